"""Sensitivity maps: parity with the released code, mathematics, robustness, cost, resume."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sadalib.models import create_model
from sadalib.runs import SadalibError, Shard
from sadalib.sensitivity import (
    SensitivityMap,
    amplitude_rule,
    fourier_basis,
    mean_amplitude,
    perturbed,
    read_map,
    save_map,
    sensitivity_map,
)

GOLDEN = Path(__file__).parent/"golden"
SIZES = st.tuples(st.integers(1, 17), st.integers(1, 17))


def golden(name: str) -> dict[str, np.ndarray]:
    "Arrays of a file of tests/golden, or of the folder SADALIB_GOLDEN"
    for folder in (GOLDEN, Path(os.environ.get("SADALIB_GOLDEN", "."))):
        if (folder/name).is_file(): return dict(np.load(folder/name, allow_pickle=False))
    pytest.skip(f"{name} is not at hand: set SADALIB_GOLDEN to the folder that holds it")


def golden_net(z: dict[str, np.ndarray]) -> nn.Module:
    "The small network whose weights the golden files carry"
    net = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 16, 5, padding=2),
                        nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(1024, 10))
    for layer, name in ((0, "conv1"), (3, "conv2"), (7, "fc")):
        net[layer].load_state_dict({k: torch.tensor(z[f"w_{name}_{k}"]) for k in ("weight", "bias")})
    return net


def measured(u: int, v: int) -> bool:
    "Whether (u, v) is in the half of the plane that is measured"
    return v > 0 or (v == 0 and u >= 0)


def full_map(half: np.ndarray) -> torch.Tensor:
    "A half grid (32, 17) of the released code as a full map (31, 31), point-symmetric"
    full = torch.zeros(31, 31)
    for u in range(-15, 16):
        for v in range(-15, 16):
            a, b = (u, v) if measured(u, v) else (-u, -v)
            full[15 + u, 15 + v] = float(half[16 + a, b])
    return full


# --- parity

def test_basis_equals_the_released_one():
    z = golden("sada_basis.npz")
    for side in (32, 8):
        for (u, v), theirs in zip(z[f"uv_N{side}"].tolist(), z[f"basis_N{side}"], strict=True):
            np.testing.assert_allclose(fourier_basis(u, v, side, side).numpy(), theirs, atol=1e-6)


def test_raw_norms_equal_the_released_ones():
    from sadalib.sensitivity import _official_norm
    raw = torch.tensor(golden("sada_basis.npz")["rawnorm_all_N32"]).view(32, 17)
    u, v = torch.meshgrid(torch.arange(-16, 16), torch.arange(17), indexing="ij")
    torch.testing.assert_close(_official_norm(u, v, 32, 32), raw, atol=1e-7, rtol=0)
    z = golden("sada_basis.npz")
    ours = [_official_norm(*torch.tensor([[u], [v]]), 8, 8).item() for u, v in z["uv_N8"].tolist()]
    np.testing.assert_allclose(ours, z["rawnorm_N8"], atol=1e-7)


@pytest.mark.parametrize("file", ["sada_map_digits.npz", "sada_map.npz"])
@pytest.mark.parametrize("variant", ["plus", "rand", "rfac"])
def test_map_equals_the_released_one(file, variant):
    z = golden(file)
    images, labels = torch.tensor(z["x"]), torch.tensor(z["y"]).long()
    raw = golden("sada_basis.npz")["rawnorm_all_N32"]
    signs = torch.tensor(z["signs"]) if variant == "rand" else None
    radii = full_map(np.maximum(8, raw*30*z["r_factor"]).reshape(32, 17)) if variant == "rfac" else 8.
    ours = sensitivity_map(golden_net(z), images, labels, l2=radii,
                           signs=1 if signs is None else lambda u, v: signs[(u + 16)*17 + v])
    assert ours.clean_error == pytest.approx(float(z["clean_error"]), abs=1e-7)
    n = len(images)
    theirs, margin = z[f"map_{variant}"], full_map(z[f"minmargin_{variant}"]).numpy()
    assert ours.error.shape == theirs.shape
    half = np.array([[measured(u, v) for v in range(-15, 16)] for u in range(-15, 16)])
    compared = half | half[::-1, ::-1] if variant == "plus" else half
    off = np.abs(ours.error.numpy()*n - theirs*n) > .01
    assert not (off & compared & (margin >= 1e-4)).any()
    assert compared.sum() >= 481
    np.testing.assert_allclose(ours.error.numpy()[half & (margin >= 1e-4)], theirs[half & (margin >= 1e-4)], atol=1e-6)


def shipped_map() -> np.ndarray:
    "The map that lies beside the released code"
    path = Path(os.environ.get("SADALIB_GOLDEN", "."))/"sample_map.npy"
    if not path.is_file(): pytest.skip("sample_map.npy is not at hand: set SADALIB_GOLDEN to the folder that holds it")
    return np.load(path, allow_pickle=False)


def test_numbers_of_the_shipped_map():
    error = torch.tensor(shipped_map())
    shipped = SensitivityMap(error, error, error[None], .0063, error, error[None], 9984, (32, 32))
    s = shipped.summary()
    assert s["mean"] == pytest.approx(.1789, abs=1e-4) and s["l1"] == pytest.approx(171.95, abs=.01)
    assert s["frobenius"] == pytest.approx(11.253, abs=1e-3) and s["area"] == 177
    radial = [.842, .874, .892, .893, .880, .869, .808, .620, .330, .113, .031, .010, .007]
    assert s["radial"][:13] == pytest.approx(radial, abs=6e-4)


# --- mathematics

@settings(max_examples=60, deadline=None)
@given(SIZES, st.data())
def test_basis_is_orthonormal_and_conjugate_symmetric(size, data):
    height, width = size
    def frequency() -> tuple[int, int]:
        return (data.draw(st.integers(-(height//2), height//2)), data.draw(st.integers(-(width//2), width//2)))
    (u, v), (a, b) = frequency(), frequency()
    wave, other = fourier_basis(u, v, height, width), fourier_basis(a, b, height, width)
    assert wave.shape == size and wave.dtype == torch.float32
    assert wave.norm().item() == pytest.approx(1, abs=1e-5)
    assert wave.flatten()[0] >= wave.max() - 1e-6 # phase 0: the peak is at the first pixel
    torch.testing.assert_close(wave, fourier_basis(-u, -v, height, width))
    same = {((s*u) % height, (s*v) % width) for s in (1, -1)} & {((s*a) % height, (s*b) % width) for s in (1, -1)}
    assert (wave*other).sum().item() == pytest.approx(1. if same else 0., abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1, 4), st.one_of(st.none(), st.integers(1, 9)))
def test_amplitude_rule_equals_a_slow_reference(size, channels, cutoff):
    height, width = size
    images = torch.rand(5, channels, *size, generator=torch.Generator().manual_seed(0))
    ours = amplitude_rule(images, cutoff=cutoff)
    ku, kv = (min((n - 1)//2, cutoff or 99) for n in size)
    assert ours.shape == (channels, 2*ku + 1, 2*kv + 1)
    full = np.abs(np.fft.fft2(images.numpy().astype(np.float64))).mean(0)
    for u in range(-ku, ku + 1):
        for v in range(-kv, kv + 1):
            one = np.zeros((height, width//2 + 1), complex)
            a, b = (u, v) if v >= 0 else (-u, -v)
            one[a % height, b] = 1
            raw = np.linalg.norm(np.fft.irfft2(one, s=size))
            theirs = np.maximum(8*np.sqrt(height*width)/32, raw*300*full[:, u % height, v % width])
            np.testing.assert_allclose(ours[:, ku + u, kv + v].numpy(), theirs, rtol=1e-4)


def test_grey_images_have_equal_radii_in_all_channels():
    grey = torch.rand(7, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    colour = amplitude_rule(grey.expand(-1, 3, -1, -1))
    assert torch.equal(colour, colour[:1].expand(3, -1, -1))
    torch.testing.assert_close(colour[:1], amplitude_rule(grey), rtol=1e-6, atol=0)
    whole = (grey*255).round()
    torch.testing.assert_close(mean_amplitude(whole.to(torch.uint8)), mean_amplitude(whole/255), rtol=1e-6, atol=0)


@pytest.mark.parametrize("channels,size", [(1, (21, 30)), (3, (16, 16)), (4, (17, 24)), (3, (24, 17)), (1, (32, 32))])
def test_map_equals_a_slow_reference(channels, size):
    net, images, labels = small_case(channels, size, 12)
    signs = torch.randint(0, 2, (12, channels), generator=torch.Generator().manual_seed(3))*2 - 1
    ours = sensitivity_map(net, images, labels, l2=3., cutoff=4, signs=lambda u, v: signs*(1 if (u + v) % 2 else -1))
    assert ours.error.shape == (9, 9) and torch.equal(ours.error, ours.error.flip(0, 1)) and ours.error.std() > .01
    net.eval()
    for u in range(-4, 5):
        for v in range(-4, 5):
            if not measured(u, v): continue
            turned = signs[:, :, None, None]*(1 if (u + v) % 2 else -1)
            wrong = net(images + 3*turned*fourier_basis(u, v, *size)).argmax(1) != labels
            assert ours.error[4 + u, 4 + v].item() == pytest.approx(wrong.float().mean().item(), abs=1e-6)
    p = ours.error.double()
    torch.testing.assert_close(ours.standard_error.double(), (p*(1 - p)/12).sqrt(), atol=1e-6, rtol=0)
    present = labels.bincount(minlength=10) > 0
    assert ours.per_class[~present].isnan().all() and ours.per_class.shape == (10, 9, 9)
    weighted = (ours.per_class[present]*labels.bincount(minlength=10)[present, None, None]).sum(0)/12
    torch.testing.assert_close(weighted, ours.error)


class Touchy(nn.Module):
    "A small random network whose answer every wave can change"
    def __init__(self, channels, size):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.out = nn.Linear(4*size[0]*size[1], 10)

    def forward(self, x): return self.out(self.conv(x - .5).tanh().flatten(1))


def small_case(channels=3, size=(32, 32), n=20, seed=0):
    "A touchy network, random images, and its own answers as labels"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net, images = Touchy(channels, size), torch.rand(n, channels, *size)
    with torch.no_grad(): labels = net(images).argmax(1)
    return net, images, labels


def test_no_strength_gives_the_clean_error_everywhere():
    net, images, labels = small_case()
    labels = (labels + (torch.arange(20) % 4 == 0)) % 10
    m = sensitivity_map(net, images, labels, l2=0)
    assert m.clean_error == .25 and torch.equal(m.error, torch.full((31, 31), .25))
    assert m.summary()["excess"] == 0 and m.summary()["area"] == 0


def test_clamp_and_channel_radii():
    images = torch.rand(3, 3, 8, 8)
    waves = torch.tensor([[1, 2]])
    out = perturbed(images, waves, torch.full((1, 3, 3), 100.), clamp=True)
    assert out.min() >= 0 and out.max() <= 1
    net, images, labels = small_case()
    one = sensitivity_map(net, images, labels, cutoff=3)
    assert torch.equal(one.radii, amplitude_rule(images, cutoff=3))
    torch.testing.assert_close(one.l2, one.radii.mean(0))
    assert torch.equal(sensitivity_map(net, images, labels, l2=one.radii, cutoff=3).error, one.error)


def test_a_given_tensor_is_read_on_the_measured_half_plane():
    net, images, labels = small_case()
    l2 = torch.rand(7, 7)*10
    m = sensitivity_map(net, images, labels, l2=l2, cutoff=3)
    for u in range(-3, 4):
        for v in range(-3, 4):
            a, b = (u, v) if measured(u, v) else (-u, -v)
            assert m.l2[3 + u, 3 + v] == l2[3 + a, 3 + b]


# --- signs

def test_models_windows_and_batch_sizes_share_signs():
    net, images, labels = small_case()
    seen: dict[str, list] = {}
    def spy(name):
        def hook(module, args): seen.setdefault(name, []).append(args[0].detach().clone())
        return hook
    for name, other, options in (("a", net, {}), ("b", small_case(seed=1)[0], {}), ("c", net, {"batch_size": 7})):
        handle = other.register_forward_pre_hook(spy(name))
        m = sensitivity_map(other, images, labels, l2=8., cutoff=2, **options)
        handle.remove()
        seen[name + "_map"] = m.error
    frames = {k: torch.cat(seen[k])[-13*20:] for k in "abc"}
    assert torch.equal(frames["a"], frames["b"]) and torch.equal(frames["a"], frames["c"])
    wide = sensitivity_map(net, images, labels, l2=8., cutoff=6).error[4:9, 4:9]
    assert torch.equal(wide, seen["a_map"]) and wide.std() > .01


def test_seeds_differ_and_repeat_and_nothing_global_moves():
    net, images, labels = small_case(n=60)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    def at(seed):
        generator = torch.Generator().manual_seed(seed)
        return sensitivity_map(net, images, labels, l2=4., cutoff=4, generator=generator).error
    assert torch.equal(at(1), at(1)) and not torch.equal(at(1), at(2))
    assert torch.equal(sensitivity_map(net, images, labels, l2=4., cutoff=4).error, at(0))
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == numpy_state).all()


# --- the model, and what is refused

class Counted(nn.Module):
    "BatchNorm, dropout, one frozen layer, one gradient: what a careless attack would disturb"
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(.5), nn.Flatten(),
                                  nn.Linear(4*14*14, 5))

    def forward(self, x): return self.body(x)


def test_the_model_is_left_as_it_was_even_after_an_error():
    net = Counted().train()
    net.body[1].eval()
    net.body[0].weight.requires_grad_(False)
    net.body[5].weight.grad = torch.ones_like(net.body[5].weight)
    def state():
        return ({k: v.clone() for k, v in net.state_dict().items()}, [m.training for m in net.modules()],
                [p.requires_grad for p in net.parameters()], [p.grad is None for p in net.parameters()],
                [(p.stride(), p.data_ptr(), p.is_inference()) for p in net.parameters()])
    before, images, labels = state(), torch.rand(6, 3, 16, 16), torch.arange(6) % 5
    first = sensitivity_map(net, images, labels, cutoff=2)
    with pytest.raises(SadalibError): sensitivity_map(net, images, labels + 1, cutoff=2)
    after = state()
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), after[0].values(), strict=True))
    assert before[1:] == after[1:] and torch.is_grad_enabled()
    assert torch.equal(first.error, sensitivity_map(net, images, labels, cutoff=2).error) # dropout was off


class Viewing(nn.Module):
    "Flattens with `view`, as the released network does"
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 4, 3), nn.Linear(4*14*14, 5)

    def forward(self, x):
        x = self.conv(x)
        return self.out(x.view(len(x), -1))


def test_a_model_with_view_and_a_double_label_type_work():
    images = torch.rand(6, 3, 16, 16)
    m = sensitivity_map(Viewing(), (images*255).to(torch.uint8), torch.arange(6, dtype=torch.uint8) % 5, cutoff=1)
    assert m.error.shape == (3, 3) and m.count == 6 and m.size == (16, 16)


class Broken(nn.Module):
    "NaN for images whose mean rows differ, so for row waves only"
    def forward(self, x):
        rows = x.mean((1, 3)).std(1) > 1
        return torch.where(rows[:, None], torch.nan, x.flatten(1)[:, :10])


@pytest.mark.parametrize("change,words", [
    ({"labels": torch.full((8,), 10)}, "the model knows classes 0 to 9"),
    ({"labels": torch.full((8,), -1)}, "the model knows classes 0 to 9"),
    ({"labels": torch.zeros(7, dtype=torch.int64)}, "one class for each image"),
    ({"labels": torch.zeros(8)}, "expected whole numbers"),
    ({"images": torch.randn(8, 3, 32, 32)}, "normalisation inside the model"),
    ({"images": torch.rand(8, 3, 32, 32)*255}, "normalisation inside the model"),
    ({"images": torch.full((8, 3, 32, 32), float("nan"))}, "range from nan"),
    ({"images": torch.rand(3, 32, 32)}, "expected a tensor (N, C, H, W)"),
    ({"images": torch.rand(0, 3, 32, 32), "labels": torch.zeros(0, dtype=torch.int64)}, "at least one image"),
    ({"images": torch.zeros(8, 3, 32, 32, dtype=torch.int32)}, "expected float in [0, 1] or uint8"),
    ({"images": np.zeros((8, 3, 32, 32))}, "expected a tensor"),
    ({"images": torch.rand(8, 1, 32, 32)}, "this model takes"),
    ({"cutoff": -1}, "expected None or a whole number"),
    ({"cutoff": True}, "expected None or a whole number"),
    ({"generator": 7}, "expected a torch.Generator"),
    ({"cutoff": 2.5}, "expected None or a whole number"),
    ({"l2": -1.}, "negative or non-finite"),
    ({"l2": float("nan")}, "negative or non-finite"),
    ({"l2": "amplitudes"}, 'expected "amplitude"'),
    ({"l2": torch.ones(32, 17)}, "expected (31, 31)"),
    ({"signs": 0}, "expected None (drawn from a seed)"),
    ({"signs": lambda u, v: torch.zeros(8, 3)}, "expected +1 or -1"),
    ({"signs": lambda u, v: torch.ones(3, 8)}, "expected +1 or -1 of shape (8, 3)"),
    ({"precision": "fp16"}, 'expected "float32" or "bf16"'),
    ({"batch_size": 0}, "expected None or a whole number"),
    ({"model": Broken(), "l2": 500.}, "NaN for images with frequency (u, v) = (1, 0) added"),
    ({"model": nn.Flatten(0)}, "expected logits"),
    ({"model": lambda x: x}, "expected a torch.nn.Module"),
])
def test_one_sentence(change, words):
    given = {"model": create_model("tinynet", seed=0), "images": torch.rand(8, 3, 32, 32),
             "labels": torch.zeros(8, dtype=torch.int64), **change}
    model, images, labels = (given.pop(k) for k in ("model", "images", "labels"))
    began = time.monotonic()
    with pytest.raises(SadalibError) as caught: sensitivity_map(model, images, labels, **given)
    message = str(caught.value)
    assert words in message and message.endswith(".") and "\n" not in message and time.monotonic() - began < 5


@pytest.mark.parametrize("u,v,size", [(17, 0, (32, 32)), (0, -17, (32, 32)), (0, 0, (0, 4)), (1.5, 0, (8, 8)),
                                      (4, 0, (7, 7))])
def test_frequencies_that_do_not_exist(u, v, size):
    with pytest.raises(SadalibError): fourier_basis(u, v, *size)


# --- memory, cost, precision

class Largest(TorchDispatchMode):
    "Remembers the largest tensor that any operation made"
    size = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor): self.size = max(self.size, out.numel())
        return out


def test_a_window_of_a_photograph_holds_no_basis():
    net = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 10))
    images, labels = torch.rand(10, 3, 224, 224), torch.arange(10)
    with Largest() as seen: m = sensitivity_map(net, images, labels, cutoff=10)
    assert m.error.shape == (21, 21)
    assert seen.size <= images.numel() # one batch; 221 waves of 224 x 224 would be seven times that
    assert 221*224*224 > 7*images.numel()


def test_cost_stays_near_the_bare_forward_passes():
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        net, images = create_model("digitnet", seed=0).eval(), torch.rand(128, 3, 32, 32)
        labels = torch.zeros(128, dtype=torch.int64)
        batch = images.contiguous(memory_format=torch.channels_last)
        ratios = []
        for _ in range(5):
            t = time.process_time()
            with torch.no_grad():
                for _ in range(6): net(batch) # 5 frequencies and the clean images
            bare = time.process_time() - t
            t = time.process_time()
            sensitivity_map(net, images, labels, cutoff=1)
            ratios.append((time.process_time() - t)/bare)
        assert sorted(ratios)[1] < 1.25, ratios
    finally: torch.set_num_threads(torch_threads)


def test_bf16_differs_little():
    net, images, labels = small_case(n=100)
    full, fast = (sensitivity_map(net, images, labels, l2=8., cutoff=3, precision=p) for p in ("float32", "bf16"))
    assert (full.error - fast.error).abs().mean() < .1
    assert fast.count == 100 and torch.equal((fast.error*100).round(), (fast.error*100).round().clamp(0, 100))


# --- resume, save, run

class Killed(Exception): "Stands for a kill"


def test_stopped_anywhere_and_resumed_equals_uninterrupted(tmp_path):
    net, images, labels = small_case(n=50)
    options = {"l2": 5., "cutoff": 4, "batch_size": 16}
    whole = sensitivity_map(net, images, labels, **options)
    assert whole.error.std() > .01
    left = [9]
    def strike(*_):
        left[0] -= 1
        if left[0] < 0: raise Killed
    for budget in (30, 1, 60, 45):
        left[0] = budget
        handle = net.register_forward_hook(strike)
        with pytest.raises(Killed): sensitivity_map(net, images, labels, resume=tmp_path/"map.safetensors", **options)
        handle.remove()
    again = sensitivity_map(net, images, labels, resume=tmp_path/"map.safetensors", **options)
    assert torch.equal(whole.per_class.nan_to_num(-1), again.per_class.nan_to_num(-1))
    calls = []
    handle = net.register_forward_hook(lambda *_: calls.append(1))
    sensitivity_map(net, images, labels, resume=tmp_path/"map.safetensors", **options)
    handle.remove()
    assert len(calls) <= 10 # a finished map is only checked: the clean images and some predictions, no wave
    for change in ({"l2": 6.}, {"clamp": True}, {"generator": torch.Generator().manual_seed(5)}):
        with pytest.raises(SadalibError, match="holds another map"):
            sensitivity_map(net, images, labels, resume=tmp_path/"map.safetensors", **{**options, **change})
    with torch.no_grad(): next(net.parameters()).mul_(2)
    with pytest.raises(SadalibError, match="holds another map"):
        sensitivity_map(net, images, labels, resume=tmp_path/"map.safetensors", **options)
    (tmp_path/"map.safetensors").write_bytes(b"torn")
    with pytest.raises(SadalibError, match="delete it"):
        sensitivity_map(net, images, labels, resume=tmp_path/"map.safetensors", **options)


CHILD = """
import sys, time, torch
from sadalib import sensitivity
from sadalib.models import create_model
torch.set_num_threads(1)
sensitivity._Partial.__init__.__defaults__ = (0.,) # save after every frequency
net = create_model("tinynet", normalise="half", seed=0)
images = torch.rand(30, 3, 32, 32, generator=torch.Generator().manual_seed(0))
slow = len(sys.argv) > 3
if slow: net.register_forward_hook(lambda *_: time.sleep(.02))
m = sensitivity.sensitivity_map(net, images, torch.arange(30) % 10, cutoff=5, resume=sys.argv[1])
sensitivity.save_map(m, sys.argv[2])
"""


def test_sigkill_and_again_gives_the_same_bytes(tmp_path):
    def child(resume, out, *more):
        return subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path/resume), str(tmp_path/out), *more])
    assert child("whole", "whole.safetensors").wait(120) == 0
    process = child("killed", "killed.safetensors", "slow")
    until = time.monotonic() + 60
    while not (tmp_path/"killed").exists() and time.monotonic() < until: time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL and not (tmp_path/"killed.safetensors").exists()
    assert (tmp_path/"killed").exists()
    assert child("killed", "killed.safetensors").wait(120) == 0
    assert (tmp_path/"killed.safetensors").read_bytes() == (tmp_path/"whole.safetensors").read_bytes()


def test_saved_and_read(tmp_path):
    net, images, labels = small_case()
    m = sensitivity_map(net, images, labels, cutoff=2)
    again = read_map(save_map(m, tmp_path/"map.safetensors"))
    assert torch.equal(again.radii, m.radii) and again.size == (32, 32) and again.summary() == m.summary()


def test_map_run_is_shared_resumed_and_bounded(tmp_path):
    from sadalib.baselines import ERM
    from sadalib.runs import record, require
    from sadalib.sensitivity import MapConfig, load_map
    from sadalib.training import Recipe, TrainConfig
    trained = TrainConfig(method=ERM(), model="tinynet", recipe=Recipe(epochs=1, warmup=5), threads=1)
    config = MapConfig(trained, n=60, cutoff=3, threads=1)
    run = require(config, root=tmp_path)
    stamp = (run.folder/"map.safetensors").stat().st_mtime_ns
    assert require(config, root=tmp_path).folder == run.folder
    assert (run.folder/"map.safetensors").stat().st_mtime_ns == stamp
    rows = {r["metric"]: r["value"] for r in record(run)["metrics"]}
    assert rows["map_mean"] == pytest.approx(load_map(run).error.mean().item(), abs=1e-6)
    assert not list(run.folder.glob("partial*"))
    with pytest.raises(SadalibError, match="ask for fewer"): require(MapConfig(trained, n=10**6), root=tmp_path)


class Scaled(nn.Module):
    "A network whose printed form and weights do not tell what it does"
    def __init__(self, net, offset):
        super().__init__()
        self.net, self.offset = net, [offset]

    def forward(self, x): return self.net(x) + self.offset[0]


def test_a_resumed_map_belongs_to_a_network_that_behaves_so(tmp_path):
    net, images, labels = small_case(n=50)
    options = {"l2": 5., "cutoff": 1, "resume": tmp_path/"map.safetensors"}
    sensitivity_map(Scaled(net, 0.), images, labels, **options)
    sensitivity_map(Scaled(net, 0.), images, labels, batch_size=7, **options)
    other = torch.zeros(10).index_fill_(0, torch.tensor([3]), 1e3)
    with pytest.raises(SadalibError, match="holds another map"):
        sensitivity_map(Scaled(net, other), images, labels, **options)


def test_numpy_whole_numbers_are_whole_numbers():
    net, images, labels = small_case(n=20)
    assert torch.equal(fourier_basis(*np.array([3, -2, 9, 8])), fourier_basis(3, -2, 9, 8))
    ones = sensitivity_map(net, images, labels, l2=4., cutoff=np.int64(2), batch_size=np.int32(8), signs=np.int64(1))
    assert torch.equal(ones.error, sensitivity_map(net, images, labels, l2=4., cutoff=2, signs=1).error)
    with pytest.raises(SadalibError): fourier_basis(True, 0, 8, 8)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_networks_of_other_floating_types(kind):
    net, images, labels = small_case(n=40)
    usual = sensitivity_map(net, images, labels, l2=6., cutoff=2)
    other = sensitivity_map(net.to(kind), images, labels, l2=6., cutoff=2)
    assert (usual.error - other.error).abs().max() < (.03 if kind == torch.float64 else .3)


def test_a_window_of_zero_holds_the_constant_wave():
    net, images, labels = small_case(n=40)
    for options in ({}, {"l2": 6.}, {"l2": torch.ones(1, 1)}):
        m = sensitivity_map(net, images, labels, cutoff=0, **options)
        assert m.error.shape == (1, 1) and m.radii.shape == (3, 1, 1) and len(m.radial()) == 1
    middle = sensitivity_map(net, images, labels, cutoff=2)
    assert sensitivity_map(net, images, labels, cutoff=0).error.item() == middle.error[2, 2].item()


def test_parts_of_a_set_draw_their_rows_of_the_signs():
    net, images, labels = small_case(n=40)
    def wrong(rows, generator):
        m = sensitivity_map(net, images[rows], labels[rows], l2=6., cutoff=2, generator=generator)
        return m.error.double()*m.count
    draws = torch.Generator().manual_seed(3)
    parts = [wrong(slice(a, b), Shard(draws, a, b, 40)) for a, b in ((0, 15), (15, 40))]
    torch.testing.assert_close(sum(parts), wrong(slice(None), draws), rtol=0, atol=1e-4)
