"The explorer of features: its answers against direct calls, its view by program and in a browser"
import base64
import html
import math
import os
import shutil
import subprocess
import sys
import time
from io import BytesIO

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sadalib.afan.mix import feature_attack, kept_by, renormalise, strengths
from sadalib.afan.sites import Site
from sadalib.data import load
from sadalib.data.scenes import digit_scenes
from sadalib.explore_afan import (
    AXES,
    BOXES,
    AnswerTile,
    FeatureExplorer,
    FeatureProbe,
    answer_told,
    demonstration,
    explore_afan,
    feature_plane,
    feature_told,
)
from sadalib.models import create_model
from sadalib.runs import SadalibError, rand, randint, seeded
from sadalib.scene_training import create_scene_model

try:  # its fixtures serve a JupyterLab of their own
    import test_browser as browser
    from test_browser import lab, page  # noqa: F401
except (ImportError, pytest.skip.Exception):
    browser = None

TASKS = ("classification", "segmentation", "detection")


def weights(model, seed=0):
    "`model` with weights that depend on the seed alone"
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("bias"):
            size = math.sqrt(2 / parameter[0].numel()) if parameter.ndim > 1 else .1
            parameter.data = (2 * rand(*parameter.shape, generator=seeded(seed, name)) - 1) * size
    return model


def classifier():
    "Two convolutions with BatchNorm and Dropout"
    return weights(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(.5),
                                 nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1),
                                 nn.Flatten(), nn.Linear(8, 5)))


def segmenter():
    "Labels of four kinds"
    return weights(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)))


def detector():
    "The smallest Faster R-CNN"
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.rpn import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign
    body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1))
    body.out_channels = 8
    pool = MultiScaleRoIAlign(["0"], 3, 2)
    return weights(FasterRCNN(body, 4, min_size=(56, 64), max_size=80, box_roi_pool=pool, box_batch_size_per_image=8,
                              rpn_anchor_generator=AnchorGenerator(((16, 32),), ((1.,),)), box_score_thresh=.01))


def pictures(count=3, size=16):
    "Images of noise"
    return rand(count, 3, size, size, generator=seeded("x", count, size))


def material(task):
    "A network with images and targets"
    if task == "classification":
        return classifier(), pictures(), randint(0, 5, 3, generator=seeded("y"))
    if task == "segmentation":
        return segmenter(), pictures(), randint(0, 4, 3, 16, 16, generator=seeded("y"))
    boxes = torch.tensor([[4., 6, 30, 40], [20, 20, 60, 50]])
    return detector(), pictures(2, 64), [{"boxes": boxes + k, "labels": torch.tensor([1, 3])} for k in range(2)]


SITES = {"classification": "0", "segmentation": "1", "detection": "backbone.0"}


@pytest.fixture(scope="module")
def probes():
    return {task: FeatureProbe(*material(task), site=SITES[task]) for task in TASKS}


@pytest.fixture
def explorer(probes):
    return FeatureExplorer(probes)


def same(one, other):
    "Whether two answers are equal, bit for bit"
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    return torch.equal(one, other)


