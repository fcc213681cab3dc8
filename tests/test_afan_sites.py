"""A-FAN's sites: a replay changes nothing, the stem runs once, and nothing stays on the model, for three kinds of networks."""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import segmentation
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock, ResNet

from sadalib.afan.sites import Site, bn_policy, list_sites
from sadalib.runs import SadalibError, rand, randint, seeded


def narrow(planes=8):
    "A residual network with all parts of ResNet-18, small enough for tests"
    net = ResNet(BasicBlock, [2, 1, 1, 1], num_classes=10)
    net.conv1, net.bn1, net.inplanes = nn.Conv2d(3, planes, 3, 2, 1, bias=False), nn.BatchNorm2d(planes), planes
    for i, blocks in enumerate((2, 1, 1, 1)):
        setattr(net, f"layer{i + 1}", net._make_layer(BasicBlock, planes*2**i, blocks, stride=1 if i == 0 else 2))
    net.fc = nn.Linear(planes*8, 10)
    return net


def classifier():
    torch.manual_seed(0)
    model = narrow()
    x, y = rand(4, 3, 32, 32, generator=seeded("x")), randint(0, 10, 4, generator=seeded("y"))
    return model, lambda: F.cross_entropy(model(x), y)


def detector():
    torch.manual_seed(0)
    body = BackboneWithFPN(narrow(), {f"layer{i}": str(i) for i in range(1, 5)}, [8, 16, 32, 64], 16)
    model = FasterRCNN(body, 3, min_size=64, max_size=96, rpn_batch_size_per_image=16, box_batch_size_per_image=16,
                       rpn_pre_nms_top_n_train=50, rpn_post_nms_top_n_train=30)
    x = list(rand(2, 3, 64, 80, generator=seeded("scenes")))
    targets = [{"boxes": torch.tensor([[5., 8., 40., 44.], [20., 3., 70., 50.]]), "labels": torch.tensor([1, 2])}]*2
    return model, lambda: sum(model(x, copy.deepcopy(targets)).values())


def segmenter():
    torch.manual_seed(0)
    body = IntermediateLayerGetter(narrow(), {"layer4": "out"})
    head = segmentation.deeplabv3.DeepLabHead(64, 5, atrous_rates=(1, 2))
    model = segmentation.DeepLabV3(body, head)
    x, y = rand(2, 3, 64, 64, generator=seeded("streets")), randint(0, 5, 2, 64, 64, generator=seeded("masks"))
    return model, lambda: F.cross_entropy(model(x)["out"], y)


class Skip(nn.Module):
    "DeepLabV3+ in small: dropout before and after the site, a low-level skip, a joined input"
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"a": nn.Conv2d(3, 4, 3, padding=1), "b": nn.Conv2d(4, 4, 3, 2, 1)})
        self.aspp = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(.5))
        self.low, self.relu, self.drop = nn.Conv2d(4, 2, 1), nn.ReLU(inplace=True), nn.Dropout(.3)
        self.block2, self.head = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(inplace=True)), nn.Conv2d(6, 5, 1)

    def forward(self, x):
        low = self.drop(self.relu(self.encoder["a"](x + .1*torch.rand_like(x))))
        high = self.aspp(self.relu(self.encoder["b"](low)))
        low = self.low(low)
        low += .5 # in place, by no module
        return self.head(self.drop(self.block2(torch.cat([low, F.interpolate(high, scale_factor=2)], 1))))


def skip():
    torch.manual_seed(0)
    model = Skip()
    x, y = rand(2, 3, 16, 16, generator=seeded("x")), randint(0, 5, 2, 16, 16, generator=seeded("y"))
    return model, lambda: F.cross_entropy(model(x), y)


SITES = {
    classifier: ["conv1", "bn1", "relu", "layer1", "layer1.0.bn1", "layer1.1", "layer2", "layer2.0.conv2", "layer3", "layer4",
                 "avgpool", ("fc", "input"), ("layer2", "input")],
    detector: ["backbone.body.layer1", "backbone.body.layer2", "backbone.body.layer3", "backbone.body.layer4",
               "roi_heads.box_roi_pool", "roi_heads.box_head", ("roi_heads.box_predictor", "input")],
    segmenter: ["backbone.layer1", "backbone.layer3", "backbone.layer4", "classifier.0", ("classifier.4", "input")],
    skip: ["encoder.a", "encoder.b", "aspp", "aspp.1", "low", ("low", "input"), "block2", ("block2", "input"), "head"],
}
CASES = [(make, *(site if isinstance(site, tuple) else (site, "output"))) for make, sites in SITES.items() for site in sites]


