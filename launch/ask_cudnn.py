"""Ask cuDNN itself, without a GPU, whether it has the attention kernels that the benches name.

    pip install 'apt_jax[plan]'                       # and a C compiler, cc
    pip install --no-deps nvidia-cudnn-frontend       # what it depends on is not needed here
    python launch/ask_cudnn.py --json docs/results/performance/cudnn_h100_asked.json

XLA compiles a call of cuDNN for an H100 that is not there without asking cuDNN: it takes heads of 512
channels too. cuDNN's own frontend can plan and build a graph for a described device, but its libraries
want a driver. This gives them one of empty functions, a description of an H100, and builds the graphs
of the attention benches: bfloat16 forward and backward with lengths, eight bits forward with the sums
of exponentials. Two graphs must be refused, or an answer says nothing. Nothing runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CASES = ("8b_720p_joint", "wan_480p_cross", "prime_head_64")
REFUSED = {"heads of 72": 72, "heads of 512": 512}  # in eight bits
ASKING = "APT_ASK_CUDNN"  # set in the process that sees the stubs
RUNTIME = "CUDNN_FRONTEND_CUDART_LIB_NAME"  # where the frontend looks for the CUDA runtime

H100 = {
    "maxGridSize": [2**31 - 1, 65535, 65535], "maxBlockSize": [1024, 1024, 64],
    "regsPerBlock": 65536, "multiProcessorCount": 132, "warpSize": 32,
    "maxSharedMemoryPerBlock": 49152, "maxSharedMemoryPerBlockOptin": 232448,
    "reservedSharedMemoryPerBlock": 1024, "oversizedSharedMemoryPerBlock": 0,
    "maxRegistersPerSM": 65536, "maxCtasPerSM": 32, "maxThreadsPerBlock": 1024,
    "maxThreadsPerSM": 2048, "pciDeviceId": 0, "isTccDriver": 0, "supportCoopLaunch": 1,
    "totalGlobalMem": 80 * 2**30, "smClockRateKHz": 1980000, "memClockRateKHz": 2619000,
    "memoryBusWidth": 5120, "l2CacheSize": 50 * 2**20, "cudaDeviceId": 0, "deviceVer": 900,
    "driverVer": 12090, "smCountOrigin": 0, "deviceName": "NVIDIA H100 80GB HBM3"}

# The driver's functions that cuDNN looks up: those that give a handle or a number, and the others.
HANDLES = ("cuCtxGetCurrent", "cuKernelGetFunction", "cuLibraryGetKernel", "cuLibraryLoadData",
           "cuLibraryLoadFromFile", "cuModuleGetFunction", "cuModuleLoadData")
NUMBERS = ("cuKernelGetAttribute", "cuOccupancyMaxPotentialClusterSize")
OTHERS = ("cuCtxGetLimit", "cuCtxPopCurrent", "cuCtxPushCurrent", "cuDeviceGet", "cuDeviceGetCount",
          "cuDriverGetVersion", "cuGetErrorName", "cuGetErrorString", "cuKernelSetAttribute",
          "cuLaunchCooperativeKernel", "cuLaunchKernel", "cuLaunchKernelEx", "cuLibraryUnload",
          "cuLinkAddData", "cuLinkComplete", "cuLinkCreate", "cuLinkDestroy", "cuModuleUnload",
          "cuStreamGetCtx", "cuTensorMapEncodeIm2col", "cuTensorMapEncodeTiled")
DRIVER = "\n".join([
    *(f"int {name}(void **out) {{ *out = (void *)64; return 0; }}" for name in HANDLES),
    *(f"int {name}(int *out) {{ *out = 1; return 0; }}" for name in NUMBERS),
    *(f"int {name}(void) {{ return 0; }}" for name in OTHERS)])
CUDART = """
#include <string.h>
#include <driver_types.h>
static int fill(struct cudaDeviceProp *p) {
  memset(p, 0, sizeof *p); p->major = 9; p->multiProcessorCount = 132; return 0;
}
int cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) {
  *value = which == cudaDevAttrComputeCapabilityMajor ? 9 :
           which == cudaDevAttrMultiProcessorCount ? 132 : 0;
  return 0;
}
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) { return fill(p); }
int cudaGetDeviceProperties_v2(struct cudaDeviceProp *p, int device) { return fill(p); }
int cudaRuntimeGetVersion(int *v) { *v = 12090; return 0; }
int cudaDriverGetVersion(int *v) { *v = 12090; return 0; }
const char *cudaGetErrorString(int error) { return "there is no GPU"; }
const char *cudaGetErrorName(int error) { return "none"; }
"""


def wheels() -> Path:
    """The folder of NVIDIA's wheels."""
    import nvidia

    return Path(next(iter(nvidia.__path__)))


