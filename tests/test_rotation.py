"""Rotations: orthogonal, undone by their inverse, exact under padding, and readable from text."""

from __future__ import annotations

import by_hand
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import LAYOUTS, laid_out

from hadagraph.rotation import (
    Fixed,
    PerStep,
    Rotation,
    block_for,
    hadamard_matrix,
    padded_size,
    rotate_reference,
    sign_vector,
    signed_hadamard,
    unrotate_reference,
)

BLOCKS = (2, 4, 16, 32, 64, 128, 256)
SIGNS = (None, Fixed(0), Fixed(123456789))
rotations = st.builds(Rotation, st.sampled_from(BLOCKS), st.sampled_from(SIGNS))


@pytest.mark.parametrize("block", BLOCKS)
def test_hadamard_is_sylvesters(block):
    assert torch.equal(hadamard_matrix(block), torch.from_numpy(by_hand.hadamard(block)))


@given(rotations)
def test_signed_hadamard_is_orthogonal_up_to_the_block(rotation):
    matrix = signed_hadamard(rotation)
    assert torch.equal(matrix @ matrix.t(), rotation.block * torch.eye(rotation.block).double())


def test_signs_are_drawn_once_from_the_seed():
    first, again, other = (sign_vector(Fixed(seed), 64) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert set(first.tolist()) == {-1.0, 1.0}
    assert torch.equal(sign_vector(None, 16), torch.ones(16).double())


def test_per_step_signs_have_no_value_here():
    with pytest.raises(ValueError, match=r"per_step\(s\).*on the device"):
        sign_vector(PerStep("s"), 16)


@given(rotations, st.data())
def test_unrotate_undoes_rotate(rotation, data):
    shape = data.draw(st.lists(st.sampled_from((0, 1, 5, 16, 20)), min_size=1, max_size=3))
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = torch.randn(shape, dtype=torch.float64)
    if len(shape) == 2:
        x = laid_out(x, data.draw(st.sampled_from(LAYOUTS)))
    rotated = rotate_reference(x, dim, rotation)
    assert rotated.shape[dim] == padded_size(shape[dim], rotation.block)
    back = unrotate_reference(rotated, dim, rotation, shape[dim])
    # Two fp64 sums of `block` terms.
    torch.testing.assert_close(back, x, rtol=0, atol=1e-13)


@given(rotations, st.sampled_from((1, 16, 20, 130)), st.sampled_from(LAYOUTS), st.integers(0, 1))
def test_rotate_is_the_padded_block_matrix_product(rotation, size, layout, dim):
    x = laid_out(torch.randint(-256, 257, (size, 24 if dim == 0 else size)).double(), layout)
    vectors = x.t() if dim == 0 else x
    padded = torch.nn.functional.pad(vectors, (0, -vectors.shape[1] % rotation.block))
    blocks = padded.shape[1] // rotation.block
    matrix = torch.block_diag(*[signed_hadamard(rotation)] * blocks)
    expected = padded @ matrix
    got = rotate_reference(x, dim, rotation, normalize=False)
    assert torch.equal(got.t() if dim == 0 else got, expected)


@given(rotations, st.sampled_from((1, 15, 16, 20, 130)))
def test_padding_keeps_inner_products(rotation, size):
    a, b = torch.randn(3, size, dtype=torch.float64), torch.randn(5, size, dtype=torch.float64)
    rotated = rotate_reference(a, 1, rotation) @ rotate_reference(b, 1, rotation).t()
    # fp64 sums of at most 256 terms.
    torch.testing.assert_close(rotated, a @ b.t(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rotate_keeps_the_dtype(dtype):
    assert rotate_reference(torch.ones(2, 16, dtype=dtype), 1, Rotation(16)).dtype == dtype


@given(
    st.sampled_from(BLOCKS),
    st.one_of(
        st.none(),
        st.builds(Fixed, st.integers(0, 2**40)),
        st.builds(PerStep, st.from_regex(r"[A-Za-z0-9_.]+", fullmatch=True)),
    ),
)
def test_text_round_trip(block, signs):
    rotation = Rotation(block, signs)
    assert Rotation.parse(str(rotation)) == rotation


@pytest.mark.parametrize(
    "make", [lambda: Fixed(-1), lambda: PerStep("a/b"), lambda: PerStep(""), lambda: PerStep("a)")]
)
def test_signs_that_text_could_not_carry_are_refused(make):
    with pytest.raises(ValueError, match="signs"):
        make()


@pytest.mark.parametrize("block", [-16, 0, 1, 3, 24, 100])
def test_blocks_that_are_no_power_of_two_are_refused(block):
    with pytest.raises(ValueError, match=f"power of two >= 2, got {block}"):
        Rotation(block)


@pytest.mark.parametrize(
    "text",
    ["", "h", "128", "h128:", "h128:fixed()", "h128:per_step()", "h16 ", "H16", "h16:fixed(x)"],
)
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="rotation must read"):
        Rotation.parse(text)


@pytest.mark.parametrize("text", ["h1", "h0", "h24"])
def test_text_with_a_bad_block_is_refused(text):
    with pytest.raises(ValueError, match="power of two"):
        Rotation.parse(text)


@pytest.mark.parametrize(
    ("size", "block"), [(0, 16), (1, 16), (20, 16), (48, 16), (96, 32), (576, 64), (4096, 128)]
)
def test_block_for_is_the_largest_that_divides(size, block):
    assert block_for(size) == block


def test_block_for_respects_the_most():
    assert block_for(4096, 32) == 32


def test_autocast_does_not_reach_the_reference():
    x = torch.randn(64, 32)
    plain = rotate_reference(x, 0, Rotation(32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rotate_reference(x, 0, Rotation(32)), plain)
