"""Draw bench/results/recipes.json and saved_memory.json for docs/recipes.md: how far each recipe
ends from bf16, the curves from scratch, and what is kept for the backward. Measures nothing."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from recipe_records import (
    ALLOWED_GAP,
    BASELINE,
    FINE_TUNING,
    FROM_SCRATCH,
    TRAINING,
    Record,
    Row,
    rows,
)
from saved_memory import BASELINE as INDUCTOR
from saved_memory import share_of

ROOT = Path(__file__).resolve().parent.parent
OURS, OTHERS, FAR = "#dd8452", "#4c72b0", "#c44e52"
OURSELVES = ("int8_rotated", "auto")


def colour(row: Row) -> str:
    """Ours, within the allowed gap, or beyond it."""
    if row.recipe.split()[0] in OURSELVES:
        return OURS
    return OTHERS if row.gap is not None and row.gap <= ALLOWED_GAP else FAR


def draw_gaps(records: list[Record], path: Path) -> None:
    """A line a recipe of the fine-tuning, a point a seed; what diverged stands at the edge."""
    found = [row for row in rows(records, FINE_TUNING) if row.recipe != BASELINE]
    found = [row for row in found if row.gaps or row.note.startswith("diverged")][::-1]
    figure, axes = pyplot.subplots(figsize=(7, 1 + 0.24 * len(found)), layout="constrained")
    axes.axvspan(-100 * ALLOWED_GAP, 100 * ALLOWED_GAP, color="#eeeeee", zorder=0)
    axes.axvline(0, color="#888888", lw=0.8)
    widest = max((100 * gap for row in found for gap in row.gaps.values()), default=1.0)
    for height, row in enumerate(found):
        gaps = [100 * gap for gap in row.gaps.values()]
        axes.plot(gaps, [height] * len(gaps), "o", ms=4, color=colour(row))
        if not gaps:
            axes.annotate(row.note.split(";")[0], (0, height), va="center", fontsize=7)
    axes.set_xscale("symlog", linthresh=1.0)
    axes.set_xlim(right=max(10.0, 1.5 * widest))
    axes.set_yticks(range(len(found)), [row.recipe for row in found], fontsize=8)
    axes.set_xlabel("gap to bf16, % of its improvement (a point a seed; grey: allowed)")
    axes.set_title("Fine-tuning: held-out loss after the last step", fontsize=10)
    _save(figure, path)


def draw_curves(records: list[Record], path: Path) -> None:
    """Held-out loss over the steps of the training from scratch."""
    ours = [r for r in records if (r["workload"], r["kind"]) == (FROM_SCRATCH, TRAINING)]
    curves = {r["recipe"]: r for r in ours if r.get("held_out")}
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for number, (recipe, record) in enumerate(sorted(curves.items(), key=_end)):
        points = [(step, loss) for step, loss in record["held_out"][1:] if loss is not None]
        style = {"color": "black", "lw": 2} if recipe == BASELINE else {"color": f"C{number}"}
        if points:
            ended = f"{points[-1][1]:.3f}"
            axes.plot(*zip(*points, strict=True), label=f"{recipe}: {ended}", **style)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss, nats a byte")
    axes.set_title("From scratch", fontsize=10)
    axes.legend(fontsize=8)
    _save(figure, path)


def _end(item: tuple[str, Record]) -> float:
    end = item[1]["end"]
    return float("inf") if end is None else float(end)


def draw_memory(content: dict[str, Any], path: Path) -> None:
    """Bytes kept for the backward as shares of bf16: the linears' and a whole block's."""
    models = {which: entries for which, entries in content["models"].items() if entries}
    names = dict.fromkeys(n for e in models.values() for n in e if n != INDUCTOR)
    order = sorted(names, key=lambda n: -_known(share_of(models["linears"].get(n, {}))))
    figure, axes = pyplot.subplots(figsize=(7, 1 + 0.28 * len(order)), layout="constrained")
    for number, (which, entries) in enumerate(models.items()):
        shares = [_known(share_of(entries.get(name, {}))) for name in order]
        heights = [height + 0.38 * (number - 0.5) for height in range(len(order))]
        label = {"linears": "seven linears, own inputs", "block": "whole block"}[which]
        axes.barh(heights, shares, height=0.36, label=label, color=(OTHERS, "#bbbbbb")[number])
    axes.axvline(1, color="#888888", lw=0.8)
    axes.margins(y=0.01)
    axes.set_yticks(range(len(order)), order, fontsize=8)
    axes.set_xlabel("bytes kept for the backward, share of bf16")
    axes.legend(fontsize=8)
    _save(figure, path)


def _known(share: float) -> float:
    return 0.0 if share != share else share


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Write the pictures of what is there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--results", type=Path, default=ROOT / "bench/results/recipes.json")
    add("--memory", type=Path, default=ROOT / "bench/results/saved_memory.json")
    add("--docs", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    if args.results.exists():
        records = json.loads(args.results.read_text())["runs"]
        draw_gaps(records, args.docs / "recipes_loss.png")
        if any(r["workload"] == FROM_SCRATCH for r in records):
            draw_curves(records, args.docs / "recipes_from_scratch.png")
    if args.memory.exists():
        draw_memory(json.loads(args.memory.read_text()), args.docs / "recipes_memory.png")


if __name__ == "__main__":
    main()