@pytest.mark.parametrize("task", TASKS)
def test_without_a_push_the_answer_is_the_clean_one_bit_for_bit(probes, task):
    probe, (model, images, _) = probes[task], material(task)
    for site in probe.sites:
        still = probe.at(site, gamma=0, axes="none")
        start = probe.at(site, gamma=1, position=0, axes="none")
        for a in (still, start):
            assert same(a.answers[0], a.answers[1]) and a.losses[0] == a.losses[1], site
            assert torch.equal(a.features[0], a.features[1]) and math.isnan(a.kept.gain) and a.size == 0
    model = model.eval()
    with torch.no_grad():
        if task == "detection":
            model.rpn._post_nms_top_n["testing"], model.transform.min_size = 30, (64,)
            direct = {k: v[:BOXES] for k, v in model([images[0]])[0].items()}
            assert len(direct["boxes"])
        else:
            logits = model(images[:1])[0]
            direct = logits.softmax(0) if task == "classification" else logits.argmax(0).to(torch.uint8)
    assert same(still.answers[1], direct)


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("unit", ["feature_std", "255ths"])
def test_an_answer_is_made_of_the_methods_parts(probes, axes, unit):
    probe, (model, images, labels) = probes["classification"], material("classification")
    model, gamma = model.eval(), .5 if unit == "feature_std" else 40
    a = probe.at("1", gamma, unit, .5, axes, 1)
    site, every = Site(model, "1"), []
    for i in range(3):
        def loss(i=i):
            return F.cross_entropy(model(images[i:i + 1]), labels[i:i + 1])
        with site.capture():
            total = loss()
        slope = torch.autograd.grad(total, site.live)[0]
        attacked = feature_attack(site, loss, gamma=gamma, gamma_unit=unit, bn="eval")
        assert torch.equal(attacked, feature_attack(site, loss, gamma=gamma, gamma_unit=unit, gradient=slope))
        every.append((site.value, strengths(site.value, attacked, 2)[0]))
    clean, moved = every[1]
    assert torch.equal(a.features[0], clean) and torch.equal(a.features[1], moved)
    if axes == "none":
        assert torch.equal(a.features[2], moved) and a.kept == (1, 1)
        return
    stacked = [torch.cat(parts) for parts in zip(*every, strict=True)]
    expected = renormalise(*stacked, "batch")[1:2] if axes == "batch" else renormalise(clean, moved, axes)
    assert torch.equal(a.features[2], expected)
    if axes != "batch":
        held = probe._held("1", 1)
        assert a.kept == pytest.approx(kept_by(held.site, lambda: probe.subject.run(1)[0], moved, axes, bn="eval"))
    assert a.losses[2] == pytest.approx(F.cross_entropy(a.answers[2].log()[None], labels[1:2]).item(), rel=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_a_push_raises_the_loss_and_captures_are_kept(probes, task):
    probe = probes[task]
    small = probe.at(gamma=.001, axes="none")
    assert small.losses[1] > small.losses[0]
    held = probe._held(probe.site, 0)
    for gamma in (.1, .3):
        probe.at(gamma=gamma, position=.4, axes="channel")
    assert probe._held(probe.site, 0) is held
    assert probe.at(gamma=.2).losses == probe.at(gamma=.2).losses


def test_the_channel_is_that_with_the_largest_first_order_change(probes):
    for probe in probes.values():
        held = probe._held(probe.site, 0)
        sums = [held.slope[:, k].abs().sum() for k in range(held.slope.shape[1])]
        assert held.channel == max(range(len(sums)), key=sums.__getitem__)


@pytest.mark.parametrize("task", TASKS)
def test_nothing_else_is_touched(task):
    model, images, targets = material(task)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    pixels, random = images.clone(), torch.get_rng_state()
    probe = FeatureProbe(model, images, targets)
    view = FeatureExplorer({task: probe})
    for site in probe.sites[:3]:
        for axes in AXES[:3]:
            view.controls["site"].value, view.controls["axes"].value = site, axes
    with pytest.raises(SadalibError):
        probe.at(gamma=1e38)
    assert torch.equal(torch.get_rng_state(), random) and torch.equal(images, pixels)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules()) and all(p.requires_grad and p.grad is None for p in model.parameters())
    for found in (model, probe.model):
        for module in found.modules():
            assert "forward" not in module.__dict__ and not module._forward_hooks and not module._forward_pre_hooks
    assert not any(m.training for m in probe.model.modules())
    assert all(torch.equal(v, before[k]) for k, v in probe.model.state_dict().items())


def failing(name, site):
    "What `at` raises when module `name` fails"
    probe = FeatureProbe(*material("classification"))
    probe.at(site)
    module, forward = probe.model.get_submodule(name), type(probe.model.get_submodule(name)).forward
    type(module).forward, probe.subject.pictures = lambda *a: 1 / 0, probe.pictures
    try:
        with pytest.raises(ZeroDivisionError):
            probe.at(site, gamma=.7)
    finally:
        type(module).forward = forward
    return probe


def test_nothing_is_left_after_an_exception():
    probe = failing("4", "1")
    assert all("forward" not in module.__dict__ for module in probe.model.modules())
    assert probe.at("1", gamma=.7).losses[1] > 0


