"""Direct launches on a GPU: the same bits as launches through Triton, wherever tensors lie, on any
stream, and in CUDA graphs."""

from __future__ import annotations

import ctypes

import pytest
import torch
import triton
from kernel_checks import integers

from hadagraph import ops
from hadagraph.codegen import direct, launch

pytestmark = pytest.mark.gpu
KNOWN = triton.__version__.split("+")[0] in direct.KNOWN_TRITON
ROTATED, PLAIN = "int8/per_kept_index/h128", "int8/per_tensor"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No launch is ready; `_hooked` as Triton's knobs say."""
    launch.prepare("cuda")
    monkeypatch.setattr(launch, "_READY", {})


@pytest.fixture
def ordinary(monkeypatch):
    """How many launches went through Triton, as a list to which each adds its kernel."""
    seen = []
    original = direct.Launch.ordinary

    def spy(self, *tensors):
        seen.append(self.kernel)
        return original(self, *tensors)

    monkeypatch.setattr(direct.Launch, "ordinary", spy)
    return seen


def every_operator(x: torch.Tensor) -> list[torch.Tensor]:
    rows, row_scale = ops.quantize_rows(x, ROTATED)
    columns, column_scale = ops.quantize_columns(x, ROTATED)
    both = (*ops.quantize_both(x, ROTATED, ROTATED), *ops.quantize_both(x, ROTATED, PLAIN))
    bias = x[0, : x.shape[0]].contiguous()
    y = ops.scaled_mm(rows, rows, row_scale, row_scale, None, torch.bfloat16)
    z = ops.scaled_mm(columns, columns, column_scale, column_scale, None, torch.float32)
    outputs = [rows, row_scale, columns, column_scale, *both, y, z]
    if len(bias) == len(rows):
        outputs.append(ops.scaled_mm(rows, rows, row_scale, row_scale, bias, torch.bfloat16))
    return outputs


def assert_same_bits(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def through_triton(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    with monkeypatch.context() as patched:
        patched.setattr(direct, "_hooked", lambda: True)
        return every_operator(x)


@pytest.mark.parametrize("shape", [(256, 384), (250, 200), (1, 130)])
def test_same_bits_as_through_triton(shape, monkeypatch, ordinary):
    inputs = [integers(*shape, torch.bfloat16, seed).cuda() for seed in range(4)]
    want = [through_triton(x, monkeypatch) for x in inputs]
    launch._READY.clear()
    every_operator(inputs[0])
    ordinary.clear()
    got = [every_operator(x) for x in inputs]
    torch.cuda.synchronize()
    for one, other in zip(got, want, strict=True):
        assert_same_bits(one, other)
    if KNOWN:
        assert ordinary == []


@pytest.mark.parametrize("offset", [1, 4, 8])
def test_other_alignments_take_turns(offset, monkeypatch):
    """One after the other and in both orders: a binary for aligned pointers must not be given
    others. offset: elements of 2 bytes, so 8 keeps the alignment of 16."""
    base = integers(257, 384, torch.bfloat16).cuda().flatten()
    aligned = base[: 256 * 384].view(256, 384)
    moved = base[offset : offset + 256 * 384].view(256, 384)
    want = [through_triton(x.clone(), monkeypatch) for x in (aligned, moved)]
    for order in ((0, 1), (1, 0)):
        launch._READY.clear()
        for _ in range(2):
            for index in order:
                assert_same_bits(every_operator((aligned, moved)[index]), want[index])


def test_misaligned_scales_and_bias():
    codes = torch.randint(-127, 128, (128, 256), dtype=torch.int8, device="cuda")
    vectors = torch.rand(3, 132, device="cuda").flatten()
    results = []
    for offset in (0, 1, 0, 3):
        scale, bias = vectors[offset : offset + 128], vectors[132 + offset : 260 + offset]
        got = ops.scaled_mm(codes, codes, scale, scale, bias, torch.float32)
        want = ops.scaled_mm(codes, codes, scale.clone(), scale.clone(), bias.clone(), got.dtype)
        results.append(got)
        assert torch.equal(got, want)
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])


def test_a_side_stream_is_waited_for_by_nothing_else(monkeypatch):
    """The launch must go to the current stream: it sees what that stream wrote after a delay."""
    x, after = (integers(256, 384, torch.bfloat16, seed).cuda() for seed in (0, 1))
    want = through_triton(after, monkeypatch)
    every_operator(x)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x.copy_(after)
        got = every_operator(x)
    side.synchronize()
    assert_same_bits(got, want)


def test_cuda_graph_capture_and_replay(monkeypatch, ordinary):
    x = integers(256, 384, torch.bfloat16).cuda()
    every_operator(x)
    torch.cuda.synchronize()
    ordinary.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = every_operator(x)
    if KNOWN:
        assert ordinary == []
    for seed in (1, 2, 3):
        x.copy_(integers(256, 384, torch.bfloat16, seed))
        graph.replay()
        graph.replay()  # the maxima start at zero again
        assert_same_bits(captured, through_triton(x.clone(), monkeypatch))


def test_two_runs_give_the_same_bits():
    """Maxima are taken with atomics in any order, and nothing else is."""
    x = torch.randn(4096, 1024, device="cuda").bfloat16()
    first = every_operator(x)
    for _ in range(5):
        assert_same_bits(every_operator(x), first)


def test_launch_hooks_are_called(monkeypatch):
    seen = []
    x = integers(64, 128, torch.bfloat16).cuda()
    for _ in range(2):
        ops.quantize_rows(x, ROTATED)
    hook = triton.knobs.runtime.launch_enter_hook
    record = lambda metadata: seen.append(metadata.get()["name"])  # noqa: E731
    hook.add(record)
    try:
        ops.quantize_rows(x, ROTATED)
    finally:
        hook.remove(record)
    ops.quantize_rows(x, ROTATED)
    assert [name.startswith("quantize_rows") for name in seen] == [True]


def test_zeros_are_zero_on_every_stream():
    for count in (1, 3, 1000, 1 << 20):
        dirty = torch.full((count,), -1, dtype=torch.int32, device="cuda")
        del dirty
        for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                words = direct.zero_words(count, torch.device("cuda", torch.cuda.current_device()))
                assert words.shape == (count,) and words.dtype == torch.int32
                assert not words.any()


def test_torch_makes_the_zeros_where_the_driver_refuses(monkeypatch):
    failing = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_uint64, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p
    )
    monkeypatch.setattr(direct, "_memset", lambda: failing(lambda *arguments: 201))
    words = direct.zero_words(4, torch.device("cuda", torch.cuda.current_device()))
    assert words.tolist() == [0, 0, 0, 0]
