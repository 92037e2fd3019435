"""Source of the scaled matmul for Hopper in Gluon, Triton's language of explicit layouts: one warp
loads, two warpgroups multiply. Only text.

Triton waits for each step's int8 products before the next. Here those of two steps are in flight,
and either one warpgroup scales and stores its tile while the other multiplies the next
("pingpong"), or both work on one of twice the width ("cooperative"), which reads a quarter less.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from hadagraph.codegen.primitives import SIGNATURE_DTYPES, TRITON_DTYPES, Lines, indent
from hadagraph.codegen.spec import COOPERATIVE, INPUT_BYTES, PINGPONG, GluonMmSpec

HOPPER = "triton.experimental.gluon.language.nvidia.hopper"
LINE = 100
SHARED = ("a_stages", "b_stages", "out_stages", "full", "empty")
SIZES = ("M", "N", "C")
LOADED = ("a_descriptor", "b_descriptor", "a_stages", "b_stages", "full", "empty", *SIZES)


@dataclass(frozen=True)
class ScheduleText:
    """The text in which one schedule differs from the other."""

    docstring: Lines
    barriers: tuple[tuple[str, int], ...]  # of its own, and how many
    boxes: tuple[tuple[str, str], ...]  # of b that a step loads: the place in b_stages, the row
    readers: int  # warpgroups that read a stage
    width: str  # columns of a warpgroup
    start: Lines
    tiles: str  # of a warpgroup: arguments of its range
    stride: str  # steps from one of its tiles to the next
    own_columns: Lines
    own_b: str
    before_products: Lines
    after_products: Lines


TEXTS = {
    PINGPONG: ScheduleText(
        docstring=[
            '"""One warpgroup: every other tile of this program. Two steps\' products are in',
            "flight; a stage is free when its own have ended and the next step's have begun.",
            '"""',
        ],
        barriers=(("turns", 2),),
        boxes=(("stage", "n"),),
        readers=1,
        width="BLOCK_N",
        start=[
            "programs = gl.num_programs(0)",
            "step = WORKER * steps",
            "turn = gl.to_tensor(1 - WORKER)  # the first is worker 0's",
        ],
        tiles="gl.program_id(0) + WORKER * programs, tiles, 2 * programs",
        stride="2 * steps",
        own_columns=[],
        own_b="stage",
        before_products=["mbarrier.wait(turns.index(WORKER), turn)", "turn ^= 1"],
        after_products=["mbarrier.arrive(turns.index(1 - WORKER), count=1)"],
    ),
    COOPERATIVE: ScheduleText(
        docstring=[
            '"""One warpgroup: half of the columns of every tile of this program. Two steps\'',
            "products are in flight; a stage is free when those of both warpgroups have ended.",
            '"""',
        ],
        barriers=(),
        boxes=(("2 * stage", "n"), ("2 * stage + 1", "n + HALF_N")),
        readers=2,
        width="HALF_N",
        start=["step = gl.to_tensor(0)"],
        tiles="gl.program_id(0), tiles, gl.num_programs(0)",
        stride="steps",
        own_columns=["n += WORKER * HALF_N"],
        own_b="2 * stage + WORKER",
        before_products=[],
        after_products=[],
    ),
}


def gluon_mm(spec: GluonMmSpec) -> Lines:
    """The file of `GluonMmSpec`'s kernel, up to what compiles it."""
    return [
        *_head(spec),
        *_function("tile_at", ["t", "M", "N"], _tile_at()),
        *_function("next_stage", ["stage", "phase"], _next_stage()),
        *_function("load", LOADED, _load(spec)),
        *_function("store", _stored(spec), _store(spec)),
        *_function("multiply", [*_multiplied(spec), "WORKER: gl.constexpr"], _multiply(spec)),
        *_function(spec.name, [name for name, _ in _arguments(spec)], _kernel(spec)),
    ]


def _function(name: str, arguments: Sequence[str], body: Lines) -> Lines:
    head = _listed(f"def {name}(", arguments, "):", 0)
    return ["", "", "@gluon.jit", *head, *indent(body)]


def _listed(before: str, items: Sequence[str], after: str, level: int) -> Lines:
    """`before`, the items and `after` in one line; where it is too long at this level of
    indentation, the items in lines of their own."""
    one = f"{before}{', '.join(items)}{after}"
    width = LINE - 4 * level
    if len(one) <= width:
        return [one]
    return [before, *indent(textwrap.wrap(f"{', '.join(items)},", width - 4)), after]


