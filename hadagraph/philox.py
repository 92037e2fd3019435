"""The counter-based stream behind stochastic rounding and per-step signs: the same seed, stream and
index give the same bits in any launch, on any device. Knows nothing of formats or kernels.

Philox-4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011). The key is the
64-bit seed; the counter of element e of stream s is (e mod 2^32, e div 2^32, s, kind); the first
word of the four is used.
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


def stream_number(name: str) -> int:
    """The 31-bit number of a stream with this name, the same in every process."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def philox_words(seed: torch.Tensor, count: int, stream: int, kind: int) -> torch.Tensor:
    """Random words [count], 32 bits each in int64; seed: int64 [1], on any device."""
    index = torch.arange(count, dtype=torch.int64, device=seed.device)
    key = [seed & _MASK, (seed >> 32) & _MASK]
    c0, c1 = index & _MASK, index >> 32
    c2, c3 = torch.full_like(index, stream & _MASK), torch.full_like(index, kind)
    for _ in range(ROUNDS):
        high0, low0 = _multiplied(c0, _MULTIPLIERS[0])
        high1, low1 = _multiplied(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key[0], low1, high0 ^ c3 ^ key[1], low0
        key = [(k + w) & _MASK for k, w in zip(key, _WEYL, strict=True)]
    return c0


def uniform(seed: torch.Tensor, shape: tuple[int, int], stream: int) -> torch.Tensor:
    """fp32 in [0, 1), multiples of 2^-24: element (i, j) from counter i * shape[1] + j."""
    words = philox_words(seed, shape[0] * shape[1], stream, ROUNDING)
    return ((words >> 8).float() * 2.0**-24).reshape(shape)


def random_signs(seed: torch.Tensor, block: int, stream: int) -> torch.Tensor:
    """fp32 [block] of +-1: -1 where the word's lowest bit is set."""
    return 1.0 - 2.0 * (philox_words(seed, block, stream, SIGNS) & 1).float()


def _multiplied(x: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a 32 by 32 bit product: int64 wraps, which keeps all its bits."""
    product = x * factor
    return (product >> 32) & _MASK, product & _MASK
