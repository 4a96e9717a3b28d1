"""FLOPs: exact for products, loops and derivatives; the 8B forward against the hand count."""

import functools

import jax
import jax.numpy as jnp
import pytest

from apt_jax.config import load_config
from apt_jax.models.presets import make_generator
from apt_jax.plan.flops import UncountedError, count_flops
from apt_jax.plan.programs import inference_program, reference_config


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_products_and_convolutions_by_hand():
    assert count_flops(jnp.matmul, array(5, 3, 4), array(5, 4, 7)).matmul == 2 * 5 * 3 * 4 * 7
    convolve = functools.partial(
        jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert count_flops(convolve, array(2, 8, 8, 3), array(3, 3, 3, 5)).convolution == (
        2 * (2 * 8 * 8 * 5) * (3 * 3 * 3))


def test_a_scan_counts_every_turn_and_its_gradient_every_product():
    def scanned(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()

    forward = count_flops(scanned, array(6, 16, 16), array(4, 16)).matmul
    assert forward == 6 * 2 * 4 * 16 * 16
    both = jax.grad(scanned, argnums=(0, 1))
    assert count_flops(both, array(6, 16, 16), array(4, 16)).matmul == 3 * forward
    again = jax.grad(jax.checkpoint(scanned), argnums=(0, 1))
    for function in (both, again):  # what is computed again belongs to the backward pass
        found = count_flops(function, array(6, 16, 16), array(4, 16))
        assert found.forward == forward
    assert found.matmul == 4 * forward


def test_the_scanned_stack_is_the_unrolled_one():
    config = load_config("configs/demo_image.py", [])
    config.model.depth, config.model.remat = 2, "none"
    net = make_generator(config.model)
    inputs = (array(2, 1, 16, 16, 3), array(2), array(2, 8, 384),
              jax.ShapeDtypeStruct((2, 8), jnp.bool_))

    def cut(params, start):
        blocks = jax.tree.map(lambda leaf: leaf[start:start + 1], params["backbone"]["blocks"])
        return {**params, "backbone": {**params["backbone"], "blocks": blocks}}

    config.model.depth = 1
    one = make_generator(config.model)
    whole = count_flops(net, net.abstract(), *inputs)
    single = count_flops(one, one.abstract(), *inputs)

    def unrolled(params, *inputs):
        first = one(cut(params, 0), *inputs)  # embeddings, a layer, the output layer
        return first + one(cut(params, 1), *inputs)

    twice = count_flops(unrolled, net.abstract(), *inputs)
    config.model.depth = 0
    c = config.model
    tokens, words, d = 2 * 64, 2 * 8, c.width
    ends = (2 * tokens * 12 * d * 2 + 2 * words * 384 * d + 2 * 2 * (256 * d + d * d)
            + 2 * 2 * d * 6 * d + 2 * 2 * d * 2 * d)  # patches in and out, text, time, modulations
    assert twice.total - whole.total == pytest.approx(ends, rel=1e-12)
    assert twice.attention == whole.attention == 2 * single.attention
    assert single.attention == 2 * 2 * 2 * (72 * 72 * d)


def test_the_8b_forward_is_the_hand_count():
    """384 TFLOP of matrix products and 980 of attention for 49x720x1280 (46,800 tokens)."""
    config = reference_config(load_config("configs/seaweed_8b_video.py", []))
    config.mesh.replica = config.mesh.fsdp = config.mesh.context = 1
    function, args = inference_program(config, jax.devices()[:1]).reference(None)
    found = count_flops(function, *args)
    assert found.matmul == pytest.approx(384e12, rel=0.03)
    assert found.attention == pytest.approx(980e12, rel=0.03)


def test_what_cannot_be_counted_is_an_error():
    def loop(x):
        return jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ x, x)

    with pytest.raises(UncountedError, match="while"):
        count_flops(loop, array(3, 3))
