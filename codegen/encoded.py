"""The CUDA implementations of `encode`, `decode`, `encoded_mm` and `clip_mask`: finds the launches
that are ready for tensors of this layout, or makes them from what `choose_encode` says. What the
kernels don't take goes to the references, on the same device, with a logged reason. Never waits for
the device.

R kept indices, C contracted dim (padded in codes); M, N kept dims of a GEMM.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from hadagraph.codegen.calls import block_scaled_mm_call, launch_of, on_device, scaled_mm_call
from hadagraph.codegen.choose import DTYPE_NAMES
from hadagraph.codegen.choose_block_scaled import block_scaled_mm
from hadagraph.codegen.choose_encode import (
    DECODED_BF16,
    NATIVE_BLOCKS,
    NATIVE_CODES,
    bf16_mm,
    decode_refusal,
    encode_refusal,
    mm_route,
    select_decode,
    select_encode,
)
from hadagraph.codegen.direct import Launch, empty, zero_words
from hadagraph.codegen.encode_spec import EncodeSpec
from hadagraph.codegen.launch import capability_of, layout_of, multiplier, ready
from hadagraph.codegen.spec import Capability
from hadagraph.codegen.transforms import is_readable, matrix_of, order_of, signs_stream
from hadagraph.encode import (
    Encoded,
    block_values,
    clip_mask_reference,
    decode_reference,
    encode_reference,
    encoded_mm_reference,
    encoded_shapes,
)
from hadagraph.formats import SCALE_FORMATS, Encoding, format_named
from hadagraph.ops import LIBRARY

__all__ = ["clip_mask", "decode", "encode", "encoded_mm"]

log = logging.getLogger(__name__)
Writer = Callable[[Tensor, Tensor | None, Sequence[Tensor]], None]
"""(x, seed, outputs): fills the outputs."""
Multiplier = Callable[[Encoded, Encoded, Tensor | None], Tensor]


def encode(
    x: Tensor,
    seed: Tensor | None,
    encoding: Encoding,
    contracted_dim: int,
    stream: int,
    capability: Capability,
) -> Encoded:
    """As `encode_reference`: codes and scales of a matrix [T, K], any strides. ValueError without
    the seed that the encoding needs."""
    key = ("encode", *layout_of(x), encoding, contracted_dim, stream, capability)
    with on_device(x.device):
        run = ready(key, lambda: _encoder(x, encoding, contracted_dim, stream, capability))
        made: Encoded = run(x, _checked(seed, encoding))
    return made


def clip_mask(
    x: Tensor,
    seed: Tensor | None,
    encoding: Encoding,
    contracted_dim: int,
    capability: Capability,
) -> Tensor:
    """As `clip_mask_reference`, of a matrix [T, K] with any strides."""
    key = ("clip_mask", *layout_of(x), encoding, contracted_dim, capability)
    with on_device(x.device):
        run = ready(key, lambda: _masker(x, encoding, contracted_dim, capability))
        made: Tensor = run(x, _checked(seed, _of_mask(encoding)))
    return made


def decode(
    encoded: Encoded,
    encoding: Encoding,
    contracted_dim: int,
    size: int,
    dtype: torch.dtype,
    capability: Capability,
) -> Tensor:
    """As `decode_reference`."""
    codes, scale = encoded.codes, encoded.scale
    key = ("decode", layout_of(codes), layout_of(scale), encoding, contracted_dim, size, dtype)
    with on_device(codes.device):
        run = ready(
            (*key, capability),
            lambda: _decoder(encoded, encoding, dtype, capability, size, contracted_dim == 0, True),
        )
        values: Tensor = run(encoded)
    return values


def encoded_mm(
    a: Encoded,
    b: Encoded,
    bias: Tensor | None,
    a_encoding: Encoding,
    b_encoding: Encoding,
    out_dtype: torch.dtype,
    capability: Capability,
) -> Tensor:
    """As `encoded_mm_reference`: out [M, N] in bf16, fp16 or fp32."""
    layouts = tuple(map(layout_of, (a.codes, a.scale, b.codes, b.scale)))
    of_bias = None if bias is None else layout_of(bias)
    key = ("encoded_mm", layouts, of_bias, a_encoding, b_encoding, out_dtype, capability)
    encodings = a_encoding, b_encoding
    with on_device(a.codes.device):
        run = ready(key, lambda: _multiplier(a, b, bias, encodings, out_dtype, capability))
        out: Tensor = run(a, b, bias)
    return out


# ------------------------------------------------------------------ codes and masks


def _encoder(
    x: Tensor, encoding: Encoding, contracted_dim: int, stream: int, capability: Capability
) -> Callable[[Tensor, Tensor | None], Encoded]:
    """(x, seed) -> codes and scales, for every x that lies so."""
    if _left_to_reference(x, encoding):
        return lambda x, seed: encode_reference(x, encoding, contracted_dim, seed, stream)
    adapt = _adaptation(x)
    if adapt is not None:
        return lambda x, seed: encode(adapt(x), seed, encoding, contracted_dim, stream, capability)
    device, R, C = x.device, x.shape[1 - contracted_dim], x.shape[contracted_dim]
    write = _writer(x, encoding, contracted_dim, stream, capability, mask=False)
    codes_shape, scale_shape = encoded_shapes(R, C, encoding)
    codes_dtype = format_named(encoding.format).dtype
    bytewise = SCALE_FORMATS[encoding.scale].name != "fp32"
    scale_dtype = torch.uint8 if bytewise else torch.float32

    def run(x: Tensor, seed: Tensor | None) -> Encoded:
        codes = empty(codes_shape, torch.uint8, device)
        scale = empty(scale_shape, scale_dtype, device)
        tensor_scale = empty((1,), torch.float32, device)
        write(x, seed, (codes, scale, tensor_scale))
        return Encoded(codes.view(codes_dtype), scale, tensor_scale)

    return run


def _masker(
    x: Tensor, encoding: Encoding, contracted_dim: int, capability: Capability
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """(x, seed) -> clip mask, for every x that lies so."""
    if _left_to_reference(x, encoding):
        return lambda x, seed: clip_mask_reference(x, encoding, contracted_dim, seed)
    adapt = _adaptation(x)
    if adapt is not None:
        return lambda x, seed: clip_mask(adapt(x), seed, encoding, contracted_dim, capability)
    device, R = x.device, x.shape[1 - contracted_dim]
    size = encoding.transformed_size(x.shape[contracted_dim])
    shape = (size, R) if contracted_dim == 0 else (R, size)
    write = _writer(x, encoding, contracted_dim, 0, capability, mask=True)

    def run(x: Tensor, seed: Tensor | None) -> Tensor:
        mask = empty(shape, torch.uint8, device)
        write(x, seed, (mask,))
        return mask.view(torch.bool)

    return run


def _left_to_reference(x: Tensor, encoding: Encoding) -> bool:
    """Whether the kernels don't take it: logged, but for empty tensors."""
    reason = encode_refusal(encoding)
    if reason is not None:
        _log_once(str(encoding), reason)
    return reason is not None or x.numel() == 0


