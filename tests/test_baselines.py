"Baselines against references (official JSD values, Pillow, scipy, loops), and the contract of every method"
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from torch import nn

from sadalib import augmix as am
from sadalib import baselines as bl
from sadalib.baselines import ERM, AugMix, PGDTraining, RandConv, SpectralNoise, jsd_loss, move_by
from sadalib.models import frozen
from sadalib.runs import SadalibError, Shard, seeded

GOLDEN = Path(__file__).parent/"golden"/"sada_jsd.npz"
AUGMENTATIONS = {
    "augmix": am.augmix,
    "augmix_all": lambda x, **k: am.augmix(x, all_ops=True, severity=7, width=2, **k),
    "augmix_alpha": lambda x, **k: am.augmix(x, alpha=.3, depth=2, **k),
    "randconv": bl.random_convolution,
    "randconv_mix": lambda x, **k: bl.random_convolution(x, mix=True, identity_prob=.3, **k),
    "spectral": bl.spectral_noise,
    "spectral_matched": lambda x, **k: bl.spectral_noise(x, norm=1.5, init="dc", brightness=.6, **k),
    "spectral_radius": lambda x, **k: bl.spectral_noise(x, radius=.4, **k),
}
METHODS = [ERM(), ERM(label_smoothing=.1), AugMix(), AugMix(views=3, severity=2, all_ops=True), RandConv(),
           RandConv(mix=False, identity_prob=.5, weight=5., per_image=False), RandConv(views=1, clamp=True),
           SpectralNoise(), SpectralNoise(norm=3., views=2), SpectralNoise(radius=.3, init=None, brightness=0.),
           PGDTraining(steps=2), PGDTraining(steps=2, mix=.5), PGDTraining(norm="l2", eps=.5, steps=2)]
UNCHANGED = [AugMix(depth=0), RandConv(identity_prob=1.), SpectralNoise(steps=0, init=None, brightness=0.),
             SpectralNoise(norm=0.), PGDTraining(eps=0.), PGDTraining(eps=0., mix=.5)]


def batch(n=12, channels=3, height=16, width=16, seed=0):
    coarse = torch.rand(n, channels, 5, 5, generator=seeded(seed, "batch"))
    smooth = F.interpolate(coarse, size=(height, width), mode="bicubic")
    return (1.3*smooth - .15).clamp(0, 1), torch.arange(n) % 4


def network(channels=3, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(.0),
                             nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(96, 4))


# Jensen-Shannon divergence -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case", "abc")
@pytest.mark.parametrize("weight", ["10", "0.025"])
def test_jsd_equals_the_official_values_and_gradients(case, weight):
    golden = np.load(GOLDEN, allow_pickle=False)
    logits = torch.tensor(golden[f"{case}_logits"], requires_grad=True)
    want = {k: golden[f"{case}_w{weight}_{k}"] for k in ("ce", "consistency", "total", "grad")}
    cross_entropy = F.cross_entropy(logits[0], torch.tensor(golden[f"{case}_y"]).long())
    consistency = float(weight)*jsd_loss(logits)
    total = cross_entropy + consistency
    gradient, = torch.autograd.grad(total, logits)
    assert cross_entropy.item() == pytest.approx(want["ce"].item(), rel=1e-5)
    assert consistency.item() == pytest.approx(want["consistency"].item(), rel=1e-5)
    assert total.item() == pytest.approx(want["total"].item(), rel=1e-5)
    assert gradient.isfinite().all()
    known = np.isfinite(want["grad"])
    assert known.any() and (known.all() or case == "c") # the official gradients are NaN in case c
    np.testing.assert_allclose(gradient.numpy()[known], want["grad"][known], rtol=1e-4, atol=2e-6)


def test_jsd_of_a_list_a_stack_equal_views_and_half_precision():
    logits = torch.randn(3, 5, 7, generator=seeded(1))
    assert torch.equal(jsd_loss(logits), jsd_loss(list(logits)))
    assert abs(jsd_loss(logits[:1].expand(4, -1, -1)).item()) < 1e-6
    assert jsd_loss(logits.bfloat16()).dtype == torch.float32
    assert torch.allclose(jsd_loss(logits), jsd_loss(logits[[2, 0, 1]]), atol=1e-7) # symmetric
    assert 0 <= jsd_loss(1e4*logits).item() <= math.log(3) + 1e-5


