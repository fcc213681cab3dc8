"""Scenes: what readers accept, count and refuse, embedded scenes that never change, and scores against slow references"""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sadalib.data import scenes as module
from sadalib.data.scenes import (
    BCCD_CLASSES,
    FAULTS,
    VOID,
    Annotation,
    DetectionSet,
    Faults,
    PictureFiles,
    SegmentationSet,
    collect_boxes,
    digit_scene,
    digit_scenes,
    held_out,
    join_scenes,
    load_scenes,
    read_camvid,
    read_cityscapes,
    read_coco_detection,
    read_voc_detection,
    read_voc_segmentation,
    resize_scene,
)
from sadalib.runs import SadalibError
from sadalib.scene_scores import average_precision, class_iou, confusion, detection_scores, ranked_precision


def refused(match, call):
    "`call` refuses with one sentence that holds `match`"
    with pytest.raises(SadalibError) as error:
        call()
    text = str(error.value)
    assert match in text and "\n" not in text and text.endswith((".", "?")), text


def picture(path, width=40, height=30, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)).save(path)


def mask(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


def voc_object(name, x1, y1, x2, y2, extra=""):
    box = f"<ymax>{y2}</ymax><xmin>{x1}</xmin><xmax>{x2}</xmax><ymin>{y1}</ymin>"  # any order, as in VOC 2012
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    return f"<object><name>{name}</name>{part}<bndbox>{box}</bndbox>{extra}</object>"


def voc_set(root, images, lists=("train",)):
    "`images`: name -> the text of its objects, or the whole text where it starts with '!'"
    for i, (word, objects) in enumerate(images.items()):
        picture(root / "JPEGImages" / f"{word}.jpg", seed=i)
        size = "<size><width>40</width><height>30</height></size>"
        (root / "Annotations").mkdir(parents=True, exist_ok=True)
        text = objects[1:] if objects[:1] == "!" else f"<annotation>{size}{objects}</annotation>"
        (root / "Annotations" / f"{word}.xml").write_text(text)
    for name in lists:
        (root / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
        (root / f"ImageSets/Main/{name}.txt").write_text("\n".join(images))
    return root


# ---------------------------------------------------------------- Pascal VOC

GOOD = voc_object("dog", 3, 5, 20, 25)
BAD = {
    "zero": (voc_object("dog", 9, 5, 8, 25), "box of zero area"),
    "outside": (voc_object("dog", 60, 5, 70, 25), "box outside the picture"),
    "cut": (voc_object("dog", 30, 5, 70, 25), "box cut to the picture"),
    "letters": (voc_object("dog", "x", 5, 70, 25), "box without numbers"),
    "endless": (voc_object("dog", "inf", 5, "1e400", 25), "box without numbers"),
    "unknown": (voc_object("dgo", 3, 5, 20, 25), "unknown class"),
    "empty": ("", "image without objects"),
    "torn": ("!<annotation><obj", "unreadable annotation"),
    "bomb": ('!<!DOCTYPE a [<!ENTITY b "bb">]><annotation>&b;</annotation>', "unreadable annotation"),
    "swapped": ("!<annotation><size><width>30</width><height>40</height></size>" + GOOD + "</annotation>",
                "size differs from the annotation"),
}


@pytest.mark.parametrize("word", BAD)
def test_every_fault_is_counted_and_named_when_strict(tmp_path, word):
    text, kind = BAD[word]
    folder = voc_set(tmp_path, {"good": GOOD, word: text})
    found = read_voc_detection(folder)
    assert found.skipped[kind] == 1 and kind in FAULTS and kind in repr(found)
    assert found.boxes[0].tolist() == [[2, 4, 20, 25]]  # 1-based inclusive became continuous
    assert len(found) == (2 if word in ("cut", "swapped") else 1)
    refused(kind, lambda: read_voc_detection(folder, strict=True))


def test_pictures_missing_broken_or_with_a_path_are_skipped(tmp_path):
    folder = voc_set(tmp_path, {"a": GOOD, "b": GOOD, "c": GOOD, "d": GOOD})
    (folder / "JPEGImages/b.jpg").unlink()
    whole = (folder / "JPEGImages/c.jpg").read_bytes()
    (folder / "JPEGImages/c.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "JPEGImages/d.jpg").write_text("<html>not found</html>")
    with open(folder / "ImageSets/Main/train.txt", "a") as file:
        file.write("\n../../../etc/passwd\n/etc/passwd\nnobody\n")
    found = read_voc_detection(folder)
    assert len(found) == 1
    assert found.skipped == {"unsafe file name": 2, "missing annotation": 1, "missing picture": 1, "unreadable picture": 2}
    for file in ("b", "c", "d"):
        (folder / "ImageSets/Main/val.txt").write_text(file)
        refused("none of 1 images is of use", lambda: read_voc_detection(folder, "valid"))


def test_difficult_and_empty_images(tmp_path):
    hard = voc_object("cat", 3, 5, 20, 25, "<difficult>1</difficult>")
    folder = voc_set(tmp_path, {"a": GOOD + hard, "b": hard, "c": ""}, ("train", "test"))
    train, test = read_voc_detection(folder), read_voc_detection(folder, "test")
    assert (len(train), len(test), len(train.without_difficult())) == (2, 3, 1)
    assert test.boxes[2].shape == (0, 4) and len(test.without_difficult()) == 2  # empty test images stay
    assert train.target(0)["labels"].tolist() == [12] and len(train.target(1)["boxes"]) == 0
    assert len(read_voc_detection(folder, keep_empty=True)) == 3


def test_voc_2012_has_no_public_test_and_parts_never_overlap(tmp_path):
    names = {f"2012_{i:06}": GOOD for i in range(20)}
    voc_set(tmp_path / "VOCdevkit/VOC2012", names)
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Main/val.txt").write_text("2012_000003\n")
    sets = {s: load_scenes("voc2012", s, root=tmp_path) for s in ("train", "valid", "trainval", "test")}
    assert [len(x) for x in sets.values()] == [18, 2, 20, 1]
    pixels = {s: {i.numpy().tobytes() for i in x.images} for s, x in sets.items()}
    assert not pixels["train"] & pixels["valid"] and pixels["train"] | pixels["valid"] == pixels["trainval"]
    few = {i.numpy().tobytes() for i in load_scenes("voc2012", "train", n=5, root=tmp_path).images}
    assert not few & pixels["valid"], "a small n must not move images between the parts"


def test_voc_0712_joins_both_years(tmp_path):
    for year, word in (("2007", "a"), ("2012", "b")):
        bad = {f"{word}2": GOOD + BAD["zero"][0]}
        voc_set(tmp_path / f"VOCdevkit/VOC{year}", {f"{word}1": GOOD, **bad}, ("trainval", "test"))
    both = load_scenes("voc0712", "trainval", root=tmp_path)
    assert (len(both), both.skipped, both.name) == (4, {"box of zero area": 2}, "voc0712")
    assert len(load_scenes("voc0712", "test", root=tmp_path)) == 2
    assert len(load_scenes("voc0712", "trainval", root=tmp_path, n=1)) == 1


# ---------------------------------------------------------------- COCO


def coco_set(root, images, annotations, categories=((1, "person"), (18, "dog")), part="train"):
    told = {
        "images": [{"id": i, "file_name": f, "width": 40, "height": 30} for i, f in images],
        "categories": [{"id": i, "name": n} for i, n in categories],
        "annotations": [{"id": j, **a} for j, a in enumerate(annotations)],
    }
    for i, name in images:
        if ".." not in name: picture(root / f"{part}2017" / name, seed=i)
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / f"annotations/instances_{part}2017.json").write_text(json.dumps(told))
    return root


def test_coco_boxes_ids_and_faults(tmp_path):
    rows = [
        {"image_id": 7, "category_id": 18, "bbox": [1, 2, 3, 4]},
        {"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 1},
        {"image_id": 7, "category_id": 18, "bbox": [1, 2, 0, 4]},
        {"image_id": 7, "category_id": 90, "bbox": [1, 2, 3, 4]},
        {"image_id": 7, "category_id": 18, "bbox": [1, 2]},
        {"image_id": 7, "category_id": 18, "bbox": None},
        {"image_id": 7, "category_id": 18, "bbox": [35, 2, 30, 4]},
        {"image_id": 99, "category_id": 18, "bbox": [1, 2, 3, 4]},
        {"category_id": 18},
    ]
    root = coco_set(tmp_path, [(7, "7.jpg"), (8, "8.jpg"), (9, "../../9.jpg")], rows, part="val")
    found = read_coco_detection(root, "test")
    assert found.classes == ("person", "dog") and len(found) == 2  # the empty one stays in a test set
    assert found.boxes[0].tolist() == [[1, 2, 4, 6], [1, 2, 4, 6], [35, 2, 40, 6]]
    assert found.labels[0].tolist() == [2, 1, 2] and found.difficult[0].tolist() == [False, True, False]
    assert found.skipped == {
        "annotation of an unknown image": 2,
        "unsafe file name": 1,
        "box of zero area": 1,
        "unknown class": 1,
        "box without numbers": 2,
        "box cut to the picture": 1,
    }


def test_coco_on_the_disk_equals_coco_in_memory(tmp_path):
    rows = [{"image_id": i, "category_id": 18, "bbox": [1, 2, 30, 20]} for i in range(20)]
    root = coco_set(tmp_path, [(i, f"{i}.jpg") for i in range(20)], rows)
    a, b = (read_coco_detection(root, "train", size=16, in_memory=k) for k in (True, False))
    assert isinstance(b.images, PictureFiles) and a.checksum == b.checksum == join_scenes("coco", [b]).checksum
    assert a.take(3).checksum == b.take([0, 1, 2]).checksum and b.images[0].shape == (3, 16, 21)
    sizes = [len(read_coco_detection(root, s)) for s in ("train", "valid", "trainval")]
    assert sizes == [18, 2, 20]
    (root / "train2017/3.jpg").unlink()
    assert read_coco_detection(root, "trainval", in_memory=False).skipped == {"missing picture": 1}


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"images": 3}', '{"images":[{}],"annotations":[],"categories":[]}', "[" * 9999])
def test_a_broken_coco_file_is_refused(tmp_path, text):
    coco_set(tmp_path, [(1, "1.jpg")], [])
    (tmp_path / "annotations/instances_train2017.json").write_text(text)
    refused("is no COCO file", lambda: read_coco_detection(tmp_path))


# ---------------------------------------------------------------- boxes


def test_resizing_keeps_boxes_on_their_objects():
    image = torch.zeros(3, 60, 90, dtype=torch.uint8)
    image[:, 20:40, 30:60] = 255
    for size in (30, 45, 120):
        small, boxes = resize_scene(image, torch.tensor([[30.0, 20, 60, 40]]), size)
        lines, columns = (np.flatnonzero((small[0] > 127).any(k).numpy()) for k in (1, 0))
        want = [columns[0], lines[0], columns[-1] + 1, lines[-1] + 1]
        assert np.abs(boxes[0].numpy() - want).max() <= 1 and min(small.shape[1:]) == size
    assert resize_scene(torch.zeros(3, 10, 100, dtype=torch.uint8), torch.zeros(0, 4), 10, 40)[0].shape == (3, 4, 40)


def test_boxes_too_thin_to_survive_resizing_are_counted(tmp_path):
    picture(tmp_path / "a.png", 400, 300)
    left = np.linspace(100, 399, 99, dtype=np.float32)  # each box is as thin as a number can tell
    thin = [(x, 1, y, 9) for x, y in zip(left.tolist(), np.nextafter(left, np.float32(999)).tolist(), strict=True)]
    told = Annotation(tmp_path / "a.png", "a", [*thin, (1, 1, 9, 9)], ["dog"] * 100, [False] * 100)
    found = collect_boxes("x", "train", [told], ("dog",), Faults("x"), size=130)
    assert found.skipped["box of zero area"] == 100 - len(found.boxes[0]) > 0
    assert resize_scene(torch.ones(3, 30, 4000, dtype=torch.uint8), found.boxes[0], 1)[0].tolist() == [[[1]]] * 3


@pytest.mark.parametrize("change", ["images", "boxes", "labels", "dtype", "order", "nan", "label"])
def test_a_set_is_checked_when_made(change):
    good = digit_scenes(n=3)
    parts = {key: list(getattr(good, key)) for key in ("images", "boxes", "labels", "difficult")}
    if change in ("images", "boxes", "labels"): parts[change] = parts[change][:2]
    if change == "dtype": parts["boxes"][0] = parts["boxes"][0].double()
    if change == "order": parts["boxes"][0] = parts["boxes"][0].flip(1)
    if change == "nan": parts["boxes"][0] = parts["boxes"][0] * torch.nan
    if change == "label": parts["labels"][0] = parts["labels"][0] * 0
    refused("x (train): ", lambda: DetectionSet("x", "train", **parts, classes=good.classes))


# ---------------------------------------------------------------- masks


def test_camvid_pads_with_void_and_counts_what_is_wrong(tmp_path):
    for i in range(6): picture(tmp_path / f"train/{i}.jpg", 24, 18, i)
    labels = np.tile(np.arange(12), (18, 2))
    for i in range(5): mask(tmp_path / f"trainannot/{i}.png", labels)
    mask(tmp_path / "trainannot/1.png", np.where(labels == 3, 77, labels))
    mask(tmp_path / "trainannot/2.png", labels[:9])
    mask(tmp_path / "trainannot/3.png", np.full((18, 24), 11))
    mask(tmp_path / "trainannot/4.png", np.zeros((18, 24, 3)))
    found = read_camvid(tmp_path)
    assert found.masks.shape == (2, 32, 32) and (found.masks[:, 18:] == VOID).all() and (found.masks[:, :, 24:] == VOID).all()
    assert torch.equal(found.masks[0, :18, :11], torch.arange(11, dtype=torch.uint8).expand(18, 11))
    assert (found.masks[:, :18, 11] == VOID).all() and (found.masks[1, :18, 3] == VOID).all()
    assert found.skipped == {
        "mask with unknown labels": 1,
        "mask of another size": 1,
        "mask without labels": 1,
        "unreadable annotation": 1,
        "missing annotation": 1,
    }
    refused("unknown labels", lambda: read_camvid(tmp_path, strict=True))
    assert read_camvid(tmp_path, size=(16, 16)).masks.shape == (2, 16, 16)


def test_cityscapes_maps_raw_ids(tmp_path):
    for part, stems in (("train", [f"ulm_{i}" for i in range(20)]), ("val", ["jena_0"])):
        for stem in stems:
            city = stem.split("_")[0]
            picture(tmp_path / f"leftImg8bit/{part}/{city}/{stem}_leftImg8bit.png", 40, 2, len(stem))
            mask(tmp_path / f"gtFine/{part}/{city}/{stem}_gtFine_labelIds.png", np.tile(np.arange(40).clip(0, 33), (2, 1)))
    test = read_cityscapes(tmp_path, "test", size=(16, 48))
    want = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14,
            28: 15, 31: 16, 32: 17, 33: 18}
    assert [want.get(i, VOID) for i in range(34)] == test.masks[0, 0, :34].tolist() and not test.skipped
    assert [len(read_cityscapes(tmp_path, s)) for s in ("train", "valid", "trainval")] == [18, 2, 20]


def test_voc_masks_come_from_the_palette(tmp_path):
    picture(tmp_path / "JPEGImages/a.jpg", 3, 2)
    labels = np.array([[0, 12, 255], [20, 21, 0]], np.uint8)
    image = Image.frombytes("P", (3, 2), labels.tobytes())
    (tmp_path / "SegmentationClass").mkdir()
    image.putpalette([i % 256 for i in range(768)])
    image.save(tmp_path / "SegmentationClass/a.png")
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("a")
    found = read_voc_segmentation(tmp_path, size=16)
    assert found.masks[0, :2, :3].tolist() == [[0, 12, VOID], [20, VOID, 0]]
    assert found.skipped == {"mask with unknown labels": 1} and len(found.classes) == 21
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("../a")
    refused("plain file names", lambda: read_voc_segmentation(tmp_path, size=16))


def test_pictures_of_several_sizes_need_one(tmp_path):
    for i in range(2):
        picture(tmp_path / f"train/{i}.png", 20 + i, 16)
        mask(tmp_path / f"trainannot/{i}.png", np.zeros((16, 20 + i)))
    refused("differ in size", lambda: read_camvid(tmp_path))
    assert read_camvid(tmp_path, size=32).images.shape == (2, 3, 32, 32)


# ---------------------------------------------------------------- embedded scenes


def test_scenes_are_the_same_everywhere():
    "Boxes and masks depend on whole numbers alone; a decoder of JPEG may differ in the photographs"
    sets = [digit_scenes(s, "segmentation", n=20) for s in ("train", "valid", "test")]
    digest = hashlib.sha256(b"".join(x.masks.numpy().tobytes() for x in sets)).hexdigest()
    assert digest[:16] == "ec932a32bf51851b"
    code = "from sadalib.data.scenes import *; print(digit_scenes(n=9).checksum, digit_scenes(n=9, seed=1).checksum)"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100).stdout
    assert seen.split()[0] == digit_scenes(n=20).take(9).checksum != seen.split()[1]


