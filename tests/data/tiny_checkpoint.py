"""A tiny checkpoint with random weights as `apt-jax convert import` lays it out."""

import dataclasses
import json

import jax
import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from apt_jax.models.umt5 import UMT5Config, make_umt5
from apt_jax.models.vae import VAEConfig, make_vae, save_vae
from apt_jax.parallel.sharding import path_string
from apt_jax.tensor_files import Spec, write_files

VAE = VAEConfig(base=8, multipliers=(1, 1, 1, 2), blocks=1)
UMT5 = UMT5Config(vocabulary=32, width=24, depth=2, heads=4, head_dim=6, mlp_width=40)
WORDS = ("a", "film", "number", "about", "picture", "cat")


def random_params(network, seed):
    """Parameters of the network, all of them random."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (rng.normal(size=leaf.shape) / np.sqrt(max(1, np.prod(leaf.shape[:-1]))) + (
            leaf.ndim == 1)).astype(np.float32), network.abstract())


def save_checkpoint(folder):
    """ckpt/{vae, text_encoder, tokenizer}/ and its config.json; returns the folder."""
    folder.mkdir(parents=True)
    save_vae(folder / "vae", VAE, random_params(make_vae(VAE), 1))
    save_umt5(folder / "text_encoder")
    save_words(folder / "tokenizer")
    (folder / "config.json").write_text('{"kind": "pipeline", "family": "wan"}\n')
    return folder


def save_umt5(folder):
    folder.mkdir()
    params = jax.tree_util.tree_leaves_with_path(random_params(make_umt5(UMT5), 2))
    write_files(folder, "model", [Spec(path_string(p), v.dtype, v.shape) for p, v in params],
                (v for _, v in params))
    fields = dataclasses.asdict(UMT5)
    (folder / "config.json").write_text(json.dumps({"kind": "umt5", "umt5": fields}))


def save_words(folder):
    folder.mkdir()
    words = {w: i for i, w in enumerate(("<pad>", "</s>", "<unk>", *WORDS, *map(str, range(10))))}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
