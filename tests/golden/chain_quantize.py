"""chain_quantize_2_rows_int8_h128_columns_int8_h32_fp16_bf16: outputs [T, K] to codes, from known maxima."""

import triton
import triton.language as tl

OPTIONS = {'num_warps': 8, 'num_stages': 1, 'enable_fp_fusion': False, 'maxnreg': 128}
SIGNATURE = {
    "v0_ptr": "*bf16",
    "v1_ptr": "*bf16",
    "matrix0_ptr": "*fp16",
    "matrix1_ptr": "*fp16",
    "matrix2_ptr": "*bf16",
    "matrix3_ptr": "*bf16",
    "row0_amax_ptr": "*i32",
    "row0_codes_ptr": "*i8",
    "row0_scale_ptr": "*fp32",
    "column0_amax_ptr": "*i32",
    "column0_codes_ptr": "*i8",
    "column0_scale_ptr": "*fp32",
    "row1_amax_ptr": "*i32",
    "row1_codes_ptr": "*i8",
    "row1_scale_ptr": "*fp32",
    "column1_amax_ptr": "*i32",
    "column1_codes_ptr": "*i8",
    "column1_scale_ptr": "*fp32",
    "T": "i32",
    "K": "i32",
    "v0_stride": "i32",
    "v1_stride": "i32",
    "row0_codes_stride": "i32",
    "column0_codes_stride": "i32",
    "row1_codes_stride": "i32",
    "column1_codes_stride": "i32",
}


