"""Others' attention beside ours: PyTorch's scaled_dot_product_attention, and tokamax's own choice.

A peer is (call, inputs, wait) as `timing.measure` takes them; UserError says why there is none.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from apt_jax.bench.cases import AttentionCase
from apt_jax.errors import UserError
from apt_jax.kernels.peers import prepare_tokamax

Contender = tuple[Callable[..., Any], Sequence[tuple], Callable[[Any], Any]]


def gradient_of(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of the result's sum for q, k and v, with the forward pass that it needs."""
    def gradient(q, k, v, *mask):
        return jax.grad(lambda *a: forward(*a, *mask).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

    return gradient


def torch_sdpa(case: AttentionCase, part: str, seeds: Sequence[int]) -> Contender:
    """PyTorch's on CUDA; UserError without it."""
    if importlib.util.find_spec("torch") is None:
        raise UserError("no PyTorch with CUDA")
    import torch

    if not torch.cuda.is_available():
        raise UserError("no PyTorch with CUDA")

    def tensors(seed):
        generator = torch.Generator("cuda").manual_seed(seed)
        make = lambda n: torch.randn(  # noqa: E731
            (case.batch, case.heads, n, case.head_dim), generator=generator, device="cuda",
            dtype=torch.bfloat16).requires_grad_(part == "gradient")
        mask = [] if case.hidden is None else [
            (torch.arange(case.keys, device="cuda") >= case.hidden)[None, None, None]]
        return make(case.queries), make(case.keys), make(case.keys), *mask

    def call(q, k, v, mask=None):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return torch.autograd.grad(out.sum(), (q, k, v)) if part == "gradient" else out

    return call, [tensors(seed) for seed in seeds], lambda _: torch.cuda.synchronize()


def release_torch() -> None:
    """Gives the memory that PyTorch keeps for itself back to the device."""
    import torch

    torch.cuda.empty_cache()


def tokamax_choice(part: str, inputs: Sequence[tuple]) -> Contender:
    """tokamax's with implementation=None: the kernel that it takes by itself. UserError without it,
    and where there is no GPU: on a CPU it has nothing but plain JAX."""
    if importlib.util.find_spec("tokamax") is None:
        raise UserError("tokamax is not installed; run: pip install 'apt_jax[tokamax]'")
    if jax.default_backend() != "gpu":
        raise UserError("tokamax's own choice is measured on GPUs")
    prepare_tokamax()

    def forward(q, k, v, mask=None):
        from tokamax import dot_product_attention

        return dot_product_attention(q, k, v, mask=None if mask is None else mask[:, None, None])

    call = forward if part == "forward" else gradient_of(forward)
    return jax.jit(call), inputs, jax.block_until_ready
