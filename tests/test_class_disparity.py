"Class disparity: properties of the four numbers, coverage of the intervals in simulations, models left untouched"
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sadalib.class_disparity import (
    ClassGaps,
    class_disparity,
    class_gaps,
    model_disparity,
    paired_disparity,
    plot_class_disparity,
)
from sadalib.models import create_model
from sadalib.runs import SadalibError, cpu_threads, rand, randint, randn
from sadalib.yardsticks import per_class_accuracy, pgd_attack, robust_accuracy

NAMES = ClassGaps._fields


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Small tensors: more threads only wait for each other"
    with cpu_threads(1):
        yield


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def least(asked, runs, errors=4):
    "The coverage that `runs` intervals of level `asked` reach but once in some ten thousand times"
    return asked - errors*math.sqrt(asked*(1 - asked)/runs)


def holds(found, truth):
    "Which of the four intervals hold `truth`"
    return torch.tensor([getattr(found, n).low - 1e-9 <= t <= getattr(found, n).high + 1e-9
                         for n, t in zip(NAMES, truth, strict=True)])


shares = st.lists(st.floats(0, 1), min_size=2, max_size=12)


@settings(max_examples=80, deadline=None)
@given(shares, st.randoms(use_true_random=False))
def test_the_four_numbers_belong_together_and_do_not_see_the_order(values, order):
    found = class_gaps(values)
    shuffled = order.sample(values, len(values))
    assert class_gaps(shuffled) == pytest.approx(found, abs=1e-12)
    assert found.worst <= found.mean + 1e-12 and found.mean <= found.worst + found.gap + 1e-12
    assert found.gap + 1e-12 >= 2*found.spread >= 0
    assert class_gaps([*values, math.nan]) == pytest.approx(found, abs=1e-12)


@given(st.floats(0, 1), st.integers(2, 30))
def test_equal_classes_have_no_gap(value, classes):
    found = class_gaps([value]*classes)
    assert found.gap == 0 and found.worst == value and found.spread == pytest.approx(0, abs=1e-7)


def test_gaps_by_hand_and_for_many_models_at_once():
    assert class_gaps([1., .5, .6]) == pytest.approx((.5, .5, math.sqrt((.09 + .04 + .01)/3), .7))
    table = rand(4, 3, 5, generator=draws())
    found = class_gaps(table)
    assert found.gap.shape == (4, 3)
    assert found.gap[2, 1].item() == pytest.approx(class_gaps(table[2, 1]).gap)


@pytest.mark.parametrize(("accuracy", "says"), [
    ([.9], "at least two"), ([], "no values"), (.9, "at least two"), ([90., 80.], "not per cent"), ([-.1, .5], "shares in"),
    ([.5, math.inf], "shares in"), ([.5, math.nan], "fewer than two"), ([[.5, .6], [math.nan, .5]], "fewer than two")])
def test_gaps_of_what_is_no_accuracy(accuracy, says):
    with pytest.raises(SadalibError, match=says):
        class_gaps(accuracy)


def tables(models=3, images=300, classes=5, seed=0):
    labels = randint(0, classes, images, generator=draws(seed))
    return rand(models, images, generator=draws(seed + 1)) < .9 - .1*labels, labels


def test_class_disparity_averages_the_models_numbers():
    correct, labels = tables()
    found = class_disparity(correct, labels, 5, resamples=200, generator=draws())
    each = torch.stack([per_class_accuracy(labels + 5*(~c), labels, 10)[:5] for c in correct])
    known = class_gaps(each)
    for name in NAMES:
        interval = getattr(found, name)
        assert interval.value == pytest.approx(getattr(known, name).mean().item())
        assert 0 <= interval.low <= interval.value <= interval.high <= 1
    torch.testing.assert_close(found.per_class.value, each.mean(0))
    assert found.worst_class == each.mean(0).argmin() and found.models == 3
    assert (found.per_class.low <= found.per_class.value).all() and (found.per_class.value <= found.per_class.high).all()
    one = class_disparity(correct[0], labels, 5, resamples=50)
    assert one.gap.value == pytest.approx(class_gaps(each[0]).gap) and one.models == 1
    assert "equal classes would show" in found._repr_markdown_() and "3 models" in found._repr_markdown_()


