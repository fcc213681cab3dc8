"Shake-Shake and ShakeDrop: sizes, both directions' weights, expectations, generators, and no question to the device"
import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sadalib.models import Normalised, WideResNet, count_parameters, frozen
from sadalib.runs import SadalibError, Shard, cpu_threads, seeded
from sadalib.shake_networks import (
    PyramidBlock,
    PyramidNet,
    ShakeBlock,
    ShakeShake,
    ShakeShortcut,
    Shaking,
    drop_pairs,
    imagenet_resnet,
    keep_probabilities,
    shake,
    shake_pairs,
    shaking,
)

SMALL = {"shake": lambda **k: ShakeShake(8, 4, **k), "shake_batch": lambda **k: ShakeShake(8, 4, per="batch", **k),
         "pyramid": lambda **k: PyramidNet(11, 6, **k),
         "pyramid_batch": lambda **k: PyramidNet(11, 6, per="batch", **k)}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Small tensors: more threads only wait for each other"
    with cpu_threads(1):
        yield


@pytest.fixture(params=SMALL, ids=str)
def net(request):
    "A small network of each kind in training mode, with the same weights each time"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SMALL[request.param]()


def batch(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def step(net, generator, images=None):
    "Logits and all gradients of one training pass"
    net.zero_grad(set_to_none=True)
    with shaking(net, generator):
        logits = net(batch(4, 3, 16, 16) if images is None else images)
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in net.parameters())]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("build, counts", [
    (lambda c: ShakeShake(26, 32, c), (2_923_162, 2_923_162 + 90*129)),
    (lambda c: ShakeShake(26, 96, c, stem="bias"), (26_192_906, 26_192_906 + 90*385)),
    (lambda c: ShakeShake(26, 112, c, stem="bias"), (35_640_426, 35_640_426 + 90*449)),
    (lambda c: PyramidNet(272, 200, c), (26_210_842, 26_288_692)),
    (lambda c: WideResNet(28, 10, c), (36_479_194, 36_536_884)),
    (lambda c: WideResNet(40, 2, c), (2_243_546, 2_255_156))])
def test_parameter_counts_are_exact(build, counts):
    with torch.device("meta"):
        assert tuple(count_parameters(build(c)) for c in (10, 100)) == counts


def test_imagenet_networks():
    with torch.device("meta"):
        nets = [imagenet_resnet(*n) for n in [((3, 4, 6, 3),), ((3, 24, 36, 3),)]]
        nets.insert(1, imagenet_resnet((3, 4, 6, 3), deep=True))
    assert [count_parameters(n) for n in nets] == [25_557_032, 25_576_264, 64_673_832]
    small = imagenet_resnet((1, 1, 1, 1), 7, channels=1, deep=True)
    assert small(batch(2, 1, 65, 65)).shape == (2, 7)
    assert imagenet_resnet((1, 1, 1, 1), 7, channels=1)(batch(2, 1, 64, 64)).shape == (2, 7)


def test_pyramid_widths_reach_the_published_end():
    with torch.device("meta"):
        net = PyramidNet(272, 200)
    assert [len(s) for s in (net.stage1, net.stage2, net.stage3)] == [30, 30, 30] and net.head.in_features == 4*216
    assert net.stage3[-1].keep == .5 and net.stage1[0].keep == pytest.approx(1 - .5/90)
    assert len({k for k in net.state_dict() if "keep" in k or "generator" in k}) == 0


def test_shake_by_hand():
    x = torch.tensor([[2.], [3.]], requires_grad=True)
    a, b = torch.tensor([[.25], [-.5]]), torch.tensor([[.75], [.1]])
    y = shake(x*x, a, b)
    assert torch.equal(y, torch.tensor([[1.], [-4.5]]))
    gradient, = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([[.75*4], [.1*6]]))


def test_second_order_and_vmap():
    x, w = torch.randn(3, 2, dtype=torch.double, requires_grad=True), torch.rand(3, 1, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda x: shake(x.sin(), w, w), x)
    assert torch.autograd.gradgradcheck(lambda x: shake(x.sin(), w, w), x)
    per_sample = torch.func.vmap(torch.func.grad(lambda x, a, b: shake(x.square(), a, b).sum()))
    torch.testing.assert_close(per_sample(x, w, w/2), w/2*2*x)


