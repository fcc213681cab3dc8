"""Adversarial AutoAugment: bookkeeping of losses, the control's budget, resume, replay, several processes."""
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
import torch.nn.functional as F

from sadalib import advaa
from sadalib.advaa import POLICIES, AdvAA, PolicyLog, crop_boxes, load_policies, policy_file, preprocess, resized_crop
from sadalib.data import load
from sadalib.models import create_model
from sadalib.runs import Log, SadalibError, load_tensors, rand, randint, require, seeded
from sadalib.training import Recipe, TrainConfig, fit

SMALL = dict(copies=4, padding=2, flip=False, cutout=8)


@pytest.fixture(scope="module")
def digits():
    return load("digits").take(60)


def trained(data, method, *, epochs=2, net="tinynet", seed=0, **options):
    recipe = Recipe(epochs=epochs, batch_size=20, warmup=2, lr=.05)
    return fit(create_model(net, seed=0), data, method, recipe, seed=seed, progress=False, device="cpu", **options)


def fresh(method, seed=0):
    method.search = advaa.Search(method, seed)
    return method


# --- losses of policies ------------------------------------------------------------------------------------------

def test_the_mean_over_policies_is_the_loss_of_the_big_batch(digits):
    model, method = create_model("tinynet", seed=0).eval(), AdvAA(**SMALL)
    total = method.loss(model, digits.images[:12], digits.labels[:12], generator=seeded(1))["total"]
    seen = method.copies_of(digits.images[:12], model, seeded(1))
    expected = F.cross_entropy(model(seen), digits.labels[:12].repeat_interleave(4))
    torch.testing.assert_close(total, expected)
    by_hand = F.cross_entropy(model(seen), digits.labels[:12].repeat_interleave(4), reduction="none").view(12, 4).mean(0)
    torch.testing.assert_close(method.search.losses.value, by_hand)


def test_swapped_policies_swap_their_losses(digits):
    """Deterministic operations, one sub-policy: the draws no longer matter"""
    model, one = create_model("tinynet", seed=0).eval(), AdvAA(copies=4, sub_policies=1, padding=0, flip=False, cutout=0)
    policies = torch.tensor([[[[6, 0], [9, 9]]], [[[8, 3], [10, 2]]], [[[12, 0], [13, 9]]], [[[11, 8], [7, 1]]]])
    found = []
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        fresh(one).search.policies = policies[order]
        one.loss(model, digits.images[:9], digits.labels[:9], generator=seeded(2))
        found.append(one.search.losses.value[torch.tensor(order).argsort()])
    torch.testing.assert_close(*found)
    assert found[0].std() > 1e-3


def test_losses_are_averaged_over_the_steps_of_a_round(digits):
    model, method = create_model("tinynet", seed=0).eval(), AdvAA(**SMALL, decay=1.)
    per_step = []
    for step in range(3):
        before = method.search.losses.total.clone() if step else torch.zeros(4)
        method.loss(model, digits.images[:8], digits.labels[:8], generator=seeded(step))
        per_step.append(method.search.losses.total - before)
    torch.testing.assert_close(method.search.losses.value, torch.stack(per_step).mean(0))


def test_only_the_image_needs_memory_on_the_way_to_the_device(digits):
    """The batch that is handed over is bytes, N of them; the M copies are made where the network is"""
    from sadalib.training import Loop, batch_at
    loop = Loop(create_model("tinynet", seed=0), digits, AdvAA(**SMALL), Recipe(epochs=1, batch_size=20), device="cpu")
    images, labels, generator, share = batch_at(loop, 0)
    assert images.dtype == torch.uint8 and images.shape == (20, 3, 32, 32) and images.nbytes == 20*3*32*32
    assert generator.device.type == "cpu" and share == 1


# --- rounds and the controller -----------------------------------------------------------------------------------

@pytest.mark.parametrize("every, rounds", [(None, 2), (1, 6), (2, 4), (3, 2), (100, 2)])
def test_rounds_of_an_epoch(digits, every, rounds):
    method = AdvAA(**SMALL, every=every)
    trained(digits, method)
    assert len(method.search.log) == rounds == method.search.round
    assert method.search.log.meta["rounds_an_epoch"]*2 == rounds
    assert method.search.log.curves["losses"].shape == (rounds, 4)
    if rounds > 1: assert not torch.equal(method.search.log.policies[0], method.search.log.policies[1])


