"""The measurements of docs/benches.md on one H100 or H200, in groups that can be stopped and continued.

    python launch/check_kernels.py               # first: do the kernels compute attention there?
    python launch/bench_h100.py first            # of each group what matters most
    python launch/bench_h100.py attention        # kernels and one block
    python launch/bench_h100.py inference        # one-step 8B, VAE, whole pipeline
    python launch/bench_h100.py training         # the G and the D step on full-width layers

A group runs `apt-jax bench` commands one after another; every case is written to --out, into files
with the GPU's name, as soon as it is measured. After --minutes (9) the group ends; the same command
goes on with the cases that are missing, and measures again what other sources or configs made (but
with --keep-rows), and last what failed. A command whose process a row broke, or that wrote nothing
for --patience seconds, goes on at once in another. Each training step has a process of its own,
since a device reports the peak of memory of a whole process: rows say it beside what the compiler
planned. --cache keeps every compiled program, so that a command which was stopped goes on from there
too, and a trace of each row. Needs pip install 'apt_jax[cuda,tokamax]'; PyTorch with CUDA and
diffusers for the peers. What is not installed is left out with a line; docs/benches.md says how
to carry wheels to a machine without a network.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from apt_jax.bench.rows import cut_off, forget  # noqa: E402
from apt_jax.cli.bench import AGAIN, MORE  # noqa: E402

RESULTS = ROOT / "docs" / "results" / "performance"
ONE = ["--config.mesh.replica=1", "--config.mesh.fsdp=1", "--config.mesh.context=1"]
VIDEO_8B = ["--config", "configs/seaweed_8b_video.py", *ONE]
# 81 frames of 480 x 832; its configs take whatever sizes a data set has
WAN = ["--config", "configs/wan_1_3b_apt_video.py", *ONE, "--config.data.height=60",
       "--config.data.width=104"]
# What trains; where tokamax is not installed its rows say so, and the others are measured.
TRAINING = ["--backends", "tokamax", "cudnn", "hopper", "pallas"]
KERNELS = [*TRAINING, "cudnn_fp8"]
BOTH = ["--weights", "bfloat16", "fp8"]
EACH = ["--rows", "1"]
PROCESSES = 4  # of a command, where rows break them (or a signal ends them)
# Full-width layers of G, D, their masters, moments and average that one GPU holds.
FEW = ["--config.model.depth=4", "--config.discriminator.taps=2,3,4"]

BRIEF = ["--seconds", "1"]
LARGE = ["--cases", "8b_720p_joint", "8b_720p_no_mask"]

# group -> (name of the file, command), in the order in which they matter. Rows of `first` are the
# others' too: whoever has more time measures only what is missing.
GROUPS: dict[str, list[tuple[str, list[str]]]] = {
    "first": [
        ("attention", ["attention", *LARGE, "--backends", "hopper", "cudnn", "tokamax", "torch",
                       *BRIEF]),
        ("forward_8b", ["forward", *VIDEO_8B, *BOTH, "--backends", "hopper", "--no-peers", *BRIEF]),
        ("train_8b", ["train", *VIDEO_8B, *FEW, "--backends", "hopper", "--no-peers", *EACH,
                      *BRIEF]),
        # its stages hold the VAE's time
        ("pipeline_8b", ["pipeline", *VIDEO_8B, "--weights", "fp8", "--backends", "hopper", *BRIEF]),
        ("forward_8b", ["forward", *VIDEO_8B, *BOTH, "--backends", "tokamax", "cudnn_fp8",
                        "--no-peers", *BRIEF]),
        ("forward_8b", ["forward", *VIDEO_8B, "--backends", "hopper", *BRIEF]),  # PyTorch's beside it
        ("train_8b", ["train", *VIDEO_8B, *FEW, "--backends", "tokamax", "--no-peers", *EACH,
                      *BRIEF]),
        ("vae", ["vae", *VIDEO_8B, "--decoders", "chunk 1", "chunk 2", "--no-peers", *BRIEF]),
    ],
    "attention": [
        ("attention", ["attention", "--cases", "8b_720p_joint", "8b_720p_no_mask", "16k",
                       "wan_480p_self", "--seconds", "1"]),
        ("block_8b", ["block", *VIDEO_8B, *BOTH, *KERNELS, "--seconds", "1"]),
        ("attention", ["attention", "--seconds", "1"]),  # the other shapes
    ],
    "inference": [
        ("forward_8b", ["forward", *VIDEO_8B, *BOTH, *KERNELS]),
        ("vae", ["vae", *VIDEO_8B]),
        ("pipeline_8b", ["pipeline", *VIDEO_8B, *BOTH, *KERNELS]),
        ("forward_wan", ["forward", *WAN, *BOTH, *KERNELS]),
    ],
    "training": [
        # the config's remat: attention
        ("train_8b", ["train", *VIDEO_8B, *FEW, *BOTH, *TRAINING, *EACH]),
        ("train_8b", ["train", *VIDEO_8B, *FEW, "--config.model.remat=full", *TRAINING,
                      "--no-peers", *EACH]),
        ("train_wan", ["train", *WAN, *TRAINING, *EACH]),
    ],
}


# All of these run on one GPU, which has no transfers to hide: with the scheduler that hides them the D
# step of `FEW` holds 44.0 GiB beside its arguments, without it 39.3 (compiled).
ALONE = "--xla_gpu_enable_latency_hiding_scheduler=false"
KERNEL_PATIENCE = 90.0  # seconds for a row of one kernel, whose program is small
SILENT = 75  # a process that was ended for its silence, as one that lost its device (AGAIN)


def command(name: str, arguments: list[str], out: Path, cache: Path, gpu: str = "h100",
            device_less: bool = False, keep: bool = False, traces: bool = True) -> list[str]:
    """The arguments of `apt-jax bench`, with the file of its rows in `out` and traces in `cache`.
    device_less: the same cases, compiled: written beside the measured ones. keep: rows of other
    sources count."""
    if not device_less:
        return [*arguments, "--json", str(out / f"{name}_{gpu}.json"),
                *(["--profile", str(cache / "profile")] if traces else []),
                *(["--keep-rows"] if keep else [])]
    for option in ("--rows", "--seconds"):  # of what is timed
        place = arguments.index(option) if option in arguments else len(arguments)
        arguments = arguments[:place] + arguments[place + 2:]
    return [*(a for a in arguments if a not in ("--no-peers", "torch")), "--json",
            str(out / f"{name}_{gpu}_compiled.json"), "--device-less", "--topology", f"{gpu}:1x1"]


def without(arguments: list[str], names: Collection[str]) -> list[str]:
    """The arguments less these backends; where none is left of those that were named, cuDNN's, or our
    Triton kernel's, or none: attention in plain jax."""
    if "--backends" not in arguments:
        return arguments
    first = arguments.index("--backends") + 1
    last = next((i for i in range(first, len(arguments)) if arguments[i].startswith("--")),
                len(arguments))
    left = [name for name in arguments[first:last] if name not in names]
    instead = next((name for name in ("cudnn", "pallas") if name not in names), "oracle")
    return [*arguments[:first], *(left or [instead]), *arguments[last:]]


