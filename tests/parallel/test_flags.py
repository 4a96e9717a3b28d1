"""The installed XLA knows every flag that the launch scripts export."""

import importlib.util

import pytest

from apt_jax.errors import UserError
from apt_jax.parallel import flags
from apt_jax.parallel.flags import __main__ as main_module
from apt_jax.parallel.flags import check
from apt_jax.parallel.flags.__main__ import main

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


def test_jaxlib_knows_the_flags_of_gpus():
    assert check.unknown_flags("gpu") == []


@pytest.mark.plan
@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu")
def test_libtpu_knows_the_flags_of_tpus():
    assert check.unknown_flags("tpu") == []
    assert check.unknown_flags("tpu", {"xla_tpu_enable_async_collective_fusion": "true",
                                       "xla_tpu_nonsense": "1"}) == ["xla_tpu_nonsense"]


@pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is installed")
def test_without_libtpu_one_line_says_so(capsys):
    """And a launch script gets all flags, to leave the judgement to the libtpu of the host."""
    with pytest.raises(UserError, match="pip install"):
        check.unknown_flags("tpu")
    assert main(["tpu", "--check"]) == 2
    assert main(["tpu", "--known"]) == 0
    out, said = capsys.readouterr()
    assert out.strip() == flags.environment_value("tpu") and said.count("pip install") == 2


def test_unknown_flags_are_named_and_can_be_left_out(monkeypatch, capsys):
    """Two among two that are known: all are found, whatever their order."""
    made_up = {"xla_gpu_a_b": "1", "xla_gpu_enable_latency_hiding_scheduler": "true",
               "xla_gpu_c_d": "x", "xla_gpu_enable_pipelined_all_gather": "true"}
    monkeypatch.setattr(flags, "platform_flags", lambda platform, hosts: made_up)
    monkeypatch.setattr(main_module, "platform_flags", lambda platform, hosts: made_up)
    monkeypatch.setattr(check, "platform_flags", lambda platform, hosts: made_up)
    assert main(["gpu", "--check"]) == 2
    said = capsys.readouterr().err
    assert "xla_gpu_a_b" in said and "xla_gpu_c_d" in said and "latency" not in said
    assert main(["gpu", "--known"]) == 0
    out, said = capsys.readouterr()
    assert out == ("--xla_gpu_enable_latency_hiding_scheduler=true "
                   "--xla_gpu_enable_pipelined_all_gather=true\n")
    assert said.count("left out") == 2


def test_a_value_that_xla_refuses_is_told():
    with pytest.raises(UserError, match="does not take the flags of gpu"):
        check.unknown_flags("gpu", {"xla_gpu_enable_latency_hiding_scheduler": "perhaps"})


def test_the_command_prints_one_line(capsys):
    assert main(["tpu"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.split()[0].startswith("--xla_") and "#" not in out
    assert main(["abacus"]) == 2
    assert "use gpu or tpu" in capsys.readouterr().err


def test_many_hosts_add_their_own_flags(capsys):
    few, many = (flags.platform_flags("gpu", hosts) for hosts in (flags.MANY_HOSTS - 1,
                                                                  flags.MANY_HOSTS))
    assert few == flags.platform_flags("cuda")
    changed = dict(many.items() - few.items())
    assert few.keys() <= many.keys() and changed == {"xla_gpu_memory_limit_slop_factor": "56"}
    assert flags.platform_flags("tpu", 64) == flags.platform_flags("tpu")
    assert main(["gpu", "--hosts", "16"]) == 0
    assert "--xla_gpu_memory_limit_slop_factor=56" in capsys.readouterr().out.split()
    assert main(["gpu", "--hosts", "0"]) == 2
    assert "1 or more" in capsys.readouterr().err
