"""The programs of a run, built abstractly on the devices of a topology and compiled there.

Every program is the one that training and sampling run: the same steps, shardings and kernels. Only
the arrays are missing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from apt_jax.data.pipeline import size_field
from apt_jax.errors import UserError
from apt_jax.eval.generate import Generation
from apt_jax.models.presets import discriminator_taps, make_generator
from apt_jax.parallel.context import on_mesh
from apt_jax.parallel.mesh import (
    batch_ways,
    check_batch,
    make_mesh,
    replicated,
    ulysses_size,
    update_sharding,
)
from apt_jax.parallel.sharding import abstract_like, infer_shardings
from apt_jax.train.state import Setup, set_up
from apt_jax.train.steps import build_steps, microbatches

KEEP_ATTENTION = ("dots", "attention", "exchange", "offload")
INFERENCE = "one-step inference"
STEP_NAMES = {"generator": "G step", "discriminator": "D step"}


@dataclasses.dataclass(frozen=True)
class Program:
    """One program: `function(*args)`, a jitted function and its abstract, sharded arguments.

    reference(remat) is the same function on the same shapes and one device with the plain
    attention, whose work can be counted, and that rematerialisation policy (None: the config's own). parts
    names the argument trees, for accounting. samples: of one call. microbatches: parts, one after
    another, into which a call cuts them. training: it takes a gradient. context_minimum: bytes that
    a device sends at least in a call so that the tokens of its samples meet (`context_minimum`);
    None where that is not known.
    keeps_attention: the remat policy keeps what attention returned, so its kernel runs once.
    """

    name: str
    function: Any
    args: tuple
    reference: Callable[[str | None], tuple[Any, tuple]]
    parts: dict[str, Any]
    samples: int
    microbatches: int = 1
    training: bool = True
    context_minimum: float | None = 0.0
    keeps_attention: bool = False


def context_minimum(config: Any, mesh: Mesh, samples: int, name: str) -> float | None:
    """Bytes that a device sends over context in one call of a program if nothing is sent twice.

    Ulysses: the device's own tokens of q, k, v and the result change places in the forward pass,
    and their four gradients in the backward pass; all but the part that stays. No padding, nothing
    computed again. 0 where tokens are not cut, None where the heads ask for a ring or no count is
    known (`layer_passes`).
    """
    ways, heads = mesh.shape["context"], config.model.heads // mesh.shape["tensor"]
    if ways == 1:
        return 0.0
    passes = layer_passes(config, name)
    if passes is None or ulysses_size(ways, heads, config.mesh.ulysses) < ways:
        return None
    frames, height, width, _ = sample_shape(config)
    tokens = math.prod(side // patch for side, patch in zip(
        (frames, height, width), config.model.patch, strict=True))
    if config.model.family == "mmdit":  # text takes part in the joint attention
        tokens += text_length(config)
    share = max(1, samples // batch_ways(mesh)) * tokens / ways * heads * config.model.head_dim
    return 4 * passes * share * jnp.dtype(config.model.dtype).itemsize * (ways - 1) / ways


def layer_passes(config: Any, name: str) -> int | None:
    """How often a program runs a layer for one sample, forward and backward each counted; None
    where the exact R1 differentiates twice."""
    depth, objective = config.model.depth, config.objective.adversarial
    if name == INFERENCE:
        return depth
    if config.stage == "pretrain":
        return 2 * depth
    if config.stage == "consistency":  # the student and its gradient, its target, the teacher twice
        return (2 + 1 + 2) * depth
    last = discriminator_taps(config.model, config.discriminator)[-1]
    if name == STEP_NAMES["generator"]:  # D's own parameters aside, its gradient goes all the way
        return 2 * (depth + last) + (last if objective.loss == "relativistic" else 0)
    if objective.r1 and objective.r1_mode == "exact":
        return None
    seen = 2 + objective.r1 + objective.r2  # real and fake samples, their perturbed twins
    return depth + (1 if config.discriminator.backbone == "frozen" else 2) * seen * last


def reference_config(config: Any, remat: str | None = "none") -> Any:
    """The same mathematics with the plain attention; remat: what is recomputed, None as it is."""
    plain = config.copy_and_resolve_references()
    plain.model.remat = plain.model.remat if remat is None else remat
    if "attention" in plain.model:
        plain.model.attention = "oracle"
    return plain


def asked_batch(config: Any) -> int:
    """Samples of one update that the config asks for, of its largest sample."""
    return config.train[batch_field(config)]


def batch_field(config: Any) -> str:
    """The field of config.train that says it."""
    return size_field(max(config.data.frames), config.train.clip_batch_size)


def batch_of(config: Any, mesh: Mesh) -> int:
    """Samples of one update as `train` runs it: filled up to what the devices and train.accumulate
    split. Raises UserError where the loop would."""
    return check_batch(mesh, asked_batch(config), config.train.accumulate,
                       f"train.{batch_field(config)}")


def sample_shape(config: Any) -> tuple[int, int, int, int]:
    """(F, H, W, C) of the largest sample of a config."""
    data = config.data
    if not data.height or not data.width:
        raise UserError("plan needs the size of a sample; set data.height and data.width")
    return max(data.frames), data.height, data.width, config.model.in_channels


def text_length(config: Any) -> int:
    return config.data.max_text_tokens


def abstract_batch(config: Any, mesh: Mesh, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of `batch` samples as the pipeline would deliver it, split over the mesh."""
    parts = microbatches(config.train.accumulate, batch, mesh)
    sharding, length = update_sharding(mesh, parts), text_length(config)

    def array(shape, dtype):
        return jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=sharding)

    return {"x": array(sample_shape(config), jnp.float32),
            "text": array((length, config.model.text_width), jnp.float32),
            "text_mask": array((length,), jnp.bool_),
            "loss_mask": array((), jnp.float32)}


