"""Operations of Adversarial AutoAugment: Pillow's bytes, policies as a per-image loop, draws that do not depend on the split."""
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torchvision.transforms import functional as TF

from sadalib.advaa import ops
from sadalib.advaa.ops import (
    CIFAR_MEAN,
    LEVELS,
    OPERATIONS,
    apply_op,
    apply_ops,
    apply_policies,
    check_policies,
    crop_flip,
    effective_strength,
    final_cutout,
    level_value,
    preprocess,
)
from sadalib.runs import SadalibError, Shard, rand, randint, seeded

NAMES = list(OPERATIONS)
EXACT = NAMES[:14]
GREY = [n for n in EXACT if n != "Color"]
SIZES = [(32, 32), (28, 28), (33, 47), (224, 160)]
EDGES = [(1, 1), (1, 9), (9, 1), (2, 2), (2, 7), (3, 3), (3, 10), (30, 20)]


def pillow(name, picture, level, sign=1, centre=(1., 1.)):
    "What the published code does to one picture, written with Pillow alone"
    op = OPERATIONS[name]
    value, (w, h) = level/9*(op.high - op.low) + op.low, picture.size
    value = sign*value if op.signed else value
    moves = {"ShearX": (1, value, 0, 0, 1, 0), "ShearY": (1, 0, 0, value, 1, 0),
             "TranslateX": (1, 0, value*w, 0, 1, 0), "TranslateY": (1, 0, 0, 0, 1, value*h)}
    if name in moves: return picture.transform((w, h), Image.Transform.AFFINE, moves[name])
    if name == "Rotate": return picture.rotate(value)
    if name in ("AutoContrast", "Invert", "Equalize"): return getattr(ImageOps, name.lower())(picture)
    if name == "Solarize": return ImageOps.solarize(picture, value)
    if name == "Posterize": return ImageOps.posterize(picture, int(value))
    if name in ("Contrast", "Color", "Brightness", "Sharpness"): return getattr(ImageEnhance, name)(picture).enhance(value)
    if name == "Cutout" and value > 0:
        x, y = (int(max(0, c - value*w/2.)) for c in centre)
        picture = picture.copy()
        ImageDraw.Draw(picture).rectangle((x, y, min(w, x + value*w), min(h, y + value*w)), (125, 123, 114))
    return picture


def to_pillow(x):
    return Image.fromarray(x[0].numpy() if len(x) == 1 else x.permute(1, 2, 0).contiguous().numpy())


def from_pillow(picture):
    x = torch.from_numpy(np.array(picture))
    return x.unsqueeze(0) if x.ndim == 2 else x.permute(2, 0, 1)


def adversarial(height, width, channels=3):
    "Random, low-contrast, constant, two-valued, gradient and single-pixel images"
    g = seeded("images", height, width)
    noise = randint(0, 256, 2, channels, height, width, generator=g)
    soft = randint(120, 131, 1, channels, height, width, generator=g)
    flat = torch.tensor([0, 137, 255]).view(3, 1, 1, 1).expand(3, channels, height, width)
    two = torch.where(noise[:1] < 100, 7, 201)
    ramp_x = torch.linspace(0, 255, width).long().expand(1, channels, height, width)
    ramp_y = torch.linspace(3, 254, height).long().unsqueeze(1).expand(1, channels, height, width)
    spark = torch.zeros(1, channels, height, width).long()
    spark[:, 0, height//2, width//3] = 255
    return torch.cat([noise, soft, flat, two, ramp_x, ramp_y, spark]).byte()


def combinations(name):
    return [(level, sign) for level in range(LEVELS) for sign in ((1, -1) if OPERATIONS[name].signed else (1,))]


def assert_equal_to_pillow(name, images):
    for some in torch.tensor(combinations(name)).split(5): # all levels and signs, different ones in one batch
        rows = images.repeat(len(some), 1, 1, 1)
        levels, signs = (c.repeat_interleave(len(images)) for c in some.unbind(1))
        ours = apply_op(rows, name, levels, signs)
        for x, y, level, sign in zip(rows, ours, levels.tolist(), signs.tolist(), strict=True):
            assert torch.equal(y, from_pillow(pillow(name, to_pillow(x), level, sign))), (name, level, sign)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_bytes_are_pillows(name, size):
    images = adversarial(*size)
    assert_equal_to_pillow(name, images[[0, 2, 6, 9]] if size[0] > 100 else images)


@pytest.mark.parametrize("size", EDGES, ids=str)
def test_bytes_are_pillows_at_the_smallest_sizes(size):
    for name in EXACT: assert_equal_to_pillow(name, adversarial(*size)[[0, 4, 9]])


@pytest.mark.parametrize("size", [(28, 28), (1, 5), (12, 17)], ids=str)
def test_bytes_are_pillows_with_one_channel(size):
    for name in GREY: assert_equal_to_pillow(name, adversarial(*size, channels=1)[[0, 2, 4, 6, 9]])


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(EXACT), st.integers(0, 9), st.sampled_from([1, -1]), st.integers(1, 70), st.integers(1, 70),
       st.integers(0, 10**6), st.integers(1, 256))
