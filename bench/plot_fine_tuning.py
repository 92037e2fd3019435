"""Draw bench/results/fine_tuning.json: held-out loss of each way of training over the steps, one
line a seed. Measures nothing."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parent.parent
COLOURS = ("#4c72b0", "#dd8452", "#999999", "#55a868", "#c44e52")


def main() -> None:
    """Write docs/fine_tuning.png."""
    content = json.loads((ROOT / "bench/results/fine_tuning.json").read_text())
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for (way, runs), colour in zip(content["runs"].items(), COLOURS, strict=False):
        for number, run in enumerate(runs):
            points = [(point["step"], point["loss"]) for point in run["held_out"]]
            label = f"{way} ({len(runs)} seed{'s' * (len(runs) > 1)})" if number == 0 else None
            axes.plot(*zip(*points, strict=True), marker="o", ms=3, color=colour, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss, nats a token")
    axes.set_title(f"{content['model']} on {content['text']}, bf16, {content['device']}")
    axes.legend()
    figure.savefig(ROOT / "docs/fine_tuning.png", dpi=120)


if __name__ == "__main__":
    main()
