"""The `apt-jax` command line: finds the subcommand, parses its flags, prints errors in one line.

A subcommand is a module `apt_jax.cli.NAME` with

    add_arguments(parser)   adds its flags; a module docstring and EXAMPLES become its --help
    run(args) -> int|None   does the work; args.overrides is the list of --config.key=value
    OVERRIDES               (optional) groups of config fields it takes without --config, ("mesh.",)
    describe_config()       help on its config, where that is not a training config

and is imported only when it is asked for, so that `apt-jax --help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from apt_jax.cli.ending import CRASHED, WRONG, complain, left, memory_error
from apt_jax.errors import UserError

COMMANDS = {
    "train": "train one stage: pretrain, consistency or adversarial",
    "sample": "draw images or clips from prompts",
    "evaluate": "measure samples against the data: Frechet distance, KID, sharpness",
    "report": "write a self-contained HTML page of a study",
    "plan": "compile a run for devices that are not there: memory, traffic, time",
    "bench": "time the parts beside their peers, or compile them for hardware that is not there",
    "convert": "take PyTorch checkpoints in, give one-step diffusers folders out",
    "prepare": "turn a folder of captioned images and clips into a data set",
}

_PATHS = ("DIR", "FILE", "FILE[:ARG]", "PATH")  # metavars of flags that name files

OVERVIEW_EXAMPLES = """\
examples:
  apt-jax train --config configs/demo_image.py --workdir runs/image
  apt-jax train --config configs/demo_image.py --workdir runs/image --config.train.steps=50
  apt-jax sample --checkpoint runs/image --prompt "red heart" --out runs/hearts
  apt-jax COMMAND --help
"""


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors: one line, no usage dump."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see '{self.prog} --help'")


def _overview() -> _Parser:
    lines = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
    parser = _Parser(
        prog="apt-jax",
        usage="apt-jax COMMAND [flags]",
        description="One-step text-to-image and text-to-video by adversarial post-training.\n\n"
                    f"commands:\n{lines}",
        epilog=OVERVIEW_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    return parser


def command_parser(name: str) -> tuple[_Parser, object]:
    """The parser of one subcommand, complete with its help, and the module that runs it."""
    module = importlib.import_module(f"apt_jax.cli.{name}")
    parser = _Parser(
        prog=f"apt-jax {name}",
        description=(module.__doc__ or COMMANDS[name]).strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    parts = [parser.epilog or ""]
    if getattr(module, "EXAMPLES", ""):
        parts.append("examples:\n" + module.EXAMPLES.rstrip())
    if _takes_config(parser):
        from apt_jax.config.schema import describe_fields

        describe = getattr(module, "describe_config", describe_fields)
        parts.append("config overrides (key and default):\n" + describe())
    parser.epilog = "\n\n".join(part for part in parts if part)
    return parser, module


def _takes_config(parser: argparse.ArgumentParser) -> bool:
    return any("--config" in action.option_strings for action in parser._actions)


def _field_of(flag: str, command: str) -> str:
    """The config field that a flag was meant for by its last part (--steps: train.steps), or ''.

    Of several that of the command's own group, else the first.
    """
    from apt_jax.config.schema import BY_KEY

    leaf = flag.removeprefix("--").replace("-", "_")
    keys = [key for key in BY_KEY if key.rsplit(".", 1)[-1] == leaf]
    return next((key for key in keys if key == f"{command}.{leaf}"), keys[0] if keys else "")


def parse_command(name: str, arguments: Sequence[str]) -> tuple[argparse.Namespace, object]:
    """Parses a subcommand's flags into (args, module). UserError for anything left over."""
    from apt_jax.config.load import nearest, split_overrides

    parser, module = command_parser(name)
    overrides, rest = split_overrides(arguments)
    groups = getattr(module, "OVERRIDES", ())
    if not _takes_config(parser):
        for override in overrides:
            if not override.removeprefix("--config.").startswith(tuple(groups)):
                only = f" but those of {', '.join(g.rstrip('.') for g in groups)}" if groups else ""
                raise UserError(f"apt-jax {name} takes no config overrides{only}, but got "
                                f"{override}; see 'apt-jax {name} --help'")
    args, unknown = parser.parse_known_args(rest)
    if unknown:
        flags = [o for a in parser._actions for o in a.option_strings if o.startswith("--")]
        first = unknown[0]
        if first.startswith("-"):
            flag = first.split("=", 1)[0]
            meant = _field_of(flag, name) if _takes_config(parser) and not hasattr(
                module, "describe_config") else ""
            raise UserError(f"unknown flag {flag!r}" + (
                f", did you mean '--config.{meant}'?" if meant else nearest(flag, flags)))
        raise UserError(f"unexpected argument {first!r}; see 'apt-jax {name} --help'")
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if action.metavar in _PATHS and isinstance(value, str):
            setattr(args, action.dest, os.path.expanduser(value))  # --out=~/x reaches us as it is
    args.overrides = overrides
    return args, module


def dispatch(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit status; raises UserError for a wrong one."""
    if not arguments or arguments[0] in ("-h", "--help"):
        _overview().print_help()
        return 0
    name, *rest = arguments
    if name == "--version":
        from apt_jax import __version__

        print(f"apt_jax {__version__}")
        return 0
    if name not in COMMANDS:
        from apt_jax.config.load import nearest

        what = "flag" if name.startswith("-") else "command"
        known = ["--help", "--version"] if what == "flag" else list(COMMANDS)
        raise UserError(f"unknown {what} {name!r}{nearest(name, known)}")
    args, module = parse_command(name, rest)
    return int(module.run(args) or 0)


class _Stderr(logging.Handler):
    """Messages as they are, on whatever sys.stderr is when they come."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


@contextlib.contextmanager
def _shown_log() -> Iterator[None]:
    """What the package logs (warnings, an automatic choice) is for whoever typed the command.

    Once, also where an import gives the root logger a handler of its own.
    """
    log = logging.getLogger("apt_jax")
    before, handler = (log.level, log.propagate), _Stderr()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before[0])
        log.propagate = before[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Status: 0 done, 2 a wrong input (one line on stderr), 1 too little memory (one
    line) or a bug, 130 interrupted."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _shown_log():
            return left(dispatch(arguments))
    except UserError as error:
        complain(error)
        return left(WRONG)
    except ModuleNotFoundError as error:
        if (error.name or "apt_jax").partition(".")[0] == "apt_jax":
            raise
        complain(UserError(f"{error.name} is not installed and this command needs it; run: pip "
                           "install apt_jax, or without a network as docs/benches.md says"))
        return left(WRONG)
    except (MemoryError, RuntimeError) as error:  # jax's own kind is a RuntimeError
        if (line := memory_error(error, arguments[0] if arguments else "")) is None:
            raise
        complain(line)
        return left(CRASHED)
    except KeyboardInterrupt:
        print("apt-jax: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `apt-jax ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
