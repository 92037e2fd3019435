"""The runs of `recipes.py` as a table on the terminal and as Markdown for docs/recipes.md."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe_records import (
    BASELINE,
    CONTROL,
    FINE_TUNING,
    FROM_SCRATCH,
    WORKLOADS,
    Record,
    Row,
    rows,
)
from rich.console import Console
from rich.table import Table
from saved_memory import share_of

import hadagraph

BEGIN = "<!-- results: written by bench/recipe_tables.py -->"
END = "<!-- end of results -->"
ROLES = ("output", "grad_input", "grad_weight")
NOTHING = "-"


@dataclass(frozen=True)
class Column:
    """A title, and what stands there for a row."""

    title: str
    cell: Callable[[Row], str]


def _number(value: float | None, form: str, factor: float = 1.0) -> str:
    return NOTHING if value is None else format(value * factor, form)


def _gap(row: Row) -> str:
    if row.recipe == BASELINE:
        return "baseline"
    if row.gap is None:
        return row.note.split(":")[0] or NOTHING
    gaps = list(row.gaps.values())
    span = f" ({100 * min(gaps):+.2f} to {100 * max(gaps):+.2f})" if len(gaps) > 1 else ""
    other = "" if row.baseline_same_call else " [1]"
    return f"{100 * row.gap:+.2f}{span}{other}"


def _parity(row: Row) -> str:
    if row.recipe == BASELINE or (row.parity is None and not row.missed):
        return NOTHING
    return "yes" if row.parity else "no" if row.parity is False else "no, by one seed"


def _time(ms: float | None, baseline: float | None) -> str:
    if ms is None or baseline is None:
        return _number(ms, ".1f")
    return f"{ms:.1f} ({baseline / ms:.2f}x)"


def _saved(row: Row) -> str:
    if row.saved_bytes is None or not row.saved_bytes_baseline:
        return _number(row.saved_bytes, ".0f", 2**-20)
    return f"{row.saved_bytes / 2**20:.0f} ({row.saved_bytes / row.saved_bytes_baseline:.2f})"


def _levels(role: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        if role not in row.sqnr:
            return NOTHING
        median, worst, _ = row.sqnr[role]
        return f"{median:.1f} / {worst:.1f}"

    return cell


def _lowered(row: Row) -> str:
    if row.gemms is None:
        return NOTHING
    emulated = f", {row.emulated} emulated" if row.emulated else ""
    return f"{row.lowered} of {row.gemms}{emulated}"


COLUMNS = (
    Column("recipe", lambda row: f"`{row.recipe}`"),
    Column("held-out loss", lambda row: _number(row.end, ".4f")),
    Column("gap, % of the improvement", _gap),
    Column("seeds", lambda row: str(len(row.gaps))),
    Column("parity", _parity),
    Column("ms a step (speedup)", lambda row: _time(row.ms, row.ms_baseline)),
    Column("device ms (speedup)", lambda row: _time(row.device_ms, row.device_ms_baseline)),
    Column("saved MiB (of bf16)", _saved),
    Column("peak GiB", lambda row: _number(row.peak_bytes, ".1f", 2**-30)),
    Column("compile s", lambda row: _number(row.compile_s, ".0f")),
    Column("GEMMs lowered", _lowered),
)
ERRORS = (
    Column("recipe", lambda row: f"`{row.recipe}`"),
    *(Column(role, _levels(role)) for role in ROLES),
    Column("worst site", lambda row: _worst_site(row)),
    Column("parity is missed: weakest", lambda row: _weakest(row)),
)


def _worst_site(row: Row) -> str:
    if not row.sqnr:
        return NOTHING
    role = min(row.sqnr, key=lambda name: row.sqnr[name][1])
    return f"{row.sqnr[role][2]}, {role}"


def _weakest(row: Row) -> str:
    """Of who misses parity: the role with the lowest median, and the Linears that are worst."""
    if not row.missed or row.weakest is None:
        return NOTHING
    linears, count, of = row.worst_linears[row.weakest]
    return f"{row.weakest}, most of all {linears} ({count} of the {of} worst)"


def _limits(found: list[Row]) -> str:
    """Which SQNR divides those that keep parity from those that miss it, in each one's weakest
    role; nothing where one of the two was not measured."""

    def weakest(row: Row) -> float:
        return row.sqnr[row.weakest][0] if row.weakest is not None else float("nan")

    kept = min((r for r in found if r.parity and r.sqnr), key=weakest, default=None)
    missed = max((r for r in found if r.missed and r.sqnr), key=weakest, default=None)
    if kept is None or missed is None:
        return ""
    return (
        f"By the median of its weakest role, the least precise recipe that keeps parity is "
        f"`{kept.recipe}` ({weakest(kept):.1f} dB, {kept.weakest}); the most precise one that "
        f"misses it is `{missed.recipe}` ({weakest(missed):.1f} dB, {missed.weakest})."
    )


def print_tables(records: list[Record]) -> None:
    """A table a workload, then what failed and why."""
    console = Console(width=180)
    for workload in WORKLOADS:
        found = rows(records, workload)
        if not found:
            continue
        columns = [c for c in COLUMNS if any(c.cell(row) != NOTHING for row in found)]
        table = Table(*(column.title for column in columns), title=workload)
        for row in found:
            table.add_row(*(column.cell(row).strip("`") for column in columns))
        console.print(table)
        for row in found:
            if row.note:
                console.print(f"{row.recipe}: {row.note}", markup=False)


def markdown(records: list[Record]) -> str:
    """The section on results: what ran, a table a workload, and the errors of the GEMMs."""
    parts = []
    titles = {
        FINE_TUNING: ("Fine-tuning", "recipes_loss.png"),
        FROM_SCRATCH: ("From scratch", "recipes_from_scratch.png"),
    }
    for workload in WORKLOADS:
        found = rows(records, workload)
        if not found:
            continue
        ours = [r for r in records if r["workload"] == workload]
        title, picture = titles[workload]
        parts.append(f"### {title}\n\n{_what_ran(ours)}\n\n![{title}]({picture})")
        parts.append(_table(COLUMNS, [row for row in found if _was_run(row)]))
        notes = [f"- `{row.recipe}`: {row.note}" for row in found if row.note]
        if notes:
            parts.append("\n".join(notes))
        if workload == FINE_TUNING and (absent := _not_run(found)):
            parts.append(f"Not run: {absent}.")
        if any(row.device_ms is not None for row in found):
            parts.append(
                "*ms a step*: wall time with the GPU to one process; *device ms*: the durations of "
                "its kernels by the profiler. Where the first is longer, the host bounds the step."
            )
        if not all(row.baseline_same_call for row in found):
            parts.append("[1] against the baseline of another call on the same kind of GPU.")
        measured = [row for row in found if row.sqnr]
        if measured:
            parts.append(
                "SQNR in dB of each GEMM at the first step, median / worst over the layers:\n\n"
                + _table(ERRORS, measured)
            )
            if limits := _limits(found):
                parts.append(limits)
    return "\n\n".join(parts) + "\n"


def _was_run(row: Row) -> bool:
    """Whether it was trained or timed: not only its errors measured."""
    return row.end is not None or row.ms is not None or bool(row.note)


def _not_run(found: list[Row]) -> str:
    """The recipes of hadagraph's table, and the control, that no run of these tried."""
    tried = {row.recipe for row in found if _was_run(row)}
    absent = [name for name in (*hadagraph.RECIPES, CONTROL) if name not in tried]
    return ", ".join(f"`{name}`" for name in absent)


