"""What a recipe is made of: the rules for the operands of each GEMM, and which of them can be
carried out together. Knows no recipe and nothing of graphs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields

from hadagraph.formats import (
    PER_KEPT_INDEX,
    QUANTIZED_FORMATS,
    Encoding,
    Granularity,
    format_named,
)
from hadagraph.rotation import MAX_BLOCK, MIN_BLOCK, Fixed, PerStep, Signs

ROLES = ("output", "grad_input", "grad_weight")
# What the two operands of each GEMM are: the left one keeps the output's rows, the right one its
# columns; both are contracted along the dim named last.
OPERANDS = {
    "output": ("input", "weight"),  # Y[T, N] = X[T, K] W[N, K]^T, contracts K
    "grad_input": ("grad_output", "weight"),  # dX[T, K] = E[T, N] W[N, K], contracts N
    "grad_weight": ("grad_output", "input"),  # dW[N, K] = E[T, N]^T X[T, K], contracts T
}
SIDES = ("left", "right")

PER_GEMM = "per_gemm"
"""Signs drawn anew in each step and for each GEMM, the same on both of its operands."""
AXES = ("kept", "contracted")
READS = ("value", "forward")
SELECTORS = ("", "adahop", "adahop_lv2", "lqs")
BLOCKS = tuple(1 << n for n in range(MIN_BLOCK.bit_length() - 1, MAX_BLOCK.bit_length()))
"""The sizes that a rotation's largest block may have."""
_OUTER = ("outer_block", "outer_tokens_kept")
_QUANTIZER_FIELDS = (
    "granularity", "max_block", "signs", "scale", "rounding", "fit", "prescale", "outer_block",
    "outliers", "outlier_axis", "reads",
)  # fmt: skip


@dataclass(frozen=True)
class OperandRule:
    """What happens to one operand of a GEMM.

    format: `bf16` stands for the operand's own precision. granularity, scale, rounding, fit,
    prescale, tokens_kept: as in `formats.Encoding`. max_block, signs: the inner rotation (along the
    contracted dim, of at most so many elements; None leaves it out). outer_block: the largest block
    of a rotation along the kept dim, which is taken back from the GEMM's output; outer_tokens_kept:
    a projection along it (r of b), likewise. outliers: so many indices of `outlier_axis` with the
    largest rms go through a high-precision GEMM of their own, the rest is quantized without them.
    reads: the tensor's `value`, or what the `forward` made of it (its decoded codes).

    ValueError on a field out of range, and on fields that contradict each other.
    """

    format: str
    granularity: Granularity = PER_KEPT_INDEX
    max_block: int | None = None
    signs: Signs | str = None
    scale: str = "fp32"
    rounding: str = "nearest"
    fit: str = "amax"
    prescale: bool = False
    tokens_kept: tuple[int, int] | None = None
    outer_block: int | None = None
    outer_tokens_kept: tuple[int, int] | None = None
    outliers: int = 0
    outlier_axis: str = "kept"
    reads: str = "value"

    def __post_init__(self) -> None:
        format_named(self.format)
        for problem in _problems(self):
            raise ValueError(problem)
        if self.is_quantized:
            Encoding(
                self.format,
                self.granularity,
                None,
                self.scale,
                self.rounding,
                self.fit,
                self.prescale,
                self.tokens_kept,
            )

    @property
    def is_quantized(self) -> bool:
        return self.format in QUANTIZED_FORMATS

    @property
    def clips(self) -> bool:
        """Whether values may lie beyond what its codes reach."""
        return self.fit == "mse" or (self.fit == "amax" and self.scale == "e8m0")


