"""Bodies of the passes that write general encodings: rotate or project, find the scale of each
group, round to codes and pack them. Only text; the numerics are those of `hadagraph.encode`.

A tile is multiplied by the matrix as runs of `width` codes, then seen as [GROUPS, GROUP]: one row a
scale group, or a part of one.
"""

from __future__ import annotations

import math

import numpy as np

from hadagraph.codec import nan_code, smallest_scale
from hadagraph.codegen.encode_spec import AMAX, BLOCK_2D, MASK, VALUES, EncodeSpec
from hadagraph.codegen.primitives import (
    INFINITY_BITS,
    ROUND,
    TRITON_DTYPES,
    Lines,
    atomic_max,
    load,
    load_matrix,
    magnitudes,
    reorder_fragments,
    rotate,
    store,
)
from hadagraph.codegen.spec import INPUT_BYTES
from hadagraph.encode import (
    FOUR_SIX_REACH,
    LONGEST_REACH,
    NORMAL_REACH,
    THREE_QUARTERS,
)
from hadagraph.formats import SCALE_FORMATS, Format, ScaleFormat, format_named
from hadagraph.philox import ROUNDING, SIGNS, SIGNS_PER_COUNTER
from hadagraph.reference import AMAX_FLOOR

NAN = "float('nan')"
LEAST_E8M0 = "0x400000"
"""The bits of 2^-127, which fp32 has as a subnormal."""


def encode_body(spec: EncodeSpec) -> Lines:
    """The body of `EncodeSpec`'s kernel."""
    lines = [*_tile(spec), *_load(spec), *_transform(spec)]
    if spec.result == AMAX:
        return [*lines, *_leave_maxima(spec)]
    if spec.result == VALUES:
        return [*lines, *_as_groups(spec), *_store_elements(spec, "out_ptr", "y")]
    if spec.encoding.prescale:
        lines += _prescale(spec)
    lines += [*_as_groups(spec), *_largest(spec), *_scales(spec)]
    if spec.result == MASK:
        most = format_named(spec.encoding.format).max
        within = f"(tl.abs(y * inverse{_each(spec)}) <= {most}) & finite{_each(spec)}"
        return [*lines, *_store_elements(spec, "mask_ptr", f"({within})")]
    lines += _store_scales(spec)
    if spec.encoding.fit == "three_quarters":
        lines += [f"y = y * {THREE_QUARTERS}"]
    lines += [f"value = y * inverse{_each(spec)}"]
    if spec.draws_rounding:
        lines += _uniform()
    lines += round_to_codes(format_named(spec.encoding.format), stochastic=spec.draws_rounding)
    lines += [f"codes = tl.where(finite{_each(spec)}, codes, 0)"]
    return [*lines, *_store_codes(spec)]


def _tile(spec: EncodeSpec) -> Lines:
    """Neighboring programs read neighboring memory."""
    if spec.kept_first:
        order = [
            "tiles = tl.cdiv(R, ROWS)",
            "tile_r = program % tiles",
            "tile_c = program // tiles",
        ]
    else:
        order = [
            "tiles = tl.cdiv(C_padded, SPAN)",
            "tile_r = program // tiles",
            "tile_c = program % tiles",
        ]
    return [
        f"ROWS: tl.constexpr = {spec.rows}  # kept indices of a tile",
        f"SPAN: tl.constexpr = {spec.span}  # its codes along the contracted dim",
        f"GROUP: tl.constexpr = {spec.group}  # codes that are treated together",
        f"GROUPS: tl.constexpr = {spec.rows * spec.span // spec.group}",
        "program = tl.program_id(0)",
        *order,
    ]


def _load(spec: EncodeSpec) -> Lines:
    """x [ROWS * PARTS, IN_WIDTH], contracted dim last."""
    row, inputs = "tl.arange(0, ROWS)", spec.parts * spec.in_width
    first = f"tile_c * {inputs}"
    if spec.parts > 1:
        lines = [f"run = tl.arange(0, {spec.rows * spec.parts})  # counts (row, part)"]
        row, first = f"run // {spec.parts}", f"{first} + (run % {spec.parts} * {spec.in_width})"
        first = f"({first})[:, None]"
    else:
        lines = []
    lines += [
        f"x_row = (tile_r * ROWS + {row})[:, None]",
        f"x_column = {first} + tl.arange(0, {spec.in_width})[None, :]",
    ]
    where = "x_row.to(tl.int64) * x_stride + x_column"
    if spec.kept_first:
        where = "x_row + x_column.to(tl.int64) * x_stride"
    mask = "(x_row < R) & (x_column < C)"
    return [*lines, f"x_ptrs = x_ptr + {where}", f"x = {load('x_ptrs', mask)}"]


