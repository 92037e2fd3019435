"""amax_rows_rotated_columns_rotated_bf16: maximum magnitudes of x [T, K], as fp32 bits, into buffers that start at 0."""

import triton
import triton.language as tl

OPTIONS = {'num_warps': 8, 'num_stages': 2, 'enable_fp_fusion': False}
SIGNATURE = {
    "x_ptr": "*bf16",
    "matrix_ptr": "*bf16",
    "row_amax_ptr": "*i32",
    "column_amax_ptr": "*i32",
    "T": "i32",
    "K": "i32",
    "x_stride": "i32",
}


@triton.jit
def amax_rows_rotated_columns_rotated_bf16(
    x_ptr,
    matrix_ptr,
    row_amax_ptr,
    column_amax_ptr,
    T,
    K,
    x_stride,
):
    k = tl.program_id(0) * 128 + tl.arange(0, 128)
    i = tl.arange(0, 128)
    matrix = tl.load(matrix_ptr + i[:, None] * 128 + i[None, :])  # [128, 128]
    column_bits = tl.zeros((128,), dtype=tl.int32)
    t = tl.program_id(1) * 128 + tl.arange(0, 128)
    x_ptrs = x_ptr + t.to(tl.int64)[:, None] * x_stride + k[None, :]
    x = tl.load(x_ptrs)  # [128 t, 128 k]
    row_y = tl.dot(x, matrix)  # [128 t, 128 k] fp32, not normalized
    row_magnitude = row_y.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(row_amax_ptr + t, tl.max(row_magnitude, axis=1), sem="relaxed")
    column_y = tl.dot(tl.trans(x), matrix)  # [128 k, 128 t] fp32, not normalized
    column_magnitude = column_y.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    column_bits = tl.maximum(column_bits, tl.max(column_magnitude, axis=1))
    tl.atomic_max(column_amax_ptr + k, column_bits, sem="relaxed")


if __name__ == "__main__":  # compiles without a GPU and prints the assembly
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = [["tt.divisibility", 16]]
    arguments = enumerate(SIGNATURE.values())
    attributes = {(i,): aligned for i, kind in arguments if kind == "i32" or "*" in kind}
    source = ASTSource(amax_rows_rotated_columns_rotated_bf16, SIGNATURE, attrs=attributes)
    target = GPUTarget("cuda", 80, 32)
    print(triton.compile(source, target=target, options=OPTIONS).asm["ptx"])