def memory_markdown(content: dict[str, Any]) -> str:
    """The section on what is kept for the backward, from saved_memory.json."""
    settings, models = content["settings"], content["models"]
    names = [name for name in models["linears"] if "error" not in models["linears"][name]]
    what = (
        f"One `{settings['shape']}` block, {settings['batch']} x {settings['sequence']} tokens, "
        f"{content['device']}; shares of what Inductor keeps in bf16. *Linears*: the seven of "
        "the block, each with an input of its own, weights left out. *Block*: with attention, "
        "norms and the activation, whose inputs are kept in bf16."
    )
    lines = [
        "### Kept for the backward\n",
        f"{what}\n",
        "![Kept for the backward](recipes_memory.png)\n",
        "| recipe | " + " | ".join(models) + " |",
        "| --- |" + " --- |" * len(models),
    ]
    for name in sorted(names, key=lambda n: -share_of(models["linears"][n])):
        shares = [share_of(entries.get(name, {})) for entries in models.values()]
        cells = [NOTHING if share != share else f"{share:.3f}" for share in shares]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _what_ran(records: list[Record]) -> str:
    settings = records[-1]["settings"]
    devices = sorted({r["device"] for r in records if r["device"]})
    return (
        f"{settings['model']} on {settings['text']}, {settings['steps']} steps of "
        f"{settings['batch']} x {settings['sequence']} tokens, AdamW at {settings['lr']:g}, fp32 "
        f"weights, matmuls in {settings['dtype']}; {', '.join(devices)}."
    )


def _table(columns: tuple[Column, ...], found: list[Row]) -> str:
    """Markdown; a column in which nothing was measured is left out."""
    kept = [c for c in columns if any(c.cell(row) != NOTHING for row in found)]
    lines = [
        "| " + " | ".join(c.title for c in kept) + " |",
        "|" + " --- |" * len(kept),
        *("| " + " | ".join(c.cell(row) for c in kept) + " |" for row in found),
    ]
    return "\n".join(lines)


def insert(document: str, section: str) -> str:
    """The document with the section between the two marks, which are added at its end where they
    are missing."""
    if BEGIN not in document or END not in document:
        return f"{document.rstrip()}\n\n## Results\n\n{BEGIN}\n{section}{END}\n"
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{section}{END}{after}"


def main() -> int:
    """Command line: print the section, or write it into a document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="bench/results/recipes.json")
    parser.add_argument("--memory", type=Path, help="bench/results/saved_memory.json")
    parser.add_argument("--into", type=Path, help="a document with the two marks")
    args = parser.parse_args()
    section = markdown(json.loads(args.results.read_text())["runs"])
    if args.memory is not None:
        section += "\n" + memory_markdown(json.loads(args.memory.read_text()))
    if args.into is None:
        print(section)
    else:
        args.into.write_text(insert(args.into.read_text(), section))
    return 0


if __name__ == "__main__":
    sys.exit(main())
