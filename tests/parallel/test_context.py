"""Attention over a cut context equals attention on one device: values, gradients, second ones."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apt_jax.kernels.attention import attention, joint_attention, local_attention
from apt_jax.kernels.choice import choosing
from apt_jax.kernels.scope import entered
from apt_jax.nn.stack import REMAT_POLICIES
from apt_jax.parallel import ring
from apt_jax.parallel.context import ContextParallel
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


def close(a, b, tolerance=1e-5):
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


def test_a_sample_without_a_key_gets_zeros_from_the_ring_too():
    q, k, v, mask = streams((3, 10))
    mask = mask.at[1].set(False)
    found = value_and_gradients(ContextParallel(mesh_of(context=4), 1), q, k, v, mask)
    assert not any(np.asarray(out[1]).any() for out in found[0])
    close(found, value_and_gradients(None, q, k, v, mask))


def test_a_long_ring_turn_takes_its_queries_in_chunks(monkeypatch):
    """No scores of all queries at once; 300 queries a device are three chunks, the last not full."""
    monkeypatch.setattr(ring, "SCORES", 1)
    q, k, v, mask = streams((80, 520))
    scope = ContextParallel(mesh_of(context=2), 1)
    found = value_and_gradients(scope, q, k, v, mask)
    close(found, value_and_gradients(None, q, k, v, mask))
    with entered(scope):
        text = jax.jit(lambda *a: joint_attention(*a, mask)).lower(q, k, v).compile().as_text()
    assert re.search(r"f32\[2,4,128,300\]|f32\[8,128,300\]", text)
    assert not re.search(r"f32\[(2,4|8),300,300\]", text)


def mesh_of(**sizes):
    return make_mesh(sizes, jax.devices()[:int(np.prod(list(sizes.values())))])


def test_a_fast_kernel_runs_in_the_ring_and_in_ulysses():
    """The Pallas kernels, interpreted, instead of plain JAX: joint, with padding, both at once."""
    q, k, v, mask = streams((3, 10))
    with choosing(backend="pallas"):
        found = value_and_gradients(ContextParallel(mesh_of(context=4), 2), q, k, v, mask)
    close(found, value_and_gradients(None, q, k, v, mask))


@pytest.mark.parametrize("queries", [1, 3, 12])
def test_queries_to_other_keys(queries):
    """The discriminator's one query to all tokens; text keys to cut video queries."""
    (q, _), (_, k), (_, v), mask = streams((queries, 9))
    mask = mask[:, queries:]

    def run(scope, q, k, v):
        with entered(scope):
            return attention(q, k, v, mask)

    def both(scope):
        loss = lambda *a: jnp.sin(run(scope, *a)).sum()  # noqa: E731
        return jax.jit(lambda *a: (run(scope, *a), jax.grad(loss, (0, 1, 2))(*a)))(q, k, v)

    close(both(ContextParallel(mesh_of(fsdp=2, context=4))), both(None))


@pytest.mark.parametrize("ulysses", [4, 1])
def test_second_derivatives_go_through(ulysses):
    """Exact R1 (Eq. 8) differentiates attention twice."""
    q, k, v, mask = streams((2, 6))

    def penalty(scope, q, k, v):
        def loss(q, k, v):
            with entered(scope), choosing(derivatives=2):
                return sum(jnp.sin(o).sum() for o in joint_attention(q, k, v, mask))
        first = jax.grad(loss, argnums=(0, 1, 2))(q, k, v)
        return sum((x**2).sum() for x in jax.tree.leaves(first))

    run = lambda scope: jax.jit(jax.value_and_grad(  # noqa: E731
        functools.partial(penalty, scope), argnums=(0, 1, 2)))(q, k, v)
    close(run(ContextParallel(mesh_of(context=4), ulysses)), run(None))


def test_a_kernel_gets_the_token_counts_it_asks_for():
    """The padding comes from the shorter stream, and is masked."""
    seen = []

    def kernel(q, k, v, key_mask):
        seen.append((q.shape[1], k.shape[1], key_mask is None))
        return local_attention(q, k, v, key_mask)

    q, k, v, _ = streams((3, 12))
    with entered(ContextParallel(mesh_of(context=4), kernel=kernel, multiple=32)):
        found = jax.jit(functools.partial(joint_attention, key_mask=None))(q, k, v)
    close(found, joint_attention(q, k, v))
    assert seen == [(32, 32, False)]


def moved(mesh, ulysses, lengths=(64, 960)):
    """{kind of collective: bytes a device holds of its results} of one joint attention."""
    scope = ContextParallel(mesh, ulysses)
    tokens = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "context"))
    shapes = tuple(jax.ShapeDtypeStruct((1, n, 8, 4), jnp.float32, sharding=tokens)
                   for n in lengths)

    def run(q, k, v):
        with entered(scope):
            return joint_attention(q, k, v)

    program = jax.jit(run, out_shardings=[tokens] * 2).lower(shapes, shapes, shapes).compile()
    found = {}
    for line in program.as_text().splitlines():
        for kind in ("all-to-all", "all-gather", "all-reduce", "collective-permute"):
            if f" {kind}(" in line:
                sizes = re.findall(r"f32\[([\d,]+)\]", line.split(f" {kind}(")[0])
                found[kind] = found.get(kind, 0) + sum(
                    4 * int(np.prod([int(n) for n in size.split(",")])) for size in sizes)
    return found


