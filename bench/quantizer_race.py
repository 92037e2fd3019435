"""Races rotate-and-quantize kernels that are not (yet) what hadagraph emits against those that it
emits, a copy, and reads without a rotation. Every candidate's codes and scales are first compared
with the reference: bit for bit on integers, within the numerics contract on random data, and with
inf and NaN in the input.

    python bench/quantizer_race.py --out race.json [--quick] [--shapes 16384x4096,...]

Families (T tokens, K columns, bf16 in, int8 out; H128 along K for rows, H32 along T for columns):
    rows           codes [T, K] and a scale a row, one read: H128 as a product with H_w (w = 16 to
                   128, one small matrix) and butterflies over 128 / w accumulators
    columns amax   maxima of columns by butterflies over 32 vectors of a program's tokens
    columns write  codes [K, T] from those maxima, four codes packed in a word
    columns two    both passes, the second one from the end backwards, where the cache still is
    columns one    one launch: stripes of columns, whose write tasks follow their maxima's tasks by
                   a few stripes and so find x in the L2 cache
    both amax, both write, both two    rows and columns in two passes
    both           a rows kernel and then columns, the fastest of each
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

Lines = list[str]
SHAPES = ((16384, 4096), (16384, 14336), (8192, 2048), (4096, 14336))
TOKENS = 32  # one rotation block along T
# Adding one of these leaves code + 128 in the low byte of an fp32. The four are such that the sum
# of the four bit patterns, shifted by 0, 8, 16 and 24, is the four bytes code + 128 and no more.
PACKED_ROUND = (12583040.0, 12583040.0, 12645696.0, 12582912.0)
ROUND = 12582912.0
NAN_MAX = "tl.maximum({}, {}, propagate_nan=tl.PropagateNan.ALL)"
FORMAT_MAX = {"int8": 127.0, "fp8_e4m3": 448.0}
CODE_POINTER = {"int8": "*i8", "fp8_e4m3": "*fp8e4nv"}


def indent(lines: Lines) -> Lines:
    return ["    " + line for line in lines]


def butterflies(count: int, block: int) -> Lines:
    """y0.. y{count - 1} become their Walsh-Hadamard transforms within runs of `block`."""
    lines, step = [], 1
    while step < block:
        for i in range(count):
            if not i & step:
                a, b = f"y{i}", f"y{i | step}"
                lines.append(f"{a}, {b} = {a} + {b}, {a} - {b}")
        step *= 2
    return lines


def maximum_of(names: list[str]) -> Lines:
    """The first of the names becomes the maximum of all, NaN if one is NaN."""
    lines = []
    while len(names) > 1:
        pairs = zip(names[::2], names[1::2], strict=False)
        lines += [f"{a} = {NAN_MAX.format(a, b)}" for a, b in pairs]
        names = names[::2]
    return lines


def joined(names: list[str]) -> tuple[Lines, str]:
    """One tensor with log2(len(names)) new last dims of 2 that count the names in order."""
    lines, level = [], 0
    while len(names) > 1:
        half = len(names) // 2
        pairs = list(zip(names[:half], names[half:], strict=True))
        names = [f"joined{level}_{i}" for i in range(half)]
        lines += [f"{n} = tl.join({a}, {b})" for n, (a, b) in zip(names, pairs, strict=True)]
        level += 1
    return lines, names[0]


def scale_lines(prefix: str, block: int, fmt: str) -> Lines:
    """{prefix}finite, {prefix}inverse and {prefix}scale from {prefix}bits."""
    p, largest = prefix, FORMAT_MAX[fmt]
    scale = f"tl.div_rn({p}amax, {largest})"
    if block > 1:
        scale += f" * {float(np.float32(1) / np.sqrt(np.float32(block)))!r}"
    return [
        f"{p}finite = {p}bits < 0x7F800000",
        f"{p}amax = tl.maximum({p}bits.to(tl.float32, bitcast=True), 7.888609052210118e-31)",
        f"{p}inverse = tl.div_rn({largest}, {p}amax)",
        f"{p}scale = tl.where({p}finite, {scale}, float('nan'))",
        f"{p}scale = tl.where({p}bits == 0, 1.0, {p}scale)",
    ]


@dataclass(frozen=True)
class Source:
    """One kernel: arguments with their Triton types, body, launch options."""

    arguments: tuple[tuple[str, str], ...]
    body: tuple[str, ...]
    warps: int
    stages: int = 3
    maxnreg: int | None = None

    @property
    def text(self) -> str:
        options: dict[str, Any] = {"num_warps": self.warps, "num_stages": self.stages}
        options["enable_fp_fusion"] = False
        if self.maxnreg is not None:
            options["maxnreg"] = self.maxnreg
        head = [
            "import triton",
            "import triton.language as tl",
            f"OPTIONS = {options}",
            f"SIGNATURE = {dict(self.arguments)}",
            "@triton.jit",
            f"def kernel({', '.join(name for name, _ in self.arguments)}):",
        ]
        return "\n".join([*head, *indent(list(self.body))]) + "\n"


SIZES = (("T", "i32"), ("K", "i32"), ("x_stride", "i32"))
X = ("x_ptr", "*bf16")


# ---------------------------------------------------------------------------------------- columns
def load_tokens(stride: str, policy: str) -> Lines:
    how = f', eviction_policy="{policy}"' if policy else ""
    return [f"y{i} = tl.load(base + {i} * {stride}{how}).to(tl.float32)" for i in range(TOKENS)]


def column_maximum(block: int) -> Lines:
    """`top` takes in the maxima over y0..y31. The last stage of the butterflies is not needed:
    max(|a + b|, |a - b|) = |a| + |b|, in fp32 too."""
    if block == 1:
        names = [f"m{i}" for i in range(TOKENS)]
        lines = [f"m{i} = tl.abs(y{i})" for i in range(TOKENS)]
    else:
        half = block // 2
        first = [i for i in range(TOKENS) if not i & half]
        lines = butterflies(TOKENS, half)
        lines += [f"m{i} = tl.abs(y{i}) + tl.abs(y{i | half})" for i in first]
        names = [f"m{i}" for i in first]
    return [*lines, *maximum_of(names), f"top = {NAN_MAX.format('top', names[0])}"]


def column_amax_tile(width: int, steps: int, block: int, stride: str, policy: str = "") -> Lines:
    """Maxima of `width` columns k over steps * TOKENS tokens from t_first, merged in memory."""
    return [
        f"top = tl.zeros(({width},), dtype=tl.float32)",
        f"for step in tl.range(0, {steps}):",
        f"    base = x_ptr + (t_first + step * {TOKENS}).to(tl.int64) * x_stride + k",
        *indent(load_tokens(stride, policy)),
        *indent(column_maximum(block)),
        'tl.atomic_max(column_amax_ptr + k, top.to(tl.int32, bitcast=True), sem="relaxed")',
    ]


def packed_words(inverse: str, prefix: str) -> tuple[Lines, list[str]]:
    """Eight words of four codes each, from y0..y31; 0 where `mask` is 0 (else -1)."""
    lines = []
    for i in range(TOKENS):
        lines.append(
            f"c{i} = (y{i} * {inverse} + {PACKED_ROUND[i % 4]}).to(tl.int32, bitcast=True)"
        )
    words = []
    for w in range(TOKENS // 4):
        a, b, c, d = (f"c{4 * w + i}" for i in range(4))
        name = f"{prefix}{w}"
        lines.append(f"{name} = ({a} + ({b} << 8)) + (({c} + ({d} << 8)) << 16)")
        lines.append(f"{name} = ({name} ^ -2139062144) & mask")
        words.append(name)
    return lines, words


def column_write_tile(
    width: int, tokens: int, chunk: int, block: int, stride: str, fmt: str, policy: str = ""
) -> Lines:
    """Codes of `width` columns k, `tokens` tokens from t_first, by column_inverse; `chunk` tokens
    are stored together."""
    if chunk < tokens:
        return [
            f"for step in tl.range(0, {tokens // chunk}):",
            f"    t_chunk = t_first + step * {chunk}",
            *indent(column_write_chunk(width, chunk, block, stride, fmt, policy)),
        ]
    lines = column_write_chunk(width, chunk, block, stride, fmt, policy)
    return ["t_chunk = t_first", *lines]


def column_write_chunk(
    width: int, chunk: int, block: int, stride: str, fmt: str, policy: str
) -> Lines:
    groups = chunk // TOKENS
    lines: Lines = []
    names: list[str] = []
    for group in range(groups):
        lines.append(f"base = x_ptr + (t_chunk + {group * TOKENS}).to(tl.int64) * x_stride + k")
        lines += load_tokens(stride, policy) + butterflies(TOKENS, block)
        if fmt == "int8":
            more, words = packed_words("column_inverse", f"w{group}_")
            lines += more
            names += words
        else:
            for i in range(TOKENS):
                name = f"v{group}_{i}"
                lines.append(f"{name} = tl.where(column_finite, y{i} * column_inverse, 0.0)")
                names.append(name)
    more, last = joined(names)
    lines += more
    size = len(names)
    values = f"tl.reshape({last}, ({width}, {size}))"
    if fmt == "int8":
        lines += [
            "words_ptr = column_codes_ptr.to(tl.pointer_type(tl.int32))",
            "words_ptr += k.to(tl.int64)[:, None] * (column_codes_stride // 4)",
            f"words_ptr += t_chunk // 4 + tl.arange(0, {size})[None, :]",
            f"tl.store(words_ptr, {values})",
        ]
    else:
        lines += [
            "codes_ptrs = column_codes_ptr + k.to(tl.int64)[:, None] * column_codes_stride",
            f"codes_ptrs += t_chunk + tl.arange(0, {size})[None, :]",
            f"tl.store(codes_ptrs, {values}.to(tl.float8e4nv))",
        ]
    return lines


def column_scales(block: int, fmt: str, condition: str, modifier: str = "") -> Lines:
    how = f', cache_modifier="{modifier}"' if modifier else ""
    return [
        f"column_bits = tl.load(column_amax_ptr + k{how})",
        *scale_lines("column_", block, fmt),
        "mask = tl.where(column_finite, -1, 0)",
        f"if {condition}:",
        "    tl.store(column_scale_ptr + k, column_scale)",
    ]


@dataclass(frozen=True)
class Columns:
    """`width` columns by `tokens` tokens a program, of which `chunk` (0: all) are stored together.
    `literal`: the stride of x is written into the kernel, so that offsets are immediates."""

    width: int
    warps: int
    tokens: int
    chunk: int = 0
    literal: int = 0
    backward: bool = False
    t_fast: bool = False
    policy: str = ""
    block: int = 32
    maxnreg: int | None = None

    @property
    def stride(self) -> str:
        return str(self.literal) if self.literal else "x_stride"

    @property
    def label(self) -> str:
        words = [f"{self.width}x{self.tokens} {self.warps}w"]
        words += [f"chunk {self.chunk}"] * bool(self.chunk)
        words += ["literal"] * bool(self.literal) + ["backward"] * self.backward
        words += ["t-fast"] * self.t_fast + [self.policy] * bool(self.policy)
        words += [f"{self.maxnreg}r"] * (self.maxnreg is not None)
        words += ["not rotated"] * (self.block == 1)
        return " ".join(words)

    def index(self) -> Lines:
        k, t = ("1", "0") if self.t_fast else ("0", "1")
        tile = f"tl.program_id({t})"
        if self.backward:
            tile = f"(tl.num_programs({t}) - 1 - tl.program_id({t}))"
        return [
            f"k = tl.program_id({k}) * {self.width} + tl.arange(0, {self.width})",
            f"t_first = {tile} * {self.tokens}",
        ]

    def grid(self, T: int, K: int) -> tuple[int, int]:
        sizes = (K // self.width, T // self.tokens)
        return sizes[::-1] if self.t_fast else sizes


def columns_amax(c: Columns) -> Source:
    body = column_amax_tile(c.width, c.tokens // TOKENS, c.block, c.stride, c.policy)
    arguments = (X, ("column_amax_ptr", "*i32"), *SIZES)
    return Source(arguments, (*c.index(), *body), c.warps, maxnreg=c.maxnreg)


def write_arguments(fmt: str) -> tuple[tuple[str, str], ...]:
    return (
        ("column_amax_ptr", "*i32"),
        ("column_codes_ptr", CODE_POINTER[fmt]),
        ("column_scale_ptr", "*fp32"),
    )


def columns_write(c: Columns, fmt: str = "int8") -> Source:
    axis = 0 if c.t_fast else 1
    body = [
        *c.index(),
        *column_scales(c.block, fmt, f"tl.program_id({axis}) == 0"),
        *column_write_tile(
            c.width, c.tokens, c.chunk or c.tokens, c.block, c.stride, fmt, c.policy
        ),
    ]
    arguments = (X, *write_arguments(fmt), *SIZES, ("column_codes_stride", "i32"))
    return Source(arguments, tuple(body), c.warps, maxnreg=c.maxnreg)


@dataclass(frozen=True)
class OneLaunch:
    """Stripes of `stripe` columns; tasks of `width` columns by `tokens` tokens; the write tasks of
    a stripe come `lag` stripes after its amax tasks. `ticket`: tasks are drawn from a counter,
    which needs no promise about the order in which programs start."""

    stripe: int
    width: int
    tokens: int
    warps: int
    lag: int
    ticket: bool
    chunk: int = 64
    literal: int = 0
    maxnreg: int | None = None
    policy: tuple[str, str] = ("", "")

    @property
    def label(self) -> str:
        how = "ticket" if self.ticket else "pid"
        words = [f"stripe {self.stripe} lag {self.lag} {self.width}x{self.tokens}", how]
        words += [f"{self.warps}w chunk {self.chunk}"] + ["literal"] * bool(self.literal)
        words += [f"{self.maxnreg}r"] * (self.maxnreg is not None)
        words += ["/".join(self.policy)] * any(self.policy)
        return " ".join(words)

    def grid(self, T: int, K: int) -> tuple[int]:
        tasks = T // self.tokens * (self.stripe // self.width)
        return (2 * tasks * (K // self.stripe + self.lag),)


def columns_one(c: OneLaunch, fmt: str = "int8") -> Source:
    sub, steps = c.stripe // c.width, c.tokens // TOKENS
    stride = str(c.literal) if c.literal else "x_stride"
    number = 'tl.atomic_add(sync_ptr, 1, sem="relaxed")' if c.ticket else "tl.program_id(0)"
    body = [
        f"number = {number}",
        f"tasks = T // {c.tokens} * {sub}  # of one stripe and kind",
        f"stripes = K // {c.stripe}",
        "writes = number % 2",
        "task = number // 2 % tasks",
        f"stripe = number // 2 // tasks - writes * {c.lag}",
        f"k = stripe * {c.stripe} + task % {sub} * {c.width} + tl.arange(0, {c.width})",
        f"t_first = task // {sub} * {c.tokens}",
        "if (writes == 0) & (stripe < stripes):",
        *indent(column_amax_tile(c.width, steps, 32, stride, c.policy[0])),
        "    tl.debug_barrier()",
        '    tl.atomic_add(sync_ptr + 32 + stripe, 1, sem="release")',
        "if (writes == 1) & (stripe >= 0):",
        '    while tl.atomic_add(sync_ptr + 32 + stripe, 0, sem="acquire") < tasks:',
        "        pass",
        *indent(column_scales(32, fmt, f"task < {sub}", ".cg")),
        *indent(column_write_tile(c.width, c.tokens, c.chunk, 32, stride, fmt, c.policy[1])),
    ]
    arguments = (X, ("sync_ptr", "*i32"), *write_arguments(fmt), *SIZES)
    arguments += (("column_codes_stride", "i32"),)
    return Source(arguments, tuple(body), c.warps, maxnreg=c.maxnreg)


# ------------------------------------------------------------------------------------------- rows
@dataclass(frozen=True)
class Rows:
    """`rows` rows a tile; H128 as H_w by a matrix and butterflies over 128 / w. `persistent`:
    programs a multiprocessor, each looping over tiles with `stages` (0: one tile a program)."""

    w: int
    warps: int
    rows: int
    persistent: int = 0
    stages: int = 2
    ordered: bool = True
    maxnreg: int | None = None
    policy: str = ""

    @property
    def label(self) -> str:
        words = [f"H{self.w} {self.rows} rows {self.warps}w"]
        words += [f"persistent {self.persistent} {self.stages}s"] * bool(self.persistent)
        words += ["unordered"] * (not self.ordered)
        words += [f"{self.maxnreg}r"] * (self.maxnreg is not None) + [self.policy]
        return " ".join(words).strip()

    def grid(self, T: int, K: int) -> tuple[int]:
        return (min(T // self.rows, self.persistent * 132 or T),)


def rotate_rows(w: int, mask: str, policy: str = "") -> Lines:
    """y0.. [tile rows, w] with the rotated runs of 128 from x_base [tile rows, w]."""
    parts = 128 // w
    how = f', eviction_policy="{policy}"' if policy else ""
    masked = f", mask={mask}, other=0.0" if mask else ""
    lines = [f"x{p} = tl.load(x_base + {p * w}{masked}{how})" for p in range(parts)]
    lines += [f"y{p} = tl.dot(x{p}, matrix)" for p in range(parts)]
    return lines + butterflies(parts, parts)


def row_maximum(w: int) -> Lines:
    parts = 128 // w
    names = [f"m{p}" for p in range(parts)]
    lines = [f"m{p} = tl.abs(y{p})" for p in range(parts)] + maximum_of(names)
    return [*lines, "group_bits = tl.max(m0.to(tl.int32, bitcast=True), axis=1)"]


def row_codes(w: int, tile_rows: int, inverse: str, ordered: bool, fmt: str) -> Lines:
    """codes [tile rows, 128], wrong in rows that are not finite."""
    parts, lines = 128 // w, []
    for p in range(parts):
        if fmt == "int8":
            lines.append(f"c{p} = (y{p} * {inverse} + {ROUND}).to(tl.int32, bitcast=True)")
            lines.append(f"c{p} = c{p}.to(tl.int8)")
        else:
            lines.append(f"c{p} = (y{p} * {inverse}).to(tl.float8e4nv)")
        if ordered:
            lines.append(f"c{p} = tl.reshape(c{p}, ({tile_rows}, {w // 8}, 4, 2))")
            lines.append(f"c{p} = tl.reshape(tl.permute(c{p}, (0, 2, 1, 3)), ({tile_rows}, {w}))")
    more, last = joined([f"c{p}" for p in range(parts)])
    if parts == 1:
        return [*lines, "codes = c0"]
    order = (0, *range(2, 2 + int(math.log2(parts))), 1)
    return [*lines, *more, f"codes = tl.reshape(tl.permute({last}, {order}), ({tile_rows}, 128))"]


def load_small_matrix(w: int) -> Lines:
    return [
        f"i = tl.arange(0, {w})",
        f"matrix = tl.load(matrix_ptr + i[:, None] * {w} + i[None, :])",
    ]


def rows_whole(c: Rows, K: int, fmt: str = "int8") -> Source:
    groups = 1 << (K // 128 - 1).bit_length()
    M = c.rows * groups
    masked = groups * 128 != K
    group_mask = f"(r % {groups} < {K // 128})[:, None]"
    tile = [
        f"row = tile * {c.rows} + r // {groups}",
        f"x_base = x_ptr + row.to(tl.int64)[:, None] * x_stride + (r % {groups} * 128)[:, None]",
        "x_base += i[None, :]",
        *rotate_rows(c.w, group_mask if masked else "", c.policy),
        *row_maximum(c.w),
    ]
    if c.rows == 1:
        tile += ["row_bits = tl.max(group_bits, axis=0)", *scale_lines("row_", 128, fmt)]
        tile += ["tl.store(row_scale_ptr + tile, row_scale)"]
        inverse, finite = "row_inverse", "row_finite"
    else:
        tile += [f"row_bits = tl.max(tl.reshape(group_bits, ({c.rows}, {groups})), axis=1)"]
        tile += scale_lines("row_", 128, fmt)
        target = f"row_scale_ptr + tile * {c.rows} + tl.arange(0, {c.rows})"
        tile += [f"tl.store({target}, row_scale)"]
        for name in ("inverse", "finite"):
            spread = f"tl.broadcast_to(row_{name}[:, None], ({c.rows}, {groups}))"
            tile += [f"{name} = tl.reshape({spread}, ({M},))[:, None]"]
        inverse, finite = "inverse", "finite"
    finite_mask, wrong_mask = finite, f"({finite} == 0)"
    if masked:
        finite_mask, wrong_mask = (f"{m} & {group_mask}" for m in (finite_mask, wrong_mask))
    zeros = f"tl.zeros(({M}, 128), dtype=tl.int8).to(codes.dtype, bitcast=True)"
    tile += [
        *row_codes(c.w, M, inverse, c.ordered, fmt),
        "codes_ptrs = row_codes_ptr + row.to(tl.int64)[:, None] * row_codes_stride",
        f"codes_ptrs += (r % {groups} * 128)[:, None] + tl.arange(0, 128)[None, :]",
        f"tl.store(codes_ptrs, codes, mask={finite_mask})",
        f"tl.store(codes_ptrs, {zeros}, mask={wrong_mask})",
    ]
    body = [*load_small_matrix(c.w), f"r = tl.arange(0, {M})"]
    if c.persistent:
        count = f"tl.cdiv(T, {c.rows})"
        loop = f"tl.range(tl.program_id(0), {count}, tl.num_programs(0), num_stages={c.stages})"
        body += [f"for tile in {loop}:", *indent(tile)]
    else:
        body += ["tile = tl.program_id(0)", *tile]
    arguments = (
        X,
        ("matrix_ptr", "*bf16"),
        ("row_codes_ptr", CODE_POINTER[fmt]),
        ("row_scale_ptr", "*fp32"),
        *SIZES,
        ("row_codes_stride", "i32"),
    )
    return Source(arguments, tuple(body), c.warps, c.stages, c.maxnreg)


# ------------------------------------------------------------------------------------------- both
@dataclass(frozen=True)
class Both:
    """Tiles of `width` columns; rows by matrices H_w over TOKENS tokens, columns by butterflies.
    x is read twice, the second time from the L1 cache."""

    width: int
    warps: int
    tokens: int
    w: int
    literal: int = 0
    backward: bool = False
    maxnreg: int | None = None

    @property
    def stride(self) -> str:
        return str(self.literal) if self.literal else "x_stride"

    @property
    def label(self) -> str:
        words = [f"{self.width}x{self.tokens} H{self.w} {self.warps}w"]
        words += ["literal"] * bool(self.literal)
        words += ["backward"] * self.backward
        words += [f"{self.maxnreg}r"] * (self.maxnreg is not None)
        return " ".join(words)

    def index(self) -> Lines:
        groups = self.width // 128
        return [
            *Columns(self.width, self.warps, self.tokens, backward=self.backward).index(),
            *load_small_matrix(self.w),
            f"r = tl.arange(0, {TOKENS * groups})",
            f"column_of_r = tl.program_id(0) * {self.width} + r % {groups} * 128",
        ]

    def row_tile(self) -> Lines:
        """x_base of the TOKENS tokens from t_step."""
        return [
            f"t_of_r = t_step + r // {self.width // 128}",
            "x_base = x_ptr + t_of_r.to(tl.int64)[:, None] * x_stride",
            "x_base += column_of_r[:, None] + i[None, :]",
            *rotate_rows(self.w, ""),
        ]

    def grid(self, T: int, K: int) -> tuple[int, int]:
        return (K // self.width, T // self.tokens)


def both_amax(c: Both) -> Source:
    groups = c.width // 128
    step = [
        f"t_step = t_first + step * {TOKENS}",
        "base = x_ptr + t_step.to(tl.int64) * x_stride + k",
        *load_tokens(c.stride, ""),
        *column_maximum(32),
        *c.row_tile(),
        *row_maximum(c.w),
        f"row_top = tl.max(tl.reshape(group_bits, ({TOKENS}, {groups})), axis=1)",
        f'tl.atomic_max(row_amax_ptr + t_step + tl.arange(0, {TOKENS}), row_top, sem="relaxed")',
    ]
    body = [
        *c.index(),
        f"top = tl.zeros(({c.width},), dtype=tl.float32)",
        f"for step in tl.range(0, {c.tokens // TOKENS}):",
        *indent(step),
        'tl.atomic_max(column_amax_ptr + k, top.to(tl.int32, bitcast=True), sem="relaxed")',
    ]
    arguments = (X, ("matrix_unordered_ptr", "*bf16"))
    arguments += (("row_amax_ptr", "*i32"), ("column_amax_ptr", "*i32"), *SIZES)
    text = tuple(line.replace("(matrix_ptr", "(matrix_unordered_ptr") for line in body)
    return Source(arguments, text, c.warps, maxnreg=c.maxnreg)


def both_write(c: Both, fmt: str = "int8") -> Source:
    groups, M = c.width // 128, TOKENS * (c.width // 128)
    rows = [
        "t_step = t_chunk",
        *c.row_tile(),
        "row_bits = tl.load(row_amax_ptr + t_of_r)",
        *scale_lines("row_", 128, fmt),
        "if tl.program_id(0) == 0:",
        f"    tl.store(row_scale_ptr + t_of_r, row_scale, mask=r % {groups} == 0)",
        *row_codes(c.w, M, "row_inverse[:, None]", True, fmt),
        "codes_ptrs = row_codes_ptr + t_of_r.to(tl.int64)[:, None] * row_codes_stride",
        "codes_ptrs += column_of_r[:, None] + tl.arange(0, 128)[None, :]",
        "tl.store(codes_ptrs, codes, mask=row_finite[:, None])",
        f"zeros = tl.zeros(({M}, 128), dtype=tl.int8).to(codes.dtype, bitcast=True)",
        "tl.store(codes_ptrs, zeros, mask=(row_finite == 0)[:, None])",
    ]
    body = [
        *c.index(),
        *column_scales(32, fmt, "tl.program_id(1) == 0"),
        *column_write_tile(c.width, c.tokens, TOKENS, 32, c.stride, fmt),
        *indent(rows),  # goes on in the loop over chunks
    ]
    arguments = (
        X,
        ("matrix_ptr", "*bf16"),
        ("row_amax_ptr", "*i32"),
        ("row_codes_ptr", CODE_POINTER[fmt]),
        ("row_scale_ptr", "*fp32"),
        *write_arguments(fmt),
        *SIZES,
        ("row_codes_stride", "i32"),
        ("column_codes_stride", "i32"),
    )
    return Source(arguments, tuple(body), c.warps, maxnreg=c.maxnreg)


# ------------------------------------------------------------------------------------- candidates
@dataclass(frozen=True)
class Part:
    source: Source
    grid: Callable[[int, int], tuple[int, ...]]
    w: int = 128


@dataclass(frozen=True)
class Candidate:
    """Kernels launched one after another. `bytes_each`: what the scheme moves per element."""

    family: str
    label: str
    parts: tuple[Part, ...]
    bytes_each: float
    checks: tuple[str, ...] = ()
    zeroed: bool = False
    fmt: str = "int8"


def row_configurations(K: int) -> Iterator[Rows]:
    if K > 8192:
        for w, warps in ((64, 8), (64, 4), (32, 4), (32, 8), (128, 8), (64, 16)):
            yield Rows(w, warps, 1)
        yield Rows(64, 8, 1, policy="evict_first")
        yield Rows(64, 8, 1, persistent=2, stages=2)
        yield Rows(32, 8, 1, persistent=2, stages=1)
        return
    for w, warps in ((64, 1), (32, 1), (16, 1), (128, 1), (64, 2), (32, 2), (16, 2)):
        yield Rows(w, warps, 1)
    for w, warps, rows in ((64, 4, 2), (32, 4, 2), (64, 4, 4), (64, 2, 2), (64, 8, 4)):
        yield Rows(w, warps, rows)
    for w, warps, programs, stages in (
        (64, 1, 8, 2),
        (32, 1, 8, 2),
        (64, 2, 6, 2),
        (32, 2, 8, 2),
        (32, 2, 8, 3),
        (64, 2, 8, 1),
        (64, 1, 10, 1),
    ):
        yield Rows(w, warps, 1, programs, stages)
    yield Rows(64, 4, 2, 5, 2)
    yield Rows(64, 4, 2, 4, 3)
    yield Rows(64, 1, 1, ordered=False)
    yield Rows(64, 1, 1, policy="evict_first")
    yield Rows(32, 2, 1, policy="evict_first")
    yield Rows(32, 1, 1, maxnreg=128)


def amax_configurations(K: int) -> Iterator[Columns]:
    for width, warps, tokens in (
        (256, 4, 128),
        (256, 4, 256),
        (256, 4, 512),
        (128, 2, 512),
        (64, 1, 512),
        (512, 4, 256),
        (512, 4, 512),
        (512, 8, 256),
        (256, 8, 256),
    ):
        yield Columns(width, warps, tokens)
    for width, warps, tokens in (
        (256, 4, 128),
        (256, 4, 256),
        (256, 4, 512),
        (512, 4, 256),
        (512, 8, 256),
        (128, 2, 256),
        (1024, 8, 256),
        (1024, 16, 128),
    ):
        yield Columns(width, warps, tokens, literal=K)
    yield Columns(256, 4, 256, t_fast=True, literal=K)
    yield Columns(256, 4, 256, literal=K, block=1)
    yield Columns(512, 4, 256, literal=K, block=1)
    yield Columns(256, 4, 256, literal=K, policy="evict_last")


def write_configurations(K: int) -> Iterator[Columns]:
    for width, warps, tokens, chunk in (
        (256, 4, 128, 128),
        (128, 2, 128, 128),
        (256, 4, 64, 64),
        (256, 4, 128, 64),
        (256, 4, 128, 32),
        (128, 2, 128, 32),
        (128, 2, 64, 64),
    ):
        yield Columns(width, warps, tokens, chunk)
    for width, warps, tokens, chunk in (
        (256, 4, 128, 128),
        (256, 4, 128, 64),
        (256, 4, 128, 32),
        (256, 4, 256, 64),
        (256, 4, 256, 32),
        (128, 2, 128, 128),
        (128, 2, 128, 64),
        (128, 2, 128, 32),
        (128, 2, 256, 32),
        (64, 1, 128, 32),
        (64, 1, 128, 128),
        (512, 4, 128, 32),
        (512, 8, 128, 64),
        (256, 8, 128, 32),
    ):
        yield Columns(width, warps, tokens, chunk, literal=K)
    yield Columns(256, 4, 128, 64, literal=K, t_fast=True)
    yield Columns(128, 2, 128, 64, literal=K, t_fast=True)
    yield Columns(256, 4, 128, 64, literal=K, backward=True)
    yield Columns(128, 2, 128, 64, literal=K, policy="evict_first")
    yield Columns(256, 4, 128, 64, literal=K, block=1)


def one_configurations(K: int) -> Iterator[OneLaunch]:
    for stripe, lag, ticket in (
        (256, 1, True),
        (256, 2, True),
        (512, 1, True),
        (1024, 1, True),
        (128, 2, True),
        (128, 4, True),
        (256, 1, False),
        (512, 1, False),
    ):
        width = min(256, stripe)
        yield OneLaunch(stripe, width, 128, width // 64, lag, ticket, literal=K)
    for stripe, width, tokens, warps, lag, chunk in (
        (256, 128, 128, 2, 1, 64),
        (512, 128, 128, 2, 1, 64),
        (256, 128, 256, 2, 1, 32),
        (256, 256, 128, 4, 1, 32),
        (512, 256, 256, 4, 1, 32),
        (256, 256, 128, 4, 1, 128),
        (256, 256, 256, 4, 1, 64),
        (512, 512, 128, 8, 1, 32),
    ):
        yield OneLaunch(stripe, width, tokens, warps, lag, True, chunk, literal=K)
    evict = ("evict_last", "evict_first")
    yield OneLaunch(256, 256, 128, 4, 1, True, literal=K, policy=evict)
    yield OneLaunch(512, 256, 128, 4, 1, True, literal=K, policy=evict)
    yield OneLaunch(256, 256, 128, 4, 1, True, literal=K, policy=("", "evict_first"))
    yield OneLaunch(256, 256, 128, 4, 1, True)


def both_configurations(K: int) -> Iterator[Both]:
    for width, warps, tokens, w in (
        (256, 4, 128, 64),
        (256, 4, 128, 32),
        (256, 2, 128, 32),
        (128, 2, 128, 64),
        (128, 2, 128, 32),
        (512, 4, 128, 64),
        (512, 8, 128, 64),
    ):
        yield Both(width, warps, tokens, w, literal=K)


def candidates(T: int, K: int) -> list[Candidate]:
    """All candidates of a shape; tiles that do not divide it are left out."""
    found: list[Candidate] = []
    for rows in row_configurations(K):
        parts = (Part(rows_whole(rows, K), rows.grid, rows.w),)
        found.append(Candidate("rows", rows.label, parts, 3, ("row",)))
    for rows in [*row_configurations(K)][:5]:
        parts = (Part(rows_whole(rows, K, "fp8_e4m3"), rows.grid, rows.w),)
        label = f"fp8 {rows.label}"
        found.append(Candidate("rows", label, parts, 3, ("row",), fmt="fp8_e4m3"))
    for c in amax_configurations(K):
        parts = (Part(columns_amax(c), c.grid),)
        found.append(Candidate("columns amax", c.label, parts, 2))
    for c in write_configurations(K):
        parts = (Part(columns_write(c), c.grid),)
        found.append(Candidate("columns write", c.label, parts, 3))
    amax_choices = (Columns(256, 4, 256, literal=K), Columns(512, 8, 256, literal=K))
    write_choices = ((256, 4, 128, 64), (128, 2, 128, 128), (128, 2, 128, 64), (256, 4, 128, 32))
    for amax in amax_choices:
        for write in write_choices:
            for backward in (False, True):
                second = Columns(*write, literal=K, backward=backward)
                parts = (
                    Part(columns_amax(amax), amax.grid),
                    Part(columns_write(second), second.grid),
                )
                label = f"{amax.label} | {second.label}"
                found.append(Candidate("columns two", label, parts, 5, ("column",), True))
    fp8, amax = Columns(128, 2, 128, 64, literal=K), amax_choices[0]
    parts = (Part(columns_amax(amax), amax.grid), Part(columns_write(fp8, "fp8_e4m3"), fp8.grid))
    label = f"fp8 {amax.label} | {fp8.label}"
    found.append(Candidate("columns two", label, parts, 5, ("column",), True, "fp8_e4m3"))
    for one in one_configurations(K):
        parts = (Part(columns_one(one), one.grid),)
        found.append(Candidate("columns one", one.label, parts, 3, ("column",), True))
    both = list(both_configurations(K))
    for b in both:
        found.append(Candidate("both amax", b.label, (Part(both_amax(b), b.grid, b.w),), 2))
        found.append(Candidate("both write", b.label, (Part(both_write(b), b.grid, b.w),), 4))
    for b in both:
        second_both = replace(b, backward=True)
        parts = (Part(both_amax(b), b.grid, b.w), Part(both_write(second_both), b.grid, b.w))
        label, checks = f"{b.label} | backward", ("row", "column")
        found.append(Candidate("both two", label, parts, 6, checks, True))
    return [c for c in found if all(divides(part, T, K) for part in c.parts)]


def thinned(found: list[Candidate]) -> list[Candidate]:
    """Every second candidate of each family."""
    families = dict.fromkeys(c.family for c in found)
    return [c for f in families for c in [c for c in found if c.family == f][::2]]


def divides(part: Part, T: int, K: int) -> bool:
    """Whether the grid covers the shape exactly."""
    owner = getattr(part.grid, "__self__", None)
    width = getattr(owner, "stripe", getattr(owner, "width", 1))
    tokens = getattr(owner, "tokens", getattr(owner, "rows", 1))
    return bool(K % width == 0 and T % tokens == 0)


# ---------------------------------------------------------------------------------------- compile
def module_path(folder: Path, source: Source) -> Path:
    name = hashlib.sha256(source.text.encode()).hexdigest()[:16]
    return folder / f"kernel_{name}.py"


def load_module(path: Path) -> Any:
    name = path.stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


WARMUP_TYPES = {"*bf16": "bfloat16", "*i32": "int32", "*i8": "int8", "*fp32": "float32"}


def compile_one(path: Path) -> tuple[str, dict[str, Any]]:
    """Compiles a kernel into triton's cache, in a process of its own."""
    import torch

    module = load_module(path)
    arguments = []
    for kind in module.SIGNATURE.values():
        if kind == "i32":
            arguments.append(4096)
        elif kind == "*fp8e4nv":
            arguments.append(torch.float8_e4m3fn)
        else:
            arguments.append(getattr(torch, WARMUP_TYPES[kind]))
    try:
        module.kernel.warmup(*arguments, grid=(1,), **module.OPTIONS)
    except Exception as error:  # noqa: BLE001  a race reports whatever went wrong and goes on
        return path.stem, {"error": one_line(error)}
    return path.stem, {}


