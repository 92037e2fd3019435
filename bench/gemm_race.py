"""Races int8 matmuls with row and column scales on one Hopper GPU: the emitted Triton kernel in
many configurations, and kernels in Gluon whose products stay in flight. cuBLAS beside them: fp8
with row scales through torch._scaled_mm, and bf16.

    python bench/gemm_race.py --out bench/results/gemm_race.json [--quick] [--only gluon]
    python bench/gemm_race.py --offline        compiles everything without a GPU: registers, spills

Every kernel must first reproduce exact integer sums, scaled and rounded as the reference does, bit
for bit. A candidate that fails, hangs or crashes is dropped: they run in a child process that is
watched. Legend: out [M, N] = (a [M, C] @ b [N, C]^T) * a_scale [M] * b_scale [N].
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

# (M, N, C) and how often each occurs in a step of one Llama-3-8B block on 16384 tokens.
T = 16384
SHAPES = {
    (T, 14336, 4096): 3,
    (T, 4096, 14336): 3,
    (14336, 4096, T): 2,
    (4096, 14336, T): 1,
    (T, 4096, 4096): 4,
    (4096, 4096, T): 2,
    (T, 1024, 4096): 2,
    (T, 4096, 1024): 2,
    (1024, 4096, T): 2,
}
QUICK = ((T, 14336, 4096), (T, 4096, 14336), (T, 4096, 1024))
BLOCKS = 4
ODD_SHAPES = ((200, 328, 400), (8, 1032, 16), (4168, 4232, 528), (1544, 2056, 4112))
SETS_BYTES = 1 << 28  # operand sets are rotated until they exceed this: no L2 holds them
BURST_MS = 20.0
START_S, SILENCE_S = 120.0, 30.0  # a child that reports nothing for so long is taken to hang
FP8, BF16 = "cuBLAS fp8 row scales", "cuBLAS bf16"
Row = dict[str, Any]


# --- Triton ----------------------------------------------------------------------------------


@triton.jit
def _grouped(t, tiles_m, tiles_n, GROUP: tl.constexpr, ACROSS: tl.constexpr):
    """Tile of position t: down GROUP rows of tiles before the next column; ACROSS: mirrored."""
    if ACROSS:
        first = t // (GROUP * tiles_m) * GROUP
        size = min(tiles_n - first, GROUP)
        within = t % (GROUP * tiles_m)
        tile_m = within // size
        tile_n = first + within % size
    else:
        first = t // (GROUP * tiles_n) * GROUP
        size = min(tiles_m - first, GROUP)
        within = t % (GROUP * tiles_n)
        tile_m = first + within % size
        tile_n = within // size
    return tile_m, tile_n


@triton.jit
def _store_tile(
    out, out_desc, out_ptr, m0, n0, M, N,
    BM: tl.constexpr, BN: tl.constexpr, BY_TMA: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    if BY_TMA:
        if PARTS == 2:
            left, right = out.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
            out_desc.store([m0, n0], left)
            out_desc.store([m0, n0 + BN // 2], right)
        else:
            out_desc.store([m0, n0], out)
    else:
        m = m0 + tl.arange(0, BM)
        n = n0 + tl.arange(0, BN)
        mask = (m[:, None] < M) & (n[None, :] < N)
        tl.store(out_ptr + m.to(tl.int64)[:, None] * N + n[None, :], out, mask=mask)


@triton.jit
def triton_mm(
    a_desc, b_desc, out_desc, out_ptr, a_scale_ptr, b_scale_ptr, M, N, C,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, GROUP: tl.constexpr,
    ACROSS: tl.constexpr, PERSISTENT: tl.constexpr, BY_TMA: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    first = tl.program_id(0)
    last = tiles_m * tiles_n if PERSISTENT else first + 1
    for t in tl.range(first, last, tl.num_programs(0), flatten=PERSISTENT):
        tile_m, tile_n = _grouped(t, tiles_m, tiles_n, GROUP, ACROSS)
        m0 = tile_m * BM
        n0 = tile_n * BN
        accumulator = tl.zeros((BM, BN), dtype=tl.int32)
        for c in range(0, C, BC):
            a = a_desc.load([m0, c])
            b = b_desc.load([n0, c])
            accumulator = tl.dot(a, b.T, acc=accumulator, out_dtype=tl.int32)
        m = m0 + tl.arange(0, BM)
        n = n0 + tl.arange(0, BN)
        a_scale = tl.load(a_scale_ptr + m, mask=m < M, other=0.0)
        b_scale = tl.load(b_scale_ptr + n, mask=n < N, other=0.0)
        out = accumulator.to(tl.float32) * a_scale[:, None] * b_scale[None, :]
        _store_tile(out.to(tl.bfloat16), out_desc, out_ptr, m0, n0, M, N, BM, BN, BY_TMA, PARTS)


# --- Gluon: one warp loads, each consumer warpgroup multiplies and stores ------------------------


@gluon.jit
def _tile_at(t, M, N, BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr):
    tiles_n = gl.cdiv(N, BN)
    first = t // (GROUP * tiles_n) * GROUP
    size = min(gl.cdiv(M, BM) - first, GROUP)
    within = t % (GROUP * tiles_n)
    return first + within % size, within // size


@gluon.jit
def _advance(stage, phase, STAGES: gl.constexpr):
    wrapped = stage == STAGES - 1
    return gl.where(wrapped, 0, stage + 1), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def _produce(
    a_desc, b_desc, a_bufs, b_bufs, full, empty, M, N, C,
    PARTS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Keeps every free stage loading: PARTS pieces of a and one of b, over all of this program's
    tiles."""
    STAGES: gl.constexpr = b_bufs.type.shape[0]
    BM: gl.constexpr = a_bufs.type.shape[1]
    BN: gl.constexpr = b_bufs.type.shape[1]
    BC: gl.constexpr = b_bufs.type.shape[2]
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    tiles = gl.cdiv(M, BM * PARTS) * gl.cdiv(N, BN)
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        tile_m, tile_n = _tile_at(t, M, N, BM * PARTS, BN, GROUP)
        for c in range(0, C, BC):
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, (PARTS * BM + BN) * BC)
            for part in gl.static_range(PARTS):
                tma.async_copy_global_to_shared(
                    a_desc,
                    [(tile_m * PARTS + part) * BM, c],
                    bar,
                    a_bufs.index(stage * PARTS + part),
                )
            tma.async_copy_global_to_shared(b_desc, [tile_n * BN, c], bar, b_bufs.index(stage))
            stage, phase = _advance(stage, phase, STAGES)


