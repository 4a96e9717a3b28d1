"""Blocks, pipelines, training steps and their PyTorch peers: what a row says, on tiny networks."""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from apt_jax import api
from apt_jax.bench import arrays, block, case, pipeline, programs, quality, run, torch_peers
from apt_jax.bench.report import Results, config_digest, row_name
from apt_jax.cli import main as cli
from apt_jax.config import load_config
from apt_jax.installed import revision
from apt_jax.models.umt5 import UMT5Config
from apt_jax.models.vae import VAEConfig

TINY = ["--config.model.depth=1", "--config.model.width=32", "--config.model.heads=2",
        "--config.model.head_dim=16", "--config.model.rope_axes=4,6,6",
        "--config.model.text_width=24", "--config.discriminator.taps=1,",
        "--config.discriminator.heads=2", "--config.mesh.fsdp=1", "--config.mesh.replica=1",
        "--config.mesh.context=1", "--config.data.max_text_tokens=4"]
IMAGE = ["--config.data.height=4", "--config.data.width=4"]


def tiny(*overrides: str):
    return load_config("configs/demo_image.py", [*TINY, *IMAGE, *overrides])


def latents(*overrides: str):
    return load_config("configs/seaweed_8b_video.py", [
        *TINY, *IMAGE, "--config.data.frames=2,", "--config.model.dtype=float32", *overrides])


def wan(*overrides: str):
    return load_config("configs/wan_1_3b_apt_video.py", [
        *TINY, *IMAGE, "--config.data.frames=2,", "--config.model.rope_axes=8,4,4",
        "--config.model.text_tokens=6", "--config.model.mlp_ratio=2.0", *overrides])


@pytest.mark.parametrize("part, times", [("forward", 1), ("gradient", 3)])
def test_a_blocks_products_are_all_found(part, times):
    """The demo's block: 4 video tokens and 4 words; qkv, out, up, down of both streams."""
    config = tiny("--config.model.remat=none")
    made = block.block_case(config, jax.devices()[0], part)
    counted = block.products(jax.make_jaxpr(made.function)(*made.args))
    work = sum(2 * np.prod(p.left) * np.prod(p.right) / np.prod(
        [p.left[i] for i in p.dimensions[0][0]]) * n for p, n in counted.items())
    assert work == times * 2 * (4 + 4) * (32 * 96 + 32 * 32 + 2 * 32 * 128)
    attention = times * 4 * 8 * 8 * 32
    assert made.flops() == pytest.approx(work + attention, rel=0.01)


def test_a_block_is_timed_beside_its_parts(tmp_path):
    plan = run.Plan("block", lambda _: tiny(), jax.devices()[:1], weights=["bfloat16", "fp8"],
                    parts=["forward"], seconds=0.01, overrides=["--config.model.depth=1"])
    results, lines = Results(tmp_path / "rows.json", "cpu"), []
    run.time_all(plan, "cpu", results, lines.append)
    assert list(results.rows) == [
        f"demo_image/block/forward/{kind} model.depth=1" for kind in
        ("torch", "dtype/auto", "fp8/auto")]
    assert "PyTorch" in results.rows["demo_image/block/forward/torch model.depth=1"]["skipped"]
    for kind in ("dtype", "fp8"):
        row = results.rows[f"demo_image/block/forward/{kind}/auto model.depth=1"]
        assert row["tflop"] > 0 and row["planned_bytes"] > 0 and row["revision"] == revision()
        assert row["over_its_parts"] == row["median"] / (
            row["products_seconds"] + row["attention_seconds"])
    count = len(lines)
    run.time_all(plan, "cpu", Results(tmp_path / "rows.json", "cpu"), lines.append)
    assert len(lines) == count  # nothing is measured twice