def clean_model(model):
    return not any("forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("make, name, where", CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_replaying_the_captured_value_changes_the_loss_by_exactly_nothing(make, name, where):
    model, loss = make()
    site = Site(model, name, where)
    with site.capture(): clean = loss()
    state = torch.get_rng_state()
    for _ in range(2):
        with site.replay(site.value): again = loss()
        assert (again - clean).item() == 0.
    assert torch.equal(torch.get_rng_state(), state) and clean_model(model)
    with site.replay(site.value*1.5 + .3): assert loss().item() != clean.item()
    clean.backward()
    assert all(p.grad is not None for n, p in model.named_parameters()) and site.gradient.shape == site.value.shape


@pytest.mark.parametrize("make, name", [(classifier, "layer2"), (skip, "aspp"), (detector, "backbone.body.layer3")])
def test_a_capture_is_a_plain_pass(make, name):
    model, loss = make()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    plain = loss()
    plain.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    after, end = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model.load_state_dict(before)
    model.zero_grad()
    torch.set_rng_state(state)
    with Site(model, name).capture(): clean = loss()
    clean.backward()
    assert clean.item() == plain.item() and torch.equal(torch.get_rng_state(), end)
    assert all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters())
    assert all(torch.equal(v, after[n]) for n, v in model.state_dict().items())


def test_gradients_equal_a_network_split_by_hand():
    torch.manual_seed(0)
    head, tail = nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Sequential(nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    model, x, y = nn.Sequential(head, tail), rand(5, 6, generator=seeded("x")), randint(0, 3, 5, generator=seeded("y"))
    shift = .1*rand(5, 8, generator=seeded("shift"))
    f = head(x)
    clean, leaf = F.cross_entropy(tail(f), y), (f.detach() + shift).requires_grad_()
    slope = torch.autograd.grad(clean, f, retain_graph=True)[0]
    (clean + F.cross_entropy(tail(leaf), y)).backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    site = Site(model, "0")
    with site.capture(): clean = F.cross_entropy(model(x), y)
    value = (site.value + shift).requires_grad_()
    with site.replay(value): (clean + F.cross_entropy(model(x), y)).backward()
    assert all(torch.equal(p.grad, w) for p, w in zip(model.parameters(), wanted, strict=True))
    assert torch.equal(value.grad, leaf.grad) and torch.equal(site.gradient, slope)


class Counting(nn.Conv2d):
    runs = 0

    def forward(self, x):
        self.runs += 1
        return super().forward(x)


def test_the_stem_runs_once_a_step():
    net = nn.Sequential(Counting(3, 4, 3), nn.Sequential(Counting(4, 4, 3)), nn.ReLU(), Counting(4, 4, 3))
    site = Site(net, "2")
    with site.capture(): net(torch.ones(1, 3, 9, 9)).sum().backward()
    for _ in range(5):
        with site.replay(site.value): net(torch.ones(1, 3, 9, 9))
    assert [net[0].runs, net[1][0].runs, net[3].runs] == [1, 1, 6]


def test_two_sites_share_a_pass_and_a_later_site_is_captured_in_a_replay():
    model, loss = classifier()
    early, late = Site(model, "layer1"), Site(model, "layer3")
    with early.capture(), late.capture(): clean = loss()
    for site in (early, late):
        with site.replay(site.value): assert loss().item() == clean.item()
    with early.replay(early.value + .2), late.capture(): moved = loss()
    with late.replay(late.value): assert loss().item() == moved.item() != clean.item()
    assert clean_model(model)


def test_nothing_stays_after_an_exception_and_an_outer_forward_survives():
    model, loss = skip()
    mine = model.head.forward
    model.head.forward = lambda x: mine(x) # as a tracer may leave it
    own, site = model.head.__dict__["forward"], Site(model, "aspp")
    def fail(): raise RuntimeError("inside")
    with pytest.raises(RuntimeError, match="inside"), site.capture(): loss(), fail()
    with pytest.raises(SadalibError, match="has no value yet"): _ = site.value
    with site.capture(): loss()
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="inside"), site.replay(site.value): loss(), fail()
    with pytest.raises(RuntimeError, match="inside"), bn_policy(model, "freeze"): fail()
    assert model.head.__dict__.pop("forward") is own and clean_model(model) and torch.equal(torch.get_rng_state(), state)
    assert model.aspp[1].track_running_stats and model.aspp[1].training


