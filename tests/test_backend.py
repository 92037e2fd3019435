"""Whole models through the backend: losses and gradients beside eager PyTorch's, in every mode of
training that users have. The eager executor where the compiler adds nothing to the claim."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from models import Mlp, decibels, gradients, tiny_llama, tokens
from torch import nn
from torch._inductor.utils import run_and_get_code

import hadagraph

pytestmark = pytest.mark.usefixtures("uncached")

EAGER = {"executor": "eager", "debug": True}


def lm_step(call, model, ids):
    loss = call(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_close_training(got, want, floor_db):
    """Loss within 2 % and every gradient at least `floor_db` above its error."""
    assert abs(got[0] - want[0]) <= 0.02 * abs(want[0])
    assert got[1].keys() == want[1].keys()
    for name, gradient in got[1].items():
        assert decibels(gradient, want[1][name]) >= floor_db, name


# Sums of several ~40 dB GEMMs (int8) and ~30 dB GEMMs (fp8), through two layers of backward.
@pytest.mark.parametrize(
    ("recipe", "floor_db"), [("int8_rotated", 22), ("fp8_rowwise", 17), ("fp8_tensorwise", 12)]
)
def test_gradients_of_a_llama_match_eager(recipe, floor_db):
    model, ids = tiny_llama(), tokens()
    want = lm_step(model, model, ids)
    compiled = torch.compile(model, backend="hadagraph", options={**EAGER, "recipe": recipe})
    got = lm_step(compiled, model, ids)
    assert_close_training(got, want, floor_db)
    (report,) = hadagraph.report()
    lowered = [site for site in report.sites if site.lowered]
    assert len(lowered) == 2 * 7 * 3  # layers x Linears x GEMMs
    assert any((got[1][n] != want[1][n]).any() for n in want[1]), "nothing was quantized"


@pytest.mark.slow
def test_where_nothing_is_lowered_the_compilers_own_code_runs():
    """No launch, tensor saved or recomputation besides, so that nothing can be slower."""
    model = nn.Sequential(nn.LayerNorm(48), Mlp())

    def kernels(**backend):
        torch._dynamo.reset()
        compiled = torch.compile(model, **backend)
        step = lambda: compiled(torch.ones(24, 48)).sum().backward()  # noqa: E731
        _, codes = run_and_get_code(step)
        bodies = [code[code.index("def call(") :] for code in codes]
        calls = [re.findall(r"(?:cpp_fused_|extern_kernels\.)\w+\(", body) for body in bodies]
        saved = [len(re.findall(r"^ +(.*) = args$", body, re.M)[0].split(",")) for body in bodies]
        return calls, saved

    plain = kernels()
    assert len(plain[0]) == 2 and plain[0][0]
    assert kernels(backend="hadagraph", options={"recipe": "auto", "min_size": 1 << 20}) == plain


def test_the_bf16_recipe_changes_nothing():
    model, ids = tiny_llama(), tokens()
    plain = torch.compile(model, backend="aot_eager_decomp_partition")
    want = lm_step(plain, model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="hadagraph", options={**EAGER, "recipe": "bf16"})
    got = lm_step(compiled, model, ids)
    # Inductor's decompositions differ in the last bits from the core ones of the other backend.
    assert_close_training(got, want, floor_db=100)


def test_inductor_and_eager_executors_agree():
    model, ids = tiny_llama(), tokens()
    want = lm_step(torch.compile(model, backend="hadagraph", options=EAGER), model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="hadagraph", options={"debug": True}, fullgraph=True)
    got = lm_step(compiled, model, ids)
    # Inductor reassociates reductions; an ulp there can move a code by one.
    assert_close_training(got, want, floor_db=35)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    model, ids = tiny_llama().to(dtype), tokens()
    want = lm_step(model, model, ids)
    got = lm_step(torch.compile(model, backend="hadagraph", options=EAGER), model, ids)
    assert all(g.dtype == dtype for g in got[1].values())
    assert_close_training(got, want, floor_db=20)


def test_autocast_quantizes_the_cast_weight_and_saves_no_copy_of_it():
    model, x = Mlp(), torch.randn(4, 20, 48)

    def step(call):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = call(x).square().mean()
        loss.backward()
        return loss.detach(), gradients(model)

    want = step(model)
    got = step(torch.compile(model, backend="hadagraph", options=EAGER))
    assert_close_training(got, want, floor_db=20)
    (report,) = hadagraph.report()
    weights = {f"bfloat16{shape}" for shape in ("[80, 48]", "[48, 80]")}
    assert not weights & {description for _, description, _ in report.saved}


def test_gradscaler_sees_an_overflow():
    model, x = Mlp(), torch.randn(2, 16, 48)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # In fp16 the first scale overflows the gradients; the scaler must skip and halve it.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    compiled = torch.compile(model, backend="hadagraph", options=EAGER)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.autocast("cpu", dtype=torch.float16):
        out = compiled(x)
    scaler.scale(out.float().square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**40
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_inputs_stay_visible(bad):
    model, x = Mlp(), torch.randn(2, 16, 48)
    x[1, 3, 5] = bad
    compiled = torch.compile(model, backend="hadagraph", options=EAGER)
    out = compiled(x)
    assert not out[1, 3].isfinite().all()
    assert out[0].isfinite().all()  # scales are per token: the rest is unharmed
    out.sum().backward()
    assert not model.down.weight.grad.isfinite().all()


def test_dynamic_batch_and_sequence_need_one_graph():
    model = tiny_llama()
    compiled = torch.compile(model, backend="hadagraph", dynamic=True)
    for batch, sequence in ((2, 24), (3, 17), (2, 40), (5, 33)):
        ids = tokens(batch, sequence)
        want = lm_step(model, model, ids)
        got = lm_step(compiled, model, ids)
        assert_close_training(got, want, floor_db=20)
    assert [report.kind for report in hadagraph.report()].count("training") == 1


@pytest.mark.parametrize("shape", [(0, 48), (1, 48), (17, 48), (3, 5, 48)])
def test_odd_and_empty_batches(shape):
    model = Mlp()
    x = torch.randn(shape, requires_grad=True)
    options = {**EAGER, "min_size": 1}
    out = torch.compile(model, backend="hadagraph", options=options)(x)
    out.square().sum().backward()
    assert out.shape == x.shape and x.grad.shape == x.shape
    got = gradients(model)
    model(x.detach()).square().sum().backward()
    for name, want in gradients(model).items():
        if x.numel() == 0:
            assert torch.equal(got[name], want), name
        else:
            assert decibels(got[name], want) > 20, name


def test_inference_runs_the_training_plan_unless_told_otherwise():
    model, ids = tiny_llama().eval(), tokens()
    with torch.no_grad():
        want = model(input_ids=ids).logits
        lowered = torch.compile(model, backend="hadagraph", options=EAGER)(input_ids=ids).logits
        torch._dynamo.reset()
        options = {**EAGER, "eval": "bf16"}
        plain = torch.compile(model, backend="hadagraph", options=options)(input_ids=ids).logits
    first, second = hadagraph.report()
    assert first.kind == second.kind == "inference"
    assert sum(site.lowered for site in first.sites) == 14
    assert not any(site.lowered for site in second.sites)
    assert 20 < decibels(lowered, want) < 80
    assert decibels(plain, want) > 100


def test_heads_stay_in_high_precision_with_a_logged_reason(caplog):
    for tied in (True, False):
        torch._dynamo.reset()
        model = tiny_llama(tied=tied)
        with caplog.at_level(logging.INFO, logger="hadagraph"):
            explanation = hadagraph.explain(model, input_ids=tokens(), labels=tokens())
        head = [s for s in explanation.reports[0].sites if s.name == "lm_head"]
        assert len(head) == 3 and not any(site.lowered for site in head)
        assert "lm_head output stays in high precision" in caplog.text


def test_overrides_choose_per_site_and_role():
    options = {
        "overrides": {
            "*.q_proj": "bf16",
            "*.down_proj:grad_weight": "fp8_rowwise",
            "lm_head": "int8_rotated",
        }
    }
    (report,) = hadagraph.explain(
        tiny_llama(), input_ids=tokens(), labels=tokens(), options=options
    ).reports
    formats = {
        (d.site.name.rpartition(".")[2], d.site.role): d.lhs.format if d.lhs else None
        for d in report.plan.decisions
    }
    assert formats["q_proj", "output"] is None
    assert formats["down_proj", "grad_weight"] == "fp8_e4m3"
    assert formats["down_proj", "output"] == "int8"
    assert formats["lm_head", "grad_input"] == "int8"


def test_one_quantization_per_tensor_for_q_k_v_and_gate_up():
    (report,) = hadagraph.explain(tiny_llama(), input_ids=tokens(), labels=tokens()).reports
    readers = [{reader.rpartition(".")[2] for reader in shared.readers} for shared in report.shared]
    for role in ("output", "grad_weight"):  # rows in the forward, columns in the backward
        assert readers.count({f"{p}_proj:{role}" for p in "qkv"}) == 2
        assert readers.count({f"{p}_proj:{role}" for p in ("gate", "up")}) == 2


def test_frozen_weights_have_no_grad_weight():
    model = Mlp()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(20, 48, requires_grad=True)
    (report,) = hadagraph.explain(model, x).reports
    assert {site.role for site in report.sites} == {"output", "grad_input"}
    assert all(site.lowered for site in report.sites)


def test_a_users_own_matmul_is_a_gemm_like_any_other():
    weight = nn.Parameter(torch.randn(32, 64))

    def model(x):
        return torch.mm(x, weight).relu()

    x = torch.randn(48, 32, requires_grad=True)
    compiled = torch.compile(model, backend="hadagraph", options=EAGER)
    compiled(x).square().sum().backward()
    got_weight, got_x = weight.grad.clone(), x.grad.clone()
    weight.grad = x.grad = None
    model(x).square().sum().backward()
    assert decibels(got_weight, weight.grad) > 25 and decibels(got_x, x.grad) > 25
    (report,) = hadagraph.report()
    assert [s.role for s in report.sites if s.lowered].count("grad_weight") == 1


def test_a_model_without_a_matmul_warns(caplog):
    compiled = torch.compile(lambda x: x.sin(), backend="hadagraph", options=EAGER)
    with caplog.at_level(logging.WARNING, logger="hadagraph"):
        assert torch.equal(compiled(torch.ones(3)), torch.ones(3).sin())
    assert "no GEMM of this graph was lowered" in caplog.text


def test_unknown_options_raise_with_what_is_allowed():
    compiled = torch.compile(Mlp(), backend="hadagraph", options={"recipee": "int8_rotated"})
    with pytest.raises(Exception, match=r"unknown option 'recipee'.*did you mean 'recipe'"):
        compiled(torch.randn(16, 48))


def test_inductor_options_and_the_users_own_pass_are_kept():
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Count(CustomGraphPass):
        calls = 0

        def __call__(self, graph):
            Count.calls += 1

        def uuid(self):
            return "count"

    options = {"joint_custom_pre_pass": Count(), "max_autotune": False, "debug": True}
    model, x = Mlp(), torch.randn(16, 48)
    out = torch.compile(model, backend="hadagraph", options=options)(x)
    assert Count.calls == 1
    assert decibels(out, model(x)) < 80  # ours ran too


def test_measured_sqnr_of_every_gemm():
    measured = hadagraph.measure_sqnr(tiny_llama(), input_ids=tokens(), labels=tokens())
    values = [db for role in measured.values() for db in role.values()]
    assert len(values) == 42
    # 8 bits, normal-like data: about 38-42 dB a GEMM with rotation.
    assert min(values) > 30 and max(values) < 60


def test_explaining_often_leaves_the_model_and_its_compilation_alone():
    model, x = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32)), torch.randn(64, 32)
    for _ in range(12):
        assert hadagraph.explain(model, x).reports
    assert model[1].num_batches_tracked == 0 and not model[1].running_mean.any()
    torch.compile(model, backend="hadagraph", options=EAGER)(x)
    assert len(hadagraph.report()) == 1


def test_measuring_without_anything_to_train():
    model, x = Mlp().requires_grad_(False), torch.randn(32, 48)
    measured = hadagraph.measure_sqnr(model, x, loss=torch.sum)
    assert len(measured["output"]) == 3 and not measured["grad_input"]


def test_formats_follow_the_operand_when_the_gradient_comes_transposed():
    """For a column-major input autograd computes (W E^T)^T: the weight is on the left there."""
    weight = torch.randn(64, 48, requires_grad=True)
    x = torch.randn(64, 32, requires_grad=True)
    (report,) = hadagraph.explain(
        lambda x, w: (x.t() @ w).sin(), x, weight, options={"recipe": "fp8_tensorwise"}
    ).reports
    for decision in report.plan.decisions:
        for named, plan in ((decision.site.lhs, decision.lhs), (decision.site.rhs, decision.rhs)):
            assert plan.format == ("fp8_e5m2" if named == "grad_output" else "fp8_e4m3")
    sources = {shared.source: shared.quantizer for shared in report.shared}
    assert {"primals_1", "primals_2"} <= set(sources)


def test_a_model_reached_as_a_global_has_the_same_names():
    global MODEL
    MODEL = nn.Sequential(nn.Linear(32, 32))

    def step(x):
        return MODEL(x)

    (report,) = hadagraph.explain(step, torch.randn(16, 32)).reports
    assert {site.name for site in report.sites} == {"0"}


def test_sites_are_unique():
    def model(x):
        return (x @ x.t()).sin() + (x @ x.t()).cos()

    x = torch.randn(32, 32, requires_grad=True)
    (report,) = hadagraph.explain(model, x).reports
    keys = [(site.name, site.role) for site in report.sites]
    assert len(keys) == len(set(keys))


def test_an_override_that_matches_nothing_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING, logger="hadagraph"):
        hadagraph.explain(Mlp(), torch.randn(32, 48), options={"overrides": {"*.q_prj": "bf16"}})
    assert "overrides['*.q_prj'] matches no GEMM" in caplog.text


def test_a_policy_that_saves_matmuls_saves_no_more_than_their_outputs():
    from torch.utils.checkpoint import (
        CheckpointPolicy,
        checkpoint,
        create_selective_checkpoint_contexts,
    )

    def policy(ctx, op, *args, **kwargs):
        matmuls = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        save = op in matmuls
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts():
        return create_selective_checkpoint_contexts(policy)

    inner = Mlp()

    def model(x):
        return checkpoint(inner.inner, x, use_reentrant=False, context_fn=contexts)

    x = torch.randn(64, 48, requires_grad=True)
    compiled = torch.compile(model, backend="hadagraph", options=EAGER)
    compiled(x).square().sum().backward()
    got = gradients(inner)
    inner.inner(x).square().sum().backward()
    for name, want in gradients(inner).items():
        assert decibels(got[name], want) > 20, name
    (report,) = hadagraph.report()
    assert not [name for name, what, _ in report.saved if what.startswith("int8")]
