"""On a CPU, side by side in one run: our MMDiT and the same in PyTorch, eager and compiled.

The demo's network and one of 100M parameters; a forward pass and a training step (flow-matching loss,
gradient, RMSProp update). Both frameworks get the same weights and inputs, both must agree before
anything is timed, and they are timed in turns.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from apt_jax.bench.profile import folder_of, profiled
from apt_jax.bench.report import Results
from apt_jax.bench.timing import interleaved
from apt_jax.errors import UserError
from apt_jax.models.mmdit import MMDiT, MMDiTConfig
from apt_jax.nn.functional import Network
from apt_jax.nn.rope import text_rotation, video_rotation
from apt_jax.parallel.flags.options import cpu_options
from apt_jax.weights import flatten

RATE, DECAY, EPS = 1e-5, 0.9, 1e-8
AGREE = 2e-4  # relative to the largest output


@dataclasses.dataclass(frozen=True)
class CpuCase:
    """A network and one batch for it: `batch` samples of shape, `words` text tokens."""

    config: MMDiTConfig
    batch: int
    shape: tuple[int, int, int]
    words: int


CASES: dict[str, CpuCase] = {
    # configs/demo_common.py: a microbatch of 16 images
    "demo": CpuCase(MMDiTConfig(width=96, depth=4, heads=3, head_dim=32, modulation="shared"),
                    16, (1, 16, 16), 8),
    "mmdit_100m": CpuCase(MMDiTConfig(width=768, depth=5, heads=12, head_dim=64,
                                      rope_axes=(16, 24, 24)), 2, (1, 32, 32), 16),
}
CONTENDERS = ("apt_jax", "torch eager", "torch.compile")


def random_params(net: Network, seed: int = 0) -> Any:
    """No leaf at zero, so that every part of the network has a say; scaled so that sums stay near 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        scale = leaf.shape[-2] ** -0.5 if name == "kernel" else 0.1
        value = scale * rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(value + (1.0 if name == "scale" else 0.0))

    return jax.tree_util.tree_map_with_path(draw, net.abstract())


def inputs_of(case: CpuCase, seed: int) -> tuple[np.ndarray, ...]:
    """x, t, text, text_mask and the target velocity."""
    rng = np.random.default_rng(seed)
    c = case.config
    x = rng.standard_normal((case.batch, *case.shape, c.in_channels), np.float32)
    text = rng.standard_normal((case.batch, case.words, c.text_width), np.float32)
    lengths = rng.integers(1, case.words + 1, case.batch)
    return (x, rng.random(case.batch, np.float32), text,
            np.arange(case.words) < lengths[:, None],
            rng.standard_normal((case.batch, *case.shape, c.out_channels), np.float32))


def _ours(net: Network, params: Any, part: str) -> tuple[Callable, Callable]:
    options = cpu_options("cpu") or None  # as in training and sampling
    if part == "forward":
        compiled = jax.jit(net, compiler_options=options)
        return lambda *a: compiled(params, *a[:4]), jax.block_until_ready
    optimizer = optax.rmsprop(RATE, decay=DECAY, eps=EPS)

    def loss(params, x, t, text, mask, target):
        return jnp.mean((net(params, x, t, text, mask) - target) ** 2)

    def step(state, *batch):
        value, gradient = jax.value_and_grad(loss)(state[0], *batch)
        updates, opt = optimizer.update(gradient, state[1], state[0])
        return (optax.apply_updates(state[0], updates), opt), value

    compiled = jax.jit(step, donate_argnums=0, compiler_options=options)
    params = jax.tree.map(jnp.copy, params)
    state = [(params, optimizer.init(params))]

    def call(*batch):
        state[0], value = compiled(state[0], *batch)
        return value

    return call, lambda value: jax.block_until_ready((value, state[0]))


