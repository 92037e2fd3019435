"""Every recipe through the backend, on one Linear: its three GEMMs beside the system's formulas,
which stand in published_by_hand.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from models import VOCABULARY, DecoderBlock, decibels, tokens
from published_by_hand import SYSTEMS, clipped, had, mxfp4, nvfp4, unhad
from torch import nn

import hadagraph
from hadagraph import compat, seeds
from hadagraph.recipes import RECIPES, ROLES, load_recipe

pytestmark = pytest.mark.usefixtures("uncached")

T, K, N = 33, 64, 96
"""No block divides T: those along the tokens are padded."""
# Codes agree; what is left are sums of a hundred products in another order.
SAME_CODES_DB = 115
# Where rounding differs in the last bit before the codes, a few of them differ by one.
NEARLY_SAME_CODES_DB = 50
DRAWS = 24


def matrices(normal=False):
    """X, W and E with a huge token, a large feature and a token with a large gradient: multiples of
    powers of two, so that sums and rotations are exact in any order, or normal."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        if normal:
            return torch.randn(shape, generator=generator)
        return torch.randint(-8, 9, shape, generator=generator).float() / 4

    x, w, e = drawn(T, K), drawn(N, K) / 16, drawn(T, N) / 64
    x[3] *= 8
    x[:, 5] *= 4
    e[7] *= 4
    return x, w, e


class Trained:
    """A Linear whose three GEMMs are run as a recipe says."""

    def __init__(self, recipe, **options):
        torch._dynamo.reset()
        self.linear = nn.Linear(K, N, bias=False)
        options = {"executor": "eager", "debug": True, "recipe": recipe, **options}
        self.call = torch.compile(self.linear, backend="hadagraph", options=options)

    def __call__(self, x, w, e):
        """Y, dX, dW."""
        with torch.no_grad():
            self.linear.weight.copy_(w)
        self.linear.weight.grad = None
        x = x.clone().requires_grad_()
        y = self.call(x)
        y.backward(e)
        return y.detach(), x.grad, self.linear.weight.grad


def is_drawn(recipe, role):
    """Whether the GEMM of that role depends on random numbers."""
    rules = RECIPES[recipe].rules(role) or ()
    return any(rule.rounding == "stochastic" or rule.signs == "per_gemm" for rule in rules)


ONE_ANSWER = [(r, role) for r in SYSTEMS for role in ROLES if not is_drawn(r, role)]
DRAWN = [(r, role) for r in SYSTEMS for role in ROLES if is_drawn(r, role)]


def given_to(recipe):
    """Normal numbers, which have no ties, unless a rotation would round them before the codes."""
    compared = [RECIPES[r].rules(role) or () for r, role in ONE_ANSWER if r == recipe]
    rules = [rule for pair in compared for rule in pair]
    return matrices(
        normal=not any(rule.max_block or rule.outer_block or rule.tokens_kept for rule in rules)
    )


@dataclass
class Results:
    """What a Linear gave, each (Y, dX, dW): once, many times, and where parts of X, W and E are
    zero, all of X and E, or an element of each is inf or NaN."""

    once: Any
    drawn: list[Any]
    parts_zero: Any
    zero: Any
    bad: list[Any]


@cache
def results(recipe):
    seeds.restart()  # the same draws in any order of the tests
    with compat.without_caches():
        trained = Trained(recipe)
        given = given_to(recipe)
        draws = DRAWS if any(is_drawn(recipe, role) for role in ROLES) else 1
        drawn = [trained(*given) for _ in range(draws)]
        x, w, e = matrices()
        x[8:16], w[32:64], e[:, :16] = 0, 0, 0
        parts_zero = trained(x, w, e)
        zero = trained(torch.zeros(T, K), w, torch.zeros(T, N))
        bad = []
        for value in (float("inf"), float("nan")):
            x, w, e = matrices()
            x[2, 5], e[9, 6] = value, value
            bad.append(trained(x, w, e))
        return Results(drawn[0], drawn, parts_zero, zero, bad)


def test_every_recipe_has_its_formulas():
    assert set(SYSTEMS) == set(RECIPES) - {"auto"}


@pytest.mark.parametrize(("recipe", "role"), ONE_ANSWER)
def test_products_are_those_of_the_formulas(recipe, role):
    index, given = ROLES.index(role), given_to(recipe)
    got = results(recipe).once[index]
    want = SYSTEMS[recipe](*given, torch.Generator())[index]
    # The 8-bit kernels rotate without the factor of 1/sqrt(block), which the scale takes.
    floor = NEARLY_SAME_CODES_DB if recipe == "int8_rotated" else SAME_CODES_DB
    assert decibels(got, want) >= floor
    if RECIPES[recipe].rules(role):
        exact = SYSTEMS["bf16"](*given, torch.Generator())[index]
        assert decibels(got, exact) < 60, "nothing was quantized"


@cache
def drawn_by_hand(recipe):
    generator = torch.Generator().manual_seed(1)
    return [SYSTEMS[recipe](*given_to(recipe), generator) for _ in range(DRAWS)]


