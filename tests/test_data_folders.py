"""Pictures in folders: what is read, what is refused, and that nothing half-written or stale is ever used"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, Resize

import sadalib.data as data
from sadalib.data import ImageSet, available, folders, load, task_of
from sadalib.data.catalogue import CATALOGUE, check_set, check_sets, list_sets, prepare
from sadalib.runs import SadalibError

NAME = "folder/birds"


def refused(match, call):
    "`call` refuses with one sentence that holds `match`"
    with pytest.raises(SadalibError) as error:
        call()
    text = str(error.value)
    assert match in text and "\n" not in text, text
    return text


def write(folder, count, *, seed=0):
    "`count` noisy pictures of several sizes, JPEG and PNG"
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.RandomState(seed)
    for i in range(count):
        pixels = noise.randint(0, 256, (20 + i % 7, 30 - i % 5, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.{('jpg', 'png', 'JPEG')[i % 3]}")


@pytest.fixture
def birds(tmp_path):
    "Forty training and six test pictures in two classes"
    for k, label in enumerate(("robin", "crow")):
        write(tmp_path / NAME / "train" / label, 20, seed=k)
        write(tmp_path / NAME / "test" / label, 3, seed=k + 9)
    return tmp_path


def cache(root):
    return sorted(path.name for path in (root / NAME / ".cache").iterdir() if path.suffix != ".lock")


def bytes_of(images):
    return {image.numpy().tobytes() for image in images}


# ---- layout


def test_classes_splits_and_labels(birds):
    train, valid, test, whole = (load(NAME, split, size=16, root=birds) for split in data.SPLITS)
    assert [len(x) for x in (train, valid, test, whole)] == [36, 4, 6, 46]
    assert train.classes == ("crow", "robin") and train.images.shape == (36, 3, 16, 16)
    assert not bytes_of(train.images) & bytes_of(valid.images)
    parts = [bytes_of(x.images) for x in (train, valid, test)]
    assert set.union(*parts) == bytes_of(whole.images) and len(set.union(*parts)) == 46
    assert test.labels.bincount().tolist() == [3, 3] and 0 < valid.labels.float().mean() < 1
    assert available([NAME, "folder/cats", "imagenet"], "train", root=birds) == (NAME,)


def test_labels_belong_to_their_pictures(birds):
    for path in (birds / NAME / "train" / "crow").iterdir():
        Image.new("RGB", (20, 20), "red").save(path.with_suffix(".png"))
        if path.suffix != ".png":
            path.unlink()
    train = load(NAME, "train", size=8, root=birds)
    red = (train.images[:, 0] == 255).flatten(1).all(1) & (train.images[:, 1] == 0).flatten(1).all(1)
    assert torch.equal(red, train.labels == 0) and red.sum() > 5


def test_val_stands_for_what_is_missing(birds):
    shutil.copytree(birds / NAME / "test", birds / NAME / "val")
    assert len(load(NAME, "valid", size=8, root=birds)) == 6 and len(load(NAME, "train", size=8, root=birds)) == 40
    shutil.rmtree(birds / NAME / "test")
    assert len(load(NAME, "test", size=8, root=birds)) == 6 and len(load(NAME, "valid", size=8, root=birds)) == 4
    (birds / NAME / "val").rename(birds / NAME / "valid")
    assert len(load(NAME, "valid", size=8, root=birds)) == 6
    refused("test is missing", lambda: load(NAME, "test", size=8, root=birds))
    assert len(load(NAME, "all", size=8, root=birds)) == 46


def test_the_order_is_mixed_and_the_same_everywhere(birds, tmp_path):
    first = load(NAME, "train", size=8, limit=12, root=birds)
    assert len(first.labels.unique()) == 2
    shutil.copytree(birds / NAME / "train", tmp_path / "other" / NAME / "train")
    again = load(NAME, "train", size=8, limit=12, root=tmp_path / "other")
    assert first.checksum == again.checksum


def test_links_hidden_and_foreign_files(birds, tmp_path):
    (birds / NAME / "train" / ".hidden").mkdir()
    (birds / NAME / "train" / "crow" / "._0.jpg").write_bytes(b"finder")
    (birds / NAME / "train" / "crow" / "notes.txt").write_text("not a picture")
    (birds / NAME / "train" / "crow" / "old.jpg").mkdir()
    (birds / "folder" / "linked").mkdir()
    (birds / "folder" / "linked" / "train").symlink_to(birds / NAME / "train", target_is_directory=True)
    linked = load("folder/linked", "train", size=8, root=birds)
    assert linked.checksum == load(NAME, "train", size=8, root=birds).checksum and len(linked) == 36
    (birds / NAME / "train" / "crow" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    refused("gone.jpg cannot be read", lambda: load(NAME, "train", size=8, root=birds))


@pytest.mark.parametrize("name", ["folder", "folder/", "folder/..", "folder/../mnist", "folder//etc", "folder/a/b",
                                  "folder/.cache", "folder/a\\b", "folder/a..b", "folder/a b", "folder/x\0"])  # fmt: skip
def test_names_that_could_leave_the_root(name, tmp_path):
    for call in (lambda: load(name, size=8, root=tmp_path), lambda: prepare(name, tmp_path), lambda: task_of(name)):
        refused("is no set of pictures", call)


def test_what_is_missing_is_one_sentence(birds):
    refused("did you mean `folder/birds`?", lambda: load("folder/bird", size=8, root=birds))
    refused("pictures differ in size, so give one", lambda: load(NAME, root=birds))
    refused("imagenet/train/CLASS", lambda: load("imagenet", size=8, root=birds))
    (birds / "folder" / "empty" / "train").mkdir(parents=True)
    refused("holds no class folders", lambda: load("folder/empty", size=8, root=birds))
    (birds / "folder" / "empty" / "train" / "x").mkdir()
    refused("too few pictures for train", lambda: load("folder/empty", size=8, root=birds))
    write(birds / NAME / "test" / "magpie", 1)
    refused("test has the folder magpie, which train has not", lambda: load(NAME, "test", size=8, root=birds))


# ---- pictures


def test_pictures_are_those_of_torchvision(birds):
    transform, listed = Compose([Resize(16), CenterCrop(16)]), folders.list_pictures(NAME, "train", birds)
    train = load(NAME, "train", size=16, root=birds)
    for image, row in zip(train.images, listed.rows, strict=True):
        with Image.open(birds / NAME / row[0]) as picture:
            assert np.array_equal(np.asarray(transform(picture.convert("RGB"))), image.permute(1, 2, 0).numpy())


def test_modes_become_colour_and_grey(birds):
    folder = birds / NAME / "test" / "crow"
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        Image.new(mode, (9, 12), 1).save(folder / f"mode{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    test = load(NAME, "test", size=8, root=birds)
    grey = load(NAME, "test", size=8, channels=1, root=birds)
    assert len(test) == 11 and grey.images.shape == (11, 1, 8, 8)
    assert torch.equal(grey.images, data.to_channels(test.images, 1))
    Image.new("I;16", (9, 12)).save(folder / "deep.png")
    refused("test/crow/deep.png (more than 8 bits", lambda: load(NAME, "test", size=8, root=birds))


def test_broken_pictures_are_all_named(birds):
    folder = birds / NAME / "train" / "crow"
    whole = (folder / "0.jpg").read_bytes()
    for i, damage in enumerate((whole[:200], b"<html>", b"", b"GIF89a")):
        (folder / f"bad{i}.jpg").write_bytes(damage)
    text = refused("4 of 40 pictures cannot be decoded", lambda: load(NAME, "train", size=8, limit=40, root=birds))
    assert all(f"train/crow/bad{i}.jpg" in text for i in range(4)) and str(birds) not in text
    assert cache(birds) == []


# ---- the cache


def test_decoded_once_and_mapped(birds, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = load(NAME, "train", size=16, root=birds)
    assert cache(birds) == ["train_16.json", "train_16.npy"]
    monkeypatch.setattr(folders, "read_picture", None)
    again = load(NAME, "train", size=16, root=birds)
    assert torch.equal(first.images, again.images)
    part = load(NAME, "train", size=16, limit=5, root=birds)
    assert torch.equal(part.images, first.images[:5]) and cache(birds) == ["train_16.json", "train_16.npy"]
    part.images[0] = 0
    assert torch.equal(load(NAME, "train", size=16, root=birds).images, again.images), "the file itself never changes"


def test_the_checksum_is_that_of_the_arrays(birds, monkeypatch):
    first = load(NAME, "train", size=16, root=birds)
    memory = ImageSet(NAME, "train", first.images.clone(), first.labels.clone(), first.classes)
    assert first.checksum == memory.checksum == first.to("cpu").checksum
    assert first.take(5).checksum == memory.take(5).checksum != first.checksum
    assert load(NAME, "train", size=16, limit=5, root=birds).checksum == memory.take(5).checksum
    changed = data.replace(first, images=255 - first.images)
    assert changed.checksum != first.checksum
    monkeypatch.setattr(data.hashlib, "sha256", hashed := CountingHash())
    assert load(NAME, "train", size=16, root=birds).checksum == memory.checksum
    assert hashed.most < first.images.numel(), "the pixels were read again"


class CountingHash:
    "sha256 that remembers the largest piece it was given"

    def __init__(self):
        self.real, self.most = hashlib.sha256, 0

    def __call__(self, content=b""):
        self.most = max(self.most, len(content))
        return self.real(content)


def test_a_limit_decodes_no_more(birds, monkeypatch):
    seen, read = [], folders.read_picture
    monkeypatch.setattr(folders, "read_picture", lambda path, *args: seen.append(path) or read(path, *args))
    few = load(NAME, "train", size=8, limit=5, root=birds)
    assert len(seen) == 5 and cache(birds) == ["train_8_first5.json", "train_8_first5.npy"]
    assert torch.equal(few.images, load(NAME, "train", size=8, root=birds).images[:5])
    assert len(load(NAME, "train", size=8, limit=999, root=birds)) == 36


@pytest.mark.parametrize("change", ["content", "time", "added", "removed", "class"])
def test_every_change_is_noticed(birds, change):
    before, folder = load(NAME, "train", size=8, root=birds), birds / NAME / "train"
    path = birds / NAME / folders.list_pictures(NAME, "train", birds).rows[0][0]
    if change == "content":
        Image.new("RGB", (20, 20), "red").save(path)
    if change == "time":
        shutil.copy(folder / "robin" / "1.png", path)
        os.utime(path, ns=(1, 1))
    if change == "added":
        write(folder / "crow", 23)
    if change == "removed":
        path.unlink()
    if change == "class":
        (folder / "crow").rename(folder / "wren")
        shutil.rmtree(birds / NAME / "test")
    after = load(NAME, "train", size=8, root=birds)
    assert after.checksum != before.checksum or after.classes != before.classes
    fresh = ImageSet(NAME, "train", after.images.clone(), after.labels, after.classes)
    assert fresh.checksum == after.checksum


@pytest.mark.parametrize("damage", ["short", "longer", "record", "foreign", "no array"])
def test_a_damaged_cache_is_made_anew(birds, damage):
    first = load(NAME, "train", size=8, root=birds)
    array, record = (birds / NAME / ".cache" / f"train_8.{ending}" for ending in ("npy", "json"))
    whole, checksum = array.read_bytes(), first.checksum
    del first
    if damage == "short":
        array.unlink()
        array.write_bytes(whole[:100])
    if damage == "longer":
        array.write_bytes(whole + b"x")
    if damage == "record":
        record.write_text("{torn")
    if damage == "foreign":
        record.write_text(json.dumps(["no record"]))
    if damage == "no array":
        array.unlink()
    assert load(NAME, "train", size=8, root=birds).checksum == checksum and array.read_bytes() == whole


def test_a_full_disk_and_a_read_only_root(birds, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (birds / NAME / ".cache").write_text("a file where the folder should be")
    kept = load(NAME, "test", size=8, root=birds)
    assert len(list((tmp_path / "home").rglob("test_8.npy"))) == 1
    assert load(NAME, "test", size=8, root=birds).checksum == kept.checksum
    shutil.rmtree(tmp_path / "home")
    (tmp_path / "home").write_text("not a folder either")
    refused("could not be written", lambda: load(NAME, "test", size=8, root=birds))
    (birds / NAME / ".cache").unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 10))
    refused("free some space", lambda: load(NAME, "test", size=8, root=birds))
    assert cache(birds) == []


CHILD = """
import sys, time
from pathlib import Path
from sadalib.data import folders, load
read = folders.read_picture
def slow(*args): time.sleep(float(sys.argv[2])); Path(sys.argv[3]).write_text("here"); return read(*args)
folders.read_picture, folders._BLOCK = slow, 4
print(load("folder/birds", "train", size=8, root=sys.argv[1]).checksum)
"""


def child(root, seconds, mark):
    return subprocess.Popen([sys.executable, "-c", CHILD, str(root), str(seconds), str(mark)], stdout=subprocess.PIPE,
                            text=True)  # fmt: skip


def test_killed_in_the_middle(birds, tmp_path):
    mark = tmp_path / "mark"
    process, deadline = child(birds, 0.5, mark), time.monotonic() + 60
    while not mark.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not [name for name in cache(birds) if not name.endswith(".part")]
    assert len(load(NAME, "train", size=8, root=birds)) == 36
    assert cache(birds) == ["train_8.json", "train_8.npy"]


def test_two_processes_at_once(birds, tmp_path):
    both = [child(birds, 0.02, tmp_path / f"mark{i}") for i in range(2)]
    said = [process.communicate(timeout=120)[0].splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0][-1] == said[1][-1] == load(NAME, "train", size=8, root=birds).checksum
    assert cache(birds) == ["train_8.json", "train_8.npy"]
    assert len(list(tmp_path.glob("mark?"))) == 1, "both have decoded"


# ---- ImageNet


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    "The layout of ImageNet with one or two small pictures a class"
    root = tmp_path_factory.mktemp("data")
    Image.new("RGB", (9, 12), "green").save(root / "green.jpg")
    content = (root / "green.jpg").read_bytes()
    for k in range(1000):
        for part, count in (("train", 2), ("val", 1)):
            folder = root / "imagenet" / part / f"n{k:08d}"
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.JPEG").write_bytes(content)
    return root


def test_imagenet_layout(imagenet):
    test = load("imagenet", "test", size=4, root=imagenet)
    assert len(test.classes) == 1000 and len(test) == 1000 and test.note == "1,000 of 50,000"
    assert test.labels.unique().tolist() == list(range(1000)) and test.classes[7] == "n00000007"
    assert len(load("imagenet", "train", size=4, limit=10, root=imagenet)) == 10
    assert task_of("imagenet", root=imagenet).sources == ("imagenet",)
    verdict = check_set("imagenet", imagenet)
    assert verdict["status"] == "partial" and "train 2,000, val 1,000" in verdict["line"]


def test_imagenet_comes_by_links(imagenet, tmp_path):
    card = CATALOGUE["imagenet"]
    folder = prepare("imagenet", tmp_path, source=imagenet / "imagenet", echo=lambda text: None)
    assert (folder / "train").is_symlink() and len(load("imagenet", "test", size=4, root=tmp_path)) == 1000
    assert check_set("imagenet", tmp_path)["status"] == "partial"
    assert not all(file.url for file in card.files) and all(file.sha256 for file in card.files)
    refused("which links to them", lambda: prepare("imagenet", tmp_path / "b", echo=lambda text: None))
    refused("has no folder train", lambda: prepare("imagenet", tmp_path / "b", source=tmp_path, echo=lambda text: None))


def test_imagenet_lacks_classes(tmp_path):
    write(tmp_path / "imagenet" / "train" / "n00000001", 2)
    refused("holds 1 folders, expected 1,000", lambda: load("imagenet", size=4, root=tmp_path))
    bad = tmp_path / "other"
    write(bad / "train" / "n00000001", 2)
    refused("expected 1,000", lambda: prepare("imagenet", tmp_path / "b", source=bad, echo=lambda text: None))
    assert not (tmp_path / "b" / "imagenet").exists()


# ---- the catalogue and tasks


def test_own_sets_in_the_catalogue(birds, tmp_path):
    rows = {row["name"]: row for row in list_sets(birds)}
    assert rows[NAME]["state"] == "by hand" and not rows[NAME]["automatic"] and not rows["imagenet"]["automatic"]
    (row,) = check_sets(birds)
    assert row["ok"] and "train 40, test 6" in row["line"]
    made = prepare("folder/mine", tmp_path / "b", source=birds / NAME, echo=lambda text: None)
    assert {p.name for p in made.iterdir()} == {"train", "test", "card.json", "checksums.json"}
    assert {p.name for p in (tmp_path / "b").iterdir()} == {"folder"} and {p.name for p in made.parent.iterdir()} == {"mine"}
    assert load("folder/mine", "test", size=8, root=tmp_path / "b").checksum == load(NAME, "test", size=8, root=birds).checksum
    assert check_set("folder/mine", tmp_path / "b")["ok"]
    refused("put the pictures into FOLDER/train/CLASS", lambda: prepare("folder/new", birds, echo=lambda text: None))


def test_tasks_of_own_sets(birds):
    task = task_of(NAME, root=birds)
    assert task.classes == ("crow", "robin") and task.targets() == () and task.source() == NAME
    assert task_of("cifar100") is data.TASKS["cifar100"]
    refused("did you mean `folder/birds`?", lambda: task_of("folder/brids", root=birds))
    refused("did you mean `imagenet`?", lambda: task_of("imagnet", root=birds))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_mapping_takes_no_memory(tmp_path):
    with open(tmp_path / "large.npy", "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (1_000_000, 3, 224, 224)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 1_000_000 * 3 * 224 * 224)  # sparse: 140 GB that take no room
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = folders.as_tensor(folders.map_array(tmp_path / "large.npy"))
    assert images.shape == (1_000_000, 3, 224, 224) and images[torch.tensor([5, 999_999])].sum() == 0