def test_both_branches_get_their_own_weights_in_both_directions():
    block = ShakeBlock(4, 4).eval()
    x, (a, b) = batch(3, 4, 6, 6).sub(.5).requires_grad_(), shake_pairs(3, 1, generator=seeded(3))[0]
    out = block(x, (a, b))
    active = x.relu()
    by_hand = a*block.branch1(active) + (1 - a)*block.branch2(active) + x
    torch.testing.assert_close(out, by_hand)
    goal = batch(3, 4, 6, 6, seed=1)
    ours = torch.autograd.grad(out, [x, *block.parameters()], goal)
    surrogate = b*block.branch1(x.relu()) + (1 - b)*block.branch2(x.relu()) + x # whose plain gradient is the one wanted
    wanted = torch.autograd.grad(surrogate, [x, *block.parameters()], goal)
    for mine, theirs in zip(ours, wanted, strict=True): torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_shake_drop_gradient_by_hand():
    block = PyramidBlock(8, 4, keep=.6).eval()
    x, a, b = batch(2, 8, 6, 6).requires_grad_(), torch.full((2, 1, 1, 1), -.7), torch.full((2, 1, 1, 1), .2)
    out = block(x, (a, b))
    torch.testing.assert_close(out[:, :8], -.7*block.branch(x)[:, :8] + x)
    ours = torch.autograd.grad(out.sum(), [x, *block.parameters()])
    wanted = torch.autograd.grad((.2*block.branch(x)).sum() + x.sum(), [x, *block.parameters()])
    for mine, theirs in zip(ours, wanted, strict=True): torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_evaluation_is_the_mean_of_branches():
    net, x = ShakeShake(8, 4).eval(), batch(2, 3, 16, 16)
    half = [(torch.full((1, 1, 1, 1), .5),)*2]*3
    torch.testing.assert_close(net(x), net.logits(x, half))
    block, x = ShakeBlock(4, 8, 2).eval(), batch(2, 4, 6, 6)
    mean = (block.branch1(x) + block.branch2(x))/2
    torch.testing.assert_close(block(x), mean + block.shortcut(x))


def test_evaluation_is_the_expectation_of_shake_drop():
    net, x = PyramidNet(11, 6).eval(), batch(2, 3, 16, 16)
    keeps = [(torch.full((1, 1, 1, 1), k),)*2 for k in keep_probabilities(3)]
    torch.testing.assert_close(net(x), net.logits(x, keeps))


def test_distribution_of_the_weights():
    first, second = (torch.stack(w).flatten(1) for w in zip(*shake_pairs(4000, 2, generator=seeded(0)), strict=True))
    for w in (*first, *second): assert w.min() >= 0 and w.max() <= 1 and abs(w.mean() - .5) < .02
    together = torch.corrcoef(torch.cat([first, second]))
    assert (together - torch.eye(4)).abs().max() < .06 # blocks and directions are independent
    keep = torch.tensor([.9, .5])
    passes = [drop_pairs(3, keep, generator=seeded(i)) for i in range(1500)]
    forward, backward = (torch.stack([torch.stack([p[i] for p in pairs]) for pairs in passes])[..., 0, 0, 0]
                         for i in (0, 1)) # (passes, blocks, images)
    kept = (forward == 1).all(2) # (passes, blocks)
    assert torch.equal(kept, (forward == 1).any(2)) and torch.equal(kept, (backward == 1).all(2)) # one gate a batch
    torch.testing.assert_close(kept.float().mean(0), keep, atol=.04, rtol=0)
    torch.testing.assert_close(forward.mean((0, 2)), keep, atol=.04, rtol=0)
    a, b = forward[~kept], backward[~kept]
    assert -1 <= a.min() < -.98 and .98 < a.max() <= 1 and 0 <= b.min() < .02 and .98 < b.max() <= 1
    assert (a[:, 0] != a[:, 1]).all() and abs(torch.corrcoef(torch.stack([a[:, 0], b[:, 0]]))[0, 1]) < .1


