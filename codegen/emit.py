"""Spec -> Triton source: one file with one kernel, readable and runnable by itself. Frames the
bodies that the other `emit_*` files write. Knows no tensors and launches nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from hadagraph.codegen.emit_block_scaled import block_scaled_mm_body, codes_a_byte
from hadagraph.codegen.emit_columns import column_amax_body, column_write_body
from hadagraph.codegen.emit_decode import decode_body
from hadagraph.codegen.emit_encode import encode_body
from hadagraph.codegen.emit_gluon import gluon_mm
from hadagraph.codegen.emit_matmul import scaled_mm_body
from hadagraph.codegen.emit_rows import quantize_rows_body
from hadagraph.codegen.emit_tiles import amax_body, matrix_names, quantize_tiles_body
from hadagraph.codegen.encode_spec import AMAX, MASK, VALUES, AnySpec, DecodeSpec, EncodeSpec
from hadagraph.codegen.primitives import SIGNATURE_DTYPES, Lines, indent
from hadagraph.codegen.spec import (
    WIDTH,
    AmaxSpec,
    BlockScaledMmSpec,
    ColumnAmaxSpec,
    ColumnPass,
    ColumnWriteSpec,
    GluonMmSpec,
    QuantizeRowsSpec,
    QuantizeTilesSpec,
    ScaledMmSpec,
)
from hadagraph.region import MATRIX, Chain

STREAMS = ("stream", "signs_stream")
"""Arguments of which every value takes the same binary."""
TRITON_SOURCE = ("triton.compiler", "ASTSource")
GLUON_SOURCE = ("triton.experimental.gluon._runtime", "GluonASTSource")


@dataclass(frozen=True)
class Kernel:
    """What a kernel's file is made of: what it does, its arguments' Triton types, its body."""

    summary: str
    arguments: tuple[tuple[str, str], ...]
    body: Lines


@lru_cache(maxsize=1024)
def emit(spec: AnySpec) -> str:
    """The source text of the kernel that the spec describes: a function of the spec alone."""
    if isinstance(spec, GluonMmSpec):
        return "\n".join([*gluon_mm(spec), "", "", *_main(spec, GLUON_SOURCE)]) + "\n"
    kernel = _KERNELS[type(spec)](spec)  # type: ignore[operator]
    options = {
        "num_warps": spec.warps,
        "num_stages": spec.stages,
        "enable_fp_fusion": False,
    }
    if isinstance(spec, QuantizeTilesSpec) and spec.maxnreg is not None:
        options["maxnreg"] = spec.maxnreg
    libdevice = any("libdevice." in line for line in kernel.body)
    lines = [
        f'"""{spec.name}: {kernel.summary}"""',
        "",
        "import triton",
        "import triton.language as tl",
        *(["from triton.language.extra import libdevice"] if libdevice else []),
        "",
        f"OPTIONS = {options}",
        "SIGNATURE = {",
        *(f'    "{name}": "{kind}",' for name, kind in kernel.arguments),
        "}",
        "",
        "",
        _decorator(kernel),
        f"def {spec.name}(",
        *(f"    {name}," for name, _ in kernel.arguments),
        "):",
        *indent(kernel.body),
        "",
        "",
        *_main(spec, TRITON_SOURCE),
    ]
    return "\n".join(lines) + "\n"


def _decorator(kernel: Kernel) -> str:
    streams = [name for name, _ in kernel.arguments if name in STREAMS]
    return f"@triton.jit(do_not_specialize={streams})" if streams else "@triton.jit"


def _main(spec: AnySpec, origin: tuple[str, str]) -> Lines:
    """`origin`: module and class of what is compiled."""
    target = spec.capability[0] * 10 + spec.capability[1]
    return [
        'if __name__ == "__main__":  # compiles without a GPU and prints the assembly',
        "    from triton.backends.compiler import GPUTarget",
        f"    from {origin[0]} import {origin[1]}",
        "",
        '    aligned = [["tt.divisibility", 16]]',
        "    arguments = enumerate(SIGNATURE.values())",
        '    attributes = {(i,): aligned for i, kind in arguments if kind == "i32" or "*" in kind}',
        f"    source = {origin[1]}({spec.name}, SIGNATURE, attrs=attributes)",
        f'    target = GPUTarget("cuda", {target}, 32)',
        '    print(triton.compile(source, target=target, options=OPTIONS).asm["ptx"])',
    ]


def _pointer(dtype: str) -> str:
    return f"*{SIGNATURE_DTYPES[dtype]}"


def _matrix_dtype(input_dtype: str) -> str:
    return "fp16" if input_dtype == "fp16" else "bf16"


def _chain_pointers(chain: Chain) -> list[tuple[str, str]]:
    return [(f"v{index}_ptr", _pointer(each.dtype)) for index, each in enumerate(chain.inputs)]


def _chain_strides(chain: Chain) -> list[tuple[str, str]]:
    matrices = [index for index, each in enumerate(chain.inputs) if each.shape == MATRIX]
    return [(f"v{index}_stride", "i32") for index in matrices]


def _quantize_rows(spec: QuantizeRowsSpec) -> Kernel:
    if spec.chain is None:
        arguments = [("x_ptr", _pointer(spec.input_dtype))]
        strides, source = [("x_stride", "i32")], "x [T, K]"
    else:
        arguments, strides = _chain_pointers(spec.chain), _chain_strides(spec.chain)
        source = "a chain's output [T, K]"
    if spec.side.block is not None:
        arguments.append(("matrix_ptr", _pointer(_matrix_dtype(spec.input_dtype))))
    arguments += [("codes_ptr", _pointer(spec.side.format)), ("scale_ptr", "*fp32")]
    if spec.value:
        arguments += [("value_ptr", _pointer(spec.input_dtype))]
    arguments += [("T", "i32"), ("K", "i32"), *strides, ("codes_stride", "i32")]
    rotated = "rotated by H, " if spec.side.block is not None else ""
    summary = f"{source} {rotated}to codes [T, K padded], one scale a row [T]."
    return Kernel(summary, tuple(arguments), quantize_rows_body(spec))


def _amax(spec: AmaxSpec) -> Kernel:
    arguments = [("x_ptr", _pointer(spec.input_dtype)), *_matrices(spec)]
    sides = [("row", spec.rows), ("column", spec.columns)]
    arguments += [(f"{name}_amax_ptr", "*i32") for name, side in sides if side is not None]
    arguments += [("T", "i32"), ("K", "i32"), ("x_stride", "i32")]
    summary = "maximum magnitudes of x [T, K], as fp32 bits, into buffers that start at 0."
    return Kernel(summary, tuple(arguments), amax_body(spec))


def _quantize_tiles(spec: QuantizeTilesSpec) -> Kernel:
    arguments = [_tile_argument("x", spec.input_dtype, spec), *_matrices(spec)]
    sides = [("row", spec.rows), ("column", spec.columns)]
    for name, side in sides:
        if side is not None:
            arguments += [
                (f"{name}_amax_ptr", "*i32"),
                _tile_argument(f"{name}_codes", side.format, spec),
                (f"{name}_scale_ptr", "*fp32"),
            ]
    arguments += [("T", "i32"), ("K", "i32")]
    if not spec.descriptors:
        arguments += [("x_stride", "i32")]
        arguments += [(f"{name}_codes_stride", "i32") for name, side in sides if side is not None]
    layouts = [name for name, side in (("[T, K]", spec.rows), ("[K, T]", spec.columns)) if side]
    summary = f"x [T, K] to codes {' and '.join(layouts)} (last dim padded), from known maxima."
    return Kernel(summary, tuple(arguments), quantize_tiles_body(spec))


def _matrices(spec: AmaxSpec | QuantizeTilesSpec) -> list[tuple[str, str]]:
    kind = _pointer(_matrix_dtype(spec.input_dtype))
    return [(f"{name}_ptr", kind) for name in dict.fromkeys(matrix_names(spec).values())]


def _tile_argument(name: str, dtype: str, spec: QuantizeTilesSpec) -> tuple[str, str]:
    if not spec.descriptors:
        return f"{name}_ptr", _pointer(dtype)
    return f"{name}_descriptor", f"tensordesc<{SIGNATURE_DTYPES[dtype]}[{WIDTH}, {WIDTH}]>"


def _column_inputs(spec: ColumnPass) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Pointers to what a column pass reads, and the strides that its source does not hold."""
    if spec.chain is None:
        pointers, strides = [("x_ptr", _pointer(spec.input_dtype))], [("x_stride", "i32")]
    else:
        pointers, strides = _chain_pointers(spec.chain), _chain_strides(spec.chain)
    return pointers, strides if spec.strides is None else []