def test_boxes_are_tight_around_their_masks_and_apart():
    for i in range(40):
        image, labels_at, boxes, labels = digit_scene(i, "train", size=64 + i)
        assert image.shape == (64 + i, 64 + i, 3) and 1 <= len(boxes) <= 4
        left = labels_at.copy()
        for (x1, y1, x2, y2), k in zip(boxes.astype(int), labels, strict=True):
            part = left[y1:y2, x1:x2]
            assert set(np.unique(part)) <= {0, k} and all(side.any() for side in (part[0], part[-1], part[:, 0], part[:, -1]))
            part[:] = 0
        assert not left.any(), "every labelled pixel lies in the box of its digit"


def test_splits_of_scenes_share_no_digit_and_no_place(monkeypatch):
    seen = {}
    for split in ("train", "valid", "test"):
        rows = module.rows(split)
        seen[split] = set(range(rows.start, rows.stop))
    assert not any(a & b for a, b in itertools.combinations(seen.values(), 2))
    dark = tuple(np.zeros((427, 640, 3), np.uint8) for _ in range(2))
    for photo in dark: photo[:, :384] = 200  # the part of training
    monkeypatch.setattr(module, "photographs", lambda: dark)
    monkeypatch.setattr(module, "_paint", lambda scene, digit, random: scene)
    train, test = (np.stack([digit_scene(i, s)[0] for i in range(10)]) for s in ("train", "test"))
    assert set(np.unique(train)) == {200} and set(np.unique(test)) == {0}


