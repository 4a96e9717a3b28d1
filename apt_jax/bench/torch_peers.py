"""The same work in PyTorch, by diffusers' models: blocks, forwards, training steps, the VAE's decoder.

QwenImageTransformer2DModel has the MMDiT's token FLOPs, but a modulation of its own in every block:
at the 8B preset's 36 layers that makes 12.2B parameters. A row says how many its peer has. Attention
is PyTorch's scaled_dot_product_attention, layers are compiled by torch.compile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import inspect
import math
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from apt_jax.bench.case import SETS, rates
from apt_jax.bench.timing import measure
from apt_jax.errors import UserError
from apt_jax.plan.programs import sample_shape, text_length

RATE, DECAY, EPS, R1_WEIGHT = 3e-6, 0.9, 1e-8, 100.0


class Peer(NamedTuple):
    """call(*sets[i]) does the work on one of SETS inputs; parameters: of one network."""

    call: Callable[..., Any]
    sets: Sequence[tuple]
    parameters: int


@dataclasses.dataclass(frozen=True)
class Place:
    """Where and how PyTorch computes."""

    device: str = "cuda"
    compiled: bool = True

    @property
    def dtype(self) -> Any:
        import torch

        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def wait(self, _: Any) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def making(self, dtype: Any = None):
        """Modules made inside are born on the device in the dtype."""
        import torch

        old = torch.get_default_dtype()
        torch.set_default_dtype(dtype or self.dtype)
        try:
            with torch.device(self.device):
                yield
        finally:
            torch.set_default_dtype(old)

    def run(self, module: Any) -> Any:
        """The module as it should run: layers that repeat are compiled once for all of them, as
        diffusers offers it, where the whole model would take PyTorch minutes."""
        import torch

        if self.compiled and getattr(module, "_repeated_blocks", None):
            module.compile_repeated_blocks()
            return module
        return torch.compile(module) if self.compiled else module


def why_not() -> str:
    """What is missing to run a peer here; "" where nothing is."""
    for module, name in (("torch", "PyTorch"), ("diffusers", "diffusers")):
        if importlib.util.find_spec(module) is None:
            return f"no {name}"
    import torch

    return "" if torch.cuda.is_available() else "no PyTorch with CUDA"


def transformer(config: Any) -> Any:
    """diffusers' model of config.model's sizes, random weights, made as the caller's context says."""
    from diffusers import QwenImageTransformer2DModel, WanTransformer3DModel

    m = config.model
    if m.family == "wan":
        return WanTransformer3DModel(
            patch_size=tuple(m.patch), num_attention_heads=m.heads, attention_head_dim=m.head_dim,
            in_channels=m.in_channels, out_channels=m.out_channels, text_dim=m.text_width,
            freq_dim=m.frequency_width, ffn_dim=round(m.width * m.mlp_ratio), num_layers=m.depth)
    if tuple(m.patch) != (1, 2, 2):
        raise UserError(f"model.patch = {m.patch}: the PyTorch peer has patches of (1, 2, 2) only")
    return QwenImageTransformer2DModel(
        patch_size=2, in_channels=4 * m.in_channels, out_channels=m.out_channels,
        num_layers=m.depth, attention_head_dim=m.head_dim, num_attention_heads=m.heads,
        joint_attention_dim=m.text_width, axes_dims_rope=tuple(m.rope_axes))


