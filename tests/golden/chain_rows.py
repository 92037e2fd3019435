"""chain_quantize_rows_int8_h128_bf16: a chain's output [T, K] rotated by H, to codes [T, K padded], one scale a row [T]."""

import triton
import triton.language as tl

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
    tile_row = tl.arange(0, ROWS * GROUPS)  # counts (row, group)
    column = (tile_row % GROUPS * 128)[:, None] + tl.arange(0, 128)[None, :]
    i = tl.arange(0, 128)
    matrix = tl.load(matrix_ptr + i[:, None] * 128 + i[None, :])  # [128, 128]
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=2):
        row = tile * ROWS + tile_row // GROUPS
        codes_row_ptr = codes_ptr + row.to(tl.int64)[:, None] * codes_stride
        v0_ptrs = v0_ptr + row.to(tl.int64)[:, None] * v0_stride + column
        v0 = tl.load(v0_ptrs).to(tl.float32)
        v1_ptrs = v1_ptr + row.to(tl.int64)[:, None] * v1_stride + column
        v1 = tl.load(v1_ptrs).to(tl.float32)
        v2 = tl.sigmoid(v0)
        v3 = v0 * v2
        v4 = v3.to(tl.bfloat16).to(tl.float32)
        v5 = v4 * v1
        x = v5.to(tl.bfloat16)  # [ROWS * GROUPS, 128]
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.bfloat16, False, 2)  # computed once
        tl.store(value_ptr + row.to(tl.int64)[:, None] * K + column, x)
        y = tl.dot(x, matrix)  # [ROWS * GROUPS, 128] fp32, not normalized
        magnitude = y.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        group_bits = tl.max(magnitude, axis=1)  # [ROWS * GROUPS]
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
        # the low byte of the sum is the code
        codes = (y * inverse + 12582912.0).to(tl.int32, bitcast=True)
        codes = tl.where(finite, codes, 0).to(tl.int8)
        codes = tl.reshape(codes, (ROWS * GROUPS, 16, 4, 2))
        codes = tl.reshape(tl.permute(codes, (0, 2, 1, 3)), (ROWS * GROUPS, 128))
        tl.store(codes_row_ptr + column, codes)


if __name__ == "__main__":  # compiles without a GPU and prints the assembly
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = [["tt.divisibility", 16]]
    arguments = enumerate(SIGNATURE.values())
    attributes = {(i,): aligned for i, kind in arguments if kind == "i32" or "*" in kind}
    source = ASTSource(chain_quantize_rows_int8_h128_bf16, SIGNATURE, attrs=attributes)
    target = GPUTarget("cuda", 90, 32)
    print(triton.compile(source, target=target, options=OPTIONS).asm["ptx"])
