"""Which attention kernel serves a request, what is said where none can, and who is asked."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_float64 import draw

from apt_jax.config import base_config
from apt_jax.config.validate import validate
from apt_jax.errors import UserError
from apt_jax.kernels import dispatch
from apt_jax.kernels.attention import attention
from apt_jax.kernels.choice import BACKENDS, Hardware, choosing, current, hardware
from apt_jax.kernels.dispatch import Request, refusal, select
from apt_jax.kernels.oracle import oracle
from apt_jax.kernels.scope import entered
from apt_jax.models.presets import make_discriminator, make_generator
from apt_jax.objectives.adversarial import exact_r1

CPU = Hardware("cpu", "cpu")
H100 = Hardware("gpu", "NVIDIA H100 80GB HBM3", 9.0)
V100 = Hardware("gpu", "Tesla V100", 7.0)
A100 = Hardware("gpu", "NVIDIA A100", 8.0)
V5P = Hardware("tpu", "TPU v5p")
BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)


def request(hardware=H100, *, queries=4096, keys=4096, dim=128, dtype=BF16, derivatives=1,
            uniform=True, batch=1):
    return Request(batch, queries, keys, 24, dim, dtype, uniform, derivatives, hardware)


@pytest.fixture
def tokamax(monkeypatch):
    """Sets whether tokamax looks installed and can be imported."""
    def installed(yes):
        monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: yes or None)
        monkeypatch.setattr(dispatch.importlib, "import_module", lambda name: None)
        dispatch._no_tokamax.cache_clear()

    installed(False)
    yield installed
    dispatch._no_tokamax.cache_clear()


@pytest.mark.parametrize("wanted, found, installed", [
    ("xla", request(CPU), False),
    ("oracle", request(CPU, queries=1), False),
    ("oracle", request(CPU, derivatives=2), False),
    ("pallas", request(), False),
    ("tokamax", request(), True),
    ("pallas", request(dim=16), True),
    ("pallas", request(dtype=F32), True),  # the scores would take 1.6 GB
    ("oracle", request(dtype=F32, queries=512, keys=512), True),
    ("oracle", request(queries=1), True),
    ("oracle", request(queries=64, keys=64), True),
    ("oracle", request(derivatives=2), True),
    ("oracle", request(V100), True),
    ("oracle", request(dim=384), True),
    ("splash", request(V5P), True),
    ("oracle", request(V5P, dim=40), True),
    ("oracle", request(uniform=False), True),
])
def test_the_automatic_choice(tokamax, wanted, found, installed):
    tokamax(installed)
    assert select("auto", found) == wanted


@pytest.mark.parametrize("backend, hardware, dtype, found", [
    ("tokamax", H100, BF16, (4224, 4224, True)),
    ("hopper", H100, BF16, (4224, 4224, True)),
    ("cudnn", H100, BF16, (4202, 4098, True)),
    ("auto", H100, BF16, (4224, 4224, True)),
    ("auto", H100, F32, (4201, 4097, False)),  # ours, which takes any number and masks
    ("cudnn_fp8", H100, BF16, (4201, 4097, False)),
    ("auto", V5P, BF16, (4201, 4097, False)),  # 4608 would be 10% more of every product
    ("auto", CPU, BF16, (4201, 4097, False)),
])
def test_the_tokens_that_a_kernel_makes_of_others(tokamax, backend, hardware, dtype, found):
    tokamax(True)
    with choosing(backend=backend, hardware=hardware):
        assert dispatch.whole(1, 4201, 4097, 24, 128, dtype) == found
        with entered(SimpleNamespace(whole=False)):  # tokens are cut over devices
            assert dispatch.whole(1, 4201, 4097, 24, 128, dtype) == (4201, 4097, False)
    if backend == "tokamax":
        with choosing(backend=backend, hardware=hardware):
            assert dispatch.whole(1, 8, 8, 24, 128, dtype) == (8, 8, False)  # plain JAX
            with pytest.raises(UserError, match="no float32"):
                dispatch.whole(1, 4201, 4097, 24, 128, F32)


@pytest.mark.parametrize("count, padded", [(16, 128), (130, 256), (385, 512), (512, 512), (513, 1024)])
def test_what_was_padded_for_splash_stays_as_it_is(count, padded, monkeypatch):
    monkeypatch.setattr(dispatch, "PADDING", float("inf"))
    with choosing(backend="splash", hardware=V5P):
        for asked in (count, padded):
            assert dispatch.whole(1, asked, asked, 2, 128, BF16).keys == padded


@pytest.mark.parametrize("count, found", [(47_056, 47_104), (32_760, 32_768), (1_560, 1_560), (272, 272),
                                          (4_064, 4_096), (3_969, 3_969)])
def test_streams_are_padded_by_a_thirtysecond_at_most(count, found, tokamax):
    """More would cost the layers' products more than it spares their attention."""
    tokamax(True)
    with choosing(backend="tokamax", hardware=H100):
        assert dispatch.whole(1, count, count, 12, 128, BF16) == (found, found, True)


