"""The benchmarks: how a trace is read, and a tiny run of each command on this machine."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_examples import LINE, save_tiny_llama
from torch import nn

import hadagraph
from hadagraph.reference import scaled_mm_reference

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

from kernel_trace import KINDS, by_kind, kernel_times, kind_of  # noqa: E402

# Names as profilers on Hopper print them.
RECORDED = {
    "nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_TNT": "bf16 GEMM",
    "nvjet_tst_192x192_64x4_1x2_h_bz_coopB_NTN": "bf16 GEMM",
    "nvjet_sm90_qqtst_128x256_128x4_2x1_v_bz_coopA_TNT": "8-bit GEMM",
    "nvjet_qrtst_128x256_128x4_2x1_v_bz_TNT": "8-bit GEMM",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas": "bf16 GEMM",
    "sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize128x128x128_cublas": "8-bit GEMM",
    "cutlass_80_tensorop_i16832gemm_s8_256x128_64x3_tn_align16": "8-bit GEMM",
    "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm::kernel"
    "::GemmUniversal<cute::tuple<int, int, int, int>, cutlass::float_e4m3_t>>>": "8-bit GEMM",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>": "bf16 GEMM",
    "scaled_mm_int8_bf16": "8-bit GEMM",
    "amax_rows_int8_h128_columns_int8_h32_bf16": "quantizer, maxima",
    "quantize_rows_int8_h128_columns_int8_h32_bf16": "quantizer, codes",
    "quantize_rows_int8_h128_bf16": "quantizer, codes",
    "chain_amax_rows_int8_h128_bf16": "quantizer, maxima",
    "chain_quantize_rows_int8_h128_bf16": "quantizer, codes",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64>>": "attention forward",
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<T>": "attention backward",
    "void pytorch_flash::flash_bwd_dot_do_o_kernel<true, T>": "attention backward",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_128x128x128": (
        "attention forward"
    ),
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_128x64x128": (
        "attention backward"
    ),
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80": "attention forward",
    "fmha_cutlassB_bf16_aligned_128x128_k128_sm80": "attention backward",
    "triton_poi_fused__scaled_dot_product_flash_attention_backward_cat_mul_3": (
        "Inductor, pointwise"
    ),
    "triton_red_fused__fused_rms_norm_add_4": "Inductor, reduction",
    "triton_red_fused_abs_max_7": "Inductor, with a quantizer",
    "triton_poi_fused_clamp_mul_transpose_9": "Inductor, with a quantizer",
    "triton_tem_fused_mm_2": "bf16 GEMM",
    "Memset (Device)": "copy, memset",
    "Memcpy DtoD (Device -> Device)": "copy, memset",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>>": (
        "copy, memset"
    ),
    "void at::native::reduce_kernel<512, 1, T>": "other",
}


@pytest.mark.parametrize("name", RECORDED)
def test_a_kernels_kind_is_told_by_its_name(name: str) -> None:
    assert kind_of(name) == RECORDED[name]
    assert kind_of(name) in KINDS


def test_a_kernel_without_a_telling_name_is_of_its_operators_kind() -> None:
    assert kind_of("kernel_0", "aten::_scaled_mm") == "8-bit GEMM"
    assert kind_of("kernel_0", "aten::mm") == "bf16 GEMM"
    assert kind_of("kernel_0") == "other"


def event(category: str, name: str, external: int, us: float = 0.0, **more: Any) -> dict[str, Any]:
    return {"cat": category, "name": name, "dur": us, "args": {"External id": external, **more}}


def operator(name: str, external: int, dims: Any, types: Any) -> dict[str, Any]:
    return event("cpu_op", name, external, **{"Input Dims": dims, "Input type": types})


BF16, INT8 = "c10::BFloat16", "signed char"


def test_a_trace_becomes_times_flops_and_bytes_a_step() -> None:
    events = [{"cat": "Trace", "name": "no args"}]
    for start in (0, 10):  # two alike steps
        events += [
            operator("aten::mm", start + 1, [[8, 4], [4, 6]], [BF16, BF16]),
            event("kernel", "nvjet_tst_64x8", start + 1, 30.0),
            operator("hadagraph::scaled_mm", start + 2, [[8, 4], [6, 4], [8]], [INT8, INT8, "f"]),
            event("kernel", "scaled_mm_int8_bf16", start + 2, 10.0),
            operator("hadagraph::quantize_both", start + 3, [[8, 4], []], [BF16, ""]),
            event("kernel", "amax_rows_int8_columns_int8_bf16", start + 3, 2.0),
            event("kernel", "quantize_rows_int8_columns_int8_bf16", start + 3, 4.0),
            operator("triton_poi_fused_add_0", start + 4, [[8, 4], [8, 4], []], [BF16, BF16, ""]),
            event("kernel", "triton_poi_fused_add_0", start + 4, 1.0),
            operator("hadagraph::quantize_chain", start + 6, [[[8, 4], [8, 4]], []], ["", ""]),
            event("kernel", "chain_quantize_rows_int8_columns_int8_bf16", start + 6, 0.5),
            event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", start + 5, 3.0, bytes=64),
        ]
    rows = {row.kernel: row for row in kernel_times(events, steps=2)}
    assert [row.us for row in rows.values()] == sorted((r.us for r in rows.values()), reverse=True)
    mm, scaled = rows["nvjet_tst_64x8"], rows["scaled_mm_int8_bf16"]
    assert (mm.us, mm.count, mm.shapes) == (30.0, 1.0, "8x4 4x6")
    assert mm.flops == scaled.flops == 2 * 8 * 6 * 4
    assert mm.bytes == 2 * (8 * 4 + 6 * 4 + 8 * 6)
    assert scaled.bytes == 8 * 4 + 6 * 4 + 2 * 8 * 6
    assert rows["amax_rows_int8_columns_int8_bf16"].bytes == 8 * 4 * 2
    assert rows["quantize_rows_int8_columns_int8_bf16"].bytes == 8 * 4 * (2 + 2)
    assert rows["triton_poi_fused_add_0"].bytes == 2 * 8 * 4 * 2
    assert rows["chain_quantize_rows_int8_columns_int8_bf16"].bytes == 8 * 4 * (2 + 2 + 2)
    assert rows["Memcpy DtoD (Device -> Device)"].bytes == 128
    kinds = by_kind(list(rows.values()))
    assert kinds["bf16 GEMM"] == pytest.approx(0.030)
    assert sum(kinds.values()) == pytest.approx(0.0505)


def test_a_kernels_share_is_its_least_time_over_its_time() -> None:
    from roofline import share

    ceiling = {"copy_bytes_per_s": 1e12, "bf16_flops_per_s": 1e15, "8bit_flops_per_s": 2e15}
    events = [
        operator("hadagraph::scaled_mm", 1, [[1000, 1000], [1000, 1000]], [INT8, INT8]),
        event("kernel", "scaled_mm_int8_bf16", 1, 8.0),
        event("kernel", "unknown", 9, 8.0),
    ]
    rows = {row.kernel: row for row in kernel_times(events, 1)}
    # 4 MB at 1 TB/s take 4 us, 2 GFLOP at 2 PFLOP/s take 1 us: the bytes decide.
    assert share(rows["scaled_mm_int8_bf16"], ceiling) == pytest.approx(0.5)
    assert share(rows["unknown"], ceiling) is None


def bench(name: str, *arguments: str, timeout: int = 280) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH / name), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def stated(path: Path) -> dict[str, Any]:
    """A result, which must say where it comes from."""
    content: dict[str, Any] = json.loads(path.read_text())
    assert content["device"]
    assert content["versions"]["torch"]
    assert content["settings"]
    return content


TINY_BLOCKS = ("--shape", "tiny", "--blocks", "1", "--batch", "2", "--sequence", "16")
ONCE = ("--rounds", "1", "--repeats", "1")
BASELINE, OURS = "inductor bf16", "hadagraph int8_rotated"
BOTH = ("--variants", BASELINE, OURS)


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """(script, arguments): runs a benchmark in this process, its variants without a code generator,
    whose compilation would take nearly all of the time. `test_linear_...` has the real ones."""
    import variants

    quick = {
        BASELINE: lambda model: torch.compile(model, backend="aot_eager"),
        OURS: variants.hadagraph(recipe="int8_rotated", executor="eager"),
    }

    def run(name: str, *arguments: str) -> None:
        module = importlib.import_module(name.removesuffix(".py"))
        monkeypatch.setattr(module, "variants", lambda: quick)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        module.main()

    torch._dynamo.reset()
    hadagraph.reset_report()
    yield run
    torch._dynamo.reset()
    hadagraph.reset_report()


def test_roofline_times_both_and_says_that_a_cpu_has_no_kernels(
    run_here: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "roofline.json"
    run_here("roofline.py", *TINY_BLOCKS, *ONCE, *BOTH, "--out", str(out))
    content = stated(out)
    assert set(content["variants"]) == {BASELINE, OURS}
    assert all(entry["wall_ms"] > 0 for entry in content["variants"].values())
    with pytest.raises(SystemExit):
        run_here("roofline.py", "--plot", str(out), "--png", str(tmp_path / "no.png"))
    assert "without a GPU" in capsys.readouterr().err


def test_roofline_draws_a_result(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from roofline import draw, kernel_rows, kinds_table

    events = [
        operator("aten::mm", 1, [[512, 256], [256, 512]], [BF16, BF16]),
        event("kernel", "nvjet_tst_64x8", 1, 30.0),
        operator("triton_poi_fused_add_0", 2, [[512, 256]], [BF16]),
        event("kernel", "triton_poi_fused_add_0", 2, 5.0),
        event("kernel", "unknown", 3, 1.0),
    ]
    rows = kernel_times(events, 1)
    ceiling = {"copy_bytes_per_s": 4e12, "bf16_flops_per_s": 8e14, "8bit_flops_per_s": 1.5e15}
    times = {"gpu_ms": 0.036, "wall_ms": 0.05, "idle_share": 0.28, "launches": 3.0}
    entry = times | {"by_kind_ms": by_kind(rows), "kernels": kernel_rows(rows, ceiling)}
    content = {
        "device": "a GPU",
        "settings": {"blocks": 1, "shape": "tiny", "batch": 2, "sequence": 16},
        "ceilings": ceiling,
        "variants": {BASELINE: entry, "torchao tensorwise": {"error": "no torchao"}},
    }
    draw(content, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 1000
    assert kinds_table(content).columns[1].header == BASELINE
    assert len(kinds_table(content).columns) == 2


@pytest.mark.slow
def test_linear_compares_every_shape_with_the_baseline(tmp_path: Path) -> None:
    out = tmp_path / "linear.json"
    shapes = ("--tokens", "32", "--features", "32x48")
    done = bench("linear.py", *shapes, *ONCE, *BOTH, "--out", str(out))
    assert done.returncode == 0, done.stderr
    content = stated(out)
    assert [(entry["K"], entry["N"]) for entry in content["shapes"]] == [(32, 48)]
    for entry in content["shapes"]:
        assert entry["flops"] == 3 * 2 * 32 * 32 * 48
        assert entry["variants"][BASELINE]["speedup"] == 1
        assert entry["variants"][OURS]["speedup"] > 0


def test_small_says_how_much_was_lowered_and_predicts_the_whole_depth(
    run_here: Callable[..., None], tmp_path: Path
) -> None:
    out = tmp_path / "small.json"
    linears = ("--linears", "32x48", "--tokens", "32")
    models = ("--models", "tiny", "--batches", "2x16", "--layers", "1")
    run_here("small.py", *linears, *models, *ONCE, "--out", str(out))
    content = stated(out)
    (linear,), (model,) = content["linears"], content["models"]
    assert (linear["gemms"], linear["lowered"]) == (3, 3)
    assert (model["gemms"], model["lowered"]) == (24, 21)  # the head's three stay
    assert linear["ratio_ms"] > 0
    empty = model["without_blocks"]["ms"]
    for name in (BASELINE, OURS):
        # One block of two was timed.
        whole = empty + 2 * (model["variants"][name]["ms"] - empty)
        assert model["predicted_ms"][name] == pytest.approx(whole)


@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole"])
def test_end_to_end_compares_time_memory_and_gradients(
    run_here: Callable[..., None], tmp_path: Path, whole: bool
) -> None:
    out = tmp_path / "end_to_end.json"
    mode = ("--whole",) if whole else ()
    run_here("end_to_end.py", *TINY_BLOCKS, *ONCE, *BOTH, *mode, "--out", str(out))
    content = stated(out)
    assert content["benchmark"] == ("whole_model" if whole else "end_to_end")
    baseline, ours = content["results"]
    assert baseline["speedup_over_baseline"] == 1
    assert baseline["gradient_error"] == 0
    # Eight bits a value: some error, and not much.
    assert 0 < ours["gradient_error"] < 0.05
    assert {"saved_bytes", "peak_bytes", "peak_without_parameters_bytes"} <= ours.keys()


@pytest.mark.slow
def test_compile_time_starts_from_empty_caches_and_from_full_ones(tmp_path: Path) -> None:
    out = tmp_path / "compile_time.json"
    sizes = ("--layers", "1", "--width", "32", "--hidden", "64", "--heads", "2", "--kv-heads", "1")
    few = ("--batch", "2", "--sequence", "16", "--variants", OURS)
    done = bench("compile_time.py", *sizes, *few, "--out", str(out))
    assert done.returncode == 0, done.stderr
    content = stated(out)
    assert [row["state"] for row in content["measured"]] == ["cold", "warm"]
    summary = content["summary"]
    assert summary["warm"][OURS]["seconds"] < summary["cold"][OURS]["seconds"]
    assert content["measured"][0]["emitted_kernels"]["kernels"] == 0  # a CPU has none


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("linear.py", ("--features", "32"), "32 is not KxN"),
        ("end_to_end.py", ("--whole", "--shape", "llama3-8b"), "--shape llama3-8b: allowed are"),
        ("roofline.py", ("--plot", "x.json"), "--plot needs --png"),
    ],
)
def test_a_bad_argument_is_named(
    name: str,
    arguments: tuple[str, ...],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    module = importlib.import_module(name.removesuffix(".py"))
    with pytest.raises(SystemExit):
        module.main()
    assert says in capsys.readouterr().err


def test_the_gemm_race_weighs_shapes_and_finds_wrong_elements() -> None:
    from gemm_race import BLOCKS, SHAPES, configurations, step_ms, table, wrong_elements

    rows = [
        {"name": name, "M": M, "N": N, "C": C, "ms": 0.5, "tflops": 1.0}
        for name in ("ours", "cuBLAS")
        for M, N, C in list(SHAPES)[: len(SHAPES) - (name == "cuBLAS")]
    ]
    assert step_ms(rows, "ours") == BLOCKS * sum(SHAPES.values()) * 0.5
    assert step_ms(rows, "cuBLAS") is None
    assert table(rows[: len(SHAPES)]).row_count == 1
    names = configurations((9, 0), "")
    assert len(names) > len(configurations((9, 0), "pingpong")) > 0
    a, b = (torch.randint(-127, 128, (8, 32), dtype=torch.int8) for _ in range(2))
    right = partial(scaled_mm_reference, bias=None, out_dtype=torch.bfloat16)
    assert wrong_elements(right, a, b) == 0
    assert wrong_elements(lambda *operands: 2 * right(*operands), a, b) == 64


def test_the_gemm_race_never_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    from gemm_race import busy_ms

    clock, waits, ran = [0.0], [], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    def takes(name: str, ms: float) -> Callable[[], None]:
        def call() -> None:
            clock[0] += ms
            ran.append(name)

        return call

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(len(ran)))
    calls = {"slow": [takes("a", 2.0), takes("b", 4.0)], "fast": [takes("c", 1.0)]}
    found = busy_ms(calls, rounds=5, launches=12)
    assert found == {"slow": [3.0] * 5, "fast": [1.0] * 5}
    assert waits == [len(ran)] == [3 + 2 * 5 * 12]
    assert ran.count("a") == ran.count("b")


def test_a_difference_is_relative_to_the_norm_of_all_tensors() -> None:
    from step import relative_difference

    want = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    got = [torch.tensor([3.0, 0.3]), torch.tensor([[4.4]])]
    assert relative_difference(got, want) == pytest.approx(0.5 / 5)


def test_a_step_leaves_no_gradient_and_trains_where_it_has_an_optimizer() -> None:
    from step import Step

    model = nn.Linear(4, 4)
    before = model.weight.detach().clone()
    x = torch.randn(2, 4, requires_grad=True)
    step = Step(model, list(model.parameters()), (x,), torch.ones(2, 4))
    gradients = step.gradients()
    assert [g.shape for g in gradients] == [(4, 4), (4,)]
    step()
    assert x.grad is None and model.weight.grad is None
    assert torch.equal(model.weight, before)
    step.optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step()
    assert not torch.equal(model.weight, before)


def test_ways_of_training_carry_hadagraphs_options() -> None:
    from fine_tuning import CONTROL, named_option, ways_of_training

    options = [named_option("never_slower=false"), named_option("executor=eager")]
    ours = argparse.Namespace(option=options, memory=["balanced"], no_control=False)
    ways = ways_of_training(ours, "int8_rotated")
    plain = {"recipe": "int8_rotated", "never_slower": False, "executor": "eager"}
    assert ways["inductor"] is None
    assert ways["hadagraph"] == plain
    assert ways["hadagraph, memory=balanced"] == plain | {"memory": "balanced"}
    assert list(ways)[-1] == CONTROL
    with pytest.raises(argparse.ArgumentTypeError, match="balanced is not NAME=VALUE"):
        named_option("balanced")


@pytest.mark.slow
def test_fine_tuning_compares_memory_options(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "model")
    (tmp_path / "text.txt").write_text(LINE * 200, encoding="utf-8")
    out = tmp_path / "fine_tuning.json"
    done = bench(
        "fine_tuning.py",
        *("--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt")),
        *("--steps", "2", "--sequence", "32", "--batch", "2", "--device", "cpu"),
        *("--seeds", "1", "--memory", "balanced", "--no-control", "--saved", "--json", str(out)),
        *("--option", "executor=eager"),
    )
    assert done.returncode == 0, done.stderr
    content = stated(out)
    assert list(content["runs"]) == ["inductor", "hadagraph", "hadagraph, memory=balanced"]
    saved = {way: runs[0]["saved_bytes"] for way, runs in content["runs"].items()}
    assert 0 < saved["hadagraph, memory=balanced"] < saved["hadagraph"]
