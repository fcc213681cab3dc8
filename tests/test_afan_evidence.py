"""A-FAN's evidence: measurements are right, repeatable, and leave nothing on the network, whatever happens inside."""
import copy
import math
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock, ResNet

from sadalib.afan import evidence
from sadalib.afan.evidence import (
    channel_maps,
    kept_frame,
    landscape,
    perturbation_curve,
    pixel_attack,
    plot_kept,
    plot_landscape,
    plot_precision,
    pollution_frame,
    precision_frame,
)
from sadalib.afan.mix import feature_attack, strengths
from sadalib.afan.sites import Site
from sadalib.runs import SadalibError, rand, randint, randn, seeded


class Small(nn.Module):
    "Batch statistics, dropout, an in-place operation, a layer normalisation and one module that is used twice"
    def __init__(self, norm=nn.BatchNorm2d, drop=.3):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU(inplace=True))
        self.first, self.shared = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.drop, self.last = norm(8), nn.Dropout(drop), nn.LayerNorm([8, 1])
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        x = self.first(self.stem(x))
        x = self.shared(self.drop(self.shared(x).relu()))
        return self.fc(self.last(self.norm(x).relu().mean((2, 3))[..., None])[..., 0])


def small(**kwargs):
    torch.manual_seed(0)
    net = Small(**kwargs)
    x, y = rand(6, 3, 8, 8, generator=seeded("x")), randint(0, 10, 6, generator=seeded("y"))
    return net, lambda: F.cross_entropy(net(x), y)


def residual(planes=16):
    "A residual network without the pooling of its stem"
    torch.manual_seed(0)
    net = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
    net.conv1, net.bn1, net.maxpool = nn.Conv2d(3, planes, 3, 1, 1, bias=False), nn.BatchNorm2d(planes), nn.Identity()
    net.inplanes = planes
    for i in range(4): setattr(net, f"layer{i + 1}", net._make_layer(BasicBlock, planes*2**i, 1, stride=1 + (i > 0)))
    net.fc = nn.Linear(planes*8, 10)
    x, y = rand(8, 3, 32, 32, generator=seeded("images")), randint(0, 10, 8, generator=seeded("labels"))
    return net, lambda: F.cross_entropy(net(x), y)


def detector():
    body = BackboneWithFPN(residual(8)[0], {f"layer{i}": str(i) for i in range(1, 5)}, [8, 16, 32, 64], 16)
    model = FasterRCNN(body, 3, min_size=64, max_size=96, rpn_batch_size_per_image=16, box_batch_size_per_image=16,
                       rpn_pre_nms_top_n_train=50, rpn_post_nms_top_n_train=30)
    x = list(rand(2, 3, 64, 80, generator=seeded("scenes")))
    targets = [{"boxes": torch.tensor([[5., 8., 40., 44.], [20., 3., 70., 50.]]), "labels": torch.tensor([1, 2])}]*2
    return model, lambda: sum(model(x, copy.deepcopy(targets)).values())


def bits(tensor):
    "The bytes of `tensor`, so that NaN equals itself and -0 is not 0"
    return tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes()


def state(model):
    "All that a measurement must leave alone"
    grads = tuple(None if p.grad is None else bits(p.grad) for p in model.parameters())
    modes = tuple((m.training, getattr(m, "momentum", 0), getattr(m, "track_running_stats", 0), "forward" in m.__dict__,
                   len(m._forward_hooks)) for m in model.modules())
    flags = tuple(p.requires_grad for p in model.parameters())
    return {k: bits(v) for k, v in model.state_dict().items()}, grads, modes, flags, bits(torch.get_rng_state())


