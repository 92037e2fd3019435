"""Direct launches without a GPU: Triton's own launcher, its C function replaced by a recorder, must
be given the same arguments the ordinary way and directly."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.nvidia import driver
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

from hadagraph.codegen import direct
from hadagraph.codegen.direct import Launch, TensorMaps

SIGNATURE = {"x": "*bf16", "d": "tensordesc<i8[16, 32]>", "y": "*fp32", "T": "i32", "K": "i32"}
META = {
    "swizzle": 1,
    "elem_size": 1,
    "elem_type": 0,
    "block_size": [16, 32],
    "fp4_padded": False,
}
GLUON_LAYOUT = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
GLUON_SIGNATURE = SIGNATURE | {"d": f"tensordesc<i8[16, 128],{GLUON_LAYOUT!r}>"}
STREAM = 77


def flat(values):
    """Arguments with tensors as addresses, and a hook that does nothing as the None it acts as."""
    result = []
    for value in values:
        if isinstance(value, (list, tuple)):
            result.append(flat(value))
        elif isinstance(value, torch.Tensor):
            result.append(value.data_ptr())
        else:
            result.append(None if value == "no hook" else value)
    return result


class Kernel:
    """A jitted kernel whose launches reach triton's CudaLauncher and then `recorded`."""

    def __init__(self, signature, metas, scratch=0):
        self.recorded, self.ordinary_launches, self.encoded = [], 0, 0

        def record(*arguments):
            self.recorded.append(flat(arguments))

        launcher = object.__new__(driver.CudaLauncher)
        launcher.launch = driver.wrap_handle_tensordesc(record, signature, metas)
        launcher.num_ctas = 1
        launcher.global_scratch_size = launcher.profile_scratch_size = scratch
        launcher.global_scratch_align = launcher.profile_scratch_align = 1
        launcher.launch_cooperative_grid, launcher.launch_pdl = False, True
        if triton.__version__ >= "3.7":
            launcher.arg_annotations, launcher.kernel_signature = "annotations", b"signature"
        metadata = SimpleNamespace(tensordesc_meta=metas)
        self.compiled = SimpleNamespace(
            run=launcher, function=5, packed_metadata=(4, 1, 1024), metadata=metadata
        )

    def __getitem__(self, grid):
        def start(*arguments, **options):
            assert options == {"num_warps": 4}
            self.ordinary_launches += 1
            self.given = arguments
            x, y, z = (*grid, 1, 1)[:3]
            c = self.compiled
            c.run(x, y, z, STREAM, c.function, c.packed_metadata, None, "no hook", None, *arguments)
            return c

        return start

    def count(self, *arguments, **options):
        self.ordinary_launches += 1
        return self.compiled

    def encode(self, address, swizzle, size, kind, block, shape, strides, padding):
        self.encoded += 1
        return ("map", address, swizzle, size, kind, *block, *shape, *strides, padding)


@pytest.fixture
def make(monkeypatch):
    """(signature, metas, scratch) -> a launch of 7 x 3 programs and its kernel."""

    def build(signature=SIGNATURE, metas=(META,), scratch=0):
        kernel = Kernel(signature, list(metas), scratch)
        utils = SimpleNamespace(
            fill_tma_descriptor=kernel.encode, fill_tma_descriptor_tiled=kernel.encode
        )
        active = SimpleNamespace(utils=utils, get_current_stream=lambda device: STREAM)
        fake = SimpleNamespace(runtime=SimpleNamespace(driver=SimpleNamespace(active=active)))
        monkeypatch.setattr(driver, "triton", fake)
        monkeypatch.setattr(direct, "_stream_of", lambda: active.get_current_stream)
        return Launch(kernel, (7, 3), {"num_warps": 4}, signature, (64, 128)), kernel

    return build


def tensors(offset=0):
    x = torch.zeros(64 * 128 + 8, dtype=torch.bfloat16)[offset:][: 64 * 128].view(64, 128)
    return x, torch.zeros(64, 128, dtype=torch.int8), torch.zeros(64)


def test_the_second_launch_says_what_the_ordinary_one_says(make):
    launch, kernel = make()
    launch(*tensors())
    other = tensors()
    launch(*other)
    assert kernel.ordinary_launches == 1
    launch.ordinary(*other)
    assert kernel.ordinary_launches == 2
    assert kernel.recorded[1] == kernel.recorded[2] != kernel.recorded[0]


def test_descriptors_of_gluon(make):
    launch, kernel = make(GLUON_SIGNATURE, (META | {"swizzle": 3, "block_size": [16, 128]},))
    x, _, y = tensors()
    codes = torch.zeros(64, 256, dtype=torch.int8)
    for _ in range(2):
        launch(x, codes, y)
    assert kernel.ordinary_launches == 1
    assert kernel.recorded[0] == kernel.recorded[1]
    descriptor = kernel.given[1]
    assert isinstance(descriptor, GluonDescriptor)
    assert (descriptor.block_shape, descriptor.layout) == ([16, 128], GLUON_LAYOUT)


