"""Decoder blocks with the shapes of known models, for plans without a checkpoint: RMSNorm, grouped
attention by SDPA, SwiGLU. Weights mean nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class BlockShape:
    """Sizes of a model's decoder blocks, and their number."""

    width: int
    hidden: int
    heads: int
    kv_heads: int
    layers: int

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def linear_parameters(self) -> int:
        """Weights of the seven Linears of one block."""
        attention = 2 * self.width * self.width + 2 * self.width * self.kv_heads * self.head_dim
        return attention + 3 * self.width * self.hidden


# From the models' published configurations.
SHAPES = {
    "llama3-8b": BlockShape(4096, 14336, 32, 8, 32),
    "llama3-1b": BlockShape(2048, 8192, 32, 8, 16),
    "llama3-70b": BlockShape(8192, 28672, 64, 8, 80),
    "qwen2.5-0.5b": BlockShape(896, 4864, 14, 2, 24),
    "smollm2-135m": BlockShape(576, 1536, 9, 3, 30),
    "smollm2-360m": BlockShape(960, 2560, 15, 5, 32),
}


class Block(nn.Module):
    """One pre-norm decoder block on [batch, sequence, width]."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        kv = shape.kv_heads * shape.head_dim
        self.head_dim = shape.head_dim
        self.attention_norm = nn.RMSNorm(shape.width)
        self.q_proj = nn.Linear(shape.width, shape.width, bias=False)
        self.k_proj = nn.Linear(shape.width, kv, bias=False)
        self.v_proj = nn.Linear(shape.width, kv, bias=False)
        self.o_proj = nn.Linear(shape.width, shape.width, bias=False)
        self.mlp_norm = nn.RMSNorm(shape.width)
        self.gate_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down_proj = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, sequence, width] -> the same."""
        a = self.attention_norm(x)
        q, k, v = (self._heads(project(a)) for project in (self.q_proj, self.k_proj, self.v_proj))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(y.transpose(1, 2).reshape(x.shape))
        m = self.mlp_norm(x)
        return x + self.down_proj(functional.silu(self.gate_proj(m)) * self.up_proj(m))

    def _heads(self, y: Tensor) -> Tensor:
        return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def blocks(name: str, layers: int) -> nn.Sequential:
    """So many blocks of a shape, in torch's default dtype. ValueError lists the names."""
    if name not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {name!r}")
    return nn.Sequential(*(Block(SHAPES[name]) for _ in range(layers)))


def example(name: str, batch: int, sequence: int) -> Tensor:
    """An input of such blocks, which requires its gradient."""
    return torch.zeros(batch, sequence, SHAPES[name].width, requires_grad=True)