def test_a_step_that_donates_its_state_is_handed_it_on():
    """A training step: the buffers of a state are gone after one call."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    x = jax.ShapeDtypeStruct((64,), np.float32, sharding=here)
    seen = []

    def step(state, x):
        jax.debug.callback(lambda v: seen.append(float(v)), state["steps"])
        return {"generator_opt": state["generator_opt"] + x, "steps": state["steps"] + 1}, x.sum()

    state = {"generator_opt": x, "steps": jax.ShapeDtypeStruct((), np.int32, sharding=here)}
    assert (arrays.random_like(state)["generator_opt"] >= 0).all()  # a second moment
    made = case.Case("toy", "D step", "auto", jax.jit(step, donate_argnums=0), (state, x),
                     lambda: 1e9, donates=True)
    row = case.time_case(made, "NVIDIA H100", 0.01)
    jax.effects_barrier()
    assert seen == list(range(1, len(seen) + 1)) and len(seen) > 3
    assert row["finite"] and row["output_norm"] > 0 and "NOT FINITE" not in case.line("a", row)
    assert row["tflops"] == pytest.approx(1e-3 / row["median"])
    assert row["share_of_peak"] == pytest.approx(row["tflops"] / 989)


def test_a_result_that_is_no_number_is_said():
    for value in (np.nan, np.inf):
        found = case.looked_at({"a": np.ones(3, np.float32), "b": np.float32([1, value])})
        assert found == {"finite": False, "output_norm": None}
    assert case.looked_at([np.uint8([3, 4])]) == {"finite": True, "output_norm": 5.0}
    row = {"median": 1.0, "low": 1.0, "high": 1.0, "backend": "auto", "finite": False,
           "incomplete": "too large"}
    assert case.line("a", row).endswith("NOT FINITE  (incomplete: too large)")


def test_training_has_two_programs_whose_work_is_known():
    d, g = programs.train_cases(tiny(), jax.devices()[:1])
    assert (d.name, g.name) == ("demo_image/D step/dtype/auto", "demo_image/G step/dtype/auto")
    assert d.donates and g.donates and d.samples == 1 and d.fp8 is None and d.weights == 2
    # one block: D runs G, then 3 samples forward and back; G runs both, and back through both
    assert 1.5 < d.flops() / g.flops() < 2.2


def test_one_step_of_two_can_be_asked_for_and_none_without_a_gradient(monkeypatch):
    asked = []
    monkeypatch.setattr(programs, "train_cases", lambda config, *_: (
        asked.append(config.model.attention),
        [case.Case(s, s, "", None, ()) for s in programs.STEPS])[1])
    plan = run.Plan("train", lambda name: tiny(f"--config.model.attention={name}"), [None],
                    ["pallas", "cudnn_fp8"], steps=["G step"])
    (made,) = run.cases(plan)
    assert made.part == "G step" and asked == ["pallas"]
    assert made.config == config_digest(tiny("--config.model.attention=pallas",
                                             "--config.discriminator.matmul=dtype"))


def test_the_pipeline_goes_from_ids_to_frames(monkeypatch):
    umt5 = UMT5Config(vocabulary=20, width=16, depth=1, heads=2, head_dim=8, mlp_width=24)
    vae = VAEConfig(base=4, multipliers=(1, 1), blocks=1, temporal=(True,))
    cases = pipeline.stages(latents(), jax.devices()[0], "bfloat16", "chunk 1", umt5, vae)
    assert cases["draw"].args[3].shape == (1, 4, 16)  # the encoder's width, not the config's
    asked = []
    measure = pipeline.measure
    monkeypatch.setattr(pipeline, "measure", lambda *a, **k: (asked.append(k.get("apart", False)),
                                                              measure(*a, **k))[1])
    row = pipeline.time_pipeline(cases, seconds=0.01)
    assert asked[0] and not any(asked[1:])  # a latency is that of a call alone
    assert row["median"] > 0 and row["per_second"] > 0
    assert set(row["stages"]) == {"encode", "draw", "decode"} and min(row["stages"].values()) > 0
    frames = jax.eval_shape(cases["decode"].function, *cases["decode"].args)
    assert frames.shape == (1, 3, 8, 8, 3) and frames.dtype == np.uint8
    assert cases["decode"].flops() > 0 and cases["encode"].flops() > 0


def test_what_a_step_must_run_in_eight_bits():
    config = latents("--config.model.matmul=fp8", "--config.discriminator.matmul=fp8",
                     "--config.model.depth=3", "--config.discriminator.taps=1,2")
    assert programs.expected_fp8("D step", config) == 8 * (3 + 3 * 2)
    assert programs.expected_fp8("G step", config) == 8 * (3 * 3 + 2 * 2)
    assert programs.expected_fp8("D step", latents()) is None
    config.discriminator.matmul = "dtype"
    assert programs.expected_fp8("D step", config) == 8 * 3
    config.model.matmul_kept = 1
    assert programs.expected_fp8("D step", config) == 8 * 2
    whole = wan("--config.data.height=60", "--config.data.width=104", "--config.data.frames=21,",
                "--config.model.width=1536", "--config.model.text_tokens=512")
    assert programs.products(whole) == 9  # k and v of the text
    assert programs.products(wan()) == 7  # and q, k, v of a few video tokens
    whole.model.width = 5120
    assert programs.products(whole) == 10  # the 14B's are larger than XLA merges
    made = programs.forward_case(latents("--config.model.depth=3"), jax.devices()[:1], "fp8")
    assert made.fp8 == 24 and "fp8" in made.name
    assert programs.expected_kernels("one-step inference", wan(), "cudnn") == {
        '"__cudnn$fmhaSoftmax"': 2, '"__cudnn$fmhaSoftmaxBackward"': 0}  # self and cross


def test_the_products_of_a_block_are_timed_once_for_all_kernels(monkeypatch):
    """They do not depend on who computes attention."""
    timed = []
    measure = block.measure
    monkeypatch.setattr(block, "measure", lambda call, *a, **k: (timed.append(call), measure(
        call, *a, **k))[1])
    monkeypatch.setattr(block, "_TIMED", {})
    found, counts = [], []
    for backend, *others in (("oracle",), ("pallas",), ("oracle", "--config.model.mlp_ratio=2.0")):
        config = tiny(f"--config.model.attention={backend}", *others)
        found.append(block.parts_of(config, jax.devices()[0], "forward", 0.001))
        counts.append(len(timed))
    assert counts[1] == counts[0] + 1 < counts[2] - 1  # its attention alone; another network all
    assert found[0]["products_seconds"] == found[1]["products_seconds"] > 0


# -- rows --------------------------------------------------------------------------------------------


def test_a_row_of_other_sources_is_measured_again(tmp_path):
    path = tmp_path / "rows.json"
    Results(path, "cpu").add("a", {"median": 1.0})
    assert "a" in Results(path, "cpu")
    kept = json.loads(path.read_text())
    kept["rows"]["a"]["revision"] = "another"
    path.write_text(json.dumps(kept))
    assert "a" not in Results(path, "cpu") and Results(path, "cpu").rows["a"]["median"] == 1.0
    assert row_name("c", "forward", overrides=["--config.b=2", "--config.a=1"]) == "c/forward a=1 b=2"


def test_a_backend_that_cannot_serve_leaves_a_row_and_the_run_goes_on(capsys, tmp_path):
    out = tmp_path / "rows.json"
    code = cli.main(["bench", "forward", "--config", "configs/demo_image.py", "--seconds", "0.01",
                     "--json", str(out), "--weights", "float32", "--no-peers", "--backends",
                     "cudnn", "oracle", *TINY, *IMAGE, "--config.mesh.replica=8"])
    assert code == 0, capsys.readouterr().err
    refused, timed = json.loads(out.read_text())["rows"].values()
    assert "NVIDIA GPU" in refused["skipped"] and timed["median"] > 0
    assert "model.width=32" in capsys.readouterr().out


# -- PyTorch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [latents, wan])
def test_the_peers_do_the_same_work(make, monkeypatch):
    """Without a mask, with which PyTorch's flash kernel could not serve."""
    pytest.importorskip("diffusers")
    import torch

    functional, masks = torch.nn.functional, []
    attend = functional.scaled_dot_product_attention

    def watched_attention(query, key, value, attn_mask=None, *args, **kwargs):
        masks.append(attn_mask)
        return attend(query, key, value, attn_mask, *args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watched_attention)
    place, config = torch_peers.Place("cpu", compiled=False), make()
    peer = torch_peers.forward(config, place)
    assert peer.parameters > 0 and torch.isfinite(peer.call(*peer.sets[0])).all()
    first, second, third = (kwargs["hidden_states"] for (kwargs,) in peer.sets)
    assert (first != second).any() and (second != third).any()
    for part in ("forward", "gradient"):
        one = torch_peers.block(config, part, place)
        assert 0 < one.parameters < peer.parameters
        first, second, third = (next(filter(torch.is_tensor, jax.tree.leaves(each)))
                                for each in one.sets)
        assert (first != second).any() and (second != third).any()
        for inputs in one.sets:
            one.call(*inputs)
    calls = []
    watched = peer._replace(call=lambda kwargs: (calls.append(id(kwargs)), peer.call(kwargs))[1])
    row = torch_peers.time_peer(lambda: watched, place, 0.01, 1e9, "cpu")
    assert set(calls) == {id(kwargs) for (kwargs,) in peer.sets}
    said = case.line("qwen", {**row, "parameters": 12_180_000_000})
    assert said.endswith("12.2B parameters")
    assert row["median"] > 0 and row["tflops"] > 0 and row["parameters"] == peer.parameters
    assert masks and not any(mask is not None for mask in masks)
    if make is wan:
        return
    steps = torch_peers.training(config, place)
    noise = steps["G step"].sets[0]
    assert float(steps["D step"].call(*noise)) > 0
    before = float(steps["G step"].call(*noise))
    assert np.isfinite(before) and float(steps["G step"].call(*noise)) != before  # it moves
    assert not any(mask is not None for mask in masks)


