"""Bodies of the column passes whose rotation is done by additions: each token of a block is a
vector of columns in registers, and butterflies over the vectors rotate it. Only text; the numerics
are in `primitives`, the arithmetic of chains in `pointwise`."""

from __future__ import annotations

from hadagraph.codegen.pointwise import Place, chain_output, chain_steps, load_inputs
from hadagraph.codegen.primitives import (
    ROUND,
    TRITON_DTYPES,
    Lines,
    atomic_max,
    butterflies,
    conjunction,
    indent,
    joined,
    load,
    maximum,
    maximum_of,
    scales,
    store,
)
from hadagraph.codegen.spec import VECTORS, ColumnAmaxSpec, ColumnWriteSpec
from hadagraph.formats import format_named
from hadagraph.region import COLUMNS, MATRIX, ROWS, SCALAR, Chain

# Adding one of these leaves code + 128 in the low byte of an fp32. The four are such that the sum
# of the four bit patterns, shifted by 0, 8, 16 and 24, is the four bytes code + 128 and no more.
PACKED_ROUND = (ROUND + 128, ROUND + 128, ROUND + 62784, ROUND)
SIGN_BITS = -2139062144  # 0x80808080: flips code + 128 to code in each byte
MOST_LOADS = 64
"""Vectors that a chain may have read before it computes: what their registers allow."""
Columns = ColumnAmaxSpec | ColumnWriteSpec


def column_amax_body(spec: ColumnAmaxSpec) -> Lines:
    """The body of `ColumnAmaxSpec`'s kernel."""
    body: Lines = []
    made = [output for output, block in enumerate(spec.blocks) if block is not None]
    for output in made:
        body += _in_fp32(spec, output)
        body += _take_in_maxima(f"top{output}", _vectors(output), spec.blocks[output] or 1)
    outputs = [o for o in range(len(spec.blocks)) if o in made or spec.values[o]]
    steps = spec.tokens // VECTORS
    inside = "k < K" if spec.mask_columns else ""
    lines = _index(spec)
    lines += [f"top{output} = tl.zeros(({spec.columns},), dtype=tl.float32)" for output in made]
    walked = [*_load_vectors(spec, outputs), *body]
    if steps == 1:
        lines += ["t = t_first", *walked]
    else:
        lines += [f"for step in tl.range(0, {steps}):", f"    t = t_first + step * {VECTORS}"]
        lines += indent(walked)
    for output in made:
        bits = f"top{output}.to(tl.int32, bitcast=True)"
        lines += [atomic_max(f"amax{output}_ptr + k", bits, inside)]
    return lines


def column_write_body(spec: ColumnWriteSpec) -> Lines:
    """The body of `ColumnWriteSpec`'s kernel."""
    inside = "k < K" if spec.mask_columns else ""
    other = f", mask={inside}, other=0" if inside else ""
    lines = [*_index(spec), f"bits = tl.load(amax_ptr + k{other})  # [{spec.columns}]"]
    lines += scales("bits", "", spec.side.format, spec.side.block)
    if format_named(spec.side.format).is_integer:
        lines += ["kept = tl.where(finite, -1, 0)  # bits of the words of codes"]
    lines += [f"if tl.program_id({spec.axes[1]}) == 0:"]
    lines += indent([store("scale_ptr + k", "scale", inside)])
    chunk = _chunk(spec)
    if spec.chunk == spec.tokens:
        return [*lines, "t_chunk = t_first", *chunk]
    walk = f"for step in tl.range(0, {spec.tokens // spec.chunk}):"
    return [*lines, walk, f"    t_chunk = t_first + step * {spec.chunk}", *indent(chunk)]


