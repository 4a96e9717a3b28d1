"""The command line: help, one-line errors, exit codes, quick start."""

import logging
import os
import subprocess
import sys
import time

import pytest

from apt_jax import __version__
from apt_jax.cli import main as cli
from apt_jax.errors import UserError


def run(capsys, *arguments):
    code = cli.main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def one_line(err: str) -> str:
    assert err.startswith("apt-jax: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_overview_lists_every_command(capsys, arguments):
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    for name in ("train", "sample", "evaluate", "report", "prepare"):
        assert f"  {name}" in out


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_help_of_a_command_is_complete(name, capsys):
    """Every flag has a help text, and there are examples."""
    with pytest.raises(SystemExit) as leave:
        cli.main([name, "--help"])
    assert leave.value.code == 0
    out = capsys.readouterr().out
    assert "examples:\n" in out and out.count(f"apt-jax {name} ") > 1
    parser, _ = cli.command_parser(name)
    for action in parser._actions:
        assert action.help, f"{name} {action.option_strings} has no help"
        assert all(option in out for option in action.option_strings)


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_examples_in_the_help_parse(name):
    import shlex

    parser, module = cli.command_parser(name)
    lines = module.EXAMPLES.replace("\\\n", " ").strip().splitlines()
    assert lines
    for line in lines:
        program, command, *arguments = shlex.split(line)
        assert program == "apt-jax"
        cli.parse_command(command, arguments)


def test_train_help_lists_every_config_field(capsys):
    from apt_jax.config.schema import FIELDS

    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    out = capsys.readouterr().out
    for field in FIELDS:
        assert f"--config.{field.key} " in out and field.help in out
    assert "FILE[:ARG]" in out and "emoji_64.py:image" in out


def test_what_the_package_logs_is_shown_once(capsys, caplog, monkeypatch):
    """An import of a command may add a handler to the root logger; afterwards all is as it was."""
    log, root = logging.getLogger("apt_jax"), logging.getLogger()
    before = list(log.handlers), log.level, log.propagate

    def command(arguments):
        root.addHandler(added := logging.StreamHandler(sys.stderr))
        try:
            log.warning("told")
        finally:
            root.removeHandler(added)
        return 0

    monkeypatch.setattr(cli, "dispatch", command)
    assert run(capsys, "train") == (0, "", "told\n")
    assert (list(log.handlers), log.level, log.propagate) == before
    log.warning("to the library's user")
    assert caplog.messages == ["to the library's user"]


def test_version(capsys):
    assert run(capsys, "--version")[:2] == (0, f"apt_jax {__version__}\n")


@pytest.mark.parametrize("arguments, words", [
    (["trian"], ["'trian'", "'train'"]),
    (["--hepl"], ["'--hepl'", "'--help'"]),
    (["train", "--config", "a.py", "--workdir", "b", "--steps", "3"],
     ["'--steps'", "'--config.train.steps'"]),
    (["train", "--config", "a.py", "--workdir", "b", "--batch-size=3"],
     ["'--batch-size'", "'--config.train.batch_size'"]),
    (["train", "--workdir", "runs/x"], ["--config", "apt-jax train --help"]),
    (["train", "--config", "configs/none.py", "--workdir", "runs/x"], ["does not exist"]),
    (["train", "--config", "configs/demo_image.py", "--workdri", "runs/x", "--workdir", "runs/x"],
     ["'--workdri'", "'--workdir'"]),
    (["train", "--config", "configs/demo_image.py", "--workdir", "runs/x", "--confg.seed=1"],
     ["'--confg.seed'"]),
    (["train", "--config", "configs/demo_image.py", "--workdir", "runs/x", "--config.sed=1"],
     ["'sed'", "'seed'"]),
    (["train", "--config", "configs/demo_image.py", "--workdir", "runs/x",
      "--config.optimizer.learning_rate=fast"], ["optimizer.learning_rate", "'fast'"]),
    (["train", "--config", "configs/demo_image.py", "--workdir", "runs/x",
      "--config.discriminator.taps=9"], ["discriminator.taps", "model.depth"]),
    (["train", "--config", "configs/demo_image.py", "--workdir", "runs/x", "extra"], ["'extra'"]),
    (["sample", "--prompt", "cat"], ["--checkpoint"]),
    (["sample", "--checkpoint", "runs/none", "--prompt", "cat"], ["runs/none"]),
    (["sample", "--checkpoint", "x", "--prompt", "cat", "--seed", "many"], ["--seed", "'many'"]),
    (["sample", "--checkpoint", "x", "--prompt", "a", "--config.seed=1"], ["no config overrides"]),
    (["sample", "--checkpoint", "x", "--prompt", "cat", "--mode", "one_step", "--steps", "4"],
     ["--mode one_step", "4"]),
    (["sample", "--checkpoint", "x", "--prompt", "cat", "--steps", "0"], ["--steps 0"]),
])
def test_a_wrong_input_is_one_line_and_exit_2(capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(os.path.join(os.path.dirname(__file__), "..", ".."))
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == ""
    for word in words:
        assert word in one_line(err), err
    assert not os.path.exists("runs/x")


def test_overrides_reach_the_command():
    args, _ = cli.parse_command("train", [
        "--config", "c.py:video", "--config.seed", "3", "--workdir", "runs/x",
        "--config.train.steps=5"])
    assert args.config == "c.py:video" and args.workdir == "runs/x"
    assert args.overrides == ["--config.seed=3", "--config.train.steps=5"]


def test_interrupt_is_130_and_a_bug_keeps_its_traceback(capsys, monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "dispatch", interrupted)
    assert run(capsys, "train")[0] == 130

    def broken(arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "dispatch", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


@pytest.mark.parametrize("command, error, words", [
    ("train", RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n  more"),
     ["little memory (Out of memory allocating 9 bytes); lower train.batch_size", "model.remat"]),
    ("sample", RuntimeError("RESOURCE_EXHAUSTED: x"), ["(x); give a smaller --height and --width"]),
    ("evaluate", MemoryError(), ["too little memory; ask for less"])])
def test_too_little_memory_is_one_line_and_exit_1(capsys, monkeypatch, command, error, words):
    def full(arguments):
        raise error

    monkeypatch.setattr(cli, "dispatch", full)
    code, _, err = run(capsys, command)
    assert code == 1
    for word in words:
        assert word in one_line(err), err


def test_a_leading_tilde_is_the_home_folder_everywhere(tmp_path, monkeypatch):
    """A shell expands it in a word of its own, not in --out=~/x or --config.init.generator=~/x."""
    import shutil

    from apt_jax.weights import folders, generator_card, load_discriminator

    monkeypatch.setenv("HOME", str(tmp_path))
    for words, name in ((["report", "~/a"], "directory"),
                        (["train", "--config=~/a", "--workdir=x"], "config"),
                        (["train", "--config=x", "--workdir=~/a"], "workdir"),
                        (["prepare", "--source=~/a", "--out=x"], "source"),
                        (["sample", "--checkpoint=~/a", "--prompt=~/b"], "checkpoint")):
        args, _ = cli.parse_command(words[0], words[1:])
        assert getattr(args, name) == str(tmp_path / "a")
    assert args.prompt == ["~/b"]
    base = folders.__file__.replace("weights/folders.py", "assets/base")
    shutil.copytree(base, tmp_path / "base")
    assert folders.generator_folder("~/base") == tmp_path / "base" and generator_card("~/base")
    with pytest.raises(UserError, match=f"{tmp_path}/base' is no run folder"):
        load_discriminator("~/base", {})


def test_a_bug_that_is_no_lack_of_memory_keeps_its_traceback(monkeypatch):
    for text in ("INTERNAL: x", "RESOURCE_EXHAUSTED: Shared memory size limit exceeded"):
        def broken(arguments, text=text):
            raise RuntimeError(text)

        monkeypatch.setattr(cli, "dispatch", broken)
        with pytest.raises(RuntimeError, match=text):
            cli.main(["train"])


@pytest.mark.parametrize("command", [
    ["bench", "attention", "--cases", "one_query", "--backends", "oracle"],
    ["train", "--config", "configs/demo_image.py"]])
def test_a_package_that_is_missing_is_one_line(command):
    """As on a machine with jax and nothing of ours: the config's package is needed first."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['ml_collections'] = None\n"
         "from apt_jax.cli.main import main; sys.exit(main(sys.argv[1:]))", *command],
        capture_output=True, text=True)
    assert done.returncode == 2
    assert "ml_collections is not installed" in one_line(done.stderr)


def test_user_error_is_always_one_line():
    assert str(UserError("a\n  b\tc")) == "a b c"


def test_module_and_script_start_quickly_without_jax():
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "apt_jax", "--help"],
        capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    assert "commands:" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "apt_jax.cli.main" in imported and not imported & {"jax", "flax", "numpy", "grain"}
    assert seconds < 5


@pytest.mark.parametrize("mode, steps, chosen", [
    (None, None, ("one_step", None)), (None, 1, ("one_step", None)), (None, 2, ("two_step", None)),
    (None, 25, ("euler", 25)), ("euler", None, ("euler", None)), ("euler", 2, ("euler", 2)),
    ("two_step", 2, ("two_step", None)), ("one_step", 1, ("one_step", None)),
])
def test_mode_from_steps(mode, steps, chosen):
    from apt_jax.cli.sample import choose_mode

    assert choose_mode(mode, steps) == chosen
