"""What a set of training runs with different recipes said: one JSON file a run, which of them are
done, how they merge into one file, and the table made of that. Trains nothing."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FINE_TUNING, FROM_SCRATCH = "fine_tuning", "from_scratch"
WORKLOADS = (FINE_TUNING, FROM_SCRATCH)
TRAINING, TIME, SQNR = "training", "time", "sqnr"
KINDS = (TRAINING, TIME, SQNR)
BASELINE = "bf16"
CONTROL = "control: 10 dB gradients"
FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"
ALLOWED_GAP = 0.02  # of the baseline's improvement

Record = dict[str, Any]


# -------------------------------------------------------------------------- one file a run


def file_name(record: Record) -> str:
    """Of a run's file: what it was and the call that it belongs to."""
    recipe = "".join(c if c.isalnum() or c in "_-" else "-" for c in record["recipe"])
    parts = [record["workload"], recipe, record["kind"], f"s{record['seed']}", record["call"]]
    if record["kind"] == TIME:
        parts.append(f"gpu{record['gpu']}")
    return "_".join(parts) + ".json"


def keep(record: Record, folder: Path) -> Path:
    """Write one run's file, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(record)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(finite(record), indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)
    return path


def finite(value: Any) -> Any:
    """The same with None for what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return value


def load(folder: Path) -> list[Record]:
    """Every run of a folder: files of one run, and merged files of earlier calls."""
    records: list[Record] = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and "runs" in content:
            records += content["runs"]
        elif isinstance(content, dict) and content.get("kind") in KINDS:
            records.append(content)
    return merged(records)


def merged(records: Iterable[Record]) -> list[Record]:
    """One record a run of each call: what finished wins over what failed, then the later one."""
    best: dict[str, Record] = {}
    for record in records:
        name = file_name(record) + json.dumps(record["settings"], sort_keys=True)
        if name not in best or record["status"] != FAILED or best[name]["status"] == FAILED:
            best[name] = record
    return sorted(best.values(), key=lambda r: (r["workload"], r["kind"], r["call"], r["recipe"]))


def is_done(
    records: Iterable[Record], workload: str, kind: str, recipe: str, seed: int, settings: Any
) -> bool:
    """Whether some call finished this run with these settings. What failed is run again."""
    wanted = (workload, kind, recipe, seed, json.loads(json.dumps(settings)))
    return any(
        (r["workload"], r["kind"], r["recipe"], r["seed"], r["settings"]) == wanted
        and r["status"] != FAILED
        for r in records
    )


# -------------------------------------------------------------------------- figures


def gap_share(run: Record, baseline: Record) -> float | None:
    """(run's end - baseline's end) / (baseline's start - baseline's end), in held-out loss; None
    where the run has no end."""
    if run["end"] is None or baseline["end"] is None:
        return None
    return float((run["end"] - baseline["end"]) / (baseline["start"] - baseline["end"]))


def baseline_of(run: Record, records: Iterable[Record]) -> Record | None:
    """The baseline of the same seed and settings: that of the same call, or else the latest one on
    the same device."""
    alike = [
        r
        for r in records
        if (r["kind"], r["recipe"], r["status"]) == (run["kind"], BASELINE, FINISHED)
        and r["workload"] == run["workload"]
        and r["settings"] == run["settings"]
        and r["seed"] == run["seed"]
        and r["device"] == run["device"]
    ]
    same_call = [r for r in alike if r["call"] == run["call"]]
    return max(same_call or alike, key=lambda r: r["call"], default=None)


@dataclass(frozen=True)
class Row:
    """One recipe of one workload. Losses in nats a token, times in ms, sizes in bytes; None where
    nothing was measured.

    gaps: by seed, shares of the baseline's improvement. difference: mean end minus the baseline's.
    spread: the baseline's range of ends over its seeds. ms, ms_baseline: medians of steps measured
    with the GPU to itself; device_ms, device_ms_baseline: their kernels alone. sqnr: role ->
    (median, worst, worst site). worst_linears: role -> which Linears, by the last name of their
    path, are commonest in the worst tenth of the sites, how many of them, and of how many.
    """

    workload: str
    recipe: str
    gaps: dict[int, float]
    start: float | None
    end: float | None
    difference: float | None
    spread: float | None
    baseline_same_call: bool
    ms: float | None
    ms_baseline: float | None
    device_ms: float | None
    device_ms_baseline: float | None
    compile_s: float | None
    calibration_s: float | None
    saved_bytes: int | None
    saved_bytes_baseline: int | None
    peak_bytes: int | None
    lowered: int | None
    gemms: int | None
    emulated: int | None
    sqnr: dict[str, tuple[float, float, str]]
    worst_linears: dict[str, tuple[str, int, int]]
    note: str

    @property
    def gap(self) -> float | None:
        """The mean over the seeds."""
        return statistics.mean(self.gaps.values()) if self.gaps else None

    @property
    def parity(self) -> bool | None:
        """At most ALLOWED_GAP of the improvement, and no further off than the baseline's own
        seeds are from each other; None with fewer than two seeds."""
        if self.note.startswith(DIVERGED):
            return False
        if self.gap is None or self.difference is None or not self.spread or len(self.gaps) < 2:
            return None
        return self.gap <= ALLOWED_GAP and self.difference <= self.spread

    @property
    def missed(self) -> bool:
        """Whether it is no parity, or its one seed is already further off than parity allows."""
        beyond = self.gap is not None and self.gap > ALLOWED_GAP
        return self.recipe != BASELINE and (self.parity is False or beyond)

    @property
    def weakest(self) -> str | None:
        """The role whose matmuls have the lowest median SQNR; None where none was measured."""
        return min(self.sqnr, key=lambda role: self.sqnr[role][0], default=None)


