"""Calibration: what is measured, how runs merge and are kept, what is left as it was, and the first
steps as a calibration."""

from __future__ import annotations

import json
import os
import socket

import pytest
import torch
from models import Mlp, gradients
from torch import nn

import hadagraph
from hadagraph import statistics
from hadagraph.config import Config
from hadagraph.formats import PER_KEPT_INDEX, PER_TENSOR, Granularity
from hadagraph.observation import Key, Observer
from hadagraph.passes.observe_operands import OBSERVED
from hadagraph.profile import PATTERNS, Profile, SiteStatistics, bin_edges
from hadagraph.recipes import ROLES
from hadagraph.statistics import observed, outlier_pattern, site_statistics

pytestmark = pytest.mark.usefixtures("uncached")

EAGER = {"executor": "eager", "debug": True, "keep": []}
SITES = {(name, role) for name in ("gate", "up", "down") for role in ROLES}
KINDS = ("input", "weight")


class Loss(nn.Module):
    """A model's mean square, so that it trains without labels."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).square().mean()


def batch(seed: int, size: int = 40) -> torch.Tensor:
    return torch.randn(size, 48, generator=torch.Generator().manual_seed(seed))


def mean_square(out: torch.Tensor) -> torch.Tensor:
    return out.square().mean()


@pytest.fixture(scope="module")
def profile() -> Profile:
    return hadagraph.calibrate(Mlp(), [batch(0), batch(1)], loss=mean_square)


def statistics_of(a: torch.Tensor, b: torch.Tensor) -> SiteStatistics:
    sums, maxima = observed(a, b, a @ b.t())
    sizes = a.shape[0], b.shape[0], a.shape[1]
    site = site_statistics("x", "output", KINDS, sizes, sums, maxima)
    assert site is not None
    return site


# What is measured.


def test_every_gemm_of_a_model_is_seen(profile):
    assert {(site.name, site.role) for site in profile.sites} == SITES
    assert all(site.batches == 2 for site in profile.sites)
    site = profile.site("gate", "output")
    assert (site.lhs.kind, site.rhs.kind) == KINDS
    assert (site.m, site.n, site.c) == (40, 80, 48)


def test_statistics_are_what_they_say():
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(n, 96, generator=generator) for n in (48, 64))
    a[:, 5] *= 6
    site = statistics_of(a, b)
    energy = float(a.square().sum())
    assert site.lhs.amax == pytest.approx(float(a.abs().max()), rel=1e-4)
    assert site.lhs.rms == pytest.approx(float(a.square().mean().sqrt()), rel=1e-4)
    out = float((a @ b.t()).square().sum())
    assert site.alignment == pytest.approx(out * 96 / (energy * float(b.square().sum())), rel=1e-3)
    columns = a.square().sum(0), b.square().sum(0)
    overlap = 96 * (columns[0] * columns[1]).sum() / (columns[0].sum() * columns[1].sum())
    assert site.overlaps[0] == pytest.approx(float(overlap), rel=1e-3)
    by_row = a.abs().amax(1).square().sum() * 128 / energy  # padded to the widest rotation
    assert site.lhs.crest(0, PER_KEPT_INDEX) == pytest.approx(float(by_row) ** 0.5, rel=1e-3)
    by_column = a.abs().amax(0).square().mean() / a.square().mean()
    assert site.lhs.crest_contracted == pytest.approx(float(by_column) ** 0.5, rel=1e-3)
    assert sum(site.lhs.sequency) == pytest.approx(1, abs=1e-3)


def test_histograms_count_amax_squared_by_bin():
    x = torch.tensor([[8.0, 7.0, 5.0, 4.0, 1.0, 0.0, 0.5, 3.0] * 16])
    site = statistics_of(x, torch.ones(1, 128))
    counts = torch.tensor(site.lhs.histogram(0, PER_KEPT_INDEX)) * float(x.square().sum()) / 64
    found = {edges: round(float(n)) for edges, n in zip(bin_edges(), counts, strict=True) if n}
    assert found == {
        (0.75, 1.0): 32,
        (0.5, 0.75): 32,
        (0.375, 0.5): 16,
        (0.125, 0.1875): 16,
        (0.0625, 0.09375): 16,
        (0.0, 2.0**-23): 16,
    }


def test_rotations_are_seen_as_they_are_applied():
    from hadagraph.rotation import Rotation, rotate_reference

    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(4))
    x[:, 9] *= 30
    site = statistics_of(x, torch.randn(32, 128))
    for block in (16, 32, 64, 128):
        rotated = statistics_of(rotate_reference(x, 1, Rotation(block)), torch.ones(1, 128))
        for granularity in (PER_TENSOR, PER_KEPT_INDEX, Granularity("block_contracted", 32)):
            expected = rotated.lhs.crest(0, granularity)
            assert site.lhs.crest(block, granularity) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("axis", "pattern"), [(0, "row"), (1, "column"), (None, "none")])
@pytest.mark.parametrize("factor", [4.0, 50.0])
def test_the_pattern_detector(axis, pattern, factor):
    x = torch.randn(200, 120, generator=torch.Generator().manual_seed(3))
    if axis is not None:
        x.select(axis, 17).mul_(factor)
    assert PATTERNS[int(outlier_pattern(x).argmax())] == pattern


def test_a_pattern_needs_twice_the_median():
    x = torch.ones(64, 64)
    for factor, pattern in ((1.9, "none"), (2.1, "row")):
        scaled = torch.cat([x[:1] * factor, x[1:]])
        assert PATTERNS[int(outlier_pattern(scaled).argmax())] == pattern


def test_the_majority_of_batches_decides():
    plain, large = torch.randn(32, 32), torch.randn(32, 32)
    large[4] *= 40
    observer = Observer()
    number = observer.announce(Key("x", "output", *KINDS))
    for x in (plain, large, large):
        observer.record(number, x, plain, x @ plain.t())
    (site,) = observer.profile().sites
    assert site.lhs.pattern == "row"
    assert site.lhs.patterns == pytest.approx((2 / 3, 0, 1 / 3), abs=1e-4)


def test_a_sample_of_the_rows_tells_the_same(monkeypatch):
    x = torch.randn(1500, 64, generator=torch.Generator().manual_seed(6)).exp()
    x[700] *= 30
    w = torch.randn(32, 64)
    few = statistics_of(x, w)
    monkeypatch.setattr(statistics, "SAMPLED_ELEMENTS", x.numel())
    every = statistics_of(x, w)
    for block in (0, 64):
        for granularity in (PER_KEPT_INDEX, Granularity("block_contracted", 16)):
            crest = every.lhs.crest(block, granularity)
            assert few.lhs.crest(block, granularity) == pytest.approx(crest, rel=0.1)


@pytest.mark.parametrize("poison", [float("inf"), float("nan"), 0.0])
def test_a_batch_that_overflowed_or_is_zero_does_not_count(poison):
    observer = Observer()
    number = observer.announce(Key("x", "output", *KINDS))
    good, bad = torch.randn(32, 32), torch.randn(32, 32)
    if poison == 0.0:
        bad.zero_()
    bad[3, 4] = poison
    for x in (good, bad):
        observer.record(number, x, good, x @ good.t())
    (site,) = observer.profile().sites
    assert site.batches == 1
    assert site == statistics_of_named(good)


def statistics_of_named(x: torch.Tensor) -> SiteStatistics:
    observer = Observer()
    number = observer.announce(Key("x", "output", *KINDS))
    observer.record(number, x, x, x @ x.t())
    return observer.profile().sites[0]


def test_operands_can_be_exchanged(profile):
    site = profile.site("gate", "grad_weight", "grad_output")
    other = profile.site("gate", "grad_weight", "input")
    assert {site.lhs.kind, other.lhs.kind} == {"grad_output", "input"}
    assert other == site.flipped()
    assert other.flipped() == site
    assert (other.m, other.n) == (site.n, site.m)


# Keeping and merging.


def test_a_profile_is_read_back_as_it_was(profile, tmp_path):
    assert Profile.from_json(profile.to_json()) == profile
    path = tmp_path / "profile.json"
    profile.save(path)
    loaded = Profile.load(path)
    assert loaded == profile
    assert loaded.fingerprint() == profile.fingerprint()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"hadagraph_profile": 99, "sites": []}',
        '{"hadagraph_profile": 1}',
        '{"hadagraph_profile": 1, "sites": 3}',
        '{"hadagraph_profile": 1, "sites": [{"lhs": []}]}',
        '{"hadagraph_profile": 1, "sites": [{"lhs": {"kind": "input"}}]}',
    ],
)
def test_what_is_no_profile_is_refused(text):
    with pytest.raises(ValueError, match="profile"):
        Profile.from_json(text)


def test_going_on_is_one_longer_run(profile):
    model = Mlp()
    longer = hadagraph.calibrate(model, [batch(0), batch(1), batch(2)], loss=mean_square)
    resumed = Profile.from_json(profile.to_json())
    merged = hadagraph.calibrate(model, [batch(2)], loss=mean_square, profile=resumed)
    assert len(merged.sites) == len(longer.sites) == len(SITES)
    for site in longer.sites:
        other = merged.site(site.name, site.role, site.lhs.kind)
        assert_alike(site, other)
    assert merged.fingerprint() != profile.fingerprint()


def assert_alike(a: SiteStatistics, b: SiteStatistics) -> None:
    """Equal up to the digits that are kept, and to numbers that round across an edge of a bin."""
    first, second = (json.loads(Profile((site,)).to_json())["sites"][0] for site in (a, b))
    numbers = [torch.utils._pytree.tree_leaves(each) for each in (first, second)]
    for one, other in zip(*numbers, strict=True):
        assert one == (
            other if isinstance(other, str) else pytest.approx(other, rel=5e-3, abs=1e-5)
        )


def test_profiles_of_different_gemms_are_joined(profile):
    sites = profile.sites
    assert Profile(sites[:3]).merged(Profile(sites[3:])) == profile


# The explicit run.


def test_a_run_leaves_the_model_and_the_random_state_alone():
    inner = nn.Sequential(nn.BatchNorm1d(48), nn.Dropout(0.5), Mlp())
    model = Loss(inner).train()
    model(batch(7)).backward()
    kept = {n: t.clone() for n, t in model.state_dict().items()}
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    hadagraph.calibrate(model, [batch(0), batch(1)])
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(t, kept[n]) for n, t in model.state_dict().items())
    assert all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters())
    assert not hadagraph.report()


def test_a_run_that_fails_leaves_the_model_alone_too():
    model = Loss(nn.Sequential(nn.BatchNorm1d(48), Mlp())).train()
    kept = {n: t.clone() for n, t in model.state_dict().items()}

    def batches():
        yield batch(0)
        raise OSError("no more data")

    random = torch.get_rng_state()
    with pytest.raises(OSError, match="no more data"):
        hadagraph.calibrate(model, batches())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, kept[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_the_backward_is_seen_even_where_gradients_are_off(off):
    model, x = Loss(Mlp()).eval(), batch(0)
    with off():
        found = hadagraph.calibrate(model, [x])
        assert not torch.is_grad_enabled()
    assert {site.role for site in found.sites} == set(ROLES)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 32)

    def forward(self, x, weight=None):
        out = self.linear(x).square().mean()
        return {"loss": out} if weight is None else out * weight


@pytest.mark.parametrize(
    ("batches", "loss"),
    [
        ([{"x": batch(0), "weight": 2.0}], None),
        ([(batch(0), 2.0)], None),
        ([[batch(0), 2.0]], None),
        ([batch(0)], lambda out: out["loss"]),
    ],
)
def test_batches_are_mappings_sequences_or_one_argument(batches, loss):
    found = hadagraph.calibrate(Named(), batches, loss=loss)
    assert {site.role for site in found.sites} == {"output", "grad_weight"}


def test_without_a_parameter_to_train_only_the_forward_is_seen():
    model = Named().requires_grad_(False)
    found = hadagraph.calibrate(model, [(batch(0), 1.0)])
    assert [site.role for site in found.sites] == ["output"]


def test_what_keeps_a_gemm_from_being_seen():
    with pytest.raises(ValueError, match="found no matmul"):
        hadagraph.calibrate(Named(), [(batch(0), 1.0)], options={"keep": ["linear"]})
    with pytest.raises(ValueError, match="no batches"):
        hadagraph.calibrate(Named(), [])
    with pytest.raises(ValueError, match="calibrate: the model's output is no scalar"):
        hadagraph.calibrate(Mlp(), [batch(0)])


def test_the_last_profile_is_kept():
    found = hadagraph.calibrate(Named(), [(batch(0), 1.0)])
    assert hadagraph.last_profile() is found


# Options.


def lowered(report) -> list[bool]:
    return [site.lowered for site in report.sites]


def test_the_first_steps_are_a_calibration_and_then_the_model_is_compiled_once_more():
    model = Loss(Mlp())
    options = {**EAGER, "calibrate_steps": 2, "recipe": "auto"}
    compiled = torch.compile(model, backend="hadagraph", options=options)
    compiled(batch(0)).backward()
    exact = gradients(model)
    model(batch(0)).backward()
    assert all(torch.allclose(g, exact[n], atol=1e-6) for n, g in gradients(model).items())
    compiled(batch(1)).backward()
    (first,) = hadagraph.report()
    assert {site.reason for site in first.sites} == {OBSERVED}
    for seed in (2, 3, 4):
        compiled(batch(seed)).backward()
    before, after = hadagraph.report()
    assert before is first
    assert all(lowered(after))
    assert "from a calibration" in after.plan.note
    found = hadagraph.last_profile()
    expected = hadagraph.calibrate(model, [batch(0), batch(1)], options={"keep": []})
    for site in expected.sites:
        assert_alike(site, found.site(site.name, site.role, site.lhs.kind))


def test_steps_go_on_with_a_given_profile():
    model = Loss(Mlp())
    known = hadagraph.calibrate(model, [batch(0)], options={"keep": []})
    options = {**EAGER, "calibrate_steps": 1, "profile": known}
    compiled = torch.compile(model, backend="hadagraph", options=options)
    for seed in (1, 2):
        compiled(batch(seed)).backward()
    assert {site.batches for site in hadagraph.last_profile().sites} == {2}


def test_evaluation_is_exact_and_not_observed_until_training_is_calibrated():
    model = Loss(Mlp())
    options = {**EAGER, "calibrate_steps": 1}
    compiled = torch.compile(model, backend="hadagraph", options=options)

    def evaluate():
        with torch.no_grad():
            return compiled(batch(9))

    exact = evaluate()
    assert torch.allclose(exact, model(batch(9)).detach(), atol=1e-6)
    compiled(batch(0)).backward()
    assert not torch.equal(evaluate(), exact)
    (site,) = {site.batches for site in hadagraph.last_profile().sites}
    assert site == 1
    assert all(lowered(hadagraph.report()[-1]))


def test_a_plan_is_the_same_from_the_profile_and_from_its_file(profile, tmp_path):
    path = tmp_path / "profile.json"
    profile.save(path)
    plans = []
    for given in (profile, path, str(path), None):
        options = {"recipe": "auto", "profile": given}
        (report,) = hadagraph.explain(Mlp(), batch(0), options=options).reports
        plans.append(report.plan.to_json())
    assert plans[0] == plans[1] == plans[2] != plans[3]


def test_compiled_code_is_kept_by_the_contents_of_the_profile(profile):
    def key(profile: Profile | None) -> str:
        return Config(profile=profile).cache_key()

    assert key(profile) == key(Profile.from_json(profile.to_json()))
    assert len({key(profile), key(Profile(profile.sites[:2])), key(None)}) == 3


@pytest.mark.slow
def test_the_first_steps_through_inductor():
    model = Loss(Mlp())
    options = {"calibrate_steps": 1, "mode": "reduce-overhead", "keep": []}
    compiled = torch.compile(model, backend="hadagraph", options=options)
    want = model(batch(0)).detach()
    got = compiled(batch(0))
    got.backward()
    assert torch.allclose(got, want, rtol=1e-4)
    compiled(batch(1)).backward()
    assert [all(lowered(report)) for report in hadagraph.report()] == [False, True]


# Ranks.


def observe_as_rank(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    observer = Observer()
    for name in ("shared", f"only{rank}"):
        number = observer.announce(Key(name, "output", *KINDS))
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(rank))
        observer.record(number, x, x, x @ x.t())
    observer.profile().save(f"{folder}/{rank}.json")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_get_the_same_profile(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(observe_as_rank, (port, str(tmp_path)), nprocs=2)
    first, second = (Profile.load(tmp_path / f"{rank}.json") for rank in (0, 1))
    assert first == second
    assert {site.name: site.batches for site in first.sites} == {
        "only0": 1,
        "only1": 1,
        "shared": 2,
    }
    alone = [
        observe(torch.randn(32, 64, generator=torch.Generator().manual_seed(r))) for r in (0, 1)
    ]
    assert_alike(first.site("shared", "output"), alone[0].merged(alone[1]).sites[0])


def observe(x: torch.Tensor) -> Profile:
    observer = Observer()
    number = observer.announce(Key("shared", "output", *KINDS))
    observer.record(number, x, x, x @ x.t())
    return observer.profile()
