"""import and export without torch: bytes there and back, and what the folders hold."""

import json

import jax
import numpy as np
import pytest
import synthetic

from apt_jax import tensor_files
from apt_jax.cli import main as cli
from apt_jax.config.networks import NETWORKS
from apt_jax.convert import engine, exporting
from apt_jax.convert.exporting import export_folder
from apt_jax.convert.families import transformer_plan
from apt_jax.convert.importing import import_folder
from apt_jax.errors import UserError
from apt_jax.models.presets import make_generator
from apt_jax.tensor_files import open_folder
from apt_jax.weights import generator_card, load_component, load_generator, save_generator

STEM = "diffusion_pytorch_model"


def tree(folder):
    """All but the hidden list of convert's own files."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("[!.]*") if p.is_file())


def test_import_then_export_gives_the_same_tensors(wan_source, wan_components, tmp_path):
    source, tensors = wan_source
    assert len(list((source / "transformer").glob("*.safetensors"))) > 1
    out = export_folder(str(wan_components), tmp_path / "out")
    with open_folder(out / "transformer", STEM) as found:
        assert set(found.tensors) == set(tensors)
        kinds = set()
        for name, value in tensors.items():
            again = found.read(name)
            assert again.dtype == value.dtype and again.tobytes() == value.tobytes(), name
            kinds.add(str(value.dtype))
    assert kinds == {"float32", "bfloat16"}


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_other_networks_are_exact_too(wan_source, wan_components, part):
    """Every value of theirs is found in ours: same multiset of bits, and one checked by hand."""
    stem = STEM if part == "vae" else "model"
    with (open_folder(wan_source[0] / part, stem) as theirs,
          open_folder(wan_components / part) as ours):
        there = np.sort(np.concatenate([theirs.read(n).view(np.uint16).ravel() for n in
                                        theirs.tensors]))
        here = np.sort(np.concatenate([ours.read(n).view(np.uint16).ravel() for n in
                                       ours.tensors]))
        np.testing.assert_array_equal(there, here)
        if part == "vae":
            x = theirs.read("encoder.down_blocks.5.time_conv.weight")  # [O, I, 3, 1, 1]
            np.testing.assert_array_equal(
                ours.read("encoder/stage2/down/time_conv/kernel")[:, 0, 0],
                x[..., 0, 0].transpose(2, 1, 0))
        else:
            x = theirs.read("encoder.block.1.layer.1.DenseReluDense.wi_1.weight")
            np.testing.assert_array_equal(ours.read("blocks/up/kernel")[1], x.T)


def test_what_an_import_writes(wan_source, wan_components):
    card = json.loads((wan_components / "config.json").read_text())
    assert card["kind"] == "pipeline" and card["family"] == "wan"
    assert card["components"] == {"transformer": "transformer", "vae": "vae",
                                  "text_encoder": "text_encoder", "tokenizer": "tokenizer",
                                  "scheduler": "source/scheduler"}
    assert card["source"]["licence"] == "apache-2.0"
    assert card["sample"] == {"guidance": 5.0, "steps": 50, "shift": 7.0}
    assert card["source"]["folder"] == str(wan_source[0])
    files = card["source"]["files"]
    assert set(files) == {name for name in tree(wan_source[0]) if name.endswith(".safetensors")}
    import hashlib

    for name, about in files.items():
        data = (wan_source[0] / name).read_bytes()
        assert about == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert "source/transformer/config.json" in tree(wan_components)
    assert not any(n.startswith("source/transformer/diff") for n in tree(wan_components))
    linked = wan_components / "source" / "vae" / f"{STEM}.safetensors"
    assert linked.stat().st_ino == (wan_source[0] / "vae" / f"{STEM}.safetensors").stat().st_ino


def test_weights_load_from_the_folder_or_its_transformer(wan_source, wan_components):
    model, params = load_generator(wan_components)
    assert model.family == "wan" and model.width == 24 and model.patch == (1, 2, 2)
    assert model.dtype == "bfloat16"  # as most of the source's tensors
    again = load_generator(wan_components / "transformer")[1]
    jax.tree.map(np.testing.assert_array_equal, params, again)
    value = wan_source[1]["blocks.2.attn1.to_k.weight"]
    leaf = params["backbone"]["blocks"]["attn"]["k"]["kernel"]
    assert leaf.dtype == np.float32 and leaf.shape == (3, 24, 24)
    np.testing.assert_array_equal(leaf[2], value.astype(np.float32).T)
    assert generator_card(wan_components)["kind"] == "generator"
    card, encoder = load_component(wan_components, "text_encoder", "umt5")
    assert card["umt5"]["depth"] == 2 and encoder["embedding"].shape == (64, 20)
    with pytest.raises(UserError, match="does not describe a vae"):
        load_component(wan_components / "text_encoder", "vae", "vae")


def test_weights_load_onto_a_mesh(wan_components):
    """Each leaf straight onto its shards, equal to numpy's; small leaves are sharded here too."""
    from apt_jax.parallel.mesh import make_mesh
    from apt_jax.parallel.sharding import infer_shardings

    mesh = make_mesh({"replica": 2, "fsdp": -1})
    _, params = load_generator(wan_components)
    shardings = infer_shardings(params, mesh, min_elements=2)
    _, placed = load_generator(wan_components, shardings=shardings)
    split = 0
    for value, where, want in zip(jax.tree.leaves(placed), jax.tree.leaves(shardings),
                                  jax.tree.leaves(params), strict=True):
        assert value.sharding == where and value.dtype == np.float32
        split += not value.is_fully_replicated
        np.testing.assert_array_equal(value, want)
    assert split > 10


