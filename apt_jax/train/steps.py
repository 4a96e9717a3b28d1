"""The compiled update of every stage: one gradient routine, one step per network.

A step is a pure function of (state, frozen, batch): its random keys come from the state's key and
step, one per sample of the global batch, so the draws do not depend on how the batch is cut into
microbatches or over devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import jaxpr_as_fun
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from apt_jax.nn.lora import join
from apt_jax.objectives import adversarial, consistency, flow_matching
from apt_jax.parallel.flags.options import cpu_options
from apt_jax.parallel.mesh import BATCH_AXES, batch_ways, replicated, waiting_axes
from apt_jax.train.adapters import BASE
from apt_jax.train.ema import update_ema
from apt_jax.train.optimizers import stop_frozen

State = dict[str, Any]
Metrics = dict[str, jax.Array]
# (params, batch, keys [b]) -> (loss [b], aux of [b])
SampleLoss = Callable[[Any, dict, jax.Array], tuple[jax.Array, dict]]
StepFunction = Callable[[State, dict, dict], tuple[State, Metrics]]
Freeze = Callable[[dict], dict]

# Separates the draws of the two steps of one adversarial update (fresh noise for each).
GENERATOR_TAG, DISCRIMINATOR_TAG = 0, 1


def sample_keys(key_data: jax.Array, step: jax.Array, tag: int, batch_size: int) -> jax.Array:
    """One key per sample of the global batch, a function of (run key, step, tag): keys [B]."""
    key = jax.random.fold_in(jax.random.wrap_key_data(key_data), step)
    return jax.random.split(jax.random.fold_in(key, tag), batch_size)


def _split(tree: Any, microbatches: int, mesh: Mesh) -> Any:
    """[B, ...] -> [A / W, W, B / A, ...], every device keeping the samples it has.

    Sample i goes to a microbatch of its own device: with contiguous microbatches each of them would
    lie on a few devices only and had to be sent around. W microbatches wait side by side on the
    devices that share a sample (`waiting_axes`); they are collected when their turn comes.
    """
    axes = waiting_axes(mesh, microbatches)
    ways = math.prod(mesh.shape[axis] for axis in axes)
    spec = NamedSharding(mesh, PartitionSpec(None, axes or None, BATCH_AXES))

    def one(x):
        x = x.reshape(x.shape[0] // microbatches, ways, microbatches // ways, *x.shape[1:])
        return jax.lax.with_sharding_constraint(jnp.moveaxis(x, 0, 2).swapaxes(0, 1), spec)

    return jax.tree.map(one, tree)


def gradient(loss_fn: SampleLoss, params: Any, batch: dict, keys: jax.Array, *,
             microbatches: int, mesh: Mesh, shardings: Any) -> tuple[Any, Metrics]:
    """The gradient of sum(loss * mask) / sum(mask) over the global batch, and the means of aux.

    Args:
      loss_fn: losses per sample.
      params: tree of float32 arrays.
      batch: arrays [B, ...] with "loss_mask" float32 [B]; B is divisible by microbatches times
        the devices that split the batch.
      keys: [B] random keys.
      microbatches: how many parts the batch is cut into; the memory of activations falls with it,
        the result is the same (up to the order of the sums).
      shardings: where the gradients lie (the parameters' own shardings).

    Returns:
      Gradients like params, and scalars "loss", "gradient_norm" and one per aux name.
    """
    total = jnp.maximum(jnp.sum(batch["loss_mask"]), 1.0)

    def objective(params, part, part_keys):
        loss, aux = loss_fn(params, part, part_keys)  # [b]
        means = {name: jnp.sum(value * part["loss_mask"]) / total
                 for name, value in {**aux, "loss": loss}.items()}
        return means["loss"], means

    def on_part(part, part_keys):
        grads, means = jax.grad(objective, has_aux=True)(params, part, part_keys)
        return jax.lax.with_sharding_constraint(grads, shardings), means

    if microbatches == 1:
        grads, means = on_part(batch, keys)
    else:
        parts, tree = jax.tree.flatten(_split((batch, keys), microbatches, mesh))
        due = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))

        def due_at(i, x):  # [A / W, W, B / A, ...]
            """Microbatch i of one array, collected together with those that wait beside it."""
            ways = x.shape[1]
            beside = jax.lax.dynamic_index_in_dim(x, i // ways, keepdims=False)
            if ways > 1:
                beside = jax.lax.with_sharding_constraint(beside, due)
            return jax.lax.dynamic_index_in_dim(beside, i % ways, keepdims=False)

        shapes = [jax.ShapeDtypeStruct(x.shape[2:], x.dtype) for x in parts]
        traced, found = jax.make_jaxpr(
            lambda leaves: on_part(*jax.tree.unflatten(tree, leaves)), return_shape=True)(shapes)
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), found)
        # What the loss does not read (G's: the real samples) is no argument of the step.
        read = {id(v) for equation in traced.jaxpr.eqns for v in equation.invars}
        reads = [id(v) in read or jnp.issubdtype(v.aval.dtype, jax.dtypes.prng_key)
                 for v in traced.jaxpr.invars]

        def turn(i, sums):
            part = [due_at(i, x) if wanted else jnp.zeros(shape.shape, shape.dtype)
                    for x, shape, wanted in zip(parts, shapes, reads, strict=True)]
            return jax.tree.map(
                jnp.add, sums, jax.tree.unflatten(jax.tree.structure(zero),
                                                  jaxpr_as_fun(traced)(*part)))

        # How often it turns is kept from the compiler: XLA:GPU would pipeline and unroll this loop as
        # it does those over the layers, and every copy of its body is all the networks.
        turns = jax.lax.optimization_barrier(jnp.int32(microbatches))
        grads, means = jax.lax.fori_loop(0, turns, turn, zero)
    return grads, {**means, "gradient_norm": optax.global_norm(grads)}


def microbatches(accumulate: int, batch_size: int, mesh: Mesh) -> int:
    """train.accumulate; 0 is one sample at a time for each part of a batch of this global size."""
    return accumulate or batch_size // batch_ways(mesh)


def _apply(optimizer: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any,
           metrics: Metrics) -> tuple[Any, Any, Metrics]:
    """One optimiser update; adds "finite", 1.0 while loss, gradient and update are all numbers."""
    updates, opt_state = optimizer.update(grads, opt_state, params)
    size = optax.global_norm(updates)
    numbers = jnp.isfinite(metrics["loss"] + metrics["gradient_norm"] + size)
    return (optax.apply_updates(params, updates), opt_state,
            {**metrics, "update_norm": size, "finite": numbers.astype(jnp.float32)})


def generator_update(loss_fn: Callable[..., Any], optimizer: optax.GradientTransformation,
                     config: Any, mesh: Mesh, shardings: Any, freeze: Freeze) -> StepFunction:
    """The step that trains the generator and its average; it ends the update (step + 1).

    Args:
      loss_fn: (params, frozen, batch, keys) -> (loss [b], aux).
      shardings: tree of shardings of the state.
      freeze: what is done once to networks that this step only evaluates.
    """
    def step(state, frozen, batch):
        keys = sample_keys(state["key"], state["step"], GENERATOR_TAG, batch["x"].shape[0])
        if "discriminator" in state:
            frozen = {**frozen, "discriminator": state["discriminator"], "step": state["step"]}
        frozen = freeze(frozen)
        grads, metrics = gradient(
            lambda params, part, part_keys: loss_fn(params, frozen, part, part_keys),
            state["generator"], batch, keys, mesh=mesh, shardings=shardings["generator"],
            microbatches=microbatches(config.train.accumulate, batch["x"].shape[0], mesh))
        params, opt_state, metrics = _apply(optimizer, grads, state["generator_opt"],
                                            state["generator"], metrics)
        count = state["step"] + 1
        ema = update_ema(state["generator_ema"], params, config.train.ema_decay, count,
                         config.train.ema_from_step)
        return {**state, "step": count, "generator": params, "generator_opt": opt_state,
                "generator_ema": ema}, metrics

    return _compile(step, mesh, shardings)


def discriminator_update(loss_fn: Callable[..., Any], optimizer: optax.GradientTransformation,
                         config: Any, mesh: Mesh, shardings: Any, freeze: Freeze
                         ) -> StepFunction:
    """The step that trains the discriminator against the present generator."""
    frozen_backbone = config.discriminator.backbone == "frozen"

    def step(state, frozen, batch):
        keys = sample_keys(state["key"], state["step"], DISCRIMINATOR_TAG, batch["x"].shape[0])
        frozen = freeze({**frozen, "generator": state["generator"], "step": state["step"]})

        def loss(params, part, part_keys):
            params = stop_frozen(params) if frozen_backbone else params
            return loss_fn(params, frozen, part, part_keys)

        grads, metrics = gradient(
            loss, state["discriminator"], batch, keys, mesh=mesh,
            shardings=shardings["discriminator"],
            microbatches=microbatches(config.train.accumulate, batch["x"].shape[0], mesh))
        params, opt_state, metrics = _apply(optimizer, grads, state["discriminator_opt"],
                                            state["discriminator"], metrics)
        return {**state, "discriminator": params, "discriminator_opt": opt_state}, metrics

    return _compile(step, mesh, shardings)


def _compile(step: StepFunction, mesh: Mesh, shardings: Any) -> StepFunction:
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)),
                   compiler_options=cpu_options(mesh.devices.flat[0].platform) or None)


def build_steps(config: Any, nets: Any, optimizers: Any, mesh: Mesh, shardings: Any
                ) -> dict[str, StepFunction]:
    """The compiled steps of `config.stage` by the network they train, in the order they run.

    Args:
      nets: `objectives.Nets`.
      optimizers: dict with "generator" and, in the adversarial stage, "discriminator".
      shardings: tree of shardings of the state.

    Returns:
      {"generator": step}, in the adversarial stage {"discriminator": step, "generator": step};
      each is a jitted (state, frozen, batch) -> (state, metrics) that donates the state.
    """
    evaluated = {"teacher": nets.velocity, "generator": nets.velocity,
                 "discriminator": nets.discriminate}

    def whole(name, params, frozen):
        """A network's parameters in its compute dtype; where adapters train, with their base."""
        return evaluated[name].compute_copy(join(frozen.get(BASE.format(name)), params))

    def freeze(frozen):
        return {name: whole(name, value, frozen) if name in evaluated else value
                for name, value in frozen.items()}

    def bind(loss, section, name="generator"):
        return lambda params, frozen, batch, keys: loss(
            whole(name, params, frozen), frozen, batch, keys, nets, section)

    def generator(loss):
        return generator_update(loss, optimizers["generator"], config, mesh, shardings, freeze)

    objective = config.objective
    if config.stage == "pretrain":
        return {"generator": generator(bind(flow_matching.loss, objective.flow))}
    if config.stage == "consistency":
        return {"generator": generator(bind(consistency.loss, objective.consistency))}
    return {
        "discriminator": discriminator_update(
            bind(adversarial.discriminator_loss, objective.adversarial, "discriminator"),
            optimizers["discriminator"], config, mesh, shardings, freeze),
        "generator": generator(bind(adversarial.generator_loss, objective.adversarial)),
    }


def build_update(config: Any, nets: Any, optimizers: Any, mesh: Mesh, shardings: Any
                 ) -> StepFunction:
    """The update of `config.stage`: (state, frozen, batch) -> (state, metrics).

    Takes what `build_steps` takes. Returns a function that runs one compiled step, or in the
    adversarial stage one step of D and then one of G (alternating updates, Sec. 3.3) on the same
    samples with fresh noise. The state is donated. Metrics are float32 scalars on the device; the
    adversarial ones are named "discriminator/..." and "generator/...". Each new batch shape
    compiles once.
    """
    steps = build_steps(config, nets, optimizers, mesh, shardings)
    if len(steps) == 1:
        return steps["generator"]

    def update(state, frozen, batch):
        metrics = {}
        for name, step in steps.items():
            state, found = step(state, frozen, batch)
            metrics |= {f"{name}/{key}": value for key, value in found.items()}
        return state, metrics

    return update