def one_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:160]


def compile_all(paths: list[Path], workers: int) -> dict[str, str]:
    """Kernel name -> error of those that do not compile."""
    failed = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for future in as_completed([pool.submit(compile_one, path) for path in paths]):
            name, result = future.result()
            if "error" in result:
                failed[name] = result["error"]
    return failed


# -------------------------------------------------------------------------------------------- run
class Buffers:
    """Everything that a candidate's arguments name, for one x."""

    def __init__(self, x: Any, fmt: str) -> None:
        import torch

        T, K = x.shape
        dtype = torch.int8 if fmt == "int8" else torch.float8_e4m3fn
        like = {"device": x.device}
        self.zeroed = torch.zeros(T + K + 1024, dtype=torch.int32, **like)
        self.values: dict[str, Any] = {
            "x_ptr": x,
            "row_codes_ptr": torch.empty(T, K, dtype=dtype, **like),
            "row_scale_ptr": torch.empty(T, **like),
            "column_codes_ptr": torch.empty(K, T, dtype=dtype, **like),
            "column_scale_ptr": torch.empty(K, **like),
            "row_amax_ptr": self.zeroed[:T],
            "column_amax_ptr": self.zeroed[T : T + K],
            "sync_ptr": self.zeroed[T + K :],
            "T": T,
            "K": K,
            "x_stride": x.stride(0),
            "row_codes_stride": K,
            "column_codes_stride": T,
        }

    def result(self, side: str) -> tuple[Any, Any]:
        return self.values[f"{side}_codes_ptr"], self.values[f"{side}_scale_ptr"]


