"""Shapes and dtypes of what hadagraph's operators return: what they do with fake tensors. Computes
no values. The schemas, which name the arguments, are in `hadagraph.ops`.

M, N kept dims and C contracted dim of a GEMM, all possibly symbolic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hadagraph.compat import fake_empty
from hadagraph.encode import encoded_shapes
from hadagraph.formats import PER_TENSOR, SCALE_FORMATS, Encoding, format_named
from hadagraph.reference import CHAIN_DTYPES
from hadagraph.region import COLUMNS, MATRIX, ROWS, SCALAR, Chain
from hadagraph.rotation import Rotation, padded_size


def _gemm(lhs: Tensor, rhs: Tensor, *_: Any) -> Tensor:
    torch._check(lhs.shape[1] == rhs.shape[1], lambda: "gemm: contracted dims differ")
    return fake_empty(lhs, (lhs.shape[0], rhs.shape[0]), lhs.dtype)


def _resized(x: Tensor, dim: int, size: int, dtype: torch.dtype | None = None) -> Tensor:
    """Like x, but for the size of one dim."""
    shape = list(x.shape)
    shape[dim] = size
    return fake_empty(x, tuple(shape), dtype or x.dtype)


def _rotate(x: Tensor, dim: int, rotation: str, *_: Any) -> Tensor:
    return _resized(x, dim, padded_size(x.shape[dim], Rotation.parse(rotation).block))


def _unrotate(x: Tensor, dim: int, rotation: str, size: int, *_: Any) -> Tensor:
    return _resized(x, dim, size)


def _project(x: Tensor, dim: int, kept: int, block: int) -> Tensor:
    return _resized(x, dim, padded_size(x.shape[dim], block) // block * kept)


def _unproject(x: Tensor, dim: int, kept: int, block: int, size: int) -> Tensor:
    return _resized(x, dim, size)


def _next_seed(device: torch.device) -> Tensor:
    return torch.empty(1, dtype=torch.int64, device=device)


def _encode(
    x: Tensor, seed: Tensor | None, encoding: str, contracted_dim: int, stream: int
) -> tuple[Tensor, Tensor, Tensor]:
    parsed = Encoding.parse(encoding)
    kept, contracted = x.shape[1 - contracted_dim], x.shape[contracted_dim]
    codes, scales = encoded_shapes(kept, contracted, parsed)
    plain = SCALE_FORMATS[parsed.scale].name == "fp32"
    return (
        fake_empty(x, codes, format_named(parsed.format).dtype),
        fake_empty(x, scales, torch.float32 if plain else torch.uint8),
        fake_empty(x, (1,), torch.float32),
    )


def _decode(codes: Tensor, *rest: Any) -> Tensor:
    contracted_dim, size, dtype = rest[-3:]
    shape = (codes.shape[0], size)
    return fake_empty(codes, shape if contracted_dim else shape[::-1], dtype)


def _encoded_mm(
    a: Tensor, a_scale: Tensor, a_tensor_scale: Tensor, b: Tensor, *rest: Any
) -> Tensor:
    out_dtype = rest[-1]
    return fake_empty(a, (a.shape[0], b.shape[0]), out_dtype)


def _clip_mask(x: Tensor, seed: Tensor | None, encoding: str, contracted_dim: int) -> Tensor:
    size = Encoding.parse(encoding).transformed_size(x.shape[contracted_dim])
    return _resized(x, contracted_dim, size, torch.bool)


def _quantized(x: Tensor, encoding: str, contracted_dim: int) -> tuple[Tensor, Tensor]:
    parsed, kept = Encoding.parse(encoding), x.shape[1 - contracted_dim]
    contracted = padded_size(x.shape[contracted_dim], parsed.contracted_multiple)
    codes = fake_empty(x, (kept, contracted), format_named(parsed.format).dtype)
    groups = 1 if parsed.granularity == PER_TENSOR else kept
    return codes, fake_empty(x, (groups,), torch.float32)


def _quantize_rows(x: Tensor, rows: str) -> tuple[Tensor, Tensor]:
    return _quantized(x, rows, 1)


def _quantize_columns(x: Tensor, columns: str) -> tuple[Tensor, Tensor]:
    return _quantized(x, columns, 0)


def _quantize_both(x: Tensor, rows: str, columns: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (*_quantized(x, rows, 1), *_quantized(x, columns, 0))


def checked_chain(
    inputs: Sequence[Tensor],
    chain: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[bool],
) -> Chain:
    """The chain of a `quantize_chain`. ValueError unless there are as many inputs, and encodings of
    outputs, as it says."""
    parsed = Chain.parse(chain)
    if len(inputs) != len(parsed.inputs):
        raise ValueError(
            f"quantize_chain: inputs must be {len(parsed.inputs)} tensors, got {len(inputs)}"
        )
    for name, given in (("rows", rows), ("columns", columns), ("values", values)):
        if len(given) != len(parsed.outputs):
            raise ValueError(
                f"quantize_chain: {name} must be {len(parsed.outputs)} long, got {len(given)}"
            )
    return parsed


def _quantize_chain(
    inputs: list[Tensor], chain: str, rows: list[str], columns: list[str], values: list[bool]
) -> list[Tensor]:
    parsed = checked_chain(inputs, chain, rows, columns, values)
    shapes = [each.shape for each in parsed.inputs]
    x = inputs[shapes.index(MATRIX)]
    expected = {MATRIX: x.shape, ROWS: x.shape[:1], COLUMNS: x.shape[1:], SCALAR: ()}
    for given, shape in zip(inputs, shapes, strict=True):
        torch._check(
            tuple(given.shape) == tuple(expected[shape]),
            lambda shape=shape: f"quantize_chain: the shape of a {shape} input differs",
        )
    results: list[Tensor] = []
    for output, by_rows, by_columns, kept in zip(
        parsed.outputs, rows, columns, values, strict=True
    ):
        results += _quantized(x, by_rows, 1) if by_rows else ()
        results += _quantized(x, by_columns, 0) if by_columns else ()
        results += [fake_empty(x, tuple(x.shape), CHAIN_DTYPES[output.dtype])] if kept else []
    return results


def _scaled_mm(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    torch._check(a.shape[1] == b.shape[1], lambda: "scaled_mm: contracted dims differ")
    out_dtype = rest[-1]
    return fake_empty(a, (a.shape[0], b.shape[0]), out_dtype)


def _measured(result: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(result)


def _scaled_mm_measured(lhs: Tensor, rhs: Tensor, *rest: Any) -> Tensor:
    *scaled, _ = rest
    return _scaled_mm(*scaled)


FAKES: dict[str, Callable[..., Any]] = {
    "gemm": _gemm,
    "gemm_observed": _gemm,
    "rotate": _rotate,
    "unrotate": _unrotate,
    "project": _project,
    "unproject": _unproject,
    "next_seed": _next_seed,
    "encode": _encode,
    "decode": _decode,
    "encoded_mm": _encoded_mm,
    "clip_mask": _clip_mask,
    "quantize_rows": _quantize_rows,
    "quantize_columns": _quantize_columns,
    "quantize_both": _quantize_both,
    "quantize_chain": _quantize_chain,
    "scaled_mm": _scaled_mm,
    "measured": _measured,
    "scaled_mm_measured": _scaled_mm_measured,
}
"""By operator: its arguments, with fake tensors -> what it returns of them."""
