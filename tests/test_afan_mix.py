"""A-FAN's attack, strengths and normalisation: bit equal to the official code, and nothing left on the model."""
import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from sadalib.afan import mix
from sadalib.afan.mix import feature_attack, kept_by, mix_strengths, parse_mask, renormalise, strengths, surviving_share
from sadalib.afan.sites import Site
from sadalib.runs import SadalibError, Shard, rand, randint, randn, seeded

GOLDEN = np.load(Path(__file__).parent/"golden"/"afan_mix.npz", allow_pickle=False)


def golden(name):
    return torch.as_tensor(GOLDEN[name])


def official():
    "The network of the golden file, its loss, and the site after its second module"
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                        nn.Conv2d(8, 8, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    net.load_state_dict({k[4:].replace("_", ".", 1): golden(k) for k in GOLDEN.files if k.startswith("net_")})
    x, y = golden("x"), golden("y").long()
    return net, Site(net, "1"), lambda: F.cross_entropy(net(x), y)


def residual():
    torch.manual_seed(0)
    net = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
    x, y = rand(4, 3, 64, 64, generator=seeded("images")), randint(0, 10, 4, generator=seeded("labels"))
    return net, lambda: F.cross_entropy(net(x), y)


def test_normalisation_equals_the_official_one():
    for name, out in (("mix", "mix_out_detection"), ("mix", "mix_out_segmentation"), ("mix_roi", "mix_roi_out"),
                      ("mix_const", "mix_const_out")):
        torch.testing.assert_close(renormalise(golden(f"{name}_clean"), golden(f"{name}_adv")), golden(out), rtol=0, atol=1e-6)


@pytest.mark.parametrize("points", [3, 5, 7])
def test_strengths_equal_the_official_points(points):
    clean, adversarial = golden("mix_clean"), golden("mix_adv")
    found = torch.cat([clean[None], strengths(clean, adversarial, points - 1)])
    torch.testing.assert_close(found, golden(f"sat{points}_points"), rtol=0, atol=1e-6)
    assert torch.equal(found[-1], adversarial)


@pytest.mark.parametrize("mask", ["0011", "1100", "1111"])
def test_masks_equal_the_official_ones(mask):
    clean, adversarial = golden("mix_clean"), golden("mix_adv")
    found = mix_strengths(clean, adversarial, 4, mask=mask)
    torch.testing.assert_close(found, golden(f"sat5_mask{mask}")[1:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("run", range(3))
def test_the_attack_equals_the_official_one_step_by_step(run):
    net, site, loss = official()
    with site.capture(): clean = loss()
    torch.testing.assert_close(site.value, golden("f"), rtol=0, atol=1e-6)
    for steps in (1, 2, 5):
        found = feature_attack(site, loss, gamma=255*float(golden(f"pgd{run}_gamma")), steps=steps, bn="train")
        torch.testing.assert_close(found, golden(f"pgd{run}_fadv")[steps - 1], rtol=0, atol=1e-5)
    if run: return
    iterates = [mix._loss_at(site, loss, f, "freeze") for f in (site.value, *golden("pgd0_fadv"))]
    assert np.allclose(iterates, GOLDEN["pgd0_loss_at_iterates"], rtol=0, atol=1e-5) and iterates == sorted(iterates)
    assert clean.item() == iterates[0]


def test_pollution_of_the_official_attack_is_reproduced_and_avoided():
    net, site, loss = official()
    with torch.no_grad(), site.capture(): loss()
    net.load_state_dict({k[4:].replace("_", ".", 1): golden(k) for k in GOLDEN.files if k.startswith("net_")})
    before = copy.deepcopy(net[3].state_dict())
    for bn in ("freeze", "eval"):
        feature_attack(site, loss, steps=5, bn=bn)
        assert all(torch.equal(v, before[k]) for k, v in net[3].state_dict().items())
    feature_attack(site, loss, steps=5, bn="train")
    assert net[3].num_batches_tracked == golden("pgd0_bn_batches_after")
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(net[3], name), golden(f"pgd0_bn_{name}_after"), rtol=0, atol=1e-5)


def test_eval_ball_and_random_start_equal_the_official_ones(monkeypatch):
    net, site, loss = official()
    with site.capture(): loss()
    eps = 255*float(golden("pgd_eps"))
    def nearest(name, **options):
        sizes = [float(golden(f"pgd{i}_gamma")) for i in range(3)]
        return min((feature_attack(site, loss, gamma=255*g, steps=s, **options) - golden(name)).abs().max().item()
                   for g in sizes for s in (1, 5))
    monkeypatch.setattr(mix, "rand", lambda *shape, **_: golden("pgd_rand_uniform"))
    assert nearest("pgd_clip_fadv", eps=eps) < 1e-6
    assert nearest("pgd_rand_fadv", eps=eps, random_start=True) < 1e-6
    net, site, loss = official()
    net.eval()
    with site.capture(): loss()
    assert nearest("pgd_eval_fadv") < 1e-6


def test_one_official_training_step():
    net, site, loss = official()
    optimizer = torch.optim.SGD(net.parameters(), .1, .9, weight_decay=5e-4)
    with torch.no_grad(), site.capture(): loss()
    net.load_state_dict({k[4:].replace("_", ".", 1): golden(k) for k in GOLDEN.files if k.startswith("net_")})
    adversarial = feature_attack(site, loss, gamma=255*float(golden("pgd0_gamma")), steps=5, bn="train")
    with site.replay(adversarial): attacked = loss()
    total = (attacked + loss())/2
    total.backward()
    assert abs(total.item() - float(golden("train_loss"))) < 1e-5
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, golden(f"train_grad_{name.replace('.', '_')}"), rtol=1e-4, atol=1e-6)
    optimizer.step()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, golden(f"train_after_{name.replace('.', '_')}"), rtol=1e-4, atol=1e-6, check_dtype=False)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["channel", "instance", "batch"]), st.floats(.1, 10), st.floats(-5, 5), st.integers(0, 99))
