"Intervals against scipy and by coverage; the contract of attacks; robust, per-class and corruption accuracy"
import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sadalib import yardsticks
from sadalib.models import Normalised, create_model
from sadalib.runs import SadalibError, Shard, cpu_threads, rand, randint, randn
from sadalib.yardsticks import (
    GROUPS,
    Interval,
    bootstrap_interval,
    confusion,
    corruption_names,
    corruption_table,
    mean_interval,
    paired_interval,
    per_class_accuracy,
    pgd_attack,
    project,
    robust_accuracy,
    spearman,
    wilson_interval,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Small tensors: more threads only wait for each other"
    with cpu_threads(1):
        yield


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def covers(low, high, truth):
    return ((low <= truth) & (truth <= high)).double().mean().item()


def linear(features, classes=2, seed=0):
    model = nn.Sequential(nn.Flatten(), nn.Linear(features, classes))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(randn(*p.shape, generator=draws(seed)))
    return model


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


# Accuracy by class

@settings(max_examples=30, deadline=None)
@given(st.integers(2, 7), st.integers(1, 60), st.integers(0, 10**6))
def test_confusion_counts_pairs(classes, n, seed):
    predictions, labels = randint(0, classes, 2, n, generator=draws(seed))
    table = confusion(predictions, labels, classes)
    pairs = list(zip(labels.tolist(), predictions.tolist(), strict=True))
    assert table.tolist() == [[pairs.count((i, j)) for j in range(classes)] for i in range(classes)]
    by_class = per_class_accuracy(predictions, labels, classes)
    assert by_class.isnan().tolist() == (table.sum(1) == 0).tolist()
    expected = (table.diag().sum()/n).item()
    assert math.isclose((by_class.nan_to_num()*table.sum(1)).sum().item()/n, expected, abs_tol=1e-6)


def test_logits_count_as_their_largest():
    logits, labels = randn(20, 4, generator=draws()), randint(0, 4, 20, generator=draws(1))
    assert torch.equal(confusion(logits, labels, 4), confusion(logits.argmax(1), labels, 4))


@pytest.mark.parametrize("predictions, labels", [
    (torch.tensor([0, 2]), torch.tensor([0, 1])), (torch.tensor([0, -1]), torch.tensor([0, 1])),
    (torch.tensor([0., 1.]), torch.tensor([0, 1])), (torch.tensor([0]), torch.tensor([0, 1])),
    (torch.full((2, 2), torch.nan), torch.tensor([0, 1])), (torch.tensor([0, 1]), torch.tensor([1, 2]))])
def test_confusion_refuses(predictions, labels):
    with pytest.raises(SadalibError):
        confusion(predictions, labels, 2)


# Intervals

@pytest.mark.parametrize("level", [.8, .95, .99])
@pytest.mark.parametrize("successes, n", [(0, 5), (5, 5), (3, 10), (912, 1000), (1, 10_000)])
def test_wilson_equals_scipy(successes, n, level):
    ours = wilson_interval(successes, n, level)
    theirs = scipy.stats.binomtest(successes, n).proportion_ci(level, "wilson")
    np.testing.assert_allclose((ours.low, ours.high), (theirs.low, theirs.high), atol=1e-12)
    assert ours.value == successes/n


def test_wilson_of_nothing_knows_nothing():
    value, low, high = wilson_interval(torch.tensor([0, 3]), torch.tensor([0, 4]))
    assert value[0].isnan() and value[1] == .75
    np.testing.assert_allclose((low[0], high[0]), (0, 1), atol=1e-15)


@pytest.mark.parametrize("p, n", [(.5, 30), (.9, 50), (.97, 200)])
def test_wilson_covers(p, n):
    right = (rand(4000, n, generator=draws()) < p).sum(1)
    _, low, high = wilson_interval(right, torch.full((4000,), n))
    assert .93 < covers(low, high, p) < .985


@pytest.mark.parametrize("level", [.9, .95])
def test_mean_interval_equals_scipy(level):
    values = randn(4, generator=draws()).double().numpy()
    theirs = scipy.stats.t.interval(level, 3, values.mean(), scipy.stats.sem(values))
    np.testing.assert_allclose(mean_interval(values, level)[1:], theirs, atol=1e-12)
    np.testing.assert_allclose(mean_interval(torch.as_tensor(values), level).value, values.mean())


@pytest.mark.parametrize("seeds", [2, 3, 5, 20])
def test_mean_interval_covers(seeds):
    _, low, high = mean_interval(randn(seeds, 4000, generator=draws(seeds)))
    assert .94 < covers(low, high, 0) < .96


def test_one_seed_has_no_interval():
    value, low, high = mean_interval([.5])
    assert value == .5 and math.isnan(low) and math.isnan(high)


def test_paired_interval_is_t_for_few_and_bootstrap_for_many():
    a, b = randn(2, 12, generator=draws())
    assert paired_interval(a, b) == paired_interval(a, b, how="t")
    theirs = scipy.stats.ttest_rel(a.double(), b.double()).confidence_interval()
    np.testing.assert_allclose(paired_interval(a, b)[1:], (theirs.low, theirs.high), atol=1e-9)
    a, b = randn(2, 300, generator=draws(1))
    theirs = scipy.stats.bootstrap(((a - b).double().numpy(),), np.mean, method="percentile", n_resamples=4000,
                                   rng=np.random.default_rng(0)).confidence_interval
    np.testing.assert_allclose(paired_interval(a, b, generator=draws())[1:], (theirs.low, theirs.high), atol=.01)


def test_paired_interval_covers():
    source, hits = draws(2), []
    for _ in range(400):
        shared = randn(60, generator=source)*5
        a, b = shared + .3 + randn(60, generator=source), shared + randn(60, generator=source)
        _, low, high = paired_interval(a, b, resamples=400, generator=source)
        hits.append(low <= .3 <= high)
    assert .91 < np.mean(hits) < .98


@pytest.mark.parametrize("seeds, spread", [(1, 0.), (3, .1), (10, .4)])
def test_bootstrap_interval_covers(seeds, spread):
    "New seeds and new images each time; images differ in how hard they are, seeds in how good they are"
    source, hits = draws(seeds), []
    ability, hard = 20_000, torch.distributions.Normal(0., 1.)
    truth = hard.cdf((1 + spread*randn(ability, generator=source))/math.sqrt(2)).mean().item()
    for _ in range(300):
        level = 1 + spread*randn(seeds, 1, generator=source) + randn(1, 150, generator=source)
        correct = randn(seeds, 150, generator=source) < level
        _, low, high = bootstrap_interval(correct, resamples=400, generator=source)
        hits.append(low <= truth <= high)
    assert .91 < np.mean(hits) < .995


def test_bootstrap_interval_of_one_seed_is_scipys():
    correct = (rand(400, generator=draws()) < .8).double()
    theirs = scipy.stats.bootstrap((correct.numpy(),), np.mean, method="percentile", n_resamples=4000,
                                   rng=np.random.default_rng(0)).confidence_interval
    np.testing.assert_allclose(bootstrap_interval(correct, generator=draws())[1:], (theirs.low, theirs.high), atol=.006)
    repeated = bootstrap_interval(correct.expand(4, -1), generator=draws())
    np.testing.assert_allclose(repeated, bootstrap_interval(correct, generator=draws()), atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=4, max_size=20))
