"""SADA: parity with recorded outputs of the released code, and what an attack must never do"""
import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sadalib import sada
from sadalib.models import create_model, frozen
from sadalib.runs import SadalibError, Shard, rand, seeded
from sadalib.sada import (
    SADA,
    amplitude_phase,
    attacked_views,
    from_amplitude,
    jsd_loss,
    shuffled_map,
    spectral_attack,
    spectral_weight,
)
from sadalib.sensitivity import SensitivityMap

HERE = Path(__file__).parent/"golden"
FILES = ("sada_attack_digits", "sada_attack_digits_color", "sada_attack", "sada_attack_color")


def golden(name):
    for folder in (HERE, os.environ.get("SADALIB_GOLDEN")):
        if folder and (path := Path(folder)/name).is_file():
            with np.load(path, allow_pickle=False) if path.suffix == ".npz" else contextlib.nullcontext() as arrays:
                return dict(arrays) if arrays is not None else np.load(path, allow_pickle=False)
    pytest.skip(f"{name} is not in tests/golden: set SADALIB_GOLDEN to the folder of the recorded outputs")


class GoldenNet(nn.Module):
    "The network of the recorded runs"

    def __init__(self, d):
        super().__init__()
        for name in ("conv1_weight", "conv1_bias", "conv2_weight", "conv2_bias", "fc_weight", "fc_bias"):
            self.register_buffer(name, torch.from_numpy(d[f"w_{name}"]))
        self.logits = []

    def forward(self, x):
        x = F.avg_pool2d(F.conv2d(x, self.conv1_weight, self.conv1_bias, padding=2).relu(), 2)
        x = F.avg_pool2d(F.conv2d(x, self.conv2_weight, self.conv2_bias, padding=2).relu(), 2)
        self.logits.append(F.linear(x.flatten(1), self.fc_weight, self.fc_bias).detach())
        return F.linear(x.flatten(1), self.fc_weight, self.fc_bias)


def options(d, variant):
    "The keywords of a recorded variant"
    full = dict(compat=True, init=None, brightness=0, stop=False, steps=int(d["num_steps"]),
                step_size=float(d["step_size"]), budget=int(d["tau_stop"]), return_info=True)
    weight = dict(weight=torch.from_numpy(d["weight_map"]))
    colour = torch.ones(*d["x"].shape)
    colour[..., 0, 0] = 1 + 4*torch.from_numpy(d["dc_u"])
    uniform = dict(init=1 + torch.from_numpy(d["uniform_noise"]))
    return full | {
        "base": {}, "one": dict(steps=1), "stop": dict(stop=True), "stopfix": dict(stop=True, freeze=True),
        "wmap": weight, "stopw": dict(stop=True, **weight), "pos": dict(direction="pos"),
        "dc": dict(stop=True, init=colour), "dcfix": dict(stop=True, init=colour, freeze=True), "uni": uniform,
        "bright": dict(steps=1, brightness=torch.full((len(d["x"]),), float(d["bright_factor"])))}[variant]


VARIANTS = ("base", "one", "stop", "stopfix", "wmap", "stopw", "pos", "dc", "dcfix", "uni", "bright")
CASES = [(f, v) for f in FILES for v in VARIANTS] + [("sada_attack_dark", v) for v in ("dc", "dcfix", "uni")]


