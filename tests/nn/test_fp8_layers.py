"""Networks whose blocks multiply in eight bits: which layers, the same parameters, stored or not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apt_jax.config import base_config, validate
from apt_jax.errors import UserError
from apt_jax.kernels.choice import Hardware, choosing
from apt_jax.kernels.fp8 import E4M3
from apt_jax.models.presets import make_discriminator, make_generator, matmul_of
from apt_jax.nn.fp8 import SCALE, store, stored
from apt_jax.nn.functional import Network
from apt_jax.nn.stack import run_stack
from apt_jax.parallel.mesh import make_mesh
from apt_jax.parallel.sharding import spec_for

MMDIT = dict(family="mmdit", in_channels=3, out_channels=3, patch=(1, 2, 2), width=32, depth=1,
             heads=2, head_dim=16, rope_axes=(4, 6, 6), text_width=8, dtype="bfloat16")
WAN = MMDIT | dict(family="wan", rope_axes=(8, 4, 4), text_tokens=4, frequency_width=16)


def random(net: Network, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(0.2 * rng.standard_normal(s.shape), s.dtype),
                        net.abstract())


def inputs():
    rng = np.random.default_rng(1)
    return (jnp.asarray(rng.standard_normal((2, 1, 4, 4, 3)), jnp.float32),
            jnp.asarray([0.2, 1.0], jnp.float32),
            jnp.asarray(rng.standard_normal((2, 3, 8)), jnp.float32),
            jnp.asarray([[True, True, False], [True] * 3]))


@pytest.mark.parametrize("model, count", [(MMDIT, 8), (WAN, 10)])
def test_stored_weights_are_the_same_network_in_eight_bits(model, count):
    """8: two streams' qkv, out, up, down. 10: q, k, v, out of two attentions, up, down."""
    plain, net = make_generator(model), make_generator(model | {"matmul": "fp8"})
    assert jax.tree.map(lambda a: a.shape, plain.shapes) == jax.tree.map(
        lambda a: a.shape, net.shapes)  # one set of weights for either
    params = random(net)
    served = stored(net)
    kept = jax.jit(lambda p: store(served, p))(params)
    assert jax.tree.structure(kept) == jax.tree.structure(served.abstract())

    eight = {jax.tree_util.keystr(path, simple=True, separator="/") for path, leaf in
             jax.tree_util.tree_leaves_with_path(kept) if leaf.dtype == E4M3}
    assert len(eight) == count and all(name.startswith("backbone/blocks/") for name in eight)
    assert not any("modulation" in name for name in eight)

    ours = jax.jit(net)(params, *inputs())
    assert (ours == jax.jit(served)(kept, *inputs())).all()
    exact = jax.jit(make_generator(model | {"dtype": "float32"}))(params, *inputs())
    error = float(jnp.linalg.norm(ours - exact) / jnp.linalg.norm(exact))
    own = float(jnp.linalg.norm(jax.jit(plain)(params, *inputs()) - exact)
                / jnp.linalg.norm(exact))
    assert own < error < 0.2  # it is another computation than bfloat16, and near


def test_the_discriminators_heads_stay_as_they_are():
    net, plain = (make_discriminator(MMDIT, {"taps": (1,), "heads": 0, "matmul": matmul})
                  for matmul in ("fp8", "dtype"))
    start = jax.jit(net.init)(jax.random.key(0))  # the switch changes no weights
    jax.tree.map(np.testing.assert_array_equal, start, jax.jit(plain.init)(jax.random.key(0)))
    kept = store(stored(net), start)
    scaled = [jax.tree_util.keystr(path) for path, _ in
              jax.tree_util.tree_leaves_with_path(kept) if SCALE in jax.tree_util.keystr(path)]
    assert len(scaled) == 8 and not any("heads" in name for name in scaled)
    assert kept["heads"]["q"]["kernel"].dtype == jnp.bfloat16


def test_g_and_d_choose_for_themselves():
    """And weights that are older than the switch have none."""
    fp8 = MMDIT | {"matmul": "fp8"}
    assert matmul_of(fp8) == "fp8" and matmul_of(MMDIT) == "dtype" == matmul_of({"taps": ()})
    text = str(make_discriminator(fp8, {"taps": (1,), "heads": 0}).graphdef)
    assert "Fp8Linear" not in text and "Fp8Linear" in str(make_generator(fp8).graphdef)


def test_stored_weights_are_cut_over_tensor_as_their_float_ones():
    """They lie turned around: outputs of qkv and up, inputs of out and down."""
    mesh = make_mesh({"replica": 1, "fsdp": 4, "tensor": 2})
    cuts = {name: spec_for(f"backbone/blocks/video/{name}", shape, mesh) for name, shape in {
        "qkv/kernel_fp8": (2, 96, 32), "qkv/kernel_scale": (2, 96), "mlp/down/kernel_fp8":
        (2, 32, 128)}.items()}
    assert [list(spec).index("tensor") for spec in cuts.values()] == [1, 1, 2]
    assert spec_for("backbone/blocks/video/qkv/kernel", (2, 32, 96), mesh)[2] == "tensor"


def factors(jaxpr) -> list[tuple[str, int]]:
    """The dtype of every product's first factor, and how often a scan runs it."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append((str(equation.invars[0].aval.dtype), 1))
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(list(equation.params.values()),
                                     is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                found += [(dtype, times * n) for dtype, n in factors(getattr(inner, "jaxpr", inner))]
    return found


def test_the_last_blocks_can_stay_as_they_are():
    """By hand: the first of two blocks in eight bits, the second not. Stored or not, and tapped."""
    model = MMDIT | {"depth": 2, "matmul": "fp8", "matmul_kept": 1}
    net, plain = make_generator(model), make_generator(MMDIT | {"depth": 2})
    params, served = random(net), stored(net)
    assert jax.tree.map(lambda a: a.shape, plain.shapes) == jax.tree.map(
        lambda a: a.shape, net.shapes)
    kept = jax.jit(lambda p: store(served, p))(params)
    qkv = kept["backbone"]["blocks"]["video"]["qkv"]
    assert {name: leaf.shape for name, leaf in qkv.items()} == {
        "kernel_fp8": (1, 96, 32), "kernel_scale": (1, 96), "kernel": (1, 32, 96), "bias": (2, 96)}
    assert qkv["kernel"].dtype == jnp.bfloat16
    assert jax.tree.structure(kept) == jax.tree.structure(served.abstract())

    ours = jax.jit(net)(params, *inputs())
    assert (ours == jax.jit(served)(kept, *inputs())).all()
    hardware = Hardware("gpu", "NVIDIA H100 80GB HBM3", 9.0)
    for n, p in ((net, net.abstract()), (served, served.abstract())):
        def run(p, *x, n=n):
            with choosing(hardware=hardware):
                return n(p, *x)

        counted = sum(times for dtype, times in factors(jax.make_jaxpr(run)(p, *inputs()).jaxpr)
                      if dtype == "float8_e4m3fn")
        assert counted == 8  # one block's

    _, tapped = run_stack(net.bind(params).backbone.blocks, lambda block, carry: carry + 1.0,
                          jnp.zeros(()), depth=2, taps=(1, 2))
    assert [float(x) for x in tapped] == [1.0, 2.0]


def test_keeping_every_block_is_refused():
    config = base_config()
    config.model.matmul, config.model.matmul_kept = "fp8", config.model.depth
    with pytest.raises(UserError, match="matmul_kept = 4 leaves none of model.depth = 4 blocks"):
        validate(config)
