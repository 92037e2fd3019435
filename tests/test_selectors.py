"""What a calibration changes in the rules of a recipe: AdaHOP's table of patterns, HOT's choice of
granularity, and how a plan carries it out."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

import hadagraph
from hadagraph import selectors
from hadagraph.encode import decode_reference, encode_reference, transformed
from hadagraph.formats import PER_KEPT_INDEX, PER_TENSOR, Encoding
from hadagraph.profile import Profile, SiteStatistics
from hadagraph.recipes import OPERANDS, RECIPES, ROLES
from hadagraph.selectors import ADAHOP_OUTLIERS, pattern_pair, select_rules
from hadagraph.statistics import observed, site_statistics

M, N, C = 96, 80, 64


def seen(role: str, a: torch.Tensor, b: torch.Tensor) -> SiteStatistics:
    sums, maxima = observed(a, b, a @ b.t())
    sizes = a.shape[0], b.shape[0], a.shape[1]
    site = site_statistics("x", role, OPERANDS[role], sizes, sums, maxima)
    assert site is not None
    return site


def matrix(rows: int, letter: str, seed: int) -> torch.Tensor:
    """[rows, C] with outliers in rows (R), columns (C) or none (N)."""
    x = torch.randn(rows, C, generator=torch.Generator().manual_seed(seed))
    if letter != "N":
        x.select("RC".index(letter), 5).mul_(30)
    return x


def with_letters(letters: str, role: str = "output") -> SiteStatistics:
    """A site whose product A [M, C] B [C, N] has outliers as the letters say."""
    left, right = letters
    transposed = {"R": "C", "C": "R", "N": "N"}[right]
    return seen(role, matrix(M, left, 1), matrix(N, transposed, 2))


# The table of arXiv 2604.02525: which operand gives its outliers away, by the pair of patterns.
ADAHOP = {
    "RR": None, "CR": None, "CN": None, "NR": None, "NN": None,
    "RN": "left", "RC": "right", "NC": "right", "CC": "right",
}  # fmt: skip


@pytest.mark.parametrize("letters", ADAHOP)
@pytest.mark.parametrize("role", ROLES)
def test_the_table_of_adahop(letters, role):
    site = with_letters(letters, role)
    assert pattern_pair(site) == letters
    pair, why = select_rules(RECIPES["adahop"], role, site)
    left, right = RECIPES["adahop"].rules(role)
    expected = {
        None: (left, right),
        "left": (replace(left, outliers=ADAHOP_OUTLIERS), right),
        "right": (left, replace(right, outliers=ADAHOP_OUTLIERS)),
    }[ADAHOP[letters]]
    assert pair == expected
    assert why == f"pattern {letters}"
    assert all(rule.outlier_axis == "kept" for rule in pair)


@pytest.mark.parametrize("letters", ADAHOP)
def test_level_2_leaves_one_pair_in_high_precision(letters):
    site = with_letters(letters)
    pair, why = select_rules(RECIPES["adahop_lv2"], "output", site)
    if letters == "CC":
        assert pair is None
        assert "CC" in why
    else:
        assert pair == select_rules(RECIPES["adahop"], "output", site)[0]


@pytest.mark.parametrize("factor", [1.0, 2.0, 10.0, 100.0])
def test_lqs_takes_scales_per_token_where_they_halve_the_error(factor):
    e = matrix(M, "N", 3)
    e[:4] *= factor  # a few tokens with large gradients
    site = seen("grad_input", e, matrix(N, "N", 4))
    (left, right), why = select_rules(RECIPES["hot"], "grad_input", site)
    token, tensor = (squared_error(e, f"int4/{g}/h16/stochastic") for g in GRANULARITIES)
    assert left == replace(
        RECIPES["hot"].grad_input[0],
        granularity=PER_KEPT_INDEX if token < 0.5 * tensor else PER_TENSOR,
    )
    assert right == RECIPES["hot"].grad_input[1]
    assert "of that per tensor" in why


GRANULARITIES = ("per_kept_index", "per_tensor")


def squared_error(x: torch.Tensor, text: str) -> float:
    encoding = Encoding.parse(text)
    made = encode_reference(x, encoding, 1, torch.tensor([3]))
    got = decode_reference(made, encoding, 1, x.shape[1], torch.float32)
    return float((got - transformed(x, encoding, 1, None)).square().sum())


def test_lqs_is_about_grad_input_only():
    site = with_letters("RN", "grad_weight")
    assert select_rules(RECIPES["hot"], "grad_weight", site) == (RECIPES["hot"].grad_weight, "")
    assert select_rules(RECIPES["hot"], "output", site) == (None, "")


@pytest.mark.parametrize("name", ["adahop", "hot"])
def test_without_a_calibration_the_rules_stand_and_it_is_said_once(name, caplog):
    selectors._log_default.cache_clear()
    with caplog.at_level(logging.WARNING, "hadagraph"):
        for _ in range(3):
            pair, why = select_rules(RECIPES[name], "grad_input", None)
    assert (pair, why) == (RECIPES[name].grad_input, "")
    assert caplog.text.count(f"recipe {name} chooses by a calibration") == 1


def test_other_recipes_take_nothing_from_a_calibration():
    site = with_letters("RN")
    for name in ("int8_rotated", "nvfp4", "bf16"):
        assert select_rules(RECIPES[name], "output", site) == (RECIPES[name].output, "")


def test_a_plan_carries_the_selection_out(uncached):
    torch.manual_seed(0)
    linear = nn.Linear(C, N, bias=False)
    x = matrix(M, "R", 1).requires_grad_()

    def mean_square(out: torch.Tensor) -> torch.Tensor:
        return out.square().mean()

    profile = hadagraph.calibrate(linear, [x], loss=mean_square)
    options = {"recipe": "adahop", "profile": profile}
    (report,) = hadagraph.explain(linear, x, options=options).reports
    for decision in report.plan.decisions:
        site = profile.site(decision.site.name, decision.site.role, OPERANDS[decision.site.role][0])
        taken = ADAHOP[pattern_pair(site)]
        kinds = OPERANDS[decision.site.role]
        outliers = {
            decision.site.lhs: decision.lhs.outliers,
            decision.site.rhs: decision.rhs.outliers,
        }
        expected = [ADAHOP_OUTLIERS * (taken == side) for side in ("left", "right")]
        assert [outliers[kind] for kind in kinds] == expected
        assert decision.why == f"pattern {pattern_pair(site)}"
    forward = report.plan.decisions[0]
    assert (forward.lhs.outliers, forward.rhs.outliers) == (ADAHOP_OUTLIERS, 0)
    (without,) = hadagraph.explain(linear, x, options={"recipe": "adahop"}).reports
    assert not any(d.lhs.outliers or d.rhs.outliers for d in without.plan.decisions)


def test_a_profile_of_another_model_changes_nothing(uncached):
    options = {"recipe": "adahop", "profile": Profile()}
    (report,) = hadagraph.explain(nn.Linear(C, N), matrix(M, "R", 1), options=options).reports
    assert not any(d.lhs.outliers for d in report.plan.decisions)
