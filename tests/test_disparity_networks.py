"""Networks on two classes: parity with the linear room, D1 and D2 as released, no trace of the intended attack"""
import math
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sadalib.disparity import Problem, TwoClasses, leaves_gradients, train_linear, two_class_problem
from sadalib.disparity.networks import Adversary, NetworkRun, build_network, take_step, train_network
from sadalib.models import count_parameters
from sadalib.runs import SadalibError, seeded
from sadalib.yardsticks import pgd_attack

INF = math.inf


@pytest.fixture(scope="module")
def digits(): return two_class_problem("digits", 5)


@pytest.fixture
def batch(digits): return digits.train.x[-40:].float(), digits.train.y[-40:]


def small(d): return nn.Sequential(nn.Linear(d, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(.2), nn.Linear(16, 2))


def gradient(net, adversary, x, y, *draw):
    "What a step of rate 1 follows"
    before = [p.detach().clone() for p in net.parameters()]
    take_step(net, torch.optim.SGD(net.parameters(), lr=1.), adversary, x, y, *draw)
    used = torch.cat([(a - b).detach().flatten() for a, b in zip(before, net.parameters(), strict=True)])
    with torch.no_grad():
        for p, b in zip(net.parameters(), before, strict=True): p.copy_(b)
    return used


# ---- networks

def test_vgg11_is_torchvisions():
    from torchvision.models.vgg import cfgs, make_layers
    net, theirs = build_network("vgg11_bn", 3072).eval(), make_layers(cfgs["A"], batch_norm=True).eval()
    assert count_parameters(net) == count_parameters(theirs) + count_parameters(nn.Linear(512, 2)) == 9_227_010
    layers = net[1:-2].state_dict().items() # named from 1 on
    theirs.load_state_dict({f"{int(k.split('.')[0]) - 1}.{k.split('.')[1]}": v for k, v in layers})
    x = torch.rand(2, 3072)
    torch.testing.assert_close(net(x), net[-1](theirs(x.view(2, 3, 32, 32)).flatten(1)))


def test_the_mlp_has_its_published_size_and_its_seed():
    assert count_parameters(build_network("mlp", 3072)) == 3072*200 + 200 + 402
    a, b, c = (build_network("mlp", 8, seed=s)[0].weight for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_given_network_is_copied(digits):
    mine = nn.Linear(64, 2)
    before = mine.weight.detach().clone()
    run = train_network(digits, model=mine, epochs=1)
    assert torch.equal(mine.weight, before) and torch.equal(run.network.weight, before)
    assert not torch.equal(run.state["weight"], before)


# ---- the adversary

@pytest.mark.parametrize("norm", [2, INF])
def test_the_intended_attack_is_the_yardstick_and_leaves_nothing(norm, batch):
    net = small(64).train()
    buffers = {k: v.clone() for k, v in net.state_dict().items()}
    attack = Adversary(norm, .3)
    assert leaves_gradients(attack, net, *batch) == 0
    assert all(torch.equal(v, buffers[k]) for k, v in net.state_dict().items()) and net.training
    assert all(p.requires_grad for p in net.parameters())
    n, step = (40, .3/40*4/3) if norm == INF else (50, .3/50*2.5)
    direct = pgd_attack(net, *batch, norm="linf" if norm == INF else "l2", eps=.3, steps=n, step_size=step,
                        generator=seeded("a"))
    assert torch.equal(attack(net, *batch, seeded("a")), direct)


@pytest.mark.parametrize("norm", [2, INF])
def test_the_published_attack_leaves_gradients_and_moves_statistics(norm, batch):
    net = small(64).train()
    mean = net[1].running_mean.clone()
    attack = Adversary(norm, .3, published=True)
    assert leaves_gradients(attack, net, *batch) > 0
    assert not torch.equal(net[1].running_mean, mean) and int(net[1].num_batches_tracked) == attack.count
    moved = attack(net, *batch) - batch[0]
    size = moved.abs().amax(1) if norm == INF else moved.norm(dim=1)
    assert float(size.max()) <= .3 + 1e-5 and float(size.max()) > .2
    assert 0 <= float((batch[0] + moved).min()) and float((batch[0] + moved).max()) <= 1 + 1e-6
    assert not moved.requires_grad


@pytest.mark.parametrize("norm", [2, INF])
def test_the_published_attack_takes_the_documented_steps(norm, batch):
    "A reference with the perturbation as the variable: move, into the cube and the ball in the released order"
    x, y = batch
    net, eps, step = build_network("mlp", 64), .25, .05
    delta = torch.zeros_like(x)
    for _ in range(8):
        slope, = torch.autograd.grad(F.cross_entropy(net(x + delta.requires_grad_()), y), delta)
        delta = delta.detach()
        if norm == INF: delta = (x + (delta + step*slope.sign()).clamp(-eps, eps)).clamp(0, 1) - x
        else:
            delta = (x + delta + step*slope/slope.norm(dim=1, keepdim=True).clamp(min=1e-6)).clamp(0, 1) - x
            delta = delta*(eps/delta.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
    ours = Adversary(norm, eps, steps=8, step_size=step, random_start=False, published=True)(net, x, y)
    torch.testing.assert_close(ours, x + delta, atol=2e-5, rtol=0)


def test_stronger_attacks_find_more(batch):
    net = build_network("mlp", 64)
    def loss(rows): return float(F.cross_entropy(net(rows), batch[1]).detach())
    losses = [loss(Adversary(INF, e)(net, *batch, seeded("b"))) for e in (0., .05, .1, .3, 5.)]
    assert losses == sorted(losses) and losses[0] < losses[1]


# ---- D1

@pytest.mark.parametrize("norm", [2, INF])
def test_one_published_iteration_adds_the_clean_gradient(norm, batch):
    net = build_network("mlp", 64)
    once = Adversary(norm, .2, steps=1, step_size=.2, random_start=False, published=True)
    clean, attacked = gradient(net, Adversary(), *batch), gradient(net, replace(once, published=False), *batch)
    torch.testing.assert_close(gradient(net, once, *batch), clean + attacked, atol=1e-6, rtol=1e-5)
    assert float(clean.norm()) > .1*float(attacked.norm())


def test_the_published_step_follows_the_sum_of_all_iterations(batch):
    net, x, y = build_network("mlp", 64), *batch
    used = gradient(net, Adversary(INF, .2, steps=5, step_size=.04, random_start=False, published=True), x, y)
    total = 0
    for n in range(6): # the rows after n iterations
        rows = Adversary(INF, .2, steps=n, step_size=.04, random_start=False)(net, x, y) if n else x
        total += gradient(net, Adversary(), rows, y)
    torch.testing.assert_close(used, total, atol=1e-5, rtol=1e-4)


def test_forty_iterations_make_a_step_about_forty_times_too_long(batch):
    net = build_network(nn.Linear(64, 2), 64)
    long, meant = (gradient(net, Adversary(INF, .1, published=p), *batch, seeded("c")) for p in (True, False))
    assert 30 < float(long.norm()/meant.norm()) < 50


# ---- training

@pytest.mark.parametrize("protocol", ["corrected", "official"])
def test_a_linear_network_trains_as_the_linear_room(protocol, digits):
    probe = nn.Linear(64, 2)
    init = probe.weight.detach().clone(), probe.bias.detach().clone()
    eps = digits.eps(.5, INF)
    common = dict(norm=INF, eps=eps, protocol=protocol, epochs=6, batch_size=32)
    once = dict(steps=1, step_size=eps) # what the linear room's official protocol does
    mine = train_network(digits, model=probe, momentum=0., random_start=False, learning_rate=.05, seed=3, **common,
                         **(once if protocol == "official" else {}))
    theirs = train_linear(*digits.train, valid=digits.valid, box=(0, 1), optimizer="sgd", init=init, attack="closed",
                          learning_rates=.05, seeds=3, **common)
    torch.testing.assert_close(mine.state["weight"][1] - mine.state["weight"][0], theirs.u[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mine.valid_loss, theirs.valid_loss[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(mine.robust_valid_loss, theirs.robust_valid_loss[0], atol=1e-6, rtol=0)
    assert mine.best_epoch == int(theirs.best_epoch[0])
    for robust in (False, True):
        torch.testing.assert_close(mine.accuracy(digits.balanced, robust=robust),
                                   theirs.accuracy(*digits.balanced, robust=robust)[0])


@pytest.mark.parametrize("protocol", ["corrected", "official"])
def test_equal_calls_give_equal_bits(protocol, digits):
    def go(seed=0): return train_network(digits, model=small, norm=INF, eps=.05, steps=3, epochs=3, protocol=protocol, seed=seed)
    state = torch.get_rng_state()
    first = go()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99) # dropout draws from the run's own seed
    second, other = go(), go(1)
    assert first.state.keys() == second.state.keys()
    assert all(torch.equal(first.state[k], second.state[k]) for k in first.state)
    assert torch.equal(first.robust_valid_loss, second.robust_valid_loss)
    assert not torch.equal(first.state["0.weight"], other.state["0.weight"])


def test_statistics_move_once_a_step_when_corrected(digits):
    def seen(protocol):
        run = train_network(digits, model=small, norm=INF, eps=.05, steps=3, epochs=1, protocol=protocol)
        return int(run.state["1.num_batches_tracked"])
    steps = math.ceil(len(digits.train)/64)
    assert (seen("corrected"), seen("official")) == (steps, 4*steps)


def test_selection_follows_the_asked_loss_and_its_weights_are_kept(digits):
    for protocol, select in (("corrected", None), ("corrected", "clean"), ("official", None), ("official", "robust")):
        run = train_network(digits, model=small, norm=INF, eps=.15, steps=3, epochs=12, learning_rate=.2, protocol=protocol,
                            select=select)
        expected = select or ("robust" if protocol == "corrected" else "clean")
        losses = run.valid_loss if expected == "clean" else run.robust_valid_loss
        assert run.select == expected and run.best_epoch == int(losses.argmin()) and run.best_loss == float(losses.min())
        with torch.no_grad(): again = F.cross_entropy(run.model()(digits.valid.x.float()), digits.valid.y)
        assert float(again) == pytest.approx(float(run.valid_loss[run.best_epoch]), abs=1e-6)
        assert bool((run.robust_valid_loss >= run.valid_loss).all()) and not run.model().training


def test_patience_ends_a_run(digits):
    run = train_network(digits, epochs=200, patience=3, learning_rate=2., eps=.2, norm=INF, steps=2)
    assert run.failed or run.epochs == len(run.valid_loss) == run.best_epoch + 4 < 200


def test_standard_training_has_one_loss(digits):
    run = train_network(digits, epochs=2)
    assert torch.equal(run.valid_loss, run.robust_valid_loss) and "standard" in repr(run)
    both = [train_network(digits, epochs=2, protocol=p).state["0.weight"] for p in ("corrected", "official")]
    assert torch.equal(*both)


@pytest.mark.parametrize("protocol", ["corrected", "official"])
@pytest.mark.parametrize("eps", [0., .1])
def test_a_diverged_run_ends_and_says_so(protocol, eps, digits):
    run = train_network(digits, learning_rate=1e30, eps=eps, norm=INF, steps=3, epochs=9, protocol=protocol)
    assert run.failed and run.epochs < 9 and run.best_epoch == -1 and run.best_loss == INF and not run.state
    assert "failed" in repr(run)
    with pytest.raises(SadalibError, match="lower the learning rate"): run.accuracy(digits.balanced)


class Breaks(nn.Linear):
    "Turns to NaN at a chosen forward pass of training"
    left = 6

    def forward(self, x):
        if self.training: self.left -= 1
        return super().forward(x)*(math.nan if self.left < 0 else 1)


def test_a_run_that_fails_later_keeps_what_it_had(digits):
    run = train_network(digits, model=Breaks(64, 2), epochs=9) # two steps an epoch: the fourth fails
    assert run.failed and run.epochs == 4 and run.best_epoch == 2 and run.valid_loss.isnan().tolist() == [False]*3 + [True]
    assert run.state["weight"].isfinite().all()


def test_errors_of_a_users_network_are_not_taken_for_divergence(digits):
    class Refuses(nn.Linear):
        def forward(self, x):
            if self.training: raise SadalibError("no training here")
            return super().forward(x)
    with pytest.raises(SadalibError, match="no training here"): train_network(digits, model=Refuses(64, 2), epochs=2)


def test_robust_accuracy_can_use_another_adversary(digits):
    run = train_network(digits, epochs=15, learning_rate=.1)
    clean, same = run.accuracy(digits.balanced), run.accuracy(digits.balanced, robust=True)
    worse = [run.accuracy(digits.balanced, adversary=Adversary(INF, e, published=True)) for e in (.05, .2, 1.)]
    assert torch.equal(clean, same) and bool((worse[0] <= clean).all()) and float(worse[-1].max()) < .5
    assert [float(w.sum()) for w in worse] == sorted((float(w.sum()) for w in worse), reverse=True)
    assert run.disparity(digits.balanced) == pytest.approx(float(clean[0] - clean[1]))
    assert isinstance(run, NetworkRun) and clean.shape == (2,)


def test_the_problem_is_left_alone_and_autograd_may_be_off(digits):
    before = digits.train.x.clone()
    with torch.no_grad(): run = train_network(digits, eps=.1, norm=INF, steps=2, epochs=1)
    assert torch.equal(digits.train.x, before) and not run.failed
    assert not any(v.requires_grad for v in run.state.values())


# ---- refusals

@pytest.mark.parametrize(("options", "says"), [
    (dict(model="mpl"), "did you mean `mlp`"), (dict(model="vgg11_bn"), "3x32x32"), (dict(model=nn.Linear(64, 3)), "two logits"),
    (dict(model=lambda d: nn.Flatten()), "two logits"), (dict(protocol="corected"), "did you mean `corrected`"),
    (dict(select="robst"), "did you mean `robust`"), (dict(eps=-.1), "eps is -0.1"), (dict(eps=math.nan), "eps is nan"),
    (dict(eps="a"), "eps is 'a'"), (dict(norm=1), "norm is 1"), (dict(norm="linf"), "norm is 'linf'"), (dict(steps=0), "steps is 0"),
    (dict(steps=1.5), "steps is 1.5"), (dict(step_size=-1.), "step_size"), (dict(learning_rate=0), "learning_rate"),
    (dict(learning_rate=math.nan), "learning_rate"), (dict(momentum=1.), "momentum"), (dict(epochs=0), "epochs is 0"),
    (dict(batch_size=0), "batch_size"), (dict(patience=0), "patience")])
def test_refused(options, says, digits):
    with pytest.raises(SadalibError, match=says.replace("(", r"\(")): train_network(digits, **options)


def test_features_outside_the_box_are_refused(digits):
    synthetic = two_class_problem("gaussian", 2, sizes=(20, 20, 20))
    with pytest.raises(SadalibError, match="problem of images"): train_network(synthetic)
    wide = Problem("wide", 2., synthetic.mean, synthetic.train, synthetic.valid, synthetic.test, synthetic.balanced, (0., 1.))
    with pytest.raises(SadalibError, match="outside the box"): train_network(wide)
    run = train_network(digits, epochs=1)
    with pytest.raises(SadalibError, match="features"): run.accuracy(TwoClasses(digits.test.x[:, :9], digits.test.y))
    with pytest.raises(SadalibError, match="labels"): run.accuracy(TwoClasses(digits.test.x, digits.test.y + 1))
    with pytest.raises(SadalibError, match="no pair"): run.accuracy(3)


def test_a_last_batch_of_one_is_refused_where_batchnorm_needs_more(digits):
    size = len(digits.train) - 1
    with pytest.raises(SadalibError, match="holds one"): train_network(digits, model=small, batch_size=size)
    assert train_network(digits, batch_size=size, epochs=1).epochs == 1


def test_any_radius_goes(digits):
    run = train_network(digits, norm=INF, eps=2*digits.eps(1., INF), steps=2, epochs=1)
    assert run.epochs == 1 and not run.failed


# ---- real images, other devices

@pytest.mark.skipif("SADALIB_DATA" not in os.environ, reason="real images: set SADALIB_DATA")
def test_cats_and_dogs():
    problem = two_class_problem("cifar10", 10, sizes=(400, 100, 100))
    eps = problem.eps(.5, INF)
    robust = train_network(problem, norm=INF, eps=eps, steps=5, epochs=2, learning_rate=.01)
    assert not robust.failed and bool((robust.robust_valid_loss > robust.valid_loss).all())
    accuracy = robust.accuracy(problem.test, robust=True)
    assert bool((accuracy <= robust.accuracy(problem.test)).all())
    tiny = two_class_problem("cifar10", 2, sizes=(32, 16, 16))
    vgg = train_network(tiny, model="vgg11_bn", norm=INF, eps=eps, steps=1, epochs=1, batch_size=24)
    assert vgg.accuracy(tiny.test).shape == (2,) and int(vgg.state["2.num_batches_tracked"]) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_cpus_run(digits):
    common = dict(norm=INF, eps=.05, steps=3, epochs=3, random_start=False)
    state = torch.cuda.get_rng_state()
    here, there = (train_network(digits, device=d, **common) for d in ("cpu", "cuda"))
    assert torch.equal(torch.cuda.get_rng_state(), state) and there.state["0.weight"].device.type == "cpu"
    torch.testing.assert_close(here.robust_valid_loss, there.robust_valid_loss, atol=1e-3, rtol=1e-3)
    assert there.accuracy(digits.balanced, robust=True, device="cuda").shape == (2,)