def _torch(case: CpuCase, flat: dict[str, np.ndarray], part: str, compile_it: bool
           ) -> tuple[Callable, Callable]:
    import torch

    from apt_jax.bench.torch_mmdit import TorchMMDiT

    c = case.config
    grid = tuple(n // p for n, p in zip(case.shape, c.patch))
    rotations = (video_rotation(grid, c.rope_axes, c.rope_theta),
                 text_rotation(case.words, grid, c.rope_axes, c.rope_theta))
    model = TorchMMDiT(c, rotations).take(flat)
    run = torch.compile(model) if compile_it else model
    if part == "forward":
        @torch.inference_mode()
        def forward(*a):
            return run(*a[:4])

        return forward, lambda _: None
    optimizer = torch.optim.RMSprop(model.parameters(), lr=RATE, alpha=DECAY, eps=EPS)

    def step(x, t, text, mask, target):
        optimizer.zero_grad(set_to_none=True)
        value = torch.mean((run(x, t, text, mask) - target) ** 2)
        value.backward()
        optimizer.step()
        return value.detach()

    return step, lambda _: None


def contenders(case: CpuCase, part: str, names: Sequence[str], seeds: Sequence[int] = (0, 1, 2)):
    """name -> (call, inputs, wait), their first results compared. UserError where they differ."""
    import torch

    net = Network.build(lambda rngs: MMDiT(case.config, rngs=rngs))
    params = random_params(net)
    flat = {name: np.asarray(value) for name, value in flatten(params).items()}
    arrays = [inputs_of(case, seed) for seed in seeds]
    made = {}
    for name in names:
        if name == "apt_jax":
            call, wait = _ours(net, params, part)
            made[name] = (call, [tuple(map(jnp.asarray, a)) for a in arrays], wait)
        else:
            call, wait = _torch(case, flat, part, name == "torch.compile")
            made[name] = (call, [tuple(map(torch.from_numpy, a)) for a in arrays], wait)
    first = {name: np.asarray(call(*sets[0])) for name, (call, sets, _) in made.items()}
    reference = first[names[0]]
    for name, value in first.items():
        difference = np.abs(value - reference).max() / np.abs(reference).max()
        if not difference < AGREE:
            raise UserError(f"{names[0]} and {name} disagree by {difference:.1e} on {part}; "
                            "their times would not compare")
    return made


def run(models: Sequence[str], names: Sequence[str], results: Results, *, seconds: float = 20.0,
        profile: str = "", tell: Callable[[str], None] = print) -> None:
    """Times every model, part and contender; a row for each (model, part) with all of them.

    profile: a folder for traces of ours, for "device_seconds" and "costliest" (`profiled`)."""
    try:
        import torch
    except ImportError:
        raise UserError("apt-jax bench cpu compares with PyTorch; run: pip install "
                        "'apt_jax[convert]'") from None
    for model in models:
        case = CASES[model]
        for part in ("forward", "train"):
            name = f"{model}/{part}"
            had = results.rows[name]["seconds"] if name in results else {}
            if set(names) <= set(had):
                continue
            # A row is of one run, in turns: what it lacks is not measured without the others.
            load = round(os.getloadavg()[0], 2)  # the file's own is of its last start
            racing = [n for n in CONTENDERS if n in {*names, *had}]
            made = contenders(case, part, racing)
            timings = interleaved(made, seconds=seconds)
            size = Network.build(lambda rngs: MMDiT(case.config, rngs=rngs)).parameter_count()  # noqa: B023
            row = {"parameters": size, "batch": case.batch, "shape": case.shape,
                   "torch_threads": torch.get_num_threads(), "load_before": load,
                   "seconds": {n: dataclasses.asdict(t) for n, t in timings.items()},
                   "ratio_to_apt_jax": {n: t.median / timings[racing[0]].median  # noqa: B023
                                        for n, t in timings.items()}}
            if profile and "apt_jax" in made:
                call, sets, wait = made["apt_jax"]
                row |= profiled(call, sets, wait, folder_of(profile, name))
            results.add(name, row)
            tell(line(name, row))


def line(name: str, row: dict[str, Any]) -> str:
    """One row as text: milliseconds, and how many times as long as ours each peer takes."""
    parts = [f"{n} {1e3 * t['median']:.1f} ms ({row['ratio_to_apt_jax'][n]:.2f}x)"
             for n, t in row["seconds"].items()]
    first = [f"{kind} {1e3 * seconds:.1f}" for kind, seconds, _ in row.get("costliest", ())[:6]]
    return (f"{name:<20} {row['parameters'] / 1e6:6.1f}M  " + "   ".join(parts)
            + (f"\n{'':<20} ours, ms: {', '.join(first)}" if first else ""))