def _frozen(config: Any, setup: Setup, mesh: Mesh) -> dict[str, Any]:
    if config.stage != "consistency":
        return dict(setup.bases)
    length, whole = text_length(config), replicated(mesh)
    return {
        **setup.bases,
        "teacher": setup.whole("generator"),
        "null_text": jax.ShapeDtypeStruct((length, config.model.text_width), jnp.float32,
                                          sharding=whole),
        "null_mask": jax.ShapeDtypeStruct((length,), jnp.bool_, sharding=whole),
    }


def training_programs(config: Any, devices: list) -> list[Program]:
    """The steps of config.stage on these devices: whole updates, all their microbatches."""
    mesh = make_mesh(config.mesh, devices)
    batch = batch_of(config, mesh)
    setup = set_up(config, mesh)
    steps = build_steps(config, setup.nets, setup.optimizers, mesh, setup.shardings)
    state, frozen = setup.abstract, _frozen(config, setup, mesh)
    teacher = {**frozen.get("teacher", {}), **{
        name: frozen[name] for name in ("null_text", "null_mask") if name in frozen}}
    inputs = abstract_batch(config, mesh, batch)

    def reference(name: str, remat: str | None) -> tuple[Any, tuple]:
        plain = reference_config(config, remat)
        plain.train.accumulate = 1
        one = make_mesh({"replica": 1, "fsdp": 1}, devices[:1])
        small = set_up(plain, one)
        step = build_steps(plain, small.nets, small.optimizers, one, small.shardings)[name]
        return step, (small.abstract, _frozen(plain, small, one),
                      abstract_batch(plain, one, batch))

    return [Program(STEP_NAMES[name], step, (state, frozen, inputs),
                    functools.partial(reference, name),
                    {**_parts(state), "untrained weights": setup.bases, "teacher": teacher,
                     "batch": inputs},
                    batch, microbatches(config.train.accumulate, batch, mesh),
                    context_minimum=context_minimum(config, mesh, batch, STEP_NAMES[name]),
                    keeps_attention=config.model.remat in KEEP_ATTENTION
                    and config.model.get("attention") != "tokamax")  # keeps no log-sum-exp for backward
            for name, step in steps.items()]


def _parts(state: dict[str, Any]) -> dict[str, Any]:
    return {"generator": state["generator"], "EMA": state["generator_ema"],
            "discriminator": state.get("discriminator", {}),
            "optimiser": [state["generator_opt"], state.get("discriminator_opt", {})]}


def inference_program(config: Any, devices: list, batch: int = 0, compute_copy: bool = False
                      ) -> Program:
    """One-step generation (Eq. 3-5) as `apt-jax sample` runs it: float32 weights cut as in
    training, the samples cut over the batch axes only where these divide them.

    batch: samples of one call; 0 is the default of `sample`, one of latents and 64 of pixels.
    compute_copy: the weights come in the dtype of the layers already.
    """
    batch = batch or (1 if config.model.in_channels != 3 else 64)

    def build(config: Any, mesh: Mesh) -> tuple[Any, tuple]:
        net = make_generator(config.model).on(on_mesh(mesh, config.mesh.ulysses))
        whole, length = replicated(mesh), text_length(config)

        def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

        abstract = net.abstract()
        if compute_copy:
            abstract = jax.eval_shape(net.compute_copy, abstract)
        params = abstract_like(abstract, infer_shardings(abstract, mesh))
        width, scalar = config.model.text_width, array((), jnp.float32)
        draw = functools.partial(Generation(net, "one_step", batch=batch).draw,
                                 shape=sample_shape(config))
        return jax.jit(draw), (
            params, array((batch,), jnp.int32), array((), jnp.int32),
            array((batch, length, width), jnp.float32), array((batch, length), jnp.bool_),
            array((length, width), jnp.float32), array((length,), jnp.bool_), scalar)

    mesh = make_mesh(config.mesh, devices)
    function, args = build(config, mesh)

    def reference(remat: str | None) -> tuple[Any, tuple]:
        return build(reference_config(config, remat),
                     make_mesh({"replica": 1, "fsdp": 1}, devices[:1]))

    return Program(INFERENCE, function, args, reference, {"generator": args[0]}, batch,
                   training=False,
                   context_minimum=context_minimum(config, mesh, batch, INFERENCE))
