"""Kernels of a profiler's trace: each one's kind by name, its time and count, and, where the
operator that launched it tells its operands' shapes, its FLOPs and bytes. Runs no kernel.

T rows and K columns of a quantizer's input; M, N kept dims and C contracted dim of a GEMM.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# First match wins. Inductor names its kernels after the operators in them, so that its rows come
# first; hadagraph's own kernels bear the names of their KernelSpecs; `nvjet` is cuBLAS's, its
# letters the types of both operands (q e4m3, r e5m2, t bf16).
NAMES_OF_KIND = (
    ("Inductor, with a quantizer", r"^triton_(?!tem|mm).*(amax|abs.*max|clamp|float8)"),
    ("Inductor, reduction", r"^triton_(red|per|mix)"),
    ("Inductor, pointwise", r"^triton_(?!tem|mm)"),
    ("copy, memset", r"^mem(cpy|set)\b|copy_kernel|fillfunctor|catarraybatched"),
    ("attention backward", r"flash_bwd|flash_bprop|fmha_cutlassB|dot_do_o|sdpa.*bprop"),
    ("attention backward", r"(fmha|attention).*(bwd|backward)|(bwd|backward).*(fmha|attention)"),
    ("attention forward", r"flash_fwd|flash_fprop|fmha|sdpa|attention"),
    ("8-bit GEMM", r"scaled_mm|nvjet(_sm\d+)?_[qr]{2}"),
    ("8-bit GEMM", r"(gemm|cutlass|cublas|triton_tem).*(e4m3|e5m2|float8|fp8|int8|_s8|i8816)"),
    ("8-bit GEMM", r"(gemm|cutlass|cublas).*(i16832|i8i32|imma)"),
    ("bf16 GEMM", r"nvjet|gemm|cutlass|cublas|splitk|triton_(tem|mm)"),
    ("quantizer, maxima", r"amax"),
    ("quantizer, codes", r"quantize"),
)
# For kernels whose name says nothing.
OPERATORS_OF_KIND = (
    ("8-bit GEMM", r"aten::(_scaled_mm|_int_mm)|hadagraph::.*scaled_mm"),
    ("bf16 GEMM", r"aten::(mm|addmm|bmm|baddbmm)$"),
    ("quantizer, codes", r"hadagraph::"),
)
OTHER = "other"
KINDS = (
    "8-bit GEMM",
    "bf16 GEMM",
    "quantizer, maxima",
    "quantizer, codes",
    "attention forward",
    "attention backward",
    "Inductor, with a quantizer",
    "Inductor, reduction",
    "Inductor, pointwise",
    "copy, memset",
    OTHER,
)
BYTES_OF_TYPE = {
    "c10::BFloat16": 2,
    "c10::Half": 2,
    "float": 4,
    "double": 8,
    "int": 4,
    "long int": 8,
    "signed char": 1,
    "unsigned char": 1,
    "c10::Float8_e4m3fn": 1,
    "c10::Float8_e5m2": 1,
    "bool": 1,
}
DEVICE_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
MATMULS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_mm", "aten::_int_mm")


def kind_of(kernel: str, operator: str = "") -> str:
    """Which of KINDS a kernel belongs to."""
    for text, table in ((kernel, NAMES_OF_KIND), (operator, OPERATORS_OF_KIND)):
        for kind, pattern in table:
            if re.search(pattern, text, re.IGNORECASE):
                return kind
    return OTHER


@dataclass
class KernelTime:
    """All launches of one kernel by one operator on operands of the same shapes, over a step.

    us: microseconds of all launches. flops and bytes: of one launch, where they are known.
    """

    kernel: str
    operator: str
    shapes: str
    kind: str
    count: float
    us: float
    flops: int | None
    bytes: int | None

    @property
    def us_each(self) -> float:
        return self.us / self.count


def recorded(profiler: Any, steps: int) -> list[KernelTime]:
    """The device's work in what a `torch.profiler.profile` has seen of `steps` alike steps."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return kernel_times(json.loads(path.read_text())["traceEvents"], steps)


