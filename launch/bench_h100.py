"""The measurements of docs/performance.md on one H100, in three groups that can be stopped and continued.

    python launch/bench_h100.py attention        # kernels and one block
    python launch/bench_h100.py inference        # one-step 8B, VAE, whole pipeline
    python launch/bench_h100.py training         # the G and the D step on full-width layers

A group runs `apt-jax bench` commands one after another; every case is written to
docs/results/performance/ as soon as it is measured. After --minutes (9) the group ends; the same
command goes on with the cases that are missing, and measures again what other sources made.
Needs pip install 'apt_jax[cuda,tokamax]'; PyTorch with CUDA and diffusers for the peers.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "docs/results/performance"
ONE = ["--config.mesh.replica=1", "--config.mesh.fsdp=1", "--config.mesh.context=1"]
VIDEO_8B = ["--config", "configs/seaweed_8b_video.py", *ONE]
WAN = ["--config", "configs/wan_1_3b_apt_video.py", *ONE]
KERNELS = ["--backends", "tokamax", "cudnn", "cudnn_fp8", "pallas"]
BOTH = ["--weights", "bfloat16", "fp8"]
# Full-width layers of G, D, their masters, moments and average that one GPU holds.
FEW = ["--config.model.depth=4", "--config.discriminator.taps=2,3,4"]


def saved(name: str) -> list[str]:
    return ["--json", f"{RESULTS}/{name}_h100.json"]


GROUPS: dict[str, list[list[str]]] = {
    "attention": [
        ["attention", "--cases", "8b_720p_joint", "8b_720p_no_mask", "16k", "wan_480p_self",
         "--seconds", "1", *saved("attention")],
        ["block", *VIDEO_8B, *BOTH, *KERNELS, "--seconds", "1", *saved("block_8b")],
        ["attention", "--seconds", "1", *saved("attention")],  # the other shapes
    ],
    "inference": [
        ["forward", *VIDEO_8B, *BOTH, *KERNELS, *saved("forward_8b")],
        ["vae", *VIDEO_8B, *saved("vae")],
        ["pipeline", *VIDEO_8B, *BOTH, "--backends", "tokamax", "cudnn_fp8",
         *saved("pipeline_8b")],
        ["forward", *WAN, *BOTH, *KERNELS, *saved("forward_wan")],
    ],
    "training": [
        ["train", *VIDEO_8B, *FEW, *BOTH, "--backends", "tokamax", "pallas", *saved("train_8b")],
        ["train", *VIDEO_8B, *FEW, "--config.model.remat=attention", "--backends", "cudnn",
         "pallas", "--no-peers", *saved("train_8b")],
        ["train", *WAN, "--backends", "tokamax", "pallas", *saved("train_wan")],
    ],
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--minutes", type=float, default=9.0, help="end the group after these")
    parser.add_argument("--device-less", action="store_true",
                        help="compile every case of the group for an H100 that is not there")
    args = parser.parse_args(argv)
    end, status = time.monotonic() + 60 * args.minutes, 0
    for command in GROUPS[args.group]:
        if args.device_less:
            command = compiled_only(command)
        line = [sys.executable, "-m", "apt_jax", "bench", *command]
        print("$ apt-jax bench", *command, flush=True)
        try:
            left = end - time.monotonic()
            status |= subprocess.run(line, cwd=ROOT, timeout=max(left, 1.0)).returncode
        except subprocess.TimeoutExpired:
            print(f"{args.minutes:g} minutes are over; the same command goes on from here")
            return 75  # as sysexits.h calls it: try again
    return status


def compiled_only(command: list[str]) -> list[str]:
    """The same cases, compiled: written beside the measured ones, by the kernels that there are."""
    return [part.replace("_h100.json", "_h100_compiled.json") for part in command
            if part != "--no-peers"] + ["--device-less", "--topology", "h100:1x1"]


if __name__ == "__main__":
    raise SystemExit(main())
