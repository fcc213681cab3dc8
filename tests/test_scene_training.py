"""Detectors and segmenters in the loop: batches, losses, resume, several processes, A-FAN's sites, bad images."""
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn

from sadalib.afan.method import AFAN, SiteAttack
from sadalib.afan.sites import Site, list_sites
from sadalib.baselines import ERM, PGDTraining
from sadalib.data.scenes import VOID, DetectionSet, digit_scenes
from sadalib.runs import Log, Run, SadalibError, load_tensors, record, require, seeded
from sadalib.scene_training import (
    SCENE_NETWORKS,
    SceneConfig,
    SceneIndex,
    SceneMethod,
    answer,
    check_scene_model,
    create_scene_model,
    detection_loss,
    drawn_from,
    kept_answers,
    load_scene_model,
    scene_batch,
    scene_losses,
    scene_rows,
    scene_sets,
    segmentation_loss,
    show_answers,
)
from sadalib.training import Recipe, fit

SEG = SceneConfig(method=SceneMethod(task="segmentation", inner=ERM()), model="deeplabv3plus_mobilenet", train_images=8, test_images=4,
                  recipe=Recipe(epochs=2, batch_size=4, warmup=0), threads=1)
DET = SceneConfig(method=SceneMethod(task="detection", inner=ERM()), model="fasterrcnn_resnet18_light", train_images=4, test_images=2,
                  rois=8,
                  recipe=Recipe(epochs=1, batch_size=2, warmup=0, lr=.005), threads=1)
DECODED = AFAN(site="encoder.features.6", strengths=2, mix="01", gamma=.2, gamma_unit="feature_std",
               decoder=SiteAttack(site="decoder.aspp", strengths=1, mix="", gamma=.2, gamma_unit="feature_std"))
DETECTED = AFAN(site="backbone.body.layer2", strengths=1, mix="1", gamma=.2, gamma_unit="feature_std",
                decoder=SiteAttack(site="roi_heads.box_head", strengths=1, mix="", gamma=.2, gamma_unit="feature_std", part="roi"))


@pytest.fixture(scope="module")
def detector(): return create_scene_model("detection", "fasterrcnn_resnet18_light", 10, rois=8)


@pytest.fixture(scope="module")
def segmenter(): return create_scene_model("segmentation", "deeplabv3plus_resnet18", 11)


# --- batches --------------------------------------------------------------------------------------------------------

def test_mirrored_boxes_hold_the_same_pixels():
    scenes = digit_scenes("train", n=4)
    plain, targets = scene_batch(scenes, range(4))
    mirrored, turned = scene_batch(scenes, range(4), flips=[True]*4)
    for a, ta, b, tb in zip(plain, targets, mirrored, turned, strict=True):
        for (x1, y1, x2, y2), (u1, v1, u2, v2) in zip(ta["boxes"].int().tolist(), tb["boxes"].int().tolist(), strict=True):
            assert torch.equal(a[:, y1:y2, x1:x2].flip(-1), b[:, v1:v2, u1:u2])
        assert torch.equal(ta["labels"], tb["labels"]) and (tb["boxes"][:, 2:] > tb["boxes"][:, :2]).all()


def test_mirrored_masks_follow_their_pictures():
    scenes = digit_scenes("train", "segmentation", n=3)
    images, masks = scene_batch(scenes, [2, 0], flips=[True, False])
    plain, straight = scene_batch(scenes, [2, 0])
    assert torch.equal(images[0].flip(-1), plain[0]) and torch.equal(masks[0].flip(-1), straight[0])
    assert torch.equal(images[1], plain[1]) and masks.dtype == torch.int64


def test_void_does_not_count(segmenter):
    images, masks = scene_batch(digit_scenes("train", "segmentation", n=2), [0, 1])
    segmenter.eval()
    whole = segmentation_loss(segmenter, images, masks)
    halved = masks.clone()
    halved[:, :48] = VOID
    logits = segmenter(images)
    expected = torch.nn.functional.cross_entropy(logits[:, :, 48:], masks[:, 48:])
    assert segmentation_loss(segmenter, images, halved).item() == pytest.approx(expected.item(), rel=1e-5)
    assert whole.isfinite()


# --- sites of section C.2 --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name,where", [("backbone.body.layer1", "output"), ("backbone.body.layer2", "output"), ("backbone.body.layer3",
                                                                                                                 "output"),
                                        ("backbone.body.layer4", "output"), ("roi_heads.box_roi_pool", "output"), ("roi_heads.box_head",
                                                                                                                   "output"),
                                        ("roi_heads.box_head", "input")])
