"""Verdicts, remedies and sweeps, without a compiler: what it says and finds is made up."""

import dataclasses
import types

import jax
import pytest

from apt_jax.config import load_config
from apt_jax.errors import UserError
from apt_jax.kernels.choice import Hardware, choosing
from apt_jax.parallel.mesh import check_batch, resolve_sizes
from apt_jax.plan import run
from apt_jax.plan.advice import launch_notes
from apt_jax.plan.chips import GIB, parse_topology
from apt_jax.plan.collectives import Collective
from apt_jax.plan.flops import Flops
from apt_jax.plan.kept import Kept
from apt_jax.plan.measure import Measurement, _notes, compile_program, measure, refusal
from apt_jax.plan.programs import Program, batch_of, context_minimum
from apt_jax.plan.run import Plan
from apt_jax.plan.show import format_plan, format_sweep
from apt_jax.train.steps import microbatches

TPU = ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
       "hbm. Used 120.50G of 95.74G hbm. Exceeded hbm capacity by 24.76G.\n\nTotal hbm usage >= 121G")


def measurement(name="D step", peak=10 * GIB, refused="", step=1.0, found=()):
    return Measurement(name, 8, 2, {}, peak, 0, 0, 0, 0, Flops(1e12), Flops(1e12), 0.1, step, 0.0,
                       (), tuple(found), (), refused)


def made(topology="h100:1x8", batch=8, **changes):
    return Plan(parse_topology(topology), {"fsdp": 8}, batch, 64, {"generator": 1},
                (measurement(**changes),))


@pytest.mark.parametrize(("message", "says", "used"), [
    (TPU, "Used 120.50G of 95.74G hbm", int(120.5 * GIB)),
    # libtpu 0.0.52's own words, of a program of 38 GiB for a v5e
    ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
     "required for HLO temporaries (38.00G) exceeds available HBM (15.75G). HLO module: jit_f.\n"
     "See https://openxla.org/xla/errors/error_1000 for more details.",
     "(38.00G) exceeds available HBM (15.75G)", 38 * GIB),
    ("Ran out of memory in memory space vmem. Used 17.0M of 16.00M vmem.", "vmem", 17 * 2**20),
    ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5.00GiB.", "5.00GiB", 5 * GIB),
    ("RESOURCE_EXHAUSTED: the pool is empty", "the pool is empty", 0)])
def test_no_room_is_read_from_the_compilers_words(message, says, used):
    text, found = refusal(message)
    assert says in text and found == used
    assert refusal("INTERNAL: Mosaic failed to compile") is None


def test_no_room_is_a_verdict_and_other_errors_stay_errors(tmp_path):
    def program(message):
        def compile(compiler_options):
            raise jax.errors.JaxRuntimeError(message)

        lowered = types.SimpleNamespace(compile=compile)
        function = types.SimpleNamespace(lower=lambda *args: lowered)
        return Program("D step", function, (), lambda remat: ((lambda: None), ()), {}, 8)

    mesh = types.SimpleNamespace(shape={"fsdp": 8})
    compiled = compile_program(program(TPU))
    found = measure(program(TPU), parse_topology("v5p:4x4x4"), mesh, compiled)
    assert found.peak == int(120.5 * GIB) and "95.74G" in found.refused
    plan = dataclasses.replace(made("v5p:4x4x4"), programs=(found,))
    assert not plan.fits and "DOES NOT FIT" in format_plan(plan)
    assert "Used 120.50G" in format_plan(plan)
    assert plan.to_json()["programs"]["D step"]["peak_gib"] == pytest.approx(120.5)
    unnamed = dataclasses.replace(plan, programs=(dataclasses.replace(found, temporaries=0),))
    assert not unnamed.fits  # the compiler's word, whatever the bytes
    with pytest.raises(jax.errors.JaxRuntimeError, match="Mosaic"):
        compile_program(program("INTERNAL: Mosaic failed"))
    assert plan.attention == "oracle" and "attention: oracle" in format_plan(plan)
    kept = Kept(tmp_path / "hlo")
    kept.check()
    assert not list((tmp_path / "hlo").iterdir())
    kept.write("D step", compiled)
    assert kept.read("D step", {}) is None  # not asked to
    kept = Kept(tmp_path / "hlo", reuse=True)
    assert kept.read("D step", {}) == compiled and kept.read("G step", {}) is None
    assert kept.read("D step", {"xla_a": 1}) is None  # compiled without it
    (tmp_path / "hlo/D_step.json").write_text("{")
    with pytest.raises(UserError, match="delete it"):
        kept.read("D step", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="give --hlo a folder"):
        Kept(tmp_path / "file/hlo").check()


