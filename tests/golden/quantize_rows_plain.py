"""quantize_rows_fp8_e4m3_bf16: x [T, K] to codes [T, K padded], one scale a row [T]."""

import triton
import triton.language as tl

OPTIONS = {'num_warps': 4, 'num_stages': 2, 'enable_fp_fusion': False}
SIGNATURE = {
    "x_ptr": "*bf16",
    "codes_ptr": "*fp8e4nv",
    "scale_ptr": "*fp32",
    "T": "i32",
    "K": "i32",
    "x_stride": "i32",
    "codes_stride": "i32",
}


@triton.jit
def quantize_rows_fp8_e4m3_bf16(
    x_ptr,
    codes_ptr,
    scale_ptr,
    T,
    K,
    x_stride,
    codes_stride,
):
    ROWS: tl.constexpr = 2  # rows of a tile
    GROUPS: tl.constexpr = 32  # runs of 128 columns of a tile
    run = tl.arange(0, ROWS * GROUPS)  # counts (row, group)
    column = (run % GROUPS * 128)[:, None]  # the first of the run
    i = tl.arange(0, 128)
    tile = tl.program_id(0)
    row = tile * ROWS + run // GROUPS
    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * x_stride + column + i[None, :]
    x0 = tl.load(x_ptrs)  # [ROWS * GROUPS, 128]
    y0 = x0.to(tl.float32)
    largest = y0.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    group_bits = tl.max(largest, axis=1)  # [ROWS * GROUPS]
    bits = tl.max(tl.reshape(group_bits, (ROWS, GROUPS)), axis=1)  # [ROWS]
    row_finite = bits < 0x7F800000
    row_amax = tl.maximum(bits.to(tl.float32, bitcast=True), 7.888609052210118e-31)
    row_inverse = tl.div_rn(448.0, row_amax)
    row_scale = tl.where(row_finite, tl.div_rn(row_amax, 448.0), float('nan'))
    row_scale = tl.where(bits == 0, 1.0, row_scale)
    scale_row = tile * ROWS + tl.arange(0, ROWS)
    tl.store(scale_ptr + scale_row, row_scale)
    inverse = tl.reshape(tl.broadcast_to(row_inverse[:, None], (ROWS, GROUPS)), (ROWS * GROUPS,))[:, None]
    finite = tl.reshape(tl.broadcast_to(row_finite[:, None], (ROWS, GROUPS)), (ROWS * GROUPS,))[:, None]
    codes = (y0 * inverse).to(tl.float8e4nv)
    codes_ptrs = codes_ptr + row.to(tl.int64)[:, None] * codes_stride + column + tl.arange(0, 128)[None, :]
    tl.store(codes_ptrs, codes, mask=finite)
    tl.store(codes_ptrs, tl.zeros((ROWS * GROUPS, 128), tl.float32).to(tl.float8e4nv), mask=finite == 0)


if __name__ == "__main__":  # compiles without a GPU and prints the assembly
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = [["tt.divisibility", 16]]
    arguments = enumerate(SIGNATURE.values())
    attributes = {(i,): aligned for i, kind in arguments if kind == "i32" or "*" in kind}
    source = ASTSource(quantize_rows_fp8_e4m3_bf16, SIGNATURE, attrs=attributes)
    target = GPUTarget("cuda", 90, 32)
    print(triton.compile(source, target=target, options=OPTIONS).asm["ptx"])
