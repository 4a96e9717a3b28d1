"""LoRA files: read, merged, refused; and those that an adapted run writes."""

import json

import jax
import numpy as np
import pytest
import synthetic
from safetensors.numpy import load_file, save_file

from apt_jax.cli import main as cli
from apt_jax.config import base_config
from apt_jax.convert.families import transformer_plan
from apt_jax.convert.importing import import_folder
from apt_jax.convert.lora import read_lora, write_lora
from apt_jax.errors import UserError
from apt_jax.models.presets import make_generator
from apt_jax.nn import lora
from apt_jax.weights import flatten, load_generator

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def good():
    """Rank 3 on two matrices, one of them not square."""
    return {"transformer.blocks.1.attn2.to_k.lora_A.weight": normal(3, 24),
            "transformer.blocks.1.attn2.to_k.lora_B.weight": normal(24, 3),
            "transformer.blocks.0.ffn.net.2.lora_A.weight": normal(3, 40),
            "transformer.blocks.0.ffn.net.2.lora_B.weight": normal(24, 3)}


def plan():
    return transformer_plan(synthetic.WAN)


@pytest.mark.parametrize("alpha", ["none", "metadata", "pattern", "tensors"])
def test_a_lora_is_merged(tmp_path, alpha):
    """By hand in numpy, with each way to say alpha; everything else stays bit by bit."""
    synthetic.write_transformer(tmp_path / "base", synthetic.WAN, dtype=np.dtype(np.float32))
    tensors, metadata, scale = good(), {}, {"none": 1.0, "tensors": 2.0}.get(alpha, 3.0)
    if alpha in ("metadata", "pattern"):
        about = {"transformer.r": 3, "transformer.lora_alpha": 9 if alpha == "metadata" else 3,
                 "transformer.use_rslora": False}
        if alpha == "pattern":
            about["transformer.alpha_pattern"] = {"attn2.to_k": 9, "blocks.0.ffn.net.2": 9,
                                                  "to_q": 5}
        metadata = {"lora_adapter_metadata": json.dumps(about)}
    if alpha == "tensors":
        tensors |= {f"transformer.{m}.alpha": np.array(6.0, np.float32)
                    for m in ("blocks.1.attn2.to_k", "blocks.0.ffn.net.2")}
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    plain = load_generator(import_folder(str(tmp_path / "base"), tmp_path / "plain"))[1]
    code = cli.main(["convert", "import", "--source", str(tmp_path / "base"), "--to",
                     str(tmp_path / "out"), "--lora", str(tmp_path / "x.safetensors"),
                     "--lora-scale", "0.5", "--quiet"])
    assert code == 0
    before, after = flatten(plain), flatten(load_generator(tmp_path / "out")[1])
    for name, value in after.items():
        want = before[name].copy()
        for ours, theirs, layer in (("cross/k", "blocks.1.attn2.to_k", 1),
                                    ("mlp/down", "blocks.0.ffn.net.2", 0)):
            if name == f"backbone/blocks/{ours}/kernel":
                a, b = (tensors[f"transformer.{theirs}.lora_{x}.weight"] for x in "AB")
                want[layer] += 0.5 * scale * (b @ a).T
        np.testing.assert_allclose(value, want, rtol=1e-6, atol=1e-6, err_msg=name)
    source = json.loads((tmp_path / "out" / "config.json").read_text())["source"]
    assert source["lora"]["scale"] == 0.5 and len(source["lora"]["sha256"]) == 64


def drop(t):
    t.pop("transformer.blocks.0.ffn.net.2.lora_B.weight")


def add(name, *shape):
    return lambda t: t.update({name: normal(*shape)})


