"""The plan: for every GEMM of a graph, what happens to its two operands, or why it stays in high
precision. Serializable data and its table; knows nothing of how a plan is made or applied."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from hadagraph.formats import Encoding, Granularity
from hadagraph.rotation import Rotation


@dataclass(frozen=True)
class GemmSite:
    """One GEMM of a graph: `out[M, N] = sum_C lhs[M, C] rhs[N, C]`.

    `name` is the module path and, where a module calls more than one GEMM, `#` and a number; sizes
    are text, so that symbols print. `node` is the FX node's name when the plan was made.
    """

    name: str
    role: str
    node: str
    m: str
    n: str
    c: str
    dtype: str
    lhs: str
    rhs: str


@dataclass(frozen=True)
class OperandPlan:
    """What happens to one operand of one GEMM.

    `saved` says what the backward gets when the operand comes from the forward: `codes` (these
    codes), `recompute` (quantized again from what is saved anyway) or None (nothing to save).
    `rounding`, `prescale`, `outliers` (rows or columns kept aside) and `tokens_kept` (HLA, r of b)
    stand at what the recipes so far use.
    """

    format: str
    granularity: Granularity
    rotation: Rotation | None = None
    rotation_place: str = "inner"
    rounding: str = "nearest"
    prescale: bool = False
    outliers: int = 0
    tokens_kept: tuple[int, int] | None = None
    saved: str | None = None

    @property
    def encoding(self) -> Encoding:
        """What the quantizing operator is told."""
        return Encoding(self.format, self.granularity, self.rotation)


@dataclass(frozen=True)
class Decision:
    """A site and the plans of its operands; both None where it stays in high precision, and then
    `reason` says why. `asked`: an override of the user's names the site."""

    site: GemmSite
    lhs: OperandPlan | None = None
    rhs: OperandPlan | None = None
    reason: str | None = None
    asked: bool = False

    @property
    def lowered(self) -> bool:
        return self.lhs is not None


@dataclass(frozen=True)
class Plan:
    """The decisions of one graph, in graph order. `note`: what is predicted of it."""

    recipe: str
    decisions: tuple[Decision, ...] = field(default=())
    note: str = ""

    def by_node(self) -> dict[str, Decision]:
        """The decisions by the name of the GEMM node."""
        return {decision.site.node: decision for decision in self.decisions}

    def to_json(self) -> str:
        """The plan as JSON; `from_json` reads it back."""
        return json.dumps(asdict(self), indent=1, default=str)

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan that `to_json` wrote."""
        data = json.loads(text)
        decisions = tuple(_decision(entry) for entry in data["decisions"])
        return Plan(data["recipe"], decisions, data["note"])


def _decision(entry: dict[str, Any]) -> Decision:
    return Decision(
        GemmSite(**entry["site"]),
        _operand_plan(entry["lhs"]),
        _operand_plan(entry["rhs"]),
        entry["reason"],
        entry["asked"],
    )


def _operand_plan(entry: dict[str, Any] | None) -> OperandPlan | None:
    if entry is None:
        return None
    fields = dict(entry)
    fields["granularity"] = Granularity(**entry["granularity"])
    rotation = entry["rotation"]
    if rotation is not None:
        fields["rotation"] = Rotation(rotation["block"], _signs(rotation["signs"]))
    tokens = entry["tokens_kept"]
    fields["tokens_kept"] = None if tokens is None else (tokens[0], tokens[1])
    return OperandPlan(**fields)


def _signs(entry: dict[str, Any] | None) -> Any:
    from hadagraph.rotation import Fixed, PerStep

    if entry is None:
        return None
    return Fixed(entry["seed"]) if "seed" in entry else PerStep(entry["stream"])


PLAN_COLUMNS = ("site", "GEMM", "M", "N", "C", "left", "right", "saved", "note")


def plan_rows(decisions: Iterable[Decision]) -> list[tuple[str, ...]]:
    """The plan as text cells, one tuple a site, in the order of PLAN_COLUMNS."""
    return [
        (
            decision.site.name or "(no module)",
            decision.site.role,
            decision.site.m,
            decision.site.n,
            decision.site.c,
            _cell(decision.site.lhs, decision.lhs),
            _cell(decision.site.rhs, decision.rhs),
            _saved(decision),
            decision.reason or "",
        )
        for decision in decisions
    ]


def _cell(operand: str, plan: OperandPlan | None) -> str:
    return operand if plan is None else f"{operand} {plan.encoding}"


def _saved(decision: Decision) -> str:
    named = ((decision.site.lhs, decision.lhs), (decision.site.rhs, decision.rhs))
    return ", ".join(f"{operand}: {plan.saved}" for operand, plan in named if plan and plan.saved)