def test_the_adversary_learns_what_hurts():
    """A network whose loss is the darkness of its input: operations that darken must gain"""
    class Dark(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))
        def forward(self, x):
            dark = 30*(1 - x.mean((1, 2, 3)))*self.weight
            return torch.stack([-dark, dark], 1)
    torch.manual_seed(0)
    images = (rand(20, 3, 8, 8, generator=seeded("dark"))*120 + 120).byte()
    labels = torch.zeros(20, dtype=torch.long)
    method = AdvAA(copies=8, padding=0, flip=False, cutout=0, every=1, controller_lr=.02)
    method.fill, method.search.collapse.quiet = (0., 0., 0.), True
    model = Dark()
    for step in range(60): method.loss(model, images, labels, generator=seeded("step", step))
    shares = advaa.policy_shares(method.search.log.policies)[0]
    dark = [advaa.OPERATION_NAMES.index(n) for n in ("Invert", "Solarize", "Brightness")]
    assert shares[-10:, dark].sum(1).mean() > shares[:10, dark].sum(1).mean() + .15
    assert method.search.log.curves["entropy"][-1] < method.search.log.curves["entropy"][0] - 5


def test_the_random_control_has_the_same_budget_and_no_learning(digits):
    runs = {policy: AdvAA(**SMALL, policy=policy, every=2) for policy in ("adversarial", "random")}
    weights = {}
    for policy, method in runs.items():
        before = [p.clone() for p in method.search.controller.parameters()]
        weights[policy] = trained(digits, method)
        moved = any(not torch.equal(a, b) for a, b in zip(before, method.search.controller.parameters(), strict=True))
        assert moved == (policy == "adversarial")
    a, b = (m.search.log for m in runs.values())
    assert a.policies.shape == b.policies.shape and weights["adversarial"].steps == weights["random"].steps
    assert set(b.curves) == {"losses"} and "entropy" in a.curves


@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "replay"])
def test_every_policy_trains(digits, policy):
    method = AdvAA(**SMALL, policy=policy)
    loop = trained(digits, method, epochs=1)
    assert all(p.isfinite().all() for p in loop.model.parameters())
    assert len(method.search.log) == (policy in ("adversarial", "random"))


def test_no_policy_and_one_copy_is_ordinary_training(digits):
    model, method = create_model("tinynet", seed=0), AdvAA(policy="none", copies=1, padding=0, flip=False, cutout=0)
    total = method.loss(model, digits.images, digits.labels, generator=seeded(0))["total"]
    torch.testing.assert_close(total, F.cross_entropy(model(digits.floats()), digits.labels))


def test_global_randomness_and_inputs_are_left_alone(digits):
    model, before, images = create_model("tinynet", seed=0), torch.get_rng_state(), digits.images.clone()
    method = AdvAA(**SMALL)
    method.loss(model, images, digits.labels, generator=seeded(0))
    method.epoch_end(0, 1)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(images, digits.images)


def test_the_square_is_the_colour_that_normalisation_removes():
    data = load("digits").take(20)
    model, method = create_model("resnet20", seed=0), AdvAA(policy="none", copies=1, padding=0, flip=False, cutout=16)
    seen = method.copies_of(data.images, model, seeded(0))
    changed = (seen - data.floats()).abs().amax(1) > 0
    normalised = (seen - model.mean)/model.std
    assert changed.any() and (normalised.permute(0, 2, 3, 1)[changed] == 0).all()


def test_nan_stops_the_run_with_its_state_kept(digits, tmp_path):
    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = create_model("tinynet", seed=0), 0
        def forward(self, x):
            self.calls += 1
            return self.net(x)*(float("nan") if self.calls > 5 and self.training else 1.)
    method = AdvAA(**SMALL, every=1)
    with pytest.raises(SadalibError, match="controller was left as it was"):
        fit(Broken(), digits, method, Recipe(epochs=3, batch_size=20, warmup=2), folder=tmp_path, progress=False, device="cpu")
    tensors, meta = load_tensors(tmp_path/"checkpoint"/"stopped.safetensors")
    assert meta["step"] == 5 and all(v.isfinite().all() for k, v in tensors.items() if k.startswith("method.controller"))
    assert all(p.isfinite().all() for p in method.search.controller.parameters())


def test_collapse_warns_once(digits):
    method = AdvAA(**SMALL, every=1, controller_lr=.5)
    with pytest.warns(UserWarning, match="entropy_weight") as seen: trained(digits, method, epochs=8)
    assert len([w for w in seen if "entropy_weight" in str(w.message)]) == 1


