"""Devices of hardware that is not there: topology descriptions that the real XLA compiles for.

TPUs come from libtpu, NVIDIA GPUs from jax's CUDA plugin with a description of the chip; neither
needs a driver. Set up the environment (`prepare_environment`) before jax makes a backend.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

from apt_jax.errors import UserError
from apt_jax.plan.chips import Topology

# GpuTargetConfig of the chip that the compiler should imagine (its public data sheet). Without a CUDA
# runtime of 12 or later it widens products of float8 to bfloat16.
_SM90 = """\
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{name}"
"""
_NAMES = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}
# By default libtpu describes every core of a v4 as a device; jax runs the two of a chip as one.
_ONE_DEVICE_A_CHIP = {"v4": {"chip_config_name": "megacore"}}
_CUDA_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
# Autotuning needs the GPU itself; without it Triton matrix products would be chosen blindly. The third
# is one of parallel/flags/gpu.txt that decides how often a kernel is in a program.
CUDA_FLAGS = ("--xla_gpu_autotune_level=0", "--xla_gpu_enable_triton_gemm=false",
              "--xla_gpu_enable_dynamic_slice_fusion=false")
# For programs that nobody runs: their memory and schedule are fixed before kernels become machine
# code, and optimising that code takes half of the time.
UNRUN_FLAGS = ("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true",
               "--xla_gpu_disable_gpuasm_optimizations=true")


def prepare_environment(unrun: bool = False) -> None:
    """Environment variables that must be set before jax starts: CPU as backend, quiet plugins.

    unrun: nobody looks at the kernels of what is compiled, or at the lines of source they come from.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")  # what matters is the topology's name
    # Without a chip nothing is shared, so two compilations may run at a time.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if unrun:
        os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
    flags = os.environ.get("XLA_FLAGS", "").split()
    for flag in CUDA_FLAGS + (UNRUN_FLAGS if unrun else ()):
        if not any(f.split("=")[0] == flag.split("=")[0] for f in flags):
            flags.append(flag)
    os.environ["XLA_FLAGS"] = " ".join(flags)


def describe(topology: Topology) -> list[Any]:
    """The devices of a topology, in the order in which a mesh should take them.

    Raises UserError where the compiler for them is not installed, or does not know the topology.
    """
    from jax.experimental import topologies

    if topology.chip.kind == "cuda":
        return list(topologies.get_topology_desc(**_cuda(topology)).devices)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("planning for TPUs needs libtpu; run: pip install 'apt_jax[plan]'")
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.text,
            **_ONE_DEVICE_A_CHIP.get(topology.chip.name, {}))
    except Exception as error:  # whatever libtpu says of a slice that does not exist
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"libtpu knows no slice {topology.text} ({reason})") from None
    return list(found.devices)


def _cuda(topology: Topology) -> dict[str, Any]:
    for name in _CUDA_PLUGINS:
        try:
            importlib.import_module(name)
            break
        except ImportError:
            continue
    else:
        raise UserError("planning for GPUs needs jax's CUDA plugin (no driver); run: "
                        "pip install 'apt_jax[plan]'")
    chip = topology.chip
    target = _SM90.format(bandwidth=int(chip.bandwidth), memory=chip.memory,
                          name=_NAMES[chip.name])
    hosts, devices = topology.sizes
    # slices x hosts x GPUs: with real devices jax calls every host a slice, so here too.
    return {"platform": "cuda", "topology_name": chip.name, "target_config": target,
            "topology": f"{hosts}x1x{devices}"}


@contextlib.contextmanager
def elsewhere(device: Any) -> Iterator[None]:
    """Kernels are chosen and built for `device`, which need not be there."""
    from apt_jax.kernels.choice import Hardware, choosing

    with contextlib.ExitStack() as stack:
        stack.enter_context(choosing(hardware=Hardware.of(device)))
        if device.platform == "gpu":
            stack.enter_context(_mesh_of(device))
            stack.enter_context(_tokamax_for(device))
        yield


def _mesh_of(device: Any) -> contextlib.AbstractContextManager[Any]:
    """A mesh without axes that says the chip.

    From 0.11 on jax's Pallas asks the mesh, else the devices that are there. A program over several
    devices brings a mesh that says it too.
    """
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    chip = AbstractDevice(device_kind=device.device_kind, platform=device.platform,
                          num_cores=getattr(device, "core_count", None))
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=chip))


@contextlib.contextmanager
def _tokamax_for(device: Any) -> Iterator[None]:
    """tokamax asks jax for the default device; for a while the answer is this one."""
    import jax.extend.backend as extend

    from apt_jax.kernels.peers import prepare_tokamax

    try:
        from tokamax._src.config import cross_compile
    except ImportError:  # not installed, which its refusal will say
        yield
        return
    prepare_tokamax()
    answer = extend.get_default_device
    extend.get_default_device = lambda: device
    try:
        with cross_compile("true"):
            yield
    finally:
        extend.get_default_device = answer