def test_a_class_without_images_is_left_out():
    correct, labels = tables()
    found, wide = (class_disparity(correct, at, k, resamples=100, generator=draws())
                   for at, k in ((labels, 5), (labels + 2, 9)))
    assert found.gap == wide.gap and found.worst_class + 2 == wide.worst_class
    assert wide.per_class.value.isnan().tolist() == [True]*2 + [False]*5 + [True]*2
    assert wide.counts.tolist()[:3] == [0, 0, found.counts[0]]
    plot_class_disparity(wide)


def test_renaming_the_classes_changes_nothing_but_their_luck():
    correct, labels = tables()
    order = torch.tensor([3, 0, 4, 1, 2])
    a, b = (class_disparity(correct, at, 5, resamples=4000, generator=draws()) for at in (labels, order[labels]))
    assert b.worst_class == order[a.worst_class]
    for name in NAMES:
        assert getattr(a, name) == pytest.approx(getattr(b, name), abs=.02)


def test_a_generator_decides_and_the_global_state_stays():
    correct, labels = tables()
    a, b = rand(4, 3, 5, generator=draws(1)), rand(4, 3, 5, generator=draws(2))
    before = torch.get_rng_state()
    first, again, other = (class_disparity(correct, labels, 5, resamples=100, generator=draws(s)) for s in (0, 0, 1))
    assert all(getattr(first, n) == getattr(again, n) for n in NAMES) and first.chance == again.chance
    assert first.gap != other.gap
    pairs = [paired_disparity(a, b, how="bootstrap", resamples=100, generator=draws(s)) for s in (0, 0, 1)]
    assert pairs[0] == pairs[1] != pairs[2]
    class_disparity(correct, labels, 5, resamples=10)
    paired_disparity(a, b, how="bootstrap", resamples=10)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("change", "says"), [
    (dict(labels=torch.zeros(299).long()), "one label an image"), (dict(labels=torch.full((300,), 5)), "do not fit 5"),
    (dict(labels=torch.full((300,), -1)), "do not fit 5"), (dict(labels=torch.zeros(300).long()), "fewer than two"),
    (dict(labels=torch.zeros(300)), "whole number"), (dict(correct=torch.full((300,), .5)), "other values than 0 and 1"),
    (dict(correct=torch.full((300,), math.nan)), "other values than 0 and 1"), (dict(correct=torch.ones(1, 2, 300)), "models, N"),
    (dict(correct=torch.ones(300, 2)), "models, N"), (dict(correct=torch.ones(0, 300)), "no values"),
    (dict(classes=1), "at least 2 classes"), (dict(classes=5.), "whole numbers"), (dict(resamples=0), "1 resample"),
    (dict(level=95), "between 0 and 1")])
def test_class_disparity_refuses(change, says):
    correct, labels = tables()
    with pytest.raises(SadalibError, match=says):
        class_disparity(**{"correct": correct, "labels": labels, "classes": 5, **change})


def test_chance_is_the_bias_of_the_plain_gap():
    "Ten equal classes of 100 images show a gap of .093, and `chance` says so"
    labels, source = torch.arange(1000) % 10, draws()
    shown = class_gaps((torch.rand(2000, 10, 100, generator=source) < .9).double().mean(2))
    assert shown.gap.mean() > .08 and shown.worst.mean() < .86
    found = class_disparity(torch.rand(4, 1000, generator=source) < .9, labels, 10, resamples=10, generator=source)
    for name in NAMES:
        assert getattr(found.chance, name) == pytest.approx(getattr(shown, name).mean().item(), abs=.012)


@pytest.mark.parametrize(("truth", "images"), [
    ([.9]*6, 80), ([.7] + [.9]*5, 80), ([.6, .7, .8, .85, .9, .95], 80), ([.6, .9], 60), ([.98]*5, 20), ([.99, .95, .99], 20)])
def test_intervals_of_one_model_hold_the_truth(truth, images, runs=150):
    source, rates = draws(3), torch.tensor(truth).repeat_interleave(images)
    labels, held, by_class = torch.arange(len(truth)).repeat_interleave(images), torch.zeros(4), 0.
    known = class_gaps(truth)
    for _ in range(runs):
        found = class_disparity(torch.rand(len(rates), generator=source) < rates, labels, len(truth), resamples=300, generator=source)
        held += holds(found, known)
        low, high = found.per_class[1:]
        by_class += ((low <= torch.tensor(truth)) & (torch.tensor(truth) <= high)).double().mean().item()
    assert (held/runs >= least(.95, runs)).all(), held/runs
    assert by_class/runs >= least(.95, runs)