@pytest.mark.parametrize("name,variant", CASES)
def test_parity(name, variant):
    d = golden(f"{name}.npz")
    net, x, y = GoldenNet(d), torch.from_numpy(d["x"]), torch.from_numpy(d["y"]).long()
    out, info = spectral_attack(net, x, y, **options(d, variant))
    final = torch.from_numpy(d[f"{variant}_final"])
    assert info.steps_run == int(d[f"{variant}_steps_run"])
    comparable = torch.from_numpy(d[f"{variant}_dev64"])[:len(final)] < 1e-5
    off = (out[:len(final)] - final).abs().amax((1, 2, 3))[comparable]
    assert len(off) and (off <= 1e-5).float().mean() >= (10/12 if len(final) > 4 else 2/3) - 1e-6, off
    assert off.max() <= 2e-3
    if f"{variant}_logits" in d:
        assert (net.logits[0] - torch.from_numpy(d[f"{variant}_logits"][0])).abs().max() < 2e-5*max(
            1, net.logits[0].abs().max().item())
    if f"{variant}_amp0" in d and variant == "dc":
        start = torch.fft.fft2(x).abs()[..., 0, 0]*(1 + 4*torch.from_numpy(d["dc_u"]))
        torch.testing.assert_close(start, torch.from_numpy(d["dc_amp0"]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("variant", ["base", "wmap", "uni"])
@pytest.mark.parametrize("name", [*FILES, "sada_attack_dark"])
def test_replay_of_recorded_signs(name, variant):
    "Without the network, and so without any ill-conditioned step: every image to 1e-6"
    d = golden(f"{name}.npz")
    if f"{variant}_gsign" not in d: pytest.skip(f"{name} records no signs of {variant}")
    amplitude, phasor = sada._analyse(torch.from_numpy(d["x"]), compat=True)
    amplitude = amplitude*(1 + torch.from_numpy(d["uniform_noise"]) if variant == "uni" else 1)
    weight = torch.from_numpy(d["weight_map"]) if variant == "wmap" else 1.
    for signs in torch.from_numpy(d[f"{variant}_gsign"]).float():
        amplitude = sada._stepped(amplitude, signs, float(d["step_size"]), weight, amplitude, None)
    image = sada._into_range(sada._synthesise(amplitude, phasor, 32, True), "batch")
    assert (image - torch.from_numpy(d[f"{variant}_final"])).abs().max() <= 1e-6


def test_the_released_stop_is_dead_and_the_repaired_one_is_not():
    d = golden("sada_attack_digits.npz")
    x, y = torch.from_numpy(d["x"]), torch.from_numpy(d["y"]).long()
    stop, base, fixed = (spectral_attack(GoldenNet(d), x, y, **options(d, v))[0] for v in ("stop", "base", "stopfix"))
    assert int(d["stop_equals_base"]) == 1 and torch.equal(stop, base) and not torch.equal(fixed, base)


@pytest.mark.parametrize("case", "abc")
@pytest.mark.parametrize("weight", [10, .025])
def test_jsd_parity(case, weight):
    d = golden("sada_jsd.npz")
    logits = torch.from_numpy(d[f"{case}_logits"]).clone().requires_grad_()
    consistency = weight*jsd_loss(logits)
    assert consistency.item() == pytest.approx(float(d[f"{case}_w{weight}_consistency"]), rel=2e-6)
    total = F.cross_entropy(logits[0], torch.from_numpy(d[f"{case}_y"]).long()) + consistency
    gradient, = torch.autograd.grad(total, logits)
    official = torch.from_numpy(d[f"{case}_w{weight}_grad"])
    assert gradient.isfinite().all() and (case != "c" or not official.isfinite().all())
    rows = official.isfinite().all(-1)
    torch.testing.assert_close(gradient[rows], official[rows], rtol=1e-4, atol=2e-6)


def test_the_placed_map_is_the_recorded_one():
    "A map of 31 x 31 lands where the maker of the recorded outputs put it"
    weight = torch.from_numpy(golden("sada_attack.npz")["weight_map"])
    shipped = torch.from_numpy(golden("sample_map.npy"))
    placed = spectral_weight(shipped, 32, 32)
    torch.testing.assert_close(placed, sada._hermitian(weight), rtol=0, atol=1e-6)
    for wrong in (shipped.T, shipped.flip(0), shipped.roll(1, 0)):
        assert (spectral_weight(wrong, 32, 32) - placed).abs().max() > .005


# ---- mathematics

SIDES = st.integers(1, 20)


@settings(max_examples=40, deadline=None)
@given(SIDES, SIDES, st.sampled_from([1, 3, 4]), st.integers(0, 99))
def test_amplitude_and_phase_and_back(height, width, channels, seed):
    x = rand(2, channels, height, width, generator=seeded(seed))
    amplitude, phasor = amplitude_phase(x)
    assert not from_amplitude(amplitude, phasor, width).is_complex()
    torch.testing.assert_close(from_amplitude(amplitude, phasor, width), x, rtol=0, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(SIDES, SIDES, st.integers(0, 99))
def test_half_and_full_factors_are_the_same_filter(height, width, seed):
    x, full = rand(1, 1, height, width, generator=seeded(seed)), rand(height, width, generator=seeded(seed, 1)) + .5
    half = sada._hermitian(full)
    slow = torch.fft.ifft2(torch.fft.fft2(x)*full).real
    torch.testing.assert_close(torch.fft.irfft2(torch.fft.rfft2(x)*half, s=(height, width)), slow, rtol=0, atol=1e-5)
    torch.testing.assert_close(sada._hermitian(sada._full(half, width)), half, rtol=0, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 20), st.integers(3, 20), st.integers(0, 99))
def test_the_weight_of_a_frequency_is_its_own(height, width, seed):
    "A map that is 1 at one frequency raises the step of that wave, whatever the size"
    ku, kv = (height - 1)//2, (width - 1)//2
    g = seeded(seed)
    u, v = (int(torch.randint(-k, k + 1, (1,), generator=g)) for k in (ku, kv))
    error = torch.zeros(2*ku + 1, 2*kv + 1)
    error[ku + u, kv + v] = error[ku - u, kv - v] = 1
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    wave = torch.cos(2*torch.pi*(u*rows/height + v*columns/width) + .3)
    filtered = torch.fft.irfft2(torch.fft.rfft2(wave)*(spectral_weight(error, height, width) - 1), s=(height, width))
    torch.testing.assert_close(filtered, wave, rtol=0, atol=1e-4)


def test_a_weight_at_another_size_keeps_its_normalised_frequency():
    u, v = torch.meshgrid(torch.arange(-15, 16.), torch.arange(-15, 16.), indexing="ij")
    smooth = torch.exp(-(u/16*1.2)**2 - (v/16*.7 - u/16*.4)**2)
    for height, width in ((64, 64), (33, 47), (20, 32)):
        weight = spectral_weight(smooth, height, width)
        assert weight.shape == (height, width//2 + 1)
        for row, column in ((1, 2), (height - 3, 4), (3, 0)):
            fu, fv = (row if row < height/2 else row - height)*32/height, column*32/width
            assert weight[row, column] == pytest.approx(
                1 + float(torch.exp(torch.tensor(-(fu/16*1.2)**2 - (fv/16*.7 - fu/16*.4)**2))), abs=.02)


def test_a_window_keeps_its_size():
    window = torch.zeros(5, 5)
    window[1, 3] = window[3, 1] = 1 # u = -1, v = 1
    weight = spectral_weight(window, 32, 32, size=(32, 32))
    assert weight[31, 1] == 2 and weight[1, 1] == 1 and weight[0, 0] == 1
    bigger = spectral_weight(window, 64, 64, size=(32, 32))
    assert bigger[62, 2] == 2


@pytest.mark.parametrize("strength,peak,mean",
                         [("published", 2, None), ("equal_peak", 1, None), ("equal_mean", None, 1)])
def test_strength(strength, peak, mean):
    error = rand(31, 31, generator=seeded(0))
    error = (error + error.flip(0, 1))/2
    error = error/error.max()
    weight = spectral_weight(error, 32, 32, strength=strength)
    if peak: assert weight.max() == pytest.approx(peak, abs=1e-6)
    if mean: assert sada._full(weight, 32).mean() == pytest.approx(mean, abs=1e-6)


def test_a_shuffled_map_keeps_its_values_and_its_symmetry():
    error = rand(21, 31, generator=seeded(0))
    error = (error + error.flip(0, 1))/2
    mixed = shuffled_map(error, generator=seeded(1))
    torch.testing.assert_close(mixed, mixed.flip(0, 1))
    assert mixed[10, 15] == error[10, 15] and not torch.equal(mixed, error)
    torch.testing.assert_close(mixed.flatten().sort().values, error.flatten().sort().values)
    assert torch.equal(mixed, shuffled_map(error, generator=seeded(1)))


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 8, 5), nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(3, 4, 1),
                                   nn.Conv2d(4, 6, (3, 5), padding=(0, 2)), nn.Conv2d(2, 3, 7, padding=3, bias=False),
                                   nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(3, 4, 3, padding="same"),
                                   nn.Conv2d(3, 4, 3, padding=4), nn.Conv2d(3, 4, 3, dilation=2)])
