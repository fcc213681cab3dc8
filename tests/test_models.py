"The networks: sizes, layouts, seeds, refusals, ImageNet weights, and `frozen`"
import contextlib
import hashlib

import pytest
import torch
from torch import nn

from sadalib import models
from sadalib.models import NETWORKS, count_parameters, create_model, frozen, list_models, statistics
from sadalib.runs import SadalibError, cpu_threads

COUNTS = {"digitnet": 4_547_466, "resnet20": 269_722, "resnet32": 464_154, "resnet44": 658_586, "resnet56": 853_018,
          "resnet110": 1_727_962, "wrn_16_1": 175_066, "wrn_16_4": 2_748_890, "wrn_40_2": 2_243_546,
          "wrn_28_10": 36_479_194, "shake_shake_26_2x32d": 2_923_162, "shake_shake_26_2x96d": 26_192_906,
          "shake_shake_26_2x112d": 35_640_426, "pyramidnet_272_shakedrop": 26_210_842, "resnet50": 23_528_522,
          "resnet50d": 23_547_754, "resnet200": 62_645_322, "resnet18": 11_181_642, "tinynet": 6_666,
          "resnet18_32": 11_173_962, "efficientnet_b0": 4_020_358}

LARGE = {"resnet18", "resnet110", "wrn_28_10", "shake_shake_26_2x96d", "shake_shake_26_2x112d", "resnet50", "resnet50d",
         "resnet200", "pyramidnet_272_shakedrop"} # slow to build or run; their blocks are tested in test_shake_networks


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Small tensors: more threads only wait for each other"
    with cpu_threads(1):
        yield


def batch(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def flags(model):
    return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


def test_parameter_counts_are_exact():
    assert {row.name: row.parameters for row in list_models()} == COUNTS
    for name in COUNTS.keys() - LARGE:
        assert count_parameters(create_model(name, seed=0)) == COUNTS[name]
    assert count_parameters(create_model("wrn_40_2", 100)) == 2_255_156


def test_large_networks_take_images():
    with torch.device("meta"):
        for name in LARGE - {"resnet18", "resnet110"}:
            card = NETWORKS[name]
            assert card.build(10, 3, (32, 32)).eval()(torch.zeros(2, 3, card.size, card.size)).shape == (2, 10), name
        assert count_parameters(NETWORKS["resnet50"].build(1000, 3, (224, 224))) == 25_557_032
        assert count_parameters(NETWORKS["resnet50d"].build(1000, 3, (224, 224))) == 25_576_264
        assert count_parameters(NETWORKS["resnet200"].build(1000, 3, (224, 224))) == 64_673_832
        assert count_parameters(NETWORKS["wrn_28_10"].build(100, 3, (32, 32))) == 36_536_884


def test_listing_is_a_table():
    table = list_models()._repr_markdown_().splitlines()
    assert len(table) == 2 + len(NETWORKS) and all(row.source for row in list_models())


@pytest.mark.parametrize("name", [n for n in COUNTS if n not in LARGE - {"resnet18"}])
def test_shapes_layouts_and_gradients(name):
    model, images = create_model(name, 7, seed=0).eval(), batch(2, 3, 32, 32)
    logits = model(images)
    assert logits.shape == (2, 7) and logits.isfinite().all()
    last = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, logits, atol=2e-5, rtol=1e-4)
    model.train()(images).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name, channels, size", [
    ("digitnet", 1, (28, 44)), ("tinynet", 4, (9, 17)), ("tinynet", 1, 8), ("resnet20", 1, (31, 20)),
    ("wrn_16_1", 4, 9), ("resnet18", 1, 64), ("digitnet", 3, 16)])
def test_other_channels_and_sizes(name, channels, size):
    height, width = (size, size) if isinstance(size, int) else size
    model = create_model(name, 3, channels=channels, size=size, seed=0).eval()
    assert model(batch(2, channels, height, width)).shape == (2, 3)


def test_relu_after_pooling_is_relu_before_it():
    net = NETWORKS["digitnet"].build(10, 3, (32, 32))
    conv1, pool, relu, conv2 = net.features[:4]
    images = batch(3, 3, 32, 32).round_(decimals=0).requires_grad_()  # constant regions: ties in every pool
    usual = net.classifier(pool(relu(conv2(pool(relu(conv1(images)))))).flatten(1))
    assert torch.equal(usual, net(images))
    ours, theirs = (torch.autograd.grad(logits[:, 0].sum(), images)[0] for logits in (net(images), usual))
    torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-5)


