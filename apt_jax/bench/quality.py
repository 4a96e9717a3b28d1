"""What eight bits cost in quality: a trained model's FD, and a large network's distance from float32.

Two gates, and one number for training: how much of the approximated R1 penalty (Eq. 9) is rounding.
On a trained model of the demo's family the FD must move by less than it moves from one seed of the
noise to the next. On a network like the 8B preset, narrower and shallower, with random weights that
have the trained model's statistics, fp8 must stay within twice bfloat16's distance from float32.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from apt_jax import api
from apt_jax.bench.report import Results
from apt_jax.eval.evaluate import draw, load_split
from apt_jax.eval.measure import Reference, measure
from apt_jax.eval.mobilenet import MobileNetFeatures
from apt_jax.media import from_uint8
from apt_jax.models.discriminator import discriminator_from_diffusion
from apt_jax.models.presets import make_discriminator, make_generator

LIMIT = 2.0  # times bfloat16's own error

# The 8B preset's structure (heads of 128, shared modulation, 16 latent channels) at a size for a CPU.
LIKE_8B = {"family": "mmdit", "in_channels": 16, "out_channels": 16, "patch": (1, 2, 2),
           "width": 512, "heads": 4, "head_dim": 128, "rope_axes": (16, 56, 56),
           "text_width": 512, "modulation": "shared", "mlp_ratio": 4.0}
SHAPE, WORDS = (3, 16, 24, 16), 32  # 288 video tokens


# -- FD of a trained model ---------------------------------------------------------------------------


def fd_rows(checkpoint: str, results: Results, *, seeds: Sequence[int], count: int, mode: str,
            tell: Callable[[str], None] = print) -> None:
    """A row per seed: FD with the checkpoint's own products and in eight bits, from the same noise.

    Pictures (one frame) on captions of the training split, as `apt-jax evaluate` measures them.
    """
    plain = api.load(checkpoint)
    eight = api.Generator({**dict(plain.model), "matmul": "fp8"}, plain.params, plain.config)
    data = plain.config.data
    real = load_split(data.path, data.split, 1, data.height, data.width,
                      max_text_tokens=data.max_text_tokens)
    extract, reference = MobileNetFeatures(), None
    for seed in seeds:
        name = f"fd/{checkpoint}/{mode}/{count}/seed {seed}"
        if name in results:
            continue
        reference = reference or Reference.build(real.frames, extract=extract)
        row = {}
        for key, generator in (("dtype", plain), ("fp8", eight)):
            samples, _ = draw(generator, real, count, "", mode=mode, seed=seed)
            row[key] = float(measure(samples.frames, reference, extract)["fd"])
        results.add(name, row)
        tell(f"{name:<44} {row['dtype']:8.2f}  fp8 {row['fp8']:8.2f}")


def fd_verdict(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """How far fp8 moves the FD, and how far a new seed does.

    spread: standard deviation of the FD over seeds. moved: mean of fp8's FD less the other's, from
    the same noise. passes: it is smaller than the spread.
    """
    moved = statistics.mean(row["fp8"] - row["dtype"] for row in rows)
    spread = statistics.stdev(row["dtype"] for row in rows)
    return {"seeds": len(rows), "moved": moved, "spread": spread, "passes": abs(moved) < spread}


# -- distance from float32 ---------------------------------------------------------------------------


def like_trained(shapes: Any, trained: Any, seed: int = 0) -> Any:
    """Random float32 parameters for `shapes` with the statistics of another network's.

    trained: parameters of a network of the same family, of any width and depth. A matrix keeps its
    gain (deviation times the root of its inputs), a vector its mean and deviation; what holds a
    modulation keeps those of each of its six parts; layers take those of the layer at the same
    part of the depth.
    """
    rng = np.random.default_rng(seed)

    def draw(path: Any, want: Any, have: Any) -> jax.Array:
        have, shape = np.asarray(have, np.float64), tuple(want.shape)
        name = jax.tree_util.keystr(path)
        parts = 6 if "modulation" in name else 2 if "norm_out" in name else 1
        if "'blocks'" in name:
            layers = [len(have) * i // shape[0] for i in range(shape[0])]
            return np.stack([_like(rng, shape[1:], have[i], parts) for i in layers])
        return _like(rng, shape, have, parts)

    return jax.tree_util.tree_map_with_path(
        lambda *a: jnp.asarray(draw(*a), jnp.float32), shapes, trained)


def _like(rng: np.random.Generator, shape: tuple[int, ...], have: np.ndarray, parts: int
          ) -> np.ndarray:
    """One array of `shape` with the statistics of `have` in each of `parts` along the last axis."""
    gain = (have.shape[0] / shape[0]) ** 0.5 if len(shape) == 2 else 1.0
    made = []
    for part in np.split(have, parts, axis=-1):
        mean = 0.0 if len(shape) == 2 else part.mean()
        made.append(mean + gain * part.std() * rng.standard_normal(
            (*shape[:-1], shape[-1] // parts)))
    return np.concatenate(made, axis=-1)


def distances(model: Mapping[str, Any], params: Any, inputs: Sequence[tuple]) -> dict[str, float]:
    """Relative distance (norms over all outputs) from float32 in "bfloat16" and in "fp8"."""
    kinds = {"float32": {"dtype": "float32"}, "bfloat16": {"dtype": "bfloat16"},
             "fp8": {"dtype": "bfloat16", "matmul": "fp8"}}
    found = {}
    for kind, fields in kinds.items():
        net = jax.jit(make_generator({**model, **fields}))
        found[kind] = np.concatenate([np.asarray(net(params, *x)).ravel() for x in inputs])
    exact = np.linalg.norm(found["float32"])
    return {kind: float(np.linalg.norm(found[kind] - found["float32"]) / exact)
            for kind in ("bfloat16", "fp8")}


def random_inputs(model: Mapping[str, Any], seed: int) -> tuple:
    """Noise at t = 1, text states and their mask, as one-step generation sees them."""
    rng = np.random.default_rng(seed)
    text = rng.standard_normal((1, WORDS, model["text_width"]), np.float32)
    return (rng.standard_normal((1, *SHAPE), np.float32), np.ones(1, np.float32), text,
            np.arange(WORDS)[None] < rng.integers(4, WORDS))


def distance_rows(checkpoint: str, results: Results, *, depths: Sequence[int],
                  seeds: Sequence[int], tell: Callable[[str], None] = print) -> None:
    """A row per depth: distances of networks like the 8B's with the checkpoint's statistics."""
    trained = api.load(checkpoint).params
    for depth in depths:
        name = f"distance/{checkpoint}/{depth} layers of {LIKE_8B['width']}"
        if name in results:
            continue
        model = {**LIKE_8B, "depth": depth}
        params = like_trained(make_generator(model).abstract(), trained)
        row = distances(model, params, [random_inputs(model, seed) for seed in seeds])
        row["ratio"] = row["fp8"] / row["bfloat16"]
        row["passes"] = row["ratio"] < LIMIT
        results.add(name, row)
        tell(f"{name:<44} bfloat16 {row['bfloat16']:.2%}  fp8 {row['fp8']:.2%}  "
             f"{row['ratio']:.1f} times: {'passes' if row['passes'] else 'fails'}")


# -- the penalty -------------------------------------------------------------------------------------


def penalty_rows(checkpoint: str, results: Results, *, sigmas: Sequence[float] = (0.01, 0.1),
                 count: int = 64, tell: Callable[[str], None] = print) -> None:
    """A row per sigma: mean (D(x) - D(x + sigma eps))^2 on real pictures, by D as it starts from the
    checkpoint (its backbone, new heads), with the config's own products and in eight bits."""
    generator = api.load(checkpoint)
    data = generator.config.data
    real = load_split(data.path, data.split, 1, data.height, data.width,
                      max_text_tokens=data.max_text_tokens)
    rng = np.random.default_rng(0)
    rows = rng.permutation(len(real.captions))[:count]
    x, text, mask = from_uint8(real.frames[rows]), real.text[rows], real.mask[rows]
    noise, t = rng.standard_normal(x.shape, np.float32), rng.random(len(x), np.float32)
    for sigma in sigmas:
        name = f"penalty/{checkpoint}/sigma {sigma:g}"
        if name in results:
            continue
        row = {}
        for key, matmul in (("dtype", "dtype"), ("fp8", "fp8")):
            net = make_discriminator(generator.model, {
                **dict(generator.config.discriminator), "matmul": matmul})
            params = discriminator_from_diffusion(generator.params, net, jax.random.key(0))
            judge = jax.jit(net)
            difference = (judge(params, x, t, text, mask)
                          - judge(params, x + sigma * noise, t, text, mask))
            row[key] = float(jnp.mean(difference**2))
        row["ratio"] = row["fp8"] / row["dtype"]
        results.add(name, row)
        tell(f"{name:<44} {row['dtype']:.2e}  fp8 {row['fp8']:.2e}  {row['ratio']:.1f} times")


def report(checkpoint: str, results: Results, tell: Callable[[str], None] = print) -> bool:
    """Prints the verdicts of all rows of a checkpoint; True where both gates hold."""
    rows = {name: row for name, row in results.rows.items() if checkpoint in name.split("/", 1)[1]}
    good = [row["passes"] for name, row in rows.items() if name.startswith("distance/")]
    fd = [row for name, row in rows.items() if name.startswith("fd/")]
    if len(fd) > 1:
        verdict = fd_verdict(fd)
        results.add(f"verdict/{checkpoint}", verdict)
        tell(f"fp8 moves the FD by {verdict['moved']:+.2f}; a new seed by {verdict['spread']:.2f} "
             f"(standard deviation of {verdict['seeds']}): "
             f"{'passes' if verdict['passes'] else 'fails'}")
        good.append(verdict["passes"])
    return bool(good) and all(good)
