"""The feature network against torch's numbers (fixture) and its own promises."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from apt_jax.errors import UserError
from apt_jax.eval import mobilenet

FIXTURE = Path(__file__).parent.parent / "fixtures" / "mobilenet_v2.safetensors"


@pytest.mark.parametrize("size", [32, 128])  # enlarged and (antialiased) reduced to 96 px
def test_features_equal_torch(size):
    fixture = load_file(FIXTURE)
    expected = fixture[f"features_{size}"]
    got = mobilenet.MobileNetFeatures(batch=2)(fixture[f"images_{size}"])
    assert got.shape == (2, mobilenet.FEATURES) and got.dtype == np.float32
    assert np.linalg.norm(got - expected) < 1e-4 * np.linalg.norm(expected)
    # The two pictures are told apart by far more than that tolerance.
    assert np.linalg.norm(expected[0] - expected[1]) > 1e-2 * np.linalg.norm(expected)


def test_last_batch_is_padded_not_dropped():
    images = load_file(FIXTURE)["images_32"]
    frames = np.concatenate([images, images[:1]])
    extract = mobilenet.MobileNetFeatures(batch=2)
    got = extract(frames)
    assert got.shape == (3, mobilenet.FEATURES)
    np.testing.assert_allclose(got[2], got[0], rtol=1e-5, atol=1e-6)
    assert extract.rate > 0


def test_refuses_floats():
    with pytest.raises(UserError, match="uint8"):
        mobilenet.MobileNetFeatures(batch=2)(np.zeros((1, 8, 8, 3), np.float32))