@cache
def _log_once(encoding: str, reason: str) -> None:
    log.info("%s: by torch's operators, not by an emitted kernel: %s", encoding, reason)


def _adaptation(x: Tensor) -> Callable[[Tensor], Tensor] | None:
    """What makes of x a tensor that the kernels read; None if they read x."""
    if x.dtype not in DTYPE_NAMES:
        return Tensor.float
    return None if is_readable(x) else Tensor.contiguous


def _writer(
    x: Tensor,
    encoding: Encoding,
    contracted_dim: int,
    stream: int,
    capability: Capability,
    *,
    mask: bool,
) -> Writer:
    """The pass that writes, after the one for maxima where that is needed."""
    R, C = x.shape[1 - contracted_dim], x.shape[contracted_dim]
    kept_first, stride = order_of(x, contracted_dim)
    plan = select_encode(
        DTYPE_NAMES[x.dtype],
        encoding,
        capability,
        kept_first=kept_first,
        mask=mask,
        kept_last=contracted_dim == 0,
    )
    padded, device = encoding.contracted_size(C), x.device
    sizes = (R, C, padded, encoding.transformed_size(C), stride)

    def pass_of(spec: EncodeSpec) -> tuple[Launch, tuple[Tensor, ...]]:
        grid = (-(-R // spec.rows) * -(-padded // spec.span),)
        streams = (stream,) if spec.draws_rounding else ()
        if spec.draws_signs:
            streams = (*streams, signs_stream(encoding))
        launch = launch_of(spec, grid, sizes, streams)
        return launch, matrix_of(spec, encoding, x.dtype, device)

    passes = [(spec, *pass_of(spec)) for spec in plan.specs]
    largest = plan.write.largest
    words = {None: 0, "tensor": 1, "kept": R}[largest]

    def run(x: Tensor, seed: Tensor | None, outputs: Sequence[Tensor]) -> None:
        maxima = () if largest is None else (zero_words(words, device),)
        for spec, launch, matrix in passes:
            drawn = spec.draws_signs or spec.draws_rounding
            seeds = () if seed is None or not drawn else (seed,)
            written = outputs if spec is plan.write else ()
            launch(x, *matrix, *seeds, *maxima, *written)

    return run


def _checked(seed: Tensor | None, encoding: Encoding) -> Tensor | None:
    if seed is None and encoding.needs_seed:
        raise ValueError(f"encoding {encoding} draws random numbers and needs a seed")
    return seed


def _of_mask(encoding: Encoding) -> Encoding:
    """The encoding as far as its clip mask depends on it, which rounding does not change."""
    return replace(encoding, rounding="nearest")


# ------------------------------------------------------------------ values and products


def _decoder(
    encoded: Encoded,
    encoding: Encoding,
    dtype: torch.dtype,
    capability: Capability,
    size: int,
    transposed: bool = False,
    factor: bool = False,
) -> Callable[[Encoded], Tensor]:
    """Codes -> what they stand for, [R, size] or `transposed`; `factor`: times the scales that a
    GEMM's epilogue multiplies otherwise."""
    if dtype not in (*DTYPE_NAMES, torch.int8):
        wide = _decoder(encoded, encoding, torch.float32, capability, size, transposed, factor)
        return lambda encoded: wide(encoded).to(dtype)
    reason = decode_refusal(encoding)
    if reason is not None:
        _log_once(str(encoding), reason)
        return lambda encoded: _decoded_by_reference(
            encoded, encoding, dtype, size, transposed, factor
        )
    codes, device = encoded.codes, encoded.codes.device
    R, padded = codes.shape[0], _contracted(codes, encoding)
    shape = (size, R) if transposed else (R, size)
    if R == 0 or size == 0:
        return lambda encoded: empty(shape, dtype, device)
    name = "int8" if dtype == torch.int8 else DTYPE_NAMES[dtype]
    spec = select_decode(encoding, name, capability, factor=factor, transposed=transposed)
    tiles = -(-padded // (spec.group * spec.groups))
    launch = launch_of(spec, (-(-R // spec.rows) * tiles,), (R, padded, size))
    blocks = encoding.granularity.block is not None

    def run(encoded: Encoded) -> Tensor:
        out = empty(shape, dtype, device)
        tensors = [encoded.codes.contiguous().view(torch.uint8)]
        tensors += [encoded.scale.contiguous()] if blocks or factor else []
        tensors += [encoded.tensor_scale] if factor else []
        launch(*tensors, out)
        return out

    return run


def _decoded_by_reference(
    encoded: Encoded,
    encoding: Encoding,
    dtype: torch.dtype,
    size: int,
    transposed: bool,
    factor: bool,
) -> Tensor:
    if factor:
        return decode_reference(encoded, encoding, 0 if transposed else 1, size, dtype)
    return block_values(encoded, encoding)[:, :size].to(dtype).contiguous()


def _contracted(codes: Tensor, encoding: Encoding) -> int:
    """Codes of a row, which packed ones share bytes."""
    return codes.shape[1] * 8 // format_named(encoding.format).bits


def _common_size(a: Encoded, b: Encoded, encodings: tuple[Encoding, Encoding]) -> int:
    """The contracted dim of both: formats may differ in how far they are padded with zeros."""
    return min(_contracted(x.codes, e) for x, e in zip((a, b), encodings, strict=True))


def _multiplier(
    a: Encoded,
    b: Encoded,
    bias: Tensor | None,
    encodings: tuple[Encoding, Encoding],
    out_dtype: torch.dtype,
    capability: Capability,
) -> Multiplier:
    """(a, b, bias) -> out [M, N], for operands laid out as these."""
    if out_dtype not in DTYPE_NAMES:
        raise ValueError(f"out_dtype must be one of {list(DTYPE_NAMES)}, got {out_dtype}")
    if 0 in (a.codes.shape[0], b.codes.shape[0], _common_size(a, b, encodings)):
        return lambda a, b, bias: encoded_mm_reference(a, b, bias, *encodings, out_dtype)
    route = mm_route(*encodings, capability)
    if route == NATIVE_CODES:
        return _multiplier_of_codes(a, b, bias, encodings, out_dtype, capability)
    if route == NATIVE_BLOCKS:
        return _multiplier_of_blocks(a, b, bias, encodings, out_dtype, capability)
    if route == DECODED_BF16:
        return _multiplier_of_values(a, b, bias, encodings, out_dtype, capability)
    _log_once(
        f"{encodings[0]} times {encodings[1]}",
        "bf16 does not hold codes times block scales, which are multiplied in fp64",
    )
    return _multiplier_in_fp64(a, b, encodings, out_dtype, capability)


def _multiplier_of_codes(
    a: Encoded,
    b: Encoded,
    bias: Tensor | None,
    encodings: tuple[Encoding, Encoding],
    out_dtype: torch.dtype,
    capability: Capability,
) -> Multiplier:
    """By the 8-bit kernels. Without block scales the tensor's scale is 1."""
    size = _common_size(a, b, encodings)
    widened = [_widener(x, e, capability, size) for x, e in zip((a, b), encodings, strict=True)]
    alike = [
        x.codes.new_empty((len(x.codes), size), dtype=torch.int8)
        if format_named(encoding.format).is_packed
        else x.codes[:, :size]
        for x, encoding in zip((a, b), encodings, strict=True)
    ]
    operands = (alike[0], alike[1], a.scale, b.scale, bias)
    multiply = multiplier(operands, out_dtype, capability)

    def run(a: Encoded, b: Encoded, bias: Tensor | None) -> Tensor:
        return multiply(widened[0](a), widened[1](b), a.scale, b.scale, bias)

    return run


def _widener(
    encoded: Encoded, encoding: Encoding, capability: Capability, size: int
) -> Callable[[Encoded], Tensor]:
    """Codes of 8 bits, [R, size], of these."""
    if not format_named(encoding.format).is_packed:
        return lambda encoded: encoded.codes[:, :size]
    return _decoder(encoded, encoding, torch.int8, capability, size)


def _multiplier_of_blocks(
    a: Encoded,
    b: Encoded,
    bias: Tensor | None,
    encodings: tuple[Encoding, Encoding],
    out_dtype: torch.dtype,
    capability: Capability,
) -> Multiplier:
    """By block-scaled matrix instructions, codes and scales as they lie."""
    size = _common_size(a, b, encodings)
    bias_dtype = None if bias is None else DTYPE_NAMES.get(bias.dtype, "fp32")
    sizes, out_name = (len(a.codes), len(b.codes), size), DTYPE_NAMES[out_dtype]
    spec = block_scaled_mm(sizes, *encodings, bias_dtype, out_name, capability)
    multiply = block_scaled_mm_call(spec, _dense(a), _dense(b), size, out_dtype)

    def run(a: Encoded, b: Encoded, bias: Tensor | None) -> Tensor:
        if bias is not None:
            bias = (bias if bias.dtype in DTYPE_NAMES else bias.float()).contiguous()
        return multiply(_dense(a), _dense(b), bias)

    return run


def _dense(encoded: Encoded) -> Encoded:
    return Encoded(encoded.codes.contiguous(), encoded.scale.contiguous(), encoded.tensor_scale)


def _multiplier_of_values(
    a: Encoded,
    b: Encoded,
    bias: Tensor | None,
    encodings: tuple[Encoding, Encoding],
    out_dtype: torch.dtype,
    capability: Capability,
) -> Multiplier:
    """Codes times block scales in bf16, which is exact, then a GEMM that scales on the way out."""
    size = _common_size(a, b, encodings)
    decoders = [
        _decoder(x, encoding, torch.bfloat16, capability, size)
        for x, encoding in zip((a, b), encodings, strict=True)
    ]
    per_tensor = tuple(
        _factor(x, encoding).numel() == 1 for x, encoding in zip((a, b), encodings, strict=True)
    )
    spec = bf16_mm(
        (a.codes.shape[0], b.codes.shape[0], size),
        per_tensor,  # type: ignore[arg-type]
        None if bias is None else DTYPE_NAMES.get(bias.dtype, "fp32"),
        DTYPE_NAMES[out_dtype],
        capability,
    )
    left, right = (x.codes.new_empty((len(x.codes), size), dtype=torch.bfloat16) for x in (a, b))
    multiply = scaled_mm_call(spec, left, right, out_dtype)

    def run(a: Encoded, b: Encoded, bias: Tensor | None) -> Tensor:
        if bias is not None:
            bias = (bias if bias.dtype in DTYPE_NAMES else bias.float()).contiguous()
        factors = _factor(a, encodings[0]), _factor(b, encodings[1])
        return multiply(decoders[0](a), decoders[1](b), *factors, bias)

    return run


def _factor(encoded: Encoded, encoding: Encoding) -> Tensor:
    """As `epilogue_scale`: without block scales the tensor's scale is 1."""
    blocks = encoding.granularity.block is not None
    return encoded.tensor_scale if blocks else encoded.scale.contiguous()


def _multiplier_in_fp64(
    a: Encoded,
    b: Encoded,
    encodings: tuple[Encoding, Encoding],
    out_dtype: torch.dtype,
    capability: Capability,
) -> Multiplier:
    """Of values that bf16 does not hold; fp32 matmuls would be rounded to TF32 where the user
    allows that."""
    size = _common_size(a, b, encodings)
    decoders = [
        _decoder(x, encoding, torch.float32, capability, size)
        for x, encoding in zip((a, b), encodings, strict=True)
    ]

    def run(a: Encoded, b: Encoded, bias: Tensor | None) -> Tensor:
        out = (decoders[0](a).double() @ decoders[1](b).double().t()).float()
        out = out * _factor(a, encodings[0])[:, None] * _factor(b, encodings[1])[None, :]
        return (out if bias is None else out + bias.float()).to(out_dtype)

    return run


# ------------------------------------------------------------------ operators


def ready_encode(
    x: Tensor,
    seed: Tensor | None,
    encoding: str,
    contracted_dim: int,
    stream: int,
    capability: Capability,
) -> Callable[[Tensor, Tensor | None], Encoded]:
    """What the operator `encode` runs for tensors laid out as these."""
    parsed = Encoding.parse(encoding)
    _checked(seed, parsed)
    return _encoder(x, parsed, contracted_dim, stream, capability)


def ready_clip_mask(
    x: Tensor, seed: Tensor | None, encoding: str, contracted_dim: int, capability: Capability
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """What the operator `clip_mask` runs for tensors laid out as these."""
    parsed = Encoding.parse(encoding)
    _checked(seed, _of_mask(parsed))
    return _masker(x, parsed, contracted_dim, capability)


def ready_decode(
    codes: Tensor,
    scale: Tensor,
    tensor_scale: Tensor,
    encoding: str,
    contracted_dim: int,
    size: int,
    dtype: torch.dtype,
    capability: Capability,
) -> Callable[[Encoded], Tensor]:
    """What the operator `decode` runs for tensors laid out as these."""
    encoded = Encoded(codes, scale, tensor_scale)
    transposed = contracted_dim == 0
    return _decoder(
        encoded, Encoding.parse(encoding), dtype, capability, size, transposed, factor=True
    )


def ready_encoded_mm(
    a: Tensor,
    a_scale: Tensor,
    a_tensor_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_tensor_scale: Tensor,
    bias: Tensor | None,
    a_encoding: str,
    b_encoding: str,
    out_dtype: torch.dtype,
    capability: Capability,
) -> Multiplier:
    """What the operator `encoded_mm` runs for tensors laid out as these."""
    return _multiplier(
        Encoded(a, a_scale, a_tensor_scale),
        Encoded(b, b_scale, b_tensor_scale),
        bias,
        (Encoding.parse(a_encoding), Encoding.parse(b_encoding)),
        out_dtype,
        capability,
    )


def _encode_cuda(
    x: Tensor, seed: Tensor | None, encoding: str, contracted_dim: int, stream: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`encode`, found by the encoding's text: an operator call parses nothing."""
    key = ("encode", *layout_of(x), seed is None, encoding, contracted_dim, stream)
    target = capability_of(x.device)
    with on_device(x.device):
        run = ready(key, lambda: ready_encode(x, seed, encoding, contracted_dim, stream, target))
        made: Encoded = run(x, seed)
    return made.codes, made.scale, made.tensor_scale


def _clip_mask_cuda(x: Tensor, seed: Tensor | None, encoding: str, contracted_dim: int) -> Tensor:
    key = ("clip_mask", *layout_of(x), seed is None, encoding, contracted_dim)
    target = capability_of(x.device)
    with on_device(x.device):
        run = ready(key, lambda: ready_clip_mask(x, seed, encoding, contracted_dim, target))
        mask: Tensor = run(x, seed)
    return mask


def _decode_cuda(
    codes: Tensor,
    scale: Tensor,
    tensor_scale: Tensor,
    encoding: str,
    contracted_dim: int,
    size: int,
    dtype: torch.dtype,
) -> Tensor:
    key = ("decode", layout_of(codes), layout_of(scale), encoding, contracted_dim, size, dtype)
    arguments = (codes, scale, tensor_scale, encoding, contracted_dim, size, dtype)
    target = capability_of(codes.device)
    with on_device(codes.device):
        run = ready(key, lambda: ready_decode(*arguments, target))
        values: Tensor = run(Encoded(codes, scale, tensor_scale))
    return values


def _encoded_mm_cuda(
    a: Tensor,
    a_scale: Tensor,
    a_tensor_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_tensor_scale: Tensor,
    bias: Tensor | None,
    a_encoding: str,
    b_encoding: str,
    out_dtype: torch.dtype,
) -> Tensor:
    layouts = tuple(map(layout_of, (a, a_scale, b, b_scale)))
    of_bias = None if bias is None else layout_of(bias)
    key = ("encoded_mm", layouts, of_bias, a_encoding, b_encoding, out_dtype)
    left, right = (a, a_scale, a_tensor_scale), (b, b_scale, b_tensor_scale)
    target = capability_of(a.device)
    with on_device(a.device):
        run = ready(
            key,
            lambda: ready_encoded_mm(
                *left, *right, bias, a_encoding, b_encoding, out_dtype, target
            ),
        )
        out: Tensor = run(Encoded(*left), Encoded(*right), bias)
    return out


LIBRARY.impl("encode", _encode_cuda, "CUDA")
LIBRARY.impl("clip_mask", _clip_mask_cuda, "CUDA")
LIBRARY.impl("decode", _decode_cuda, "CUDA")
LIBRARY.impl("encoded_mm", _encoded_mm_cuda, "CUDA")
