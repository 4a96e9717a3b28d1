"""UMT5's encoder equals transformers' UMT5EncoderModel: from a file and, with torch, live; it runs
sharded; and prompts become ids as in Wan's pipeline."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import relative_error
from safetensors import safe_open
from umt5_names import from_reference

from apt_jax.errors import UserError
from apt_jax.models.prompts import PromptTokenizer, clean_prompt
from apt_jax.models.umt5 import UMT5Config, make_umt5, relative_buckets, umt5_config
from apt_jax.parallel.mesh import make_mesh
from apt_jax.parallel.sharding import infer_shardings

FIXTURES = Path(__file__).parents[1] / "fixtures"
TOLERANCE = 2e-5  # the promise is 1e-4


def our_config(sizes: dict, **changes) -> UMT5Config:
    return UMT5Config(
        vocabulary=sizes["vocab_size"], width=sizes["d_model"], depth=sizes["num_layers"],
        heads=sizes["num_heads"], head_dim=sizes["d_kv"], mlp_width=sizes["d_ff"],
        buckets=sizes["relative_attention_num_buckets"],
        max_distance=sizes["relative_attention_max_distance"], **changes)


def encode(config: UMT5Config, params, ids, mask) -> np.ndarray:
    """States, zero where masked; the tree is checked to be exactly ours."""
    net = make_umt5(config)
    chex.assert_trees_all_equal_shapes(params, net.abstract())
    return np.asarray(jax.jit(net)(params, ids, mask)) * mask[..., None]


@pytest.fixture(scope="module")
def fixture():
    with safe_open(FIXTURES / "umt5.safetensors", "np") as file:
        sizes = json.loads(file.metadata()["about"])["sizes"]
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    weights = {k.removeprefix("weights."): v for k, v in tensors.items()
               if k.startswith("weights.")}
    return our_config(sizes), from_reference(weights, sizes["num_layers"]), tensors


@pytest.fixture(scope="module")
def states(fixture):
    config, params, tensors = fixture
    return encode(config, params, tensors["ids"], tensors["mask"])


def test_equals_the_reference(fixture, states):
    error = relative_error(states, fixture[2]["states"])
    print(f"relative error {error:.2e}")
    assert error < TOLERANCE


def test_positions_fall_into_the_references_rows(fixture):
    rows = relative_buckets(601, 32, 128)
    np.testing.assert_array_equal(rows[600], fixture[2]["buckets"][:601])  # keys behind
    np.testing.assert_array_equal(rows[0], fixture[2]["buckets"][600:])  # keys ahead
    assert set(rows.ravel()) == set(range(32)) - {16}  # "0 steps ahead" cannot be


def test_padding_changes_no_state(fixture, states):
    """A prompt may be encoded at any padded length; what the padding holds does not matter."""
    config, params, tensors = fixture
    ids, mask = tensors["ids"][1:, :48].copy(), tensors["mask"][1:, :48]
    ids[~mask] = 7
    assert relative_error(encode(config, params, ids, mask), states[1:, :48]) < 1e-5


def test_relative_positions_matter(fixture, states):
    config, params, tensors = fixture
    turned = params | {"blocks": params["blocks"] | {
        "positions": params["blocks"]["positions"][:, ::-1]}}
    other = encode(config, turned, tensors["ids"], tensors["mask"])
    assert relative_error(other, states) > 1e-2


def test_runs_sharded_over_the_mesh(fixture, states):
    """Every large matrix cut over eight devices: the same states; and such weights are born so."""
    config, params, tensors = fixture
    mesh = make_mesh({"fsdp": 8})
    net = make_umt5(config)
    shardings = infer_shardings(net.abstract(), mesh, min_elements=64)
    cut = {k for k, s in shardings["blocks"].items() if k in "qkv" or k in ("out", "gate", "up")
           if "fsdp" in s["kernel"].spec}
    assert cut >= {"q", "k", "v", "gate", "up"} and "fsdp" in shardings["embedding"].spec
    assert all(s.spec[:1] in ((), (None,)) for s in jax.tree.leaves(shardings["blocks"]))
    placed = jax.tree.map(jax.device_put, params, shardings)
    got = jax.jit(net)(placed, tensors["ids"], tensors["mask"])
    assert relative_error(got * tensors["mask"][..., None], states) < 1e-5
    born = jax.jit(net.init, out_shardings=shardings)(jax.random.key(0))
    assert born["embedding"].addressable_shards[0].data.size * 8 == born["embedding"].size


def test_weights_in_bfloat16_serve(fixture, states):
    """The encoder of 5.7B parameters need not be held in float32."""
    config, params, tensors = fixture
    config = UMT5Config(**{**vars(config), "dtype": "bfloat16"})
    halved = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), params)
    got = encode(config, halved, tensors["ids"], tensors["mask"])
    assert got.dtype == np.float32 and 1e-4 < relative_error(got, states) < 5e-2


def test_xxl_builds_without_allocating_and_eight_devices_share_it():
    net = make_umt5(UMT5Config())
    assert net.parameter_count() == 5_680_910_336
    abstract = net.abstract()
    cut = jax.tree.map(lambda leaf, where: math.prod(where.shard_shape(leaf.shape)), abstract,
                       infer_shardings(abstract, make_mesh({"fsdp": 8})))
    share = sum(jax.tree.leaves(cut))
    assert share < 1.001 * 5_680_910_336 / 8  # 1.4 GB each in bfloat16


def test_config_of_a_component():
    assert umt5_config({"vocabulary": 40, "width": 24}, dtype="bfloat16") == UMT5Config(
        vocabulary=40, width=24, dtype="bfloat16")
    with pytest.raises(UserError, match="d_model"):
        umt5_config({"d_model": 24})
    for wrong in ({"width": "24"}, {"heads": 0}, {"depth": -1}, {"vocabulary": 2.5}, {"dtype": 1}):
        with pytest.raises(UserError, match="the text encoder's config has .* is not allowed"):
            umt5_config(wrong)


# -- live ----------------------------------------------------------------------------------------

LIVE = {
    "deep": dict(vocab_size=101, d_model=40, num_layers=6, num_heads=3, d_kv=16, d_ff=56,
                 relative_attention_num_buckets=32, relative_attention_max_distance=128),
    "few_rows": dict(vocab_size=30, d_model=32, num_layers=2, num_heads=4, d_kv=4, d_ff=96,
                     relative_attention_num_buckets=16, relative_attention_max_distance=40),
}


@pytest.mark.parametrize("name", LIVE)
def test_equals_the_live_reference(name, tmp_path):
    """float32 to 1e-4; bfloat16 no further from float32 than PyTorch's own bfloat16 (times 1.2)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sys.path.insert(0, str(FIXTURES))
    try:
        import umt5_reference as reference
    finally:
        sys.path.remove(str(FIXTURES))

    sizes = LIVE[name]
    model = reference.random_model(3, **sizes)
    ids, mask = reference.random_batch(4, sizes["vocab_size"], lengths=(21, 60, 9))
    expected = reference.run(model, ids, mask)
    params = from_reference(reference.weights(model), sizes["num_layers"])
    error = relative_error(encode(our_config(sizes), params, ids, mask), expected)
    model.save_pretrained(tmp_path)
    half = transformers.UMT5EncoderModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    theirs = relative_error(reference.run(half, ids, mask), expected)
    ours = relative_error(
        encode(our_config(sizes, dtype="bfloat16"), params, ids, mask), expected)
    print(f"float32 {error:.2e}; bfloat16 ours {ours:.2e}, PyTorch {theirs:.2e}")
    assert error < TOLERANCE and 1e-4 < ours < 1.2 * theirs