@pytest.mark.parametrize(("asked", "words"), [
    ({"site": "backbon.0"}, "such as `backbone.0`"), ({"site": "roi_heads.box_head"}, "inside a detector's backbone"),
    ({"site": "rpn.head"}, "inside a detector's backbone"), ({"gamma": -1}, "gamma=-1"),
    ({"gamma": math.nan}, "gamma=nan"), ({"unit": "std"}, "no unit 'std'"), ({"position": 1.5}, "position is 1.5"),
    ({"position": "x"}, "position is 'x'"), ({"axes": "layer"}, "no axes `layer`"), ({"image": 2}, "image is 2"),
    ({"image": .5}, "image is 0.5")], ids=str)
def test_refused_questions(probes, asked, words):
    with pytest.raises(SadalibError, match=words) as failure:
        probes["detection"].at(**asked)
    assert "\n" not in str(failure.value)


def test_refused_material():
    model, images, labels = material("classification")
    _, _, masks = material("segmentation")
    _, scenes, boxes = material("detection")
    broken = nn.Sequential(model, nn.Threshold(1e9, math.nan))
    for words, call in {
            "without targets": lambda: FeatureProbe(model, images),
            "3 images and 2 targets": lambda: FeatureProbe(model, images, labels[:2]),
            r"\(C, H, W\) is expected": lambda: FeatureProbe(model, images[0], labels),
            "leave .0, 1.": lambda: FeatureProbe(model, images * 9, labels),
            "there are no images": lambda: FeatureProbe(model, images[:0], labels[:0]),
            "fit no task": lambda: FeatureProbe(model, images, ["a"] * 3),
            "labels up to 8": lambda: FeatureProbe(model, images, labels + 8 - labels.max()),
            "does not fit a target": lambda: FeatureProbe(model, images, masks),
            "has no `backbone`": lambda: FeatureProbe(model, scenes, boxes),
            "are for classification": lambda: FeatureProbe(model, images, labels, task="segmentation"),
            "did you mean `detection`": lambda: FeatureProbe(model, images, labels, task="detektion"),
            "the loss is nan": lambda: FeatureProbe(broken, images, labels).at("0"),
            "came without images": lambda: explore_afan(model),
            "came without a model": lambda: explore_afan(images=images),
            "known are|did you mean": lambda: explore_afan(task="x"),
            "did you mean `smoke`": lambda: demonstration("classification", profile="smok"),
            "no network to explore": lambda: FeatureExplorer({})}.items():
        with pytest.raises(SadalibError, match=words) as failure:
            call()
        assert "\n" not in str(failure.value)


def test_void_pixels_and_class_255_count_as_they_should():
    model, images, masks = material("segmentation")
    masks[:, :4] = 255
    a = FeatureProbe(model, images, masks).at(gamma=.3)
    right = (a.answers[0] == a.target)[4:].float().mean()
    assert f"{100 * right:.1f} % right" == answer_told(a.answers[0], a.target)
    wide = weights(nn.Sequential(nn.Flatten(), nn.Linear(768, 300)))
    b = FeatureProbe(wide, images, torch.tensor([255, 1, 2])).at("1", axes="none")
    assert b.losses[0] == pytest.approx(F.cross_entropy(b.answers[0].log()[None], torch.tensor([255])).item(), rel=1e-4)


def test_images_of_different_size_have_no_batch_statistics():
    model, images, targets = material("detection")
    probe = FeatureProbe(model, [images[0], rand(3, 64, 80, generator=seeded(1))], targets, site="backbone.0")
    assert probe.at(axes="instance", image=1).losses[0] > 0
    with pytest.raises(SadalibError, match="differ in size"):
        probe.at(axes="batch")


def test_vectors_grey_images_and_single_images():
    model = weights(nn.Sequential(nn.Flatten(), nn.Linear(48, 7), nn.ReLU(), nn.Linear(7, 3)))
    view = explore_afan(model, rand(1, 3, 4, 4, generator=seeded(0)), torch.tensor([1]), site="1")
    assert view.controls["image"].disabled and view.answer.features[0].shape == (1, 7)
    view.controls["axes"].value = "instance"
    assert "leave one element" in view.text.value
    grey = weights(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3)))
    other = explore_afan(grey, rand(2, 1, 8, 8, generator=seeded(0)), torch.tensor([1, 0]), site="0", classes=("a", "b", "c"))
    other.controls["image"].value = 1
    assert other.answer.image == 1 and other.static() and any(name in other.text.value for name in "abc")
    assert feature_plane(torch.arange(24.).view(1, 2, 3, 4), 1).shape == (3, 4)
    assert feature_plane(torch.zeros(1, 5, 6), 0).shape == (3, 3)


