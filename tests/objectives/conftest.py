"""float64 for the tests that ask for it."""

import jax
import pytest


@pytest.fixture
def x64():
    """The test runs in float64; networks and batches come from toys.py as float64."""
    with jax.enable_x64(True):
        yield