def test_replay_in_a_detector_changes_the_loss_by_exactly_nothing(detector, name, where):
    images, targets = scene_batch(digit_scenes("train", n=2), [0, 1])
    site = Site(detector.train(), name, where)
    before = torch.get_rng_state()
    with drawn_from(seeded(0), 1):
        with site.capture(): first = detection_loss(detector, images, targets)
        with site.replay(site.value): again = detection_loss(detector, images, targets)
    assert first.item() == again.item() and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name,where", [("net.encoder.layer1", "output"), ("net.encoder.layer2", "output"), ("net.encoder.layer3",
                                                                                                             "output"),
                                        ("net.encoder.layer4", "output"), ("net.decoder.aspp", "output"), ("net.decoder.block2", "input"),
                                        ("net.decoder.block2", "output")])
def test_replay_in_a_segmenter_changes_the_loss_by_exactly_nothing(segmenter, name, where):
    images, masks = scene_batch(digit_scenes("train", "segmentation", n=2), [0, 1])
    site = Site(segmenter.train(), name, where)
    with site.capture(): first = segmentation_loss(segmenter, images, masks)
    with site.replay(site.value): again = segmentation_loss(segmenter, images, masks)
    assert first.item() == again.item()


def test_a_site_that_runs_once_a_level_is_refused_with_names_that_work(detector):
    images, targets = scene_batch(digit_scenes("train", n=2), [0, 1])
    usable = [row.name for row in list_sites(detector.train(), run=lambda: detector(images, targets))]
    assert "backbone.body.layer2" in usable and "roi_heads.box_head" in usable
    with pytest.raises(SadalibError, match="ran [0-9]+ times"):
        AFAN(site="rpn.head.conv").terms(detector, lambda: detection_loss(detector, images, targets))


@pytest.mark.parametrize("task,method", [("detection", DETECTED), ("segmentation", DECODED)])
def test_every_parameter_learns_and_the_stem_runs_once(task, method, detector):
    model = detector if task == "detection" else create_scene_model("segmentation", "deeplabv3plus_mobilenet", 11)
    model.train().zero_grad()
    calls, stem = [], model.backbone.body.conv1 if task == "detection" else model.net.encoder.features[0][0]
    run = stem.forward
    stem.forward = lambda *a: (calls.append(0), run(*a))[1]
    images, targets = scene_batch(digit_scenes("train", task, n=2), [0, 1])
    whole, parts = scene_losses(task, model, images, targets)
    with drawn_from(seeded(1), 2): terms = method.terms(model, whole, parts=parts)
    terms["total"].backward()
    del stem.forward
    assert len(calls) == 1 and all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert terms["adversarial"] > 0 and terms["size_l2"] > 0


def test_terms_of_the_regions_leave_the_backbone_to_the_clean_term(detector):
    """An attack at the pooled regions trains only the two predictors behind them"""
    images, targets = scene_batch(digit_scenes("train", n=2), [0, 1])
    method = AFAN(site="roi_heads.box_head", strengths=1, mix="", gamma=.5, gamma_unit="feature_std", part="roi")
    def gradients(run):
        detector.train().zero_grad()
        with drawn_from(seeded(2), 2): run().backward()
        return {k: p.grad.clone() for k, p in detector.named_parameters() if p.grad is not None}
    whole, parts = scene_losses("detection", detector, images, targets)
    plain, ours = gradients(whole), gradients(lambda: method.terms(detector, whole, parts=parts)["total"])
    changed = [k for k in plain if not torch.allclose(plain[k], ours[k], rtol=1e-4, atol=1e-7)]
    assert changed and all(k.startswith("roi_heads.box_predictor") for k in changed)


def test_frozen_layers_of_an_imagenet_backbone_are_refused(detector):
    images, targets = scene_batch(digit_scenes("train", n=1), [0])
    model = create_scene_model("detection", "fasterrcnn_resnet18_light", 10, rois=8)
    for part in (model.backbone.body.conv1, model.backbone.body.bn1, model.backbone.body.layer1): part.requires_grad_(False)
    with pytest.raises(SadalibError, match="frozen layers"):
        AFAN(site="backbone.body.layer1").terms(model, lambda: detection_loss(model, images, targets))


# --- the loop -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config", [replace(SEG, method=replace(SEG.method, inner=DECODED)), replace(DET, method=replace(DET.method,
                                                                                                                         inner=DETECTED))])
