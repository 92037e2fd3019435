"""Shows a comparison: a table, a picture and a JSON file; measures nothing itself."""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from finetuning.backends import HADAGRAPH, INDUCTOR, Lowering
from finetuning.training import RunResult, Settings

TITLES = {INDUCTOR: "Inductor", HADAGRAPH: "hadagraph"}


@dataclass(frozen=True)
class Comparison:
    """Everything the demo found out. `lowering` is None where hadagraph did not run."""

    model: str
    text: str
    settings: Settings
    runs: tuple[RunResult, ...]
    lowering: Lowering | None

    @property
    def emulated(self) -> bool:
        """Whether hadagraph's kernels ran as their plain-PyTorch references."""
        return not self.settings.device.startswith("cuda")

    @property
    def gap_share(self) -> float | None:
        """(hadagraph's end - Inductor's end) / (start - Inductor's end); None unless both ran."""
        ran = {run.backend: run for run in self.runs}
        if len(ran) < 2 or ran[INDUCTOR].start == ran[INDUCTOR].end:
            return None
        baseline = ran[INDUCTOR]
        return (ran[HADAGRAPH].end - baseline.end) / (baseline.start - baseline.end)


def device_name(device: str) -> str:
    """The GPU's name, or the processor's architecture."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def show(comparison: Comparison, console: Console) -> None:
    """Print the table."""
    settings = comparison.settings
    table = Table(
        title=f"{comparison.model} on {comparison.text}: {settings.steps} steps of "
        f"{settings.batch}x{settings.sequence} tokens, {settings.dtype}, "
        f"{device_name(settings.device)}",
        caption=_caption(comparison),
    )
    table.add_column()
    for run in comparison.runs:
        table.add_column(TITLES[run.backend], justify="right")
    for name, cell in _rows(comparison):
        table.add_row(name, *(cell(run) for run in comparison.runs))
    console.print(table)


Cell = Callable[[RunResult], str]


def _rows(comparison: Comparison) -> list[tuple[str, Cell]]:
    emulated = " (emulated)" if comparison.emulated else ""
    rows: list[tuple[str, Cell]] = [
        ("held-out loss, start", lambda run: f"{run.start:.4f}"),
        ("held-out loss, end", lambda run: f"{run.end:.4f}"),
        ("improvement", lambda run: f"{run.start - run.end:.4f}"),
    ]
    if comparison.gap_share is not None:
        gap = f"{100 * comparison.gap_share:+.2f} %"
        rows.append(("gap, share of Inductor's improvement", _only_hadagraph(gap)))
    if comparison.lowering is not None:
        found = comparison.lowering
        count = str(found.lowered)
        rows.append((f"matmuls lowered ({comparison.settings.recipe})", _only_hadagraph(count)))
        for role, levels in found.sqnr_db.items():
            if levels:
                level = f"{statistics.median(levels):.1f} ({min(levels):.1f}) dB"
                rows.append((f"SQNR of {role}, median (worst)", _only_hadagraph(level)))
    rows += [
        ("saved for backward", lambda run: _mebibytes(run.saved_bytes)),
        (
            "time per step, median",
            lambda run: _seconds(run.median_step_s) + (emulated if _is_ours(run) else ""),
        ),
        ("first step, with compilation", lambda run: _seconds(run.first_step_s)),
    ]
    if not comparison.emulated:
        rows.append(("peak memory", lambda run: _mebibytes(run.peak_memory_bytes)))
    return rows


def _caption(comparison: Comparison) -> str:
    how = {
        "plain": "Held-out loss: the trained weights, run without compiling.",
        "compiled": "Held-out loss: the trained weights, run through each backend.",
    }[comparison.settings.evaluate]
    if comparison.emulated and comparison.lowering is not None:
        how += " Emulated: 8-bit kernels run as plain PyTorch here, exact in value but slow."
    return how


def _is_ours(run: RunResult) -> bool:
    return run.backend == HADAGRAPH


def _only_hadagraph(text: str) -> Cell:
    return lambda run: text if _is_ours(run) else "-"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def _mebibytes(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / 2**20:.1f} MiB"


def write_json(comparison: Comparison, path: Path) -> None:
    """Every figure with its settings, device and versions."""
    content = {
        "model": comparison.model,
        "text": comparison.text,
        "settings": dataclasses.asdict(comparison.settings),
        "device": device_name(comparison.settings.device),
        "emulated": comparison.emulated,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "runs": [
            {
                **dataclasses.asdict(run),
                "median_step_s": run.median_step_s,
                "first_step_s": run.first_step_s,
            }
            for run in comparison.runs
        ],
        "gap_share": comparison.gap_share,
        "lowered": comparison.lowering.lowered if comparison.lowering else None,
        "sqnr_db": comparison.lowering.sqnr_db if comparison.lowering else None,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def draw(comparison: Comparison, path: Path) -> None:
    """Train losses as lines and held-out losses as points, one colour a backend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    styles = {INDUCTOR: ("tab:gray", "-", "o"), HADAGRAPH: ("tab:orange", "--", "x")}
    for run in comparison.runs:
        colour, line, marker = styles[run.backend]
        steps = range(1, len(run.train_loss) + 1)
        title = TITLES[run.backend]
        axes.plot(steps, run.train_loss, line, color=colour, linewidth=1.2, label=f"{title}, train")
        axes.scatter(
            [point.step for point in run.held_out],
            [point.loss for point in run.held_out],
            color=colour,
            marker=marker,
            s=60,
            zorder=3,
            label=f"{title}, held out",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(
        f"{comparison.model} on {comparison.text}, recipe {comparison.settings.recipe}, seed "
        f"{comparison.settings.seed}"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