def test_returned_scenes_are_copies():
    first = digit_scenes(n=3)
    first.images.zero_()
    assert digit_scenes(n=3).images.any()


@pytest.mark.parametrize("bad", [
    dict(name="scnes"), dict(split="trian"), dict(split="trainval"), dict(task="boxes"), dict(n=0), dict(n=True), dict(n=2.0),
    dict(size=0), dict(size=(96, 96)), dict(size=4096), dict(name="bccd", size="big"), dict(name="camvid", size=(1, 2, 3)),
    dict(name="bccd", root="/nowhere"), dict(name="coco", root="/nowhere"), dict(name="camvid", task="detection"),
])
def test_requests_that_make_no_sense(bad):
    refused("", lambda: load_scenes(**{"name": "scenes", **bad}))


def test_held_out_is_a_partition():
    names = [f"n{i}" for i in range(37)]
    parts = [held_out(names, s) for s in ("train", "valid", "trainval")]
    assert set(parts[0]) | set(parts[1]) == set(names) == set(parts[2]) and not set(parts[0]) & set(parts[1])


def test_pictures_are_drawn_for_any_task(tmp_path):
    for task in ("detection", "segmentation"):
        found = digit_scenes(n=3, task=task)
        for n in (1, 2, 9): found.show(n).savefig(tmp_path / "x.png")
    empty = digit_scenes(n=1)
    module.show_boxes(empty.images.float() / 255, [torch.zeros(0, 4)]).savefig(tmp_path / "y.png")
    assert isinstance(digit_scenes(n=1, task="segmentation").to("cpu"), SegmentationSet)