def again_with_stubs() -> int:
    """This command once more, in a process whose driver and runtime are stubs."""
    with tempfile.TemporaryDirectory() as folder:
        nvidia = wheels()
        include = [f"-I{nvidia}/cuda_runtime/include", f"-I{nvidia}/cuda_nvcc/include"]
        for name, source in (("libcuda.so.1", DRIVER), ("libcudart_stub.so", CUDART)):
            subprocess.run(["cc", "-w", "-shared", "-fPIC", *include, f"-Wl,-soname,{name}", "-x",
                            "c", "-", "-o", f"{folder}/{name}"],
                           input=source, text=True, check=True)
        path = f"{folder}:{nvidia}/cudnn/lib:{os.environ.get('LD_LIBRARY_PATH', '')}"
        env = {**os.environ, ASKING: "1", RUNTIME: f"{folder}/libcudart_stub.so",
               "LD_LIBRARY_PATH": path}
        return subprocess.run([sys.executable, __file__, *sys.argv[1:]], env=env).returncode


class Graphs:
    """Graphs of cuDNN's frontend for the described device; [B, N, heads, d] arrays throughout."""

    def __init__(self) -> None:
        import ctypes

        for library in ("cuda_nvrtc/lib/libnvrtc.so.12", "cublas/lib/libcublasLt.so.12",
                        "cudnn/lib/libcudnn_graph.so.9", "cudnn/lib/libcudnn.so.9"):
            ctypes.CDLL(str(wheels() / library), mode=ctypes.RTLD_GLOBAL)
        import cudnn

        self.cudnn = cudnn
        self.device = cudnn.create_device_properties(json.dumps(H100))

    def _graph(self, dtype):
        kinds = self.cudnn.data_type
        graph = self.cudnn.pygraph(io_data_type=dtype, intermediate_data_type=kinds.FLOAT,
                                   compute_data_type=kinds.FLOAT, device_property=self.device)

        def array(name, shape, kind=dtype):
            strides, step = [0] * 4, 1
            for axis in (3, 1, 2, 0):  # heads lie inside tokens
                strides[axis], step = step, step * shape[axis]
            return graph.tensor(name=name, dim=list(shape), stride=strides, data_type=kind)

        return graph, array

    def _out(self, tensor, like, kind):
        b, h, n, d = like
        tensor.set_output(True).set_dim([b, h, n, d]).set_stride([n * h * d, d, h * d, 1])
        tensor.set_data_type(kind)

    def _rows(self, tensor, like):
        b, h, n, _ = like
        tensor.set_output(True).set_dim([b, h, n, 1]).set_stride([h * n, n, 1, 1])
        tensor.set_data_type(self.cudnn.data_type.FLOAT)

    def eight_bits(self, q, k):
        """Forward with the sums. q, k: shapes [B, heads, N, d]."""
        kinds = self.cudnn.data_type
        graph, array = self._graph(kinds.FP8_E4M3)
        one = [array(name, (1, 1, 1, 1), kinds.FLOAT) for name in "abcdef"]
        out, sums, *largest = graph.sdpa_fp8(
            q=array("q", q), k=array("k", k), v=array("v", k), descale_q=one[0], descale_k=one[1],
            descale_v=one[2], descale_s=one[3], scale_s=one[4], scale_o=one[5],
            generate_stats=True, attn_scale=q[3] ** -0.5)
        self._out(out, q, kinds.FP8_E4M3)
        self._rows(sums, q)
        for x in largest:
            self._out(x, (1, 1, 1, 1), kinds.FLOAT)
        return graph

    def forward(self, q, k):
        """bfloat16, as many keys as a length says."""
        kinds = self.cudnn.data_type
        graph, array = self._graph(kinds.BFLOAT16)
        out, sums = graph.sdpa(
            q=array("q", q), k=array("k", k), v=array("v", k), generate_stats=True,
            attn_scale=q[3] ** -0.5, **self._lengths(array, q[0]))
        self._out(out, q, kinds.BFLOAT16)
        self._rows(sums, q)
        return graph

    def backward(self, q, k):
        """The gradients of `forward`."""
        kinds = self.cudnn.data_type
        graph, array = self._graph(kinds.BFLOAT16)
        b, h, n, _ = q
        sums = graph.tensor(name="sums", dim=[b, h, n, 1], stride=[h * n, n, 1, 1],
                            data_type=kinds.FLOAT)
        gradients = graph.sdpa_backward(
            q=array("q", q), k=array("k", k), v=array("v", k), o=array("o", q), dO=array("do", q),
            stats=sums, attn_scale=q[3] ** -0.5, **self._lengths(array, b))
        for gradient, like in zip(gradients, (q, k, k), strict=True):
            self._out(gradient, like, kinds.BFLOAT16)
        return graph

    def _lengths(self, array, batch):
        kind = self.cudnn.data_type.INT32
        return {"use_padding_mask": True, "seq_len_q": array("nq", (batch, 1, 1, 1), kind),
                "seq_len_kv": array("nk", (batch, 1, 1, 1), kind)}

    def build(self, make, q, k) -> dict:
        """A row: whether cuDNN builds a plan, and which one or why not."""
        start, row = time.perf_counter(), {"q": q, "k": k}
        try:
            graph = make(q, k)
            graph.validate()
            graph.build_operation_graph()
            graph.create_execution_plans([self.cudnn.heur_mode.A])
            graph.check_support()
            graph.build_plans()
            row |= {"built": True, "plan": graph.get_plan_name_at_index(0),
                    "workspace_bytes": graph.get_workspace_size()}
        except Exception as error:  # of cuDNN's own kinds
            row |= {"built": False, "reason": " ".join(str(error).split())[:300]}
        return row | {"seconds": time.perf_counter() - start}


