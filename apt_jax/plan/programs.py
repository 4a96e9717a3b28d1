"""The programs of a run, built abstractly on the devices of a topology and compiled there.

Every program is the one that training and sampling run: the same steps, shardings and kernels. Only
the arrays are missing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from apt_jax.diffusion.samplers import one_step
from apt_jax.errors import UserError
from apt_jax.models.presets import make_generator
from apt_jax.parallel.context import on_mesh
from apt_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from apt_jax.parallel.sharding import abstract_like, infer_shardings
from apt_jax.train.state import Setup, set_up
from apt_jax.train.steps import build_steps

STEP_NAMES = {"generator": "G step", "discriminator": "D step"}


@dataclasses.dataclass(frozen=True)
class Program:
    """One program: `function(*args)`, a jitted function and its abstract, sharded arguments.

    reference is the same function on the same shapes with the plain attention and without
    recomputation, for counting model FLOPs. parts names the argument trees, for accounting.
    """

    name: str
    function: Any
    args: tuple
    reference: Callable[[], tuple[Any, tuple]]
    parts: dict[str, Any]


def reference_config(config: Any) -> Any:
    """The same mathematics with the plain attention and nothing recomputed."""
    plain = config.copy_and_resolve_references()
    plain.model.remat = "none"
    if "attention" in plain.model:
        plain.model.attention = "oracle"
    return plain


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
    sharding = batch_sharding(mesh)
    length = text_length(config)

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


def training_programs(config: Any, devices: list, batch: int) -> list[Program]:
    """The steps of config.stage on these devices with a global batch of `batch` samples."""
    mesh = make_mesh(config.mesh, devices)
    setup = set_up(config, mesh)
    steps = build_steps(config, setup.nets, setup.optimizers, mesh, setup.shardings)
    state, frozen = setup.abstract, _frozen(config, setup, mesh)
    inputs = abstract_batch(config, mesh, batch)

    def reference(name: str) -> tuple[Any, tuple]:
        plain = reference_config(config)
        plain.train.accumulate = 1
        one = make_mesh({"replica": 1, "fsdp": 1}, devices[:1])
        small = set_up(plain, one)
        step = build_steps(plain, small.nets, small.optimizers, one, small.shardings)[name]
        return step, (small.abstract, _frozen(plain, small, one),
                      abstract_batch(plain, one, batch))

    return [Program(STEP_NAMES[name], step, (state, frozen, inputs),
                    functools.partial(reference, name),
                    {**_parts(state), "teacher": frozen.get("teacher", {}), "batch": inputs})
            for name, step in steps.items()]


def _parts(state: dict[str, Any]) -> dict[str, Any]:
    return {"generator": state["generator"], "EMA": state["generator_ema"],
            "discriminator": state.get("discriminator", {}),
            "optimiser": [state["generator_opt"], state.get("discriminator_opt", {})]}


def inference_program(config: Any, devices: list, batch: int) -> Program:
    """One-step generation (Eq. 3-5) with weights in the compute dtype."""
    mesh = make_mesh(config.mesh, devices)
    dtype = jnp.dtype(config.model.dtype)

    def build(config, mesh):
        net = make_generator(config.model).on(on_mesh(mesh, config.mesh.ulysses))

        def cast(leaf):
            return jax.ShapeDtypeStruct(leaf.shape, dtype if leaf.ndim > 1 else leaf.dtype)

        abstract = jax.tree.map(cast, net.abstract())
        params = abstract_like(abstract, infer_shardings(abstract, mesh))
        inputs = abstract_batch(config, mesh, batch)

        def draw(params, z, text, text_mask):
            return one_step(functools.partial(net, params), z, text, text_mask)

        function = jax.jit(draw, out_shardings=batch_sharding(mesh))
        return function, (params, inputs["x"], inputs["text"], inputs["text_mask"])

    function, args = build(config, mesh)

    def reference():
        return build(reference_config(config), make_mesh({"replica": 1, "fsdp": 1}, devices[:1]))

    return Program("one-step inference", function, args, reference, {"generator": args[0]})