@pytest.mark.parametrize(("change", "metadata", "says"), [
    (drop, {}, r"lacks blocks\.0\.ffn\.net\.2\.lora_B\.weight"),
    (add("transformer.blocks.9.attn1.to_q.lora_A.weight", 3, 24), {},
     r"blocks\.9\.attn1\.to_q, which is no matrix of this model"),
    (add("transformer.blocks.0.norm2.lora_A.weight", 3, 24), {}, "which is no matrix"),
    (add("blocks.1.attn2.to_k.lora_A.weight", 3, 24), {}, "twice, under two names"),
    (add("diffusion_model.blocks.0.self_attn.q.lora_down.weight", 3, 24), {},
     r"lacks blocks\.0\.attn1\.to_q\.lora_B"),
    (add("diffusion_model.blocks.1.cross_attn.k.lora_down.weight", 3, 24), {},
     r"has blocks\.1\.attn2\.to_k twice, under two names"),
    (add("diffusion_model.blocks.0.self_attn.q.diff_b", 3), {}, "whole tensor.* fuse_lora"),
    (add("lora_unet_blocks_0_self_attn_q.lora_down.weight", 3, 24), {}, "kohya.* fuse_lora"),
    (add("blocks.0.attn1.to_q.hada_w1_a", 3), {}, "not of a LoRA in diffusers' format"),
    (add("transformer.blocks.0.ffn.net.2.lora_A.weight"), {}, r"has A \(\) and B"),
    (add("transformer.blocks.0.ffn.net.2.lora_A.weight", 0, 40), {}, r"has A \(0, 40\)"),
    (add("transformer.blocks.0.ffn.net.2.alpha", 2), {}, "alpha is no single number"),
    (lambda t: t.update({"x.lora_A.weight": np.zeros((3, 24), np.int8)}), {}, "is I8; give a LoRA"),
    (lambda t: t["transformer.blocks.0.ffn.net.2.lora_B.weight"].fill(np.nan), {}, "not finite"),
    (lambda t: None, {"lora_alpha": "high"}, "is no number"),
    (lambda t: None, {"alpha_pattern": {"(": 3}}, "is no number"),
    (lambda t: None, {"alpha_pattern": [3]}, "is no number"),
    (add("transformer.blocks.0.ffn.net.2.lora_B.weight", 3, 24), {},
     r"A \(3, 40\) and B \(3, 24\), its matrix is \(24, 40\)"),
    (lambda t: t.clear(), {}, "holds no tensors"),
    (lambda t: None, {"use_dora": True}, "use_dora = True is another kind"),
    (lambda t: None, {"use_rslora": True}, "use_rslora"),
    (lambda t: None, "{", "not valid JSON"),
])
def test_wrong_files_are_one_line(tmp_path, change, metadata, says):
    tensors = good()
    change(tensors)
    text = metadata if isinstance(metadata, str) else json.dumps(
        {f"transformer.{k}": v for k, v in metadata.items()})
    save_file(tensors, tmp_path / "x.safetensors",
              {"lora_adapter_metadata": text} if metadata else None)
    with pytest.raises(UserError, match=says) as error:
        read_lora(tmp_path / "x.safetensors", plan())
    assert "\n" not in str(error.value)


def test_a_cut_file(wan_source, tmp_path):
    save_file(good(), tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(data[:-9])
    with pytest.raises(UserError, match="damaged or incomplete"):
        import_folder(str(wan_source[0]), tmp_path / "out", lora=str(tmp_path / "x.safetensors"))
    assert not (tmp_path / "out").exists()


# Every matrix of attention and MLP, by diffusers' names, and nothing else.
BLOCK = {"wan": "blocks", "qwen": "transformer_blocks"}
MATRICES = {
    "wan": [*(f"attn{n}.{m}" for n in (1, 2) for m in ("to_q", "to_k", "to_v", "to_out.0")),
            "ffn.net.0.proj", "ffn.net.2"],
    "qwen": [*(f"attn.{m}" for m in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj",
                                     "add_k_proj", "add_v_proj", "to_add_out")),
             *(f"{side}_mlp.net.{m}" for side in ("img", "txt") for m in ("0.proj", "2"))],
}


