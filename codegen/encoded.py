"""The CUDA implementations of `encode`, `clip_mask` and `decode`: finds the launches that are ready
for tensors of this layout, or makes them from what `choose_encode` says. What the kernels don't
take goes to the references, on the same device, with a logged reason. Never waits for the device.

R kept indices, C contracted dim (padded in codes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hadagraph.codegen.calls import launch_of
from hadagraph.codegen.choose import DTYPE_NAMES
from hadagraph.codegen.choose_encode import (
    decode_refusal,
    encode_refusal,
    select_decode,
    select_encode,
)
from hadagraph.codegen.direct import Launch, empty, zero_words
from hadagraph.codegen.encode_spec import EncodeSpec
from hadagraph.codegen.launch import layout_of, log_refusal, run_ready
from hadagraph.codegen.spec import Capability
from hadagraph.codegen.transforms import (
    is_readable,
    matrix_of,
    order_of,
    signs_stream,
)
from hadagraph.encode import (
    Encoded,
    block_values,
    clip_mask_reference,
    decode_reference,
    encode_reference,
    encoded_shapes,
)
from hadagraph.formats import SCALE_FORMATS, Encoding, format_named
from hadagraph.ops import LIBRARY
from hadagraph.philox import check_stream

Codes = tuple[Tensor, Tensor, Tensor]
"""As `Encoded.tensors`."""
Writer = Callable[[Tensor, Tensor | None, Sequence[Tensor]], None]
"""(x, seed, outputs): fills the outputs."""


# ------------------------------------------------------------------ codes and masks


def ready_encode(
    capability: Capability,
    x: Tensor,
    seed: Tensor | None,
    encoding: str,
    contracted_dim: int,
    stream: int,
) -> Callable[[Tensor, Tensor | None], Codes]:
    """(x, seed) -> codes and scales: what the operator `encode` runs for tensors laid out as these.
    ValueError without the seed that the encoding needs."""
    parsed = Encoding.parse(encoding)
    _check_seed(seed, parsed)
    if _left_to_reference(x, parsed):
        return lambda x, seed: encode_reference(x, parsed, contracted_dim, seed, stream).tensors
    adapt = _adaptation(x)
    if adapt is not None:
        again = ready_encode(capability, adapt(x), seed, encoding, contracted_dim, stream)
        return lambda x, seed: again(adapt(x), seed)
    device, R, C = x.device, x.shape[1 - contracted_dim], x.shape[contracted_dim]
    write = _writer(x, parsed, contracted_dim, stream, capability, mask=False)
    codes_shape, scale_shape = encoded_shapes(R, C, parsed)
    codes_dtype = format_named(parsed.format).dtype
    bytewise = SCALE_FORMATS[parsed.scale].name != "fp32"
    scale_dtype = torch.uint8 if bytewise else torch.float32

    def run(x: Tensor, seed: Tensor | None) -> Codes:
        codes = empty(codes_shape, torch.uint8, device)
        scale = empty(scale_shape, scale_dtype, device)
        tensor_scale = empty((1,), torch.float32, device)
        write(x, seed, (codes, scale, tensor_scale))
        return codes.view(codes_dtype), scale, tensor_scale

    return run


def ready_clip_mask(
    capability: Capability, x: Tensor, seed: Tensor | None, encoding: str, contracted_dim: int
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """(x, seed) -> clip mask: what the operator `clip_mask` runs for tensors laid out as these.
    ValueError without the seed of signs that are drawn."""
    parsed = Encoding.parse(encoding)
    _check_seed(seed, replace(parsed, rounding="nearest"))  # which no mask depends on
    if _left_to_reference(x, parsed):
        return lambda x, seed: clip_mask_reference(x, parsed, contracted_dim, seed)
    adapt = _adaptation(x)
    if adapt is not None:
        again = ready_clip_mask(capability, adapt(x), seed, encoding, contracted_dim)
        return lambda x, seed: again(adapt(x), seed)
    device, R = x.device, x.shape[1 - contracted_dim]
    size = parsed.transformed_size(x.shape[contracted_dim])
    shape = (size, R) if contracted_dim == 0 else (R, size)
    write = _writer(x, parsed, contracted_dim, 0, capability, mask=True)

    def run(x: Tensor, seed: Tensor | None) -> Tensor:
        mask = empty(shape, torch.uint8, device)
        write(x, seed, (mask,))
        return mask.view(torch.bool)

    return run


def _check_seed(seed: Tensor | None, encoding: Encoding) -> None:
    if seed is None and encoding.needs_seed:
        raise ValueError(f"encoding {encoding} draws random numbers and needs a seed")


def _left_to_reference(x: Tensor, encoding: Encoding) -> bool:
    """Whether the kernels don't take it: logged, but for empty tensors."""
    reason = encode_refusal(encoding)
    if reason is not None:
        log_refusal(str(encoding), reason)
    return reason is not None or x.numel() == 0


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
        check_stream(stream)
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


# ------------------------------------------------------------------ values


def ready_decode(
    capability: Capability,
    codes: Tensor,
    scale: Tensor,
    tensor_scale: Tensor,
    encoding: str,
    contracted_dim: int,
    size: int,
    dtype: torch.dtype,
) -> Callable[..., Tensor]:
    """(codes, scale, tensor_scale) -> the matrix: what the operator `decode` runs for tensors laid
    out as these."""
    encoded, parsed = Encoded(codes, scale, tensor_scale), Encoding.parse(encoding)
    run = decoder(encoded, parsed, dtype, capability, size, contracted_dim == 0, factor=True)
    return lambda *tensors: run(Encoded(*tensors))


def decoder(
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
        wide = decoder(encoded, encoding, torch.float32, capability, size, transposed, factor)
        return lambda encoded: wide(encoded).to(dtype)
    reason = decode_refusal(encoding)
    if reason is not None:
        log_refusal(str(encoding), reason)
        return lambda encoded: _decoded_by_reference(
            encoded, encoding, dtype, size, transposed, factor
        )
    codes, device = encoded.codes, encoded.codes.device
    R, padded = codes.shape[0], contracted_size(codes, encoding)
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


def contracted_size(codes: Tensor, encoding: Encoding) -> int:
    """Codes of a row, which packed ones share bytes."""
    return codes.shape[1] * 8 // format_named(encoding.format).bits


# ------------------------------------------------------------------ operators


def _encode_cuda(x: Tensor, seed: Tensor | None, *values: Any) -> Codes:
    key = ("encode", *layout_of(x), seed is None, *values)
    return run_ready(key, ready_encode, (x, seed, *values), (x, seed))


def _clip_mask_cuda(x: Tensor, seed: Tensor | None, *values: Any) -> Tensor:
    key = ("clip_mask", *layout_of(x), seed is None, *values)
    return run_ready(key, ready_clip_mask, (x, seed, *values), (x, seed))


def _decode_cuda(codes: Tensor, scale: Tensor, tensor_scale: Tensor, *values: Any) -> Tensor:
    key = ("decode", layout_of(codes), layout_of(scale), *values)
    tensors = (codes, scale, tensor_scale)
    return run_ready(key, ready_decode, (*tensors, *values), tensors)


LIBRARY.impl("encode", _encode_cuda, "CUDA")
LIBRARY.impl("clip_mask", _clip_mask_cuda, "CUDA")
LIBRARY.impl("decode", _decode_cuda, "CUDA")