def test_spearman_equals_scipy(pairs):
    a, b = (list(v) for v in zip(*pairs, strict=True))
    ours = spearman(a, b, resamples=50, generator=draws())
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert all(map(math.isnan, ours))
    else:
        assert math.isclose(ours.value, scipy.stats.spearmanr(a, b).statistic, abs_tol=1e-9)
        assert ours.low <= ours.high or math.isnan(ours.low)


@pytest.mark.parametrize("rho", [0., .7])
def test_spearman_covers(rho):
    truth, source, hits = 6/math.pi*math.asin(rho/2), draws(3), []
    for _ in range(300):
        x, y = randn(2, 25, generator=source)
        _, low, high = spearman(x, rho*x + math.sqrt(1 - rho**2)*y, resamples=300, generator=source)
        hits.append(low <= truth <= high)
    assert .91 < np.mean(hits) < .985


def test_few_points_have_no_interval():
    assert spearman([1, 2, 3], [1, 2, 3]).value == 1 and math.isnan(spearman([1, 2, 3], [1, 2, 3]).low)


@pytest.mark.parametrize("call", [
    lambda: mean_interval([]), lambda: mean_interval([1.], 0), lambda: mean_interval([1.], 95),
    lambda: mean_interval(1.), lambda: wilson_interval(3, 2), lambda: wilson_interval(-1, 2),
    lambda: wilson_interval(1, 2, 1), lambda: paired_interval([1, 2], [1]), lambda: paired_interval([[1]], [[1]]),
    lambda: paired_interval([1], [1], how="z"),
    lambda: bootstrap_interval(torch.ones(2, 2, 2)), lambda: bootstrap_interval(torch.ones(0)),
    lambda: spearman([1, 2], [1, 2, 3])])
