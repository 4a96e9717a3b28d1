"""Test session set-up: eight virtual CPU devices, no noise. Runs before anything imports jax."""

import gc
import importlib.metadata
import os
import shutil
import sys
import tempfile

# Importing and tracing make many objects, most of which live on: looking for dead cycles among them
# takes a tenth of the time of tests that compile. Once after each file is enough.
gc.disable()

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "--xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()
if "--xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]:
    # Tests compile much and compute little: without LLVM's expensive passes a compile takes half.
    os.environ["XLA_FLAGS"] += (
        " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )
os.environ["XLA_FLAGS"] += (
    " --xla_cpu_parallel_codegen_split_count=1 --xla_cpu_emitter_verification_level=0"
)
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # One MLIR pipeline a fusion costs more than the rest of a compile: an adversarial step of the
    # demo takes 22 s with them and 6 s without. Later versions have no other way.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
if "--xla_cpu_collective" not in os.environ["XLA_FLAGS"]:
    # Eight devices share two cores: on a busy machine they meet late, which is no deadlock.
    os.environ["XLA_FLAGS"] += (
        " --xla_cpu_collective_call_terminate_timeout_seconds=300"
        " --xla_cpu_collective_timeout_seconds=300"
    )
CACHE = "APT_TEST_PROGRAMS"
if CACHE not in os.environ:
    # Equal programs are compiled once in a session: its processes, and those that tests start, find
    # the folder in their environment. The first process removes it.
    os.environ[CACHE] = tempfile.mkdtemp(prefix="apt_jax_programs_")
    REMOVE = os.environ[CACHE]
else:
    REMOVE = None
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ[CACHE]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
os.environ.setdefault("GLOG_minloglevel", "3")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import logging  # noqa: E402

import hypothesis  # noqa: E402

assert "jax" not in sys.modules, "a plugin imported jax before the virtual devices were set"

logging.getLogger("absl").setLevel(logging.ERROR)

# Two slow cores shared with compilations: no deadlines, and the same examples in every run.
hypothesis.settings.register_profile(
    "apt", deadline=None, derandomize=True, max_examples=50, print_blob=True
)
hypothesis.settings.load_profile("apt")


def pytest_collection_modifyitems(items):
    """Files with slow tests first, so that no process ends with one alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    gc.freeze()


def pytest_runtest_teardown(item, nextitem):
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


def pytest_unconfigure():
    if REMOVE:
        shutil.rmtree(REMOVE, ignore_errors=True)