def launcher(candidate: Candidate, buffers: Buffers, folder: Path) -> Callable[[], None]:
    """A call that launches the candidate on these buffers, arguments made ready."""
    import torch

    from hadagraph.codegen.matrices import rotation_matrix
    from hadagraph.rotation import Rotation

    T, K = buffers.values["T"], buffers.values["K"]
    ready = []
    for part in candidate.parts:
        module = load_module(module_path(folder, part.source))
        rotation = Rotation(part.w)
        ordered = getattr(getattr(part.grid, "__self__", None), "ordered", True)
        matrices = {
            name: rotation_matrix(rotation, order, part.w).to(torch.bfloat16).cuda()
            for name, order in (("matrix_ptr", ordered), ("matrix_unordered_ptr", False))
        }
        values = [(matrices | buffers.values)[name] for name, _ in part.source.arguments]
        ready.append((module.kernel[part.grid(T, K)], values, module.OPTIONS))

    def run() -> None:
        if candidate.zeroed:
            buffers.zeroed.zero_()
        for kernel, values, options in ready:
            kernel(*values, **options)

    return run


def encoding(side: str, fmt: str) -> Any:
    from hadagraph.formats import Encoding

    return Encoding.parse(f"{fmt}/per_kept_index/{'h128' if side == 'row' else 'h32'}")