# ---------------------------------------------------------------- real data

DATA = Path(os.environ.get("SADALIB_DATA", "/nowhere"))


@pytest.mark.skipif(not (DATA / "bccd").is_dir(), reason="needs bccd: set SADALIB_DATA to where it lies")
def test_bccd_counts_match_its_lists():
    sets = {s: load_scenes("bccd", s, size=120) for s in ("train", "valid", "test")}
    assert [len(x) for x in sets.values()] == [205, 87, 72]
    assert sum(x.skipped.get("box of zero area", 0) for x in sets.values()) == 2
    assert all(set(x.skipped) <= {"box of zero area"} for x in sets.values())
    labels = torch.cat([torch.cat(x.labels) for x in sets.values()])
    assert torch.bincount(labels).tolist() == [0, 4153, 372, 361] and sets["train"].classes == BCCD_CLASSES
    pixels = [{hashlib.sha256(i.numpy().tobytes()).digest() for i in x.images} for x in sets.values()]
    assert not any(a & b for a, b in itertools.combinations(pixels, 2))
    refused("BloodImage_00", lambda: load_scenes("bccd", strict=True))


@pytest.mark.skipif(not (DATA / "camvid240").is_dir(), reason="needs camvid240: set SADALIB_DATA to where it lies")
def test_camvid_counts_and_void():
    sets = {s: load_scenes("camvid", s) for s in ("train", "valid", "test")}
    assert [len(x) for x in sets.values()] == [367, 101, 233] and not any(x.skipped for x in sets.values())
    for x in sets.values():
        assert x.images.shape[1:] == (3, 192, 240) and (x.masks[:, 180:] == VOID).all()
        assert set(x.masks.unique().tolist()) == {*range(11), VOID}


