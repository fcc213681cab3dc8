"""What A-FAN's costs are measured against does the same work: shares, passes, losses, gradients, runs upstream, memory."""
import math

import pandas as pd
import pytest
import torch
from torch import nn

from sadalib import benchmarks
from sadalib.afan.method import AFAN
from sadalib.benchmarks import (
    LIMITS,
    afan_costs,
    afan_table,
    attacked_feature,
    hooked_loss,
    layers_around,
    pass_costs,
    peak_bytes,
    split_loss,
    split_network,
    swapped,
    tail_passes,
    tail_share,
    upstream_runs,
)
from sadalib.models import create_model
from sadalib.runs import SadalibError, rand, seeded

SITES = ("layer1", "layer2", "layer3", "layer4")


@pytest.fixture(scope="module")
def net():
    return create_model("resnet18_32", seed=0).train()


@pytest.fixture(scope="module")
def batch():
    return rand(4, 3, 16, 16, generator=seeded(0)), torch.tensor([3, 1, 4, 1])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def ours(model, site, images, labels, steps, strengths):
    method = AFAN(site=site, strengths=strengths, mix="", steps=steps, gamma=1.)
    return method.loss(model, images, labels)["total"]


def test_the_tails_share_is_that_of_the_published_network(net):
    images = rand(1, 3, 32, 32, generator=seeded(0))
    shares = [tail_share(net, site, images) for site in SITES]
    assert shares == pytest.approx([.73, .48, .24, 0], abs=.01) and 0 < shares[3] < 1e-4
    before, after = layers_around(net, "net.conv1", images)
    assert list(before.values()) == [32*32*64*3*9] and len(after) == 20 # 16 of the blocks, 3 shortcuts, the classifier
    assert after[net.net.fc] == 512*10 and net.training


def test_groups_and_layers_that_run_twice_are_counted():
    shared = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), shared, nn.ReLU(), shared)
    before, after = layers_around(model, "0", torch.zeros(2, 3, 5, 5))
    assert before == {model[0]: 2*25*4*3} and after == {shared: 2*2*25*4*2*9}


def test_the_formula_at_known_values():
    assert [round(pass_costs(t)["A-FAN"], 2) for t in (.73, .48, .24, 0)] == [1.73, 1.48, 1.24, 1.]
    assert [round(pass_costs(t, steps=5)["A-FAN"], 2) for t in (.73, 0)] == [3.68, 1.]
    assert pass_costs(.5, strengths=4) == pytest.approx({"A-FAN": 3, "released": 1 + 7.5/3, "hooks only": 1 + 10.5/3,
                                                         "pixel PGD": 8/3})
    for tau in (0., .3, 1.):
        for steps, strengths in ((1, 1), (5, 1), (1, 4), (7, 3)):
            costs = pass_costs(tau, steps=steps, strengths=strengths)
            assert 1 <= costs["A-FAN"] <= costs["released"] <= costs["hooks only"] + 1e-9


@pytest.mark.parametrize("site", SITES)
def test_the_parts_are_the_network(net, batch, site):
    head, tail = split_network(net, site)
    ids = [id(p) for part in (head, tail) for p in part.parameters()]
    assert ids == [id(p) for p in net.parameters()]
    net.eval()
    with torch.no_grad(): assert torch.equal(tail(head(batch[0])), net(batch[0]))
    net.train()


@pytest.mark.parametrize(("site", "steps", "strengths"), [("layer1", 1, 1), ("layer3", 2, 1), ("layer2", 1, 2)])
def test_every_way_gives_one_loss_and_its_gradients(batch, site, steps, strengths):
    model, images = create_model("resnet18_32", seed=0).train().double(), batch[0][..., ::2, ::2].double()
    for name in ("mean", "std"): setattr(model, name, getattr(model, name).double())
    how = {"steps": steps, "strengths": strengths}
    losses = [ours(model, site, images, batch[1], **how), split_loss(model, site, images, batch[1], **how),
              hooked_loss(model, site, images, batch[1], **how)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-9)
    assert losses[2].item() == pytest.approx(losses[0].item(), rel=1e-9)
    wanted, *others = [gradients(model, loss) for loss in losses]
    for other in others:
        for a, b in zip(wanted, other, strict=True): assert torch.allclose(a, b, rtol=1e-6, atol=1e-9)


def test_adversarial_terms_train_the_tail_only(net, batch):
    plain = gradients(net, nn.functional.cross_entropy(net(batch[0]), batch[1]))
    head, tail = split_network(net, "layer3")
    for loss in (split_loss, hooked_loss):
        found = gradients(net, loss(net, "layer3", *batch))
        n = len(list(head.parameters()))
        for a, b in zip(plain[:n], found[:n], strict=True): assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)
        assert not torch.allclose(plain[-2], found[-2], rtol=.1)


