"""Kernel specs: everything that an emitted kernel's source depends on, as frozen dataclasses, with
the FLOPs and bytes of a launch. Equal specs give equal source. Knows nothing of tensors.

Legend: T rows of the input matrix, K its columns, M and N kept dims of a GEMM, C contracted dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from hadagraph.formats import PER_TENSOR, Encoding, format_named
from hadagraph.region import MATRIX, Chain

WIDTH = 128
"""Columns of a tile, and of the +-1 matrix that rotates it unless a spec says otherwise: smaller
blocks are repeated along its diagonal, which is exact and gives all blocks one code path."""
VECTORS = 32
"""Tokens that a program of the column passes holds in registers, each as a vector of columns: the
largest block that butterflies over them rotate."""

Capability = tuple[int, int]
INPUT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
SWIZZLE_BYTES = 128
"""Of a row of a tile in shared memory, at most, as tensor cores and TMA take it."""


def check_capability(format_name: str, capability: Capability) -> None:
    """ValueError if the target has no matrix instruction for the format."""
    needed = format_named(format_name).min_capability
    if capability < needed:
        raise ValueError(
            f"format {format_name} needs compute capability {needed[0]}.{needed[1]} or higher, "
            f"the target has {capability[0]}.{capability[1]}"
        )


@dataclass(frozen=True)
class Side:
    """One output of a quantizer: its format, rotation block (`None`: not rotated), and whether one
    scale serves the whole tensor. Signs live in the matrix argument, not in the source."""

    format: str
    block: int | None
    per_tensor: bool

    def __post_init__(self) -> None:
        if self.block is not None and self.block > WIDTH:
            raise ValueError(
                f"rotation block of a kernel must be at most {WIDTH}, got {self.block}"
            )

    @staticmethod
    def of(encoding: Encoding) -> Side:
        block = encoding.rotation.block if encoding.rotation else None
        return Side(encoding.format, block, encoding.granularity == PER_TENSOR)

    @property
    def label(self) -> str:
        rotation = "" if self.block is None else f"_h{self.block}"
        return f"{self.format}{rotation}{'_tensor' if self.per_tensor else ''}"


@dataclass(frozen=True)
class QuantizeRowsSpec:
    """Rotate and quantize whole rows, per-row scales, in one kernel.

    A tile is `rows` rows of `groups * WIDTH` columns. Rotations multiply by a matrix of `width`
    columns, and add up parts of as many for the rest of larger blocks, which then have no signs.
    `streamed`: the row does not fit one tile and is read twice. `persistent`: each program loops
    over tiles. `fragment_order`: see `hadagraph.codegen.matrices`. `mask_rows`/`mask_columns`: the
    tile may pass the matrix's edge; `ragged`: within a run of WIDTH columns.
    `chain`: what makes the matrix, if it is not read; `value`: it is also written.
    """

    input_dtype: str
    side: Side
    rows: int
    groups: int
    width: int
    streamed: bool
    persistent: bool
    fragment_order: bool
    mask_rows: bool
    mask_columns: bool
    ragged: bool
    warps: int
    stages: int
    capability: Capability
    chain: Chain | None = None
    value: bool = False

    def __post_init__(self) -> None:
        check_capability(self.side.format, self.capability)
        assert self.width == WIDTH or self.side.block is not None
        assert self.mask_columns or not self.ragged
        assert not self.side.per_tensor, "per_tensor scales need the amax pass"
        assert not (self.streamed and self.persistent)
        assert self.chain is None or len(self.chain.outputs) == 1
        assert self.chain is not None or not self.value

    @property
    def name(self) -> str:
        prefix = "" if self.chain is None else "chain_"
        return f"{prefix}quantize_rows_{self.side.label}_{self.input_dtype}"

    @property
    def parts(self) -> int:
        """Parts of a run, each of `width` columns."""
        return WIDTH // self.width

    def flops(self, T: int, K: int) -> int:
        """Multiply-adds of the rotation, counted twice."""
        return 2 * T * K * self.side.block if self.side.block else 0

    def bytes(self, T: int, K: int) -> int:
        """Device memory traffic: one read of the input, one write of codes and scales."""
        size = INPUT_BYTES[self.input_dtype]
        read = size if self.chain is None else matrix_bytes(self.chain)
        return T * K * (read + 1 + self.value * size) + 4 * T


@dataclass(frozen=True)
class AmaxSide:
    """What the amax pass must know of a `Side`; formats that differ only in codes share it."""

    rotated: bool
    per_tensor: bool

    @staticmethod
    def of(side: Side | None) -> AmaxSide | None:
        return None if side is None else AmaxSide(side.block is not None, side.per_tensor)

    @property
    def label(self) -> str:
        return f"{'rotated' if self.rotated else 'plain'}{'_tensor' if self.per_tensor else ''}"


@dataclass(frozen=True)
class AmaxSpec:
    """Maximum magnitudes (as fp32 bits in int32) of rows and/or columns, or of the whole tensor.

    A program walks `tiles` tiles of WIDTH x WIDTH down one stripe of columns. `one_matrix`: both
    sides are rotated by the same matrix, which then takes shared memory once.
    """

    input_dtype: str
    rows: AmaxSide | None
    columns: AmaxSide | None
    one_matrix: bool
    tiles: int
    mask_rows: bool
    mask_columns: bool
    warps: int
    stages: int
    capability: Capability

    @property
    def name(self) -> str:
        rows = f"_rows_{self.rows.label}" if self.rows else ""
        columns = f"_columns_{self.columns.label}" if self.columns else ""
        return f"amax{rows}{columns}_{self.input_dtype}"

    def flops(self, T: int, K: int) -> int:
        return sum(2 * T * K * WIDTH for s in (self.rows, self.columns) if s and s.rotated)

    def bytes(self, T: int, K: int) -> int:
        """One read of the input, one write of each maximum."""
        sides = 4 * T * (self.rows is not None) + 4 * K * (self.columns is not None)
        return T * K * INPUT_BYTES[self.input_dtype] + sides


@dataclass(frozen=True)
class QuantizeTilesSpec:
    """Codes in row layout and/or transposed layout, from maxima that `AmaxSpec` left.

    `tiles` and `one_matrix`: as there. `descriptors`: x and the codes are moved through host-made
    tensor descriptors (TMA), which read zeros and write nothing outside, and free the registers
    that pointers take. `maxnreg`: registers a thread, at most.
    """

    input_dtype: str
    rows: Side | None
    columns: Side | None
    one_matrix: bool
    tiles: int
    descriptors: bool
    maxnreg: int | None
    fragment_order: bool
    mask_rows: bool
    mask_columns: bool
    warps: int
    stages: int
    capability: Capability

    def __post_init__(self) -> None:
        for side in (self.rows, self.columns):
            if side is not None:
                check_capability(side.format, self.capability)

    @property
    def name(self) -> str:
        rows = f"_rows_{self.rows.label}" if self.rows else ""
        columns = f"_columns_{self.columns.label}" if self.columns else ""
        return f"quantize{rows}{columns}_{self.input_dtype}"

    def flops(self, T: int, K: int) -> int:
        return sum(2 * T * K * s.block for s in (self.rows, self.columns) if s and s.block)

    def bytes(self, T: int, K: int) -> int:
        """One read of the input, one write of the codes of each layout."""
        layouts = (self.rows is not None) + (self.columns is not None)
        return T * K * (INPUT_BYTES[self.input_dtype] + layouts)


def matrix_bytes(chain: Chain) -> int:
    """Bytes that a chain reads for one element of its outputs: those of its matrices."""
    return sum(INPUT_BYTES[each.dtype] for each in chain.inputs if each.shape == MATRIX)


@dataclass(frozen=True)
class ColumnPass:
    """A pass over tiles of `columns` x `tokens` of x [T, K], or of what a `chain` makes, each token
    a vector of columns in registers; butterflies over VECTORS of them rotate along T.

    `strides`: elements between the rows of each matrix that is read, if written into the source, so
    that offsets are immediates. Programs walk along K first, or along T (`tokens_first`);
    `backward`: from the last tokens, which the cache may still hold.
    """

    input_dtype: str
    chain: Chain | None
    columns: int
    tokens: int
    strides: tuple[int, ...] | None
    tokens_first: bool
    backward: bool
    mask_tokens: bool
    mask_columns: bool
    warps: int
    stages: int
    capability: Capability

    @property
    def axes(self) -> tuple[int, int]:
        """Of the grid: those of k and of t."""
        return (1, 0) if self.tokens_first else (0, 1)

    @property
    def read_bytes(self) -> int:
        """Of one element."""
        if self.chain is None:
            return INPUT_BYTES[self.input_dtype]
        return matrix_bytes(self.chain)

    @property
    def prefix(self) -> str:
        return "" if self.chain is None else "chain_"


@dataclass(frozen=True)
class ColumnAmaxSpec(ColumnPass):
    """Maximum magnitudes of columns, as fp32 bits in int32, into buffers that start at 0.

    `blocks`: of each output, the rotation block (1: not rotated), or None: no maxima. `values`: the
    outputs that are also written in high precision; `value_stride`: as `strides`, theirs.
    """

    blocks: tuple[int | None, ...]
    values: tuple[bool, ...]
    value_stride: int | None

    @property
    def name(self) -> str:
        blocks = {block for block in self.blocks if block is not None}
        labels = [f"_h{block}" if block > 1 else "_plain" for block in sorted(blocks)]
        what = "column_amax" if labels else "values"
        dtypes = [each.dtype for each in self.chain.outputs] if self.chain else [self.input_dtype]
        return f"{self.prefix}{what}{''.join(labels)}_{'_'.join(dict.fromkeys(dtypes))}"

    def flops(self, T: int, K: int) -> int:
        """Additions of the butterflies."""
        return sum(T * K * (block.bit_length() - 1) for block in self.blocks if block is not None)

    def bytes(self, T: int, K: int) -> int:
        """One read of the matrices, one write of the values and of the maxima."""
        outputs = self.chain.outputs if self.chain is not None else ()
        sizes = [INPUT_BYTES[output.dtype] for output in outputs]
        written = sum(n for n, value in zip(sizes, self.values, strict=False) if value)
        maxima = sum(block is not None for block in self.blocks)
        return T * K * (self.read_bytes + written) + 4 * K * maxima


@dataclass(frozen=True)
class ColumnWriteSpec(ColumnPass):
    """Codes in transposed layout [K, T padded] from maxima that `ColumnAmaxSpec` left; `chunk`
    tokens are stored together."""

    side: Side
    chunk: int

    def __post_init__(self) -> None:
        check_capability(self.side.format, self.capability)
        assert self.tokens % self.chunk == 0 and self.chunk % VECTORS == 0

    @property
    def name(self) -> str:
        return f"{self.prefix}quantize_columns_{self.side.label}_{self.input_dtype}"

    def flops(self, T: int, K: int) -> int:
        """Additions of the butterflies."""
        return T * K * ((self.side.block or 1).bit_length() - 1)

    def bytes(self, T: int, K: int) -> int:
        """One read of the matrices, one write of the codes and the scales."""
        return T * K * (self.read_bytes + 1) + 4 * K


class Matmul:
    """out [M, N] from operands over C."""

    out_dtype: str

    def flops(self, M: int, N: int, C: int) -> int:
        return 2 * M * N * C

    def bytes(self, M: int, N: int, C: int) -> int:
        """Each operand of one byte read once, the output written once."""
        return (M + N) * C + M * N * INPUT_BYTES[self.out_dtype]


def operand_formats(a_format: str, b_format: str) -> str:
    """Of both operands, once if they are the same."""
    return a_format if a_format == b_format else f"{a_format}_{b_format}"


@dataclass(frozen=True)
class ScaledMmSpec(Matmul):
    """out[m, n] = (sum_c a[m, c] b[n, c]) * a_scale[m] * b_scale[n] + bias[n], both K-major.

    `part`: the contraction is summed in runs of this length, added in fp32 (`None`: one run).
    `descriptors`: operands are read through host-made tensor descriptors (TMA), else by pointers.
    """

    a_format: str
    b_format: str
    out_dtype: str
    bias_dtype: str | None
    a_per_tensor: bool
    b_per_tensor: bool
    block_m: int
    block_n: int
    block_c: int
    group: int
    part: int | None
    descriptors: bool
    mask_m: bool
    mask_n: bool
    mask_c: bool
    warps: int
    stages: int
    capability: Capability

    def __post_init__(self) -> None:
        check_capability(self.a_format, self.capability)
        check_capability(self.b_format, self.capability)
        both = format_named(self.a_format), format_named(self.b_format)
        if both[0].is_integer != both[1].is_integer:
            raise ValueError(
                f"operands of scaled_mm must be both int8 or both fp8, got {self.a_format} and "
                f"{self.b_format}"
            )
        assert self.part is None or self.part % self.block_c == 0

    @property
    def name(self) -> str:
        formats = operand_formats(self.a_format, self.b_format)
        return f"scaled_mm_{formats}_{self.out_dtype}"


PINGPONG, COOPERATIVE = SCHEDULES = "pingpong", "cooperative"


@dataclass(frozen=True)
class GluonMmSpec(Matmul):
    """`ScaledMmSpec`'s result for int8 codes on Hopper, from one program an SM with two warpgroups
    that each keep the products of two steps in flight; the contraction is one run.

    `schedule`, by CUTLASS's names: "pingpong", they take tiles in turn, or "cooperative", each
    takes half of a tile's columns. Operands come and the output goes through tensor descriptors
    (TMA), `out_width` columns at once: the masks guard the scales and the bias.
    """

    schedule: str
    out_dtype: str
    bias_dtype: str | None
    a_per_tensor: bool
    b_per_tensor: bool
    block_m: int
    block_n: int
    block_c: int
    group: int
    mask_m: bool
    mask_n: bool
    warps: int
    stages: int
    capability: Capability

    def __post_init__(self) -> None:
        assert self.capability == (9, 0)
        assert self.schedule in SCHEDULES
        assert (self.warps, self.block_c) == (4, SWIZZLE_BYTES)
        assert self.stages >= 2  # a stage is freed when the next one's products have begun
        assert self.warpgroup_n <= 128  # its sums are in registers

    @property
    def cooperative(self) -> bool:
        return self.schedule == COOPERATIVE

    @property
    def warpgroup_n(self) -> int:
        """Columns of a tile that one warpgroup multiplies."""
        return self.block_n // 2 if self.cooperative else self.block_n

    @property
    def out_width(self) -> int:
        return SWIZZLE_BYTES // INPUT_BYTES[self.out_dtype]

    @property
    def runs(self) -> int:
        """Stores of one warpgroup's part of a tile."""
        return self.warpgroup_n // self.out_width

    @property
    def name(self) -> str:
        return f"scaled_mm_{self.schedule}_int8_{self.out_dtype}"