@pytest.mark.parametrize("logits", [torch.zeros(4, 10), torch.zeros(1, 4, 10), [],
                                    [torch.zeros(4, 10), torch.zeros(4, 9)]])
def test_jsd_refuses_other_shapes(logits):
    with pytest.raises(SadalibError, match="two or more views of one shape"): jsd_loss(logits)


def test_consistency_needs_one_forward_pass():
    images, labels = batch()
    calls = []
    model = network()
    model.register_forward_hook(lambda *_: calls.append(1))
    out = bl.consistency_loss(model, [images, images.flip(-1)], labels, weight=3.)
    assert len(calls) == 1
    assert torch.allclose(out["total"], out["cross_entropy"] + 3*out["consistency"])


# Operations against Pillow -------------------------------------------------------------------------------------------

def pictures(levels):
    return [Image.fromarray(x[0].byte().numpy()) if len(x) == 1 else Image.fromarray(x.permute(1, 2, 0).byte().numpy())
            for x in levels]


def off(levels, peers):
    arrays = [torch.tensor(np.array(p)).float() for p in peers]
    return (levels - torch.stack([a[None] if a.ndim == 2 else a.permute(2, 0, 1) for a in arrays])).abs()


def byte_images(kind, channels, height, width, n=24):
    noise = (torch.rand(n, channels, height, width, generator=seeded(2, kind))*256).floor()
    if kind == "noise": return noise
    smooth = (batch(n, channels, height, width, seed=5)[0]*255).round()
    if kind == "smooth": return smooth
    special = torch.stack([torch.zeros_like(noise[0]), torch.full_like(noise[0], 255), torch.full_like(noise[0], 77)])
    return torch.cat([special, (noise[:4] > 128).float()*255, 100 + (noise[:4]/128).floor()])


SIZES = [("noise", 3, 32, 32), ("smooth", 3, 32, 32), ("smooth", 1, 17, 24), ("noise", 1, 9, 5), ("special", 3, 32, 32),
         ("special", 1, 6, 7), ("smooth", 3, 64, 48)]


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_value_operations_equal_pillow(shape):
    levels = byte_images(*shape)
    each = torch.arange(len(levels))
    bits, threshold = 1 + each % 8, (each*11) % 257
    assert off(am.equalize(levels), [ImageOps.equalize(p) for p in pictures(levels)]).max() == 0
    peers = [ImageOps.posterize(p, b) for p, b in zip(pictures(levels), bits.tolist(), strict=True)]
    assert off(am.posterize(levels, bits), peers).max() == 0
    peers = [ImageOps.solarize(p, t) for p, t in zip(pictures(levels), threshold.tolist(), strict=True)]
    assert off(am.solarize(levels, threshold), peers).max() == 0
    peers = [ImageOps.autocontrast(p) for p in pictures(levels)]
    assert off(am.autocontrast(levels), peers).max() <= 1 # Pillow rounds its scale and offset first


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
def test_geometry_equals_pillow_within_one_level(shape, name):
    levels = byte_images(*shape)
    height, width = levels.shape[2:]
    level = torch.linspace(.1, 10, len(levels))
    sign = torch.where(torch.arange(len(levels)) % 2 == 0, 1., -1.)
    peers = [official(name, p, a, s) for p, a, s in zip(pictures(levels), level.tolist(), sign.tolist(), strict=True)]
    away = off(am.apply_operation(name, levels, level, sign), peers)
    exact = name.startswith("translate")
    assert away.max() <= (0 if exact else 1) and (away > 0).float().mean() < .02


@pytest.mark.parametrize("shape", [s for s in SIZES if s[1] == 3], ids=str)
@pytest.mark.parametrize("name", am.ENHANCEMENTS)
def test_enhancements_equal_pillow_within_one_level(shape, name):
    levels = byte_images(*shape)
    level = torch.linspace(.1, 10, len(levels))
    peers = [official(name, p, a, 1) for p, a in zip(pictures(levels), level.tolist(), strict=True)]
    away = off(am.apply_operation(name, levels, level), peers)
    assert away.max() <= 1 and (away > 0).float().mean() < .01