def test_a_site_that_runs_often_or_never_is_refused_with_names_that_work():
    model, loss = detector()
    with pytest.raises(SadalibError, match=r"ran 5 times .* would work are `backbone|ran 5 times .* would work are `r"), \
            Site(model, "rpn.head.conv").capture(): loss()
    names = {row.name for row in list_sites(model, loss)}
    assert "rpn.head.conv" not in names and {"backbone.body.layer2", "roi_heads.box_head"} <= names
    with pytest.raises(SadalibError, match="no tensor of floats as output"), Site(model, "backbone").capture(): loss()
    net = classifier()[0]
    with pytest.raises(SadalibError, match="did not run"), Site(net, "layer1").capture(): pass
    with pytest.raises(SadalibError, match="close are `layer4`") , Site(net, "layer44").capture(): pass


def test_what_a_replay_refuses():
    model, loss = classifier()
    site = Site(model, "layer2")
    with site.capture(): loss()
    with pytest.raises(SadalibError, match="same shape"), site.replay(site.value[:2]): loss()
    with pytest.raises(SadalibError, match="reached 0 times"), site.replay(site.value): pass
    with pytest.raises(SadalibError, match="reached 2 times"), site.replay(site.value): loss(), loss()
    with pytest.raises(SadalibError, match="did you mean `output`"): Site(model, "layer2", where="outputs")
    for name in ("", "layer1..0", "training", "layer9"):
        with pytest.raises(SadalibError, match="is no module"): Site(model, name)


def test_every_listed_site_replays():
    model, loss = skip()
    state, stats = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    rows = list_sites(model, loss)
    assert torch.equal(torch.get_rng_state(), state) and clean_model(model)
    assert all(torch.equal(v, stats[n]) for n, v in model.state_dict().items())
    for row in rows:
        site = Site(model, row.name)
        with site.capture(): clean = loss()
        assert tuple(site.value.shape) == row.shape
        with site.replay(site.value): assert loss().item() == clean.item(), row.name
    assert {row.name for row in rows} < {row.name for row in list_sites(model)}


def test_a_site_in_frozen_layers_still_has_a_gradient():
    model, loss = classifier()
    for p in (*model.conv1.parameters(), *model.bn1.parameters(), *model.layer1.parameters()): p.requires_grad_(False)
    site = Site(model, "layer1")
    with site.capture(): clean = loss()
    assert site.frozen and not site.value.requires_grad
    clean.backward()
    assert site.gradient.abs().sum() > 0 and model.conv1.weight.grad is None and model.layer2[0].conv1.weight.grad is not None
    with torch.no_grad(), site.capture(): loss()
    assert not site.frozen and site.gradient is None


def test_autocast_and_half_features():
    model, loss = classifier()
    site = Site(model, "layer2")
    with torch.autocast("cpu", torch.bfloat16):
        with site.capture(): clean = loss()
        with site.replay(site.value.float()): assert loss().item() == clean.item()


@pytest.mark.parametrize("norm, shape", [(nn.BatchNorm2d, (4, 3, 5, 5)), (nn.BatchNorm1d, (6, 3)),
                                         (lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True), (4, 3, 5, 5)),
                                         (lambda c: nn.BatchNorm2d(c, momentum=None), (4, 3, 5, 5))])
def test_policies_of_batch_normalisation(norm, shape):
    net, x = norm(3), rand(*shape, generator=seeded("x"))
    net(x + 1) # statistics of a batch
    def run(mode, x=x):
        other = copy.deepcopy(net)
        with bn_policy(other, mode): out = other(x)
        same = all(torch.equal(a, b) for a, b in zip(net.buffers(), other.buffers(), strict=True))
        assert other.training and other.track_running_stats and other.momentum == net.momentum
        return out, same
    (train, moved), (freeze, kept), (fixed, still) = (run(mode) for mode in ("train", "freeze", "eval"))
    assert not moved and kept and still and torch.equal(train, freeze)
    assert torch.equal(fixed, copy.deepcopy(net).eval()(x)) and not torch.equal(fixed, freeze)
    if isinstance(net, nn.modules.batchnorm._BatchNorm): assert run("freeze", x*torch.inf)[1]
    net.eval()
    with bn_policy(net, "freeze"): assert torch.equal(net(x), fixed) and not net.training
    with pytest.raises(SadalibError, match="did you mean `freeze`"), bn_policy(net, "frozen"): pass


def test_data_parallel_is_refused():
    with pytest.raises(SadalibError, match="one process a device"): Site(nn.DataParallel(nn.Sequential(nn.ReLU())), "0")
