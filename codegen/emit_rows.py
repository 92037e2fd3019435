"""Body of the whole-row quantizer: rotate, one scale a row, codes. Only text; the numerics are in
`primitives`, the arithmetic of chains in `pointwise`.

A run of WIDTH columns is rotated as the Kronecker product of two Hadamard matrices: tensor cores
multiply parts of `width` columns by the small one, and additions of whole parts (butterflies) are
the large one. The small matrix takes little shared memory, and leaves tensor cores little to do.
"""

from __future__ import annotations

from hadagraph.codegen.pointwise import Place, chain_output, chain_steps, load_inputs, opaque
from hadagraph.codegen.primitives import (
    TRITON_DTYPES,
    Lines,
    butterflies,
    code_values,
    conjunction,
    indent,
    joined,
    load,
    load_matrix,
    magnitudes,
    maximum_of,
    reorder_fragments,
    rotate,
    scales,
    store,
)
from hadagraph.codegen.spec import WIDTH, QuantizeRowsSpec
from hadagraph.region import COLUMNS, MATRIX, ROWS, SCALAR, Chain

RUN_COLUMN = f"column = (run % GROUPS * {WIDTH})[:, None]"


def quantize_rows_body(spec: QuantizeRowsSpec) -> Lines:
    """The body of `QuantizeRowsSpec`'s kernel."""
    lines = [
        f"ROWS: tl.constexpr = {spec.rows}  # rows of a tile",
        f"GROUPS: tl.constexpr = {spec.groups}  # runs of {WIDTH} columns of a tile",
        "run = tl.arange(0, ROWS * GROUPS)  # counts (row, group)",
    ]
    if not spec.streamed:
        lines += [f"{RUN_COLUMN}  # the first of the run"]
    if spec.side.block is None:
        lines += [f"i = tl.arange(0, {spec.width})"]
    else:
        lines += load_matrix("matrix_ptr", "matrix", spec.width)
    if spec.chain is not None:
        lines += load_inputs(spec.chain, {SCALAR: Place("")})
    tile = _streamed_tile(spec) if spec.streamed else _resident_tile(spec)
    if spec.persistent:
        loop = "tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0)"
        return [*lines, f"for tile in {loop}, num_stages={spec.stages}):", *indent(tile)]
    return [*lines, "tile = tl.program_id(0)", *tile]


def _resident_tile(spec: QuantizeRowsSpec) -> Lines:
    return [
        "row = tile * ROWS + run // GROUPS",
        *_load_rows(spec, value=spec.value),
        *_largest(spec),
        # in two steps: one max over the reshaped accumulator is miscompiled (triton 3.6, sm_90)
        "group_bits = tl.max(largest, axis=1)  # [ROWS * GROUPS]",
        *_row_scales(spec),
        *_write_rows(spec),
    ]


def _streamed_tile(spec: QuantizeRowsSpec) -> Lines:
    """Two walks over the row; the second finds it in the L2 cache."""
    walk = f"for start in tl.range(0, codes_stride, GROUPS * {WIDTH}, num_stages={spec.stages}):"
    column = f"    {RUN_COLUMN} + start"
    return [
        "row = tile * ROWS + run // GROUPS",
        "group_bits = tl.zeros((ROWS * GROUPS,), dtype=tl.int32)",
        walk,
        column,
        *indent(_load_rows(spec, value=spec.value)),
        *indent(_largest(spec)),
        "    group_bits = tl.maximum(group_bits, tl.max(largest, axis=1))",
        *_row_scales(spec),
        walk,
        column,
        *indent(_load_rows(spec, value=False)),
        *indent(_write_rows(spec)),
    ]


def _part_column(spec: QuantizeRowsSpec, part: int) -> str:
    return "column + i[None, :]" + (f" + {part * spec.width}" if part else "")


