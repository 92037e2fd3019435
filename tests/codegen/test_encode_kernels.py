"""Emitted kernels of general encodings in Triton's interpreter against their references: no GPU
needed. One ordinary test runs this file again under TRITON_INTERPRET=1."""

from __future__ import annotations

import weakref

import pytest
import torch
from again import assert_passes_interpreted, interpreter, starts_interpreter
from encode_checks import (
    ENCODINGS,
    PRODUCTS,
    PROJECTIONS,
    REFUSED,
    ROTATIONS,
    STREAM,
    check_encode,
    check_mm,
    check_projection,
    check_rotation,
    encoded_on,
    multiplied_on,
    operand,
    seed_on,
)
from kernel_checks import integers, normals

from hadagraph import ops
from hadagraph.codegen import encoded, encoded_mm, launch, transforms
from hadagraph.encode import clip_mask_reference, encode_reference
from hadagraph.formats import Encoding
from hadagraph.philox import philox_words
from hadagraph.rotation import Rotation, rotate_reference

SM90, SM80 = (9, 0), (8, 0)
BF16 = torch.bfloat16
STOCHASTIC = "fp4_e2m1/block_contracted(32)/e8m0/stochastic"
TENSOR = "int4/per_tensor/h16"
KEPT = "int8/per_kept_index/keep8of16/stochastic"
MXFP8 = "fp8_e4m3/block_contracted(32)/e8m0"
NVFP4 = "fp4_e2m1/block_contracted(16)/h16:fixed(7)/ue4m3/stochastic/prescale"
MSE = "fp4_e2m1/block_contracted(32)/h32/e8m0/mse"
SQUARE = "fp4_e2m1/block_2d(16)/ue4m3/prescale"
SIX = "fp6_e2m3/block_contracted(32)/h64:per_step(z)/e8m0"


@pytest.mark.slow
@starts_interpreter
def test_interpreter_process():
    assert_passes_interpreted(__file__)


def check(x: torch.Tensor, text: str, contracted_dim: int, *, exact: bool = True) -> None:
    check_encode(x, Encoding.parse(text), contracted_dim, "cpu", SM90, exact=exact)


@interpreter
@pytest.mark.parametrize("text", ENCODINGS)
def test_every_encoding(text):
    for contracted_dim, shape in ((1, (37, 150)), (0, (150, 37))):
        check(integers(*shape, BF16), text, contracted_dim)


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("text", [TENSOR, KEPT, NVFP4, SQUARE, SIX, MSE])
def test_dtypes(text, dtype):
    check(integers(33, 70, dtype), text, 1)
    check(integers(33, 70, dtype), text, 0)
    check(normals(140, 70, dtype), text, 1, exact=False)


@interpreter
def test_fp64_is_rounded_to_fp32():
    check(integers(20, 40, torch.float64), TENSOR, 1)


@interpreter
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (1, 40), (40, 1), (3, 129)])
def test_odd_shapes(shape):
    for text in (KEPT, NVFP4, SQUARE):
        for contracted_dim in (0, 1):
            check(integers(*shape, BF16), text, contracted_dim)


@interpreter
def test_strides():
    base = integers(60, 80, BF16)
    for x in (base.t(), base[::2], base[:, 3:50], base[:, ::3], base[:1].expand(30, 80)):
        for contracted_dim in (0, 1):
            check(x, NVFP4, contracted_dim)
            check(x, SIX, contracted_dim)


@interpreter
@pytest.mark.parametrize("text", [TENSOR, KEPT, STOCHASTIC, NVFP4, SQUARE, SIX, MSE])
def test_special_values(text):
    """A group with inf or NaN is NaN, its neighbors are untouched; zeros; tiny and huge groups."""
    x = integers(40, 144, BF16)
    x[5], x[7, 64:128] = 0, 0
    check(x, text, 1)
    x[3, 7], x[30, 100] = float("nan"), float("inf")
    check(x, text, 1)
    y = torch.zeros(32, 64, dtype=BF16)
    # no subnormals: the interpreter's bf16 loads flush them
    y[1], y[2], y[3, 5] = 2.0**-120, 2.0**110, 2.0**-125
    check(y, text, 1)
    y[4, 4] = 2.0**-130
    check(y.float(), text, 1)


