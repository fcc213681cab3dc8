"""One contract for every training method, in the manner of scikit-learn's estimator checks."""
import copy
from dataclasses import dataclass, fields, is_dataclass

import pytest
import torch

from sadalib.advaa import AdvAA
from sadalib.afan import AFAN
from sadalib.models import create_model
from sadalib.recipes import METHODS, TrainParameters, build_method
from sadalib.runs import Shard, canonical, rand, seeded


@dataclass(kw_only=True)
class AnySite(AFAN):
    "A-FAN at a site of whichever of the two networks it is given"
    def loss(self, model, images, labels, **options):
        site = "stage1" if hasattr(model.net, "stage1") else "features.1"
        return AFAN(**{f.name: getattr(self, f.name) for f in fields(AFAN)} | {"site": site}).loss(model, images, labels, **options)


def ready(name: str, **options):
    "Method `name`, with a hand-made map where it wants one"
    if name == "advaa": return AdvAA(copies=2, padding=2, cutout=8, operations=15) # no pairing: its pool is the training's
    if name == "afan": return AnySite(site="any", strengths=2, mix="01", gamma=.2, gamma_unit="feature_std")
    method = build_method(TrainParameters(method=name, profile="smoke", guidance=options.pop("guidance", "uniform"), **options))
    return method


@pytest.fixture(params=(*METHODS, "advaa", "afan"))
def method(request):
    return ready(request.param)


@pytest.fixture(scope="module")
def floats():
    return rand(12, 3, 32, 32, generator=seeded("images")), torch.arange(12) % 10


@pytest.fixture
def batch(method, floats):
    "What the method takes: images in [0, 1], or bytes"
    return ((floats[0]*255).byte() if method.takes_bytes else floats[0]), floats[1]


def net(name="resnet20"):
    return create_model(name, seed=0).train()


def state(model):
    "Everything an attack or augmentation must leave alone"
    return ([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()],
            [p.grad is None for p in model.parameters()])


def test_is_a_dataclass_that_can_be_identified(method):
    assert is_dataclass(method) and canonical(method)["kind"] == type(method).__name__
    assert all(f.kw_only for f in fields(method))


def test_terms_are_finite_scalars_with_a_total(method, batch):
    terms = method.loss(net("tinynet"), *batch, generator=seeded(0))
    assert "total" in terms and all(v.ndim == 0 and v.isfinite() for v in terms.values())
    assert terms["total"].requires_grad


def test_leaves_flags_and_global_randomness_alone(method, batch):
    model, before = net(), torch.get_rng_state()
    flags = state(model)
    method.loss(model, *batch, generator=seeded(0))
    assert state(model) == flags and torch.equal(torch.get_rng_state(), before)


def test_inputs_are_not_changed(method, batch):
    images, labels = batch[0].clone(), batch[1].clone()
    method.loss(net("tinynet"), images, labels, generator=seeded(0))
    assert torch.equal(images, batch[0]) and torch.equal(labels, batch[1])


def test_same_generator_same_loss(method, batch):
    a, b = (method.loss(net("tinynet"), *batch, generator=seeded(s))["total"] for s in (3, 3))
    assert torch.equal(a, b)


def test_bn_statistics_move_once_per_training_forward(method, batch):
    "Attack passes must not pollute BatchNorm: at most one training pass a step (joint forward)"
    model = net()
    method.loss(model, *batch, generator=seeded(0))
    counted = {int(b) for n, b in model.named_buffers() if n.endswith("num_batches_tracked")}
    assert counted == {1}


def test_two_halves_average_to_the_whole(method, batch):
    "With `Shard`, two processes' gradients, weighted by rows, are one process's gradient"
    def gradient(images, labels, generator):
        model = net("tinynet")
        copy.deepcopy(method).loss(model, images, labels, generator=generator)["total"].backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])
    whole = gradient(*batch, seeded(5))
    parts = [gradient(batch[0][s], batch[1][s], Shard(seeded(5), s.start, s.stop, 12)) for s in (slice(0, 6), slice(6, 12))]
    torch.testing.assert_close(sum(parts) / 2, whole, rtol=2e-3, atol=2e-5)


def test_guided_sada_without_its_map_says_so(floats):
    method = ready("sada", guidance="guided")
    with pytest.raises(ValueError, match="map"):
        method.loss(net("tinynet"), *floats, generator=seeded(0))