def _load_rows(spec: QuantizeRowsSpec, *, value: bool) -> Lines:
    """x0, x1, ..., the parts of the runs, written if they are a `value`; of the rotated or
    converted runs y0, y1, ...; each [ROWS * GROUPS, width]."""
    names = [f"y{part}" for part in range(spec.parts)]
    row_mask = "row[:, None] < T" if spec.mask_rows else None
    shape = f"[ROWS * GROUPS, {spec.width}]"
    lines: Lines = []
    stores: Lines = []  # after all loads, which the compiler would not move ahead of them
    if spec.chain is None:
        start = "x_ptr + row.to(tl.int64)[:, None] * x_stride"
        lines += [f"x_ptrs = {start} + {_part_column(spec, 0)}"]
    for part in range(spec.parts):
        column_mask = _column_mask(spec, part, "K", each=spec.ragged)
        mask = conjunction(row_mask, column_mask or None)
        if spec.chain is None:
            offset = f" + {part * spec.width}" if part else ""
            lines += [f"x{part} = {load(f'x_ptrs{offset}', mask)}  # {shape}"]
            continue
        lines += _chained_part(spec, spec.chain, part, mask, column_mask)
        if value:
            address = f"value_ptr + row.to(tl.int64)[:, None] * K + {_part_column(spec, part)}"
            stores += [store(address, f"x{part}", mask)]
    lines += stores
    for part, name in enumerate(names):
        if spec.side.block is None:
            lines += [f"{name} = x{part}.to(tl.float32)"]
        else:
            lines += rotate(f"x{part}", "matrix", name, spec.input_dtype, shape)
    return lines + butterflies(names, max(1, (spec.side.block or 1) // spec.width))


def _column_mask(spec: QuantizeRowsSpec, part: int, size: str, *, each: bool) -> str:
    """Of the part's columns below `size`: of `each`, or of whole runs."""
    if not spec.mask_columns:
        return ""
    return f"{_part_column(spec, part) if each else 'column'} < {size}"


def _chained_part(
    spec: QuantizeRowsSpec, chain: Chain, part: int, mask: str, column_mask: str
) -> Lines:
    """x{part} [ROWS * GROUPS, width], made by the chain."""
    column = _part_column(spec, part)
    places = {
        MATRIX: Place(" + row.to(tl.int64)[:, None] * {stride} + " + column, mask),
        ROWS: Place(" + row", "row < T" if spec.mask_rows else "", "[:, None]"),
        COLUMNS: Place(f" + {column}", column_mask),
    }
    return [
        *load_inputs(chain, places),
        *chain_steps(chain),
        *chain_output(
            chain, 0, f"x{part}", f"(ROWS * GROUPS, {spec.width})", column_mask, (MATRIX, COLUMNS)
        ),
        *(opaque(f"x{part}", spec.input_dtype) if chain.steps else ()),
    ]


def _largest(spec: QuantizeRowsSpec) -> Lines:
    """`largest` [ROWS * GROUPS, width]: the parts' maximum `magnitudes`."""
    if spec.parts == 1:
        return magnitudes("y0", "largest")
    names = [f"m{part}" for part in range(spec.parts)]
    lines = [f"m{part} = tl.abs(y{part})" for part in range(spec.parts)]
    return [*lines, *maximum_of(names), "largest = m0.to(tl.int32, bitcast=True)"]


def _row_scales(spec: QuantizeRowsSpec) -> Lines:
    """Scales from `group_bits` [ROWS * GROUPS], stored; `inverse` and `finite` of the tile's runs,
    numbers if it is one row."""
    if spec.rows == 1 and spec.capability[0] != 10:  # there triton 3.7 fails on such a maximum
        lines = ["bits = tl.max(group_bits, axis=0)"]
        lines += scales("bits", "", spec.side.format, spec.side.block)
        return [*lines, "tl.store(scale_ptr + tile, scale)"]
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


def _write_rows(spec: QuantizeRowsSpec) -> Lines:
    """Codes of the parts, joined to [ROWS * GROUPS, WIDTH] and stored; zeros in rows that hold inf
    or NaN, by a store of their own, as no other element then needs to be chosen."""
    lines: Lines = []
    names = [f"codes{part}" for part in range(spec.parts)] if spec.parts > 1 else ["codes"]
    for part, name in enumerate(names):
        lines += [f"{name} = {code_values(f'y{part}', 'inverse', spec.side.format)}"]
        if spec.fragment_order and spec.side.block is not None:
            lines += reorder_fragments(name, "ROWS * GROUPS", spec.width)
    if spec.parts > 1:
        joins, last = joined(names)
        order = (0, *range(2, 1 + spec.parts.bit_length()), 1)
        in_order = f"tl.permute({last}, {order})"
        lines += [*joins, f"codes = tl.reshape({in_order}, (ROWS * GROUPS, {WIDTH}))"]
    dtype = TRITON_DTYPES[spec.side.format]
    each = f"column + tl.arange(0, {WIDTH})[None, :]"
    whole = not spec.ragged or spec.side.block == WIDTH
    inside = conjunction(
        "row[:, None] < T" if spec.mask_rows else None,
        f"{'column' if whole else each} < codes_stride" if spec.mask_columns else None,
    )
    finite, not_finite = "finite", "finite == 0"
    if inside:
        finite, not_finite = f"finite & {inside}", f"(finite == 0) & {inside}"
    zeros = f"tl.zeros((ROWS * GROUPS, {WIDTH}), tl.float32).to({dtype})"
    return [
        *lines,
        f"codes_ptrs = codes_ptr + row.to(tl.int64)[:, None] * codes_stride + {each}",
        store("codes_ptrs", "codes", finite),
        store("codes_ptrs", zeros, not_finite),
    ]
