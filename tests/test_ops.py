"""The operators: what their fakes promise is what they return, and torch accepts how they are
registered."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import FLOATS, matrices, traced
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from hadagraph import ops
from hadagraph.formats import PER_KEPT_INDEX, PER_TENSOR, PLAIN_FORMATS, Encoding
from hadagraph.observation import Key, Observer
from hadagraph.rotation import Fixed, Rotation, padded_size

ROTATIONS = ("h2", "h16", "h64:fixed(3)")
ENCODINGS = [
    str(Encoding(name, granularity, rotation))
    for name in PLAIN_FORMATS
    for granularity in (PER_TENSOR, PER_KEPT_INDEX)
    for rotation in (None, Rotation(16, Fixed(2)))
]
# Every format, granularity, scale format, fit, and what draws.
GENERAL = (
    "int8/per_tensor/stochastic",
    "int4/per_kept_index/h16",
    "int4/per_tensor/mse",
    "int8/per_tensor/keep8of16",
    "int4/per_tensor/keep3of8",
    "fp6_e3m2/block_2d(16)/e8m0",
    "fp6_e2m3/block_contracted(32)/ue5m3",
    "fp8_e4m3/block_contracted(128)",
    "fp8_e5m2/block_2d(32)/e8m0/ceil",
    "fp4_e2m1/block_contracted(32)/h32:per_step(a)/e8m0/stochastic/three_quarters",
    "fp4_e2m1/block_contracted(16)/ue4m3/four_six/prescale",
    "fp4_e2m1/block_2d(16)/h16:fixed(3)/ue4m3/prescale",
)
SEED = torch.tensor([3])
OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def described(value):
    """Shape, dtype, device, and the strides that address anything."""
    return [(tuple(t.shape), t.dtype, t.device, strides_used(t)) for t in tree_leaves(value)]


def strides_used(t):
    pairs = zip(t.shape, t.stride(), strict=True)
    return [step for size, step in pairs if size > 1] if t.numel() else []


def assert_fake_agrees(op, *args):
    real = op(*args)
    with FakeTensorMode() as mode:
        fakes = tree_map(lambda a: mode.from_tensor(a) if torch.is_tensor(a) else a, args)
        fake, directly = op(*fakes), ops.FAKE_OF[op](*fakes)
    assert described(fake) == described(directly) == described(real)
    assert {type(t) for t in tree_leaves(directly)} == {FakeTensor}
    return real


@given(matrices((*FLOATS, torch.float64)), st.integers(0, 1), st.sampled_from(ROTATIONS))
def test_rotations(x, dim, rotation):
    turned = assert_fake_agrees(ops.rotate, x, dim, rotation)
    back = assert_fake_agrees(ops.unrotate, turned, dim, rotation, x.shape[dim])
    assert back.shape == x.shape


@given(st.integers(-3, 2), st.sampled_from(ROTATIONS))
def test_rotations_of_three_dims(dim, rotation):
    x = torch.randn(3, 5, 17).transpose(0, 1)
    turned = assert_fake_agrees(ops.rotate, x, dim, rotation)
    back = assert_fake_agrees(ops.unrotate, turned, dim, rotation, x.shape[dim])
    torch.testing.assert_close(back, x, rtol=0, atol=1e-5)  # two fp32 sums of 64


@given(matrices(), st.booleans())
def test_gemm(x, with_bias):
    rhs = torch.ones(3, x.shape[1], dtype=x.dtype)
    assert_fake_agrees(ops.gemm, x, rhs, rhs.new_ones(3) if with_bias else None)


@given(matrices(), st.sampled_from(ENCODINGS), st.sampled_from(ENCODINGS))
def test_quantizers(x, rows, columns):
    row = assert_fake_agrees(ops.quantize_rows, x, rows)
    column = assert_fake_agrees(ops.quantize_columns, x, columns)
    both = assert_fake_agrees(ops.quantize_both, x, rows, columns)
    for got, expected in zip(both, (*row, *column), strict=True):
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


@given(
    matrices(),
    st.sampled_from(["", *ENCODINGS]),
    st.sampled_from(["", *ENCODINGS]),
    st.booleans(),
)
def test_quantize_chain(x, rows, columns, kept):
    dtype = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[x.dtype]
    chain = f"in {dtype} matrix; in fp32 rows; mul %0 %1; out %2 bf16; out %0 {dtype}"
    by_row = torch.rand(x.shape[0])
    lists = ([rows, columns], [columns, rows], [kept, not kept])
    got = assert_fake_agrees(ops.quantize_chain, [x, by_row], chain, *lists)
    expected = []
    values = ((x.float() * by_row[:, None]).bfloat16(), x)
    for value, by_rows, by_columns, keep in zip(values, *lists, strict=True):
        expected += ops.quantize_rows(value, by_rows) if by_rows else ()
        expected += ops.quantize_columns(value, by_columns) if by_columns else ()
        expected += [value] if keep else []
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine.float(), theirs.float())


@given(
    matrices(),
    st.sampled_from(ENCODINGS),
    st.sampled_from(OUT_DTYPES),
    st.booleans(),
    st.booleans(),
)
def test_scaled_mm(x, encoding, out_dtype, with_bias, measured):
    a, a_scale = ops.quantize_rows(x, encoding)
    other = torch.ones(5, x.shape[1])
    b, b_scale = ops.quantize_rows(other, encoding)
    bias = torch.ones(5, dtype=out_dtype) if with_bias else None
    args = (a, b, a_scale, b_scale, bias, out_dtype)
    out = assert_fake_agrees(ops.scaled_mm, *args)
    if measured:
        got = assert_fake_agrees(ops.scaled_mm_measured, x, other.to(x), *args, "site")
        assert torch.equal(got, out)
        assert ops.MEASURED.pop("site") is not None


@given(matrices((*FLOATS, torch.float64)), st.integers(0, 1), st.sampled_from(((8, 16), (1, 2))))
def test_projections(x, dim, kept):
    small = assert_fake_agrees(ops.project, x, dim, *kept)
    back = assert_fake_agrees(ops.unproject, small, dim, *kept, x.shape[dim])
    assert back.shape == x.shape


@given(matrices((torch.float32, torch.float64)), st.integers(0, 1))
def test_rotations_by_signs_of_the_step(x, dim):
    turned = assert_fake_agrees(ops.rotate, x, dim, "h16:per_step(a)", SEED)
    back = assert_fake_agrees(ops.unrotate, turned, dim, "h16:per_step(a)", x.shape[dim], SEED)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-3)  # two fp32 sums of 16 up to 256


def test_next_seed():
    seeds = [assert_fake_agrees(ops.next_seed, torch.device("cpu")) for _ in range(3)]
    assert len({int(seed) for seed in seeds}) == 3


@given(
    matrices(),
    st.sampled_from((*GENERAL, *ENCODINGS)),
    st.integers(0, 1),
    st.sampled_from(OUT_DTYPES),
)
def test_encode_and_decode(x, encoding, dim, dtype):
    encoded = assert_fake_agrees(ops.encode, x, SEED, encoding, dim, 5)
    size = Encoding.parse(encoding).transformed_size(x.shape[dim])
    assert_fake_agrees(ops.decode, *encoded, encoding, dim, size, dtype)
    mask = assert_fake_agrees(ops.clip_mask, x, SEED, encoding, dim)
    assert mask.shape[dim] == size


@given(
    matrices(),
    st.sampled_from((*GENERAL, *ENCODINGS)),
    st.sampled_from(GENERAL),
    st.sampled_from(OUT_DTYPES),
    st.booleans(),
)
def test_encoded_mm(x, left, right, out_dtype, with_bias):
    a = ops.encode(x, SEED, left, 1, 0)
    b = ops.encode(torch.ones(5, x.shape[1]), SEED, right, 1, 0)
    bias = torch.ones(5, dtype=out_dtype) if with_bias else None
    assert_fake_agrees(ops.encoded_mm, *a, *b, bias, left, right, out_dtype)


@pytest.mark.parametrize("encoding", ENCODINGS[::5])
def test_encode_is_the_plain_quantizer_too(encoding):
    x = torch.randn(20, 48)
    codes, scale, tensor_scale = ops.encode(x, None, encoding, 1, 0)
    plain_codes, plain_scale = ops.quantize_rows(x, encoding)
    # One rotates unnormalized and scales after, the other before.
    torch.testing.assert_close(scale, plain_scale, rtol=1e-6, atol=0)
    differing = codes.view(torch.uint8) != plain_codes.view(torch.uint8)
    assert differing.float().mean() < 1e-2
    assert tensor_scale.tolist() == [1.0]


def test_measured_sqnr_is_that_of_the_codes():
    x, w = torch.randn(16, 64), torch.randn(32, 64)
    encoding = str(Encoding("int8", PER_KEPT_INDEX))
    a, a_scale = ops.quantize_rows(x, encoding)
    b, b_scale = ops.quantize_rows(w, encoding)
    ops.scaled_mm_measured(x, w, a, b, a_scale, b_scale, torch.ones(32), torch.bfloat16, "site")
    exact = x.double() @ w.double().t()
    approximate = (a.double() * a_scale[:, None]) @ (b.double() * b_scale[:, None]).t()
    noise = (approximate - exact).square().sum()
    expected = 10 * torch.log10(exact.square().sum() / noise)
    # scaled_mm rounds to fp32: 1e-7 beside a quantization error of 1e-2.
    assert ops.MEASURED.pop("site") == pytest.approx(float(expected), abs=1e-2)


@pytest.mark.parametrize("tokens", [1, 16, 21])
def test_fakes_keep_symbols(tokens):
    def everything(x, w):
        turned = ops.unrotate(ops.rotate(x, 0, "h16"), 0, "h16", x.shape[0])
        rows, row_scale, columns, column_scale = ops.quantize_both(
            turned, "int8/per_kept_index/h16", "int8/per_tensor/h64"
        )
        weight, weight_scale = ops.quantize_rows(w, "int8/per_kept_index/h16")
        product = ops.scaled_mm(rows, weight, row_scale, weight_scale, None, torch.float32)
        return ops.gemm(product, product, None), columns, column_scale

    gm = traced(everything, torch.randn(40, 48), torch.randn(24, 48), mode="symbolic")
    found = {n.target: n.meta["val"] for n in gm.graph.nodes if n.op == "call_function"}
    symbol = found[ops.quantize_both][0].shape[0]
    assert isinstance(symbol, torch.SymInt)
    assert found[ops.scaled_mm].shape[0] is symbol or str(found[ops.scaled_mm].shape[0]) == str(
        symbol
    )
    x = torch.randn(tokens, 48)
    out, columns, _ = gm(x, torch.randn(24, 48))
    assert out.shape == (tokens, tokens)
    assert columns.shape == (48, padded_size(tokens, 64))


def test_contractions_that_differ_are_refused_when_traced():
    with FakeTensorMode(), pytest.raises(RuntimeError, match="gemm: contracted dims differ"):
        ops.gemm(torch.empty(2, 16), torch.empty(3, 17), None)
    with FakeTensorMode():
        a, b = (torch.empty(2, n, dtype=torch.int8) for n in (16, 32))
        scale = torch.empty(2)
        with pytest.raises(RuntimeError, match="scaled_mm: contracted dims differ"):
            ops.scaled_mm(a, b, scale, scale, None, torch.float32)


def _samples():
    x, w, bias = torch.randn(17, 20), torch.randn(5, 20), torch.randn(5)
    encoding = "int8/per_kept_index/h16"
    a, a_scale = ops.quantize_rows(x, encoding)
    b, b_scale = ops.quantize_rows(w, encoding)
    chain = (
        "in fp32 matrix; in fp32 rows; in fp32 columns; in fp32 scalar; "
        "mul %0 %1; add %4 %2; mul %5 %3; exp %0; out %6 bf16; out %7 fp32"
    )
    product = (a, b, a_scale, b_scale, bias, torch.bfloat16)
    observer = Observer()
    seen = observer.announce(Key("linear", "output", "input", "weight"))
    left, right = ops.encode(x, SEED, GENERAL[9], 1, 3), ops.encode(w, None, GENERAL[10], 1, 0)
    return {
        ops.gemm: (x, w, bias),
        ops.rotate: (x.t(), 0, "h16"),
        ops.unrotate: (torch.randn(3, 32), 1, "h16", 20),
        ops.quantize_rows: (x, encoding),
        ops.quantize_columns: (x, "fp8_e4m3/per_tensor"),
        ops.quantize_both: (x.t(), encoding, encoding),
        ops.quantize_chain: (
            [x, x[:, 0], w[0], bias[0]],
            chain,
            [encoding, ""],
            ["fp8_e4m3/per_tensor", encoding],
            [True, False],
        ),
        ops.scaled_mm: product,
        ops.scaled_mm_measured: (x, w, *product, "site"),
        ops.gemm_observed: (x, w, bias, observer.number, seen),
        ops.project: (x, 0, 8, 16),
        ops.unproject: (torch.randn(3, 16), 1, 8, 16, 20),
        ops.next_seed: (torch.device("cpu"),),
        ops.encode: (x, SEED, GENERAL[9], 1, 3),
        ops.decode: (*left, GENERAL[9], 1, 20, torch.bfloat16),
        ops.encoded_mm: (*left, *right, bias, GENERAL[9], GENERAL[10], torch.bfloat16),
        ops.clip_mask: (x, SEED, GENERAL[9], 0),
        ops.measured: (x @ w.t(), x, w, None, "", "", "site"),
    }


def test_every_operator_is_sampled():
    assert {op._opname for op in _samples()} == set(ops.SCHEMAS)


@pytest.mark.parametrize("name", sorted(ops.SCHEMAS))
def test_opcheck(name):
    op, args = next((op, args) for op, args in _samples().items() if op._opname == name)
    # Another seed at each call is what a comparison of two calls finds.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    utils = tests if name == "next_seed" else (*tests, "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, args, test_utils=utils)
    ops.MEASURED.clear()
