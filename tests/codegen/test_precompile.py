"""Kernels compiled ahead: those that the calls will launch, under the keys that the launches ask
for. A driver that says sm_90 stands for the GPU."""

from __future__ import annotations

import logging
import os
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from again import compiler
from kernel_checks import CHAINS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from hadagraph import backend, compat
from hadagraph.codegen import precompile, workers
from hadagraph.codegen.direct import Launch
from hadagraph.codegen.listing import specs_for
from hadagraph.codegen.store import kernel_module
from hadagraph.region import Chain

pytestmark = compiler
HOPPER, TARGET = (9, 0), GPUTarget("cuda", 90, 32)
H128, H32, FP8 = "int8/per_kept_index/h128", "int8/per_kept_index/h32", "fp8_e4m3/per_tensor"


@pytest.fixture
def device(monkeypatch, tmp_path):
    """The process's driver is one of sm_90, its kernels' cache is empty."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(workers, "_SUBMITTED", {})
    monkeypatch.setattr(workers, "TOTALS", workers.Totals())
    stub = SimpleNamespace(
        get_current_target=lambda: TARGET,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(driver, "_active", stub)
    return stub


@pytest.fixture
def pool(monkeypatch, device):
    """What was submitted; it stays unfinished."""
    submitted = []

    def submit(task, *arguments):
        submitted.append((task, arguments))
        return Future()

    monkeypatch.setattr(workers, "submit_to_compile_worker", submit)
    return submitted


def matrix(T, K, dtype=torch.bfloat16, device="meta"):
    return torch.empty(T, K, dtype=dtype, device=device)


def multiplication(M, N, C, dtype=torch.int8, bias=None):
    scales = (torch.empty(M, device="meta"), torch.empty(N, device="meta"))
    return (matrix(M, C, dtype), matrix(N, C, dtype), *scales, bias, torch.bfloat16)


def chained(name, T, K, rows, columns):
    chain = Chain.parse(CHAINS[name])
    count = len(chain.outputs)
    inputs = [matrix(T, K)] * len(chain.inputs)
    return inputs, str(chain), [rows] * count, [columns] * count, [False] * count


CALLS = [
    ("quantize_rows", (matrix(16384, 4096), H128)),
    ("quantize_columns", (matrix(1000, 4096), H32)),
    ("quantize_both", (matrix(16384, 4096), H128, H32)),
    ("quantize_both", (matrix(16384, 4096).t(), H128, H32)),
    ("quantize_both", (matrix(512, 768), FP8, FP8)),
    ("quantize_chain", chained("silu_mul_backward", 16384, 14336, H128, H32)),
    ("scaled_mm", multiplication(16384, 14336, 4096)),
    ("scaled_mm", multiplication(1000, 4096, 4096, torch.float8_e4m3fn, torch.empty(4096))),
]


@pytest.mark.parametrize(("op", "arguments"), CALLS)
def test_the_kernels_of_a_call_are_found(op, arguments):
    found = {request.spec for request in precompile.requests_for(op, arguments, HOPPER)}
    assert found == set(specs_for(op, arguments, HOPPER))
    assert found or op == "scaled_mm"  # which may be the library's


def test_an_unknown_operator_has_none():
    assert precompile.requests_for("projected_mm", (matrix(16, 16),), HOPPER) == []


def launched(request, tensors):
    """Compiles as the first launch of `direct.Launch` does, and stops before the GPU."""
    module = kernel_module(request.spec)
    kernel = getattr(module, request.spec.name)

    class Compiling:
        def __getitem__(self, grid):
            return lambda *given, **options: kernel.run(*given, grid=grid, warmup=True, **options)

    launch = Launch(Compiling(), (1,), module.OPTIONS, module.SIGNATURE, request.integers)
    return launch.ordinary(*tensors)


def compile_here(op, arguments):
    """In this process, as a worker does; the request."""
    request = precompile.requests_for(op, arguments, HOPPER)[-1]
    target = (TARGET.backend, TARGET.arch, TARGET.warp_size)
    path, environment = str(kernel_module(request.spec).__file__), workers.triton_environment()
    given = (path, request.spec.name, request.integers, target, environment)
    assert workers.compile_kernel(*given) > 0
    return request


LAUNCHES = pytest.mark.parametrize(
    ("op", "arguments", "shapes"),
    [
        # integers that are 1, a multiple of 16, and neither
        ("quantize_rows", (matrix(1, 96), H32), [(1, 96), (128, 128), (1, 96), (1,)]),
        ("quantize_columns", (matrix(64, 100), H32), [(64, 100), (100,), (100, 64), (100,)]),
        # descriptors of Triton and of Gluon
        (
            "scaled_mm",
            multiplication(1024, 1024, 256, torch.float8_e5m2)[:1]
            + multiplication(1024, 1024, 256, torch.float8_e4m3fn)[1:],
            [(1024, 256), (1024, 256), (1024, 1024), (1024,), (1024,)],
        ),
        (
            "scaled_mm",
            multiplication(4096, 4096, 256),
            [(4096, 256), (4096, 256), (4096, 4096), (4096,), (4096,)],
        ),
    ],
)


@LAUNCHES
def test_a_launch_finds_what_was_compiled_ahead(device, monkeypatch, op, arguments, shapes):
    hits = []
    monkeypatch.setattr(
        triton.knobs.compilation, "listener", lambda *, cache_hit, **_: hits.append(cache_hit)
    )
    request = compile_here(op, arguments)
    assert driver.active is device
    assert launched(request, tensors_of(request, shapes)) is not None
    assert hits == [False, True]


def tensors_of(request, shapes):
    """Aligned ones for the arguments of its kernel."""
    kinds = [kind for kind in kernel_module(request.spec).SIGNATURE.values() if kind != "i32"]
    dtypes = [workers.stand_in(kind) for kind in kinds]
    dtypes = [getattr(each, "base", each).dtype for each in dtypes]
    tensors = [torch.empty(*s, dtype=d) for s, d in zip(shapes, dtypes, strict=True)]
    assert not any(tensor.data_ptr() % 16 for tensor in tensors)
    return tensors


@LAUNCHES
@pytest.mark.skipif(not hasattr(nvidia, "make_launcher"), reason="one launcher for all kernels")
def test_the_first_launch_finds_its_launcher_built(device, monkeypatch, op, arguments, shapes):
    """With triton 3.6, which has a C compiler build one for each signature."""
    built = []

    def build(name, src, srcdir, *_):
        built.append(Path(src).read_text())
        (Path(srcdir) / "built.so").touch()
        return str(Path(srcdir) / "built.so")

    monkeypatch.setattr(triton.runtime.build, "_build", build)
    monkeypatch.setattr(nvidia, "library_dirs", list)  # there is no driver here
    loaded = SimpleNamespace(launch=lambda *_: None)
    monkeypatch.setattr(triton.runtime.build, "_load_module_from_path", lambda *_: loaded)
    request = compile_here(op, arguments)
    assert len(built) == 1
    compiled = launched(request, tensors_of(request, shapes))
    nvidia.CudaLauncher(compiled.src, compiled.metadata)
    assert len(built) == 1


def test_a_launcher_that_cannot_be_built_loses_no_kernel(device, monkeypatch, caplog):
    def refused(*_):
        raise AssertionError("libcuda.so cannot found!")

    monkeypatch.setattr(nvidia, "make_launcher", refused, raising=False)
    monkeypatch.setattr(nvidia, "CudaLauncher", refused)
    with caplog.at_level(logging.DEBUG, logger="hadagraph.codegen.direct"):
        compile_here("quantize_rows", (matrix(16, 96), H32))
    assert "its launcher is built at the first launch" in caplog.text


def test_a_kernel_is_submitted_once(pool):
    call = ("quantize_rows", (matrix(1024, 1024), H128))
    alike = ("quantize_rows", (torch.empty_like(call[1][0]), H128))
    assert precompile.compile_ahead([call, alike], HOPPER) == 1
    assert precompile.compile_ahead([alike], HOPPER) == 0
    ((task, (path, name, integers, target, environment)),) = pool
    assert task is workers.compile_kernel
    assert (name, integers) == ("quantize_rows_int8_h128_bf16", (1024, 1024, 1024, 1024))
    assert target == ("cuda", 90, 32)
    assert environment["TRITON_CACHE_DIR"] == os.environ["TRITON_CACHE_DIR"]
    assert f"def {name}(" in Path(path).read_text()


def test_symbolic_sizes_count_as_their_hints(pool):
    symbols = ShapeEnv()
    mode = FakeTensorMode(shape_env=symbols)
    dynamic = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    fake = mode.from_tensor(torch.empty(1024, 512).bfloat16(), symbolic_context=dynamic)
    assert isinstance(fake.shape[0], torch.SymInt)
    with mode:
        assert precompile.compile_ahead([("quantize_rows", (fake, H128))], HOPPER) == 1
    ((_, (_, _, integers, _, _)),) = pool
    assert integers == (1024, 512, 512, 512)
    assert not symbols.guards
    rotated = ("unrotate", (fake, 0, "h16", fake.shape[0]))
    assert precompile._key(*rotated) == precompile._key("unrotate", (fake, 0, "h16", 1024))


def test_one_compile_thread_means_no_worker(device, monkeypatch):
    monkeypatch.setattr(compat, "AsyncCompile", None)  # not asked
    with compat.inductor_config.patch(compile_threads=1):
        assert precompile.compile_ahead([CALLS[0]], HOPPER) == 0
    assert not workers._SUBMITTED


def test_the_first_launch_waits(pool, monkeypatch):
    call = CALLS[0]
    precompile.compile_ahead([call], HOPPER)
    ((request, future),) = workers._SUBMITTED.items()
    waited = []

    def wait(futures, timeout):
        waited.append(futures)
        future.set_result(2.5)
        return SimpleNamespace(done=True)

    monkeypatch.setattr(workers, "wait", wait)
    for _ in range(2):
        workers.wait_for(request)
    assert waited == [[future]]
    assert (workers.TOTALS.kernels, workers.TOTALS.worker_seconds) == (1, 2.5)


def test_a_failed_worker_is_logged(pool, caplog):
    with caplog.at_level(logging.DEBUG, logger=workers.__name__):
        precompile.compile_ahead([CALLS[0]], HOPPER)
        ((request, future),) = workers._SUBMITTED.items()
        future.set_exception(ValueError("no such instruction"))
        workers.wait_for(request)  # and the launch compiles it
    assert "no such instruction" in caplog.text


def test_workers_that_hang_are_waited_for_once(pool, monkeypatch, caplog):
    monkeypatch.setattr(workers, "LONGEST_WAIT", 0.05)
    assert precompile.compile_ahead(CALLS[:2], HOPPER) > 1
    with caplog.at_level(logging.WARNING, logger=workers.__name__):
        for request in workers._SUBMITTED:
            workers.wait_for(request)
    assert len(caplog.records) == 1
    assert workers.TOTALS.waits_in_vain == 1
    assert workers.TOTALS.waited_seconds < 0.5
    assert precompile.compile_ahead(CALLS[2:3], HOPPER) == 0


@pytest.mark.parametrize("error", [BrokenPipeError(), RuntimeError("closed")])
def test_workers_that_are_gone_take_nothing(device, monkeypatch, error):
    def submit(*_):
        raise error

    gone = SimpleNamespace(process_pool=lambda: SimpleNamespace(submit=submit))
    monkeypatch.setattr(compat, "AsyncCompile", gone)
    with compat.inductor_config.patch(compile_threads=2):
        assert precompile.compile_ahead([CALLS[0]], HOPPER) == 0


def test_a_worker_has_the_launcher_s_variables(monkeypatch):
    monkeypatch.setenv("TRITON_ONLY_HERE", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/worker")
    with workers._environment({"TRITON_CACHE_DIR": "/launcher"}):
        assert workers.triton_environment() == {"TRITON_CACHE_DIR": "/launcher"}
    assert os.environ["TRITON_ONLY_HERE"] == "1"
    assert os.environ["TRITON_CACHE_DIR"] == "/worker"


def trained(monkeypatch, capability):
    monkeypatch.setattr(backend, "_capability", lambda inputs: capability)
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(256, 512), nn.SiLU(), nn.Linear(512, 256)).bfloat16()
    compiled = torch.compile(model, backend="hadagraph", options={"executor": "eager"})
    compiled(torch.randn(128, 256, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    torch._dynamo.reset()


def test_a_model_s_kernels_are_submitted(pool, monkeypatch):
    trained(monkeypatch, HOPPER)
    names = {arguments[1] for _, arguments in pool}
    assert names >= {
        "scaled_mm_int8_bf16",
        "quantize_rows_int8_h128_bf16",
        "chain_quantize_rows_int8_h128_bf16",
        "chain_column_amax_h32_bf16",
    }


def test_none_are_on_a_cpu(pool, monkeypatch):
    trained(monkeypatch, None)
    assert not pool


@pytest.mark.slow
def test_in_inductor_s_workers(device):
    with compat.inductor_config.patch(compile_threads=2):
        assert precompile.compile_ahead([CALLS[0], CALLS[6]], HOPPER) == 2
    requests = list(workers._SUBMITTED)
    for request in requests:
        workers.wait_for(request)
        assert workers._SUBMITTED[request].result() > 0
    assert workers.TOTALS.waited_seconds > 0
    stored = [file for _, _, files in os.walk(os.environ["TRITON_CACHE_DIR"]) for file in files]
    for request in requests:
        assert f"{request.spec.name}.cubin" in stored