@triton.jit
def chain_quantize_2_rows_int8_h128_columns_int8_h32_fp16_bf16(
    v0_ptr,
    v1_ptr,
    matrix0_ptr,
    matrix1_ptr,
    matrix2_ptr,
    matrix3_ptr,
    row0_amax_ptr,
    row0_codes_ptr,
    row0_scale_ptr,
    column0_amax_ptr,
    column0_codes_ptr,
    column0_scale_ptr,
    row1_amax_ptr,
    row1_codes_ptr,
    row1_scale_ptr,
    column1_amax_ptr,
    column1_codes_ptr,
    column1_scale_ptr,
    T,
    K,
    v0_stride,
    v1_stride,
    row0_codes_stride,
    column0_codes_stride,
    row1_codes_stride,
    column1_codes_stride,
):
    k = tl.program_id(0) * 128 + tl.arange(0, 128)
    i = tl.arange(0, 128)
    matrix0 = tl.load(matrix0_ptr + i[:, None] * 128 + i[None, :])  # [128, 128]
    i = tl.arange(0, 64)
    matrix1 = tl.load(matrix1_ptr + i[:, None] * 64 + i[None, :])  # [64, 64]
    i = tl.arange(0, 128)
    matrix2 = tl.load(matrix2_ptr + i[:, None] * 128 + i[None, :])  # [128, 128]
    i = tl.arange(0, 64)
    matrix3 = tl.load(matrix3_ptr + i[:, None] * 64 + i[None, :])  # [64, 64]
    column0_bits = tl.load(column0_amax_ptr + k)  # [128]
    column0_finite = column0_bits < 0x7F800000
    column0_amax = tl.maximum(column0_bits.to(tl.float32, bitcast=True), 7.888609052210118e-31)
    column0_inverse = tl.div_rn(127.0, column0_amax)
    column0_scale = tl.where(column0_finite, tl.div_rn(column0_amax, 127.0) * 0.1767766922712326, float('nan'))
    column0_scale = tl.where(column0_bits == 0, 1.0, column0_scale)
    if tl.program_id(1) == 0:
        tl.store(column0_scale_ptr + k, column0_scale)
    column1_bits = tl.load(column1_amax_ptr + k)  # [128]
    column1_finite = column1_bits < 0x7F800000
    column1_amax = tl.maximum(column1_bits.to(tl.float32, bitcast=True), 7.888609052210118e-31)
    column1_inverse = tl.div_rn(127.0, column1_amax)
    column1_scale = tl.where(column1_finite, tl.div_rn(column1_amax, 127.0) * 0.1767766922712326, float('nan'))
    column1_scale = tl.where(column1_bits == 0, 1.0, column1_scale)
    if tl.program_id(1) == 0:
        tl.store(column1_scale_ptr + k, column1_scale)
    t = tl.program_id(1) * 64 + tl.arange(0, 64)
    v0_ptrs = v0_ptr + t.to(tl.int64)[:, None] * v0_stride + k[None, :]
    v0 = tl.load(v0_ptrs, mask=(t[:, None] < T), other=0.0).to(tl.float32)
    v1_ptrs = v1_ptr + t.to(tl.int64)[:, None] * v1_stride + k[None, :]
    v1 = tl.load(v1_ptrs, mask=(t[:, None] < T), other=0.0).to(tl.float32)
    v2 = v0 - 1.0
    v3 = tl.where((v0 > v1) | (v0 != v0), v0, v1)
    x0 = tl.where((t[:, None] < T), v2.to(tl.float16), 0.0)  # [64, 128]
    x0 = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x0], tl.float16, False, 2)  # computed once
    x1 = tl.where((t[:, None] < T), v3.to(tl.bfloat16), 0.0)  # [64, 128]
    x1 = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x1], tl.bfloat16, False, 2)  # computed once
    row0_bits = tl.load(row0_amax_ptr + t, mask=t < T, other=0)  # [64]
    row0_finite = row0_bits < 0x7F800000
    row0_amax = tl.maximum(row0_bits.to(tl.float32, bitcast=True), 7.888609052210118e-31)
    row0_inverse = tl.div_rn(127.0, row0_amax)
    row0_scale = tl.where(row0_finite, tl.div_rn(row0_amax, 127.0) * 0.0883883461356163, float('nan'))
    row0_scale = tl.where(row0_bits == 0, 1.0, row0_scale)
    if tl.program_id(0) == 0:
        tl.store(row0_scale_ptr + t, row0_scale, mask=t < T)
    row0_y = tl.dot(x0, matrix0)  # [64 t, 128 k] fp32, not normalized
    # the low byte of the sum is the code
    row0_codes = (row0_y * row0_inverse[:, None] + 12582912.0).to(tl.int32, bitcast=True)
    row0_codes = tl.where(row0_finite[:, None], row0_codes, 0).to(tl.int8)
    row0_codes = tl.reshape(row0_codes, (64, 16, 4, 2))
    row0_codes = tl.reshape(tl.permute(row0_codes, (0, 2, 1, 3)), (64, 128))
    row0_codes_ptrs = row0_codes_ptr + t.to(tl.int64)[:, None] * row0_codes_stride + k[None, :]
    tl.store(row0_codes_ptrs, row0_codes, mask=(t[:, None] < T))
    column0_y = tl.dot(tl.trans(x0), matrix1)  # [128 k, 64 t] fp32, not normalized
    # the low byte of the sum is the code
    column0_codes = (column0_y * column0_inverse[:, None] + 12582912.0).to(tl.int32, bitcast=True)
    column0_codes = tl.where(column0_finite[:, None], column0_codes, 0).to(tl.int8)
    column0_codes = tl.reshape(column0_codes, (128, 8, 4, 2))
    column0_codes = tl.reshape(tl.permute(column0_codes, (0, 2, 1, 3)), (128, 64))
    column0_codes_ptrs = column0_codes_ptr + k.to(tl.int64)[:, None] * column0_codes_stride + t[None, :]
    tl.store(column0_codes_ptrs, column0_codes, mask=(t[None, :] < column0_codes_stride))
    row1_bits = tl.load(row1_amax_ptr + t, mask=t < T, other=0)  # [64]
    row1_finite = row1_bits < 0x7F800000
    row1_amax = tl.maximum(row1_bits.to(tl.float32, bitcast=True), 7.888609052210118e-31)
    row1_inverse = tl.div_rn(127.0, row1_amax)
    row1_scale = tl.where(row1_finite, tl.div_rn(row1_amax, 127.0) * 0.0883883461356163, float('nan'))
    row1_scale = tl.where(row1_bits == 0, 1.0, row1_scale)
    if tl.program_id(0) == 0:
        tl.store(row1_scale_ptr + t, row1_scale, mask=t < T)
    row1_y = tl.dot(x1, matrix2)  # [64 t, 128 k] fp32, not normalized
    # the low byte of the sum is the code
    row1_codes = (row1_y * row1_inverse[:, None] + 12582912.0).to(tl.int32, bitcast=True)
    row1_codes = tl.where(row1_finite[:, None], row1_codes, 0).to(tl.int8)
    row1_codes = tl.reshape(row1_codes, (64, 16, 4, 2))
    row1_codes = tl.reshape(tl.permute(row1_codes, (0, 2, 1, 3)), (64, 128))
    row1_codes_ptrs = row1_codes_ptr + t.to(tl.int64)[:, None] * row1_codes_stride + k[None, :]
    tl.store(row1_codes_ptrs, row1_codes, mask=(t[:, None] < T))
    column1_y = tl.dot(tl.trans(x1), matrix3)  # [128 k, 64 t] fp32, not normalized
    # the low byte of the sum is the code
    column1_codes = (column1_y * column1_inverse[:, None] + 12582912.0).to(tl.int32, bitcast=True)
    column1_codes = tl.where(column1_finite[:, None], column1_codes, 0).to(tl.int8)
    column1_codes = tl.reshape(column1_codes, (128, 8, 4, 2))
    column1_codes = tl.reshape(tl.permute(column1_codes, (0, 2, 1, 3)), (128, 64))
    column1_codes_ptrs = column1_codes_ptr + k.to(tl.int64)[:, None] * column1_codes_stride + t[None, :]
    tl.store(column1_codes_ptrs, column1_codes, mask=(t[None, :] < column1_codes_stride))


if __name__ == "__main__":  # compiles without a GPU and prints the assembly
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = [["tt.divisibility", 16]]
    arguments = enumerate(SIGNATURE.values())
    attributes = {(i,): aligned for i, kind in arguments if kind == "i32" or "*" in kind}
    source = ASTSource(chain_quantize_2_rows_int8_h128_columns_int8_h32_fp16_bf16, SIGNATURE, attrs=attributes)
    target = GPUTarget("cuda", 90, 32)
    print(triton.compile(source, target=target, options=OPTIONS).asm["ptx"])