def _column_amax(spec: ColumnAmaxSpec) -> Kernel:
    arguments, strides = _column_inputs(spec)
    for index, block in enumerate(spec.blocks):
        if block is not None:
            arguments += [(f"amax{index}_ptr", "*i32")]
    for index, written in enumerate(spec.values):
        if written:
            assert spec.chain is not None
            arguments += [(f"value{index}_ptr", _pointer(spec.chain.outputs[index].dtype))]
    arguments += [("T", "i32"), ("K", "i32"), *strides]
    source = "x [T, K]" if spec.chain is None else "a chain's outputs [T, K]"
    what = f"{source}, written"
    if any(block is not None for block in spec.blocks):
        what = f"maximum magnitudes of the columns of {source}, as fp32 bits, from 0"
    return Kernel(f"{what}.", tuple(arguments), column_amax_body(spec))


def _column_write(spec: ColumnWriteSpec) -> Kernel:
    arguments, strides = _column_inputs(spec)
    arguments += [
        ("amax_ptr", "*i32"),
        ("codes_ptr", _pointer(spec.side.format)),
        ("scale_ptr", "*fp32"),
    ]
    arguments += [("T", "i32"), ("K", "i32"), *strides, ("codes_stride", "i32")]
    source = "x [T, K]" if spec.chain is None else "a chain's output [T, K]"
    summary = f"{source} to codes [K, T padded], from known maxima of its columns."
    return Kernel(summary, tuple(arguments), column_write_body(spec))