@pytest.mark.parametrize("size", [(9, 12), (16, 11)])
def test_the_thin_first_layer_is_the_layer(layer, size):
    x = rand(2, layer.in_channels, *size, generator=seeded(0)).double().requires_grad_()
    layer = layer.double().requires_grad_(False)
    expected, = torch.autograd.grad(layer(x).square().sum(), x)
    with sada._ThinFirstLayer(): y = layer(x)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], expected)


# ---- what an attack must do, and never do

class Smooth(nn.Module):
    "A small network whose gradient no rounding turns round"

    def __init__(self, channels=3, classes=4, size=(16, 16), seed=0):
        super().__init__()
        g = seeded(seed, "smooth")
        self.a = nn.Parameter(torch.randn(12, channels*size[0]*size[1], generator=g, dtype=torch.float64)*.2)
        self.b = nn.Parameter(torch.randn(classes, 12, generator=g, dtype=torch.float64))

    def forward(self, x): return (x.flatten(1).to(self.a) @ self.a.T).tanh() @ self.b.T


def batch(n=12, channels=3, size=(16, 16), seed=0, net=None):
    x = rand(n, channels, *size, generator=seeded(seed, "batch")).double()
    net = net or Smooth(channels, size=size)
    return net, x, net(x).argmax(1).detach()


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 17), st.integers(2, 17), st.sampled_from([1, 3, 4]), st.booleans(),
       st.sampled_from(["dc", "uniform", None]))