def _arguments(spec: GluonMmSpec) -> list[tuple[str, str]]:
    """The kernel's arguments and their Triton types; descriptors' layouts as f-strings."""
    operand = f"[{{}}, {spec.block_c}],{{{{CODES!r}}}}>"  # a tile's rows, a warpgroup's columns
    out = f"{SIGNATURE_DTYPES[spec.out_dtype]}[{spec.block_m}, {spec.out_width}],{{OUT!r}}>"
    arguments = [
        ("a_descriptor", "tensordesc<i8" + operand.format(spec.block_m)),
        ("b_descriptor", "tensordesc<i8" + operand.format(spec.warpgroup_n)),
        ("out_descriptor", f"tensordesc<{out}"),
        ("a_scale_ptr", "*fp32"),
        ("b_scale_ptr", "*fp32"),
    ]
    if spec.bias_dtype is not None:
        arguments.append(("bias_ptr", f"*{SIGNATURE_DTYPES[spec.bias_dtype]}"))
    return [*arguments, ("M", "i32"), ("N", "i32"), ("C", "i32")]


def _head(spec: GluonMmSpec) -> Lines:
    options = {"num_warps": spec.warps, "enable_fp_fusion": False}
    bits = 8 * INPUT_BYTES[spec.out_dtype]
    bias = " + bias" if spec.bias_dtype else ""
    layout = "gl.NVMMADistributedLayout([3, 0], [4, 1], [16, {}, 32])"
    constants = {
        "BLOCK_M": spec.block_m,
        "BLOCK_N": spec.block_n,
        "BLOCK_C": spec.block_c,
        **({"HALF_N": spec.warpgroup_n} if spec.cooperative else {}),
        "WIDTH": spec.out_width,
        "STAGES": spec.stages,
        "GROUP_M": spec.group,
        "SUMS": layout.format(spec.warpgroup_n),
        "RUN": layout.format(spec.out_width),
    }
    comments = {
        "HALF_N": "  # columns of one warpgroup",
        "WIDTH": "  # columns that are stored at once",
        "GROUP_M": "  # rows of tiles that share columns in L2",
    }
    return [
        f'"""{spec.name}: out [M, N] = (a [M, C] @ b [N, C]^T) * a_scale * b_scale{bias}."""',
        "",
        "import triton",
        "from triton.experimental import gluon",
        "from triton.experimental.gluon import language as gl",
        f"from {HOPPER} import (",
        "    fence_async_shared,",
        "    mbarrier,",
        "    tma,",
        "    warpgroup_mma,",
        "    warpgroup_mma_wait,",
        ")",
        "",
        *(f"{n} = gl.constexpr({value}){comments.get(n, '')}" for n, value in constants.items()),
        "CODES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)",
        f"OUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth={bits}, rank=2)",
        f"OPTIONS = {options}",
        "SIGNATURE = {",
        *(f'    "{name}": {_quoted(kind)},' for name, kind in _arguments(spec)),
        "}",
    ]


def _quoted(kind: str) -> str:
    return f'f"{kind}"' if "{" in kind else f'"{kind}"'


def _tile_at() -> Lines:
    return [
        '"""Row and column at which tile t starts; GROUP_M tiles down before the next column."""',
        "tiles_n = gl.cdiv(N, BLOCK_N)",
        "first_m = t // (GROUP_M * tiles_n) * GROUP_M",
        "group_m = min(gl.cdiv(M, BLOCK_M) - first_m, GROUP_M)",
        "in_group = t % (GROUP_M * tiles_n)",
        "return (first_m + in_group % group_m) * BLOCK_M, in_group // group_m * BLOCK_N",
    ]


def _next_stage() -> Lines:
    return [
        "last = stage == STAGES - 1",
        "return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)",
    ]


