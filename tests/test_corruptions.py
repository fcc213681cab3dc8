"""Corruptions: shapes, determinism, severities, and slow references written from the definitions."""
import colorsys
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from sadalib import corruptions as made
from sadalib.corruptions import FIDELITY, PARAMETERS, corrupt, regenerated
from sadalib.data import CORRUPTIONS, EXTRA_CORRUPTIONS, load
from sadalib.runs import SadalibError, Shard, rand, seeded

NAMES = (*CORRUPTIONS, *EXTRA_CORRUPTIONS)


@pytest.fixture(scope="module")
def photos():
    return load("digits_photo", "test", limit=40).images


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def distance(a, b):
    return (a.double() - b.double()).flatten(1).norm(dim=1).mean().item()


def test_every_corruption_has_five_settings_and_says_how_near_it_is():
    assert set(NAMES) == set(PARAMETERS) == set(FIDELITY)
    assert all(len(v) == 5 for v in PARAMETERS.values())
    kinds = ("exact formula", "same distribution, other random numbers", "approximation")
    assert all(v.startswith(kinds) for v in FIDELITY.values())


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_the_same_shape_whatever_the_size(name):
    for shape, severity in itertools.product(((2, 3, 32, 32), (2, 1, 28, 28), (1, 3, 8, 21), (1, 1, 40, 9)), (1, 3, 5)):
        images = noise(*shape)
        before = images.clone()
        out = corrupt(images, name, severity, generator=seeded(0))
        assert out.dtype == torch.uint8 and out.shape == images.shape and torch.equal(images, before)
    assert corrupt(images[:0], name, 1).shape == (0, 1, 40, 9)


@pytest.mark.parametrize("name", NAMES)
def test_image_i_gets_the_same_numbers_in_any_batch(name, photos):
    whole = corrupt(photos[:9], name, 4, generator=seeded(7))
    assert torch.equal(whole, corrupt(photos[:9], name, 4, generator=seeded(7)))
    assert torch.equal(whole[:2], corrupt(photos[:2], name, 4, generator=seeded(7)))
    halves = [corrupt(photos[a:b], name, 4, generator=Shard(seeded(7), a, b, 9)) for a, b in ((0, 4), (4, 9))]
    assert torch.equal(whole, torch.cat(halves))
    strange = photos[:9].contiguous(memory_format=torch.channels_last)
    assert torch.equal(whole, corrupt(strange, name, 4, generator=seeded(7)))
    if not FIDELITY[name].startswith("exact"):
        assert not torch.equal(whole, corrupt(photos[:9], name, 4, generator=seeded(8)))


@pytest.mark.parametrize("name", NAMES)
def test_a_large_batch_gives_the_same_bytes(name):
    images = load("digits", "test", limit=120).images # large constant areas, where rounding would show
    few = corrupt(images[:3], name, 3, generator=seeded(0))
    assert torch.equal(few, corrupt(images, name, 3, generator=seeded(0))[:3])


def test_parts_do_not_show():
    images = noise(260, 1, 8, 8)
    whole = corrupt(images, "fog", 2, generator=seeded(0))
    sources = made._sources(260, seeded(0))
    assert torch.equal(whole[250:], made._bytes(made._fog(images[250:], PARAMETERS["fog"][1], sources[250:])))


def test_the_global_generator_stays():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for name in NAMES: corrupt(noise(1, 3, 8, 8), name, 5)
    assert torch.equal(torch.get_rng_state(), before)


# elastic transforms and glass blur trade one effect for another, frost darkens what it covers, pixels may fit a grid
UNSTEADY = ("elastic_transform", "glass_blur", "frost", "saturate", "spatter", "motion_blur", "pixelate")


@pytest.mark.parametrize("name", NAMES)
def test_severity_raises_the_distance_to_clean(name, photos):
    far = [distance(corrupt(photos, name, s, generator=seeded(1)), photos) for s in range(1, 6)]
    assert far[0] > 0
    if name not in UNSTEADY: assert far == sorted(far), far
    elif name != "elastic_transform": assert far[4] > far[0], far


