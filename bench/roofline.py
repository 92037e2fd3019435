"""Where a step's time goes: GPU time by kind of kernel for Inductor bf16, torchao and hadagraph,
and each kernel against the device's ceiling. `--plot` draws a result without a GPU.

    python bench/roofline.py --out bench/results/roofline.json
    python bench/roofline.py --plot bench/results/roofline.json --png docs/roofline.png

Under 150 s on one H200.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from kernel_trace import KINDS, KernelTime, by_kind, recorded
from llama_blocks import SHAPES, linear_flops, make_blocks
from record import header, interleaved, median, milliseconds, save
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from step import Step, activations
from torch.profiler import ProfilerActivity, profile
from variants import BASELINE, variants

DEFAULT_VARIANTS = (BASELINE, "torchao tensorwise", "hadagraph int8_rotated")
COPY_BYTES = 1 << 29
CEILING_GEMMS = ((8192, 4096, 4096), (8192, 4096, 14336), (16384, 14336, 4096))


def ceilings() -> dict[str, float] | None:
    """Copy bytes a second (read plus write), and the best FLOPs a second of cuBLAS in bf16 and of
    `torch._scaled_mm` in fp8; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    source, target = (torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    target.copy_(source)
    copy = median([milliseconds(lambda: target.copy_(source), 10) for _ in range(5)])
    found = {"copy_bytes_per_s": 2 * COPY_BYTES / copy * 1e3, "bf16_flops_per_s": 0.0}
    fp8 = torch.cuda.get_device_capability() >= (8, 9)
    if fp8:
        found["8bit_flops_per_s"] = 0.0
    for M, N, C in CEILING_GEMMS:
        a, b = (torch.randn(rows, C, device="cuda").bfloat16() for rows in (M, N))
        calls = {"bf16_flops_per_s": lambda a=a, b=b: a @ b.t()}
        if fp8:
            low = [x.to(torch.float8_e4m3fn) for x in (a, b)]
            one = torch.ones((), device="cuda")
            calls["8bit_flops_per_s"] = lambda low=low, one=one: torch._scaled_mm(
                low[0], low[1].t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
            )
        for call in calls.values():
            call()
        for name, rounds in interleaved(calls, 3, 10).items():
            found[name] = max(found[name], 2 * M * N * C / median(rounds) * 1e3)
    return found


def profiled(step: Step, steps: int) -> list[KernelTime]:
    """The kernels of a step, the mean of `steps`; none without a GPU."""
    if not torch.cuda.is_available():
        return []
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, record_shapes=True) as prof:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return recorded(prof, steps)


def share(row: KernelTime, ceiling: dict[str, float]) -> float | None:
    """The least time that the ceilings allow the kernel, over its time; None where unknown."""
    flops_name = "8bit_flops_per_s" if row.kind == "8-bit GEMM" else "bf16_flops_per_s"
    least = [
        amount / ceiling[name]
        for amount, name in ((row.flops, flops_name), (row.bytes, "copy_bytes_per_s"))
        if amount is not None and ceiling.get(name)
    ]
    return max(least) * 1e6 / row.us_each if least and row.us else None


