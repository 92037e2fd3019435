"""scaled_mm_int8_fp16: out [M, N] = (a [M, C] @ b [N, C]^T) * a_scale * b_scale + bias."""

import triton
import triton.language as tl

OPTIONS = {'num_warps': 4, 'num_stages': 4, 'enable_fp_fusion': False}
SIGNATURE = {
    "a_ptr": "*i8",
    "b_ptr": "*i8",
    "out_ptr": "*fp16",
    "a_scale_ptr": "*fp32",
    "b_scale_ptr": "*fp32",
    "bias_ptr": "*bf16",
    "M": "i32",
    "N": "i32",
    "C": "i32",
    "a_stride": "i32",
    "b_stride": "i32",
}


@triton.jit
def scaled_mm_int8_fp16(
    a_ptr,
    b_ptr,
    out_ptr,
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    M,
    N,
    C,
    a_stride,
    b_stride,
):
    BLOCK_M: tl.constexpr = 32
    BLOCK_N: tl.constexpr = 64
    BLOCK_C: tl.constexpr = 64
    GROUP_M: tl.constexpr = 8  # rows of tiles that share columns in L2
    program = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first_m = program // (GROUP_M * tiles_n) * GROUP_M
    group_m = min(tl.cdiv(M, BLOCK_M) - first_m, GROUP_M)
    in_group = program % (GROUP_M * tiles_n)
    tile_m = first_m + in_group % group_m
    tile_n = in_group // group_m
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offset_c = tl.arange(0, BLOCK_C)
    a_ptrs = a_ptr + (m % M).to(tl.int64)[:, None] * a_stride + offset_c[None, :]
    b_ptrs = b_ptr + (n % N).to(tl.int64)[:, None] * b_stride + offset_c[None, :]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for c in range(0, C, BLOCK_C):
        a = tl.load(a_ptrs + c, mask=offset_c[None, :] < C - c, other=0.0)
        b = tl.load(b_ptrs + c, mask=offset_c[None, :] < C - c, other=0.0)
        accumulator = tl.dot(a, b.T, acc=accumulator, out_dtype=tl.int32)
    a_scale = tl.load(a_scale_ptr + m, mask=m < M, other=0.0)
    b_scale = tl.load(b_scale_ptr)
    out = accumulator.to(tl.float32) * a_scale[:, None] * b_scale
    out += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_ptrs, out.to(tl.float16), mask=(m[:, None] < M) & (n[None, :] < N))


if __name__ == "__main__":  # compiles without a GPU and prints the assembly
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = [["tt.divisibility", 16]]
    arguments = enumerate(SIGNATURE.values())
    attributes = {(i,): aligned for i, kind in arguments if kind == "i32" or "*" in kind}
    source = ASTSource(scaled_mm_int8_fp16, SIGNATURE, attrs=attributes)
    target = GPUTarget("cuda", 80, 32)
    print(triton.compile(source, target=target, options=OPTIONS).asm["ptx"])