@dataclass(frozen=True)
class Recipe:
    """Per role the rules of (left, right) operand, or None to leave that GEMM in high precision.

    select: how a calibration profile changes the rules site by site (see `hadagraph.selectors`).
    clip_masked: the gradient of a clipped forward operand is zero where it was clipped.

    ValueError, naming recipe, role and what is wrong, on rules that no GEMM can carry out.
    """

    name: str
    summary: str
    source: str
    output: tuple[OperandRule, OperandRule] | None = None
    grad_input: tuple[OperandRule, OperandRule] | None = None
    grad_weight: tuple[OperandRule, OperandRule] | None = None
    aliases: tuple[str, ...] = field(default=())
    select: str = ""
    clip_masked: bool = False

    def __post_init__(self) -> None:
        for name in (self.name, *self.aliases):
            if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(
                    f"name of a recipe must be letters, digits, '_', '.' and '-', got {name!r}"
                )
        if self.select not in SELECTORS:
            allowed = ", ".join(map(repr, SELECTORS))
            raise ValueError(
                f"recipe {self.name!r}: select must be one of {allowed}, got {self.select!r}"
            )
        for role in ROLES:
            pair = self.rules(role)
            for problem in _problems_of_pair(role, *pair) if pair else ():
                raise ValueError(f"recipe {self.name!r}, role {role!r}: {problem}")
            for problem in self._problems_with_forward(role):
                raise ValueError(f"recipe {self.name!r}, role {role!r}: {problem}")
        for problem in self._problems_of_mask():
            raise ValueError(f"recipe {self.name!r}: clip_masked=True {problem}")

    def rules(self, role: str) -> tuple[OperandRule, OperandRule] | None:
        """The rules of one role. ValueError on an unknown role."""
        if role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, got {role!r}")
        pair: tuple[OperandRule, OperandRule] | None = getattr(self, role)
        return pair

    def rule_of_forward(self, operand: str) -> OperandRule | None:
        """How the forward's GEMM treats its `input` or `weight`; None in high precision."""
        return None if self.output is None else self.output[OPERANDS["output"].index(operand)]

    def _problems_with_forward(self, role: str) -> Iterator[str]:
        for side, operand, rule in zip(SIDES, OPERANDS[role], self.rules(role) or (), strict=False):
            if rule.reads != "forward":
                continue
            where = f"reads='forward' of the {side} operand"
            if role == "output" or operand == "grad_output":
                yield f"{where}: {operand} of {role} is not among what the forward quantized"
                continue
            forward = self.rule_of_forward(operand)
            if forward is None or not forward.is_quantized:
                yield f"{where} needs rules for 'output' that quantize its {operand}"
                continue
            if rule.outer_block is not None:
                yield (
                    f"outer_block={rule.outer_block} of the {side} operand: what the forward made "
                    f"of it is read in the basis it has there; outer_block must be None"
                )
            for name in (*_OUTER, "outliers"):
                if getattr(forward, name):
                    yield (
                        f"{where}: codes alone are read, so {name} of its {operand} in 'output' "
                        f"must be left out, got {getattr(forward, name)!r}"
                    )

    def _problems_of_mask(self) -> Iterator[str]:
        if not self.clip_masked:
            return
        if self.output is None or not any(rule.clips for rule in self.output):
            yield (
                "needs an output operand that is clipped: fit='mse', or fit='amax' with "
                f"scale='e8m0'; got output={self.output}"
            )
            return
        for role in ("grad_input", "grad_weight"):
            pair = self.rules(role)
            if pair is None or pair[1].reads != "forward":
                yield (
                    f"needs the gradient of what the forward made: the right operand of {role} "
                    f"must have reads='forward', got {pair and pair[1]}"
                )