def kernel_rows(rows: list[KernelTime], ceiling: dict[str, float] | None) -> list[dict[str, Any]]:
    """The kernels with their rates and share of the ceiling."""
    found = []
    for row in rows:
        seconds = row.us_each * 1e-6
        found.append(
            {
                **asdict(row),
                "us_each": row.us_each,
                "tflops": row.flops and row.flops / seconds / 1e12,
                "gb_per_s": row.bytes and row.bytes / seconds / 1e9,
                "of_ceiling": ceiling and share(row, ceiling),
            }
        )
    return found


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All variants; what there is, is saved after each. A failing one is reported and left out."""
    # All variants stay compiled side by side, so that the rounds can interleave.
    torch._dynamo.config.recompile_limit = 64
    device = "cuda" if torch.cuda.is_available() else "cpu"
    content = header("roofline", args) | {
        "shape": asdict(SHAPES[args.shape]),
        "linear_flops": linear_flops(args.shape, args.blocks, args.batch * args.sequence),
        "ceilings": ceilings(),
        "variants": {},
    }
    shape = (args.batch, args.sequence, SHAPES[args.shape].width)
    steps: dict[str, Step] = {}
    began = time.perf_counter()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("variants", total=len(args.variants))
        for name in args.variants:
            try:
                model = make_blocks(args.shape, args.blocks, args.sequence, device)
                x, gradient = activations(shape, device)
                step = Step(variants()[name](model), list(model.parameters()), (x,), gradient)
                step()
                milliseconds(step, 2)
                rows = profiled(step, args.profiled)
            except (ImportError, RuntimeError, ValueError) as error:
                content["variants"][name] = {"error": f"{type(error).__name__}: {error}"[:500]}
                console.print(f"[red]{name}: {content['variants'][name]['error'][:300]}[/red]")
                continue
            finally:
                progress.advance(task)
            steps[name] = step
            content["variants"][name] = {
                "gpu_ms": sum(row.us for row in rows) / 1e3,
                "launches": sum(row.count for row in rows),
                "by_kind_ms": by_kind(rows),
                "kernels": kernel_rows(rows, content["ceilings"]),
            }
            save(content, args.out)
            progress.console.print(f"{name}: {time.perf_counter() - began:.0f} s since the start")
    for name, rounds in interleaved(steps, args.rounds, args.repeats).items():
        entry = content["variants"][name]
        entry["round_ms"], entry["wall_ms"] = rounds, median(rounds)
        # Kernels of one stream do not overlap: what is left of the wall time is idle.
        entry["idle_share"] = 1 - entry["gpu_ms"] / entry["wall_ms"] if entry["kernels"] else None
    save(content, args.out)
    return content


def kinds_table(content: dict[str, Any]) -> Table:
    """Milliseconds a step by kind, one column a variant."""
    measured = {n: v for n, v in content["variants"].items() if "error" not in v}
    settings = content["settings"]
    title = f"{settings['blocks']} {settings['shape']} blocks, B={settings['batch']}, "
    table = Table(title=title + f"S={settings['sequence']}: GPU ms a step by kind")
    table.add_column("")
    for name in measured:
        table.add_column(name, justify="right")
    for kind in KINDS:
        table.add_row(kind, *(f"{entry['by_kind_ms'][kind]:.2f}" for entry in measured.values()))
    table.add_section()
    table.add_row("GPU, sum", *(f"{entry['gpu_ms']:.2f}" for entry in measured.values()))
    table.add_row("wall", *(f"{entry['wall_ms']:.2f}" for entry in measured.values()))
    idle = [entry["idle_share"] for entry in measured.values()]
    table.add_row("idle share", *("-" if i is None else f"{i:.3f}" for i in idle))
    table.add_row("launches", *(f"{entry['launches']:.0f}" for entry in measured.values()))
    return table


def print_kernels(name: str, entry: dict[str, Any], count: int, console: Console) -> None:
    """The longest kernels, one line each; rates where the operands tell."""
    console.print(f"\n{name}: the longest kernels of a step")
    console.print("    ms count us each TFLOP/s  GB/s of ceiling  kernel [operands]")
    for row in entry["kernels"][:count]:
        rates = [row["tflops"], row["gb_per_s"], row["of_ceiling"]]
        shown = [
            f"{rate:{width}}" if rate is not None else "-".rjust(int(width.split(".")[0]))
            for rate, width in zip(rates, ("7.0f", "5.0f", "10.2f"), strict=True)
        ]
        times = f"{row['us'] / 1e3:6.2f} {row['count']:5.0f} {row['us_each']:7.0f}"
        label = f"{row['kernel'][:58]} [{row['shapes'][:34]}]"
        console.print(f"{times} {' '.join(shown)}  {label}", markup=False, highlight=False)


def draw(content: dict[str, Any], png: Path) -> None:
    """Bars of a step's time by kind, and every kernel under the roofline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = {n: v for n, v in content["variants"].items() if v.get("kernels")}
    figure, (bars, roof) = pyplot.subplots(1, 2, figsize=(14, 5.5), layout="constrained")
    colours = pyplot.get_cmap("tab20")
    bottom = [0.0] * len(measured)
    for number, kind in enumerate(KINDS):
        heights = [entry["by_kind_ms"][kind] for entry in measured.values()]
        if any(heights):
            bars.bar(list(measured), heights, 0.6, bottom=bottom, label=kind, color=colours(number))
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    idle = [max(e["wall_ms"] - e["gpu_ms"], 0) for e in measured.values()]
    bars.bar(list(measured), idle, 0.6, bottom=bottom, label="idle", color="#eeeeee")
    names = [name.replace(" ", "\n").replace("_", "\n", name.count("_") - 1) for name in measured]
    bars.set_xticks(range(len(names)), names)
    bars.set_ylabel("ms a step")
    bars.set_title(f"Step time by kind, {content['device']}")
    bars.legend(fontsize="small", loc="upper right", bbox_to_anchor=(1.0, 1.0))
    bars.set_xlim(-0.5, len(measured) + 1.2)
    _draw_roof(roof, content, measured)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=120)