IMAGES = rand(4, 3, 8, 8, generator=seeded("pixels"))
MEASURES = {
    "kept": lambda model, loss: kept_frame(model, loss, ["first", "drop"], steps=2),
    "kept, train": lambda model, loss: kept_frame(model, loss, ["stem"], bn="train"),
    "pollution": lambda model, loss: pollution_frame(model, "first", loss),
    "landscape": lambda model, loss: landscape(model, loss, directions=2, points=3),
    "pixels": lambda model, loss: pixel_attack(lambda x: F.cross_entropy(model(x), torch.arange(4)), IMAGES, steps=2,
                                               random_start=True, model=model),
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize("how", ["train", "eval", "frozen", "mixed", "no grad"])
def test_nothing_is_left_behind(measure, how):
    model, loss = small()
    loss().backward()
    if how == "eval": model.eval()
    if how == "frozen": model.requires_grad_(False)
    if how == "mixed": model.stem.eval(), model.fc.requires_grad_(False)
    before = state(model)
    with torch.set_grad_enabled(how != "no grad"): measure(model, loss)
    assert state(model) == before


@pytest.mark.parametrize(("name", "when"), [(name, when) for name, passes in
                                            (("kept", 20), ("kept, train", 9), ("pollution", 19), ("landscape", 5))
                                            for when in range(1, passes + 1, 2)])
def test_nothing_is_left_behind_after_an_exception(name, when):
    model, loss = small()
    loss().backward()
    calls = []

    def failing():
        calls.append(1)
        total = loss()
        if len(calls) == when: raise RuntimeError("the network stops here")
        return total

    before = state(model)
    with pytest.raises(RuntimeError, match="stops here"): MEASURES[name](model, failing)
    assert state(model) == before


def test_pixels_leave_nothing_after_an_exception():
    model, _ = small()
    images, before = rand(2, 3, 8, 8, generator=seeded(1)), state(model)

    def failing(x):
        model(x)
        torch.rand(3)
        raise RuntimeError("here")

    with pytest.raises(RuntimeError, match="here"): pixel_attack(failing, images, model=model)
    assert state(model) == before


def test_a_waiting_backward_is_not_disturbed():
    model, loss = small(drop=0.)
    model.eval()
    reference = torch.autograd.grad(loss(), list(model.parameters()))
    waiting = loss()
    landscape(model, loss, directions=1, points=3)
    pollution_frame(model, "first", loss, steps=1)
    later = torch.autograd.grad(waiting, list(model.parameters()))
    assert all(map(torch.equal, reference, later))


def test_a_buffer_that_the_network_replaces_comes_back():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls = self.calls + 1
            return self.fc(x)

    model = Counting()
    kept, x = model.calls, rand(4, 3, generator=seeded(0))
    landscape(model, lambda: model(x).square().mean(), directions=2, points=3)
    assert model.calls is kept and kept.item() == 0


# What is left of an attack

def test_kept_over_channels_is_two_of_c():
    model, loss = residual()
    frame = kept_frame(model, loss, ["layer1", "layer2", "layer3", "layer4"], axes="channel")
    channels = np.array([16, 32, 64, 128])
    assert list(frame.columns) == ["site", "axes", "distance", "gain"]
    assert frame.site.tolist() == [f"layer{i}" for i in range(1, 5)]
    assert np.allclose(frame.gain, 2/channels, atol=.025) and np.allclose(frame.distance, (2/channels)**.5, rtol=.4)


def test_instance_before_the_pooling_is_the_attack_itself_and_nowhere_else():
    model, loss = residual()
    frame = kept_frame(model, loss, ["layer2", "layer3", "layer4"], axes="instance").set_index("site")
    assert frame.gain["layer4"] == pytest.approx(1, abs=.02) and frame.distance["layer4"] == pytest.approx(1, abs=.01)
    assert frame.gain["layer3"] < .5 and frame.distance["layer2"] < .5


def test_axes_without_two_elements_are_nan():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 1, 3), nn.Conv2d(1, 4, 6), nn.Flatten(), nn.Linear(4, 3))
    x = rand(5, 3, 8, 8, generator=seeded(0))
    frame = kept_frame(net, lambda: F.cross_entropy(net(x), torch.arange(5) % 3), ["0", "1", "2"])
    missing = frame.set_index(["site", "axes"]).gain.isna()
    assert missing.to_dict() == {("0", "channel"): True, ("0", "instance"): False, ("0", "batch"): False,
                                 ("1", "channel"): False, ("1", "instance"): True, ("1", "batch"): False,
                                 ("2", "channel"): False, ("2", "instance"): True, ("2", "batch"): False}
    assert (frame.distance.isna() == frame.gain.isna()).all()
    one = kept_frame(net, lambda: F.cross_entropy(net(x[:1]), torch.zeros(1, dtype=torch.long)), ["1"], axes="batch")
    assert one.gain.isna().all()


