"""Disparity: parity with recorded numbers, the mathematics under random inputs, and what a batch of runs must not do"""
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sadalib import disparity
from sadalib.disparity import (
    disparity_gaps,
    gaussian_accuracies,
    gaussian_mixture,
    gaussian_rule,
    gaussian_split,
    half_distance,
    image_problem,
    leaves_gradients,
    linear,
    linear_accuracy,
    population_accuracy,
    pulled_mean,
    ramp_mean,
    robust_margins,
    solve_linear,
    stable_accuracies,
    stable_cdf,
    stable_margins,
    stable_mixture,
    stable_noise,
    stable_pdf,
    stable_score,
    stable_threshold,
    synthetic_problem,
    train_linear,
    two_class_problem,
    worst_points,
)
from sadalib.disparity.theory import collapse_ratio
from sadalib.runs import SadalibError, seeded
from sadalib.yardsticks import pgd_attack

HERE, INF = Path(__file__).parent/"golden", math.inf
quick = settings(max_examples=25, deadline=None, derandomize=True)


def golden(name):
    for folder in (HERE, os.environ.get("SADALIB_GOLDEN")):
        if folder and (path := Path(folder)/name).is_file():
            with np.load(path, allow_pickle=False) as arrays: return dict(arrays)
    pytest.skip(f"{name} is not in tests/golden: set SADALIB_GOLDEN to the folder of the recorded outputs")


# ---- theory against recorded numbers

@pytest.mark.parametrize("i", range(20))
def test_gaussian_parity(i):
    g = golden("disparity_theory.npz")
    mean = g["gauss_mu_table"][g["gauss_mu_kind"][i]]
    cov = g["gauss_sigma"][i]**2*g["gauss_Sigma_unit_table"][g["gauss_Sigma_kind"][i]]
    rule = gaussian_rule(mean, cov, g["gauss_R"][i], g["gauss_eps"][i], g["gauss_p"][i])
    # the record maximises numerically: its own s is up to 1.1e-8 short of the maximum
    np.testing.assert_allclose([rule.robust_margin, rule.threshold],
                               [g["gauss_robust_margin_s"][i], g["gauss_threshold_t"][i]], rtol=1e-8, atol=1e-8)
    assert rule.robust_margin >= g["gauss_robust_margin_s"][i] - 1e-12
    np.testing.assert_allclose([rule.majority, rule.minority, rule.disparity],
                               [g["gauss_acc_maj"][i], g["gauss_acc_min"][i], g["gauss_AD"][i]], rtol=0, atol=5e-6)


@pytest.mark.parametrize(("law", "alpha", "close"), [("cauchy", 1, 5e-6), ("holtsmark", 1.5, 1e-4)])
def test_stable_parity(law, alpha, close):
    g = golden("disparity_theory.npz")
    for a, ratio, t, many, few, collapsed in zip(*(g[f"{law}_{k}"] for k in (
            "a", "R", "threshold", "acc_maj", "acc_min", "collapsed")), strict=True):
        ours = stable_threshold(a, ratio, alpha)
        assert (ours == INF) == bool(collapsed) == (t == INF)
        if ours < INF: assert abs(ours - t) < (1e-8 if alpha == 1 else 1e-6)
        np.testing.assert_allclose(stable_accuracies(a, ratio, alpha), (many, few), rtol=0, atol=close)


def test_collapse_parity():
    g = golden("disparity_theory.npz")
    for a, ratio, bound in zip(g["cauchy_collapse_a"], g["cauchy_collapse_R"], g["cauchy_collapse_R_upper_bound"], strict=True):
        assert collapse_ratio(a, 1) == pytest.approx(ratio, abs=1e-8)
        assert collapse_ratio(a, 1) < bound == pytest.approx((math.hypot(1, a) + a)**2)


def test_holtsmark_distribution_parity():
    g = golden("disparity_theory.npz")
    np.testing.assert_allclose(stable_cdf(g["holtsmark_cdf_z"], 1.5), g["holtsmark_cdf"], rtol=0, atol=1e-13)


# ---- Gaussian theory

MEANS = st.lists(st.floats(-3, 3), min_size=2, max_size=5).filter(lambda m: np.linalg.norm(m) > .3 and max(map(abs, m)) > .2)


def covariance(d, seed):
    root = np.random.default_rng(seed).standard_normal((d, d))
    return root @ root.T/d + .3*np.eye(d)


@quick
@given(MEANS, st.floats(0, .95), st.sampled_from([2, INF]), st.integers(0, 99))
def test_the_pulled_mean_is_the_nearest_point_of_the_ball(mean, fraction, norm, seed):
    cov, eps = covariance(len(mean), seed), fraction*np.linalg.norm(mean, norm)
    v = pulled_mean(mean, cov, eps, norm)
    assert np.linalg.norm(v - mean, norm) <= eps*(1 + 1e-9) + 1e-12
    inverse, draw = np.linalg.inv(cov), np.random.default_rng(seed)
    for _ in range(50):
        z = draw.standard_normal(len(mean))
        other = mean - eps*draw.random()*z/np.linalg.norm(z, norm)
        assert v @ inverse @ v <= other @ inverse @ other + 1e-10
    w = inverse @ v # the same margin from the weights: the two problems are dual
    s = (w @ mean - eps*np.linalg.norm(w, 1 if norm == INF else 2))/math.sqrt(w @ cov @ w)
    assert s == pytest.approx(gaussian_rule(mean, cov, 2, eps, norm).robust_margin, abs=1e-8)