def test_intervals_refuse(call):
    with pytest.raises(SadalibError):
        call()


def test_intervals_unpack_and_print():
    value, low, high = Interval(.5, .25, .75)
    assert (value, low, high) == (.5, .25, .75) and str(Interval(.5, .25, .75)) == "0.500 [0.250, 0.750]"


def test_same_generator_same_interval_and_the_global_state_stays():
    values, before = randn(50, generator=draws()), torch.get_rng_state()
    for f in (lambda g: paired_interval(values, values.flip(0), generator=g),
              lambda g: bootstrap_interval(values > 0, generator=g),
              lambda g: spearman(values, values**2, generator=g)):
        assert f(draws()) == f(draws())
        f(None)
    assert torch.equal(before, torch.get_rng_state())


# The attack contract (T15)

@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["linf", "l2"]), st.floats(0, 2), st.integers(0, 4), st.booleans(), st.integers(0, 10**6))
def test_inside_the_ball_and_the_image(norm, eps, steps, init, seed):
    model, images = linear(3*4*5, 3, seed), rand(6, 3, 4, 5, generator=draws(seed)).round(decimals=1)
    labels = randint(0, 3, 6, generator=draws(seed))
    out = pgd_attack(model, images, labels, norm=norm, eps=eps, steps=steps, init=init, generator=draws(seed))
    delta = (out - images).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert out.shape == images.shape and (size <= eps + 1e-6*(1 + eps)).all()
    assert out.min() >= 0 and out.max() <= 1 and out.isfinite().all() and not out.requires_grad


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("zero", [dict(eps=0.), dict(steps=0), dict(eps=0., step_size=.1)])
def test_radius_or_steps_zero_is_the_identity(norm, zero):
    images, labels = rand(4, 3, 6, 6, generator=draws()), torch.arange(4)
    out = pgd_attack(linear(108, 4), images, labels, norm=norm, **zero)
    assert torch.equal(out, images) and out.data_ptr() != images.data_ptr()
    assert pgd_attack(linear(108, 4), images[:0], labels[:0], norm=norm).shape == (0, 3, 6, 6)


def closed_form(model, images, labels, norm, eps):
    "The point of the ball where a two-class linear model loses most; with the box for linf"
    weight = model[1].weight.detach()
    uphill = ((1 - 2*labels)[:, None]*(weight[1] - weight[0])).view_as(images)
    if norm == "linf":
        return (images + eps*uphill.sign()).clamp(0, 1)
    return images + eps*uphill/uphill.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


