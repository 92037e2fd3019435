"""scaled_mm_int8_bf16: out [M, N] = (a [M, C] @ b [N, C]^T) * a_scale * b_scale."""

import triton
import triton.language as tl

OPTIONS = {'num_warps': 4, 'num_stages': 3, 'enable_fp_fusion': False}
SIGNATURE = {
    "a_descriptor": "tensordesc<i8[128, 128]>",
    "b_descriptor": "tensordesc<i8[128, 128]>",
    "out_ptr": "*bf16",
    "a_scale_ptr": "*fp32",
    "b_scale_ptr": "*fp32",
    "M": "i32",
    "N": "i32",
    "C": "i32",
}


@triton.jit
def scaled_mm_int8_bf16(
    a_descriptor,
    b_descriptor,
    out_ptr,
    a_scale_ptr,
    b_scale_ptr,
    M,
    N,
    C,
):
    BLOCK_M: tl.constexpr = 128
    BLOCK_N: tl.constexpr = 128
    BLOCK_C: tl.constexpr = 128
    GROUP_M: tl.constexpr = 16  # rows of tiles that share columns in L2
    program = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first_m = program // (GROUP_M * tiles_n) * GROUP_M
    group_m = min(tl.cdiv(M, BLOCK_M) - first_m, GROUP_M)
    in_group = program % (GROUP_M * tiles_n)
    tile_m = first_m + in_group % group_m
    tile_n = in_group // group_m
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for c in range(0, C, BLOCK_C):
        a = a_descriptor.load([tile_m * BLOCK_M, c])
        b = b_descriptor.load([tile_n * BLOCK_N, c])
        accumulator = tl.dot(a, b.T, acc=accumulator, out_dtype=tl.int32)
    a_scale = tl.load(a_scale_ptr + m)
    b_scale = tl.load(b_scale_ptr + n)
    out = accumulator.to(tl.float32) * a_scale[:, None] * b_scale[None, :]
    out_ptrs = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_ptrs, out.to(tl.bfloat16))


if __name__ == "__main__":  # compiles without a GPU and prints the assembly
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = [["tt.divisibility", 16]]
    arguments = enumerate(SIGNATURE.values())
    attributes = {(i,): aligned for i, kind in arguments if kind == "i32" or "*" in kind}
    source = ASTSource(scaled_mm_int8_bf16, SIGNATURE, attrs=attributes)
    target = GPUTarget("cuda", 90, 32)
    print(triton.compile(source, target=target, options=OPTIONS).asm["ptx"])