def _scaled_mm(spec: ScaledMmSpec) -> Kernel:
    a, b = SIGNATURE_DTYPES[spec.a_format], SIGNATURE_DTYPES[spec.b_format]
    if spec.descriptors:
        arguments = [
            ("a_descriptor", f"tensordesc<{a}[{spec.block_m}, {spec.block_c}]>"),
            ("b_descriptor", f"tensordesc<{b}[{spec.block_n}, {spec.block_c}]>"),
        ]
    else:
        arguments = [("a_ptr", f"*{a}"), ("b_ptr", f"*{b}")]
    arguments += [("out_ptr", _pointer(spec.out_dtype)), ("a_scale_ptr", "*fp32")]
    arguments += [("b_scale_ptr", "*fp32")]
    if spec.bias_dtype is not None:
        arguments.append(("bias_ptr", _pointer(spec.bias_dtype)))
    arguments += [("M", "i32"), ("N", "i32"), ("C", "i32")]
    if not spec.descriptors:
        arguments += [("a_stride", "i32"), ("b_stride", "i32")]
    bias = " + bias" if spec.bias_dtype else ""
    summary = f"out [M, N] = (a [M, C] @ b [N, C]^T) * a_scale * b_scale{bias}."
    return Kernel(summary, tuple(arguments), scaled_mm_body(spec))


