"""Body of the scaled matmul kernel: grouped tiles, 8-bit products, scales and bias on the way out.
Only text."""

from __future__ import annotations

from hadagraph.codegen.primitives import (
    TRITON_DTYPES,
    Lines,
    conjunction,
    indent,
    store,
)
from hadagraph.codegen.spec import BlockScaledMmSpec, ScaledMmSpec
from hadagraph.formats import format_named


def scaled_mm_body(spec: ScaledMmSpec) -> Lines:
    """The body of `ScaledMmSpec`'s kernel."""
    return [
        f"BLOCK_M: tl.constexpr = {spec.block_m}",
        f"BLOCK_N: tl.constexpr = {spec.block_n}",
        f"BLOCK_C: tl.constexpr = {spec.block_c}",
        *tile_order(spec),
        "m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)",
        "n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)",
        *_operand_pointers(spec),
        *_contraction(spec),
        *_epilogue(spec),
    ]


def tile_order(spec: ScaledMmSpec | BlockScaledMmSpec) -> Lines:
    """Programs walk down GROUP_M rows of tiles before the next column: neighbours share operands
    in the L2 cache."""
    return [
        f"GROUP_M: tl.constexpr = {spec.group}  # rows of tiles that share columns in L2",
        "program = tl.program_id(0)",
        "tiles_n = tl.cdiv(N, BLOCK_N)",
        "first_m = program // (GROUP_M * tiles_n) * GROUP_M",
        "group_m = min(tl.cdiv(M, BLOCK_M) - first_m, GROUP_M)",
        "in_group = program % (GROUP_M * tiles_n)",
        "tile_m = first_m + in_group % group_m",
        "tile_n = in_group // group_m",
    ]


def _operand_pointers(spec: ScaledMmSpec) -> Lines:
    if spec.descriptors:
        return []
    a_row = "(m % M)" if spec.mask_m else "m"
    b_row = "(n % N)" if spec.mask_n else "n"
    return [
        "offset_c = tl.arange(0, BLOCK_C)",
        f"a_ptrs = a_ptr + {a_row}.to(tl.int64)[:, None] * a_stride + offset_c[None, :]",
        f"b_ptrs = b_ptr + {b_row}.to(tl.int64)[:, None] * b_stride + offset_c[None, :]",
    ]


def _load_operands(spec: ScaledMmSpec) -> Lines:
    if spec.descriptors:
        return [
            "a = a_descriptor.load([tile_m * BLOCK_M, c])",
            "b = b_descriptor.load([tile_n * BLOCK_N, c])",
        ]
    mask = ", mask=offset_c[None, :] < C - c, other=0.0" if spec.mask_c else ""
    return [f"a = tl.load(a_ptrs + c{mask})", f"b = tl.load(b_ptrs + c{mask})"]


def _contraction(spec: ScaledMmSpec) -> Lines:
    """`accumulator` [BLOCK_M, BLOCK_N]: the sum over C, exact int32 or the tensor core's fp32, in
    parts that are added in fp32 where one accumulator would overflow or lose digits."""
    dtype = "tl.int32" if format_named(spec.a_format).is_integer else "tl.float32"
    zeros = f"tl.zeros((BLOCK_M, BLOCK_N), dtype={dtype})"
    tile = [
        *_load_operands(spec),
        f"accumulator = tl.dot(a, b.T, acc=accumulator, out_dtype={dtype})",
    ]
    if spec.part is None:
        return [f"accumulator = {zeros}", "for c in range(0, C, BLOCK_C):", *indent(tile)]
    return [
        "total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)",
        f"for part in range(0, C, {spec.part}):",
        f"    accumulator = {zeros}",
        f"    for c in range(part, min(part + {spec.part}, C), BLOCK_C):",
        *indent(tile, 2),
        "    total += accumulator.to(tl.float32)",
    ]


def _epilogue(spec: ScaledMmSpec) -> Lines:
    m_mask = "m < M" if spec.mask_m else ""
    n_mask = "n < N" if spec.mask_n else ""
    accumulator = "accumulator" if spec.part is None else "total"
    a_scale, b_scale = "a_scale[:, None]", "b_scale[None, :]"
    lines = []
    if spec.a_per_tensor:
        lines += ["a_scale = tl.load(a_scale_ptr)"]
        a_scale = "a_scale"
    else:
        lines += [f"a_scale = {_vector('a_scale_ptr + m', m_mask)}"]
    if spec.b_per_tensor:
        lines += ["b_scale = tl.load(b_scale_ptr)"]
        b_scale = "b_scale"
    else:
        lines += [f"b_scale = {_vector('b_scale_ptr + n', n_mask)}"]
    lines += [f"out = {accumulator}.to(tl.float32) * {a_scale} * {b_scale}"]
    return [*lines, *bias_and_store(spec)]


def bias_and_store(spec: ScaledMmSpec | BlockScaledMmSpec) -> Lines:
    """The end of a matmul: `out` [BLOCK_M, BLOCK_N] fp32 plus the bias, rounded once, written."""
    lines = []
    if spec.bias_dtype is not None:
        bias = _vector("bias_ptr + n", "n < N" if spec.mask_n else "")
        lines += [f"out += {bias}.to(tl.float32)[None, :]"]
    mask = conjunction(
        "m[:, None] < M" if spec.mask_m else None, "n[None, :] < N" if spec.mask_n else None
    )
    return [
        *lines,
        "out_ptrs = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]",
        store("out_ptrs", f"out.to({TRITON_DTYPES[spec.out_dtype]})", mask),
    ]


def _vector(pointer: str, mask: str) -> str:
    return f"tl.load({pointer}, mask={mask}, other=0.0)" if mask else f"tl.load({pointer})"
