"""A Llama of 30 M parameters to train from scratch on the bytes of a text: no tokenizer, no
pretrained weights, nothing to download."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

SEPARATOR = 0  # a byte that no text holds
VOCABULARY = 256


@dataclass(frozen=True)
class Size:
    """Layers, and the width of the residual stream."""

    layers: int
    width: int

    @property
    def hidden(self) -> int:
        """Of the MLP: 3.5 widths, as in Llama 3."""
        return self.width * 7 // 2

    @property
    def heads(self) -> int:
        """Of 64 elements each; two in a narrower model."""
        return max(2, self.width // 64)


LLAMA_30M = Size(8, 512)


def size_named(text: str) -> Size:
    """`LAYERSxWIDTH`. ValueError where it is not."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        raise ValueError(f"{text} is not LAYERSxWIDTH, such as 8x512")
    size = Size(int(found[1]), int(found[2]))
    if size.layers < 1 or size.width < 16 or size.width % 16:
        raise ValueError(f"{text}: at least one layer, and a width that is a multiple of 16")
    return size


def build(size: Size, seed: int, sequence: int) -> nn.Module:
    """The model in fp32 with the weights that this seed draws; its head is tied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        intermediate_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=max(sequence, 128),
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=SEPARATOR,
        eos_token_id=SEPARATOR,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def stream(texts: Sequence[str]) -> torch.Tensor:
    """The bytes of the texts, a separator behind each: 1-d int64."""
    joined = b"".join(text.encode() + bytes([SEPARATOR]) for text in texts)
    return torch.frombuffer(bytearray(joined or b"\0"), dtype=torch.uint8).long()
