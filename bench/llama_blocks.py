"""Llama-shaped decoder blocks for benchmarks: RMSNorm, rotary grouped-query attention by SDPA,
SwiGLU. Weights are random; nothing else of a language model is here."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from hadagraph.shapes import SHAPES as KNOWN
from hadagraph.shapes import BlockShape

SHAPES = KNOWN | {"tiny": BlockShape(64, 160, 4, 2, 2)}


class Block(nn.Module):
    """One pre-norm decoder block on [batch, sequence, width]."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        kv = shape.kv_heads * shape.head_dim
        self.shape = shape
        self.attention_norm = nn.RMSNorm(shape.width, eps=1e-5)
        self.q_proj = nn.Linear(shape.width, shape.width, bias=False)
        self.k_proj = nn.Linear(shape.width, kv, bias=False)
        self.v_proj = nn.Linear(shape.width, kv, bias=False)
        self.o_proj = nn.Linear(shape.width, shape.width, bias=False)
        self.mlp_norm = nn.RMSNorm(shape.width, eps=1e-5)
        self.gate_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down_proj = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cosine, sine)
        h = self.mlp_norm(x)
        return x + self.down_proj(functional.silu(self.gate_proj(h)) * self.up_proj(h))

    def attention(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        batch, sequence, _ = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, sequence, -1, self.shape.head_dim).transpose(1, 2)

        q = rotary(heads(self.q_proj(x)), cosine, sine)
        k = rotary(heads(self.k_proj(x)), cosine, sine)
        v = heads(self.v_proj(x))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, sequence, -1))


def rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding of [batch, heads, sequence, head_dim], halves rotated."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


class Blocks(nn.Module):
    """A stack of blocks with its rotary tables."""

    def __init__(self, shape: BlockShape, count: int, sequence: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(shape) for _ in range(count))
        half = shape.head_dim // 2
        frequency = 500000.0 ** (-torch.arange(half) / half)
        angle = torch.outer(torch.arange(sequence), frequency).repeat(1, 2)
        self.register_buffer("cosine", angle.cos())
        self.register_buffer("sine", angle.sin())

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.cosine, self.sine)
        return x


def make_blocks(name: str, count: int, sequence: int, device: str, seed: int = 0) -> Blocks:
    """bf16 blocks with weights of the usual scale, the same for the same seed."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = Blocks(SHAPES[name], count, sequence)
        for name_, parameter in model.named_parameters():
            if "norm" not in name_:
                nn.init.normal_(parameter, std=0.02)
    return model.to(torch.bfloat16)


def linear_flops(name: str, count: int, tokens: int) -> int:
    """FLOPs of the Linears' three GEMMs, forward and backward."""
    return 3 * 2 * tokens * SHAPES[name].linear_parameters * count