def test_kernels_and_flags_are_those_that_the_programs_were_compiled_with():
    from apt_jax.kernels.attention import attention

    function = jax.jit(lambda q: attention(q, q, q))
    program = Program("D step", function, (jax.ShapeDtypeStruct((1, 16, 1, 8), "float32"),),
                      lambda remat: ((lambda: None), ()), {}, 8)
    options = {"xla_cpu_enable_fast_min_max": True}
    compiled = compile_program(program, options)
    assert compiled.attention == "xla" and compiled.flags == options
    with choosing(backend="pallas"):
        again = dataclasses.replace(program, function=jax.jit(lambda q: attention(q, q, q)))
        assert compile_program(again).attention == "pallas"

    def planned(*of):
        return dataclasses.replace(made(), programs=tuple(
            dataclasses.replace(made().programs[0], attention=name, flags=flags)
            for name, flags in of))

    plan = planned(("pallas", options), ("oracle+pallas", options))
    assert plan.attention == "oracle+pallas" and plan.flags == options
    value = plan.to_json()
    assert (value["attention"], value["flags"]) == (plan.attention, options)
    assert value["programs"]["D step"]["attention"] == "oracle+pallas"
    assert planned(("pallas", options), ("pallas", {})).flags is None
    # kept by a plan from before these were noted
    assert planned(("not recorded", None)).to_json()["attention"] == "not recorded"


def on(**shape):
    """What stands for a mesh where only sizes are asked for."""
    return types.SimpleNamespace(
        shape={"replica": 1, "fsdp": 1, "context": 1, "tensor": 1, **shape})


@pytest.mark.parametrize(("given", "batch", "parts"), [
    ({"batch_size": 64, "accumulate": 4}, 64, 4), ({"batch_size": 62, "accumulate": 2}, 64, 2),
    ({"batch_size": 61, "accumulate": 0}, 64, 8), ({"batch_size": 61, "accumulate": 1}, 64, 1),
    ({"batch_size": 64, "clip_batch_size": 16, "accumulate": 0}, 64, 8)])
