"""The search for what to lower: never worse than all or nothing, reasons for all that is dropped,
what the user asked for is kept."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hadagraph.cost import Gemm, Matrix, Use, gemm_us
from hadagraph.device import CHIPS
from hadagraph.selection import LEAST_GAIN, LEAST_GAIN_BY_HOST, Candidate, Part, Search

H200 = CHIPS["H200"]
CHIP = st.sampled_from(list(CHIPS.values()))


def linears(T, K, widths, *, format="int8", asked=False, count=1, given=False):
    """Linears [K] -> widths that share their input of T tokens, forward and backward; given: input
    and output gradient come from outside."""
    x = Matrix("x", T, K, 2, given=given, fused=not given)
    candidates = []
    for index, N in enumerate(widths):
        w = Matrix(f"w{index}", N, K, 2, given=True)
        e = Matrix(f"e{index}", T, N, 2, given=given)
        kind = "rotated" if format == "int8" else "plain"

        def use(matrix, dim, backward=True, kind=kind):
            return Use(matrix, dim, f"{format} along {dim}", kind, backward)

        roles = {
            "output": (T, N, K, (use(x, 1, False), use(w, 1, False))),
            "grad_input": (T, K, N, (use(e, 1), use(w, 0))),
            "grad_weight": (N, K, T, (use(e, 0), use(x, 0))),
        }
        for role, (rows, columns, contracted, uses) in roles.items():
            gemm = Gemm(rows, columns, contracted, format, "bf16", uses)
            candidates.append(Candidate(gemm, role, index, asked))
    return Part(tuple(candidates), count)


def block(T, width, hidden, kv, **options):
    """The Linears of a decoder block."""
    return [
        linears(T, width, (width, kv, kv), **options),
        linears(T, width, (width,), **options),
        linears(T, width, (hidden, hidden), **options),
        linears(T, hidden, (width,), **options),
    ]


widths = st.integers(1, 160).map(lambda n: 64 * n)
parts = st.lists(
    st.builds(
        linears,
        st.sampled_from((16, 512, 2048, 8192, 16384)),
        widths,
        st.lists(widths, min_size=1, max_size=3),
        asked=st.booleans(),
        count=st.integers(1, 40),
    ),
    min_size=1,
    max_size=3,
)


@given(CHIP, parts, st.booleans())
def test_no_choice_is_worse_than_all_or_nothing(profile, parts, host):
    search = Search(parts, profile, host)
    choice = search.run()
    assert choice.us == search.total(choice.lowered).us
    assert choice.us <= choice.none_us
    by_host = search.total(choice.lowered).host > search.total(choice.lowered).device
    assert choice.us <= choice.all_us / (1 - (LEAST_GAIN_BY_HOST if host else LEAST_GAIN))
    least = LEAST_GAIN_BY_HOST if by_host else LEAST_GAIN
    assert choice.us == choice.none_us or choice.us <= (1 - least) * choice.none_us
    for part, lowered, reasons in zip(parts, choice.lowered, choice.reasons, strict=True):
        everything = set(range(len(part.candidates)))
        assert part.asked() <= lowered <= everything
        assert set(reasons) == everything - lowered
        assert all(reason.startswith("stays bf16: ") for reason in reasons.values())


@given(st.sampled_from((512, 1024, 4096)), widths, st.lists(widths, min_size=1, max_size=3))
def test_more_tokens_never_lose(T, K, N):
    for tokens in (T, 2 * T, 4 * T):
        choice = Search([linears(tokens, K, N)], H200, host=True).run()
        assert choice.us <= choice.none_us


@pytest.mark.parametrize("T", [8192, 16384, 32768])
@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_all_of_an_8b_model_is_lowered(T, format):
    parts = [replace(part, count=32) for part in block(T, 4096, 14336, 1024, format=format)]
    choice = Search(parts, H200, host=True).run()
    assert not any(choice.reasons)
    assert choice.us == choice.all_us < 0.8 * choice.none_us


@pytest.mark.parametrize("host", [True, False])
def test_nothing_of_a_small_model_is(host):
    parts = [replace(part, count=30) for part in block(8192, 576, 1536, 192)]
    choice = Search(parts, H200, host).run()
    assert not any(choice.lowered)
    assert choice.us == choice.none_us < choice.all_us


def test_launches_decide_unless_they_are_captured():
    """A graph whose GEMMs gain less than the host loses with its quantizers."""
    parts = [replace(part, count=30) for part in block(2048, 4096, 14336, 1024)]
    slow_host = replace(H200, host=replace(H200.host, scaled_mm=2000.0))
    launched, captured = (Search(parts, slow_host, host).run() for host in (True, False))
    assert not any(launched.lowered) and any(captured.lowered)
    reasons = {reason for found in launched.reasons for reason in found.values()}
    assert any("us of launches by the host against" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("T", "K", "N"), [(8192, 8192, 1280), (8192, 1024, 8192), (2048, 3584, 8192)]
)
def test_a_lone_linear_must_hide_the_step_and_its_launches(T, K, N):
    """Faster on the device, but the host is slower: bench/results/small.json has such steps."""
    lone = linears(T, K, (N,), given=True)
    launched, captured = (Search([lone], H200, host).run() for host in (True, False))
    assert not any(launched.lowered) and launched.us == launched.none_us
    assert all(captured.lowered) and captured.us < 0.9 * captured.none_us
    assert all(Search([linears(4 * T, K, (N,), given=True)], H200, host=True).run().lowered)


@pytest.mark.parametrize("host", [True, False])
def test_where_the_host_is_slower_the_gain_must_be_larger(host):
    """7 % less than bf16: enough on the device, not where the host takes that long."""
    sizes = (16384, 8192, 8192)
    part = Part(linears(16384, 8192, (8192,), given=True).candidates[:1])
    none_us = Search([part], H200, host=False).run().none_us
    rates = {rate.format: rate for rate in H200.gemms}
    launches = Search([part], H200, host=True).total([frozenset({0})]).host - H200.host.step
    for share, enough in ((0.87, True), (0.93, not host)):
        profile = replace(H200, host=replace(H200.host, step=share * none_us - launches))
        if not host:  # the GEMM itself is slower
            quantizers = Search([part], H200, host=False).run().all_us - gemm_us(
                H200, *sizes, "int8"
            )
            left = share * none_us - quantizers
            int8 = replace(rates["int8"], sustained=2e-6 * math.prod(sizes) / left)
            profile = replace(H200, gemms=(rates["bf16"], int8, rates["fp8"]))
        choice = Search([part], profile, host).run()
        assert choice.all_us == pytest.approx(share * none_us, rel=1e-3)
        assert bool(choice.lowered[0]) == enough


def test_a_losing_linear_goes_and_the_others_stay():
    wide, narrow = linears(16384, 4096, (14336,)), linears(16384, 128, (128,))
    choice = Search([wide, narrow], H200, host=False).run()
    assert choice.lowered == (frozenset({0, 1, 2}), frozenset())
    (reason,) = set(choice.reasons[1].values())
    assert reason.startswith("stays bf16: predicted ") and reason.endswith("3 GEMMs together")


def test_what_was_asked_for_stays_lowered():
    choice = Search([linears(512, 128, (128,), asked=True)], H200, host=True).run()
    assert choice.lowered == (frozenset({0, 1, 2}),) and choice.us == choice.none_us


def test_a_linear_is_split_only_for_a_good_part_of_its_time():
    """Of these, grad_input alone would save a little: not enough to keep both precisions."""
    part = linears(8192, 4096, (4096, 1024, 1024))
    lowered = frozenset(range(9))
    assert part.leaves_a_linear_in_part(lowered, frozenset({4}))
    assert not part.leaves_a_linear_in_part(lowered, frozenset({3, 4, 5}))
    assert not part.leaves_a_linear_in_part(frozenset({0, 1, 2, 4}), frozenset({4}))
