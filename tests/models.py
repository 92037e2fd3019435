"""Small real models for whole-model tests: a Llama from transformers, and a mixed block of Linears.
Random weights; nothing is downloaded."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

VOCABULARY = 96


def tiny_llama(*, tied: bool = True, seed: int = 0) -> nn.Module:
    """A 2-layer Llama with grouped-query attention, 64 wide, in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


class Mlp(nn.Module):
    """norm -> (gate, up) -> down, with biases, a residual, and optional checkpointing."""

    def __init__(self, width: int = 48, hidden: int = 80, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, hidden)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.checkpointed = checkpointed

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return self.down(nn.functional.silu(self.gate(h)) * self.up(h))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.checkpointed:
            return x + checkpoint(self.inner, x, use_reentrant=False)
        return x + self.inner(x)


class DecoderBlock(nn.Module):
    """One Llama block of Llama-3-8B's proportions, 128 wide: RMSNorm, causal grouped-query
    attention, SwiGLU. Position embeddings are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(128, eps=1e-5) for _ in range(2))
        sizes = {"q": (128, 128), "k": (128, 32), "v": (128, 32), "o": (128, 128)}
        sizes |= {"gate_proj": (128, 448), "up": (128, 448), "down": (448, 128)}
        linears = {n: nn.Linear(i, o, bias=False) for n, (i, o) in sizes.items()}
        self.linears = nn.ModuleDict(linears)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        linear, h = self.linears, self.norms[0](x)
        q, k, v = (linear[n](h).unflatten(-1, (-1, 32)).transpose(1, 2) for n in "qkv")
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + linear["o"](mixed.transpose(1, 2).flatten(2))
        h = self.norms[1](x)
        return x + linear["down"](nn.functional.silu(linear["gate_proj"](h)) * linear["up"](h))


class DecoderBlocks(nn.Sequential):
    """A stack of them, with weights that do not depend on what was drawn before."""

    def __init__(self, count: int) -> None:
        torch.manual_seed(2)
        super().__init__(*(DecoderBlock() for _ in range(count)))


def tokens(batch: int = 2, sequence: int = 24, seed: int = 3) -> torch.Tensor:
    """Random token ids [batch, sequence]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (batch, sequence), generator=generator)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters' gradients by name, taken off the model."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def decibels(got: torch.Tensor, want: torch.Tensor) -> float:
    """Signal to noise of `got` against `want`, in dB."""
    want = want.double()
    noise = (got.double() - want).square().sum()
    return float(10 * torch.log10(want.square().sum() / noise.clamp(min=1e-300)))