@pytest.mark.parametrize("per, rows", [("image", 5), ("batch", 1)])
def test_who_shares_a_weight(per, rows):
    assert shake_pairs(5, 2, per=per)[0][0].shape == (rows, 1, 1, 1)
    dropped = drop_pairs(5, torch.zeros(2), per=per)
    assert dropped[0][0].shape == dropped[0][1].shape == (rows, 1, 1, 1)


def test_the_same_generator_gives_the_same_pass(net):
    twin = copy.deepcopy(net)
    first, again, other = step(net, seeded(1)), step(twin, seeded(1)), step(copy.deepcopy(net), seeded(2))
    assert equal(first, again) and not equal(first, other) and net.generator is None
    assert len({step(net, None)[0].sum().item() for _ in range(12)}) > 1


def test_the_global_state_is_left_alone(net):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    step(net, None), step(net, seeded(0)), net.eval()(batch(2, 3, 16, 16))
    assert torch.equal(before, torch.get_rng_state())


def test_shards_draw_what_one_process_draws(net):
    images = batch(6, 3, 8, 8)
    def drawn(generator, rows):
        with shaking(net, generator): return net.draw(images[rows])
    whole = drawn(seeded(5), slice(0, 6))
    parts = [drawn(Shard(seeded(5), start, stop, 6), slice(start, stop)) for start, stop in ((0, 4), (4, 6))]
    for i, pair in enumerate(whole):
        for direction, weight in enumerate(pair):
            pieces = [part[i][direction] for part in parts]
            if len(weight) == 6: assert torch.equal(weight, torch.cat(pieces))
            else: assert all(torch.equal(weight, piece) for piece in pieces)


def test_shaking_finds_nested_networks_and_restores():
    inner, outer = ShakeShake(8, 4), seeded(1)
    model = nn.ModuleList([Normalised(inner), nn.Linear(2, 2), PyramidNet(11, 6)])
    with shaking(model, outer):
        with pytest.raises(RuntimeError), shaking(model, seeded(2)):
            assert inner.generator is model[2].generator is not outer
            raise RuntimeError
        assert inner.generator is outer
    assert inner.generator is None and all(m.generator is None for m in model.modules() if isinstance(m, Shaking))


