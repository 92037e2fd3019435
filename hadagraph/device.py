"""What a device does in a microsecond: the record that predictions are made from, and a table of it
by chip. Measures nothing and predicts nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

LAYOUTS = ("rows", "columns", "both")
KINDS = ("plain", "rotated", "per_tensor")
BLOCK_KINDS = ("block", "two_level", "random")
"""Of quantizers to block scales, one layout a call: scales alone, with one of the tensor's above
them, and stochastic rounding."""


@dataclass(frozen=True)
class GemmRate:
    """GEMMs with operands of one format (`bf16`, `int8`, `fp8`; block-scaled `mxfp8`, `fp4`).

    tflops: what the tensor cores reach inside a large tile. sustained: TFLOP/s that the power limit
    leaves a large GEMM after a while. ramp: a tile's start and end, as
    elements of the contracted dim. edge: what a tile costs beyond its area, as elements along both
    of its sides. alone: the share of a multiprocessor's rate that one program reaches without a
    second beside it. tiles: (rows, columns) of the output that one program makes. splits: into how
    many parts the contraction may be cut where tiles are fewer than multiprocessors. fixed_us: a
    launch of an empty problem.
    """

    format: str
    tflops: float
    sustained: float
    ramp: float
    edge: float
    alone: float
    tiles: tuple[tuple[int, int], ...]
    splits: int
    fixed_us: float


@dataclass(frozen=True)
class QuantizerRate:
    """Quantizers that write one or both layouts: the share of copy bandwidth that they reach on the
    bytes nobody can avoid (the input once, each layout's codes once), and a launch's own time."""

    layouts: str
    kind: str
    share: float
    fixed_us: float


@dataclass(frozen=True)
class HostTimes:
    """Host microseconds of one call: of an operator, or of a kernel of Inductor's (`kernel`).
    `step`: of a compiled graph's forward and backward beside its calls (of a forward alone no more
    than that)."""

    mm: float
    scaled_mm: float
    quantize_rows: float
    quantize_columns: float
    quantize_both: float
    kernel: float = 6.0
    step: float = 550.0


@dataclass(frozen=True)
class DeviceProfile:
    """One device. `copy_bytes_per_us` counts a copy's read and write; `source` says where the
    figures come from: `measured` on this device or on another, or a `datasheet` and priors."""

    name: str
    capability: tuple[int, int]
    source: str
    multiprocessors: int
    copy_bytes_per_us: float
    gemms: tuple[GemmRate, ...]
    quantizers: tuple[QuantizerRate, ...]
    host: HostTimes

    def gemm(self, format: str) -> GemmRate:
        """The rate of a format. ValueError lists those that the device has."""
        for rate in self.gemms:
            if rate.format == format:
                return rate
        known = ", ".join(rate.format for rate in self.gemms)
        raise ValueError(f"format must be one of {known} on {self.name}, got {format!r}")

    def quantizer(self, layouts: str, kind: str) -> QuantizerRate:
        """The rate of a quantizer. ValueError lists those that there are."""
        for rate in self.quantizers:
            if (rate.layouts, rate.kind) == (layouts, kind):
                return rate
        known = ", ".join(f"{rate.layouts} {rate.kind}" for rate in self.quantizers)
        raise ValueError(f"quantizer must be one of {known}, got {layouts!r} {kind!r}")

    def to_json(self) -> str:
        """The profile as JSON; `from_json` reads it back."""
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> DeviceProfile:
        """The profile that `to_json` wrote. ValueError on any other text."""
        try:
            data: dict[str, Any] = json.loads(text)
            data["capability"] = tuple(data["capability"])
            data["gemms"] = tuple(_gemm(entry) for entry in data["gemms"])
            data["quantizers"] = tuple(QuantizerRate(**entry) for entry in data["quantizers"])
            data["host"] = HostTimes(**data["host"])
            return DeviceProfile(**data)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a device profile: {error}") from error


def _gemm(entry: dict[str, Any]) -> GemmRate:
    tiles = tuple((int(rows), int(columns)) for rows, columns in entry["tiles"])
    return GemmRate(**{**entry, "tiles": tiles})


# Hopper: fitted to bench/results/time_model.json (one H200) by `hadagraph.fitting.fit`,
# but for the host times, which are of an older, slower run: they err towards bf16; `step` is what
# single Linears of bench/results/small.json take beyond their calls.
_TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 64))
_HOPPER_GEMMS = (
    GemmRate("bf16", 900.0, 740.0, 205.0, 2.8, 0.88, _TILES, 2, 2.4),
    GemmRate("int8", 2008.0, 1467.0, 183.0, 12.0, 0.53, _TILES, 1, 4.9),
    GemmRate("fp8", 2398.0, 1410.0, 670.0, 19.0, 0.69, _TILES, 1, 2.9),
)
_HOPPER_QUANTIZERS = (
    QuantizerRate("rows", "plain", 1.0, 1.6),
    QuantizerRate("rows", "rotated", 0.9, 2.5),
    QuantizerRate("rows", "per_tensor", 0.61, 4.9),
    QuantizerRate("columns", "plain", 0.52, 6.6),
    QuantizerRate("columns", "rotated", 0.57, 8.2),
    QuantizerRate("columns", "per_tensor", 0.5, 6.2),
    QuantizerRate("both", "plain", 0.52, 5.6),
    QuantizerRate("both", "rotated", 0.48, 11.5),
    QuantizerRate("both", "per_tensor", 0.54, 6.0),
)
# From bench/results/encode_kernels.json, and not fitted: means of few encodings.
_BLOCK_QUANTIZERS = (
    QuantizerRate("rows", "block", 0.56, 4.3),
    QuantizerRate("columns", "block", 0.43, 4.7),
    QuantizerRate("rows", "two_level", 0.37, 7.0),
    QuantizerRate("columns", "two_level", 0.16, 8.5),
    QuantizerRate("rows", "random", 0.22, 8.0),
    QuantizerRate("columns", "random", 0.22, 8.0),
)
_HOST = HostTimes(
    mm=15.0, scaled_mm=40.0, quantize_rows=29.0, quantize_columns=57.0, quantize_both=87.0
)
H200 = DeviceProfile(
    "H200",
    (9, 0),
    "measured on one H200",
    132,
    4.2e6,
    _HOPPER_GEMMS,
    _HOPPER_QUANTIZERS + _BLOCK_QUANTIZERS,
    _HOST,
)


def _prior(
    name: str,
    capability: tuple[int, int],
    multiprocessors: int,
    terabytes: float,
    tflops: dict[str, float],
    note: str,
) -> DeviceProfile:
    """A row from a datasheet: dense TFLOP/s by format and memory bandwidth in TB/s. Prior: cuBLAS
    reaches 0.85 of the former in bf16, our kernels 0.65 in 8 bit, a copy 0.85 of the latter,
    quantizers two thirds of Hopper's shares; the rest as on Hopper."""
    tiles = _TILES[2:]
    most = 0.85 * tflops["bf16"]
    gemms = [GemmRate("bf16", most, 0.9 * most, 154.0, 3.7, 1.0, tiles, 2, 4.0)]
    for format in ("int8", "fp8", "mxfp8", "fp4"):
        if format in tflops:
            most = 0.65 * tflops[format]
            gemms.append(GemmRate(format, most, 0.9 * most, 430.0, 5.0, 1.0, tiles, 1, 4.5))
    quantizers = tuple(replace(rate, share=rate.share * 2 / 3) for rate in H200.quantizers)
    source = f"datasheet, {note}" if note else "datasheet"
    bandwidth = 0.85e6 * terabytes
    return DeviceProfile(
        name, capability, source, multiprocessors, bandwidth, tuple(gemms), quantizers, _HOST
    )


