"""Fixtures that several files of model tests share."""

import pytest
from networks import TINY_VAE, random_params

from apt_jax.models.vae import make_vae


@pytest.fixture(scope="module")
def tiny_vae():
    """(VAE, parameters) of `TINY_VAE`, every parameter random."""
    vae = make_vae(TINY_VAE)
    return vae, random_params(vae)
