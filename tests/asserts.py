"""Assertions named by what they claim, over tensors and graphs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

# fp64 sums of at most a few hundred terms, reordered by a rotation: about 1e-14 of max|out|, with
# room for a chain of GEMMs.
EXACT = 1e-12


def assert_codes_bitwise(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Same shape, dtype and bits, except that -0 is 0."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    same = got.view(torch.uint8) == expected.view(torch.uint8)
    if got.dtype.is_floating_point:
        same |= (got.float() == 0) & (expected.float() == 0)
    assert bool(same.all()), f"{int((~same).sum())} of {same.numel()} codes differ"


def assert_sqnr(got: torch.Tensor, expected: torch.Tensor, floor_db: float) -> None:
    """The signal is at least `floor_db` above the error."""
    signal, noise = expected.double(), got.double() - expected.double()
    decibels = 10 * torch.log10(signal.square().sum() / noise.square().sum())
    assert decibels >= floor_db, f"SQNR {decibels:.1f} dB is below {floor_db} dB"


def run_graph(gm: fx.GraphModule, values: Sequence[object]) -> list[object]:
    """The graph's outputs, flat, run node by node."""
    return list(tree_leaves(fx.Interpreter(gm).run(*values)))


def assert_graph_values_equal(
    before: fx.GraphModule, after: fx.GraphModule, values: Sequence[object], bound: float = EXACT
) -> None:
    """Every output of the two graphs agrees to `bound` of its largest magnitude (0: bitwise), and
    in shape and dtype."""
    expected, got = run_graph(before, values), run_graph(after, values)
    assert len(expected) == len(got)
    for number, (want, have) in enumerate(zip(expected, got, strict=True)):
        if not isinstance(want, torch.Tensor):
            assert want == have
            continue
        assert isinstance(have, torch.Tensor)
        assert (want.shape, want.dtype) == (have.shape, have.dtype)
        if want.numel() == 0:
            continue
        error, largest = (want - have).abs().max(), want.abs().max()
        assert error <= bound * largest, f"output {number}: {error:.2e} of {largest:.2e}"
