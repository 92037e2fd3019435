"""Bodies of the quantizer kernels: whole rows, maxima of tiles, codes of tiles. Only text; the
numerics are in `primitives`."""

from __future__ import annotations

from hadagraph.codegen.pointwise import Place, chain_output, chain_steps, load_inputs, opaque
from hadagraph.codegen.primitives import (
    Lines,
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
from hadagraph.codegen.spec import (
    WIDTH,
    AmaxSide,
    AmaxSpec,
    ChainWriteSpec,
    QuantizeRowsSpec,
    QuantizeTilesSpec,
    Side,
)
from hadagraph.region import COLUMNS, MATRIX, ROWS, SCALAR, Chain


def quantize_rows_body(spec: QuantizeRowsSpec) -> Lines:
    """The body of `QuantizeRowsSpec`'s kernel."""
    lines = [
        f"ROWS: tl.constexpr = {spec.rows}  # rows of a tile",
        f"GROUPS: tl.constexpr = {spec.groups}  # runs of {WIDTH} columns of a tile",
        "tile_row = tl.arange(0, ROWS * GROUPS)  # counts (row, group)",
        f"column = (tile_row % GROUPS * {WIDTH})[:, None] + tl.arange(0, {WIDTH})[None, :]",
    ]
    if spec.side.block is not None:
        lines += load_matrix("matrix_ptr", "matrix")
    if spec.chain is not None:
        lines += load_inputs(spec.chain, {SCALAR: Place("")})
    tile = _streamed_tile(spec) if spec.streamed else _resident_tile(spec)
    if spec.persistent:
        loop = "tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0)"
        lines += [f"for tile in {loop}, num_stages={spec.stages}):", *indent(tile)]
    else:
        lines += ["tile = tl.program_id(0)", *tile]
    return lines


def _row_index(spec: QuantizeRowsSpec) -> Lines:
    lines = ["row = tile * ROWS + tile_row // GROUPS"]
    if spec.chain is None:
        lines += ["x_row_ptr = x_ptr + row.to(tl.int64)[:, None] * x_stride"]
    return [
        *lines,
        "codes_row_ptr = codes_ptr + row.to(tl.int64)[:, None] * codes_stride",
    ]


def _load_rows(spec: QuantizeRowsSpec, column: str, *, value: bool = False) -> Lines:
    """x, written if it is a `value`, and, rotated or converted, y [ROWS * GROUPS, WIDTH]."""
    mask = conjunction(
        "row[:, None] < T" if spec.mask_rows else None,
        f"{column} < K" if spec.mask_columns else None,
    )
    shape = f"[ROWS * GROUPS, {WIDTH}]"
    if spec.chain is None:
        lines = [f"x = {load(f'x_row_ptr + {column}', mask)}  # {shape}"]
    else:
        lines = _chained_rows(spec, spec.chain, column, mask)
        if value:
            lines += [store(f"value_ptr + row.to(tl.int64)[:, None] * K + {column}", "x", mask)]
    if spec.side.block is None:
        return [*lines, "y = x.to(tl.float32)"]
    return lines + rotate("x", "matrix", "y", spec.input_dtype, shape)


def _chained_rows(spec: QuantizeRowsSpec, chain: Chain, column: str, mask: str) -> Lines:
    """x [ROWS * GROUPS, WIDTH], made by the chain."""
    row_mask = "row < T" if spec.mask_rows else ""
    column_mask = f"{column} < K" if spec.mask_columns else ""
    places = {
        MATRIX: Place(" + row.to(tl.int64)[:, None] * {stride} + " + column, mask),
        ROWS: Place(" + row", row_mask, "[:, None]"),
        COLUMNS: Place(f" + {column}", column_mask),
    }
    shape = ("ROWS * GROUPS", str(WIDTH))
    return [
        *load_inputs(chain, places),
        *chain_steps(chain),
        *chain_output(chain, 0, "x", shape, column_mask),
        *(opaque("x", spec.input_dtype) if chain.steps else ()),
    ]


def _row_scales(spec: QuantizeRowsSpec) -> Lines:
    """Scales [ROWS] from `group_bits` [ROWS * GROUPS], stored, and spread to the tile's rows."""
    spread = "tl.broadcast_to(row_{0}[:, None], (ROWS, GROUPS))"
    lines = ["bits = tl.max(tl.reshape(group_bits, (ROWS, GROUPS)), axis=1)  # [ROWS]"]
    lines += scales("bits", "row_", spec.side.format, spec.side.block)
    lines += ["scale_row = tile * ROWS + tl.arange(0, ROWS)"]
    lines += [
        store("scale_ptr + scale_row", "row_scale", "scale_row < T" if spec.mask_rows else "")
    ]
    for name in ("inverse", "finite"):
        lines += [f"{name} = tl.reshape({spread.format(name)}, (ROWS * GROUPS,))[:, None]"]
    return lines


def _write_rows(spec: QuantizeRowsSpec, column: str) -> Lines:
    mask = conjunction(
        "row[:, None] < T" if spec.mask_rows else None,
        f"{column} < codes_stride" if spec.mask_columns else None,
    )
    lines = round_codes("y", "codes", "inverse", "finite", spec.side.format)
    if spec.fragment_order and spec.side.block is not None:
        lines += reorder_fragments("codes", "ROWS * GROUPS")
    return [*lines, store(f"codes_row_ptr + {column}", "codes", mask)]


def _resident_tile(spec: QuantizeRowsSpec) -> Lines:
    return [
        *_row_index(spec),
        *_load_rows(spec, "column", value=spec.value),
        *magnitudes("y", "magnitude"),
        # in two steps: one max over the reshaped accumulator is miscompiled (triton 3.6, sm_90)
        "group_bits = tl.max(magnitude, axis=1)  # [ROWS * GROUPS]",
        *_row_scales(spec),
        *_write_rows(spec, "column"),
    ]


def _streamed_tile(spec: QuantizeRowsSpec) -> Lines:
    """Two walks over the row; the second finds it in the L2 cache."""
    walk = f"for start in tl.range(0, codes_stride, GROUPS * {WIDTH}, num_stages={spec.stages}):"
    column = "(column + start)"
    return [
        *_row_index(spec),
        "group_bits = tl.zeros((ROWS * GROUPS,), dtype=tl.int32)",
        walk,
        *indent(_load_rows(spec, column, value=spec.value)),
        *indent(magnitudes("y", "magnitude")),
        "    group_bits = tl.maximum(group_bits, tl.max(magnitude, axis=1))",
        *_row_scales(spec),
        walk,
        *indent(_load_rows(spec, column)),
        *indent(_write_rows(spec, column)),
    ]


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


def atomic_max(pointer: str, value: str, mask: str) -> str:
    masked = f", mask={mask}" if mask else ""
    return f'tl.atomic_max({pointer}, {value}{masked}, sem="relaxed")'


def quantize_tiles_body(spec: QuantizeTilesSpec) -> Lines:
    """The body of `QuantizeTilesSpec`'s kernel."""
    before = _load_matrices(spec)
    tile: Lines = []
    for name, side in (("row", spec.rows), ("column", spec.columns)):
        if side is None:
            continue
        scale = side_scales(spec, name, side, name)
        if side.per_tensor or name == "column":
            before += scale
        else:
            tile += scale
        tile += _turned(spec, name, f"{name}_y")
        tile += write_side(spec, name, side, name)
    return _stripe(spec, before, tile)


def side_scales(
    spec: QuantizeTilesSpec | ChainWriteSpec, layout: str, side: Side, name: str
) -> Lines:
    """Loads the side's maxima, makes its scales, and stores them in one program of those that
    share them. `name`: what the names of its variables start with."""
    index, size, masked = ("t", "T", spec.mask_rows) if layout == "row" else ("k", "K", True)
    if layout == "column":
        masked = spec.mask_columns
    if side.per_tensor:
        lines = [f"{name}_bits = tl.load({name}_amax_ptr)"]
        condition = "tl.program_id(0) + tl.program_id(1) == 0"
        target, mask = f"{name}_scale_ptr", ""
    else:
        kept = spec.tile_rows if isinstance(spec, ChainWriteSpec) and layout == "row" else WIDTH
        mask = f"{index} < {size}" if masked else ""
        other = f", mask={mask}, other=0" if mask else ""
        lines = [f"{name}_bits = tl.load({name}_amax_ptr + {index}{other})  # [{kept}]"]
        condition = f"tl.program_id({0 if layout == 'row' else 1}) == 0"
        target = f"{name}_scale_ptr + {index}"
    lines += scales(f"{name}_bits", f"{name}_", side.format, side.block)
    return [*lines, f"if {condition}:", "    " + store(target, f"{name}_scale", mask)]


def write_side(
    spec: QuantizeTilesSpec | ChainWriteSpec,
    layout: str,
    side: Side,
    name: str,
    tile: tuple[int, int] = (WIDTH, WIDTH),
) -> Lines:
    """Rounds {name}_y to codes and stores them; `tile`: rows and columns of x in it."""
    kept, contracted = ("t", "k") if layout == "row" else ("k", "t")
    kept_size, contracted_size = tile if layout == "row" else tile[::-1]
    mask_kept = spec.mask_rows if layout == "row" else spec.mask_columns
    mask_contracted = spec.mask_columns if layout == "row" else spec.mask_rows
    size = "T" if layout == "row" else "K"
    mask = conjunction(
        f"{kept}[:, None] < {size}" if mask_kept else None,
        f"{contracted}[None, :] < {name}_codes_stride" if mask_contracted else None,
    )
    suffix = "" if side.per_tensor else "[:, None]"
    codes = f"{name}_codes"
    inverse, finite = f"{name}_inverse{suffix}", f"{name}_finite{suffix}"
    lines = round_codes(f"{name}_y", codes, inverse, finite, side.format)
    if spec.fragment_order and side.block is not None:
        lines += reorder_fragments(codes, str(kept_size), contracted_size)
    if spec.descriptors:
        where = f"[{kept}_start, {contracted}_start]"
        return [*lines, f"{name}_codes_descriptor.store({where}, {codes})"]
    row = f"{name}_codes_ptr + {kept}.to(tl.int64)[:, None] * {name}_codes_stride"
    return [
        *lines,
        f"{name}_codes_ptrs = {row} + {contracted}[None, :]",
        store(f"{name}_codes_ptrs", codes, mask),
    ]
