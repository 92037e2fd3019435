"""Does the error model predict what is measured? Calibrates a real model on real text, then takes
another batch and compares, for every matmul of some layers and every candidate encoding of its
operands, the predicted SQNR with the one measured against fp32 on the operands themselves.

    python bench/error_model.py --out bench/results/error_model.json --plot docs/error_model.png

Runs on the CPU as well: it measures precision, not time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import header, save
from rich.console import Console
from rich.table import Table

import hadagraph
from hadagraph.encode import block_values, encode_reference, epilogue_scale
from hadagraph.error import predicted_sqnr, prior_sqnr
from hadagraph.formats import Encoding
from hadagraph.profile import Profile
from hadagraph.recipes import OPERANDS, ROLES

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from finetuning.model import CausalLoss, find_model, load_model
from finetuning.text import batches, read_works, split_works, tokenize

WITHIN_DB = 3.0
SHARE = 0.9
_MX = "block_contracted(32)"
CANDIDATES = (
    *(f"int8/per_kept_index{r}" for r in ("", "/h16", "/h32", "/h64", "/h128")),
    *(f"int8/per_tensor{r}" for r in ("", "/h32", "/h128")),
    *(f"fp8_e4m3/{g}{r}" for g in ("per_kept_index", "per_tensor") for r in ("", "/h32")),
    "fp8_e5m2/per_tensor",
    *(f"int4/per_kept_index{r}" for r in ("", "/h16", "/h64")),
    *(f"fp8_e4m3/{_MX}{r}/e8m0" for r in ("", "/h32")),
    *(f"fp6_{f}/{_MX}{r}/e8m0" for f in ("e3m2", "e2m3") for r in ("", "/h32")),
    *(f"fp4_e2m1/{_MX}{r}/e8m0" for r in ("", "/h32", "/h64")),
    f"fp4_e2m1/{_MX}/h64/e8m0/stochastic/three_quarters",
    *(f"fp4_e2m1/block_contracted(16){r}/ue4m3/prescale" for r in ("", "/h16")),
)
Matrices = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Point:
    """One site with one encoding of both operands."""

    site: str
    role: str
    encoding: str
    measured: float
    predicted: float
    prior: float

    @property
    def error(self) -> float:
        return self.predicted - self.measured


def decoded(x: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    """x [kept, contracted] as its codes have it: fp32, in the rotated basis."""
    seed = torch.tensor([x.shape[0]], device=x.device) if encoding.needs_seed else None
    made = encode_reference(x, encoding, 1, seed)
    return block_values(made, encoding).float() * epilogue_scale(made, encoding)[:, None]


def measured_db(operands: Matrices, exact: torch.Tensor, encoding: Encoding) -> float:
    """SQNR in dB of the product of both operands, encoded alike."""
    a, b = (decoded(x, encoding) for x in operands)
    noise = (a @ b.t() - exact).double().square().sum()
    return float(10 * torch.log10(exact.double().square().sum() / noise))


def linears_of(model: torch.nn.Module, layers: list[int]) -> Iterator[tuple[str, Any]]:
    """The Linears of these layers, by module path."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and any(f"layers.{n}." in name for n in layers):
            yield name, module


def watch(
    loss: torch.nn.Module, layers: list[int], seen: Callable[[str, str, Matrices], None]
) -> None:
    """Call `seen(site, role, operands)` for the three GEMMs of each Linear, in the backward."""

    def hook(name: str, module: torch.nn.Linear) -> None:
        def keep(_: torch.nn.Module, inputs: tuple[torch.Tensor], out: torch.Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2).bfloat16()
            w = module.weight.detach().bfloat16()

            def compare(gradient: torch.Tensor) -> None:
                e = gradient.flatten(0, -2).bfloat16()
                seen(name, "output", (x, w))
                seen(name, "grad_input", (e, w.t()))
                seen(name, "grad_weight", (e.t(), x.t()))

            out.register_hook(compare)

        module.register_forward_hook(keep)

    for name, module in linears_of(loss, layers):
        hook(name, module)


def calibrated(args: argparse.Namespace, loss: torch.nn.Module, data: Any) -> Profile:
    """The profile of the whole model, read from or written to `--profile` where given."""
    if args.profile is not None and args.profile.exists():
        return Profile.load(args.profile)
    start = time.perf_counter()
    with torch.autocast(data[0].device.type, dtype=torch.bfloat16):
        profile = hadagraph.calibrate(loss, data)
    Console().print(f"calibrated {len(profile.sites)} sites: {time.perf_counter() - start:.0f} s")
    if args.profile is not None:
        profile.save(args.profile)
    return profile