def _index(spec: Columns) -> Lines:
    """k [columns], the first token, and the chain's inputs that all tokens share."""
    axis_k, axis_t = spec.axes
    tile_t = f"tl.program_id({axis_t})"
    if spec.backward:
        tile_t = f"(tl.num_programs({axis_t}) - 1 - tl.program_id({axis_t}))"
    lines = [
        f"k = tl.program_id({axis_k}) * {spec.columns} + tl.arange(0, {spec.columns})",
        f"t_first = {tile_t} * {spec.tokens}",
    ]
    if spec.chain is None:
        return lines
    inside = "k < K" if spec.mask_columns else ""
    shared = {COLUMNS: Place(" + k", inside), SCALAR: Place("")}
    return lines + load_inputs(spec.chain, shared)


def _vectors(output: int) -> list[str]:
    return [f"y{output}_{token}" for token in range(VECTORS)]


def _load_vectors(spec: Columns, outputs: list[int]) -> Lines:
    """VECTORS tokens from token t, zeros past the end: of x, y0_0, ... [columns] in fp32; of a
    chain's outputs, x{output}_0, ... in their dtypes, and written where wanted.

    Loads come in runs ahead of the stores: what is stored might lie where the next load reads, for
    all that the compiler knows, so that it moves no load ahead of a store.
    """
    if spec.chain is None:
        stride = "x_stride" if spec.strides is None else str(spec.strides[0])
        cast = "" if spec.input_dtype == "fp32" else ".to(tl.float32)"
        return [
            f"x_t_ptr = x_ptr + t.to(tl.int64) * {stride} + k",
            *(
                f"y0_{token} = {load(_at('x_t_ptr', token, stride), _inside(spec, token))}{cast}"
                for token in range(VECTORS)
            ),
        ]
    matrices = [i for i, each in enumerate(spec.chain.inputs) if each.shape == MATRIX]
    names = [f"v{index}_stride" for index in matrices]
    strides = dict(zip(matrices, map(str, spec.strides or names), strict=True))
    values: list[int] = []
    apart = "K"
    if isinstance(spec, ColumnAmaxSpec):
        values = [output for output in outputs if spec.values[output]]
        apart = str(spec.value_stride or "K")
    lines = [
        f"v{index}_t_ptr = v{index}_ptr + t.to(tl.int64) * {stride} + k"
        for index, stride in strides.items()
    ]
    lines += [f"value{o}_t_ptr = value{o}_ptr + t.to(tl.int64) * {apart} + k" for o in values]
    run = VECTORS if len(strides) * VECTORS <= MOST_LOADS else VECTORS // 2
    for start in range(0, VECTORS, run):
        tokens = range(start, start + run)
        for token in tokens:
            mask = _inside(spec, token)
            lines += [
                f"v{index}_{token} = {load(_at(f'v{index}_t_ptr', token, stride), mask)}"
                for index, stride in strides.items()
            ]
        for token in tokens:
            lines += _chained_token(spec, spec.chain, token, outputs)
        for output in values:
            lines += [
                store(_at(f"value{output}_t_ptr", t, apart), f"x{output}_{t}", _inside(spec, t))
                for t in tokens
            ]
    return lines


def _at(pointer: str, token: int, stride: str) -> str:
    offset = str(token * int(stride)) if stride.isdigit() else f"{token} * {stride}"
    return f"{pointer} + {offset}" if token else pointer


def _inside(spec: Columns, token: int) -> str:
    return conjunction(
        f"t + {token} < T" if spec.mask_tokens else None, "k < K" if spec.mask_columns else None
    )


def _chained_token(spec: Columns, chain: Chain, token: int, outputs: list[int]) -> Lines:
    """One token's x{output}_{token} [columns]."""
    t_inside = f"t + {token} < T" if spec.mask_tokens else ""
    lines = [
        f"v{index} = v{index}_{token}{'' if each.dtype == 'fp32' else '.to(tl.float32)'}"
        for index, each in enumerate(chain.inputs)
        if each.shape == MATRIX
    ]
    lines += load_inputs(chain, {ROWS: Place(f" + t + {token}", t_inside)})
    lines += chain_steps(chain)
    for output in outputs:
        name = f"x{output}_{token}"
        shape = f"({spec.columns},)"
        lines += chain_output(chain, output, name, shape, t_inside, (MATRIX, ROWS))
    return lines