@pytest.mark.parametrize(("arguments", "says"), [
    (("fogg", 1), "did you mean `fog`"), (("fog", 0), "1 \\(weak\\) to 5"), (("fog", 6), "severity is 6"),
    (("fog", True), "severity is True"), (("fog", 2.5), "severity is 2.5"), (("fog", "3"), "severity is '3'")])
def test_bad_names_and_severities(arguments, says):
    with pytest.raises(SadalibError, match=says): corrupt(noise(1, 3, 8, 8), *arguments)


@pytest.mark.parametrize(("images", "says"), [
    (torch.rand(1, 3, 8, 8), "float32"), (np.zeros((1, 3, 8, 8), np.uint8), "ndarray"), (noise(3, 8, 8), "N, C, H, W"),
    (noise(1, 2, 8, 8), "1 or 3 channels"), (noise(1, 3, 7, 8), "at least 8 pixels")])
def test_bad_images(images, says):
    with pytest.raises(SadalibError, match=says): corrupt(images, "fog", 1)


def test_glass_is_the_published_loop_with_its_swap_that_copies():
    images, source = noise(2, 3, 12, 9), made._sources(2, seeded(5))
    fast = made._shuffled(images, source)
    back = torch.cat([rand(1, 2, 12, 9, generator=g) for g in made._sources(2, seeded(5))]) < .5
    for k in range(2):
        slow = images[k].permute(1, 2, 0).numpy().copy()
        for h in range(11, 1, -1):
            for w in range(8, 1, -1):
                there = h - int(back[k, 0, h, w]), w - int(back[k, 1, h, w])
                slow[h, w] = slow[there] # what a swap of two numpy views comes to
        assert torch.equal(fast[k], torch.from_numpy(slow).permute(2, 0, 1))


def test_streaks_pixel_by_pixel():
    x, radius, sigma = noise(3, 1, 9, 12).double(), 4, 2.
    angles = torch.tensor([-40., 12., -100.], dtype=torch.float64)
    weights = [math.exp(-i*i/2/sigma**2) for i in range(2*radius + 1)]
    slow = torch.zeros_like(x)
    for k, y, col in itertools.product(range(3), range(9), range(12)):
        for i, weight in enumerate(weights):
            dy, dx = (math.ceil(i*f(math.radians(angles[k])) - .5) for f in (math.sin, math.cos))
            slow[k, 0, y, col] += weight/sum(weights)*x[k, 0, min(max(y + dy, 0), 8), min(max(col + dx, 0), 11)]
    assert (made._streak(x, radius, sigma, angles) - slow).abs().max() < 1e-3


def test_zoom_is_scipys():
    for size, factor in itertools.product((32, 28, 9), (1., 1.01, 1.13, 1.25, 1.75, 2.25)):
        x = torch.rand(size, size, dtype=torch.float64, generator=seeded(size))
        crop = math.ceil(size/factor)
        top = (size - crop)//2
        big = ndimage.zoom(x[top:top + crop, top:top + crop].numpy(), factor, order=1)
        trim = (len(big) - size)//2
        np.testing.assert_allclose(made._zoom(x, factor), big[trim:trim + size, trim:trim + size], atol=1e-9)


@pytest.mark.parametrize(("sigma", "truncate", "border"), [
    (.4, 4., "nearest"), (1., 4., "nearest"), (6.4, 3., "reflect"), (9., 3., "reflect")])
def test_smoothing_is_scipys(sigma, truncate, border):
    x = torch.rand(11, 17, dtype=torch.float64, generator=seeded(1))
    np.testing.assert_allclose(made._smooth(x, sigma, truncate, border),
                               ndimage.gaussian_filter(x.numpy(), sigma, mode=border, truncate=truncate), atol=1e-12)