def test_ulysses_moves_no_more_than_it_must():
    """Four arrays of a device's tokens each way, once; nothing is gathered."""
    local = (64 + 960) // 8 * 8 * 4 * 4  # bytes of q on one device
    assert moved(mesh_of(context=8), -1) == {"all-to-all": 4 * local}


@pytest.mark.parametrize(("policy", "exchanges"), [("full", 12), ("exchange", 8)])
def test_what_was_exchanged_need_not_travel_again(policy, exchanges):
    """A block's training step: four arrays forward, four back, and those the policy forgot.

    Seven rounds, so that the compiler does not unroll them.
    """
    mesh = mesh_of(context=4)
    tokens = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "context"))
    x = jax.ShapeDtypeStruct((1, 64, 16), jnp.float32, sharding=tokens)
    w = jax.ShapeDtypeStruct((7, 3, 16, 4, 4), jnp.float32)

    @functools.partial(jax.checkpoint, policy=REMAT_POLICIES[policy])
    def block(x, w):
        q, k, v = (jnp.einsum("bnd,dhe->bnhe", x, part) for part in w)
        with entered(ContextParallel(mesh)):
            (out,) = joint_attention([q], [k], [v])
        # its value is needed to go back, as the projection that follows attention needs it
        return x + jnp.sin(out.reshape(x.shape)), None

    def loss(x, w):
        return jax.lax.scan(block, x, w)[0].sum()

    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, w).compile().as_text()
    assert len(re.findall(r"= \S+ all-to-all\(|= \([^=]*\) all-to-all\(", text)) == exchanges


def test_a_sharded_layer_is_gathered_whole_and_its_gradient_scattered():
    """Weights move, activations do not: no all-to-all, however small the batch is."""
    from flax import nnx

    from apt_jax.kernels.scope import entered
    from apt_jax.nn.stack import run_stack, stack
    from apt_jax.parallel.context import on_mesh
    from apt_jax.parallel.sharding import infer_shardings

    mesh = make_mesh({"fsdp": 8, "replica": 1})
    graph, state = nnx.split(stack(
        lambda r: nnx.Linear(64, 64, rngs=r), 3, nnx.Rngs(0)))
    params = nnx.to_pure_dict(state)
    shardings = infer_shardings({"blocks": params}, mesh, 1)["blocks"]

    def loss(params, x):
        with entered(on_mesh(mesh)):
            out, _ = run_stack(nnx.merge(graph, params), lambda block, x: jnp.tanh(block(x)), x,
                               depth=3)
        return (out**2).sum()

    x = jax.random.normal(jax.random.key(0), (8, 4, 64))
    placed = jax.device_put(params, shardings)
    step = jax.jit(jax.grad(loss), out_shardings=shardings)
    text = step.lower(placed, x).compile().as_text()
    assert "all-gather" in text and "all-to-all" not in text
    got, want = step(placed, x), jax.grad(
        lambda p, x: (run_stack(nnx.merge(graph, p), lambda b, x: jnp.tanh(b(x)), x,
                                depth=3)[0]**2).sum())(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def test_activations_shrink_with_the_context():
    """A stack's gradient on eight devices keeps little more than an eighth of each block's values;
    a stream that eight does not divide is cut too."""
    from flax import nnx

    from apt_jax.nn.linear import MLP
    from apt_jax.nn.stack import run_stack, stack

    graph, state = nnx.split(stack(lambda r: MLP(8, 8, dtype=jnp.float32, rngs=r), 6, nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (1, 1000 - 3, 8))

    def program(scope):
        def loss(x):
            with entered(scope):
                out, _ = run_stack(nnx.merge(graph, state), lambda mlp, x: x + mlp(x), x, depth=6)
            return (out**2).sum()
        return jax.jit(jax.grad(loss)).lower(x).compile()

    one, eight = program(None), program(ContextParallel(mesh_of(context=8)))
    sizes = [p.memory_analysis().temp_size_in_bytes for p in (one, eight)]
    assert sizes[1] < sizes[0] / 6, sizes
    close(eight(x), one(x))


@pytest.mark.parametrize(("sizes", "multiple", "said"), [
    ({"fsdp": 2, "tensor": 2}, 1, True),
    ({"fsdp": 2, "tensor": 2}, 10, False),  # the text, which is first, gets padding behind it
    ({"context": 2}, 1, False),  # pieces of both streams, side by side
])
def test_hidden_last_is_said_only_where_it_holds_on_the_device(sizes, multiple, said):
    seen = []

    def kernel(q, k, v, key_mask, hidden_last=False):
        seen.append(hidden_last)
        if hidden_last:
            assert key_mask.shape[1] == 16
        return local_attention(q, k, v, key_mask)

    q, k, v, _ = streams((4, 12))
    mask = jnp.arange(16) < jnp.asarray([[5], [16]])
    with entered(ContextParallel(mesh_of(**sizes), kernel=kernel, multiple=multiple)):
        found = jax.jit(functools.partial(joint_attention, hidden_last=True))(q, k, v, mask)
    close(found, joint_attention(q, k, v, mask))
    assert seen == [said]