def test_bytes_are_pillows_at_any_size(name, level, sign, height, width, seed, values):
    x = randint(0, values, 1, 3, height, width, generator=seeded(seed)).byte()
    assert torch.equal(apply_op(x, name, level, sign)[0], from_pillow(pillow(name, to_pillow(x[0]), level, sign)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(1, 70), st.integers(1, 70), st.floats(1, 70), st.floats(1, 70))
def test_cutout_is_pillows_rectangle(level, height, width, x, y):
    images, centre = torch.full((1, 3, height, width), 9).byte(), (min(x, float(width)), min(y, float(height)))
    expected = from_pillow(pillow("Cutout", to_pillow(images[0]), level, centre=centre))
    assert torch.equal(apply_op(images, "Cutout", level, centres=[centre])[0], expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.integers(0, 10**6))
def test_sample_pairing_is_pillows_blend(level, seed):
    x, pool = (randint(0, 256, n, 3, 9, 7, generator=seeded(seed, n)).byte() for n in (2, 5))
    ours = apply_op(x, "SamplePairing", level, pool=pool, partners=[4, 1])
    for image, other, out in zip(x, pool[[4, 1]], ours, strict=True):
        assert torch.equal(out, from_pillow(Image.blend(to_pillow(image), to_pillow(other), level/9*.4)))


def golden():
    folder = os.environ.get("SADALIB_GOLDEN")
    if not folder or not (Path(folder)/"advaa_ops.npz").is_file():
        pytest.skip("advaa_ops.npz is not at hand: set SADALIB_GOLDEN to the folder that holds it")
    return np.load(Path(folder)/"advaa_ops.npz", allow_pickle=False)


def test_parity_with_the_published_code():
    g = golden()
    images, centres = torch.tensor(g["images"]).permute(0, 3, 1, 2), torch.tensor(g["cutout_centres_xy"])
    assert g["op_names"].tolist() == NAMES[:15]
    for k, name in enumerate(NAMES[:15]):
        for i, level in enumerate(g["levels"].tolist()):
            value = g["values"][k, i]
            assert level_value(name, level) == (int(value) if name == "Posterize" else value)
            ours = apply_op(images, name, level, int(g["sign"]), centres=centres)
            assert np.array_equal(ours.permute(0, 2, 3, 1).numpy(), g["outputs"][:, k, i]), (name, level)


# ---- the table

def test_strengths_straighten_levels():
    for name, op in OPERATIONS.items():
        s = [effective_strength(name, level) for level in range(LEVELS)]
        assert min(s) >= 0 and max(s) == 1
        if op.levels == "rises": assert s == [level/9 for level in range(LEVELS)]
        if op.levels == "reversed": assert s == [(9 - level)/9 for level in range(LEVELS)]
        if op.levels == "V-shaped": assert s == s[::-1] and np.argmin(s) == 4 and np.allclose(s, np.abs(np.arange(10) - 4.5)/4.5)
        if op.levels == "none": assert set(s) == {1.}
    table = effective_strength(torch.arange(16).unsqueeze(1), torch.arange(10))
    assert table.shape == (16, 10) and table[8, 0] == 1 and table[8, 9] == 0
    assert effective_strength("Rotate", torch.tensor([0, 9])).tolist() == [0, 1]


def test_zero_strength_changes_nothing():
    x = adversarial(20, 24)
    for name, op in OPERATIONS.items():
        for level in range(LEVELS):
            if effective_strength(name, level) == 0 and op.levels != "V-shaped": assert torch.equal(apply_op(x, name, level), x)
    assert torch.equal(apply_op(x, "Solarize", 0), apply_op(x, "Invert", 0))
    assert torch.equal(apply_op(apply_op(x, "Invert", 3), "Invert", 8), x)
    assert [level_value("Posterize", level) for level in range(LEVELS)] == [4, 4, 4, 5, 5, 6, 6, 7, 7, 8]


def test_centres_are_those_of_numpys_uniform():
    u = np.random.RandomState(5).random_sample((100, 2))
    r = np.random.RandomState(5)
    theirs = [[r.uniform(40), r.uniform(20)] for _ in range(100)]
    ours = ops._centres(torch.tensor(u), 20, 40)
    assert np.allclose(ours, theirs, rtol=0, atol=1e-12) and ours.min() >= 1
    area = [(apply_op(torch.zeros(1, 3, 32, 32).byte(), "Cutout", 9, generator=seeded(k)) > 0).sum().item()/3 for k in range(200)]
    assert max(area) == 49


# ---- operations side by side, policies

def some(n=6, height=16, width=20):
    return randint(0, 256, n, 3, height, width, generator=seeded("some", n)).byte()


def some_policies(copies=4, subpolicies=3, seed=0):
    ids, levels = (randint(0, k, copies, subpolicies, 2, generator=seeded("policies", seed, k)) for k in (16, 10))
    return torch.stack([ids, levels], -1)


def test_each_image_its_own_operation():
    x = some(48)
    ids, levels = torch.arange(48) % 16, torch.arange(48) % 10
    signs, centres = torch.where(torch.arange(48) % 3 == 0, -1, 1), 1 + 15*rand(48, 2, generator=seeded(1))
    partners = torch.arange(47, -1, -1)
    ours = apply_ops(x, ids, levels, signs, centres=centres, partners=partners)
    for i in range(48):
        mine = slice(i, i + 1)
        one = apply_op(x[mine], NAMES[ids[i]], int(levels[i]), int(signs[i]), centres=centres[mine], pool=x, partners=partners[mine])
        assert torch.equal(ours[i:i + 1], one), NAMES[ids[i]]


@pytest.mark.parametrize("seed", range(3))
def test_policies_equal_a_loop(seed):
    x, policies, (n, m) = some(), some_policies(seed=seed), (6, 4)
    g = seeded("loop", seed)
    choices, signs = randint(0, 3, n, m, generator=g), 2*randint(0, 2, n, m, 2, generator=g) - 1
    centres, partners = ops._centres(rand(n, m, 2, 2, generator=g), 16, 20), randint(0, n, n, m, 2, generator=g)
    ours = apply_policies(x, policies, choices, signs, centres=centres, partners=partners)
    assert ours.shape == (6, 4, 3, 16, 20) and ours.dtype == torch.uint8
    for i in range(n):
        for j in range(m):
            one = x[i:i + 1]
            for k, (op, level) in enumerate(policies[j, choices[i, j]].tolist()):
                one = apply_op(one, NAMES[op], level, int(signs[i, j, k]), centres=centres[i, j, k:k + 1], pool=x,
                               partners=partners[i, j, k:k + 1])
            assert torch.equal(ours[i, j], one[0])


def test_draws_are_those_documented():
    x, policies = some(), some_policies()
    g = seeded("draws")
    choices, signs = randint(0, 3, 6, 4, generator=g), 2*randint(0, 2, 6, 4, 2, generator=g) - 1
    assert torch.equal(apply_policies(x, policies, generator=seeded("draws")), apply_policies(x, policies, choices, signs, generator=g))


@pytest.mark.parametrize("cuts", [[0, 6], [0, 1, 6], [0, 2, 4, 6], [0, 1, 2, 3, 4, 5, 6]], ids=str)
def test_parts_of_a_batch_see_what_the_whole_sees(cuts):
    x, policies, pool = some(), some_policies(copies=8), some(9)
    whole = preprocess(x, policies, pool=pool, generator=seeded(0))
    parts = [preprocess(x[a:b], policies, pool=pool, generator=Shard(seeded(0), a, b, 6)) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert torch.equal(torch.cat(parts), whole)


def test_generators_decide_and_the_global_state_rests():
    x, policies, before = some(), some_policies(), torch.get_rng_state()
    numpy_before = np.random.get_state()[1].copy()
    a, b = (preprocess(x, policies, generator=seeded(1)) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, preprocess(x, policies, generator=seeded(2)))
    assert not torch.equal(preprocess(x, policies), preprocess(x, policies))
    for name in NAMES: apply_op(x, name, 5)
    assert torch.equal(torch.get_rng_state(), before) and (np.random.get_state()[1] == numpy_before).all()


def test_images_are_left_alone_and_memory_is_new():
    x = some()
    kept = x.clone()
    for name in NAMES:
        for level in (0, 9):
            out = apply_op(x, name, level, generator=seeded(0))
            out.zero_()
            assert torch.equal(x, kept), name
    apply_policies(x, some_policies(), generator=seeded(0)).zero_()
    crop_flip(x, padding=0, flip=False).zero_()
    assert torch.equal(x, kept)


def test_layout_and_empty_batches():
    x = some()
    strange = x.contiguous(memory_format=torch.channels_last)
    wide = torch.cat([x, x], 3)[..., 20:]
    for name in NAMES:
        assert torch.equal(apply_op(strange, name, 7, generator=seeded(0)), apply_op(x, name, 7, generator=seeded(0)))
        assert torch.equal(apply_op(wide, name, 7, generator=seeded(0)), apply_op(x, name, 7, generator=seeded(0)))
        assert apply_op(x[:0], name, 7).shape == (0, 3, 16, 20)
    assert apply_policies(x[:0], some_policies()).shape == (0, 4, 3, 16, 20)
    assert preprocess(x[:0], some_policies()).shape == (0, 4, 3, 16, 20)


def test_chunks_do_not_matter(monkeypatch):
    x, policies = some(), some_policies()
    expected = apply_policies(x, policies, generator=seeded(0))
    monkeypatch.setattr(ops, "_chunk", lambda images: 1)
    assert torch.equal(apply_policies(x, policies, generator=seeded(0)), expected)


# ---- around the policies

def test_crop_and_flip_are_torchvisions():
    x = some(40)
    ours = crop_flip(x, padding=3, generator=seeded(0))
    g = seeded(0)
    shift, mirror = randint(-3, 4, 40, 2, generator=g), randint(0, 2, 40, 1, generator=g)
    for image, out, (top, left), flipped in zip(x, ours, (3 + shift).tolist(), mirror.flatten().tolist(), strict=True):
        expected = TF.crop(TF.pad(image, 3), top, left, 16, 20)
        assert torch.equal(out, TF.hflip(expected) if flipped else expected)
    assert 0 < mirror.sum() < 40


def test_final_cutout_is_zero_after_normalisation():
    x = some(64, 32, 32)/255
    mean, std = torch.tensor(CIFAR_MEAN).view(1, 3, 1, 1), torch.tensor([.2023, .1994, .2010]).view(1, 3, 1, 1)
    out = (final_cutout(x, generator=seeded(0)) - mean)/std
    holes, plain = (out == 0).all(1), (x - mean)/std
    g = seeded(0)
    across, down = (randint(0, 32, 64, generator=g) for _ in range(2))
    for hole, cx, cy in zip(holes, across.tolist(), down.tolist(), strict=True):
        mask = torch.zeros(32, 32, dtype=torch.bool)
        mask[max(0, cy - 8):cy + 8, max(0, cx - 8):cx + 8] = True
        assert torch.equal(hole, mask)
    assert torch.equal(torch.where(holes.unsqueeze(1), 0., plain), out)
    assert torch.equal(final_cutout(x, size=0), x)


def test_copies_share_crop_and_flip():
    x, nothing = some(20, 32, 32), torch.tensor([[8, 9], [9, 9]]).expand(4, 1, 2, 2) # Solarize 9, Posterize 9: no change
    out = preprocess(x, nothing, cutout=0, generator=seeded(0))
    base = crop_flip(x, generator=seeded(0))
    assert torch.equal(out, (base.float()/255).unsqueeze(1).expand(-1, 4, -1, -1, -1))
    covered = preprocess(x, nothing, generator=seeded(0))
    assert (covered != out).any() and not torch.equal(covered[:, 0] != out[:, 0], covered[:, 1] != out[:, 1])


# ---- what is refused

def refuse(says, f, *args, **kwargs):
    with pytest.raises(SadalibError, match=says) as error: f(*args, **kwargs)
    text = str(error.value)
    assert "\n" not in text and len(text) < 300 and text.endswith((".", "?"))


def test_wrong_operations_levels_and_signs():
    x = some(3)
    refuse("did you mean `Color`", apply_op, x, "Colour", 3)
    refuse("did you mean `ShearX`|did you mean `ShearY`", apply_op, x, "Shear", 3)
    refuse("known are ShearX", apply_op, x, "zzz", 3)
    refuse("unknown", apply_op, x, 3, 3)
    for level in (10, -1, 3.5, "3", None, float("nan"), float("inf"), torch.tensor([0, 1, 10]), [1, 2, 3.2]):
        refuse("level is .*0 to 9 are expected", apply_op, x, "Rotate", level)
    refuse(r"level has shape \(2,\), but \(3,\)", apply_op, x, "Rotate", torch.tensor([1, 2]))
    for sign in (0, 2, -3, .5, torch.tensor([1, -1, 0])):
        refuse("sign is .*1 or -1 is expected", apply_op, x, "Rotate", 3, sign)
    refuse("operation is 16, but whole numbers from 0 to 15", apply_ops, x, torch.tensor([0, 16, 1]), 3)
    refuse("level is 12", level_value, "Rotate", 12)
    refuse("unknown", level_value, "Rotates much", 2)
    refuse("level is -1", effective_strength, "Rotate", -1)
    assert apply_op(x, "Rotate", torch.tensor([1., 2., 9.]), torch.tensor([1., -1., 1.])).shape == x.shape


def test_wrong_images():
    refuse("images are torch.float32, but uint8", apply_op, some(2)/255, "Rotate", 3)
    refuse("images are ndarray", apply_op, some(2).numpy(), "Rotate", 3)
    refuse("add the batch dimension", apply_op, some(2)[0], "Rotate", 3)
    refuse("1 or 3 channels", apply_op, some(2).permute(0, 2, 3, 1), "Rotate", 3)
    refuse("Color needs 3", apply_op, some(2)[:, :1], "Color", 3)
    refuse("Color needs 3", apply_policies, some(2)[:, :1], torch.full((2, 1, 2, 2), 9).index_fill(3, torch.tensor(0), 11))
    refuse("images are torch.float32", crop_flip, some(2)/255)
    refuse("padding is -1", crop_flip, some(2), padding=-1)
    refuse("divide bytes by 255", final_cutout, some(2))
    refuse("even number", final_cutout, some(2)/255, size=7)
    refuse("fill holds 1 numbers", final_cutout, some(2)/255, fill=(.5,))
    grey = apply_op(some(2)[:, :1], "Cutout", 9, generator=seeded(0))
    assert (grey == 123).any()


def test_wrong_policies_and_draws():
    x, policies = some(3), some_policies()
    for bad in (policies[0], policies[..., 0], policies[:, :, :1], policies[:0], torch.zeros(2, 5, 4), "policies", None):
        refuse(r"policies have shape .*\(M, Q, 2, 2\) is expected", check_policies, bad)
    refuse("level is 10", check_policies, torch.full((1, 1, 2, 2), 10))
    refuse("operation is 16", apply_policies, x, torch.full((1, 1, 2, 2), 16))
    refuse("choice is 3", apply_policies, x, policies, torch.full((3, 4), 3))
    refuse(r"choice has shape \(4, 3\)", apply_policies, x, policies, torch.zeros(4, 3))
    refuse("sign is 0", apply_policies, x, policies, None, torch.zeros(3, 4, 2))
    refuse("crop or resize", apply_op, x, "SamplePairing", 3, pool=some(3, 8, 8))
    refuse("partners is 3", apply_op, x, "SamplePairing", 3, partners=[0, 1, 3])
    refuse("centres have shape", apply_op, x, "Cutout", 3, centres=torch.zeros(3))
    refuse("centres have shape", apply_op, x, "Cutout", 3, centres=torch.full((3, 2), float("nan")))
    refuse("pass `pool`", apply_op, x, "SamplePairing", 3, generator=Shard(seeded(0), 0, 3, 6))
    assert apply_policies(x, policies.tolist(), generator=seeded(0)).shape[:2] == (3, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the same bytes on a GPU are not checked")
def test_a_gpu_gives_the_same_bytes_without_waiting():
    x, policies = some(64, 32, 32), some_policies(8, 5)
    expected = preprocess(x, policies, generator=seeded(0)).mul(255).round()
    y, pool = x.cuda(), x.cuda()
    preprocess(y, policies, pool=pool, generator=seeded(0))
    torch.cuda.set_sync_debug_mode("error")
    try: copies = preprocess(y, policies, generator=seeded(0))
    finally: torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(copies.cpu().mul(255).round(), expected)
    for name in NAMES:
        for level in range(LEVELS):
            ours = [apply_op(t, name, level, -1, generator=seeded(0)).cpu() for t in (x, y)]
            assert torch.equal(*ours), (name, level)
