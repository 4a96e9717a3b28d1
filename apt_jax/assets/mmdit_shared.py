"""The MMDiT with shared modulation in PyTorch: one file, next to its weights.

    from mmdit_shared import MMDiTShared, one_step
    model = MMDiTShared.from_pretrained("path/of/this/folder")
    x = one_step(model, z, text, text_mask)        # z - v(z, text, t = 1)

Needs torch and safetensors. Samples are channels last: [batch, frames, height, width, channels].
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS) * weight.float()).to(x.dtype)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], eps=EPS).to(x.dtype) * (1 + scale) + shift


def _angles(positions: Tensor, dim: int, theta: float) -> Tensor:
    rates = theta ** (-torch.arange(0, dim, 2, device=positions.device).float() / dim)
    return positions.float()[:, None] * rates


def _rotations(grid, length: int, axes, theta: float, device) -> tuple[Tensor, Tensor]:
    """Complex unit numbers of the text [L, head_dim / 2] and video [N, head_dim / 2] tokens."""
    f, h, w = grid
    frames = torch.arange(f, device=device)
    rows = torch.arange(h, device=device) - (h - h // 2)
    columns = torch.arange(w, device=device) - (w - w // 2)
    shape = (f, h, w)
    video = torch.cat([
        _angles(frames, axes[0], theta)[:, None, None].expand(*shape, -1),
        _angles(rows, axes[1], theta)[None, :, None].expand(*shape, -1),
        _angles(columns, axes[2], theta)[None, None].expand(*shape, -1),
    ], dim=-1).reshape(f * h * w, -1)
    words = torch.arange(length, device=device) + max(h // 2, w // 2)
    text = torch.cat([_angles(words, a, theta) for a in axes], dim=-1)
    return torch.polar(torch.ones_like(text), text), torch.polar(torch.ones_like(video), video)


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotation[:, None]).flatten(-2).to(x.dtype)


class _Weight(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return _rms(x, self.weight)


class _Up(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class _MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.net = nn.ModuleList([_Up(dim, hidden), nn.Identity(), nn.Linear(hidden, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class _Attention(nn.Module):
    """Joint attention of text and video tokens; every stream has its own projections."""

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj",
                     "to_add_out"):
            setattr(self, name, nn.Linear(dim, dim))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            setattr(self, name, _Weight(head_dim))

    def forward(self, video: Tensor, text: Tensor, rotations, mask: Tensor):
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1))  # [B, N, heads, head_dim]

        words, pictures = rotations
        q = torch.cat([_rotate(self.norm_added_q(heads(self.add_q_proj(text))), words),
                       _rotate(self.norm_q(heads(self.to_q(video))), pictures)], dim=1)
        k = torch.cat([_rotate(self.norm_added_k(heads(self.add_k_proj(text))), words),
                       _rotate(self.norm_k(heads(self.to_k(video))), pictures)], dim=1)
        v = torch.cat([heads(self.add_v_proj(text)), heads(self.to_v(video))], dim=1)
        joint = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask[:, None, None])
        joint = joint.transpose(1, 2).flatten(2)  # [B, L + N, D]
        length = text.shape[1]
        return self.to_out[0](joint[:, length:]), self.to_add_out(joint[:, :length])


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, head_dim: int, hidden: int):
        super().__init__()
        self.img_mod = nn.Parameter(torch.zeros(6 * dim))
        self.txt_mod = nn.Parameter(torch.zeros(6 * dim))
        self.attn = _Attention(dim, heads, head_dim)
        self.img_mlp, self.txt_mlp = _MLP(dim, hidden), _MLP(dim, hidden)

    def forward(self, video: Tensor, text: Tensor, condition: Tensor, rotations, mask: Tensor):
        iv = (condition + self.img_mod)[:, None].chunk(6, dim=-1)  # shift, scale, gate; twice
        tv = (condition + self.txt_mod)[:, None].chunk(6, dim=-1)
        attn_video, attn_text = self.attn(
            _modulated(video, iv[0], iv[1]), _modulated(text, tv[0], tv[1]), rotations, mask)
        video, text = video + iv[2] * attn_video, text + tv[2] * attn_text
        video = video + iv[5] * self.img_mlp(_modulated(video, iv[3], iv[4]))
        text = text + tv[5] * self.txt_mlp(_modulated(text, tv[3], tv[4]))
        return video, text


class _Time(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(256, dim), nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        rates = torch.exp(-math.log(10_000.0) * torch.arange(128, device=t.device).float() / 128)
        angle = 1000.0 * t.float()[:, None] * rates
        features = torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(features)))


class MMDiTShared(nn.Module):
    """Velocity network: model(x, t, text, text_mask) -> v, float32, shaped like x."""

    def __init__(self, in_channels, out_channels, patch, width, depth, heads, head_dim, rope_axes,
                 rope_theta, text_width, mlp_ratio):
        super().__init__()
        size = math.prod(patch)
        self.patch, self.rope_axes, self.rope_theta = tuple(patch), tuple(rope_axes), rope_theta
        self.img_in = nn.Linear(in_channels * size, width)
        self.txt_norm = _Weight(text_width)
        self.txt_in = nn.Linear(text_width, width)
        self.time_text_embed = nn.ModuleDict({"timestep_embedder": _Time(width)})
        self.modulation = nn.Linear(width, 6 * width)
        self.transformer_blocks = nn.ModuleList(
            [_Block(width, heads, head_dim, round(width * mlp_ratio)) for _ in range(depth)])
        self.norm_out = nn.ModuleDict({"linear": nn.Linear(width, 2 * width)})
        self.proj_out = nn.Linear(width, out_channels * size)

    @classmethod
    def from_pretrained(cls, folder: str, dtype: torch.dtype | None = None) -> MMDiTShared:
        """Reads config.json and the safetensors files of `folder`."""
        from safetensors.torch import load_file

        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text())
        if config.pop("_class_name") != cls.__name__:
            raise ValueError(f"{folder} is not of {cls.__name__}")
        with torch.device("meta"):
            model = cls(**config)
        weights = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights.update(load_file(file))
        model.load_state_dict(weights, strict=True, assign=True)
        return (model if dtype is None else model.to(dtype)).eval()

    def forward(self, x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """x [B, F, H, W, C]; t [B] in [0, 1], 1 is noise; text [B, L, text_width]; text_mask bool
        [B, L], False for padding."""
        b, f, h, w, c = x.shape
        pt, ph, pw = self.patch
        grid = (f // pt, h // ph, w // pw)
        dtype = self.img_in.weight.dtype
        tokens = x.to(dtype).reshape(b, grid[0], pt, grid[1], ph, grid[2], pw, c)
        tokens = tokens.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, math.prod(grid), -1)

        video = self.img_in(tokens)
        words = self.txt_in(self.txt_norm(text.to(dtype)))
        time = self.time_text_embed["timestep_embedder"](t)
        condition = self.modulation(F.silu(time))
        rotations = _rotations(grid, words.shape[1], self.rope_axes, self.rope_theta, x.device)
        mask = torch.cat([text_mask, text_mask.new_ones(b, video.shape[1])], dim=1)
        for block in self.transformer_blocks:
            video, words = block(video, words, condition, rotations, mask)

        scale, shift = self.norm_out["linear"](F.silu(time))[:, None].chunk(2, dim=-1)
        v = self.proj_out(_modulated(video, shift, scale))
        v = v.reshape(b, *grid, -1, pt, ph, pw).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return v.reshape(b, f, h, w, -1).float()


@torch.no_grad()
def one_step(model: MMDiTShared, z: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
    """The generator: z - v(z, text, t = 1)."""
    return z - model(z, torch.ones(z.shape[0], device=z.device), text, text_mask)


@torch.no_grad()
def two_steps(model: MMDiTShared, z: Tensor, text: Tensor, text_mask: Tensor, t: float = 0.5
              ) -> Tensor:
    """One step, back to time t with the same noise, and one step from there."""
    x_t = (1 - t) * one_step(model, z, text, text_mask) + t * z
    return x_t - t * model(x_t, torch.full((z.shape[0],), t, device=z.device), text, text_mask)
