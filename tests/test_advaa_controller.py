"""Adversarial AutoAugment's controller: parity with recorded updates of the public code, and how a search may fail"""
import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sadalib.advaa.controller import (
    OPERATION_NAMES,
    Collapse,
    Controller,
    MovingAverage,
    PolicyLog,
    advantages,
    autoaugment_table,
    controller_loss,
    controller_optimizer,
    drawn_policies,
    load_policies,
    plot_collapse,
    plot_policies,
    policy_diversity,
    policy_shares,
    randaugment_table,
    replay,
    toy_search,
    trivialaugment_table,
    uniform_policies,
    update,
)
from sadalib.runs import SadalibError, Shard, save_tensors, seeded

KEYS = {"embedding_weight": "embedding.weight", "lstm_weight_ih": "lstm.weight_ih", "lstm_weight_hh": "lstm.weight_hh",
        "lstm_bias_ih": "lstm.bias_ih", "lstm_bias_hh": "lstm.bias_hh", "outop_weight": "operation_head.weight",
        "outop_bias": "operation_head.bias", "outmag_weight": "level_head.weight", "outmag_bias": "level_head.bias"}


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent/"golden"/"advaa_controller.npz", allow_pickle=False) as arrays: return dict(arrays)


def recorded(golden):
    "The controller of the recorded updates"
    controller = Controller(15)
    controller.load_state_dict({ours: torch.from_numpy(golden[f"p_{theirs}"]) for theirs, ours in KEYS.items()})
    return controller


def far(ours, theirs):
    "Largest absolute difference"
    return np.abs(torch.as_tensor(ours).detach().numpy().astype(float) - np.asarray(theirs, float)).max()


# The recording's own check had log-probabilities within 8e-6, losses 2e-6, gradients 3e-8, parameters 8e-8. Here sub-policies are
# decoded at once, so sums over them are rounded in another order: gradients of the heads' biases, up to 1.3, may differ by two units
# in the last place (2.4e-7; a float64 evaluation is 1.4e-7 from the recording), parameters after Adam by 1e-7.
# Sums of 20 entropies, recorded in float32, are compared with a float64 controller.

def test_recorded_updates(golden):
    controller = recorded(golden)
    optimizer = controller_optimizer(controller, float(golden["lr"]))
    for k in range(3):
        policies = torch.from_numpy(golden[f"s{k}_policies"]).view(4, 5, 2, 2)
        seen = controller(policies)
        assert far(seen.log_prob, golden[f"s{k}_log_probs"]) <= 8e-6
        assert far(copy.deepcopy(controller).double()(policies).entropy, golden[f"s{k}_entropies"]) <= 8e-6
        assert far(seen.step_log_prob.flatten(1), golden[f"s{k}_step_log_probs"]) <= 8e-6
        assert far(seen.step_entropy.flatten(1), golden[f"s{k}_step_entropies"]) <= 8e-6
        assert far(seen.operation_logits.flatten(1, 2), golden[f"s{k}_op_logits"]) <= 2e-6
        assert far(seen.level_logits.flatten(1, 2), golden[f"s{k}_mag_logits"]) <= 2e-6
        weights = advantages(golden[f"s{k}_Lm"])
        assert far(weights, golden[f"s{k}_normalized_Lm"]) <= 2e-6
        assert far(controller_loss(seen.log_prob, weights, seen.entropy, entropy_weight=0), golden[f"s{k}_score_loss"]) <= 2e-6
        loss = controller_loss(seen.log_prob, weights, seen.entropy, entropy_weight=float(golden["entropy_penalty"]))
        assert far(loss, golden[f"s{k}_controller_loss"]) <= 2e-6
        loss.backward()
        for theirs, ours in KEYS.items():
            gradient = controller.get_parameter(ours).grad
            assert far(gradient.norm(), golden[f"s{k}_gradnorm_{theirs}"]) <= 2e-6
            room = 2.4e-7 if theirs in ("outop_bias", "outmag_bias") else 3e-8
            if k == 0: assert far(gradient, golden[f"s0_grad_{theirs}"]) <= room
        before = {n: p.detach().clone() for n, p in controller.named_parameters()}
        told = update(controller, optimizer, policies, golden[f"s{k}_Lm"])
        assert abs(told["loss"] - golden[f"s{k}_controller_loss"]) <= 2e-6
        assert abs(told["entropy"] - golden[f"s{k}_entropy_mean"]) <= 8e-6
        for theirs, ours in KEYS.items() if k == 0 else ():
            assert far(controller.get_parameter(ours).detach() - before[ours], golden[f"s0_delta_{theirs}"]) <= 1e-7
    for theirs, ours in KEYS.items(): assert far(controller.get_parameter(ours), golden[f"final_{theirs}"]) <= 1e-7


