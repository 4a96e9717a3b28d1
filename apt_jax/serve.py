"""One-step generation as a service runs it: compiled ahead of time, and nothing waits for the host.

    server = apt_jax.load("runs/video").server(batch=1, weights="fp8")
    latents = server.draw(text, text_mask, seed=7)     # on the device, at once; the work goes on there
    frames = np.asarray(server.decode(latents))        # uint8, waits

Every stage is one program with fixed shapes: `draw` makes the noise, runs the network once and gives
latents (G(z, c) = z - v(z, c, 1), Eq. 3-5); `encode` (token ids -> text states) and `decode` (latents
-> bytes) are there where an encoder or a VAE is given. A call hands arrays of the device from one
program to the next; the host only starts them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from apt_jax.diffusion.samplers import one_step
from apt_jax.errors import UserError
from apt_jax.eval.generate import check_sampling, sample_noise
from apt_jax.kernels.scope import Scope
from apt_jax.models.presets import make_generator
from apt_jax.models.vae import VAE, Tiling
from apt_jax.nn import fp8
from apt_jax.nn.functional import Network, Params
from apt_jax.parallel.flags.options import cpu_options
from apt_jax.parallel.mesh import replicated
from apt_jax.parallel.sharding import infer_shardings
from apt_jax.samples import whole

# How weights are kept and what blocks multiply in. "" leaves both as the model's config says.
WEIGHTS = ("", "float32", "bfloat16", "fp8")


class Stage(NamedTuple):
    """A jitted function and the abstract arguments that it is compiled for, parameters first."""

    function: Any
    args: tuple

    def compile(self) -> Any:
        """The program of this process's devices, by the compiler options that `Generation` takes."""
        return self.function.lower(*self.args).compile(
            compiler_options=cpu_options(jax.default_backend()) or None)


class Served(NamedTuple):
    """A network for inference, and the abstract float32 parameters that its own are made of."""

    net: Network
    masters: Params

    def store(self, params: Params) -> Params:
        """Float parameters -> those that `net` is called with. Jittable."""
        return fp8.store(self.net, params)

    def abstract(self) -> Params:
        """Shapes and dtypes of `store`'s result."""
        return jax.eval_shape(self.store, self.masters)


def served(model: Mapping[str, Any], weights: str = "", scope: Scope | None = None) -> Served:
    """The generator of config.model with its weights kept as `weights` says.

    "bfloat16" and "fp8" compute in bfloat16; fp8 keeps the blocks' matrices in eight bits with a
    scale for each output, the others in bfloat16. Raises UserError for another name.
    """
    if weights not in WEIGHTS:
        raise UserError(f"weights = {weights!r:.60} is not one of {', '.join(filter(None, WEIGHTS))}")
    fields = dict(model)
    if weights:
        fields |= {"dtype": "bfloat16" if weights == "fp8" else weights,
                   "matmul": "fp8" if weights == "fp8" else "dtype"}
    kept = fields.get("matmul_kept", 0)
    if fields.get("matmul") == "fp8" and not 0 <= kept < fields["depth"]:
        raise UserError(f"kept = {kept} of {fields['depth']} blocks leaves none in eight bits; keep "
                        "fewer")
    net = make_generator(fields).on(scope)
    return Served(fp8.stored(net) if fields.get("matmul") == "fp8" else net, net.abstract())


# -- the stages --------------------------------------------------------------------------------------


def draw_stage(net: Network, params: Params, shape: tuple[int, int, int, int], batch: int,
               text: tuple[int, int], sharding: Sharding | None = None) -> Stage:
    """(params, seed, first, text, mask) -> latents float32 [B, *shape].

    Args:
      params: abstract, with shardings where there is a mesh.
      shape: (F, H, W, C) of one sample. text: tokens and width of its states.
      sharding: of the other arguments and the result; None is one device, the default.

    seed and first are int32 scalars: sample i starts from noise of (seed, first + i), as
    `Generator.sample` draws it.
    """
    def draw(params, seed, first, text, mask):
        z = sample_noise(seed, first + jnp.arange(batch, dtype=jnp.int32), shape)
        return one_step(functools.partial(net, params), z, text, mask)

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    args = (params, array((), jnp.int32), array((), jnp.int32),
            array((batch, *text), jnp.float32), array((batch, text[0]), jnp.bool_))
    return Stage(jax.jit(draw, out_shardings=sharding), args)


