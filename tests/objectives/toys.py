"""Small analytic networks in float64, batches for them, a recorder of what a network is asked.

The same functions run under jax.numpy and numpy (`xp`), so that losses can be worked out by hand.
"""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from apt_jax.objectives import Nets

SHAPE = (1, 2, 2, 2)  # F, H, W, C
PIXELS, TOKENS, TEXT, HIDDEN = 8, 3, 4, 5


def _features(p, x, t, text, mask, xp):
    """Smooth, nonlinear in the sample, the time and the caption: [B, HIDDEN]."""
    words = (text * mask[..., None]).sum(1) / mask.sum(1)[:, None]  # [B, TEXT]
    return xp.tanh(x.reshape(x.shape[0], -1) @ p["x"] + words @ p["text"] + t[:, None] * p["t"])


def velocity(params, x, t, text, mask, xp=jnp):
    """[B, F, H, W, C]."""
    h = _features(params["backbone"], x, t, text, mask, xp)
    return (h @ params["out"]).reshape(x.shape)


def discriminate(params, x, t, text, mask, xp=jnp):
    """[B]."""
    h = _features(params["backbone"], x, t, text, mask, xp)
    return xp.tanh(h @ params["heads"]) @ params["logit"]


NETS = Nets(velocity, discriminate)


def parameters(kind: str, seed: int = 0, dtype=np.float64):
    """Random parameters of the toy "velocity" or "discriminate"."""
    rng = np.random.default_rng([seed, len(kind)])
    normal = lambda *shape: (0.7 * rng.normal(size=shape)).astype(dtype)  # noqa: E731
    backbone = {"x": normal(PIXELS, HIDDEN), "text": normal(TEXT, HIDDEN), "t": normal(HIDDEN)}
    params = {"backbone": backbone}
    if kind == "velocity":
        return params | {"out": normal(HIDDEN, PIXELS)}
    return params | {"heads": normal(HIDDEN, 4), "logit": normal(4)}


def make_batch(size: int = 3, seed: int = 0, dtype=np.float64):
    rng = np.random.default_rng([seed, 99])
    mask = np.ones((size, TOKENS), bool)
    mask[::2, -1] = False
    return {
        "x": rng.uniform(-1, 1, (size, *SHAPE)).astype(dtype),
        "text": rng.normal(size=(size, TOKENS, TEXT)).astype(dtype),
        "text_mask": mask,
    }


NULL_TEXT = np.random.default_rng(7).normal(size=(TOKENS, TEXT))
NULL_MASK = np.array([True, False, False])


def part_of(batch, indices):
    """Some samples of a batch."""
    return jax.tree.map(lambda a: a[indices], batch)


def make_keys(size: int = 3, seed: int = 0):
    return jax.random.split(jax.random.key(seed), size)


ADVERSARIAL = {
    "r1": True, "r1_mode": "approximate", "r1_weight": 100.0, "r1_sigma": 0.01, "time_shift": 1.0,
    "fixed_time": -1.0, "loss": "non_saturating", "r2": False, "translate": 0.0, "cutout": 0.0,
    "color": 0.0, "mirror": 0.0, "backwards": 0.0, "augment_after": 0,
}
CONSISTENCY = {"steps": 8, "shift": 3.0, "guidance": 7.5}
FLOW = {"shift": 2.0, "logit_mean": -0.2, "logit_std": 1.1}


class Recorder:
    """Wraps the toy networks and keeps every call's concrete inputs, alone or under one jax.vmap.

    Only outside jit. A call is a namespace with net, tag (first leaf of params), x, t, text, mask,
    as numpy. (Not by jax.debug.callback, whose calls come later and in no promised order.)
    """

    def __init__(self, velocity=velocity, discriminate=discriminate):
        self.calls: list[SimpleNamespace] = []
        self.nets = Nets(self._wrap("velocity", velocity), self._wrap("discriminate", discriminate))

    def _wrap(self, name, function):
        def keep(*arrays):
            names = ("tag", "x", "t", "text", "mask")
            self.calls.append(SimpleNamespace(net=name, **dict(zip(names, map(np.array, arrays)))))

        @jax.custom_batching.custom_vmap
        def note(*arrays):
            return arrays[2]

        @note.def_vmap
        def note_slices(size, batched, *arrays):
            for i in range(size):
                keep(*(a[i] if mapped else a for a, mapped in zip(arrays, batched)))
            return arrays[2], batched[2]

        def call(params, x, t, text, mask):
            inputs = jax.lax.stop_gradient((jax.tree.leaves(params)[0], x, t, text, mask))
            if any(isinstance(a, jax.core.Tracer) for a in inputs):
                note(*inputs)  # under vmap its rule is given the concrete stacked arrays
            else:
                keep(*inputs)
            return function(params, x, t, text, mask)

        return call

    def of(self, name: str):
        return [c for c in self.calls if c.net == name]


def softplus(x):
    return np.logaddexp(0, x)


def sum_of(loss):
    """A loss as a scalar function of its parameters, for jax.grad."""
    return lambda params, *rest: loss(params, *rest)[0].sum()


def check_gradient(function, params, directions: int = 4, h: float = 1e-5, rtol: float = 1e-6):
    """jax.grad of `function` against central differences: every leaf along random directions."""
    gradient = jax.jit(jax.grad(function))(params)
    value = jax.jit(function)
    leaves, tree = jax.tree.flatten(params)
    grads = jax.tree.leaves(gradient)
    assert all(g.dtype == np.float64 for g in grads)
    scale = max(float(np.abs(g).max()) for g in grads)
    assert scale > 1e-6
    rng = np.random.default_rng(0)
    for i, leaf in enumerate(leaves):
        for _ in range(directions):
            d = rng.normal(size=leaf.shape)

            def moved(step, i=i, leaf=leaf, d=d):
                return tree.unflatten([*leaves[:i], leaf + step * d, *leaves[i + 1:]])

            slope = float(value(moved(h)) - value(moved(-h))) / (2 * h)
            np.testing.assert_allclose(
                float((np.asarray(grads[i]) * d).sum()), slope, rtol=rtol, atol=rtol * scale
            )
