"""A-FAN as a method: the official step, one pass upstream, several sites, several processes, and what is refused."""
import copy
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sadalib.afan.method import AFAN, LALFA, SiteAttack, TermSum, find_site, onto_sum_one, perturbed, term_weights
from sadalib.afan.mix import mix_strengths, renormalise
from sadalib.afan.sites import Site
from sadalib.data import load
from sadalib.models import create_model
from sadalib.runs import SadalibError, load_tensors, rand, randint, seeded
from sadalib.training import Recipe, fit

GOLDEN = np.load(Path(__file__).parent/"golden"/"afan_mix.npz", allow_pickle=False)


def golden(name): return torch.as_tensor(GOLDEN[name])


def official():
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                        nn.Conv2d(8, 8, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    net.load_state_dict({k[4:].replace("_", ".", 1): golden(k) for k in GOLDEN.files if k.startswith("net_")})
    return net, golden("x"), golden("y").long()


def batch(n=6, side=16, classes=10):
    return rand(n, 3, side, side, generator=seeded("images")), randint(0, classes, n, generator=seeded("labels"))


# --- the official step ------------------------------------------------------------------------------------------------

def test_the_official_training_step():
    """Loss, gradients, sizes and number of statistics' updates; the order of passes differs (ours starts with the clean one),
    so the running statistics agree only as far as the features of the passes do"""
    net, x, y = official()
    steps = len(GOLDEN["pgd0_fadv"])
    method = AFAN(site="1", strengths=1, mix="", gamma=255*float(golden("pgd0_gamma")), steps=steps, weights_of_terms="code",
                  attack_bn="train", adv_bn="train")
    terms = method.loss(net.train(), x, y)
    terms["total"].backward()
    assert terms["total"].item() == pytest.approx(float(golden("train_loss")), abs=1e-6)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, golden("train_grad_" + name.replace(".", "_")), rtol=0, atol=1e-6)
    assert terms["size_l2"].item() == pytest.approx(float(golden("train_norm_l2")), rel=1e-4)
    assert terms["size_linf"].item() == pytest.approx(float(golden("train_norm_linf")), rel=1e-4)
    before = int(golden("net_3_num_batches_tracked"))
    assert int(net[3].num_batches_tracked) == int(golden("train_after_3_num_batches_tracked")) == before + steps + 2
    torch.testing.assert_close(net[3].running_mean, golden("train_after_3_running_mean"), rtol=0, atol=2e-2)


def test_the_default_leaves_one_update_of_statistics_and_the_same_gradients_of_the_clean_term():
    net, x, y = official()
    AFAN(site="1", strengths=4, mix="0011", gamma=8.).loss(net.train(), x, y)["total"].backward()
    plain, _, _ = official()
    F.cross_entropy(plain.train()(x), y).backward()
    assert torch.equal(net[3].running_mean, plain[3].running_mean) and net[3].num_batches_tracked == plain[3].num_batches_tracked
    assert torch.equal(net[0].weight.grad, plain[0].weight.grad) # before the site: the clean term alone
    assert not torch.allclose(net[9].weight.grad, plain[9].weight.grad)


def test_the_weighting_expressions():
    losses, second = golden("combo_losses").double(), golden("combo_loss_sd").double()
    for w in (.3, .5):
        weights = torch.tensor(term_weights("code", 4, decoder=1, task="detection", decoder_weight=w), dtype=torch.float64)
        assert (weights*torch.cat([losses, second[None]])).sum().item() == pytest.approx(float(golden(f"combo_detection_w{w}")), abs=1e-6)
    weights = torch.tensor(term_weights("code", 2, decoder=1, task="segmentation"), dtype=torch.float64)
    assert (weights*torch.cat([losses[:3], second[None]])).sum().item() == pytest.approx(float(golden("combo_segmentation")), abs=1e-6)
    assert sum(term_weights("code", 1)) == 1 and term_weights("lambda", 2, lam=.5) == (1., .5, .5)


def test_the_losses_of_the_strengths():
    net, x, y = official()
    net.eval()
    site = Site(net, "1")
    with torch.no_grad(), site.capture(): clean = F.cross_entropy(net(x), y)
    first = golden("pgd0_fadv")[0]
    losses = [clean.item()]
    for point in mix_strengths(site.value, first, 4, mask="0011"):
        with torch.no_grad(), site.replay(point): losses.append(F.cross_entropy(net(x), y).item())
    assert np.allclose(losses, GOLDEN["combo_losses"], rtol=0, atol=1e-5)
    with torch.no_grad(), site.replay(renormalise(site.value, first)): last = F.cross_entropy(net(x), y).item()
    assert last == pytest.approx(float(golden("combo_loss_sd")), abs=1e-5)


