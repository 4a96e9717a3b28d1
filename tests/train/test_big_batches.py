"""The paper's batches, 9,062 images and 2,048 clips, cut into microbatches on a mesh that neither
of them divides: every sample counts once, with its own draw, and the next one follows."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apt_jax.config import load_config, validate
from apt_jax.data.pipeline import batches, plan_of
from apt_jax.data.plan import PADDING
from apt_jax.parallel.mesh import batch_unit, check_batch, make_mesh, replicated
from apt_jax.train.feeding import put_batch, rows_of
from apt_jax.train.steps import gradient, microbatches, sample_keys

IMAGES, CLIPS = 9062, 2048
RECORDS = (2 * IMAGES + 5, CLIPS + 7)  # of images and of clips; the last batches are short
SEED = 3
CONFIGS = ("configs/seaweed_8b_image.py", "configs/seaweed_8b_video.py")


class Records:
    """A data set of one pixel a frame whose captions are the records' numbers (from 1)."""

    kind, channels, caption_dropout, records = "pixels", 3, 0.0, sum(RECORDS)
    shapes = [SimpleNamespace(frames=n, height=1, width=1) for n in (1, 2)]
    members = (np.arange(RECORDS[0]), np.arange(RECORDS[0], sum(RECORDS)))
    null_text, null_mask = np.zeros((1, 1), np.float32), np.ones(1, bool)

    def load(self, number):
        frames = 1 if number < RECORDS[0] else 2
        return {"frames": np.full((frames, 1, 1, 3), number % 256, np.uint8),
                "text": np.full((1, 1), number + 1, np.float32), "text_mask": np.ones(1, bool)}


@pytest.fixture(scope="module")
def mesh():
    """Three ways to split a batch: 9062 = 3 * 3020 + 2, 2048 = 3 * 682 + 2."""
    return make_mesh({"fsdp": 3, "context": 2}, jax.devices()[:6])


def stream(mesh, accumulate, **which):
    return batches(Records(), batch_size=IMAGES, clip_batch_size=CLIPS, seed=SEED, threads=0,
                   multiple=batch_unit(mesh, accumulate), **which)


@pytest.mark.parametrize("accumulate", [1, 53])
def test_three_processes_read_every_record_once_an_epoch_and_go_on_anywhere(mesh, accumulate):
    plan = plan_of(Records(), IMAGES, SEED, CLIPS)
    steps = plan.batches_per_epoch
    assert steps == 3 + 2

    def of(process):  # two neighbours of the six devices, which share their samples
        return lambda size: rows_of(mesh, size, accumulate, process, lambda d: d.id // 2)

    parts = [stream(mesh, accumulate, rows=of(i)) for i in range(3)]
    seen, sizes = [], []
    for step in range(steps + 1):
        rows = [next(part) for part in parts]
        index = np.concatenate([row["index"] for row in rows])
        planned = plan.batch(step).records
        filled = check_batch(mesh, len(planned), accumulate)
        assert len({len(row["index"]) for row in rows}) == 1 and len(index) == filled
        np.testing.assert_array_equal(index[:len(planned)], planned)
        assert (index[len(planned):] == PADDING).all() and filled > len(planned)
        mask = np.concatenate([row["loss_mask"] for row in rows])
        np.testing.assert_array_equal(mask, index != PADDING)
        if step < steps:
            seen.extend(index[mask > 0])
            sizes.append(len(planned))
    assert sorted(seen) == list(range(sum(RECORDS)))
    assert sorted(sizes) == [CLIPS] * 2 + [IMAGES] * 3
    last = next(stream(mesh, accumulate, start_step=steps, rows=of(2)))
    for name, value in last.items():
        np.testing.assert_array_equal(value, rows[2][name])


@pytest.mark.parametrize(("frames", "accumulate", "parts"), [
    (1, 53, 53),  # 9,063 samples, 57 at a time on each of three
    (2, 0, 683),  # 2,049 samples, one at a time on each
    (2, 12, 12),  # 2,052 samples; two microbatches wait beside each other on the context axis
])
def test_every_sample_of_an_update_counts_once_with_its_own_draw(mesh, frames, accumulate, parts):
    """The gradient of mean(u_i * w[record i]) by w is u_i / B at the records of the batch."""
    plan = plan_of(Records(), IMAGES, SEED, CLIPS)
    size = (IMAGES, CLIPS)[frames - 1]
    config = validate(load_config(CONFIGS[frames - 1], [f"--config.train.accumulate={accumulate}"]))
    assert config.train.batch_size == size and not config.train.clip_batch_size
    step = next(s for s in range(5) if plan.batch(s).bucket == frames - 1
                and (plan.batch(s).records != PADDING).all())
    batch = next(stream(mesh, accumulate, start_step=step))
    filled = len(batch["index"])
    assert filled == check_batch(mesh, size, accumulate) > size
    assert microbatches(accumulate, filled, mesh) == parts
    key = jax.random.key_data(jax.random.key(1))

    def loss(params, part, keys):
        record = part["text"][:, 0, 0].astype(jnp.int32)  # [b], 0 for an empty sample
        draw = jax.vmap(jax.random.uniform)(keys)
        return params[record] * draw, {}

    @jax.jit
    def run(params, on_device):
        return gradient(loss, params, on_device, sample_keys(key, jnp.int32(step), 0, filled),
                        microbatches=parts, mesh=mesh, shardings=replicated(mesh))

    zeros = jnp.zeros(sum(RECORDS) + 1)
    found, means = run(jax.device_put(zeros, replicated(mesh)), put_batch(batch, mesh, accumulate))
    draws = jax.vmap(jax.random.uniform)(sample_keys(key, jnp.int32(step), 0, size))
    want = np.zeros(sum(RECORDS) + 1)
    want[plan.batch(step).records + 1] = np.asarray(draws) / size
    assert np.count_nonzero(want) == size
    np.testing.assert_allclose(np.asarray(found), want, rtol=1e-6)
    assert means["loss"] == 0