def test_clouds_point_by_point():
    fast = made._plasma(made._sources(1, seeded(2)), 8, 8, 2., torch.zeros(1))[0, 0]
    u = 2*rand(1, 8, 8, generator=made._sources(1, seeded(2))[0])[0].double() - 1
    slow, step, wibble = torch.zeros(8, 8, dtype=torch.float64), 8, 100.
    while step > 1:
        half = step//2
        squares = list(itertools.product(range(half, 8, step), repeat=2))
        rows = [(i, j) for i in range(0, 8, step) for j in range(half, 8, step)]
        for points, around in ((squares, ((-half, -half), (-half, half), (half, -half), (half, half))),
                               (rows + [(j, i) for i, j in rows], ((-half, 0), (half, 0), (0, -half), (0, half)))):
            new = {p: sum(slow[(p[0] + a) % 8, (p[1] + b) % 8] for a, b in around)/4 + wibble**2*u[p] for p in points}
            for p, value in new.items(): slow[p] = value
        step, wibble = half, wibble/2
    slow = (slow - slow.min())/(slow - slow.min()).max()
    assert (fast - slow).abs().max() < 1e-9


def test_photons_are_poissons():
    value, photons = 40, 100
    images = torch.full((8, 1, 64, 64), value, dtype=torch.uint8)
    counts = (made._shot_noise(images, photons, made._sources(8, seeded(0)))*photons).round().long().flatten()
    rate = value*photons/255
    expected = [math.exp(k*math.log(rate) - rate - math.lgamma(k + 1)) for k in range(5, 30)]
    seen = torch.bincount(counts, minlength=30)[5:30]/len(counts)
    assert (seen - torch.tensor(expected)).abs().max() < .005
    assert made._shot_noise(images*0, photons, made._sources(8, seeded(0))).abs().max() == 0
    assert (made._shot_noise(images*0 + 255, 500, made._sources(8, seeded(0))).mean() - 1).abs() < .001


def test_noise_has_the_published_size():
    grey = torch.full((8, 3, 32, 32), 100, dtype=torch.uint8)
    for severity, sigma in enumerate(PARAMETERS["gaussian_noise"]):
        found = made._gaussian_noise(grey, sigma, made._sources(8, seeded(severity)))
        assert abs(found.std().item()/sigma - 1) < .03
    found = made._impulse_noise(grey, .07, made._sources(8, seeded(0)))
    assert abs((found == 0).double().mean() - .035) < .004 and abs((found == 1).double().mean() - .035) < .004


def test_colours_are_those_of_hsv():
    images = torch.cat([noise(1, 3, 8, 8), torch.full((1, 3, 8, 8), 90, dtype=torch.uint8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)])
    for c, amount in zip(PARAMETERS["saturate"], PARAMETERS["brightness"], strict=True):
        vivid, bright = made._saturate(images, c, []), made._brightness(images, amount, [])
        for k, y, x in itertools.product(range(3), range(8), range(8)):
            h, s, v = colorsys.rgb_to_hsv(*(images[k, :, y, x].double()/255).tolist())
            for found, want in ((vivid, (h, min(1, s*c[0] + c[1]), v)), (bright, (h, s, min(1, v + amount)))):
                assert found[k, :, y, x].tolist() == pytest.approx(colorsys.hsv_to_rgb(*want), abs=1e-9)


def test_three_points_move_and_an_elastic_image_is_its_own_at_rest():
    where = made._affine(made._sources(4, seeded(0)), 32, 32, 2.5, torch.zeros(1))
    there = where - made._pixels(32, 32, where)[..., :2]
    assert 0 < there[:, 6:27, 6:27].abs().max() < 8
    still = made._affine(made._sources(1, seeded(0)), 20, 33, 0., torch.zeros(1))
    images = noise(1, 3, 20, 33).float()
    assert (made._sampled(images, still, True) - images).abs().max() < 1e-2


def test_a_regenerated_set_says_so():
    clean = load("digits", "test", limit=5)
    found = regenerated(clean, "snow", 2, seed=1)
    assert "regenerated" in found.name and found.note == "regenerated" and torch.equal(found.labels, clean.labels)
    assert found.checksum == regenerated(clean, "snow", 2, seed=1).checksum != regenerated(clean, "snow", 2, seed=2).checksum