def test_what_an_export_writes(wan_source, wan_components, tmp_path):
    out = tmp_path / "out"
    assert cli.main(["convert", "export", "--checkpoint", str(wan_components), "--to", str(out),
                     "--two-step-time", "0.25", "--quiet"]) == 0
    want = {n for n in tree(wan_source[0]) if not n.startswith("transformer/diff")}
    assert set(tree(out)) == want | {f"transformer/{STEM}.safetensors"}
    for kept in (f"vae/{STEM}.safetensors", "text_encoder/model.safetensors"):
        assert (out / kept).samefile(wan_source[0] / kept)  # a hard link, through the import
    index = json.loads((out / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    assert index["vae"] == ["diffusers", "AutoencoderKLWan"]
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["shift"] == pytest.approx((999 / 3) ** 0.5)
    assert scheduler["shift_terminal"] is None and scheduler["use_dynamic_shifting"] is False
    assert (json.loads((out / "transformer" / "config.json").read_text())
            == json.loads((wan_source[0] / "transformer" / "config.json").read_text()))
    readme = (out / "README.md").read_text()
    for words in ("license: apache-2.0", "tiny-wan", "num_inference_steps=1", "t = 0.25",
                  "apt-jax convert export --checkpoint", "WanPipeline"):
        assert words in readme, words
    assert str(wan_source[0].parent) not in readme.replace(str(wan_components), "")


def test_shards_and_dtypes_of_an_export(wan_source, wan_components, tmp_path):
    out = export_folder(str(wan_components), tmp_path / "small", dtype="float32",
                        shard_bytes=50_000)
    with open_folder(out / "transformer", STEM) as found:
        assert len(found.files) > 2
        for name, value in wan_source[1].items():
            np.testing.assert_array_equal(found.read(name), value.astype(np.float32))
            assert found.tensors[name].dtype == np.float32


def test_weights_above_5_gb_are_several_files(wan_components, tmp_path, monkeypatch):
    """The limit that an export has unless told otherwise, on the sizes of Wan 1.3B."""
    limits, write = [], exporting.write_files

    def noting(*args, limit, **more):
        limits.append(limit)
        write(*args, limit=limit, **more)

    monkeypatch.setattr(exporting, "write_files", noting)
    assert cli.main(["convert", "export", "--checkpoint", str(wan_components), "--to",
                     str(tmp_path / "out"), "--quiet"]) == 0
    export_folder(str(wan_components), tmp_path / "again")
    assert len(set(limits)) == 1 and len(limits) == 2
    plan = transformer_plan(NETWORKS["wan_1_3b"])
    for dtype, files in (("BF16", 1), ("F32", 2)):  # 2.8 and 5.7 GB
        specs = engine.their_specs(plan, {engine.DEFAULT: dtype})
        sizes = [sum(s.nbytes for s in group) for group in tensor_files._split(specs, limits[0])]
        assert len(sizes) == files and max(sizes) <= 5e9


def test_a_transformer_alone(tmp_path):
    tensors = synthetic.write_transformer(tmp_path / "qwen", synthetic.QWEN)
    ours = import_folder(str(tmp_path / "qwen"), tmp_path / "ckpt")
    assert load_generator(ours)[0].modulation == "per_block"
    out = export_folder(str(ours), tmp_path / "out")
    assert tree(out) == ["README.md", "config.json", f"{STEM}.safetensors"]
    found = {n: t for n, t in _raw(out / f"{STEM}.safetensors")}
    assert found == {name: value.tobytes() for name, value in tensors.items()}


def _raw(path):
    from safetensors import deserialize

    return [(name, bytes(t["data"])) for name, t in deserialize(path.read_bytes())]


def test_mixed_dtypes_in_one_leaf_come_back(tmp_path):
    """q in float32, k and v in bfloat16: one fused leaf here, three dtypes there again."""
    tensors = synthetic.write_transformer(tmp_path / "qwen", synthetic.QWEN, odd=("to_q.weight",))
    ours = import_folder(str(tmp_path / "qwen"), tmp_path / "c")
    out = export_folder(str(ours), tmp_path / "out")
    assert dict(_raw(out / f"{STEM}.safetensors")) == {n: v.tobytes() for n, v in tensors.items()}


def test_a_weights_folder_of_our_own_becomes_a_transformer(tmp_path):
    """Trained from scratch here: no base, so float32 and no pipeline."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32),
                          make_generator(synthetic.QWEN).abstract())
    folder = save_generator(tmp_path / "weights", synthetic.QWEN, params)
    out = export_folder(str(folder), tmp_path / "out")
    back = import_folder(str(out), tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, load_generator(back)[1], params)
    assert "This is the transformer alone" in (out / "README.md").read_text()
    with pytest.raises(UserError, match="rope_theta"):
        export_folder(str(save_generator(tmp_path / "other", {**synthetic.QWEN, "rope_theta": 5.0},
                                         params)), tmp_path / "no")
    short = {**synthetic.WAN, "text_tokens": 0}
    params = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), make_generator(short).abstract())
    with pytest.raises(UserError, match="text_tokens = 0, diffusers' pipeline fills texts up to 512"):
        export_folder(str(save_generator(tmp_path / "short", short, params)), tmp_path / "no")


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path):
    """An infinity in the export would be noticed as black pictures only."""
    model = {**synthetic.WAN, "depth": 1}
    params = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), make_generator(model).abstract())
    params["proj_out"]["bias"][3] = -7e4
    folder = save_generator(tmp_path / "weights", model, params)
    with pytest.raises(UserError, match=r"proj_out\.bias has 1 values beyond the range of float16 "
                                        r"\(up to 7e\+04\); use --dtype bfloat16"):
        export_folder(str(folder), tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    params["proj_out"]["bias"][3] = np.inf  # what was infinite stays so: bytes there and back
    folder = save_generator(tmp_path / "weights", model, params)
    out = export_folder(str(folder), tmp_path / "out", dtype="float16")
    with open_folder(out, STEM) as found:
        assert np.isposinf(found.read("proj_out.bias")).sum() == 1
