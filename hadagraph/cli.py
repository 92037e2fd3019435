"""The command `hadagraph`: `doctor` says what is known of this machine, `explain` what would be
done with a model, here or on another chip. Both work without a GPU."""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table

import hadagraph
from hadagraph import compat
from hadagraph.codegen import tuned
from hadagraph.codegen.store import source_directory
from hadagraph.comparison import Comparison, compare, trace
from hadagraph.config import Config, parse_options
from hadagraph.device import CHIPS, DeviceProfile, chip_named
from hadagraph.formats import (
    BLOCK_SCALED_CAPABILITY,
    FORMATS,
    PLAIN_FORMATS,
    QUANTIZED_FORMATS,
)
from hadagraph.measurement import measure_device, profile_of, profile_path
from hadagraph.recipes import DEFAULT_RECIPE
from hadagraph.shapes import SHAPES, blocks, example

LAYERS = 2
"""Of a model that are traced unless asked otherwise: the others are alike."""
COMPARED = ("auto", "int8_rotated", "fp8_rowwise", "fp8_tensorwise")
COMPARED_BLOCK_SCALED = ("mxfp8", "nvfp4", "mxfp4")
PLAN_WIDTH = 200
"""Characters of a line where the output is no terminal."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (the process's own by default); the exit status. What is
    wrong with an argument is said on stderr, with status 2."""
    parser = _parser()
    options = parser.parse_args(arguments)
    console = Console()
    if not console.is_terminal:  # a file or a pager: as wide as the plan's table is readable
        console = Console(width=PLAN_WIDTH)
    try:
        run = {"doctor": _doctor, "explain": _explain}[options.command]
        run(options, console)
    except ValueError as error:
        print(f"hadagraph {options.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hadagraph", description=__doc__)
    parser.add_argument("--version", action="version", version=hadagraph.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="what is known of this machine")
    doctor.add_argument(
        "--measure", action="store_true", help="time the CUDA devices (20 s each) and keep it"
    )
    explain = commands.add_parser("explain", help="what would be done with a model")
    explain.add_argument(
        "model",
        help=f"a built-in shape ({', '.join(SHAPES)}), or the folder, the JSON file or the name of "
        "a Hugging Face configuration",
    )
    chips = ", ".join(CHIPS)
    explain.add_argument("--target", help=f"the chip to plan for: {chips}; else this machine's")
    explain.add_argument("--recipe", default=DEFAULT_RECIPE, help="default: %(default)s")
    explain.add_argument("--budget", type=float, default=30.0, help="error_budget_db (%(default)s)")
    explain.add_argument("--profile", help="the file of a calibration (Profile.save)")
    explain.add_argument("--batch", type=int, default=4)
    explain.add_argument("--sequence", type=int, default=4096)
    explain.add_argument(
        "--layers", type=int, default=LAYERS, help=f"how many to trace ({LAYERS}); 0: all"
    )
    return parser


# -------------------------------------------------------------------------- doctor


def _doctor(options: argparse.Namespace, console: Console) -> None:
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if options.measure and not devices:
        raise ValueError("--measure needs a CUDA device, and torch finds none")
    console.print(_machine(devices))
    for device in devices:
        if options.measure:
            measure_device(device)
        _print_device(device, console)
    if not devices:
        console.print(
            "No CUDA device: every format is emulated by the references, nothing is skipped for "
            "speed. Plans for other chips: hadagraph explain MODEL --target CHIP."
        )
        console.print(_chips())
    console.print(_formats([torch.cuda.get_device_capability(device) for device in devices]))


def _machine(devices: Sequence[torch.device]) -> Table:
    table = Table(title="hadagraph", show_header=False)
    driver = compat.cuda_driver_version()
    rows = {
        "hadagraph": hadagraph.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "CUDA of torch": torch.version.cuda or "none",
        "CUDA of the driver": f"{driver // 1000}.{driver % 1000 // 10}" if driver else "no driver",
        "CUDA devices": str(len(devices)),
        "default recipe": DEFAULT_RECIPE,
        "kernels, profiles": str(source_directory()),
    }
    rows |= {name: os.environ[name] for name in sorted(os.environ) if name in _variables()}
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _variables() -> tuple[str, ...]:
    return ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_VISIBLE_DEVICES")


def _print_device(device: torch.device, console: Console) -> None:
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    console.print(
        f"\n{device}: {name}, compute capability {capability[0]}.{capability[1]}, {memory:.0f} GiB"
    )
    profile, path = profile_of(device), profile_path(device)
    if profile is None:
        console.print("no profile: nothing is skipped for speed; --measure makes one")
        return
    where = f"kept in {path}" if path.exists() else "a table; --measure replaces it"
    console.print(f"profile: {profile.source} ({where})")
    console.print(f"matmul configurations that won a race here: {len(tuned.winners_on(name))}")
    console.print(_gemm_rates(profile))
    console.print(_quantizer_rates(profile))


def _gemm_rates(profile: DeviceProfile) -> Table:
    copy = profile.copy_bytes_per_us / 1e6
    step = f"the host beside launches {profile.host.step:.0f} us a step"
    table = Table(title=f"GEMMs of {profile.name}; copy {copy:.2f} TB/s; {step}")
    for column in ("format", "TFLOP/s in a tile", "sustained", "launch, us", "host, us"):
        table.add_column(column, justify="right")
    for rate in profile.gemms:
        host = profile.host.mm if rate.format == "bf16" else profile.host.scaled_mm
        cells = (rate.tflops, rate.sustained, rate.fixed_us, host)
        table.add_row(
            rate.format, *(f"{cell:.0f}" if cell > 30 else f"{cell:.1f}" for cell in cells)
        )
    return table