# ---------------------------------------------------------------- scores against slow references


def slow_iou(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0: return 0.0
    return w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h)


def slow_verdicts(found, truth, k, iou, rule):
    "Scores and verdicts of class `k` by plain loops"
    rows, count = [], 0
    for i, (p, boxes, labels, hard) in enumerate(zip(found, truth.boxes, truth.labels, truth.difficult, strict=True)):
        own = [(b, bool(h)) for b, y, h in zip(boxes.tolist(), labels.tolist(), hard.tolist(), strict=True) if y == k]
        count += sum(not h for _, h in own)
        used = set()
        mine = [(s, b) for b, y, s in zip(p["boxes"].tolist(), p["labels"].tolist(), p["scores"].tolist(), strict=True) if y == k]
        for score, box in sorted(mine, key=lambda r: -r[0]):
            best, who = iou, None
            if rule == "voc":
                over = [slow_iou(box, b) for b, _ in own]
                if over and max(over) >= iou: who = int(np.argmax(over))
            else:
                for want_hard in (False, True):
                    if who is not None: break
                    for j, (b, hard_one) in enumerate(own):
                        if hard_one != want_hard or (j in used and not hard_one): continue
                        over = slow_iou(box, b)
                        if hard_one:
                            w, h = min(box[2], b[2]) - max(box[0], b[0]), min(box[3], b[3]) - max(box[1], b[1])
                            over = max(w, 0) * max(h, 0) / ((box[2] - box[0]) * (box[3] - box[1]))
                        if over > best or (over == best and who is None): best, who = over, j
            if who is None: rows.append((score, i, 0))
            elif own[who][1]: continue
            elif who in used: rows.append((score, i, 0))
            else:
                used.add(who)
                rows.append((score, i, 1))
    return [r[2] for r in sorted(rows, key=lambda r: (-r[0], r[1]))], count