@pytest.mark.parametrize(("recipe", "role"), DRAWN)
def test_draws_have_the_formulas_mean_and_spread(recipe, role):
    index = ROLES.index(role)
    ours = torch.stack([products[index] for products in results(recipe).drawn])
    theirs = torch.stack([products[index] for products in drawn_by_hand(recipe)])
    variance = [each.var(0).mean() for each in (ours, theirs)]
    # Of thousands of elements, correlated by rows and columns: within 12 %.
    assert abs(variance[0] / variance[1] - 1) < 0.12
    # Each mean has variance / DRAWS around the true one.
    difference = (ours.mean(0) - theirs.mean(0)).square().mean()
    assert difference < 1.25 * (variance[0] + variance[1]) / DRAWS


UNBIASED = [(r, "grad_input") for r in ("hot", "hlq")] + [
    (r, role)
    for r in ("mxfp4_rht_sr", "quartet", "quartet2", "tetrajet")
    for role in ("grad_input", "grad_weight")
]


@pytest.mark.parametrize(("recipe", "role"), UNBIASED)
def test_gradients_are_unbiased(recipe, role):
    """Their mean is the exact product of E and what the forward made of the other operand."""
    index = ROLES.index(role)
    ours = torch.stack([products[index] for products in results(recipe).drawn])
    want = exact_gradients(recipe)[index]
    variance = ours.var(0).mean()
    assert (ours.mean(0) - want).square().mean() < 1.25 * variance / DRAWS


def exact_gradients(recipe):
    """The products with every stochastic rounding left out."""
    x, w, e = given_to(recipe)
    if recipe == "quartet":
        (xq, x_mask), (wq, w_mask) = clipped(x), clipped(w)
        return None, unhad(e @ wq * x_mask, 32, K), unhad(e.T @ xq * w_mask, 32, K)
    forward = {
        "tetrajet": lambda a: mxfp4(a, up=True),
        "quartet2": lambda a: nvfp4(a, four_six=True),
    }.get(recipe, lambda a: a)
    return None, e @ forward(w), e.T @ forward(x)


def test_two_draws_differ_and_the_same_seed_repeats_them():
    given, trained = matrices(), Trained("mxfp4_rht_sr")
    torch.manual_seed(5)
    first, second = trained(*given), trained(*given)
    torch.manual_seed(6)
    assert not torch.equal(trained(*given)[1], first[1])
    torch.manual_seed(5)
    again = trained(*given)
    assert not torch.equal(first[1], second[1])
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


# ------------------------------------------------------------------------------- outliers apart


def outliers(side, count, axis="kept"):
    rules = {"format": "mxfp4", "max_block": 32, side: {"outliers": count, "outlier_axis": axis}}
    return load_recipe({"name": "apart", "output": rules})


def largest(matrix, count):
    """Indices of the rows of largest rms."""
    return matrix.square().mean(1).topk(min(count, len(matrix))).indices


@pytest.mark.parametrize("count", [3, 1000])
def test_outliers_along_the_kept_dim_are_exact_rows(count):
    """AdaHOP: rows apart in high precision, the rest rotated and quantized without them."""
    x, w, e = matrices(normal=True)
    y, _, _ = Trained(outliers("left", count))(x, w, e)
    rest = x.clone()
    rest[largest(x, count)] = 0
    want = mxfp4(had(rest, 32)) @ mxfp4(had(w, 32)).T + (x - rest) @ w.T
    assert decibels(y, want) >= NEARLY_SAME_CODES_DB
    y, _, _ = Trained(outliers("right", count))(x, w, e)
    rest = w.clone()
    rest[largest(w, count)] = 0
    want = mxfp4(had(x, 32)) @ mxfp4(had(rest, 32)).T + x @ (w - rest).T
    assert decibels(y, want) >= NEARLY_SAME_CODES_DB


def test_outliers_along_the_contracted_dim_are_exact_columns():
    x, w, e = matrices(normal=True)
    y, _, _ = Trained(outliers("left", 3, "contracted"))(x, w, e)
    rest = x.clone()
    rest[:, largest(x.T, 3)] = 0
    want = mxfp4(had(rest, 32)) @ mxfp4(had(w, 32)).T + (x - rest) @ w.T
    assert decibels(y, want) >= NEARLY_SAME_CODES_DB


# ----------------------------------------------------------------------------------- edge cases


@pytest.mark.parametrize("recipe", SYSTEMS)
def test_zeros_inf_and_nan(recipe):
    """Zeros give zeros. inf and nan reach what depends on them: of X, its token's output and its
    feature's weight gradient; of E, its token's dX and its feature's dW."""
    y, dx, dw = results(recipe).parts_zero
    assert all(bool(each.isfinite().all()) for each in (y, dx, dw))
    assert not y[8:16].any() and not y[:, 32:64].any()
    assert not dw[:16].any()
    assert not any(each.any() for each in results(recipe).zero)
    for y, dx, dw in results(recipe).bad:
        for reached in (y[2], dx[9], dw[:, 5], dw[6]):
            assert not reached.isfinite().any()


# ---------------------------------------------------------------------------------- fine-tuning

STEPS = 12


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SYSTEMS)
def test_a_language_model_learns(recipe):
    """One Llama block between an embedding and a head, the same batch again and again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 128), DecoderBlock(), nn.Linear(128, VOCABULARY))
    ids = tokens()
    options = {"executor": "eager", "recipe": recipe}
    call = torch.compile(model, backend="hadagraph", options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    losses = []
    for _ in range(STEPS):
        logits = call(ids[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.5 * losses[0]
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    (report,) = hadagraph.report()
    assert recipe == "bf16" or any(site.lowered for site in report.sites)
