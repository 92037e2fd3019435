"""decode_fp4_e2m1_block_2d_16_ue4m3_bf16: codes [R, C padded] to their values [R, size]."""

import triton
import triton.language as tl

OPTIONS = {'num_warps': 4, 'num_stages': 1, 'enable_fp_fusion': False}
SIGNATURE = {
    "codes_ptr": "*u8",
    "scale_ptr": "*u8",
    "out_ptr": "*bf16",
    "R": "i32",
    "C_padded": "i32",
    "size": "i32",
}


@triton.jit
def decode_fp4_e2m1_block_2d_16_ue4m3_bf16(
    codes_ptr,
    scale_ptr,
    out_ptr,
    R,
    C_padded,
    size,
):
    GROUP: tl.constexpr = 16  # codes along the contracted dim, of one scale
    GROUPS: tl.constexpr = 256
    tiles = tl.cdiv(C_padded, 128)
    tile_r = tl.program_id(0) // tiles
    tile_c = tl.program_id(0) % tiles
    group = tl.arange(0, GROUPS)
    row = tile_r * 32 + group // 8
    column = (tile_c * 8 + group % 8) * GROUP
    byte = (column // 2)[:, None] + tl.arange(0, GROUP // 2)[None, :]
    inside = (row < R)[:, None] & (byte < C_padded // 2)
    codes_ptrs = codes_ptr + row.to(tl.int64)[:, None] * (C_padded // 2) + byte
    codes = tl.load(codes_ptrs, mask=inside, other=0).to(tl.int32)
    codes = tl.reshape(tl.join(codes & 15, codes >> 4), (GROUPS, GROUP))
    exponent = (codes & 7) >> 1
    mantissa = (codes & 1) + ((exponent > 0).to(tl.int32) << 1)
    step = ((tl.maximum(exponent, 1) + 125) << 23).to(tl.float32, bitcast=True)
    value = mantissa.to(tl.float32) * step
    value = tl.where(codes >= 8, -value, value)
    scale_ptrs = scale_ptr + (row // GROUP).to(tl.int64) * (C_padded // GROUP) + column // GROUP
    scale_code = tl.load(scale_ptrs, mask=(row < R) & (column < C_padded), other=0)
    scale_code = scale_code.to(tl.int32)
    scale_exponent = scale_code >> 3
    scale_mantissa = scale_code & 7
    scale_mantissa += (scale_exponent > 0).to(tl.int32) << 3
    scale_step = (tl.maximum(scale_exponent, 1) + 117) << 23
    scale = scale_mantissa.to(tl.float32) * scale_step.to(tl.float32, bitcast=True)
    scale = tl.where(scale_code == 127, float('nan'), scale)
    value = value * scale[:, None]
    out_column = column[:, None] + tl.arange(0, GROUP)[None, :]
    inside = (row < R)[:, None] & (out_column < size)
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * size + out_column
    tl.store(out_ptrs, value.to(tl.bfloat16), mask=inside)


if __name__ == "__main__":  # compiles without a GPU and prints the assembly
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = [["tt.divisibility", 16]]
    arguments = enumerate(SIGNATURE.values())
    attributes = {(i,): aligned for i, kind in arguments if kind == "i32" or "*" in kind}
    source = ASTSource(decode_fp4_e2m1_block_2d_16_ue4m3_bf16, SIGNATURE, attrs=attributes)
    target = GPUTarget("cuda", 90, 32)
    print(triton.compile(source, target=target, options=OPTIONS).asm["ptx"])