def encode_stage(net: Network, params: Params, batch: int, tokens: int,
                 sharding: Sharding | None = None) -> Stage:
    """(params, ids int32 [B, L], mask bool [B, L]) -> text states float32 [B, L, D], 0 where masked."""
    def encode(params, ids, mask):
        return jnp.where(mask[..., None], net(params, ids, mask), 0.0)

    def array(dtype):
        return jax.ShapeDtypeStruct((batch, tokens), dtype, sharding=sharding)

    return Stage(jax.jit(encode, out_shardings=sharding),
                 (params, array(jnp.int32), array(jnp.bool_)))


def decode_stage(vae: VAE, params: Params, shape: tuple[int, int, int, int], batch: int, *,
                 chunk: int = 1, tiling: Tiling | None = None, sharding: Sharding | None = None
                 ) -> Stage:
    """(params, latents float32 [B, *shape]) -> frames uint8 [B, F, H, W, 3], all on the device.

    chunk: latents per step of the causal scan; tiling: diffusers' tiles.
    """
    def decode(params, latents):
        y = vae.decode(params, latents, chunk=chunk, tiling=tiling).astype(jnp.float32)
        return jnp.clip(jnp.rint((y + 1.0) * 127.5), 0, 255).astype(jnp.uint8)

    latents = jax.ShapeDtypeStruct((batch, *shape), jnp.float32, sharding=sharding)
    return Stage(jax.jit(decode, out_shardings=sharding), (params, latents))


# -- the server --------------------------------------------------------------------------------------


def abstract(params: Params) -> Params:
    """Shapes, dtypes and places of arrays."""
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), params)


class Server:
    """Programs for one size and batch, compiled when it is made, with their weights on the device.

    Attributes: shape (F, H, W, C of one sample), batch, tokens (text states per prompt), network,
    params.
    """

    def __init__(self, model: Mapping[str, Any], params: Params,
                 shape: tuple[int, int, int, int], *, batch: int = 1, tokens: int = 256,
                 weights: str = "bfloat16", scope: Scope | None = None,
                 decoder: tuple[VAE, Params] | None = None, chunk: int = 1,
                 tiling: Tiling | None = None):
        """
        Args:
          model: config.model. params: its float32 (or bfloat16) parameters, on the scope's mesh.
          shape: of one sample, latents or pixels. tokens: every prompt is filled up to so many.
          weights: one of WEIGHTS. scope: `parallel.context.on_mesh`, None for one device.
          decoder: a VAE and its parameters; without one `decode` turns pixels into bytes.
          chunk, tiling: of the decoder (`decode_stage`).
        """
        batch, tokens = (_at_least(1, name, value)
                         for name, value in (("batch", batch), ("tokens", tokens)))
        parts = served(model, weights, scope)
        self.network, self.shape, self.batch, self.tokens = parts.net, shape, batch, tokens
        self.width = model["text_width"]
        place = _everywhere(scope)
        self.params = jax.jit(parts.store, out_shardings=_kept(parts, scope))(params)
        self._draw = draw_stage(parts.net, abstract(self.params), shape, batch,
                                (tokens, self.width), place).compile()
        if decoder is None:
            self._vae, stage = {}, _pixels_stage(batch, shape, place)
        else:
            vae, weights_of_vae = decoder
            self._vae = jax.jit(vae.cast, out_shardings=place)(weights_of_vae)
            stage = decode_stage(vae, abstract(self._vae), shape, batch, chunk=chunk,
                                 tiling=tiling, sharding=place)
        self._decode = stage.compile()

    def draw(self, text: Any, mask: Any, *, seed: int = 0, first: int = 0) -> jax.Array:
        """Text states float [B, L <= tokens, D] and their mask bool [B, L] -> float32 [B, *shape] on
        the device. Returns before the work is done. Sample i is `Generator.sample`'s of index
        first + i. UserError for another batch, width, dtype or longer text, or a seed or an index
        beyond int32."""
        seed, first = whole("seed", seed), whole("first", first)
        check_sampling({"seed": seed})
        if not 0 <= first < 2**31 - self.batch:
            raise UserError(f"first = {first} does not fit; give an index from 0 to "
                            f"{2**31 - 1 - self.batch}")
        return self._draw(self.params, np.int32(seed), np.int32(first), *self._filled(text, mask))

    def decode(self, latents: jax.Array) -> jax.Array:
        """What `draw` gave -> frames uint8 [B, F, H, W, 3] on the device, before they are done.

        A NaN becomes some byte: looking for it would wait for the device. UserError for another
        shape or dtype.
        """
        want = (self.batch, *self.shape)
        if np.shape(latents) != want or _dtype(latents) != np.float32:
            raise UserError(f"the latents are {_dtype(latents)} {np.shape(latents)}, this server "
                            f"decodes float32 {want}; give what its draw gave")
        return self._decode(self._vae, latents)

    def _filled(self, text: Any, mask: Any) -> tuple[Any, Any]:
        """Both with `tokens` tokens, as the program takes them; what is on the device stays there."""
        b, length, width = shape = np.shape(text) if np.ndim(text) == 3 else (None,) * 3
        if None in shape or (b, width) != (self.batch, self.width) or length > self.tokens:
            raise UserError(f"text states are {np.shape(text)}, this server takes a batch of "
                            f"{self.batch}, up to {self.tokens} tokens, width {self.width}; make "
                            "one for the size you need")
        if np.shape(mask) != (b, length) or _dtype(mask) != np.dtype(bool):
            raise UserError(f"the mask is {_dtype(mask)} {np.shape(mask)}, and these text states need "
                            f"bool {(b, length)}")
        if not jnp.issubdtype(_dtype(text), jnp.floating):
            raise UserError(f"text states are {_dtype(text)}; give floats")
        rest = self.tokens - length
        pads = ((0, 0), (0, rest), (0, 0)), ((0, 0), (0, rest))
        filled = []
        for x, dtype, pad in zip((text, mask), (np.float32, bool), pads, strict=True):
            here = jnp if isinstance(x, jax.Array) else np
            x = x if _dtype(x) == dtype else here.asarray(x, dtype)
            filled.append(here.pad(x, pad) if rest else x)
        return tuple(filled)


