"""chain_quantize_rows_int8_h128_bf16: a chain's output [T, K] rotated by H, to codes [T, K padded], one scale a row [T]."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

OPTIONS = {'num_warps': 8, 'num_stages': 2, 'enable_fp_fusion': False}
SIGNATURE = {
    "v0_ptr": "*bf16",
    "v1_ptr": "*bf16",
    "matrix_ptr": "*bf16",
    "codes_ptr": "*i8",
    "scale_ptr": "*fp32",
    "value_ptr": "*bf16",
    "T": "i32",
    "K": "i32",
    "v0_stride": "i32",
    "v1_stride": "i32",
    "codes_stride": "i32",
}


@triton.jit
def chain_quantize_rows_int8_h128_bf16(
    v0_ptr,
    v1_ptr,
    matrix_ptr,
    codes_ptr,
    scale_ptr,
    value_ptr,
    T,
    K,
    v0_stride,
    v1_stride,
    codes_stride,
):
    ROWS: tl.constexpr = 4  # rows of a tile
    GROUPS: tl.constexpr = 32  # runs of 128 columns of a tile
    run = tl.arange(0, ROWS * GROUPS)  # counts (row, group)
    column = (run % GROUPS * 128)[:, None]  # the first of the run
    i = tl.arange(0, 64)
    matrix = tl.load(matrix_ptr + i[:, None] * 64 + i[None, :])  # [64, 64]
    tile = tl.program_id(0)
    row = tile * ROWS + run // GROUPS
    v0_ptrs = v0_ptr + row.to(tl.int64)[:, None] * v0_stride + column + i[None, :]
    v0 = tl.load(v0_ptrs).to(tl.float32)
    v1_ptrs = v1_ptr + row.to(tl.int64)[:, None] * v1_stride + column + i[None, :]
    v1 = tl.load(v1_ptrs).to(tl.float32)
    v5 = v0 * libdevice.fast_dividef(1.0, 1.0 + libdevice.exp2(v0 * -1.4426950408889634))
    v6 = v5 * v1
    x0 = v6.to(tl.bfloat16)
    x0 = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x0], tl.bfloat16, False, 2)  # computed once
    v0_ptrs = v0_ptr + row.to(tl.int64)[:, None] * v0_stride + column + i[None, :] + 64
    v0 = tl.load(v0_ptrs).to(tl.float32)
    v1_ptrs = v1_ptr + row.to(tl.int64)[:, None] * v1_stride + column + i[None, :] + 64
    v1 = tl.load(v1_ptrs).to(tl.float32)
    v5 = v0 * libdevice.fast_dividef(1.0, 1.0 + libdevice.exp2(v0 * -1.4426950408889634))
    v6 = v5 * v1
    x1 = v6.to(tl.bfloat16)
    x1 = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x1], tl.bfloat16, False, 2)  # computed once
    tl.store(value_ptr + row.to(tl.int64)[:, None] * K + column + i[None, :], x0)
    tl.store(value_ptr + row.to(tl.int64)[:, None] * K + column + i[None, :] + 64, x1)
    y0 = tl.dot(x0, matrix)  # [ROWS * GROUPS, 64] fp32, not normalized
    y1 = tl.dot(x1, matrix)  # [ROWS * GROUPS, 64] fp32, not normalized
    y0, y1 = y0 + y1, y0 - y1
    m0 = tl.abs(y0)
    m1 = tl.abs(y1)
    m0 = tl.maximum(m0, m1, propagate_nan=tl.PropagateNan.ALL)
    largest = m0.to(tl.int32, bitcast=True)
    group_bits = tl.max(largest, axis=1)  # [ROWS * GROUPS]
    bits = tl.max(tl.reshape(group_bits, (ROWS, GROUPS)), axis=1)  # [ROWS]
    row_finite = bits < 0x7F800000
    row_amax = tl.maximum(bits.to(tl.float32, bitcast=True), 7.888609052210118e-31)
    row_inverse = tl.div_rn(127.0, row_amax)
    row_scale = tl.where(row_finite, tl.div_rn(row_amax, 127.0) * 0.0883883461356163, float('nan'))
    row_scale = tl.where(bits == 0, 1.0, row_scale)
    scale_row = tile * ROWS + tl.arange(0, ROWS)
    tl.store(scale_ptr + scale_row, row_scale)
    inverse = tl.reshape(tl.broadcast_to(row_inverse[:, None], (ROWS, GROUPS)), (ROWS * GROUPS,))[:, None]
    finite = tl.reshape(tl.broadcast_to(row_finite[:, None], (ROWS, GROUPS)), (ROWS * GROUPS,))[:, None]
    codes0 = (y0 * inverse + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    codes0 = tl.reshape(codes0, (ROWS * GROUPS, 8, 4, 2))
    codes0 = tl.reshape(tl.permute(codes0, (0, 2, 1, 3)), (ROWS * GROUPS, 64))
    codes1 = (y1 * inverse + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    codes1 = tl.reshape(codes1, (ROWS * GROUPS, 8, 4, 2))
    codes1 = tl.reshape(tl.permute(codes1, (0, 2, 1, 3)), (ROWS * GROUPS, 64))
    joined0_0 = tl.join(codes0, codes1)
    codes = tl.reshape(tl.permute(joined0_0, (0, 2, 1)), (ROWS * GROUPS, 128))
    codes_ptrs = codes_ptr + row.to(tl.int64)[:, None] * codes_stride + column + tl.arange(0, 128)[None, :]
    tl.store(codes_ptrs, codes, mask=finite)
    tl.store(codes_ptrs, tl.zeros((ROWS * GROUPS, 128), tl.float32).to(tl.int8), mask=finite == 0)


if __name__ == "__main__":  # compiles without a GPU and prints the assembly
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = [["tt.divisibility", 16]]
    arguments = enumerate(SIGNATURE.values())
    attributes = {(i,): aligned for i, kind in arguments if kind == "i32" or "*" in kind}
    source = ASTSource(chain_quantize_rows_int8_h128_bf16, SIGNATURE, attrs=attributes)
    target = GPUTarget("cuda", 90, 32)
    print(triton.compile(source, target=target, options=OPTIONS).asm["ptx"])