def test_another_layout_than_the_signature_says_is_an_error():
    padded = NVMMASharedLayout(128, 8, rank=2, fp4_padded=True)
    with pytest.raises(AssertionError, match="fp4_padded"):
        direct.Block.of(f"tensordesc<i8[16, 128],{padded!r}>")


def test_without_descriptors(make):
    signature = {"x": "*bf16", "y": "*fp32", "T": "i32", "K": "i32"}
    launch, kernel = make(signature, ())
    x, _, y = tensors()
    for _ in range(2):
        launch(x, y)
    assert kernel.ordinary_launches == 1
    assert kernel.recorded[0] == kernel.recorded[1]


def test_an_address_is_encoded_once(make):
    launch, kernel = make()
    given = [tensors() for _ in range(3)]
    launch(*given[0])  # Triton's own
    before = kernel.encoded
    for _ in range(2):
        for each in given:
            launch(*each)
    assert kernel.encoded == before + 3
    for each, row in zip(given, kernel.recorded[1:4], strict=True):
        assert str(("map", each[1].data_ptr(), 1))[:-1] in str(row).replace("[", "(")


def test_maps_may_be_dropped_under_way(make, monkeypatch):
    """A launch holds the maps that it uses, whatever is dropped meanwhile."""
    monkeypatch.setattr(direct, "MAPS_KEPT", 1)
    signature = {"d": SIGNATURE["d"], "e": SIGNATURE["d"], "T": "i32", "K": "i32"}
    launch, kernel = make(signature, (META, META))
    pairs = [(tensors()[1], tensors()[1]) for _ in range(3)]
    launch(*pairs[0])  # Triton's own
    encode = TensorMaps.__call__

    def encode_and_drop(maps, *arguments):
        found = encode(maps, *arguments)
        for other in launch.maps:
            other.kept.clear()
        return found

    monkeypatch.setattr(TensorMaps, "__call__", encode_and_drop)
    for pair in pairs:
        launch(*pair)
        launch.ordinary(*pair)
        assert kernel.recorded[-2] == kernel.recorded[-1]


def test_few_maps_are_kept(make, monkeypatch):
    monkeypatch.setattr(direct, "MAPS_KEPT", 2)
    launch, kernel = make()
    given = [tensors() for _ in range(5)]
    for each in (given[0], *given, *given):
        launch(*each)
        launch.ordinary(*each)
        assert kernel.recorded[-2] == kernel.recorded[-1]
        assert all(maps is None or len(maps.kept) <= 2 for maps in launch.maps)


def test_what_is_prepared_is_prepared_before_the_first_launch(make):
    launch, kernel = make()
    launches = []
    launch.prepare = lambda: launches.append(kernel.ordinary_launches)
    for _ in range(3):
        launch(*tensors())
    assert launches == [0]


def test_misaligned_tensors_go_through_triton(make):
    launch, kernel = make()
    launch(*tensors(offset=4))  # first: its binary must not be kept
    launch(*tensors())
    launch(*tensors(offset=4))
    assert kernel.ordinary_launches == 3
    launch(*tensors())
    assert kernel.ordinary_launches == 3


def test_launch_hooks_see_every_launch(make, monkeypatch):
    launch, kernel = make()
    launch(*tensors())
    monkeypatch.setattr(
        triton.knobs.runtime, "launch_enter_hook", SimpleNamespace(calls=[lambda metadata: None])
    )
    launch(*tensors())
    assert kernel.ordinary_launches == 2
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", None)
    launch(*tensors())
    assert kernel.ordinary_launches == 2


@pytest.mark.parametrize("why", ["version", "scratch", "launcher", "descriptors"])
def test_what_is_not_known_goes_through_triton(make, monkeypatch, caplog, why):
    direct._log_once.cache_clear()
    launch, kernel = make(scratch=0)
    expected = {
        "version": "9.0.0 is not one of",
        "scratch": "scratch",
        "launcher": "SimpleNamespace",
        "descriptors": "not tensor maps",
    }[why]
    if why == "version":
        monkeypatch.setattr(triton, "__version__", "9.0.0")
    elif why == "scratch":
        kernel.compiled.run.global_scratch_size = 8
        allocator = SimpleNamespace(get=lambda: lambda size, align, stream: None)
        monkeypatch.setattr(driver._allocation, "_allocator", allocator)
    elif why == "launcher":
        monkeypatch.setattr(Kernel, "__getitem__", lambda self, grid: self.count)
        kernel.compiled.run = SimpleNamespace()
    else:
        kernel.compiled.metadata.tensordesc_meta = None
    with caplog.at_level(logging.INFO, logger=direct.__name__):
        for _ in range(3):
            launch(*tensors())
    assert kernel.ordinary_launches == 3
    assert [expected in record.getMessage() for record in caplog.records] == [True]


def test_without_a_binary_every_launch_is_ordinary():
    calls = []
    interpreted = {(2,): lambda *arguments, **options: calls.append(arguments)}
    launch = Launch(interpreted, (2,), {}, {"x": "*fp32", "T": "i32"}, (3,))
    x = torch.zeros(4)
    launch(x)
    launch(x)
    assert calls == [(x, 3), (x, 3)]
