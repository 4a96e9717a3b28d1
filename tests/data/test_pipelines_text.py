"""Text states equal those of diffusers' own pipelines (live, needs torch and diffusers)."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "convert"))

import tiny_pipelines  # noqa: E402

from apt_jax.convert.importing import import_folder  # noqa: E402
from apt_jax.data.text_encoders import QwenEncoder, UMT5Encoder, load_text_encoder  # noqa: E402
from apt_jax.errors import UserError  # noqa: E402

PROMPTS = ["a red cat surfing on the beach", "", "  the  blue\ncar &amp; dog running"]


def close(found, want):
    assert np.linalg.norm(found - want) <= 1e-4 * np.linalg.norm(want)


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    root = tmp_path_factory.mktemp("wan")
    return tiny_pipelines.save_wan(root / "theirs"), import_folder(
        str(root / "theirs"), root / "ours")


def test_wans_states_are_its_pipelines(wan):
    from diffusers import WanPipeline

    theirs, ours = wan
    pipeline = WanPipeline.from_pretrained(theirs)
    encoder = load_text_encoder(ours, "float32")
    assert isinstance(encoder, UMT5Encoder)
    text, _ = encoder.encode(PROMPTS, 16)
    with torch.no_grad():
        want = pipeline._get_t5_prompt_embeds(PROMPTS, max_sequence_length=16).numpy()
    close(text, want)  # zeros after the prompt in both
    cut, mask = encoder.encode(PROMPTS, 4)
    with torch.no_grad():
        want = pipeline._get_t5_prompt_embeds(PROMPTS, max_sequence_length=4).numpy()
    close(cut, want)
    assert mask.sum(1).tolist() == [4, 1, 4]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    root = tmp_path_factory.mktemp("qwen")
    theirs = tiny_pipelines.save_qwen(root / "theirs")
    return theirs, import_folder(str(theirs), root / "ours")


def test_qwens_states_are_its_pipelines(qwen, caplog):
    from diffusers import QwenImagePipeline

    theirs, ours = qwen
    encoder = load_text_encoder(ours, "float32")
    assert isinstance(encoder, QwenEncoder) and encoder.width == tiny_pipelines.TEXT_WIDTH
    pipeline = QwenImagePipeline.from_pretrained(theirs)
    prompts = ["a red cat", "", " "]
    with torch.no_grad():
        want, valid = pipeline._get_qwen_prompt_embeds(prompts)
    length = want.shape[1]
    text, mask = encoder.encode(prompts, length)
    np.testing.assert_array_equal(mask, valid.numpy().astype(bool))
    close(text, want.numpy())
    assert not text[~mask].any()
    assert not caplog.records
    cut, mask = encoder.encode(prompts, int(valid[0].sum()) - 1)  # of the longest
    assert "1 of 3 captions are longer" in caplog.text and mask[0].all()
    close(cut, want.numpy()[:, :cut.shape[1]] * mask[..., None])


def test_damaged_qwen_weights_are_one_line(qwen, tmp_path):
    folder = shutil.copytree(qwen[1], tmp_path / "ours") / "source" / "text_encoder"
    file = folder / "model.safetensors"
    whole = load_file(file)
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(UserError, match="model.safetensors is damaged or incomplete"):
        load_text_encoder(folder).name  # noqa: B018  what prepare asks for first
    with pytest.raises(UserError, match=r"cannot read .*text_encoder \(SafetensorError.*again$"):
        load_text_encoder(folder).encode(["a cat"], 8)
    del whole["model.layers.1.mlp.up_proj.weight"]  # transformers would draw it at random
    save_file(whole, file, {"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 tensors, the first .*layers.1.mlp.up_proj"):
        load_text_encoder(folder).encode(["a cat"], 8)


def test_a_missing_qwen_tokenizer_is_one_line_and_another_one_is_noticed(qwen, tmp_path):
    ours = shutil.copytree(qwen[1], tmp_path / "ours")
    file = ours / "source" / "tokenizer" / "tokenizer.json"
    name, text = load_text_encoder(ours).name, file.read_text()
    value = json.loads(text)
    value["added_tokens"][-1]["content"] += "x"
    file.write_text(json.dumps(value))
    assert load_text_encoder(ours).name != name
    file.write_text(text[:100])
    with pytest.raises(UserError, match="cannot read .*tokenizer .*again$"):
        load_text_encoder(ours).encode(["a cat"], 8)
    file.unlink()
    (file.parent / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match="no Qwen tokenizer .merges.txt missing"):
        load_text_encoder(ours)