def _transform(spec: EncodeSpec) -> Lines:
    """y, in fp32."""
    lines: Lines = []
    if spec.draws_signs or spec.draws_rounding:
        lines += ["seed = tl.load(seed_ptr)"]
    if spec.draws_signs:
        lines += _signs(spec)
    if spec.draws_signs and not spec.inverse:
        size, dtype = INPUT_BYTES[spec.input_dtype], TRITON_DTYPES[spec.input_dtype]
        lines += [
            f"sign_bits = (negative << {8 * size - 1}).to(tl.int{8 * size})[None, :]",
            f"x = (x.to(tl.int{8 * size}, bitcast=True) ^ sign_bits).to({dtype}, bitcast=True)",
        ]
    runs = spec.rows * spec.parts
    if not spec.transformed:
        if spec.draws_rounding and spec.kept_first:
            lines += [
                "# a thread read other rows; from here it holds neighbors, which share a counter",
                f"even, odd = tl.split(tl.reshape(x, ({runs}, {spec.width // 2}, 2)))",
                f"x = tl.reshape(tl.join(even, odd), ({runs}, {spec.width}))",
            ]
        return [*lines, "y = x.to(tl.float32)"]
    lines += _load_matrix(spec)
    lines += rotate("x", "matrix", "y", spec.input_dtype, f"[{runs}, {spec.width}]")
    if spec.fragment_order:
        lines += reorder_fragments("y", str(runs), spec.width)
    lines += [f"y = y * {_normalization(spec)!r}"]
    if spec.draws_signs and spec.inverse:
        lines += ["y = tl.where(negative[None, :] != 0, -y, y)"]
    return lines


