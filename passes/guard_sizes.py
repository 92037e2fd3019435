"""Keep a plan that was made for one value of a symbolic size to the range in which it is good: find
where another would be clearly faster by the predictions, and guard the range. Changes no graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import sympy
import torch
from torch import fx

from hadagraph import auto, selection
from hadagraph.alternatives import alternatives
from hadagraph.auto import HIGH_PRECISION
from hadagraph.compat import size_bounds, static_hint, symbolic_size
from hadagraph.cost import Gemm
from hadagraph.device import DeviceProfile
from hadagraph.graph import arguments, gemms
from hadagraph.plan import Plan
from hadagraph.profile import Profile

log = logging.getLogger(__name__)
LARGEST = 1 << 24
"""A plan that holds up to here is taken to hold beyond."""
STRIDE = 4
"""Factor between the sizes that are tried before a change of the plan is located exactly."""
LEAST_LOSS = 0.03
"""A plan is kept for sizes at which the best would take less by up to this: fewer compilations."""


def guard_sizes(
    graph: fx.Graph,
    plan: Plan,
    undecided: Plan,
    profile: DeviceProfile,
    *,
    budget: float,
    statistics: Profile | None = None,
    host: bool = True,
    fused: bool = True,
    never_slower: bool = True,
) -> Plan:
    """The plan with a note of the sizes that it holds for, which are guarded from here on: other
    sizes compile anew. A graph without symbolic sizes is left alone.

    undecided: the plan before `choose_precision`; the other arguments as there and in
    `never_slower`. Where GEMMs depend on several symbols in different ways, each has its range with
    the others as they were traced. To be called as long as the shape environment takes guards.
    """
    found = _symbolic_sizes(graph)
    if not found:
        return plan
    parts = alternatives(
        graph,
        undecided,
        profile,
        budget=budget,
        statistics=statistics,
        fused=fused,
        size_of=symbolic_size,
    ).parts
    variables = _variables(parts, found)
    hints = {e: static_hint(size) for e, size in found.items() if isinstance(e, sympy.Symbol)}
    texts = []
    for variable in variables:
        size = found[variable]

        def search(value: int, variable: sympy.Expr = variable) -> auto.Search:
            valued = [auto.with_sizes(part, _valuation(variable, value, hints)) for part in parts]
            return auto.Search(valued, profile, budget, host)

        wanted = _decided(search(static_hint(size)), never_slower)

        def holds(value: int, wanted: list[auto.Choices] = wanted) -> bool:
            there = search(value)
            best = _decided(there, never_slower)
            return best == wanted or there.us(wanted) <= (1 + LEAST_LOSS) * there.us(best)

        low, high = _range(holds, static_hint(size), *size_bounds(size))
        texts.append(_guard(size, variable, low, high))
    note = "the plan holds for " + ", ".join(texts) if texts else ""
    log.info(note)
    return replace(plan, note="\n".join(filter(None, (plan.note, note))))


def _symbolic_sizes(graph: fx.Graph) -> dict[sympy.Expr, torch.SymInt]:
    """Every symbolic size of the graph's inputs and GEMM operands that had a value when it was
    traced, by its expression."""
    found: dict[sympy.Expr, torch.SymInt] = {}
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    for gemm in gemms(graph):
        nodes += [each for each in arguments(gemm)[:2] if isinstance(each, fx.Node)]
    for node in nodes:
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
        for size in sizes:
            if isinstance(size, torch.SymInt) and size.node.has_hint():
                found.setdefault(symbolic_size(size), size)
    return found


def _variables(
    parts: Sequence[auto.Part], found: Mapping[sympy.Expr, torch.SymInt]
) -> list[sympy.Expr]:
    """What the GEMMs' sizes are functions of: one symbol, one expression, or several symbols."""
    expressions = {
        size
        for part in parts
        for site in part.sites
        for size in _sizes(site.options[0].gemm)
        if isinstance(size, sympy.Expr)
    }
    symbols = sorted({s for e in expressions for s in e.free_symbols}, key=str)
    known = [symbol for symbol in symbols if symbol in found]
    if len(symbols) > 1 and len(expressions) == 1 and expressions <= found.keys():
        return list(expressions)
    return known


