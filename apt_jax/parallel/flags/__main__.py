"""Print a platform's flags on one line: python -m apt_jax.parallel.flags gpu"""

import sys

from apt_jax.errors import UserError
from apt_jax.parallel.flags import environment_value


def main(arguments: list[str]) -> int:
    try:
        if len(arguments) != 1:
            raise UserError("give one platform: gpu or tpu")
        print(environment_value(arguments[0]))
    except UserError as error:
        print(f"flags: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
