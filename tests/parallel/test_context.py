"""Attention over a cut context equals attention on one device: values, gradients, second ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apt_jax.errors import UserError
from apt_jax.kernels.attention import joint_attention, local_attention
from apt_jax.kernels.scope import entered
from apt_jax.parallel.context import ContextParallel, on_mesh
from apt_jax.parallel.mesh import make_mesh

BATCH, HEADS, DIM = 2, 4, 8


def streams(lengths, seed=0):
    """q, k, v of each stream, and a mask with holes."""
    rng = np.random.default_rng(seed)
    q, k, v = ([jnp.asarray(rng.normal(size=(BATCH, n, HEADS, DIM)), jnp.float32) for n in lengths]
               for _ in range(3))
    mask = rng.random((BATCH, sum(lengths))) < 0.8
    mask[:, -1] = True
    return q, k, v, jnp.asarray(mask)


def value_and_gradients(scope, q, k, v, mask):
    """(outputs, gradients) of a loss that weighs every output differently."""
    def loss(q, k, v):
        with entered(scope):
            out = joint_attention(q, k, v, mask)
        return sum((jnp.sin(o) * (1 + jnp.arange(o.size).reshape(o.shape) % 7)).sum()
                   for o in out), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return out, grads


def close(a, b, tolerance=2e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * float(np.abs(y).max()))


@pytest.mark.parametrize(("sizes", "ulysses", "lengths", "masked"), [
    ({"context": 4}, -1, (4, 12), False),  # Ulysses 4
    ({"context": 4}, -1, (3, 10), True),  # padding of both streams
    ({"context": 4}, 1, (4, 12), False),  # ring 4
    ({"context": 4}, 1, (3, 10), True),
    ({"context": 8}, -1, (5, 16), True),  # Ulysses 4 inside ring 2
    ({"context": 4}, 2, (16,), False),  # Ulysses 2 inside ring 2, one stream
    ({"fsdp": 2, "context": 2, "tensor": 2}, -1, (3, 9), True),
    ({"context": 2, "tensor": 4}, -1, (4, 8), True),  # one head a device: ring 2
])
def test_joint_attention_on_every_kind_of_mesh(sizes, ulysses, lengths, masked):
    count = int(np.prod(list(sizes.values())))
    scope = ContextParallel(make_mesh(sizes, jax.devices()[:count]), ulysses)
    q, k, v, mask = streams(lengths)
    mask = mask if masked else None
    found = value_and_gradients(scope, q, k, v, mask)
    close(found, value_and_gradients(None, q, k, v, mask))
