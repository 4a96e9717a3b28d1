"""Generation: noise by index only, whatever the batch and the method; padding; modes."""

import numpy as np
import pytest

from apt_jax.errors import UserError
from apt_jax.eval.generate import Generation, generate, sample_noise

SHAPE = (2, 4, 4, 3)


def _net(params, x, t, text, mask):
    """v = z - target(text) at every t: any straight sampler ends at the text's own colour."""
    target = (text * mask[..., None]).mean((1, 2))[:, None, None, None, None]
    return params["scale"] * (x - target) / t[:, None, None, None, None]


def _inputs(n=5):
    text = np.broadcast_to(np.linspace(-1, 1, n)[:, None, None], (n, 3, 6)).astype(np.float32)
    return {"scale": np.float32(1)}, text, np.ones((n, 3), bool)


def test_noise_depends_on_seed_index_and_stream_only():
    index = np.array([3, 0, 7])
    z = sample_noise(1, index, SHAPE)
    np.testing.assert_array_equal(sample_noise(1, np.array([7, 9]), SHAPE)[0], z[2])
    assert np.abs(sample_noise(2, index, SHAPE) - z).max() > 0.1
    assert np.abs(sample_noise(1, index, SHAPE, stream=1) - z).max() > 0.1
    assert abs(np.asarray(sample_noise(0, np.arange(400), SHAPE)).std() - 1) < 0.02


@pytest.mark.parametrize("mode", ["one_step", "two_step", "euler"])
def test_every_mode_reaches_the_target_and_batches_do_not_matter(mode):
    params, text, mask = _inputs()
    null = {"null_text": np.zeros_like(text[0]), "null_mask": np.zeros_like(mask[0])}
    whole = generate(_net, params, text, mask, SHAPE, mode, batch=8, **null)
    parts = generate(_net, params, text, mask, SHAPE, mode, batch=2, **null)
    assert whole.shape == (5, *SHAPE) and whole.dtype == np.uint8
    np.testing.assert_array_equal(whole, parts)  # 5 = 2 + 2 + 1: the last one is padded
    expected = np.rint((np.linspace(-1, 1, 5) + 1) * 127.5)
    assert np.abs(whole.mean((1, 2, 3, 4)) - expected).max() <= 1


def test_weights_change_samples_without_compiling_anew():
    params, text, mask = _inputs()
    sampler = Generation(_net, "one_step", batch=4)
    full = sampler(params, text, mask, SHAPE)
    half = sampler({"scale": np.float32(0.5)}, text, mask, SHAPE)
    assert np.abs(full.astype(int) - half).max() > 10
    assert sampler._program._cache_size() == 1 and sampler.seconds > 0


def test_guidance_is_no_new_program_and_counts():
    params, text, mask = _inputs()
    sampler = Generation(_net, "euler", steps=3, batch=8)
    null = {"null_text": np.zeros_like(text[0]), "null_mask": np.zeros_like(mask[0])}
    weak = sampler(params, text, mask, SHAPE, guidance=1.0, **null)
    strong = sampler(params, text, mask, SHAPE, guidance=0.5, **null)
    assert sampler._program._cache_size() == 1
    assert np.abs(strong.mean((1, 2, 3, 4)) - 127.5).max() < np.abs(
        weak.mean((1, 2, 3, 4)) - 127.5).max()


def test_first_continues_a_set():
    params, text, mask = _inputs(4)
    params = {"scale": np.float32(0.5)}  # the noise stays visible
    sampler = Generation(_net, "one_step", batch=2)
    whole = sampler(params, text, mask, SHAPE, seed=3)
    tail = sampler(params, text[2:], mask[2:], SHAPE, seed=3, first=2)
    np.testing.assert_array_equal(whole[2:], tail)


def test_counts_and_seeds_that_cannot_be_are_refused():
    params, text, mask = _inputs()
    for batch in (0, -1):  # would leave frames as the memory was
        with pytest.raises(UserError, match=f"batch = {batch}"):
            generate(_net, params, text, mask, SHAPE, "one_step", batch=batch)
    with pytest.raises(UserError, match="no caption"):
        generate(_net, params, text[:0], mask[:0], SHAPE, "one_step")
    with pytest.raises(UserError, match="seed = 2147483648"):
        generate(_net, params, text, mask, SHAPE, "one_step", seed=2**31)
    assert len(generate(_net, params, text, mask, SHAPE, "one_step", seed=2**31 - 1)) == 5


def test_wrong_mode_and_missing_null_are_refused():
    with pytest.raises(UserError, match="one_step"):
        Generation(_net, "three_step")
    params, text, mask = _inputs()
    with pytest.raises(UserError, match="null_text"):
        generate(_net, params, text, mask, SHAPE, "euler")