def test_attacks_are_deterministic_and_leave_no_trace(net):
    images, before = batch(2, 3, 16, 16), {k: v.clone() for k, v in net.state_dict().items()}
    net.stage2.eval() # an unusual mixture of flags comes back too
    flags = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    def gradients():
        x = images.clone().requires_grad_()
        with frozen(net):
            first, = torch.autograd.grad(net(x).logsumexp(1).sum(), x, create_graph=True)
            return first.detach(), torch.autograd.grad(first.square().sum(), x)[0]
    once, twice = gradients(), gradients()
    assert equal(once, twice) and all(g.abs().sum() > 0 and g.isfinite().all() for g in once)
    assert flags == ([m.training for m in net.modules()], [p.requires_grad for p in net.parameters()])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_every_parameter_learns(net):
    with shaking(net, seeded(4)):
        net(batch(4, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters()) # no dead weights


def test_bf16_autocast(net):
    images = batch(4, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16), shaking(net, seeded(0)):
        logits = net(images)
    logits.float().square().sum().backward()
    assert logits.dtype == torch.bfloat16 and all(p.grad.dtype == torch.float32 for p in net.parameters())
    with shaking(net, seeded(0)): assert (net(images) - logits).abs().max() < .1*logits.abs().max() + .1


@pytest.mark.parametrize("training", [True, False])
def test_nothing_depends_on_a_value(net, training):
    "Tensors without values go through both directions: no `.item()`, no branch on a tensor, no wait for a device"
    with FakeTensorMode():
        fake = type(net)(8, 4) if isinstance(net, ShakeShake) else PyramidNet(11, 6)
        fake.train(training)
        fake.generator = seeded(0)
        logits = fake(torch.rand(2, 3, 16, 16))
        logits.sum().backward()
    assert logits.shape == (2, 10)
    meta = copy.deepcopy(net).to("meta").train(training)
    meta(torch.zeros(2, 3, 16, 16, device="meta")).sum().backward()


def test_the_guard_would_notice():
    with FakeTensorMode(), pytest.raises(Exception, match="item|data-dependent|_local_scalar_dense"):
        torch.rand(1).item()


@pytest.mark.parametrize("kind", ["shake", "pyramid"])
def test_the_pure_half_is_one_graph(kind):
    net, images = SMALL[kind](), batch(4, 3, 16, 16)
    twin = copy.deepcopy(net)
    with shaking(net, seeded(1)): pairs = net.draw(images)
    plain = net.logits(images, pairs)
    torch.testing.assert_close(torch.compile(twin.logits, backend="eager", fullgraph=True)(images, pairs), plain)


def test_a_compiled_network_draws_outside_its_graph():
    net = ShakeShake(8, 4)
    plain = step(copy.deepcopy(net), seeded(1))
    torch.testing.assert_close(step(torch.compile(net, backend="eager"), seeded(1)), plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_wait_on_a_gpu(net):
    net, images = net.cuda(), batch(4, 3, 16, 16).cuda()
    for _ in range(2): net(images).sum().backward() # libraries warm up
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(2): net(images).sum().backward()
    finally: torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("channels, height, width", [(1, 8, 8), (3, 9, 17), (4, 31, 20)])
def test_other_channels_and_sizes(channels, height, width):
    for build in (ShakeShake, PyramidNet):
        net = build(8 if build is ShakeShake else 11, 4, 3, channels).eval()
        images = batch(2, channels, height, width)
        logits = net(images)
        assert logits.shape == (2, 3) and logits.isfinite().all()
        last = net.to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(last, logits, atol=2e-5, rtol=1e-4)


def test_the_shortcut_sees_both_diagonals():
    shortcut = ShakeShortcut(1, 2, stride=2).eval()
    for path in (shortcut.path1, shortcut.path2): nn.init.ones_(path.weight)
    x = torch.arange(16.).view(1, 1, 4, 4)
    out = shortcut(x)*(1 + shortcut.bn.eps)**.5
    torch.testing.assert_close(out[0, 0], torch.tensor([[0., 2.], [8., 10.]]))
    torch.testing.assert_close(out[0, 1], torch.tensor([[5., 7.], [13., 15.]]))


def test_a_network_learns_while_shaken(net):
    images, labels = batch(16, 3, 8, 8), torch.arange(16) % 2
    images[labels == 1, 0] += 1
    optimiser, losses = torch.optim.SGD(net.parameters(), lr=.05, momentum=.9), []
    for i in range(25):
        with shaking(net, seeded(0, i)): loss = nn.functional.cross_entropy(net(images), labels)
        optimiser.zero_grad(); loss.backward(); optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < .5*sum(losses[:5])


@pytest.mark.parametrize("wrong, words", [
    (lambda: ShakeShake(27, 32), "6n + 2 layers, such as 26 or 32"), (lambda: ShakeShake(2, 32), "depth=2"),
    (lambda: ShakeShake(26, 31), "width=31"), (lambda: ShakeShake(26, 0), "width=0"),
    (lambda: ShakeShake(26, 32, per="pixel"), "unknown per `pixel`"),
    (lambda: ShakeShake(26, 32, stem="x"), "unknown stem"), (lambda: PyramidNet(11, -1), "alpha=-1"),
    (lambda: PyramidNet(270, 200), "9n + 2 layers, such as 263 or 272"),
    (lambda: PyramidNet(11, 6, drop=2.), "drop=2.0"),
    (lambda: shaking(nn.Linear(1, 1), "cpu").__enter__(), "generator='cpu'")])
def test_wrong_arguments_are_one_sentence(wrong, words):
    with pytest.raises(SadalibError) as error: wrong()
    assert words in str(error.value) and "\n" not in str(error.value)
