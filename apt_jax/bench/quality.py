"""What eight bits cost in quality: a trained model's FD, and a large network's distance from float32.

Two gates, and one number for training: how much of the approximated R1 penalty (Eq. 9) is rounding.
On a trained model of the demo's family the FD must move by less than from seed to seed: of the
training, where runs of several seeds are given, else of the noise. On a network like the 8B preset,
narrower and shallower, with random weights that have the trained model's statistics, eight bits must
stay within twice bfloat16's distance from float32.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from apt_jax import api
from apt_jax.bench.report import Results, config_digest
from apt_jax.eval.evaluate import draw, load_split
from apt_jax.eval.measure import Reference, measure
from apt_jax.eval.mobilenet import MobileNetFeatures
from apt_jax.media import from_uint8
from apt_jax.models.discriminator import discriminator_from_diffusion
from apt_jax.models.presets import make_discriminator, make_generator

LIMIT = 2.0  # times bfloat16's own error

# What is in eight bits -> the fields of config.model that say so. "but last": the last block's
# products are not.
KINDS: dict[str, dict[str, str]] = {
    "products": {"matmul": "fp8"},
    "attention": {"attention": "cudnn_fp8"},
    "both": {"matmul": "fp8", "attention": "cudnn_fp8"},
    "products but last": {"matmul": "fp8", "matmul_kept": 1},
    "both but last": {"matmul": "fp8", "attention": "cudnn_fp8", "matmul_kept": 1},
}

# The 8B preset's structure (heads of 128, shared modulation, 16 latent channels) at a size for a CPU.
LIKE_8B = {"family": "mmdit", "in_channels": 16, "out_channels": 16, "patch": (1, 2, 2),
           "width": 512, "heads": 4, "head_dim": 128, "rope_axes": (16, 56, 56),
           "text_width": 512, "modulation": "shared", "mlp_ratio": 4.0}
SHAPE, WORDS = (3, 16, 24, 16), 32  # 288 video tokens


def digest(generator: api.Generator) -> str:
    """Twelve hexadecimal digits of a checkpoint's config and weights: a run's folder keeps its name
    when it is trained again, and rows of the old weights must not pass for the new ones'."""
    found = hashlib.sha256(config_digest(generator.config).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(generator.params):
        found.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return found.hexdigest()[:12]


# -- FD of a trained model ---------------------------------------------------------------------------


def fd_rows(checkpoint: str, results: Results, *, seeds: Sequence[int], count: int, mode: str,
            kinds: Sequence[str] = tuple(KINDS), tell: Callable[[str], None] = print) -> None:
    """A row per seed: FD as the checkpoint computes ("dtype") and in eight bits, same noise.

    Pictures, or clips of a checkpoint that was trained on nothing else, on captions of the training
    split, as `apt-jax evaluate` measures them.
    """
    plain = api.load(checkpoint)
    data, config = plain.config.data, digest(plain)
    frames = min(data.frames)
    real, reference, extract = None, None, MobileNetFeatures()
    for seed in seeds:
        name = f"fd/{checkpoint}/{mode}/{count}/seed {seed}"
        row = dict(results.rows[name]) if results.has(name, config) else {}
        missing = [kind for kind in ("dtype", *kinds) if kind not in row]
        if not missing:
            continue
        real = real or load_split(data.path, data.split, frames, data.height, data.width,
                                  data.max_text_tokens, data.frame_stride)
        reference = reference or Reference.build(real.frames, extract=extract)
        for kind in missing:
            generator = _in(plain, kind) if kind in KINDS else plain
            samples, _ = draw(generator, real, count, "", mode=mode, seed=seed)
            row[kind] = float(measure(samples.frames, reference, extract)["fd"])
        results.add(name, row, config)
        tell(f"{name:<44} {row['dtype']:8.2f}  " + "  ".join(
            f"{kind} {row[kind] - row['dtype']:+.2f}" for kind in kinds))


def _in(generator: api.Generator, kind: str) -> api.Generator:
    """The generator with what KINDS says in eight bits."""
    fields = KINDS[kind]
    return api.Generator({**dict(generator.model), **fields}, generator.params, generator.config,
                         attention=fields.get("attention", "auto"))


def fd_verdict(runs: Sequence[Sequence[Mapping[str, float]]], kind: str) -> dict[str, Any]:
    """How far eight bits move the FD, and how far a seed does.

    runs: the rows of one run or of several that differ in the training's seed; a row per seed of
      the noise.
    Returns: runs, seeds; moved: mean over all rows of the FD in eight bits less the other's, from
      the same noise; each: the same of each run; noise: standard deviation of the FD over seeds of
      the noise, the root mean square over runs; training: standard deviation over runs of their
      mean FD, None of one run; passes: moved is smaller than training's, or noise's of one run.
    """
    each = [statistics.mean(row[kind] - row["dtype"] for row in run) for run in runs]
    variances = [statistics.variance([row["dtype"] for row in run]) for run in runs]
    noise = statistics.mean(variances) ** 0.5
    training = None
    if len(runs) > 1:
        training = statistics.stdev(statistics.mean(row["dtype"] for row in run) for run in runs)
    moved = statistics.mean(each)
    return {"runs": len(runs), "seeds": len(runs[0]), "moved": moved, "each": each, "noise": noise,
            "training": training, "passes": abs(moved) < (noise if training is None else training)}


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


def distances(model: Mapping[str, Any], params: Any, inputs: Sequence[tuple],
              kinds: Sequence[str] = tuple(KINDS)) -> dict[str, float]:
    """Relative distance (norms over all outputs) from float32, in "bfloat16" and of each kind."""
    ways = {"float32": {"dtype": "float32"}, "bfloat16": {"dtype": "bfloat16"},
            **{kind: {"dtype": "bfloat16", **KINDS[kind]} for kind in kinds}}
    found = {}
    for way, fields in ways.items():
        net = jax.jit(make_generator({**model, **fields}))
        found[way] = np.concatenate([np.asarray(net(params, *x)).ravel() for x in inputs])
    exact = found.pop("float32")
    return {way: float(np.linalg.norm(out - exact) / np.linalg.norm(exact))
            for way, out in found.items()}


def random_inputs(model: Mapping[str, Any], seed: int) -> tuple:
    """Noise at t = 1, text states and their mask, as one-step generation sees them."""
    rng = np.random.default_rng(seed)
    text = rng.standard_normal((1, WORDS, model["text_width"]), np.float32)
    return (rng.standard_normal((1, *SHAPE), np.float32), np.ones(1, np.float32), text,
            np.arange(WORDS)[None] < rng.integers(4, WORDS))


def distance_rows(checkpoint: str, results: Results, *, depths: Sequence[int],
                  seeds: Sequence[int], kinds: Sequence[str] = tuple(KINDS),
                  tell: Callable[[str], None] = print) -> None:
    """A row per depth: distances of networks like the 8B's with the checkpoint's statistics, and
    how many times bfloat16's each kind's is ("times")."""
    generator = api.load(checkpoint)
    trained, config = generator.params, digest(generator)
    for depth in depths:
        name = f"distance/{checkpoint}/{depth} layers of {LIKE_8B['width']}"
        if results.has(name, config) and set(kinds) <= set(results.rows[name]["times"]):
            continue
        model = {**LIKE_8B, "depth": depth}
        params = like_trained(make_generator(model).abstract(), trained)
        row: dict[str, Any] = distances(model, params,
                                        [random_inputs(model, seed) for seed in seeds], kinds)
        row["times"] = {kind: row[kind] / row["bfloat16"] for kind in kinds}
        results.add(name, row, config)
        tell(f"{name:<44} bfloat16 {row['bfloat16']:.2%}  " + "  ".join(
            f"{kind} {row[kind]:.2%}, {times:.1f} times: {_word(times < LIMIT)}"
            for kind, times in row["times"].items()))


def _word(passes: bool) -> str:
    return "passes" if passes else "fails"


# -- the penalty -------------------------------------------------------------------------------------


def penalty_rows(checkpoint: str, results: Results, *, sigmas: Sequence[float] = (0.01, 0.1),
                 count: int = 64, tell: Callable[[str], None] = print) -> None:
    """A row per sigma: mean (D(x) - D(x + sigma eps))^2 on real pictures, by D as it starts from the
    checkpoint (its backbone, new heads), with the config's own products and in eight bits."""
    generator = api.load(checkpoint)
    data, config = generator.config.data, digest(generator)
    real = load_split(data.path, data.split, 1, data.height, data.width,
                      max_text_tokens=data.max_text_tokens)
    rng = np.random.default_rng(0)
    rows = rng.permutation(len(real.captions))[:count]
    x, text, mask = from_uint8(real.frames[rows]), real.text[rows], real.mask[rows]
    noise, t = rng.standard_normal(x.shape, np.float32), rng.random(len(x), np.float32)
    for sigma in sigmas:
        name = f"penalty/{checkpoint}/sigma {sigma:g}"
        if results.has(name, config):
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
        results.add(name, row, config)
        tell(f"{name:<44} {row['dtype']:.2e}  fp8 {row['fp8']:.2e}  {row['ratio']:.1f} times")


def report(checkpoints: Mapping[str, str], results: Results, *, mode: str, count: int,
           kinds: Sequence[str] = tuple(KINDS), tell: Callable[[str], None] = print) -> bool:
    """Prints and keeps the verdicts: of each checkpoint, and of several as one training from
    several seeds, from the rows of these weights (name -> `digest`).

    True where the gates hold: both of one checkpoint; of several each one's distance and the FD's of
    them all. A gate that nothing judges, since there are no two seeds of the noise, does not hold.
    """
    good, runs, names = [], [], list(checkpoints)
    for checkpoint, config in checkpoints.items():
        rows = {name: row for name, row in results.rows.items() if row.get("config", "") == config
                and name.startswith((f"distance/{checkpoint}/", f"fd/{checkpoint}/{mode}/{count}/"))}
        good += [row["times"][kind] < LIMIT for name, row in rows.items()
                 if name.startswith("distance/") for kind in kinds]
        runs.append([row for name, row in rows.items() if name.startswith("fd/")])
    groups = [[i] for i in range(len(runs))] + ([list(range(len(runs)))] if len(runs) > 1 else [])
    for group in groups:
        name = "verdict/" + " ".join(names[i] for i in group)
        if any(len(runs[i]) < 2 for i in group):
            tell(f"{name}: the FD is not judged: that takes two seeds of the noise")
            good += [False] * (group is groups[-1])
            continue
        found = {kind: fd_verdict([runs[i] for i in group], kind) for kind in kinds}
        results.add(name, found)
        for kind, verdict in found.items():
            seed = ("a new seed of the noise" if len(group) == 1 else "a new seed of the training")
            tell(f"{name}: {kind} in eight bits move the FD by {verdict['moved']:+.2f}; {seed} by "
                 f"{verdict['training'] or verdict['noise']:.2f} (standard deviation): "
                 f"{_word(verdict['passes'])}")
        if group is groups[-1]:
            good += [verdict["passes"] for verdict in found.values()]
    return bool(good) and all(good)