def environment(cache: Path, flags: str = "") -> dict[str, str]:
    """This process's, jax's cache of every program that it compiles in `cache`, and XLA's flags, less
    those that the environment has in its own way."""
    own = os.environ.get("XLA_FLAGS", "").split()
    said = {flag.split("=")[0] for flag in own}
    xla = " ".join([*(f for f in flags.split() if f.split("=")[0] not in said), *own])
    return {"JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", **os.environ,
            **({"XLA_FLAGS": xla} if xla else {})}


def known_flags() -> str:
    """The package's flags for GPUs, as it tells users to export them, that the installed XLA knows,
    for one GPU; each row holds them."""
    from apt_jax.parallel.flags.check import known_value

    found = known_value("gpu", 1, lambda line: print(f"flags: {line}", flush=True)).split()
    return " ".join([*(f for f in found if f.split("=")[0] != ALONE.split("=")[0]), ALONE])


def gpu_name() -> str:
    """"h100", "h200", or what else nvidia-smi calls the first GPU, in letters for a file's name."""
    try:
        said = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
                              capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    if not said.strip():
        raise SystemExit("bench_h100: nvidia-smi names no GPU here; --device-less compiles the cases "
                         "without one")
    name = said.splitlines()[0].lower()
    return next((chip for chip in ("h100", "h200") if chip in name),
                re.sub(r"[^a-z0-9]+", "_", name).strip("_"))


