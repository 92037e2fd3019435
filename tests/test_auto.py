"""The search of recipe auto: the fastest that is precise enough, the most precise of those nearly
as fast, high precision where nothing is precise enough; never worse than one option for all."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hadagraph.auto import (
    BLOCK_SCALED,
    CANDIDATES,
    HIGH_PRECISION,
    SLACK,
    Option,
    Part,
    Search,
    Site,
    alike,
    distinct,
)
from hadagraph.cost import Gemm, Matrix, Use
from hadagraph.device import CHIPS
from hadagraph.recipes import RECIPES, ROLES

H200, B200, A100 = (CHIPS[name] for name in ("H200", "B200", "A100"))
KINDS = {
    "int8": ("int8", "rotated"),
    "int8_plain": ("int8", "plain"),
    "fp8_rowwise": ("fp8", "plain"),
    "fp8_tensorwise": ("fp8", "per_tensor"),
}
SQNR = {"int8": 33.0, "int8_plain": 20.0, "fp8_rowwise": 28.0, "fp8_tensorwise": 24.0}


def option(name, M, N, C, operands, backward, sqnr):
    format, kind = KINDS[name]
    left, right = (Use(matrix, dim, f"{name} {dim}", kind, backward) for matrix, dim in operands)
    return Option(name, name, Gemm(M, N, C, format, "bf16", (left, right)), sqnr)


def part(T, K, widths, sqnr=SQNR, count=1):
    """Linears [K] -> widths that share their input; `sqnr` by option, or by (role, option)."""
    x = Matrix("x", T, K, 2, given=False, fused=True)
    sites = []
    for index, N in enumerate(widths):
        w = Matrix(f"w{index}", N, K, 2, given=True)
        e = Matrix(f"e{index}", T, N, 2, given=False)
        for role, shape, operands in (
            ("output", (T, N, K), ((x, 1), (w, 1))),
            ("grad_input", (T, K, N), ((e, 1), (w, 0))),
            ("grad_weight", (N, K, T), ((e, 0), (x, 0))),
        ):
            options = tuple(
                option(name, *shape, operands, role != "output", sqnr.get((role, name), db))
                for name, db in sqnr.items()
                if isinstance(name, str)
            )
            sites.append(Site(role, index, options))
    return Part(tuple(sites), count)


def block(T, width, hidden, kv, **options):
    return [
        part(T, width, (width, kv, kv), **options),
        part(T, width, (width,), **options),
        part(T, width, (hidden, hidden), **options),
        part(T, hidden, (width,), **options),
    ]


EIGHT_B = block(16384, 4096, 14336, 1024, count=32)


def keys(parts, choice):
    return {
        "bf16" if number == HIGH_PRECISION else site.options[number].key
        for part, chosen in zip(parts, choice.chosen, strict=True)
        for site, number in zip(part.sites, chosen, strict=True)
    }


def run(parts, profile=H200, budget=30.0, host=False):
    return Search(parts, profile, budget, host).run()


def test_hopper_takes_rotated_int8_at_30_db():
    choice = run(EIGHT_B)
    assert keys(EIGHT_B, choice) == {"int8"}
    for reason in itertools.chain(*choice.reasons):
        assert reason.startswith("int8 33.0 dB, ")
        assert " < 30 dB, " in reason and "high precision, +" in reason


def test_a_lower_budget_takes_what_is_faster():
    """Where rotating costs more than the slack allows."""
    slow = replace(
        H200,
        quantizers=tuple(
            replace(rate, share=rate.share / 3) if rate.kind == "rotated" else rate
            for rate in H200.quantizers
        ),
    )
    assert keys(EIGHT_B, run(EIGHT_B, slow, 30.0)) == {"int8"}
    assert keys(EIGHT_B, run(EIGHT_B, slow, 27.0)) == {"fp8_rowwise"}
    chosen = keys(EIGHT_B, run(EIGHT_B, slow, 15.0))
    assert "int8" not in chosen and chosen <= set(KINDS)


def test_nothing_precise_enough_stays_in_high_precision():
    choice = run(EIGHT_B, budget=40.0)
    assert keys(EIGHT_B, choice) == {"bf16"}
    assert all(r.startswith("high precision, ") for r in itertools.chain(*choice.reasons))


def test_one_imprecise_gemm_does_not_keep_the_others():
    sqnr = SQNR | {("grad_weight", "int8"): 29.0}
    parts = [part(16384, 4096, (4096,), sqnr)]
    (chosen,) = run(parts).chosen
    by_role = {site.role: number for site, number in zip(parts[0].sites, chosen, strict=True)}
    assert by_role == {"output": 0, "grad_input": 0, "grad_weight": HIGH_PRECISION}


def test_no_rotation_where_it_hurts():
    sqnr = SQNR | {("grad_weight", "int8"): 25.1, ("grad_weight", "int8_plain"): 31.0}
    parts = [part(16384, 4096, (14336,), sqnr)]
    choice = run(parts)
    by_role = dict(zip((s.role for s in parts[0].sites), choice.chosen[0], strict=True))
    assert by_role == {"output": 0, "grad_input": 0, "grad_weight": 1}
    (reason,) = [reason for reason in choice.reasons[0] if reason.startswith("int8_plain 31.0 dB")]
    assert "fp8_rowwise 28.0 dB < 30 dB" in reason


def test_of_plans_within_the_slack_the_most_precise():
    """fp8_rowwise is faster than rotated int8 by more than the slack, and then by less."""

    def blocks(*names):
        return block(16384, 4096, 14336, 1024, sqnr={name: SQNR[name] for name in names})

    plain = {rate.layouts: rate for rate in H200.quantizers if rate.kind == "plain"}
    alike = tuple(replace(H200.gemm("fp8"), format=format) for format in ("bf16", "int8", "fp8"))

    def rotating_at(share):
        """Of the speed of quantizers without a rotation; GEMMs are alike."""
        rates = tuple(
            replace(plain[rate.layouts], kind=rate.kind, share=share * plain[rate.layouts].share)
            if rate.kind == "rotated"
            else rate
            for rate in H200.quantizers
        )
        return replace(H200, gemms=alike, quantizers=rates)

    for profile, expected in ((rotating_at(0.6), False), (rotating_at(0.9), True)):
        both = blocks("int8", "fp8_rowwise")
        int8, fp8 = (run(blocks(name), profile, 25.0).us for name in ("int8", "fp8_rowwise"))
        choice = run(both, profile, 25.0)
        assert int8 > fp8 and choice.us <= (1 + SLACK) * fp8
        assert (int8 <= (1 + SLACK) * fp8) == expected == (keys(both, choice) == {"int8"})


def test_chips_differ():
    """On sm_100 int8 has no fast instruction; without fp8 rates only int8 is left."""
    assert keys(EIGHT_B, run(EIGHT_B, B200, 25.0)) <= {"fp8_rowwise", "fp8_tensorwise"}
    without = {name: db for name, db in SQNR.items() if name.startswith("int8")}
    parts = block(16384, 4096, 14336, 1024, sqnr=without)
    assert keys(parts, run(parts, A100, 30.0)) == {"int8"}


def test_without_a_profile_the_most_precise():
    choice = run(EIGHT_B, None)
    assert keys(EIGHT_B, choice) == {"int8"} and choice.us == 0.0
    assert choice.reasons[0][0] == (
        "int8 33.0 dB; fp8_rowwise 28.0 dB < 30 dB; fp8_tensorwise 24.0 dB < 30 dB"
    )
    assert keys(EIGHT_B, run(EIGHT_B, None, 50.0)) == {"bf16"}


def test_a_fixed_site_keeps_its_option():
    first, *rest = EIGHT_B[1].sites
    fixed = replace(first, options=first.options[3:], fixed=True)
    parts = [Part((fixed, *rest))]
    choice = run(parts)
    assert choice.chosen == ((0, 0, 0),)
    assert choice.reasons[0][0].startswith("fp8_tensorwise, ")


sizes = st.sampled_from((128, 512, 2048, 4096, 8192))
sqnrs = st.fixed_dictionaries({name: st.floats(10.0, 50.0) for name in KINDS})
parts_drawn = st.builds(part, sizes, sizes, st.lists(sizes, min_size=1, max_size=3), sqnrs)


@given(st.sampled_from(list(CHIPS.values())), parts_drawn, st.floats(10.0, 50.0), st.booleans())
def test_the_budget_is_met_and_no_uniform_choice_is_faster(profile, drawn, budget, host):
    formats = {rate.format for rate in profile.gemms}
    sites = [
        replace(s, options=tuple(o for o in s.options if o.gemm.format in formats))
        for s in drawn.sites
    ]
    drawn = Part(tuple(sites))
    search = Search([drawn], profile, budget, host)
    choice = search.run()
    for site, number in zip(drawn.sites, choice.chosen[0], strict=True):
        assert number in site.allowed(budget)
    for number in range(len(sites[0].options)):
        uniform = (number,) * len(sites)
        if all(site.options[number].sqnr >= budget for site in sites):
            assert choice.us <= (1 + SLACK) * search.us([uniform]) * (1 + 1e-9)


@given(st.sampled_from((H200, B200)), sizes, sizes, st.lists(sizes, min_size=2, max_size=2))
def test_the_descent_comes_near_the_best(profile, T, K, widths):
    """Of 4^6 choices, against all of them."""
    drawn = part(T, K, widths)
    search = Search([drawn], profile, 1.0, False)
    found = search._fastest_part(0, [1.0] * len(drawn.sites))
    best = min(search._score(0, each) for each in itertools.product(range(3), repeat=6))
    assert search._score(0, found) <= 1.01 * best


def test_planning_is_quick():
    started = time.perf_counter()
    run(EIGHT_B, host=True, budget=15.0)
    assert time.perf_counter() - started < 2.0


def test_distinct_keeps_the_first_and_the_best_rotation():
    first, plain, row, _ = EIGHT_B[0].sites[0].options
    better, near = replace(first, key="h16", sqnr=36.0), replace(first, key="h64", sqnr=33.5)
    assert distinct((first, near, better, plain, row)) == (first, better, plain, row)
    assert distinct((first, near, plain)) == (first, plain)
    assert distinct((first, replace(first, sqnr=first.sqnr))) == (first,)


def test_alike_parts_are_one_and_the_least_precision_counts():
    low = part(512, 512, (512,), SQNR | {"int8": 31.0})
    high = part(512, 512, (512,), SQNR | {"int8": 36.0})
    failing = part(512, 512, (512,), SQNR | {"int8": 29.0})
    merged, members = alike([high, failing, low], 30.0)
    assert members == [[0, 2], [1]] and [each.count for each in merged] == [2, 1]
    assert merged[0].sites[0].options[0].sqnr == 31.0
    assert merged[1] == failing


def test_candidates_cover_every_role():
    for name, pairs in (CANDIDATES | BLOCK_SCALED).items():
        assert set(pairs) == set(ROLES), name
    first = next(iter(CANDIDATES.values()))
    assert first == {role: RECIPES["auto"].rules(role) for role in ROLES}
    assert first == {role: RECIPES["int8_rotated"].rules(role) for role in ROLES}


@pytest.mark.parametrize("host", [True, False])
def test_launches_count_unless_captured(host):
    """Where launching dominates, fewer quantizers win over faster GEMMs."""
    busy = replace(H200, host=replace(H200.host, quantize_both=1e4, quantize_columns=1e4))
    parts = block(512, 1024, 2048, 256)
    choice = run(parts, busy, 15.0, host)
    assert (choice.us > 1e4) == host


@pytest.mark.parametrize("host", [True, False])
def test_a_step_counts_unless_captured(host):
    late = replace(H200, host=replace(H200.host, step=1e4))
    difference = run(block(512, 1024, 2048, 256), late, 15.0, host).us
    difference -= run(block(512, 1024, 2048, 256), H200, 15.0, host).us
    assert (difference > 8e3) == host and (host or difference == 0)
