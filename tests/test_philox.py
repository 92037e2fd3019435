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
    assert words.tolist() == [0x6627E8D5]


SEEDS = (0, 1, 0xFFFFFFFF, 1 << 32, 0xA4093822299F31D0, (1 << 64) - 1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("stream", "kind"), [(0, 1), (0x7FFFFFFF, 0), (0x13198A2E, 1)])
def test_words_are_those_of_the_counter(seed, stream, kind):
    words = philox.philox_words(seed_of(seed), 50, stream, kind)
    key = (seed & MASK, seed >> 32)
    expected = [by_hand((e, 0, stream, kind), key)[0] for e in range(50)]
    assert words.tolist() == expected


def test_an_element_is_the_same_in_a_larger_draw():
    seed = seed_of(7)
    few = philox.uniform(seed, (3, 40), 5)
    assert torch.equal(philox.uniform(seed, (9, 40), 5)[:3], few)
    assert torch.equal(philox.uniform(seed, (1, 120), 5).reshape(3, 40), few)
    words = philox.philox_words(seed, 120, 5, philox.ROUNDING).tolist()
    assert few.flatten().tolist() == [(word >> 8) / 2**24 for word in words]


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


def test_signs():
    signs = philox.random_signs(seed_of(3), 128, 9)
    words = philox.philox_words(seed_of(3), 128, 9, philox.SIGNS).tolist()
    assert signs.tolist() == [-1.0 if word & 1 else 1.0 for word in words]
    assert 30 < (signs == 1).sum() < 98  # 64 +- 5.7
    assert not torch.equal(signs, philox.random_signs(seed_of(4), 128, 9))


def test_numbers_of_streams_are_fixed_and_small():
    # CRC-32 of the ASCII digits, its check value, without the top bit.
    assert philox.stream_number("123456789") == 0xCBF43926 & 0x7FFFFFFF
    assert philox.stream_number("a") != philox.stream_number("b")


def test_nothing_drawn():
    assert philox.uniform(seed_of(0), (0, 5), 0).shape == (0, 5)