def inputs(config: Any, place: Place, batch: int = 1) -> dict[str, Any]:
    """Keyword arguments of `transformer`'s forward pass for samples of the config's size."""
    import torch

    m, (frames, height, width, channels) = config.model, sample_shape(config)
    grid = [side // patch for side, patch in zip((frames, height, width), m.patch, strict=True)]
    words = m.text_tokens or text_length(config) if m.family == "wan" else text_length(config)
    with place.making():
        found = {"encoder_hidden_states": torch.randn(batch, words, m.text_width),
                 "timestep": torch.rand(batch)}
        if m.family == "wan":
            return {**found, "hidden_states": torch.randn(batch, channels, frames, height, width)}
        # No mask of the text: one of all True would keep PyTorch from its flash kernel.
        return {**found, **_lengths(batch, words), "img_shapes": [[tuple(grid)]] * batch,
                "hidden_states": torch.randn(batch, math.prod(grid), 4 * channels)}


def _lengths(batch: int, words: int) -> dict[str, Any]:
    """The length of each text for diffusers that do not read it off the text states themselves."""
    from diffusers import QwenImageTransformer2DModel

    asked = inspect.signature(QwenImageTransformer2DModel.forward).parameters
    return {"txt_seq_lens": [words] * batch} if "txt_seq_lens" in asked else {}


def forward(config: Any, place: Place) -> Peer:
    """One evaluation of the network."""
    import torch

    with place.making():
        model = transformer(config).eval().requires_grad_(False)
    run = place.run(model)

    @torch.inference_mode()
    def call(kwargs):
        return run(**kwargs, return_dict=False)[0]

    return Peer(call, [(inputs(config, place),) for _ in range(SETS)], _count(model))


def block(config: Any, part: str, place: Place) -> Peer:
    """One block, "forward" or "gradient": its inputs are caught on their way through a network."""
    import torch

    one = config.copy_and_resolve_references()
    one.model.depth = 1
    with place.making():
        model = transformer(one)
    (module,) = model.blocks if one.model.family == "wan" else model.transformer_blocks
    caught: list[tuple] = []
    with torch.no_grad(), contextlib.ExitStack() as hooks:
        hook = module.register_forward_pre_hook(
            lambda _, args, kwargs: caught.append((args, kwargs)), with_kwargs=True)
        hooks.callback(hook.remove)
        for _ in range(SETS):
            model(**inputs(one, place), return_dict=False)
    run = place.run(module)

    def gradient(x: Any) -> Any:
        return x.detach().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x

    if part == "gradient":
        caught = [(tuple(map(gradient, args)), {name: gradient(x) for name, x in kwargs.items()})
                  for args, kwargs in caught]

    def call(args, kwargs):
        if part == "forward":
            with torch.inference_mode():
                return run(*args, **kwargs)
        out = run(*args, **kwargs)
        module.zero_grad(set_to_none=True)
        sum(x.sum() for x in (out if isinstance(out, tuple) else (out,))).backward()
        return None

    return Peer(call, caught, _count(module))


def training(config: Any, place: Place) -> dict[str, Peer]:
    """The D and the G step of adversarial training: float32 weights, bfloat16 autocast, RMSProp, EMA.

    D's logit is the mean of its output instead of three heads of one query each, which are less than
    a thousandth of its work.
    """
    import torch
    from torch.nn.functional import softplus

    with place.making(torch.float32):
        nets = {name: transformer(config) for name in ("generator", "discriminator", "average")}
        sets = [(inputs(config, place),) for _ in range(SETS)]
    nets["average"].requires_grad_(False)
    for name in ("generator", "discriminator"):
        if config.model.remat != "none":
            nets[name].enable_gradient_checkpointing()
    runs = {name: place.run(nets[name]) for name in ("generator", "discriminator")}
    optimizers = {name: torch.optim.RMSprop(nets[name].parameters(), lr=RATE, alpha=DECAY, eps=EPS)
                  for name in runs}

    def apply(name: str, kwargs: dict[str, Any], x: Any) -> Any:
        times = x.shape[0]
        repeated = {key: value.repeat(times, *[1] * (value.ndim - 1)) if torch.is_tensor(value)
                    else value * times for key, value in kwargs.items()}
        with torch.autocast(place.device, torch.bfloat16, enabled=place.device == "cuda"):
            return runs[name](**{**repeated, "hidden_states": x}, return_dict=False)[0].float()

    def logits(kwargs, x):
        return apply("discriminator", kwargs, x).flatten(1).mean(1)

    def draw(noise):
        z = torch.randn_like(noise["hidden_states"], dtype=torch.float32)
        return z - apply("generator", noise, z)

    def update(name: str, loss: Any) -> None:
        optimizers[name].zero_grad(set_to_none=True)
        loss.backward()
        optimizers[name].step()

    def d_step(noise):
        nets["discriminator"].requires_grad_(True)
        with torch.no_grad():
            fake = draw(noise)
        real = torch.randn_like(fake)
        real_logit, near, fake_logit = logits(
            noise, torch.cat([real, real + 0.1 * torch.randn_like(real), fake])).unbind()
        loss = softplus(-real_logit) + softplus(fake_logit) + R1_WEIGHT * (real_logit - near) ** 2
        update("discriminator", loss)
        return loss.detach()

    def g_step(noise):
        nets["discriminator"].requires_grad_(False)
        loss = softplus(-logits(noise, draw(noise))).mean()
        update("generator", loss)
        with torch.no_grad():
            torch._foreach_lerp_(list(nets["average"].parameters()),
                                 list(nets["generator"].parameters()), 0.005)
        return loss.detach()

    size = _count(nets["generator"])
    return {"D step": Peer(d_step, sets, size), "G step": Peer(g_step, sets, size)}


def decode(config: Any, place: Place, **fields: Any) -> Peer:
    """AutoencoderKLWan's decoder on one sample, frame by frame as it does. fields: of its config."""
    import torch
    from diffusers import AutoencoderKLWan

    frames, height, width, channels = sample_shape(config)
    with place.making():
        vae = AutoencoderKLWan(**fields).eval().requires_grad_(False)
        sets = [(torch.randn(1, channels, frames, height, width),) for _ in range(SETS)]

    @torch.inference_mode()
    def call(z):
        return vae.decode(z, return_dict=False)[0]

    return Peer(call, sets, sum(p.numel() for p in vae.decoder.parameters()))


def time_peer(make: Callable[[], Peer], place: Place, seconds: float, flops: float | None,
              device: str) -> dict[str, Any]:
    """A timed row of a peer, or one that says why it is left out; raises what PyTorch raises."""
    reason = why_not() if place.device == "cuda" else ""
    if reason:
        return {"backend": "torch", "skipped": reason}
    peer = None
    try:
        peer = make()
        parameters = peer.parameters
        timing = measure(peer.call, peer.sets, place.wait, seconds=seconds)
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # they hold the model, as `peer` does
        raise
    finally:
        peer = None  # nothing of it may be held when its memory is given back
        free(place)
    return {**dataclasses.asdict(timing), "backend": "torch", "compiled": place.compiled,
            "parameters": parameters, **rates(flops, timing.median, device)}


def free(place: Place) -> None:
    """Gives PyTorch's unused memory back to the device."""
    if place.device == "cuda" and not why_not():
        import gc

        import torch

        gc.collect()
        torch.cuda.empty_cache()


def _count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())
