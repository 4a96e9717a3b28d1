"""What the plan says of memory is what live arrays take; eight CPU devices stand for the topology."""

import dataclasses

import jax
import numpy as np
import pytest

from apt_jax.config import load_config, validate
from apt_jax.errors import UserError
from apt_jax.parallel import flags
from apt_jax.parallel.mesh import make_mesh, resolve_sizes
from apt_jax.plan.chips import parse_topology
from apt_jax.plan.flops import Flops, UncountedError
from apt_jax.plan.measure import compile_program, measure, shard_bytes, work
from apt_jax.plan.programs import inference_program, training_programs
from apt_jax.plan.run import Plan, forward_flops, mesh_shapes
from apt_jax.plan.show import format_plan


@pytest.fixture(scope="module")
def config():
    config = load_config("configs/demo_image.py", [
        "--config.model.depth=2", "--config.model.width=32", "--config.model.heads=4",
        "--config.model.head_dim=8", "--config.model.rope_axes=4,2,2", "--config.mesh.fsdp=4",
        "--config.mesh.replica=2", "--config.train.batch_size=30", "--config.train.accumulate=2",
        "--config.model.remat=full", "--config.discriminator.heads=4"])
    return validate(config)


@pytest.fixture(scope="module")
def measured(config):
    mesh = make_mesh(config.mesh)
    topology = parse_topology("h100:1x8")
    programs = [*training_programs(config, jax.devices()),
                inference_program(config, jax.devices())]
    return mesh, topology, programs, [
        measure(p, topology, mesh, compile_program(p)) for p in programs]


def live_bytes(tree):
    device = jax.devices()[0]
    return sum(shard.data.nbytes for leaf in jax.tree.leaves(tree)
               for shard in leaf.addressable_shards if shard.device == device)


@pytest.mark.parametrize(("overrides", "untrained"), [
    ((), ()), (("--config.lora.rank=2", "--config.lora.discriminator=True"), ("untrained weights",)),
    (("--config.stage=consistency", "--config.lora.rank=2"), ("untrained weights", "teacher"))])
def test_every_argument_of_a_step_has_a_row(overrides, untrained):
    config = validate(load_config("configs/demo_image.py", [
        "--config.model.depth=2", "--config.discriminator.taps=2,", "--config.mesh.fsdp=8", *overrides]))
    for program in training_programs(config, jax.devices()):
        state = program.args[0]
        rows = {name: shard_bytes(tree) for name, tree in program.parts.items()}
        assert sum(rows.values()) + shard_bytes([state["step"], state["key"]]) == shard_bytes(
            program.args)
        assert all(rows[name] > rows["generator"] for name in untrained)


def test_arguments_and_outputs_are_the_live_bytes_exactly(measured):
    _, _, programs, results = measured
    for program, result in zip(programs, results, strict=True):
        live = jax.tree.map(
            lambda a: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding), program.args)
        assert live_bytes(live) == shard_bytes(program.args)
        # G's loss never looks at the real samples, nor one step at a negative prompt and guidance:
        # they are no arguments
        unread = {"G step": lambda: live[2]["x"], "one-step inference": lambda: live[5:]}  # noqa: B023 - called at once
        left_out = live_bytes(unread[program.name]()) if program.name in unread else 0
        assert result.arguments == live_bytes(live) - left_out
        out = program.function(*live)
        assert result.outputs - live_bytes(out) in (0, 8 * len(jax.tree.leaves(out)))


def test_the_state_is_updated_in_place(measured):
    _, _, programs, results = measured
    for program, result in zip(programs[:2], results[:2], strict=True):
        assert result.aliased == shard_bytes(program.args[0])
        assert result.parts["generator"] == result.parts["EMA"]
        assert result.parts["optimiser"] >= result.parts["generator"]
        # the peak counts the state once
        assert result.peak < result.arguments + result.outputs + result.temporaries