def test_the_floor_makes_the_passes_of_the_method(net, batch):
    head, tail = split_network(net, "layer2")
    counts = {"head": 0, "tail": 0}
    hooks = [net.net.conv1.register_forward_hook(lambda *_: counts.update(head=counts["head"] + 1)),
             net.net.fc.register_forward_hook(lambda *_: counts.update(tail=counts["tail"] + 1))]
    for steps, strengths in ((1, 1), (3, 1), (1, 4)):
        counts.update(head=0, tail=0)
        net.zero_grad()
        tail_passes(net, "layer2", *batch, steps=steps, strengths=strengths)
        assert counts == {"head": 1, "tail": steps + strengths} # the clean pass is the attack's first
        assert all(p.grad is not None for p in net.parameters())
    for hook in hooks: hook.remove()


def test_an_attack_moves_by_its_steps_and_leaves_no_gradient(net, batch):
    head, tail = split_network(net, "layer3")
    net.zero_grad()
    feature = head(batch[0]).detach()
    moved = attacked_feature(tail, feature, batch[1], 3, gamma=.01)
    assert (moved - feature).abs().max().item() == pytest.approx(.03, abs=1e-5) and not moved.requires_grad
    assert not feature.requires_grad and all(p.grad is None for p in net.parameters())
    assert attacked_feature(tail, feature, batch[1], 0).equal(feature)


@pytest.mark.parametrize(("steps", "strengths"), [(1, 1), (3, 1), (1, 4)])
def test_layers_before_the_site_run_once(net, batch, steps, strengths):
    how = {"steps": steps, "strengths": strengths}
    runs = [upstream_runs(net, "layer2", batch[0], work) for work in
            (lambda: ours(net, "layer2", *batch, **how), lambda: split_loss(net, "layer2", *batch, **how),
             lambda: hooked_loss(net, "layer2", *batch, **how))]
    assert runs == [1, 2, 2 + steps + strengths]
    assert not any("forward" in m.__dict__ or m._forward_hooks for m in net.modules())


def test_nothing_is_left_after_an_exception(net, batch):
    def fails(): raise KeyError("stop")
    with pytest.raises(KeyError): upstream_runs(net, "layer2", batch[0], fails)
    with pytest.raises(KeyError), swapped(net.net.layer1, batch[0]): fails()
    with pytest.raises(SadalibError, match="did you mean"): split_network(net, "layer5")
    with pytest.raises(SadalibError, match="layer2"): tail_share(net, "layr2", batch[0])
    assert not any("forward" in m.__dict__ or m._forward_hooks for m in net.modules())


def test_memory_is_counted_in_full_and_given_back():
    layer, rows = nn.Linear(100, 10, bias=False), torch.zeros(500, 100)
    def two():
        first = layer(rows).detach()
        view, moved = first[:3], first + 1
        del view, first
        return moved*2
    with torch.no_grad(): assert peak_bytes(layer, two) == 4*(1000 + 2*5000)
    assert peak_bytes(layer, lambda: layer(rows).sum()) == 4*(1000 + 5000 + 1)
    assert peak_bytes(layer, lambda: layer(rows).square().sum().backward()) >= 4*(1000 + 2*5000)
    assert layer.weight.grad is not None and peak_bytes(layer, lambda: None) == 4*1000 and layer.weight.grad is None


def test_memory_is_the_same_each_time_and_grows_with_what_is_kept(batch):
    net, images, labels = create_model("resnet18_32", seed=0).train(), rand(8, 3, 32, 32, generator=seeded(0)), torch.arange(8)
    def step(loss): return lambda: loss().backward()
    plain = step(lambda: nn.functional.cross_entropy(net(images), labels))
    peaks = {k: peak_bytes(net, step(lambda k=k: split_loss(net, "layer1", images, labels, strengths=k))) for k in (1, 3)}
    afan = {k: peak_bytes(net, step(lambda k=k: ours(net, "layer1", images, labels, 1, k))) for k in (1, 3)}
    least = peak_bytes(net, plain)
    assert least == peak_bytes(net, plain) > 2*sum(p.nbytes for p in net.parameters())
    assert least < peaks[1] < peaks[3] and least < afan[1] <= afan[3] < peaks[3]
    assert afan[3] - afan[1] < (peaks[3] - peaks[1])/2 # one graph at a time


def test_rows_make_a_table(monkeypatch):
    monkeypatch.setattr(benchmarks, "interleaved", lambda work, rounds, *_, **__: {k: [1.]*rounds for k in work})
    monkeypatch.setattr(benchmarks, "_counted", lambda model, images, site, work: (10**9, 1))
    monkeypatch.setattr(benchmarks, "peak_bytes", lambda model, work: 10**9)
    rows = afan_costs(8, 3)
    assert len({row["metric"] for row in rows}) == len(rows)
    assert all(math.isfinite(row[k]) for row in rows for k in ("value", "low", "high"))
    assert {metric for metric in LIMITS if metric.startswith("A-FAN step")} <= {row["metric"] for row in rows}
    table = afan_table(pd.DataFrame([{"metric": "another", "value": 2.}, *rows]))
    assert list(table.site) == list(SITES)*3 and list(table.steps) == [1]*4 + [5]*4 + [1]*4
    assert (table["A-FAN"] == 1).all() and (table["pixel PGD"] == 1).all() and table.notna().sum().min() == 8
    assert {row["n"] for row in rows if row.get("column") == "A-FAN"} == {3, 2}