# --- mathematics --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("direction", ["adversarial", "random"])
@pytest.mark.parametrize("bn", ["freeze", "eval", "train"])
def test_gradients_equal_a_network_split_by_hand(bn, direction):
    torch.manual_seed(0)
    head = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    tail = nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(5*14*14, 10))
    net = nn.Sequential(head, tail).double().train()
    x, y = batch()
    x = x.double()
    method = AFAN(site="0", strengths=2, mix="01", gamma=30., lam=.7, attack_bn=bn, adv_bn=bn, direction=direction)
    ours = copy.deepcopy(net)
    terms = method.loss(ours, x, y, generator=seeded("signs"))
    terms["total"].backward()
    site = Site(net, "0")
    with site.capture(): clean = F.cross_entropy(net(x), y)
    points = perturbed(site, lambda: F.cross_entropy(net(x), y), method, bn=bn, generator=seeded("signs"))
    if bn == "eval": net[1].eval()
    total = clean + .7*sum(F.cross_entropy(net[1](p), y) for p in points)
    total.backward()
    assert terms["total"].item() == pytest.approx(total.item(), abs=1e-9)
    for a, b in zip(ours.parameters(), net.parameters(), strict=True): torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


def test_total_may_be_scaled_and_used_twice():
    layer = nn.Linear(3, 1)
    total = TermSum(layer)
    total.add(layer(torch.ones(2, 3)).sum(), .5)
    (3*total.total).backward()
    (total.total*1).backward()
    assert torch.equal(layer.weight.grad, torch.full((1, 3), 4.))
    once = total.total
    once.backward()
    assert torch.equal(layer.weight.grad, torch.full((1, 3), 5.)) and torch.equal(total.gradients[0], torch.ones(1, 3))
    with pytest.raises(RuntimeError): once.backward()


def test_steps_of_any_number_raise_the_loss():
    net, x, y = create_model("resnet20", seed=0).train(), *batch(16, 32)
    for steps in (1, 3):
        terms = AFAN(site="stage1", strengths=1, mix="", gamma=2., steps=steps).loss(net, x, y)
        assert terms["adversarial"] > terms["clean"]


def test_noise_has_the_size_of_the_attack_and_hurts_less():
    net, x, y = create_model("resnet20", seed=0).train(), *batch(16, 32)
    one = dict(site="stage1", strengths=1, mix="", gamma=4.)
    attack, noise = (AFAN(**one, direction=d).loss(copy.deepcopy(net), x, y, generator=seeded(1)) for d in ("adversarial", "random"))
    assert noise["size_l2"].item() == pytest.approx(attack["size_l2"].item(), rel=1e-4)
    assert noise["adversarial"] < attack["adversarial"]


# --- passes ---------------------------------------------------------------------------------------------------------

class Counting(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x):
        self.calls += 1
        return self.inner(x)


@pytest.mark.parametrize("steps,k,expected", [(1, 1, 2), (1, 4, 5), (5, 1, 6), (3, 2, 5)])
def test_upstream_runs_once_and_the_tail_as_often_as_it_must(steps, k, expected):
    """The clean pass, S - 1 further attack steps and k strengths"""
    head, tail = Counting(nn.Conv2d(3, 4, 3)), Counting(nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(4*14*14, 10)))
    net, (x, y) = nn.Sequential(head, nn.ReLU(), tail), batch()
    AFAN(site="1", strengths=k, mix="", steps=steps).loss(net.train(), x, y)["total"].backward()
    assert (head.calls, tail.calls) == (1, expected)


@pytest.mark.parametrize("change,more", [({"attack_bn": "eval"}, 1), ({"eps": 4., "random_start": True}, 1), ({"attack_bn": "train"}, 1)])
def test_the_first_step_is_free_only_where_it_is_exact(change, more):
    tail = Counting(nn.Sequential(nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4*14*14, 10)))
    net, (x, y) = nn.Sequential(nn.Conv2d(3, 4, 3), tail), batch()
    AFAN(site="0", strengths=1, mix="", **change).loss(net.train(), x, y, generator=seeded(0))["total"].backward()
    assert tail.calls == 2 + more


def test_two_sites_share_one_clean_pass():
    net, (x, y) = create_model("resnet20", seed=0).train(), batch(8, 32)
    stem = Counting(net.net.stem)
    net.net.stem = stem
    second = SiteAttack(site="stage3", strengths=1, mix="", gamma=8.)
    both = AFAN(site="stage1", strengths=2, mix="01", gamma=8., decoder=second)
    terms = both.loss(net, x, y)
    assert stem.calls == 1
    one = AFAN(site="stage1", strengths=2, mix="01", gamma=8.).loss(net, x, y)
    other = AFAN(site="stage3", strengths=1, mix="", gamma=8.).loss(net, x, y)
    assert terms["total"].item() == pytest.approx((one["total"] + other["total"] - one["clean"]).item(), abs=1e-4)


