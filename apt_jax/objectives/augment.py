"""What D is shown of a sample: moved, holed, recoloured, mirrored, backwards at random (not in the paper; small data).

A discriminator that sees 1,500 pictures a hundred times learns them by heart, and its gradient stops
helping G (launch/memorised.py shows it). Differentiable augmentation (Zhao et al. 2020,
"Differentiable Augmentation for Data-Efficient GAN Training") shows it T(x) and T(G(z)) instead, in
both steps, with a T drawn anew for each sample: D cannot know pictures by heart, and G, judged
through T, gains nothing from making T's traces itself. That holds of a change with two outcomes only
where one is the rarer (Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data"):
mirrored half the time, left and right would look alike to D. Colours and holes hold D back as well, so
they may begin late, once there is something to forget (`augment_after`). With the paper's millions of
samples, leave all of it off.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def _moved(key: jax.Array, x: jax.Array, most: float) -> jax.Array:
    """x [F, H, W, C] moved by whole rows and columns, up to `most` of each; edges are repeated."""

    def places(key, size):
        reach = round(most * size)
        shift = jax.random.randint(key, (), -reach, reach + 1)
        return jnp.clip(jnp.arange(size) + shift, 0, size - 1)

    rows, columns = jax.random.split(key)
    return x[:, places(rows, x.shape[1])][:, :, places(columns, x.shape[2])]


def _holed(key: jax.Array, x: jax.Array, side: float) -> jax.Array:
    """x [F, H, W, C] with zeros in a rectangle of `side` of its height and width, in all frames."""

    def outside(key, size):
        length = round(side * size)
        start = jax.random.randint(key, (), -(length // 2), size - length // 2)
        place = jnp.arange(size)
        return (place < start) | (place >= start + length)

    rows, columns = jax.random.split(key)
    keep = outside(rows, x.shape[1])[:, None] | outside(columns, x.shape[2])[None, :]
    return jnp.where(keep[None, :, :, None], x, 0)


def _coloured(key: jax.Array, x: jax.Array, strength: float) -> jax.Array:
    """x [F, H, W, 3] in [-1, 1] with other brightness, saturation and contrast, in all frames."""
    brightness, saturation, contrast = strength * jax.random.uniform(key, (3,), x.dtype, -1, 1)
    x = x + brightness / 2
    grey = x.mean(axis=-1, keepdims=True)
    x = grey + (x - grey) * (1 + saturation)
    mean = x.mean()
    return mean + (x - mean) * (1 + contrast / 2)


def _mirrored(key: jax.Array, x: jax.Array, part: float) -> jax.Array:
    """x [F, H, W, C], `part` of the time with left and right exchanged, in all frames."""
    return jnp.where(jax.random.bernoulli(key, part), x[:, :, ::-1], x)


def _backwards(key: jax.Array, x: jax.Array, part: float) -> jax.Array:
    """x [F, H, W, C], `part` of the time with its last frame first."""
    return jnp.where(jax.random.bernoulli(key, part), x[::-1], x)


LATE = ("color", "cutout")  # what `augment_after` puts off


def shown(keys: jax.Array, x: jax.Array, config, step: jax.Array | int = 0) -> jax.Array:
    """T(x): what D sees of samples x [B, F, H, W, C]; x itself where the config asks for nothing.

    keys: [B], one per sample. config: config.objective.adversarial; `translate` (largest move, part
    of the height and width), `cutout` (side of the hole, part of them), `color` (0 to 1; pixels),
    `mirror` and `backwards` (how much of the time, below a half), `augment_after` (finished updates
    before the first with `color` and `cutout`). step: finished updates.
    """
    begun = step >= config["augment_after"]
    chosen = [(name, change, config[name]) for name, change in (
        ("color", _coloured), ("translate", _moved), ("cutout", _holed), ("mirror", _mirrored),
        ("backwards", _backwards)) if config[name]]

    def one(key, sample):
        for number, (name, change, amount) in enumerate(chosen):
            new = change(jax.random.fold_in(key, number), sample, amount)
            late = name in LATE and config["augment_after"]
            sample = jnp.where(begun, new, sample) if late else new
        return sample

    return jax.vmap(one)(keys, x) if chosen else x
