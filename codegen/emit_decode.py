"""Body of the kernel that reads general encodings: unpack, exact values of codes, times the scales
of blocks. Only text; the numerics are those of `hadagraph.encode`."""

from __future__ import annotations

from hadagraph.codec import nan_code
from hadagraph.codegen.emit_encode import LEAST_E8M0, NAN
from hadagraph.codegen.encode_spec import BLOCK_2D, DecodeSpec
from hadagraph.codegen.primitives import TRITON_DTYPES, Lines, store
from hadagraph.formats import SCALE_FORMATS, Format, ScaleFormat, format_named


def decode_body(spec: DecodeSpec) -> Lines:
    """The body of `DecodeSpec`'s kernel."""
    format, granularity = format_named(spec.encoding.format), spec.encoding.granularity
    lines = [
        f"GROUP: tl.constexpr = {spec.group}  # codes along the contracted dim, of one scale",
        f"GROUPS: tl.constexpr = {spec.rows * spec.groups}",
        f"tiles = tl.cdiv(C_padded, {spec.group * spec.groups})",
        "tile_r = tl.program_id(0) // tiles",
        "tile_c = tl.program_id(0) % tiles",
        "group = tl.arange(0, GROUPS)",
        f"row = tile_r * {spec.rows} + group // {spec.groups}",
        f"column = (tile_c * {spec.groups} + group % {spec.groups}) * GROUP",
        *_load_codes(format),
        *values_of_codes(format),
    ]
    if granularity.block is not None:
        kept = "row // GROUP" if granularity.kind == BLOCK_2D else "row"
        where = f"({kept}).to(tl.int64) * (C_padded // GROUP) + column // GROUP"
        mask = "(row < R) & (column < C_padded)"
        lines += [f"scale_ptrs = scale_ptr + {where}"]
        lines += [f"scale_code = tl.load(scale_ptrs, mask={mask}, other=0)"]
        lines += _scale_values(SCALE_FORMATS[spec.encoding.scale])
        lines += ["value = value * scale[:, None]"]
    if spec.factor:
        lines += _factor(spec)
    return [*lines, *_store_values(spec)]


def _load_codes(format: Format) -> Lines:
    """codes, int32 [GROUPS, GROUP]."""
    apart, count, size, first = {
        8: ("", "GROUP", "C_padded", "column"),
        4: ("", "GROUP // 2", "C_padded // 2", "column // 2"),
        6: (" * 3", "GROUP // 4", "C_padded // 4 * 3", "column // 4 * 3"),
    }[format.bits]
    lines = [
        f"byte = ({first})[:, None] + tl.arange(0, {count})[None, :]{apart}",
        f"inside = (row < R)[:, None] & (byte < {size})",
        f"codes_ptrs = codes_ptr + row.to(tl.int64)[:, None] * ({size}) + byte",
        "codes = tl.load(codes_ptrs, mask=inside, other=0).to(tl.int32)",
    ]
    if format.bits == 8:
        return lines
    if format.bits == 4:
        joined = "tl.join(codes & 15, codes >> 4)"
    else:
        lines += [
            "second = tl.load(codes_ptrs + 1, mask=inside, other=0).to(tl.int32)",
            "third = tl.load(codes_ptrs + 2, mask=inside, other=0).to(tl.int32)",
            "even = tl.join(codes & 63, (second >> 4) | ((third & 3) << 4))",
            "odd = tl.join((codes >> 6) | ((second & 15) << 2), third >> 2)",
        ]
        joined = "tl.join(even, odd)"
    return [*lines, f"codes = tl.reshape({joined}, (GROUPS, GROUP))"]


def values_of_codes(format: Format) -> Lines:
    """value, fp32, of `codes`, exactly."""
    if format.is_integer:
        unused = 32 - format.bits
        return [f"value = ((codes << {unused}) >> {unused}).to(tl.float32)"]
    bits, half = format.mantissa_bits, 1 << (format.bits - 1)
    below = 127 + format.least_exponent - bits - 1
    return [
        f"exponent = (codes & {half - 1}) >> {bits}",
        f"mantissa = (codes & {(1 << bits) - 1}) + ((exponent > 0).to(tl.int32) << {bits})",
        f"step = ((tl.maximum(exponent, 1) + {below}) << 23).to(tl.float32, bitcast=True)",
        "value = mantissa.to(tl.float32) * step",
        f"value = tl.where(codes >= {half}, -value, value)",
    ]


def _scale_values(format: ScaleFormat) -> Lines:
    """scale, fp32, of `scale_code`."""
    if format.name == "fp32":
        return ["scale = scale_code"]
    lines = ["scale_code = scale_code.to(tl.int32)"]
    bits = format.mantissa_bits
    if bits == 0:
        bits_of = f"tl.maximum(scale_code << 23, {LEAST_E8M0})"
        lines += [f"scale = {bits_of}.to(tl.float32, bitcast=True)"]
    else:
        below = 127 + 2 - (1 << (format.exponent_bits - 1)) - bits - 1
        lines += [
            f"scale_exponent = scale_code >> {bits}",
            f"scale_mantissa = scale_code & {(1 << bits) - 1}",
            f"scale_mantissa += (scale_exponent > 0).to(tl.int32) << {bits}",
            f"scale_step = (tl.maximum(scale_exponent, 1) + {below}) << 23",
            "scale = scale_mantissa.to(tl.float32) * scale_step.to(tl.float32, bitcast=True)",
        ]
    return [*lines, f"scale = tl.where(scale_code == {nan_code(format)}, {NAN}, scale)"]


def _factor(spec: DecodeSpec) -> Lines:
    kind = spec.encoding.granularity.kind
    lines = ["factor = tl.load(tensor_scale_ptr)"]
    if kind == "per_tensor":
        lines += ["factor = tl.load(scale_ptr) * factor"]
    elif kind == "per_kept_index":
        lines += ["factor = tl.load(scale_ptr + row, mask=row < R, other=0.0) * factor"]
        return [*lines, "value = value * factor[:, None]"]
    return [*lines, "value = value * factor"]


def _store_values(spec: DecodeSpec) -> Lines:
    where = "row.to(tl.int64)[:, None] * size + out_column"
    if spec.transposed:
        where = "out_column.to(tl.int64) * R + row[:, None]"
    return [
        "out_column = column[:, None] + tl.arange(0, GROUP)[None, :]",
        "inside = (row < R)[:, None] & (out_column < size)",
        f"out_ptrs = out_ptr + {where}",
        store("out_ptrs", f"value.to({TRITON_DTYPES[spec.out_dtype]})", "inside"),
    ]