def test_any_size_stays_in_range(height, width, channels, compat, init):
    net, x, y = batch(4, channels, (height, width))
    out = spectral_attack(net, x.float(), y, init=init, compat=compat, generator=seeded(0))
    assert out.shape == x.shape and out.dtype == torch.float32 and out.min() >= 0 and out.max() <= 1
    assert not out.requires_grad


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 17), st.integers(1, 17), st.sampled_from([1, 3, 4]), st.booleans())
def test_no_step_is_the_identity(height, width, channels, bound):
    net, x, y = batch(3, channels, (height, width))
    how = dict(eps=0., steps=5) if bound else dict(steps=0)
    out = spectral_attack(net, x.float(), y, init=None, brightness=0, **how)
    torch.testing.assert_close(out, x.float(), rtol=0, atol=1e-5)


def test_eps_bounds_every_amplitude():
    net, x, y = batch()
    info = spectral_attack(net, x, y, init=None, brightness=0, eps=.1, steps=9, stop=False, return_info=True)[1]
    start = amplitude_phase(x)[0]
    ratio = (info.amplitude/start)[start > 1e-9]
    assert ratio.min() >= .9 - 1e-9 and ratio.max() <= 1.1 + 1e-9 and ratio.max() > 1.09


def test_the_loss_climbs_and_the_other_direction_falls():
    net, x, y = batch(40)
    def loss(z): return F.cross_entropy(net(z), y).item()
    up, down = (loss(spectral_attack(net, x, y, init=None, brightness=0, stop=False, step_size=.02, direction=way))
                for way in ("neg", "pos"))
    assert up > loss(x) > down


def test_the_gradient_is_the_one_of_finite_differences():
    "Through scaling by the maximum and clamping: where a step leads up, the loss grows"
    net, x, y = batch(2, 1, (6, 7))
    x = x*1.0
    x[0] = x[0]*.2 + .8
    with frozen(net):
        climb = sada._Climb(net, x, y, sada._Rule(1, .05, "neg", False, 1, True, True, "image", None, False))
        start = climb.amplitude*1.3 # overshoots
        leaf = start.clone().requires_grad_()
        exact, = torch.autograd.grad(F.cross_entropy(net(climb.images(leaf)), y, reduction="sum"), leaf)
        for index in [(0, 0, 0, 0), (0, 0, 1, 2), (1, 0, 4, 1), (0, 0, 0, 3)]:
            moved = [start.clone(), start.clone()]
            for sign, one in zip((1, -1), moved, strict=True): one[index] += sign*1e-6
            plus, minus = (F.cross_entropy(net(climb.images(one)), y, reduction="sum") for one in moved)
            assert exact[index].item() == pytest.approx(((plus - minus)/2e-6).item(), rel=1e-3, abs=1e-6)


def test_on_a_linear_model_each_amplitude_moves_all_the_way():
    "The closed form: a linear score is linear in the amplitudes, so each goes to one end of its range"
    g = seeded(0)
    w = torch.randn(8*9, generator=g, dtype=torch.float64)
    class Linear(nn.Module):
        def forward(self, x): return torch.stack([x.flatten(1) @ w, -(x.flatten(1) @ w)], 1)*.01
    x = .5 + .02*torch.randn(5, 1, 8, 9, generator=g, dtype=torch.float64) # never leaves [0, 1]
    y = torch.zeros(5, dtype=torch.int64)
    info = spectral_attack(Linear(), x, y, init=None, brightness=0, stop=False, steps=3, step_size=.01,
                           return_info=True)[1]
    amplitude, phasor = amplitude_phase(x)
    slope = torch.autograd.functional.jacobian(lambda a: (from_amplitude(a, phasor, 9).flatten(1) @ w).sum(), amplitude)
    expected = amplitude*torch.where(slope > 0, .99**3, 1.01**3)
    torch.testing.assert_close(info.amplitude, expected, rtol=1e-6, atol=1e-9)


