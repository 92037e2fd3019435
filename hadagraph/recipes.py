"""Recipes: tables that say, from a GEMM's role alone, how each of its operands is treated. Knows
nothing of graphs; a new published system is a new row."""

from __future__ import annotations

from dataclasses import dataclass, field

from hadagraph.formats import PER_KEPT_INDEX, PER_TENSOR, Granularity, format_named
from hadagraph.rotation import MAX_BLOCK, Signs

ROLES = ("output", "grad_input", "grad_weight")
# What the two operands of each GEMM are: the left one keeps the output's rows, the right one its
# columns; both are contracted along the dim named last.
OPERANDS = {
    "output": ("input", "weight"),  # Y[T, N] = X[T, K] W[N, K]^T, contracts K
    "grad_input": ("grad_output", "weight"),  # dX[T, K] = E[T, N] W[N, K], contracts N
    "grad_weight": ("grad_output", "input"),  # dW[N, K] = E[T, N]^T X[T, K], contracts T
}


@dataclass(frozen=True)
class OperandRule:
    """What happens to one operand: its format and scale granularity, an inner rotation (along the
    contracted dim, of at most `max_block`; None leaves it out) and that rotation's signs."""

    format: str
    granularity: Granularity
    max_block: int | None = None
    signs: Signs = None

    def __post_init__(self) -> None:
        format_named(self.format)


@dataclass(frozen=True)
class Recipe:
    """Per role the rules of (left, right) operand, or None to leave that GEMM in high precision.

    Both operands of a GEMM must agree on the inner rotation, or it would not cancel.
    """

    name: str
    summary: str
    source: str
    output: tuple[OperandRule, OperandRule] | None = None
    grad_input: tuple[OperandRule, OperandRule] | None = None
    grad_weight: tuple[OperandRule, OperandRule] | None = None
    aliases: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for role in ROLES:
            pair = self.rules(role)
            if pair is None:
                continue
            left, right = pair
            if (left.max_block, left.signs) != (right.max_block, right.signs):
                raise ValueError(
                    f"recipe {self.name!r}, role {role!r}: the inner rotation must be the same on "
                    f"both operands, got {left} and {right}"
                )
            if format_named(left.format).is_integer != format_named(right.format).is_integer:
                raise ValueError(
                    f"recipe {self.name!r}, role {role!r}: no GEMM multiplies {left.format} by "
                    f"{right.format}; use two integer or two floating-point formats"
                )

    def rules(self, role: str) -> tuple[OperandRule, OperandRule] | None:
        """The rules of one role. ValueError on an unknown role."""
        if role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, got {role!r}")
        pair: tuple[OperandRule, OperandRule] | None = getattr(self, role)
        return pair


_INT8 = OperandRule("int8", PER_KEPT_INDEX, max_block=MAX_BLOCK)
# Along the tokens a few rows are huge (attention sinks). A block of 128 spreads each over 128
# tokens at a level that hides theirs; 32 is best on real activations, by 4 dB at the worst site
# (bench/results/token_rotation.json).
_INT8_TOKENS = OperandRule("int8", PER_KEPT_INDEX, max_block=32)
_E4M3_ROW = OperandRule("fp8_e4m3", PER_KEPT_INDEX)
_E4M3 = OperandRule("fp8_e4m3", PER_TENSOR)
_E5M2 = OperandRule("fp8_e5m2", PER_TENSOR)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "bf16",
            "nothing is quantized",
            "the baseline: Inductor alone",
        ),
        Recipe(
            "int8_rotated",
            "INT8, inner Hadamard rotation, one scale per kept index, round to nearest even",
            "hadagraph",
            output=(_INT8, _INT8),
            grad_input=(_INT8, _INT8),
            grad_weight=(_INT8_TOKENS, _INT8_TOKENS),
            aliases=("int8",),
        ),
        Recipe(
            "fp8_rowwise",
            "FP8 e4m3, no rotation, one scale per kept index",
            "row-wise FP8 training, as in torchao's float8 'rowwise'",
            output=(_E4M3_ROW, _E4M3_ROW),
            grad_input=(_E4M3_ROW, _E4M3_ROW),
            grad_weight=(_E4M3_ROW, _E4M3_ROW),
            aliases=("fp8",),
        ),
        Recipe(
            "fp8_tensorwise",
            "FP8, e4m3 for inputs and weights, e5m2 for gradients, one scale per tensor",
            "FP8 Formats for Deep Learning, arXiv 2209.05433",
            output=(_E4M3, _E4M3),
            grad_input=(_E5M2, _E4M3),
            grad_weight=(_E5M2, _E4M3),
        ),
    )
}
DEFAULT_RECIPE = "int8_rotated"
_BY_NAME = {name: recipe for recipe in RECIPES.values() for name in (recipe.name, *recipe.aliases)}


def recipe_named(name: str, option: str = "recipe") -> Recipe:
    """The recipe of that name or alias. ValueError names the option and lists what is allowed."""
    if name not in _BY_NAME:
        raise ValueError(f"{option} must be one of {', '.join(sorted(_BY_NAME))}, got {name!r}")
    return _BY_NAME[name]
