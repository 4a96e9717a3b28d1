"""Programs carry the options that this machine's compiler has and its CPU wants."""

import jax
import jax.numpy as jnp
import pytest

from apt_jax.parallel.flags import options
from apt_jax.parallel.flags.options import cpu_options, known_options, plain_x86


def test_options_that_the_compiler_lacks_are_left_out_and_told():
    told = []
    has = {"xla_gpu_enable_latency_hiding_scheduler": True}
    assert known_options({"xla_gone": 1, **has, "xla_gone_too": "x"}, jax.devices()[0],
                         told.append) == has
    assert sorted(line.split(":")[0] for line in told) == ["left out xla_gone",
                                                            "left out xla_gone_too"]


@pytest.fixture(autouse=True)
def fresh():
    cpu_options.cache_clear()
    yield
    cpu_options.cache_clear()


@pytest.mark.parametrize("flags, plain", [
    ("fma avx avx2 f16c", True), ("fma avx2 avx512f avx512vl", False), ("fma avx", False),
    ("asimd sve", False)])
def test_only_avx2_without_avx512_is_plain(tmp_path, flags, plain):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nmodel name : A CPU\nflags\t\t: fpu {flags} sse\n")
    assert plain_x86(tmp_path / "cpuinfo") is plain


def test_where_no_file_tells_nothing_is_assumed(tmp_path):
    assert plain_x86(tmp_path / "absent") is False


def test_products_of_a_plain_cpu_are_xlas_own(monkeypatch):
    """The option is taken by the installed compiler and takes YNNPACK out of the program."""
    monkeypatch.setattr(options, "plain_x86", lambda: True)
    found = cpu_options("cpu")
    assert found == {"xla_cpu_experimental_ynn_fusion_type": ""}
    run = jax.jit(lambda x: jnp.tanh(x @ x.T) + 1, compiler_options=found)
    assert "ynn" not in run.lower(jnp.ones((64, 96))).compile().as_text()


@pytest.mark.parametrize("platform", ["gpu", "cuda", "tpu"])
def test_other_devices_and_other_cpus_get_none(monkeypatch, platform):
    monkeypatch.setattr(options, "plain_x86", lambda: True)
    assert cpu_options(platform) == {}
    monkeypatch.setattr(options, "plain_x86", lambda: False)
    assert cpu_options("cpu") == {}


def test_what_the_user_says_of_it_counts(monkeypatch):
    monkeypatch.setattr(options, "plain_x86", lambda: True)
    jax.devices()  # XLA has read its flags
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT")
    assert cpu_options("cpu") == {}


def test_a_compiler_without_the_option_gets_none(monkeypatch):
    monkeypatch.setattr(options, "plain_x86", lambda: True)
    monkeypatch.setattr(options, "_PLAIN_X86", {"xla_cpu_gone": ""})
    assert cpu_options("cpu") == {}


def test_a_program_with_options_is_counted():
    """Inside another jitted function jax refuses it."""
    from apt_jax.plan.flops import count_flops

    x = jnp.ones((64, 96))
    run = jax.jit(lambda x: x @ x.T, compiler_options={"xla_cpu_enable_fast_math": False})
    assert count_flops(run, x).total == count_flops(lambda x: x @ x.T, x).total == 2 * 64 * 64 * 96