def rows(records: list[Record], workload: str) -> list[Row]:
    """A row a recipe, the baseline first, the others from the smallest gap to the largest."""
    names = {r["recipe"]: None for r in records if r["workload"] == workload}
    made = [_row([r for r in records if r["workload"] == workload], workload, n) for n in names]

    def order(row: Row) -> tuple[bool, bool, float]:
        gap = row.gap
        return row.recipe != BASELINE, gap is None, 0.0 if gap is None else gap

    return sorted(made, key=order)


def _row(records: list[Record], workload: str, recipe: str) -> Row:
    ours = [r for r in records if r["recipe"] == recipe]
    trained = _latest_of_each_seed([r for r in ours if r["kind"] == TRAINING])
    ended = [r for r in trained if r["status"] == FINISHED]
    pairs = [(r, baseline_of(r, records)) for r in ended]
    paired = [(r, b) for r, b in pairs if b is not None and b["end"] is not None]
    ends = [b["end"] for _, b in paired]
    gaps = {r["seed"]: gap_share(r, b) for r, b in paired}
    times = _alone(ours, records)
    levels = _levels([r for r in ours if r["kind"] == SQNR])
    return Row(
        workload=workload,
        recipe=recipe,
        gaps={seed: gap for seed, gap in gaps.items() if gap is not None},
        start=_mean([r["start"] for r in ended]),
        end=_mean([r["end"] for r in ended]),
        difference=_mean([r["end"] - b["end"] for r, b in paired]),
        spread=max(ends) - min(ends) if len(ends) > 1 else None,
        baseline_same_call=all(r["call"] == b["call"] for r, b in paired),
        ms=times[0],
        ms_baseline=times[1],
        device_ms=times[2],
        device_ms_baseline=times[3],
        compile_s=_first(trained, "compile_s"),
        calibration_s=_first(trained, "calibration_s"),
        saved_bytes=_first(trained, "saved_bytes"),
        saved_bytes_baseline=_first(
            [r for r in records if r["recipe"] == BASELINE and r["kind"] == TRAINING], "saved_bytes"
        ),
        peak_bytes=_first(trained, "peak_bytes"),
        lowered=_first(trained, "lowered"),
        gemms=_first(trained, "gemms"),
        emulated=_first(trained, "emulated"),
        sqnr={role: _summary(sites) for role, sites in levels.items()},
        worst_linears={role: _worst_linears(sites) for role, sites in levels.items()},
        note="; ".join(dict.fromkeys(_note(r) for r in trained if r["status"] != FINISHED)),
    )


def _latest_of_each_seed(records: list[Record]) -> list[Record]:
    latest: dict[int, Record] = {}
    for record in sorted(records, key=lambda r: (r["status"] != FAILED, r["call"])):
        latest[record["seed"]] = record
    return [latest[seed] for seed in sorted(latest)]


def _note(record: Record) -> str:
    if record["status"] == DIVERGED:
        return f"{DIVERGED} at step {record['steps_done']} (seed {record['seed']})"
    return f"{FAILED}: {record['error']}"


def _alone(ours: list[Record], records: list[Record]) -> tuple[float | None, ...]:
    """Milliseconds a step of the recipe and of the baseline in the same call, on the same GPU where
    both were measured there, each with the GPU to itself; then those of their kernels alone."""
    timed = [r for r in ours if r.get("alone_ms")]
    if not timed:
        return (None,) * 4
    latest = max(timed, key=lambda r: (r["kind"] == TIME, r["call"]))
    call = [
        r
        for r in records
        if r["recipe"] == BASELINE and r.get("alone_ms") and r["call"] == latest["call"]
    ]
    beside = [r for r in call if r["gpu"] == latest["gpu"]] or call
    beside = [r for r in beside if r["kind"] == latest["kind"]] or beside
    baseline = [statistics.median(r["alone_ms"]) for r in beside]
    on_device = latest.get("device_ms"), _mean([r.get("device_ms") for r in beside])
    return statistics.median(latest["alone_ms"]), _mean(baseline), *on_device


def _levels(records: list[Record]) -> dict[str, dict[str, float]]:
    """Role -> site -> dB of the latest measurement, roles without a lowered matmul left out."""
    measured = [r for r in records if r["status"] == FINISHED]
    latest = max(measured, key=lambda r: r["call"])["sqnr_db"] if measured else {}
    known = {
        role: {site: level for site, level in sites.items() if level is not None}
        for role, sites in latest.items()
    }
    return {role: sites for role, sites in known.items() if sites}


def _summary(levels: dict[str, float]) -> tuple[float, float, str]:
    worst = min(levels, key=levels.__getitem__)
    return statistics.median(levels.values()), levels[worst], worst


def _worst_linears(levels: dict[str, float]) -> tuple[str, int, int]:
    worst = sorted(levels, key=levels.__getitem__)[: max(1, len(levels) // 10)]
    name, count = Counter(site.rpartition(".")[2] for site in worst).most_common(1)[0]
    return name, count, len(worst)


def _mean(values: list[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _first(records: list[Record], name: str) -> Any:
    return next((r[name] for r in records if r.get(name) is not None), None)