@dataclass(frozen=True)
class BlockScaledMmSpec(Matmul):
    """out[m, n] = (sum_c a[m, c] a_scales[m, c / block] b[n, c] b_scales[n, c / block]) * a_scale *
    b_scale + bias[n] by block-scaled matrix instructions: fp8 or packed fp4 codes, both K-major,
    block scales as bytes, `a_scale` and `b_scale` of the tensors.

    `scale`: e8m0, one for `block` = 32 codes, or ue4m3, one for 16. `a_tiles`, `b_tiles`: a scale
    serves as many kept indices, too. `descriptors`: codes are read through host-made tensor
    descriptors (TMA), which read zeros outside, else by pointers. `arranged`: block scales lie as
    tensor memory takes them (`hadagraph.codegen.calls.arranged`), one for each kept index, with
    zeros up to whole tiles; else as `Encoded.scale`.
    """

    a_format: str
    b_format: str
    scale: str
    block: int
    a_tiles: bool
    b_tiles: bool
    out_dtype: str
    bias_dtype: str | None
    block_m: int
    block_n: int
    block_c: int
    group: int
    descriptors: bool
    arranged: bool
    mask_m: bool
    mask_n: bool
    mask_c: bool
    warps: int
    stages: int
    capability: Capability

    def __post_init__(self) -> None:
        whole = self.block_m % 128 == self.block_n % 128 == self.block_c % (4 * self.block) == 0
        assert whole or not self.arranged
        assert (self.scale, self.block) in (("e8m0", 32), ("ue4m3", 16))
        assert self.capability >= (10, 0)
        assert self.block_c % self.block == 0

    @property
    def name(self) -> str:
        formats = operand_formats(self.a_format, self.b_format)
        return f"block_scaled_mm_{formats}_{self.scale}_{self.out_dtype}"

    def bytes(self, M: int, N: int, C: int) -> int:
        """Each operand and its scales read once, the output written once."""
        read = 0
        sides = ((M, self.a_format, self.a_tiles), (N, self.b_format, self.b_tiles))
        for kept, name, tiles in sides:
            groups = -(-kept // self.block) if tiles else kept
            read += kept * C * format_named(name).bits // 8 + groups * (C // self.block)
        return read + M * N * INPUT_BYTES[self.out_dtype]


MmSpec = ScaledMmSpec | GluonMmSpec
QuantizerSpec = QuantizeRowsSpec | AmaxSpec | QuantizeTilesSpec | ColumnAmaxSpec | ColumnWriteSpec
KernelSpec = QuantizerSpec | MmSpec | BlockScaledMmSpec