class Normed(nn.Module):
    "With BatchNorm, dropout, and one part that somebody froze"

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(),
                                  nn.AdaptiveAvgPool2d(2))
        self.head = nn.Linear(24, 4)
        self.head.bias.requires_grad_(False)
        self.body[1].eval()

    def forward(self, x): return self.head(self.body(x).flatten(1))


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(compat, fails):
    torch.manual_seed(0)
    net, x = Normed(), rand(6, 3, 16, 16, generator=seeded(0))
    y = torch.tensor([0, 1, 2, 3, 0, 9 if fails else 1])
    F.cross_entropy(net(x), y.clamp(max=3)).backward()
    def state():
        return [*(v.clone() for v in net.state_dict().values()), torch.get_rng_state(), x.clone(), y.clone(),
                *(torch.tensor([]) if p.grad is None else p.grad.clone() for p in net.parameters())]
    flags = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    before = state()
    for _ in range(2):
        try: spectral_attack(net, x, y, compat=compat)
        except SadalibError: assert fails
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert flags == ([m.training for m in net.modules()], [p.requires_grad for p in net.parameters()])
    assert torch.is_grad_enabled()


def test_it_runs_where_gradients_are_off():
    net, x, y = batch()
    reference = spectral_attack(net, x, y, generator=seeded(0))
    with torch.no_grad(): assert torch.equal(spectral_attack(net, x, y, generator=seeded(0)), reference)
    with torch.inference_mode():
        assert torch.equal(spectral_attack(net, x.clone(), y.clone(), generator=seeded(0)), reference)


@pytest.mark.parametrize("normalised", [False, True])
def test_out_of_reach_gradients_do_not_spoil_a_black_image(normalised):
    net = create_model("tinynet", seed=0)
    x, y = torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64)
    out = spectral_attack(net, x, y, normalise="image" if normalised else "none")
    assert out.isfinite().all() and out.max() == 0


@pytest.mark.parametrize("init", ["dc", None])
def test_compaction_changes_nothing(init):
    net, x, y = batch(64)
    how = dict(steps=8, init=init, return_info=True, budget=2)
    a, slim = spectral_attack(net, x, y, **how, generator=seeded(0))
    b, fat = spectral_attack(net, x, y, compact=False, **how, generator=seeded(0))
    assert (a - b).abs().max() <= 1e-6 and torch.equal(slim.fooled, fat.fooled)
    assert sum(slim.entered) < .95*sum(fat.entered) # it saved something


def test_compaction_in_float32_differs_at_most_as_rounding_does():
    "Other batch sizes, other last bits, and now and then the sign of a gradient that is nearly zero"
    net = create_model("tinynet", seed=0)
    x, y = rand(64, 3, 32, 32, generator=seeded(0)), torch.zeros(64, dtype=torch.int64)
    with frozen(net): y = net(x).argmax(1)
    a, b = (spectral_attack(net, x, y, compact=c, generator=seeded(0)) for c in (True, False))
    off = (a - b).abs().amax((1, 2, 3))
    assert (off <= 1e-5).float().mean() > .8 and off.max() < 5e-3


def test_an_image_is_itself_in_any_company():
    net, x, y = batch(10)
    factors = rand(10, 3, 16, 9, generator=seeded(3), low=.8, high=1.5).double()
    gains = rand(10, generator=seeded(4), low=1., high=1.6).double()
    together = spectral_attack(net, x, y, init=factors, brightness=gains)
    alone = [spectral_attack(net, x[i:i + 1], y[i:i + 1], init=factors[i:i + 1], brightness=gains[i:i + 1])
             for i in range(10)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-9)


def test_rounding_decides_no_direction():
    "Black backgrounds and several pixels at the maximum: noise as large as another FFT's turns few signs"
    net = Smooth(size=(32, 32))
    x = torch.zeros(6, 3, 32, 32)
    x[:, :, 8:20, 10:14] = 1
    y = torch.zeros(6, dtype=torch.int64)
    with frozen(net):
        climb = sada._Climb(net, x, y, sada._Rule(1, .05, "neg", False, 1, True, True, "image", None, False))
        signs = []
        for seed in range(2):
            leaf = climb.amplitude*(1.1 + 2e-7*(rand(*climb.amplitude.shape, generator=seeded(seed)) - .5))
            leaf.requires_grad_()
            loss = F.cross_entropy(net(climb.images(leaf)), y, reduction="sum")
            signs.append(torch.autograd.grad(loss, leaf)[0].sign()[climb.amplitude > 1e-3])
    assert (signs[0] != signs[1]).float().mean() < .001


def test_a_fooled_image_freezes_and_one_fooled_at_the_start_does_not_move():
    net, x, y = batch(20)
    wrong = (y + 1) % 4
    out, info = spectral_attack(net, x, torch.cat([wrong[:10], y[10:]]), init=None, brightness=0, return_info=True)
    torch.testing.assert_close(out[:10], x[:10], rtol=0, atol=1e-9)
    assert info.fooled[:10].all() and info.entered[:2] == (1., pytest.approx(.5, abs=.5))