def test_statistics_are_those_asked_for(axes, scale, shift, seed):
    clean, other = randn(3, 16, 5, 5, generator=seeded("c", seed)), scale*randn(3, 16, 5, 5, generator=seeded("a", seed)) + shift
    dims = mix._dims(clean, axes)
    found = renormalise(clean, other, axes)
    torch.testing.assert_close(found.mean(dims), other.mean(dims), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.std(dims), other.std(dims), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(renormalise(clean, clean, axes), clean, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 10))
@settings(max_examples=10, deadline=None)
def test_strengths_lie_on_the_line(k):
    clean, other = randn(2, 3, 4, generator=seeded("c")), randn(2, 3, 4, generator=seeded("a"))
    for i, point in enumerate(strengths(clean, other, k), 1): torch.testing.assert_close(point - clean, (other - clean)*i/k)


def test_an_attack_leaves_nothing_behind_and_its_first_step_is_free():
    net, loss = residual()
    site = Site(net, "layer2")
    with site.capture(): clean = loss()
    before, flags = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    state, runs = torch.get_rng_state(), []
    def counted():
        runs.append(1)
        return loss()
    slow = feature_attack(site, counted, gamma=1., steps=3)
    assert len(runs) == 3 and all(p.grad is None for p in net.parameters()) and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert flags == [m.training for m in net.modules()] and not slow.requires_grad
    assert not any("forward" in m.__dict__ for m in net.modules())
    clean.backward()
    runs.clear()
    assert torch.equal(feature_attack(site, counted, gamma=1., steps=3, gradient=site.gradient), slow) and len(runs) == 2
    with torch.no_grad(): assert torch.equal(feature_attack(site, loss, gamma=1., steps=3), slow)
    assert torch.equal(feature_attack(site, loss, steps=0), site.value) and torch.equal(feature_attack(site, loss, gamma=0.), site.value)


def test_a_small_attack_raises_the_loss_at_every_site_and_a_linear_tail_reaches_the_optimum():
    net, loss = residual()
    for name in ("layer1", "layer2", "layer3", "layer4"):
        site = Site(net, name)
        with site.capture(): clean = loss()
        assert mix._loss_at(site, loss, feature_attack(site, loss, gamma=.2, steps=2), "freeze") > clean.item()
    linear = nn.Sequential(nn.Flatten(), nn.Linear(6, 1))
    x = rand(3, 6, generator=seeded("x"))
    site, loss = Site(linear, "0"), lambda: linear(x).sum()
    with site.capture(): clean = loss()
    gain = mix._loss_at(site, loss, feature_attack(site, loss, gamma=1., steps=9, eps=2.), "freeze") - clean.item()
    assert gain == pytest.approx(3*2/255*linear[1].weight.abs().sum().item(), rel=1e-4)


