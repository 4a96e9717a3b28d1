"""Whole programs: one-step generation, and the steps of adversarial training.

Compiled for hardware that is not there, with the kernels counted, or run on the hardware that is,
with random weights: speed does not ask what they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from apt_jax.bench.case import Case
from apt_jax.bench.cases import MARKERS
from apt_jax.bench.report import row_name
from apt_jax.bench.tables import pairs_of
from apt_jax.errors import UserError
from apt_jax.models.presets import discriminator_taps, matmul_of
from apt_jax.parallel.context import on_mesh
from apt_jax.parallel.mesh import batch_ways, make_mesh, replicated, ulysses_size
from apt_jax.parallel.sharding import abstract_like, infer_shardings
from apt_jax.plan.flops import count_flops
from apt_jax.plan.programs import reference_config, sample_shape, text_length, training_programs
from apt_jax.serve import draw_stage, served

# These keep what attention returned; under the others the backward pass runs it once more.
KEEPING = ("none", "dots", "attention", "exchange", "offload")


STEPS = ("D step", "G step")

# Matrices of one block that model.matmul = "fp8" multiplies in eight bits.
MATRICES = {"mmdit": 8, "wan": 10}
# XLA makes one product of those that share a factor where one of them reads and writes no more
# bytes (its xla_gpu_dot_merger_threshold_mb).
MERGED = 32 * 2**20


def forward_case(config: Any, devices: Sequence[Any], weights: str,
                 overrides: Sequence[str] = ()) -> Case:
    """One-step generation as `serve.Server` runs it, one sample for each copy of the mesh."""
    mesh = make_mesh(config.mesh, list(devices))
    batch, shape = batch_ways(mesh), sample_shape(config)
    text = text_length(config), config.model.text_width

    def stage(model: Any, weights: str, mesh: Any):
        parts = served(model, weights, on_mesh(mesh, config.mesh.ulysses))
        params = parts.abstract()
        params = abstract_like(params, infer_shardings(params, mesh))
        return draw_stage(parts.net, params, shape, batch, text, replicated(mesh))

    def flops() -> float:
        plain = stage({**dict(reference_config(config).model), "matmul": "dtype"}, "",
                      make_mesh({"replica": 1, "fsdp": 1}, list(devices)[:1]))
        return count_flops(plain.function, *plain.args).total

    found = stage(config.model, weights, mesh)
    eight = weights == "fp8" or (not weights and config.model.matmul == "fp8")
    backend = config.model.attention
    kind = weights or config.model.dtype + (" + fp8" if eight else "")
    return Case(row_name(config.name, "forward", kind, backend, overrides=overrides),
                "one-step inference", backend, found.function, found.args, flops,
                expected_kernels("one-step inference", config, backend),
                products(config) * (config.model.depth - config.model.matmul_kept)
                if eight else None,
                pairs_of(config), device_share("one-step inference", config), batch,
                exactly=True)


# Fields that a bench's own flags stand for.
SWITCHES = {"model.attention": "backends", "model.matmul": "weights", "discriminator.matmul": "weights"}
BATCH_FIELDS = ("train.batch_size", "train.clip_batch_size", "train.accumulate")


def _fields(overrides: Sequence[str]) -> list[str]:
    return [o.removeprefix("--").removeprefix("config.").partition("=")[0] for o in overrides]


def check_switches(overrides: Sequence[str]) -> None:
    """UserError for a field of the config that a bench sets itself, row by row."""
    for field in _fields(overrides):
        if field in SWITCHES:
            raise UserError(f"bench sets {field} itself; give --{SWITCHES[field]} instead")


def check_overrides(overrides: Sequence[str], as_trained: bool) -> None:
    """UserError where a command names the size of an update and does not ask to time it."""
    for field in _fields(overrides):
        if field in BATCH_FIELDS and not as_trained:
            raise UserError(f"bench train times one sample per copy of the mesh, whatever {field} "
                            "says; add --as-trained for the update that train runs")


def train_cases(config: Any, devices: Sequence[Any], overrides: Sequence[str] = (),
                as_trained: bool = False) -> list[Case]:
    """The D and the G step for one sample per copy of the mesh; as_trained: for the batch and the
    accumulation of the config, of its largest sample, as `train` runs them."""
    if config.stage != "adversarial":
        raise UserError(f"bench train counts the kernels of adversarial training, and the config's "
                        f"stage is {config.stage!r}; give an image or video config")
    check_overrides(overrides, as_trained)
    config = config.copy_and_resolve_references()
    ways = batch_ways(make_mesh(config.mesh, list(devices)))
    if not as_trained:
        config.train.batch_size, config.train.clip_batch_size, config.train.accumulate = ways, 0, 1
    backend = config.model.attention
    cases = []
    for program in training_programs(config, list(devices)):
        def flops(program: Any = program) -> float:
            reference, abstract = program.reference("none")
            return count_flops(reference, *abstract).total

        turns = program.microbatches
        kernels = expected_kernels(program.name, config, backend)
        eight = expected_fp8(program.name, config)
        size = [f"batch {program.samples} in {turns}"] if as_trained else []
        cases.append(Case(
            row_name(config.name, program.name, config.model.matmul, backend, *size,
                     overrides=overrides),
            program.name, backend, program.function, program.args, flops,
            {name: turns * count for name, count in kernels.items()}, eight and turns * eight,
            pairs_of(config),
            device_share(program.name, config) * (program.samples // turns // ways),
            program.samples, donates=True, weights=2))
    return cases


def products(config: Any) -> int:
    """Eight-bit products of one block's forward pass, as XLA leaves them: Wan's k and v of the text
    share its tokens and are one where they are small; so are q, k and v of few video tokens."""
    count = MATRICES[config.model.family]
    if config.model.family != "wan":
        return count  # its q, k and v are one matrix
    width, words = config.model.width, config.model.text_tokens or text_length(config)

    def small(rows: int) -> bool:  # read in eight bits, written in bfloat16
        return rows * width + width**2 + 2 * rows * width <= MERGED

    return count - small(words) - 2 * small(tokens(config) - text_length(config))


def expected_fp8(program: str, config: Any) -> int | None:
    """Eight-bit products that one call of a training step runs at least; None without fp8.

    A matrix has one forward and two in the backward pass, for its weight (merged as forward) and
    for its input; what is computed again comes on top, but for the products whose result no
    gradient needs. The G step goes through D to its video tokens: neither D's weights nor the text,
    from which Wan's second k and v come, need a gradient there.
    """
    g = config.model.depth - config.model.matmul_kept if matmul_of(config.model) == "fp8" else 0
    d = 0
    if matmul_of(config.discriminator) == "fp8":
        d = discriminator_taps(config.model, config.discriminator)[-1]
    one, whole = products(config), MATRICES[config.model.family]
    trained = 2 * one + whole
    through = one + whole - 2 * (config.model.family == "wan")
    return {"D step": g * one + d * trained, "G step": g * trained + d * through}[program] or None


def expected_kernels(program: str, config: Any, backend: str) -> dict[str, int]:
    """marker -> how often one call must run it. program: its name in `plan.programs`.

    The generator has `depth` attentions, the discriminator those up to its last tap (its heads have
    one query each, which no kernel takes). Real, perturbed and fake samples go through D at once.
    In a ring every attention takes as many turns as the ring has places, by our own kernels.
    """
    heads = config.model.heads // max(1, config.mesh.tensor)
    context = max(1, config.mesh.context)
    ring = context // ulysses_size(context, heads, config.mesh.ulysses)
    g, d = config.model.depth, discriminator_taps(config.model, config.discriminator)[-1]
    again = int(config.model.remat not in KEEPING)
    if backend == "tokamax" and config.model.remat != "none":
        again = 1  # it keeps its log-sum-exp to itself, under every policy
    forwards, backwards = {
        "one-step inference": (g, 0),
        "G step": ((g + d) * (1 + again), g + d),
        "D step": (g + d * (1 + again), d),
    }[program]
    counts = MARKERS.get("pallas" if ring > 1 else backend, {})  # none of auto and plain JAX
    each = ring + (config.model.family == "wan")  # a cross attention beside it, which needs no ring
    return {marker: each * (forwards * forward + backwards * (gradient - forward))
            for marker, (forward, gradient) in counts.items()}


def tokens(config: Any) -> int:
    """Tokens of one sample, text and video."""
    sides = zip(sample_shape(config)[:3], config.model.patch, strict=True)
    return text_length(config) + math.prod(side // patch for side, patch in sides)


def device_share(program: str, config: Any) -> int:
    """Elements of attention's result that one device should make: its part of one sample's tokens or
    heads, three times that in the D step (real, perturbed, fake)."""
    whole = tokens(config) * config.model.width
    ways = max(1, config.mesh.context) * max(1, config.mesh.tensor)
    return whole // ways * (3 if program == "D step" else 1)