@interpreter
def test_rounding_draws_the_words_of_philox():
    """Codes of a constant say which of the words are below its fraction, beyond 2^32 seeds too."""
    x = torch.full((5, 64), 1.0)
    x[:, 0] = 7.0  # the scale: 1
    x[:, 1:] = 2.375
    got = encoded_on(SM90, x, seed_on("cpu"), "int4/per_kept_index/stochastic", 1, STREAM)
    codes = torch.stack((got.codes & 15, got.codes >> 4), -1).flatten(-2)
    words = philox_words(seed_on("cpu"), 80, STREAM, 0).reshape(5, 64) >> 8
    expected = torch.where(words < 0.375 * 2**24, 3, 2).to(torch.uint8)
    assert torch.equal(codes[:, 1:], expected[:, 1:])
    assert 0.2 < float((codes[:, 1:] == 3).float().mean()) < 0.55


@interpreter
def test_streams_and_seeds_differ():
    x = normals(20, 64, BF16)
    seeds = torch.tensor([1]), torch.tensor([1 + (1 << 40)])
    made = [
        encoded_on(SM90, x, seed, STOCHASTIC, 1, stream).codes
        for seed in seeds
        for stream in (1, 2)
    ]
    for i, one in enumerate(made):
        assert all(not torch.equal(one, other) for other in made[i + 1 :])


def test_a_missing_seed_is_named():
    with pytest.raises(ValueError, match="needs a seed"):
        encoded_on(SM90, torch.ones(2, 64), None, STOCHASTIC, 1, 0)


