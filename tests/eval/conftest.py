"""The feature network is compiled with a few of LLVM's passes here: it does much for a test."""

import pytest

from apt_jax.eval import mobilenet


@pytest.fixture(scope="session", autouse=True)
def features_in_vector_code():
    """Without any (tests/conftest.py) a frame takes 14 ms; this compiles for 2 s longer and takes 2.6."""
    def options(platform, real=mobilenet.cpu_options):
        return {**real(platform), "xla_backend_optimization_level": 1}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mobilenet, "cpu_options", options)
        yield