@pytest.mark.parametrize("model_name", MATRICES)
def test_what_we_write_reads_back_as_the_merge(model_name, tmp_path):
    """Adapters -> file -> adapters of their matrices: the same as merging ours, also for a fused
    qkv, whose three matrices share A."""
    model = {"wan": synthetic.WAN, "qwen": synthetic.QWEN}[model_name]
    config = base_config()
    config.lora.rank, config.lora.alpha = 3, 6.0
    net = make_generator(model, config.lora)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), net.abstract())
    adapters, base = lora.split(params)
    table = transformer_plan(model)
    write_lora(tmp_path, table, flatten(adapters), 2.0)
    found = read_lora(tmp_path, table)
    kernels = [leaf for leaf in table.leaves.values()
               if leaf.name.replace("kernel", "lora_a") in flatten(adapters)]
    assert len(found) == sum(len(row) for leaf in kernels for row in leaf.parts)
    assert set(found) == {f"{BLOCK[model_name]}.{i}.{module}.weight" for i in range(model["depth"])
                          for module in MATRICES[model_name]}
    merged = flatten(lora.merge(lora.join(base, adapters), 2.0))
    for leaf in kernels:
        value = flatten(base)[leaf.name]
        for layer, row in enumerate(leaf.parts):
            parts = []
            for name, part in zip(row, leaf.split(value[layer]), strict=True):
                a, b, scale = found[name]
                assert scale == 1.0
                parts.append(part + b @ a)
            np.testing.assert_allclose(leaf.join(parts), merged[leaf.name][layer], rtol=1e-4,
                                       atol=1e-4)


# -- runs and diffusers ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A tiny Wan pipeline of diffusers and its component folder."""
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    import tiny_pipelines

    folder = tmp_path_factory.mktemp("lora")
    source = tiny_pipelines.save_wan(folder / "source")
    return source, import_folder(str(source), folder / "ckpt")


def fake_run(folder, ckpt, model, monkeypatch):
    """A run folder whose checkpoint gives random adapters."""
    from apt_jax.config import save_json
    from apt_jax.weights import runs

    config = base_config()
    config.stage, config.name = "consistency", "adapted"
    for key, value in model.items():
        config.model[key] = value
    config.lora.rank, config.lora.alpha = 2, 4.0
    config.init.diffusion = str(ckpt)
    (folder / "checkpoints").mkdir(parents=True)
    save_json(config, folder / "config.json")
    rng = np.random.default_rng(3)
    adapters = jax.tree.map(lambda s: (0.2 * rng.normal(size=s.shape)).astype(np.float32),
                            lora.split(make_generator(config.model, config.lora).abstract())[0])
    monkeypatch.setattr(runs, "newest", lambda *_: adapters)
    return folder


def test_diffusers_reads_the_adapters_of_a_run(pipeline, tmp_path, monkeypatch):
    """pipe.load_lora_weights on the base = our merged weights, exported; one forward pass."""
    import torch
    from diffusers import WanPipeline

    source, ckpt = pipeline
    model = load_generator(ckpt)[0]
    run = fake_run(tmp_path / "run", ckpt, model, monkeypatch)
    for flags, name in ((["--adapters"], "alone"), ([], "merged")):
        assert cli.main(["convert", "export", "--checkpoint", str(run), "--to",
                         str(tmp_path / name), "--quiet", *flags]) == 0
    assert sorted(p.name for p in (tmp_path / "alone").glob("[!.]*")) == [
        "README.md", "pytorch_lora_weights.safetensors"]
    assert "LoRA of rank 2" in (tmp_path / "alone" / "README.md").read_text()
    pipe = WanPipeline.from_pretrained(source)
    x = {"hidden_states": torch.randn(1, 16, 2, 4, 6), "timestep": torch.tensor([700.0]),
         "encoder_hidden_states": torch.randn(1, 512, 24), "return_dict": False}
    with torch.no_grad():
        plain = pipe.transformer(**x)[0]
        pipe.load_lora_weights(str(tmp_path / "alone"))
        adapted = pipe.transformer(**x)[0]
        merged = WanPipeline.from_pretrained(tmp_path / "merged").transformer(**x)[0]
    size = adapted.norm()
    assert (adapted - merged).norm() < 1e-4 * size < 1e-2 * (adapted - plain).norm()


