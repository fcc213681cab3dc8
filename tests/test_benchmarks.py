"""Benchmarks at reduced sizes: what they compare does the same work, and every subject gives finite ratios; no times"""
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sadalib import benchmarks
from sadalib.advaa import OPERATIONS, apply_op, uniform_policies
from sadalib.benchmarks import (
    LIMITS,
    SUBJECTS,
    BenchmarkConfig,
    CostParameters,
    afan_costs,
    attacked_input,
    augment_costs,
    batch_augment,
    batch_slots,
    cost_configs,
    exact_costs,
    grid_costs,
    interleaved,
    limit_of,
    linear_costs,
    measure_all,
    module_loop,
    network_pass,
    on_both_clocks,
    pillow_augment,
    pillow_operations,
    published_problems,
    ratio,
    scikit_logistic,
    search_loop,
    shaken_by_block,
    step_by_copy,
    step_copies,
    step_costs,
    theory_costs,
)
from sadalib.data import load
from sadalib.disparity import linear, robust_margins, solve_linear, train_linear
from sadalib.runs import SadalibError, record, require, seeded
from sadalib.shake_networks import ShakeBlock, ShakeShake
from sadalib.training import take_step

SIZES = {"attack": 8, "throughput": 8, "linear": 80, "grid": 60, "exact": 700, "theory": 10,
         "augment": 8, "advaa_step": 4, "shake": 2, "afan": 2}
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
    monkeypatch.setattr(benchmarks, "on_both_clocks", lambda work, rounds, *_: ({k: [1.]*rounds for k in work},)*2)
    monkeypatch.setattr(benchmarks, "interleaved", lambda work, rounds, *_, **__: {k: [1.]*rounds for k in work})
    monkeypatch.setattr(benchmarks, "_counted", lambda *_: (1, 1)) # of A-FAN: memory and runs
    monkeypatch.setattr(benchmarks, "peak_bytes", lambda *_: 1)
    found = {row["metric"] for rows in (linear_costs(60, 1), exact_costs(700, 1), theory_costs(5, 1),
             benchmarks.map_costs(8, 1), benchmarks.attack_costs(4, 1), grid_costs(60), augment_costs(2, 1),
             step_costs(2, 1), afan_costs(8, 1)) for row in rows}
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


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_pillow_gives_the_same_floats(batched, seed):
    images, policies = load("digits", "train", limit=20).images, uniform_policies(5, generator=seeded("policies", seed))
    ours = batch_augment(images, policies, generator=seeded(seed))
    theirs = pillow_augment(images.permute(0, 2, 3, 1).numpy(), policies, batched=batched, generator=seeded(seed))
    assert ours.shape == (100, 3, 32, 32) and torch.equal(ours, theirs)
    assert (ours == 0).all(1).flatten(1).sum(1).min() >= 8*8 # the square, in the mean's colour


def test_pillow_has_every_operation():
    image, others = torch.randint(0, 256, (2, 3, 32, 32), generator=seeded(1)).byte(), torch.tensor([1, 1])
    pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in image]
    for name in OPERATIONS:
        done = pillow_operations()[name](pictures[0], benchmarks._value(name, 8, -1), [7., 20.], pictures[1])
        ours = apply_op(image, name, 8, -1, centres=torch.tensor([[7., 20.]]*2), partners=others)[0]
        assert np.array_equal(np.asarray(done), ours.permute(1, 2, 0).numpy()), name


def test_the_largest_difference_is_measured(monkeypatch):
    rows = {row["metric"]: row["value"] for row in augment_costs(2, 1)}
    assert rows["augmentation by Pillow - by preprocess, largest difference"] == 0
    monkeypatch.setattr(benchmarks, "pillow_augment", lambda x, p, **_: batch_augment(
        torch.from_numpy(x).permute(0, 3, 1, 2), p, generator=seeded("other")))
    rows = {row["metric"]: row["value"] for row in augment_costs(2, 1)}
    assert rows["augmentation by Pillow - by preprocess, largest difference"] > .1