@pytest.mark.parametrize("backend, asked, words", [
    ("pallas", request(V5P), "written for GPUs.*TPU v5p.*'splash'"),
    ("pallas", request(V100), "8.0 or newer.*Tesla V100"),
    ("pallas", request(dim=384), "384 channels"),
    ("pallas", request(derivatives=2), "differentiated once"),
    ("pallas", request(uniform=False), "different dtypes"),
    ("pallas", request(dtype=jnp.dtype(jnp.float64)), "no float64"),
    ("cudnn", request(CPU), "needs an NVIDIA GPU.*this is a cpu"),
    ("cudnn", request(dtype=F32), "no float32.*bfloat16"),
    ("cudnn", request(dim=256), "up to 128 channels, not 256"),
    ("cudnn", request(derivatives=2), "differentiated once"),
    ("cudnn_fp8", request(A100), "9.0 or newer.*A100"),
    ("cudnn_fp8", request(V5P), "NVIDIA GPU.*TPU v5p"),
    ("cudnn_fp8", request(dim=384), "up to 256 channels, not 384"),
    ("cudnn_fp8", request(CPU, derivatives=2), "differentiated once"),
    ("hopper", request(A100), "Hopper.*A100"),
    ("hopper", request(V5P), "Hopper.*TPU v5p"),
    ("hopper", request(dtype=F32), "no float32.*bfloat16"),
    ("hopper", request(dim=96), "64 or 128 channels, not 96"),
    ("hopper", request(derivatives=2), "differentiated once"),
    ("tokamax", request(V100), "Hopper.*Tesla V100"),
    ("tokamax", request(), "not installed.*pip install"),
    ("splash", request(), "for TPUs.*H100"),
    ("splash", request(V5P, dim=40), "multiples of 64"),
    ("flash3", request(), "not one of auto, oracle, xla, pallas, hopper"),
])
def test_a_named_kernel_that_cannot_serve_says_why(tokamax, backend, asked, words):
    with pytest.raises(UserError, match=words) as error:
        select(backend, asked)
    assert "\n" not in str(error.value)


def test_a_tokamax_that_lacks_a_package_is_none(tokamax, monkeypatch):
    """0.0.17 imports xprof: installed without it, "auto" takes the next kernel."""
    def fails(name):
        raise ModuleNotFoundError("No module named 'xprof'")

    tokamax(True)
    monkeypatch.setattr(dispatch.importlib, "import_module", fails)
    assert "No module named 'xprof'" in refusal("tokamax", request())
    assert select("auto", request()) == "pallas"


def test_an_interpreter_that_would_wait_for_ever_is_refused(monkeypatch):
    monkeypatch.setattr(dispatch.os, "sched_getaffinity", lambda _: {0})
    assert "give it two" in refusal("hopper", request(CPU))
    assert refusal("hopper", request()) is None


@pytest.mark.parametrize("dim", [96, 192, 384])
@pytest.mark.parametrize("backend", ["hopper", "cudnn", "pallas"])
def test_a_discriminators_query_may_have_heads_of_any_size(backend, dim):
    """discriminator.heads are its own, and its one query never goes to a kernel."""
    assert select(backend, request(queries=1, dim=dim)) == "oracle"