@pytest.mark.parametrize("init", [False, True])
@pytest.mark.parametrize("norm, eps", [("linf", .3), ("linf", 8/255), ("l2", .25)])
def test_linear_model_reaches_the_closed_form_optimum(norm, eps, init):
    model = linear(3*8*8)
    images = rand(16, 3, 8, 8, generator=draws(1), low=0. if norm == "linf" else .3, high=1. if norm == "linf" else .7)
    labels = torch.arange(16) % 2
    step_size = eps if norm == "l2" and init else None  # on a sphere, PGD closes in geometrically
    out = pgd_attack(model, images, labels, norm=norm, eps=eps, steps=20, step_size=step_size, init=init,
                     generator=draws())
    best = closed_form(model, images, labels, norm, eps)
    torch.testing.assert_close(out, best, atol=3e-6, rtol=0)
    reached, ideal = (F.cross_entropy(model(x), labels, reduction="none") for x in (out, best))
    torch.testing.assert_close(reached, ideal, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm, eps", [("linf", .05), ("l2", 1.)])
def test_loss_does_not_fall(norm, eps):
    model, images = create_model("resnet20", seed=0).eval(), rand(16, 3, 32, 32, generator=draws())
    labels = randint(0, 10, 16, generator=draws(1))
    out = pgd_attack(model, images, labels, norm=norm, eps=eps, steps=5, generator=draws())
    before, after = (F.cross_entropy(model(x), labels, reduction="none") for x in (images, out))
    assert (after > before).double().mean() > .9


@pytest.mark.parametrize("training", [True, False])
def test_attack_leaves_nothing_behind(training):
    model = create_model("wrn_16_1", seed=0).train(training)
    model.net.stage2.eval()
    images, labels = rand(4, 3, 32, 32, generator=draws()), torch.arange(4)
    kept = images.clone()
    before, modes, random = state(model), [m.training for m in model.modules()], torch.get_rng_state()
    pgd_attack(model, images, labels, steps=2)
    pgd_attack(model, images, labels, steps=2, generator=draws())
    robust_accuracy(model, images, labels)
    assert [m.training for m in model.modules()] == modes and torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(images, kept) and not images.requires_grad and images.grad is None


def test_same_generator_same_attack_and_a_start_of_its_own():
    model, images, labels = linear(48), rand(4, 3, 4, 4, generator=draws()), torch.tensor([0, 1, 0, 1])
    attack = lambda g: pgd_attack(model, images, labels, steps=1, step_size=.001, generator=g)  # noqa: E731
    assert torch.equal(attack(draws()), attack(draws())) and not torch.equal(attack(draws()), attack(draws(1)))
    assert not torch.equal(attack(None), attack(None))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_two_processes_attack_as_one(norm):
    model, images = create_model("tinynet", seed=0), rand(6, 3, 32, 32, generator=draws())
    labels = torch.arange(6)
    whole = pgd_attack(model, images, labels, norm=norm, steps=3, generator=draws())
    halves = [pgd_attack(model, images[s], labels[s], norm=norm, steps=3, generator=Shard(draws(), s.start, s.stop, 6))
              for s in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(torch.cat(halves), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_neighbour_does_not_change_the_attack(norm):
    model, images, labels = create_model("tinynet", seed=0), rand(5, 3, 32, 32, generator=draws()), torch.arange(5)
    together = pgd_attack(model, images, labels, norm=norm, init=False)
    alone = pgd_attack(model, images[2:3], labels[2:3], norm=norm, init=False)
    torch.testing.assert_close(together[2:3], alone, atol=1e-5, rtol=0)


def test_works_where_gradients_are_off():
    model, images, labels = linear(48), rand(4, 3, 4, 4, generator=draws()), torch.tensor([0, 1, 0, 1])
    usual = pgd_attack(model, images, labels, generator=draws())
    with torch.no_grad():
        assert torch.equal(pgd_attack(model, images, labels, generator=draws()), usual)
    with torch.inference_mode():
        assert torch.equal(pgd_attack(model, images.clone(), labels.clone(), generator=draws()), usual)


def test_bytes_and_layouts():
    model = create_model("digitnet", seed=0)
    images, labels = randint(0, 256, 4, 3, 32, 32, generator=draws()).byte(), torch.arange(4)
    usual = pgd_attack(model, images.float()/255, labels, steps=2, init=False)
    assert torch.equal(pgd_attack(model, images, labels, steps=2, init=False), usual)
    last = dict(memory_format=torch.channels_last)
    other = pgd_attack(model.to(**last), (images.float()/255).to(**last), labels, steps=2, init=False)
    assert ((other - usual).abs() > 1e-5).double().mean() < .01  # a sign may turn where the gradient is nothing


def test_a_confident_model_is_still_attacked():
    model, images, labels = linear(48), rand(4, 3, 4, 4, generator=draws(), low=.4, high=.6), torch.tensor([0, 1, 0, 1])
    labels = model(images).argmax(1)
    with torch.no_grad():
        model[1].weight.mul_(12)  # probabilities saturate, gradients of about 1e-30
    moved = pgd_attack(model, images, labels, norm="l2", eps=.1, steps=1, init=False) - images
    torch.testing.assert_close(moved.flatten(1).norm(dim=1), torch.full((4,), .1), atol=1e-4, rtol=0)


def fgsm_by_hand(net, images, labels, eps):
    "One signed step on normalised images, written without the library"
    images = images.clone().requires_grad_()
    F.cross_entropy(net(images), labels).backward()
    return images.detach() + eps*images.grad.sign()


def test_normalisation_inside_equals_scaled_epsilon_by_hand():
    "T19"
    mean, std = torch.tensor([.5, .4, .3]).view(1, 3, 1, 1), torch.tensor([.2, .25, .3]).view(1, 3, 1, 1)
    model = create_model("tinynet", normalise=(mean.flatten().tolist(), std.flatten().tolist()), seed=0).eval()
    images, labels = rand(6, 3, 32, 32, generator=draws(), low=.1, high=.9), torch.arange(6)
    ours = pgd_attack(model, images, labels, eps=8/255, steps=1, init=False)
    hand = fgsm_by_hand(model.net, (images - mean)/std, labels, 8/255/std)
    assert ((ours - (hand*std + mean)).abs() > 1e-6).double().mean() < .002
    both = robust_accuracy(model, images, labels, attack=lambda m, x, y, generator: pgd_attack(m, x, y, init=False))
    bare = robust_accuracy(Normalised(model.net, mean.flatten(), std.flatten()), images, labels,
                           attack=lambda m, x, y, generator: pgd_attack(m, x, y, init=False))
    assert (both.clean, both.robust) == (bare.clean, bare.robust)


class Broken(nn.Module):
    "Returns something that is not finite, at once or from the second call on"
    def __init__(self, value, healthy=0):
        super().__init__()
        self.net, self.value, self.healthy = linear(12), value, healthy

    def forward(self, x):
        self.healthy -= 1
        return self.net(x)*(1. if self.healthy >= 0 else self.value)


@pytest.mark.parametrize("value, healthy", [(math.nan, 0), (math.inf, 0), (math.nan, 1)])
def test_a_model_that_is_not_finite(value, healthy):
    model, images, labels = Broken(value, healthy), rand(4, 3, 2, 2, generator=draws()), torch.tensor([0, 1, 0, 1])
    with pytest.raises(SadalibError, match="not finite"):
        pgd_attack(model, images, labels)
    assert model.training and all(p.requires_grad for p in model.parameters())
    with pytest.raises(SadalibError, match="not finite"):
        robust_accuracy(Broken(value), images, labels)


IMAGES, LABELS = rand(4, 3, 2, 2, generator=draws()), torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize("images, labels, keywords, words", [
    (IMAGES*2, LABELS, {}, "give them in [0, 1]"), (IMAGES - .5, LABELS, {}, "normalisation lives inside"),
    (IMAGES*math.nan, LABELS, {}, "nan"), (IMAGES, LABELS + 1, {}, "from 1 to 2, but the model has 2 classes"),
    (IMAGES, LABELS - 1, {}, "from -1"), (IMAGES, LABELS[:3], {}, "do not fit"),
    (IMAGES, LABELS.float(), {}, "do not fit"),
    (IMAGES, LABELS, dict(norm="linff"), "did you mean `linf`"), (IMAGES, LABELS, dict(eps=-1.), "eps=-1.0"),
    (IMAGES, LABELS, dict(eps=math.nan), "eps=nan"), (IMAGES, LABELS, dict(steps=-1), "steps=-1"),
    (IMAGES, LABELS, dict(steps=1.5), "steps=1.5"), (IMAGES, LABELS, dict(step_size=-.1), "step_size=-0.1")])
def test_attack_refuses(images, labels, keywords, words):
    with pytest.raises(SadalibError) as error:
        pgd_attack(linear(12), images, labels, **keywords)
    assert words in str(error.value)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["linf", "l2"]), st.floats(0, 3), st.integers(0, 10**6))
def test_projection_is_idempotent(norm, eps, seed):
    images, far = rand(2, 3, 3, 4, 5, generator=draws(seed))*torch.tensor([1., 5.]).view(2, 1, 1, 1, 1)
    once = project(far, images, norm, eps)
    torch.testing.assert_close(project(once, images, norm, eps), once, atol=1e-6, rtol=0)
    torch.testing.assert_close(project(images, images, norm, eps), images)


def test_random_start_fills_the_ball():
    images = torch.full((20_000, 1, 1, 2), .5)
    radius = (yardsticks._start(images, "l2", 1., draws()) - .5).flatten(1).norm(dim=1)
    assert radius.max() <= 1 and abs((radius < .5).double().mean().item() - .25) < .015  # area of a disc
    corner = yardsticks._start(images, "linf", .25, draws()) - .5
    assert -.25 <= corner.min() < -.249 and .249 < corner.max() <= .25


# Robust accuracy

def test_robust_counts_only_what_was_right_before():
    model, images = linear(12), rand(40, 3, 2, 2, generator=draws(), low=.4, high=.6)
    labels = randint(0, 2, 40, generator=draws(1))
    margin = (model(images)*torch.tensor([1., -1.])).sum(1)*(1 - 2*labels)
    reach = .02*(model[1].weight[0] - model[1].weight[1]).abs().sum()
    result = robust_accuracy(model, images, labels, batch_size=7, generator=draws(),
                             attack=lambda m, x, y, generator: pgd_attack(m, x, y, eps=.02, generator=generator))
    assert math.isclose(result.clean, (margin > 0).double().mean())
    assert math.isclose(result.robust, (margin > reach).double().mean())
    for share, right in ((result.per_class_clean, margin > 0), (result.per_class_robust, margin > reach)):
        torch.testing.assert_close(share, torch.stack([right[labels == k].double().mean() for k in (0, 1)]))
    assert result.n == 40 and result.counts.sum() == 40
    helped = robust_accuracy(model, images, labels, attack=lambda m, x, y, generator: x)
    assert helped.robust == helped.clean == result.clean


def test_robust_accuracy_with_a_missing_class_and_bytes():
    model, images = create_model("tinynet", 4, seed=0), randint(0, 256, 9, 3, 32, 32, generator=draws()).byte()
    result = robust_accuracy(model, images, torch.arange(9) % 3, batch_size=4, generator=draws())
    assert result.per_class_clean[3].isnan() and result.per_class_robust[3].isnan()
    assert result.counts.tolist() == [3, 3, 3, 0]
    assert (result.per_class_robust[:3] <= result.per_class_clean[:3]).all() and result.robust <= result.clean


@pytest.mark.parametrize("images, labels, batch_size", [(IMAGES[:0], LABELS[:0], 4), (IMAGES, LABELS[:2], 4),
                                                        (IMAGES, LABELS, 0), (IMAGES, LABELS + 5, 4)])
def test_robust_accuracy_refuses(images, labels, batch_size):
    with pytest.raises(SadalibError):
        robust_accuracy(linear(12), images, labels, batch_size=batch_size)


# Corruptions

def test_corruption_means():
    accuracy = {name: i/20 for i, name in enumerate(corruption_names())}
    table = corruption_table(accuracy, severities=(5,))
    assert [len(v) for v in GROUPS.values()] == [4, 4, 3, 4] and len(set(corruption_names())) == 15
    assert math.isclose(table.mean, np.mean(list(accuracy.values())))
    assert math.isclose(table.group_mean, np.mean([np.mean([accuracy[c] for c in g]) for g in GROUPS.values()]))
    assert table.severities == (5,) and table._repr_markdown_().splitlines()[2].startswith("| 5 |")
    assert corruption_table(accuracy | {"spatter": 0.}, severities=(5,)).mean == table.mean


def test_severities_are_selected():
    accuracy = {name: {s: s/10 for s in range(1, 6)} for name in corruption_names()}
    assert math.isclose(corruption_table(accuracy).mean, .3)
    assert math.isclose(corruption_table(accuracy, severities=(4, 5)).group_mean, .45)


def test_published_averages_are_means_of_groups():
    "SADA's rows of the CIFAR-10-C table as He et al. (2024) reprint them: weather, blur, noise, digital -> Avg"
    for groups, average in (((79.44, 80.68, 70.77, 78.42), 77.33), ((79.14, 82.38, 71.42, 78.38), 77.83)):
        accuracy = {c: value for g, value in zip(GROUPS, groups, strict=True) for c in GROUPS[g]}
        assert abs(corruption_table(accuracy, severities=(5,)).group_mean - average) < .006


@pytest.mark.parametrize("accuracy, severities, words", [
    ({"fogg": 1.}, (5,), "did you mean `fog`"), ({"fog": 1.}, (5,), "14 of 15"),
    ({c: {5: 1.} for c in corruption_names()}, (1, 5), "lacks severity 1"),
    ({c: 1. for c in corruption_names()}, (), "no severity")])
def test_corruption_table_refuses(accuracy, severities, words):
    with pytest.raises(SadalibError, match=words):
        corruption_table(accuracy, severities=severities)


def test_pixels_past_the_range_by_rounding_are_clamped():
    model, images = linear(12), IMAGES.clone()
    images[0, 0, 0] = torch.tensor([-5e-4, 1 + 5e-4])
    assert torch.equal(pgd_attack(model, images, LABELS, eps=0.), images.clamp(0, 1))
    attacked = pgd_attack(model, images, LABELS, eps=.1, generator=draws())
    assert torch.equal(attacked, pgd_attack(model, images.clamp(0, 1), LABELS, eps=.1, generator=draws()))
    with pytest.raises(SadalibError, match="give them in"): pgd_attack(model, images + .002, LABELS)