def _problems(rule: OperandRule) -> Iterator[str]:
    """What is wrong with the fields of one rule, taken alone."""
    for name in ("max_block", "outer_block"):
        block = getattr(rule, name)
        if block is not None and (isinstance(block, bool) or block not in BLOCKS):
            yield f"{name} must be None or one of {_listed(BLOCKS)}, got {block!r}"
    if not isinstance(rule.granularity, Granularity):
        yield f"granularity must be a Granularity, got {rule.granularity!r}"
    if not (
        rule.signs is None or rule.signs == PER_GEMM or isinstance(rule.signs, Fixed | PerStep)
    ):
        yield (
            f"signs must be None, Fixed(seed), PerStep(stream) or, given by name, {PER_GEMM!r}, "
            f"got {rule.signs!r}"
        )
    if rule.signs is not None and rule.max_block is None:
        yield f"signs={rule.signs!r} are those of the inner rotation, but max_block is None"
    for name, allowed in (("outlier_axis", AXES), ("reads", READS)):
        if getattr(rule, name) not in allowed:
            yield f"{name} must be one of {_listed(allowed)}, got {getattr(rule, name)!r}"
    if isinstance(rule.outliers, bool) or not isinstance(rule.outliers, int) or rule.outliers < 0:
        yield f"outliers must be a number of indices, at least 0, got {rule.outliers!r}"
    for name, block in (("tokens_kept", "max_block"), ("outer_tokens_kept", "outer_block")):
        yield from _problems_of_projection(name, getattr(rule, name), block, getattr(rule, block))
    if rule.scale == "fp32" and rule.fit in ("ceil", "four_six"):
        yield f"fit={rule.fit!r} is about how scales are rounded, and scale='fp32' rounds none"
    if not rule.is_quantized:
        plain = {f.name: f.default for f in fields(OperandRule)}
        for name in _QUANTIZER_FIELDS:
            if getattr(rule, name) != plain[name]:
                yield (
                    f"{name}={getattr(rule, name)!r} is for quantized formats "
                    f"({_listed(QUANTIZED_FORMATS)}), got format={rule.format!r}"
                )


def _problems_of_projection(
    name: str, kept: tuple[int, int] | None, block_name: str, block: int | None
) -> Iterator[str]:
    if kept is None:
        return
    if (
        not isinstance(kept, tuple)
        or len(kept) != 2
        or kept[1] not in BLOCKS
        or not 0 < kept[0] <= kept[1]
    ):
        yield f"{name} must be (r, b) with 0 < r <= b and b one of {_listed(BLOCKS)}, got {kept!r}"
    if block is not None:
        yield f"{name}={kept!r} projects, and allows no rotation besides: {block_name}={block}"


def _problems_of_pair(role: str, left: OperandRule, right: OperandRule) -> Iterator[str]:
    """What is wrong with the two rules of one GEMM, taken together."""
    for name in ("max_block", "signs"):
        if getattr(left, name) != getattr(right, name):
            yield (
                f"the inner rotation must be the same on both operands, or it would not cancel, "
                f"got {name}={getattr(left, name)!r} and {getattr(right, name)!r}"
            )
    if left.tokens_kept != right.tokens_kept:
        yield (
            f"tokens_kept must be the same on both operands, got {left.tokens_kept!r} and "
            f"{right.tokens_kept!r}"
        )
    if left.is_quantized != right.is_quantized:
        yield (
            f"no GEMM multiplies {left.format} by {right.format}; quantize both operands or none "
            f"(both 'bf16')"
        )
    elif format_named(left.format).is_integer != format_named(right.format).is_integer:
        yield (
            f"no GEMM multiplies {left.format} by {right.format}; use two integer or two "
            f"floating-point formats"
        )
    if left.tokens_kept is not None and role != "grad_weight":
        yield (
            f"tokens_kept={left.tokens_kept!r} projects tokens along the contracted dim, which "
            f"only 'grad_weight' contracts"
        )
    outer = [name for name in _OUTER if getattr(left, name) or getattr(right, name)]
    if outer and (left.outliers or right.outliers):
        yield (
            f"outliers={max(left.outliers, right.outliers)} go through a GEMM of their own in the "
            f"plain basis; {' and '.join(outer)} must be None on both operands"
        )
    for side, operand, rule in zip(SIDES, OPERANDS[role], (left, right), strict=True):
        if rule.outer_tokens_kept is not None and (side == "right" or role == "grad_weight"):
            yield (
                f"outer_tokens_kept={rule.outer_tokens_kept!r} of the {side} operand: {operand} "
                f"keeps no tokens here; the left operands of 'output' and 'grad_input' do"
            )


def _listed(values: tuple[object, ...]) -> str:
    return ", ".join(map(str, values))