def test_shortcuts_of_option_a_carry_the_input():
    block = models.BasicBlock(16, 32, stride=2).eval()
    nn.init.zeros_(block.conv2.weight)
    x = batch(1, 16, 8, 8)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2]) and not out[:, :8].any() and not out[:, 24:].any()


def test_seed_decides_and_the_global_state_stays():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (state(create_model("wrn_16_1", seed=s)) for s in (1, 1, 2))
    free, loose = (state(create_model("wrn_16_1")) for _ in range(2))
    list_models()
    assert torch.equal(before, torch.get_rng_state())
    assert same(first, again) and not same(first, other) and not same(free, loose)


def test_seed_means_what_it_means_to_torch():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        usual = models.CifarResNet(20)
    assert same(state(create_model("resnet20", normalise="none", seed=4).net), state(usual))


def test_names_are_forgiving():
    assert same(state(create_model("WRN-16-1", seed=0)), state(create_model("wrn_16_1", seed=0)))
    assert create_model("tinynet").training


@pytest.mark.parametrize("arguments, words", [
    (dict(name="digitnett"), "did you mean `digitnet`"), (dict(name="vgg"), "unknown model `vgg`; known are"),
    (dict(name=None), "unknown model"), (dict(classes=1), "classes=1 is not possible"),
    (dict(classes=True), "classes=True"), (dict(classes=10.), "classes=10.0"), (dict(channels=0), "channels=0"),
    (dict(size=7), "at least 8"), (dict(size=(32, 7)), "at least 8"), (dict(size=(32,)), "a pair"),
    (dict(size=32.), "size=32.0"), (dict(seed=-1), "seed=-1"), (dict(seed="1"), "seed='1'"),
    (dict(weights="imagnet"), "did you mean `imagenet`"), (dict(weights="imagenet"), "no ImageNet weights for tinynet"),
    (dict(name="resnet18", weights="imagenet", channels=1), "with 1 channels"), (dict(weights=None), "unknown weights"),
    (dict(normalise="imagnet"), "did you mean `imagenet`"), (dict(normalise=((.5,), (.5,))), "3 channels"),
    (dict(normalise=((.5,)*3, (0.,)*3)), "positive"), (dict(normalise=.5), "(mean, std)"),
    (dict(normalise=(.5, .5)), "(mean, std)")])
def test_wrong_arguments_are_one_sentence(arguments, words):
    with pytest.raises(SadalibError) as error:
        create_model(**(dict(name="tinynet") | arguments))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("images", [batch(2, 1, 32, 32), batch(3, 32, 32), batch(2, 3, 28, 28),
                                    torch.zeros(2, 3, 32, 32, dtype=torch.uint8)])
def test_wrong_images_are_one_sentence(images):
    with pytest.raises(SadalibError, match=r"float images in \[0, 1\] of shape \(B, 3, 32, 32\), but got"):
        create_model("tinynet")(images)


def test_normalisation_is_inside_and_travels_with_the_weights():
    images = batch(2, 3, 32, 32)
    inside = create_model("resnet20", seed=0).eval()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in statistics("cifar10"))
    torch.testing.assert_close(inside(images), inside.net((images - mean)/std))
    assert {"mean", "std"} <= inside.state_dict().keys() and "mean" not in dict(inside.named_parameters())
    assert create_model("digitnet").mean is None and create_model("resnet20", normalise="none").mean is None
    own = create_model("tinynet", normalise=((.1, .2, .3), (1, 2, 3)))
    assert own.std.flatten().tolist() == [1, 2, 3] and own.mean.dtype == torch.float32
    assert len(set(create_model("resnet18", channels=4).mean.flatten().tolist())) == 1


def test_bfloat16_and_float64():
    images, model = batch(2, 3, 32, 32), create_model("resnet20", seed=0).eval()
    assert model.double()(images.double()).dtype == torch.float64
    assert model.bfloat16()(images.bfloat16()).dtype == torch.bfloat16