@quick
@given(MEANS, st.floats(.3, 3), st.floats(1, 50), st.floats(0, .9), st.sampled_from([2, INF]))
def test_gaussian_properties(mean, sigma, ratio, fraction, norm):
    eps = fraction*np.linalg.norm(mean, norm)
    many, few = gaussian_accuracies(mean, sigma, ratio, eps, norm)
    assert many >= few - 1e-12 and (ratio > 1 or many == pytest.approx(few))
    split = gaussian_split(mean, sigma, ratio, eps, norm)
    np.testing.assert_allclose(np.add(split.inherent, split.imbalance), split.total, atol=1e-12)
    assert split.imbalance[0] >= -1e-12 and split.imbalance[1] <= 1e-12 # the threshold only ever grows
    assert max(split.inherent) <= 1e-12 # and the margin only ever shrinks
    if norm == 2: np.testing.assert_allclose(split.inherent, 0, atol=1e-9)
    isotropic = gaussian_accuracies(mean, np.eye(len(mean))*sigma**2, ratio, eps, norm)
    np.testing.assert_allclose(isotropic, (many, few), atol=1e-7)


@quick
@given(st.integers(0, 1000), st.floats(1, 10), st.floats(0, .8), st.sampled_from([2, INF]))
def test_simulated_errors_match_the_gaussian_closed_form(seed, ratio, fraction, norm):
    draw = np.random.default_rng(seed)
    mean, cov = draw.standard_normal(3) + .5, covariance(3, seed)
    eps = fraction*np.linalg.norm(mean, norm)
    v = pulled_mean(mean, cov, eps, norm)
    w = torch.from_numpy(np.linalg.solve(cov, v))
    x, y = gaussian_mixture(20_000, mean, torch.from_numpy(cov), 1, seeded(seed))
    simulated = linear_accuracy(w, torch.tensor(-math.log(ratio)/2), x, y)
    exact = gaussian_accuracies(mean, cov, ratio, eps, norm)
    np.testing.assert_allclose(simulated, exact, atol=5*math.sqrt(.25/20_000))


def test_a_mean_may_be_a_list_an_array_or_a_tensor():
    expected = gaussian_accuracies([1., 2.], 1.5, 3, .5)
    for make in (np.array, torch.tensor, tuple): assert gaussian_accuracies(make([1., 2.]), 1.5, 3, .5) == expected
    assert gaussian_accuracies(torch.tensor([1., 2.]), torch.eye(2)*2.25, 3, .5) == pytest.approx(expected)


# ---- stable laws

@pytest.mark.parametrize("alpha", [.4, .7, .95, 1.05, 1.3, 1.5, 1.8, 1.99])
def test_stable_density_and_distribution(alpha):
    from scipy.integrate import quad
    from scipy.stats import levy_stable
    x = np.array([0, .05, .5, 1.7, 5, 30.])
    np.testing.assert_allclose(stable_pdf(x, alpha), levy_stable.pdf(x, alpha, 0), rtol=1e-7, atol=1e-12)
    assert stable_pdf(0., alpha) == pytest.approx(math.gamma(1 + 1/alpha)/math.pi, rel=1e-12)
    np.testing.assert_allclose(stable_cdf(x, alpha) + stable_cdf(-x, alpha), 1, atol=1e-14)
    for low, high in ((.5, 1.), (2., 4.)):
        area = quad(lambda t: stable_pdf(t, alpha), low, high, epsabs=1e-12)[0]
        assert stable_cdf(high, alpha) - stable_cdf(low, alpha) == pytest.approx(area, abs=1e-11)
    slope = (math.log(stable_pdf(2 + 1e-5, alpha)) - math.log(stable_pdf(2 - 1e-5, alpha)))/2e-5
    assert stable_score(2., alpha) == pytest.approx(-slope, rel=1e-5)


def test_stable_tails_follow_their_power_law():
    for alpha in (.5, 1.2, 1.5, 1.9):
        tail = math.gamma(alpha)*math.sin(math.pi*alpha/2)/math.pi
        assert 1 - stable_cdf(1e5, alpha) == pytest.approx(tail*1e5**-alpha, rel=2e-2, abs=1e-14)


def error(a, t, ratio, alpha):
    return (ratio*(1 - stable_cdf(a + t, alpha)) + 1 - stable_cdf(a - t, alpha))/(1 + ratio)


@quick
@given(st.floats(.2, 6), st.floats(1, 40), st.sampled_from([.1, .5, .9, 1, 1.5, 1.9, 2]))
def test_no_threshold_is_better_than_the_best(a, ratio, alpha):
    t = stable_threshold(a, ratio, alpha)
    grid = np.linspace(0, 12, 400)
    others = np.minimum(error(a, grid, ratio, alpha).min(), 1/(1 + ratio))
    assert (1/(1 + ratio) if t == INF else error(a, t, ratio, alpha)) <= others + 1e-10
    assert (t == INF) == (ratio >= collapse_ratio(a, alpha)) and (ratio > 1 or t == 0)


