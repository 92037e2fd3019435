"""The runs of `recipes.py` as a table on the terminal and as Markdown for docs/recipes.md."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe_records import BASELINE, FINE_TUNING, FROM_SCRATCH, WORKLOADS, Record, Row, rows
from rich.console import Console
from rich.table import Table
from saved_memory import share_of

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
    if row.recipe == BASELINE or row.parity is None:
        return NOTHING
    return "yes" if row.parity else "no"


def _time(row: Row) -> str:
    if row.ms is None or row.ms_baseline is None:
        return _number(row.ms, ".1f")
    return f"{row.ms:.1f} ({row.ms_baseline / row.ms:.2f}x)"


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
    Column("ms a step (speedup)", _time),
    Column("saved MiB (of bf16)", _saved),
    Column("peak GiB", lambda row: _number(row.peak_bytes, ".1f", 2**-30)),
    Column("compile s", lambda row: _number(row.compile_s, ".0f")),
    Column("GEMMs lowered", _lowered),
)
ERRORS = (
    Column("recipe", lambda row: f"`{row.recipe}`"),
    *(Column(role, _levels(role)) for role in ROLES),
    Column("worst site", lambda row: _worst_site(row)),
)


def _worst_site(row: Row) -> str:
    if not row.sqnr:
        return NOTHING
    role = min(row.sqnr, key=lambda name: row.sqnr[name][1])
    return f"{row.sqnr[role][2]}, {role}"


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
        parts.append(_table(COLUMNS, found))
        notes = [f"- `{row.recipe}`: {row.note}" for row in found if row.note]
        if notes:
            parts.append("\n".join(notes))
        if not all(row.baseline_same_call for row in found):
            parts.append("[1] against the baseline of another call on the same kind of GPU.")
        measured = [row for row in found if row.sqnr]
        if measured:
            parts.append(
                "SQNR in dB of each GEMM at the first step, median / worst over the layers:\n\n"
                + _table(ERRORS, measured)
            )
    return "\n\n".join(parts) + "\n"


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