MOVES = [("site", {"classification": "4", "segmentation": "0", "detection": "backbone.3"}), ("gamma", 1.1), ("unit", "255ths"),
         ("position", .3), ("axes", "none"), ("axes", "instance"), ("axes", "batch"), ("image", 1)]


@pytest.mark.parametrize("task", TASKS)
def test_every_control_changes_the_picture(probes, task):
    view = FeatureExplorer({task: probes[task]})
    for name, value in MOVES:
        value = value[task] if isinstance(value, dict) else value
        before, said = view.pane.widget.value, view.text.value
        view.controls[name].value = value
        assert view.pane.widget.value == view.pane.png() != before and view.text.value != said, name
        settings = list(view.question()[1:])
        settings[2] = {"deviations": "feature_std"}.get(settings[2], settings[2])
        expected = probes[task].at(*settings)
        assert same(view.answer.answers[2], expected.answers[2]) and view.answer.losses == expected.losses
        assert feature_told(expected, probes[task].classes) in view.text.value and "nan" not in view.text.value


def test_another_network_brings_its_sites_and_images(probes):
    made = []

    def make(task):
        made.append(task)
        return probes[task]

    view = FeatureExplorer({task: lambda task=task: make(task) for task in TASKS})
    assert made == ["classification"]
    view.controls["image"].value, view.controls["site"].value = 2, "4"
    for task in ("detection", "segmentation", "classification"):
        view.controls["task"].value = task
        assert view.answer.task == task and view.controls["site"].options == probes[task].sites
        assert view.controls["site"].value == SITES[task] and view.controls["image"].value == 0
        assert view.controls["image"].max == len(probes[task].pictures) - 1
    assert made == ["classification", "detection", "segmentation"]


def test_a_network_that_cannot_be_made_is_a_sentence(probes):
    def fails():
        raise SadalibError("there is none: make one.")

    view = FeatureExplorer({"classification": probes["classification"], "detection": fails})
    view.controls["task"].value = "detection"
    assert "there is none" in view.text.value and view.answer.task == "classification"
    view.controls["task"].value = "classification"
    assert "loss clean" in view.text.value


def test_the_search_narrows_sites(explorer):
    explorer.controls["task"].value = "detection"
    sites, answered = explorer.controls["site"].options, explorer.answer
    explorer.find.value = "backbone"
    assert explorer.controls["site"].options == sites and explorer.answer is answered
    explorer.find.value = "nowhere"
    assert explorer.controls["site"].options == (answered.site,) and explorer.answer is answered
    explorer.find.value = "BONE .3"
    assert explorer.controls["site"].options == ("backbone.3",) and explorer.answer.site == "backbone.3"
    explorer.find.value = ""
    assert explorer.controls["site"].options == sites and explorer.answer.site == "backbone.3"
    explorer.controls["task"].value = "segmentation"
    assert explorer.find.value == "" and explorer.answer.task == "segmentation"


def test_gamma_reaches_as_far_as_its_unit(explorer):
    gamma = explorer.controls["gamma"]
    assert [gamma.base ** gamma.min, gamma.base ** gamma.max] == pytest.approx([.01, 2])
    explorer.controls["unit"].value = "255ths"
    gamma.value = 90.
    assert explorer.answer.size == pytest.approx(90 / 255, rel=1e-3)
    explorer.controls["unit"].value = "deviations"
    assert gamma.value == pytest.approx(2) and explorer.answer.gamma == gamma.value and explorer.answer.unit == "feature_std"


def test_a_failing_network_is_a_sentence_not_a_crash():
    view = explore_afan(*material("classification"), site="0")
    list(view.probe.model.parameters())[-2].data.fill_(math.nan)
    view.controls["gamma"].value = 1.
    assert "the loss is nan" in view.text.value and view.answer.gamma == .2


