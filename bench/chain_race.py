"""Races schedules and configurations of chain kernels (`codegen/choose_chains`) on a GPU, beside
the same work unfused: the chain compiled by Inductor, then the quantizers of its outputs.

    python bench/chain_race.py --out bench/results/chain_race.json [--quick] [--cases NAME ...]
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from kernels import LAUNCH_ERRORS, buffer_sets, copy_bandwidth, median_ms
from record import header, save

from hadagraph.codegen import launch, tune
from hadagraph.codegen.choose_chains import SCHEDULES, select_chain, wanted_of
from hadagraph.formats import Encoding
from hadagraph.reference import CHAIN_DTYPES
from hadagraph.region import Chain

T = 16384
ROWS, COLUMNS = "int8/per_kept_index/h128", "int8/per_kept_index/h32"
FP8 = "fp8_e4m3/per_kept_index"
# As in a Llama block under Inductor: gate, up -> silu(gate) * up; with grad_output -> grad_up,
# grad_gate, and between them silu(gate) * up again.
SILU_MUL = (
    "in bf16 matrix; in bf16 matrix; neg %0; exp %2; add %3 1.0; div %0 %4; mul %5 %1; out %6 bf16"
)
SILU_MUL_BACKWARD = (
    "in bf16 matrix; in bf16 matrix; in bf16 matrix; neg %0; exp %3; add %4 1.0; div %0 %5; "
    "mul %2 %6; mul %2 %1; sigmoid %0; mul %8 %9; sub 1.0 %9; mul %0 %11; add %12 1.0; "
    "mul %10 %13; out %7 bf16; out %14 bf16"
)
SILU_MUL_THREE = (
    "in bf16 matrix; in bf16 matrix; in bf16 matrix; neg %0; exp %3; add %4 1.0; div %0 %5; "
    "mul %6 %1; mul %2 %6; mul %2 %1; sigmoid %0; mul %9 %10; sub 1.0 %10; mul %0 %12; "
    "add %13 1.0; mul %11 %14; out %8 bf16; out %7 bf16; out %15 bf16"
)
RMS_NORM = "in bf16 matrix; in fp32 rows; in bf16 columns; mul %0 %1; mul %3 %2; out %4 bf16"
ADD = "in bf16 matrix; in bf16 matrix; add %0 %1; out %2 bf16"
# name, chain, K, rows and columns (of all outputs, or of each), value wanted
CASES = (
    ("silu_mul rows", SILU_MUL, 14336, ROWS, "", False),
    ("silu_mul rows fp8", SILU_MUL, 14336, FP8, "", False),
    ("silu_mul columns", SILU_MUL, 14336, "", COLUMNS, False),
    ("silu_mul backward", SILU_MUL_BACKWARD, 14336, ROWS, COLUMNS, False),
    ("silu_mul backward fp8", SILU_MUL_BACKWARD, 14336, FP8, FP8, False),
    ("silu_mul backward, again", SILU_MUL_THREE, 14336, (ROWS, "", ROWS), COLUMNS, False),
    ("silu_mul backward rows", SILU_MUL_BACKWARD, 14336, ROWS, "", False),
    ("silu_mul both", SILU_MUL, 14336, ROWS, COLUMNS, False),
    ("rms_norm rows", RMS_NORM, 4096, ROWS, "", False),
    ("rms_norm columns", RMS_NORM, 4096, "", COLUMNS, False),
    ("rms_norm both", RMS_NORM, 4096, ROWS, COLUMNS, False),
    ("add both, value", ADD, 4096, ROWS, COLUMNS, True),
)


def inputs_of(chain: Chain, K: int) -> list[torch.Tensor]:
    shapes = {"matrix": (T, K), "rows": (T,), "columns": (K,), "scalar": ()}
    return [
        torch.randn(shapes[each.shape], device="cuda").to(CHAIN_DTYPES[each.dtype])
        for each in chain.inputs
    ]


def eager(chain: Chain, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The chain as Inductor is given it: `CASES` use these operations only."""
    functions: dict[str, Any] = {
        "add": torch.add,
        "sub": lambda a, b: a - b,
        "mul": torch.mul,
        "div": torch.div,
        "neg": torch.neg,
        "exp": torch.exp,
        "sigmoid": torch.sigmoid,
    }
    values = [
        x.float()[:, None] if each.shape == "rows" else x.float()
        for x, each in zip(inputs, chain.inputs, strict=True)
    ]
    for step in chain.steps:
        operands = [
            each if isinstance(each, float) else values[each.index] for each in step.operands
        ]
        values.append(functions[step.op](*operands))
    return [values[out.value.index].to(CHAIN_DTYPES[out.dtype]) for out in chain.outputs]