def _in_fp32(spec: Columns, output: int) -> Lines:
    """y{output}_0, ...: an output of a chain, as its rotation takes it."""
    if spec.chain is None:
        return []
    cast = "" if spec.chain.outputs[output].dtype == "fp32" else ".to(tl.float32)"
    return [f"y{output}_{token} = x{output}_{token}{cast}" for token in range(VECTORS)]


def _take_in_maxima(top: str, names: list[str], block: int) -> Lines:
    """`top` takes in the maximum magnitudes of the rotated vectors. The last stage of the
    butterflies is not needed: max(|a + b|, |a - b|) = |a| + |b|, in fp32 too."""
    if block == 1:
        lines = [f"m{i} = tl.abs({name})" for i, name in enumerate(names)]
        maxima = [f"m{i}" for i in range(len(names))]
    else:
        half = block // 2
        first = [i for i in range(len(names)) if not i & half]
        lines = butterflies(names, half)
        lines += [f"m{i} = tl.abs({names[i]}) + tl.abs({names[i | half]})" for i in first]
        maxima = [f"m{i}" for i in first]
    return [*lines, *maximum_of(maxima), f"{top} = {maximum(top, maxima[0])}"]


def _chunk(spec: ColumnWriteSpec) -> Lines:
    """Codes of `chunk` tokens from t_chunk, joined so that each column's are stored together."""
    integer = format_named(spec.side.format).is_integer
    lines: Lines = []
    parts: list[str] = []
    for group in range(spec.chunk // VECTORS):
        lines += [f"t = t_chunk + {group * VECTORS}" if group else "t = t_chunk"]
        lines += [*_load_vectors(spec, [0]), *_in_fp32(spec, 0)]
        lines += butterflies(_vectors(0), spec.side.block or 1)
        more, names = (_packed if integer else _scaled)(group)
        lines += more
        parts += names
    joins, codes = joined(parts)
    lines += joins
    size = len(parts)
    codes = f"tl.reshape({codes}, ({spec.columns}, {size}))"
    stride, pointer = "codes_stride", "codes_ptr"
    if integer:
        lines += ["words_ptr = codes_ptr.to(tl.pointer_type(tl.int32))  # of four codes"]
        stride, pointer = "(codes_stride // 4)", "words_ptr"
    else:
        codes = f"{codes}.to({TRITON_DTYPES[spec.side.format]})"
    start = "t_chunk // 4" if integer else "t_chunk"
    lines += [
        f"place = {start} + tl.arange(0, {size})",
        f"codes_ptrs = {pointer} + k.to(tl.int64)[:, None] * {stride} + place[None, :]",
    ]
    mask = conjunction(
        "k[:, None] < K" if spec.mask_columns else None,
        f"place[None, :] < {stride}" if spec.mask_tokens else None,
    )
    return [*lines, store("codes_ptrs", codes, mask)]


def _packed(group: int) -> tuple[Lines, list[str]]:
    """Words of four codes each of the vectors; 0 in columns that hold inf or NaN."""
    lines = []
    for i, name in enumerate(_vectors(0)):
        rounded = f"({name} * inverse + {PACKED_ROUND[i % 4]}).to(tl.int32, bitcast=True)"
        lines += [f"c{i} = {rounded}"]
    words = []
    for word in range(VECTORS // 4):
        a, b, c, d = (f"c{4 * word + i}" for i in range(4))
        name = f"word{group}_{word}"
        lines += [f"{name} = ({a} + ({b} << 8)) + (({c} + ({d} << 8)) << 16)"]
        lines += [f"{name} = ({name} ^ {SIGN_BITS}) & kept"]
        words.append(name)
    return lines, words


def _scaled(group: int) -> tuple[Lines, list[str]]:
    """The vectors, scaled to the format's range; 0 in columns that hold inf or NaN."""
    names = [f"scaled{group}_{i}" for i in range(VECTORS)]
    pairs = zip(names, _vectors(0), strict=True)
    return [f"{a} = tl.where(finite, {b} * inverse, 0.0)" for a, b in pairs], names
