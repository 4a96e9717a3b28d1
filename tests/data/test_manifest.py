"""The manifest is read strictly; every fault is one line for the user."""

import copy
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_jax.data import manifest as m
from apt_jax.data.bundled import resolve
from apt_jax.data.quantise import quantise
from apt_jax.errors import UserError


def example():
    prompt = m.Prompt("", *quantise(np.random.default_rng(0).normal(size=(2, 4))))
    bucket = m.Bucket("train", 1, 8, 8, 5, (m.Shard("a.arrayrecord", 5, 100, "0" * 64),))
    return m.Manifest("x", "hash", 4, 16, prompt, None, {"train": 5}, (bucket,), 0, (), {})


def test_round_trip():
    text = example().dumps()
    assert m.parse(json.loads(text)).dumps() == text


def test_the_bundled_manifest_is_canonical_and_its_hashes_hold():
    folder = resolve("bundled:emoji")
    manifest = m.load(folder, check_hashes=True)
    assert manifest.dumps() == (folder / m.FILE).read_text("utf-8")


def places(value, path=()):
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*path, key)
            yield from places(inner, (*path, key))


PLACES = list(places({k: v for k, v in json.loads(example().dumps()).items() if k != "made"}))
JUNK = st.sampled_from([None, -1, 1.5, "", "../x", [], {}, [1], {"a": 1}, True, "9" * 70])


@given(st.sampled_from(PLACES), JUNK)
def test_junk_anywhere_is_a_user_error_or_valid(path, junk):
    value = json.loads(example().dumps())
    node = value
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = junk
    try:
        m.parse(copy.deepcopy(value))
    except UserError as error:
        assert "\n" not in str(error) and ";" in str(error)
    else:  # what was put there is allowed: free text, a list of no notices, another number
        assert path[-1] in ("name", "encoder", "prompt", "negative", "notices", "max_tokens",
                            "skipped", "file")


@given(st.sampled_from([p for p in PLACES if isinstance(p[-1], str)]))
def test_a_missing_key_is_named(path):
    value = json.loads(example().dumps())
    node = value
    for key in path[:-1]:
        node = node[key]
    del node[path[-1]]
    with pytest.raises(UserError, match=str(path[-1])):
        m.parse(value)


@pytest.mark.parametrize("change, words", [
    (lambda v: v.update(version=3), "version"),
    (lambda v: v.update(extra=1), "extra"),
    (lambda v: v["splits"].update(train=6), "disagrees"),
    (lambda v: v["splits"].update(other=1), "disagrees"),
    (lambda v: v["buckets"].append(v["buckets"][0]), "twice"),
    (lambda v: v["buckets"][0].update(records=4), "sum"),
    (lambda v: v["buckets"][0]["shards"][0].update(file="../a"), "not allowed"),
    (lambda v: v["buckets"][0]["shards"][0].update(file="/etc/passwd"), "not allowed"),
    (lambda v: v["text"]["null"].update(tokens=3), "bytes"),
    (lambda v: v["text"]["null"].update(values="!!"), "base64"),
])
def test_faults_are_named(change, words):
    value = json.loads(example().dumps())
    change(value)
    with pytest.raises(UserError, match=words):
        m.parse(value)


def test_files_are_checked(tmp_path):
    with pytest.raises(UserError, match="apt-jax prepare"):
        m.load(tmp_path)
    (tmp_path / m.FILE).write_text("{")
    with pytest.raises(UserError, match="JSON"):
        m.load(tmp_path)
    (tmp_path / m.FILE).write_text(example().dumps())
    with pytest.raises(UserError, match="missing"):
        m.load(tmp_path)
    (tmp_path / "a.arrayrecord").write_bytes(b"x" * 99)
    with pytest.raises(UserError, match="99 bytes"):
        m.load(tmp_path)
    (tmp_path / "a.arrayrecord").write_bytes(b"x" * 100)
    m.load(tmp_path)
    with pytest.raises(UserError, match="sha256"):
        m.load(tmp_path, check_hashes=True)
