"""Whole programs: one-step generation, and the steps of adversarial training.

Compiled for hardware that is not there, with the attention kernels counted, or run on the hardware
that is, with random weights: speed does not ask what they are.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from apt_jax.bench.attention import peak_of
from apt_jax.bench.cases import MARKERS
from apt_jax.bench.device_less import Compiled, complaint, count_kernels, elsewhere
from apt_jax.bench.timing import measure
from apt_jax.errors import UserError
from apt_jax.models.presets import discriminator_taps
from apt_jax.parallel.mesh import batch_ways, make_mesh, ulysses_size
from apt_jax.plan.flops import count_flops
from apt_jax.plan.programs import (
    Program,
    inference_program,
    sample_shape,
    text_length,
    training_programs,
)

# These keep what attention returned; under the others the backward pass runs it once more.
KEEPING = ("none", "attention", "offload")


def build(what: str, config: Any, devices: Sequence[Any]) -> list[Program]:
    """The programs of "forward" (one-step generation) or "train" for one sample per copy of the mesh."""
    batch = batch_ways(make_mesh(config.mesh, devices))
    if what == "forward":
        return [inference_program(config, list(devices), batch, compute_copy=True)]
    if config.stage != "adversarial":
        raise UserError(f"bench train counts the kernels of adversarial training, and the config's "
                        f"stage is {config.stage!r}; give an image or video config")
    config.train.batch_size, config.train.accumulate = batch, 1
    return training_programs(config, list(devices))


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
    return {marker: ring * (forwards * forward + backwards * (gradient - forward))
            for marker, (forward, gradient) in MARKERS["pallas" if ring > 1 else backend].items()}


def tokens(config: Any) -> int:
    """Tokens of one sample, text and video."""
    count = text_length(config)
    frames, height, width, _ = sample_shape(config)
    grid = 1
    for side, patch in zip((frames, height, width), config.model.patch, strict=True):
        grid *= side // patch
    return count + grid


def device_share(program: str, config: Any) -> int:
    """Elements of attention's result that one device should make: its part of one sample's tokens or
    heads, three times that in the D step (real, perturbed, fake)."""
    whole = tokens(config) * config.model.width
    ways = max(1, config.mesh.context) * max(1, config.mesh.tensor)
    return whole // ways * (3 if program == "D step" else 1)


def compile_program(program: Program, config: Any, backend: str, device: Any, label: str
                    ) -> Compiled:
    """Compiles one program for a device that is not there and checks its kernels."""
    wanted, scores = expected_kernels(program.name, config, backend), tokens(config) ** 2
    start = time.perf_counter()
    with elsewhere(device):
        compiled = program.function.lower(*program.args).compile()
    kernels, largest, result = count_kernels(compiled.as_text(), list(wanted))
    error = complaint(kernels, wanted, largest, scores)
    share = device_share(program.name, config)
    if not error and result > 1.1 * share:
        error = f"a kernel makes {result} elements on one device, whose share is {share}"
    return Compiled(
        case=label, backend=backend, part=program.name, device=device.device_kind, kernels=kernels,
        wanted=wanted, largest=largest, scores=scores,
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
        seconds=time.perf_counter() - start, error=error)


def time_program(program: Program, device: str, seconds: float) -> dict[str, Any]:
    """Runs a program that donates nothing on random arrays of its arguments' shapes."""
    def fill(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jax.device_put(jnp.ones(leaf.shape, leaf.dtype), leaf.sharding)
        make = jax.jit(lambda key: 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype),
                       out_shardings=leaf.sharding)
        return make(jax.random.key(leaf.size % 1009))

    args = jax.tree.map(fill, program.args)
    timing = measure(program.function, [args], jax.block_until_ready, seconds=seconds)
    reference, abstract = program.reference("none")
    flops, peak = count_flops(reference, *abstract).total, peak_of(device)
    return {**dataclasses.asdict(timing), "batch": args[1].shape[0], "tflop": flops / 1e12,
            "tflops": flops / timing.median / 1e12,
            "share_of_peak": flops / timing.median / peak if peak else None}


def compile_all(what: str, config_of: Callable[[str], Any], backends: Sequence[str],
                devices: Sequence[Any], label: str,
                done: Callable[[Compiled], None] = lambda row: None) -> list[Compiled]:
    """Every program by every backend. config_of(backend): a fresh config with that attention."""
    rows = []
    for backend in backends:
        config = config_of(backend)
        for program in build(what, config, devices):
            row = compile_program(program, config, backend, devices[0], label)
            rows.append(row)
            done(row)
    return rows
