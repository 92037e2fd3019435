"""encode_fp4_e2m1_block_2d_16_ue4m3_prescale_bf16: x [R, C] to codes [R, C padded] and scales."""

import triton
import triton.language as tl

OPTIONS = {'num_warps': 4, 'num_stages': 1, 'enable_fp_fusion': False}
SIGNATURE = {
    "x_ptr": "*bf16",
    "amax_ptr": "*i32",
    "codes_ptr": "*u8",
    "scale_ptr": "*u8",
    "tensor_scale_ptr": "*fp32",
    "R": "i32",
    "C": "i32",
    "C_padded": "i32",
    "C_transformed": "i32",
    "x_stride": "i32",
}


@triton.jit
def encode_fp4_e2m1_block_2d_16_ue4m3_prescale_bf16(
    x_ptr,
    amax_ptr,
    codes_ptr,
    scale_ptr,
    tensor_scale_ptr,
    R,
    C,
    C_padded,
    C_transformed,
    x_stride,
):
    ROWS: tl.constexpr = 32  # kept indices of a tile
    SPAN: tl.constexpr = 128  # its codes along the contracted dim
    GROUP: tl.constexpr = 16  # codes that are treated together
    GROUPS: tl.constexpr = 256
    program = tl.program_id(0)
    tiles = tl.cdiv(C_padded, SPAN)
    tile_r = program // tiles
    tile_c = program % tiles
    x_row = (tile_r * ROWS + tl.arange(0, ROWS))[:, None]
    x_column = tile_c * 128 + tl.arange(0, 128)[None, :]
    x_ptrs = x_ptr + x_row.to(tl.int64) * x_stride + x_column
    x = tl.load(x_ptrs, mask=(x_row < R) & (x_column < C), other=0.0)
    y = x.to(tl.float32)
    REACH: tl.constexpr = 2688.0
    tensor_bits = tl.load(amax_ptr)
    tensor_amax = tl.maximum(tensor_bits.to(tl.float32, bitcast=True), 7.888609052210118e-31)
    prescale = tl.where(tensor_bits == 0, 1.0, tl.div_rn(REACH, tensor_amax))
    y = y * tl.where(tensor_bits > 0x7F800000, float('nan'), prescale)
    y = tl.reshape(y, (GROUPS, GROUP))
    group = tl.arange(0, GROUPS)
    row = tile_r * ROWS + group // 8
    column = tile_c * SPAN + group % 8 * GROUP  # the first of the group
    magnitude = y.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.max(magnitude, axis=1)
    tiles_bits = tl.max(tl.reshape(bits, (ROWS // GROUP, GROUP, 128 // GROUP)), axis=1)
    bits = tl.reshape(tl.broadcast_to(tiles_bits[:, None, :], (ROWS // GROUP, GROUP, 128 // GROUP)), (GROUPS,))
    finite = bits < 0x7F800000
    amax = tl.maximum(bits.to(tl.float32, bitcast=True), 7.888609052210118e-31)
    scale = tl.minimum(tl.maximum(tl.div_rn(amax, 6.0), 0.001953125), 448.0)
    exponent = tl.maximum(scale.to(tl.int32, bitcast=True) >> 23, 121)
    per_step = ((257 - exponent) << 23).to(tl.float32, bitcast=True)
    steps = (scale * per_step + 12582912.0) - 12582912.0
    scale = steps * ((exponent - 3) << 23).to(tl.float32, bitcast=True)
    scale_code = steps.to(tl.int32) + ((exponent - 121) << 3)
    inverse = tl.div_rn(1.0, scale)
    scale_code = tl.where(bits == 0, 56, tl.where(finite, scale_code, 127)).to(tl.uint8)
    inverse = tl.where(bits == 0, 1.0, inverse)
    tensor_scale = tl.where(tensor_bits < 0x7F800000, tensor_amax, float('nan'))
    tensor_scale = tl.div_rn(tensor_scale, REACH)
    tensor_scale = tl.where(tensor_bits == 0, 1.0, tensor_scale)
    if program == 0:
        tl.store(tensor_scale_ptr, tensor_scale)
    scale_ptrs = scale_ptr + (row // GROUP).to(tl.int64) * (C_padded // GROUP) + column // GROUP
    tl.store(scale_ptrs, scale_code, mask=(row < R) & (column < C_padded) & (row % GROUP == 0))
    value = y * inverse[:, None]
    magnitude = tl.minimum(tl.abs(value), 6.0)
    exponent = tl.maximum(magnitude.to(tl.int32, bitcast=True) >> 23, 127)
    quotient = magnitude * ((255 - exponent) << 23).to(tl.float32, bitcast=True)
    steps = (quotient + 12582912.0).to(tl.int32, bitcast=True) & 0x3FFFFF
    sign = (value.to(tl.int32, bitcast=True) >> 28) & 8
    codes = (steps + ((exponent - 127) << 1)) | sign
    codes = tl.where(finite[:, None], codes, 0)
    codes, high_codes = tl.split(tl.reshape(codes, (GROUPS, GROUP // 2, 2)))
    codes = codes | (high_codes << 4)
    byte = (column // 2)[:, None] + tl.arange(0, GROUP // 2)[None, :]
    codes_ptrs = codes_ptr + row.to(tl.int64)[:, None] * (C_padded // 2) + byte
    inside = (row < R)[:, None] & (byte < C_padded // 2)
    tl.store(codes_ptrs, codes.to(tl.uint8), mask=inside)


if __name__ == "__main__":  # compiles without a GPU and prints the assembly
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = [["tt.divisibility", 16]]
    arguments = enumerate(SIGNATURE.values())
    attributes = {(i,): aligned for i, kind in arguments if kind == "i32" or "*" in kind}
    source = ASTSource(encode_fp4_e2m1_block_2d_16_ue4m3_prescale_bf16, SIGNATURE, attrs=attributes)
    target = GPUTarget("cuda", 90, 32)
    print(triton.compile(source, target=target, options=OPTIONS).asm["ptx"])
