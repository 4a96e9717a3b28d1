"""From token ids to frames: UMT5, one step of the generator, the VAE, and each of them alone.

Random weights throughout: speed does not ask what they are. The text states go from the encoder to
the generator and the latents to the VAE on the device (`apt_jax/serve.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from apt_jax.bench.arrays import random_like
from apt_jax.bench.case import LONG, SETS, Case, looked_at
from apt_jax.bench.cases import MARKERS
from apt_jax.bench.memory import memory_stats, peak, planned
from apt_jax.bench.profile import CALLS, profiled
from apt_jax.bench.programs import forward_case
from apt_jax.bench.report import row_name
from apt_jax.bench.rows import keep
from apt_jax.bench.timing import measure
from apt_jax.errors import UserError
from apt_jax.kernels import dispatch
from apt_jax.models.umt5 import UMT5Config, make_umt5
from apt_jax.models.vae import Tiling, VAEConfig, make_vae
from apt_jax.models.vae.layers import query_blocks
from apt_jax.plan.flops import count_flops
from apt_jax.plan.programs import sample_shape, text_length
from apt_jax.serve import Stage, decode_stage, encode_stage

# Latents that the VAE decodes at once, and diffusers' tiles of 256 pixels.
DECODERS: dict[str, dict[str, Any]] = {
    "chunk 1": {"chunk": 1}, "chunk 2": {"chunk": 2}, "chunk 4": {"chunk": 4},
    "tiles": {"chunk": 1, "tiling": Tiling()}}


def check_latents(config: Any) -> None:
    """UserError for a config whose samples the VAE cannot decode."""
    channels = VAEConfig().latent_channels
    if config.model.in_channels != channels:
        raise UserError(f"the config has no latents: its samples have {config.model.in_channels} "
                        f"channels, and the VAE decodes {channels}; give one of latents, for example "
                        "configs/seaweed_8b_video.py")


def _on(device: Any, tree: Any) -> Any:
    place = SingleDeviceSharding(device)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree)


def _flops(stage: Stage) -> Any:
    return lambda: count_flops(stage.function, *stage.args).total


def decode_case(config: Any, device: Any, decoder: str, vae: VAEConfig | None = None,
                overrides: Sequence[str] = ()) -> Case:
    """The VAE's decoder on one sample of the config's size. decoder: one of DECODERS.

    Its one head of 384 channels is plain JAX's on a GPU and splash's on a TPU, where the kernel's runs
    are counted, but for tiles."""
    autoencoder = make_vae(vae or VAEConfig(dtype="bfloat16"))
    params = jax.eval_shape(autoencoder.cast, autoencoder.decoder.abstract())
    stage = decode_stage(autoencoder, _on(device, params), sample_shape(config), 1,
                         sharding=SingleDeviceSharding(device), **DECODERS[decoder])
    name = row_name(config.name, "vae", decoder, overrides=overrides)
    if device.platform != "tpu" or "tiling" in DECODERS[decoder]:
        return Case(name, "vae decode", "xla", stage.function, stage.args, _flops(stage))
    frames, height, width = sample_shape(config)[:3]
    head, size = autoencoder.cut(frames, **DECODERS[decoder])
    runs = sum(query_blocks(chunk, height * width, height * width)
               for chunk in (head, *[size] * ((frames - head) // size)))
    (marker, _), *_ = MARKERS["splash"].items()
    return Case(name, "vae decode", "splash", stage.function, stage.args, _flops(stage),
                {marker: runs}, pairs=[(height * width, height * width)])


def encode_case(config: Any, device: Any, encoder: UMT5Config | None = None,
                overrides: Sequence[str] = ()) -> Case:
    """The text encoder on one prompt of the config's length, bfloat16 weights."""
    net = make_umt5(encoder or UMT5Config(dtype="bfloat16"))
    params = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16 if a.ndim > 1 else a.dtype),
        net.abstract())
    stage = encode_stage(net, _on(device, params), 1, text_length(config),
                         SingleDeviceSharding(device))
    return Case(row_name(config.name, "encode", overrides=overrides), "text encoder", "xla",
                stage.function, stage.args, _flops(stage))


def with_text_of(config: Any, encoder: UMT5Config | None) -> Any:
    """The config whose network reads the encoder's states: the 8B preset's width is another's."""
    config = config.copy_and_resolve_references()
    config.model.text_width = (encoder or UMT5Config()).width
    return config


def stages(config: Any, device: Any, weights: str, decoder: str,
           encoder: UMT5Config | None = None, vae: VAEConfig | None = None,
           overrides: Sequence[str] = ()) -> dict[str, Case]:
    """"encode", "draw" and "decode" of one sample on one device."""
    config = with_text_of(config, encoder)
    return {"encode": encode_case(config, device, encoder, overrides),
            "draw": forward_case(config, [device], weights, overrides),
            "decode": decode_case(config, device, decoder, vae, overrides)}


def time_pipeline(cases: dict[str, Case], seconds: float, queued: int = 3,
                  trace: Path | None = None) -> dict[str, Any]:
    """A row: the median latency of a whole call at batch 1, each stage's own, and the throughput.

    latency: from token ids in host memory to frames done on the device. per_second: samples where
    `queued` calls are started before the first is waited for. peak_bytes: of all three stages and
    their weights (`memory.peak`); planned_bytes: of the draw alone. trace: a folder for a profile
    of whole calls.
    """
    before = memory_stats()
    with dispatch.recording() as selected:
        compiled = {name: case.function.lower(*case.args).compile() for name, case in cases.items()}
    params = {name: random_like(case.args[0]) for name, case in cases.items()}
    asked = [jax.device_get((random_like(cases["encode"].args[1:], i),
                             random_like(cases["draw"].args[1], i))) for i in range(SETS)]
    sets = [(ids, mask, seed) for (ids, mask), seed in asked]

    def encode(ids, mask):
        return compiled["encode"](params["encode"], ids, mask)

    def draw(states, mask, seed):
        return compiled["draw"](params["draw"], seed, seed, states, mask)

    def decode(latents):
        return compiled["decode"](params["decode"], latents)

    def whole(ids, mask, seed):
        return decode(draw(encode(ids, mask), mask, seed))

    def time(call, inputs, **how):  # everything has run by then: no more of it to warm up
        return measure(call, inputs, jax.block_until_ready, seconds=seconds, warmup=0, **how)

    def several(*first):
        return [whole(*first) for _ in range(queued)]

    drawn = [(encode(ids, mask), mask, seed) for ids, mask, seed in sets]
    latents = [(draw(*inputs),) for inputs in drawn]
    frames = looked_at(decode(*latents[0]))
    row = dataclasses.asdict(time(whole, sets, apart=True))  # queued calls hide the host's part
    row |= frames | {"backend": cases["draw"].backend, "selected": sorted(selected)}
    keep(row)
    # A whole call takes seconds, and `several` three of them: few samples, for hosts that are lent.
    row["stages"] = {"encode": time(encode, [one[:2] for one in sets]).median,
                     "draw": time(draw, drawn, least=3).median,
                     "decode": time(decode, latents, least=3).median}
    row["per_second"] = queued / time(several, sets, least=2).median
    row |= peak(planned(compiled["draw"]), before) | {"planned_over_peak": None}  # not of the same
    keep(row)
    return row | profiled(whole, sets, jax.block_until_ready, trace,
                          calls=1 if row["median"] > LONG else CALLS)