def test_tiles_show_what_they_are_given():
    picture, font = torch.full((3, 20, 10), .5), AnswerTile(60, 80, ("one", "two"))
    mask = torch.full((20, 10), 255)
    mask[:, 5:] = 1
    tinted = np.asarray(font(mask, picture, mask)).reshape(-1, 3)
    assert (tinted == 127).all(1).mean() == pytest.approx(.5, abs=.05)
    boxes = {"boxes": torch.tensor([[2., 2, 8, 15]]), "labels": torch.tensor([1]), "scores": torch.tensor([.4])}
    assert np.unique(np.asarray(font(boxes, picture, None)).reshape(-1, 3), axis=0).shape[0] > 2
    none = {k: v[:0] for k, v in boxes.items()}
    assert (np.asarray(font(none, picture, None)) == 128).all() and answer_told(none, None) == "no box"
    shares = torch.linspace(0, 1, 300).softmax(0)
    assert AnswerTile(200, 150)(shares, picture, 299).size == (200, 150)


def test_every_control_has_a_name_and_a_description(explorer):
    for name, control in explorer.controls.items():
        assert control.tooltip and (control.description or name in ("unit", "axes"))
    assert explorer.find.tooltip and "told in" in explorer.pane.widget.tooltip


def test_static_pictures(explorer, monkeypatch):
    from PIL import Image
    for task in TASKS:
        explorer.controls["task"].value = task
        monkeypatch.delenv("IN_TEST", raising=False)
        live = explorer._repr_mimebundle_()
        assert {"application/vnd.jupyter.widget-view+json", "image/png", "text/plain"} <= set(live)
        monkeypatch.setenv("IN_TEST", "1")
        still = explorer._repr_mimebundle_()
        assert set(still) == {"image/png", "text/plain"} and len(still["image/png"]) < 90_000
        shown = Image.open(BytesIO(base64.b64decode(still["image/png"])))
        assert shown.size == (672, 504) and len(np.unique(np.asarray(shown))) > 8


def test_the_small_networks_come_from_runs(tmp_path):
    view = explore_afan(root=tmp_path, profile="smoke")
    run = next((tmp_path / "train").iterdir())
    assert run.name in view.text.value and view.controls["task"].options == ("classification", "detection", "segmentation")
    assert view.answer.site == "features.1" and "seconds only" in view.text.value and view.probe.classes[3] in view.text.value
    again = demonstration("classification", root=tmp_path)
    assert again.at().losses == view.answer.losses and len(list((tmp_path / "train").iterdir())) == 1


