"""Fragments of Triton text: rotate a tile, take maximum magnitudes, make scales, round to codes.
Each function returns lines; the names that they read and write are arguments. Knows no kernels.

Every fragment follows the order of operations of `hadagraph.reference`, and relies on
`enable_fp_fusion=False`: a fused multiply-add would round `y * inverse + ROUND` once, not twice.
"""

from __future__ import annotations

import numpy as np

from hadagraph.codegen.spec import WIDTH
from hadagraph.formats import format_named
from hadagraph.reference import AMAX_FLOOR

Lines = list[str]

# Adding 1.5 * 2^23 leaves round_half_even(v) in the low mantissa bits of an fp32, |v| < 2^22.
ROUND = 12582912.0
INFINITY_BITS = "0x7F800000"
MAGNITUDE_MASK = "0x7FFFFFFF"
TRITON_DTYPES = {
    "bf16": "tl.bfloat16",
    "fp16": "tl.float16",
    "fp32": "tl.float32",
    "int8": "tl.int8",
    "fp8_e4m3": "tl.float8e4nv",
    "fp8_e5m2": "tl.float8e5",
}
SIGNATURE_DTYPES = {
    "bf16": "bf16",
    "fp16": "fp16",
    "fp32": "fp32",
    "int8": "i8",
    "fp8_e4m3": "fp8e4nv",
    "fp8_e5m2": "fp8e5",
}


def indent(lines: Lines, levels: int = 1) -> Lines:
    return ["    " * levels + line if line else line for line in lines]


def load_matrix(pointer: str, name: str, width: int = WIDTH) -> Lines:
    return [
        f"i = tl.arange(0, {width})",
        f"{name} = tl.load({pointer} + i[:, None] * {width} + i[None, :])  # [{width}, {width}]",
    ]


def rotate(x: str, matrix: str, y: str, input_dtype: str, shape: str) -> Lines:
    """y = x @ matrix in fp32: x [.., WIDTH] times the +-1 matrix, products exact.

    An fp32 x is split exactly in three bf16 numbers of 8 bits, the smallest summed first; tensor
    cores would else read it as TF32.
    """
    if input_dtype != "fp32":
        return [f"{y} = tl.dot({x}, {matrix})  # {shape} fp32, not normalized"]
    return [
        f"high = ({x}.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)",
        f"rest = {x} - high",
        "middle = (rest.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)",
        f"{y} = tl.dot((rest - middle).to(tl.bfloat16), {matrix})  # {shape} fp32, not normalized",
        f"{y} = tl.dot(middle.to(tl.bfloat16), {matrix}, acc={y})",
        f"{y} = tl.dot(high.to(tl.bfloat16), {matrix}, acc={y})",
    ]


def reorder_fragments(y: str, rows: str, width: int = WIDTH) -> Lines:
    """Column 8 j + 2 q + e of the product becomes column (width / 4) q + 2 j + e: undoes the order
    of the matrix's columns, and leaves each thread of an mma fragment with contiguous ones."""
    parts = f"({rows}, {width // 8}, 4, 2)"
    return [
        f"{y} = tl.reshape({y}, {parts})",
        f"{y} = tl.reshape(tl.permute({y}, (0, 2, 1, 3)), ({rows}, {width}))",
    ]


def butterflies(names: list[str], block: int) -> Lines:
    """Unnormalized Walsh-Hadamard transforms within runs of `block` of the named tensors."""
    lines, step = [], 1
    while step < block:
        pairs = [(i, i | step) for i in range(len(names)) if not i & step]
        for a, b in ((names[i], names[j]) for i, j in pairs):
            lines.append(f"{a}, {b} = {a} + {b}, {a} - {b}")
        step *= 2
    return lines


def maximum_of(names: list[str]) -> Lines:
    """The first of the named tensors becomes the maximum of all, NaN where one is NaN."""
    lines = []
    while len(names) > 1:
        pairs = zip(names[::2], names[1::2], strict=True)
        lines += [f"{a} = {maximum(a, b)}" for a, b in pairs]
        names = names[::2]
    return lines


