"""What a run waits for at its first save, and what it says of a checkpoint that it cannot read."""

import errno
import os

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny import emoji_config, tiny_config

from apt_jax.config import save_json
from apt_jax.errors import UserError
from apt_jax.parallel.mesh import make_mesh
from apt_jax.parallel.sharding import path_string
from apt_jax.train.checkpoint import SHARED_WRITING, Checkpoints
from apt_jax.train.state import set_up
from apt_jax.weights import load_generator, open_generator, runs


def test_small_copies_are_written_without_a_program_for_each(tmp_path):
    mesh = jax.make_mesh((8,), ("fsdp",))
    copied = NamedSharding(mesh, PartitionSpec())
    cut = NamedSharding(mesh, PartitionSpec("fsdp"))
    rng = np.random.default_rng(0)
    state = {f"bias{n}": jax.device_put(rng.normal(size=(n, 24)), copied) for n in (8, 16, 24)}
    state["matrix"] = jax.device_put(rng.normal(size=(64, 3)), cut)
    state["step"] = jax.device_put(np.int32(1), copied)
    large = jax.device_put(np.arange(8 * SHARED_WRITING // 4, dtype=np.float32), copied)
    compiled = []
    listener = lambda event, _, **__: compiled.append(event)  # noqa: E731
    second = state | {"step": jax.device_put(np.int32(2), copied), "large": large}
    checkpoints = Checkpoints(tmp_path, emoji_config())

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        checkpoints.save(1, state, {}, 2.0)
        checkpoints.wait()
        assert not [event for event in compiled if "backend_compile" in event]
        checkpoints.save(2, second, {}, 4.0)
        checkpoints.wait()
        assert [event for event in compiled if "backend_compile" in event]  # that is how it shows
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)

    restored = checkpoints.restore(jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), second))
    checkpoints.close()
    assert (restored.step, restored.seconds) == (2, 4.0)
    for name in ("bias16", "matrix"):
        np.testing.assert_array_equal(restored.state[name], state[name])
    np.testing.assert_array_equal(restored.state["large"], large)


# -- reading ---------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    """(checkpoints, folder, abstract state) of a run with the untrained steps 1 and 2."""
    from apt_jax.models.presets import make_generator

    config = emoji_config()
    save_json(config, tmp_path / "config.json")
    one = make_generator(config.model).init(jax.random.key(0))
    checkpoints = Checkpoints(tmp_path, config)
    for step in (1, 2):
        state = {"generator": one, "generator_ema": one, "step": jax.numpy.int32(step)}
        checkpoints.save(step, state, {}, 0.0)
        checkpoints.wait()
    yield checkpoints, tmp_path, jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    checkpoints.close()


PASSING = [
    OSError(errno.ESTALE, os.strerror(errno.ESTALE)),
    MemoryError("no memory"),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."),
    ValueError(f"Error reading a file [os_error_code='{errno.EIO}' source locations='a.cc:7']"),
]


def failing(monkeypatch, owner, name, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize("error", PASSING, ids=lambda error: type(error).__name__)
def test_a_checkpoint_that_may_be_whole_stays_where_it_is(two, monkeypatch, error):
    checkpoints, folder, abstract = two
    failing(monkeypatch, Checkpoints, "_read_from", error)
    with pytest.raises(type(error)) as raised:
        checkpoints.restore(abstract)
    assert raised.value is error and "nothing was moved" in error.__notes__[-1]
    failing(monkeypatch, runs, "_read_checkpoint", error)
    with pytest.raises(type(error)):
        load_generator(folder)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["1", "2"]
    assert not (folder / "broken_checkpoints").exists()


def test_one_that_may_not_be_read_is_an_error_of_one_line(two, monkeypatch):
    checkpoints, folder, abstract = two
    error = PermissionError(errno.EACCES, "Permission denied", str(folder / "x"))
    failing(monkeypatch, Checkpoints, "_read_from", error)
    failing(monkeypatch, runs, "_read_checkpoint", error)
    for call in (lambda: checkpoints.restore(abstract), lambda: load_generator(folder)):
        with pytest.raises(UserError, match="x cannot be read .Permission denied.; change its perm"):
            call()
    assert not (folder / "broken_checkpoints").exists()


def test_another_process_that_cannot_read_just_now_stops_all_for_another_start(two, monkeypatch):
    from apt_jax.train import checkpoint

    monkeypatch.setattr(checkpoint, "everywhere", lambda value: (
        [value, checkpoint.NOT_NOW] if value == checkpoint.GOOD else [value]))
    with pytest.raises(RuntimeError, match="process 1 could not read .*checkpoints/2 just now"):
        two[0].restore(two[2])


def test_a_leaf_that_is_damaged_is_named_when_it_is_read(two, monkeypatch):
    _, folder, _ = two
    _, leaves = open_generator(folder).__enter__()
    assert leaves.read("proj_out/kernel").size
    failing(monkeypatch, runs, "_read_checkpoint", ValueError("DATA_LOSS"))
    with pytest.raises(UserError, match="checkpoints/2 is damaged: 'proj_out/bias' cannot be read"):
        leaves.read("proj_out/bias")


def test_a_leaf_that_the_checkpoint_lacks_is_named(two):
    from apt_jax.weights.common import flatten, make_abstract, unflatten

    _, folder, _ = two
    flat = flatten(make_abstract(emoji_config().model))
    more = unflatten({**flat, "proj_out/gate": flat["proj_out/bias"]})
    with pytest.raises(UserError, match="lacks parameter 'proj_out/gate'"):
        runs.newest(folder, "ema", more)


# -- a rate that begins or ceases to change --------------------------------------------------------


FALLS = {"optimizer__final_rate": 0.1, "optimizer__warmup_steps": 3}


@pytest.mark.parametrize("mode", ["train", "rate"])
@pytest.mark.parametrize(("there", "here"), [({}, FALLS), (FALLS, {})], ids=["falls", "stays"])
def test_a_run_goes_on_with_a_rate_that_changes_or_no_longer_does(tmp_path, mode, there, here):
    mesh = make_mesh({"replica": 1, "fsdp": 8})
    config, other = (tiny_config("adversarial", discriminator__backbone=mode, **overrides)
                     for overrides in (there, here))
    setup, wanted = (set_up(c, mesh, min_elements=1) for c in (config, other))
    numbers = iter(range(1, 1000))
    state = jax.tree.map(lambda leaf: jax.device_put(
        np.full(leaf.shape, next(numbers), leaf.dtype), leaf.sharding), setup.abstract)
    state["step"] = jax.device_put(np.int32(3), setup.abstract["step"].sharding)
    said = []
    saving, reading = Checkpoints(tmp_path, config), None
    try:
        saving.save(3, state, {}, 0.0)
        saving.wait()
        reading = Checkpoints(tmp_path, other, said.append)
        restored = reading.restore(wanted.abstract).state
    finally:
        saving.close()
        if reading:
            reading.close()
    assert len(said) == 2 and "final_rate" in "".join(said) and "warmup_steps" in "".join(said)
    before = {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    counts = 0
    assert jax.tree.structure(restored) == jax.tree.structure(wanted.abstract)
    for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
        name = path_string(path)
        if name in before:
            np.testing.assert_array_equal(leaf, before[name], name)
        else:
            assert name.endswith("count") and leaf == 3, name
            counts += 1
    assert counts == (len(here) > 0) * (2 if mode == "train" else 3)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted.abstract)
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == shardings