def test_weight_zero_stands_still_and_a_map_object_is_placed():
    net, x, y = batch()
    quiet = spectral_attack(net, x, y, weight=torch.zeros(16, 9), init=None, brightness=0, stop=False)
    torch.testing.assert_close(quiet, x, rtol=0, atol=1e-9)
    e = rand(15, 15, generator=seeded(0))
    measured = SensitivityMap(e, e, e[None], .1, e, e[None], 9, (16, 16))
    given_map = spectral_attack(net, x, y, weight=measured, init=None, brightness=0)
    placed = spectral_attack(net, x, y, weight=spectral_weight(e, 16, 16), init=None, brightness=0)
    whole = sada._full(spectral_weight(e, 16, 16), 16)
    full = spectral_attack(net, x, y, weight=whole, init=None, brightness=0)
    assert torch.equal(given_map, placed) and (full - placed).abs().max() < 1e-6


def test_equal_seeds_equal_images_and_shards_see_their_rows():
    net, x, y = batch(12)
    def run(generator, rows=slice(None)): return spectral_attack(net, x[rows], y[rows], generator=generator)
    whole = run(seeded(0))
    assert torch.equal(whole, run(seeded(0))) and not torch.equal(whole, run(seeded(1)))
    parts = [run(Shard(seeded(0), a, b, 12), slice(a, b)) for a, b in ((0, 5), (5, 12))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-9)


X = rand(4, 3, 16, 16, generator=seeded(0))
Y = torch.tensor([0, 1, 2, 3])


class Broken(nn.Module):
    def forward(self, x): return x.flatten(1)[:, :4]*float("nan")


@pytest.mark.parametrize("change,says", [
    (dict(model=Broken()), "returns NaN"), (dict(labels=Y + 1), "labels run from 0"), (dict(labels=Y - 1), "label -1"),
    (dict(labels=Y[:2]), "do not fit"), (dict(labels=Y.float()), "do not fit"), (dict(images=X[0]), "do not fit"),
    (dict(images=X*255), "undo the normalisation"), (dict(images=X - .5), "undo the normalisation"),
    (dict(images=X*float("nan")), "range from nan"), (dict(images=X[:0], labels=Y[:0]), "do not fit"),
    (dict(weight=torch.ones(15, 15)), "spectral_weight"), (dict(weight=torch.full((16, 9), float("inf"))), "finite"),
    (dict(init="normal"), '"dc", "uniform"'), (dict(init=torch.ones(3, 1, 16, 9)), r"init has shape [^:]*\.$"),
    (dict(steps=-1), "steps is -1"), (dict(step_size=-.1), "step_size is"), (dict(budget=0), "budget is 0"),
    (dict(eps=-1), "eps is -1"), (dict(eps=float("inf")), "eps is inf"), (dict(step_size=float("inf")), "finite"),
    (dict(step_size=float("nan")), "finite"), (dict(steps=2.5), "whole number"), (dict(budget=1.5), "whole number"),
    (dict(model=lambda x: x), "torch.nn.Module"), (dict(images=X.numpy()), "a tensor .B, C, H, W. is expected"),
    (dict(weight="guided"), "weight is a str"), (dict(init=3.), "the same factor everywhere"),
    (dict(weight=torch.ones(1, 1)), "spectral_weight"), (dict(direction="up"), "unknown direction"),
    (dict(normalise="pixel"), "unknown normalise"),
    (dict(brightness=-1), "brightness is -1"), (dict(brightness=float("nan")), "brightness is nan"),
    (dict(brightness=float("inf")), "brightness is inf"), (dict(brightness=torch.ones(3)), "each of the 4 images"),
    (dict(brightness=torch.tensor([1., 1., -1., 1.])), "brightness is a tensor"), (dict(brightness="high"), "high")])
def test_one_sentence(change, says):
    call = {"model": Smooth(), "images": X, "labels": Y, **change}
    with pytest.raises(SadalibError, match=says) as error: spectral_attack(**call)
    assert str(error.value).rstrip().endswith(".") and "\n" not in str(error.value)


def test_bytes_are_images_too():
    levels = (X*255).round().byte()
    a, b = (spectral_attack(Smooth(), x, Y, generator=seeded(0)) for x in (levels, levels.float()/255))
    assert torch.equal(a, b)


# ---- the method