def test_a_named_kernel_leaves_few_queries_to_the_plain_path(tokamax):
    tokamax(True)
    for backend in ("pallas", "hopper", "cudnn", "cudnn_fp8", "tokamax"):
        assert refusal(backend, request()) is None
        assert select(backend, request()) == backend
        assert select(backend, request(queries=1)) == "oracle"


@pytest.mark.parametrize("change, words", [
    ({"k": (2, 30, 2, 16), "v": (2, 30, 2, 16)}, "queries .2, 20, 4, 16. and keys .2, 30, 2, 16."),
    ({"k": (1, 30, 4, 16), "v": (1, 30, 4, 16)}, "differ in tokens only"),
    ({"k": (2, 30, 4, 8), "v": (2, 30, 4, 8)}, "differ in tokens only"),
    ({"q": (2, 20, 64)}, "differ in tokens only"),
    ({"v": (2, 30, 4, 8)}, "values .2, 30, 4, 8. and keys .2, 30, 4, 16."),
    ({"v": (2, 29, 4, 16)}, "attention wants one shape"),
    ({"mask": (2, 29)}, "mask bool .2, 29. does not fit: .* bool .2, 30."),
    ({"mask": (30,)}, "does not fit"),
])
def test_arrays_that_do_not_belong_together_are_refused(change, words):
    """By every kernel: ours read what lay behind a short mask, plain JAX broadcast a batch of one."""
    shapes = {"q": (2, 20, 4, 16), "k": (2, 30, 4, 16), "v": (2, 30, 4, 16), "mask": (2, 30)} | change
    args = [jax.ShapeDtypeStruct(s, bool if n == "mask" else F32) for n, s in shapes.items()]
    for backend in ("oracle", "pallas"):
        with choosing(backend=backend), pytest.raises(UserError, match=words) as error:
            jax.eval_shape(dispatch.run, *args)
        assert "\n" not in str(error.value)


def test_a_mask_of_numbers_is_refused():
    x = jax.ShapeDtypeStruct((2, 30, 4, 16), F32)
    with pytest.raises(UserError, match="the mask float32 .2, 30. does not fit"):
        jax.eval_shape(dispatch.run, x, x, x, jax.ShapeDtypeStruct((2, 30), F32))


@pytest.mark.parametrize("backend", ["auto", "pallas", "splash", "cudnn_fp8"])
def test_without_any_key_there_are_zeros(backend):
    q, k = jnp.ones((1, 20, 1, 64)), jnp.ones((1, 0, 1, 64))
    with choosing(backend=backend):
        for mask in ([], [jnp.ones((1, 0), bool)]):
            np.testing.assert_array_equal(attention(q, k, k, *mask), jnp.zeros_like(q))


def test_eight_bit_attention_is_only_taken_by_name():
    for here in (CPU, H100, A100, V5P):
        assert select("auto", request(here)) != "cudnn_fp8"
    assert select("cudnn_fp8", request(CPU)) == select("cudnn_fp8", request()) == "cudnn_fp8"


def test_a_jax_without_eight_bit_attention_is_named(monkeypatch):
    monkeypatch.setattr(dispatch.cudnn_fp8, "available", lambda: False)
    with pytest.raises(UserError, match=f"jax {jax.__version__} does not have it"):
        select("cudnn_fp8", request())


def test_the_automatic_choice_is_logged_once(tokamax, caplog):
    dispatch._note.cache_clear()
    with caplog.at_level(logging.INFO, logger="apt_jax"):
        for _ in range(3):
            select("auto", request())
        select("pallas", request())
    lines = [r.getMessage() for r in caplog.records]
    assert lines == ["attention on NVIDIA H100 80GB HBM3: pallas (bfloat16, heads of 128)"]


def test_on_a_cpu_auto_has_no_kernel_and_is_the_oracle():
    q, k, v, _, _ = draw((2, 300, 2, 16), 300, jnp.float32)
    mask = jnp.asarray(np.random.default_rng(1).random((2, 300)) < 0.5)
    np.testing.assert_allclose(attention(q, k, v, mask), oracle(q, k, v, mask), atol=1e-6)
    with choosing(backend="oracle"):
        np.testing.assert_array_equal(attention(q, k, v, mask), oracle(q, k, v, mask))
    assert "pallas" not in str(jax.make_jaxpr(attention)(q, k, v, mask))