# NVIDIA's datasheets and architecture white papers, without sparsity; GeForce accumulates bf16 and
# fp8 in fp32 at half of the headline rate. HGX B200: 72 PFLOP/s of fp8 and 144 of fp4, eight GPUs
# and sparsity counted, 4.5 and 9 without.
CHIPS: dict[str, DeviceProfile] = {
    "H200": H200,
    "H100": replace(
        H200, name="H100", source="measured on an H200, bandwidth scaled", copy_bytes_per_us=2.95e6
    ),
    "A100": _prior("A100", (8, 0), 108, 1.94, {"bf16": 312.0, "int8": 624.0}, ""),
    "L40S": _prior("L40S", (8, 9), 142, 0.864, {"bf16": 362.0, "int8": 733.0, "fp8": 733.0}, ""),
    "RTX 4090": _prior(
        "RTX 4090", (8, 9), 128, 1.008, {"bf16": 165.2, "int8": 660.6, "fp8": 330.3}, ""
    ),
    "B200": _prior(
        "B200",
        (10, 0),
        148,
        8.0,
        {"bf16": 2250.0, "int8": 450.0, "fp8": 4500.0, "mxfp8": 4500.0, "fp4": 9000.0},
        "int8 at a tenth: triton emits no fast int8 for sm_100",
    ),
    "RTX 5090": _prior(
        "RTX 5090",
        (12, 0),
        170,
        1.792,
        {"bf16": 209.5, "int8": 838.0, "fp8": 419.0, "mxfp8": 419.0, "fp4": 1676.0},
        "",
    ),
}
# A chip that the table does not name is taken for the slowest gain of its generation.
_BY_CAPABILITY = {
    (8, 0): "A100",
    (8, 6): "A100",
    (8, 9): "L40S",
    (9, 0): "H100",
    (10, 0): "B200",
    (12, 0): "RTX 5090",
}


def chip_named(name: str, option: str = "target") -> DeviceProfile:
    """The row of a chip, whatever its case. ValueError names the option and lists the chips."""
    for chip, profile in CHIPS.items():
        if chip.lower() == name.lower():
            return profile
    raise ValueError(f"option {option} must be one of {', '.join(CHIPS)}, got {name!r}")


def chip_profile(name: str, capability: tuple[int, int]) -> DeviceProfile | None:
    """The table's row for a CUDA device's name and compute capability; None where the table knows
    neither."""
    for chip, profile in CHIPS.items():
        if chip in name and profile.capability == capability:
            return profile
    known = _BY_CAPABILITY.get(capability)
    if known is None:
        return None
    profile = CHIPS[known]
    return replace(profile, name=name, source=f"{profile.source}; taken for {known}")