def test_the_plan_takes_the_batch_and_the_microbatch_of_training(given, batch, parts):
    config = load_config("configs/demo_image.py", ["--config.train.clip_batch_size=0"])
    for name, value in given.items():
        config.train[name] = value
    mesh = on(fsdp=8)
    assert batch_of(config, mesh) == batch == check_batch(mesh, config.train.batch_size,
                                                          config.train.accumulate)
    assert microbatches(config.train.accumulate, batch, mesh) == parts
    config.data.frames = (1, 5)  # clips: train.clip_batch_size, where it is set
    wanted = config.train.clip_batch_size or config.train.batch_size
    assert batch_of(config, mesh) == -(-wanted // 8) * 8
    config.train.batch_size = config.train.clip_batch_size = 3
    with pytest.raises(UserError, match="clip_batch_size = 3"):
        batch_of(config, mesh)


def test_the_first_remedy_is_smaller_microbatches(monkeypatch):
    config = load_config("configs/demo_image.py", [
        "--config.train.accumulate=2", "--config.model.remat=full"])
    tried, large = [], made(peak=90 * GIB)

    def plan(config, topology, inference, first):
        tried.append((config.train.accumulate, config.model.remat, config.mesh.context))
        assert first == "D step" and not inference
        return made(peak=(90 if config.mesh.context < 4 else 10) * GIB)

    monkeypatch.setattr(run, "plan", plan)
    found = run.find_remedy(config, parse_topology("h100:1x8"), large)
    assert found == "--config.mesh.context=4"
    config.mesh.fsdp, before = 8, list(tried)  # leaves no device to context
    assert run.find_remedy(config, parse_topology("h100:1x8"), large) == (
        "--config.mesh.context=4 --config.mesh.fsdp=-1")
    config.mesh.fsdp, tried[:] = -1, before
    assert tried == [(0, "full", 1), (2, "full", 2), (2, "full", 4)]  # remat is full: not again
    monkeypatch.setattr(run, "plan", lambda *args, **kw: made(peak=10 * GIB))
    assert run.find_remedy(config, parse_topology("h100:1x8"), large) == (
        "--config.train.accumulate=0")
    monkeypatch.setattr(run, "plan", lambda *args, **kw: made(peak=90 * GIB))
    assert run.find_remedy(config, parse_topology("h100:1x8"), large) == ""
    assert "more devices" in format_plan(dataclasses.replace(large, remedy=""))
    assert "changes" not in format_plan(large)  # nobody looked for one


def test_a_remedy_for_inference_is_tried_on_inference_and_may_end_in_an_error(monkeypatch):
    config = load_config("configs/demo_image.py", [])
    large = made(peak=90 * GIB, name=run.INFERENCE)
    tried = []

    def plan(config, topology, inference, first):
        assert inference and first == run.INFERENCE
        tried.append(config.mesh.context)
        if config.mesh.context == 2:
            raise jax.errors.JaxRuntimeError("INTERNAL: no")
        if config.mesh.context == 4:
            raise ValueError("a mesh that jax refuses")
        return made(peak=10 * GIB, name=run.INFERENCE)

    monkeypatch.setattr(run, "plan", plan)
    assert run.find_remedy(config, parse_topology("h100:1x8"), large) == "--config.mesh.context=8"
    assert tried == [2, 4, 8]  # microbatches and remat do nothing for it


@pytest.mark.parametrize(("topology", "head_dim", "kernel"), [
    ("h100:1x1", 32, "pallas"), ("v5e:1x1", 64, "splash"), ("v5e:1x1", 32, "auto")])
def test_the_chips_own_kernel_is_taken_where_it_serves(topology, head_dim, kernel):
    config = load_config("configs/demo_image.py", [])
    config.model.heads, config.model.head_dim = 96 // head_dim, head_dim
    config.model.width = config.model.heads * head_dim
    topology = parse_topology(topology)
    platform = "gpu" if topology.chip.kind == "cuda" else "tpu"
    found = run.for_chip(config, topology, Hardware(platform, "x", 9.0 * (platform == "gpu")))
    assert found.model.attention == kernel and config.model.attention == "auto"
    config.objective.adversarial.r1_mode = "exact"  # a second derivative, which no fast one has
    assert run.for_chip(config, topology, Hardware(platform, "x", 9.0 * (platform == "gpu"))
                        ).model.attention == "auto"
    config.stage = "consistency"
    assert run.for_chip(config, topology, Hardware(platform, "x", 9.0 * (platform == "gpu"))
                        ).model.attention == kernel


def test_a_smaller_batch_is_the_last_remedy_and_only_where_samples_are_large():
    config = load_config("configs/demo_image.py", [
        "--config.train.accumulate=0", "--config.model.remat=full"])
    config.train.batch_size, large = 1024, made(peak=81 * GIB)
    held = dataclasses.replace(large.programs[0], parts={"batch": 16 * GIB})
    found = run.remedies(config, dataclasses.replace(large, programs=(held,)))
    assert found[-2:] == [{"train.batch_size": 512}, {"train.batch_size": 256}]
    assert not [change for change in run.remedies(config, large) if "train.batch_size" in change]


def test_copies_are_given_up_first_and_context_only_gets_wider():
    config = load_config("configs/demo_image.py", [
        "--config.train.accumulate=0", "--config.model.remat=full", "--config.mesh.replica=8",
        "--config.mesh.fsdp=1"])

    def wanted(topology="h100:1x8", name="D step", **mesh):
        return run.remedies(config, dataclasses.replace(
            made(topology, peak=90 * GIB, name=name), mesh={"replica": 1, "context": 1, **mesh}))

    one_copy = {"mesh.replica": 1, "mesh.fsdp": -1}
    assert wanted(replica=8)[0] == wanted(name=run.INFERENCE, replica=8)[0] == one_copy
    config.mesh.fsdp = -1
    assert wanted(replica=8)[0] == {"mesh.replica": 1}  # the rest stands there already
    config.mesh.replica = 1
    assert wanted(context=4) == [{"mesh.context": 8}]
    assert wanted("h100:8x8", context=4) == [{"mesh.context": 8}, {"mesh.context": 16}]
    assert [change["mesh.context"] for change in wanted("h100:1x6")] == [2, 3, 6]


def test_copies_that_do_not_fit_are_mended_by_one(monkeypatch):
    config = load_config("configs/demo_image.py", [
        "--config.train.accumulate=0", "--config.model.remat=full", "--config.mesh.replica=8",
        "--config.mesh.fsdp=1"])

    def plan(config, topology, inference, first):
        resolve_sizes(config.mesh, topology.devices)
        return made(peak=(90 if config.mesh.replica > 1 else 20) * GIB)

    monkeypatch.setattr(run, "plan", plan)
    large = dataclasses.replace(made(peak=90 * GIB), mesh={"replica": 8, "fsdp": 1, "context": 1})
    assert run.find_remedy(config, parse_topology("h100:1x8"), large) == (
        "--config.mesh.replica=1 --config.mesh.fsdp=-1")


def test_a_launch_of_long_updates_is_told_its_patience_and_its_grace():
    config = load_config("configs/demo_image.py", [])
    config.train.hang_seconds, config.train.first_step_seconds = 1800.0, 3600.0
    assert launch_notes(config, 8, 299.0) == ()
    (grace,) = launch_notes(config, 8, 1750.0)
    assert "1,750 s" in grace and "grace of 2100 s" in grace and "--signal=B:USR1@" in grace
    patience, grace = launch_notes(config, 8, 10_442.0)
    assert "--config.train.first_step_seconds=21000" in patience and "3,600 s" in patience
    config.train.first_step_seconds = 21_600.0
    assert launch_notes(config, 8, 10_442.0) == (grace,)
    config.train.first_step_seconds = 3600.0
    assert launch_notes(config, 1, 10_442.0) == (grace,)  # nothing to wait for, nobody watches
    config.train.hang_seconds = 0.0
    assert launch_notes(config, 8, 10_442.0) == (grace,)  # switched off
    long = dataclasses.replace(made(), notes=(grace,))
    assert f"  {grace}" in format_plan(long) and long.to_json()["notes"] == [grace]


def test_the_sweep_ranks_what_fits_by_time_a_sample(monkeypatch):
    config = load_config("configs/demo_image.py", [
        "--config.train.batch_size=4", "--config.model.heads=8"])
    config.train.accumulate = 1
    shapes = list(run.mesh_shapes(config, 8))
    assert shapes and all(s["replica"] * s["fsdp"] <= 4 for s in shapes)  # of four samples
    config.model.heads = 12
    twelve = list(run.mesh_shapes(config, 12))
    assert {s["context"] for s in twelve} == {1, 2, 3, 4, 6, 12}
    assert {s["tensor"] for s in twelve} == {1, 2, 3, 4, 6}
    config.model.heads = 8

    def plan(config, topology, inference):
        if config.mesh.tensor > 1:
            raise UserError("no such mesh")
        if config.model.remat == "none":
            return made(peak=(80 + config.mesh.context) * GIB)
        return made(batch=4, step=float(config.mesh.context))

    monkeypatch.setattr(run, "plan", plan)
    seen = []
    rows = run.sweep(config, parse_topology("h100:1x8"), ("none", "full"), each=seen.append)
    assert len(rows) == 2 * len(shapes)
    assert [len(part) for part in seen] == list(range(1, len(rows) + 1)) and seen[-1] == rows
    assert all(part == run.rank(part) for part in seen)
    kinds = ["error" if isinstance(p, str) else "fits" if p.fits else "large" for *_, p in rows]
    assert kinds == sorted(kinds, key=["fits", "large", "error"].index)
    assert {"fits", "large", "error"} == set(kinds)
    steps = [p.step for *_, p in rows if not isinstance(p, str) and p.fits]
    assert steps == sorted(steps) and rows[0][1] == "full"
    assert "remat full" in format_sweep(rows, 8) and "remat none" in format_sweep(rows, 8)


def test_what_waits_in_the_layers_is_listed_and_notes_name_what_is_large():
    def one(name, kind="all-gather", axes="fsdp", dtype="bf16", steady=True, hidden=1.0,
            size=2**27):
        return Collective(name, kind, axes, 8, dtype, size, float(size), 72.0, steady, (), 1e-3,
                          hidden, size * (dtype == "f32"))

    found = [one("a", hidden=0.2), one("b"), one("c", steady=False, hidden=0.0),
             one("d", dtype="f32", steady=False), one("e", "all-reduce", "context"),
             one("f", "all-reduce", "replica+fsdp"), one("g", "all-reduce", "replica"),
             one("h", dtype="f32", size=2**20),
             one("i", "all-reduce", size=2**23), one("j", "all-reduce", size=2**17)]  # a vector's
    plan = made(found=found)
    assert [c.name for c in plan.programs[0].exposed_steady] == ["a"]
    value = plan.to_json()["programs"]["D step"]
    assert [row["name"] for row in value["exposed_steady"]] == ["a"]
    gathers = [r for r in value["steady_collectives"] if r["kind"] == "all-gather"]
    assert {r["dtype"]: r["count"] for r in gathers} == {"bf16": 144.0, "f32": 72.0}  # a b, h
    assert "exposed in the layers" in format_plan(plan)
    steps = [dataclasses.replace(one(name, hidden=0.0, steady=False), times=times)
             for name, times in (("update", 1.0), ("turn", 500.0))]
    assert made(found=steps).programs[0].exposed_once == pytest.approx(1e-3)
    program = Program("D step", None, (), None, {}, 8)
    notes = _notes(program, found, {"fsdp": 1})
    assert [n for n in notes if "(d)" in n and "outside the layers" in n]
    assert [n for n in notes if "(e)" in n and "context" in n]
    assert [n for n in notes if "(f)" in n and "reduce-scatter" in n] and len(notes) == 4
    assert [n for n in notes if "(i)" in n and "8 MiB" in n]
    joined = dataclasses.replace(found[0], bytes=2**30, float32=2**27)  # most of it bfloat16
    assert "float32 all-gather over fsdp, in the layers, of 128 MiB" in _notes(
        program, [joined], {"fsdp": 1})[0]
    assert len(_notes(dataclasses.replace(program, training=False), found, {"fsdp": 1})) == 1


def test_the_least_that_context_sends_is_ulysses_by_hand():
    """Eight clips of 13x90x160 latents, four devices each: 46,800 + 256 tokens of 3,072."""
    config = load_config("configs/seaweed_8b_video.py", [])
    mesh = on(fsdp=2, context=4)
    once = 4 * (47_056 / 4) * 3072 * 2 * 3 / 4  # q, k, v and the result of one layer and clip
    assert context_minimum(config, mesh, 1, "one-step inference") == pytest.approx(36 * once)
    assert context_minimum(config, mesh, 8, "G step") == pytest.approx(4 * 2 * 72 * once)
    assert context_minimum(config, mesh, 8, "D step") == pytest.approx(4 * (36 + 6 * 36) * once)

    def layers(name="D step", **changes):
        """Runs of a layer, forward and backward each counted."""
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
        found = context_minimum(changed, mesh, 8, name)
        return found and found / once / 4

    # as the compiled consistency step with remat none sends them: student 2, target 1, teacher 2
    assert layers("G step", stage="consistency") == pytest.approx(5 * 36)
    assert layers("G step", stage="pretrain") == pytest.approx(2 * 36)
    objective = "objective__adversarial__"
    assert layers(**{f"{objective}r2": True}) == pytest.approx(36 + 8 * 36)
    assert layers(**{f"{objective}r1": False}) == pytest.approx(36 + 4 * 36)
    assert layers(**{f"{objective}r1_mode": "exact"}) is None  # twice differentiated: not counted
    assert layers(discriminator__backbone="frozen") == pytest.approx(36 + 3 * 36)  # no gradient
    assert layers("G step", **{f"{objective}loss": "relativistic"}) == pytest.approx(5 * 36)
    config.mesh.ulysses = 2
    assert context_minimum(config, mesh, 8, "D step") is None  # a ring: another minimum
    assert context_minimum(config, on(fsdp=8), 8, "D step") == 0
    plan = made(found=[
        Collective("a", "all-to-all", "context", 4, "bf16", 1, 3.0 * GIB, 2.0, True)])
    plan = dataclasses.replace(plan, programs=(dataclasses.replace(
        plan.programs[0], context_minimum=4.0 * GIB, traffic=plan.programs[0].steady),))
    assert "tokens sent / least possible" in format_plan(plan) and "1.50" in format_plan(plan)
    assert plan.to_json()["programs"]["D step"]["context_gib"] == 6.0
    ring = dataclasses.replace(plan, programs=(dataclasses.replace(
        plan.programs[0], context_minimum=None),))
    assert "not known" in format_plan(ring)
    assert ring.to_json()["programs"]["D step"]["context_minimum_gib"] is None