def measure(args: argparse.Namespace) -> list[Point]:
    """Every site and candidate."""
    name, works = read_works(None)
    language = load_model(find_model(args.model))
    corpus = tokenize(name, split_works(works), language.tokenizer, args.sequence)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loss = CausalLoss(language.module).train().to(device)
    data = batches(corpus.train, args.batches + 1, args.batch, args.sequence, 0)
    *calibration, held_out = (ids.to(device) for ids in data)
    profile = calibrated(args, loss, calibration)
    points: list[Point] = []

    def compare(site: str, role: str, operands: Matrices) -> None:
        known = profile.site(site, role, OPERANDS[role][0])
        assert known is not None, f"{site}:{role} was not calibrated"
        exact = operands[0].float() @ operands[1].float().t()
        for text in CANDIDATES:
            encoding = Encoding.parse(text)
            level = measured_db(operands, exact, encoding)
            predicted = predicted_sqnr(known, encoding, encoding)
            prior = prior_sqnr(role, OPERANDS[role], encoding, encoding)
            points.append(Point(site, role, text, level, predicted, prior))

    watch(loss, args.layers, compare)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss(held_out).backward()
    return points


def within(points: list[Point]) -> dict[str, float]:
    """How many, the share within WITHIN_DB, the median error, and the share whose prior is safe."""
    errors = [point.error for point in points]
    return {
        "points": len(points),
        "share_within_3_db": sum(abs(error) <= WITHIN_DB for error in errors) / len(errors),
        "median_error_db": statistics.median(errors),
        "share_prior_at_most_measured": sum(p.prior <= p.measured for p in points) / len(points),
    }


def summary(points: list[Point]) -> dict[str, Any]:
    """`within` of all, of each role, of each encoding and of each encoding and role."""
    found: dict[str, Any] = {"all": within(points), "role": {}, "encoding": {}}
    for role in ROLES:
        found["role"][role] = within([p for p in points if p.role == role])
    for text in CANDIDATES:
        found["encoding"][text] = within([p for p in points if p.encoding == text])
    return found


def content_of(args: argparse.Namespace, points: list[Point]) -> dict[str, Any]:
    """What is saved: the summary, and dB by encoding, role and site."""
    content = header("error_model", args)
    for path in ("profile", "plot"):
        content["settings"].pop(path)
    content |= summary(points)
    for what in ("measured", "predicted"):
        table: dict[str, dict[str, dict[str, float]]] = {}
        for point in points:
            sites = table.setdefault(point.encoding, {}).setdefault(point.role, {})
            sites[point.site] = round(getattr(point, what), 2)
        content[f"{what}_db"] = table
    return content


def plot(points: list[Point], path: Path) -> None:
    """Predicted over measured, a color a format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(ROLES), figsize=(13, 4.6), sharex=True, sharey=True)
    formats = sorted({point.encoding.partition("/")[0] for point in points})
    for axis, role in zip(axes, ROLES, strict=True):
        for format in formats:
            chosen = [p for p in points if p.role == role and p.encoding.startswith(format + "/")]
            xs, ys = [p.measured for p in chosen], [p.predicted for p in chosen]
            axis.scatter(xs, ys, s=5, alpha=0.6, label=format)
        ends = (0, max(point.measured for point in points))
        axis.plot(ends, ends, color="black", linewidth=0.8)
        for shift in (-WITHIN_DB, WITHIN_DB):
            axis.plot(ends, [e + shift for e in ends], color="black", linewidth=0.5, ls=":")
        axis.set_title(role)
        axis.set_xlabel("measured SQNR, dB")
    axes[0].set_ylabel("predicted SQNR, dB")
    axes[-1].legend(markerscale=3, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="as in examples/finetune.py (default: SmolLM2-135M)")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--batches", type=int, default=2, help="to calibrate on")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 8, 15, 22, 29])
    parser.add_argument("--profile", type=Path, help="read the profile here, or write it")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--plot", type=Path, help="write a scatter plot here")
    args = parser.parse_args()
    points = measure(args)
    found = summary(points)
    table = Table(title=f"{args.batch}x{args.sequence} tokens, layers {args.layers}")
    for column in ("what", "points", "within 3 dB", "median error, dB", "prior is safe"):
        table.add_column(column)
    rows = {"all": found["all"], **found["role"], **found["encoding"]}
    for name, row in rows.items():
        count, share, median, safe = row.values()
        table.add_row(name, str(count), f"{share:.3f}", f"{median:+.2f}", f"{safe:.3f}")
    Console().print(table)
    save(content_of(args, points), args.out)
    if args.plot is not None:
        plot(points, args.plot)
    if found["all"]["share_within_3_db"] < SHARE:
        sys.exit(f"the error model is within {WITHIN_DB} dB for less than {SHARE:.0%}")


if __name__ == "__main__":
    main()