def compare(codes: Any, scale: Any, want: tuple[Any, Any], exact: bool, fmt: str) -> str:
    """What is wrong, or nothing."""
    import torch

    got, expected = (c.view(torch.uint8) for c in (codes, want[0]))
    bad_scale = (torch.isnan(scale) != torch.isnan(want[1])).any()
    gap = torch.nan_to_num((scale.double() / want[1].double() - 1).abs()).max().item()
    if bad_scale or gap > 2.5e-7:
        return f"scales off by {gap:.1e}"
    differs = got != expected
    share = differs.float().mean().item()
    if exact and share:
        return f"codes differ on integers: {share:.1e}"
    if fmt == "int8":
        worst = (got.view(torch.int8).short() - expected.view(torch.int8).short()).abs().max()
    else:
        worst = (codes.float() - want[0].float()).abs().max() / 448 * 16
    if share > 1e-4 or worst.item() > 1:
        return f"codes differ: {share:.1e}, by up to {worst.item():.0f}"
    return ""


class Oracle:
    """References of a shape: random, integer and non-finite inputs; made once for each side."""

    def __init__(self, T: int, K: int) -> None:
        import torch

        generator = torch.Generator("cuda").manual_seed(7)
        like = {"device": "cuda", "generator": generator}
        random = torch.randn(T, K, **like)
        integers = torch.randint(-256, 257, (T, K), **like)
        spoiled = integers.clone().float()
        spoiled[3, 5], spoiled[T - 1, K - 2], spoiled[40, 7] = math.inf, math.nan, -math.inf
        spoiled[:, K // 2] = 0
        self.inputs = {
            "integers": integers.bfloat16(),
            "spoiled": spoiled.bfloat16(),
            "random": random.bfloat16(),
        }
        self.cache: dict[tuple[str, str, str], tuple[Any, Any]] = {}

    def want(self, name: str, side: str, fmt: str) -> tuple[Any, Any]:
        from hadagraph.reference import quantize_reference

        key = (name, side, fmt)
        if key not in self.cache:
            contracted = 1 if side == "row" else 0
            self.cache[key] = quantize_reference(self.inputs[name], encoding(side, fmt), contracted)
        return self.cache[key]

    def check(self, candidate: Candidate, folder: Path) -> str:
        """What is wrong with the candidate's codes and scales, or nothing."""
        import torch

        for name, x in self.inputs.items():
            buffers = Buffers(x, candidate.fmt)
            for side in candidate.checks:
                buffers.result(side)[0].view(torch.int8).fill_(99)
            launcher(candidate, buffers, folder)()
            for side in candidate.checks:
                want = self.want(name, side, candidate.fmt)
                exact = name != "random"
                wrong = compare(*buffers.result(side), want, exact, candidate.fmt)
                if wrong:
                    return f"{name} {side}: {wrong}"
        return ""


def median_ms(calls: list[Callable[[], object]], repeats: int) -> float:
    """Median over `repeats` of the mean time of one pass through `calls` (each on its own buffers),
    measured with CUDA events behind a spin that hides launch overhead."""
    import torch

    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(300_000 * len(calls))
        start.record()
        for call in calls:
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / len(calls))
    return statistics.median(times)


