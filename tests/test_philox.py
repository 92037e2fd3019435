"""The random stream: known answers, the layout of counters, and that nothing but seed, stream, kind
and index matters."""

from __future__ import annotations

import pytest
import torch

from hadagraph import philox

MASK = 0xFFFFFFFF
# Counter, key, words: kat_vectors of Random123 (philox4x32 with 10 rounds).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def by_hand(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox-4x32-10 in Python integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def seed_of(value: int) -> torch.Tensor:
    return torch.tensor([value - (1 << 64) if value >> 63 else value], dtype=torch.int64)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_the_transcription_has_the_known_answers(counter, key, words):
    assert by_hand(counter, key) == words


def test_the_first_known_answer():
    words = philox.philox_words(seed_of(0), 1, stream=0, kind=0)
    assert words.tolist() == [list(KNOWN[0][2])]


SEEDS = (0, 1, 0xFFFFFFFF, 1 << 32, 0xA4093822299F31D0, (1 << 64) - 1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("stream", "kind"), [(0, 1), (0x7FFFFFFF, 0), (0x13198A2E, 1)])
def test_words_are_those_of_the_counter(seed, stream, kind):
    words = philox.philox_words(seed_of(seed), 50, stream, kind)
    key = (seed & MASK, seed >> 32)
    assert words.tolist() == [list(by_hand((n, 0, stream, kind), key)) for n in range(50)]


def test_an_element_is_the_same_in_a_larger_draw():
    seed = seed_of(7)
    few = philox.uniform(seed, (3, 40), 5)
    assert torch.equal(philox.uniform(seed, (9, 40), 5)[:3], few)
    assert torch.equal(philox.uniform(seed, (1, 120), 5).reshape(3, 40), few)


@pytest.mark.parametrize("shape", [(4, 16), (5, 7), (3, 1)])
def test_each_element_has_a_word_of_its_own(shape):
    """Four neighbors of a row share a counter, and a row ends with its last."""
    R, C = shape
    fours = (C + 3) // 4
    words = [
        by_hand((i * fours + j // 4, 0, 5, philox.ROUNDING), (7, 0))[j % 4]
        for i in range(R)
        for j in range(C)
    ]
    assert len(set(words)) == R * C
    drawn = philox.uniform(seed_of(7), shape, 5)
    assert drawn.flatten().tolist() == [(word >> 8) / 2**24 for word in words]


def test_streams_kinds_and_seeds_differ():
    draws = [
        philox.philox_words(seed_of(seed), 64, stream, kind)
        for seed in (1, 2)
        for stream in (3, 4)
        for kind in (philox.ROUNDING, philox.SIGNS)
    ]
    together = torch.cat(draws)
    assert together.unique().numel() == together.numel()


def test_uniform_numbers_are_uniform():
    draws = philox.uniform(seed_of(11), (1000, 100), 1).double()
    assert 0 <= draws.min() <= draws.max() < 1
    # 1e5 draws: the mean's standard deviation is 1 / sqrt(12 * 1e5) = 9e-4; 5 of them.
    assert abs(draws.mean() - 0.5) < 4.6e-3
    counts = draws.flatten().histc(16, 0, 1)
    # Each of 16 bins: 6250 +- 77.
    assert (counts - 6250).abs().max() < 5 * 77
    words = draws.unflatten(1, (25, 4)) - 0.5
    assert words.mean((0, 1)).abs().max() < 5 / (12 * 25_000) ** 0.5
    # Products of two words of a counter: their standard deviation is 1 / 12.
    together = torch.einsum("rca,rcb->ab", words, words) / 25_000
    assert (together - torch.eye(4) / 12).triu(1).abs().max() < 5 / 12 / 25_000**0.5


@pytest.mark.parametrize("block", [16, 128, 512])
def test_signs(block):
    signs = philox.random_signs(seed_of(3), block, 9)
    words = [word for n in range(4) for word in by_hand((n, 0, 9, philox.SIGNS), (3, 0))]
    bits = [words[i // 32] >> i % 32 & 1 for i in range(block)]
    assert signs.tolist() == [-1.0 if bit else 1.0 for bit in bits]
    assert not torch.equal(signs, philox.random_signs(seed_of(4), block, 9))


def test_signs_are_balanced():
    signs = torch.stack([philox.random_signs(seed_of(3), 128, stream) for stream in range(400)])
    assert signs.mean(0).abs().max() < 5 / 400**0.5
    assert signs.mean().abs() < 5 / (128 * 400) ** 0.5


def test_numbers_of_streams_are_fixed_and_small():
    # CRC-32 of the ASCII digits, its check value, without the top bit.
    assert philox.stream_number("123456789") == 0xCBF43926 & 0x7FFFFFFF
    assert philox.stream_number("a") != philox.stream_number("b")


def test_nothing_drawn():
    assert philox.uniform(seed_of(0), (0, 5), 0).shape == (0, 5)


@pytest.mark.parametrize("stream", [-1, 1 << 31])
def test_a_stream_is_a_number_of_31_bits(stream):
    with pytest.raises(ValueError, match="stream must be a number of 31 bits"):
        philox.uniform(seed_of(0), (1, 4), stream)