def test_kept_needs_no_gradient_outside_and_no_batch_normalisation():
    with torch.no_grad(): frame = kept_frame(*small(norm=lambda c: nn.GroupNorm(2, c)), ["first"])
    assert frame.gain.notna().all()


def test_an_attack_without_slope_gives_nan_and_draws():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    with torch.no_grad(): net[2].weight.zero_()
    x = rand(2, 3, 8, 8, generator=seeded(0))
    frame = kept_frame(net, lambda: net(x).mean(), ["1"])
    assert frame[["distance", "gain"]].isna().all().all()
    plot_kept(frame)


@pytest.mark.parametrize(("change", "says"), [
    (dict(sites=["frist"]), "close are `first`"), (dict(sites=[]), "no sites"), (dict(axes=()), "no axes"),
    (dict(axes="chanel"), "channel"),
    (dict(axes=["batch", "x"]), "known are"), (dict(gamma=-1), "from 0"), (dict(gamma=math.nan), "from 0"),
    (dict(steps=1.5), "whole"),
    (dict(bn="frozen"), "freeze"), (dict(gamma_unit="255"), "255ths"), (dict(sites=["shared"]), "ran 2 times")])
def test_bad_input_of_kept(change, says):
    model, loss = small()
    before = state(model)
    with pytest.raises(SadalibError, match=says): kept_frame(model, loss, **{"sites": ["first"], **change})
    assert state(model) == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused(value):
    model, loss = small()
    for measure in list(MEASURES.values())[:4]:
        with pytest.raises(SadalibError, match="loss is (nan|inf)"): measure(model, lambda: loss()*value)
    with pytest.raises(SadalibError, match="loss is (nan|inf)"):
        pixel_attack(lambda x: x.sum()*value, rand(1, 3, 4, 4, generator=seeded(0)))


@pytest.mark.parametrize("wrong", [lambda: torch.zeros(3), lambda: 1., lambda: {"loss": torch.zeros(1)}])
def test_a_loss_that_is_no_number_is_refused(wrong):
    model, loss = small()
    for measure in list(MEASURES.values())[:4]:
        with pytest.raises(SadalibError, match="one number"): measure(model, lambda: (loss(), wrong())[1])


# Precision

def test_precision_agrees_with_the_measured_table():
    frame = precision_frame(randn(4, 64, 16, 16, generator=seeded("table")).relu())
    frame = frame.set_index(["precision", "gamma"]).nonzero
    gammas = (1, .5, .4, .2, .1, .03, .01, .001)
    table = {"tf32": (1., 1., .99, .92, .75, .39, .18, .03), "float16": (1., 1., .99, .92, .74, .39, .18, .03),
             "bfloat16": (.83, .61, .53, .34, .21, .09, .04, .0)}
    for precision, shares in table.items(): assert np.allclose([frame[precision, g] for g in gammas], shares, atol=.025)
    assert (frame["float32"] > .99).all()


def test_precision_counts_zeros_apart():
    frame = precision_frame(torch.cat([torch.zeros(30, 1), torch.full((10, 1), 8.)]), [.01], ["bfloat16"])
    assert frame.iloc[0].to_dict() == {"gamma": .01, "precision": "bfloat16", "share": .75, "nonzero": 0.}


@pytest.mark.parametrize("feature", [torch.full((3, 4), 2.),
                                     torch.zeros(3, 4), torch.full((2, 2), 1e30), torch.ones(1).half(),
                                     torch.ones(2, 2, dtype=torch.float64, requires_grad=True)])
def test_precision_of_constant_features(feature):
    frame = precision_frame(feature)
    assert frame.share.between(0, 1).all() and frame.nonzero.isna().all() == bool((feature == 0).all())
    plot_precision(frame)