def _block_scaled_mm(spec: BlockScaledMmSpec) -> Kernel:
    arguments, strides = [], []
    sides = (("a", spec.a_format, spec.block_m), ("b", spec.b_format, spec.block_n))
    for name, format_name, rows in sides:
        packed = codes_a_byte(format_name)
        dtype = SIGNATURE_DTYPES[format_name] if packed == 1 else "u8"
        if spec.descriptors:
            tile = f"tensordesc<{dtype}[{rows}, {spec.block_c // packed}]>"
            arguments += [(f"{name}_descriptor", tile)]
        else:
            arguments += [(f"{name}_ptr", f"*{dtype}")]
            strides += [f"{name}_stride"]
    scale = "*u8" if spec.scale == "e8m0" else "*fp8e4nv"
    arguments += [("out_ptr", _pointer(spec.out_dtype))]
    arguments += [("a_scales_ptr", scale), ("b_scales_ptr", scale)]
    arguments += [("a_scale_ptr", "*fp32"), ("b_scale_ptr", "*fp32")]
    if spec.bias_dtype is not None:
        arguments.append(("bias_ptr", _pointer(spec.bias_dtype)))
    sizes = ["M", "N", "C", *strides, "a_scales_stride", "b_scales_stride"]
    arguments += [(name, "i32") for name in sizes]
    bias = " + bias" if spec.bias_dtype else ""
    summary = f"out [M, N] = (a [M, C] @ b [N, C]^T, block scales in it) * a_scale * b_scale{bias}."
    return Kernel(summary, tuple(arguments), block_scaled_mm_body(spec))


def _encode(spec: EncodeSpec) -> Kernel:
    arguments = [("x_ptr", _pointer(spec.input_dtype))]
    if spec.transformed:
        arguments += [("matrix_ptr", _pointer(_matrix_dtype(spec.input_dtype)))]
    if spec.draws_signs or spec.draws_rounding:
        arguments += [("seed_ptr", "*i64")]
    if spec.largest is not None:
        arguments += [("amax_ptr", "*i32")]
    sizes, what = ["R", "C", "C_padded", "C_transformed", "x_stride"], "maximum magnitudes"
    if spec.result == MASK:
        arguments, what = [*arguments, ("mask_ptr", "*u8")], "where codes are not clipped"
    elif spec.result == VALUES:
        arguments += [("out_ptr", _pointer(spec.input_dtype))]
        what = "what was rotated" if spec.encoding.rotation else "what was projected"
        what += ", taken back" if spec.inverse else ""
    elif spec.result != AMAX:
        scale = "*fp32" if spec.encoding.scale == "fp32" else "*u8"
        arguments += [("codes_ptr", "*u8"), ("scale_ptr", scale), ("tensor_scale_ptr", "*fp32")]
        what = "codes [R, C padded] and scales"
    sizes += ["stream"] * spec.draws_rounding + ["signs_stream"] * spec.draws_signs
    arguments += [(name, "i32") for name in sizes]
    source = "x [C, R]" if spec.kept_first else "x [R, C]"
    return Kernel(f"{source} to {what}.", tuple(arguments), encode_body(spec))


def _decode(spec: DecodeSpec) -> Kernel:
    arguments = [("codes_ptr", "*u8")]
    if spec.factor or spec.encoding.granularity.block is not None:
        arguments += [("scale_ptr", "*fp32" if spec.encoding.scale == "fp32" else "*u8")]
    if spec.factor:
        arguments += [("tensor_scale_ptr", "*fp32")]
    arguments += [("out_ptr", _pointer(spec.out_dtype))]
    arguments += [(name, "i32") for name in ("R", "C_padded", "size")]
    shape = "[size, R]" if spec.transposed else "[R, size]"
    summary = f"codes [R, C padded] to their values {shape}."
    return Kernel(summary, tuple(arguments), decode_body(spec))


_KERNELS = {
    QuantizeRowsSpec: _quantize_rows,
    AmaxSpec: _amax,
    QuantizeTilesSpec: _quantize_tiles,
    ScaledMmSpec: _scaled_mm,
    BlockScaledMmSpec: _block_scaled_mm,
    ColumnAmaxSpec: _column_amax,
    ColumnWriteSpec: _column_write,
    EncodeSpec: _encode,
    DecodeSpec: _decode,
}