@pytest.mark.parametrize(("operations", "parameters", "nats"), [(15, 56925, 50.106), (16, 57058, 50.752)])
def test_parameters_and_the_entropy_of_even_heads(operations, parameters, nats):
    controller = Controller(operations)
    assert sum(p.numel() for p in controller.parameters()) == parameters
    assert all(-.1 <= p.min() and p.max() < .1 for p in controller.parameters())
    assert not controller.operation_head.bias.any() and not controller.level_head.bias.any()
    with torch.no_grad(): controller.operation_head.weight.zero_(), controller.level_head.weight.zero_()
    for carry in (False, True):
        controller.carry_state = carry
        assert torch.allclose(controller.sample(3).entropy, torch.tensor(nats), atol=6e-4)


@pytest.mark.parametrize("options", [{}, {"carry_state": True}, {"logit_bound": 1.5}, {"temperature": 5.},
                                     {"sub_policies": 3, "hidden": 20, "embedding": 7, "levels": 4}])
def test_teacher_forcing_equals_sampling(options):
    controller = Controller(15, **options)
    with torch.no_grad(): controller.operation_head.weight.mul_(30), controller.level_head.weight.mul_(30)
    sample = controller.sample(6, seeded(0))
    forced = controller(sample.policies)
    assert sample.policies.shape == (6, controller.sub_policies, 2, 2) and sample.policies.dtype == torch.int64
    assert torch.equal(forced.policies, sample.policies)
    assert torch.allclose(controller.log_prob(sample.policies), sample.log_prob, atol=8e-6, rtol=0)
    assert torch.allclose(forced.entropy, sample.entropy, atol=8e-6, rtol=0)
    if controller.logit_bound: assert max(sample.operation_logits.abs().max(), sample.level_logits.abs().max()) <= 1.5


@pytest.mark.parametrize("carry", [False, True])
def test_samples_follow_their_probabilities(carry):
    controller = Controller(3, levels=2, sub_policies=2, carry_state=carry)
    with torch.no_grad(): controller.operation_head.bias.copy_(torch.tensor([1., 0., -1.]))
    sample = controller.sample(20000, seeded(0))
    first = torch.bincount(sample.policies[:, 0, 0, 0], minlength=3)/20000
    wanted = sample.operation_logits[0, 0, 0].softmax(0)
    assert (first - wanted).abs().max() < 4*(wanted*(1 - wanted)/20000).sqrt().max()
    estimate = -sample.log_prob.mean() # of the entropy
    assert abs(estimate - sample.entropy.mean()) < 4*sample.log_prob.std()/math.sqrt(20000)


def test_reset_makes_sub_policies_independent_and_carry_does_not():
    policies, other = uniform_policies(4, generator=seeded(0)), uniform_policies(4, generator=seeded(1))
    other[:, 1:] = policies[:, 1:] # all but the first sub-policy
    for carry in (False, True):
        controller = Controller(carry_state=carry)
        steps = [controller(p).step_log_prob for p in (policies, other)]
        assert torch.equal(steps[0][:, 1:], steps[1][:, 1:]) != carry
    moved = policies[:, [3, 1, 4, 0, 2]]
    assert torch.allclose(Controller().log_prob(moved), Controller().log_prob(policies), atol=8e-6, rtol=0)


def test_permuting_policies_permutes_everything():
    controller, order = Controller(carry_state=True), torch.tensor([2, 0, 3, 1])
    policies, losses = uniform_policies(4, generator=seeded(0)), torch.tensor([1.2, 1.5, .9, 1.35])
    assert torch.allclose(controller.log_prob(policies[order]), controller.log_prob(policies)[order], atol=8e-6, rtol=0)
    assert torch.allclose(advantages(losses[order]), advantages(losses)[order], atol=1e-6)
    mean = MovingAverage()
    mean.add(losses[order])
    assert torch.equal(mean.value, losses[order])