@pytest.mark.parametrize(("args", "says"), [
    ((torch.zeros(2, dtype=torch.long),), "floats"), ((torch.zeros(0, 3),), "one element"),
    ((torch.tensor([math.nan]),), "NaN"),
    ((torch.ones(2), [-1.]), "perturbs nothing"), ((torch.ones(2), [math.inf]), "perturbs nothing"),
    ((torch.ones(2), [1.], []), "no precisions"),
    ((torch.ones(2), [1.], ["fp16"]), "float16"), ((np.ones(2),), "floats")])
def test_bad_input_of_precision(args, says):
    with pytest.raises(SadalibError, match=says): precision_frame(*args)


# Batch normalisation

def test_pollution_agrees_with_a_count_by_hand():
    model, loss = small(drop=0.)
    frame = pollution_frame(model, "first", loss, steps=3, gamma=20.).set_index("policy")
    assert frame.batches.tolist() == [3, 0, 0]
    assert frame.mean_shift.tolist()[1:] == [0, 0] == frame.var_shift.tolist()[1:]
    twin = copy.deepcopy(model)
    with evidence._unmoved(model):
        site = Site(model, "first")
        evidence._captured(site, loss, "freeze")
        feature_attack(site, loss, gamma=20., steps=3, bn="train")
        by_hand = [(getattr(model.norm, n) - getattr(twin.norm, n)).norm().item()
                   for n in ("running_mean", "running_var")]
    assert frame.loc["train", ["mean_shift", "var_shift"]].tolist() == pytest.approx(by_hand, rel=1e-6)
    assert frame.loss["train"] == frame.loss["freeze"] != frame.loss["eval"]
    assert (frame.loss > loss().item()).all()


def test_only_norms_behind_the_site_count():
    model, loss = small()
    with torch.no_grad(): model.stem(IMAGES), model.stem(IMAGES)
    assert pollution_frame(model, "first", loss).batches.tolist() == [5, 0, 0]
    assert pollution_frame(model, "norm", loss, policies="train").mean_shift.tolist() == [0]


def test_pollution_in_evaluation_mode_attacks_as_in_training():
    model, loss = small()
    frame = pollution_frame(model.eval(), "first", loss, steps=2)
    assert frame.batches.tolist() == [2, 0, 0] and not any(m.training for m in model.modules())


def test_norms_that_the_caller_keeps_in_evaluation_stay_there():
    model, loss = small()
    model.norm.eval()
    assert pollution_frame(model, "first", loss).mean_shift.tolist() == [0, 0, 0]


@pytest.mark.parametrize("norm", [lambda c: nn.GroupNorm(2, c), lambda c: nn.BatchNorm2d(c, track_running_stats=False),
                          nn.InstanceNorm2d,
                                  nn.Identity])
def test_networks_without_running_statistics_show_zeros(norm):
    model, loss = small(norm=norm)
    frame = pollution_frame(model, "first", loss)
    assert frame[["mean_shift", "var_shift", "batches"]].eq(0).all().all() and frame.loss.notna().all()


def test_instance_norm_with_statistics_and_cumulative_batch_norm():
    for norm in (lambda c: nn.InstanceNorm2d(c, track_running_stats=True), lambda c: nn.BatchNorm2d(c, momentum=None)):
        model, loss = small(norm=norm)
        frame, before = pollution_frame(model, "first", loss), state(model)
        assert frame.mean_shift[0] > 0 and frame.mean_shift[1:].eq(0).all()
        landscape(model, loss, directions=1, points=3)
        assert state(model) == before


def test_bad_input_of_pollution():
    model, loss = small()
    for change, says in ((dict(policies="frezee"), "freeze"), (dict(policies=[]), "no policies"),
                         (dict(steps=-1), "from 0"),
                         (dict(site="nothing"), "no module"), (dict(gamma=math.inf), "from 0")):
        with pytest.raises(SadalibError, match=says):
            pollution_frame(model, **{"site": "first", "loss": loss, **change})


# The landscape

def test_directions_are_filter_normalised_and_leave_vectors_alone():
    model, _ = small()
    names = [n for n, p in model.named_parameters() if any(p is w for w in evidence._filters(model))]
    assert names == ["stem.0.weight", "first.weight", "shared.weight", "fc.weight"]
    weights = evidence._filters(model)
    with torch.no_grad(): weights[1][2] = 0 # a dead filter stays
    for weight, way in zip(weights, evidence._direction(weights, seeded(3)), strict=True):
        assert torch.allclose(weight.flatten(1).norm(dim=1), way.flatten(1).norm(dim=1), rtol=1e-5)
        assert way.dtype == weight.dtype and not way.requires_grad
    assert (evidence._direction(weights, seeded(3))[1][2] == 0).all()


