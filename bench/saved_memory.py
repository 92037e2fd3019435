"""How much do the Linears keep for the backward? Bytes on the device between forward and backward,
recipe by recipe beside Inductor in bf16: for the seven Linears of one decoder block, each with an
input of its own that nobody else holds, and for the whole block.

    python bench/saved_memory.py --out bench/results/saved_memory.json
    python bench/saved_memory.py --shard 0/4 --out part0.json   (and 1/4, ... on other GPUs)
    python bench/saved_memory.py --merge part*.json --out bench/results/saved_memory.json

On a GPU the allocator says it (`allocated_bytes`); everywhere autograd does (`saved_bytes`), as the
storages that it packs, parameters left out. A run leaves what it had: the same command goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
from pathlib import Path
from typing import Any

import torch
from llama_blocks import SHAPES, BlockShape, make_blocks
from record import header, save, shard_of
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import hadagraph

BASELINE = "inductor bf16"
LINEARS, BLOCK = "linears", "block"
PUBLISHED = {"mxfp4": 0.28, "adahop": 0.28, "hot": 0.26}
"""What the linears' share of bf16 must stay within, outlier side paths left out."""


class Linears(nn.Module):
    """The Linears of a block, each on an input of its own."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        kv = shape.kv_heads * shape.head_dim
        sizes = {
            "q_proj": (shape.width, shape.width),
            "k_proj": (shape.width, kv),
            "v_proj": (shape.width, kv),
            "o_proj": (shape.width, shape.width),
            "gate_proj": (shape.width, shape.hidden),
            "up_proj": (shape.width, shape.hidden),
            "down_proj": (shape.hidden, shape.width),
        }
        for name, (inputs, outputs) in sizes.items():
            setattr(self, name, nn.Linear(inputs, outputs, bias=False))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear(x) for linear, x in zip(self.children(), inputs, strict=True))


@torch.library.custom_op("hadagraph_bench::fresh", mutates_args=())
def fresh(leaf: Tensor, number: int, batch: int, sequence: int, width: int) -> Tensor:
    """A random bf16 tensor [batch, sequence, width]: an operator that nobody computes again, so
    that what the backward needs of its output has to be kept. The number tells it from others."""
    return torch.randn(batch, sequence, width, dtype=torch.bfloat16, device=leaf.device)


@fresh.register_fake
def _(leaf: Tensor, number: int, batch: int, sequence: int, width: int) -> Tensor:
    return leaf.new_empty(batch, sequence, width, dtype=torch.bfloat16)


fresh.register_autograd(lambda ctx, gradient: (gradient.sum().float(), *[None] * 4))


class Fed(nn.Module):
    """A module and the operators that make its inputs, of these widths."""

    def __init__(self, inner: nn.Module, batch: int, sequence: int, widths: list[int]) -> None:
        super().__init__()
        self.inner, self.batch, self.sequence, self.widths = inner, batch, sequence, widths

    def forward(self, leaf: Tensor) -> Any:
        made = (
            fresh(leaf, number, self.batch, self.sequence, width)
            for number, width in enumerate(self.widths)
        )
        return self.inner(*made)


class Model:
    """One of the two models, how it is called, and what a call keeps."""

    def __init__(self, which: str, args: argparse.Namespace) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        shape = SHAPES[args.shape]
        torch.manual_seed(0)
        if which == LINEARS:
            inner: nn.Module = Linears(shape).to(self.device, torch.bfloat16)
            widths = [linear.in_features for linear in inner.children()]
        else:
            inner, widths = make_blocks(args.shape, 1, args.sequence, self.device), [shape.width]
        self.module = Fed(inner, args.batch, args.sequence, widths)
        self.leaf = torch.zeros((), device=self.device, requires_grad=True)

    def keeps(self, compiled: Any) -> dict[str, int]:
        """Bytes between forward and backward, outputs left out: the storages that autograd packs,
        and on a GPU what the allocator holds more than before the inputs were made."""
        for _ in range(2):
            self._backward(compiled(self.leaf))  # compiles, and fills lazy caches
        found = {"saved_bytes": self._packed(compiled)}
        if self.device == "cuda":
            gc.collect()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            out = compiled(self.leaf)
            torch.cuda.synchronize()
            outputs = sum(_bytes(t) for t in _tensors(out))
            found["allocated_bytes"] = torch.cuda.memory_allocated() - before - outputs
            self._backward(out)
        return found

    def _packed(self, compiled: Any) -> int:
        held = (*self.module.state_dict().values(), self.leaf)
        owned = {t.untyped_storage().data_ptr() for t in held}
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in owned:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = compiled(self.leaf)
        self._backward(out)
        return sum(kept.values())

    def _backward(self, out: Any) -> None:
        tensors = _tensors(out)
        torch.autograd.backward(tensors, [torch.ones_like(t) for t in tensors])
        self.module.zero_grad(set_to_none=True)
        self.leaf.grad = None


def _tensors(out: Any) -> list[Tensor]:
    return list(out) if isinstance(out, (tuple, list)) else [out]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def measure(model: Model, recipe: str, args: argparse.Namespace) -> dict[str, Any]:
    """What one recipe keeps, and what the compiler says that it saves; or why there is nothing."""
    torch.compiler.reset()
    hadagraph.reset_report()
    if recipe == BASELINE:
        return dict(model.keeps(torch.compile(model.module, backend="inductor")))
    options = {"recipe": recipe, "never_slower": False, "executor": args.executor}
    if getattr(hadagraph.RECIPES[recipe], "select", "") or recipe == "auto":
        options["profile"] = _profile(model)
    compiled = torch.compile(model.module, backend="hadagraph", options=options)
    try:
        found: dict[str, Any] = dict(model.keeps(compiled))
    except (RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    reports = [report for report in hadagraph.report() if report.kind == "training"]
    sites = [site for report in reports for site in report.sites]
    saved = sorted((entry for report in reports for entry in report.saved), key=lambda e: -e[2])
    return found | {
        "lowered": sum(site.lowered for site in sites),
        "gemms": len(sites),
        "largest": [list(entry) for entry in saved[:16]],
    }


def _profile(model: Model) -> Any:
    return hadagraph.calibrate(model.module, [model.leaf], loss=_mean_square)


def _mean_square(out: Any) -> Tensor:
    return torch.stack([t.float().square().mean() for t in _tensors(out)]).sum()


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Every model and recipe that the file does not hold yet."""
    content = header("saved_memory", args) | {"models": {which: {} for which in args.models}}
    if args.out is not None and args.out.exists():
        earlier = json.loads(args.out.read_text())
        if _same(earlier, content):
            content["models"] |= earlier["models"]
    names = args.recipes or [name for name in hadagraph.RECIPES if name != "bf16"]
    index, count = args.shard
    for which in args.models:
        model = Model(which, args)
        entries = content["models"][which]
        for name in dict.fromkeys([BASELINE, *names[index::count]]):
            if name in entries and "error" not in entries[name]:
                continue
            entries[name] = measure(model, name, args)
            _share(entries, name)
            console.print(f"{which} {name}: {_summary(entries[name])}", markup=False)
            save(content, args.out)
    return content