def test_seeds_decide_and_the_global_state_is_left_alone():
    before = torch.get_rng_state()
    a, b, c = Controller(seed=3), Controller(seed=3), Controller(seed=4)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.lstm.weight_hh, c.lstm.weight_hh)
    assert torch.equal(a.sample(4, seeded(1)).policies, b.sample(4, seeded(1)).policies)
    assert not torch.equal(a.sample(4).policies, a.sample(4).policies)
    uniform_policies(4), drawn_policies(trivialaugment_table(), 4), toy_search(2)
    update(a, controller_optimizer(a), a.sample(2).policies, [0., 1.])
    assert torch.equal(torch.get_rng_state(), before)
    part = uniform_policies(2, generator=Shard(seeded(5), 1, 3, 4))
    assert torch.equal(part, uniform_policies(4, generator=seeded(5))[1:3])


def test_rewarded_operations_become_likely():
    controller = Controller(15, seed=0)
    optimizer = controller_optimizer(controller, 1e-2)
    def chance(): return controller.sample(1, seeded(0)).operation_logits[0, 0, 0].softmax(0)[0].item()
    first, generator = chance(), seeded(1)
    for _ in range(40):
        policies = controller.sample(8, generator).policies
        update(controller, optimizer, policies, (policies[..., 0] == 0).flatten(1).any(1).float())
    assert chance() > 3*first


def test_equal_rewards_have_no_gradient_and_one_policy_none_to_compare_with():
    controller = Controller()
    seen = controller.sample(5, seeded(0))
    loss = controller_loss(seen.log_prob, advantages([.3]*5), seen.entropy, entropy_weight=0)
    loss.backward()
    assert loss == 0 and all(not p.grad.any() for p in controller.parameters())
    with pytest.raises(SadalibError, match="M of at least 2"): advantages([1.])
    with pytest.raises(SadalibError, match=r"\(M,\)"): advantages([[1., 2.]])


def test_a_larger_entropy_weight_raises_entropy():
    controller = Controller()
    with torch.no_grad(): controller.operation_head.bias[0] = 3
    policies, optimizer = controller.sample(4, seeded(0)).policies, controller_optimizer(controller, 1e-2)
    before = controller(policies).entropy.mean()
    for _ in range(5): update(controller, optimizer, policies, [1.]*4, entropy_weight=1.)
    assert controller(policies).entropy.mean() > before + 1


def state_of(controller, optimizer):
    return [p.detach().clone() for p in controller.parameters()], {k: {n: torch.as_tensor(t).clone() for n, t in s.items()}
                                                                   for k, s in optimizer.state_dict()["state"].items()}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(("losses", "options", "says"), [
    ([1., math.nan], {}, "resume from"), ([1., math.inf], {}, "resume from"),
    ([0., 1.], {"entropy_weight": math.nan}, "lower its"), ([0., 1.], {"entropy_weight": math.inf, "steps": 3}, "lower its")])
def test_what_is_not_finite_changes_nothing(losses, options, says, warm):
    controller = Controller()
    optimizer, policies = controller_optimizer(controller), controller.sample(2, seeded(0)).policies
    if warm: update(controller, optimizer, policies, [0., 1.])
    before = state_of(controller, optimizer)
    with pytest.raises(SadalibError, match=says): update(controller, optimizer, policies, losses, **options)
    after = state_of(controller, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1].keys() == after[1].keys()
    assert all(torch.equal(t, after[1][k][n]) for k, s in before[1].items() for n, t in s.items())
    assert all(p.grad is None for p in controller.parameters())


def test_a_step_that_overflows_is_taken_back():
    controller = Controller()
    optimizer, policies = controller_optimizer(controller, 3e37), controller.sample(2, seeded(0)).policies
    before = state_of(controller, optimizer)[0]
    with pytest.raises(SadalibError, match="lower its"): update(controller, optimizer, policies, [0., 1.], steps=2)
    assert all(torch.equal(a, b) for a, b in zip(before, controller.parameters(), strict=True))
    assert not optimizer.state_dict()["state"]


def test_more_steps_and_clipped_gradients():
    moved = []
    for steps in (1, 4):
        controller = Controller()
        policies = controller.sample(4, seeded(0)).policies
        first = controller.log_prob(policies)[3].item()
        update(controller, torch.optim.SGD(controller.parameters(), .01), policies, [0., 1, 2, 3], steps=steps, max_norm=.5)
        moved.append(controller.log_prob(policies)[3].item() - first)
        if steps == 1:
            distance = sum((p - q).square().sum() for p, q in zip(controller.parameters(), Controller().parameters(), strict=True))
            assert distance.sqrt() <= .005*(1 + 1e-4)
    assert moved[1] > moved[0] > 0