def test_the_oracle_gives_zeros_without_a_key():
    q, k, v, _, _ = draw((2, 3, 1, 8), 5, jnp.float32)
    mask = jnp.array([[True] * 5, [False] * 5])
    out, pull = jax.vjp(lambda *a: attention(*a, mask), q, k, v)
    np.testing.assert_array_equal(out[1], 0)
    for g in pull(out + 1):
        np.testing.assert_array_equal(g[1], 0)
        assert np.abs(g[0]).max() > 0


def test_choices_nest_and_end():
    with choosing(derivatives=2):
        with choosing(backend="pallas", hardware=H100):
            assert (current().backend, current().derivatives) == ("pallas", 2)
            assert hardware() == H100
        assert (current().backend, current().derivatives) == ("auto", 2)
    assert current().derivatives == 1
    assert hardware().platform == "cpu"


@pytest.mark.parametrize("platform, capability, wanted", [
    ("gpu", "9.0", ("gpu", 9.0)), ("cuda", "8.6", ("gpu", 8.6)), ("rocm", "gfx942", ("gpu", 0.0)),
    ("tpu", None, ("tpu", 0.0)), ("cpu", None, ("cpu", 0.0))])
def test_hardware_of_a_device(platform, capability, wanted):
    device = SimpleNamespace(platform=platform, device_kind="kind")
    if capability is not None:
        device.compute_capability = capability
    found = Hardware.of(device)
    assert (found.platform, found.capability, found.name) == (*wanted, "kind")


# -- the config's name reaches the kernel ----------------------------------------------------------


def small_config(attention_name):
    config = base_config()
    config.model.update(depth=2, width=32, heads=2, head_dim=16, rope_axes=(4, 6, 6))
    config.model.attention = attention_name
    return config


def inputs(config):
    x = jnp.ones((1, 1, 16, 16, 3))
    return (x, jnp.ones((1,)), jnp.ones((1, 4, config.model.text_width)),
            jnp.array([[True, True, False, False]]))


def test_generator_and_discriminator_use_the_named_kernel():
    for name, wanted in (("auto", False), ("pallas", True)):
        config = small_config(name)
        nets = [make_generator(config.model),
                make_discriminator(config.model, config.discriminator)]
        for net in nets:
            jaxpr = str(jax.make_jaxpr(net)(net.abstract(), *inputs(config)))
            assert ("apt_flash_forward" in jaxpr) == wanted
    assert current().backend == "auto"


def test_a_generator_computes_the_same_by_the_named_kernel():
    config = small_config("auto")
    net = make_generator(config.model)
    params = net.init(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))  # zero-initialised leaves would hide it
    params = jax.tree.unflatten(
        tree, [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])
    plain = jax.jit(net)(params, *inputs(config))
    flash = jax.jit(make_generator(small_config("pallas").model))(params, *inputs(config))
    assert np.abs(plain).max() > 0.1
    np.testing.assert_allclose(flash, plain, atol=1e-4 * float(np.abs(plain).max()))


def test_the_exact_r1_takes_the_oracle_by_itself():
    config = small_config("auto")
    net = make_discriminator(config.model, config.discriminator)
    args = inputs(config)

    def penalty(params):
        return exact_r1(net, params, *args).sum()

    with choosing(hardware=H100):  # there "auto" would take a kernel that cannot do it
        text = str(jax.make_jaxpr(jax.grad(penalty))(net.abstract()))
    assert "apt_flash" not in text


def test_the_exact_r1_and_a_fast_kernel_are_refused_together():
    config = base_config()
    config.stage = "adversarial"
    config.init.generator = config.init.diffusion = "bundled:base"
    config.objective.adversarial.r1_mode = "exact"
    config.model.attention = "oracle"
    validate(config)
    config.model.attention = "pallas"
    with pytest.raises(UserError, match="model.attention = 'pallas'.*twice"):
        validate(config)


def test_every_name_of_the_config_is_known():
    assert set(BACKENDS) == {"auto", "oracle", *dispatch._REFUSALS}
