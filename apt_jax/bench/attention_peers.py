"""Others' attention beside ours: PyTorch's scaled_dot_product_attention, and tokamax's own choice.

UserError says why there is none.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from apt_jax.bench.cases import AttentionCase
from apt_jax.errors import UserError
from apt_jax.kernels.peers import prepare_tokamax


class Contender(NamedTuple):
    """call, inputs and wait as `timing.measure` takes them; says: what belongs into the row."""

    call: Callable[..., Any]
    inputs: Sequence[tuple]
    wait: Callable[[Any], Any]
    says: Mapping[str, Any] = {}


def gradient_of(forward: Callable[..., Any]) -> Callable[..., Any]:
    """(q, k, v, cotangent, mask where there is one) -> (dq, dk, dv), with the forward pass that
    they need."""
    def gradient(q, k, v, dout, *mask):
        return jax.vjp(lambda *a: forward(*a, *mask), q, k, v)[1](dout)

    return gradient


def inputs_of(part: str, drawn: Sequence[tuple]) -> Sequence[tuple]:
    """Sets of q, k, v and mask as a forward pass or a gradient takes them: the cotangent of one set
    is the next one's q."""
    if part == "forward":
        return drawn
    return [(q, k, v, drawn[(i + 1) % len(drawn)][0], *mask)
            for i, (q, k, v, *mask) in enumerate(drawn)]


def torch_sdpa(case: AttentionCase, part: str, seeds: Sequence[int], device: str = "cuda"
               ) -> Contender:
    """PyTorch's on CUDA (device "cpu": for tests); UserError without it.

    Keys that the mask hides are cut off, which is what it asks for, since they are the first of every
    sample: with a mask PyTorch's flash kernel could not serve.
    """
    if importlib.util.find_spec("torch") is None:
        raise UserError("no PyTorch with CUDA")
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("no PyTorch with CUDA")
    gradient = part == "gradient"

    def tensors(seed):
        generator = torch.Generator(device).manual_seed(seed)

        def make(n, gradient=gradient):
            return torch.randn((case.batch, case.heads, n, case.head_dim), generator=generator,
                               device=device, dtype=torch.bfloat16).requires_grad_(gradient)

        keys = case.keys - (case.hidden or 0)
        made = make(case.queries), make(keys), make(keys)
        return (*made, make(case.queries, False)) if gradient else made

    def call(q, k, v, dout=None):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return torch.autograd.grad(out, (q, k, v), dout) if gradient else out

    sets = [tensors(seed) for seed in seeds]
    says = {"kernels": [_torch_kernel(*sets[0][:3])]}
    if case.hidden:
        says["mask"] = "hidden keys cut off"
    return Contender(call, sets, lambda _: device == "cuda" and torch.cuda.synchronize(), says)


def _torch_kernel(q: Any, k: Any, v: Any) -> str:
    """Which of its kernels PyTorch takes for such arrays; "unknown" where it does not say."""
    import torch

    try:
        return torch.nn.attention.SDPBackend(torch._fused_sdp_choice(q, k, v)).name
    except (AttributeError, TypeError, ValueError):  # not part of its public interface
        return "unknown"


def release_torch() -> None:
    """Gives the memory that PyTorch keeps for itself back to the device."""
    import torch

    torch.cuda.empty_cache()


def tokamax_choice(part: str, inputs: Sequence[tuple]) -> Contender:
    """tokamax's with implementation=None: the kernel that it takes by itself, which the row names.
    UserError without it, and where there is no GPU: on a CPU it has nothing but plain JAX."""
    if importlib.util.find_spec("tokamax") is None:
        raise UserError("tokamax is not installed; run: pip install 'apt_jax[tokamax]'")
    if jax.default_backend() != "gpu":
        raise UserError("tokamax's own choice is measured on GPUs")
    prepare_tokamax()

    def forward(q, k, v, mask=None):
        from tokamax import dot_product_attention

        return dot_product_attention(q, k, v, mask=None if mask is None else mask[:, None, None])

    call, sets = forward if part == "forward" else gradient_of(forward), inputs_of(part, inputs)
    compiled = jax.jit(call).lower(*sets[0]).compile()
    return Contender(compiled, sets, jax.block_until_ready,
                     {"kernels": kernels_in(compiled.as_text())})


# What a line of a program says -> the kernel.
KERNELS = {"mosaic_gpu": "Mosaic", "__cudnn$fmha": "cuDNN", "gpu.triton": "Triton"}


def kernels_in(text: str) -> list[str]:
    """The kernels that compute attention in a compiled program; ["XLA"] where there is none."""
    calls = [line for line in text.splitlines() if "custom_call_target=" in line]
    return [name for marker, name in KERNELS.items()
            if any(marker in line for line in calls)] or ["XLA"]