def test_work_and_verdict(measured, config):
    mesh, topology, _, results = measured
    d_step, g_step, draw = results
    assert (d_step.samples, d_step.microbatches) == (32, 2)  # 30, filled up for 8 devices x 2
    forward = draw.flops.total / draw.samples * 32
    assert draw.samples == 64 and draw.flops.backward == 0
    assert 10 * forward < d_step.flops.total < 11 * forward  # G once, three samples through D
    assert 4.9 * forward < g_step.flops.total < 6 * forward
    assert 4 * forward < d_step.flops.forward < 4.4 * forward
    assert 2 * forward < g_step.flops.forward < 2.2 * forward
    # the generator alone, counted where it was measured and where inference was left out
    counted = [forward_flops(config, list(mesh.devices.flat), part)
               for part in (results, results[:2])]
    found = Plan(topology, dict(mesh.shape), 32, 64, {"generator": 1}, tuple(results),
                 forward=counted[1])
    assert counted[0] == pytest.approx(counted[1])
    assert found.fits and "fits:" in format_plan(found) and found.microbatch == 16
    value = found.to_json()
    assert value["flops_forward_tflop"] == pytest.approx(forward / 32 / 1e12)
    assert value["programs"]["G step"]["peak_gib"] * 2**30 == pytest.approx(g_step.peak)
    assert value["programs"]["D step"]["flops_forward_tflop"] == pytest.approx(
        d_step.flops.forward / 32 / 1e12)
    assert any(t.axes == "fsdp" for t in d_step.traffic)


def test_what_is_computed_again_follows_the_policy(measured):
    """remat full: the blocks of the passes that take a gradient, forward once more, and no more."""
    _, _, programs, (d_step, g_step, draw) = measured
    assert d_step.executed.backward - d_step.flops.backward == pytest.approx(
        3 / 4 * d_step.flops.forward, rel=0.2)
    assert g_step.executed.total > 1.2 * g_step.flops.total and draw.executed == draw.flops
    plain = dataclasses.replace(  # the policy "none": nothing
        programs[2], training=True, reference=lambda remat: programs[2].reference("none"))
    model, executed = work(plain)
    assert executed == model == draw.flops
    # and where its result is kept, attention's kernel runs once
    model, executed = work(dataclasses.replace(programs[1], keeps_attention=True))
    assert executed.attention == model.attention and executed.matmul > 1.2 * model.matmul


def test_only_what_cannot_be_counted_is_estimated(measured, monkeypatch):
    program = measured[2][0]

    def fails(error):
        def count(function, *args):
            raise error
        return lambda remat: (None, ()), count

    reference, count = fails(TypeError("a bug"))
    broken = dataclasses.replace(program, reference=reference)
    monkeypatch.setattr("apt_jax.plan.measure.count_flops", count)
    with pytest.raises(TypeError, match="a bug"):
        work(broken)
    answers = iter([Flops(3.0, 6.0, 0.0, 6.0), UncountedError("a kernel")])

    def one_then_none(function, *args):
        if isinstance(answer := next(answers), Exception):
            raise answer
        return answer

    monkeypatch.setattr("apt_jax.plan.measure.count_flops", one_then_none)
    assert work(broken) == (Flops(3.0, 6.0, 0.0, 6.0), Flops(4.0, 8.0, 0.0, 8.0))


def test_meshes_left_to_us_fill_one_copy_first():
    rest = {"replica": -1, "fsdp": -1, "context": 4}
    assert resolve_sizes(rest, 8) == {"replica": 1, "fsdp": 2, "context": 4, "tensor": 1}
    assert resolve_sizes(rest, 1024) == {"replica": 8, "fsdp": 32, "context": 4, "tensor": 1}
    assert resolve_sizes({**rest, "copy": 64}, 1024)["fsdp"] == 16
    with pytest.raises(UserError):
        resolve_sizes(rest, 6)


def test_the_sweep_names_only_meshes_of_all_devices(config):
    shapes = list(mesh_shapes(config, 16))
    assert all(np.prod(list(s.values())) == 16 for s in shapes)
    assert {"replica": 1, "fsdp": 4, "context": 4, "tensor": 1} in shapes
    assert not any(s["tensor"] == 8 for s in shapes)  # four heads


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_every_flag_has_a_value_and_a_reason(platform):
    found = flags.platform_flags(platform)
    assert len(found) >= 4 and all(name.startswith("xla_") for name in found)
    assert flags.environment_value(platform).startswith("--xla_")


@pytest.mark.parametrize(("line", "says"), [
    ("--xla_gpu_x=1", "the reason"), ("xla_gpu_x=1  # why", "the reason"),
    ("--xla_a=1  # why\n--xla_a=2  # why", "twice")])
def test_a_flag_without_reason_is_refused(tmp_path, line, says):
    (tmp_path / "f.txt").write_text(line)
    with pytest.raises(UserError, match=says):
        flags.compiler_options(str(tmp_path / "f.txt"), "cuda")