def test_nothing_is_left_on_the_model_after_a_failure():
    net, (x, y) = create_model("resnet20", seed=0).train(), batch(4, 32)
    state, calls = copy.deepcopy(net.state_dict()), []

    def loss():
        calls.append(0)
        if len(calls) == 3: raise KeyError("third pass")
        return F.cross_entropy(net(x), y)
    before = torch.get_rng_state()
    with pytest.raises(KeyError): AFAN(site="stage1", strengths=4).terms(net, loss)
    assert all("forward" not in m.__dict__ and not m._forward_hooks for m in net.modules())
    assert torch.equal(before, torch.get_rng_state()) and all(p.grad is None for p in net.parameters())
    moved = [k for k, v in net.state_dict().items() if not torch.equal(v, state[k])]
    assert moved and all("running" in k or "num_batches" in k for k in moved) # of the clean pass, which was made


# --- refusals --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how,word", [(dict(site="stage1", strengths=2), "k=2"), (dict(site="stage1", strengths=0, mix=""), "k=0"),
                                      (dict(site="stage1", mix="0021"), "0021"), (dict(site="stage1", weights_of_terms="cod"), "code"),
                                      (dict(site="stage1", task="detect"), "detection"), (dict(), "site"), (dict(site="a", attack_bn="x"),
                                                                                                            "x"),
                                      (dict(site="a", random_start=True), "eps"), (dict(site="a", direction="up"), "up")])
def test_wrong_settings(how, word):
    with pytest.raises(SadalibError) as error: AFAN(**how)
    assert word in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("how,word", [(dict(site="stge1"), "net.stage1"), (dict(site="stage1", gamma_unit="std"), "feature_std"),
                                      (dict(site="stage1", axes="layer"), "channel"), (dict(site="head", axes="instance"), "axes"),
                                      (dict(site="stage1", part="roi"), "roi"), (dict(site="stage1", gamma=-1.), "gamma"),
                                      (dict(site="stage1", steps=1.5), "steps")])
def test_wrong_settings_that_need_a_network(how, word):
    net, (x, y) = create_model("resnet20", seed=0).train(), batch(4, 32)
    with pytest.raises(SadalibError) as error: AFAN(**how).loss(net, x, y)
    assert word in str(error.value) and "\n" not in str(error.value)


def test_frozen_layers_are_refused_and_a_later_site_is_not():
    net, (x, y) = create_model("resnet20", seed=0).train(), batch(4, 32)
    for part in (net.net.stem, net.net.stage1): part.requires_grad_(False)
    with pytest.raises(SadalibError, match="frozen layers"): AFAN(site="stage1").loss(net, x, y)
    AFAN(site="stage2").loss(net, x, y)["total"].backward()
    assert net.net.stem[0].weight.grad is None and net.net.stage3[0].conv1.weight.grad is not None


def test_a_site_with_nothing_trained_behind_it_is_refused():
    net, (x, y) = create_model("resnet20", seed=0).train(), batch(4, 32)
    with pytest.raises(SadalibError, match="nothing that is trained lies behind site `net.head`"): AFAN(site="head").loss(net, x, y)


def test_a_lost_step_is_told_once():
    net, (x, y) = create_model("tinynet", seed=0).train(), batch(4, 32)
    method = AFAN(site="features.1", gamma=.01)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(UserWarning, match="lost in bfloat16"): method.loss(net, x, y)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            method.loss(net, x, y)


def test_a_site_under_an_in_place_operation_is_captured_before_it():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4*14*14, 10)).train()
    x, y = batch()
    site = Site(net, "1")
    with site.capture(): clean = F.cross_entropy(net(x), y)
    assert (site.value < 0).any()
    with site.replay(site.value): again = F.cross_entropy(net(x), y)
    assert again.item() == clean.item()
    AFAN(site="1", strengths=2, mix="01").loss(net, x, y)["total"].backward()


def test_find_site_knows_the_normalised_wrapper():
    net = create_model("resnet20", seed=0)
    assert find_site(net, "stage1").module is find_site(net, "net.stage1").module is net.net.stage1


# --- learned weights ---------------------------------------------------------------------------------------------------