def test_the_loss_is_cross_entropy_plus_weighted_divergence():
    net = create_model("tinynet", seed=0).eval()
    x, y = rand(8, 3, 32, 32, generator=seeded(0)), torch.arange(8)
    method = SADA(guidance="uniform", views=2, weight=3.)
    terms = method.loss(net, x, y, generator=seeded(1))
    views, _ = attacked_views(method, net, x, y, generator=seeded(1))
    logits = torch.stack([net(x), net(views[:, 0]), net(views[:, 1])])
    torch.testing.assert_close(terms["total"], F.cross_entropy(logits[0], y) + 3*jsd_loss(logits), rtol=1e-5, atol=1e-6)
    terms["total"].backward()
    assert all(p.grad is not None for p in net.parameters()) and all(t.ndim == 0 for t in terms.values())
    apart = SADA(guidance="uniform", views=2, weight=3., joint=False).loss(net, x, y, generator=seeded(1))
    torch.testing.assert_close(apart["total"], terms["total"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", [{}, dict(augmix=True, init="uniform"), dict(views=1, eps=.1)])
def test_views_are_the_same_on_one_and_on_two_processes(how):
    net = create_model("tinynet", seed=0)
    x, y = rand(6, 3, 32, 32, generator=seeded(0)), torch.arange(6)
    method = SADA(guidance="uniform", **{"views": 3, **how})
    whole = attacked_views(method, net, x, y, generator=seeded(1))[0]
    parts = [attacked_views(method, net, x[a:b], y[a:b], generator=Shard(seeded(1), a, b, 6))[0]
             for a, b in ((0, 2), (2, 6))]
    off = (torch.cat(parts) - whole).abs().amax((2, 3, 4))
    assert (off <= 1e-5).float().mean() > .8 and off.max() < 5e-3
    assert (whole[:, 0] - whole[:, -1]).abs().max() > .01 or method.views == 1


def test_warm_up_does_not_attack():
    net = create_model("tinynet", seed=0)
    passes = []
    net.register_forward_hook(lambda *_: passes.append(1))
    x, y = rand(4, 3, 32, 32, generator=seeded(0)), torch.arange(4)
    method = SADA.official(guidance="uniform")
    for epoch, expected in ((0, 4), (5, 4), (6, None)):
        passes.clear()
        method.epoch_start(epoch, 50)
        method.loss(net, x, y, generator=seeded(0))
        assert len(passes) == expected if expected else len(passes) > 4
    plain = SADA(guidance="uniform", warm_up=1).loss(net, x, y, generator=seeded(0))
    torch.testing.assert_close(plain["total"], plain["cross_entropy"])


def test_the_official_settings_are_the_released_ones():
    m = SADA.official(guidance="uniform")
    assert (m.views, m.steps, m.step_size, m.weight) == (3, 5, .08, .025)
    assert (m.warm_up, m.warm_up_weight, m.brightness) == (6, 10., .6)
    assert (m.augmix, m.augmix_severity, m.augmix_all_ops, m.strength, m.init) == (True, 2., True, "published", "dc")


def test_guidance():
    error = rand(31, 31, generator=seeded(0))
    guided, shuffled = (SADA(guidance=g).use_map(error).placed(32, 32) for g in ("guided", "shuffled"))
    assert SADA(guidance="uniform").placed(32, 32) is None
    assert guided.max() == 1 == shuffled.max() and (guided - shuffled).abs().mean() > .1
    assert SADA(guidance="guided").use_map(error).placed(40, 33).shape == (40, 17)
    with pytest.raises(SadalibError, match="has no map"): SADA().prepare(lambda config: None)
    SADA(guidance="uniform").prepare(None)


@pytest.mark.parametrize("change", [dict(guidance="gided"), dict(strength="x"), dict(views=0), dict(steps=-1),
                                    dict(init="no"), dict(weight=-1.), dict(warm_up=-1), dict(eps=-.1),
                                    dict(brightness=-1.), dict(brightness=float("inf")), dict(views=1.5),
                                    dict(steps=2.5), dict(step_size=float("nan"))])
def test_wrong_settings(change):
    with pytest.raises(SadalibError): SADA(**change)


# ---- networks and arguments as people have them

class Viewing(nn.Module):
    "Flattens with `view`, which channels-last forbids"

    def __init__(self):
        super().__init__()
        self.conv, self.out, self.passes = nn.Conv2d(3, 4, 3), nn.Linear(4*14*14, 4), 0

    def forward(self, x):
        self.passes += 1
        x = self.conv(x)
        return self.out(x.view(len(x), -1))


def test_a_network_that_flattens_with_view():
    net = Viewing()
    out = spectral_attack(net, X, Y, generator=seeded(0))
    reshaped = nn.Sequential(net.conv, nn.Flatten(), net.out)
    off = (out - spectral_attack(reshaped, X, Y, generator=seeded(0))).abs()
    assert (off > 1e-4).float().mean() < .02
    with pytest.raises(RuntimeError, match="size of tensor"): # other errors stay what they are
        spectral_attack(nn.Sequential(nn.Flatten(), Adding()), X, Y)


class Adding(nn.Module):
    def forward(self, x): return x + torch.ones(7)


@pytest.mark.parametrize("bad", [dict(brightness=-1), dict(brightness=torch.ones(3)), dict(steps=2.5)])
def test_wrong_arguments_cost_no_pass(bad):
    net = Viewing()
    with pytest.raises(SadalibError): spectral_attack(net, X, Y, **bad)
    assert net.passes == 0


@pytest.mark.parametrize("network,images,result", [
    (torch.float32, torch.float64, torch.float32), (torch.float64, torch.float32, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32)])
def test_floating_types_of_networks_and_images(network, images, result):
    net = create_model("tinynet", seed=0)
    x, y = rand(4, 3, 32, 32, generator=seeded(0)), torch.arange(4)
    usual = spectral_attack(net, x, y, stop=False, init=None, brightness=0)
    other = spectral_attack(net.to(network), x.to(images), y, stop=False, init=None, brightness=0)
    assert other.dtype == result
    assert ((other - usual).abs() > 1e-3).float().mean() < (.02 if network != torch.bfloat16 else 1.)


def test_a_centred_map_of_odd_size_is_not_taken_for_a_spectrum():
    x, error = rand(4, 3, 15, 13, generator=seeded(0)), rand(15, 13, generator=seeded(1))
    error = (error + error.flip(0, 1))/2
    with pytest.raises(SadalibError, match="the symmetry of a centred map"):
        spectral_attack(Smooth(size=(15, 13)), x, Y, weight=1 + error)
    plain = dict(init=None, brightness=0)
    placed = spectral_weight(error, 15, 13)
    full = sada._full(placed, 13)
    expected = spectral_attack(Smooth(size=(15, 13)), x, Y, weight=placed, **plain)
    for fine in (full, full.numpy(), placed.numpy(), SensitivityMap(error, error, error[None], .1, error, error[None],
                                                                   9, (15, 13))):
        torch.testing.assert_close(spectral_attack(Smooth(size=(15, 13)), x, Y, weight=fine, **plain), expected)
    spectral_attack(Smooth(size=(15, 13)), x, Y, weight=torch.ones(15, 13)) # symmetric both ways


@pytest.mark.parametrize("compat", [False, True])
def test_a_factor_for_each_channel(compat):
    factors = torch.tensor([.5, 1., .8]).view(3, 1, 1)
    out = spectral_attack(Smooth(), X, Y, steps=0, init=factors, brightness=0, compat=compat, normalise="none")
    torch.testing.assert_close(out, X*factors, rtol=0, atol=1e-5)


def test_pixels_past_the_range_by_rounding_are_clamped():
    x = X.clone()
    x[0, 0, 0, :2] = torch.tensor([-5e-4, 1 + 5e-4])
    out = spectral_attack(Smooth(), x, Y, steps=0, init=None, brightness=0)
    torch.testing.assert_close(out, x.clamp(0, 1), rtol=0, atol=1e-5)


def test_a_black_batch_stays_black():
    for normalise in ("batch", "image", "none"):
        out = spectral_attack(Smooth(), X*0, Y, normalise=normalise)
        assert torch.equal(out, X*0)


def test_the_epoch_is_state():
    method, other = SADA(guidance="uniform", warm_up=2), SADA(guidance="uniform", warm_up=2)
    method.epoch_start(3, 9)
    assert all(isinstance(x, torch.Tensor) for x in method.state_dict().values())
    other.load_state_dict(method.state_dict())
    net, x, y = create_model("tinynet", seed=0).eval(), rand(4, 3, 32, 32, generator=seeded(0)), torch.arange(4)
    ours, theirs = (m.loss(net, x, y, generator=seeded(0))["total"] for m in (method, other))
    assert torch.equal(ours, theirs)
    other.load_state_dict({})
    assert "attack_fooled" not in other.loss(net, x, y, generator=seeded(0))


def test_eight_official_settings_differ_from_the_defaults():
    ours, theirs = SADA(), SADA.official()
    assert sum(getattr(ours, name) != getattr(theirs, name) for name in SADA.__dataclass_fields__) == 8
    assert not theirs.compat and SADA.official(compat=True).compat
