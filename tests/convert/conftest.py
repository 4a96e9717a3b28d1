"""The folders that several test files read, made once."""

import pytest
import synthetic


@pytest.fixture(scope="session")
def wan_source(tmp_path_factory):
    """A Wan pipeline folder (no torch), its transformer in several files with two dtypes."""
    folder = tmp_path_factory.mktemp("source") / "tiny-wan"
    tensors = synthetic.write_pipeline(folder, synthetic.WAN, limit=60_000,
                                       odd=("norm", "scale_shift", "time_"))
    return folder, tensors


@pytest.fixture(scope="session")
def wan_components(wan_source, tmp_path_factory):
    """The same, imported."""
    from apt_jax.convert.importing import import_folder

    return import_folder(str(wan_source[0]), tmp_path_factory.mktemp("ckpt") / "wan")
