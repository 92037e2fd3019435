"""The ways of compiling a model that the benchmarks compare, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

BASELINE = "inductor bf16"
Compile = Callable[[nn.Module], Any]


def variants() -> dict[str, Compile]:
    """Name -> how to compile a model whose weights are bf16."""
    return {
        BASELINE: torch.compile,
        "torchao tensorwise": torchao_float8("tensorwise"),
        "torchao rowwise": torchao_float8("rowwise"),
        "hadagraph auto": hadagraph(recipe="auto"),
        "hadagraph int8_rotated": hadagraph(recipe="int8_rotated"),
        "hadagraph int8_rotated_unfused": hadagraph(recipe="int8_rotated", fuse=False),
        "hadagraph int8_rotated_fast": hadagraph(recipe="int8_rotated", memory="fast"),
        "hadagraph int8_rotated_balanced": hadagraph(recipe="int8_rotated", memory="balanced"),
        "hadagraph int8_rotated_min": hadagraph(recipe="int8_rotated", memory="min"),
        "hadagraph int8_rotated_always": hadagraph(recipe="int8_rotated", never_slower=False),
        "hadagraph fp8_tensorwise": hadagraph(recipe="fp8_tensorwise"),
        "hadagraph fp8_rowwise": hadagraph(recipe="fp8_rowwise"),
    }


def hadagraph(**options: Any) -> Compile:
    """With backend hadagraph and these of its options."""
    return lambda model: torch.compile(model, backend="hadagraph", options=options)


def torchao_float8(recipe: str) -> Compile:
    """With torchao's float8 training Linears, then Inductor; the language-model head stays bf16,
    as with hadagraph. ImportError without torchao."""

    def compiled(model: nn.Module) -> Any:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = Float8LinearConfig.from_recipe_name(recipe)
        converted = convert_to_float8_training(
            model, config=config, module_filter_fn=lambda _, name: name != "lm_head"
        )
        return torch.compile(converted)

    return compiled