def test_the_landscape_equals_one_by_hand():
    model, loss = small(drop=0.)
    model.eval()
    frame = landscape(model, loss, directions=2, reach=.6, points=5, seed=4)
    assert frame.direction.tolist() == [0]*5 + [1]*5 and frame["t"].tolist()[:5] == pytest.approx([-.6, -.3, 0, .3, .6])
    assert (frame["t"] == 0).sum() == 2 and frame[frame["t"] == 0].loss.tolist() == [loss().item()]*2
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p, way in zip(evidence._filters(twin),
                          evidence._direction(evidence._filters(model), seeded("landscape", 4, 1)), strict=True):
            p += .3*way
        x, y = rand(6, 3, 8, 8, generator=seeded("x")), randint(0, 10, 6, generator=seeded("y"))
        assert frame.loss[8] == pytest.approx(F.cross_entropy(twin(x), y).item(), rel=1e-6)


def test_the_landscape_repeats_and_its_directions_do_not_depend_on_their_number():
    model, loss = small()
    a, b = (landscape(model, loss, directions=2, points=3, seed=7) for _ in range(2))
    torch.manual_seed(99)
    many = landscape(model, loss, directions=4, points=3, seed=7)
    assert a.equals(b) and many.direction.nunique() == 4 and many[:6]["t"].equals(a["t"])
    assert not landscape(model, loss, directions=2, points=3, seed=8).loss.equals(a.loss)
    model.eval()
    assert landscape(model, loss, directions=4, points=3)[:6].equals(landscape(model, loss, directions=2, points=3))


def test_dropout_adds_no_noise_to_the_landscape():
    model, loss = small(drop=.5)
    frame = landscape(model, loss, directions=3, points=3, reach=1e-7)
    assert frame.groupby("t").loss.std().max() < 1e-4


def test_odd_networks_have_a_landscape():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6)
            self.down.weight = self.up.weight

        def forward(self, x): return self.down(self.up(x))

    x = rand(5, 6, generator=seeded(0))
    models = [Tied(), nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4))),
              nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))), nn.Linear(6, 4).double(),
              nn.Linear(6, 4).bfloat16()]
    for model in models:
        kind, before = next(model.parameters()).dtype, state(model)
        frame = landscape(model, lambda m=model, k=kind: m(x.to(k)).square().mean(), directions=2, points=3)
        assert state(model) == before and frame.loss.notna().all() and frame.loss.nunique() > 2
    assert len(evidence._filters(models[0])) == 1


def test_weights_that_are_nan_or_negative_zero_come_back_bit_for_bit():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad(): model[0].weight[0, 0], model[0].weight[1, 1] = -0., float("1e-42")
    before, x = state(model), rand(3, 4, generator=seeded(0))
    landscape(model, lambda: model(x).mean(), directions=2, points=5, reach=1e6)
    assert state(model) == before


def test_a_landscape_that_overflows_keeps_its_rows_and_draws():
    model = nn.Linear(4, 4)
    x = rand(3, 4, generator=seeded(0))
    frame = landscape(model, lambda: (model(x)*100).exp().mean(), directions=2, points=3, reach=100.)
    assert len(frame) == 6 and not np.isfinite(frame.loss).all()
    plot_landscape({"one": frame, "two": frame[frame["t"] == 0]})


@pytest.mark.parametrize(("change", "says"), [
    (dict(directions=0), "from 1"), (dict(directions=2.), "from 1"), (dict(directions=True), "from 1"),
    (dict(points=4), "odd"),
    (dict(points=1), "odd"), (dict(points=3.), "odd"), (dict(reach=0.), "above 0"), (dict(reach=math.nan), "above 0")])
def test_bad_input_of_the_landscape(change, says):
    with pytest.raises(SadalibError, match=says): landscape(nn.Linear(2, 2), lambda: torch.zeros(()), **change)