def _sizes(gemm: Gemm) -> list[object]:
    matrices = [use.matrix for use in gemm.uses]
    return [gemm.M, gemm.N, gemm.C, *(size for each in matrices for size in (each.T, each.K))]


def _valuation(
    variable: sympy.Expr, value: int, hints: Mapping[sympy.Symbol, int]
) -> Callable[[int | sympy.Expr], int]:
    """Sizes where one variable has a value and other symbols are as traced (1 without a value)."""

    def valued(size: int | sympy.Expr) -> int:
        if isinstance(size, int):
            return size
        rest = size.subs(variable, value)
        return int(rest.subs({symbol: hints.get(symbol, 1) for symbol in rest.free_symbols}))

    return valued


def _decided(search: auto.Search, never_slower: bool) -> list[auto.Choices]:
    """The options of every part, high precision where `never_slower` gives a GEMM back."""
    chosen = search.choices()
    if not never_slower or search.profile is None:
        return chosen
    left = [_lowered(part, numbers) for part, numbers in zip(search.parts, chosen, strict=True)]
    counts: dict[selection.Part, int] = {}
    for part, alone in zip(search.parts, left, strict=True):
        counts[alone] = counts.get(alone, 0) + part.count
    distinct = [replace(part, count=count) for part, count in counts.items() if part.candidates]
    lowered = selection.Search(distinct, search.profile, search.host).run().lowered
    kept = {replace(p, count=1): found for p, found in zip(distinct, lowered, strict=True)}
    return [
        _without(numbers, kept.get(alone, frozenset()))
        for numbers, alone in zip(chosen, left, strict=True)
    ]


def _without(chosen: auto.Choices, kept: selection.Lowered) -> auto.Choices:
    """The options of those GEMMs alone that are kept, counted among the lowered."""
    places = [index for index, number in enumerate(chosen) if number != HIGH_PRECISION]
    places = [index for count, index in enumerate(places) if count in kept]
    return tuple(
        number if index in places else HIGH_PRECISION for index, number in enumerate(chosen)
    )


def _lowered(part: auto.Part, chosen: auto.Choices) -> selection.Part:
    """The chosen options as `never_slower` sees them."""
    return selection.Part(
        tuple(
            selection.Candidate(site.options[number].gemm, site.role, site.linear, site.asked)
            for site, number in zip(part.sites, chosen, strict=True)
            if number != HIGH_PRECISION
        )
    )


def _range(
    holds: Callable[[int], bool], start: int, least: int, most: int | None
) -> tuple[int, int | None]:
    """The range around `start`, within (least, most), that holds; None: without an end."""
    low, below = start, max(least, 1)
    while low > below:
        tried = max(below, low // STRIDE)
        if not holds(tried):
            low = _last(holds, low, tried)
            break
        low = tried
    high, above = start, LARGEST if most is None else min(most, LARGEST)
    while high < above:
        tried = min(above, high * STRIDE)
        if not holds(tried):
            return low, _last(holds, high, tried)
        high = tried
    return low, None if most is None or most > LARGEST else most


def _last(holds: Callable[[int], bool], inside: int, outside: int) -> int:
    """The last size, from one at which it holds towards one at which it does not, at which it
    holds; by bisection."""
    while abs(outside - inside) > 1:
        middle = (inside + outside) // 2
        if holds(middle):
            inside = middle
        else:
            outside = middle
    return inside


def _guard(size: torch.SymInt, variable: sympy.Expr, low: int, high: int | None) -> str:
    """Let the compiled code be used within the range only; the range as text."""
    least, most = size_bounds(size)
    if low > least:
        torch._check(size >= low)
    if high is not None and (most is None or high < most):
        torch._check(size <= high)
    return f"{low} <= {variable}" + ("" if high is None else f" <= {high}")
