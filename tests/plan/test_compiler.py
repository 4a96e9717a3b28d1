"""The text of programs for TPUs comes from libtpu's dump, whole or not at all."""

import tempfile
from pathlib import Path

import pytest

from apt_jax.errors import UserError
from apt_jax.plan.compiler import compile_text
from apt_jax.plan.kept import Kept
from apt_jax.plan.measure import Compiled

HELPER = "HloModule m\n\n%helper () -> s32[] {\n  ROOT %c = s32[] constant(0)\n}\n"
TEXT = HELPER + "\nENTRY %main () -> s32[] {\n  ROOT %c = s32[] constant(0)\n}\n"


class Lowered:
    """Writes what it is given, as libtpu does, and keeps the options."""

    def __init__(self, texts):
        self.texts = texts

    def compile(self, compiler_options):
        self.options = compiler_options
        for number, text in enumerate(self.texts):
            Path(compiler_options["xla_dump_to"], f"module_{number}.after_optimizations.txt").write_text(text)
        return "compiled"


def test_the_largest_module_is_the_program():
    lowered = Lowered(["HloModule helper\n}", TEXT])
    assert compile_text(lowered, {"xla_a": "true", "xla_dump_to": "mine"}, "tpu") == ("compiled", TEXT)
    assert lowered.options["xla_a"] == "true" and lowered.options["xla_dump_hlo_as_text"] is True
    assert not Path(lowered.options["xla_dump_to"]).exists()


@pytest.mark.parametrize("texts, says", [
    ([], "there is no dump"), ([TEXT[:-4]], "cut off"), ([HELPER], "cut off")])
def test_a_dump_that_is_missing_or_cut_off_is_one_line(texts, says):
    with pytest.raises(UserError, match=f"{says}; make room there, or name another folder in TMPDIR"):
        compile_text(Lowered(texts), None, "tpu")


def test_a_folder_that_cannot_be_made_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(UserError, match="Not a directory; make room"):
        compile_text(Lowered([TEXT]), None, "tpu")


@pytest.mark.parametrize("left", [TEXT[:-4], HELPER])
def test_a_kept_text_that_is_cut_off_is_one_line(tmp_path, left):
    kept = Kept(tmp_path, reuse=True)
    kept.write("D step", Compiled(TEXT, 1, 2, 3, 4, 5))
    assert kept.read("D step", {}).text == TEXT
    (tmp_path / "D_step.txt").write_text(left)
    with pytest.raises(UserError, match="D_step.txt beside it is cut off.*delete it"):
        kept.read("D step", {})