def test_updates_resume_bit_for_bit():
    def run(controller, optimizer, generator, updates):
        for _ in range(updates):
            policies = controller.sample(4, generator).policies
            update(controller, optimizer, policies, policies[..., 1].flatten(1).float().mean(1))
    straight = Controller()
    run(straight, controller_optimizer(straight), seeded(0), 6)
    first, generator = Controller(), seeded(0)
    optimizer = controller_optimizer(first)
    run(first, optimizer, generator, 3)
    second = Controller(seed=9)
    second.load_state_dict(first.state_dict())
    resumed = controller_optimizer(second)
    resumed.load_state_dict(optimizer.state_dict())
    run(second, resumed, generator, 3)
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), second.parameters(), strict=True))


def test_moving_average():
    rows, moving, plain = torch.rand(7, 4, generator=seeded(0)), MovingAverage(.9), MovingAverage(1.)
    for row in rows: moving.add(row), plain.add(row)
    weights = .9**torch.arange(6., -1, -1)
    assert torch.allclose(moving.value, (weights[:, None]*rows).sum(0)/weights.sum(), atol=1e-6)
    assert torch.allclose(plain.value, rows.mean(0), atol=1e-6)
    again = MovingAverage(.9)
    again.load_state_dict(moving.state_dict())
    again.add(rows[0]), moving.add(rows[0])
    assert torch.equal(again.value, moving.value)
    with pytest.raises(SadalibError, match="call `reset`"): moving.add(torch.zeros(3))
    moving.reset()
    with pytest.raises(SadalibError, match="no losses"): moving.value.sum()


# the collapse

@pytest.mark.parametrize(("options", "fits"), [({}, lambda nats: nats < 20), ({"entropy_weight": .1}, lambda nats: nats > 30),
                                               ({"logit_bound": 1.5}, lambda nats: nats > 30)], ids=["1e-5", ".1", "bound"])
def test_the_collapse_and_what_prevents_it(options, fits):
    record, policies = toy_search(600, **options)
    entropies = [row["entropy"] for row in record.rows]
    assert abs(entropies[0] - 50.1) < .1 and min(entropies[:100]) > 49 and fits(entropies[-1])
    assert bool(record.warns) == (not options)
    assert policies.shape == (600, 8, 5, 2, 2)


def test_the_floor_of_bounded_logits():
    controller = Controller(15, logit_bound=1.5)
    with torch.no_grad():
        for head in (controller.operation_head, controller.level_head):
            head.bias.fill_(-1e4)
            head.bias[0] = 1e4
    assert 30.59 < controller.sample(2, seeded(0)).entropy[0] < 30.6


def test_the_detector_warns_once_and_resumes():
    watch, even = Collapse(), uniform_policies(8, generator=seeded(0))
    assert watch.add(0, even, 50.) is None and watch.add(1, even) is None and not watch.warns
    with pytest.warns(UserWarning, match="19.0 nats, below 20, in epoch 2"): assert watch.add(2, even, torch.tensor([19., 19.]))
    assert watch.add(3, torch.full_like(even, 1), 5.) is None and "ShearY is 100%" in watch.warns[1]
    again = Collapse()
    again.load_state_dict(watch.state_dict())
    assert again.warns == watch.warns and again.frame().equals(watch.frame())
    assert list(watch.frame()) == ["epoch", "entropy", "top_operation", "top_share", "distinct"]
    Collapse().load_state_dict(Collapse().state_dict())


def test_even_policies_never_warn():
    for m in (2, 8):
        watch = Collapse(quiet=True)
        for epoch in range(300): watch.add(epoch, uniform_policies(m, generator=seeded(m, epoch)))
        assert not watch.warns


def test_shares_and_diversity():
    policies = torch.zeros(3, 2, 5, 2, 2, dtype=torch.int64)
    policies[1, ..., 0], policies[1, ..., 0, 1] = 4, 9
    operations, levels = policy_shares(policies)
    assert operations.shape == (3, 16) and levels.shape == (3, 10)
    assert operations[:, [0, 4]].tolist() == [[1, 0], [0, 1], [1, 0]] and levels[1, [0, 9]].tolist() == [.5, .5]
    assert policy_diversity(policies[0]) == {"distinct": 1, "distance": 0., "top_share": 1.}
    two = torch.tensor([[[[0, 0], [0, 0]], [[1, 1], [0, 0]]]])
    assert policy_diversity(two) == {"distinct": 2, "distance": .5, "top_share": .75}


