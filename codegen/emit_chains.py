"""Bodies of the passes over tiles whose matrices [T, K] a chain makes in registers: maxima, and
codes. Only text; the arithmetic of chains is in `pointwise`, the numerics in `primitives`."""

from __future__ import annotations

from hadagraph.codegen.emit_quantizers import atomic_max, side_scales, write_side
from hadagraph.codegen.pointwise import Place, chain_output, chain_steps, load_inputs, opaque
from hadagraph.codegen.primitives import (
    Lines,
    conjunction,
    indent,
    load_matrix,
    magnitudes,
    rotate,
    store,
)
from hadagraph.codegen.spec import (
    WIDTH,
    ChainAmaxSpec,
    ChainSide,
    ChainTiles,
    ChainWriteSpec,
    Side,
)
from hadagraph.region import COLUMNS, MATRIX, ROWS, SCALAR


def side_prefix(spec: ChainTiles, side: ChainSide) -> str:
    """What the names of the side's variables start with."""
    return side.layout if len(spec.chain.outputs) == 1 else f"{side.layout}{side.output}"


def _tiles(spec: ChainTiles, before: Lines, tile: Lines) -> Lines:
    """A program's walk over tiles down a stripe of WIDTH columns; makes x0, x1, ... of each."""
    t_mask = "t < T" if spec.mask_rows else ""
    k_mask = "k < K" if spec.mask_columns else ""
    inside = conjunction(
        "t[:, None] < T" if spec.mask_rows else None,
        "k[None, :] < K" if spec.mask_columns else None,
    )
    each_tile = {
        MATRIX: Place(" + t.to(tl.int64)[:, None] * {stride} + k[None, :]", inside),
        ROWS: Place(" + t", t_mask, "[:, None]"),
    }
    each_stripe = {COLUMNS: Place(" + k", k_mask, "[None, :]"), SCALAR: Place("")}
    tile_t = "tl.program_id(1)" if spec.tiles == 1 else f"(tl.program_id(1) * {spec.tiles} + step)"
    body = [f"t = {tile_t} * {spec.tile_rows} + tl.arange(0, {spec.tile_rows})"]
    body += load_inputs(spec.chain, each_tile)
    body += chain_steps(spec.chain)
    shape = (str(spec.tile_rows), str(WIDTH))
    outputs = {side.output for side in spec.sides}
    for index, written in enumerate(spec.values):
        if index in outputs or written:
            body += chain_output(spec.chain, index, f"x{index}", shape, inside)
            if spec.chain.steps:
                body += opaque(f"x{index}", spec.chain.outputs[index].dtype)
        if written:
            address = f"value{index}_ptr + t.to(tl.int64)[:, None] * K + k[None, :]"
            body += [store(address, f"x{index}", inside)]
    k = [f"k = tl.program_id(0) * {WIDTH} + tl.arange(0, {WIDTH})"]
    before = [*k, *load_inputs(spec.chain, each_stripe), *before]
    if spec.tiles == 1:
        return [*before, *body, *tile]
    walk = f"for step in tl.range(0, {spec.tiles}, num_stages={spec.stages}):"
    return [*before, walk, *indent(body), *indent(tile)]


def _load_matrices(spec: ChainTiles) -> Lines:
    return [
        line
        for index, matrix in enumerate(spec.matrices)
        for line in load_matrix(f"matrix{index}_ptr", f"matrix{index}", matrix.width)
    ]


def _turned(spec: ChainTiles, side: ChainSide, y: str) -> Lines:
    """y: the output as the side sees it, contracted dim last, rotated along it."""
    x, rows = f"x{side.output}", spec.tile_rows
    shape = f"[{rows} t, {WIDTH} k]"
    if side.layout == "column":
        x, shape = f"tl.trans({x})", f"[{WIDTH} k, {rows} t]"
    if side.matrix is None:
        return [f"{y} = {x}.to(tl.float32)  # {shape}"]
    lines = []
    dtype = spec.chain.outputs[side.output].dtype
    if side.layout == "column" and dtype == "fp32":
        lines, x = [f"x_turned = {x}"], "x_turned"
    return lines + rotate(x, f"matrix{side.matrix}", y, dtype, shape)


def chain_amax_body(spec: ChainAmaxSpec) -> Lines:
    """The body of `ChainAmaxSpec`'s kernel."""
    before = _load_matrices(spec)
    tile: Lines = []
    after: Lines = []
    for side in spec.sides:
        name = side_prefix(spec, side)
        tile += _turned(spec, side, f"{name}_y")
        tile += magnitudes(f"{name}_y", f"{name}_magnitude")
        tile_max, pointer = f"tl.max({name}_magnitude, axis=1)", f"{name}_amax_ptr"
        if side.layout == "row" and not side.side.per_tensor:
            tile += [atomic_max(f"{pointer} + t", tile_max, "t < T" if spec.mask_rows else "")]
            continue
        kept = spec.tile_rows if side.layout == "row" else WIDTH
        before += [f"{name}_bits = tl.zeros(({kept},), dtype=tl.int32)"]
        tile += [f"{name}_bits = tl.maximum({name}_bits, {tile_max})"]
        if side.side.per_tensor:
            after += [atomic_max(pointer, f"tl.max({name}_bits, axis=0)", "")]
        else:
            mask = "k < K" if spec.mask_columns else ""
            after += [atomic_max(f"{pointer} + k", f"{name}_bits", mask)]
    return _tiles(spec, before, tile) + after


def chain_write_body(spec: ChainWriteSpec) -> Lines:
    """The body of `ChainWriteSpec`'s kernel."""
    before = _load_matrices(spec)
    tile: Lines = []
    for each in spec.sides:
        name = side_prefix(spec, each)
        assert isinstance(each.side, Side)
        scale = side_scales(spec, each.layout, each.side, name)
        if each.layout == "column" or each.side.per_tensor:
            before += scale
        else:
            tile += scale
        tile += _turned(spec, each, f"{name}_y")
        tile += write_side(spec, each.layout, each.side, name, (spec.tile_rows, WIDTH))
    return _tiles(spec, before, tile)