@quick
@given(st.floats(.3, 5), st.sampled_from([.6, 1, 1.2, 1.5, 1.8]))
def test_collapse_is_where_the_constant_rule_draws_level(a, alpha):
    ratio = collapse_ratio(a, alpha)
    t = stable_threshold(a, ratio*(1 - 1e-9), alpha)
    assert t < INF and error(a, t, ratio, alpha) == pytest.approx(1/(1 + ratio), abs=1e-8)
    assert stable_threshold(a, ratio*(1 + 1e-9), alpha) == INF and collapse_ratio(a*.9, alpha) < ratio
    assert stable_accuracies(a, ratio*1.01, alpha) == (1., 0.)


def gap(a, robust, ratio, alpha):
    (p, q), (r, s) = (stable_accuracies(a, ratio, alpha, robust=m) for m in (robust, a))
    return (p - q) - (r - s)


@quick
@given(st.floats(2.2, 6), st.floats(.4, .9), st.floats(1.05, 2))
def test_heavy_tails_change_the_sign_of_the_gap(a, part, ratio):
    robust = a*part
    assert gap(a, robust, ratio, 2) > 0
    if robust > 1.3 and ratio < .9*collapse_ratio(robust, 1): assert gap(a, robust, ratio, 1) < 0
    assert gap(a, robust, 1, 1) == gap(a, robust, 1, 2) == 0
    between = math.sqrt(collapse_ratio(robust, 1)*collapse_ratio(a, 1))
    assert gap(a, robust, between, 1) > .3 # the robust rule has collapsed, the standard one has not
    assert gap(a, robust, 1.1*collapse_ratio(a, 1), 1) == 0


@quick
@given(st.integers(0, 1000), st.sampled_from([.8, 1, 1.5, 2]), st.booleans())
def test_simulated_errors_match_the_stable_closed_form(seed, alpha, isotropic):
    mean = np.abs(np.random.default_rng(seed).standard_normal(3)) + .4
    a, robust = stable_margins(mean, alpha, .3*mean.max(), INF, isotropic=isotropic)
    ratio = 1 + .7*(min(collapse_ratio(robust, alpha), 5) - 1)
    w = torch.from_numpy(disparity.theory._direction(mean, float(alpha), .3*mean.max(), INF, isotropic))
    spread = float(w.norm() if isotropic else w.abs().pow(alpha).sum()**(1/alpha))
    t = stable_threshold(robust, ratio, alpha)
    x, y = stable_mixture(20_000, mean, alpha, 1, seeded(seed), isotropic=isotropic)
    simulated = linear_accuracy(w/spread, torch.tensor(-t), x, y)
    np.testing.assert_allclose(simulated, stable_accuracies(a, ratio, alpha, robust=robust), atol=5*math.sqrt(.25/20_000))


@quick
@given(MEANS, st.floats(0, .95), st.sampled_from([1, 1.1, 1.5, 1.9, 2]), st.sampled_from([2, INF]), st.integers(0, 99))
def test_no_direction_has_a_larger_robust_margin(mean, fraction, alpha, norm, seed):
    eps = fraction*np.linalg.norm(mean, norm)
    clean, robust = stable_margins(mean, alpha, eps, norm)
    assert clean >= robust >= -1e-9
    draw = np.random.default_rng(seed)
    for w in np.array(mean) + draw.standard_normal((60, len(mean)))*draw.choice([.01, .3, 2], (60, 1)):
        reach = w @ np.array(mean) - eps*np.linalg.norm(w, 1 if norm == INF else 2)
        assert reach/(np.abs(w)**alpha).sum()**(1/alpha) <= robust + 1e-7


def test_stable_draws():
    for alpha in (.3, 1, 1.5, 2):
        noise = stable_noise(200_000, 1, alpha, seeded(alpha))
        assert noise.dtype == torch.float64 and noise.isfinite().all()
        for t in (.3, 1., 2.): assert (t*noise).cos().mean() == pytest.approx(math.exp(-t**alpha), abs=.01)
        wide = stable_noise(50_000, 3, alpha, seeded(alpha), isotropic=True)
        for direction in ([1., 0, 0], [.6, .64, .48]):
            assert (wide @ torch.tensor(direction).double()).cos().mean() == pytest.approx(math.exp(-1), abs=.02)
    assert torch.equal(stable_noise(5, 2, 1.5, seeded(3)), stable_noise(5, 2, 1.5, seeded(3)))


# ---- problems

def test_problems_are_paired_over_ratios_and_seeds_differ():
    for name in ("gaussian", "cauchy", "holtsmark"):
        a, b, c = (two_class_problem(name, r, seed=s, sizes=(60, 30, 40)) for r, s in ((1, 0), (5, 0), (5, 1)))
        assert torch.equal(a.train.x[:60], b.train.x[:60]) and torch.equal(a.train.x[60:72], b.train.x[60:])
        assert not torch.equal(b.train.x, c.train.x) and torch.equal(a.balanced.x, b.balanced.x)
        assert b.train.counts == (60, 12) and b.test.counts == (40, 8) and b.balanced.counts == (40, 40)
        assert b.eps(.5) == pytest.approx(.5*float(b.mean.norm())) and "mu: l2" in b._repr_markdown_()


def test_digits_are_split_without_overlap():
    p = image_problem("digits", 3)
    train, valid, test = ({tuple(row.tolist()) for row in part.x} for part in (p.train, p.valid, p.test))
    assert not train & valid and not train & test and p.box == (0, 1) and p.train.x.shape[1] == 64
    assert p.eps(1, INF) == pytest.approx(image_problem("digits", 1).eps(1, INF))


