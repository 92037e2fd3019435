"""How long compiling takes: the first forward and backward of Llama-shaped blocks with Inductor and
with hadagraph, cold (no cache of any kind) and warm (a new process that finds the caches). Of
hadagraph's own kernels also the seconds in compile workers (beside everything else), those that
launches waited for workers, and those of kernels that were compiled at their launch.

    python bench/compile_time.py --out bench/results/compile_time.json

Each measurement is a fresh process with caches of its own. The blocks are narrower than a real
model's: compile time grows with the graph, not with the widths. Under 300 s on one H200.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from llama_blocks import Blocks, BlockShape
from record import header, median, save
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from step import Step, activations
from variants import BASELINE, variants

# So narrow a model would stay bf16.
DEFAULT_VARIANTS = (BASELINE, "hadagraph int8_rotated_always")
STATES = ("cold", "warm")


class EmittedKernels:
    """Listens to Triton in this process: hadagraph's kernels that a launch had to compile."""

    def __init__(self) -> None:
        self.compiled, self.seconds = 0, 0.0

    def __call__(self, *, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        folder = Path(src.fn.fn.__code__.co_filename).parent.name
        if folder == "hadagraph" and not cache_hit:
            self.compiled += 1
            self.seconds += times.total * 1e-6

    def found(self) -> dict[str, Any]:
        from hadagraph.codegen import workers  # here: a first step takes the time of importing it

        return asdict(workers.TOTALS) | {"compiled": self.compiled, "compile_seconds": self.seconds}


def child(args: argparse.Namespace) -> None:
    """In a process of its own: print the seconds of the first step, and of a later one."""
    emitted = EmittedKernels()
    triton.knobs.compilation.listener = emitted
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = BlockShape(args.width, args.hidden, args.heads, args.kv_heads, args.layers)
    torch.manual_seed(0)
    with torch.device(device):
        model = Blocks(shape, args.layers, args.sequence).to(torch.bfloat16)
    x, gradient = activations((args.batch, args.sequence, args.width), device)
    _ = x @ x.transpose(1, 2)  # cuBLAS and the device's context are not compile time
    if device == "cuda":
        torch.cuda.synchronize()
    (name,) = args.variants
    step = Step(variants()[name](model), list(model.parameters()), (x,), gradient)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    steps = {"first_step_s": seconds[0], "later_step_s": seconds[1]}
    print(json.dumps(steps | {"emitted_kernels": emitted.found()}))


def fresh_process(name: str, cache: Path, args: argparse.Namespace, layers: int) -> dict[str, Any]:
    """What `child` measures with its caches under `cache`; an error text where it fails."""
    # hadagraph keeps its kernels under Inductor's folder; its other files follow the home.
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "XDG_CACHE_HOME": str(cache / "home"),
    }
    command = [sys.executable, str(Path(__file__).resolve()), "--child", "--variants", name]
    command += ["--layers", str(layers)]
    for option in ("width", "hidden", "heads", "kv_heads", "batch", "sequence"):
        command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=environment,
            check=False,
            timeout=args.limit,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"more than {args.limit:g} s"}
    if done.returncode:
        return {"error": done.stderr[-1000:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def summarize(content: dict[str, Any], names: list[str]) -> None:
    """Medians, and their ratio to the first variant's."""
    content["summary"] = {}
    for state in STATES:
        of_name = {}
        for name in names:
            rows = [m for m in content["measured"] if (m["name"], m["state"]) == (name, state)]
            of_name[name] = median([m["first_step_s"] for m in rows if "first_step_s" in m])
        base = of_name[names[0]]
        content["summary"][state] = {
            name: {"seconds": seconds, "ratio": seconds / base if base and seconds else None}
            for name, seconds in of_name.items()
        }


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Every variant cold, then warm, over the rounds; what there is, is saved after each."""
    content = header("compile_time", args) | {"baseline": args.variants[0], "measured": []}
    total = args.rounds * len(STATES) * len(args.variants)
    with Progress(console=console, transient=True) as progress:
        if torch.cuda.is_available():
            with tempfile.TemporaryDirectory() as folder:
                # Not counted: the machine's first process also waits for libraries to be read.
                fresh_process(args.variants[0], Path(folder), args, layers=1)
        task = progress.add_task("processes", total=total)
        for number in range(args.rounds):
            with tempfile.TemporaryDirectory() as folder:
                for state in STATES:
                    for index, name in enumerate(args.variants):
                        found = fresh_process(name, Path(folder) / str(index), args, args.layers)
                        entry = {"round": number, "state": state, "name": name, **found}
                        content["measured"].append(entry)
                        summarize(content, args.variants)
                        save(content, args.out)
                        progress.advance(task)
                        if "error" in found:
                            text = f"{name}, {state}: {found['error'][-300:]}"
                            progress.console.print(text, style="red", markup=False)
    return content


def table(content: dict[str, Any], names: list[str]) -> Table:
    """Seconds of the first step, cold and warm, and of those what emitted kernels took."""
    layers = content["settings"]["layers"]
    shown = Table(title=f"{layers} blocks: seconds of the first step (x {names[0]})")
    columns = [column for state in STATES for column in (state, "emitted kernels")]
    for column in ("", *columns):
        shown.add_column(column, justify="right" if column else "left")
    for name in names:
        cells = []
        for state in STATES:
            found = content["summary"][state][name]
            ratio = f" ({found['ratio']:.2f})" if found["ratio"] else ""
            cells.append(f"{found['seconds']:.1f}{ratio}" if found["seconds"] else "failed")
            cells.append(of_emitted(content, name, state))
        shown.add_row(name, *cells)
    return shown


def of_emitted(content: dict[str, Any], name: str, state: str) -> str:
    """What the variant's first round says of emitted kernels; nothing if it had none."""
    rows = [m for m in content["measured"] if (m["name"], m["state"]) == (name, state)]
    found = next((m["emitted_kernels"] for m in rows if "emitted_kernels" in m), None)
    if found is None or not found["kernels"] + found["compiled"]:
        return ""
    ahead = f"{found['kernels']} ahead: {found['worker_seconds']:.1f} s"
    return (
        f"{ahead}, waited {found['waited_seconds']:.1f} s, "
        f"{found['compiled']} late: {found['compile_seconds']:.1f} s"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    add = parser.add_argument
    add("--layers", type=int, default=32)
    add("--width", type=int, default=1024)
    add("--hidden", type=int, default=3584)
    add("--heads", type=int, default=8)
    add("--kv-heads", type=int, default=2)
    add("--batch", type=int, default=4)
    add("--sequence", type=int, default=2048)
    add("--rounds", type=int, default=1, help="each from empty caches")
    add("--limit", type=float, default=300, help="seconds a process (%(default)s)")
    names = list(variants())
    add(
        "--variants",
        nargs="+",
        choices=names,
        default=list(DEFAULT_VARIANTS),
        metavar="NAME",
        help="ratios are to the first",
    )
    add("--out", type=Path, help="write the results here as JSON")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    console = Console(width=120)
    content = run(args, console)
    console.print(table(content, args.variants))


if __name__ == "__main__":
    main()