def test_pictures():
    record, policies = toy_search(5)
    assert len(plot_policies(policies, OPERATION_NAMES[:15]).axes) == 2
    assert len(plot_policies(policies[:1], OPERATION_NAMES[:15], strength=torch.rand(15, 10)).axes) == 3
    assert len(plot_collapse({"search": record, "nothing": Collapse()}).axes) == 2
    with pytest.raises(SadalibError, match="stack them"): plot_policies(policies[0])


# logs and replay

@pytest.fixture
def log():
    return PolicyLog(meta={"model": "wrn_40_2"}, policies=torch.stack([uniform_policies(4, generator=seeded(e)) for e in range(6)]))


def test_a_log_survives_its_file(log, tmp_path):
    path = log.save(tmp_path/"policies.safetensors")
    again = load_policies(path)
    assert torch.equal(again.policies, log.policies) and again.policies.dtype == torch.int64
    assert (again.operations, again.levels, again.meta) == (log.operations, 10, {"model": "wrn_40_2"})
    assert path.stat().st_size < 6*4*20 + 700
    empty = load_policies(PolicyLog().save(tmp_path/"empty.safetensors"))
    assert len(empty) == 0
    empty.add(log.policies[0])
    assert len(empty) == 1


def test_replay_maps_epochs_in_proportion(log):
    assert all(torch.equal(replay(log, e), log.policies[e]) for e in range(6))
    for epochs in (1, 3, 6, 13):
        mapped = [replay(log, e, epochs) for e in range(epochs)]
        assert all(torch.equal(p, log.policies[math.floor(e*6/epochs)]) for e, p in enumerate(mapped))
    assert torch.equal(replay(log, 2, m=4, operations=list(OPERATION_NAMES)), log.policies[2])


@pytest.mark.parametrize(("call", "says"), [
    (lambda log: replay(log, 6), "6 epochs, but epoch 6"), (lambda log: replay(log, 3, 3), "count from 0"),
    (lambda log: replay(log, -1), "epoch is -1"), (lambda log: replay(log, 0, m=8), "set its M"),
    (lambda log: replay(log, 0, operations=OPERATION_NAMES[:15]), "use the same table"),
    (lambda log: replay(PolicyLog(), 0, 5), "0 epochs"), (lambda log: log.add(log.policies[0, :2]), "begin another"),
    (lambda log: log.add(log.policies[0] + 16), "operations below 16"), (lambda log: log.add(log.policies[0].float()), "whole numbers")])
def test_a_log_refuses(log, call, says):
    with pytest.raises(SadalibError, match=says): call(log)


@pytest.mark.parametrize(("tensors", "meta"), [
    ({"policies": torch.zeros(2, 4, 5, 2, 2).byte()}, {}), ({"other": torch.zeros(2)}, {"kind": "policy log"}),
    ({"policies": torch.full((2, 4, 5, 2, 2), 30).byte()}, {"kind": "policy log", "operations": ["a", "b"], "levels": 10}),
    ({"policies": torch.zeros(4, 5, 2, 2).byte()}, {"kind": "policy log", "operations": ["a", "b"], "levels": 10})])
def test_other_files_are_no_logs(tensors, meta, tmp_path):
    with pytest.raises(SadalibError): load_policies(save_tensors(tmp_path/"file", tensors, meta))


# fixed tables

def effect(name, level):
    "What our table does at `level`, in the units of torchvision's tables"
    m = level/9
    if name in ("Contrast", "Color", "Brightness", "Sharpness"): return abs(.1 + 1.8*m - 1)
    if name == "Solarize": return 256*m
    if name == "Posterize": return int(4 + 4*m + 1e-9)
    return {"Rotate": 30*m, "ShearX": .3*m, "ShearY": .3*m, "TranslateX": .45*32*m, "TranslateY": .45*32*m}.get(name, 0)