@gluon.jit
def _split_columns(x, COUNT: gl.constexpr):
    """COUNT runs of adjacent columns, each a tensor; nothing moves between threads."""
    xs = (x,)
    for _ in gl.static_range(COUNT.bit_length() - 1):
        halves = ()
        for j in gl.static_range(len(xs)):
            each = xs[j]
            halves += each.reshape(each.shape[0], 2, each.shape[1] // 2).permute(0, 2, 1).split()
        xs = halves
    return xs


@gluon.jit
def _b_scales(b_scale_ptr, n, N, i: gl.constexpr, WIDTH: gl.constexpr, layout: gl.constexpr):
    columns = n + i * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    return gl.load(b_scale_ptr + columns, mask=columns < N, other=0.0)


@gluon.jit
def _epilogue(
    acc, a_scale, b_scales, out_desc, b_scale_ptr, out_bufs, m, n, N,
    FIRST: gl.constexpr, OUTS: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """Scales, rounds, and stores through OUTS buffers in turn, WIDTH columns at a time."""
    WIDTH: gl.constexpr = out_bufs.type.shape[2]
    COUNT: gl.constexpr = acc.shape[1] // WIDTH
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    runs = _split_columns(acc, COUNT)
    for i in gl.static_range(COUNT):
        if EARLY:
            b_scale = b_scales[i]
        else:
            b_scale = _b_scales(b_scale_ptr, n, N, i, WIDTH, narrow)
        run = gl.convert_layout(runs[i], narrow).to(gl.float32)
        scale = gl.convert_layout(a_scale, gl.SliceLayout(1, narrow))
        out = run * gl.expand_dims(scale, 1) * gl.expand_dims(b_scale, 0)
        buf = out_bufs.index(FIRST + i % OUTS)
        tma.store_wait(pendings=OUTS - 1)
        buf.store(out.to(out_desc.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [m, n + i * WIDTH], buf)


@gluon.jit
def _consume(
    out_desc, a_scale_ptr, b_scale_ptr, a_bufs, b_bufs, out_bufs, full, empty, turns, M, N, C,
    PART: gl.constexpr, PARTS: gl.constexpr, GROUP: gl.constexpr, PINGPONG: gl.constexpr,
    EARLY: gl.constexpr, WORKERS: gl.constexpr, INSTRUCTION_N: gl.constexpr,
):  # fmt: skip
    """One warpgroup: rows PART of every tile of the program, or (PINGPONG) every other tile. At
    most two steps' products are in flight; a stage is freed when the next step's have begun."""
    STAGES: gl.constexpr = b_bufs.type.shape[0]
    BM: gl.constexpr = a_bufs.type.shape[1]
    BN: gl.constexpr = b_bufs.type.shape[1]
    BC: gl.constexpr = b_bufs.type.shape[2]
    OUTS: gl.constexpr = out_bufs.type.shape[0] // WORKERS
    WIDTH: gl.constexpr = out_bufs.type.shape[2]
    ACC: gl.constexpr = gl.int32 if b_bufs.dtype == gl.int8 else gl.float32
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, INSTRUCTION_N, 32])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    tiles = gl.cdiv(M, BM * PARTS) * gl.cdiv(N, BN)
    steps = gl.cdiv(C, BC)
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    first = gl.program_id(0)
    stride = gl.num_programs(0)
    if PINGPONG:
        loaded = PART * steps
        turn = gl.to_tensor(1 - PART)
        first += PART * stride
        stride *= WORKERS
    for t in range(first, tiles, stride):
        tile_m, tile_n = _tile_at(t, M, N, BM * PARTS, BN, GROUP)
        if PINGPONG:
            m = tile_m * BM
            a_part = 0
            stage = loaded % STAGES
            phase = (loaded // STAGES) & 1
            loaded += WORKERS * steps
            mbarrier.wait(turns.index(PART), turn)
            turn ^= 1
        else:
            m = (tile_m * PARTS + PART) * BM
            a_part = PART
        n = tile_n * BN
        rows = m + gl.arange(0, BM, layout=gl.SliceLayout(1, layout))
        a_scale = gl.load(a_scale_ptr + rows, mask=rows < M, other=0.0)
        acc = gl.zeros([BM, BN], ACC, layout)
        mbarrier.wait(full.index(stage), phase)
        acc = warpgroup_mma(
            a_bufs.index(stage * PARTS + a_part),
            b_bufs.index(stage).permute((1, 0)),
            acc,
            use_acc=False,
            is_async=True,
        )
        acc = warpgroup_mma_wait(1, (acc,))
        before = stage
        stage, phase = _advance(stage, phase, STAGES)
        for _c in range(BC, C, BC):
            mbarrier.wait(full.index(stage), phase)
            acc = warpgroup_mma(
                a_bufs.index(stage * PARTS + a_part),
                b_bufs.index(stage).permute((1, 0)),
                acc,
                is_async=True,
            )
            acc = warpgroup_mma_wait(1, (acc,))
            mbarrier.arrive(empty.index(before), count=1)
            before = stage
            stage, phase = _advance(stage, phase, STAGES)
        if PINGPONG:
            mbarrier.arrive(turns.index(1 - PART), count=1)
        b_scales = ()
        if EARLY:
            for i in gl.static_range(BN // WIDTH):
                b_scales += (_b_scales(b_scale_ptr, n, N, i, WIDTH, narrow),)
        acc = warpgroup_mma_wait(0, (acc,))
        mbarrier.arrive(empty.index(before), count=1)
        _epilogue(
            acc, a_scale, b_scales, out_desc, b_scale_ptr, out_bufs, m, n, N, PART * OUTS, OUTS,
            EARLY,
        )  # fmt: skip
    tma.store_wait(pendings=0)


@gluon.jit
def gluon_mm(
    a_desc, b_desc, out_desc, a_scale_ptr, b_scale_ptr, M, N, C,
    STAGES: gl.constexpr, OUTS: gl.constexpr, WORKERS: gl.constexpr, GROUP: gl.constexpr,
    PINGPONG: gl.constexpr, EARLY: gl.constexpr, INSTRUCTION_N: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    PARTS: gl.constexpr = 1 if PINGPONG else WORKERS
    BM: gl.constexpr = a_desc.block_type.shape[0]
    BN: gl.constexpr = b_desc.block_type.shape[0]
    BC: gl.constexpr = b_desc.block_type.shape[1]
    WIDTH: gl.constexpr = out_desc.block_type.shape[1]
    a_bufs = gl.allocate_shared_memory(a_desc.dtype, [STAGES * PARTS, BM, BC], a_desc.layout)
    b_bufs = gl.allocate_shared_memory(b_desc.dtype, [STAGES, BN, BC], b_desc.layout)
    out_bufs = gl.allocate_shared_memory(
        out_desc.dtype, [OUTS * WORKERS, BM, WIDTH], out_desc.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=PARTS)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()
    # Constants must be passed here, not through a tuple with a name, which makes them values.
    if WORKERS == 2:
        gl.warp_specialize([
            (_consume, (
                out_desc, a_scale_ptr, b_scale_ptr, a_bufs, b_bufs, out_bufs, full, empty, turns,
                M, N, C, 0, PARTS, GROUP, PINGPONG, EARLY, WORKERS, INSTRUCTION_N,
            )),
            (_consume, (
                out_desc, a_scale_ptr, b_scale_ptr, a_bufs, b_bufs, out_bufs, full, empty, turns,
                M, N, C, 1, PARTS, GROUP, PINGPONG, EARLY, WORKERS, INSTRUCTION_N,
            )),
            (_produce, (a_desc, b_desc, a_bufs, b_bufs, full, empty, M, N, C, PARTS, GROUP)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (
                out_desc, a_scale_ptr, b_scale_ptr, a_bufs, b_bufs, out_bufs, full, empty, turns,
                M, N, C, 0, PARTS, GROUP, PINGPONG, EARLY, WORKERS, INSTRUCTION_N,
            )),
            (_consume, (
                out_desc, a_scale_ptr, b_scale_ptr, a_bufs, b_bufs, out_bufs, full, empty, turns,
                M, N, C, 1, PARTS, GROUP, PINGPONG, EARLY, WORKERS, INSTRUCTION_N,
            )),
            (_consume, (
                out_desc, a_scale_ptr, b_scale_ptr, a_bufs, b_bufs, out_bufs, full, empty, turns,
                M, N, C, 2, PARTS, GROUP, PINGPONG, EARLY, WORKERS, INSTRUCTION_N,
            )),
            (_produce, (a_desc, b_desc, a_bufs, b_bufs, full, empty, M, N, C, PARTS, GROUP)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip


@gluon.jit
def gluon_plain_mm(
    a_desc, b_desc, out_desc, a_scale_ptr, b_scale_ptr, M, N, C,
    STAGES: gl.constexpr, OUTS: gl.constexpr, GROUP: gl.constexpr, EARLY: gl.constexpr,
    INSTRUCTION_N: gl.constexpr,
):  # fmt: skip
    """One warpgroup that loads, multiplies and stores one tile: the emitted Triton kernel, with two
    steps' products in flight."""
    BM: gl.constexpr = a_desc.block_type.shape[0]
    BN: gl.constexpr = b_desc.block_type.shape[0]
    BC: gl.constexpr = b_desc.block_type.shape[1]
    WIDTH: gl.constexpr = out_desc.block_type.shape[1]
    ACC: gl.constexpr = gl.int32 if b_desc.dtype == gl.int8 else gl.float32
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, INSTRUCTION_N, 32])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    a_bufs = gl.allocate_shared_memory(a_desc.dtype, [STAGES, BM, BC], a_desc.layout)
    b_bufs = gl.allocate_shared_memory(b_desc.dtype, [STAGES, BN, BC], b_desc.layout)
    out_bufs = gl.allocate_shared_memory(out_desc.dtype, [OUTS, BM, WIDTH], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    tile_m, tile_n = _tile_at(gl.program_id(0), M, N, BM, BN, GROUP)
    m = tile_m * BM
    n = tile_n * BN
    for i in gl.static_range(STAGES - 1):
        inside = i * BC < C
        mbarrier.expect(full.index(i), (BM + BN) * BC, pred=inside)
        tma.async_copy_global_to_shared(
            a_desc, [m, i * BC], full.index(i), a_bufs.index(i), pred=inside
        )
        tma.async_copy_global_to_shared(
            b_desc, [n, i * BC], full.index(i), b_bufs.index(i), pred=inside
        )
    rows = m + gl.arange(0, BM, layout=gl.SliceLayout(1, layout))
    a_scale = gl.load(a_scale_ptr + rows, mask=rows < M, other=0.0)
    acc = gl.zeros([BM, BN], ACC, layout)
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    free = gl.to_tensor(STAGES - 1)
    for c in range(0, C, BC):
        mbarrier.wait(full.index(stage), phase)
        acc = warpgroup_mma(
            a_bufs.index(stage), b_bufs.index(stage).permute((1, 0)), acc, is_async=True
        )
        acc = warpgroup_mma_wait(1, (acc,))
        ahead = c + (STAGES - 1) * BC
        inside = ahead < C
        bar = full.index(free)
        mbarrier.expect(bar, (BM + BN) * BC, pred=inside)
        tma.async_copy_global_to_shared(a_desc, [m, ahead], bar, a_bufs.index(free), pred=inside)
        tma.async_copy_global_to_shared(b_desc, [n, ahead], bar, b_bufs.index(free), pred=inside)
        free = stage
        stage, phase = _advance(stage, phase, STAGES)
    b_scales = ()
    if EARLY:
        for i in gl.static_range(BN // WIDTH):
            b_scales += (_b_scales(b_scale_ptr, n, N, i, WIDTH, narrow),)
    acc = warpgroup_mma_wait(0, (acc,))
    _epilogue(
        acc, a_scale, b_scales, out_desc, b_scale_ptr, out_bufs, m, n, N, 0, OUTS, EARLY
    )  # fmt: skip
    tma.store_wait(pendings=0)


# --- candidates ------------------------------------------------------------------------------


@dataclass(frozen=True)
class TritonConfig:
    """`programs`: programs an SM, of a persistent kernel."""

    block_m: int
    block_n: int
    block_c: int
    warps: int
    stages: int
    group: int = 16
    across: bool = False
    programs: int | None = None
    tma_store: bool = False
    parts: int = 1

    @property
    def name(self) -> str:
        more = " across" * self.across
        more += f" persistent{self.programs}" if self.programs else ""
        more += f" store{self.parts}" if self.tma_store else ""
        tile = f"{self.block_m}x{self.block_n}x{self.block_c}"
        return f"triton {tile} {self.warps}w {self.stages}s g{self.group}{more}"

    @property
    def kernel(self) -> Any:
        return triton_mm

    def blocks(self) -> tuple[list[int], list[int], list[int]]:
        out = [self.block_m, self.block_n // self.parts]
        return [self.block_m, self.block_c], [self.block_n, self.block_c], out

    def constants(self) -> dict[str, Any]:
        return {
            "BM": self.block_m,
            "BN": self.block_n,
            "BC": self.block_c,
            "GROUP": self.group,
            "ACROSS": self.across,
            "PERSISTENT": self.programs is not None,
            "BY_TMA": self.tma_store,
            "PARTS": self.parts,
        }

    def options(self) -> dict[str, Any]:
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}

    def grid(self, M: int, N: int, sms: int) -> tuple[int]:
        tiles = -(-M // self.block_m) * -(-N // self.block_n)
        return (tiles if self.programs is None else min(tiles, self.programs * sms),)

    def arguments(self, a: Any, b: Any, out: Any, scales: Any) -> list[Any]:
        blocks = zip((a, b, out), self.blocks(), strict=True)
        descriptors = [TensorDescriptor.from_tensor(x, block) for x, block in blocks]
        return [*descriptors, out, *scales, a.shape[0], b.shape[0], a.shape[1]]

    def signature(self, operand: str) -> dict[str, str]:
        kinds = (operand, operand, "bf16")
        names = ("a_desc", "b_desc", "out_desc")
        table = {
            name: f"tensordesc<{kind}{block}>"
            for name, kind, block in zip(names, kinds, self.blocks(), strict=True)
        }
        return table | {"out_ptr": "*bf16"}


@dataclass(frozen=True)
class GluonConfig:
    """`block_m`: rows of one consumer. `workers`: consumer warpgroups, `None`: no specialization.
    `pingpong`: each consumer has tiles of its own, in turn. `early`: column scales are loaded
    before the last products end. `outs` buffers of `width` columns a consumer stage the output."""

    block_m: int
    block_n: int
    stages: int
    outs: int
    workers: int | None = 2
    group: int = 16
    pingpong: bool = False
    early: bool = True
    width: int = 64
    block_c: int = 128
    registers: int = 240
    fp8: bool = False

    @property
    def name(self) -> str:
        how = "plain" if self.workers is None else f"{self.workers}wg"
        how += " pingpong" * self.pingpong
        kind = "gluon fp8" if self.fp8 else "gluon"
        late = "" if self.early else " late"
        tile = f"{self.block_m}x{self.block_n}x{self.block_c}"
        return f"{kind} {how} {tile} {self.stages}s {self.outs}o{self.width} g{self.group}{late}"

    @property
    def kernel(self) -> Any:
        return gluon_plain_mm if self.workers is None else gluon_mm

    def blocks(self) -> tuple[list[int], list[int], list[int]]:
        a, b = [self.block_m, self.block_c], [self.block_n, self.block_c]
        return a, b, [self.block_m, self.width]

    def layouts(self) -> tuple[Any, Any, Any]:
        swizzles = min(128, self.block_c), min(128, 2 * self.width)
        codes, out = (
            gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=bits, rank=2)
            for swizzle, bits in zip(swizzles, (8, 16), strict=True)
        )
        return codes, codes, out

    def constants(self) -> dict[str, Any]:
        n = min(self.block_n, 256 if self.fp8 else 128)
        table = {
            "STAGES": self.stages,
            "OUTS": self.outs,
            "GROUP": self.group,
            "EARLY": self.early,
            "INSTRUCTION_N": n,
        }
        if self.workers is None:
            return table
        return table | {
            "WORKERS": self.workers,
            "PINGPONG": self.pingpong,
            "REGISTERS": self.registers,
        }

    def options(self) -> dict[str, Any]:
        return {"num_warps": 4, "enable_fp_fusion": False}

    def grid(self, M: int, N: int, sms: int) -> tuple[int]:
        rows = self.block_m * (1 if self.workers is None or self.pingpong else self.workers)
        tiles = -(-M // rows) * -(-N // self.block_n)
        return (tiles if self.workers is None else min(tiles, sms),)

    def arguments(self, a: Any, b: Any, out: Any, scales: Any) -> list[Any]:
        parts = zip((a, b, out), self.blocks(), self.layouts(), strict=True)
        descriptors = [GluonDescriptor.from_tensor(x, block, layout) for x, block, layout in parts]
        return [*descriptors, *scales, a.shape[0], b.shape[0], a.shape[1]]

    def signature(self, operand: str) -> dict[str, str]:
        kinds = (operand, operand, "bf16")
        names = ("a_desc", "b_desc", "out_desc")
        parts = zip(names, kinds, self.blocks(), self.layouts(), strict=True)
        return {name: f"tensordesc<{kind}{block},{lay!r}>" for name, kind, block, lay in parts}


Config = TritonConfig | GluonConfig
CURRENT = TritonConfig(128, 128, 128, 4, 3)
CANDIDATES: tuple[Config, ...] = (
    CURRENT,
    GluonConfig(64, 256, 4, 2),
    GluonConfig(64, 256, 4, 2, group=8),
    GluonConfig(64, 256, 4, 2, group=32),
    GluonConfig(128, 128, 4, 1),
    GluonConfig(128, 128, 4, 1, group=8),
    GluonConfig(128, 128, 4, 2, width=32),
    GluonConfig(128, 128, 6, 1, pingpong=True),
    GluonConfig(128, 128, 6, 1, pingpong=True, group=8),
    GluonConfig(128, 128, 5, 2, pingpong=True),
    GluonConfig(64, 256, 3, 2, workers=3, early=False, registers=160),
    GluonConfig(64, 256, 7, 1, workers=3, early=False, registers=160, block_c=64),
    GluonConfig(128, 128, 3, 1, workers=None),
    GluonConfig(128, 128, 3, 1, workers=None, group=8),
    GluonConfig(64, 256, 4, 2, fp8=True),
    TritonConfig(128, 128, 128, 4, 3, group=8),
    TritonConfig(128, 128, 128, 4, 3, group=32),
    TritonConfig(128, 128, 128, 4, 3, across=True),
    TritonConfig(128, 128, 64, 4, 6),
    TritonConfig(128, 128, 128, 8, 3),
    TritonConfig(128, 256, 128, 8, 4, group=8),
    TritonConfig(256, 128, 128, 8, 4, group=8),
    TritonConfig(128, 256, 64, 8, 6, group=8),
    TritonConfig(64, 256, 128, 4, 2),
    TritonConfig(128, 128, 128, 4, 3, programs=2),
    TritonConfig(128, 128, 128, 4, 2, tma_store=True),
    TritonConfig(128, 256, 128, 8, 3, group=8, programs=1, tma_store=True, parts=2),
)
BY_NAME = {config.name: config for config in CANDIDATES}


def is_fp8(config: Config) -> bool:
    return isinstance(config, GluonConfig) and config.fp8


def launcher(config: Config, a: Any, b: Any, out: Any, scales: Any) -> Callable[[], object]:
    """A launch on these operands: descriptors are made once, here."""
    sms = torch.cuda.get_device_properties(a.device).multi_processor_count
    grid = config.grid(a.shape[0], b.shape[0], sms)
    bound = config.kernel[grid]
    arguments, named = config.arguments(a, b, out, scales), config.constants() | config.options()
    return lambda: bound(*arguments, **named)


def operands(M: int, N: int, C: int, dtype: torch.dtype) -> list[Any]:
    """Codes [M, C] and [N, C], the output, and the scales of rows and columns."""
    shapes = ((M, C), (N, C))
    if dtype == torch.int8:
        codes = [torch.randint(-127, 128, s, dtype=dtype, device="cuda") for s in shapes]
    else:
        codes = [torch.randn(s, device="cuda", dtype=torch.bfloat16).to(dtype) for s in shapes]
    out = torch.full((M, N), torch.nan, dtype=torch.bfloat16, device="cuda")
    scales = [torch.rand(size, device="cuda") * 1e-2 + 1e-4 for size in (M, N)]
    return [*codes, out, scales]


# --- child: checks, then the race ------------------------------------------------------------


def tell(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def wrong_elements(config: Config, M: int, N: int, C: int) -> float:
    """How many elements of the output differ from the reference by a bit (int8), or by more than
    bf16 and the tensor core's fp8 sums allow; at most 2048 rows are looked at, chosen at random."""
    dtype = torch.float8_e4m3fn if is_fp8(config) else torch.int8
    a, b, out, scales = operands(M, N, C, dtype)
    call = launcher(config, a, b, out, scales)
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    rows = torch.randperm(M, device="cuda")[:2048]
    exact = a.float()[rows].double() @ b.double().t()
    expected = exact.float() * scales[0][rows][:, None] * scales[1][None, :]
    if is_fp8(config):
        close = (out[rows].float() - expected).abs() <= 5e-2 * expected.abs().mean()
        return float((~close).sum())
    return float((out[rows] != expected.to(torch.bfloat16)).sum())


def check(config: Config) -> None:
    """Told: the candidate's wrong elements over all shapes, or its error."""
    tell(begin=config.name)
    try:
        found = {str(s): wrong_elements(config, *s) for s in (*ODD_SHAPES, (T, 4096, 1024))}
        wrong = {shape: count for shape, count in found.items() if count}
        tell(checked=config.name, wrong=wrong)
    except Exception as error:
        tell(checked=config.name, error=f"{type(error).__name__}: {error}"[:300])
        if "CUDA" in str(error):
            raise


def baselines(sets: int, M: int, N: int, C: int) -> dict[str, list[Callable[[], object]]]:
    calls: dict[str, list[Callable[[], object]]] = {FP8: [], BF16: []}
    for _ in range(sets):
        a, b, out, (row, column) = operands(M, N, C, torch.float8_e4m3fn)
        calls[FP8].append(
            lambda a=a, b=b, row=row, column=column: torch._scaled_mm(
                a,
                b.t(),
                scale_a=row[:, None],
                scale_b=column[None, :],
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
        )
        x, w = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((M, C), (N, C)))
        calls[BF16].append(lambda x=x, w=w, out=out: torch.mm(x, w.t(), out=out))
    return calls


def captured(calls: list[Callable[[], object]]) -> Any:
    """A CUDA graph of all calls: replays cost the host nothing."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph


def burst_ms(graph: Any, calls: int, replays: int) -> float:
    """Mean time of a call, over `replays` replays after one untimed."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / (replays * calls)


def race(shape: tuple[int, int, int], names: list[str], rounds: int) -> None:
    """Told: the median time of every candidate on the shape, in rounds of mixed order."""
    M, N, C = shape
    sets = max(2, min(4, -(-SETS_BYTES // ((M + N) * C))))
    tell(begin=f"race {shape}")
    libraries = baselines(sets, M, N, C)  # kept: a capture frees what nobody holds
    graphs = {name: captured(calls) for name, calls in libraries.items()}
    made = {
        dtype: [operands(M, N, C, dtype) for _ in range(sets)]
        for dtype in {torch.float8_e4m3fn if is_fp8(BY_NAME[n]) else torch.int8 for n in names}
    }
    for name in names:
        config = BY_NAME[name]
        tell(begin=f"{name} on {shape}")
        dtype = torch.float8_e4m3fn if is_fp8(config) else torch.int8
        graphs[name] = captured([launcher(config, *each) for each in made[dtype]])
    replays = {}
    for name, graph in graphs.items():
        tell(begin=f"{name} on {shape}")
        replays[name] = max(1, round(BURST_MS / (burst_ms(graph, sets, 1) * sets)))
    times: dict[str, list[float]] = {name: [] for name in graphs}
    order = list(graphs)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            times[name].append(burst_ms(graphs[name], sets, replays[name]))
        tell(begin=f"round on {shape}")
    rows = []
    for name, each in times.items():
        ms = statistics.median(each)
        rows.append(
            {"name": name, "M": M, "N": N, "C": C, "ms": ms, "spread": max(each) / min(each)}
            | {"tflops": 2e-9 * M * N * C / ms}
        )
    tell(raced=list(shape), rows=rows)
    for graph in graphs.values():
        graph.reset()


def sustained(names: list[str], shape: tuple[int, int, int], seconds: float) -> None:
    """Told: rate, SM clock and power of each candidate when nothing else runs for a while."""
    M, N, C = shape
    table = baselines(2, M, N, C)
    for name in names:
        if name in BY_NAME:
            dtype = torch.float8_e4m3fn if is_fp8(BY_NAME[name]) else torch.int8
            each = [operands(M, N, C, dtype) for _ in range(2)]
            table[name] = [launcher(BY_NAME[name], *one) for one in each]
    query = "nvidia-smi --query-gpu=clocks.sm,power.draw --format=csv,noheader,nounits"
    for name in names:
        tell(begin=f"sustained {name}")
        graph = captured(table[name])
        once = burst_ms(graph, 2, 3)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        replays = int(seconds * 1e3 / (2 * once))
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        time.sleep(seconds * 0.6)
        try:
            found = subprocess.run(query.split(), capture_output=True, text=True, timeout=5)
            clock, power = found.stdout.splitlines()[0].split(", ")
        except (OSError, ValueError, IndexError, subprocess.SubprocessError):
            clock = power = "?"
        torch.cuda.synchronize()
        ms = start.elapsed_time(end) / (2 * replays)
        tell(
            sustained=name, shape=list(shape), tflops=2e-9 * M * N * C / ms, mhz=clock, watts=power
        )
        graph.reset()


def child(task: Row) -> None:
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
    tell(begin="start")
    if task["kind"] == "compile":
        for name in task["names"]:
            compile_for_device(BY_NAME[name])
    elif task["kind"] == "check":
        for name in task["names"]:
            check(BY_NAME[name])
    elif task["kind"] == "race":
        for shape in task["shapes"]:
            race(tuple(shape), task["names"], task["rounds"])
    else:
        sustained(task["names"], tuple(task["shape"]), task["seconds"])


# --- compilation -----------------------------------------------------------------------------


def compile_for_device(config: Config) -> None:
    """Puts the binary that the race needs into Triton's cache; launches nothing."""
    dtype = torch.float8_e4m3fn if is_fp8(config) else torch.int8
    named = config.constants() | config.options()
    try:
        for size in (512, 520):  # sizes that are multiples of 16, and those that are not
            given = operands(size, size, 512, dtype)
            config.kernel.warmup(*config.arguments(*given), grid=(1,), **named)
            tell(begin=config.name)
        tell(compiled=config.name)
    except Exception as error:  # noqa: BLE001  a race reports whatever went wrong
        tell(compiled=config.name, error=f"{type(error).__name__}: {error}"[:300])


def compile_offline(config: Config) -> Row:
    """Registers, spills, shared memory and products of the sm_90 binary."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    fp8 = is_fp8(config)
    kinds = config.signature("fp8e4nv" if fp8 else "i8")
    kinds |= {"a_scale_ptr": "*fp32", "b_scale_ptr": "*fp32", "M": "i32", "N": "i32", "C": "i32"}
    constants = config.constants()
    names = config.kernel.arg_names
    signature = {name: kinds.get(name, "constexpr") for name in names}
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (i,): aligned
        for i, name in enumerate(names)
        if signature[name] == "i32" or signature[name].startswith("*")
    }
    indexed = {(names.index(name),): value for name, value in constants.items()}
    make = GluonASTSource if isinstance(config, GluonConfig) else ASTSource
    source = make(config.kernel, signature, indexed, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=config.options())
    return {"name": config.name, "shared": compiled.metadata.shared, **_binary(compiled)}


def _binary(compiled: Any) -> Row:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        tool = knobs.nvidia.ptxas.path
        command = [tool, "-v", "--gpu-name=sm_90a", str(ptx), "-o", str(ptx) + ".cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    text = compiled.asm["ptx"]
    products = set(re.findall(r"wgmma\.mma_async\S*?\.(m\d+n\d+k\d+)", text))
    waits = re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", text)
    found = re.search(r"Used (\d+) registers", said)
    spills = re.search(r"(\d+) bytes spill stores", said)
    return {
        "registers": int(found[1]) if found else None,
        "spill_bytes": int(spills[1]) if spills else None,
        "products": sorted(products),
        "waits": waits,
        "serialized": "C7510" in said or "serialized" in said,
    }


# --- parent ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """How a child came to an end, and what it was at."""

    at: str
    what: str


def run_child(task: Row, silence: float = SILENCE_S) -> tuple[list[Row], Failure | None]:
    """The events that a child told, and where and how it hung or died (None: it ended)."""
    command = [sys.executable, __file__, "--task", json.dumps(task)]
    with tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True)
        lines: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        events: list[Row] = []
        at, patience = "start", START_S
        while True:
            try:
                line = lines.get(timeout=patience)
            except queue.Empty:
                process.kill()
                process.wait()
                return events, Failure(at, "hung")
            if line is None:
                break
            try:
                event = json.loads(line)
            except ValueError:
                continue
            at, patience = event.get("begin", at), silence
            if "begin" not in event:
                events.append(event)
        code = process.wait()
        complaints.seek(0)
        tail = complaints.read()[-400:]
    return events, None if code == 0 else Failure(at, f"exit {code}: {tail}")


def compile_all(names: list[str]) -> dict[str, str]:
    """Errors by candidate; binaries are left in the cache, made in parallel."""
    width = max(1, min(12, (os.cpu_count() or 2) - 1, len(names)))
    tasks = [{"kind": "compile", "names": names[i::width]} for i in range(width)]
    errors: dict[str, str] = {}
    with ThreadPoolExecutor(width) as pool:
        for task, (events, failure) in zip(tasks, pool.map(run_child, tasks), strict=True):
            done = {event["compiled"] for event in events if "compiled" in event}
            errors |= {e["compiled"]: e["error"] for e in events if "error" in e}
            missing = [name for name in task["names"] if name not in done]
            if missing and failure:
                errors[missing[0]] = failure.what
    return errors


def check_all(names: list[str]) -> tuple[list[str], dict[str, str]]:
    """The candidates that are right, and why the others are not; a hung or crashed one is passed
    over by a fresh child."""
    right: list[str] = []
    errors: dict[str, str] = {}
    left = list(names)
    while left:
        events, failure = run_child({"kind": "check", "names": left}, silence=15.0)
        for event in events:
            name = event["checked"]
            left.remove(name)
            if "error" in event:
                errors[name] = event["error"]
            elif event["wrong"]:
                errors[name] = f"wrong elements: {event['wrong']}"
            else:
                right.append(name)
        if failure is None:
            break
        if failure.at in left:
            left.remove(failure.at)
            errors[failure.at] = failure.what
        elif not events:
            errors |= dict.fromkeys(left, failure.what)
            break
    return right, errors


def step_ms(rows: list[Row], name: str) -> float | None:
    """Time of all GEMMs of a step with one candidate; None where a shape is missing."""
    found = {(r["M"], r["N"], r["C"]): r["ms"] for r in rows if r["name"] == name}
    if any(shape not in found for shape in SHAPES):
        return None
    return BLOCKS * sum(count * found[shape] for shape, count in SHAPES.items())


def show(rows: list[Row], shapes: list[tuple[int, int, int]]) -> None:
    """TFLOP/s, one line a candidate and one column a shape; milliseconds of a step at the end."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    table = {(r["name"], r["M"], r["N"], r["C"]): r for r in rows}
    width = max(map(len, names), default=0)
    heads = [f"{M}x{N}x{C}" for M, N, C in shapes]
    print("TFLOP/s".ljust(width), *heads, "step ms")
    steps = {name: step_ms(rows, name) for name in names}
    for name in sorted(names, key=lambda n: steps[n] or 0.0):
        cells = []
        for shape, head in zip(shapes, heads, strict=True):
            row = table.get((name, *shape))
            cells.append((f"{row['tflops']:.0f}" if row else "-").rjust(len(head)))
        step = steps[name]
        print(name.ljust(width), *cells, "" if step is None else f"{step:.2f}".rjust(7))
    if names and all(steps.values()):
        own = [row for row in rows if row["name"] in BY_NAME and not is_fp8(BY_NAME[row["name"]])]
        best = {
            s: min((r for r in own if (r["M"], r["N"], r["C"]) == s), key=lambda r: r["ms"])
            for s in shapes
        }
        total = BLOCKS * sum(SHAPES[s] * best[s]["ms"] for s in shapes)
        print(f"best int8 of each shape: {total:.2f} ms a step")
        for shape, row in best.items():
            print(f"  {shape}: {row['name']}, {row['tflops']:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--quick", action="store_true", help="three shapes")
    parser.add_argument("--only", default="", help="candidates whose name contains this")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--offline", action="store_true", help="compile only, without a GPU")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        child(json.loads(options.task))
        return
    names = [c.name for c in CANDIDATES if options.only in c.name or c == CURRENT]
    if options.offline:
        for name in names:
            try:
                print(json.dumps(compile_offline(BY_NAME[name])), flush=True)
            except Exception as error:  # noqa: BLE001
                print(name, type(error).__name__, str(error)[:300], flush=True)
        return
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        parser.error("needs a GPU of compute capability 9.0")
    began = time.time()
    errors = compile_all(names)
    compiled = time.time() - began
    right, wrong = check_all([name for name in names if name not in errors])
    errors |= wrong
    checked = time.time() - began
    shapes = list(QUICK if options.quick else SHAPES)
    rows: list[Row] = []
    left, racing = list(shapes), list(right)
    while left:
        task = {"kind": "race", "names": racing, "shapes": left, "rounds": options.rounds}
        events, failure = run_child(task)
        rows += [row for event in events for row in event["rows"]]
        raced = [tuple(event["raced"]) for event in events]
        left = [shape for shape in left if shape not in raced]
        if failure is None:
            break
        guilty = [name for name in racing if failure.at.startswith(f"{name} on")]
        errors |= dict.fromkeys(guilty, failure.what)
        racing = [name for name in racing if name not in guilty]
        if not guilty and left:
            errors[str(left.pop(0))] = f"at {failure.at}: {failure.what}"
    record: Row = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "configurations": {name: asdict(BY_NAME[name]) for name in names},
        "errors": errors,
        "rows": rows,
    }
    gluon_rows = [r for r in rows if r["name"].startswith("gluon ") and "fp8" not in r["name"]]
    gluon_names = {r["name"] for r in gluon_rows}
    totals = {n: sum(r["ms"] for r in gluon_rows if r["name"] == n) for n in gluon_names}
    longest = [FP8, CURRENT.name, *sorted(totals, key=lambda n: totals[n])[:2]]
    longest = [name for name in longest if name == FP8 or name in right]
    task = {"kind": "sustained", "names": longest, "shape": shapes[0], "seconds": 1.0}
    events, failure = run_child(task)
    record["sustained"] = events
    record["seconds"] = time.time() - began
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    for name, error in errors.items():
        print(f"dropped {name}: {error}")
    for event in events:
        print(
            f"sustained {event['sustained']}: {event['tflops']:.0f} TFLOP/s, "
            f"{event['mhz']} MHz, {event['watts']} W"
        )
    print(f"{record['device']}, torch {torch.__version__}, triton {triton.__version__}, ", end="")
    print(f"compiled {compiled:.0f} s, checked {checked:.0f} s, all {record['seconds']:.0f} s")
    show(rows, shapes)


if __name__ == "__main__":
    main()
