"""The CUDA implementation of `encoded_mm`: by the 8-bit kernels, by block-scaled matrix
instructions, or of decoded operands, as `choose_encode.mm_route` says; made ready once per layout.

M, N kept dims of a GEMM, R one of them; C contracted dim (padded in codes).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hadagraph.codegen.calls import block_scaled_mm_call, readable_bias, scaled_mm_call
from hadagraph.codegen.choose import DTYPE_NAMES
from hadagraph.codegen.choose_block_scaled import block_scaled_mm
from hadagraph.codegen.choose_encode import (
    DECODED_BF16,
    NATIVE_BLOCKS,
    NATIVE_CODES,
    bf16_mm,
    mm_route,
)
from hadagraph.codegen.encoded import contracted_size, decoder
from hadagraph.codegen.launch import layout_of, log_refusal, multiplier, run_ready
from hadagraph.codegen.spec import Capability
from hadagraph.encode import Encoded, encoded_mm_reference
from hadagraph.formats import Encoding, format_named
from hadagraph.ops import LIBRARY

Multiplier = Callable[[Encoded, Encoded, Tensor | None], Tensor]
TENSORS = 7
"""Leading arguments of `encoded_mm` that are tensors, or the bias."""


@dataclass(frozen=True)
class Product:
    """A call of `encoded_mm`, as far as what is made ready depends on it. Nothing that is kept may
    hold one: it would keep the operands' memory."""

    operands: tuple[Encoded, Encoded]
    bias: Tensor | None
    encodings: tuple[Encoding, Encoding]
    out_dtype: torch.dtype
    capability: Capability

    @property
    def sides(self) -> tuple[tuple[Encoded, Encoding], ...]:
        return tuple(zip(self.operands, self.encodings, strict=True))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, N, C; formats may differ in how far they are padded with zeros along C."""
        M, N = (len(x.codes) for x in self.operands)
        return M, N, min(contracted_size(x.codes, encoding) for x, encoding in self.sides)

    @property
    def bias_dtype(self) -> str | None:
        return None if self.bias is None else DTYPE_NAMES.get(self.bias.dtype, "fp32")

    def decoders(self, dtype: torch.dtype) -> list[Callable[[Encoded], Tensor]]:
        """Codes -> what they stand for without the epilogue's scales, [R, C], of each side."""
        size = self.sizes[2]
        return [decoder(x, encoding, dtype, self.capability, size) for x, encoding in self.sides]


def ready_encoded_mm(capability: Capability, *arguments: Any) -> Callable[..., Tensor]:
    """What the operator `encoded_mm` runs for `arguments` laid out as these: its tensors and bias
    -> out [M, N] in bf16, fp16 or fp32."""
    tensors, (a_encoding, b_encoding, out_dtype) = arguments[:TENSORS], arguments[TENSORS:]
    if out_dtype not in DTYPE_NAMES:
        raise ValueError(f"out_dtype must be one of {list(DTYPE_NAMES)}, got {out_dtype}")
    a, b, bias = _operands(tensors)
    encodings = Encoding.parse(a_encoding), Encoding.parse(b_encoding)
    run = _multiplier(Product((a, b), bias, encodings, out_dtype, capability))
    return lambda *tensors: run(*_operands(tensors))


def _operands(tensors: tuple[Any, ...]) -> tuple[Encoded, Encoded, Tensor | None]:
    return Encoded(*tensors[:3]), Encoded(*tensors[3:6]), tensors[6]


def _multiplier(product: Product) -> Multiplier:
    """(a, b, bias) -> out [M, N], for operands laid out as these."""
    encodings, out_dtype = product.encodings, product.out_dtype
    if 0 in product.sizes:
        return lambda a, b, bias: encoded_mm_reference(a, b, bias, *encodings, out_dtype)
    route = mm_route(*encodings, product.capability)
    if route == NATIVE_CODES:
        return _multiplier_of_codes(product)
    if route == NATIVE_BLOCKS:
        return _multiplier_of_blocks(product)
    if route == DECODED_BF16:
        return _multiplier_of_values(product)
    log_refusal(
        f"{encodings[0]} times {encodings[1]}",
        "bf16 does not hold codes times block scales, which are multiplied in fp64",
    )
    return _multiplier_in_fp64(product)