def _load(spec: GluonMmSpec) -> Lines:
    boxes = TEXTS[spec.schedule].boxes
    return [
        '"""One warp: keeps every free stage loading, over all of this program\'s tiles."""',
        "stage = gl.to_tensor(0)",
        "phase = gl.to_tensor(1)  # of fresh barriers: every stage is free",
        "tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)",
        "for t in range(gl.program_id(0), tiles, gl.num_programs(0)):",
        "    m, n = tile_at(t, M, N)",
        "    for c in range(0, C, BLOCK_C):",
        "        loaded = full.index(stage)",
        "        mbarrier.wait(empty.index(stage), phase)",
        "        mbarrier.expect(loaded, (BLOCK_M + BLOCK_N) * BLOCK_C)",
        *indent(_copy("a", "stage", "m"), 2),
        *indent([line for place, row in boxes for line in _copy("b", place, row)], 2),
        "        stage, phase = next_stage(stage, phase)",
    ]


def _copy(operand: str, place: str, row: str) -> Lines:
    source = f"{operand}_descriptor, [{row}, c]"
    return [
        f"{operand}_stage = {operand}_stages.index({place})",
        f"tma.async_copy_global_to_shared({source}, loaded, {operand}_stage)",
    ]


def _stored(spec: GluonMmSpec) -> list[str]:
    bias = [] if spec.bias_dtype is None else ["bias"]
    return ["sums", "a_scale", "b_scale", *bias, "out_descriptor", "out_stage", "m", "n"]


def _store(spec: GluonMmSpec) -> Lines:
    a_scale = "a_scale" if spec.a_per_tensor else "gl.expand_dims(a_scale, 1)"
    b_scale = "b_scale" if spec.b_per_tensor else "gl.expand_dims(b_scale, 0)"
    bias = ["out += gl.expand_dims(bias.to(gl.float32), 0)"] if spec.bias_dtype is not None else []
    return [
        '"""WIDTH columns of a tile: scaled, rounded, and on their way to memory."""',
        "out = gl.convert_layout(sums, RUN).to(gl.float32)",
        f"out = out * {a_scale} * {b_scale}",
        *bias,
        "tma.store_wait(pendings=0)  # until the stage was read",
        f"out_stage.store(out.to({_gluon_dtype(spec.out_dtype)}))",
        "fence_async_shared()",
        "tma.async_copy_shared_to_global(out_descriptor, [m, n], out_stage)",
    ]


def _gluon_dtype(name: str) -> str:
    return TRITON_DTYPES[name].replace("tl.", "gl.")


def _multiplied(spec: GluonMmSpec) -> list[str]:
    bias = [] if spec.bias_dtype is None else ["bias_ptr"]
    own = [name for name, _ in TEXTS[spec.schedule].barriers]
    return ["out_descriptor", "a_scale_ptr", "b_scale_ptr", *bias, *SHARED, *own, *SIZES]


def _multiply(spec: GluonMmSpec) -> Lines:
    text = TEXTS[spec.schedule]
    return [
        *text.docstring,
        "steps = gl.cdiv(C, BLOCK_C)",
        "tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)",
        *text.start,
        f"for t in range({text.tiles}):",
        *indent(_tile(spec)),
        "tma.store_wait(pendings=0)",
    ]


def _tile(spec: GluonMmSpec) -> Lines:
    text = TEXTS[spec.schedule]
    operands = [
        "mbarrier.wait(full.index(stage), phase)",
        "a = a_stages.index(stage)",
        f"b = b_stages.index({text.own_b}).permute((1, 0))",
    ]
    return [
        "m, n = tile_at(t, M, N)",
        *text.own_columns,
        "stage = step % STAGES",
        "phase = (step // STAGES) & 1",
        f"step += {text.stride}",
        *text.before_products,
        *_row_scales(spec),
        *operands,
        f"sums = gl.zeros([BLOCK_M, {text.width}], gl.int32, SUMS)",
        "sums = warpgroup_mma(a, b, sums, use_acc=False, is_async=True)",
        "sums = warpgroup_mma_wait(1, (sums,))",
        "before = stage",
        "stage, phase = next_stage(stage, phase)",
        "for _c in range(BLOCK_C, C, BLOCK_C):",
        *indent(operands),
        "    sums = warpgroup_mma(a, b, sums, is_async=True)",
        "    sums = warpgroup_mma_wait(1, (sums,))",
        "    mbarrier.arrive(empty.index(before), count=1)",
        "    before = stage",
        "    stage, phase = next_stage(stage, phase)",
        *text.after_products,
        *_column_vectors(spec),
        "sums = warpgroup_mma_wait(0, (sums,))",
        "mbarrier.arrive(empty.index(before), count=1)",
        *_stores(spec),
    ]