# --- resume ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("policy, every", [("adversarial", None), ("adversarial", 2), ("random", 2), ("trivialaugment", None)])
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_stopped_anywhere_and_resumed_is_the_same(digits, tmp_path, policy, every, stop):
    whole, parts = (AdvAA(**SMALL, policy=policy, every=every) for _ in range(2))
    loop = trained(digits, whole, folder=tmp_path/"whole")

    class Stop(Exception): pass
    count, real = [0], AdvAA.loss
    def stopping(self, *args, **kw):
        if count[0] == stop: raise Stop
        count[0] += 1
        return real(self, *args, **kw)
    parts.loss = stopping.__get__(parts)
    with pytest.raises(Stop): trained(digits, parts, folder=tmp_path/"parts", save_every=0)
    again = AdvAA(**SMALL, policy=policy, every=every)
    resumed = trained(digits, again, folder=tmp_path/"parts", save_every=0)
    for key, value in loop.model.state_dict().items(): assert torch.equal(value, resumed.model.state_dict()[key]), key
    a, b = (load_tensors(tmp_path/name/"checkpoint"/"last.safetensors")[0] for name in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())
    if policy != "trivialaugment":
        files = [(tmp_path/name/"policies.safetensors").read_bytes() for name in ("whole", "parts")]
        assert files[0] == files[1]


HEAD = """
import os, sys, time
from sadalib.advaa import AdvAA
from sadalib.data import load
from sadalib.models import create_model
from sadalib.runs import require, save_tensors
from sadalib.training import Recipe, TrainConfig, fit
method = AdvAA(copies=3, padding=2, flip=False, cutout=8, every=3)
config = TrainConfig(method=method, model="tinynet", train_images=200, threads=1, recipe=Recipe(epochs=4, batch_size=20, warmup=5))
"""


def python(code, root, **env):
    env = {**os.environ, "SADALIB_RUNS": str(root), "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen([sys.executable, "-c", HEAD + textwrap.dedent(code)], env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def test_sigkill_then_the_same_bytes(tmp_path):
    assert python("require(config)", tmp_path/"whole").wait() == 0
    for pause in (.3, .9):
        job = python("""
            import sadalib.training
            sadalib.training.Loop.__init__.__kwdefaults__["save_every"] = .05
            print("go", flush=True); require(config)
        """, tmp_path/"cut")
        job.stdout.readline()
        time.sleep(pause)
        job.send_signal(signal.SIGKILL)
        job.wait()
    last = python("require(config)", tmp_path/"cut")
    out = last.communicate()[0]
    assert last.returncode == 0, out
    whole, cut = (next((tmp_path/n).glob("train/*")) for n in ("whole", "cut"))
    for name in ("result.json", "metrics.jsonl", "policies.safetensors", "checkpoint/last.safetensors"):
        assert (whole/name).read_bytes() == (cut/name).read_bytes(), name


RANKS = """
    import torch
    loop = fit(create_model("tinynet", seed=0), load("digits").take(101), method, Recipe(epochs=2, batch_size=25, warmup=2, lr=.05),
               progress=False, device="cpu")
    state = {**loop.model.state_dict(), **{f"method.{k}": v for k, v in method.state_dict().items()}}
    save_tensors(f"{os.environ['SADALIB_RUNS']}/rank{loop.team.rank}of{loop.team.size}.safetensors", state)
    if loop.team.size > 1: torch.distributed.destroy_process_group()
"""


def test_two_processes_equal_one(tmp_path):
    """The same policies on both, other images on each, and the losses of policies as on one process"""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(21000 + os.getpid() % 20000),
              "ACCELERATE_USE_CPU": "true"}
    jobs = [python(RANKS, tmp_path)] + [python(RANKS, tmp_path, RANK=str(r), LOCAL_RANK=str(r), **common) for r in (0, 1)]
    outs = [j.communicate(timeout=150)[0] for j in jobs]
    assert [j.returncode for j in jobs] == [0, 0, 0], "\n".join(outs)
    one, a, b = (load_tensors(tmp_path/f"rank{n}.safetensors")[0] for n in ("0of1", "0of2", "1of2"))
    for key in one:
        assert torch.equal(a[key], b[key]), key
        if key != "method.curves.loss": # a difference of nearly equal numbers: rounding is all that is left of it
            torch.testing.assert_close(a[key], one[key], rtol=2e-3, atol=5e-5, msg=lambda m, key=key: f"{key}: {m}")
    assert torch.equal(one["method.log.policies"][:2], a["method.log.policies"][:2])


# --- replay ------------------------------------------------------------------------------------------------------

def test_replayed_policies_give_the_same_images(digits, tmp_path):
    first = AdvAA(**SMALL)
    trained(digits, first, folder=tmp_path)
    log = load_policies(tmp_path/"policies.safetensors")
    again = AdvAA(**SMALL, policy="replay", replayed=policy_file(tmp_path/"policies.safetensors"))
    trained(digits, again)
    assert torch.equal(log.policies, again.search.log.policies)
    images = [preprocess(digits.images[:5], policies, generator=seeded(9)) for policies in (log.policies[1], again.search.log.policies[1])]
    assert torch.equal(*images)