def test_mnist_radii_are_the_published_ones():
    if not os.environ.get("SADALIB_DATA"): pytest.skip("set SADALIB_DATA to the folder of the prepared sets")
    p = image_problem("mnist", 10)
    assert p.eps(1, 2) == pytest.approx(2.6956, abs=.02) and p.eps(1, INF) == pytest.approx(.4341, abs=.005)


# ---- the adversary of linear rules

@quick
@given(st.integers(0, 10_000), st.sampled_from([2, INF]), st.floats(0, 1.5), st.booleans())
def test_no_point_of_the_ball_is_worse(seed, norm, eps, boxed):
    g, box = seeded(seed), (0., 1.) if boxed else None
    x, signs = torch.rand(4, 7, generator=g).double(), torch.tensor([1., -1., 1., -1.]).double()
    u, c = torch.randn(7, generator=g).double(), torch.tensor(.2).double()
    moved = worst_points(x, signs, u, norm=norm, eps=eps, box=box)
    assert torch.linalg.vector_norm(moved - x, norm, dim=1).max() <= eps + 1e-9
    if boxed: assert 0 <= moved.min() and moved.max() <= 1
    least = robust_margins(u, c, x, signs, norm=norm, eps=eps, box=box)
    torch.testing.assert_close(signs*(moved @ u + c), least, rtol=0, atol=1e-9)
    for _ in range(30):
        step = torch.randn(4, 7, generator=g).double() - signs[:, None]*u*2
        other = x + eps*step/torch.linalg.vector_norm(step, norm, dim=1, keepdim=True)
        if boxed: other = other.clamp(0, 1)
        assert (signs*(other @ u + c) >= least - 1e-6).all()


def test_accuracies_of_many_rules_at_once():
    x, y = gaussian_mixture(50, ramp_mean(6), 2., 2, seeded(0))
    u, c = torch.randn(3, 6, generator=seeded(1)).double(), torch.tensor([0., .1, -.2]).double()
    for how in (dict(), dict(eps=.4), dict(eps=.1, norm=INF), dict(eps=.3, box=(-9., 9.)), dict(eps=.3, norm=INF, box=(-9., 9.))):
        together = linear_accuracy(u, c, x, y, **how)
        assert together.shape == (3, 2)
        for i in range(3): torch.testing.assert_close(together[i], linear_accuracy(u[i], c[i], x, y, **how))
    torch.testing.assert_close(linear_accuracy(u, c, x, 3 - 2*y), linear_accuracy(-u, -c, x, y).flip(1)) # labels 3 and 1


def test_population_accuracy_is_the_limit():
    mean, u = ramp_mean(5, 3.), torch.randn(5, generator=seeded(0)).double().abs()
    for law, (x, y) in ((dict(sigma=2.), gaussian_mixture(40_000, mean, 2., 1, seeded(1))),
                        (dict(alpha=1.5), stable_mixture(40_000, mean, 1.5, 1, seeded(1)))):
        for ball in (dict(), dict(eps=.5), dict(eps=.3, norm=INF)):
            torch.testing.assert_close(population_accuracy(u, .4, mean, **law, **ball),
                                       linear_accuracy(u, torch.tensor(.4), x, y, **ball), rtol=0, atol=.013)


# ---- training against recorded runs

RECORDED = [(ratio, kind, norm, eps) for ratio in (1, 10) for kind, norm, eps in (
    ("std", 2, 0), ("advl2_2.5", 2, 2.5), ("advlinf_0.5", INF, .5))]


def replay(g, ratio, **how):
    part = {k: (g[f"R{ratio}_X_{k}"], g[f"R{ratio}_y_{k}"].astype(int)) for k in ("train", "valid", "test")}
    return part["test"], train_linear(
        *part["train"], valid=part["valid"], learning_rates=[.01], seeds=[2], epochs=5, attack="published", select="clean",
        init=(g[f"R{ratio}_init_W"], g[f"R{ratio}_init_b"]), order=g[f"R{ratio}_order"].astype(int), **how)


@pytest.mark.parametrize("protocol", ["official", "corrected"])
@pytest.mark.parametrize(("ratio", "kind", "norm", "eps"), RECORDED)
def test_training_parity(ratio, kind, norm, eps, protocol):
    g = golden("disparity_train.npz")
    key = f"R{ratio}_{kind}" + ("" if kind == "std" else f"_{protocol}")
    test, runs = replay(g, ratio, norm=norm, eps=eps, protocol=protocol)
    np.testing.assert_allclose(runs.valid_loss[0], g[f"{key}_val_loss"], rtol=0, atol=1e-6)
    assert int(runs.best_epoch[0]) == g[f"{key}_best_epoch"]
    np.testing.assert_allclose(runs.u_last[0], g[f"{key}_u"][-1], rtol=0, atol=WEIGHTS[norm])
    np.testing.assert_allclose(runs.u[0], g[f"{key}_u_final"], rtol=0, atol=WEIGHTS[norm])
    np.testing.assert_allclose([runs.c_last[0], runs.c[0]], [g[f"{key}_c"][-1], g[f"{key}_c_final"]], rtol=0, atol=1e-6)
    right = runs.accuracy(*test)[0]*torch.tensor([(test[1] == 0).sum(), (test[1] == 1).sum()])
    np.testing.assert_allclose(right, g[f"{key}_test_correct"], atol=.5)