def test_a_peer_without_the_mask_gives_the_same_numbers():
    """And an older diffusers is told the length of the text, which it does not read off it."""
    diffusers = pytest.importorskip("diffusers")
    import torch

    config, place = latents(), torch_peers.Place("cpu", compiled=False)
    torch.manual_seed(0)
    model = torch_peers.transformer(config).eval()
    ask = torch_peers.inputs(config, place)
    batch, words, _ = ask["encoder_hidden_states"].shape
    masked = {**ask, "encoder_hidden_states_mask": torch.ones(batch, words, dtype=torch.bool)}
    with torch.no_grad():
        one, other = (model(**each, return_dict=False)[0] for each in (ask, masked))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)

    class Older(diffusers.QwenImageTransformer2DModel):
        def forward(self, hidden_states, txt_seq_lens=None):
            return None

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(diffusers, "QwenImageTransformer2DModel", Older)
        assert torch_peers.inputs(config, place, 2)["txt_seq_lens"] == [words, words]


def test_pytorch_compiles_a_layer_once_for_all_of_them(monkeypatch):
    torch = pytest.importorskip("torch")
    whole = []
    monkeypatch.setattr(torch, "compile", lambda module: whole.append(module) or module)
    made = SimpleNamespace(_repeated_blocks=["Block"], compile_repeated_blocks=lambda: whole.append(1))
    assert torch_peers.Place("cpu").run(made) is made and whole == [1]
    alone = SimpleNamespace()
    torch_peers.Place("cpu").run(alone)
    torch_peers.Place("cpu", compiled=False).run(made)
    assert whole == [1, alone]


