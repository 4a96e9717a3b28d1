"""Wrong sources, bases, arguments and disks: one clear line, and nothing left behind."""

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import synthetic
from safetensors.numpy import save_file

from apt_jax import tensor_files
from apt_jax.cli import main as cli
from apt_jax.convert.exporting import export_folder
from apt_jax.convert.importing import import_folder
from apt_jax.errors import UserError

STEM = "diffusion_pytorch_model"


def tree(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def copy(wan_source, tmp_path):
    """A copy of the source to damage (files of its own, no links)."""
    import shutil

    return shutil.copytree(wan_source[0], tmp_path / "source")


@pytest.fixture(scope="module")
def qwen_source(tmp_path_factory):
    """A Qwen-Image pipeline whose text encoder, which is not converted, has two files."""
    folder = tmp_path_factory.mktemp("source") / "qwen"
    synthetic.write_pipeline(folder, synthetic.QWEN)
    (folder / "text_encoder" / "model.safetensors").unlink()
    synthetic.write_tensors(folder / "text_encoder", "model",
                            synthetic.umt5_plan(synthetic.UMT5).theirs, limit=13_000)
    return folder


@pytest.fixture(scope="module")
def qwen_components(qwen_source, tmp_path_factory):
    return import_folder(str(qwen_source), tmp_path_factory.mktemp("ckpt") / "qwen")


def rewrite(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def set_(**fields):
    return lambda folder: rewrite(folder / "transformer" / "config.json",
                                  lambda value: value.update(fields))


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def first_shard(folder):
    return sorted((folder / "transformer").glob("*.safetensors"))[0]


def rename_tensor(folder):
    path = folder / "vae" / f"{STEM}.safetensors"
    data = path.read_bytes()
    assert data.count(b'"encoder.conv_in.bias"') == 1
    path.write_bytes(data.replace(b'"encoder.conv_in.bias"', b'"encoder.conv_in.bios"'))


def untie(folder):
    save_file({"shared.weight": np.zeros((64, 20), np.float32),
               "encoder.embed_tokens.weight": np.ones((64, 20), np.float32),
               **{n: np.zeros(s, np.float32) for n, s in
                  synthetic.umt5_plan(synthetic.UMT5).theirs.items() if n != "shared.weight"}},
              folder / "text_encoder" / "model.safetensors")


def integers(folder):
    shapes = synthetic.vae_plan(synthetic.VAE).theirs
    save_file({n: np.zeros(s, np.int8 if n == "quant_conv.bias" else np.float32)
               for n, s in shapes.items()}, folder / "vae" / f"{STEM}.safetensors")


@pytest.mark.parametrize(("damage", "says"), [
    (lambda f: cut(first_shard(f)), "damaged or incomplete"),
    (lambda f: cut(f / "vae" / f"{STEM}.safetensors"), "vae.*damaged or incomplete"),
    (lambda f: first_shard(f).unlink(), "lacks diffusion_pytorch_model-00001"),
    (lambda f: (f / "transformer" / "config.json").unlink(), "no readable config.json"),
    (lambda f: (f / "transformer" / "config.json").write_text("{"), "not valid JSON"),
    (lambda f: (f / "transformer" / "config.json").write_text("[]"), "holds no table but list"),
    (set_(_class_name="FluxTransformer2DModel"), "is WanTransformer3DModel, .* FluxTransformer2"),
    (set_(num_layers=4), r"lacks tensor blocks\.3\.attn1\.norm_k\.weight and 26 more"),
    (set_(num_layers=2), r"unknown tensor blocks\.2\."),
    (set_(ffn_dim=48), r"blocks\.0\.ffn\.net\.0\.proj\.bias is \(40,\).*makes it \(48,\)"),
    (set_(num_layers="3"), "num_layers = '3' is not a valid value"),
    (set_(num_layers=0), "num_layers = 0 must be 1 or more"),
    (set_(num_layers=10**9), "num_layers = 1000000000 is more than any model has"),
    (set_(image_dim=1280), "image_dim = 1280 is not supported"),
    (set_(in_channels=36), "image-to-video"),
    (set_(new_thing=3), "field new_thing = 3 is unknown"),
    (rename_tensor, r"unknown tensor encoder\.conv_in\.bios|lacks tensor encoder\.conv_in\.bias"),
    (untie, "tied in this model, but differ"),
    (integers, r"quant_conv\.bias is I8; only unquantised"),
    (lambda f: (f / "tokenizer" / "tokenizer.json").unlink(), "tokenizer lacks tokenizer.json"),
    (lambda f: [p.unlink() for p in (f / "tokenizer").iterdir()] and (f / "tokenizer").rmdir(),
     "lacks the folder tokenizer"),
    (lambda f: rewrite(f / "model_index.json", lambda v: v.update(_class_name="FluxPipeline")),
     "is of FluxPipeline; WanPipeline and QwenImagePipeline can be"),
    (lambda f: rewrite(f / "model_index.json", lambda v: v.update(boundary_ratio=0.9)),
     "only Wan 2.1"),
    (lambda f: rewrite(f / "model_index.json",
                       lambda v: v.update(transformer_2=["diffusers", "WanTransformer3DModel"])),
     "component transformer_2"),
    (lambda f: rewrite(f / "model_index.json", lambda v: v.pop("vae")), "names no vae"),
    (lambda f: rewrite(f / "vae" / "config.json", lambda v: v.update(is_residual=True)),
     "is_residual"),
    (lambda f: rewrite(f / "text_encoder" / "config.json", lambda v: v.update(model_type="t5")),
     "describes t5, not umt5"),
    (lambda f: rewrite(f / "text_encoder" / "config.json",
                       lambda v: v.update(feed_forward_proj="relu")), "'relu' is not supported"),
    (lambda f: (f / "model_index.json").write_text("[1]"), "model_index.json holds no table"),
    (lambda f: rewrite(f / "model_index.json", lambda v: v.update(vae=[1, 2, 3])),
     "no library and class"),
    (lambda f: rewrite(f / "model_index.json",
                       lambda v: v["vae"].__setitem__(1, "AutoencoderKLQwenImage")),
     "says that vae is AutoencoderKLQwenImage, .*config.json AutoencoderKLWan"),
    (lambda f: (f / "tokenizer" / "tokenizer.json").write_text(""), "tokenizer.json is not valid"),
    (lambda f: (f / "scheduler" / "scheduler_config.json").write_text("[]"), "holds no table"),
    (lambda f: (f / "text_encoder" / "config.json").write_text("[" * 10**5), "not valid JSON"),
    (lambda f: rewrite(f / "vae" / "config.json", lambda v: v.update(dim_mult="1244")),
     "dim_mult = '1244' is not a valid value"),
    (lambda f: rewrite(f / "vae" / "config.json", lambda v: v.update(latents_std=[0] * 16)),
     "not above 0"),
    (lambda f: (f / "model_index.json").unlink(), "neither model_index.json nor config.json"),
])
def test_a_bad_source_is_one_line_and_leaves_nothing(copy, tmp_path, capsys, damage, says):
    import re

    damage(copy)
    code = cli.main(["convert", "import", "--source", str(copy), "--to", str(tmp_path / "out"),
                     "--quiet"])
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1, err
    assert re.search(says, err), err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_a_checkpoint_of_another_model(tmp_path, wan_source):
    """Qwen-Image's weights beside Wan's config."""
    synthetic.write_transformer(tmp_path / "mixed", synthetic.QWEN)
    config = (wan_source[0] / "transformer" / "config.json").read_text()
    (tmp_path / "mixed" / "config.json").write_text(config)
    with pytest.raises(UserError, match=r"lacks tensor blocks\.0\.attn1"):
        import_folder(str(tmp_path / "mixed"), tmp_path / "out")


@pytest.mark.parametrize("way", ["import", "export"])
def test_a_full_disk_leaves_nothing(wan_source, wan_components, tmp_path, monkeypatch, capsys, way):
    """The disk fills up while the second file is synced."""
    synced = []

    def refuse(handle):
        synced.append(handle)
        if len(synced) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensor_files.os, "fsync", refuse)
    arguments = (["--source", str(wan_source[0])] if way == "import" else
                 ["--checkpoint", str(wan_components), "--shard-gb", "5e-5"])
    code = cli.main(["convert", way, *arguments, "--to", str(tmp_path / "out"), "--quiet"])
    err = capsys.readouterr().err
    assert code == 2 and "no space left" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_said_before_anything_is_written(wan_source, tmp_path, monkeypatch):
    import collections

    from apt_jax.convert import folders

    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(UserError, match=r"needs \d\.\d MB and its disk has 0\.0 MB free"):
        import_folder(str(wan_source[0]), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_import_leaves_nothing(wan_source, tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tensor_files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        import_folder(str(wan_source[0]), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_unasked(wan_source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(UserError, match="is there already"):
        import_folder(str(wan_source[0]), tmp_path / "out")
    with pytest.raises(UserError, match=r"files that convert did not write \(mine\)"):
        import_folder(str(wan_source[0]), tmp_path / "out", overwrite=True)
    assert tree(tmp_path) == ["out/mine"]
    (tmp_path / "out" / "mine").unlink()
    for _ in range(2):
        import_folder(str(wan_source[0]), tmp_path / "out", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_copies_where_asked(wan_source, tmp_path):
    out = import_folder(str(wan_source[0]), tmp_path / "out", copy=True)
    assert (out / "source" / "vae" / f"{STEM}.safetensors").stat().st_nlink == 1


@pytest.mark.parametrize(("damage", "says"), [
    (lambda f: cut(f / "model-00002-of-00002.safetensors"),
     r"text_encoder/model-00002-of-00002\.safetensors is damaged or incomplete"),
    (lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
     r"text_encoder lacks model-00002-of-00002\.safetensors"),
    (lambda f: rewrite(f / "model.safetensors.index.json",
                       lambda v: v["weight_map"].pop("shared.weight")),
     r"shared\.weight should be in no file"),
    (lambda f: [p.unlink() for p in f.glob("model*")], "text_encoder has neither"),
    (lambda f: (f / "model.fp16.safetensors").write_bytes(b"half"), r"model\.fp16\.safetensors is"),
    (lambda f: (f / "config.json").unlink(), "text_encoder has no readable config.json"),
])
def test_a_network_that_is_not_converted_is_checked_too(qwen_source, qwen_components, tmp_path,
                                                          damage, says):
    """Qwen-Image's text encoder goes through as it is: broken at import, or between the two."""
    import shutil

    broken = shutil.copytree(qwen_source, tmp_path / "broken")
    damage(broken / "text_encoder")
    with pytest.raises(UserError, match=says):
        import_folder(str(broken), tmp_path / "out")
    ours = shutil.copytree(qwen_components, tmp_path / "ours")
    damage(ours / "source" / "text_encoder")
    with pytest.raises(UserError, match=says):
        export_folder(str(ours), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "ours"]


def test_a_component_folder_that_was_damaged(qwen_components, tmp_path):
    """What a whole pipeline needs and the base no longer has; nothing is left out without a word."""
    import shutil

    ours = shutil.copytree(qwen_components, tmp_path / "ours")
    card, source = ours / "transformer" / "config.json", ours / "source"
    saved = card.read_text()
    for change, says in (({"tensor_dtypes": {"": ["F32"]}}, "does not say the source's dtypes"),
                         ({"tensor_dtypes": {"a": "F32"}}, "does not say the source's dtypes"),
                         ({"tensor_dtypes": {"": "I8"}}, "does not say the source's dtypes"),
                         ({"model": {"width": "x"}}, "describes no network that can be built")):
        rewrite(card, lambda value, change=change: value.update(change))
        with pytest.raises(UserError, match=says):
            export_folder(str(ours), tmp_path / "out")
        card.write_text(saved)
    for damage, says in (
            (lambda: (source / "tokenizer" / "tokenizer.json").unlink(), "lacks tokenizer.json"),
            (lambda: shutil.rmtree(source / "vae"), "lacks the folder vae"),
            (lambda: shutil.rmtree(source), "no readable model_index.json")):
        damage()
        with pytest.raises(UserError, match=says):
            export_folder(str(ours), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_needs_its_own_base(wan_components, qwen_source, qwen_components, tmp_path):
    assert json.loads((qwen_components / "config.json").read_text())["components"]["text_encoder"] \
        == "source/text_encoder"
    with pytest.raises(UserError, match="of family qwen_image, the checkpoint of wan"):
        export_folder(str(wan_components), tmp_path / "out", base=str(qwen_components))
    with pytest.raises(UserError, match="is no component folder"):
        export_folder(str(wan_components), tmp_path / "out", base=str(qwen_source))
    synthetic.write_pipeline(tmp_path / "deep", {**synthetic.WAN, "depth": 2})
    deep = import_folder(str(tmp_path / "deep"), tmp_path / "deeper")
    with pytest.raises(UserError, match="has num_layers = 2, the checkpoint 3"):
        export_folder(str(wan_components), tmp_path / "out", base=str(deep))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("arguments", "says"), [
    (["import", "--to", "x"], "needs --source"),
    (["export", "--to", "x"], "needs --checkpoint"),
    (["import", "--source", "a", "--checkpoint", "b", "--to", "x"],
     "--checkpoint are of apt-jax convert export"),
    (["import", "--source", "a", "--to", "x", "--dtype", "float16", "--shard-gb", "1"],
     "--dtype and --shard-gb are of apt-jax convert export; import takes --source"),
    (["export", "--source", "a", "--checkpoint", "b", "--to", "x", "--lora", "c"],
     "--source and --lora are of apt-jax convert import"),
    (["export", "--checkpoint", "b", "--to", "x", "--adapters", "--dtype", "float32", "--base",
      "c", "--copy", "--two-step-time", "0.3", "--shard-gb", "1"],
     "--base and --dtype and --two-step-time and --shard-gb and --copy do not apply to --adapters"),
    (["import", "--source", "a", "--to", "x", "--lora-scale", "2"], "give both"),
    (["import", "--source", ".", "--to", "x", "--revision", "v1"], "--revision v1 is of a hub id"),
    (["import", "--source", "n" * 300, "--to", "x"], "cannot be read (File name too long)"),
    (["export", "--checkpoint", "{source}", "--to", "x"], "is a diffusers folder; apt-jax convert"),
    (["export", "--checkpoint", "{source}/transformer", "--to", "x"], "is a diffusers folder"),
    (["export", "--checkpoint", "n" * 300, "--to", "x"], "cannot be read (File name too long)"),
    (["export", "--checkpoint", "b", "--to", "x", "--shard-gb", "nan"], "above 0"),
    (["export", "--checkpoint", "b", "--to", "x", "--shard-gb", "inf"], "a finite number"),
    (["import", "--source", "a", "--to", "x", "--lora", "b", "--lora-scale", "inf"], "finite"),
    (["import", "--source", "./nowhere", "--to", "x"], "no folder ./nowhere"),
    (["export", "--checkpoint", "nowhere", "--to", "x"], "no folder nowhere"),
    (["export", "--checkpoint", "bundled:base", "--to", "x", "--shard-gb", "0"], "above 0"),
    (["export", "--checkpoint", "bundled:base", "--to", "x", "--two-step-time", "1"], "between 0"),
    (["sideways", "--to", "x"], "invalid choice"),
])
def test_wrong_arguments(wan_source, tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    arguments = [word.format(source=wan_source[0]) for word in arguments]
    assert cli.main(["convert", *arguments]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_hub_id_without_the_network(tmp_path, monkeypatch, capsys):
    """One line, whether the package is there or not; no request leaves this machine."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    code = ("import sys; from apt_jax.cli.main import main; "
            "sys.exit(main(['convert', 'import', '--source', 'nobody/nothing', '--to', 'x']))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "hub" in done.stderr and "local folder" in done.stderr
    assert not (tmp_path / "x").exists()


def test_a_hub_id_is_recorded(wan_source, tmp_path, monkeypatch):
    """The hub's cache is a folder of symbolic links, named by the commit."""
    import types

    calls, snapshot = {}, tmp_path / "hub" / "snapshots" / "0123abc"
    for name in tree(wan_source[0]):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(wan_source[0] / name)

    def snapshot_download(name, revision, allow_patterns):
        calls.update(name=name, revision=revision)
        return str(snapshot)

    monkeypatch.setitem(sys.modules, "huggingface_hub",
                        types.SimpleNamespace(snapshot_download=snapshot_download))
    out = import_folder("Wan-AI/Tiny", tmp_path / "out", revision="v1")
    assert calls == {"name": "Wan-AI/Tiny", "revision": "v1"}
    source = json.loads((out / "config.json").read_text())["source"]
    assert source["hub"] == "Wan-AI/Tiny" and source["revision"] == "0123abc"
    exported = export_folder(str(out), tmp_path / "e")
    assert "base_model: Wan-AI/Tiny" in (exported / "README.md").read_text()
    for folder in (out, exported):  # whole without the cache
        assert not any(path.is_symlink() for path in folder.rglob("*"))
    kept = f"vae/{STEM}.safetensors"
    assert (exported / kept).samefile(wan_source[0] / kept)