def test_a_lora_that_peft_made_is_merged_as_diffusers_fuses_it(pipeline, tmp_path):
    """Ranks and alphas that differ between modules, in the file's metadata; loaded by both."""
    import torch
    from diffusers import WanPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    source, _ = pipeline
    pipe = WanPipeline.from_pretrained(source)
    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(
        r=3, lora_alpha=6, init_lora_weights=False, rank_pattern={"attn2.to_k": 2},
        alpha_pattern={"attn2.to_k": 5},
        target_modules=["attn1.to_q", "attn2.to_k", "ffn.net.0.proj"]))
    state = get_peft_model_state_dict(pipe.transformer)
    about = {k: sorted(v) if isinstance(v, set) else v
             for k, v in pipe.transformer.peft_config["default"].to_dict().items()}
    WanPipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers=state,
                                  transformer_lora_adapter_metadata=about)
    pipe = WanPipeline.from_pretrained(source)
    pipe.load_lora_weights(str(tmp_path / "lora"))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    want = {name: value.numpy() for name, value in pipe.transformer.state_dict().items()}
    assert load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    ours = import_folder(str(source), tmp_path / "ours", lora=str(tmp_path / "lora"))
    from apt_jax.convert.exporting import export_folder
    from apt_jax.tensor_files import open_folder

    out = export_folder(str(ours), tmp_path / "out")
    with open_folder(out / "transformer", "diffusion_pytorch_model") as tensors:
        assert set(tensors.tensors) == set(want)
        for name, value in want.items():
            np.testing.assert_allclose(tensors.read(name), value, rtol=1e-5, atol=1e-6,
                                       err_msg=name)


@pytest.mark.parametrize("halves", [("lora_down", "lora_up"), ("lora_A", "lora_B")])
def test_a_lora_of_the_original_names_is_merged_as_diffusers_does(pipeline, tmp_path, halves):
    """As ComfyUI and the original Wan code name it; with alphas and without."""
    from diffusers import WanPipeline

    from apt_jax.convert.lora import Merged
    from apt_jax.tensor_files import open_folder

    source, ckpt = pipeline
    sizes = {"blocks.0.self_attn.q": (24, 24), "blocks.0.self_attn.o": (24, 24),
             "blocks.1.cross_attn.k": (24, 24), "blocks.2.cross_attn.o": (24, 24),
             "blocks.1.ffn.0": (24, 40), "blocks.2.ffn.2": (40, 24), "head.head": (24, 64),
             "time_projection.1": (24, 144), "text_embedding.0": (24, 24),
             "text_embedding.2": (24, 24), "time_embedding.0": (32, 24),
             "time_embedding.2": (24, 24)}
    tensors = {}
    for module, (inward, outward) in sizes.items():
        tensors[f"diffusion_model.{module}.{halves[0]}.weight"] = normal(2, inward)
        tensors[f"diffusion_model.{module}.{halves[1]}.weight"] = normal(outward, 2)
        if module.startswith("blocks") and halves[0] == "lora_down":
            tensors[f"diffusion_model.{module}.alpha"] = np.array(5.0, np.float32)
    save_file(tensors, tmp_path / "x.safetensors")
    pipe = WanPipeline.from_pretrained(source)
    pipe.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    adapters = read_lora(tmp_path / "x.safetensors", transformer_plan(load_generator(ckpt)[0]))
    assert len(adapters) == len(sizes)
    with open_folder(source / "transformer", "diffusion_pytorch_model") as base:
        merged = Merged(base, adapters)
        for name, value in pipe.transformer.state_dict().items():
            np.testing.assert_allclose(merged.read(name), value.numpy(), rtol=1e-5, atol=2e-5,
                                       err_msg=name)


def test_a_merge_that_float16_cannot_hold(tmp_path):
    synthetic.write_transformer(tmp_path / "base", synthetic.WAN, dtype=np.dtype(np.float16))
    save_file(good(), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="beyond the range of float16 .*lower --lora-scale"):
        import_folder(str(tmp_path / "base"), tmp_path / "out", lora_scale=1e6,
                      lora=str(tmp_path / "x.safetensors"))
    assert not (tmp_path / "out").exists()