# -- prompts -------------------------------------------------------------------------------------

@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a T5-like tokenizer: words, <pad> 0, </s> 1, and an end token by template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "</s>", "<unk>", "a", "cat", "surfing", "&", "the"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)])
    made.enable_truncation(3)  # a preset that must not matter
    made.enable_padding(length=5)
    (tmp_path / "tokenizer").mkdir()
    made.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    return tmp_path


def test_prompts_become_ids(checkpoint):
    for folder in (checkpoint, checkpoint / "tokenizer"):
        tokenizer = PromptTokenizer(folder)
        assert tokenizer.rows(["a cat   surfing\n", "", "a &amp;amp; cat"]) == [
            [3, 4, 5, 1], [1], [3, 6, 4, 1]]
    assert tokenizer.rows(["a cat surfing the cat"], max_tokens=3) == [[3, 4, 1]]
    ids, mask = tokenizer(["a cat", ""])
    assert ids.shape == (2, 16) and ids.dtype == np.int32 and mask.sum(1).tolist() == [3, 1]
    assert ids[0].tolist() == [3, 4, 1] + [0] * 13
    assert tokenizer(["a " * 40], max_tokens=30)[0].shape == (1, 32)


def test_the_prompt_is_cleaned_as_the_pipeline_does():
    pipeline = pytest.importorskip("diffusers.pipelines.wan.pipeline_wan")
    for text in ("  a\tcat &amp;lt;3 \n\n surfs ", "", "色调艳丽，过曝", "a &quot;b&quot;"):
        assert clean_prompt(text) == pipeline.prompt_clean(text)


def test_a_missing_or_broken_tokenizer_is_one_clear_line(checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer .*tokenizer\.json") as missing:
        PromptTokenizer(tmp_path / "elsewhere")
    path = checkpoint / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace("</s>", "[SEP]"))
    with pytest.raises(UserError, match="no token '</s>'"):
        PromptTokenizer(checkpoint)
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read as a tokenizer") as broken:
        PromptTokenizer(checkpoint)
    assert all("\n" not in str(e.value) for e in (missing, broken))