def test_without_a_gpu_a_peer_says_why():
    row = torch_peers.time_peer(lambda: None, torch_peers.Place(), 0.01, None, "cpu")
    assert row["skipped"] in ("no PyTorch with CUDA", "no PyTorch", "no diffusers")


# -- quality -----------------------------------------------------------------------------------------


def test_random_weights_keep_the_statistics_of_trained_ones():
    rng = np.random.default_rng(0)
    trained = {"blocks": {"up": {"kernel": 3.0 * rng.standard_normal((2, 16, 64)) / 4}},
               "modulation": np.repeat(np.arange(6.0), 32), "bias": 5 + rng.standard_normal(64)}
    trained["blocks"]["up"]["kernel"][1] *= 2
    shapes = {"blocks": {"up": {"kernel": np.zeros((4, 64, 256))}}, "modulation": np.zeros(600),
              "bias": np.zeros(4096)}
    made = quality.like_trained(shapes, trained)
    gains = np.asarray(made["blocks"]["up"]["kernel"]).std(axis=(1, 2)) * 8
    np.testing.assert_allclose(gains, [3, 3, 6, 6], rtol=0.1)
    np.testing.assert_allclose(made["modulation"].reshape(6, 100).mean(1), range(6), atol=1e-6)
    assert abs(float(made["bias"].mean()) - 5) < 0.3


def test_eight_bits_may_move_the_fd_by_less_than_a_seed_does():
    def run(*values):
        return [{"dtype": dtype, "both": eight} for dtype, eight in values]

    noise = run((100.0, 100.5), (104.0, 103.5))
    found = quality.fd_verdict([noise], "both")
    assert found["moved"] == 0.0 and found["noise"] == pytest.approx(8**0.5)
    assert found["passes"] and found["training"] is None
    assert (found["runs"], found["seeds"]) == (1, 2)
    assert not quality.fd_verdict([run((100.0, 109.0), (104.0, 113.0))], "both")["passes"]
    # Two seeds of the training, 10 apart: three is much beside the noise and little beside those.
    first, second = run((99.0, 102.0), (101.0, 104.0)), run((109.0, 112.0), (111.0, 114.0))
    far = quality.fd_verdict([first, second], "both")
    assert far["training"] == pytest.approx(50**0.5) and far["noise"] == pytest.approx(2**0.5)
    assert far["moved"] == 3.0 and far["each"] == [3.0, 3.0] and far["passes"]
    near = quality.fd_verdict([first] * 2, "both")
    assert near["training"] == 0.0 and not near["passes"]


