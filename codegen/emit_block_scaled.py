"""Body of the block-scaled matmul kernel: codes and block scales as they lie go to the matrix
instructions that multiply both; the tensors' scales and the bias on the way out. Only text.

The instructions of sm_100 read scales from tensor memory, to which `tcgen05.cp` copies them from
shared memory without a detour through registers, if they lie as it wants them: 4 scales of 128 rows
in 512 bytes, as `arranged` scales do (PTX ISA, "tcgen05.cp"). Those of sm_120 take registers.
"""

from __future__ import annotations

from dataclasses import dataclass

from hadagraph.codegen.emit_matmul import bias_and_store, tile_order
from hadagraph.codegen.primitives import Lines, indent
from hadagraph.codegen.spec import BlockScaledMmSpec
from hadagraph.formats import format_named

NAMES = {"fp8_e4m3": "e4m3", "fp8_e5m2": "e5m2", "fp4_e2m1": "e2m1"}
"""What `tl.dot_scaled` calls the formats."""


def block_scaled_mm_body(spec: BlockScaledMmSpec) -> Lines:
    """The body of `BlockScaledMmSpec`'s kernel."""
    return [
        f"BLOCK_M: tl.constexpr = {spec.block_m}",
        f"BLOCK_N: tl.constexpr = {spec.block_n}",
        f"BLOCK_C: tl.constexpr = {spec.block_c}",
        f"SCALES: tl.constexpr = BLOCK_C // {spec.block}  # of a row of a tile",
        *tile_order(spec),
        "m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)",
        "n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)",
        *_pointers(spec),
        "accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)",
        "for c in range(0, C, BLOCK_C):",
        *indent(_step(spec)),
        "out = accumulator * (tl.load(a_scale_ptr) * tl.load(b_scale_ptr))",
        *bias_and_store(spec),
    ]


@dataclass(frozen=True)
class _Side:
    """One operand: its name, the index that it keeps, its codes' format, whether its scales serve
    tiles, and whether a tile's rows may lie beyond the edge."""

    name: str
    index: str
    format: str
    tiles: bool
    masked: bool

    @property
    def zero(self) -> str:
        return "0" if codes_a_byte(self.format) > 1 else "0.0"

    def bytes(self, codes: str) -> str:
        """So many codes, in bytes."""
        packed = codes_a_byte(self.format)
        return codes if packed == 1 else f"{codes} // {packed}"


def _sides(spec: BlockScaledMmSpec) -> tuple[_Side, _Side]:
    return (
        _Side("a", "m", spec.a_format, spec.a_tiles, spec.mask_m),
        _Side("b", "n", spec.b_format, spec.b_tiles, spec.mask_n),
    )


def codes_a_byte(format_name: str) -> int:
    return 8 // format_named(format_name).bits


def _pointers(spec: BlockScaledMmSpec) -> Lines:
    run = "SCALES * 128)  # 4 of 128 rows, and the next 4" if spec.arranged else "SCALES)"
    lines = [f"s = tl.arange(0, {run}"]
    for side in _sides(spec):
        name = side.name
        row = f"({side.index} % {side.index.upper()})" if side.masked else side.index
        if not spec.descriptors:
            codes = f"{row}.to(tl.int64)[:, None] * {name}_stride + {name}_byte[None, :]"
            lines += [
                f"{name}_byte = tl.arange(0, {side.bytes('BLOCK_C')})",
                f"{name}_ptrs = {name}_ptr + {codes}",
            ]
        group = f"({row} // {spec.block})" if side.tiles else row
        if spec.arranged:
            parts = f"BLOCK_{side.index.upper()} // 128"
            group = f"{name}_part"
            lines += [f"{group} = tile_{side.index} * ({parts}) + tl.arange(0, {parts})"]
        scales = f"{group}.to(tl.int64)[:, None] * {name}_scales_stride + s[None, :]"
        lines += [f"{name}_scales_ptrs = {name}_scales_ptr + {scales}"]
    return lines


def _step(spec: BlockScaledMmSpec) -> Lines:
    """One step along C: codes and scales beyond its end are zeros."""
    lines = []
    for side in _sides(spec):
        name, at = side.name, side.bytes("c")
        if spec.descriptors:
            tile = f"tile_{side.index} * BLOCK_{side.index.upper()}"
            lines += [f"{name} = {name}_descriptor.load([{tile}, {at}])"]
            continue
        inside = f"{name}_byte[None, :] < {side.bytes('(C - c)')}"
        mask = f", mask={inside}, other={side.zero}" if spec.mask_c else ""
        lines += [f"{name} = tl.load({name}_ptrs + {at}{mask})"]
    if spec.arranged:
        return [*lines, *_arranged_scales(spec), *_product(spec)]
    zero = "0" if spec.scale == "e8m0" else "0.0"
    inside = f"s[None, :] < (C - c) // {spec.block}"
    mask = f", mask={inside}, other={zero}" if spec.mask_c else ""
    for name in ("a", "b"):
        lines += [f"{name}_scales = tl.load({name}_scales_ptrs + c // {spec.block}{mask})"]
    return [*lines, *_product(spec)]


def _arranged_scales(spec: BlockScaledMmSpec) -> Lines:
    lines = []
    for side in _sides(spec):
        name, rows = f"{side.name}_scales", f"BLOCK_{side.index.upper()}"
        lines += [
            f"{name} = tl.load({name}_ptrs + c // {spec.block} * 128)",
            f"{name} = tl.reshape({name}, ({rows} // 128, SCALES // 4, 32, 4, 4))",
            f"{name} = tl.reshape(tl.permute({name}, (0, 3, 2, 1, 4)), ({rows}, SCALES))",
        ]
    return lines


def _product(spec: BlockScaledMmSpec) -> Lines:
    return [
        "accumulator = tl.dot_scaled(",
        f'    a, a_scales, "{NAMES[spec.a_format]}", b.T, b_scales, "{NAMES[spec.b_format]}",',
        "    acc=accumulator,",
        ")",
    ]