# ImageNet weights

@pytest.fixture
def weights_file(tmp_path, monkeypatch):
    "A stand-in for the published file, with its own size and digest"
    monkeypatch.setenv("SADALIB_DATA", str(tmp_path/"data"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path/"hub"))
    path = tmp_path/"published.pth"
    torch.save(NETWORKS["resnet18"].build(1000, 3, (224, 224)).state_dict(), path)
    monkeypatch.setattr(models, "_IMAGENET_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(models, "_IMAGENET_BYTES", path.stat().st_size)
    monkeypatch.setattr(models, "IMAGENET_URL", "http://127.0.0.1:9/resnet18-f37072fd.pth")
    return path


@pytest.mark.parametrize("place", ["data/weights", "hub/hub/checkpoints"])
def test_imagenet_weights_are_found(weights_file, tmp_path, place):
    target = tmp_path/place/"resnet18-f37072fd.pth"
    target.parent.mkdir(parents=True)
    target.write_bytes(weights_file.read_bytes())
    published = torch.load(weights_file, weights_only=True)
    seven, again, thousand = (create_model("resnet18", k, "imagenet", seed=0).net.state_dict() for k in (7, 7, 1000))
    assert torch.equal(seven["layer4.1.conv2.weight"], published["layer4.1.conv2.weight"])
    assert seven["fc.weight"].shape == (7, 512) and torch.equal(seven["fc.weight"], again["fc.weight"])
    assert same(thousand, published)


def test_imagenet_weights_that_cannot_be_had(weights_file, tmp_path):
    with pytest.raises(SadalibError, match=r'cannot be had .*resnet18-f37072fd.pth yourself, or use weights="none".$'):
        create_model("resnet18", 7, "imagenet", size=64)
    assert not [f for f in (tmp_path/"data").rglob("*") if f.is_file()]


def test_wrong_imagenet_weights_are_never_loaded(weights_file, tmp_path):
    target = tmp_path/"data/weights/resnet18-f37072fd.pth"
    target.parent.mkdir(parents=True)
    target.write_bytes(weights_file.read_bytes()[:-1] + b"x")
    with pytest.raises(SadalibError, match="cannot be had"):
        create_model("resnet18", 7, "imagenet")
    assert target.exists()


# frozen

class Nan(Exception):
    "An error inside an attack"


def partly_frozen():
    model = create_model("wrn_16_1", seed=0)
    model.net.stage2.eval()
    model.net.head.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_frozen_leaves_nothing_behind(fails, depth):
    model, images = partly_frozen(), batch(2, 3, 32, 32).requires_grad_()
    before, weights, random = flags(model), state(model), torch.get_rng_state()
    with contextlib.suppress(Nan), contextlib.ExitStack() as stack:
        for _ in range(depth):
            net = stack.enter_context(frozen(model))
        assert not any(m.training for m in net.modules()) and not any(p.requires_grad for p in net.parameters())
        gradient, = torch.autograd.grad(net(images).sum(), images)
        assert gradient.abs().sum() > 0
        if fails:
            raise Nan
    assert flags(model) == before and same(state(model), weights) and torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_frozen_keeps_gradients_that_were_there():
    model = create_model("tinynet", seed=0)
    model(batch(2, 3, 32, 32)).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    with frozen(model) as net:
        net(batch(2, 3, 32, 32).requires_grad_()).sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_inner_frozen_does_not_thaw_the_outer():
    model = create_model("resnet20", seed=0)
    with frozen(model):
        with frozen(model):
            pass
        assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_frozen_survives_a_model_that_guards_its_own_train():
    class Stubborn(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[0].eval()  # as fine-tuning recipes do with BatchNorm
            return self
    model = Stubborn(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    model[0].training = True
    with frozen(model):
        pass
    assert model[0].training and model.training


def test_frozen_enters_distributed_models(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path/'rendezvous'}", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(create_model("tinynet", seed=0))
        images = batch(2, 3, 32, 32)
        with frozen(model) as net:
            assert net is model.module
            pixels = images.clone().requires_grad_()
            torch.autograd.grad(net(pixels).sum(), pixels)
        model(images).sum().backward()
        assert model.training and all(p.grad is not None for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()