def _row_scales(spec: GluonMmSpec) -> Lines:
    if spec.a_per_tensor:
        return ["a_scale = gl.load(a_scale_ptr)"]
    mask = ", mask=rows < M, other=0.0" if spec.mask_m else ""
    return [
        "rows = m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, RUN))",
        f"a_scale = gl.load(a_scale_ptr + rows{mask})",
    ]


def _column_vectors(spec: GluonMmSpec) -> Lines:
    """Loads of what the columns of each run are scaled with and added to, under the products."""
    lines = ["b_scale = gl.load(b_scale_ptr)"] if spec.b_per_tensor else []
    named = [] if spec.b_per_tensor else ["b_scale"]
    named += [] if spec.bias_dtype is None else ["bias"]
    for run in range(spec.runs if named else 0):
        columns = f"columns_{run}"
        arange = "gl.arange(0, WIDTH, layout=gl.SliceLayout(0, RUN))"
        mask = f", mask={columns} < N, other=0.0" if spec.mask_n else ""
        lines += [f"{columns} = {_start(run)} + {arange}"]
        lines += [f"{name}_{run} = gl.load({name}_ptr + {columns}{mask})" for name in named]
    return lines


def _stores(spec: GluonMmSpec) -> Lines:
    """The tile as `spec.runs` runs of adjacent columns, halved until they are narrow enough, which
    moves nothing between threads."""
    lines, runs, width = [], ["sums"], spec.warpgroup_n
    while len(runs) < spec.runs:
        width //= 2
        halves = []
        for each in runs:
            stem = each if "_" in each else f"{each}_"
            left, right = f"{stem}l", f"{stem}r"
            swapped = f"{each}.reshape(BLOCK_M, 2, {width}).permute(0, 2, 1)"
            lines += [f"{left}, {right} = {swapped}.split()"]
            halves += [left, right]
        runs = halves
    for run, sums in enumerate(runs):
        b_scale = "b_scale" if spec.b_per_tensor else f"b_scale_{run}"
        bias = [] if spec.bias_dtype is None else [f"bias_{run}"]
        place = ["out_descriptor", "out_stage", "m", _start(run)]
        lines += _listed("store(", [sums, "a_scale", b_scale, *bias, *place], ")", 2)
    return ["out_stage = out_stages.index(WORKER)", *lines]


def _start(run: int) -> str:
    """The first column of a run."""
    return "n" if run == 0 else "n + WIDTH" if run == 1 else f"n + {run} * WIDTH"


def _kernel(spec: GluonMmSpec) -> Lines:
    text = TEXTS[spec.schedule]
    b_stages = "STAGES" if len(text.boxes) == 1 else f"{len(text.boxes)} * STAGES"
    shapes = {
        "a": "[STAGES, BLOCK_M, BLOCK_C]",
        "b": f"[{b_stages}, {text.width}, BLOCK_C]",
        "out": "[2, BLOCK_M, WIDTH]",
    }
    lines = []
    for name, shape in shapes.items():
        source = f"{name}_descriptor"
        items = [f"{source}.dtype", shape, f"{source}.layout"]
        lines += _listed(f"{name}_stages = gl.allocate_shared_memory(", items, ")", 1)
    layout = "mbarrier.MBarrierLayout()"
    for name, count in (("full", "STAGES"), ("empty", "STAGES"), *text.barriers):
        lines += [f"{name} = gl.allocate_shared_memory(gl.int64, [{count}, 1], {layout})"]
    workers = [_listed("(multiply, (", [*_multiplied(spec), w], ")),", 3) for w in "01"]
    return [
        *lines,
        "for i in gl.static_range(STAGES):",
        "    mbarrier.init(full.index(i), count=1)",
        f"    mbarrier.init(empty.index(i), count={text.readers})",
        *(line for name, count in text.barriers for line in _init(name, count)),
        "fence_async_shared()",
        "gl.warp_specialize(",
        "    [",
        *indent([line for worker in workers for line in worker], 2),
        *indent(_listed("(load, (", LOADED, ")),", 3), 2),
        "    ],",
        f"    [{spec.warps}, 1],  # warps of the second and the third",
        "    [240, 24],  # and their registers a thread",
        ")",
    ]


def _init(name: str, count: int) -> Lines:
    return [f"for i in gl.static_range({count}):", f"    mbarrier.init({name}.index(i), count=1)"]