def test_a_network_without_filters_has_no_landscape():
    with pytest.raises(SadalibError, match="nothing to move"): landscape(nn.LayerNorm([4, 4]), lambda: torch.zeros(()))


# Pixels

@settings(max_examples=15, deadline=None)
@given(st.floats(0, .2), st.floats(0, .1), st.integers(0, 4), st.booleans(),
       st.sampled_from([torch.float32, torch.float64, torch.float16]))
def test_attacked_images_stay_in_the_ball(eps, step_size, steps, random_start, kind):
    images = rand(2, 3, 5, 5, generator=seeded("ball")).to(kind)
    images[0, 0, 0] = torch.tensor([0., 1., 0., 1., .5], dtype=kind)
    kept = images.clone()
    out = pixel_attack(lambda x: (x.double()*torch.linspace(-1, 1, 5)).sum(), images, eps=eps, step_size=step_size,
                       steps=steps,
                       random_start=random_start, generator=seeded(1))
    slack = {torch.float16: 1e-3, torch.float32: 1e-7, torch.float64: 1e-12}[kind]
    assert out.dtype == kind and torch.equal(images, kept) and out is not images and not out.requires_grad
    assert (out - images).abs().max() <= eps + slack and out.min() >= 0 and out.max() <= 1


def test_pixels_raise_the_loss_and_agree_with_one_step_by_hand():
    model, _ = small(drop=0.)
    model.eval()
    x, y = rand(6, 3, 8, 8, generator=seeded("x")), randint(0, 10, 6, generator=seeded("y"))
    def loss(z): return F.cross_entropy(model(z), y)
    slope = torch.autograd.grad(loss(given_ := x.clone().requires_grad_()), given_)[0]
    by_hand = (x + slope.sign()/255).clamp(0, 1).maximum(x - 1/255).minimum(x + 1/255)
    assert torch.equal(pixel_attack(loss, x, steps=1, eps=1/255, step_size=1/255), by_hand)
    assert loss(pixel_attack(loss, x, steps=10)) > loss(x)
    one, two, other = (pixel_attack(loss, x, random_start=True, generator=seeded(k)) for k in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_pixels_for_a_detector_and_a_segmenter():
    model, _ = detector()
    targets = [{"boxes": torch.tensor([[5., 8., 40., 44.]]), "labels": torch.tensor([1])}]*2
    x, before = rand(2, 3, 64, 80, generator=seeded("scenes")), state(model)
    out = pixel_attack(lambda images: sum(model(list(images), copy.deepcopy(targets)).values()), x, steps=1,
                       model=model)
    assert not torch.equal(out, x) and state(model) == before


def test_an_empty_batch_and_no_steps_are_fine():
    empty, one = torch.zeros(0, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    assert pixel_attack(lambda x: x.mean(), empty).shape == empty.shape
    assert torch.equal(pixel_attack(lambda x: x.mean(), one, steps=0), one)


@pytest.mark.parametrize(("images", "change", "says"), [
    (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), {}, "255"), (torch.zeros(3, 4, 4), {}, "stack"),
    (torch.full((1, 1, 2, 2), 1.5), {}, "normalise"),
    (torch.full((1, 1, 2, 2), math.nan), {}, "normalise"), (torch.zeros(1, 1, 2, 2), dict(eps=-1), "from 0"),
    (torch.zeros(1, 1, 2, 2), dict(steps=.5), "whole"), ([0.], {}, "floats")])
def test_bad_images(images, change, says):
    with pytest.raises(SadalibError, match=says): pixel_attack(lambda x: x.mean(), images, **change)


def test_losses_that_leave_the_images():
    x = torch.zeros(1, 1, 2, 2)
    for wrong in (lambda z: torch.zeros(()), lambda z: z.detach().sum(),
                  lambda z: torch.ones((), requires_grad=True)*2):
        with pytest.raises(SadalibError, match="does not depend"): pixel_attack(wrong, x)


# Other tasks, and pictures

def test_a_detector_is_measured_without_a_change():
    model, loss = detector()
    loss().backward()
    before = state(model)
    frame = kept_frame(model, loss, ["backbone.body.layer2", "roi_heads.box_roi_pool"], axes=("channel", "instance"))
    assert frame.gain.notna().all()
    assert pollution_frame(model, "backbone.body.layer2", loss, steps=2).batches.tolist() == [2, 0, 0]
    assert np.isfinite(landscape(model, loss, directions=1, points=3, reach=.1).loss).all()
    assert state(model) == before


def pictures():
    clean = randn(2, 6, 5, 5, generator=seeded("clean"))
    moved = clean.clone()
    moved[:, 4] += .1
    return clean, strengths(clean, moved, 4)


def test_channel_maps_take_the_channel_that_changes_most():
    clean, points = pictures()
    figure = channel_maps(clean, points)
    shown = [a for a in figure.axes if a.images]
    assert len(shown) == 9 and "channel 4" in [a.get_ylabel() for a in figure.axes]
    assert np.allclose(shown[0].images[0].get_array(), clean[0, 4])
    assert [a.get_title() for a in shown].count("its change") == 4


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 20])
def test_channel_maps_wrap(columns):
    clean, points = pictures()
    figure = channel_maps(clean, points, channel=0, columns=columns)
    assert sum(bool(a.images) for a in figure.axes) == 9
    figure.canvas.draw()