WEIGHTS = {2: 1e-6, INF: 1e-6}


# ---- training against a loop over modules

def attacked(model, x, y, norm, eps, box, leak):
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(model(x), y)
    if leak: loss.backward()
    push = x.grad if leak else torch.autograd.grad(loss, x)[0]
    step = push.sign() if norm == INF else push/push.norm(dim=1, keepdim=True).clamp(min=1e-6)
    out = x + eps*step
    return (out if box is None else out.clamp(*box)).detach()


def one_module(x, y, init, order, rate, epochs, norm, eps, official, box=None, sgd=None):
    model = nn.Linear(x.shape[1], 2, dtype=x.dtype)
    model.load_state_dict({"weight": init[0], "bias": init[1]})
    optimizer = torch.optim.Adam(model.parameters(), rate) if sgd is None else torch.optim.SGD(model.parameters(), rate, sgd)
    for epoch in range(epochs):
        for rows in order[epoch].split(64):
            bx, by = x[rows], y[rows]
            optimizer.zero_grad() # before the attack: what it leaves behind is kept, as in the released code
            if eps: bx = attacked(model, bx, by, norm, eps, box, leak=official)
            F.cross_entropy(model(bx), by).backward()
            optimizer.step()
    return (model.weight[1] - model.weight[0]).detach(), (model.bias[1] - model.bias[0]).detach()


@pytest.mark.parametrize("sgd", [None, 0., .9])
@pytest.mark.parametrize("box", [None, (-8., 8.)])
@pytest.mark.parametrize("protocol", ["official", "corrected"])
def test_a_batch_of_runs_is_a_loop_over_modules(protocol, box, sgd):
    p = synthetic_problem("gaussian", 4, sizes=(200, 50, 50), mean=ramp_mean(20), sigma=2.)
    x, y = p.train.x.clamp(-8, 8), p.train.y
    order = torch.stack([torch.randperm(len(y), generator=seeded(e)) for e in range(3)])
    init = torch.randn(2, 20, generator=seeded(0)).double()*.1, torch.zeros(2).double()
    rates, strengths = (.02, .003), [(2, 0.), (2, 2.), (INF, .3)]
    runs = train_linear(x, y, valid=p.valid, norm=[n for n, _ in strengths], eps=[e for _, e in strengths], protocol=protocol,
                        learning_rates=rates, seeds=[0], epochs=3, init=init, order=order, attack="published", box=box,
                        optimizer="adam" if sgd is None else "sgd", momentum=sgd or 0., dtype=torch.float64)
    for i, (norm, eps, rate) in enumerate((n, e, r) for n, e in strengths for r in rates):
        u, c = one_module(x, y, init, order, rate, 3, norm, eps, protocol == "official", box, sgd)
        torch.testing.assert_close(runs.u_last[i], u, rtol=0, atol=1e-8)
        torch.testing.assert_close(runs.c_last[i], c, rtol=0, atol=1e-8)


def test_the_first_order_optimum_is_the_exact_one():
    p = synthetic_problem("gaussian", 3, sizes=(400, 100, 100), mean=ramp_mean(10), sigma=3.)
    for norm in (2, INF):
        exact = solve_linear(*p.train, norm=norm, eps=p.eps(.4, norm))
        runs = train_linear(*p.train, valid=p.train, norm=norm, eps=p.eps(.4, norm), learning_rates=[.02], seeds=[0], epochs=1000,
                            patience=1000, batch_size=10_000, optimizer="sgd", dtype=torch.float64)
        assert -1e-9 < runs.best_loss[0] - exact.loss < 2e-3


# ---- what a batch must do

SMALL = dict(sizes=(150, 60, 60), mean=ramp_mean(12), sigma=4.)


def small(ratio=3, **how): return synthetic_problem("gaussian", ratio, **{**SMALL, **how})