@pytest.mark.parametrize("epochs, expected", [(4, [0, 0, 1, 1]), (2, [0, 1]), (1, [0])])
def test_a_log_is_stretched_over_other_lengths(digits, tmp_path, epochs, expected):
    log = PolicyLog(policies=randint(0, 10, 2, 4, 5, 2, 2, generator=seeded("log")))
    method = AdvAA(**SMALL, policy="replay", replayed=policy_file(log.save(tmp_path/"log.safetensors")))
    trained(digits, method, epochs=epochs)
    assert torch.equal(method.search.log.policies, log.policies[expected])


def test_a_run_can_be_replayed_by_its_configuration(tmp_path):
    recipe = Recipe(epochs=2, batch_size=20, warmup=2)
    one = TrainConfig(method=AdvAA(**SMALL), model="tinynet", train_images=60, threads=1, recipe=recipe)
    two = TrainConfig(method=AdvAA(**SMALL, policy="replay", replayed=one), model="tinynet", train_images=60, threads=1,
                      recipe=recipe, seed=3)
    run = require(two, root=tmp_path)
    logs = [load_policies(require(c, root=tmp_path).folder/"policies.safetensors").policies for c in (one, two)]
    assert torch.equal(*logs) and run.done
    row = Log(run.folder/"metrics.jsonl").rows()[-1]
    assert row["advaa_hardest"] >= row["advaa_easiest"] and json.loads((run.folder/"config.json").read_text())


@pytest.mark.parametrize("change, words", [
    (dict(copies=3), "set its M"), (dict(operations=15), "use the same table")])
def test_a_log_of_another_shape_is_refused_before_the_first_step(digits, tmp_path, change, words):
    log = PolicyLog(policies=randint(0, 10, 2, 4, 5, 2, 2, generator=seeded("log")))
    file = policy_file(log.save(tmp_path/"log.safetensors"))
    with pytest.raises(SadalibError, match=words):
        trained(digits, AdvAA(**{**SMALL, **change}, policy="replay", replayed=file))
    (tmp_path/"log.safetensors").write_bytes((tmp_path/"log.safetensors").read_bytes() + b" ")
    with pytest.raises(SadalibError, match="has changed"):
        trained(digits, AdvAA(**SMALL, policy="replay", replayed=file))


# --- what cannot be ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings, words", [
    (dict(policy="advers"), "did you mean"), (dict(copies=1), "at least 2 copies"), (dict(copies=0, policy="random"), "from 1"),
    (dict(operations=17), "from 2 to 16"), (dict(crop="padd"), "did you mean `pad`"), (dict(policy="replay"), "set both or none"),
    (dict(every=0), "from 1"), (dict(copies=2.5), "whole number"), (dict(decay=1.5), "decay"), (dict(logit_bound=-1.), "logit_bound"),
    (dict(controller_lr=float("nan")), "lr"), (dict(policy="randaugment", magnitude=31.), "magnitude")])
def test_bad_settings_are_one_sentence(settings, words):
    with pytest.raises(SadalibError, match=words): AdvAA(**settings)


def test_what_does_not_fit_the_training_is_one_sentence(digits):
    with pytest.raises(SadalibError, match='set it to "none"'):
        fit(create_model("tinynet"), digits, AdvAA(), Recipe(epochs=1, augment="crop_flip"), device="cpu", progress=False)
    grey = load("digits", channels=1).take(20)
    with pytest.raises(SadalibError, match="1 channel"):
        fit(create_model("tinynet", channels=1), grey, AdvAA(), Recipe(epochs=1), device="cpu", progress=False)
    with pytest.raises(SadalibError, match="uint8"):
        AdvAA(**SMALL).loss(create_model("tinynet"), digits.floats(), digits.labels)


# --- large photographs -------------------------------------------------------------------------------------------

def test_crop_boxes_fit_and_cover_the_published_range():
    boxes = crop_boxes(4000, 120, 200, generator=seeded("boxes"))
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 120).all() and (left + width <= 200).all()
    whole = (height < 120) & (width < 200)
    area, shape = (height*width/24000.)[whole], (width/height)[whole]
    assert area.min() > .07 and area.min() < .12 and shape.min() > .72 and shape.max() < 1.38


def test_resized_crops_keep_shape_type_and_depend_on_their_generator_alone():
    images = randint(0, 256, 5, 3, 40, 30, generator=seeded("photo")).byte()
    a, b = (resized_crop(images, generator=seeded(1)) for _ in range(2))
    assert a.shape == images.shape and a.dtype == torch.uint8 and torch.equal(a, b) and not torch.equal(a, images)
    method = AdvAA(copies=2, crop="resized", cutout=0, policy="random")
    assert method.copies_of(images, torch.nn.Identity(), seeded(2)).shape == (10, 3, 40, 30)