def run(line: list[str], env: dict[str, str], end: float, patience: float, file: Path) -> int | None:
    """Runs a command. Returns its status; None where the time `end` came before; SILENT where its
    process was ended, `file` having stayed as it was for `patience` seconds."""
    began = time.time()
    # A group of its own, to end all of it; not a session, in which it would outlive whoever ends us.
    process = subprocess.Popen(line, cwd=ROOT, env=env, process_group=0)
    try:
        while True:
            try:
                return process.wait(timeout=max(0.0, min(1.0, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                pass
            if time.monotonic() >= end:
                return None
            if time.time() - max(began, file.stat().st_mtime if file.exists() else 0) > patience:
                print(f"nothing for {patience:g} s: the process is ended, its row counts as failed",
                      flush=True)
                return SILENT
    finally:
        if process.poll() is None:  # with what it started: PyTorch compiles in processes of its own
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--minutes", type=float, default=9.0, help="end the group after these")
    parser.add_argument("--patience", type=float, default=240.0, metavar="S",
                        help="end a process that keeps no row for so long, of kernels alone for 90 "
                             "at most (default: 240)")
    parser.add_argument("--without", nargs="+", default=[], choices=KERNELS[1:], metavar="NAME",
                        help="leave out kernels that check_kernels.py found wrong; where a command "
                             f"names no other, cuDNN's is measured. Of {', '.join(KERNELS[1:])}")
    parser.add_argument("--no-profile", action="store_true", help="no traces")
    parser.add_argument("--keep-rows", action="store_true",
                        help="rows that other sources made count too; each says which")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR",
                        help="where the results go (default: docs/results/performance)")
    parser.add_argument("--cache", type=Path, metavar="DIR",
                        help="where programs and traces are kept (default: .cache/bench_h100 beside "
                             "this checkout's folders)")
    parser.add_argument("--device-less", action="store_true",
                        help="compile every case of the group for an H100 that is not there")
    args = parser.parse_args(argv)
    end, status = time.monotonic() + 60 * args.minutes, 0
    out = args.out.resolve()
    cache = (args.cache or ROOT / ".cache" / "bench_h100").resolve()
    gpu = "h100" if args.device_less else gpu_name()
    env = environment(cache / "programs", "" if args.device_less else known_flags())
    for name, arguments in GROUPS[args.group]:
        patience = args.patience
        if arguments[0] == "attention":
            patience = min(patience, KERNEL_PATIENCE)
        arguments = command(name, without(arguments, args.without), out, cache, gpu,
                            args.device_less, args.keep_rows, not args.no_profile)
        file = Path(arguments[arguments.index("--json") + 1])
        broken = 0
        while broken < PROCESSES:
            print("$ apt-jax bench", *arguments, flush=True)
            before = cut_off(file)
            found = run([sys.executable, "-m", "apt_jax", "bench", *arguments], env, end,
                        patience, file)
            if found is None:  # the row that the clock cut off did not fail: it is missing
                forget(file, cut_off(file) - before)
                print(f"{args.minutes:g} minutes are over; the same command goes on from here")
                return AGAIN
            if found == MORE:
                continue
            if found != AGAIN and found >= 0:
                break
            broken += 1
        status |= 1 if found < 0 or found == AGAIN else found
    return status


if __name__ == "__main__":
    # Ended from outside it ends its bench too, which would keep the GPU.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    raise SystemExit(main())
