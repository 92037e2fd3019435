"""Whole decoder models with random weights: embedding, Llama-shaped blocks, norm, head and loss, in
the sizes of published ones. Qwen's QKV biases are left out."""

from __future__ import annotations

import torch
from llama_blocks import SHAPES, Blocks, BlockShape
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = {
    "smollm2-135m": 49152,
    "smollm2-360m": 49152,
    "qwen2.5-0.5b": 151936,
    "llama3-1b": 128256,
    "tiny": 96,
}
"""Tokens of the published models; their blocks and depths are in `SHAPES`."""


class LanguageModel(nn.Module):
    """Tokens [batch, sequence] and the tokens that follow them -> mean cross entropy, from logits
    in bf16 made fp32 (as transformers does)."""

    def __init__(
        self, shape: BlockShape, vocabulary: int, layers: int, sequence: int, tied: bool
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, shape.width)
        self.body = Blocks(shape, layers, sequence)
        self.norm = nn.RMSNorm(shape.width, eps=1e-5)
        self.lm_head = nn.Linear(shape.width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, following: Tensor) -> Tensor:
        logits = self.lm_head(self.norm(self.body(self.embedding(tokens))))
        return functional.cross_entropy(logits.float().flatten(0, 1), following.flatten())


def make_language_model(
    name: str, layers: int | None, sequence: int, device: str, *, tied: bool, seed: int = 0
) -> LanguageModel:
    """A bf16 model with weights of the usual scale; `layers` None: as many as the published one."""
    shape = SHAPES[name]
    torch.manual_seed(seed)
    with torch.device(device):
        depth = shape.layers if layers is None else layers
        model = LanguageModel(shape, VOCABULARY[name], depth, sequence, tied)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
    return model.to(torch.bfloat16)


def token_batch(name: str, batch: int, sequence: int, device: str) -> tuple[Tensor, Tensor]:
    """Random tokens, and the ones that follow each."""
    generator = torch.Generator(device).manual_seed(1)
    size = (batch, sequence + 1)
    tokens = torch.randint(VOCABULARY[name], size, generator=generator, device=device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