def test_a_run_repeats_bit_for_bit_and_leaves_the_random_state(config, tmp_path):
    before = torch.get_rng_state()
    runs = [require(config, root=tmp_path/n) for n in "ab"]
    assert torch.equal(before, torch.get_rng_state())
    first, second = (load_tensors(r.folder/"checkpoint"/"last.safetensors")[0] for r in runs)
    assert all(torch.equal(first[k], second[k]) for k in first) and record(runs[0])["metrics"] == record(runs[1])["metrics"]
    rows = Log(runs[0].folder/"metrics.jsonl").rows()
    assert {"clean", "adversarial", "size_l2", "size_linf"} <= set(rows[-1])
    model = load_scene_model(runs[0])
    test = scene_sets(config)[1]
    again = {row["metric"]: row["value"] for row in scene_rows(test, answer(model, test))}
    assert again == {m["metric"]: m["value"] for m in record(runs[0])["metrics"]}
    show_answers(test, kept_answers(runs[0]), n=2)


KILLED = """
    import sadalib.training
    from dataclasses import replace
    from sadalib.afan.method import AFAN
    from sadalib.runs import require
    from sadalib.scene_training import SceneConfig, SceneMethod
    from sadalib.training import Recipe
    config = SceneConfig(method=SceneMethod(task="segmentation", inner=AFAN(site="encoder.features.6", strengths=1, mix="")),
                         train_images=12,
                         test_images=2, model="deeplabv3plus_mobilenet", recipe=Recipe(epochs=3, batch_size=2, warmup=0), threads=1)
    sadalib.training.Loop.__init__.__kwdefaults__["save_every"] = .05
    print("go", flush=True); require(config)
"""


def python(code, root, **env):
    env = {**os.environ, "SADALIB_RUNS": str(root), "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True)


def test_sigkill_then_the_same_bytes(tmp_path):
    whole = python(KILLED, tmp_path/"whole")
    assert whole.wait(timeout=240) == 0, whole.stdout.read()
    kills = 0
    for pause in (1.5, 3.):
        job = python(KILLED, tmp_path/"cut")
        job.stdout.readline()
        time.sleep(pause)
        kills += job.poll() is None
        job.send_signal(signal.SIGKILL)
        job.wait()
    last = python(KILLED, tmp_path/"cut")
    out = last.communicate(timeout=240)[0]
    assert last.returncode == 0 and kills, out
    one, cut = (next((tmp_path/n).glob("scenes/*")) for n in ("whole", "cut"))
    for name in ("result.json", "metrics.jsonl", "answers.safetensors", "checkpoint/last.safetensors"):
        assert (one/name).read_bytes() == (cut/name).read_bytes(), name


def test_two_processes_hold_one_network(tmp_path):
    """Batch statistics and regions are each process's own, so two are not one; but both end with the same weights and one result"""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(24000 + os.getpid() % 20000), "ACCELERATE_USE_CPU": "true"}
    code = KILLED.replace("batch_size=2", "batch_size=4").replace("import sadalib.training", "import sadalib.training, torch") + """
    torch.distributed.destroy_process_group()
    """
    jobs = [python(code, tmp_path, RANK=str(r), LOCAL_RANK=str(r), **common) for r in (0, 1)]
    outs = [j.communicate(timeout=240)[0] for j in jobs]
    assert [j.returncode for j in jobs] == [0, 0], "\n".join(outs)
    run = next(tmp_path.glob("scenes/*"))
    assert (run/"done").is_file() and len(Log(run/"metrics.jsonl").rows()) == 3


# --- bad images ---------------------------------------------------------------------------------------------------------

