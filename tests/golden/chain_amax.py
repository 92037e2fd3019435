"""chain_amax_2_rows_rotated_columns_rotated_fp16_bf16: maximum magnitudes of outputs [T, K], as fp32 bits, from 0."""

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
    "column0_amax_ptr": "*i32",
    "row1_amax_ptr": "*i32",
    "column1_amax_ptr": "*i32",
    "T": "i32",
    "K": "i32",
    "v0_stride": "i32",
    "v1_stride": "i32",
}


@triton.jit
def chain_amax_2_rows_rotated_columns_rotated_fp16_bf16(
    v0_ptr,
    v1_ptr,
    matrix0_ptr,
    matrix1_ptr,
    matrix2_ptr,
    matrix3_ptr,
    row0_amax_ptr,
    column0_amax_ptr,
    row1_amax_ptr,
    column1_amax_ptr,
    T,
    K,
    v0_stride,
    v1_stride,
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
    column0_bits = tl.zeros((128,), dtype=tl.int32)
    column1_bits = tl.zeros((128,), dtype=tl.int32)
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
    row0_y = tl.dot(x0, matrix0)  # [64 t, 128 k] fp32, not normalized
    row0_magnitude = row0_y.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(row0_amax_ptr + t, tl.max(row0_magnitude, axis=1), mask=t < T, sem="relaxed")
    column0_y = tl.dot(tl.trans(x0), matrix1)  # [128 k, 64 t] fp32, not normalized
    column0_magnitude = column0_y.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    column0_bits = tl.maximum(column0_bits, tl.max(column0_magnitude, axis=1))
    row1_y = tl.dot(x1, matrix2)  # [64 t, 128 k] fp32, not normalized
    row1_magnitude = row1_y.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(row1_amax_ptr + t, tl.max(row1_magnitude, axis=1), mask=t < T, sem="relaxed")
    column1_y = tl.dot(tl.trans(x1), matrix3)  # [128 k, 64 t] fp32, not normalized
    column1_magnitude = column1_y.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    column1_bits = tl.maximum(column1_bits, tl.max(column1_magnitude, axis=1))
    tl.atomic_max(column0_amax_ptr + k, column0_bits, sem="relaxed")
    tl.atomic_max(column1_amax_ptr + k, column1_bits, sem="relaxed")


if __name__ == "__main__":  # compiles without a GPU and prints the assembly
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = [["tt.divisibility", 16]]
    arguments = enumerate(SIGNATURE.values())
    attributes = {(i,): aligned for i, kind in arguments if kind == "i32" or "*" in kind}
    source = ASTSource(chain_amax_2_rows_rotated_columns_rotated_fp16_bf16, SIGNATURE, attrs=attributes)
    target = GPUTarget("cuda", 90, 32)
    print(triton.compile(source, target=target, options=OPTIONS).asm["ptx"])
