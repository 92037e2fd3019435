"""The plan: for every GEMM of a graph, what happens to its two operands, or why it stays in high
precision. Serializable data and its table; knows nothing of how a plan is made or applied."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from hadagraph.formats import QUANTIZED_FORMATS, Encoding, Granularity
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
    """What happens to one operand of one GEMM; fields as in `recipes.OperandRule`, with the
    rotations made concrete. `format` may be `bf16`: the operand's own precision.

    `saved` says what the backward gets when the operand comes from the forward: `codes` (these
    codes), `recompute` (quantized again from what is saved anyway) or None (nothing to save).
    `emulated`: the device has no such GEMM, and decodes the codes for one in higher precision.
    """

    format: str
    granularity: Granularity
    rotation: Rotation | None = None
    scale: str = "fp32"
    rounding: str = "nearest"
    fit: str = "amax"
    prescale: bool = False
    tokens_kept: tuple[int, int] | None = None
    outer: Rotation | None = None
    outer_tokens_kept: tuple[int, int] | None = None
    outliers: int = 0
    outlier_axis: str = "kept"
    reads: str = "value"
    clip_masked: bool = False
    saved: str | None = None
    emulated: bool = False

    @property
    def is_quantized(self) -> bool:
        return self.format in QUANTIZED_FORMATS

    @property
    def is_plain(self) -> bool:
        """Whether the 8-bit kernels take the operand as it is, or rotated along the kept dim."""
        whole = not self.outliers and self.outer_tokens_kept is None
        as_it_is = self.reads == "value" and not self.clip_masked
        return self.is_quantized and whole and as_it_is and self.encoding.is_plain

    @property
    def encoding(self) -> Encoding:
        """What the quantizing operator is told. ValueError where nothing is quantized."""
        return Encoding(
            self.format,
            self.granularity,
            self.rotation,
            self.scale,
            self.rounding,
            self.fit,
            self.prescale,
            self.tokens_kept,
        )


@dataclass(frozen=True)
class Candidate:
    """One way to treat the operands of a GEMM, of several that are to be chosen from."""

    name: str
    lhs: OperandPlan
    rhs: OperandPlan


@dataclass(frozen=True)
class Decision:
    """A site and the plans of its operands; both None where it stays in high precision, and then
    `reason` says why. `asked`: an override of the user's names the site. `forward`: of a gradient,
    the node of the GEMM that it belongs to. `why`: what a lowered GEMM's treatment was compared
    with, where it was chosen. `candidates`: what it is chosen from, as long as it is not; they are
    no part of the serialized plan."""

    site: GemmSite
    lhs: OperandPlan | None = None
    rhs: OperandPlan | None = None
    reason: str | None = None
    asked: bool = False
    why: str = ""
    forward: str | None = None
    candidates: tuple[Candidate, ...] = field(default=(), compare=False, repr=False)

    @property
    def is_native(self) -> bool:
        """Whether the device multiplies both operands' codes as they are."""
        plans = (self.lhs, self.rhs)
        return all(p is not None and p.is_quantized and not p.emulated for p in plans)

    @property
    def lowered(self) -> bool:
        return self.lhs is not None


@dataclass(frozen=True)
class Predicted:
    """Microseconds of a graph's GEMMs and their operands, or of the host: as planned, with all
    lowered that a recipe asks for, and in high precision."""

    us: float
    all_us: float
    none_us: float


@dataclass(frozen=True)
class Plan:
    """The decisions of one graph, in graph order. `note`: what is predicted of it, in words."""

    recipe: str
    decisions: tuple[Decision, ...] = field(default=())
    note: str = ""
    predicted: Predicted | None = None

    def by_node(self) -> dict[str, Decision]:
        """The decisions by the name of the GEMM node."""
        return {decision.site.node: decision for decision in self.decisions}

    def to_json(self) -> str:
        """The plan as JSON; `from_json` reads it back."""
        data = asdict(self)
        for decision in data["decisions"]:
            del decision["candidates"]
        return json.dumps(data, indent=1, default=str)

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan that `to_json` wrote."""
        data = json.loads(text)
        decisions = tuple(_decision(entry) for entry in data["decisions"])
        predicted = data["predicted"] and Predicted(**data["predicted"])
        return Plan(data["recipe"], decisions, data["note"], predicted)


def _decision(entry: dict[str, Any]) -> Decision:
    return Decision(
        GemmSite(**entry["site"]),
        _operand_plan(entry["lhs"]),
        _operand_plan(entry["rhs"]),
        entry["reason"],
        entry["asked"],
        entry["why"],
        entry["forward"],
    )


def _operand_plan(entry: dict[str, Any] | None) -> OperandPlan | None:
    if entry is None:
        return None
    fields = dict(entry)
    fields["granularity"] = Granularity(**entry["granularity"])
    rotation = entry["rotation"]
    if rotation is not None:
        fields["rotation"] = Rotation(rotation["block"], _signs(rotation["signs"]))
    outer = entry["outer"]
    if outer is not None:
        fields["outer"] = Rotation(outer["block"], _signs(outer["signs"]))
    for name in ("tokens_kept", "outer_tokens_kept"):
        fields[name] = None if entry[name] is None else (entry[name][0], entry[name][1])
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
            decision.reason or decision.why,
        )
        for decision in decisions
    ]


def _cell(operand: str, plan: OperandPlan | None) -> str:
    return operand if plan is None else f"{operand} {treatment(plan)}"


def treatment(plan: OperandPlan) -> str:
    """Everything that happens to an operand, as text: its encoding, and what stands before it."""
    parts = [str(plan.encoding)] if plan.is_quantized else [plan.format]
    if not plan.is_quantized and plan.rotation is not None:
        parts.append(str(plan.rotation))
    if not plan.is_quantized and plan.tokens_kept is not None:
        parts.append("keep{}of{}".format(*plan.tokens_kept))
    if plan.outer is not None:
        parts.append(f"outer {plan.outer}")
    if plan.outer_tokens_kept is not None:
        parts.append("outer keep{}of{}".format(*plan.outer_tokens_kept))
    if plan.outliers:
        parts.append(f"{plan.outliers} {plan.outlier_axis} outliers in high precision")
    if plan.reads == "forward":
        parts.append("of the forward's codes")
    if plan.clip_masked:
        parts.append("gradient masked where clipped")
    if plan.emulated:
        parts.append("emulated")
    return ", ".join(parts)


def _saved(decision: Decision) -> str:
    named = ((decision.site.lhs, decision.lhs), (decision.site.rhs, decision.rhs))
    return ", ".join(f"{operand}: {plan.saved}" for operand, plan in named if plan and plan.saved)