def _multiplier_of_codes(product: Product) -> Multiplier:
    """By the 8-bit kernels. Without block scales the tensor's scale is 1."""
    size, capability = product.sizes[2], product.capability
    widen_a, widen_b = (_widener(x, e, capability, size) for x, e in product.sides)
    left, right = (
        x.codes.new_empty((len(x.codes), size), dtype=torch.int8)
        if format_named(encoding.format).is_packed
        else x.codes[:, :size]
        for x, encoding in product.sides
    )
    a, b = product.operands
    operands = (left, right, a.scale, b.scale, product.bias)
    multiply = multiplier(operands, product.out_dtype, capability)

    def run(a: Encoded, b: Encoded, bias: Tensor | None) -> Tensor:
        return multiply(widen_a(a), widen_b(b), a.scale, b.scale, bias)

    return run


def _widener(
    encoded: Encoded, encoding: Encoding, capability: Capability, size: int
) -> Callable[[Encoded], Tensor]:
    """Codes of 8 bits, [R, size], of these."""
    if not format_named(encoding.format).is_packed:
        return lambda encoded: encoded.codes[:, :size]
    return decoder(encoded, encoding, torch.int8, capability, size)


def _multiplier_of_blocks(product: Product) -> Multiplier:
    """By block-scaled matrix instructions, codes and scales as they lie."""
    sizes, out_dtype = product.sizes, product.out_dtype
    out_name = DTYPE_NAMES[out_dtype]
    spec = block_scaled_mm(
        sizes, *product.encodings, product.bias_dtype, out_name, product.capability
    )
    left, right = (_dense(x) for x in product.operands)
    multiply = block_scaled_mm_call(spec, left, right, sizes[2], out_dtype)

    def run(a: Encoded, b: Encoded, bias: Tensor | None) -> Tensor:
        return multiply(_dense(a), _dense(b), readable_bias(bias))

    return run


def _dense(encoded: Encoded) -> Encoded:
    return Encoded(encoded.codes.contiguous(), encoded.scale.contiguous(), encoded.tensor_scale)


def _multiplier_of_values(product: Product) -> Multiplier:
    """Codes times block scales in bf16, which is exact, then a GEMM that scales on the way out."""
    sizes, out_dtype, (a_encoding, b_encoding) = product.sizes, product.out_dtype, product.encodings
    decode_a, decode_b = product.decoders(torch.bfloat16)
    a, b = product.operands
    per_tensor = _factor(a, a_encoding).numel() == 1, _factor(b, b_encoding).numel() == 1
    out_name = DTYPE_NAMES[out_dtype]
    spec = bf16_mm(sizes, per_tensor, product.bias_dtype, out_name, product.capability)
    left, right = (
        x.codes.new_empty((len(x.codes), sizes[2]), dtype=torch.bfloat16) for x in (a, b)
    )
    multiply = scaled_mm_call(spec, left, right, out_dtype)

    def run(a: Encoded, b: Encoded, bias: Tensor | None) -> Tensor:
        factors = _factor(a, a_encoding), _factor(b, b_encoding)
        return multiply(decode_a(a), decode_b(b), *factors, readable_bias(bias))

    return run


def _factor(encoded: Encoded, encoding: Encoding) -> Tensor:
    """As `epilogue_scale`: without block scales the tensor's scale is 1."""
    blocks = encoding.granularity.block is not None
    return encoded.tensor_scale if blocks else encoded.scale.contiguous()


def _multiplier_in_fp64(product: Product) -> Multiplier:
    """Of values that bf16 does not hold; fp32 matmuls would be rounded to TF32 where the user
    allows that."""
    out_dtype, (a_encoding, b_encoding) = product.out_dtype, product.encodings
    decode_a, decode_b = product.decoders(torch.float32)

    def run(a: Encoded, b: Encoded, bias: Tensor | None) -> Tensor:
        out = (decode_a(a).double() @ decode_b(b).double().t()).float()
        out = out * _factor(a, a_encoding)[:, None] * _factor(b, b_encoding)[None, :]
        return (out if bias is None else out + bias.float()).to(out_dtype)

    return run


def _encoded_mm_cuda(*arguments: Any) -> Any:
    tensors, values = arguments[:TENSORS], arguments[TENSORS:]
    a, a_scale, _, b, b_scale, _, bias = tensors
    layouts = tuple(map(layout_of, (a, a_scale, b, b_scale)))
    of_bias = None if bias is None else layout_of(bias)
    key = ("encoded_mm", layouts, of_bias, *values)
    return run_ready(key, ready_encoded_mm, arguments, tensors)


LIBRARY.impl("encoded_mm", _encoded_mm_cuda, "CUDA")