def test_channel_maps_of_constant_features_draw():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        channel_maps(torch.zeros(1, 2, 3, 3), torch.zeros(1, 1, 2, 3, 3)).canvas.draw()
        channel_maps(torch.ones(1, 2, 3, 3).bfloat16().requires_grad_(),
                     torch.ones(2, 1, 2, 3, 3).bfloat16()).canvas.draw()


@pytest.mark.parametrize(("args", "change", "says"), [
    ((torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)), {}, "give"),
    ((torch.zeros(2, 3), torch.zeros(1, 2, 3)), {}, "give"),
    ((torch.zeros(1, 3, 4, 4), torch.zeros(2, 1, 3, 4, 4)), dict(channel=3), "from 0 to 2"),
    ((torch.zeros(1, 3, 4, 4), torch.zeros(2, 1, 3, 4, 4)), dict(channel=-1), "from 0 to 2"),
    ((torch.zeros(1, 3, 4, 4), torch.zeros(2, 1, 3, 4, 4)), dict(columns=0), "columns=0"),
    ((torch.zeros(1, 3, 4, 4), torch.full((2, 1, 3, 4, 4), math.nan)), {}, "NaN"),
    ((torch.zeros(0, 3, 4, 4), torch.zeros(1, 0, 3, 4, 4)), {}, "one element")])
def test_bad_maps(args, change, says):
    with pytest.raises(SadalibError, match=says): channel_maps(*args, **change)


def test_perturbations_over_epochs():
    frame = pd.DataFrame({"name": ["a", "a", "a", "b"], "epoch": [1, 1, 2, 1], "size_l2": [1., 3., 4., 5.],
                          "size_linf": [.1]*4})
    figure = perturbation_curve(frame)
    assert figure.axes[0].lines[0].get_ydata().tolist() == [2, 4]
    figure.canvas.draw()


@pytest.mark.parametrize("plot", [plot_kept, plot_precision, perturbation_curve, lambda f: plot_landscape({"a": f})])
def test_pictures_refuse_other_frames(plot):
    with pytest.raises(SadalibError, match="lacks"): plot(pd.DataFrame({"x": [1]}))


def test_pictures_leave_the_settings_and_draw():
    import matplotlib
    before = dict(matplotlib.rcParams)
    model, loss = small()
    for figure in (plot_kept(kept_frame(model, loss, "first")), plot_precision(precision_frame(torch.rand(9))),
                   plot_landscape({str(i): landscape(model, loss, directions=1, points=3, seed=i) for i in range(10)})):
        figure.canvas.draw()
    assert dict(matplotlib.rcParams) == before
    with pytest.raises(SadalibError, match="no rows"): plot_kept(kept_frame(model, loss, "first")[:0])


def test_the_import_is_light():
    heavy = ("matplotlib", "pandas", "scipy", "PIL")
    code = f"import sys, sadalib.afan.evidence; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert out == "[]"
