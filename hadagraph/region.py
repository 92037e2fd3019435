"""Regions: what passes between the passes and the code generator. A `Chain` is the pointwise
arithmetic that makes a quantizer's input, as data that is hashed, printed and parsed; a `Region`
names the nodes of one rotate-quantize-GEMM chain. Knows neither FX nor Triton.

Legend: T rows of the matrix that is quantized, K its columns.
"""

from __future__ import annotations

from dataclasses import dataclass

MATRIX, ROWS, COLUMNS, SCALAR = "matrix", "rows", "columns", "scalar"
SHAPES = (MATRIX, ROWS, COLUMNS, SCALAR)
DTYPES = ("bf16", "fp16", "fp32")
ARITY = {
    "add": 2,
    "sub": 2,
    "mul": 2,
    "div": 2,
    "maximum": 2,
    "minimum": 2,
    "pow": 2,
    "neg": 1,
    "abs": 1,
    "square": 1,
    "reciprocal": 1,
    "sqrt": 1,
    "rsqrt": 1,
    "exp": 1,
    "log": 1,
    "sigmoid": 1,
    "tanh": 1,
    "erf": 1,
    "relu": 1,
    "cast_bf16": 1,
    "cast_fp16": 1,
}
"""The operations of a chain and how many operands they take. All compute in fp32; `cast_*` rounds
to the dtype and continues in fp32."""


@dataclass(frozen=True)
class ChainInput:
    """A tensor that the chain reads: its dtype, and its shape as seen by the matrix [T, K]:
    `matrix` [T, K], `rows` [T] (one value a row), `columns` [K], `scalar` (one value)."""

    dtype: str
    shape: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES or self.shape not in SHAPES:
            raise ValueError(
                f"chain input must be one of {', '.join(DTYPES)} and one of {', '.join(SHAPES)}, "
                f"got {self.dtype!r} {self.shape!r}"
            )


@dataclass(frozen=True)
class Value:
    """An operand: the input or step with this number, inputs counted first."""

    index: int


@dataclass(frozen=True)
class Step:
    """One operation on values and constants."""

    op: str
    operands: tuple[Value | float, ...]

    def __post_init__(self) -> None:
        if self.op not in ARITY:
            raise ValueError(f"chain operation must be one of {', '.join(ARITY)}, got {self.op!r}")
        if len(self.operands) != ARITY[self.op]:
            raise ValueError(
                f"chain operation {self.op} takes {ARITY[self.op]} operands, "
                f"got {len(self.operands)}"
            )


@dataclass(frozen=True)
class ChainOutput:
    """A matrix [T, K] that the chain makes: a value, rounded to the dtype that it has in the
    graph. That is what is quantized."""

    value: Value
    dtype: str


@dataclass(frozen=True)
class Chain:
    """Pointwise arithmetic in fp32 from inputs to the matrices that are quantized."""

    inputs: tuple[ChainInput, ...]
    steps: tuple[Step, ...]
    outputs: tuple[ChainOutput, ...]

    def __post_init__(self) -> None:
        known = len(self.inputs)
        for step in self.steps:
            self._check(step.operands, known)
            known += 1
        self._check(tuple(output.value for output in self.outputs), known)
        if not any(each.shape == MATRIX for each in self.inputs):
            raise ValueError("a chain must read at least one matrix")

    @staticmethod
    def _check(operands: tuple[Value | float, ...], known: int) -> None:
        for operand in operands:
            if isinstance(operand, Value) and not 0 <= operand.index < known:
                raise ValueError(f"chain value %{operand.index} is used before it is made")

    def __str__(self) -> str:
        """`in bf16 matrix; in bf16 columns; mul %0 %1; out %2 bf16`: what `parse` reads."""
        lines = [f"in {each.dtype} {each.shape}" for each in self.inputs]
        lines += [f"{step.op} {' '.join(map(_operand, step.operands))}" for step in self.steps]
        lines += [f"out {_operand(each.value)} {each.dtype}" for each in self.outputs]
        return "; ".join(lines)

    @staticmethod
    def parse(text: str) -> Chain:
        """The chain that `str` wrote. ValueError names what cannot be read."""
        inputs: list[ChainInput] = []
        steps: list[Step] = []
        outputs: list[ChainOutput] = []
        for line in text.split(";"):
            op, *rest = line.split()
            if op == "in":
                inputs.append(ChainInput(*rest))
            elif op == "out":
                value = _parse_operand(rest[0])
                if not isinstance(value, Value):
                    raise ValueError(f"a chain's output must be a value, got {rest[0]!r}")
                outputs.append(ChainOutput(value, rest[1]))
            else:
                steps.append(Step(op, tuple(map(_parse_operand, rest))))
        return Chain(tuple(inputs), tuple(steps), tuple(outputs))


def _operand(operand: Value | float) -> str:
    return f"%{operand.index}" if isinstance(operand, Value) else repr(float(operand))


def _parse_operand(text: str) -> Value | float:
    return Value(int(text[1:])) if text.startswith("%") else float(text)


@dataclass(frozen=True)
class Region:
    """A quantizing op of a partitioned graph, by node name.

    gemms: the GEMMs that read its codes. producers: the pointwise nodes that it computes, in graph
    order, and `chain` their arithmetic (`Chain` as text). reason: why it computes none. unfused and
    fused: device memory traffic of producers and quantizers, codes left out, in bytes for one
    element of the matrix, without and with fusion; 0 where nothing was to be weighed.
    """

    quantizer: str
    gemms: tuple[str, ...]
    producers: tuple[str, ...] = ()
    chain: str = ""
    reason: str = ""
    unfused: int = 0
    fused: int = 0

    def __str__(self) -> str:
        weighed = f" ({self.unfused} -> {self.fused} bytes an element)" if self.fused else ""
        if self.chain:
            return f"{self.quantizer} computes {', '.join(self.producers)}{weighed}"
        return f"{self.quantizer} computes no producer: {self.reason}{weighed}"