def test_runs_do_not_know_of_each_other_and_leave_when_done(monkeypatch):
    p, widths = small(), []
    inner = linear._ball_gradient
    monkeypatch.setattr(linear, "_ball_gradient", lambda q, *a: (widths.append(q.shape[:2]), inner(q, *a))[1])
    how = dict(valid=p.valid, epochs=80, patience=4)
    norms, radii = [2, 2, INF], [0, p.eps(.6), p.eps(.5, INF)]
    grid = train_linear(*p.train, norm=norms, eps=radii, learning_rates=(.1, .01, .0003), seeds=(1, 2), **how)
    areas = [a*b for a, b in widths]
    assert areas[0] == 18 and areas[-1] <= 6 and areas == sorted(areas, reverse=True)
    assert sum(areas) < 1.3*sum(-(-len(p.train)//64)*int(e) for e in grid.epochs)
    for i in (0, 7, 10, 17):
        alone = train_linear(*p.train, norm=float(grid.norm[i]), eps=float(grid.eps[i]), learning_rates=[float(grid.learning_rate[i])],
                             seeds=[int(grid.seed[i])], **how)
        assert alone.epochs[0] == grid.epochs[i] and alone.best_epoch[0] == grid.best_epoch[i]
        torch.testing.assert_close(alone.valid_loss[0], grid.valid_loss[i], rtol=0, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(alone.u[0], grid.u[i], rtol=0, atol=1e-4)


def test_early_stopping_follows_the_selecting_loss():
    p = small()
    for select, losses in (("clean", "valid_loss"), ("robust", "robust_valid_loss")):
        runs = train_linear(*p.train, valid=p.valid, eps=p.eps(.7), learning_rates=(.1, .01), seeds=(0, 1), epochs=60,
                            patience=5, select=select)
        for i in range(len(runs)):
            seen = getattr(runs, losses)[i, :runs.epochs[i]]
            assert int(seen.argmin()) == runs.best_epoch[i] and runs.best_loss[i] == seen.min()
            assert runs.epochs[i] in (60, runs.best_epoch[i] + 6)
            assert runs.valid_loss[i, runs.epochs[i]:].isnan().all()
        best = runs.chosen()
        assert len(best) == 2 and sorted(best.seed.tolist()) == [0, 1]
        for i, s in enumerate(best.seed): assert best.best_loss[i] == runs.best_loss[runs.seed == s].min()


def test_defaults_of_both_protocols():
    p = small()
    runs = {name: train_linear(*p.train, valid=p.valid, learning_rates=[.01], seeds=[0], epochs=1, eps=.5, protocol=name)
            for name in ("official", "corrected")}
    assert (runs["official"].select, runs["corrected"].select) == ("clean", "robust")
    robust = runs["corrected"]
    margins = robust_margins(robust.u_last, robust.c_last, p.valid.x.float(), 2*p.valid.y - 1, eps=.5)
    sizes = linear._batch_weights(len(p.valid), 64)
    assert robust.robust_valid_loss[0, 0] == pytest.approx(float(F.softplus(-margins[0]).double() @ sizes), abs=1e-6)


def test_a_run_that_explodes_ends_alone():
    p = small()
    with np.errstate(all="ignore"):
        runs = train_linear(*p.train, valid=p.valid, eps=1., learning_rates=(.01, 3e38, .001), seeds=(0, 1), epochs=6)
    assert runs.failed.tolist() == [False, False, True, True, False, False] and runs.epochs[2] == 1
    assert runs.u[~runs.failed].isfinite().all() and runs.best_epoch[2] == -1 and runs.best_loss[2] == INF
    assert "| 2 |" in runs._repr_markdown_() and "2 failed" in repr(runs) and not runs.chosen().failed.any()


def test_heavy_tails_are_finite_in_training():
    p = synthetic_problem("cauchy", 2, sizes=(200, 80, 80))
    runs = train_linear(*p.train, valid=p.valid, eps=p.eps(.5), learning_rates=(.01, .0001), seeds=[0], epochs=5)
    assert not runs.failed.any()
    assert solve_linear(*p.train, eps=p.eps(.5)).loss < math.log(2)


def test_the_global_random_state_is_left_alone():
    before, p = torch.random.get_rng_state(), small()
    train_linear(*p.train, valid=p.valid, eps=.5, seeds=[0], epochs=2)
    stable_mixture(10, [1.], 1.5, 2)
    assert torch.equal(before, torch.random.get_rng_state())


def test_official_understates_the_gap():
    p = synthetic_problem("gaussian", 10, sizes=(1000, 400, 400))
    gaps = {}
    for name in ("official", "corrected"):
        runs = train_linear(*p.train, valid=p.valid, norm=2, eps=[0, p.eps(.75)], protocol=name, learning_rates=(.01, .001), seeds=(0, 1),
                            epochs=60, patience=10)
        gaps[name] = float(disparity_gaps(runs, p)[2., p.eps(.75)][:, 0].mean())
    assert gaps["corrected"] > 2*gaps["official"] > 0


# ---- the exact problem

@quick
@given(st.integers(0, 10_000), st.sampled_from([2, INF]), st.floats(.05, .98), st.booleans())
def test_nothing_near_a_solution_is_better(seed, norm, fraction, boxed):
    g = seeded("exact", seed)
    x, y = gaussian_mixture(60, torch.rand(4, generator=g).double()*.25 + .02, .25, 2, g)
    if boxed: x = (x + .5).clamp(0, 1)
    signs = 2.*y - 1
    s = solve_linear(x, y, norm=norm, eps=fraction*half_distance(x, signs, norm), box=(0., 1.) if boxed else None)
    if s.separable: return
    assert s.residual < 1e-5
    def loss(u, c): return float(F.softplus(-robust_margins(u, c, x, signs, norm=norm, eps=s.eps, box=s.box)).mean())
    assert loss(s.u, s.c) == pytest.approx(s.loss, abs=1e-12)
    for size in (1e-4, 1e-2, .3):
        for _ in range(10):
            u = s.u + size*s.u.norm()*torch.randn(4, generator=g).double()
            assert loss(u, s.c + size*torch.randn((), generator=g).double()) >= s.loss - 1e-9


@quick
@given(st.integers(0, 10_000), st.sampled_from([2, INF]), st.floats(1, 20))
def test_the_solution_is_zero_exactly_from_the_half_distance_on(seed, norm, ratio):
    x, y = gaussian_mixture(60, [.4, -.2, .1], 1., ratio, seeded(seed))
    edge = half_distance(x, 2.*y - 1, norm)
    below, at = (solve_linear(x, y, norm=norm, eps=edge*f) for f in (.999, 1 + 1e-12))
    assert at.degenerate and at.u.norm() == 0 and not below.degenerate and below.u.norm() > 1e-9
    many, few = (y == 0).sum(), (y == 1).sum()
    prior = few/(many + few)
    assert at.loss == pytest.approx(float(-(prior*prior.log() + (1 - prior)*(1 - prior).log())), abs=1e-6)
    assert below.loss <= at.loss + 1e-12


def test_the_exact_solution_does_not_depend_on_names_places_or_units():
    p = small()
    base = solve_linear(*p.train, norm=INF, eps=p.eps(.5, INF))
    swapped = solve_linear(-p.train.x, 1 - p.train.y, norm=INF, eps=p.eps(.5, INF))
    torch.testing.assert_close(swapped.u, base.u, rtol=0, atol=1e-8)
    moved = solve_linear(p.train.x*10 + 7, p.train.y + 4, norm=INF, eps=10*p.eps(.5, INF))
    torch.testing.assert_close(moved.u*10, base.u, rtol=0, atol=1e-7)
    assert moved.loss == pytest.approx(base.loss, abs=1e-10) and (base.majority, swapped.majority) == (0, 1)
    assert swapped.disparity(-p.balanced.x, 1 - p.balanced.y) == pytest.approx(base.disparity(*p.balanced))


def test_quasi_newton_agrees_with_newton(monkeypatch):
    p = small()
    for norm in (2, INF):
        newton = solve_linear(*p.train, norm=norm, eps=p.eps(.5, norm))
        monkeypatch.setattr(disparity.exact, "NEWTON_UP_TO", 1)
        other = solve_linear(*p.train, norm=norm, eps=p.eps(.5, norm))
        monkeypatch.undo()
        assert other.loss == pytest.approx(newton.loss, abs=1e-9)
        torch.testing.assert_close(other.u, newton.u, rtol=0, atol=1e-4)


def test_a_wide_box_is_no_box():
    p = small()
    for norm in (2, INF):
        free, boxed = (solve_linear(*p.train, norm=norm, eps=p.eps(.5, norm), box=b) for b in (None, (-1e3, 1e3)))
        assert boxed.loss == pytest.approx(free.loss, abs=1e-8)


def test_large_samples_approach_the_theory():
    mean, gaps = ramp_mean(20), []
    for eps in (0., 3.75):
        s = solve_linear(*gaussian_mixture(40_000, mean, 3., 10, seeded(0)), eps=eps)
        many, few = population_accuracy(s.u, s.c, mean, sigma=3.)
        gaps.append(float(many - few))
    theory = [gaussian_rule(mean, 3., 10, e).disparity for e in (0., 3.75)]
    np.testing.assert_allclose(gaps, theory, atol=.02)


def test_reprs():
    p = small()
    s = solve_linear(*p.train, eps=1.)
    assert s.converged and "optimal" in s._repr_markdown_()
    separable = solve_linear(torch.tensor([[1., 0], [2, 1], [-1, 0], [-2, 1]]), [1, 1, 0, 0], eps=.5)
    assert separable.separable and not separable.converged and "no finite optimum" in separable._repr_markdown_()
    assert "minority" in gaussian_rule([1.], 1., 2)._repr_markdown_()


# ---- gradients that an attack leaves

def leaky(model, x, y): return attacked(model, x, y, 2, 1., None, leak=True)


def test_guard_no_attack_of_ours_leaves_a_gradient():
    model, y = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), torch.tensor([0, 1, 1, 0])
    images = torch.rand(4, 3, 4, 4, generator=seeded(0))
    kept = [torch.ones_like(q) for q in model.parameters()]
    for q, k in zip(model.parameters(), kept, strict=True): q.grad = k.clone()
    for norm in ("l2", "linf"):
        def attack(*batch, norm=norm): return pgd_attack(*batch, norm=norm, eps=.1, steps=3, generator=seeded(0))
        assert leaves_gradients(attack, model, images, y) == 0
    assert leaves_gradients(leaky, model, images.flatten(1), y) > 0
    assert all(torch.equal(q.grad, k) for q, k in zip(model.parameters(), kept, strict=True))


def test_the_effect_of_a_gradient_left_behind():
    "Published: a step of clean + attacked gradient. The leak makes corrected training official, bit for bit but rounding"
    p = small()
    order = torch.stack([torch.randperm(len(p.train), generator=seeded(e)) for e in range(4)])
    init = torch.randn(2, 12, generator=seeded(9)).double()*.1, torch.zeros(2).double()
    leak, clean = (one_module(*p.train, init, order, .05, 4, 2, 2.5, official)[0] for official in (True, False))
    how = dict(valid=p.valid, eps=2.5, learning_rates=[.05], seeds=[0], epochs=4, init=init, order=order,
               attack="published", dtype=torch.float64)
    official, corrected = (train_linear(*p.train, protocol=name, **how).u_last[0] for name in ("official", "corrected"))
    torch.testing.assert_close(leak, official, rtol=0, atol=1e-8)
    torch.testing.assert_close(clean, corrected, rtol=0, atol=1e-8)
    assert (leak - clean).norm() > .1*clean.norm()


# ---- bad input

X, Y = torch.randn(20, 3, generator=seeded(0)) + torch.tensor([0, 1]).repeat(10)[:, None]*2, torch.tensor([0, 1]).repeat(10)
HUGE = X.clone().double()
HUGE[3, 1] = 1e300


@pytest.mark.parametrize(("x", "y", "how", "says"), [
    (X, Y*0, {}, "one class only"), (X, torch.arange(20) % 3, {}, "3 values"), (X, Y[:5], {}, "are expected"),
    (X[0], Y, {}, "are expected"), (X, torch.tensor([1] + [0]*19), {}, "19 and 1 points"),
    (X*math.nan, Y, {}, "NaN or infinity"), (X/0, Y, {}, "NaN or infinity"),
    (X, Y, dict(eps=99.), "beyond half the distance"), (X, Y, dict(eps=math.nan), "finite number from 0"),
    (X, Y, dict(eps=-.1), "eps is -0.1"), (X, Y, dict(norm=1), "2 or float"), (X, Y, dict(norm="linf"), "2 or float"),
    (X, Y, dict(eps="big"), "eps is 'big'")])
def test_one_sentence(x, y, how, says):
    for call in (lambda: solve_linear(x, y, **how), lambda: train_linear(x, y, valid=(X, Y), epochs=1, **how)):
        with pytest.raises(SadalibError, match=says) as error: call()
        assert str(error.value).endswith(".") and "\n" not in str(error.value)


def train(x=X, y=Y, valid=(X, Y), **how): return train_linear(x, y, valid=valid, epochs=1, **how)


@pytest.mark.parametrize(("call", "says"), [
    (lambda: gaussian_accuracies([1., 1.], 1., .5), "ratio is 0.5"),
    (lambda: gaussian_accuracies([1., 1.], 1., INF), "ratio is inf"),
    (lambda: gaussian_accuracies([1., 1.], 1., 2, 3.), "beyond the degenerate"),
    (lambda: gaussian_accuracies([3., 4.], 1., 2, 5.), "at the degenerate"),
    (lambda: gaussian_accuracies([3., 4.], 1., 1, 4., INF), "at the degenerate"),
    (lambda: gaussian_accuracies([math.nan], 1., 2), "finite vector"),
    (lambda: gaussian_accuracies("mu", 1., 2), "finite vector"),
    (lambda: gaussian_accuracies([0., 0.], 1., 2), "mean is 0"),
    (lambda: gaussian_accuracies([1., 1.], 0., 2), "standard deviation above 0"),
    (lambda: gaussian_accuracies([1., 1.], np.eye(3), 2), "covariance"),
    (lambda: gaussian_accuracies([1., 1.], 1., 2, .1, 3), "norm is 3"),
    (lambda: stable_threshold(1., 2., 0), "alpha is 0"),
    (lambda: stable_threshold(1., 2., 2.1), "alpha is 2.1"),
    (lambda: stable_threshold(math.nan, 2., 1), "a is nan"),
    (lambda: collapse_ratio(-1., 1), "a is -1"),
    (lambda: stable_cdf(math.nan, 1), "NaN"),
    (lambda: stable_margins([1., 2.], .5, .5), "alpha is below 1"),
    (lambda: stable_mixture(100, [1.], 1., 80, seeded(0)), "at least two"),
    (lambda: stable_mixture(100, [1.], 1., .5), "ratio is 0.5"),
    (lambda: stable_mixture(100, [1.], 3., 2), "at most 2"),
    (lambda: stable_mixture(100, "mu", 1., 2), "finite vector"),
    (lambda: two_class_problem("cifar", 2), "did you mean `cifar10`"),
    (lambda: synthetic_problem("stable", 2), "needs an alpha"),
    (lambda: small().eps(1.01), "fraction from 0 to 1"),
    (lambda: population_accuracy(X[0], 0., X[0]), "give one"),
    (lambda: solve_linear(X, Y, box=(0, 1)), "outside the box"),
    (lambda: train(HUGE), "as float32"),
    (lambda: train(valid=(X, Y + 1)), "labels differ"),
    (lambda: train(valid=(X[:, :2], Y)), "2 features"),
    (lambda: train(protocol="exact"), "call `solve_linear`"),
    (lambda: train(protocol="correct"), "did you mean `corrected`"),
    (lambda: train(norm=[2, INF], eps=[.1, .2, .3]), "2 norms and 3 radii"),
    (lambda: train(attack="pgd"), "unknown attack"),
    (lambda: train(patience=0), "patience is 0"),
    (lambda: train(learning_rates=[-1.]), "learning_rates"),
    (lambda: train(x=["a"]*20), "no numbers"),
    (lambda: train(valid=None), "no pair"),
    (lambda: train(seeds=[]), "seeds are"),
    (lambda: train(seeds=[1, 1]), "different whole numbers"),
    (lambda: train(eps=[]), "0 radii"),
    (lambda: train(box=(0, 1)), "outside the box"),
    (lambda: train(init=3), "init has"),
    (lambda: train(order="x"), "order has"),
    (lambda: train(momentum=2), "momentum is 2"),
    (lambda: gaussian_accuracies([1.], "x", 2), "standard deviation above 0"),
    (lambda: stable_pdf(1., .01), "below 0.02"),
    (lambda: small(sizes=(9, 9)), "three are expected")])
def test_one_sentence_elsewhere(call, says):
    with pytest.raises(SadalibError, match=says) as error: call()
    assert str(error.value)[-1] in ".?" and "\n" not in str(error.value)


def test_import_is_light():
    heavy = ("matplotlib", "pandas", "sklearn", "scipy", "IPython", "ipywidgets", "fastcore")
    code = f"import sys, sadalib.disparity; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
