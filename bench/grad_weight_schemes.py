"""Race the ways to quantize one tensor for two GEMMs that contract different dims of it.

A Linear needs X[T, K] twice in int8: row-major, rotated along K, one scale per token (`output`,
Y = X W^T contracts K), and transposed, rotated along T (`grad_weight`, dW = E^T X contracts T).
A column's scale needs its maximum over all tokens before the first code can be written, hence:

  a    an amax pass (both directions, integer atomic max), then one pass that writes both copies
  a2   the same for the columns only, and a separate row kernel that keeps its row in registers
  b    one K-rotated copy, stored both ways; its token scale is folded into E before E is
       quantized per column; dW comes out rotated along K and is un-rotated after the GEMM
  c    column scales per superblock of S tokens, so a strip is quantized in one launch; the GEMM
       promotes its int32 accumulator to fp32 after every superblock

Each kernel is checked against plain torch before it is timed. This script knows nothing of the
package: it decides what the package's kernels should look like.

Shape letters: T tokens, K input features, N output features, B Hadamard block, S superblock.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

FORMAT_MAX = 127.0
INTERPRETED = triton.knobs.runtime.interpret
# The interpreter multiplies bfloat16's bit patterns as integers; fp32 holds the same values.
OPERAND = torch.float32 if INTERPRETED else torch.bfloat16
SHAPES_TKN = (
    (16384, 4096, 4096),
    (16384, 4096, 14336),
    (16384, 14336, 4096),
    (8192, 4096, 4096),
)
SUPERBLOCKS = (128, 512, 1024, 2048)
INF_BITS = 0x7F800000


# --------------------------------------------------------------------------- plain torch


def hadamard_matrix(block: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Unnormalized Walsh-Hadamard matrix in Sylvester order, +-1, fp32, symmetric."""
    h = torch.ones(1, 1, device=device)
    while h.shape[0] < block:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)), 0)
    return h


