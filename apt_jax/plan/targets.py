"""The targets of the committed plans against what was found, and why those that are missed are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from apt_jax.plan.measure import UNREAD
from apt_jax.plan.programs import INFERENCE

PEAKS = (  # (result, what, most GiB at the peak of a training step)
    ("seaweed_8b_video_h100_1x8", "8B video fits 8 H100s at <= 70 GiB, one clip per 4 GPUs", 70.0),
    ("seaweed_8b_video_h100_8x8", "8B video on 64 H100s at <= 40 GiB", 40.0),
)
CONTEXT_TARGET = 1.05
HIDDEN_TARGET = 0.995  # 100%, rounded
_SUM = re.compile(r"all-reduce over ([\w+]+), .* of (\d+) MiB, (\S+) times")


class Reason(NamedTuple):
    """mark: stands in the table. what: "gathers", "sums" or "tokens". plans, steps: patterns of
    names that it explains; the first that matches counts."""

    mark: str
    what: str
    plans: str
    steps: str
    text: str


REASONS = (
    Reason("a", "tokens", r".*_video_.*", r".*",
           "Tokens: with remat `attention` (and Wan 1.3B's `full`) the backward pass sends a layer's "
           "four arrays a second time, 12 where 8 would do in a layer that takes a gradient. "
           "Keeping them is remat `exchange`: five arrays a layer and sample, 36 GiB more in the"
           " 8B D step of four devices a clip, 54 in Wan 14B's of eight, neither of which an "
           "H100 has left. The 8B stage with eight devices a clip has it (`context_8`, which "
           "sends 1.00 of the least)."),
    Reason("b", "gathers", r".*_v(5p|6e)_.*", r".*",
           "TPUs: gathers run on the sparse cores, beside the products, but the first of each layer "
           "begins with its layer and has nothing to hide behind ([plan.md](../plan.md) has what "
           "was tried)."),
    Reason("c", "sums", r".*_image_(v5p_4x8x8|v6e_16x16)", r"D step",
           "Images on 256 TPUs, D: two sums a microbatch of three arrays [3, 128, 3072], the three "
           "heads' vectors for the 128 samples of a copy, which libtpu collects by a sum of their "
           "parts. No matrix's gradient is in it."),
    Reason("d", "sums", r"seaweed_8b_video_h100_128x8", r"D step",
           "1,024 H100s: one sum over replica+fsdp, the gradients of the heads' three output "
           "matrices, 56 MiB once a microbatch, 10 ms of 52 s and hidden."),
    Reason("e", "gathers", r"seaweed_8b_image_h100_128x8", r"G step",
           "Images on 1,024 H100s: of every two layers of the backward loop one gather has to "
           "end before the sum over the copies may begin (XLA has one of them under way at a "
           "time), which leaves it the products of q, k and v to hide behind: 36% of 1.1 ms."),
    Reason("f", "gathers", r"wan_14b_.*", r"D step",
           "Wan 14B: the gathers of backward loops are synchronous, for want of memory to gather"
           " ahead into: from four hosts on overlap is given 56% of what is left "
           "(`gpu_hosts.txt`, for the 40 GiB of the 8B stage), and a clip of 75,600 tokens takes "
           "that for itself. What it costs is 0.6% of the step. With remat `full` and 80% "
           "(`--flags`) all were hidden, at 55.1 GiB; the config spends the memory on remat "
           "`attention`, which saves 18% of the update."),
    Reason("g", "gathers", r"seaweed_8b_video_h100_8x8_context_8", r"G step",
           "`context_8`, G step: a gather of a MiB or more is hidden by 95% or more of its time."),
)
OTHERS = """
Not misses, but to be known. Memory: XLA's scheduler spends on overlap what it is given of what the
arguments leave: 105% of 80% of the chip's on few hosts, 56% from four hosts on (`gpu_hosts.txt`),
where XLA's own 95% took 59 GiB for the same hidden gathers. Gathers: those of a loop travel a layer
ahead, beside that layer's products; the first layer of each loop (there is one between two taps)
has nothing to wait behind, and its gather comes once a microbatch. On 1,024 devices the layers'
reduce-scatters wait, for the sum over the copies that follows them. Float32 gathers: of the 8B
stages and of 64 to 212 MiB over context alone, the samples whose turn has come; of Wan besides, of
each network once a microbatch, its time modulation (601 MiB of 14B, 54 of 1.3B), which Wan computes
in float32: less than 0.05% of the step. Sums over context alone, Wan 14B's: the gradients of the
text's keys and values, 10 MiB a layer, which every device of a clip holds in full; no parameter's.
"""


def parameter_gathers(program: Mapping[str, Any]) -> tuple[float, float]:
    """(seconds of a call, the part of them that is hidden) of the gathers inside the layers."""
    rows = [t for t in program["steady_collectives"] if t["kind"] == "all-gather"]
    total = sum(t["seconds"] for t in rows)
    return total, sum(t["seconds"] * t["overlapped"] for t in rows) / total if total else 1.0


def sums(program: Mapping[str, Any]) -> list[tuple[str, int, float]]:
    """(axes, MiB, times) of the all-reduces that were noted: over fsdp, where a reduce-scatter
    would do, or over context."""
    found = map(_SUM.match, program["notes"])
    return [(m.group(1), int(m.group(2)), float(m.group(3))) for m in found if m]


def over_fsdp(program: Mapping[str, Any]) -> list[tuple[str, int, float]]:
    """Those of `sums` over fsdp, whatever else."""
    return [row for row in sums(program) if "fsdp" in row[0].split("+")]


def tokens_ratio(program: Mapping[str, Any]) -> float | None:
    """Bytes sent over context against the least possible; 0 where nothing is sent, None where the
    least is not known."""
    least, sent = program["context_minimum_gib"], program["context_gib"]
    if least:
        return sent / least
    return None if least is None or sent else 0.0


def training_steps(results: Mapping[str, dict]) -> Iterator[tuple[str, str, dict]]:
    """(plan, step, program) of every training step that compiled for several devices."""
    for name, result in results.items():
        if result["plan"]["devices"] > 1:
            for label, program in result["plan"]["programs"].items():
                if label != INFERENCE and not program["refused"]:
                    yield name, label, program


def missed(program: Mapping[str, Any]) -> list[str]:
    """Which of "gathers", "sums", "tokens" miss their targets."""
    total, hidden = parameter_gathers(program)
    return [what for what, miss in (
        ("gathers", total > 0 and hidden < HIDDEN_TARGET), ("sums", bool(over_fsdp(program))),
        ("tokens", (tokens_ratio(program) or 0.0) > CONTEXT_TARGET)) if miss]


def unjudged(program: Mapping[str, Any]) -> list[str]:
    """Which of them cannot be said to be met: the least is not known, or not all could be read."""
    unread = any(UNREAD in note for note in program["notes"])
    return [what for what, unknown in (
        ("gathers", unread), ("sums", unread), ("tokens", unread or tokens_ratio(program) is None))
        if unknown and what not in missed(program)]


def reason(name: str, label: str, what: str) -> Reason | None:
    """Why this step of this plan misses that target, where it was found out."""
    return next((r for r in REASONS if r.what == what and re.fullmatch(r.plans, name)
                 and re.fullmatch(r.steps, label)), None)
