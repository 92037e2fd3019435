"""The numerics contract written out once more in NumPy, a line a step, to hold the references
against. Shares no code with them."""

from __future__ import annotations

import numpy as np
import torch

MAX = {"int8": 127.0, "fp8_e4m3": 448.0, "fp8_e5m2": 57344.0}
DTYPE = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def hadamard(block: int) -> np.ndarray:
    """Sylvester's recursion."""
    h = np.ones((1, 1))
    while len(h) < block:
        h = np.kron(np.array([[1, 1], [1, -1]]), h)
    return h


def quantize(
    x: torch.Tensor,
    format: str,
    *,
    per_tensor: bool = False,
    block: int | None = None,
    signs: np.ndarray | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and fp32 scales of x [kept, contracted]; finite input."""
    y = x.detach().double().numpy()
    multiple = max(16, block or 1)
    y = np.pad(y, ((0, 0), (0, -y.shape[1] % multiple)))
    if block is not None:
        diagonal = np.ones(block) if signs is None else signs
        blocks = y.reshape(len(y), -1, block) if y.size else y.reshape(len(y), 0, block)
        y = ((blocks * diagonal) @ hadamard(block)).reshape(y.shape)
    y = y.astype(np.float32)
    if y.size == 0:
        amax = np.zeros(1 if per_tensor else len(y), np.float32)
    else:
        amax = np.abs(y).max(keepdims=True)[0] if per_tensor else np.abs(y).max(axis=1)
    floored = np.maximum(amax, np.float32(2.0**-100))
    largest = np.float32(MAX[format])
    scaled = y * (largest / floored)[:, None]
    root = np.float32(1) / np.sqrt(np.float32(block or 1))
    scale = np.where(amax == 0, np.float32(1), floored / largest * root)
    if format == "int8":
        codes = torch.from_numpy(np.rint(scaled).astype(np.int8))
    else:
        codes = torch.from_numpy(scaled).to(DTYPE[format])
    return codes, torch.from_numpy(scale)


def scaled_mm(
    a: torch.Tensor, b: torch.Tensor, a_scale: torch.Tensor, b_scale: torch.Tensor
) -> torch.Tensor:
    """The product of int8 codes in fp32, by exact integers."""
    exact = a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T
    out = exact.astype(np.float32) * a_scale.numpy()[:, None] * b_scale.numpy()[None, :]
    return torch.from_numpy(out)