def test_units_of_gamma_and_shards():
    net, loss = residual()
    site = Site(net, "layer2")
    with site.capture(): loss()
    moved = (feature_attack(site, loss, gamma=.1, gamma_unit="feature_std") - site.value).abs().flatten(1).amax(1)
    torch.testing.assert_close(moved, .1*site.value.flatten(1).std(1, correction=0), rtol=1e-4, atol=1e-6)
    ball = dict(gamma=0., eps=.1, gamma_unit="feature_std", random_start=True, steps=1)
    whole = feature_attack(site, loss, **ball, generator=seeded("start"))
    assert torch.equal(whole, feature_attack(site, loss, **ball, generator=Shard(seeded("start"), 0, 4, 4)))
    assert not torch.equal(whole, site.value) and ((whole - site.value).abs().flatten(1).amax(1) <= moved + 1e-6).all()


def test_code_normalisation_cancels_the_attack_and_instance_before_pooling_keeps_it():
    net, loss = residual()
    kept = {}
    for name, axes in (("layer2", "channel"), ("layer4", "channel"), ("layer4", "instance"), ("layer4", "batch")):
        site = Site(net, name)
        with site.capture(): loss()
        kept[name, axes] = kept_by(site, loss, feature_attack(site, loss, gamma=1.), axes)
    assert kept["layer2", "channel"].gain < .05 and kept["layer4", "channel"].gain < .02
    assert kept["layer4", "instance"].gain == pytest.approx(1, abs=.01) and kept["layer4", "batch"].gain < .6
    site = Site(net, "layer2")
    with site.capture(): loss()
    assert all(np.isnan(kept_by(site, loss, site.value)[1:]))


def test_a_gamma_that_rounding_loses_is_reported():
    relu = randn(2, 64, 16, 16, generator=seeded("relu")).abs()
    shares = [surviving_share(relu, g/255, "bfloat16") for g in (1, .5, .1, .01, .001)]
    assert np.allclose(shares, [.83, .61, .21, .04, 0], atol=.04) and shares == sorted(shares, reverse=True)
    assert np.allclose([surviving_share(relu, g/255, "tf32") for g in (1, .1, .01)], [1, .75, .18], atol=.03)
    assert surviving_share(relu, 0., "bfloat16") == 1 and surviving_share(relu, 1e-12, "float32") < .01
    net, site, loss = official()
    with site.capture(): loss()
    with pytest.warns(UserWarning, match=r"lost in bfloat16: \d+% of the elements survive"):
        feature_attack(site, loss, gamma=.01, precision="bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feature_attack(site, loss, gamma=.01)
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="lost in bfloat16"):
        feature_attack(site, loss, gamma=.01)


BAD = {"did you mean `channel`": lambda f, s, loss: renormalise(f, f, "chanel"),
       "two of one shape": lambda f, s, loss: strengths(f, f[:1], 2),
       "whole number from 1": lambda f, s, loss: strengths(f, f, True), "give 2 digits": lambda f, s, loss: parse_mask("011", 2),
       "use axes='channel'": lambda f, s, loss: renormalise(f[:, :, :1, :1], f[:, :, :1, :1], "instance"),
       "gamma=nan": lambda f, s, loss: feature_attack(s, loss, gamma=float("nan")),
       "steps=-1": lambda f, s, loss: feature_attack(s, loss, steps=-1),
       "give `eps`": lambda f, s, loss: feature_attack(s, loss, random_start=True),
       "same capture": lambda f, s, loss: feature_attack(s, loss, gradient=f[:1]),
       "give only one": lambda f, s, loss: feature_attack(s, loss, gradient=f, random_start=True, eps=1.),
       "no unit": lambda f, s, loss: feature_attack(s, loss, gamma_unit="std"),
       "float16": lambda f, s, loss: surviving_share(f, 1., "fp16"),
       "did you mean `bfloat16`": lambda f, s, loss: feature_attack(s, loss, precision="bfloat"),
       "with a gradient": lambda f, s, loss: feature_attack(s, lambda: loss().detach()),
       "has no policy": lambda f, s, loss: feature_attack(s, loss, bn="frozen")}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_costs_one_sentence(words):
    net, site, loss = official()
    with site.capture(): loss()
    with pytest.raises(SadalibError, match=words): BAD[words](site.value, site, loss)
    assert not any("forward" in m.__dict__ for m in net.modules())
