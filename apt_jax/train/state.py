"""The state of a run: one plain dict of arrays, born sharded.

    step               int32 scalar, finished updates
    key                uint32 [2], key data of the run's random key; never changes
    generator          params, float32 masters
    generator_ema      their average
    generator_opt      optax state
    discriminator      params                  (stage adversarial)
    discriminator_opt  optax state             (stage adversarial)

Where adapters train (config.lora), params are the part that trains (`train/adapters.py`).
Draws and data position are functions of (key, seed, step), so this and the step is all a resumed
run needs to go on bit by bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from apt_jax.errors import UserError
from apt_jax.models.discriminator import discriminator_from_diffusion
from apt_jax.models.presets import make_discriminator, make_generator
from apt_jax.nn.lora import join
from apt_jax.objectives import Nets
from apt_jax.parallel.context import on_mesh
from apt_jax.parallel.mesh import check_model
from apt_jax.parallel.sharding import MIN_ELEMENTS, abstract_like, infer_shardings, path_string
from apt_jax.train import adapters
from apt_jax.train.optimizers import discriminator_optimizer, generator_optimizer
from apt_jax.weights import load_discriminator, load_generator
from apt_jax.weights.common import BUNDLED

State = dict[str, Any]


class Setup(NamedTuple):
    """Everything static about a run."""

    generator: Any  # nn.functional.Network
    discriminator: Any  # the same, or None
    optimizers: dict[str, Any]
    abstract: State  # jax.ShapeDtypeStruct leaves with shardings
    shardings: State
    nets: Nets
    bases: dict[str, Any]  # like abstract: the untrained parts where adapters train; else {}

    def whole(self, name: str) -> Any:
        """Abstract parameters of a network, trained or not, with shardings."""
        return join(self.bases.get(adapters.BASE.format(name)), self.abstract[name])

    def plain(self) -> Any:
        """Abstract parameters of the generator without adapters, with shardings."""
        return self.bases.get(adapters.BASE.format("generator")) or self.abstract["generator"]


def set_up(config: Any, mesh: Mesh, min_elements: int = MIN_ELEMENTS) -> Setup:
    """Networks, optimisers and the abstract, sharded state of `config`; allocates nothing.

    Arrays below `min_elements` are not sharded over fsdp.
    """
    adversarial = config.stage == "adversarial"
    check_model(mesh, config.model, adversarial and (
        config.discriminator.heads or config.model.heads), config.mesh.ulysses)
    scope = on_mesh(mesh, config.mesh.ulysses)
    generator = make_generator(config.model, config.lora).on(scope)
    discriminator = (make_discriminator(config.model, config.discriminator, config.lora).on(scope)
                     if adversarial else None)
    optimizers = {"generator": generator_optimizer(config)}
    if adversarial:
        optimizers["discriminator"] = discriminator_optimizer(config)
    trained, bases = {"discriminator": None}, {}
    for name, net in (("generator", generator), ("discriminator", discriminator)):
        if net is not None:
            trained[name], base = adapters.parts(config, name, net.abstract())
            if base:
                bases[adapters.BASE.format(name)] = abstract_like(
                    base, infer_shardings(base, mesh, min_elements))
    abstract = jax.eval_shape(
        lambda g, d: _assemble(config.seed, g, d, optimizers), trained["generator"],
        trained["discriminator"])
    shardings = infer_shardings(abstract, mesh, min_elements)
    return Setup(generator, discriminator, optimizers, abstract_like(abstract, shardings),
                 shardings, Nets(generator, discriminator), bases)


def _assemble(seed: int, generator: Any, discriminator: Any, optimizers: dict) -> State:
    state = {
        "step": jnp.zeros((), jnp.int32),
        "key": jax.random.key_data(jax.random.key(seed)),
        "generator": generator,
        # A copy: one buffer cannot be donated twice.
        "generator_ema": jax.tree.map(jnp.copy, generator),
        "generator_opt": optimizers["generator"].init(generator),
    }
    if discriminator is not None:
        state["discriminator"] = discriminator
        state["discriminator_opt"] = optimizers["discriminator"].init(discriminator)
    return state


def check_like(params: Any, abstract: Any, source: str) -> None:
    """UserError naming the first parameter of `params` that the network has not, lacks or shapes
    otherwise."""
    def flat(tree):
        return {path_string(path): tuple(leaf.shape)
                for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    have, want = flat(params), flat(abstract)
    for name in sorted(want):
        if name not in have:
            raise UserError(f"{source} has no parameter {name!r} that config.model asks for; "
                            "set config.model as the weights were trained")
        if have[name] != want[name]:
            raise UserError(
                f"{source}: parameter {name!r} is {have[name]}, config.model makes it "
                f"{want[name]}; set config.model as the weights were trained")
    for name in sorted(set(have) - set(want)):
        raise UserError(f"{source} has a parameter {name!r} that config.model does not make; "
                        "set config.model as the weights were trained")


def load_params(source: str, which: str, setup: Setup, dtype: Any = np.float32) -> Any:
    """Generator weights of a run, a weights folder or the bundled base, on the mesh, float32."""
    plain = setup.plain()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, plain)
    _, params = load_generator(source, which, shardings)
    check_like(params, plain, source)
    return jax.tree.map(
        lambda value, sharding: jax.device_put(value.astype(dtype), sharding), params, shardings)


def read_start(config: Any, setup: Setup, source: str, which: str) -> Any:
    """`load_params` of weights that config.init names; its UserErrors name the field."""
    # Below adapters that go on lie weights which the other run's config names, not this one.
    key = next((f"init.{name}" for name in ("generator", "diffusion")
                if config.init[name] == source), "")
    if key and not source.startswith(BUNDLED) and not Path(source).expanduser().exists():
        stage = "the stage before" if key == "init.generator" else "pre-training"
        raise UserError(f"{key} = {source!r}: there is no such folder; a run of {stage} makes it "
                        f"(apt-jax train --workdir {source}), or give another path with "
                        f"--config.{key}=PATH")
    try:
        return load_params(source, which, setup)
    except UserError as error:
        if not key:
            raise
        raise UserError(f"{key}: {error}") from error


def init_state(config: Any, setup: Setup) -> State:
    """The state at step 0.

    The generator starts from init.generator (in the consistency stage, where that is empty, from
    init.diffusion: the student starts as its teacher), or from scratch. The discriminator's
    backbone starts from init.diffusion, the original diffusion weights, never from the distilled
    ones (Sec. 3.3); its heads are new. Where init.discriminator names a run, its whole discriminator
    goes on instead, with new moments of its optimiser.
    """
    generator_key, discriminator_key = jax.random.split(jax.random.key(config.seed + 1))
    source, which = adapters.start_source(config)
    if adapters.trains_adapters(config, "generator"):
        generator = adapters.init_trained(config, setup, "generator", generator_key)
    elif source:
        generator = read_start(config, setup, source, which)
    else:
        generator = jax.jit(setup.generator.init, out_shardings=setup.shardings["generator"])(
            generator_key)
    discriminator = None
    if config.stage == "adversarial":
        if adapters.trains_adapters(config, "discriminator"):
            discriminator = adapters.init_trained(config, setup, "discriminator",
                                                  discriminator_key)
        elif config.init.discriminator:
            discriminator = load_discriminator(
                config.init.discriminator, setup.abstract["discriminator"],
                setup.shardings["discriminator"])
        elif config.init.diffusion:
            diffusion = read_start(config, setup, config.init.diffusion, "ema")
            start = jax.jit(
                lambda params, key: discriminator_from_diffusion(params, setup.discriminator, key),
                out_shardings=setup.shardings["discriminator"])
            discriminator = start(diffusion, discriminator_key)
        else:
            discriminator = jax.jit(
                setup.discriminator.init,
                out_shardings=setup.shardings["discriminator"])(discriminator_key)
    return jax.jit(
        lambda g, d: _assemble(config.seed, g, d, setup.optimizers),
        out_shardings=setup.shardings)(generator, discriminator)


def frozen_inputs(config: Any, setup: Setup, negative_text: np.ndarray,
                  negative_mask: np.ndarray, replicated: Any) -> dict[str, Any]:
    """What a stage's loss reads besides the state: the teacher and the negative prompt, and where
    adapters train, their bases.

    Args:
      negative_text, negative_mask: [L, D] float32 and [L] bool, the teacher's negative prompt.
    """
    if config.stage == "consistency" and not config.init.diffusion:
        raise UserError("stage = consistency needs a teacher; set init.diffusion to the "
                        "pre-training run or its weights folder")

    def load(source, which):
        return read_start(config, setup, source, which)

    bases = adapters.frozen_bases(config, setup, load)
    if config.stage != "consistency":
        return bases
    teacher = load(config.init.diffusion, "ema")
    return {**bases, "teacher": adapters.as_adapted(config, setup, teacher),
            "null_text": jax.device_put(np.asarray(negative_text, np.float32), replicated),
            "null_mask": jax.device_put(np.asarray(negative_mask, bool), replicated)}
