"""The MMDiT once more, in PyTorch as one would write it there: the peer that `bench cpu` runs beside ours.

It takes our weights, so that the two are compared on equal results. Needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from apt_jax.models.mmdit import MMDiTConfig
from apt_jax.nn.embeddings import FREQUENCIES, TIME_SCALE
from apt_jax.nn.norm import EPS


def _norm(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


class _MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class _Stream(nn.Module):
    def __init__(self, c: MMDiTConfig):
        super().__init__()
        self.heads = c.heads
        if c.modulation == "per_block":
            self.modulation = nn.Linear(c.width, 6 * c.width)
        else:
            self.modulation = nn.Parameter(torch.zeros(6 * c.width))
        self.qkv = nn.Linear(c.width, 3 * c.width)
        self.q_norm, self.k_norm = (nn.RMSNorm(c.head_dim, eps=EPS) for _ in range(2))
        self.out = nn.Linear(c.width, c.width)
        self.mlp = _MLP(c.width, round(c.width * c.mlp_ratio))

    def modulations(self, condition):
        m = (self.modulation(condition) if isinstance(self.modulation, nn.Linear)
             else condition + self.modulation)
        return m[:, None].chunk(6, dim=-1)  # six of [B, 1, D]

    def project(self, x, rotation):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # [B, N, heads, d]
        q, k = _rotate(self.q_norm(q), rotation), _rotate(self.k_norm(k), rotation)
        return [y.transpose(1, 2) for y in (q, k, v)]  # [B, heads, N, d]


def _rotate(x, rotation):
    cos, sin = rotation  # [N, 1, d / 2]
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


class _Block(nn.Module):
    def __init__(self, c: MMDiTConfig):
        super().__init__()
        self.video, self.text = _Stream(c), _Stream(c)

    def forward(self, video, text, condition, rotations, mask):
        states, streams = [text, video], [self.text, self.video]
        m = [s.modulations(condition) for s in streams]
        qkv = [s.project(_norm(x) * (1 + scale) + shift, r)
               for s, x, (shift, scale, *_), r in zip(streams, states, m, rotations[::-1])]
        q, k, v = (torch.cat(parts, dim=2) for parts in zip(*qkv))
        joint = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        lengths = [x.shape[1] for x in states]
        for i, part in enumerate(joint.split(lengths, dim=1)):
            _, _, gate, shift, scale, mlp_gate = m[i]
            x = states[i] + gate * streams[i].out(part)
            states[i] = x + mlp_gate * streams[i].mlp(_norm(x) * (1 + scale) + shift)
        return states[1], states[0]


class TorchMMDiT(nn.Module):
    """x [B, F, H, W, C], t [B], text [B, L, D], mask bool [B, L] -> velocity [B, F, H, W, C_out].

    rotations: ours (`nn.rope`), cos and sin of the video's and of the text's tokens.
    """

    def __init__(self, c: MMDiTConfig, rotations):
        super().__init__()
        pt, ph, pw = c.patch
        self.c = c
        self.video_in = nn.Linear(c.in_channels * pt * ph * pw, c.width)
        self.text_norm = nn.RMSNorm(c.text_width, eps=EPS)
        self.text_in = nn.Linear(c.text_width, c.width)
        self.time_hidden = nn.Linear(FREQUENCIES, c.width)
        self.time_out = nn.Linear(c.width, c.width)
        if c.modulation == "shared":
            self.modulation = nn.Linear(c.width, 6 * c.width)
        self.blocks = nn.ModuleList(_Block(c) for _ in range(c.depth))
        self.norm_out = nn.Linear(c.width, 2 * c.width)
        self.proj_out = nn.Linear(c.width, c.out_channels * pt * ph * pw)
        self.rotations = [tuple(torch.from_numpy(np.array(a))[:, None] for a in r)
                          for r in rotations]
        half = FREQUENCIES // 2
        self.rates = torch.exp(-math.log(10_000.0) * torch.arange(half) / half)

    def forward(self, x, t, text, text_mask):
        c = self.c
        (pt, ph, pw), (b, f, h, w, _) = c.patch, x.shape
        grid = (f // pt, h // ph, w // pw)
        tokens = x.reshape(b, grid[0], pt, grid[1], ph, grid[2], pw, -1)
        video = self.video_in(tokens.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, math.prod(grid), -1))
        words = self.text_in(self.text_norm(text))
        angle = TIME_SCALE * t[:, None] * self.rates
        time = self.time_out(F.silu(self.time_hidden(torch.cat([angle.cos(), angle.sin()], -1))))
        condition = F.silu(time)
        if c.modulation == "shared":
            condition = self.modulation(condition)
        mask = torch.cat([text_mask, text_mask.new_ones(b, video.shape[1])], 1)[:, None, None]
        for block in self.blocks:
            video, words = block(video, words, condition, self.rotations, mask)
        scale, shift = self.norm_out(F.silu(time))[:, None].chunk(2, dim=-1)
        out = self.proj_out(_norm(video) * (1 + scale) + shift)
        out = out.reshape(b, *grid, c.out_channels, pt, ph, pw).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return out.reshape(b, f, h, w, c.out_channels)

    @torch.no_grad()
    def take(self, flat: Mapping[str, np.ndarray]) -> TorchMMDiT:
        """Our parameters, flat "a/b/c" names; KeyError or ValueError where they do not fit."""
        rest = dict(flat)
        for name, parameter in self.named_parameters():
            path, layer = name.replace("time_", "time.").split("."), None
            if path[0] == "blocks":
                layer = int(path.pop(1))
            if path[0] not in ("norm_out", "proj_out"):
                path.insert(0, "backbone")
            if path[-1] == "weight":
                path[-1] = "scale" if "norm" in path[-2] and path[-2] != "norm_out" else "kernel"
            key = "/".join(path)
            value = flat[key] if layer is None else flat[key][layer]
            rest.pop(key, None)
            value = torch.from_numpy(np.array(value, np.float32))
            parameter.copy_(value.T if path[-1] == "kernel" else value)
        if rest:
            raise ValueError(f"the PyTorch model has no {sorted(rest)[0]}")
        return self