def official(name, picture, level, sign):
    "One operation at one strength, as AugMix defines them on Pillow images"
    width, height = picture.size
    bilinear = Image.Resampling.BILINEAR
    def bent(*matrix): return picture.transform(picture.size, Image.Transform.AFFINE, matrix, resample=bilinear)
    level = float(np.float32(level))
    if name == "autocontrast": return ImageOps.autocontrast(picture)
    if name == "equalize": return ImageOps.equalize(picture)
    if name == "posterize": return ImageOps.posterize(picture, 4 - int(level*4/10))
    if name == "solarize": return ImageOps.solarize(picture, 256 - int(level*256/10))
    if name == "rotate": return picture.rotate(sign*int(level*30/10), resample=bilinear)
    if name == "shear_x": return bent(1, sign*level*.3/10, 0, 0, 1, 0)
    if name == "shear_y": return bent(1, 0, 0, sign*level*.3/10, 1, 0)
    if name == "translate_x": return bent(1, 0, sign*int(level*(width/3)/10 + 1e-6), 0, 1, 0)
    if name == "translate_y": return bent(1, 0, 0, 0, 1, sign*int(level*(height/3)/10 + 1e-6))
    return getattr(ImageEnhance, name.capitalize())(picture).enhance(level*1.8/10 + .1)


@pytest.mark.parametrize("all_ops", [False, True])
def test_augmix_replayed_one_image_at_a_time_in_pillow(all_ops):
    "The whole of AugMix from the same random table, image by image, chain by chain"
    levels = byte_images("smooth", 3, 32, 32, n=40)
    severity, width, steps = 3., 3, 3
    names = am.OPERATIONS + am.ENHANCEMENTS if all_ops else am.OPERATIONS
    got = am.augmix(levels/255, severity=severity, all_ops=all_ops, generator=seeded(9))*255
    draws = torch.rand(len(levels), width*(2 + 3*steps) + 2, generator=seeded(9))
    gammas = -torch.log1p(-draws[:, :width + 2].double())
    weights = gammas[:, :width]/gammas[:, :width].sum(1, keepdim=True)
    share = gammas[:, width]/gammas[:, width:].sum(1)
    table = draws[:, width + 2:].view(-1, width, 1 + 3*steps)
    want = []
    for i, picture in enumerate(pictures(levels)):
        mixed = np.zeros((3, 32, 32))
        for chain in range(width):
            image = picture
            for step in range(1 + int(table[i, chain, 0]*3)):
                kind, level, side = table[i, chain, 1 + 3*step:4 + 3*step]
                level = (.1 + level*(severity - .1)).item()
                image = official(names[int(kind*len(names))], image, level, -1. if side < .5 else 1.)
            mixed += weights[i, chain].item()*np.array(image).transpose(2, 0, 1)
        want.append((1 - share[i].item())*levels[i].numpy() + share[i].item()*mixed)
    away = (got - torch.tensor(np.stack(want))).abs()
    assert away.mean() < .1 and away.quantile(.99) < 1.5 # rounding by one level, spread by later operations


def test_augmix_edges():
    images, _ = batch()
    assert torch.equal(am.augmix(images, depth=0), images)
    assert am.augmix(images[:0]).shape == (0, 3, 16, 16)
    for tiny in (torch.rand(2, 3, 1, 1), torch.rand(2, 1, 2, 5), torch.zeros(3, 3, 8, 8), torch.ones(3, 1, 8, 8)):
        out = am.augmix(tiny, all_ops=True, severity=10)
        assert out.shape == tiny.shape and out.isfinite().all() and 0 <= out.min() and out.max() <= 1
    assert am.augmix(images.double()).dtype == torch.float64
    strong, weak = (am.augmix(images, severity=s, generator=seeded(1)) - images for s in (10, 1))
    assert strong.abs().mean() > weak.abs().mean()