def ask(results) -> bool:
    """Adds a row per graph; True where all are as they should be."""
    from apt_jax.bench.cases import CASES as KNOWN
    from apt_jax.kernels.cudnn_fp8 import TILE
    from apt_jax.kernels.peers import CUDNN_TILE

    graphs = Graphs()
    good = True

    def row(name, make, q, k, wanted=True):
        nonlocal good
        made = graphs.build(make, q, k)
        made |= {"wanted": wanted, "cudnn": graphs.cudnn.backend_version_string()}
        good &= made["built"] if wanted else "hidden_dim" in made.get("reason", "")
        results.add(name, made)
        said = made.get("plan") or made["reason"]
        print(f"{name:<36}{'built' if made['built'] else 'refused':<9}{said[:80]}", flush=True)

    for name in CASES:
        c = KNOWN[name]

        def shapes(tile, c=c):
            return [(c.batch, c.heads, n + -n % tile, c.head_dim) for n in (c.queries, c.keys)]

        row(f"{name}/forward/cudnn", graphs.forward, *shapes(CUDNN_TILE))
        row(f"{name}/backward/cudnn", graphs.backward, *shapes(CUDNN_TILE))
        row(f"{name}/forward/cudnn_fp8", graphs.eight_bits, *shapes(TILE))
    for name, dim in REFUSED.items():
        shape = (1, 24, 4096, dim)
        row(f"{name}/forward/cudnn_fp8", graphs.eight_bits, shape, shape, wanted=False)
    return good


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="keep the answers here")
    args = parser.parse_args(argv)
    if ASKING not in os.environ:
        try:
            return again_with_stubs()
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            print(f"ask_cudnn: {error}; it needs NVIDIA's wheels (pip install 'apt_jax[plan]') and "
                  "a C compiler, cc", file=sys.stderr)
            return 2
    try:
        import cudnn  # noqa: F401
    except ImportError:
        print("ask_cudnn: there is no cuDNN frontend; run: pip install --no-deps "
              "nvidia-cudnn-frontend",
              file=sys.stderr)
        return 2
    from apt_jax.bench.report import Results

    results = Results(args.json, f"{H100['deviceName']} (described)",
                      ["python", "launch/ask_cudnn.py", *sys.argv[1:]])
    return 0 if ask(results) else 1


if __name__ == "__main__":
    sys.exit(main())
