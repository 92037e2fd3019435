"""encode_amax_tensor_bf16: x [R, C] to maximum magnitudes."""

import triton
import triton.language as tl

OPTIONS = {'num_warps': 4, 'num_stages': 1, 'enable_fp_fusion': False}
SIGNATURE = {
    "x_ptr": "*bf16",
    "amax_ptr": "*i32",
    "R": "i32",
    "C": "i32",
    "C_padded": "i32",
    "C_transformed": "i32",
    "x_stride": "i32",
}


@triton.jit
def encode_amax_tensor_bf16(
    x_ptr,
    amax_ptr,
    R,
    C,
    C_padded,
    C_transformed,
    x_stride,
):
    ROWS: tl.constexpr = 32  # kept indices of a tile
    SPAN: tl.constexpr = 128  # its codes along the contracted dim
    GROUP: tl.constexpr = 128  # codes that are treated together
    GROUPS: tl.constexpr = 32
    program = tl.program_id(0)
    tiles = tl.cdiv(C_padded, SPAN)
    tile_r = program // tiles
    tile_c = program % tiles
    x_row = (tile_r * ROWS + tl.arange(0, ROWS))[:, None]
    x_column = tile_c * 128 + tl.arange(0, 128)[None, :]
    x_ptrs = x_ptr + x_row.to(tl.int64) * x_stride + x_column
    x = tl.load(x_ptrs, mask=(x_row < R) & (x_column < C), other=0.0)
    y = x.to(tl.float32)
    magnitude = y.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.max(magnitude, axis=1)
    tl.atomic_max(amax_ptr, tl.max(bits, axis=0), sem="relaxed")


if __name__ == "__main__":  # compiles without a GPU and prints the assembly
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = [["tt.divisibility", 16]]
    arguments = enumerate(SIGNATURE.values())
    attributes = {(i,): aligned for i, kind in arguments if kind == "i32" or "*" in kind}
    source = ASTSource(encode_amax_tensor_bf16, SIGNATURE, attrs=attributes)
    target = GPUTarget("cuda", 90, 32)
    print(triton.compile(source, target=target, options=OPTIONS).asm["ptx"])