@pytest.mark.parametrize("wrong", [dict(width=0), dict(depth=-2), dict(severity=0), dict(severity=11), dict(alpha=0),
                                   dict(severity=math.nan)])
def test_augmix_refuses(wrong):
    with pytest.raises(SadalibError, match="expected"): am.augmix(batch()[0], **wrong)


@pytest.mark.parametrize("make", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
@pytest.mark.parametrize("wrong", [torch.rand(3, 8, 8), torch.rand(2, 8, 8, 3), torch.rand(2, 4, 8, 8),
                                   torch.zeros(2, 3, 8, 8, dtype=torch.uint8)])
def test_augmentations_refuse_other_images(make, wrong):
    with pytest.raises(SadalibError, match="expected"): make(wrong)


@pytest.mark.parametrize("alpha", [.01, .1, .5, 1., 2.5, 40., 1000.])
def test_gamma_draws_invert_the_distribution_function(alpha):
    gamma = pytest.importorskip("scipy.stats").gamma
    uniform = torch.linspace(1e-4, 1 - 1e-4, 201, dtype=torch.float64)
    got, want = am.log_gamma_draws(uniform, alpha).exp().numpy(), gamma.ppf(uniform.numpy(), alpha)
    visible = want > 1e-250
    np.testing.assert_allclose(got[visible], want[visible], rtol=1e-6)
    assert am.log_gamma_draws(torch.tensor([0., 1 - 2**-24]), alpha).isfinite().all()


# What every augmentation promises ------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_same_generator_same_images_and_global_state_untouched(make, channels):
    images, _ = batch(channels=channels, height=15, width=18)
    before, kept = torch.random.get_rng_state(), images.clone()
    first, second = (make(images, generator=seeded(4)) for _ in range(2))
    make(images) # without a generator
    assert torch.equal(torch.random.get_rng_state(), before) and torch.equal(images, kept)
    assert torch.equal(first, second) and first.shape == images.shape
    assert first.isfinite().all() and not first.requires_grad
    assert not torch.equal(first, make(images, generator=seeded(5)))
    assert not torch.equal(make(images), make(images))


@pytest.mark.parametrize("make", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_a_part_of_the_batch_sees_what_the_whole_batch_would(make):
    images, _ = batch(n=12)
    whole = make(images, generator=seeded(6))
    parts = [make(images[a:b], generator=Shard(seeded(6), a, b, 12)) for a, b in ((0, 5), (5, 6), (6, 12))]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)


@pytest.mark.parametrize("method", [m for m in METHODS if getattr(m, "per_image", True)], ids=str)
def test_methods_draw_the_same_on_parts(method):
    images, labels = batch(n=12)
    model = network().eval() # BatchNorm by running statistics: rows do not meet
    whole = method.loss(model, images, labels, generator=seeded(7))["total"]
    def part(a, b): return method.loss(model, images[a:b], labels[a:b], generator=Shard(seeded(7), a, b, 12))["total"]
    assert torch.allclose((part(0, 6) + part(6, 12))/2, whole, atol=1e-5)


# RandConv ------------------------------------------------------------------------------------------------------------

def test_random_convolution_equals_a_loop_over_images():
    images, sizes = batch(n=20)[0], (1, 3, 5, 7)
    got = bl.random_convolution(images, mix=True, generator=seeded(8))
    generator = seeded(8)
    chances, taps = torch.rand(20, 3, generator=generator), torch.randn(20, 3, 3, 7, 7, generator=generator)
    for i, image in enumerate(2*images - 1):
        size = sizes[int(chances[i, 0]*4)]
        edge = (7 - size)//2
        kernel = taps[i, :, :, edge:7 - edge, edge:7 - edge]/math.sqrt(3*size**2)
        made = F.conv2d(image[None], kernel, padding=size//2)[0]
        want = chances[i, 1]*image + (1 - chances[i, 1])*made
        assert torch.allclose(got[i], want/2 + .5, atol=1e-5)


def test_random_convolution_keeps_variance_and_obeys_its_switches():
    images, _ = batch(n=600, height=8, width=8)
    out = bl.random_convolution(images, kernel_sizes=(1,), generator=seeded(1))
    assert (2*out - 1).square().mean().item() == pytest.approx((2*images - 1).square().mean().item(), rel=.15)
    assert torch.equal(bl.random_convolution(images, identity_prob=1., generator=seeded(1)), images)
    kept = (bl.random_convolution(images, identity_prob=.5, generator=seeded(1)) == images).flatten(1).all(1)
    assert .4 < kept.float().mean() < .6
    clamped = bl.random_convolution(images, clamp=True, generator=seeded(1))
    assert 0 <= clamped.min() and clamped.max() <= 1
    twins = images[:1].expand(5, -1, -1, -1)
    shared, own = (bl.random_convolution(twins, per_image=p, generator=seeded(2)) for p in (False, True))
    assert torch.allclose(shared, shared[:1].expand_as(shared), atol=1e-6)
    assert not torch.allclose(own[0], own[1], atol=1e-2)


@pytest.mark.parametrize("wrong", [dict(kernel_sizes=(2,)), dict(kernel_sizes=()), dict(kernel_sizes=(-1,)),
                                   dict(identity_prob=1.5)])
def test_random_convolution_refuses(wrong):
    with pytest.raises(SadalibError, match="expected"): bl.random_convolution(batch()[0], **wrong)


# Spectral noise ------------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 13), st.integers(1, 13), st.sampled_from([1, 3]), st.integers(0, 7))
def test_spectral_noise_scales_amplitudes_and_keeps_phases(height, width, channels, steps):
    images = .45 + .1*torch.rand(3, channels, height, width, generator=seeded(height, width)) # far from 0 and 1
    noisy = bl.spectral_noise(images, steps=steps, step_size=.02, generator=seeded(3))
    ratio = torch.fft.fft2(noisy.double())/torch.fft.fft2(images.double())
    strong = torch.fft.fft2(images.double()).abs() > 1e-3
    reach = torch.tensor([1.02**k*.98**(steps - k) for k in range(steps + 1)], dtype=torch.float64)
    away = (ratio[strong].real.unsqueeze(-1) - reach).abs().amin(-1)
    assert ratio[strong].imag.abs().max() < 2e-3 and away.max() < 2e-3
    assert torch.allclose(bl.spectral_noise(images, steps=0), images, atol=1e-5)


def test_spectral_noise_is_uniform_over_frequencies_and_signs_balance():
    images = .5 + .01*torch.randn(400, 1, 8, 8, generator=seeded(1))
    noisy = bl.spectral_noise(images, steps=1, step_size=.1, generator=seeded(2))
    ratio = (torch.fft.fft2(noisy)/torch.fft.fft2(images)).real
    assert (ratio[..., 1:, 1:] > 1).float().mean((0, 1)).sub(.5).abs().max() < .13
    rough = bl.spectral_noise(images, radius=.1, generator=seeded(2))
    mean = (torch.fft.fft2(rough)/torch.fft.fft2(images)).real[:, 0, 0, 0]
    assert .89 < mean.min() and mean.max() < 1.11 and mean.std().item() == pytest.approx(.1/3**.5, rel=.1)


@pytest.mark.parametrize("norm", [.01, .5, 2., 5.])
def test_spectral_noise_has_the_norm_asked_for_after_clamping(norm):
    images = (batch(n=16)[0]*2 - .5).clamp(0, 1) # many pixels at 0 and 1
    for options in ({}, dict(init="dc", brightness=.6), dict(radius=.5)):
        noisy = bl.spectral_noise(images, norm=norm, generator=seeded(3), **options)
        assert torch.allclose((noisy - images).flatten(1).norm(dim=1), torch.full((16,), norm), rtol=2e-3)
    each = torch.linspace(0, norm, 16)
    distance = (bl.spectral_noise(images, norm=each, generator=seeded(3)) - images).flatten(1).norm(dim=1)
    assert torch.allclose(distance, each, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("share", [.05, .5, .9, .99])
def test_move_by_equals_bisection_where_most_pixels_saturate(share):
    images = (batch(n=8)[0]*2 - .5).clamp(0, 1)
    change = torch.randn(images.shape, generator=seeded(1)).pow(5) # speeds over ten orders of magnitude
    norm = share*(torch.where(change > 0, 1 - images, images)).flatten(1).norm(dim=1) # of the farthest reachable
    got = move_by(images, change, norm)
    low, high = torch.zeros(8, dtype=torch.float64), torch.full((8,), 1e12, dtype=torch.float64)
    for _ in range(200):
        middle = (low + high)/2
        made = (images + middle.view(-1, 1, 1, 1)*change).clamp(0, 1)
        below = (made - images).flatten(1).norm(dim=1) < norm
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    assert torch.allclose((got - images).flatten(1).norm(dim=1), norm, rtol=2e-3)
    if share < .99: assert torch.allclose(got.double(), made, atol=5e-3)


def test_colour_start_and_brightness_follow_sada():
    images = .05 + .02*torch.rand(500, 3, 4, 4, generator=seeded(0))
    ratio = bl.spectral_noise(images, steps=0, init="dc", generator=seeded(1)).mean((2, 3))/images.mean((2, 3))
    assert 1 <= ratio.min() + 1e-5 and ratio.max() < 5 + 1e-5 and ratio.mean().item() == pytest.approx(3, abs=.1)
    assert torch.corrcoef(ratio.T).fill_diagonal_(0).abs().max() < .2 # a start for each channel
    gain = bl.spectral_noise(images, steps=0, brightness=.6, generator=seeded(1))/images
    assert gain.flatten(1).std(1).max() < 1e-4 and gain.min() > 1 - 1e-5 and gain.max() < 1.6 + 1e-5
    assert gain.mean().item() == pytest.approx(1.3, abs=.03)


def test_move_by_goes_as_far_as_it_can_and_no_further():
    images = batch(n=4)[0]
    change = torch.ones_like(images)
    assert torch.equal(move_by(images, change, 1e6), torch.ones_like(images)) # cannot be reached: all white
    assert torch.equal(move_by(images, 0*change, 3.), images) # no direction
    assert torch.equal(move_by(images, change, 0.), images)
    black = torch.zeros(2, 3, 8, 8)
    assert torch.equal(bl.spectral_noise(black, norm=2.), black) # nothing to scale: amplitudes are zero


@pytest.mark.parametrize("wrong", [dict(norm=torch.ones(3)), dict(init="uniform"), dict(steps=-1)])
def test_spectral_noise_refuses(wrong):
    with pytest.raises(SadalibError, match="expected"): bl.spectral_noise(batch()[0], **wrong)


# Methods -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_methods_give_finite_terms_and_leave_the_rest_alone(method, channels):
    images, labels = batch(channels=channels)
    model, kept, state = network(channels), images.clone(), torch.random.get_rng_state()
    flags = [m.training for m in model.modules()]
    terms = method.loss(model, images, labels, generator=seeded(1))
    assert all(t.ndim == 0 and t.isfinite() for t in terms.values()) and terms["total"].requires_grad
    assert torch.equal(torch.random.get_rng_state(), state) and torch.equal(images, kept)
    assert [m.training for m in model.modules()] == flags
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model[1].num_batches_tracked == 1 # one training pass: attacks and views cost BatchNorm nothing more
    terms["total"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    again = method.loss(network(channels), images, labels, generator=seeded(1))
    assert set(again) == set(terms) and all(torch.equal(again[k], terms[k]) for k in terms)


@pytest.mark.parametrize("method", UNCHANGED, ids=str)
def test_methods_of_no_strength_are_erm(method):
    images, labels = batch()
    with frozen(network()) as model:
        want = ERM().loss(model, images, labels)["total"]
        got = method.loss(model, images, labels, generator=seeded(1))["total"]
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: AugMix(views=0), lambda: RandConv(views=0), lambda: SpectralNoise(views=0),
                                  lambda: PGDTraining(mix=2), lambda: PGDTraining(eps=-1),
                                  lambda: PGDTraining(eps=math.nan)])
def test_methods_refuse_when_they_are_built(make):
    with pytest.raises(SadalibError, match="expected"): make()


def test_names_differ():
    assert len({m.name for m in METHODS}) == 5
