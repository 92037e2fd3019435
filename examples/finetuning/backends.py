"""Every call into hadagraph that the example makes; nothing else here knows its interface."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from finetuning import UsageError, one_line

INDUCTOR = "inductor"
HADAGRAPH = "hadagraph"
HIGH_PRECISION_RECIPE = "bf16"
PREDICTED_SLOWER = "stays bf16: "  # how such a reason begins


@dataclass(frozen=True)
class Lowering:
    """What hadagraph does with a model.

    sqnr_db: role -> signal-to-noise ratio in dB of each matmul that was lowered.
    """

    sqnr_db: dict[str, list[float]]

    @property
    def lowered(self) -> int:
        """How many matmuls compute in low precision."""
        return sum(len(levels) for levels in self.sqnr_db.values())


def compile_loss(loss: torch.nn.Module, backend: str, recipe: str) -> torch.nn.Module:
    """`loss` compiled from scratch by plain Inductor or by hadagraph."""
    torch.compiler.reset()
    if backend == INDUCTOR:
        return torch.compile(loss, backend=INDUCTOR)
    return torch.compile(loss, backend=HADAGRAPH, options={"recipe": recipe})


def examine(
    loss: torch.nn.Module,
    ids: torch.Tensor,
    recipe: str,
    precision: AbstractContextManager[object],
    extra: Mapping[str, Any] | None = None,
) -> Lowering:
    """What the recipe does with this model, and each matmul's error against fp64 on its operands;
    `extra` are more of hadagraph's options.

    Raises UsageError for an unknown recipe, and where no matmul can be lowered. That none
    should be, as on a fast GPU with a small model, is no error.
    """
    import hadagraph

    if recipe not in hadagraph.RECIPES:
        allowed = ", ".join(hadagraph.RECIPES)
        raise UsageError(f"--recipe {recipe}: unknown; allowed are {allowed}")
    options = {"recipe": recipe, **(extra or {})}
    logging.getLogger("hadagraph").setLevel(logging.ERROR)  # what it warns of is said below
    torch.compiler.reset()
    with precision:
        try:
            measured = hadagraph.measure_sqnr(loss, ids, options=options)
        except ValueError as error:
            raise UsageError(f"hadagraph cannot compile this model: {one_line(error)}") from error
    lowering = Lowering({role: list(sites.values()) for role, sites in measured.items()})
    if not lowering.lowered and recipe != HIGH_PRECISION_RECIPE:
        reason = _commonest_reason(loss, ids, options)
        if not reason.startswith(PREDICTED_SLOWER):
            raise UsageError(
                f"--recipe {recipe}: no matmul worth lowering in this model (most often: {reason})"
            )
    return lowering


def _commonest_reason(loss: torch.nn.Module, ids: torch.Tensor, options: dict[str, Any]) -> str:
    import hadagraph

    torch.compiler.reset()
    reports = hadagraph.explain(loss, ids, options=options).reports
    reasons = Counter(site.reason for report in reports for site in report.sites if site.reason)
    return reasons.most_common(1)[0][0] if reasons else "it has none"