def copy_bandwidth(repeats: int) -> float:
    """Bytes per second of a device copy, read plus write."""
    import torch

    size = 1 << 29
    buffers = [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(4)]
    calls = [lambda a=a, b=b: b.copy_(a) for a, b in (buffers[:2], buffers[2:])]
    return 2 * size / (median_ms(calls, repeats) * 1e-3)


def baselines(T: int, K: int, inputs: list[Any], repeats: int) -> list[dict[str, Any]]:
    """What hadagraph launches today, and copies that move as many bytes."""
    import torch

    from hadagraph.codegen import launch

    capability = torch.cuda.get_device_capability()
    row, column = encoding("row", "int8"), encoding("column", "int8")
    found = []

    def add(family: str, label: str, bytes_each: float, calls: list[Callable[[], object]]) -> None:
        ms = median_ms(calls, repeats)
        found.append(result_row(family, label, T, K, ms, bytes_each))

    for family, bytes_each in (("rows", 3), ("columns one", 3), ("columns two", 5), ("both", 6)):
        size = int(T * K * bytes_each / 2)
        pairs = [torch.empty(2, size, dtype=torch.uint8, device="cuda") for _ in range(2)]
        copies = [lambda p=p: p[1].copy_(p[0]) for p in pairs]
        add(family, f"[copy of {bytes_each} B]", bytes_each, copies)
    schemes = (("rows", row, None, 3), ("columns two", None, column, 5), ("both", row, column, 6))
    for family, rows, columns, bytes_each in schemes:
        calls = [
            lambda x=x, r=rows, c=columns: launch.quantize(x, r, c, capability) for x in inputs
        ]
        add(family, "[hadagraph]", bytes_each, calls)
    return found


