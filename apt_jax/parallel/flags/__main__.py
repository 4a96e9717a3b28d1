"""Print a platform's flags on one line.

    python -m apt_jax.parallel.flags gpu            for XLA_FLAGS (tpu: LIBTPU_INIT_ARGS)
    python -m apt_jax.parallel.flags gpu --hosts 8  for a run on eight hosts
    python -m apt_jax.parallel.flags gpu --known    only those that the installed XLA knows; all
                                                    where it cannot be asked
    python -m apt_jax.parallel.flags gpu --check    status 2 if it lacks one
"""

import argparse
import sys

from apt_jax.errors import UserError
from apt_jax.parallel.flags import environment_value, platform_flags
from apt_jax.parallel.flags.check import known_value, unknown_flags


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m apt_jax.parallel.flags", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("platform", help="gpu or tpu")
    parser.add_argument("--hosts", type=int, default=1, metavar="N",
                        help="how many hosts the run has (default: 1)")
    asks = parser.add_mutually_exclusive_group()
    asks.add_argument("--known", action="store_true")
    asks.add_argument("--check", action="store_true")
    args = parser.parse_args(arguments)
    try:
        flags = platform_flags(args.platform, args.hosts)
        if args.check:
            if unknown := unknown_flags(args.platform, flags):
                raise UserError(
                    f"the installed XLA does not know {', '.join(unknown)}; take "
                    f"{'them' if len(unknown) > 1 else 'it'} out of {args.platform}.txt")
            print(f"the installed XLA knows all {len(flags)} flags of {args.platform}")
        elif args.known:
            print(known_value(args.platform, args.hosts,
                              lambda line: print(f"flags: {line}", file=sys.stderr)))
        else:
            print(environment_value(args.platform, args.hosts))
    except UserError as error:
        print(f"flags: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
