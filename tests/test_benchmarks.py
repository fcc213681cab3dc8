"""Benchmarks at reduced sizes: what they compare does the same work, and every subject gives finite ratios; no times"""
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from sadalib import benchmarks
from sadalib.benchmarks import (
    LIMITS,
    SUBJECTS,
    BenchmarkConfig,
    CostParameters,
    attacked_input,
    batch_slots,
    cost_configs,
    exact_costs,
    grid_costs,
    interleaved,
    limit_of,
    linear_costs,
    module_loop,
    on_both_clocks,
    published_problems,
    ratio,
    scikit_logistic,
    theory_costs,
)
from sadalib.disparity import linear, robust_margins, solve_linear, train_linear
from sadalib.runs import SadalibError, record, require

SIZES = {"attack": 8, "throughput": 8, "linear": 80, "grid": 60, "exact": 700, "theory": 10}
SLOW = {"map", "stop"} # on data and training: shown in the notebook


@pytest.fixture(scope="module")
def small():
    return published_problems(120)


@pytest.mark.parametrize("subject", sorted(set(SUBJECTS) - SLOW))
def test_every_subject_gives_finite_ratios(subject, tmp_path):
    rows = record(require(BenchmarkConfig(subject, SIZES[subject], rounds=1, threads=1), root=tmp_path))["metrics"]
    for row in rows:
        assert all(math.isfinite(row[k]) and row[k] >= 0 for k in ("value", "low", "high")), row
        assert row["low"] <= row["value"] <= row["high"] and row["n"] > 0, row
        if " / " in row["metric"] and "scikit" not in row["metric"]: assert row["value"] > 0
    assert len({row["metric"] for row in rows}) == len(rows)


def test_every_limit_names_a_metric_that_is_measured(monkeypatch):
    monkeypatch.setattr(benchmarks, "on_both_clocks", lambda work, rounds: ({k: [1.]*rounds for k in work},)*2)
    monkeypatch.setattr(benchmarks, "interleaved", lambda work, rounds, *_: {k: [1.]*rounds for k in work})
    found = {row["metric"] for rows in (linear_costs(60, 1), exact_costs(700, 1), theory_costs(5, 1),
             benchmarks.map_costs(8, 1), benchmarks.attack_costs(4, 1), grid_costs(60)) for row in rows}
    assert set(LIMITS) <= found | {m.removeprefix("reduced ") for m in found}


def test_the_grid_is_the_published_one():
    problems = published_problems(4000)
    assert [p.train.counts for p, _, _ in problems] == [(4000, 4000), (4000, 2000), (4000, 800), (4000, 400)]
    assert {len(p.mean) for p, _, _ in problems} == {100}
    for problem, norms, radii in problems:
        assert norms == [2, 2, 2, 2] + [math.inf]*3 and radii[0] == 0
        assert radii[3] == pytest.approx(5) and radii[6] == pytest.approx(float(problem.mean.max()))
    assert len(problems)*7*len(linear.LEARNING_RATES)*len(linear.SEEDS) == 1120


@pytest.mark.parametrize("which", [0, 2, 5])
def test_the_loop_does_the_work_of_the_batch(small, which):
    problem, norms, radii = small[1]
    net, n = nn.Linear(100, 2), len(problem.train)
    start = net.weight.detach().clone(), net.bias.detach().clone()
    loss = module_loop(net, problem, norm=norms[which], eps=radii[which], learning_rate=.01, epochs=10, batch_size=n)
    ours = train_linear(*problem.train, valid=problem.valid, norm=norms[which], eps=radii[which], learning_rates=.01,
                        seeds=1, epochs=10, batch_size=n, init=start)
    assert torch.allclose(ours.u_last[0], (net.weight[1] - net.weight[0]).detach(), atol=1e-5)
    assert float(ours.valid_loss[0, -1]) == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("norm", [2., math.inf])
def test_the_loops_attack_is_exact_and_leaves_no_gradient(small, norm):
    net, (x, y) = nn.Linear(100, 2), small[0][0].train
    moved = attacked_input(net, x.float(), y, norm, .3)
    u, c, signs = net.weight[1] - net.weight[0], net.bias[1] - net.bias[0], 2.*y - 1
    assert torch.allclose(signs*(moved @ u + c), robust_margins(u, c, x.float(), signs, norm=norm, eps=.3), atol=1e-5)
    assert net.weight.grad is None and net.bias.grad is None and not moved.requires_grad


def test_both_loops_take_every_step(small, monkeypatch):
    steps = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *a, **k: steps.append(1))
    for loader in (False, True):
        module_loop(nn.Linear(100, 2), small[3][0], epochs=2, batch_size=50, loader=loader)
        assert len(steps) == 2*math.ceil(len(small[3][0].train)/50)
        steps.clear()


