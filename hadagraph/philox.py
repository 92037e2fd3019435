"""The counter-based stream behind stochastic rounding and per-step signs: the same seed, stream and
index give the same bits in any launch, on any device. Knows nothing of formats or kernels.

Philox-4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011). The key is the
64-bit seed; counter n of stream s is (n mod 2^32, n div 2^32, s, kind), and has four words.
"""

from __future__ import annotations

import zlib

import torch

ROUNDING, SIGNS = 0, 1
"""The kinds of draws, which never share a counter."""
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
ROUNDS = 10
SIGNS_PER_COUNTER = 128
"""One a bit."""


def stream_number(name: str) -> int:
    """The 31-bit number of a stream with this name, the same in every process."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def check_stream(stream: int) -> None:
    """ValueError if it is no number of a stream."""
    if not 0 <= stream < 1 << 31:
        raise ValueError(f"stream must be a number of 31 bits, got {stream}")


def philox_words(seed: torch.Tensor, count: int, stream: int, kind: int) -> torch.Tensor:
    """Words [count, 4] of the first counters, 32 bits each in int64; seed: int64 [1], on any
    device."""
    check_stream(stream)
    index = torch.arange(count, dtype=torch.int64, device=seed.device)
    key = [seed & _MASK, (seed >> 32) & _MASK]
    c0, c1 = index & _MASK, index >> 32
    c2, c3 = torch.full_like(index, stream), torch.full_like(index, kind)
    for _ in range(ROUNDS):
        high0, low0 = _multiplied(c0, _MULTIPLIERS[0])
        high1, low1 = _multiplied(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key[0], low1, high0 ^ c3 ^ key[1], low0
        key = [(k + w) & _MASK for k, w in zip(key, _WEYL, strict=True)]
    return torch.stack((c0, c1, c2, c3), 1)


def uniform(seed: torch.Tensor, shape: tuple[int, int], stream: int) -> torch.Tensor:
    """fp32 in [0, 1), multiples of 2^-24, from the upper 24 bits of words: element (i, j) from word
    j mod 4 of counter i * ceil(shape[1] / 4) + j div 4."""
    fours = -(-shape[1] // 4)
    words = philox_words(seed, shape[0] * fours, stream, ROUNDING)
    words = words.reshape(shape[0], 4 * fours)[:, : shape[1]]
    return (words >> 8).float() * 2.0**-24


def random_signs(seed: torch.Tensor, block: int, stream: int) -> torch.Tensor:
    """fp32 [block] of +-1: -1 where bit i mod 32 of word i div 32 is set, counters one after the
    other."""
    counters = -(-block // SIGNS_PER_COUNTER)
    words = philox_words(seed, counters, stream, SIGNS).flatten()
    bits = words[:, None] >> torch.arange(32, device=seed.device)
    return 1.0 - 2.0 * (bits & 1).flatten()[:block].float()


def _multiplied(x: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a 32 by 32 bit product: int64 wraps, which keeps all its bits."""
    product = x * factor
    return (product >> 32) & _MASK, product & _MASK