def maximum(a: str, b: str) -> str:
    return f"tl.maximum({a}, {b}, propagate_nan=tl.PropagateNan.ALL)"


def joined(names: list[str]) -> tuple[Lines, str]:
    """The name of one tensor whose log2(len(names)) new last dims count the named ones in order."""
    lines, level = [], 0
    while len(names) > 1:
        half = len(names) // 2
        pairs = list(zip(names[:half], names[half:], strict=True))
        names = [f"joined{level}_{i}" for i in range(half)]
        lines += [f"{n} = tl.join({a}, {b})" for n, (a, b) in zip(names, pairs, strict=True)]
        level += 1
    return lines, names[0]


def magnitudes(y: str, bits: str) -> Lines:
    """|y| as integers, which order like the numbers and put inf and NaN last; `tl.max` on floats
    would drop NaN."""
    return [f"{bits} = {y}.to(tl.float32).to(tl.int32, bitcast=True) & {MAGNITUDE_MASK}"]


def scales(bits: str, prefix: str, format_name: str, block: int | None) -> Lines:
    """From maximum magnitudes `bits`: {prefix}finite, {prefix}inverse, {prefix}scale."""
    largest = format_named(format_name).max
    floor = repr(AMAX_FLOOR)
    amax, finite = f"{prefix}amax", f"{prefix}finite"
    scale = f"tl.div_rn({amax}, {largest})"
    if block is not None:
        normalization = float(np.float32(1.0) / np.sqrt(np.float32(block)))
        scale = f"{scale} * {normalization!r}"
    return [
        f"{finite} = {bits} < {INFINITY_BITS}",
        f"{amax} = tl.maximum({bits}.to(tl.float32, bitcast=True), {floor})",
        f"{prefix}inverse = tl.div_rn({largest}, {amax})",
        f"{prefix}scale = tl.where({finite}, {scale}, float('nan'))",
        f"{prefix}scale = tl.where({bits} == 0, 1.0, {prefix}scale)",
    ]


def code_values(y: str, inverse: str, format_name: str) -> str:
    """round_half_even(y * inverse), as codes; see `round_codes`. Anything in groups that hold inf
    or NaN."""
    dtype = TRITON_DTYPES[format_name]
    if format_named(format_name).is_integer:  # the low byte of the sum is the code
        return f"({y} * {inverse} + {ROUND}).to(tl.int32, bitcast=True).to({dtype})"
    return f"({y} * {inverse}).to({dtype})"


def round_codes(y: str, codes: str, inverse: str, finite: str, format_name: str) -> Lines:
    """codes = round_half_even(y * inverse), 0 in groups that hold inf or NaN.

    |y| <= amax, so y * inverse passes the format's maximum by rounding error only, which rounding
    to codes removes: no clamp is needed.
    """
    if format_named(format_name).is_integer:
        return [
            "# the low byte of the sum is the code",
            f"{codes} = ({y} * {inverse} + {ROUND}).to(tl.int32, bitcast=True)",
            f"{codes} = tl.where({finite}, {codes}, 0).to(tl.int8)",
        ]
    dtype = TRITON_DTYPES[format_name]
    return [f"{codes} = tl.where({finite}, {y} * {inverse}, 0.0).to({dtype})"]


def conjunction(*terms: str | None) -> str:
    """`a & b` of the terms that are there; empty if none is."""
    return " & ".join(f"({term})" for term in terms if term)


def load(pointer: str, mask: str) -> str:
    return f"tl.load({pointer}, mask={mask}, other=0.0)" if mask else f"tl.load({pointer})"


def store(pointer: str, value: str, mask: str) -> str:
    return f"tl.store({pointer}, {value}, mask={mask})" if mask else f"tl.store({pointer}, {value})"


def atomic_max(pointer: str, value: str, mask: str) -> str:
    masked = f", mask={mask}" if mask else ""
    return f'tl.atomic_max({pointer}, {value}{masked}, sem="relaxed")'