def voc(root, files, size=(80, 64)):
    "A toy set in BCCD's layout: `files` maps a name to a list of boxes; None leaves the picture out"
    base = root/"bccd"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"): (base/folder).mkdir(parents=True, exist_ok=True)
    for i, (name, boxes) in enumerate(files.items()):
        if boxes is None: (base/"JPEGImages"/f"{name}.jpg").write_bytes(b"no picture")
        else: Image.new("RGB", size, (40*i % 255, 90, 120)).save(base/"JPEGImages"/f"{name}.jpg")
        objects = "".join(f"<object><name>{kind}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax>"
                          f"<ymax>{d}</ymax></bndbox></object>"
                          for kind, a, b, c, d in boxes or [("RBC", 1, 1, 20, 20)])
        (base/"Annotations"/f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")
    names = "\n".join(files)
    for split in ("train", "val", "trainval", "test"): (base/"ImageSets/Main"/f"{split}.txt").write_text(names)


def test_one_bad_image_ends_no_run_and_is_counted(tmp_path, monkeypatch):
    voc(tmp_path/"data", {"a": [("RBC", 5, 5, 40, 40)], "b": None, "c": [("WBC", 10, 10, 10, 30), ("RBC", 2, 2, 30, 30)],
                          "d": [("RBC", 300, 300, 340, 340)], "e": [("Dog", 3, 3, 30, 30), ("RBC", 3, 3, 30, 30)], "f": []})
    monkeypatch.setenv("SADALIB_DATA", str(tmp_path/"data"))
    config = replace(DET, data="bccd", train_images=None, test_images=None, size=64)
    run = require(config, root=tmp_path/"runs")
    found = record(run)
    assert found["trained_on"] == 3 + 1 # `voc` gives f, whose list is empty, one object
    assert found["skipped"]["train"] == {"unreadable picture": 1, "box of zero area": 1, "box outside the picture": 1,
                                         "image without objects": 1, "unknown class": 1}


# --- refusals ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change,word", [({"data": "bcd"}, "bccd"), ({"model": "fasterrcnn_resnet17"}, "resnet18"),
                                         ({"weights": "imagenett"}, "imagenet"),
                                         ({"data": "camvid"}, "no boxes"), ({"recipe": Recipe(augment="crop_flip")}, "mirrored by")])
def test_wrong_configurations(change, word):
    with pytest.raises(SadalibError) as error: scene_sets(replace(DET, **change))
    assert word in str(error.value) and "\n" not in str(error.value)


def test_a_last_batch_of_one_picture_ends_no_training(tmp_path):
    run = require(replace(SEG, train_images=9), root=tmp_path)
    assert record(run)["trained_on"] == 8
    with pytest.raises(SadalibError, match="raise batch_size"): require(replace(SEG, recipe=replace(SEG.recipe, batch_size=1)),
                                                                        root=tmp_path)


def test_methods_that_need_labels_are_refused():
    with pytest.raises(SadalibError, match="does not train on scenes"): SceneMethod(task="detection", inner=PGDTraining())
    with pytest.raises(SadalibError, match="trains in `fit` only"):
        SceneMethod(task="detection", inner=ERM()).loss(nn.Linear(1, 1), torch.arange(2), torch.arange(2))


def test_all_listed_networks_can_be_built():
    for task, names in SCENE_NETWORKS.items():
        for name in names:
            check_scene_model(task, name)
            if "101" in name: continue # as the others, but large
            with torch.random.fork_rng(): model = create_scene_model(task, name, 3, rois=8)
            assert model.training and all(p.requires_grad for p in model.parameters())


def test_equal_seeds_give_equal_networks_and_the_global_state_stays():
    before = torch.get_rng_state()
    a, b, c = (create_scene_model("detection", "fasterrcnn_resnet18_light", 3, seed=s) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.backbone.body.conv1.weight, c.backbone.body.conv1.weight)


def test_pictures_of_different_sizes_train(tmp_path):
    scenes = digit_scenes("train", n=4)
    images = [image[:, :, :96 - 8*i] for i, image in enumerate(scenes.images)]
    boxes = [b.clamp(max=96 - 8*i) for i, b in enumerate(scenes.boxes)]
    keep = [(b[:, 2:] > b[:, :2]).all(1) for b in boxes]
    mixed = DetectionSet("mixed", "train", images, [b[k] for b, k in zip(boxes, keep, strict=True)],
                         [x[k] for x, k in zip(scenes.labels, keep, strict=True)], [x[k] for x, k in zip(scenes.difficult, keep,
                                                                                                         strict=True)],
                         scenes.classes)
    model = create_scene_model("detection", "fasterrcnn_resnet18_light", 10, rois=8)
    loop = fit(model, SceneIndex(mixed), SceneMethod(task="detection", inner=DETECTED), Recipe(epochs=1, batch_size=2, warmup=0, lr=.001),
               progress=False)
    assert loop.step == 2 and len(answer(loop.model, mixed)) == 4


def test_the_result_names_its_data(tmp_path):
    run = require(SEG, root=tmp_path)
    found = record(run)
    assert set(found["datasets"]) == {"scenes/train", "scenes/test"} and found["trained_on"] == 8
    assert {"miou", "pixel_accuracy"} <= {m["metric"] for m in found["metrics"]} and json.loads((run.folder/"result.json").read_text())
    assert Run(SEG, tmp_path).done