def kernel_times(events: Iterable[dict[str, Any]], steps: int) -> list[KernelTime]:
    """The device's work in the `traceEvents` of `steps` alike steps, longest first."""
    operators: dict[int, dict[str, Any]] = {}
    launched = []
    for event in events:
        category = event.get("cat")
        if category == "cpu_op" and "External id" in event.get("args", {}):
            operators[event["args"]["External id"]] = event
        elif category in DEVICE_CATEGORIES:
            launched.append(event)
    grouped: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    by_key: dict[tuple[str, str, str], tuple[dict[str, Any], dict[str, Any]]] = {}
    for event in launched:
        operator = operators.get(event.get("args", {}).get("External id"), {})
        arguments = operator.get("args", {})
        shapes = [size for size, _ in _tensors(arguments)]
        shown = " ".join("x".join(map(str, size)) for size in shapes[:3])
        key = (event["name"], operator.get("name", ""), shown)
        grouped[key].append(event)
        by_key.setdefault(key, (event, arguments))
    found = []
    for key, same in grouped.items():
        name, operator_name, shown = key
        event, arguments = by_key[key]
        kind = kind_of(name, operator_name)
        work = _work(kind, event, operator_name, arguments)
        us = sum(e["dur"] for e in same) / steps
        found.append(KernelTime(*key, kind, len(same) / steps, us, *work))
    return sorted(found, key=lambda row: -row.us)


def _tensors(arguments: dict[str, Any]) -> list[tuple[list[int], int]]:
    """Shape and bytes an element of an operator's tensors, scalars left out; those in lists, whose
    dtypes a trace does not tell, count as 2 bytes."""
    dims = arguments.get("Input Dims", [])
    found: list[tuple[list[int], int]] = []
    for size, dtype in zip(dims, arguments.get("Input type", [""] * len(dims)), strict=False):
        if size and isinstance(size[0], list):
            found += [(each, 2) for each in size if each]
        elif size and dtype in BYTES_OF_TYPE:
            found.append((size, BYTES_OF_TYPE[dtype]))
    return found


def _work(
    kind: str, event: dict[str, Any], operator: str, arguments: dict[str, Any]
) -> tuple[int | None, int | None]:
    """FLOPs and bytes of one launch; None where the operands do not tell.

    An Inductor kernel's bytes are those of all its arguments, each counted once; a quantizer's are
    its inputs' and one a code, without values that it also keeps in high precision.
    """
    name = event["name"]
    tensors = _tensors(arguments)
    if event["cat"] != "kernel":
        moved = event.get("args", {}).get("bytes")
        return None, moved and moved * (2 if event["cat"] == "gpu_memcpy" else 1)
    if kind.endswith("GEMM") and "reduce" not in name.lower():
        return _matmul_work(operator, tensors)
    if operator.startswith("triton_") and tensors:
        return None, sum(math.prod(size) * width for size, width in tensors)
    if kind.startswith("quantizer") and operator.startswith("hadagraph::quantize") and tensors:
        read = sum(math.prod(size) * width for size, width in tensors)
        layouts = 0 if "amax" in name else name.count("rows") + name.count("columns")
        return None, read + layouts * max(math.prod(size) for size, _ in tensors)
    return None, None


def _matmul_work(
    operator: str, tensors: list[tuple[list[int], int]]
) -> tuple[int | None, int | None]:
    """Of a [M, C] times b [C, N], or hadagraph's b [N, C], with a 2-byte result."""
    matrices = [(size, width) for size, width in tensors if len(size) >= 2]
    ours = operator.startswith("hadagraph::") and "scaled_mm" in operator
    if len(matrices) < 2 or not (ours or operator in MATMULS):
        return None, None
    (a, width), (b, _) = matrices[:2]
    if operator == "aten::addmm" and len(matrices) > 2:
        (a, width), (b, _) = matrices[1:3]
    M, C = math.prod(a[:-1]), a[-1]
    N = b[0] if ours else b[-1]
    batches = math.prod(b[:-2])
    return 2 * M * N * C, width * (M * C + batches * N * C) + 2 * M * N


def by_kind(rows: list[KernelTime]) -> dict[str, float]:
    """Kind -> milliseconds a step, every kind present."""
    total = dict.fromkeys(KINDS, 0.0)
    for row in rows:
        total[row.kind] += row.us / 1e3
    return total
