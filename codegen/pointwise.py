"""A `Chain` as Triton text: loads of its inputs, its arithmetic, its rounded outputs. Knows no
kernels.

Value %i of a chain is named vi, in fp32. Its shape is that of the tile, or one that broadcasts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from hadagraph.codegen.primitives import TRITON_DTYPES, Lines, load
from hadagraph.compat import unset_fake_temporarily
from hadagraph.reference import STEPS
from hadagraph.region import MATRIX, Chain, Step, Value

# As Inductor's Triton code computes them, so that both round the same numbers. But `sigmoid` is
# `tl.sigmoid` without its care for denormals and for divisors above 2^126: the same bits for all
# x above -87.3, and 0 for those below, whose sigmoid is under 1.2e-38.
EXPRESSIONS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "maximum": "tl.where(({0} > {1}) | ({0} != {0}), {0}, {1})",
    "minimum": "tl.where(({0} < {1}) | ({0} != {0}), {0}, {1})",
    "pow": "libdevice.pow({0}, {1})",
    "neg": "-{0}",
    "abs": "tl.abs({0})",
    "square": "{0} * {0}",
    "reciprocal": "1.0 / {0}",
    "sqrt": "tl.sqrt_rn({0})",
    "rsqrt": "libdevice.rsqrt({0})",
    "exp": "libdevice.exp({0})",
    "log": "tl.log({0})",
    "sigmoid": "libdevice.fast_dividef(1.0, 1.0 + libdevice.exp2({0} * -1.4426950408889634))",
    "tanh": "libdevice.tanh({0})",
    "erf": "libdevice.erf({0})",
    "relu": "tl.where({0} < 0.0, 0.0, {0})",
    "cast_bf16": "{0}.to(tl.bfloat16).to(tl.float32)",
    "cast_fp16": "{0}.to(tl.float16).to(tl.float32)",
}

# silu, which is decomposed as x / (exp(-x) + 1), by the sigmoid of x, which its backward needs too
# (1 / (exp(-x) + 1) in torch 2.11). Its exp is off by 1e-7 * (2 + |x| * 3 / 4) of itself in fp32,
# more than libdevice's, and below -87.3 it is 0. Of silu(gate) * up into rows that is 23
# instructions an element, not 36 (sm_90).
SILU = "{0} * " + EXPRESSIONS["sigmoid"]

# What devices approximate, each in its own way.
APPROXIMATED = ("div", "pow", "reciprocal", "rsqrt", "exp", "log", "sigmoid", "tanh", "erf")


@dataclass(frozen=True)
class Place:
    """Where a kernel finds the elements of inputs of one shape: the address behind an input's
    pointer (`{stride}`: its row stride), the mask, and the index that makes it broadcast."""

    address: str
    mask: str = ""
    expand: str = ""


def load_inputs(chain: Chain, places: dict[str, Place]) -> Lines:
    """v0, v1, ... of the inputs whose shape has a place."""
    lines = []
    for index, each in enumerate(chain.inputs):
        place = places.get(each.shape)
        if place is None:
            continue
        address = f"v{index}_ptr{place.address.format(stride=f'v{index}_stride')}"
        if each.shape == MATRIX:
            lines.append(f"v{index}_ptrs = {address}")
            address = f"v{index}_ptrs"
        cast = "" if each.dtype == "fp32" else ".to(tl.float32)"
        lines.append(f"v{index} = {load(address, place.mask)}{place.expand}{cast}")
    return lines


def chain_steps(chain: Chain) -> Lines:
    """The values that the chain computes and its outputs need, each in fp32."""
    first = len(chain.inputs)
    needed = {output.value.index for output in chain.outputs}
    lines = []
    for index, step in reversed(list(enumerate(chain.steps, first))):
        if index not in needed:
            continue
        expression, read = _by_sigmoid(chain, step) or (EXPRESSIONS[step.op], step.operands)
        needed |= {operand.index for operand in read if isinstance(operand, Value)}
        operands = [_operand(operand) for operand in read]
        if not any(isinstance(operand, Value) for operand in read):
            operands[0] = f"tl.full((), {operands[0]}, tl.float32)"
        lines.append(f"v{index} = {expression.format(*operands)}")
    return lines[::-1]


def _by_sigmoid(chain: Chain, step: Step) -> tuple[str, tuple[Value]] | None:
    """The expression of x, and x, where the step is x / (exp(-x) + 1) or 1 / (exp(-x) + 1)."""
    if step.op not in ("div", "reciprocal"):
        return None
    *dividend, made = step.operands
    for op, *constants in (("add", 1.0), ("exp",), ("neg",)):
        before = _made_by(chain, made)
        if before is None or before.op != op or [*before.operands[1:]] != constants:
            return None
        made = before.operands[0]
    if not isinstance(made, Value) or dividend not in ([], [made]):
        return None
    return (SILU if dividend else EXPRESSIONS["sigmoid"]), (made,)


def _made_by(chain: Chain, operand: Value | float) -> Step | None:
    if not isinstance(operand, Value) or operand.index < len(chain.inputs):
        return None
    return chain.steps[operand.index - len(chain.inputs)]


def _operand(operand: Value | float) -> str:
    if isinstance(operand, Value):
        return f"v{operand.index}"
    text = repr(float(operand))
    return text if text[-1].isdigit() else f"float('{text}')"


def chain_output(
    chain: Chain, index: int, name: str, shape: str, inside: str, zeroed: tuple[str, ...]
) -> Lines:
    """{name}: the output, rounded to its dtype, of the tile's shape; 0 where not `inside`, where
    loads give zeros for inputs of the shapes `zeroed`, of which arithmetic may make anything."""
    output = chain.outputs[index]
    value = f"v{output.value.index}"
    if not _spans_tile(chain, output.value.index):
        value = f"tl.broadcast_to({value}, {shape})"
    if output.dtype != "fp32":
        value = f"{value}.to({TRITON_DTYPES[output.dtype]})"
    if inside and not zero_of_zeros(chain, index, zeroed):
        value = f"tl.where({inside}, {value}, 0.0)"
    return [f"{name} = {value}"]


@lru_cache(maxsize=256)
def zero_of_zeros(chain: Chain, index: int, zeroed: tuple[str, ...]) -> bool:
    """Whether the output is 0, and not -0, wherever the inputs of these shapes are, also where what
    devices approximate is off by 0.1 % and more: silu(gate) * up is, exp(x) - 1 is not taken to be.
    """
    made = chain.outputs[index].value.index
    if any(chain.inputs[each].shape not in zeroed for each in _inputs_of(chain)[made]):
        return False
    with unset_fake_temporarily():
        return all(_bits_of_zeros(chain, made, error) == 0 for error in (1e-3, -1e-3))


def _bits_of_zeros(chain: Chain, index: int, error: float) -> int:
    """The value's bits where every input is 0, and approximations are off by different multiples
    of `error`, of which no length of the chain makes a factor of 0."""
    number = partial(torch.tensor, dtype=torch.float32, device="cpu")
    values = [number(0.0) for _ in chain.inputs]
    for place, step in enumerate(chain.steps):
        operands = [
            values[each.index] if isinstance(each, Value) else number(each)
            for each in step.operands
        ]
        off = (1 + place % 89) * error if step.op in APPROXIMATED else 0.0
        values.append(STEPS[step.op](*operands) * (1 + off))
    return int(values[index].view(torch.int32))


def opaque(name: str, dtype: str) -> Lines:
    """A move that the compiler cannot look through, so that a chain is computed once: it would
    else be computed in the layout of each product that reads it, from inputs moved to each.

    On sm_90 silu(gate) * up's backward spilled 264 bytes a thread without it, and takes 164
    registers with it (64 x 128 tiles, 8 warps, both layouts of both gradients).
    """
    pack = 1 if dtype == "fp32" else 2
    arguments = f'"mov.b32 $0, $1;", "=r,r", [{name}], {TRITON_DTYPES[dtype]}, False, {pack}'
    return [f"{name} = tl.inline_asm_elementwise({arguments})  # computed once"]


def _spans_tile(chain: Chain, index: int) -> bool:
    """Whether the value depends on a matrix; others have only one row or column, or one element."""
    return any(chain.inputs[each].shape == MATRIX for each in _inputs_of(chain)[index])


@lru_cache(maxsize=256)
def _inputs_of(chain: Chain) -> tuple[frozenset[int], ...]:
    """Of each value the inputs on which it depends."""
    found = [frozenset({index}) for index in range(len(chain.inputs))]
    for step in chain.steps:
        read = [found[each.index] for each in step.operands if isinstance(each, Value)]
        found.append(frozenset().union(*read))
    return tuple(found)