def slow_ap(verdicts, count, points):
    recall, precision, hits = [], [], 0
    for n, v in enumerate(verdicts, 1):
        hits += v
        recall.append(hits / count)
        precision.append(hits / n)
    if points == "all":
        total, last = 0.0, 0.0
        for i, r in enumerate(recall):
            total += (r - last) * max(precision[i:])
            last = r
        return total
    m = int(points)
    return sum(max((p for p, r in zip(precision, recall, strict=True) if r >= t / (m - 1) - 1e-9), default=0) for t in range(m)) / m


def random_detections(seed, images=6):
    random = np.random.RandomState(seed)

    def boxes(n):
        corner, size = random.randint(0, 20, (n, 2)), random.randint(4, 14, (n, 2))
        return torch.tensor(np.concatenate([corner, corner + size], 1).reshape(-1, 4), dtype=torch.float32)

    parts, found = [], []
    for _ in range(images):
        n, m = random.randint(0, 6), random.randint(0, 9)
        truth, labels = boxes(n), torch.tensor(random.randint(1, 4, n), dtype=torch.int64)
        parts.append((torch.zeros(3, 9, 9, dtype=torch.uint8), truth, labels, torch.tensor(random.rand(n) < 0.25)))
        near = truth.repeat(2, 1)[:m] + torch.tensor(random.randint(-2, 3, (min(m, 2 * n), 4)), dtype=torch.float32)
        near[:, 2:] = torch.maximum(near[:, 2:], near[:, :2] + 1)
        mixed = torch.cat([near, boxes(m - len(near))])
        kinds = torch.cat([labels.repeat(2)[:m], torch.tensor(random.randint(1, 4, m - len(near)), dtype=torch.int64)])
        found.append({"boxes": mixed, "labels": kinds, "scores": torch.tensor(random.permutation(1000)[:m] / 1000)})
    images_, boxes_, labels_, hard = map(list, zip(*parts, strict=True))
    return found, DetectionSet("random", "test", images_, boxes_, labels_, hard, ("a", "b", "c", "d"))


