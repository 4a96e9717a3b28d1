"""Configs survive JSON exactly."""

import json

import ml_collections
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_jax.config import (
    apply_overrides,
    base_config,
    config_from_json,
    config_to_json,
    load_json,
    save_json,
    validate,
)
from apt_jax.errors import UserError


def same(a, b) -> bool:
    """Equal values of equal types, down to the leaves."""
    if isinstance(a, ml_collections.ConfigDict):
        return (isinstance(b, ml_collections.ConfigDict) and set(a) == set(b)
                and all(same(a[k], b[k]) for k in a))
    return type(a) is type(b) and a == b


def test_default_config_round_trips_with_types(tmp_path):
    config = base_config()
    apply_overrides(config, ["discriminator.taps=2,4", "optimizer.learning_rate=3e-05"])
    save_json(config, tmp_path / "run" / "config.json")
    back = load_json(tmp_path / "run" / "config.json")
    assert same(config, back) and validate(back).is_locked
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.json"]
    assert config_to_json(back) == config_to_json(config)


leaf = st.one_of(st.booleans(), st.integers(-2**60, 2**60), st.text(max_size=8),
                 st.floats(allow_nan=False, allow_infinity=False))
value = st.one_of(leaf, st.lists(leaf, max_size=4).map(tuple))


@given(st.dictionaries(st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True), value, max_size=6))
def test_any_config_round_trips(fields):
    fields = {f"x{key}": v for key, v in fields.items()}  # clear of ConfigDict's own method names
    config = ml_collections.ConfigDict(fields)
    assert same(config, config_from_json(config_to_json(config)))


def test_json_is_plain(tmp_path):
    data = json.loads(config_to_json(base_config()))
    assert data["train"]["steps"] == base_config().train.steps


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"3", b"{\xff", b"[" * 100_000,
                                  b'{"a.b": 1}', b'{"a": {"__tuple__": 5}}'])
def test_damaged_json_is_one_line(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(UserError, match="config.json"):
        load_json(path)
    with pytest.raises(UserError, match="cannot read"):
        load_json(tmp_path / "none.json")


def test_what_json_cannot_keep_is_refused():
    with pytest.raises(UserError, match="set"):
        config_to_json(ml_collections.ConfigDict({"a": {1, 2}}))