def test_the_gates_of_several_checkpoints(capsys):
    results = Results(None, "cpu")
    ask = {"mode": "one_step", "count": 9, "kinds": ["attention"]}
    for name, times, fd in (("a/1", 1.9, 100.0), ("a/2", 1.5, 110.0), ("a", 2.1, 0.0)):
        results.add(f"distance/{name}/4 layers", {"times": {"attention": times, "both": 9.0}}, name)
        for seed in range(2):
            results.add(f"fd/{name}/one_step/9/seed {seed}",
                        {"dtype": fd + 2 * seed, "attention": fd + 2 * seed + 3}, name)
    # A third seed was measured of weights that the folder has no more.
    results.add("fd/a/1/one_step/9/seed 2", {"dtype": 0.0, "attention": 50.0}, "old")
    assert quality.report({"a/1": "a/1", "a/2": "a/2"}, results, **ask)
    said = capsys.readouterr().out
    assert "verdict/a/1: attention in eight bits move the FD by +3.00" in said
    assert "a new seed of the noise by 1.41 (standard deviation): fails" in said
    assert said.count("fails") == 2 and "by 7.07 (standard deviation): passes" in said
    assert results.rows["verdict/a/1 a/2"]["attention"]["training"] == pytest.approx(50**0.5)
    assert not quality.report({"a/1": "a/1"}, results, **ask)  # 3 is more than the noise's 1.41
    assert not quality.report({"a": "a"}, results, **ask)
    assert not quality.report({"other": "a"}, results, **ask)
    # One seed of the noise judges nothing: the FD's gate does not hold.
    results.add("distance/b/4 layers", {"times": {"attention": 1.0}}, "b")
    results.add("fd/b/one_step/9/seed 0", {"dtype": 9.0, "attention": 9.0}, "b")
    capsys.readouterr()
    assert not quality.report({"b": "b"}, results, **ask)
    assert "verdict/b: the FD is not judged" in capsys.readouterr().out


def test_an_fd_row_is_filled_up_with_the_kinds_it_lacks(monkeypatch):
    drawn = []
    monkeypatch.setattr(quality, "load_split", lambda *a, **k: SimpleNamespace(frames=None))
    monkeypatch.setattr(quality, "Reference", SimpleNamespace(build=lambda *a, **k: None))
    monkeypatch.setattr(quality, "MobileNetFeatures", lambda: None)
    monkeypatch.setattr(quality, "draw", lambda generator, *a, **k: (drawn.append(
        (generator.model.get("matmul"), generator.network.attention, k["seed"]))
        or SimpleNamespace(frames=None), None))
    monkeypatch.setattr(quality, "measure", lambda *a: {"fd": float(len(drawn))})
    results, ask = Results(None, "cpu"), {"seeds": [5], "count": 3, "mode": "one_step"}
    quality.fd_rows("bundled:base", results, kinds=["products"], tell=lambda _: None, **ask)
    quality.fd_rows("bundled:base", results, kinds=["products", "both"], tell=lambda _: None, **ask)
    (row,) = results.rows.values()
    assert drawn[1:] == [("fp8", "auto", 5), ("fp8", "cudnn_fp8", 5)] and len(drawn) == 3
    assert (row["dtype"], row["products"], row["both"]) == (1.0, 2.0, 3.0)
    # Other weights in the same folder: everything anew.
    monkeypatch.setattr(quality, "digest", lambda generator: "trained again")
    quality.fd_rows("bundled:base", results, kinds=["products"], tell=lambda _: None, **ask)
    (row,) = results.rows.values()
    assert len(drawn) == 5 and "both" not in row and row["config"] == "trained again"


def test_a_checkpoint_is_told_by_its_config_and_its_weights():
    one = api.load("bundled:base")
    other = api.load("bundled:base")
    assert quality.digest(one) == quality.digest(other) != ""
    leaves, shape = jax.tree.flatten(one.params)
    other.params = jax.tree.unflatten(shape, [leaves[0] + 1e-6, *leaves[1:]])
    assert quality.digest(one) != quality.digest(other)


def test_a_network_like_the_8b_is_measured_in_both_ways(monkeypatch):
    monkeypatch.setitem(quality.LIKE_8B, "width", 128)
    monkeypatch.setitem(quality.LIKE_8B, "heads", 1)
    monkeypatch.setitem(quality.LIKE_8B, "text_width", 16)
    monkeypatch.setattr(quality, "SHAPE", (1, 4, 4, 16))
    results = Results(None, "cpu")
    quality.distance_rows("bundled:base", results, depths=[1], seeds=[0], kinds=["both"],
                          tell=lambda _: None)
    (row,) = results.rows.values()
    assert 0 < row["bfloat16"] < row["both"] < 0.2
    assert row["times"] == {"both": row["both"] / row["bfloat16"]}
