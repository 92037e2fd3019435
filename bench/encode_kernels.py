"""Microseconds of `encode`, `decode` and `encoded_mm` by emitted kernels, next to a copy of as many
bytes, the same operators composed of torch's own (the reference), and a bf16 GEMM.

    python bench/encode_kernels.py --out bench/results/encode_kernels.json

Under 60 s on one H200. Each call is captured in a CUDA graph and replayed, so that the host's work
does not count; without `--no-host` it is timed once more as it is called, with the host's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from linear import features
from record import header, interleaved, median, save
from rich.console import Console
from rich.table import Table
from step import captured

import hadagraph  # noqa: F401  (defines the operators)
from hadagraph import ops
from hadagraph.codegen import launch
from hadagraph.codegen.encode_spec import stored_bytes
from hadagraph.encode import Encoded, decode_reference, encode_reference
from hadagraph.formats import Encoding

ENCODINGS = (
    "int4/per_kept_index/h16/stochastic",
    "int8/per_tensor/keep8of16",
    "fp4_e2m1/block_contracted(32)/h32/e8m0",
    "fp4_e2m1/block_contracted(32)/h64:per_step(s)/e8m0/stochastic/three_quarters",
    "fp8_e4m3/block_contracted(32)/e8m0",
    "fp4_e2m1/block_contracted(16)/ue4m3/prescale",
    "fp4_e2m1/block_contracted(16)/h16:fixed(1)/ue4m3/stochastic/prescale",
    "fp4_e2m1/block_2d(16)/ue4m3/prescale",
    "fp4_e2m1/block_contracted(16)/ue4m3/four_six/prescale",
    "fp6_e3m2/per_tensor/h128",
)
SHAPES = ((4096, 576), (8192, 4096))
OUTPUTS = 4096
Row = dict[str, Any]


def copy_of(size: int) -> Callable[[], None]:
    """Moves as many bytes: half of them read, half written."""
    source = torch.empty(max(size // 2, 1), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return copy


def encoding_calls(text: str, T: int, K: int) -> dict[str, Callable[[], object]]:
    """Both layouts by kernels and by the reference, reading them back, and copies of the bytes."""
    encoding = Encoding.parse(text)
    x = torch.randn(T, K, device="cuda").bfloat16()
    seed = torch.tensor([1], device="cuda")
    made = Encoded(*ops.encode(x, seed, text, 1, 0))
    size = encoding.contracted_size(K)
    stored = stored_bytes(encoding, T, size)
    return {
        "rows": lambda: ops.encode(x, seed, text, 1, 0),
        "columns": lambda: ops.encode(x, seed, text, 0, 0),
        "decode": lambda: ops.decode(*made.tensors, text, 1, size, torch.bfloat16),
        "copy": copy_of(x.nbytes + stored),
        "copy_decode": copy_of(stored + 2 * T * size),
        "reference": lambda: encode_reference(x, encoding, 1, seed, 0),
        "reference_decode": lambda: decode_reference(made, encoding, 1, size, torch.bfloat16),
    }


def product_calls(text: str, T: int, K: int, N: int) -> dict[str, Callable[[], object]]:
    """out [T, N] of two encoded operands, and in bf16."""
    x, w = torch.randn(T, K, device="cuda").bfloat16(), torch.randn(N, K, device="cuda").bfloat16()
    seed = torch.tensor([1], device="cuda")
    a, b = ops.encode(x, seed, text, 1, 0), ops.encode(w, seed, text, 1, 1)
    return {
        "encoded_mm": lambda: ops.encoded_mm(*a, *b, None, text, text, torch.bfloat16),
        "bf16_mm": lambda: x @ w.t(),
    }


def measured(
    calls: dict[str, Callable[[], object]], rounds: int, repeats: int, *, host: bool
) -> Row:
    """Microseconds of each call as a CUDA graph, and with the host's work. References copy their
    matrices to the device, and cannot be captured."""
    graphs = {n: c if "reference" in n else captured(c) for n, c in calls.items()}
    found = interleaved(graphs, rounds, repeats)
    row: Row = {name: round(1e3 * median(times), 2) for name, times in found.items()}
    if host:
        own = {n: c for n, c in calls.items() if "reference" not in n and "copy" not in n}
        with_host = interleaved(own, rounds, repeats)
        row["with_host"] = {n: round(1e3 * median(times), 2) for n, times in with_host.items()}
    return row


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The file's content; written after every encoding. What does not run is recorded."""
    content = header("encode_kernels", args)
    content["microseconds"] = rows = []
    started = time.perf_counter()
    launch.prepare("cuda")
    for T, K in args.shapes:
        for text in args.encodings:
            timing = {"rounds": args.rounds, "repeats": args.repeats, "host": not args.no_host}
            row: Row = {"encoding": text, "T": T, "K": K}
            try:
                row |= measured(encoding_calls(text, T, K), **timing)
                products = measured(product_calls(text, T, K, args.outputs), **timing)
                host = {**row.pop("with_host", {}), **products.pop("with_host", {})}
                row |= {**products, "with_host": host}
            except RuntimeError as error:
                row["error"] = f"{type(error).__name__}: {error}"[:500]
            rows.append(row)
            content["seconds"] = round(time.perf_counter() - started, 1)
            save(content, args.out)
    return content


def table(content: dict[str, Any]) -> Table:
    """Microseconds, one line an encoding and shape."""
    names = ("rows", "columns", "copy", "reference", "decode", "copy_decode", "encoded_mm")
    names += ("bf16_mm",)
    shown = Table("encoding", "T x K", *names, title="us as CUDA graphs")
    for row in content["microseconds"]:
        figures = [f"{row[name]:.1f}" if name in row else "failed" for name in names]
        shown.add_row(row["encoding"], f"{row['T']} x {row['K']}", *figures)
    return shown


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    add = parser.add_argument
    add("--shapes", type=features, nargs="+", default=list(SHAPES), metavar="TxK")
    add("--encodings", nargs="+", default=list(ENCODINGS))
    add("--outputs", type=int, default=OUTPUTS, help="N of the GEMM")
    add("--rounds", type=int, default=5, help="interleaved over the calls")
    add("--repeats", type=int, default=10, help="calls timed together in a round")
    add("--no-host", action="store_true", help="do not time calls with the host's work too")
    add("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    console = Console(width=170)
    content = run(args)
    console.print(table(content))
    console.print(f"{content['device']}, {content['seconds']:.0f} s")


if __name__ == "__main__":
    main()