def _draw_roof(axes: Any, content: dict[str, Any], measured: dict[str, Any]) -> None:
    ceiling = content["ceilings"]
    intensities = [2.0**i for i in range(-3, 14)]
    for name, label, colour in (
        ("bf16_flops_per_s", "cuBLAS bf16", "#4c72b0"),
        ("8bit_flops_per_s", "torch._scaled_mm fp8", "#dd8452"),
    ):
        if name in ceiling:
            roof = [min(ceiling[name], i * ceiling["copy_bytes_per_s"]) / 1e12 for i in intensities]
            axes.plot(intensities, roof, color=colour, label=label)
    for marker, (name, entry) in zip("ox^svD*P", measured.items(), strict=False):
        known = [row for row in entry["kernels"] if row["flops"] and row["bytes"]]
        points = [(row["flops"] / row["bytes"], row["tflops"]) for row in known]
        sizes = [8 + 4e-3 * row["us"] for row in known]
        if points:
            axes.scatter(*zip(*points, strict=True), s=sizes, marker=marker, label=name, alpha=0.7)
        # Kernels without FLOPs worth counting: their share of the copy bandwidth, at the left.
        moved = [row for row in entry["kernels"] if row["bytes"] and not row["flops"]]
        rates = [row["gb_per_s"] * intensities[0] / 1e3 for row in moved]
        sizes = [8 + 4e-3 * row["us"] for row in moved]
        axes.scatter([intensities[0]] * len(rates), rates, s=sizes, marker=marker, color="#999999")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs a byte (grey, at the left: kernels that only move bytes)")
    axes.set_ylabel("TFLOP/s")
    axes.set_title("Each kernel under the measured ceilings")
    axes.legend(fontsize="small")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama3-8b")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved over the variants")
    parser.add_argument("--repeats", type=int, default=5, help="steps timed together in a round")
    parser.add_argument("--profiled", type=int, default=2, help="steps under the profiler")
    parser.add_argument("--top", type=int, default=25, help="kernels printed of each variant")
    names = list(variants())
    parser.add_argument(
        "--variants", nargs="+", choices=names, default=list(DEFAULT_VARIANTS), metavar="NAME"
    )
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--plot", type=Path, help="measure nothing: draw this result")
    parser.add_argument("--png", type=Path, help="where --plot draws to")
    args = parser.parse_args()
    console = Console(width=130)
    if args.plot is not None:
        if args.png is None:
            parser.error("--plot needs --png")
        content = json.loads(args.plot.read_text())
        if not any(entry.get("kernels") for entry in content["variants"].values()):
            parser.error(f"--plot {args.plot}: holds no kernels, it was measured without a GPU")
        draw(content, args.png)
        return
    content = run(args, console)
    for name, entry in content["variants"].items():
        if entry.get("kernels"):
            print_kernels(name, entry, args.top, console)
    console.print(kinds_table(content))


if __name__ == "__main__":
    main()