def _signs(spec: EncodeSpec) -> Lines:
    """negative: 1 where a sign is -1; one counter has the bits of them all."""
    assert spec.encoding.rotation is not None
    block = spec.encoding.rotation.block
    assert block <= SIGNS_PER_COUNTER
    return [
        f"index = tl.arange(0, {spec.in_width}) % {block}",
        _philox("0", "0", "signs_stream", str(SIGNS)),
        "words = word0",
        *(f"words = tl.where(index < {32 * k}, words, word{k})" for k in range(1, block // 32)),
        "negative = (words >> (index % 32).to(tl.uint32)) & 1",
    ]


def _load_matrix(spec: EncodeSpec) -> Lines:
    if spec.in_width == spec.width:
        return load_matrix("matrix_ptr", "matrix", spec.width)
    return [
        f"i = tl.arange(0, {spec.in_width})[:, None]",
        f"j = tl.arange(0, {spec.width})[None, :]",
        f"matrix = tl.load(matrix_ptr + i * {spec.width} + j)  # [{spec.in_width}, {spec.width}]",
    ]


def _normalization(spec: EncodeSpec) -> float:
    encoding = spec.encoding
    block = encoding.rotation.block if encoding.rotation else None
    if encoding.tokens_kept is not None:
        block = encoding.tokens_kept[1]
    assert block is not None
    return float(np.float32(block**-0.5))


def _philox(low: str, high: str, stream: str, kind: str) -> str:
    """word0 to word3 of each counter."""
    return f"word0, word1, word2, word3 = tl.philox(seed, {low}, {high}, {stream}, {kind})"


def _leave_maxima(spec: EncodeSpec) -> Lines:
    lines = magnitudes("y", "magnitude")
    if spec.largest == "tensor" and spec.capability[0] == 10:
        # there triton 3.7 fails on a maximum of maxima
        whole = f"tl.reshape(magnitude, ({spec.rows * spec.span},))"
        return [*lines, atomic_max("amax_ptr", f"tl.max({whole}, axis=0)", "")]
    lines += ["bits = tl.max(magnitude, axis=1)"]
    if spec.largest == "tensor":
        return [*lines, atomic_max("amax_ptr", "tl.max(bits, axis=0)", "")]
    if spec.parts > 1:
        lines += [f"bits = tl.max(tl.reshape(bits, (ROWS, {spec.parts})), axis=1)"]
    lines += ["row = tile_r * ROWS + tl.arange(0, ROWS)"]
    return [*lines, atomic_max("amax_ptr + row", "bits", "row < R")]


def _prescale(spec: EncodeSpec) -> Lines:
    """Brings the tensor's maximum to the largest number that block scales reach."""
    encoding = spec.encoding
    longest = FOUR_SIX_REACH if encoding.fit == "four_six" else LONGEST_REACH
    reach = format_named(encoding.format).max * min(SCALE_FORMATS[encoding.scale].max, longest)
    return [
        f"REACH: tl.constexpr = {reach}",
        "tensor_bits = tl.load(amax_ptr)",
        f"tensor_amax = tl.maximum(tensor_bits.to(tl.float32, bitcast=True), {AMAX_FLOOR!r})",
        "prescale = tl.where(tensor_bits == 0, 1.0, tl.div_rn(REACH, tensor_amax))",
        f"y = y * tl.where(tensor_bits > {INFINITY_BITS}, {NAN}, prescale)",
    ]


def _as_groups(spec: EncodeSpec) -> Lines:
    per_row = spec.span // spec.group
    lines = [] if spec.group == spec.width else ["y = tl.reshape(y, (GROUPS, GROUP))"]
    return [
        *lines,
        "group = tl.arange(0, GROUPS)",
        f"row = tile_r * ROWS + group // {per_row}",
        f"column = tile_c * SPAN + group % {per_row} * GROUP  # the first of the group",
    ]


def _each(spec: EncodeSpec) -> str:
    """What spreads a scale over its group's codes."""
    return "" if spec.encoding.granularity.kind == "per_tensor" else "[:, None]"


def _largest(spec: EncodeSpec) -> Lines:
    """bits: the maximum magnitude of each group."""
    kind = spec.encoding.granularity.kind
    if kind == "per_tensor":
        return ["bits = tl.load(amax_ptr)"]
    if kind == "per_kept_index":
        return ["bits = tl.load(amax_ptr + row, mask=row < R, other=0)"]
    lines = [*magnitudes("y", "magnitude"), "bits = tl.max(magnitude, axis=1)"]
    return [*lines, *_over_rows(spec, "bits", "tl.max")]


def _over_rows(spec: EncodeSpec, name: str, reduce: str) -> Lines:
    """`name` [GROUPS], reduced over the rows of each square tile and spread over them again."""
    if spec.encoding.granularity.kind != BLOCK_2D:
        return []
    shape = f"(ROWS // GROUP, GROUP, {spec.width} // GROUP)"
    spread = f"tl.broadcast_to(tiles_{name}[:, None, :], {shape})"
    return [
        f"tiles_{name} = {reduce}(tl.reshape({name}, {shape}), axis=1)",
        f"{name} = tl.reshape({spread}, (GROUPS,))",
    ]


def _scales(spec: EncodeSpec) -> Lines:
    """finite, inverse, and scale (fp32) or scale_code of each group."""
    encoding = spec.encoding
    scale_format = SCALE_FORMATS[encoding.scale]
    lines = [
        f"finite = bits < {INFINITY_BITS}",
        f"amax = tl.maximum(bits.to(tl.float32, bitcast=True), {AMAX_FLOOR!r})",
    ]
    if encoding.fit == "mse":
        lines += _normal_reach(spec)
    lines += _fitted(spec, scale_format)
    if scale_format.name == "fp32":
        scale = f"tl.where(finite, scale, {NAN})"
        return [*lines, f"scale = tl.where(bits == 0, 1.0, {scale})"]
    one = _code_of_one(scale_format)
    code = f"tl.where(finite, scale_code, {nan_code(scale_format)})"
    return [
        *lines,
        f"scale_code = tl.where(bits == 0, {one}, {code}).to(tl.uint8)",
        "inverse = tl.where(bits == 0, 1.0, inverse)",
    ]


def _normal_reach(spec: EncodeSpec) -> Lines:
    """amax: what the largest code shall stand for, by the rms of what is no padding."""
    count = "tl.minimum(tl.maximum(C_transformed - column, 1), GROUP)"
    if spec.encoding.granularity.kind == BLOCK_2D:
        count = f"{count} * tl.minimum(R - row // GROUP * GROUP, GROUP)"
    return [
        "relative = tl.div_rn(y, tl.broadcast_to(amax[:, None], (GROUPS, GROUP)))",
        "squares = tl.sum(relative * relative, axis=1)",
        *_over_rows(spec, "squares", "tl.sum"),
        f"count = tl.maximum({count}, 1).to(tl.float32)",
        "rms = tl.sqrt_rn(tl.div_rn(squares, count))",
        f"amax = amax * rms * {_fp32(NORMAL_REACH[spec.encoding.format])}",
    ]


def _fitted(spec: EncodeSpec, scale_format: ScaleFormat) -> Lines:
    encoding, format = spec.encoding, format_named(spec.encoding.format)
    quotient = f"tl.div_rn(amax, {format.max})"
    if scale_format.name == "fp32":
        return [f"scale = {quotient}", f"inverse = tl.div_rn({format.max}, amax)"]
    if encoding.fit == "four_six":
        return _four_or_six(spec, scale_format)
    if scale_format.name == "e8m0" and encoding.fit in ("amax", "three_quarters"):
        quotient = f"amax * {2.0 ** -math.floor(math.log2(format.max))!r}"
    elif scale_format.name == "e8m0" and encoding.fit == "mse":
        quotient = f"{quotient} * {_fp32(2**0.5)}"
    return round_scale(quotient, "", scale_format, up=encoding.fit == "ceil")


def round_scale(value: str, suffix: str, format: ScaleFormat, *, up: bool) -> Lines:
    """scale{suffix} of positive numbers on the format's grid, inverse{suffix} = 1 / scale and
    scale_code{suffix}; nearest even, or e8m0 down, or up (of no less than 2^-126)."""
    scale, code, inverse = f"scale{suffix}", f"scale_code{suffix}", f"inverse{suffix}"
    if format.mantissa_bits == 0:
        lines = [f"{scale} = tl.minimum({value}, {format.max!r}).to(tl.int32, bitcast=True)"]
        exponent = f"{scale} >> 23"
        if up:
            exponent = f"({exponent}) + (({scale} & 0x7FFFFF) != 0).to(tl.int32)"
        return [
            *lines,
            f"{code} = {exponent}  # as fp32 biases it",
            f"{scale} = tl.maximum({code} << 23, {LEAST_E8M0}).to(tl.float32, bitcast=True)",
            f"{inverse} = tl.div_rn(1.0, {scale})",
        ]
    least, bits = 2 - (1 << (format.exponent_bits - 1)), format.mantissa_bits
    steps = f"tl.ceil({scale} * per_step)" if up else f"({scale} * per_step + {ROUND}) - {ROUND}"
    return [
        f"{scale} = tl.minimum(tl.maximum({value}, {smallest_scale(format)!r}), {format.max})",
        f"exponent = tl.maximum({scale}.to(tl.int32, bitcast=True) >> 23, {127 + least})",
        f"per_step = (({254 + bits} - exponent) << 23).to(tl.float32, bitcast=True)",
        f"steps = {steps}",
        f"{scale} = steps * ((exponent - {bits}) << 23).to(tl.float32, bitcast=True)",
        f"{code} = steps.to(tl.int32) + ((exponent - {127 + least}) << {bits})",
        f"{inverse} = tl.div_rn(1.0, {scale})",
    ]


def _four_or_six(spec: EncodeSpec, scale_format: ScaleFormat) -> Lines:
    """The maximum is put on 6, or on 4 where that errs less in the group."""
    format = format_named(spec.encoding.format)
    lines: Lines = []
    for most, name in ((6.0, "_six"), (4.0, "_four")):
        lines += round_scale(f"tl.div_rn(amax, {most})", name, scale_format, up=False)
        lines += [
            f"magnitude = tl.minimum(tl.abs(y * inverse{name}[:, None]), {format.max})",
            *_steps(format, stochastic=False),
            "decoded = steps.to(tl.float32) * step",
            f"difference = decoded * scale{name}[:, None] - tl.abs(y)",
            f"error{name} = tl.sum(difference * difference, axis=1)",
            *_over_rows(spec, f"error{name}", "tl.sum"),
        ]
    lines += ["four = error_four < error_six"]
    for name in ("inverse", "scale_code"):
        lines += [f"{name} = tl.where(four, {name}_four, {name}_six)"]
    return lines


def _steps(format: Format, *, stochastic: bool) -> Lines:
    """steps: how many of the grid's step at its place a `magnitude` (at most the format's largest)
    is, rounded; exponent (biased by 127), step. `uniform` numbers decide if stochastic."""
    least, bits = 127 + format.least_exponent, format.mantissa_bits
    lines = [
        f"exponent = tl.maximum(magnitude.to(tl.int32, bitcast=True) >> 23, {least})",
        f"step = ((exponent - {bits}) << 23).to(tl.float32, bitcast=True)",
        f"quotient = magnitude * (({254 + bits} - exponent) << 23).to(tl.float32, bitcast=True)",
    ]
    return [*lines, *_rounded("quotient", stochastic=stochastic)]


def _rounded(quotient: str, *, stochastic: bool) -> Lines:
    """steps, int32, of a number from 0 to 2^22."""
    if stochastic:
        return [
            f"steps = {quotient}.to(tl.int32)",
            f"steps += (uniform < {quotient} - steps.to(tl.float32)).to(tl.int32)",
        ]
    return [f"steps = ({quotient} + {ROUND}).to(tl.int32, bitcast=True) & 0x3FFFFF"]


def round_to_codes(format: Format, *, stochastic: bool) -> Lines:
    """codes, int32, of fp32 numbers named `value`: clamped, then rounded to the format's grid."""
    lines = [f"magnitude = tl.minimum(tl.abs(value), {format.max})"]
    if format.is_integer:
        lines += _rounded("magnitude", stochastic=stochastic)
        signed = "tl.where(value < 0, -steps, steps)"
        return [*lines, f"codes = {signed} & {(1 << format.bits) - 1}"]
    least, bits = 127 + format.least_exponent, format.bits
    lines += _steps(format, stochastic=stochastic)
    lines = [line for line in lines if not line.startswith("step =")]
    return [
        *lines,
        f"sign = (value.to(tl.int32, bitcast=True) >> {32 - bits}) & {1 << (bits - 1)}",
        f"codes = (steps + ((exponent - {least}) << {format.mantissa_bits})) | sign",
    ]


def _uniform() -> Lines:
    """uniform: fp32 in [0, 1) for each code; four neighbors share a counter, by their place in
    [R, C_padded / 4]."""
    return [
        "place = (column // 4)[:, None] + tl.arange(0, GROUP // 4)[None, :]",
        "place = row.to(tl.int64)[:, None] * (C_padded // 4) + place",
        "low = (place & 0xFFFFFFFF).to(tl.uint32)",
        "high = (place >> 32).to(tl.uint32)",
        "# were the kind no tensor, triton (3.6, 3.7) would move words through shared memory",
        _philox("low", "high", "stream", f"low * 0 + {ROUNDING}"),
        "words = tl.join(tl.join(word0, word2), tl.join(word1, word3))  # the last dims: 2, 2",
        "words = tl.reshape(words, (GROUPS, GROUP))",
        f"uniform = (words >> 8).to(tl.int32).to(tl.float32) * {2.0**-24!r}",
    ]


def _store_scales(spec: EncodeSpec) -> Lines:
    encoding = spec.encoding
    tensor_scale = "1.0"
    lines: Lines = []
    if encoding.prescale:
        lines += [
            f"tensor_scale = tl.where(tensor_bits < {INFINITY_BITS}, tensor_amax, {NAN})",
            "tensor_scale = tl.div_rn(tensor_scale, REACH)",
            "tensor_scale = tl.where(tensor_bits == 0, 1.0, tensor_scale)",
        ]
        tensor_scale = "tensor_scale"
    if encoding.fit == "three_quarters":
        tensor_scale = f"{tensor_scale} * {_fp32(1 / THREE_QUARTERS)}"
    lines += ["if program == 0:", f"    tl.store(tensor_scale_ptr, {tensor_scale})"]
    if encoding.granularity.kind == "per_tensor":
        return [*lines, "    tl.store(scale_ptr, scale)"]
    name = "scale" if encoding.scale == "fp32" else "scale_code"
    where, mask = "row", "(row < R) & (column == 0)"
    if encoding.granularity.block is not None:
        where = "row.to(tl.int64) * (C_padded // GROUP) + column // GROUP"
        mask = "(row < R) & (column < C_padded)"
    if encoding.granularity.kind == BLOCK_2D:
        where = "(row // GROUP).to(tl.int64) * (C_padded // GROUP) + column // GROUP"
        mask = f"{mask} & (row % GROUP == 0)"
    return [*lines, f"scale_ptrs = scale_ptr + {where}", store("scale_ptrs", name, mask)]


def _store_codes(spec: EncodeSpec) -> Lines:
    """Packed into bytes: two codes of 4 bits in one, four of 6 bits in three; the latter stored as
    words, for sixteen in three."""
    bits = format_named(spec.encoding.format).bits
    if bits == 8:
        return _store_units([("codes", "")], "column", 1, "GROUP", "C_padded")
    if bits == 4:
        split = "codes, high_codes = tl.split(tl.reshape(codes, (GROUPS, GROUP // 2, 2)))"
        lines = [split, "codes = codes | (high_codes << 4)"]
        return lines + _store_units(
            [("codes", "")], "column // 2", 1, "GROUP // 2", "C_padded // 2"
        )
    lines = [
        *_in_fours("code", "codes", "GROUP // 4"),
        "codes = code0 | (code1 << 6) | (code2 << 12) | (code3 << 18)",
        *_in_fours("four", "codes", "GROUP // 16"),
        "codes_ptr = codes_ptr.to(tl.pointer_type(tl.int32), bitcast=True)",
    ]
    parts = (
        ("(four0 | (four1 << 24))", ""),
        ("((four1 >> 8) | (four2 << 16))", " + 1"),
        ("((four2 >> 16) | (four3 << 8))", " + 2"),
    )
    size = "C_padded // 16 * 3"
    return lines + _store_units(
        list(parts), "column // 16 * 3", 3, "GROUP // 16", size, name="word", dtype="tl.int32"
    )


def _in_fours(name: str, whole: str, count: str) -> Lines:
    """{name}0 to {name}3, [GROUPS, count]: each fourth of `whole`, from the first to the fourth."""
    return [
        f"even, odd = tl.split(tl.reshape({whole}, (GROUPS, {count}, 2, 2)))",
        f"{name}0, {name}2 = tl.split(even)",
        f"{name}1, {name}3 = tl.split(odd)",
    ]


def _store_units(
    parts: list[tuple[str, str]],
    first: str,
    apart: int,
    count: str,
    size: str,
    *,
    name: str = "byte",
    dtype: str = "tl.uint8",
) -> Lines:
    """`parts`: values, of which the low bits that `dtype` has are meant, and their offset; `first`:
    unit of a group in its row of `size` units."""
    each = f"tl.arange(0, {count})[None, :]"
    lines = [
        f"{name} = ({first})[:, None] + {each}{f' * {apart}' if apart > 1 else ''}",
        f"codes_ptrs = codes_ptr + row.to(tl.int64)[:, None] * ({size}) + {name}",
        f"inside = (row < R)[:, None] & ({name} < {size})",
    ]
    for value, offset in parts:
        lines += [store(f"codes_ptrs{offset}", f"{value}.to({dtype})", "inside")]
    return lines


def _store_elements(spec: EncodeSpec, pointer: str, value: str) -> Lines:
    """One element for each of the C_transformed, [R, C_transformed] or the other way round."""
    where = "out_row.to(tl.int64) * C_transformed + out_column"
    if spec.kept_last:
        where = "out_column.to(tl.int64) * R + out_row"
    dtype = "tl.uint8" if spec.result == MASK else TRITON_DTYPES[spec.input_dtype]
    return [
        "out_row, out_column = row[:, None], column[:, None] + tl.arange(0, GROUP)[None, :]",
        "inside = (out_row < R) & (out_column < C_transformed)",
        store(f"{pointer} + {where}", f"{value}.to({dtype})", "inside"),
    ]


def _fp32(value: float) -> str:
    """A literal of the nearest fp32."""
    return repr(float(np.float32(value)))


def _code_of_one(format: ScaleFormat) -> int:
    """1.0 as a scale code."""
    if format.mantissa_bits == 0:
        return 127
    return ((1 << (format.exponent_bits - 1)) - 1) << format.mantissa_bits