def result_row(
    family: str, label: str, T: int, K: int, ms: float, bytes_each: float
) -> dict[str, Any]:
    return {
        "family": family,
        "label": label,
        "T": T,
        "K": K,
        "us": ms * 1e3,
        "bytes": T * K * bytes_each,
    }


def race(
    T: int, K: int, found: list[Candidate], failed: dict[str, str], folder: Path, repeats: int
) -> list[dict[str, Any]]:
    """One row a candidate that is right, with its time; else with its error."""
    import torch

    oracle = Oracle(T, K)
    sets = max(2, min(6, -(-(1 << 28) // (T * K * 2))))
    inputs = [torch.randn(T, K, dtype=torch.bfloat16, device="cuda") for _ in range(sets)]
    buffers = {fmt: [Buffers(x, fmt) for x in inputs] for fmt in FORMAT_MAX}
    results = baselines(T, K, inputs, repeats)
    best: dict[str, list[tuple[float, Candidate]]] = {}
    for candidate in found:
        row = result_row(candidate.family, candidate.label, T, K, 0.0, candidate.bytes_each)
        names = [module_path(folder, part.source).stem for part in candidate.parts]
        errors = [failed[name] for name in names if name in failed]
        try:
            error = errors[0] if errors else oracle.check(candidate, folder)
            if not error:
                calls = [launcher(candidate, b, folder) for b in buffers[candidate.fmt]]
                row["us"] = median_ms(calls, repeats) * 1e3
                if candidate.fmt == "int8":
                    best.setdefault(candidate.family, []).append((row["us"], candidate))
        except Exception as raised:
            error = one_line(raised)
            if "illegal" in error or "unspecified launch" in error:
                raise
        results.append(row | ({"error": error} if error else {}))
    fastest = {
        name: [c for _, c in sorted(rows, key=lambda r: r[0])[:2]] for name, rows in best.items()
    }
    for rows in fastest.get("rows", []):
        for family in ("columns one", "columns two"):
            for columns in fastest.get(family, [])[:1]:
                calls = []
                for b in buffers["int8"]:
                    pair = launcher(rows, b, folder), launcher(columns, b, folder)
                    calls.append(lambda pair=pair: [call() for call in pair])
                ms = median_ms(calls, repeats)
                label = f"{rows.label} || {columns.label}"
                results.append(result_row("both", label, T, K, ms, 6))
    for columns in fastest.get("both two", [])[:1]:
        calls = [launcher(columns, b, folder) for b in buffers["int8"]]
        ms = median_ms(calls, repeats)
        results.append(result_row("both", f"two passes: {columns.label}", T, K, ms, 6))
    return results


def show(rows: list[dict[str, Any]], bandwidth: float, most: int) -> None:
    """Families of each shape, fastest first; every baseline, and `most` candidates."""
    minimal = {"columns amax": 2, "columns two": 3, "both two": 4, "both": 4, "both amax": 2}
    for T, K in dict.fromkeys((row["T"], row["K"]) for row in rows):
        here = [row for row in rows if (row["T"], row["K"]) == (T, K)]
        print(f"\n{T} x {K}: us, share of copy on the scheme's bytes, and on the least bytes")
        for family in dict.fromkeys(row["family"] for row in here):
            good = [r for r in here if r["family"] == family and "error" not in r]
            for index, row in enumerate(sorted(good, key=lambda r: r["us"])):
                if index >= most and not row["label"].startswith(("[", "fp8", "pid")):
                    continue
                share = row["bytes"] / (row["us"] * 1e-6) / bandwidth
                least = T * K * minimal.get(family, row["bytes"] / (T * K))
                least /= row["us"] * 1e-6 * bandwidth
                print(f"{family:14}{row['us']:8.1f}{share:7.3f}{least:7.3f}  {row['label']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, the first shape only")
    parser.add_argument("--shapes", help="TxK, comma separated")
    parser.add_argument("--full", action="store_true", help="all candidates on every shape")
    parser.add_argument("--families", help="only these, comma separated")
    parser.add_argument("--most", type=int, default=6, help="lines a family in the table")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    options = parser.parse_args()
    import torch
    import triton

    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    began = time.time()
    shapes = SHAPES[:1] if options.quick else SHAPES
    if options.shapes:
        shapes = tuple(tuple(map(int, s.split("x"))) for s in options.shapes.split(","))
    repeats = 5 if options.quick else 9
    folder = Path(tempfile.mkdtemp(prefix="quantizer_race_"))
    found = {shape: candidates(*shape) for shape in shapes}
    if not options.full:
        for shape in shapes[1:]:
            found[shape] = thinned(found[shape])
    if options.families:
        kept = options.families.split(",")
        found = {shape: [c for c in cs if c.family in kept] for shape, cs in found.items()}
    paths = {}
    for cs in found.values():
        for part in (part for c in cs for part in c.parts):
            path = module_path(folder, part.source)
            path.write_text(part.source.text)
            paths[path] = len(part.source.text)
    longest_first = sorted(paths, key=lambda path: -paths[path])
    failed = compile_all(longest_first, options.workers)
    compiled = time.time() - began
    bandwidth = copy_bandwidth(repeats)
    rows: list[dict[str, Any]] = []
    for (T, K), cs in found.items():
        rows += race(T, K, cs, failed, folder, repeats)
        if options.out is not None:
            record = {
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "triton": triton.__version__,
                "copy_bytes_per_s": bandwidth,
                "results": rows,
            }
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(record, indent=1) + "\n")
    for row in rows:
        if "error" in row:
            print(f"FAILED {row['T']}x{row['K']} {row['family']}: {row['label']}: {row['error']}")
    show(rows, bandwidth, options.most)
    print(
        f"\n{torch.cuda.get_device_name()}, triton {triton.__version__}, copy "
        f"{bandwidth / 1e12:.2f} TB/s, {len(paths)} kernels compiled in {compiled:.0f} s, "
        f"{time.time() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