def unfused(
    compiled: Any, inputs: list[torch.Tensor], rows: list[str], columns: list[str]
) -> list[Any]:
    capability = torch.cuda.get_device_capability()
    results = []
    for x, *texts in zip(compiled(*inputs), rows, columns, strict=True):
        encodings = [Encoding.parse(text) if text else None for text in texts]
        results.append(launch.quantize(x, *encodings, capability))
    return results


def race(case: tuple[Any, ...], copy: float, repeats: int, quick: bool) -> dict[str, Any]:
    name, text, K, row, column, value = case
    chain = Chain.parse(text)
    count = len(chain.outputs)
    capability = torch.cuda.get_device_capability()
    sets = [inputs_of(chain, K) for _ in range(buffer_sets(T * K * 2 * len(chain.inputs)))]
    rows, columns = (
        [each] * count if isinstance(each, str) else list(each) for each in (row, column)
    )
    lists = (rows, columns, [value] * count)
    wanted = wanted_of(*lists)
    compiled = torch.compile(partial(eager, chain), dynamic=False)
    calls = [partial(unfused, compiled, inputs, rows, columns) for inputs in sets]
    entries: list[dict[str, Any]] = [{"how": "unfused", "ms": median_ms(calls, repeats)}]
    passes = list(tune.columns_candidates(capability)) if column else []
    configs = [*(tune.chain_rows_candidates(capability) if row else ()), *passes]
    table = select_chain(T, K, chain, wanted, capability)
    for schedule, config in product(SCHEDULES, [None] if quick else [None, *configs]):
        plan = select_chain(T, K, chain, wanted, capability, config, schedule)
        entry = {"how": str(schedule), "config": str(config), "table": plan == table}
        options = (*lists, capability, config, schedule)
        calls = [partial(launch.quantize_chain, inputs, text, *options) for inputs in sets]
        try:
            entry["ms"] = median_ms(calls, repeats)
        except LAUNCH_ERRORS as error:
            entry["error"] = str(error)[:200]
        else:
            moved = plan.bytes(T, K)
            entry["bytes"] = moved
            entry["share_of_copy"] = moved / (entry["ms"] * 1e-3) / copy
        entries.append(entry)
    entries.sort(key=lambda each: each.get("ms", float("inf")))
    print(f"\n{name} [{T} x {K}]")
    for entry in entries[:12] + [e for e in entries[12:] if e["how"] == "unfused"]:
        share = f"{entry['share_of_copy']:.2f}" if "share_of_copy" in entry else "    "
        took = f"{entry['ms']:.4f} ms" if "ms" in entry else entry["error"]
        print(f"  {took}  {share}  {entry['how']} {entry.get('config', '')}", flush=True)
    return {"case": name, "T": T, "K": K, "entries": entries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--quick", action="store_true", help="the tables' configurations only")
    parser.add_argument("--repeats", type=int, default=15)
    names = [name for name, *_ in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="NAME")
    args = parser.parse_args()
    copy = copy_bandwidth(args.repeats)
    content = header("chain_race", args) | {"copy_bytes_per_s": copy, "cases": []}
    print(f"copy {copy / 1e12:.2f} TB/s")
    for case in (case for case in CASES if case[0] in args.cases):
        content["cases"].append(race(case, copy, args.repeats, args.quick))
        save(content, args.out)


if __name__ == "__main__":
    main()
