"""encode_fp4_e2m1_block_contracted_32_h64_e8m0_stochastic_three_quarters_bf16: x [C, R] to codes [R, C padded] and scales."""

import triton
import triton.language as tl

OPTIONS = {'num_warps': 4, 'num_stages': 1, 'enable_fp_fusion': False}
SIGNATURE = {
    "x_ptr": "*bf16",
    "matrix_ptr": "*bf16",
    "seed_ptr": "*i64",
    "codes_ptr": "*u8",
    "scale_ptr": "*u8",
    "tensor_scale_ptr": "*fp32",
    "R": "i32",
    "C": "i32",
    "C_padded": "i32",
    "C_transformed": "i32",
    "x_stride": "i32",
    "stream": "i32",
    "signs_stream": "i32",
}


@triton.jit(do_not_specialize=['stream', 'signs_stream'])
def encode_fp4_e2m1_block_contracted_32_h64_e8m0_stochastic_three_quarters_bf16(
    x_ptr,
    matrix_ptr,
    seed_ptr,
    codes_ptr,
    scale_ptr,
    tensor_scale_ptr,
    R,
    C,
    C_padded,
    C_transformed,
    x_stride,
    stream,
    signs_stream,
):
    ROWS: tl.constexpr = 64  # kept indices of a tile
    SPAN: tl.constexpr = 64  # its codes along the contracted dim
    GROUP: tl.constexpr = 32  # codes that are treated together
    GROUPS: tl.constexpr = 128
    program = tl.program_id(0)
    tiles = tl.cdiv(R, ROWS)
    tile_r = program % tiles
    tile_c = program // tiles
    x_row = (tile_r * ROWS + tl.arange(0, ROWS))[:, None]
    x_column = tile_c * 64 + tl.arange(0, 64)[None, :]
    x_ptrs = x_ptr + x_row + x_column.to(tl.int64) * x_stride
    x = tl.load(x_ptrs, mask=(x_row < R) & (x_column < C), other=0.0)
    seed = tl.load(seed_ptr)
    index = tl.arange(0, 64) % 64
    word0, word1, word2, word3 = tl.philox(seed, 0, 0, signs_stream, 1)
    words = word0
    words = tl.where(index < 32, words, word1)
    negative = (words >> (index % 32).to(tl.uint32)) & 1
    sign_bits = (negative << 15).to(tl.int16)[None, :]
    x = (x.to(tl.int16, bitcast=True) ^ sign_bits).to(tl.bfloat16, bitcast=True)
    i = tl.arange(0, 64)
    matrix = tl.load(matrix_ptr + i[:, None] * 64 + i[None, :])  # [64, 64]
    y = tl.dot(x, matrix)  # [64, 64] fp32, not normalized
    y = tl.reshape(y, (64, 8, 4, 2))
    y = tl.reshape(tl.permute(y, (0, 2, 1, 3)), (64, 64))
    y = y * 0.125
    y = tl.reshape(y, (GROUPS, GROUP))
    group = tl.arange(0, GROUPS)
    row = tile_r * ROWS + group // 2
    column = tile_c * SPAN + group % 2 * GROUP  # the first of the group
    magnitude = y.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.max(magnitude, axis=1)
    finite = bits < 0x7F800000
    amax = tl.maximum(bits.to(tl.float32, bitcast=True), 7.888609052210118e-31)
    scale = tl.minimum(amax * 0.25, 1.7014118346046923e+38).to(tl.int32, bitcast=True)
    scale_code = scale >> 23  # as fp32 biases it
    scale = tl.maximum(scale_code << 23, 0x400000).to(tl.float32, bitcast=True)
    inverse = tl.div_rn(1.0, scale)
    scale_code = tl.where(bits == 0, 127, tl.where(finite, scale_code, 255)).to(tl.uint8)
    inverse = tl.where(bits == 0, 1.0, inverse)
    if program == 0:
        tl.store(tensor_scale_ptr, 1.0 * 1.3333333730697632)
    scale_ptrs = scale_ptr + row.to(tl.int64) * (C_padded // GROUP) + column // GROUP
    tl.store(scale_ptrs, scale_code, mask=(row < R) & (column < C_padded))
    y = y * 0.75
    value = y * inverse[:, None]
    place = (column // 4)[:, None] + tl.arange(0, GROUP // 4)[None, :]
    place = row.to(tl.int64)[:, None] * (C_padded // 4) + place
    low = (place & 0xFFFFFFFF).to(tl.uint32)
    high = (place >> 32).to(tl.uint32)
    # were the kind no tensor, triton (3.6, 3.7) would move words through shared memory
    word0, word1, word2, word3 = tl.philox(seed, low, high, stream, low * 0 + 0)
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))  # the last dims: 2, 2
    words = tl.reshape(words, (GROUPS, GROUP))
    uniform = (words >> 8).to(tl.int32).to(tl.float32) * 5.960464477539063e-08
    magnitude = tl.minimum(tl.abs(value), 6.0)
    exponent = tl.maximum(magnitude.to(tl.int32, bitcast=True) >> 23, 127)
    quotient = magnitude * ((255 - exponent) << 23).to(tl.float32, bitcast=True)
    steps = quotient.to(tl.int32)
    steps += (uniform < quotient - steps.to(tl.float32)).to(tl.int32)
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
    source = ASTSource(encode_fp4_e2m1_block_contracted_32_h64_e8m0_stochastic_three_quarters_bf16, SIGNATURE, attrs=attributes)
    target = GPUTarget("cuda", 90, 32)
    print(triton.compile(source, target=target, options=OPTIONS).asm["ptx"])