@pytest.mark.parametrize(("models", "images"), [(2, 60), (2, 400), (3, 400), (5, 60)])
def test_intervals_of_few_models_hold_the_truth(models, images, runs=150):
    "Whether the luck of the images or that of the models prevails"
    source, truth = draws(4), torch.linspace(.7, .9, 5)
    labels, held, by_class = torch.arange(5).repeat_interleave(images), torch.zeros(4), 0.
    known = [v.mean().item() for v in class_gaps(truth + .05*randn(50000, 5, generator=source).clamp(-2, 2))]
    for _ in range(runs):
        rates = truth + .05*randn(models, 5, generator=source).clamp(-2, 2)
        correct = torch.rand(models, 5*images, generator=source) < rates[:, labels]
        found = class_disparity(correct, labels, 5, resamples=100, generator=source)
        held += holds(found, known)
        by_class += ((found.per_class.low <= truth) & (truth <= found.per_class.high)).double().mean().item()
    assert (held/runs >= least(.95, runs)).all(), held/runs
    assert by_class/runs >= least(.95, runs), by_class/runs


def test_paired_differences_by_hand():
    a = torch.tensor([[[.9, .7], [.8, .8]], [[.9, .5], [1., .6]]])
    b = torch.tensor([[[.9, .5], [.8, .6]], [[.9, .5], [1., .6]]])
    found = paired_disparity(a, b)
    assert (found.over, found.units) == ("data seeds", 2)
    assert found.worst.value == pytest.approx(.1) and found.gap.value == pytest.approx(-.1)
    assert found.worst.high - found.worst.value == pytest.approx(12.7062*.1, rel=1e-4) # t of 1 degree, s.e. .1
    swapped = paired_disparity(b, a)
    assert swapped.gap.value == pytest.approx(-found.gap.value) and swapped.gap.low == pytest.approx(-found.gap.high)
    same = paired_disparity(a, a, how="bootstrap", generator=draws())
    assert all(tuple(getattr(same, n)) == (0., 0., 0.) for n in NAMES)
    assert "2 data seeds" in found._repr_markdown_()


def test_one_data_seed_speaks_of_model_seeds_and_one_model_of_nothing():
    a, b = rand(1, 5, 4, generator=draws(1)), rand(1, 5, 4, generator=draws(2))
    found = paired_disparity(a, b)
    assert (found.over, found.units) == ("model seeds", 5) and found.gap.low < found.gap.value < found.gap.high
    for how in ("auto", "bootstrap"):
        alone = paired_disparity(a[:, :1], b[:, :1], how=how)
        assert math.isnan(alone.gap.low) and math.isnan(alone.gap.high) and not math.isnan(alone.gap.value)
    assert "1 model seed |" in alone._repr_markdown_()


def simulated(runs, data, models, of_data, source, of_models=.03):
    "Accuracies of two methods, (2, runs, D, S, 4)"
    known = torch.tensor([[.5, .7, .8, .9], [.6, .7, .8, .9]]).view(2, 1, 1, 1, 4)
    luck = torch.randn(2, runs, data, 1, 4, generator=source)*of_data
    return (known + luck + torch.randn(2, runs, data, models, 4, generator=source)*of_models).clamp(0, 1)


@pytest.mark.parametrize(("data", "models", "of_data", "bootstrap"), [
    (5, 5, .03, (.88, .97)), (3, 1, .03, (.65, .85)), (1, 5, 0., (.75, .93)), (30, 5, .01, (.95, 1.))])
