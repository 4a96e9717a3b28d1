"""What is written whole or not at all never replaces what is read."""

import pytest

from apt_jax.convert.folders import new_folder
from apt_jax.errors import UserError


@pytest.mark.parametrize("to", ["run", ".", "run/../run"])
def test_the_input_is_never_replaced(tmp_path, to):
    source = tmp_path / "run"
    source.mkdir()
    (source / "weights").write_text("precious")
    with pytest.raises(UserError, match="give another --to"):
        with new_folder(tmp_path / to, True, (None, source)):
            raise AssertionError("nothing may be written")
    assert (source / "weights").read_text() == "precious"


def test_a_folder_inside_the_input_or_beside_it_is_fine(tmp_path):
    source = tmp_path / "run"
    source.mkdir()
    for to in (source / "export", tmp_path / "out"):
        with new_folder(to, False, (source,)) as part:
            (part / "a").write_text("new")
        assert (to / "a").read_text() == "new"


def test_a_block_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ValueError):
        with new_folder(tmp_path / "out", False):
            raise ValueError
    assert not list(tmp_path.iterdir())