def test_answers_take_less_than_200_ms_of_processor_time():
    made = {
        "classification": (create_model("tinynet", seed=0), load("digits", "test", limit=8), "features.1"),
        "segmentation": (create_scene_model("segmentation", "deeplabv3plus_mobilenet", 11), digit_scenes("test", "segmentation", n=2),
                         "encoder.features.6"),
        "detection": (create_scene_model("detection", "fasterrcnn_resnet18_light", 10, rois=16), digit_scenes("test", "detection", n=2),
                      "backbone.body.layer2")}
    everything = []
    for task, (model, data, site) in made.items():
        view, spent = explore_afan(model, data, site=site), []
        moves = [("gamma", .02 * 1.7 ** k) for k in range(7)] + [("position", k / 4) for k in range(4)]
        for name, value in [*moves, ("axes", "none"), ("axes", "instance"), ("image", 1)]:
            wall, start = time.perf_counter(), time.process_time()
            view.controls[name].value = value
            spent.append((time.process_time() - start, time.perf_counter() - wall))
        middle, late, clock = (1000 * sorted(t)[int(p * len(t))] for t, p in zip(
            [[s for s, _ in spent]] * 2 + [[w for _, w in spent]], (.5, .95, .5), strict=True))
        print(f"\n{task}: processor, median {middle:.0f} ms, 95 % within {late:.0f} ms; wall clock, median {clock:.0f} ms", end="")
        assert middle < (200 if task != "detection" else 260), "a busy machine slows the passes that share its memory"
        everything += [s for s, _ in spent]
    assert sorted(everything)[len(everything) // 2] < .2


def test_importing_needs_no_widgets_and_drawing_no_pyplot():
    code = """if True:
        import sys, torch, sadalib.explore_afan as e
        heavy = {"matplotlib", "ipywidgets", "anywidget", "pandas", "PIL.Image", "scipy", "segmentation_models_pytorch"} & set(sys.modules)
        assert not heavy, heavy
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 2))
        view = e.explore_afan(model, torch.zeros(4, 3, 4, 4), torch.tensor([0, 1, 0, 1]), site="0")
        view.controls["gamma"].value = .5; view._repr_mimebundle_()
        assert "matplotlib.pyplot" not in sys.modules"""
    env = os.environ | {"IN_TEST": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


CELLS = ["""\
import torch
from sadalib.data.scenes import digit_scenes
from sadalib.explore_afan import FeatureExplorer, FeatureProbe
from sadalib.data import load
from sadalib.models import create_model
from sadalib.scene_training import create_scene_model
digits = FeatureProbe(create_model("tinynet", seed=0), load("digits", "test", limit=4), site="features.1")
detector = create_scene_model("detection", "fasterrcnn_resnet18_light", 10, rois=16)
explorer = FeatureExplorer({
    "classification": digits,
    "detection": lambda: FeatureProbe(detector, digit_scenes("test", "detection", n=2), site="backbone.body.layer2")})
""", "explorer"]


@pytest.mark.skipif(browser is None or browser.CHROMIUM is None,
                    reason="no chromium on the PATH, or playwright or jupyterlab is not installed")
def test_the_explorer_in_jupyterlab(request, monkeypatch, tmp_path):
    from playwright.sync_api import expect
    monkeypatch.setattr(browser, "CELLS", CELLS)
    page = request.getfixturevalue("page")
    view = page.locator(".jp-OutputArea-output:has(.widget-slider)")
    failed = page.locator(".jp-OutputArea [data-mime-type='application/vnd.jupyter.error']")
    view.or_(failed).first.wait_for(timeout=150_000)  # imports on a busy machine
    assert not failed.count(), failed.all_inner_texts()
    picture, line = view.locator("img.widget-image"), view.locator("[role=status]")

    def moved(words: str, act) -> str:
        "What the view says once `act` has changed its picture and its line has `words`"
        image = picture.get_attribute("src")
        act()
        expect(line).to_contain_text(words, timeout=60_000)
        expect(picture).not_to_have_attribute("src", image, timeout=60_000)
        return line.inner_text()

    def press(slider: int, key: str):
        view.get_by_role("slider").nth(slider).focus()
        page.keyboard.press(key)

    expect(line).to_contain_text("features.1 8 × 16 × 16, image 0: loss clean", timeout=60_000)
    moved("renormalised over channel", lambda: press(0, "End"))
    moved("Largest change 0;", lambda: press(1, "Home"))
    moved("renormalised over channel", lambda: press(1, "End"))
    moved("renormalised over instance", lambda: view.get_by_role("button", name="instance").click())
    moved("no renormalisation", lambda: view.get_by_role("button", name="none").click())
    moved("no renormalisation", lambda: view.get_by_role("button", name="255ths").click())
    moved("image 1", lambda: press(2, "ArrowRight"))
    moved("features.4", lambda: view.get_by_role("combobox").nth(1).select_option("features.4"))
    moved("classifier 10", lambda: view.get_by_label("find site").fill("class"))
    moved("backbone.body.layer2 128 × 12 × 12, image 0", lambda: view.get_by_role("combobox").first.select_option("detection"))
    expect(view.get_by_role("combobox").nth(1)).to_have_value("backbone.body.layer2")
    said = moved("best box", lambda: press(0, "PageDown"))

    described = page.locator(".widget-slider, .widget-dropdown, .widget-toggle-button, .widget-text, .widget-image")
    name = "e.title || e.querySelector('[title]')?.title || e.querySelector('select, input')?.labels?.[0]?.innerText || ''"
    titles = described.evaluate_all(f"all => all.map(e => {name})")
    assert len(titles) >= 12 and all(titles), titles
    view.screenshot(path=tmp_path / "explorer.png")
    assert (tmp_path / "explorer.png").stat().st_size > 10_000
    if os.environ.get("SADALIB_AFAN_SCREENSHOT"):
        shutil.copy(tmp_path / "explorer.png", os.environ["SADALIB_AFAN_SCREENSHOT"])
    print(f"\n{html.unescape(said)}\n{titles}")
    assert not page.complaints
