"""quantize_rows_int8_h128_columns_int8_h128_bf16: x [T, K] to codes [T, K] and [K, T] (last dim padded), from known maxima."""

import triton
import triton.language as tl

OPTIONS = {'num_warps': 8, 'num_stages': 2, 'enable_fp_fusion': False}
SIGNATURE = {
    "x_ptr": "*bf16",
    "matrix_ptr": "*bf16",
    "row_amax_ptr": "*i32",
    "row_codes_ptr": "*i8",
    "row_scale_ptr": "*fp32",
    "column_amax_ptr": "*i32",
    "column_codes_ptr": "*i8",
    "column_scale_ptr": "*fp32",
    "T": "i32",
    "K": "i32",
    "x_stride": "i32",
    "row_codes_stride": "i32",
    "column_codes_stride": "i32",
}


@triton.jit
def quantize_rows_int8_h128_columns_int8_h128_bf16(
    x_ptr,
    matrix_ptr,
    row_amax_ptr,
    row_codes_ptr,
    row_scale_ptr,
    column_amax_ptr,
    column_codes_ptr,
    column_scale_ptr,
    T,
    K,
    x_stride,
    row_codes_stride,
    column_codes_stride,
):
    k = tl.program_id(0) * 128 + tl.arange(0, 128)
    i = tl.arange(0, 128)
    matrix = tl.load(matrix_ptr + i[:, None] * 128 + i[None, :])  # [128, 128]
    column_bits = tl.load(column_amax_ptr + k)  # [128]
    column_finite = column_bits < 0x7F800000
    column_amax = tl.maximum(column_bits.to(tl.float32, bitcast=True), 7.888609052210118e-31)
    column_inverse = tl.div_rn(127.0, column_amax)
    column_scale = tl.where(column_finite, tl.div_rn(column_amax, 127.0) * 0.0883883461356163, float('nan'))
    column_scale = tl.where(column_bits == 0, 1.0, column_scale)
    if tl.program_id(1) == 0:
        tl.store(column_scale_ptr + k, column_scale)
    t = tl.program_id(1) * 128 + tl.arange(0, 128)
    x_ptrs = x_ptr + t.to(tl.int64)[:, None] * x_stride + k[None, :]
    x = tl.load(x_ptrs)  # [128 t, 128 k]
    row_bits = tl.load(row_amax_ptr + t)  # [128]
    row_finite = row_bits < 0x7F800000
    row_amax = tl.maximum(row_bits.to(tl.float32, bitcast=True), 7.888609052210118e-31)
    row_inverse = tl.div_rn(127.0, row_amax)
    row_scale = tl.where(row_finite, tl.div_rn(row_amax, 127.0) * 0.0883883461356163, float('nan'))
    row_scale = tl.where(row_bits == 0, 1.0, row_scale)
    if tl.program_id(0) == 0:
        tl.store(row_scale_ptr + t, row_scale)
    row_y = tl.dot(x, matrix)  # [128 t, 128 k] fp32, not normalized
    # the low byte of the sum is the code
    row_codes = (row_y * row_inverse[:, None] + 12582912.0).to(tl.int32, bitcast=True)
    row_codes = tl.where(row_finite[:, None], row_codes, 0).to(tl.int8)
    row_codes = tl.reshape(row_codes, (128, 16, 4, 2))
    row_codes = tl.reshape(tl.permute(row_codes, (0, 2, 1, 3)), (128, 128))
    row_codes_ptrs = row_codes_ptr + t.to(tl.int64)[:, None] * row_codes_stride + k[None, :]
    tl.store(row_codes_ptrs, row_codes)
    column_y = tl.dot(tl.trans(x), matrix)  # [128 k, 128 t] fp32, not normalized
    # the low byte of the sum is the code
    column_codes = (column_y * column_inverse[:, None] + 12582912.0).to(tl.int32, bitcast=True)
    column_codes = tl.where(column_finite[:, None], column_codes, 0).to(tl.int8)
    column_codes = tl.reshape(column_codes, (128, 16, 4, 2))
    column_codes = tl.reshape(tl.permute(column_codes, (0, 2, 1, 3)), (128, 128))
    column_codes_ptrs = column_codes_ptr + k.to(tl.int64)[:, None] * column_codes_stride + t[None, :]
    tl.store(column_codes_ptrs, column_codes)


if __name__ == "__main__":  # compiles without a GPU and prints the assembly
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = [["tt.divisibility", 16]]
    arguments = enumerate(SIGNATURE.values())
    attributes = {(i,): aligned for i, kind in arguments if kind == "i32" or "*" in kind}
    source = ASTSource(quantize_rows_int8_h128_columns_int8_h128_bf16, SIGNATURE, attrs=attributes)
    target = GPUTarget("cuda", 80, 32)
    print(triton.compile(source, target=target, options=OPTIONS).asm["ptx"])