def test_coverage_of_paired_intervals(data, models, of_data, bootstrap, runs=300):
    "t holds what is asked; the bootstrap is too narrow for few seeds, and too wide where the models vary most"
    source = draws(5)
    a, b = simulated(40000//models, min(data, 2), models, of_data, source)
    known = [x.mean().item() - y.mean().item() for x, y in zip(class_gaps(a), class_gaps(b), strict=True)]
    held = {"auto": torch.zeros(4), "bootstrap": torch.zeros(4)}
    for a, b in zip(*simulated(runs, data, models, of_data, source), strict=True):
        for how in held:
            held[how] += holds(paired_disparity(a, b, how=how, resamples=200, generator=source), known)
    assert (held["auto"]/runs >= least(.95, runs)).all() and (held["auto"]/runs <= 2*.95 - least(.95, runs)).all()
    assert bootstrap[0] < held["bootstrap"].mean()/runs < bootstrap[1]


@pytest.mark.parametrize(("a", "b", "options", "says"), [
    ((3, 2, 4), (3, 2, 5), {}, "without NaN"), ((3, 4), (3, 4), {}, "without NaN"), ((3, 2, 1), (3, 2, 1), {}, "at least two"),
    ((0, 2, 4), (0, 2, 4), {}, "no values"), ((3, 2, 4), (3, 2, 4), dict(how="bootstap"), "did you mean `bootstrap`"),
    ((3, 2, 4), (3, 2, 4), dict(level=95), "between 0 and 1")])
def test_paired_disparity_refuses(a, b, options, says):
    with pytest.raises(SadalibError, match=says):
        paired_disparity(torch.full(a, .5), torch.full(b, .5), **options)


def test_paired_disparity_refuses_nan_and_per_cent():
    good, bad = torch.full((2, 2, 3), .5), torch.full((2, 2, 3), .5)
    bad[0, 0, 0] = math.nan
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(SadalibError, match="without NaN"):
            paired_disparity(*pair)
    with pytest.raises(SadalibError, match="b reaches from"):
        paired_disparity(good, good*100)


@pytest.fixture(scope="module")
def model():
    net = create_model("tinynet", size=16, seed=0)
    net.train()
    net.net.classifier.weight.grad = torch.ones_like(net.net.classifier.weight)
    return net


def test_model_disparity_is_robust_accuracy_by_class_and_leaves_the_model_alone(model):
    images, source = rand(60, 3, 16, 16, generator=draws()), draws(1)
    labels = torch.cat([model.eval()(images[:30]).argmax(1).detach(), torch.arange(30) % 10])
    model.train()
    attack = partial(pgd_attack, eps=.02, steps=3)
    state, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    found = model_disparity(model, images, labels, attack=attack, batch_size=25, generator=source)
    known = robust_accuracy(model, images, labels, attack=attack, batch_size=25, generator=draws(1))
    model_disparity(model, images[:20], torch.arange(20) % 2, attack=attack)
    assert torch.equal(rng, torch.get_rng_state()) and model.training and model.net.classifier.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert (model.net.classifier.weight.grad == 1).all() and model.net.features[0].weight.grad is None
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(found.per_class_robust, known.per_class_robust, equal_nan=True)
    torch.testing.assert_close(found.per_class_standard, known.per_class_clean, equal_nan=True)
    assert found.standard == class_gaps(known.per_class_clean) and found.robust == class_gaps(known.per_class_robust)
    assert found.robust.mean <= found.standard.mean
    for which in ("standard", "robust"):
        again = class_disparity(*found.images(which), 10, resamples=10)
        assert again.gap.value == pytest.approx(getattr(found, which).gap)
    assert "robust" in found._repr_markdown_()


@pytest.mark.parametrize(("labels", "says"), [
    (torch.arange(5), "6 images do not fit"), (torch.zeros(6).long(), "fewer than two"), (torch.arange(6) + 5, "do not fit 10"),
    (torch.arange(6) - 1, "do not fit 10"), (torch.arange(6)/7, "whole number"), (torch.zeros(6, 10), "class number an image")])
def test_model_disparity_refuses_before_any_attack(model, labels, says):
    def attack(*args, **options):
        raise AssertionError("attacked before the labels were checked")
    with pytest.raises(SadalibError, match=says):
        model_disparity(model, rand(6, 3, 16, 16, generator=draws()), labels, attack=attack)


def test_a_model_without_parameters_has_a_disparity_too():
    found = model_disparity(nn.Flatten(), torch.eye(3).view(3, 3, 1, 1), torch.tensor([0, 1, 1]), attack=lambda m, x, y, generator: x)
    assert found.standard == pytest.approx((.5, .5, .25, .75)) and found.per_class_standard.isnan().tolist() == [False, False, True]


def test_the_picture_shows_each_class_and_refuses_other_names():
    correct, labels = tables()
    found = class_disparity(correct, labels, 5, resamples=50)
    fig = plot_class_disparity({"clean": found, "again": found}, "abcde")
    (ax,) = fig.axes
    assert [t.get_text() for t in ax.get_xticklabels()] == list("abcde")
    for wrong in ((found, "abc"), ({}, None)):
        with pytest.raises(SadalibError, match="same classes"):
            plot_class_disparity(*wrong)
