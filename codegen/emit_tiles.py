"""Bodies of the passes over square tiles, rotated by matrix products: maxima, then codes of either
layout or both. Only text; the numerics are in `primitives`."""

from __future__ import annotations

from hadagraph.codegen.primitives import (
    Lines,
    atomic_max,
    conjunction,
    indent,
    load,
    load_matrix,
    magnitudes,
    reorder_fragments,
    rotate,
    round_codes,
    scales,
    store,
)
from hadagraph.codegen.spec import WIDTH, AmaxSide, AmaxSpec, QuantizeTilesSpec, Side


def matrix_names(spec: AmaxSpec | QuantizeTilesSpec) -> dict[str, str]:
    """Rotated side ("row", "column") -> its matrix's name in the kernel."""
    sides = {"row": spec.rows, "column": spec.columns}
    names = {}
    for name, side in sides.items():
        rotated = side.rotated if isinstance(side, AmaxSide) else side is not None and side.block
        if rotated:
            names[name] = "matrix" if spec.one_matrix else f"{name}_matrix"
    return names


def _load_matrices(spec: AmaxSpec | QuantizeTilesSpec) -> Lines:
    names = dict.fromkeys(matrix_names(spec).values())
    return [line for name in names for line in load_matrix(f"{name}_ptr", name)]


def _stripe(spec: AmaxSpec | QuantizeTilesSpec, before: Lines, tile: Lines) -> Lines:
    """A program's walk over `tiles` tiles down a stripe of WIDTH columns; loads x."""
    tile_t = "tl.program_id(1)"
    if spec.tiles > 1:
        tile_t = f"(tl.program_id(1) * {spec.tiles} + step)"
    if isinstance(spec, QuantizeTilesSpec) and spec.descriptors:
        body = [
            f"t_start = {tile_t} * {WIDTH}",
            f"t = t_start + tl.arange(0, {WIDTH})",
            f"x = x_descriptor.load([t_start, k_start])  # [{WIDTH} t, {WIDTH} k]",
        ]
        k = [f"k_start = tl.program_id(0) * {WIDTH}", f"k = k_start + tl.arange(0, {WIDTH})"]
    else:
        mask = conjunction(
            "t[:, None] < T" if spec.mask_rows else None,
            "k[None, :] < K" if spec.mask_columns else None,
        )
        body = [
            f"t = {tile_t} * {WIDTH} + tl.arange(0, {WIDTH})",
            "x_ptrs = x_ptr + t.to(tl.int64)[:, None] * x_stride + k[None, :]",
            f"x = {load('x_ptrs', mask)}  # [{WIDTH} t, {WIDTH} k]",
        ]
        k = [f"k = tl.program_id(0) * {WIDTH} + tl.arange(0, {WIDTH})"]
    if spec.tiles == 1:
        return [*k, *before, *body, *tile]
    walk = f"for step in tl.range(0, {spec.tiles}, num_stages={spec.stages}):"
    return [*k, *before, walk, *indent(body), *indent(tile)]


def _turned(spec: AmaxSpec | QuantizeTilesSpec, side: str, y: str) -> Lines:
    """y: x as the side sees it, contracted dim last, rotated along it."""
    x = "x" if side == "row" else "tl.trans(x)"
    shape = f"[{WIDTH} t, {WIDTH} k]" if side == "row" else f"[{WIDTH} k, {WIDTH} t]"
    matrix = matrix_names(spec).get(side)
    if matrix is None:
        return [f"{y} = {x}.to(tl.float32)  # {shape}"]
    if side == "column" and spec.input_dtype == "fp32":
        turn = [f"x_turned = {x}"]
        return turn + rotate("x_turned", matrix, y, "fp32", shape)
    return rotate(x, matrix, y, spec.input_dtype, shape)