@pytest.mark.parametrize("batch", [2, 6])
def test_bytes_handed_over_are_those_of_the_images(batch):
    images, labels, copies = step_copies(search_loop(batch, "tinynet"))
    assert images.dtype == torch.uint8 and images.shape == (batch, 3, 32, 32) and len(labels) == batch
    assert copies.dtype == torch.float32 and copies.nbytes == 4*4*images.nbytes
    counted = [row for row in step_costs(batch, 1) if row["metric"].startswith("bytes of float copies")]
    assert [row["value"] for row in counted] == [16]


def test_a_step_its_rival_and_its_floor_do_the_same_work():
    ours, user, floor = (search_loop(6, "tinynet") for _ in range(3))
    for loop in (ours, user, floor): loop.model.eval() # where BatchNorm mixes copies, gradients differ
    _, labels, copies = step_copies(floor)
    for group in floor.optimizer.param_groups + user.optimizer.param_groups: group["lr"] = ours.recipe.lr/ours.recipe.warmup
    total = float(take_step(ours)["total"])
    assert sum(step_by_copy(user))/4 == pytest.approx(total, abs=1e-5) and user.step == ours.step == 1
    network_pass(floor, copies, labels.repeat_interleave(4))
    for a, b, c in zip(*(loop.model.parameters() for loop in (ours, user, floor)), strict=True):
        assert torch.allclose(a, b, atol=1e-5) and torch.allclose(a, c, atol=1e-5)
    assert ours.method.search.steps == 1 and user.method.search.steps == 0


def test_the_search_that_is_timed_updates_the_controller(monkeypatch):
    loops, inner = [], benchmarks.search_loop
    monkeypatch.setattr(benchmarks, "search_loop", lambda n: loops.append(inner(n, "tinynet")) or loops[-1])
    step_costs(2, 2)
    assert [loop.method.search.round for loop in loops] == [0, 0, 0, 3] and len(loops[3].method.search.log) == 3
    assert [loop.step for loop in loops] == [3, 3, 0, 0]


def test_blocks_that_draw_for_themselves_are_the_same_network():
    net, x = ShakeShake(8, 4), torch.rand(3, 3, 16, 16, generator=seeded(0))
    other = shaken_by_block(net)
    assert sum(isinstance(m, ShakeBlock) for m in net.modules()) == 3 and not torch.equal(other(x), other(x))
    for m in [*net.modules(), *other.modules()]:
        if isinstance(m, ShakeBlock): m.branch2 = m.branch1 # two equal branches: their weights add up to 1
    assert torch.allclose(net(x), other(x), atol=1e-5)


def test_progress_counts_seconds_of_what_is_not_there(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(benchmarks.Progress, "update", lambda self, n=1, **shown: said.append((self.total, n, shown)))
    configs = [BenchmarkConfig(name, 2, rounds=1, threads=1) for name in ("shake", "advaa_step")]
    require(configs[0], root=tmp_path)
    said.clear()
    assert [run.config for run in measure_all(configs, root=tmp_path)] == configs
    seconds = benchmarks._USUAL["advaa_step"].seconds
    assert [row for row in said if row[2]] == [(seconds, seconds, {"finished": "advaa_step"})]
    assert set(benchmarks._USUAL) == set(SUBJECTS)


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
    assert {full[s].threads for s in ("linear", "grid", "exact", "theory", "augment", "advaa_step", "shake", "afan")} == {1}
    assert full["map"].threads == 2 and full["map"].rounds == 9
    assert cost_configs(CostParameters(), "small")["map"].rounds == 5
    own = cost_configs(CostParameters(images=5, points=77, rounds=3, threads=4), "small", "cuda")
    assert (own["map"].n, own["linear"].n, own["theory"].n, own["throughput"].device) == (5, 77, 200, "cuda")
    assert {own[s].n for s in ("augment", "advaa_step", "shake", "afan")} == {5}
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
        heavy = {"matplotlib", "pandas", "sklearn", "scipy", "PIL", "ipywidgets", "sadalib.disparity", "sadalib.advaa",
                 "sadalib.afan"}
        print(sorted(heavy & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