def test_neither_loop_touches_global_randomness(small):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for loops in (benchmarks._loops(small, False), benchmarks._loops(small, True)): loops[next(iter(loops))]()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("patience", [1, 3])
def test_slots_are_what_the_batch_computes(small, monkeypatch, patience):
    computed, inner = [], linear._ball_gradient
    monkeypatch.setattr(linear, "_ball_gradient", lambda p, *a: computed.append(p.shape[0]*p.shape[1]) or inner(p, *a))
    problem, norms, radii = small[2]
    runs = train_linear(*problem.train, valid=problem.valid, norm=norms, eps=radii, epochs=25, patience=patience)
    needed, batch, whole = batch_slots(runs)
    assert batch*math.ceil(len(problem.train)/64) == sum(computed)
    assert needed == int(runs.epochs.sum()) and whole == 280*int(runs.epochs.max())
    assert needed <= batch < whole


def test_a_reduced_grid_says_so_and_counts_its_runs():
    rows = {row["metric"]: row["value"] for row in grid_costs(60)}
    assert all(name.startswith("reduced Gaussian grid, ") for name in rows) and not set(rows) & set(LIMITS)
    assert rows["reduced Gaussian grid, runs"] == 1120
    assert 5 < rows["reduced Gaussian grid, mean stop epoch"] <= 40
    assert rows["reduced Gaussian grid, run-epochs of a batch that waits / of one that narrows"] >= 1
    assert rows["reduced Gaussian grid, run-epochs of the batch / of its runs"] >= 1


def test_scikit_learn_solves_the_same_problem():
    for problem, _, _ in published_problems(800):
        ours = solve_linear(*problem.train).loss
        assert scikit_logistic(problem, tol=1e-10) == pytest.approx(ours, abs=1e-8)
        assert scikit_logistic(problem) > ours - 1e-12


def test_theory_starts_from_nothing_each_time():
    from sadalib.disparity import theory
    first = benchmarks.law_curves("holtsmark")
    spent = theory._threshold.cache_info().misses
    assert benchmarks.law_curves("holtsmark") == first and len(first) == 36
    assert theory._threshold.cache_info().misses == spent > 0


def test_ratios_pair_rounds():
    assert ratio([2., 8., 3.], [1., 2., 3.]) == {"value": 2., "low": 1., "high": 4.}
    assert ratio([1.], [2.], 10)["value"] == 5
    times = interleaved({"a": lambda: None, "b": lambda: None}, 3)
    assert [len(t) for t in times.values()] == [3, 3]
    cpu, wall = on_both_clocks({"a": lambda: None}, 2)
    assert len(cpu["a"]) == len(wall["a"]) == 2 and isinstance(cpu["a"][0], float)


def test_limits_are_judged_on_the_right_side():
    for metric, (sign, limit) in LIMITS.items():
        assert limit_of(metric, limit) == (f"{sign} {limit:g}", "yes")
        assert limit_of(metric, limit + (1e-6 if sign == "<=" else -1e-6))[1] == "no"
        assert limit_of(metric, math.nan)[1] == "no"
    assert limit_of("nothing promised", 1.) == ("", "")


def test_configurations_follow_profile_and_parameters():
    full, smoke = (cost_configs(CostParameters(), profile) for profile in ("paper", "smoke"))
    assert set(full) == set(smoke) == set(SUBJECTS) and next(iter(full)) == "grid"
    assert {full[s].n for s in ("linear", "grid", "exact")} == {4000} and {c.rounds for c in smoke.values()} == {1}
    assert {full[s].threads for s in ("linear", "grid", "exact", "theory")} == {1} and full["map"].threads == 2
    own = cost_configs(CostParameters(images=5, points=77, rounds=3, threads=4), "small", "cuda")
    assert (own["map"].n, own["linear"].n, own["theory"].n, own["throughput"].device) == (5, 77, 200, "cuda")
    assert own["grid"].rounds == 1 and {c.rounds for s, c in own.items() if s != "grid"} == {3}
    assert {c.threads for c in own.values()} == {4}
    assert cost_configs(CostParameters(), "small", "cuda")["throughput"].n == 2048


@pytest.mark.parametrize(("name", "near"), [("gird", "grid"), ("exakt", "exact")])
def test_an_unknown_subject_is_refused_before_anything_runs(name, near):
    with pytest.raises(SadalibError, match=f"did you mean `{near}`"):
        cost_configs(CostParameters(subjects=("map", name)), "smoke")


def test_importing_is_light():
    code = """if True:
        import sys, sadalib.benchmarks
        heavy = {"matplotlib", "pandas", "sklearn", "scipy", "PIL", "ipywidgets", "sadalib.disparity"}
        print(sorted(heavy & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