def _at_least(least: int, name: str, value: Any) -> int:
    """A whole number from `least` on; UserError for anything else."""
    if whole(name, value) < least:
        raise UserError(f"{name} = {value} must be at least {least}")
    return whole(name, value)


def _dtype(x: Any) -> Any:
    return x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype


def server_of(generator: Any, *, frames: int | None = None, height: int | None = None,
              width: int | None = None, batch: int = 1, weights: str = "bfloat16",
              attention: str = "auto", kept: int | None = None, tokens: int | None = None,
              chunk: int = 1, tiling: Tiling | None = None) -> Server:
    """The server of an `api.Generator`.

    Args:
      frames, height, width: pixels of a sample; by default what the generator was trained on.
      batch: samples of one call.
      weights: "bfloat16", "fp8", "float32", or "" for the dtype of the generator's config, with
        which `Server.draw` gives what `Generator.sample` gives.
      attention: the kernel by name, one of `kernels.choice.BACKENDS`; "cudnn_fp8" rounds to eight
        bits on a Hopper GPU, "auto" never does.
      kept: how many of the last blocks multiply in bfloat16 beside fp8 (default: the config's
        model.matmul_kept); with 1, eight bits shift the samples' statistics by less than half.
      tokens: every prompt's states are filled up to so many (default: the config's).
      chunk, tiling: how the VAE decodes (`decode_stage`).
    """
    shape = generator.sample_shape(frames=frames, height=height, width=width)
    decoder = generator.latents and generator.latents.decoder
    model = {**dict(generator.model), "attention": attention}
    if kept is not None:
        kept = _at_least(0, "kept", kept)
        if weights != "fp8" and (weights or model.get("matmul") != "fp8"):
            raise UserError(f"kept = {kept} is for weights = 'fp8': no block multiplies in eight bits")
        model["matmul_kept"] = kept
    tokens = _at_least(1, "tokens",
                       generator.config.data.max_text_tokens if tokens is None else tokens)
    most = model.get("text_tokens") or 0
    if most and tokens > most:
        raise UserError(f"tokens = {tokens}, and the network reads {most} at most (model.text_tokens)")
    return Server(model, generator.params, shape,
                  batch=batch, tokens=tokens, weights=weights, scope=generator.network.scope,
                  chunk=chunk, tiling=tiling,
                  decoder=decoder and (decoder.vae, decoder.params))


def _pixels_stage(batch: int, shape: tuple[int, ...], sharding: Sharding | None) -> Stage:
    def to_bytes(_, x):
        return jnp.clip(jnp.rint((x + 1.0) * 127.5), 0, 255).astype(jnp.uint8)

    x = jax.ShapeDtypeStruct((batch, *shape), jnp.float32, sharding=sharding)
    return Stage(jax.jit(to_bytes, out_shardings=sharding), ({}, x))


def _everywhere(scope: Scope | None) -> Sharding | None:
    return None if scope is None else replicated(scope.mesh)


def _kept(parts: Served, scope: Scope | None) -> Any:
    """Shardings of the stored parameters: as `parallel.sharding` cuts them; None on one device."""
    return None if scope is None else infer_shardings(parts.abstract(), scope.mesh)