def test_learned_weights_follow_their_gradient():
    """Against plain autograd through the same points"""
    net, (x, y) = create_model("resnet20", seed=0).double().train(), batch(8, 32)
    x = x.double()
    method = LALFA(sites=("stage1", "stage3"), gamma=20., l1=.5, weight_lr=.1)
    start = method.weights.clone()
    sites = [find_site(net, n) for n in method.sites]
    with sites[0].capture(), sites[1].capture(): clean = F.cross_entropy(net(x), y)
    slopes = torch.autograd.grad(clean, [s.live for s in sites])
    expected = []
    for site, slope, w in zip(sites, slopes, start, strict=True):
        points = perturbed(site, lambda: F.cross_entropy(net(x), y), SiteAttack(site="", strengths=1, mix="", gamma=20., steps=3),
                           gradient=slope)
        w = w.clone().requires_grad_()
        from sadalib.afan.sites import bn_policy
        with bn_policy(net, "freeze"), site.replay(site.value + w*(points[-1] - site.value)): term = F.cross_entropy(net(x), y)
        expected.append(torch.autograd.grad(term/4, w)[0].item() + .5)
    method.loss(net, x, y)
    assert torch.allclose(method.velocity, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-7)
    assert torch.allclose(method.weights, onto_sum_one(start - .1*method.velocity))
    assert method.weights.sum().item() == pytest.approx(1.)


def test_learned_weights_survive_a_checkpoint(tmp_path):
    data, recipe = load("digits").take(60), Recipe(epochs=2, batch_size=20, warmup=0)
    def method(): return LALFA(sites=("features.1", "features.3"), gamma=20.)
    whole = fit(create_model("tinynet", seed=0), data, method(), recipe, progress=False, folder=tmp_path/"a")
    cut = fit(create_model("tinynet", seed=0), data, method(), Recipe(epochs=1, batch_size=20, warmup=0), progress=False,
              folder=tmp_path/"b")
    tensors, _ = load_tensors(tmp_path/"b"/"checkpoint"/"last.safetensors")
    assert torch.equal(tensors["method.weights"], cut.method.weights)
    again = method()
    again.load_state_dict({k.removeprefix("method."): v for k, v in tensors.items() if k.startswith("method.")})
    assert torch.equal(again.weights, cut.method.weights) and torch.equal(again.velocity, cut.method.velocity)
    assert not torch.equal(whole.method.weights, cut.method.weights)


# --- several processes -------------------------------------------------------------------------------------------------

RANKS = """
    import os, torch
    from sadalib.afan.method import AFAN, LALFA, SiteAttack
    from sadalib.data import load
    from sadalib.models import create_model
    from sadalib.runs import save_tensors
    from sadalib.training import Recipe, fit
    second = SiteAttack(site="features.5", strengths=1, mix="", gamma=8.)
    method = {"afan": AFAN(site="features.1", strengths=2, mix="01", gamma=.2, gamma_unit="feature_std", steps=2, decoder=second),
              "noise": AFAN(site="features.1", strengths=1, mix="", gamma=.2, gamma_unit="feature_std", direction="random"),
              "start": AFAN(site="features.1", strengths=1, mix="", gamma=8., eps=9., random_start=True),
              "l_alfa": LALFA(sites=("features.1", "features.3"), gamma=20.)}[os.environ["METHOD"]]
    loop = fit(create_model("tinynet", seed=0), load("digits").take(101), method, Recipe(epochs=2, batch_size=25, warmup=2, lr=.05),
               progress=False, device="cpu")
    state = {**loop.model.state_dict(), **{f"method.{k}": v for k, v in method.state_dict().items()}}
    save_tensors(f"{os.environ['SADALIB_RUNS']}/rank{loop.team.rank}of{loop.team.size}.safetensors", state)
    if loop.team.size > 1: torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("method", ["afan", "noise", "start", "l_alfa"])
def test_two_gloo_ranks_equal_one_process(tmp_path, method):
    def python(**env):
        env = {**os.environ, "SADALIB_RUNS": str(tmp_path), "OMP_NUM_THREADS": "1", "METHOD": method, **env}
        return subprocess.Popen([sys.executable, "-c", textwrap.dedent(RANKS)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(22000 + (os.getpid() + len(method)*997) % 20000),
              "ACCELERATE_USE_CPU": "true"}
    jobs = [python()] + [python(RANK=str(r), LOCAL_RANK=str(r), **common) for r in (0, 1)]
    outs = [j.communicate(timeout=150)[0] for j in jobs]
    assert [j.returncode for j in jobs] == [0, 0, 0], "\n".join(outs)
    one, a, b = (load_tensors(tmp_path/f"rank{n}.safetensors")[0] for n in ("0of1", "0of2", "1of2"))
    for key in one:
        assert torch.equal(a[key], b[key]), key
        torch.testing.assert_close(a[key], one[key], rtol=2e-3, atol=5e-4, msg=lambda m, key=key: f"{key}: {m}")