def _quantizer_rates(profile: DeviceProfile) -> Table:
    table = Table(title="quantizers: share of copy bandwidth, launch in us")
    for column in ("layouts", "kind", "share", "launch, us", "host, us"):
        table.add_column(column, justify="right")
    for rate in profile.quantizers:
        host = getattr(profile.host, f"quantize_{rate.layouts}")
        table.add_row(
            rate.layouts, rate.kind, f"{rate.share:.2f}", f"{rate.fixed_us:.1f}", f"{host:.0f}"
        )
    return table


def _chips() -> Table:
    table = Table(title="chips that plans can be printed for")
    for column in ("chip", "capability", "figures"):
        table.add_column(column)
    for chip in CHIPS.values():
        table.add_row(chip.name, "{}.{}".format(*chip.capability), chip.source)
    return table


def _formats(capabilities: Sequence[tuple[int, int]]) -> Table:
    """Which GEMMs the device has for two operands of each format, in which granularity."""
    table = Table(title="GEMMs by format")
    table.add_column("format")
    table.add_column("one scale a tensor or kept index")
    table.add_column("block scales")
    for name in QUANTIZED_FORMATS:
        row = FORMATS[name]
        plain = "emulated"
        if name in PLAIN_FORMATS and any(each >= row.min_capability for each in capabilities):
            plain = "native"
        block = "emulated"
        if name.startswith(("fp8", "fp4")) and any(
            each >= BLOCK_SCALED_CAPABILITY for each in capabilities
        ):
            block = "native (e8m0 for 32; fp4 also ue4m3 for 16)"
        table.add_row(name, plain, block)
    return table


# -------------------------------------------------------------------------- explain


def _explain(options: argparse.Namespace, console: Console) -> None:
    given = {"recipe": options.recipe, "error_budget_db": options.budget, "target": options.target}
    if options.profile is not None:
        given["profile"] = options.profile
    config = parse_options(None, given)
    for name in ("batch", "sequence", "layers"):
        least = 0 if name == "layers" else 1
        if getattr(options, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(options, name)}")
    profile = _profile_to_plan_for(config)
    graphs, what = _traced(options)
    console.print(what)
    (mine,) = compare(graphs, config, [config.recipe], profile)
    for report in mine.reports:
        console.print(report.table())
        if report.plan.note:
            console.print(report.plan.note)
    recipes = [*COMPARED]
    if profile is not None and profile.capability >= BLOCK_SCALED_CAPABILITY:
        recipes += COMPARED_BLOCK_SCALED
    others = [name for name in recipes if name != config.recipe_name]
    console.print(_table([mine, *compare(graphs, config, others, profile)], profile))


def _profile_to_plan_for(config: Config) -> DeviceProfile | None:
    if config.target is not None:
        return chip_named(config.target)
    return profile_of(torch.device("cuda", 0)) if torch.cuda.is_available() else None


def _table(compared: Sequence[Comparison], profile: DeviceProfile | None) -> Table:
    where = f"on {profile.name} ({profile.source})" if profile else "without a device's profile"
    what = "GEMMs and their operands, or the host, forward and backward"
    table = Table(title=f"predicted {where}: {what}")
    for column in ("recipe", "us", "of bf16", "lowered", "emulated", "worst, dB", "worst GEMM"):
        table.add_column(column, justify="left" if column in ("recipe", "worst GEMM") else "right")
    for each in compared:
        decisions = [d for report in each.reports for d in report.plan.decisions]
        lowered = sum(decision.lowered for decision in decisions)
        us = share = "-"
        if each.predicted is not None and not each.emulated:
            us = f"{each.predicted.us:.0f}"
            share = f"{each.predicted.us / each.predicted.none_us:.2f}"
        worst = f"{each.worst_db:.1f}" if math.isfinite(each.worst_db) else "-"
        counts = f"{lowered} of {len(decisions)}", str(each.emulated or "-")
        table.add_row(each.recipe, us, share, *counts, worst, each.worst_site)
    return table


def _traced(options: argparse.Namespace) -> tuple[list[Any], str]:
    """The joint graphs of the model, in bf16 and without data, and what was traced."""
    with compat.without_data(), _default_dtype(torch.bfloat16):
        if options.model in SHAPES:
            layers = options.layers or SHAPES[options.model].layers
            x = example(options.model, options.batch, options.sequence)
            graphs = trace(blocks(options.model, layers), x)
            every = SHAPES[options.model].layers
        else:
            model, layers, every = _from_configuration(options.model, options.layers)
            ids = torch.zeros(options.batch, options.sequence, dtype=torch.long)
            graphs = trace(model, input_ids=ids, labels=ids, use_cache=False)
    tokens = f"{options.batch} x {options.sequence} tokens"
    return graphs, f"{options.model}: {layers} of {every} layers, {tokens}, bf16"


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _from_configuration(name: str, layers: int) -> tuple[Any, int, int]:
    """A causal language model in training mode from a Hugging Face configuration, how many layers
    it was given, and how many the configuration has. ValueError where there is none."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ValueError(
            f"model must be one of {', '.join(SHAPES)}, or transformers be installed to read the "
            f"configuration {name!r}"
        ) from error
    try:
        configuration = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        said = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"model must be one of {', '.join(SHAPES)}, or a Hugging Face configuration, "
            f"got {name!r}: {said}"
        ) from error
    every = getattr(configuration, "num_hidden_layers", None)
    if every is None:
        raise ValueError(f"the configuration of {name!r} has no num_hidden_layers")
    configuration.num_hidden_layers = min(layers or every, every)
    if getattr(configuration, "layer_types", None):
        configuration.layer_types = configuration.layer_types[: configuration.num_hidden_layers]
    model = AutoModelForCausalLM.from_config(configuration).train()
    return model, configuration.num_hidden_layers, every


if __name__ == "__main__":
    raise SystemExit(main())