def amax_body(spec: AmaxSpec) -> Lines:
    """The body of `AmaxSpec`'s kernel."""
    before = _load_matrices(spec)
    tile: Lines = []
    after: Lines = []
    t_mask = "t < T" if spec.mask_rows else ""
    k_mask = "k < K" if spec.mask_columns else ""
    for name, side in (("row", spec.rows), ("column", spec.columns)):
        if side is None:
            continue
        y, bits = f"{name}_y", f"{name}_bits"
        tile += _turned(spec, name, y)
        tile += magnitudes(y, f"{name}_magnitude")
        tile_max = f"tl.max({name}_magnitude, axis=1)"
        if name == "row" and not side.per_tensor:
            value = atomic_max("row_amax_ptr + t", tile_max, t_mask)
            tile += [value]
            continue
        before += [f"{bits} = tl.zeros(({WIDTH},), dtype=tl.int32)"]
        tile += [f"{bits} = tl.maximum({bits}, {tile_max})"]
        if side.per_tensor:
            after += [atomic_max(f"{name}_amax_ptr", f"tl.max({bits}, axis=0)", "")]
        else:
            after += [atomic_max("column_amax_ptr + k", bits, k_mask)]
    return _stripe(spec, before, tile) + after


def quantize_tiles_body(spec: QuantizeTilesSpec) -> Lines:
    """The body of `QuantizeTilesSpec`'s kernel."""
    before = _load_matrices(spec)
    tile: Lines = []
    for name, side in (("row", spec.rows), ("column", spec.columns)):
        if side is None:
            continue
        scale = _side_scales(spec, name, side)
        if side.per_tensor or name == "column":
            before += scale
        else:
            tile += scale
        tile += _turned(spec, name, f"{name}_y")
        tile += _write_side(spec, name, side)
    return _stripe(spec, before, tile)


def _side_scales(spec: QuantizeTilesSpec, name: str, side: Side) -> Lines:
    """Loads the side's maxima, makes its scales, and stores them in one program of those that
    share them."""
    index, size, masked = ("t", "T", spec.mask_rows) if name == "row" else ("k", "K", True)
    if name == "column":
        masked = spec.mask_columns
    if side.per_tensor:
        lines = [f"{name}_bits = tl.load({name}_amax_ptr)"]
        condition = "tl.program_id(0) + tl.program_id(1) == 0"
        target, mask = f"{name}_scale_ptr", ""
    else:
        mask = f"{index} < {size}" if masked else ""
        other = f", mask={mask}, other=0" if mask else ""
        lines = [f"{name}_bits = tl.load({name}_amax_ptr + {index}{other})  # [{WIDTH}]"]
        condition = f"tl.program_id({0 if name == 'row' else 1}) == 0"
        target = f"{name}_scale_ptr + {index}"
    lines += scales(f"{name}_bits", f"{name}_", side.format, side.block)
    return [*lines, f"if {condition}:", "    " + store(target, f"{name}_scale", mask)]


def _write_side(spec: QuantizeTilesSpec, name: str, side: Side) -> Lines:
    kept, contracted = ("t", "k") if name == "row" else ("k", "t")
    mask_kept = spec.mask_rows if name == "row" else spec.mask_columns
    mask_contracted = spec.mask_columns if name == "row" else spec.mask_rows
    size = "T" if name == "row" else "K"
    mask = conjunction(
        f"{kept}[:, None] < {size}" if mask_kept else None,
        f"{contracted}[None, :] < {name}_codes_stride" if mask_contracted else None,
    )
    suffix = "" if side.per_tensor else "[:, None]"
    codes = f"{name}_codes"
    inverse, finite = f"{name}_inverse{suffix}", f"{name}_finite{suffix}"
    lines = round_codes(f"{name}_y", codes, inverse, finite, side.format)
    if spec.fragment_order and side.block is not None:
        lines += reorder_fragments(codes, str(WIDTH))
    if spec.descriptors:
        where = f"[{kept}_start, {contracted}_start]"
        return [*lines, f"{name}_codes_descriptor.store({where}, {codes})"]
    row = f"{name}_codes_ptr + {kept}.to(tl.int64)[:, None] * {name}_codes_stride"
    return [
        *lines,
        f"{name}_codes_ptrs = {row} + {contracted}[None, :]",
        store(f"{name}_codes_ptrs", codes, mask),
    ]
