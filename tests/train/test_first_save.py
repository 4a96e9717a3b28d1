"""What a run waits for at its first save."""

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tiny import emoji_config

from apt_jax.train.checkpoint import SHARED_WRITING, Checkpoints


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