def test_tables_do_what_torchvisions_do():
    from torchvision.transforms import AutoAugment, AutoAugmentPolicy, RandAugment
    auto, names = AutoAugment(AutoAugmentPolicy.CIFAR10), ("Posterize", 9)
    space, table = auto._augmentation_space(10, (32, 32)), autoaugment_table().view(25, 20, 20, 2, 2)
    for k, published in enumerate(auto.policies):
        for slot, (name, chance, level) in enumerate(published):
            entries = table[k, :, 0, 0] if slot == 0 else table[k, 0, :, 1]
            words = [(OPERATION_NAMES[o], v) for o, v in entries.tolist()]
            acting = [w for w in words if w != names]
            assert len(acting) == round(20*chance)
            wanted = float(space[name][0][level]) if level is not None else 0.
            room = {"Solarize": 1.01, "TranslateX": .11, "TranslateY": .11}.get(name, .1001 if space[name][1] else 1e-4)
            assert all(w[0] == name and abs(effect(*w) - wanted) <= room for w in acting), (name, level)
    for magnitude in range(31):
        space = RandAugment(magnitude=magnitude)._augmentation_space(31, (32, 32))
        half = {"Solarize": 14.8, "Posterize": 0, "Rotate": 1.7, "ShearX": .017, "ShearY": .017, "TranslateX": .9, "TranslateY": .9}
        for o, level in randaugment_table(magnitude)[::28, 0].tolist():
            name = OPERATION_NAMES[o]
            if (name, level) == names or name not in space: continue
            wanted = space[name][0][magnitude].item() if space[name][0].ndim else 0.
            assert abs(effect(name, level) - wanted) <= half.get(name, .1001), (name, magnitude, level)


def test_tables_are_what_they_say():
    skipped = torch.tensor([9, 9])
    trivial = trivialaugment_table()
    assert trivial.shape == (280, 2, 2) and (trivial[:, 1] == skipped).all()
    shares = policy_shares(trivial[None, :, :1].repeat(1, 1, 2, 1))[0]
    assert torch.allclose(shares[shares > 0].sort().values, torch.tensor([1/14]*12 + [2/14]), atol=1e-6) # with the identity
    rand = randaugment_table()
    assert rand.shape == (784, 2, 2)
    policies = drawn_policies(rand, 3, 7, generator=seeded(0))
    assert policies.shape == (3, 7, 2, 2) and all((rand == p).flatten(1).all(1).any() for p in policies.flatten(0, 1))
    assert torch.equal(drawn_policies(rand, 3, None), rand.expand(3, -1, -1, -1))
    with pytest.raises(SadalibError, match="did you mean|known are"): randaugment_table(9, OPERATION_NAMES[:9])
    with pytest.raises(SadalibError, match="30 is the most"): randaugment_table(40)
    with pytest.raises(SadalibError, match=r"\(rows, 2, 2\)"): drawn_policies(rand[0], 2)


@pytest.mark.parametrize(("call", "says"), [
    (lambda: Controller(1), "operations is 1"), (lambda: Controller(15.), "operations is 15.0"),
    (lambda: Controller(sub_policies=0), "sub_policies is 0"), (lambda: Controller(logit_bound=-1), "logit_bound is -1"),
    (lambda: Controller(temperature=0), "temperature is 0"), (lambda: Controller().sample(0), "m is 0"),
    (lambda: Controller().sample(True), "m is True"), (lambda: Controller()(torch.zeros(2, 5, 2, 2)), "whole numbers"),
    (lambda: Controller()(torch.zeros(2, 4, 2, 2).long()), "(M, 5, 2, 2)"),
    (lambda: Controller()(torch.zeros(0, 5, 2, 2).long()), "choose an epoch"),
    (lambda: Controller()(torch.zeros(3, 2, 5, 2, 2).long()), "choose an epoch"),
    (lambda: Controller(15)(torch.full((2, 5, 2, 2), 15)), "operations below 15"),
    (lambda: Controller()(torch.full((2, 5, 2, 2), -1)), "less than 0"), (lambda: Controller()("no"), "whole numbers"),
    (lambda: MovingAverage(1.5), "decay is 1.5"), (lambda: controller_optimizer(Controller(), math.nan), "lr is nan"),
    (lambda: uniform_policies(2, operations=0), "operations is 0"),
    (lambda: update(Controller(), None, torch.zeros(2, 5, 2, 2).long(), [1., 2.], steps=0), "steps is 0"),
    (lambda: update(c := Controller(), controller_optimizer(c), torch.zeros(2, 5, 2, 2).long(), [1., 2, 3]), "3 losses for 2")])
def test_bad_input_is_one_sentence(call, says):
    with pytest.raises(SadalibError) as error: call()
    text = str(error.value)
    assert says in text and text.endswith(".") and "\n" not in text