@pytest.mark.parametrize("rule", ["voc", "coco"])
@pytest.mark.parametrize("points", ["all", "11", "101"])
def test_average_precision_equals_plain_loops(rule, points):
    for seed in range(25):
        found, truth = random_detections(seed)
        for iou in (0.3, 0.5, 0.75):
            ours = average_precision(found, truth, iou=iou, points=points, rule=rule)
            for k in range(4):
                verdicts, count = slow_verdicts(found, truth, k + 1, iou, rule)
                if not count: assert ours[k].isnan()
                else: assert float(ours[k]) == pytest.approx(slow_ap(verdicts, count, points), abs=1e-9), (seed, k, iou)


def test_known_values_and_their_average():
    "The toy of two truths in three: points differ as the textbooks say"
    ranks = torch.tensor([1, 0, 1])
    assert ranked_precision(ranks, 2, points="all") == pytest.approx(5 / 6)
    assert ranked_precision(ranks, 2, points="11") == pytest.approx((6 + 5 * 2 / 3) / 11)  # 0.84848
    found, truth = random_detections(3)
    levels = [0.5 + 0.05 * i for i in range(10)]
    each = torch.stack([average_precision(found, truth, iou=i, points="101", rule="coco") for i in levels])
    scores = detection_scores(found, truth)
    assert scores.ap == pytest.approx(float(each.nanmean())) and scores.ap50 == pytest.approx(float(each[0].nanmean()))
    assert np.isnan(scores.per_class["d"])


def test_no_detections_their_order_and_nan():
    found, truth = random_detections(1)
    none = [{k: v[:0] for k, v in p.items()} for p in found]
    assert average_precision(none, truth).nan_to_num(0).sum() == 0
    distinct = [{**p, "scores": p["boxes"].sum(1).double() + p["labels"] / 7} for p in found]
    assert torch.equal(
        average_precision(distinct, truth).nan_to_num(9),
        average_precision([{k: v.flip(0) for k, v in p.items()} for p in distinct], truth).nan_to_num(9),
    )
    broken = [dict(p) for p in found]
    broken[0]["scores"] = broken[0]["scores"] * torch.nan if len(broken[0]["scores"]) else torch.tensor([torch.nan])
    refused("", lambda: average_precision(broken, truth))


def test_class_iou_equals_plain_loops():
    for seed in range(10):
        random = np.random.RandomState(seed)
        masks = torch.tensor(random.choice([0, 1, 2, 4, VOID], (3, 5, 7)))
        guess = torch.tensor(random.choice([0, 1, 2, 4], (3, 5, 7)))
        counts = sum(confusion(g, m, 6) for g, m in zip(guess, masks, strict=True))
        assert torch.equal(counts, confusion(guess, masks.to(torch.uint8), 6))
        for k in range(6):
            both = either = 0
            for g, m in zip(guess.flatten().tolist(), masks.flatten().tolist(), strict=True):
                if m != VOID: both, either = both + (g == k and m == k), either + (g == k or m == k)
            ours = float(class_iou(counts)[k])
            assert np.isnan(ours) if not either else ours == pytest.approx(both / either)


def test_against_torchmetrics():
    metrics = pytest.importorskip("torchmetrics")
    random = np.random.RandomState(0)
    masks, guess = (torch.tensor(random.randint(0, 4, (2, 9, 9))) for _ in range(2))
    theirs = metrics.classification.MulticlassJaccardIndex(4)(guess, masks)
    assert float(class_iou(confusion(guess, masks, 4)).nanmean()) == pytest.approx(float(theirs), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_coco_rule_against_torchmetrics(seed):
    metrics = pytest.importorskip("torchmetrics")
    pytest.importorskip("pycocotools")
    found, truth = random_detections(seed)
    levels = np.linspace(0, 1, 101).tolist() # COCO's; torchmetrics' own are rounded to float32
    theirs = metrics.detection.MeanAveragePrecision(iou_thresholds=[0.5], rec_thresholds=levels)
    marks = [{"boxes": b, "labels": k, "iscrowd": d.long()} for b, k, d in zip(truth.boxes, truth.labels, truth.difficult, strict=True)]
    theirs.update(found, marks)
    ours = average_precision(found, truth, points="101", rule="coco", most=100)
    assert float(ours.nanmean()) == pytest.approx(float(theirs.compute()["map"]), abs=1e-6)