def store_order_matrix(block: int, device: torch.device | str) -> torch.Tensor:
    """The Hadamard matrix with its columns reordered for a conversion-free one-byte store.

    A wgmma accumulator gives the thread with lane % 4 == q the columns 8 j + 2 q + {0, 1}. Placing
    output column q B/4 + 2 j + {0, 1} there gives every thread B/4 adjacent output columns.
    """
    j, q, pair = torch.meshgrid(
        torch.arange(block // 8), torch.arange(4), torch.arange(2), indexing="ij"
    )
    source = (q * (block // 4) + 2 * j + pair).flatten()
    return hadamard_matrix(block, device)[:, source.to(device)].contiguous()


def rotate_last_reference(x: torch.Tensor, block: int) -> torch.Tensor:
    """Unnormalized block-diagonal Hadamard along the last dim, in x's dtype."""
    h = hadamard_matrix(block, x.device).to(x.dtype)
    return (x.reshape(*x.shape[:-1], -1, block) @ h).reshape(x.shape)


def scale_from_amax_reference(amax: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(inverse for the codes, scale for the GEMM) of unnormalized maxima, both fp32."""
    fmax = torch.full_like(amax, FORMAT_MAX)
    inverse = torch.where(amax > 0, fmax / amax, torch.zeros_like(amax))
    # Tensor by tensor: CUDA divides by a Python number through its reciprocal, 1 ulp off.
    scale = amax / fmax * (1.0 / math.sqrt(block))
    scale = torch.where(amax == 0, torch.ones_like(amax), scale)
    return inverse, torch.where(amax.isfinite(), scale, torch.full_like(amax, math.nan))


def quantize_rows_reference(
    y: torch.Tensor, block: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(int8 codes, scale, amax) of an already rotated fp32 matrix with one scale per row."""
    amax = y.abs().amax(-1)
    inverse, scale = scale_from_amax_reference(amax, block)
    codes = torch.round(y * inverse[..., None]).clamp(-FORMAT_MAX, FORMAT_MAX)
    return codes.to(torch.int8), scale, amax


# --------------------------------------------------------------------------- tile primitives


@triton.jit
def magnitude_bits(y):
    """|y| as an integer that orders like it, with NaN above infinity (tl.max would drop NaN)."""
    return y.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def inverse_and_scale(bits, NORM: tl.constexpr):
    """(127 / amax or 0, amax / 127 * NORM or 1 for zeros or NaN for non-finite)."""
    amax = bits.to(tl.float32, bitcast=True)
    safe = tl.where(bits == 0, 1.0, amax)
    inverse = tl.where(bits == 0, 0.0, tl.math.div_rn(127.0, safe))
    scale = tl.where(bits == 0, 1.0, tl.math.div_rn(amax, 127.0) * NORM)
    return inverse, tl.where(bits >= 0x7F800000, float("nan"), scale)


@triton.jit
def to_codes(scaled, LOW_BYTE: tl.constexpr):
    """rint to int8. |scaled| <= 127 (1 + 2^-22), so the clamp is the rounding itself.

    Adding 1.5 * 2^23 leaves rint(scaled) in the low mantissa bits, in two's complement: the code
    is the low byte, with neither the subtraction nor a float-to-int conversion.
    """
    shifted = scaled + 12582912.0
    if LOW_BYTE:
        return shifted.to(tl.int32, bitcast=True).to(tl.int8)
    return (shifted - 12582912.0).to(tl.int8)


@triton.jit
def natural_order(acc, M: tl.constexpr, B: tl.constexpr):
    """Undo `store_order_matrix`'s column order; moves no data between threads."""
    split = tl.reshape(acc, (M, B // 8, 4, 2))
    return tl.reshape(tl.permute(split, (0, 2, 1, 3)), (M, B))


@triton.jit
def rotate_tile(x, h, R: tl.constexpr, C: tl.constexpr, B: tl.constexpr):
    """x[R, C] bf16 -> rotated along C in blocks of B, as [R C / B, B] fp32."""
    if C == B:
        return tl.dot(x, h)
    return tl.dot(tl.reshape(x, (R * C // B, B)), h)


@triton.jit
def row_max_of_blocks(bits, R: tl.constexpr, BLOCKS: tl.constexpr):
    """Maximum per row of [R * BLOCKS, B]. Two steps: one reshaped reduction is miscompiled."""
    per_block = tl.max(bits, 1)
    if BLOCKS == 1:
        return per_block
    return tl.max(tl.reshape(per_block, (R, BLOCKS)), 1)


# --------------------------------------------------------------------------- scheme a (and b's E)


@triton.jit
def tile_amax_kernel(
    x_TK, h_BB, pre_T, row_bits_T, col_bits_K, T, K,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, B: tl.constexpr, TILES: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DIRECT: tl.constexpr, TMA: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Row maxima of X rotated along K (ROWS) and column maxima: COLS "rotated" along T or
    "scaled" (T-plain, times pre_T). A program takes TILES tiles along T."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = tl.program_id(1) * TILES
    last = tl.minimum(first + TILES, tl.cdiv(T, BLOCK_T))
    h = tl.load(h_BB + tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :])
    col_bits = tl.zeros((BLOCK_K,), tl.int32)
    for tile in tl.range(first, last, num_stages=STAGES):
        t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        if TMA:
            x = x_TK.load([tile * BLOCK_T, tl.program_id(0) * BLOCK_K])
        else:
            x = tl.load(x_TK + t.to(tl.int64)[:, None] * K + k[None, :])
        if ROWS:
            y = rotate_tile(x, h, BLOCK_T, BLOCK_K, B)
            row_bits = row_max_of_blocks(magnitude_bits(y), BLOCK_T, BLOCK_K // B)
            tl.atomic_max(row_bits_T + t, row_bits, sem="relaxed")
        if COLS == "rotated":
            if DIRECT:
                z = rotate_tile(tl.trans(x), h, BLOCK_K, BLOCK_T, B)
                bits = row_max_of_blocks(magnitude_bits(z), BLOCK_K, BLOCK_T // B)
            else:
                bits = tl.max(magnitude_bits(tl.dot(h, x)), 0)
            col_bits = tl.maximum(col_bits, bits)
        if COLS == "scaled":
            v = x.to(tl.float32) * tl.load(pre_T + t)[:, None]
            col_bits = tl.maximum(col_bits, tl.max(magnitude_bits(v), 0))
    if COLS != "none":
        tl.atomic_max(col_bits_K + k, col_bits, sem="relaxed")


@triton.jit
def tile_codes_kernel(
    x_TK, h_BB, pre_T, row_bits_T, col_bits_K, row_TK, col_KT, row_scale_T, col_scale_K, T, K,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, B: tl.constexpr, TILES: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DIRECT: tl.constexpr, TMA: tl.constexpr,
    STAGES: tl.constexpr, ORDERED: tl.constexpr, LOW_BYTE: tl.constexpr, NORM: tl.constexpr,
    COL_NORM: tl.constexpr,
):  # fmt: skip
    """Second pass: codes from known maxima, row-major (ROWS) and transposed (COLS).

    COLS: "rotated" and "scaled" as in `tile_amax_kernel`, "shared" the row codes transposed.
    ORDERED: h is `store_order_matrix`. DIRECT: the transposed product is computed, instead of
    transposing the codes.
    """
    k0 = tl.program_id(0) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    first = tl.program_id(1) * TILES
    last = tl.minimum(first + TILES, tl.cdiv(T, BLOCK_T))
    h = tl.load(h_BB + tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :])
    if COLS == "rotated" or COLS == "scaled":
        col_inverse, col_scale = inverse_and_scale(tl.load(col_bits_K + k), COL_NORM)
        if first == 0:
            tl.store(col_scale_K + k, col_scale)
    for tile in tl.range(first, last, num_stages=STAGES):
        t0 = tile * BLOCK_T
        t = t0 + tl.arange(0, BLOCK_T)
        if TMA:
            x = x_TK.load([t0, k0])
        else:
            x = tl.load(x_TK + t.to(tl.int64)[:, None] * K + k[None, :])
        if ROWS:
            y = rotate_tile(x, h, BLOCK_T, BLOCK_K, B)
            if ORDERED:
                y = natural_order(y, BLOCK_T * BLOCK_K // B, B)
            row_inverse, row_scale = inverse_and_scale(tl.load(row_bits_T + t), NORM)
            if k0 == 0:
                tl.store(row_scale_T + t, row_scale)
            y = tl.reshape(y, (BLOCK_T, BLOCK_K))
            codes = to_codes(y * row_inverse[:, None], LOW_BYTE)
            if TMA:
                row_TK.store([t0, k0], codes)
            else:
                tl.store(row_TK + t.to(tl.int64)[:, None] * K + k[None, :], codes)
        if COLS != "none":
            if COLS == "shared":
                codes_t = tl.trans(codes)
            elif COLS == "scaled":
                v = x.to(tl.float32) * tl.load(pre_T + t)[:, None]
                codes_t = tl.trans(to_codes(v * col_inverse[None, :], LOW_BYTE))
            elif DIRECT:
                z = rotate_tile(tl.trans(x), h, BLOCK_K, BLOCK_T, B)
                if ORDERED:
                    z = natural_order(z, BLOCK_K * BLOCK_T // B, B)
                z = tl.reshape(z, (BLOCK_K, BLOCK_T))
                codes_t = to_codes(z * col_inverse[:, None], LOW_BYTE)
            else:
                z = tl.dot(h, x)
                codes_t = tl.trans(to_codes(z * col_inverse[None, :], LOW_BYTE))
            if TMA:
                col_KT.store([k0, t0], codes_t)
            else:
                tl.store(col_KT + k.to(tl.int64)[:, None] * T + t[None, :], codes_t)


# --------------------------------------------------------------------------- row kernel (a2, b, c)


@triton.jit
def row_kernel(
    x_TK, h_BB, row_TK, row_scale_T, T, K,
    R: tl.constexpr, BLOCKS: tl.constexpr, B: tl.constexpr, ORDERED: tl.constexpr,
    LOW_BYTE: tl.constexpr, NORM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """R whole rows (BLOCKS Hadamard blocks each, padded to a power of two) in registers at once:
    one read, one write. Persistent over groups of rows."""
    m = tl.arange(0, R * BLOCKS)
    column = (m % BLOCKS)[:, None] * B + tl.arange(0, B)[None, :]
    h = tl.load(h_BB + tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :])
    for group in tl.range(tl.program_id(0), tl.cdiv(T, R), tl.num_programs(0), num_stages=STAGES):
        row = group * R + m // BLOCKS
        offset = row.to(tl.int64)[:, None] * K + column
        inside = (row < T)[:, None] & (column < K)
        x = tl.load(x_TK + offset, mask=inside, other=0.0)
        y = tl.dot(x, h)
        bits = row_max_of_blocks(magnitude_bits(y), R, BLOCKS)
        inverse, scale = inverse_and_scale(bits, NORM)
        group_rows = group * R + tl.arange(0, R)
        tl.store(row_scale_T + group_rows, scale, mask=group_rows < T)
        if ORDERED:
            y = natural_order(y, R * BLOCKS, B)
        spread = tl.reshape(tl.broadcast_to(inverse[:, None], (R, BLOCKS)), (R * BLOCKS,))
        tl.store(row_TK + offset, to_codes(y * spread[:, None], LOW_BYTE), mask=inside)


@triton.jit
def transpose_kernel(src_TK, dst_KT, T, K, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """One-byte transpose of a [BLOCK_T, BLOCK_K] tile."""
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (t < T)[:, None] & (k < K)[None, :]
    codes = tl.load(src_TK + t.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0)
    inside_t = (k < K)[:, None] & (t < T)[None, :]
    tl.store(dst_KT + k.to(tl.int64)[:, None] * T + t[None, :], tl.trans(codes), mask=inside_t)


@triton.jit
def unrotate_kernel(y_NK, h_BB, out_NK, N, K, R: tl.constexpr, B: tl.constexpr,
                    NORM: tl.constexpr):  # fmt: skip
    """Scheme b's dW: bf16 in, rotated back along K, bf16 out."""
    n = tl.program_id(1) * R + tl.arange(0, R)
    k = tl.program_id(0) * B + tl.arange(0, B)
    h = tl.load(h_BB + tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :])
    offset = n.to(tl.int64)[:, None] * K + k[None, :]
    y = tl.load(y_NK + offset, mask=(n < N)[:, None], other=0.0)
    tl.store(out_NK + offset, (tl.dot(y, h) * NORM).to(tl.bfloat16), mask=(n < N)[:, None])


# --------------------------------------------------------------------------- scheme c


@triton.jit
def rotated_strip_tile(x_TK, t0, k, K, h, BLOCK_K: tl.constexpr, B: tl.constexpr):
    """Rows t0.. t0 + B of some columns, rotated along T, as [BLOCK_K, B] fp32."""
    t = t0 + tl.arange(0, B)
    x = tl.load(x_TK + t.to(tl.int64)[:, None] * K + k[None, :])
    return rotate_tile(tl.trans(x), h, BLOCK_K, B, B)


@triton.jit
def strip_kernel(
    x_TK, h_BB, col_KT, scale_SK, T, K, S,
    BLOCK_K: tl.constexpr, B: tl.constexpr, ONE_BLOCK: tl.constexpr, ORDERED: tl.constexpr,
    LOW_BYTE: tl.constexpr, NORM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Superblock of S tokens x BLOCK_K columns: maxima, then the strip again (from L2), codes.

    ONE_BLOCK: S == B, nothing is read twice.
    """
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = tl.program_id(1) * S
    last = tl.minimum(first + S, T)
    h = tl.load(h_BB + tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :])
    out = col_KT + k.to(tl.int64)[:, None] * T + tl.arange(0, B)[None, :]
    if ONE_BLOCK:
        z = rotated_strip_tile(x_TK, first, k, K, h, BLOCK_K, B)
        bits = tl.max(magnitude_bits(z), 1)
    else:
        bits = tl.zeros((BLOCK_K,), tl.int32)
        for t0 in tl.range(first, last, B, num_stages=STAGES):
            z = rotated_strip_tile(x_TK, t0, k, K, h, BLOCK_K, B)
            bits = tl.maximum(bits, tl.max(magnitude_bits(z), 1))
    inverse, scale = inverse_and_scale(bits, NORM)
    tl.store(scale_SK + tl.program_id(1) * K + k, scale)
    if ONE_BLOCK:
        if ORDERED:
            z = natural_order(z, BLOCK_K, B)
        tl.store(out + first, to_codes(z * inverse[:, None], LOW_BYTE))
    else:
        for t0 in tl.range(first, last, B, num_stages=STAGES):
            z = rotated_strip_tile(x_TK, t0, k, K, h, BLOCK_K, B)
            if ORDERED:
                z = natural_order(z, BLOCK_K, B)
            tl.store(out + t0, to_codes(z * inverse[:, None], LOW_BYTE))


# --------------------------------------------------------------------------- GEMMs
# Letters here are a GEMM's own: C[M, N] = A[M, L] B[N, L]^T, L contracted.


@triton.jit
def grouped_tile(pid, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """(row, column) of tile pid: GROUP tile rows are walked column by column, for L2 reuse."""
    tiles_m = tl.cdiv(M, BM)
    per_group = GROUP * tl.cdiv(N, BN)
    first = (pid // per_group) * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    return (first + (pid % per_group) % rows) * BM, ((pid % per_group) // rows) * BN


@triton.jit
def scaled_store(acc, c_desc, a_scale, b_scale, m0, n0, M, N, BM: tl.constexpr, BN: tl.constexpr,
                 DTYPE: tl.constexpr, HALVES: tl.constexpr):  # fmt: skip
    """acc * a_scale[:, None] * b_scale[None, :], stored whole or as two halves (less smem)."""
    m = m0 + tl.arange(0, BM)
    sa = tl.load(a_scale + m, mask=m < M, other=0.0)[:, None]
    if HALVES:
        n = n0 + tl.arange(0, BN // 2)
        halves = tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        sb = tl.load(b_scale + n, mask=n < N, other=0.0)[None, :]
        c_desc.store([m0, n0], (left.to(tl.float32) * sa * sb).to(DTYPE))
        sb = tl.load(b_scale + n + BN // 2, mask=n + BN // 2 < N, other=0.0)[None, :]
        c_desc.store([m0, n0 + BN // 2], (right.to(tl.float32) * sa * sb).to(DTYPE))
    else:
        n = n0 + tl.arange(0, BN)
        sb = tl.load(b_scale + n, mask=n < N, other=0.0)[None, :]
        c_desc.store([m0, n0], (acc.to(tl.float32) * sa * sb).to(DTYPE))


@triton.jit
def gemm_kernel(
    a_desc, b_desc, c_desc, a_scale, b_scale, M, N, L,
    BM: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, GROUP: tl.constexpr,
    DTYPE: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """One output tile per program."""
    m0, n0 = grouped_tile(tl.program_id(0), M, N, BM, BN, GROUP)
    acc = tl.zeros((BM, BN), tl.int32)
    for l0 in range(0, L, BL):
        a = a_desc.load([m0, l0])
        b = b_desc.load([n0, l0])
        acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)
    scaled_store(acc, c_desc, a_scale, b_scale, m0, n0, M, N, BM, BN, DTYPE, HALVES)


@triton.jit
def persistent_gemm_kernel(
    a_desc, b_desc, c_desc, a_scale, b_scale, M, N, L,
    BM: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, GROUP: tl.constexpr,
    DTYPE: tl.constexpr, HALVES: tl.constexpr, FLATTEN: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """One program per SM walks the tiles, so that a tile's epilogue overlaps the next loads."""
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    for tile in tl.range(
        tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN, warp_specialize=SPECIALIZE
    ):
        m0, n0 = grouped_tile(tile, M, N, BM, BN, GROUP)
        acc = tl.zeros((BM, BN), tl.int32)
        for l0 in range(0, L, BL):
            a = a_desc.load([m0, l0])
            b = b_desc.load([n0, l0])
            acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)
        scaled_store(acc, c_desc, a_scale, b_scale, m0, n0, M, N, BM, BN, DTYPE, HALVES)


@triton.jit
def promoted(total, acc, a_scale, b_scale, s, m, n, M, N):
    """total + acc * a_scale[s, m] * b_scale[s, n]."""
    sa = tl.load(a_scale + s * M + m, mask=m < M, other=0.0)[:, None]
    sb = tl.load(b_scale + s * N + n, mask=n < N, other=0.0)[None, :]
    return total + acc.to(tl.float32) * sa * sb


@triton.jit
def promoting_gemm_kernel(
    a_desc, b_desc, c_desc, a_scale, b_scale, M, N, L, STEPS,
    BM: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, GROUP: tl.constexpr,
    DTYPE: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """Scales per superblock of STEPS * BL contracted elements: a_scale[s, M], b_scale[s, N]."""
    m0, n0 = grouped_tile(tl.program_id(0), M, N, BM, BN, GROUP)
    m = m0 + tl.arange(0, BM)
    n = n0 + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    if NESTED:
        for s in range(tl.cdiv(L, STEPS * BL)):
            acc = tl.zeros((BM, BN), tl.int32)
            for step in range(STEPS):
                l0 = (s * STEPS + step) * BL
                a = a_desc.load([m0, l0])
                b = b_desc.load([n0, l0])
                acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)
            total = promoted(total, acc, a_scale, b_scale, s, m, n, M, N)
    else:
        acc = tl.zeros((BM, BN), tl.int32)
        for step in range(tl.cdiv(L, BL)):
            a = a_desc.load([m0, step * BL])
            b = b_desc.load([n0, step * BL])
            acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)
            if (step + 1) % STEPS == 0:
                total = promoted(total, acc, a_scale, b_scale, step // STEPS, m, n, M, N)
                acc = tl.zeros((BM, BN), tl.int32)
    c_desc.store([m0, n0], total.to(DTYPE))


# --------------------------------------------------------------------------- one tensor's buffers


@dataclass
class Buffers:
    """A tensor to quantize, everything its quantizers read and write."""

    x: torch.Tensor
    block: int = 128
    pre: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        t, k = self.x.shape
        device = self.x.device
        self.bits = torch.zeros(t + k, dtype=torch.int32, device=device)
        self.row_bits, self.col_bits = self.bits[:t], self.bits[t:]
        self.row = torch.empty(t, k, dtype=torch.int8, device=device)
        self.col = torch.empty(k, t, dtype=torch.int8, device=device)
        self.row_scale = torch.empty(t, device=device)
        self.col_scale = torch.empty(k, device=device)
        self.strip_scale = torch.empty(-(-t // 128), k, device=device)
        self.pre = torch.ones(t, device=device)
        self.sms = 4 if INTERPRETED else torch.cuda.get_device_properties(0).multi_processor_count
        self.h = {b: hadamard_matrix(b, device).to(OPERAND) for b in (32, 64, 128)}
        self.h_ordered = {b: store_order_matrix(b, device).to(OPERAND) for b in (32, 64, 128)}

    def poison(self) -> None:
        """Make anything that a kernel fails to write visible."""
        for codes in (self.row, self.col):
            codes.fill_(77)
        for scale in (self.row_scale, self.col_scale, self.strip_scale):
            scale.fill_(-3.0)


def described(tensor: torch.Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, list(block))


@dataclass(frozen=True)
class TileConfig:
    """Launch of the two tile kernels."""

    block_t: int = 128
    block_k: int = 128
    tiles: int = 1
    warps: int = 4
    stages: int = 1
    block: int = 128
    rows: bool = True
    cols: str = "rotated"
    direct: bool = True
    tma: bool = False
    ordered: bool = True
    low_byte: bool = True
    maxnreg: int | None = None

    def grid(self, t: int, k: int) -> tuple[int, int]:
        return triton.cdiv(k, self.block_k), triton.cdiv(t, self.block_t * self.tiles)

    def shared(self) -> dict:
        return {
            "BLOCK_T": self.block_t, "BLOCK_K": self.block_k, "B": self.block,
            "TILES": self.tiles, "ROWS": self.rows, "COLS": self.cols, "DIRECT": self.direct,
            "TMA": self.tma, "STAGES": self.stages, "num_warps": self.warps,
            "enable_fp_fusion": False, "maxnreg": self.maxnreg,
        }  # fmt: skip


def launch_tile_amax(b: Buffers, c: TileConfig):
    t, k = b.x.shape
    x = described(b.x, c.block_t, c.block_k) if c.tma else b.x
    b.bits.zero_()
    return tile_amax_kernel[c.grid(t, k)](
        x, b.h[c.block], b.pre, b.row_bits, b.col_bits, t, k, **c.shared()
    )


def launch_tile_codes(b: Buffers, c: TileConfig):
    t, k = b.x.shape
    x, row, col = b.x, b.row, b.col
    if c.tma:
        x, row = described(x, c.block_t, c.block_k), described(row, c.block_t, c.block_k)
        col = described(col, c.block_k, c.block_t)
    norm = 1.0 / math.sqrt(c.block)
    return tile_codes_kernel[c.grid(t, k)](
        x, (b.h_ordered if c.ordered else b.h)[c.block], b.pre, b.row_bits, b.col_bits, row, col,
        b.row_scale, b.col_scale, t, k, ORDERED=c.ordered, LOW_BYTE=c.low_byte, NORM=norm,
        COL_NORM=norm if c.cols == "rotated" else 1.0, **c.shared(),
    )  # fmt: skip


@dataclass(frozen=True)
class RowConfig:
    """Launch of the row kernel: `values` per program sets the rows; waves 0 = not persistent."""

    values: int = 8192
    warps: int = 4
    stages: int = 1
    waves: int = 0
    ordered: bool = True


def launch_row(b: Buffers, c: RowConfig):
    t, k = b.x.shape
    blocks = triton.next_power_of_2(triton.cdiv(k, 128))
    rows = max(1, c.values // (blocks * 128))
    groups = triton.cdiv(t, rows)
    grid = min(groups, b.sms * c.waves) if c.waves else groups
    return row_kernel[(grid,)](
        b.x, (b.h_ordered if c.ordered else b.h)[128], b.row, b.row_scale, t, k, R=rows,
        BLOCKS=blocks, B=128, ORDERED=c.ordered, LOW_BYTE=True, NORM=1.0 / math.sqrt(128),
        STAGES=c.stages, num_warps=c.warps, enable_fp_fusion=False,
    )  # fmt: skip


def launch_transpose(b: Buffers, c: tuple[int, int, int]):
    t, k = b.x.shape
    block_t, block_k, warps = c
    grid = (triton.cdiv(k, block_k), triton.cdiv(t, block_t))
    return transpose_kernel[grid](
        b.row, b.col, t, k, BLOCK_T=block_t, BLOCK_K=block_k, num_warps=warps
    )


@dataclass(frozen=True)
class StripConfig:
    """Launch of scheme c's column kernel."""

    superblock: int
    block_k: int = 64
    warps: int = 4
    stages: int = 2
    ordered: bool = True


def launch_strip(b: Buffers, c: StripConfig):
    t, k = b.x.shape
    grid = (k // c.block_k, triton.cdiv(t, c.superblock))
    return strip_kernel[grid](
        b.x, (b.h_ordered if c.ordered else b.h)[128], b.col, b.strip_scale, t, k, c.superblock,
        BLOCK_K=c.block_k, B=128, ONE_BLOCK=c.superblock == 128, ORDERED=c.ordered, LOW_BYTE=True,
        NORM=1.0 / math.sqrt(128), STAGES=c.stages, num_warps=c.warps, enable_fp_fusion=False,
    )  # fmt: skip


def launch_unrotate(y: torch.Tensor, out: torch.Tensor, h: torch.Tensor, rows: int, warps: int):
    n, k = y.shape
    return unrotate_kernel[(k // 128, triton.cdiv(n, rows))](
        y, h, out, n, k, R=rows, B=128, NORM=1.0 / math.sqrt(128), num_warps=warps
    )


# --------------------------------------------------------------------------- checks of quantizers


def code_difference(what: str, got: torch.Tensor, want: torch.Tensor, exact: bool) -> str | None:
    """Bitwise if the arithmetic was exact, else at most 1 apart in at most 1e-4 of the codes."""
    gap = (got.int() - want.int()).abs()
    share = (gap > 0).float().mean().item()
    if gap.max().item() <= (0 if exact else 1) and share <= (0.0 if exact else 1e-4):
        return None
    return f"{what}: codes differ by up to {gap.max().item()} in {share:.2e} of them"


def scale_difference(what: str, got: torch.Tensor, want: torch.Tensor, exact: bool) -> str | None:
    same = torch.equal(got.isnan(), want.isnan())
    gap = ((got - want).abs() / want.abs()).nan_to_num(0.0).max().item()
    if same and gap <= (0.0 if exact else 4e-7):
        return None
    return f"{what}: scales differ by {gap:.2e}, NaN {'agree' if same else 'disagree'}"


def first_failure(*failures: str | None) -> str | None:
    return next((f for f in failures if f), None)


@dataclass(frozen=True)
class Expected:
    """What plain torch says of one input, both directions."""

    row: torch.Tensor
    row_scale: torch.Tensor
    row_bits: torch.Tensor
    col: torch.Tensor
    col_scale: torch.Tensor
    col_bits: torch.Tensor


def expect(b: Buffers, block: int, cols: str) -> Expected:
    x = b.x.float()
    row, row_scale, row_amax = quantize_rows_reference(rotate_last_reference(x, block), block)
    if cols == "scaled":
        z, col_block = (x * b.pre[:, None]).T.contiguous(), 1
    else:
        z, col_block = rotate_last_reference(x.T.contiguous(), block), block
    col, col_scale, col_amax = quantize_rows_reference(z, col_block)
    return Expected(
        row, row_scale, row_amax.view(torch.int32), col, col_scale, col_amax.view(torch.int32)
    )


def check_inputs(t: int, k: int, device: str) -> list[tuple[torch.Tensor, bool]]:
    """(input, whether every sum in it is exact): integers with a zero row and column, normal."""
    generator = torch.Generator().manual_seed(t + k)
    integers = torch.randint(-128, 129, (t, k), generator=generator).float()
    integers[5] = 0.0
    integers[:, 7] = 0.0
    integers[:128, 9] = 0.0
    normal = torch.randn(t, k, generator=generator)
    normal[:, 3] *= 30.0
    normal = normal.bfloat16()
    return [(integers.to(device, OPERAND), True), (normal.to(device, OPERAND), False)]


def check_tile_amax(c: TileConfig, device: str) -> str | None:
    for x, exact in check_inputs(640, 384, device):
        b = Buffers(x)
        b.pre = torch.rand(x.shape[0], device=device) + 0.5
        want = expect(b, c.block, c.cols)
        launch_tile_amax(b, c)
        for ask, name, got, right in (
            (c.rows, "row", b.row_bits, want.row_bits),
            (c.cols != "none", "column", b.col_bits, want.col_bits),
        ):
            gap = (got - right).abs().max().item()
            if ask and gap > (0 if exact else 4):
                return f"{name} maxima are {gap} ulp off ({'integers' if exact else 'normal'})"
    b.x[3, 9] = math.inf
    launch_tile_amax(b, c)
    if c.rows and b.row_bits[3].item() < INF_BITS:
        return "an infinity did not reach its row's maximum"
    if c.cols != "none" and b.col_bits[9].item() < INF_BITS:
        return "an infinity did not reach its column's maximum"
    return None


def check_tile_codes(c: TileConfig, device: str) -> str | None:
    for x, exact in check_inputs(640, 384, device):
        b = Buffers(x)
        b.pre = torch.rand(x.shape[0], device=device) + 0.5
        want = expect(b, c.block, c.cols)
        b.row_bits.copy_(want.row_bits)
        b.col_bits.copy_(want.col_bits)
        b.poison()
        launch_tile_codes(b, c)
        failures = []
        if c.rows:
            failures.append(code_difference("row", b.row, want.row, exact))
            failures.append(scale_difference("row", b.row_scale, want.row_scale, True))
        if c.cols == "shared":
            failures.append(code_difference("column", b.col, want.row.T, exact))
        elif c.cols != "none":
            failures.append(code_difference("column", b.col, want.col, exact))
            failures.append(scale_difference("column", b.col_scale, want.col_scale, True))
        if failure := first_failure(*failures):
            return failure
    b.row_bits[3] = INF_BITS
    launch_tile_codes(b, c)
    if c.rows and not b.row_scale[3].isnan():
        return "an infinite row maximum did not give a NaN scale"
    return None


def check_row(c: RowConfig, device: str, k: int) -> str | None:
    for x, exact in check_inputs(11 if INTERPRETED else 4 * 132 * 8 + 3, k, device):
        b = Buffers(x)
        rotated = rotate_last_reference(x.float(), 128)
        codes, scale, _ = quantize_rows_reference(rotated, 128)
        b.poison()
        launch_row(b, c)
        failure = first_failure(
            code_difference("row", b.row, codes, exact),
            scale_difference("row", b.row_scale, scale, exact),
        )
        if failure:
            return failure
    b.x[3, 9] = math.nan
    launch_row(b, c)
    return None if b.row_scale[3].isnan() else "a NaN did not reach its row's scale"


def check_transpose(c: tuple[int, int, int], device: str) -> str | None:
    b = Buffers(torch.zeros(400, 272, dtype=torch.bfloat16, device=device))
    b.poison()
    b.row.copy_(torch.randint(-127, 128, b.row.shape))
    launch_transpose(b, c)
    return code_difference("transpose", b.col, b.row.T, True)


def check_strip(c: StripConfig, device: str) -> str | None:
    tokens = 2 * c.superblock + (128 if c.superblock > 128 else 0)
    for x, exact in check_inputs(tokens, 256, device):
        b = Buffers(x)
        b.poison()
        launch_strip(b, c)
        for s, start in enumerate(range(0, tokens, c.superblock)):
            strip = x[start : start + c.superblock].float().T.contiguous()
            codes, scale, _ = quantize_rows_reference(rotate_last_reference(strip, 128), 128)
            got = b.col[:, start : start + c.superblock]
            failure = first_failure(
                code_difference(f"superblock {s}", got, codes, exact),
                scale_difference(f"superblock {s}", b.strip_scale[s], scale, exact),
            )
            if failure:
                return failure
    return None


def check_unrotate(rows: int, warps: int, device: str) -> str | None:
    y = torch.randint(-64, 65, (200, 384)).to(device, OPERAND)
    out = torch.full_like(y, 77.0)
    launch_unrotate(y, out, hadamard_matrix(128, device).to(OPERAND), rows, warps)
    want = (rotate_last_reference(y.float(), 128) / math.sqrt(128)).bfloat16()
    gap = (out.float() - want.float()).abs().max().item()
    return None if gap <= 2.0**-7 * want.float().abs().max().item() else f"off by {gap}"


# --------------------------------------------------------------------------- GEMM launches


@dataclass(frozen=True)
class GemmConfig:
    """Launch of one of the three GEMM kernels (`kind` plain, persistent, promoting)."""

    kind: str
    bm: int
    bn: int
    bl: int = 128
    warps: int = 8
    stages: int = 3
    group: int = 8
    halves: bool = False
    flatten: bool = False
    specialize: bool = False
    nested: bool = True


@dataclass(frozen=True)
class GemmOperands:
    """A[M, L] B[N, L] int8, their scales ([M], [N], or [s, M], [s, N]), the output."""

    a: torch.Tensor
    b: torch.Tensor
    a_scale: torch.Tensor
    b_scale: torch.Tensor
    out: torch.Tensor
    superblock: int = 0

    @property
    def flops(self) -> int:
        return 2 * self.a.shape[0] * self.b.shape[0] * self.a.shape[1]


def launch_gemm(o: GemmOperands, c: GemmConfig):
    m, length = o.a.shape
    n = o.b.shape[0]
    store_n = c.bn // 2 if c.halves else c.bn
    descriptors = (
        described(o.a, c.bm, c.bl), described(o.b, c.bn, c.bl), described(o.out, c.bm, store_n)
    )  # fmt: skip
    tiles = triton.cdiv(m, c.bm) * triton.cdiv(n, c.bn)
    arguments = (*descriptors, o.a_scale, o.b_scale, m, n, length)
    options = {
        "BM": c.bm, "BN": c.bn, "BL": c.bl, "GROUP": c.group, "num_warps": c.warps,
        "DTYPE": tl.float32 if o.out.dtype == torch.float32 else tl.bfloat16,
        "num_stages": c.stages,
    }  # fmt: skip
    if c.kind == "promoting":
        steps = o.superblock // c.bl
        return promoting_gemm_kernel[(tiles,)](*arguments, steps, NESTED=c.nested, **options)
    if c.kind == "plain":
        return gemm_kernel[(tiles,)](*arguments, HALVES=c.halves, **options)
    sms = 3 if INTERPRETED else torch.cuda.get_device_properties(0).multi_processor_count
    return persistent_gemm_kernel[(min(tiles, sms),)](
        *arguments, HALVES=c.halves, FLATTEN=c.flatten, SPECIALIZE=c.specialize, **options
    )


def random_codes(rows: int, columns: int, device: str) -> torch.Tensor:
    return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=device)


def check_gemm(c: GemmConfig, device: str, dtype: torch.dtype = torch.bfloat16) -> str | None:
    m, n, length = (256, 256, 384) if INTERPRETED else (1664, 2432, 2048)
    a, b = random_codes(m, length, device), random_codes(n, length, device)
    superblock = 128 if INTERPRETED else 512
    count = length // superblock if c.kind == "promoting" else 1
    a_scale = torch.rand(count, m, device=device) + 0.5
    b_scale = torch.rand(count, n, device=device) + 0.5
    out = torch.full((m, n), math.nan, dtype=dtype, device=device)
    if c.kind == "promoting":
        launch_gemm(GemmOperands(a, b, a_scale, b_scale, out, superblock), c)
    else:
        launch_gemm(GemmOperands(a, b, a_scale[0], b_scale[0], out), c)
    want = torch.zeros(m, n, dtype=torch.float64, device=device)
    for s, part in enumerate(torch.arange(length).chunk(count)):
        i, j = part[0].item(), part[-1].item() + 1
        product = a[:, i:j].double() @ b[:, i:j].double().T
        want += product * a_scale[s].double()[:, None] * b_scale[s].double()
    # A bf16 output is off by half an ulp (the interpreter truncates: one ulp); the fp32 sum of
    # superblocks adds about 2^-22 of the largest.
    half_ulp = 2.0**-7 if INTERPRETED else 2.0**-8
    limit = half_ulp * want.abs() + 2.0**-21 * want.abs().max()
    worst = ((out.double() - want).abs() / limit).nan_to_num(math.inf).max().item()
    return None if worst <= 1.0 else f"error is {worst:.3g} times the limit"


# --------------------------------------------------------------------------- the race


class Race:
    """Deadline, timing, and the record of every variant, also of those that failed."""

    def __init__(self, seconds: float, device: str) -> None:
        self.start = time.perf_counter()
        self.seconds = seconds
        self.device = device
        self.record: dict = {"variants": {}, "quantizers": [], "gemms": [], "totals": []}
        self.usable: dict[str, bool] = {}
        self.flush = None
        if device != "cpu":
            self.flush = torch.empty(2**28, dtype=torch.int8, device=device)

    def late(self) -> bool:
        return time.perf_counter() - self.start > self.seconds

    def check(self, name: str, check: Callable[[], str | None]) -> None:
        """Record 'ok', the failed claim, or the error; a variant that is not ok is not timed."""
        entry = self.record["variants"].setdefault(name, {})
        begin = time.perf_counter()
        if self.late():
            entry["status"] = "skipped: deadline"
        else:
            try:
                failure = check()
                if self.device != "cpu":
                    torch.cuda.synchronize()
                entry["status"] = f"WRONG: {failure}" if failure else "ok"
            # A variant may fail in the compiler, in ptxas or at launch, each with its own type.
            except Exception as error:  # noqa: BLE001
                message = f"{type(error).__name__}: {error}".strip()
                entry["status"] = f"ERROR: {message.splitlines()[0][:200]}"
        entry["seconds"] = round(time.perf_counter() - begin, 2)
        self.usable[name] = entry["status"] == "ok"
        if not self.usable[name] or self.device == "cpu":
            print(f"[{time.perf_counter() - self.start:6.1f}s] {name}: {entry['status']}")

    def note_kernel(self, name: str, kernel: object) -> None:
        """Registers, spills, shared memory and instruction of a compiled variant."""
        entry = self.record["variants"].setdefault(name, {})
        asm = getattr(kernel, "asm", None)
        if asm is None:
            return
        entry["wgmma"] = "wgmma" in asm["ptx"]
        entry["registers"] = getattr(kernel, "n_regs", None)
        entry["spills"] = getattr(kernel, "n_spills", None)
        entry["smem"] = kernel.metadata.shared

    def time_ms(self, run: Callable[[], object], reps: int = 15) -> float:
        """Median of single runs, each after the L2 was overwritten."""
        for _ in range(2):
            run()
        pairs = []
        for _ in range(reps):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            begin.record()
            run()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return statistics.median(b.elapsed_time(e) for b, e in pairs)

    def timed(self, name: str, run: Callable[[], object]) -> float | None:
        """Time a usable variant; None if it is not, or if it fails now."""
        if not self.usable.get(name, False) or self.late():
            return None
        try:
            self.note_kernel(name, run())
            return self.time_ms(run)
        except Exception as error:  # noqa: BLE001  (same reason as in `check`)
            self.usable[name] = False
            self.record["variants"][name]["status"] = f"ERROR when timed: {error}"[:300]
            print(f"{name}: {self.record['variants'][name]['status']}")
            return None


@dataclass(frozen=True)
class Step:
    """One kernel of a quantizer: its role in a scheme, bytes moved per element, launch, check."""

    name: str
    role: str
    bytes_per_value: float
    launch: Callable[[Buffers], object]
    check: Callable[[str], str | None]
    only_k: int | None = None


def tile_step(role: str, label: str, c: TileConfig) -> Step:
    amax = role.startswith("amax")
    launch = launch_tile_amax if amax else launch_tile_codes
    check = check_tile_amax if amax else check_tile_codes
    written = 0 if amax else (c.rows + (c.cols != "none"))
    return Step(f"{role} {label}", role, 2 + written, lambda b: launch(b, c), lambda d: check(c, d))


def quantizer_steps() -> list[Step]:
    """Every quantizer kernel raced, most informative first."""
    wide = {"warps": 8}
    four = {"warps": 8, "tiles": 4, "stages": 2}
    tma = {"warps": 8, "tiles": 4, "stages": 1, "tma": True}
    h64_tile = {"block_t": 64, "block_k": 64, "tiles": 8, "stages": 2}
    table = [
        ("amax both", "4w", {}),
        ("amax both", "8w", wide),
        ("amax both", "4w x4", {"tiles": 4, "stages": 2}),
        ("amax both", "8w x4", four),
        ("amax both", "8w x8 st3", four | {"tiles": 8, "stages": 3}),
        ("amax both", "8w x4 tma", tma),
        ("amax both", "8w x8 tma st2", tma | {"tiles": 8, "stages": 2}),
        ("amax both", "8w indirect", wide | {"direct": False}),
        ("codes both", "4w", {}),
        ("codes both", "8w", wide),
        ("codes both", "8w x4", four),
        ("codes both", "8w x4 128 regs", four | {"maxnreg": 128}),
        ("codes both", "8w x4 tma", tma),
        ("codes both", "8w x4 tma st2", tma | {"stages": 2}),
        ("codes both", "8w unordered", wide | {"ordered": False}),
        ("codes both", "8w x4 tma unord.", tma | {"ordered": False}),
        ("codes both", "8w trans", wide | {"direct": False, "ordered": False}),
        ("codes both", "8w subtract", wide | {"low_byte": False}),
        ("amax col", "4w x4", {"tiles": 4, "stages": 2, "rows": False}),
        ("amax col", "8w", wide | {"rows": False}),
        ("amax col", "8w x4", four | {"rows": False}),
        ("codes col", "4w", {"rows": False}),
        ("codes col", "8w", wide | {"rows": False}),
        ("codes col", "8w x4", four | {"rows": False}),
        ("codes col", "8w x4 tma", tma | {"rows": False}),
        ("amax scaled", "8w", wide | {"cols": "scaled"}),
        ("amax scaled", "8w x4", four | {"cols": "scaled"}),
        ("codes scaled", "8w", wide | {"cols": "scaled"}),
        ("codes scaled", "8w x4", four | {"cols": "scaled"}),
        ("amax row", "8w", wide | {"cols": "none"}),
        ("amax row", "8w x4", four | {"cols": "none"}),
        ("codes shared", "8w", wide | {"cols": "shared", "ordered": False}),
        ("codes shared", "8w x4", four | {"cols": "shared", "ordered": False}),
        ("codes shared", "8w x4 tma", tma | {"cols": "shared", "ordered": False}),
        ("amax both h64", "128x128 8w", wide | {"block": 64}),
        ("amax both h64", "64x64 4w x8", h64_tile | {"block": 64}),
        ("codes both h64", "128x128 8w", wide | {"block": 64}),
        ("codes both h64", "64x64 4w x8", h64_tile | {"block": 64}),
        ("amax both h32", "128x128 8w", wide | {"block": 32}),
        ("codes both h32", "128x128 8w", wide | {"block": 32, "ordered": False}),
    ]
    steps = [tile_step(role, label, TileConfig(**options)) for role, label, options in table]
    for k in (4096, 14336):
        rows = {"4w": RowConfig(), "8w": RowConfig(16384, 8),
                "8w persistent": RowConfig(16384, 8, 2, 2)}  # fmt: skip
        if k == 4096:
            rows["8w unordered"] = RowConfig(16384, 8, ordered=False)
        else:
            rows["16w"] = RowConfig(16384, 16)
            del rows["4w"]
        for label, c in rows.items():
            steps.append(
                Step(f"row {label} K{k}", "row", 3, lambda b, c=c: launch_row(b, c),
                     lambda d, c=c, k=k: check_row(c, d, k), k)
            )  # fmt: skip
    for c in ((128, 128, 4), (128, 64, 4), (64, 64, 2), (128, 128, 8)):
        steps.append(
            Step(f"transpose {c[0]}x{c[1]} {c[2]}w", "transpose", 2,
                 lambda b, c=c: launch_transpose(b, c), lambda d, c=c: check_transpose(c, d))
        )  # fmt: skip
    for s in SUPERBLOCKS:
        wide = StripConfig(s, 128, 8)
        for label, c in (("x64 4w", StripConfig(s)), ("x128 8w", wide)):
            steps.append(
                Step(f"strip {s}{label}", f"strip {s}", 3, lambda b, c=c: launch_strip(b, c),
                     lambda d, c=c: check_strip(c, d))
            )  # fmt: skip
    return steps


GEMMS = {
    "128x256 8w 3st": GemmConfig("plain", 128, 256),
    "128x256 8w 4st": GemmConfig("plain", 128, 256, stages=4),
    "256x128 8w 3st": GemmConfig("plain", 256, 128),
    "256x128 8w 4st": GemmConfig("plain", 256, 128, stages=4),
    "128x256 4st group 16": GemmConfig("plain", 128, 256, stages=4, group=16),
    "128x256x256 8w 2st": GemmConfig("plain", 128, 256, bl=256, stages=2),
    "256x128x256 8w 2st": GemmConfig("plain", 256, 128, bl=256, stages=2),
    # Triton waits for an int32-accumulating wgmma in every step: two programs per SM fill the gap.
    "128x128 4w 3st": GemmConfig("plain", 128, 128, warps=4),
    "128x128 8w 3st": GemmConfig("plain", 128, 128),
    "persistent 128x256 3st": GemmConfig("persistent", 128, 256, halves=True, flatten=True),
    "persistent 128x256 4st": GemmConfig(
        "persistent", 128, 256, stages=4, halves=True, flatten=True
    ),
    "persistent 128x128 4w": GemmConfig("persistent", 128, 128, warps=4, flatten=True),
    "persistent 128x256 ws": GemmConfig("persistent", 128, 256, warps=4, specialize=True),
}
PROMOTING = {
    "promoting nested 3st": GemmConfig("promoting", 128, 128, stages=3),
    "promoting nested 5st": GemmConfig("promoting", 128, 128, stages=5),
    "promoting branch 3st": GemmConfig("promoting", 128, 128, stages=3, nested=False),
    "promoting branch 5st": GemmConfig("promoting", 128, 128, stages=5, nested=False),
    "promoting 64x128 4w": GemmConfig("promoting", 64, 128, warps=4, nested=False),
}
UNROTATE = {"unrotate 128 4w": (128, 4), "unrotate 64 4w": (64, 4)}


def check_all(race: Race, steps: list[Step]) -> None:
    """Compile and check every variant once; what is not ok is never timed."""
    # Steps first: they are what the race is about, should the deadline come.
    for step in steps:
        race.check(step.name, lambda step=step: step.check(race.device))
    for name, (rows, warps) in UNROTATE.items():
        race.check(name, lambda rows=rows, warps=warps: check_unrotate(rows, warps, race.device))
    for name, c in {**GEMMS, **PROMOTING}.items():
        race.check(name, lambda c=c: check_gemm(c, race.device))
    plain = GEMMS["128x256 8w 3st"]
    race.check("128x256 8w 3st fp32", lambda: check_gemm(plain, race.device, torch.float32))


def measure_copy(race: Race, x: torch.Tensor) -> float:
    """Bytes per second, read and written, of a device copy of x."""
    out = torch.empty_like(x)
    return 2 * x.numel() * x.element_size() / (race.time_ms(lambda: out.copy_(x)) * 1e-3)


def race_quantizers(race: Race, steps: list[Step], b: Buffers, bandwidth: float) -> dict[str, Step]:
    """Time every usable step on one tensor; the fastest of each role."""
    t, k = b.x.shape
    best: dict[str, tuple[float, Step]] = {}
    for step in steps:
        if step.only_k not in (None, k):
            continue
        ms = race.timed(step.name, lambda step=step: step.launch(b))
        if ms is None:
            continue
        share = step.bytes_per_value * t * k / (ms * 1e-3) / bandwidth
        race.record["quantizers"].append(
            {"step": step.name, "role": step.role, "T": t, "K": k, "ms": ms, "share": share}
        )
        if step.role not in best or ms < best[step.role][0]:
            best[step.role] = (ms, step)
    return {role: step for role, (_, step) in best.items()}


def sequences() -> dict[str, tuple[list[str], list[str]]]:
    """Roles run on X and on E by each scheme (b's transpose follows the row kernel)."""
    both = ["amax both", "codes both"]
    columns = ["row", "amax col", "codes col"]
    table = {
        "a": (both, both),
        "a h64": (["amax both h64", "codes both h64"],) * 2,
        "a h32": (["amax both h32", "codes both h32"],) * 2,
        "a2": (columns, columns),
        "b": (["row", "transpose"], ["amax scaled", "codes scaled"]),
        "b tile": (["amax row", "codes shared"], ["amax scaled", "codes scaled"]),
    }
    for s in SUPERBLOCKS:
        table[f"c {s}"] = (["row", f"strip {s}"],) * 2
    return table


def minimal_bytes(roles: list[str]) -> int:
    """Bytes per element that this sequence of passes cannot avoid."""
    cost = {"amax": 2, "codes both": 4, "codes s": 4, "codes col": 3, "row": 3, "strip": 3,
            "transpose": 2}  # fmt: skip
    return sum(next(v for key, v in cost.items() if role.startswith(key)) for role in roles)


def time_sequence(race: Race, b: Buffers, best: dict[str, Step], roles: list[str]) -> float | None:
    """One scheme's whole quantization of one tensor, back to back."""
    if race.late() or any(role not in best for role in roles):
        return None
    chosen = [best[role] for role in roles]

    def run() -> None:
        for step in chosen:
            step.launch(b)

    return race.time_ms(run)


def race_gemm(
    race: Race, role: str, o: GemmOperands, configs: dict[str, GemmConfig], shape: list[int]
) -> float | None:
    """Fastest usable configuration's time in ms."""
    best = None
    for name, c in configs.items():
        ms = race.timed(name, lambda c=c: launch_gemm(o, c))
        if ms is None:
            continue
        race.record["gemms"].append(
            {"gemm": role, "TKN": shape, "name": name, "superblock": o.superblock, "ms": ms,
             "tflops": o.flops / ms * 1e-9}
        )  # fmt: skip
        best = ms if best is None else min(best, ms)
    return best


def race_baselines(
    race: Race, role: str, mm_operands: tuple[torch.Tensor, torch.Tensor], o: GemmOperands,
    shape: list[int],
) -> None:  # fmt: skip
    """bf16 torch.mm of the operands before quantization, torch._int_mm on the same codes."""
    for name, run in (
        ("bf16 torch.mm", lambda: torch.mm(*mm_operands)),
        ("torch._int_mm", lambda: torch._int_mm(o.a, o.b.T)),
    ):
        if race.late():
            return
        ms = race.time_ms(run)
        race.record["gemms"].append(
            {"gemm": role, "TKN": shape, "name": name, "superblock": 0, "ms": ms,
             "tflops": o.flops / ms * 1e-9}
        )  # fmt: skip


def race_shape(race: Race, steps: list[Step], t: int, k: int, n: int) -> None:
    """Quantizers of X and E, both GEMMs, and the total of every scheme for one Linear."""
    device, shape = race.device, [t, k, n]
    x = Buffers(torch.randn(t, k, device=device).bfloat16())
    e = Buffers(torch.randn(t, n, device=device).bfloat16())
    weight = torch.randn(n, k, device=device).bfloat16()
    w_codes, w_scale, _ = quantize_rows_reference(rotate_last_reference(weight.float(), 128), 128)
    bandwidth = measure_copy(race, x.x)
    race.record.setdefault("copy_TBps", {})[str(shape)] = bandwidth * 1e-12
    best_x = race_quantizers(race, steps, x, bandwidth)
    best_e = race_quantizers(race, steps, e, bandwidth) if n != k else best_x

    # The GEMMs read what the last steps above left: real codes, so that the power is real too.
    forward = GemmOperands(x.row, w_codes, x.row_scale, w_scale, x.x.new_empty(t, n))
    race_baselines(race, "output", (x.x, weight.T), forward, shape)
    race_gemm(race, "output", forward, GEMMS, shape)
    dw = torch.empty(n, k, dtype=torch.bfloat16, device=device)
    gradient = GemmOperands(e.col, x.col, e.col_scale, x.col_scale, dw)
    race_baselines(race, "grad_weight", (e.x.T, x.x), gradient, shape)
    gemm_ms = race_gemm(race, "grad_weight", gradient, GEMMS, shape)
    single = GemmOperands(e.col, x.col, e.col_scale, x.col_scale, dw.float())
    race_gemm(race, "grad_weight fp32", single, {"128x256 8w 3st fp32": GEMMS["128x256 8w 3st"]},
              shape)  # fmt: skip
    unrotated = torch.empty_like(dw)
    unrotate_ms = None
    for name, (rows, warps) in UNROTATE.items():
        ms = race.timed(
            name, lambda r=rows, w=warps: launch_unrotate(dw, unrotated, x.h[128], r, w)
        )
        if ms is not None:
            share = 4 * dw.numel() / (ms * 1e-3) / bandwidth
            race.record["quantizers"].append(
                {"step": name, "role": "unrotate", "T": n, "K": k, "ms": ms, "share": share}
            )
            unrotate_ms = ms if unrotate_ms is None else min(unrotate_ms, ms)

    for scheme, (roles_x, roles_e) in sequences().items():
        scheme_gemm = gemm_ms
        if scheme.startswith("c "):
            o = GemmOperands(e.col, x.col, e.strip_scale, x.strip_scale, dw, int(scheme[2:]))
            scheme_gemm = race_gemm(race, "grad_weight", o, PROMOTING, shape)
        after = unrotate_ms if scheme.startswith("b") else 0.0
        x_ms = time_sequence(race, x, best_x, roles_x)
        e_ms = time_sequence(race, e, best_e, roles_e)
        parts = (x_ms, e_ms, scheme_gemm, after)
        entry = {"TKN": shape, "scheme": scheme, "x_ms": x_ms, "e_ms": e_ms,
                 "gemm_ms": scheme_gemm, "after_ms": after,
                 "total_ms": sum(parts) if None not in parts else None}  # fmt: skip
        if x_ms is not None:
            entry["x_bytes"] = minimal_bytes(roles_x)
            entry["x_share"] = entry["x_bytes"] * t * k / (x_ms * 1e-3) / bandwidth
        race.record["totals"].append(entry)


# --------------------------------------------------------------------------- accuracy


def sample(kind: str, device: str, t: int, k: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(X[T, K], E[T, N]) in bf16, of one kind of trouble."""
    generator = torch.Generator().manual_seed(7)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    x, e = normal(t, k), normal(t, n)
    if kind == "channels":
        x[:, ::61] *= 20.0
        e[:, ::53] *= 20.0
    elif kind == "tokens of X":
        x[::509] *= 20.0
    elif kind == "tokens of X, E":
        x[::509] *= 20.0
        e[::509] *= 20.0
    elif kind == "heavy tails":
        # Student's t with 3 degrees of freedom.
        x = x / (normal(t, k).square() + normal(t, k).square() + normal(t, k).square()).sqrt()
        e = e / (normal(t, n).square() + normal(t, n).square() + normal(t, n).square()).sqrt()
    elif kind == "token sizes":
        # Whole tokens of very different size (log-normal), as gradients have.
        e *= torch.exp(1.5 * normal(t, 1))
    return x.bfloat16().to(device), e.bfloat16().to(device)


def dequantized_rows(y: torch.Tensor, block: int) -> torch.Tensor:
    codes, scale, _ = quantize_rows_reference(y, block)
    return codes.double() * scale.double()[..., None]


def grad_weight_of(scheme: str, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """dW[N, K] in fp64 from the codes that a scheme would make (`plain`: no rotation)."""
    x_KT, e_NT = x.float().T.contiguous(), e.float().T.contiguous()
    if scheme == "b":
        codes, scale, _ = quantize_rows_reference(rotate_last_reference(x.float(), 128), 128)
        folded = dequantized_rows(e_NT * scale[None, :], 1)
        return rotate_last_reference(folded @ codes.double(), 128) / math.sqrt(128)
    block = {"a h64": 64, "a h32": 32}.get(scheme, 128)
    span = int(scheme[2:]) if scheme.startswith("c ") else x.shape[0]
    parts = []
    for operand in (e_NT, x_KT):
        y = operand if scheme == "plain" else rotate_last_reference(operand, block)
        y = y.reshape(y.shape[0], -1, span)
        parts.append(dequantized_rows(y, 1 if scheme == "plain" else block).flatten(1))
    return parts[0] @ parts[1].T


def sqnr_db(got: torch.Tensor, want: torch.Tensor) -> float:
    return 10.0 * math.log10((want.square().sum() / (got - want).square().sum()).item())


def measure_accuracy(race: Race, t: int = 8192, k: int = 512, n: int = 512) -> None:
    """SQNR of dW against fp64, per kind of data and scheme, from the plain torch twins."""
    schemes = ["plain", "a", "a h64", "a h32", "b", *(f"c {s}" for s in SUPERBLOCKS)]
    kinds = ["normal", "channels", "tokens of X", "tokens of X, E", "heavy tails", "token sizes"]
    table = race.record.setdefault("sqnr_db", {})
    for kind in kinds:
        if race.late():
            return
        x, e = sample(kind, race.device, t, k, n)
        want = e.double().T @ x.double()
        table[kind] = {s: round(sqnr_db(grad_weight_of(s, x, e), want), 2) for s in schemes}
        table[kind]["bf16 mm"] = round(sqnr_db((e.T @ x).double(), want), 2)


# --------------------------------------------------------------------------- report


def print_grid(title: str, columns: list[str], rows: dict[str, list[str]]) -> None:
    width = max((len(name) for name in rows), default=0)
    print(f"\n{title}\n{'':{width}} " + " ".join(f"{c:>10}" for c in columns))
    for name, cells in rows.items():
        print(f"{name:{width}} " + " ".join(f"{c:>10}" for c in cells))


def print_report(race: Race) -> None:
    record = race.record
    quantizers = record["quantizers"]
    tensors = sorted({(q["T"], q["K"]) for q in quantizers if q["role"] != "unrotate"})[::-1]
    rows: dict[str, list[str]] = {}
    for q in quantizers:
        if q["role"] == "unrotate":
            continue
        cells = rows.setdefault(q["step"], ["-"] * len(tensors))
        cells[tensors.index((q["T"], q["K"]))] = f"{q['ms'] * 1e3:.0f} {q['share']:.2f}"
    for name, cells in rows.items():
        v = record["variants"].get(name, {})
        cells.append(f"{v.get('registers')}/{v.get('spills')}")
    columns = [f"{t}x{k}" for t, k in tensors] + ["regs/spill"]
    print_grid("QUANTIZER STEPS: us, share of copy on the step's own bytes", columns, rows)

    shapes = list(dict.fromkeys(str(g["TKN"]) for g in record["gemms"]))
    rows = {}
    for g in record["gemms"]:
        tag = f" S{g['superblock']}" if g["superblock"] else ""
        kind = g["name"].replace("promoting", "prom.").replace("persistent", "persist.")
        name = f"{'O' if g['gemm'] == 'output' else 'GW'} {kind}{tag}"
        cells = rows.setdefault(name, ["-"] * len(shapes))
        cells[shapes.index(str(g["TKN"]))] = f"{g['tflops']:.0f}"
    columns = [",".join(f"{d // 1024}k" for d in json.loads(s)) for s in shapes]
    print_grid("GEMMs, TFLOP/s (O output, GW grad_weight), by T,K,N", columns, rows)

    rows = {}
    for entry in record["totals"]:
        cells = rows.setdefault(entry["scheme"], ["-"] * len(shapes))
        if entry["total_ms"] is not None and str(entry["TKN"]) in shapes:
            text = f"{entry['total_ms'] * 1e3:.0f}({entry['x_share']:.2f})"
            cells[shapes.index(str(entry["TKN"]))] = text
    print_grid("TOTAL us: X both ways + E both ways + grad_weight (+ un-rotation); in brackets\n"
               "X's quantizer as a share of copy on its scheme's bytes", columns, rows)  # fmt: skip
    big = [e for e in record["totals"] if e["TKN"] == list(SHAPES_TKN[0])]
    rows = {
        e["scheme"]: ["-" if v is None else f"{v * 1e3:.0f}" for v in
                      (e["x_ms"], e["e_ms"], e["gemm_ms"], e["after_ms"])]
        for e in big
    }  # fmt: skip
    print_grid(f"its parts for {SHAPES_TKN[0]}, us", ["X", "E", "GEMM", "un-rotate"], rows)

    if table := record.get("sqnr_db"):
        schemes = list(next(iter(table.values())))
        rows = {kind: [f"{values[s]:.1f}" for s in schemes] for kind, values in table.items()}
        print_grid("SQNR of dW, dB", schemes, rows)
    bad = {n: v["status"] for n, v in record["variants"].items() if v.get("status") != "ok"}
    print(f"\nvariants ok: {len(record['variants']) - len(bad)}, not ok: {len(bad)}")
    for name, status in bad.items():
        print(f"  {name}: {status}")
    print(f"{record['device']}, torch {record['torch']}, triton {record['triton']}, copy TB/s "
          f"{record.get('copy_TBps')}, wall {record['wall_s']:.0f} s")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write every figure to this JSON file")
    parser.add_argument("--seconds", type=float, default=135.0, help="skip what starts later")
    parser.add_argument("--check-only", action="store_true", help="correctness only")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
    race = Race(args.seconds, device)
    race.record |= {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    steps = quantizer_steps()
    torch.manual_seed(0)
    try:
        check_all(race, steps)
        if not args.check_only:
            measure_accuracy(race, **({} if device == "cuda" else {"t": 4096, "k": 128, "n": 128}))
            for t, k, n in SHAPES_TKN if device == "cuda" else ():
                race_shape(race, steps, t, k, n)
    finally:
        race.record["wall_s"] = time.perf_counter() - race.start
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(race.record, indent=1))
        print_report(race)


if __name__ == "__main__":
    main()
