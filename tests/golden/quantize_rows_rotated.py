"""quantize_rows_int8_h128_bf16: x [T, K] rotated by H, to codes [T, K padded], one scale a row [T]."""

import triton
import triton.language as tl

OPTIONS = {'num_warps': 1, 'num_stages': 3, 'enable_fp_fusion': False}
SIGNATURE = {
    "x_ptr": "*bf16",
    "matrix_ptr": "*bf16",
    "codes_ptr": "*i8",
    "scale_ptr": "*fp32",
    "T": "i32",
    "K": "i32",
    "x_stride": "i32",
    "codes_stride": "i32",
}


@triton.jit
def quantize_rows_int8_h128_bf16(
    x_ptr,
    matrix_ptr,
    codes_ptr,
    scale_ptr,
    T,
    K,
    x_stride,
    codes_stride,
):
    ROWS: tl.constexpr = 1  # rows of a tile
    GROUPS: tl.constexpr = 32  # runs of 128 columns of a tile
    run = tl.arange(0, ROWS * GROUPS)  # counts (row, group)
    column = (run % GROUPS * 128)[:, None]  # the first of the run
    i = tl.arange(0, 32)
    matrix = tl.load(matrix_ptr + i[:, None] * 32 + i[None, :])  # [32, 32]
    tile = tl.program_id(0)
    row = tile * ROWS + run // GROUPS
    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * x_stride + column + i[None, :]
    x0 = tl.load(x_ptrs)  # [ROWS * GROUPS, 32]
    x1 = tl.load(x_ptrs + 32)  # [ROWS * GROUPS, 32]
    x2 = tl.load(x_ptrs + 64)  # [ROWS * GROUPS, 32]
    x3 = tl.load(x_ptrs + 96)  # [ROWS * GROUPS, 32]
    y0 = tl.dot(x0, matrix)  # [ROWS * GROUPS, 32] fp32, not normalized
    y1 = tl.dot(x1, matrix)  # [ROWS * GROUPS, 32] fp32, not normalized
    y2 = tl.dot(x2, matrix)  # [ROWS * GROUPS, 32] fp32, not normalized
    y3 = tl.dot(x3, matrix)  # [ROWS * GROUPS, 32] fp32, not normalized
    y0, y1 = y0 + y1, y0 - y1
    y2, y3 = y2 + y3, y2 - y3
    y0, y2 = y0 + y2, y0 - y2
    y1, y3 = y1 + y3, y1 - y3
    m0 = tl.abs(y0)
    m1 = tl.abs(y1)
    m2 = tl.abs(y2)
    m3 = tl.abs(y3)
    m0 = tl.maximum(m0, m1, propagate_nan=tl.PropagateNan.ALL)
    m2 = tl.maximum(m2, m3, propagate_nan=tl.PropagateNan.ALL)
    m0 = tl.maximum(m0, m2, propagate_nan=tl.PropagateNan.ALL)
    largest = m0.to(tl.int32, bitcast=True)
    group_bits = tl.max(largest, axis=1)  # [ROWS * GROUPS]
    bits = tl.max(group_bits, axis=0)
    finite = bits < 0x7F800000
    amax = tl.maximum(bits.to(tl.float32, bitcast=True), 7.888609052210118e-31)
    inverse = tl.div_rn(127.0, amax)
    scale = tl.where(finite, tl.div_rn(amax, 127.0) * 0.0883883461356163, float('nan'))
    scale = tl.where(bits == 0, 1.0, scale)
    tl.store(scale_ptr + tile, scale)
    codes0 = (y0 * inverse + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    codes0 = tl.reshape(codes0, (ROWS * GROUPS, 4, 4, 2))
    codes0 = tl.reshape(tl.permute(codes0, (0, 2, 1, 3)), (ROWS * GROUPS, 32))
    codes1 = (y1 * inverse + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    codes1 = tl.reshape(codes1, (ROWS * GROUPS, 4, 4, 2))
    codes1 = tl.reshape(tl.permute(codes1, (0, 2, 1, 3)), (ROWS * GROUPS, 32))
    codes2 = (y2 * inverse + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    codes2 = tl.reshape(codes2, (ROWS * GROUPS, 4, 4, 2))
    codes2 = tl.reshape(tl.permute(codes2, (0, 2, 1, 3)), (ROWS * GROUPS, 32))
    codes3 = (y3 * inverse + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    codes3 = tl.reshape(codes3, (ROWS * GROUPS, 4, 4, 2))
    codes3 = tl.reshape(tl.permute(codes3, (0, 2, 1, 3)), (ROWS * GROUPS, 32))
    joined0_0 = tl.join(codes0, codes2)
    joined0_1 = tl.join(codes1, codes3)
    joined1_0 = tl.join(joined0_0, joined0_1)
    codes = tl.reshape(tl.permute(joined1_0, (0, 2, 3, 1)), (ROWS * GROUPS, 128))
    codes_ptrs = codes_ptr + row.to(tl.int64)[:, None] * codes_stride + column + tl.arange(0, 128)[None, :]
    tl.store(codes_ptrs, codes, mask=finite)
    tl.store(codes_ptrs, tl.zeros((ROWS * GROUPS, 128), tl.float32).to(tl.int8), mask=finite == 0)


if __name__ == "__main__":  # compiles without a GPU and prints the assembly
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = [["tt.divisibility", 16]]
    arguments = enumerate(SIGNATURE.values())
    attributes = {(i,): aligned for i, kind in arguments if kind == "i32" or "*" in kind}
    source = ASTSource(quantize_rows_int8_h128_bf16, SIGNATURE, attrs=attributes)
    target = GPUTarget("cuda", 90, 32)
    print(triton.compile(source, target=target, options=OPTIONS).asm["ptx"])