def merge(args: argparse.Namespace) -> dict[str, Any]:
    """What the files hold together, a later file's entries before an earlier one's, but no failure
    before a result; ValueError where they measured different things."""
    first, *others = (json.loads(path.read_text()) for path in args.merge)
    for path, other in zip(args.merge[1:], others, strict=True):
        if not _same(other, first):
            raise ValueError(f"--merge {path}: another device or other settings")
        for which, entries in other["models"].items():
            held = first["models"].setdefault(which, {})
            held |= {n: e for n, e in entries.items() if "error" not in e or n not in held}
    first["settings"] |= {"shard": [0, 1], "merge": None}
    save(first, args.out)
    return dict(first)


def _same(earlier: dict[str, Any], content: dict[str, Any]) -> bool:
    names = ("shape", "batch", "sequence", "executor")
    ours = json.loads(json.dumps(content, default=str))
    return bool(
        earlier["device"] == ours["device"]
        and all(earlier["settings"][name] == ours["settings"][name] for name in names)
    )


def _share(entries: dict[str, Any], name: str) -> None:
    """Of the baseline's bytes, counted in the same way."""
    for key in ("saved_bytes", "allocated_bytes"):
        whole = entries[BASELINE].get(key)
        if whole and key in entries[name]:
            share = f"{key.removesuffix('_bytes')}_share"
            entries[name][share] = round(entries[name][key] / whole, 4)


def _summary(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "largest"}


def share_of(entry: dict[str, Any]) -> float:
    """The allocator's word where there is one; NaN where nothing was measured."""
    return float(entry.get("allocated_share", entry.get("saved_share", math.nan)))


def show(content: dict[str, Any], console: Console) -> None:
    """A row a recipe."""
    table = Table(title="kept for the backward, share of bf16")
    for column in ("recipe", *content["models"], "at most (linears)"):
        table.add_column(column)
    for name in dict.fromkeys(n for entries in content["models"].values() for n in entries):
        shares = [share_of(entries.get(name, {})) for entries in content["models"].values()]
        limit = PUBLISHED.get(name)
        table.add_row(name, *(f"{share:.3f}" for share in shares), f"{limit}" if limit else "")
    console.print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), default="llama3-8b")
    add("--batch", type=int, default=2)
    add("--sequence", type=int, default=4096)
    add("--models", nargs="+", choices=(LINEARS, BLOCK), default=[LINEARS, BLOCK])
    add("--recipes", nargs="+", choices=sorted(hadagraph.RECIPES), help="default: all")
    add("--executor", choices=("inductor", "eager"), default="inductor", help="%(default)s")
    add("--shard", type=shard_of, default=(0, 1), metavar="I/N", help="every N-th recipe")
    add("--merge", type=Path, nargs="+", metavar="FILE", help="measure nothing: unite these")
    add("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    console = Console(width=140)
    if args.merge is None:
        show(run(args, console), console)
        return
    try:
        show(merge(args), console)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
