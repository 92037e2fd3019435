"""chain_column_amax_h32_bf16: maximum magnitudes of the columns of a chain's outputs [T, K], as fp32 bits, from 0."""

import triton
import triton.language as tl

OPTIONS = {'num_warps': 2, 'num_stages': 3, 'enable_fp_fusion': False}
SIGNATURE = {
    "v0_ptr": "*bf16",
    "v1_ptr": "*bf16",
    "amax0_ptr": "*i32",
    "value0_ptr": "*bf16",
    "T": "i32",
    "K": "i32",
    "v0_stride": "i32",
    "v1_stride": "i32",
}


@triton.jit
def chain_column_amax_h32_bf16(
    v0_ptr,
    v1_ptr,
    amax0_ptr,
    value0_ptr,
    T,
    K,
    v0_stride,
    v1_stride,
):
    k = tl.program_id(0) * 128 + tl.arange(0, 128)
    t_first = tl.program_id(1) * 32
    top0 = tl.zeros((128,), dtype=tl.float32)
    t = t_first
    v0_t_ptr = v0_ptr + t.to(tl.int64) * v0_stride + k
    v1_t_ptr = v1_ptr + t.to(tl.int64) * v1_stride + k
    value0_t_ptr = value0_ptr + t.to(tl.int64) * K + k
    v0_0 = tl.load(v0_t_ptr, mask=(t + 0 < T), other=0.0)
    v1_0 = tl.load(v1_t_ptr, mask=(t + 0 < T), other=0.0)
    v0_1 = tl.load(v0_t_ptr + 1 * v0_stride, mask=(t + 1 < T), other=0.0)
    v1_1 = tl.load(v1_t_ptr + 1 * v1_stride, mask=(t + 1 < T), other=0.0)
    v0_2 = tl.load(v0_t_ptr + 2 * v0_stride, mask=(t + 2 < T), other=0.0)
    v1_2 = tl.load(v1_t_ptr + 2 * v1_stride, mask=(t + 2 < T), other=0.0)
    v0_3 = tl.load(v0_t_ptr + 3 * v0_stride, mask=(t + 3 < T), other=0.0)
    v1_3 = tl.load(v1_t_ptr + 3 * v1_stride, mask=(t + 3 < T), other=0.0)
    v0_4 = tl.load(v0_t_ptr + 4 * v0_stride, mask=(t + 4 < T), other=0.0)
    v1_4 = tl.load(v1_t_ptr + 4 * v1_stride, mask=(t + 4 < T), other=0.0)
    v0_5 = tl.load(v0_t_ptr + 5 * v0_stride, mask=(t + 5 < T), other=0.0)
    v1_5 = tl.load(v1_t_ptr + 5 * v1_stride, mask=(t + 5 < T), other=0.0)
    v0_6 = tl.load(v0_t_ptr + 6 * v0_stride, mask=(t + 6 < T), other=0.0)
    v1_6 = tl.load(v1_t_ptr + 6 * v1_stride, mask=(t + 6 < T), other=0.0)
    v0_7 = tl.load(v0_t_ptr + 7 * v0_stride, mask=(t + 7 < T), other=0.0)
    v1_7 = tl.load(v1_t_ptr + 7 * v1_stride, mask=(t + 7 < T), other=0.0)
    v0_8 = tl.load(v0_t_ptr + 8 * v0_stride, mask=(t + 8 < T), other=0.0)
    v1_8 = tl.load(v1_t_ptr + 8 * v1_stride, mask=(t + 8 < T), other=0.0)
    v0_9 = tl.load(v0_t_ptr + 9 * v0_stride, mask=(t + 9 < T), other=0.0)
    v1_9 = tl.load(v1_t_ptr + 9 * v1_stride, mask=(t + 9 < T), other=0.0)
    v0_10 = tl.load(v0_t_ptr + 10 * v0_stride, mask=(t + 10 < T), other=0.0)
    v1_10 = tl.load(v1_t_ptr + 10 * v1_stride, mask=(t + 10 < T), other=0.0)
    v0_11 = tl.load(v0_t_ptr + 11 * v0_stride, mask=(t + 11 < T), other=0.0)
    v1_11 = tl.load(v1_t_ptr + 11 * v1_stride, mask=(t + 11 < T), other=0.0)
    v0_12 = tl.load(v0_t_ptr + 12 * v0_stride, mask=(t + 12 < T), other=0.0)
    v1_12 = tl.load(v1_t_ptr + 12 * v1_stride, mask=(t + 12 < T), other=0.0)
    v0_13 = tl.load(v0_t_ptr + 13 * v0_stride, mask=(t + 13 < T), other=0.0)
    v1_13 = tl.load(v1_t_ptr + 13 * v1_stride, mask=(t + 13 < T), other=0.0)
    v0_14 = tl.load(v0_t_ptr + 14 * v0_stride, mask=(t + 14 < T), other=0.0)
    v1_14 = tl.load(v1_t_ptr + 14 * v1_stride, mask=(t + 14 < T), other=0.0)
    v0_15 = tl.load(v0_t_ptr + 15 * v0_stride, mask=(t + 15 < T), other=0.0)
    v1_15 = tl.load(v1_t_ptr + 15 * v1_stride, mask=(t + 15 < T), other=0.0)
    v0_16 = tl.load(v0_t_ptr + 16 * v0_stride, mask=(t + 16 < T), other=0.0)
    v1_16 = tl.load(v1_t_ptr + 16 * v1_stride, mask=(t + 16 < T), other=0.0)
    v0_17 = tl.load(v0_t_ptr + 17 * v0_stride, mask=(t + 17 < T), other=0.0)
    v1_17 = tl.load(v1_t_ptr + 17 * v1_stride, mask=(t + 17 < T), other=0.0)
    v0_18 = tl.load(v0_t_ptr + 18 * v0_stride, mask=(t + 18 < T), other=0.0)
    v1_18 = tl.load(v1_t_ptr + 18 * v1_stride, mask=(t + 18 < T), other=0.0)
    v0_19 = tl.load(v0_t_ptr + 19 * v0_stride, mask=(t + 19 < T), other=0.0)
    v1_19 = tl.load(v1_t_ptr + 19 * v1_stride, mask=(t + 19 < T), other=0.0)
    v0_20 = tl.load(v0_t_ptr + 20 * v0_stride, mask=(t + 20 < T), other=0.0)
    v1_20 = tl.load(v1_t_ptr + 20 * v1_stride, mask=(t + 20 < T), other=0.0)
    v0_21 = tl.load(v0_t_ptr + 21 * v0_stride, mask=(t + 21 < T), other=0.0)
    v1_21 = tl.load(v1_t_ptr + 21 * v1_stride, mask=(t + 21 < T), other=0.0)
    v0_22 = tl.load(v0_t_ptr + 22 * v0_stride, mask=(t + 22 < T), other=0.0)
    v1_22 = tl.load(v1_t_ptr + 22 * v1_stride, mask=(t + 22 < T), other=0.0)
    v0_23 = tl.load(v0_t_ptr + 23 * v0_stride, mask=(t + 23 < T), other=0.0)
    v1_23 = tl.load(v1_t_ptr + 23 * v1_stride, mask=(t + 23 < T), other=0.0)
    v0_24 = tl.load(v0_t_ptr + 24 * v0_stride, mask=(t + 24 < T), other=0.0)
    v1_24 = tl.load(v1_t_ptr + 24 * v1_stride, mask=(t + 24 < T), other=0.0)
    v0_25 = tl.load(v0_t_ptr + 25 * v0_stride, mask=(t + 25 < T), other=0.0)
    v1_25 = tl.load(v1_t_ptr + 25 * v1_stride, mask=(t + 25 < T), other=0.0)
    v0_26 = tl.load(v0_t_ptr + 26 * v0_stride, mask=(t + 26 < T), other=0.0)
    v1_26 = tl.load(v1_t_ptr + 26 * v1_stride, mask=(t + 26 < T), other=0.0)
    v0_27 = tl.load(v0_t_ptr + 27 * v0_stride, mask=(t + 27 < T), other=0.0)
    v1_27 = tl.load(v1_t_ptr + 27 * v1_stride, mask=(t + 27 < T), other=0.0)
    v0_28 = tl.load(v0_t_ptr + 28 * v0_stride, mask=(t + 28 < T), other=0.0)
    v1_28 = tl.load(v1_t_ptr + 28 * v1_stride, mask=(t + 28 < T), other=0.0)
    v0_29 = tl.load(v0_t_ptr + 29 * v0_stride, mask=(t + 29 < T), other=0.0)
    v1_29 = tl.load(v1_t_ptr + 29 * v1_stride, mask=(t + 29 < T), other=0.0)
    v0_30 = tl.load(v0_t_ptr + 30 * v0_stride, mask=(t + 30 < T), other=0.0)
    v1_30 = tl.load(v1_t_ptr + 30 * v1_stride, mask=(t + 30 < T), other=0.0)
    v0_31 = tl.load(v0_t_ptr + 31 * v0_stride, mask=(t + 31 < T), other=0.0)
    v1_31 = tl.load(v1_t_ptr + 31 * v1_stride, mask=(t + 31 < T), other=0.0)
    v0 = v0_0.to(tl.float32)
    v1 = v1_0.to(tl.float32)
    v2 = v0 + v1
    x0_0 = v2.to(tl.bfloat16)
    v0 = v0_1.to(tl.float32)
    v1 = v1_1.to(tl.float32)
    v2 = v0 + v1
    x0_1 = v2.to(tl.bfloat16)
    v0 = v0_2.to(tl.float32)
    v1 = v1_2.to(tl.float32)
    v2 = v0 + v1
    x0_2 = v2.to(tl.bfloat16)
    v0 = v0_3.to(tl.float32)
    v1 = v1_3.to(tl.float32)
    v2 = v0 + v1
    x0_3 = v2.to(tl.bfloat16)
    v0 = v0_4.to(tl.float32)
    v1 = v1_4.to(tl.float32)
    v2 = v0 + v1
    x0_4 = v2.to(tl.bfloat16)
    v0 = v0_5.to(tl.float32)
    v1 = v1_5.to(tl.float32)
    v2 = v0 + v1
    x0_5 = v2.to(tl.bfloat16)
    v0 = v0_6.to(tl.float32)
    v1 = v1_6.to(tl.float32)
    v2 = v0 + v1
    x0_6 = v2.to(tl.bfloat16)
    v0 = v0_7.to(tl.float32)
    v1 = v1_7.to(tl.float32)
    v2 = v0 + v1
    x0_7 = v2.to(tl.bfloat16)
    v0 = v0_8.to(tl.float32)
    v1 = v1_8.to(tl.float32)
    v2 = v0 + v1
    x0_8 = v2.to(tl.bfloat16)
    v0 = v0_9.to(tl.float32)
    v1 = v1_9.to(tl.float32)
    v2 = v0 + v1
    x0_9 = v2.to(tl.bfloat16)
    v0 = v0_10.to(tl.float32)
    v1 = v1_10.to(tl.float32)
    v2 = v0 + v1
    x0_10 = v2.to(tl.bfloat16)
    v0 = v0_11.to(tl.float32)
    v1 = v1_11.to(tl.float32)
    v2 = v0 + v1
    x0_11 = v2.to(tl.bfloat16)
    v0 = v0_12.to(tl.float32)
    v1 = v1_12.to(tl.float32)
    v2 = v0 + v1
    x0_12 = v2.to(tl.bfloat16)
    v0 = v0_13.to(tl.float32)
    v1 = v1_13.to(tl.float32)
    v2 = v0 + v1
    x0_13 = v2.to(tl.bfloat16)
    v0 = v0_14.to(tl.float32)
    v1 = v1_14.to(tl.float32)
    v2 = v0 + v1
    x0_14 = v2.to(tl.bfloat16)
    v0 = v0_15.to(tl.float32)
    v1 = v1_15.to(tl.float32)
    v2 = v0 + v1
    x0_15 = v2.to(tl.bfloat16)
    v0 = v0_16.to(tl.float32)
    v1 = v1_16.to(tl.float32)
    v2 = v0 + v1
    x0_16 = v2.to(tl.bfloat16)
    v0 = v0_17.to(tl.float32)
    v1 = v1_17.to(tl.float32)
    v2 = v0 + v1
    x0_17 = v2.to(tl.bfloat16)
    v0 = v0_18.to(tl.float32)
    v1 = v1_18.to(tl.float32)
    v2 = v0 + v1
    x0_18 = v2.to(tl.bfloat16)
    v0 = v0_19.to(tl.float32)
    v1 = v1_19.to(tl.float32)
    v2 = v0 + v1
    x0_19 = v2.to(tl.bfloat16)
    v0 = v0_20.to(tl.float32)
    v1 = v1_20.to(tl.float32)
    v2 = v0 + v1
    x0_20 = v2.to(tl.bfloat16)
    v0 = v0_21.to(tl.float32)
    v1 = v1_21.to(tl.float32)
    v2 = v0 + v1
    x0_21 = v2.to(tl.bfloat16)
    v0 = v0_22.to(tl.float32)
    v1 = v1_22.to(tl.float32)
    v2 = v0 + v1
    x0_22 = v2.to(tl.bfloat16)
    v0 = v0_23.to(tl.float32)
    v1 = v1_23.to(tl.float32)
    v2 = v0 + v1
    x0_23 = v2.to(tl.bfloat16)
    v0 = v0_24.to(tl.float32)
    v1 = v1_24.to(tl.float32)
    v2 = v0 + v1
    x0_24 = v2.to(tl.bfloat16)
    v0 = v0_25.to(tl.float32)
    v1 = v1_25.to(tl.float32)
    v2 = v0 + v1
    x0_25 = v2.to(tl.bfloat16)
    v0 = v0_26.to(tl.float32)
    v1 = v1_26.to(tl.float32)
    v2 = v0 + v1
    x0_26 = v2.to(tl.bfloat16)
    v0 = v0_27.to(tl.float32)
    v1 = v1_27.to(tl.float32)
    v2 = v0 + v1
    x0_27 = v2.to(tl.bfloat16)
    v0 = v0_28.to(tl.float32)
    v1 = v1_28.to(tl.float32)
    v2 = v0 + v1
    x0_28 = v2.to(tl.bfloat16)
    v0 = v0_29.to(tl.float32)
    v1 = v1_29.to(tl.float32)
    v2 = v0 + v1
    x0_29 = v2.to(tl.bfloat16)
    v0 = v0_30.to(tl.float32)
    v1 = v1_30.to(tl.float32)
    v2 = v0 + v1
    x0_30 = v2.to(tl.bfloat16)
    v0 = v0_31.to(tl.float32)
    v1 = v1_31.to(tl.float32)
    v2 = v0 + v1
    x0_31 = v2.to(tl.bfloat16)
    tl.store(value0_t_ptr, x0_0, mask=(t + 0 < T))
    tl.store(value0_t_ptr + 1 * K, x0_1, mask=(t + 1 < T))
    tl.store(value0_t_ptr + 2 * K, x0_2, mask=(t + 2 < T))
    tl.store(value0_t_ptr + 3 * K, x0_3, mask=(t + 3 < T))
    tl.store(value0_t_ptr + 4 * K, x0_4, mask=(t + 4 < T))
    tl.store(value0_t_ptr + 5 * K, x0_5, mask=(t + 5 < T))
    tl.store(value0_t_ptr + 6 * K, x0_6, mask=(t + 6 < T))
    tl.store(value0_t_ptr + 7 * K, x0_7, mask=(t + 7 < T))
    tl.store(value0_t_ptr + 8 * K, x0_8, mask=(t + 8 < T))
    tl.store(value0_t_ptr + 9 * K, x0_9, mask=(t + 9 < T))
    tl.store(value0_t_ptr + 10 * K, x0_10, mask=(t + 10 < T))
    tl.store(value0_t_ptr + 11 * K, x0_11, mask=(t + 11 < T))
    tl.store(value0_t_ptr + 12 * K, x0_12, mask=(t + 12 < T))
    tl.store(value0_t_ptr + 13 * K, x0_13, mask=(t + 13 < T))
    tl.store(value0_t_ptr + 14 * K, x0_14, mask=(t + 14 < T))
    tl.store(value0_t_ptr + 15 * K, x0_15, mask=(t + 15 < T))
    tl.store(value0_t_ptr + 16 * K, x0_16, mask=(t + 16 < T))
    tl.store(value0_t_ptr + 17 * K, x0_17, mask=(t + 17 < T))
    tl.store(value0_t_ptr + 18 * K, x0_18, mask=(t + 18 < T))
    tl.store(value0_t_ptr + 19 * K, x0_19, mask=(t + 19 < T))
    tl.store(value0_t_ptr + 20 * K, x0_20, mask=(t + 20 < T))
    tl.store(value0_t_ptr + 21 * K, x0_21, mask=(t + 21 < T))
    tl.store(value0_t_ptr + 22 * K, x0_22, mask=(t + 22 < T))
    tl.store(value0_t_ptr + 23 * K, x0_23, mask=(t + 23 < T))
    tl.store(value0_t_ptr + 24 * K, x0_24, mask=(t + 24 < T))
    tl.store(value0_t_ptr + 25 * K, x0_25, mask=(t + 25 < T))
    tl.store(value0_t_ptr + 26 * K, x0_26, mask=(t + 26 < T))
    tl.store(value0_t_ptr + 27 * K, x0_27, mask=(t + 27 < T))
    tl.store(value0_t_ptr + 28 * K, x0_28, mask=(t + 28 < T))
    tl.store(value0_t_ptr + 29 * K, x0_29, mask=(t + 29 < T))
    tl.store(value0_t_ptr + 30 * K, x0_30, mask=(t + 30 < T))
    tl.store(value0_t_ptr + 31 * K, x0_31, mask=(t + 31 < T))
    y0_0 = x0_0.to(tl.float32)
    y0_1 = x0_1.to(tl.float32)
    y0_2 = x0_2.to(tl.float32)
    y0_3 = x0_3.to(tl.float32)
    y0_4 = x0_4.to(tl.float32)
    y0_5 = x0_5.to(tl.float32)
    y0_6 = x0_6.to(tl.float32)
    y0_7 = x0_7.to(tl.float32)
    y0_8 = x0_8.to(tl.float32)
    y0_9 = x0_9.to(tl.float32)
    y0_10 = x0_10.to(tl.float32)
    y0_11 = x0_11.to(tl.float32)
    y0_12 = x0_12.to(tl.float32)
    y0_13 = x0_13.to(tl.float32)
    y0_14 = x0_14.to(tl.float32)
    y0_15 = x0_15.to(tl.float32)
    y0_16 = x0_16.to(tl.float32)
    y0_17 = x0_17.to(tl.float32)
    y0_18 = x0_18.to(tl.float32)
    y0_19 = x0_19.to(tl.float32)
    y0_20 = x0_20.to(tl.float32)
    y0_21 = x0_21.to(tl.float32)
    y0_22 = x0_22.to(tl.float32)
    y0_23 = x0_23.to(tl.float32)
    y0_24 = x0_24.to(tl.float32)
    y0_25 = x0_25.to(tl.float32)
    y0_26 = x0_26.to(tl.float32)
    y0_27 = x0_27.to(tl.float32)
    y0_28 = x0_28.to(tl.float32)
    y0_29 = x0_29.to(tl.float32)
    y0_30 = x0_30.to(tl.float32)
    y0_31 = x0_31.to(tl.float32)
    y0_0, y0_1 = y0_0 + y0_1, y0_0 - y0_1
    y0_2, y0_3 = y0_2 + y0_3, y0_2 - y0_3
    y0_4, y0_5 = y0_4 + y0_5, y0_4 - y0_5
    y0_6, y0_7 = y0_6 + y0_7, y0_6 - y0_7
    y0_8, y0_9 = y0_8 + y0_9, y0_8 - y0_9
    y0_10, y0_11 = y0_10 + y0_11, y0_10 - y0_11
    y0_12, y0_13 = y0_12 + y0_13, y0_12 - y0_13
    y0_14, y0_15 = y0_14 + y0_15, y0_14 - y0_15
    y0_16, y0_17 = y0_16 + y0_17, y0_16 - y0_17
    y0_18, y0_19 = y0_18 + y0_19, y0_18 - y0_19
    y0_20, y0_21 = y0_20 + y0_21, y0_20 - y0_21
    y0_22, y0_23 = y0_22 + y0_23, y0_22 - y0_23
    y0_24, y0_25 = y0_24 + y0_25, y0_24 - y0_25
    y0_26, y0_27 = y0_26 + y0_27, y0_26 - y0_27
    y0_28, y0_29 = y0_28 + y0_29, y0_28 - y0_29
    y0_30, y0_31 = y0_30 + y0_31, y0_30 - y0_31
    y0_0, y0_2 = y0_0 + y0_2, y0_0 - y0_2
    y0_1, y0_3 = y0_1 + y0_3, y0_1 - y0_3
    y0_4, y0_6 = y0_4 + y0_6, y0_4 - y0_6
    y0_5, y0_7 = y0_5 + y0_7, y0_5 - y0_7
    y0_8, y0_10 = y0_8 + y0_10, y0_8 - y0_10
    y0_9, y0_11 = y0_9 + y0_11, y0_9 - y0_11
    y0_12, y0_14 = y0_12 + y0_14, y0_12 - y0_14
    y0_13, y0_15 = y0_13 + y0_15, y0_13 - y0_15
    y0_16, y0_18 = y0_16 + y0_18, y0_16 - y0_18
    y0_17, y0_19 = y0_17 + y0_19, y0_17 - y0_19
    y0_20, y0_22 = y0_20 + y0_22, y0_20 - y0_22
    y0_21, y0_23 = y0_21 + y0_23, y0_21 - y0_23
    y0_24, y0_26 = y0_24 + y0_26, y0_24 - y0_26
    y0_25, y0_27 = y0_25 + y0_27, y0_25 - y0_27
    y0_28, y0_30 = y0_28 + y0_30, y0_28 - y0_30
    y0_29, y0_31 = y0_29 + y0_31, y0_29 - y0_31
    y0_0, y0_4 = y0_0 + y0_4, y0_0 - y0_4
    y0_1, y0_5 = y0_1 + y0_5, y0_1 - y0_5
    y0_2, y0_6 = y0_2 + y0_6, y0_2 - y0_6
    y0_3, y0_7 = y0_3 + y0_7, y0_3 - y0_7
    y0_8, y0_12 = y0_8 + y0_12, y0_8 - y0_12
    y0_9, y0_13 = y0_9 + y0_13, y0_9 - y0_13
    y0_10, y0_14 = y0_10 + y0_14, y0_10 - y0_14
    y0_11, y0_15 = y0_11 + y0_15, y0_11 - y0_15
    y0_16, y0_20 = y0_16 + y0_20, y0_16 - y0_20
    y0_17, y0_21 = y0_17 + y0_21, y0_17 - y0_21
    y0_18, y0_22 = y0_18 + y0_22, y0_18 - y0_22
    y0_19, y0_23 = y0_19 + y0_23, y0_19 - y0_23
    y0_24, y0_28 = y0_24 + y0_28, y0_24 - y0_28
    y0_25, y0_29 = y0_25 + y0_29, y0_25 - y0_29
    y0_26, y0_30 = y0_26 + y0_30, y0_26 - y0_30
    y0_27, y0_31 = y0_27 + y0_31, y0_27 - y0_31
    y0_0, y0_8 = y0_0 + y0_8, y0_0 - y0_8
    y0_1, y0_9 = y0_1 + y0_9, y0_1 - y0_9
    y0_2, y0_10 = y0_2 + y0_10, y0_2 - y0_10
    y0_3, y0_11 = y0_3 + y0_11, y0_3 - y0_11
    y0_4, y0_12 = y0_4 + y0_12, y0_4 - y0_12
    y0_5, y0_13 = y0_5 + y0_13, y0_5 - y0_13
    y0_6, y0_14 = y0_6 + y0_14, y0_6 - y0_14
    y0_7, y0_15 = y0_7 + y0_15, y0_7 - y0_15
    y0_16, y0_24 = y0_16 + y0_24, y0_16 - y0_24
    y0_17, y0_25 = y0_17 + y0_25, y0_17 - y0_25
    y0_18, y0_26 = y0_18 + y0_26, y0_18 - y0_26
    y0_19, y0_27 = y0_19 + y0_27, y0_19 - y0_27
    y0_20, y0_28 = y0_20 + y0_28, y0_20 - y0_28
    y0_21, y0_29 = y0_21 + y0_29, y0_21 - y0_29
    y0_22, y0_30 = y0_22 + y0_30, y0_22 - y0_30
    y0_23, y0_31 = y0_23 + y0_31, y0_23 - y0_31
    m0 = tl.abs(y0_0) + tl.abs(y0_16)
    m1 = tl.abs(y0_1) + tl.abs(y0_17)
    m2 = tl.abs(y0_2) + tl.abs(y0_18)
    m3 = tl.abs(y0_3) + tl.abs(y0_19)
    m4 = tl.abs(y0_4) + tl.abs(y0_20)
    m5 = tl.abs(y0_5) + tl.abs(y0_21)
    m6 = tl.abs(y0_6) + tl.abs(y0_22)
    m7 = tl.abs(y0_7) + tl.abs(y0_23)
    m8 = tl.abs(y0_8) + tl.abs(y0_24)
    m9 = tl.abs(y0_9) + tl.abs(y0_25)
    m10 = tl.abs(y0_10) + tl.abs(y0_26)
    m11 = tl.abs(y0_11) + tl.abs(y0_27)
    m12 = tl.abs(y0_12) + tl.abs(y0_28)
    m13 = tl.abs(y0_13) + tl.abs(y0_29)
    m14 = tl.abs(y0_14) + tl.abs(y0_30)
    m15 = tl.abs(y0_15) + tl.abs(y0_31)
    m0 = tl.maximum(m0, m1, propagate_nan=tl.PropagateNan.ALL)
    m2 = tl.maximum(m2, m3, propagate_nan=tl.PropagateNan.ALL)
    m4 = tl.maximum(m4, m5, propagate_nan=tl.PropagateNan.ALL)
    m6 = tl.maximum(m6, m7, propagate_nan=tl.PropagateNan.ALL)
    m8 = tl.maximum(m8, m9, propagate_nan=tl.PropagateNan.ALL)
    m10 = tl.maximum(m10, m11, propagate_nan=tl.PropagateNan.ALL)
    m12 = tl.maximum(m12, m13, propagate_nan=tl.PropagateNan.ALL)
    m14 = tl.maximum(m14, m15, propagate_nan=tl.PropagateNan.ALL)
    m0 = tl.maximum(m0, m2, propagate_nan=tl.PropagateNan.ALL)
    m4 = tl.maximum(m4, m6, propagate_nan=tl.PropagateNan.ALL)
    m8 = tl.maximum(m8, m10, propagate_nan=tl.PropagateNan.ALL)
    m12 = tl.maximum(m12, m14, propagate_nan=tl.PropagateNan.ALL)
    m0 = tl.maximum(m0, m4, propagate_nan=tl.PropagateNan.ALL)
    m8 = tl.maximum(m8, m12, propagate_nan=tl.PropagateNan.ALL)
    m0 = tl.maximum(m0, m8, propagate_nan=tl.PropagateNan.ALL)
    top0 = tl.maximum(top0, m0, propagate_nan=tl.PropagateNan.ALL)
    tl.atomic_max(amax0_ptr + k, top0.to(tl.int32, bitcast=True), sem="relaxed")


if __name__ == "__main__":  # compiles without a GPU and prints the assembly
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = [["tt.divisibility", 16]]
    arguments = enumerate(SIGNATURE.values())
    attributes = {(i,): aligned for i, kind in arguments if kind == "i32" or "*" in kind}
    source = ASTSource(chain_column_amax_h32_bf16, SIGNATURE, attrs=attributes)
    target = GPUTarget("cuda", 90, 32)
    print(triton.compile(source, target=target, options=OPTIONS).asm["ptx"])