@pytest.mark.parametrize("text", REFUSED)
def test_what_kernels_refuse_goes_to_the_reference(text, caplog):
    encoding = Encoding.parse(text)
    x = integers(24, 300, BF16)
    launch.log_refusal.cache_clear()
    with caplog.at_level("INFO", "hadagraph.codegen.launch"):
        for _ in range(2):
            got = encoded_on(SM90, x, None, text, 1, 0)
    expected = encode_reference(x, encoding, 1)
    assert torch.equal(got.codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(got.scale, expected.scale)
    assert len(caplog.records) == 1
    assert text in caplog.text


@pytest.mark.parametrize("texts", [*PRODUCTS, (MXFP8, MXFP8)])
def test_what_is_ready_keeps_no_operands(texts):
    """It is kept for as long as the process lives."""
    a, b = (operand(text, 32, 64, 0)[0] for text in texts)
    x, seed, bias = integers(32, 64, BF16), seed_on("cpu"), torch.ones(32)
    tensors = (*a.tensors, *b.tensors, bias)
    rotation = ROTATIONS[3]
    made = [
        encoded.ready_encode(SM90, x, seed, texts[0], 1, 0),
        encoded.ready_clip_mask(SM90, x, seed, texts[0], 1),
        encoded.ready_decode(SM90, *a.tensors, texts[0], 1, 64, BF16),
        encoded_mm.ready_encoded_mm((10, 0), *tensors, *texts, BF16),
        transforms.ready_rotate(SM90, x, 0, rotation, seed),
        transforms.ready_unrotate(SM90, x[::2, ::2], 0, rotation, 8, seed),
    ]
    kept = [weakref.ref(each) for each in (x, seed, *tensors)]
    del a, b, x, seed, bias, tensors
    assert not [each for each in kept if each() is not None]
    assert all(map(callable, made))


def operator_calls() -> list[tuple[object, tuple[object, ...]]]:
    """Of every operator that `transforms`, `encoded` and `encoded_mm` implement."""
    x, seed = integers(32, 64, torch.float32), seed_on("cpu")
    codes = ops.encode(x, None, TENSOR, 1, 0)
    return [
        (ops.rotate, (x, 0, "h16")),
        (ops.rotate, (x, 1, ROTATIONS[3], seed)),
        (ops.unrotate, (x, 0, "h16", 30)),
        (ops.unrotate, (x, 1, ROTATIONS[3], 60, seed)),
        (ops.project, (x, 0, 8, 16)),
        (ops.unproject, (x, 1, 8, 16, 128)),
        (ops.encode, (x, None, TENSOR, 1, 0)),
        (ops.encode, (x, seed, STOCHASTIC, 0, STREAM)),
        (ops.clip_mask, (x, None, SQUARE, 1)),
        (ops.decode, (*codes, TENSOR, 1, 64, BF16)),
        (ops.encoded_mm, (*codes, *codes, None, TENSOR, TENSOR, torch.float32)),
        (ops.encoded_mm, (*codes, *codes, torch.ones(32), TENSOR, TENSOR, torch.float32)),
    ]


@interpreter
def test_operators_run_what_is_ready(monkeypatch):
    """The implementations for CUDA, of tensors on the CPU: twice, and made ready once."""
    monkeypatch.setattr(launch, "capability_of", lambda device: SM90)
    monkeypatch.setattr(launch, "_READY", {})
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for count, (op, arguments) in enumerate(operator_calls(), 1):
        for _ in range(2):
            got = op.redispatch(cuda, *arguments)
            torch.testing.assert_close(got, op(*arguments), rtol=1e-6, atol=1e-4)
        assert len(launch._READY) == count
    with pytest.raises(ValueError, match="needs a seed"):
        ops.rotate.redispatch(cuda, torch.ones(32, 64), 0, ROTATIONS[3])


@interpreter
@pytest.mark.parametrize("texts", PRODUCTS)
@pytest.mark.parametrize("capability", [SM90, SM80])
def test_encoded_mm(texts, capability):
    check_mm(texts, (70, 33, 150), BF16, torch.float32, "cpu", capability)
    check_mm(texts, (1, 5, 16), None, BF16, "cpu", capability)


@interpreter
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("text", ROTATIONS)
def test_rotations(text, dtype):
    x = normals(150, 70, dtype)
    for dim in (0, 1):
        for lying in (x, x.t(), x[::2, ::3]):
            check_rotation(lying, dim, text, "cpu", SM90)


@interpreter
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_projections(projection):
    x = normals(150, 70, BF16)
    for dim in (0, 1):
        for lying in (x, x.t()):
            check_projection(lying, dim, projection, "cpu", SM90)


def test_rotations_that_kernels_refuse(caplog):
    launch.log_refusal.cache_clear()
    x = normals(4, 300, torch.float32)
    with caplog.at_level("INFO", "hadagraph.codegen.launch"):
        got = transforms.ready_rotate(SM90, x, 1, "h256")(x)
    assert torch.equal(got, rotate_reference(x, 1, Rotation(256)))
    assert "h256" in caplog.text


@interpreter
def test_encoded_mm_of_nothing():
    check_mm(PRODUCTS[0], (0, 5, 16), None, BF16, "cpu", SM90)
    check_mm(PRODUCTS[4], (5, 0, 16), None, BF16, "cpu", SM90)


@interpreter
def test_a_mask_draws_no_rounding():
    x, encoding = integers(10, 64, BF16), Encoding.parse(STOCHASTIC)
    mask = encoded.ready_clip_mask(SM90, x, None, STOCHASTIC, 1)(x, None)
    assert torch.equal(mask, clip_mask_reference(x, encoding, 1, None))
    with pytest.raises(ValueError, match="needs a seed"):
        encoded.ready_clip_mask(SM90, x, None, SIX, 1)


@interpreter
def test_a_nan_group_makes_its_outputs_nan():
    text = "fp4_e2m1/block_contracted(32)/e8m0"
    x = integers(10, 64, BF16)
    x[4, 40] = float("inf")
    a = encoded_on(SM90, x, None, text, 1, 0)
    out = multiplied_on(SM90, a, a, None, text, text, torch.float32)
    assert out[4].isnan().all() and out[:, 4].isnan().all()
    assert int(out.isnan().sum()) == 19
