"""Data sets: what is refused, what is promised.

Stand-ins are written in the official layouts; the real sets need SADALIB_DATA.
"""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sadalib.data as data
from sadalib.data import TASKS, ImageSet, available, load
from sadalib.data.digits import EMBEDDED, SPLITS, embedded, outline, photographs, source_digits, target_rows
from sadalib.runs import SadalibError

MNIST_TEST = data.ARRAY_SETS["mnist"].histograms["test"]


def refused(match, *args, **kwargs):
    "`load` refuses with one sentence that holds `match`"
    with pytest.raises(SadalibError) as error:
        load(*args, **kwargs)
    text = str(error.value)
    assert match in text, text
    assert "\n" not in text
    return text


def write_npz(folder, split, images, labels):
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / f"{split}.npz", images=images, labels=labels)
    return folder / f"{split}.npz"


@pytest.fixture
def mnist(tmp_path):
    "A stand-in for MNIST's test file: its layout, count and label histogram, other pixels"
    pixels = np.random.RandomState(0).randint(0, 256, (10000, 28, 28)).astype(np.uint8)
    write_npz(tmp_path / "mnist", "test", pixels, np.repeat(np.arange(10), MNIST_TEST))
    return tmp_path


@pytest.fixture
def pacs(tmp_path):
    "A stand-in for PACS: two domains, seven classes, four pictures a class, JPEG and PNG, split.csv"
    noise, rows = np.random.RandomState(1), ["path,domain,class,label,split"]
    for domain in ("photo", "sketch"):
        for label, name in enumerate(data.PACS_CLASSES):
            (tmp_path / "pacs" / domain / name).mkdir(parents=True)
            for i in range(4):
                path = f"{domain}/{name}/{i}.{'jpg' if i % 2 else 'png'}"
                pixels = noise.randint(0, 256, (20, 20) if domain == "sketch" else (20, 20, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pacs" / path)
                rows.append(f"{path},{domain},{name},{label},{'train' if i else 'val'}")
    (tmp_path / "pacs" / "split.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


@pytest.fixture
def cifar10_c(tmp_path):
    "A stand-in for CIFAR-10-C: sparse files in the official shape, severity in the first pixel"
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    images = np.lib.format.open_memmap(folder / "fog.npy", "w+", np.uint8, (50000, 32, 32, 3))
    images[np.arange(5) * 10000, 0, 0, 0] = np.arange(1, 6)
    images.flush()
    np.save(folder / "labels.npy", np.tile(np.arange(10000) % 10, 5).astype(np.uint8))
    return tmp_path


# ---- sets


def make(images=None, labels=None, classes=("a", "b")):
    images = torch.zeros(3, 1, 4, 4, dtype=torch.uint8) if images is None else images
    return ImageSet("toy", "train", images, torch.tensor([0, 1, 1]) if labels is None else labels, classes)


@pytest.mark.parametrize(
    "images, labels, words",
    [
        (torch.zeros(3, 1, 4, 4), None, "float32"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), None, "expected uint8 (N, C, H, W)"),
        (None, torch.tensor([0.0, 1, 1]), "expected int64"),
        (None, torch.tensor([[0, 1, 1]]), "expected int64 (N,)"),
        (None, torch.tensor([0, 1]), "3 images but 2 labels"),
        (None, torch.tensor([0, 1, 2]), "labels run from 0 to 2, expected 0 to 1"),
        (None, torch.tensor([-1, 1, 1]), "labels run from -1 to 1"),
        (torch.zeros(0, 1, 4, 4, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), "no images"),
    ],
)
def test_a_set_is_checked_when_made(images, labels, words):
    with pytest.raises(SadalibError, match="toy") as error:
        make(images, labels)
    assert words in str(error.value)


def test_checksum_depends_on_everything():
    toy = make()
    one = toy.images.clone()
    one[2, 0, 3, 3] = 1
    others = [make(one), make(labels=torch.tensor([0, 1, 0])), make(toy.images.reshape(3, 1, 2, 8)), toy.take(2)]
    assert len({toy.checksum, *(s.checksum for s in others)}) == 5
    assert toy.checksum == make().checksum == make(toy.images.expand(3, 1, 4, 4)).checksum
    assert len(toy.checksum) == 64


def test_take_floats_and_words():
    toy = load("digits", "test")
    assert toy.take(10).labels.tolist() == toy.take(torch.arange(10)).labels.tolist() == toy.labels[:10].tolist()
    assert len(toy.take(10**6)) == len(toy) == 450
    assert toy.take(toy.labels == 3).labels.unique().tolist() == [3]
    batch = toy.floats(torch.tensor([4, 4]))
    assert batch.dtype == torch.float32 and batch.shape == (2, 3, 32, 32) and 0 <= batch.min() < batch.max() <= 1
    assert torch.equal((batch * 255).round().to(torch.uint8)[0], toy.images[4])
    assert "450 images" in repr(toy) and toy.checksum[:12] in toy._repr_markdown_()
    assert toy.to("cpu").checksum == toy.checksum
    assert len(toy.show(5).axes) == 5


# ---- the embedded default


def test_digits_splits_are_disjoint_and_complete():
    indices = [set(range(*span)) for span in SPLITS.values()]
    assert [len(i) for i in indices] == [1200, 147, 450] and len(set.union(*indices)) == 1797
    parts = [load("digits", split, channels=1) for split in SPLITS]
    assert torch.equal(torch.cat([p.images for p in parts]), load("digits", "all", channels=1).images)
    seen = [{image.numpy().tobytes() for image in part.images} for part in parts]
    assert not seen[0] & seen[2] and not seen[0] & seen[1] and not seen[1] & seen[2]


def test_targets_use_test_digits_only_and_are_balanced():
    rows = target_rows(source_digits()[1])
    assert rows.min() >= SPLITS["test"][0] and len(rows) >= 900
    for name in list(EMBEDDED)[1:]:
        target = load(name, "test")
        assert target.labels.bincount(minlength=10).tolist() == [100] * 10
        assert target.checksum == load(name, "all").checksum
        assert len({image.numpy().tobytes() for image in target.images}) == 1000
        refused("no split `train`", name, "train")


def test_embedded_sets_are_the_same_every_time_and_leave_global_state_alone():
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = {name: hashlib.sha256(embedded(name)[0].tobytes()).hexdigest() for name in EMBEDDED}
    for function in EMBEDDED.values():
        function.cache_clear()
    outline.cache_clear()
    assert first == {name: hashlib.sha256(embedded(name)[0].tobytes()).hexdigest() for name in EMBEDDED}
    assert torch.equal(states[0], torch.random.get_rng_state()) and states[2] == random.getstate()
    assert np.array_equal(states[1], np.random.get_state()[1])


def test_the_source_is_the_same_bit_for_bit_on_every_machine():
    "Whole numbers only; the targets pass through a JPEG decoder and a font reader, so their means are pinned"
    digest = hashlib.sha256(source_digits()[0].tobytes()).hexdigest()
    assert digest.startswith("33515ab302f9")
    means = {"digits_photo": 101.94, "digits_fonts": 25.66, "digits_hand": 78.50}
    assert {name: embedded(name)[0].mean() for name in means} == pytest.approx(means, abs=0.2)
    spreads = {"digits_photo": 81.04, "digits_fonts": 61.86, "digits_hand": 95.79}
    assert {name: embedded(name)[0].std() for name in spreads} == pytest.approx(spreads, abs=0.3)


def test_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = source_digits()
    digits = datasets.load_digits()
    assert np.array_equal(labels, digits.target)
    middle = images[:, 5:29:3, 5:29:3].astype(float)  # the middle pixel of each 3x3 block is the original one
    assert np.abs(middle - digits.images * 255 / 16).max() <= 0.5
    assert np.array_equal(photographs()[0], datasets.load_sample_image("china.jpg"))


def test_embedded_arrays_cannot_be_changed_through_a_set():
    before = load("digits", "test", channels=1).checksum
    load("digits", "test", channels=1).images.zero_()
    load("digits_photo", "test").images.zero_()
    assert load("digits", "test", channels=1).checksum == before
    assert load("digits_photo", "test").images.any()
    with pytest.raises(ValueError, match="read-only"):
        embedded("digits")[0][0] = 0


# ---- requests


@pytest.mark.parametrize(
    "name, words",
    [
        ("mnsit", "unknown data set `mnsit`: did you mean `mnist`?"),
        ("pacs/foto", "did you mean `pacs/photo`?"),
        ("pacs", "name a domain as well, as in `pacs/photo`"),
        ("cifar10_c/fog", "severity, 1 to 5"),
        ("cifar10_c/fog/0", "severity, 1 to 5"),
        ("cifar10_c/fog/12", "severity, 1 to 5"),
        ("cifar10_c/fog/", "severity, 1 to 5"),
        ("cifar10_c/foog/3", "did you mean `cifar10_c/fog/3`?"),
        ("../mnist", "unknown data set"),
        ("mnist/train", "unknown data set"),
        ("", "unknown data set"),
    ],
)
def test_unknown_names(name, words):
    refused(words, name)


def test_bad_requests_are_refused_before_any_file_is_touched(tmp_path):
    refused("unknown split `tset`: did you mean `test`?", "mnist", "tset", root=tmp_path)
    refused("`size` is 0", "mnist", size=0, root=tmp_path)
    refused("`size` is '32'", "mnist", size="32", root=tmp_path)
    refused("`limit` is -1", "mnist", limit=-1, root=tmp_path)
    refused("`limit` is True", "mnist", limit=True, root=tmp_path)
    refused("`channels` is 4", "mnist", channels=4, root=tmp_path)
    refused("only corrupted test images", "cifar10_c/fog/1", "train", root=tmp_path)


@pytest.mark.parametrize("name", ["mnist", "usps", "mnist_m", "svhn", "syn", "cifar10", "fashion_mnist", "pacs/photo",
                                  "cifar10_c/fog/1"])
def test_missing_data_says_where_it_was_looked_for_and_how_to_get_it(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SADALIB_DATA", str(tmp_path))
    text = refused(f"sadalib data prepare {name.split('/')[0]}`", name, "test")
    assert str(tmp_path) in text and "SADALIB_DATA" in text
    assert available([name]) == ()


# ---- array sets


def test_array_set_loads_resized_and_repeated(mnist):
    full = load("mnist", "test", root=mnist)
    assert full.images.shape == (10000, 3, 28, 28) and full.labels.bincount().tolist() == list(MNIST_TEST)
    small = load("mnist", "test", size=32, channels=1, limit=7, root=mnist)
    assert small.images.shape == (7, 1, 32, 32) and small.labels.tolist() == [0] * 7
    assert torch.equal(load("mnist", "test", size=32, limit=7, root=mnist).images[:, 2], small.images[:, 0])
    assert available(["mnist", "usps"], root=mnist) == ("mnist",)
    refused("train.npz is missing", "mnist", "all", root=mnist)


def test_resize_agrees_with_pillow():
    photo = Image.fromarray(embedded("digits_photo")[0][0])
    for size in (16, 32, 57):
        ours = data.resize(torch.tensor(np.asarray(photo)).permute(2, 0, 1)[None], size)[0].permute(1, 2, 0)
        theirs = np.asarray(photo.resize((size, size), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(ours.numpy() - theirs).max() <= 1


def test_valid_is_the_end_of_train(tmp_path):
    labels = np.arange(7291) % 10
    images = np.random.RandomState(0).randint(0, 256, (7291, 16, 16)).astype(np.uint8)
    write_npz(tmp_path / "usps", "train", images, labels)
    valid, train = load("usps", "valid", root=tmp_path), load("usps", "train", limit=6291, root=tmp_path)
    assert len(valid) == 1000 and valid.note == "last 1,000 of train"
    assert torch.equal(torch.cat([train.images, valid.images]), load("usps", "train", root=tmp_path).images)
    write_npz(tmp_path / "usps", "valid", images[:9], labels[:9])
    assert len(load("usps", "valid", root=tmp_path)) == 9


def test_part_of_cifar10_says_so(tmp_path):
    write_npz(tmp_path / "cifar10", "train", np.zeros((6000, 32, 32, 3), np.uint8), np.arange(6000) % 10)
    assert load("cifar10", "train", limit=5, root=tmp_path).note == "6,000 of 50,000"
    write_npz(tmp_path / "cifar10", "train", np.zeros((50001, 32, 32, 3), np.uint8), np.arange(50001) % 10)
    refused("50,001 images, expected 50,000 or fewer", "cifar10", "train", root=tmp_path)
    write_npz(tmp_path / "cifar10", "train", np.zeros((5000, 32, 32, 3), np.uint8), np.arange(5000) % 10)
    refused("too few to hold 5,000 out", "cifar10", "valid", root=tmp_path)


@pytest.mark.parametrize(
    "images, labels, words",
    [
        (np.zeros((2007, 16, 16), np.uint8), np.zeros(2007, int), "holds 16x16 images, as in usps, expected 28x28"),
        (np.zeros((60, 28, 28), np.uint8), np.zeros(60, int), "holds 60 images, expected 10,000"),
        (np.zeros((10000, 28, 28), np.uint8), np.arange(10000) % 10, "not its labels, so it is another set"),
        (np.zeros((10000, 28, 28), np.uint8), np.repeat(np.arange(1, 11), MNIST_TEST), "not its labels"),
        (np.zeros((10000, 28, 28), np.float32), np.zeros(10000, int), "expected uint8 images"),
        (np.zeros((10000, 28, 28), np.uint8), np.zeros(9999, int), "expected uint8 images and as many labels"),
        (np.zeros((10000, 28, 28), np.uint8), np.zeros((10000, 10)), "expected uint8 images and as many labels"),
        (np.uint8(3), np.zeros(3, int), "expected uint8 images and as many labels"),
        (np.array([{}]), np.zeros(1, int), "truncated or no array file"),
    ],
)
def test_swapped_and_malformed_files(images, labels, words, tmp_path):
    write_npz(tmp_path / "mnist", "test", images, labels)
    refused(words, "mnist", "test", root=tmp_path)


def test_truncated_and_foreign_files(mnist):
    file = mnist / "mnist" / "test.npz"
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:100], b"", b"<!DOCTYPE html><html>", b"\x80\x04pickle"):
        file.write_bytes(content)
        refused("truncated or no array file", "mnist", "test", root=mnist)
    np.savez(file, pictures=np.zeros(3))
    refused("truncated or no array file", "mnist", "test", root=mnist)
    file.write_bytes(whole[:5_000_000] + b"\xff" * 1000 + whole[5_001_000:])
    refused("truncated or no array file", "mnist", "test", root=mnist)


def test_a_malicious_pickle_does_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    write_npz(tmp_path / "usps", "test", np.array([Bomb()], dtype=object), np.zeros(1, int))
    refused("truncated or no array file", "usps", "test", root=tmp_path)
    (tmp_path / "cifar10_c").mkdir()
    np.save(tmp_path / "cifar10_c" / "fog.npy", np.array([Bomb()], dtype=object))
    np.save(tmp_path / "cifar10_c" / "labels.npy", np.zeros(50000, np.uint8))
    refused("truncated or no array file", "cifar10_c/fog/1", "test", root=tmp_path)
    assert not (tmp_path / "ran").exists()


def test_recorded_checksums_are_enforced(mnist):
    file, record = mnist / "mnist" / "test.npz", mnist / "mnist" / "checksums.json"
    record.write_text(json.dumps({"test.npz": hashlib.sha256(file.read_bytes()).hexdigest(), "other": "0"}))
    assert len(load("mnist", "test", root=mnist)) == 10000
    with np.load(file) as arrays:
        images, labels = arrays["images"].copy(), arrays["labels"]
    images[0, 0, 0] ^= 1
    write_npz(mnist / "mnist", "test", images, labels)
    refused("another sha256 than checksums.json records", "mnist", "test", root=mnist)
    record.write_text("{broken")
    refused("checksums.json cannot be read", "mnist", "test", root=mnist)


def test_labels_out_of_range(tmp_path):
    write_npz(tmp_path / "svhn", "test", np.zeros((20, 32, 32, 3), np.uint8), np.arange(20) % 10 + 1)
    refused("svhn (test): labels run from 1 to 10, expected 0 to 9", "svhn", "test", root=tmp_path)
    write_npz(tmp_path / "svhn", "test", np.zeros((20, 32, 32, 3), np.uint8), np.arange(20) - 1)
    refused("labels run from -1", "svhn", "test", root=tmp_path)


def test_colour_becomes_grey_by_luma(tmp_path):
    images = np.zeros((4, 32, 32, 3), np.uint8)
    images[[0, 1, 2], ..., [0, 1, 2]] = 255
    images[3] = 255
    write_npz(tmp_path / "syn", "test", images, np.arange(4))
    grey = load("syn", "test", channels=1, root=tmp_path).images
    assert grey.shape == (4, 1, 32, 32) and grey[:, 0, 0, 0].tolist() == [76, 150, 29, 255]


# ---- PACS


def test_pacs_lists_and_whole_domain(pacs):
    train, valid, whole = (load("pacs/photo", split, size=16, root=pacs) for split in ("train", "valid", "test"))
    assert (len(train), len(valid), len(whole)) == (21, 7, 28)
    assert whole.labels.unique().tolist() == list(range(7)) and whole.classes == data.PACS_CLASSES
    pictures = [{image.numpy().tobytes() for image in part.images} for part in (train, valid, whole)]
    assert not pictures[0] & pictures[1] and pictures[0] | pictures[1] == pictures[2]
    assert "28 instead of 1,670" in whole.note
    assert load("pacs/sketch", "all", root=pacs).images.shape == (28, 3, 20, 20)
    assert load("pacs/photo", "test", size=16, root=pacs).checksum == whole.checksum
    assert available(TASKS["pacs"].domains, root=pacs) == ("pacs/photo", "pacs/sketch")


def test_pacs_first_images_are_a_mixed_sample(pacs):
    assert len(load("pacs/photo", "train", size=16, limit=10, root=pacs).labels.unique()) > 3


def test_pacs_cache_notices_changed_files(pacs):
    before = load("pacs/photo", "test", size=16, root=pacs)
    cache = next((pacs / "pacs" / ".cache").glob("photo_16.npz"))
    Image.new("RGB", (20, 20), "red").save(pacs / "pacs/photo/dog/0.png")
    after = load("pacs/photo", "test", size=16, root=pacs)
    red = [image.float().mean((1, 2)).tolist() == [255, 0, 0] for image in after.images]
    assert sum(red) == 1 and before.checksum != after.checksum
    cache.write_bytes(cache.read_bytes()[:500])
    assert load("pacs/photo", "test", size=16, root=pacs).checksum == after.checksum
    assert not list((pacs / "pacs" / ".cache").glob("*.part"))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"<html>", lambda b: b""])
@pytest.mark.parametrize("path", ["photo/guitar/1.jpg", "photo/guitar/2.png"])
def test_a_corrupt_picture_is_named(pacs, path, damage):
    file = pacs / "pacs" / path
    file.write_bytes(damage(file.read_bytes()))
    text = refused(f"pacs/photo: {path} cannot be decoded", "pacs/photo", size=16, root=pacs)
    assert "sadalib data prepare pacs" in text and "remove it from split.csv" in text
    assert not (pacs / "pacs" / ".cache").exists()
    assert len(load("pacs/sketch", "test", size=16, root=pacs)) == 28


def test_a_missing_picture_is_named(pacs):
    load("pacs/photo", size=16, root=pacs)
    (pacs / "pacs/photo/dog/1.jpg").unlink()
    refused("pacs/photo: photo/dog/1.jpg is listed in split.csv but cannot be found", "pacs/photo", size=16, root=pacs)


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("photo,dog,0,val", "photo,dog,1,val", "class dog has label 1, expected 0 to 6"),
        ("photo,person,6,val", "photo,person,7,val", "class person has label 7"),
        ("photo,dog,0,val", "photo,cat,0,val", "class cat has label 0"),
        ("photo,dog,0,val", "photo,dog,0,test", "split test is neither train nor val"),
        ("photo/dog/0.png", "../../secret.png", "a path outside the data set is given"),
        ("photo/dog/0.png", "/etc/secret.png", "a path outside the data set is given"),
        ("path,domain", "file,domain", "expected the columns path, domain, class, label, split"),
        (",photo,", ",foto,", "no images are listed"),
    ],
)
def test_wrong_lists(pacs, old, new, words):
    file = pacs / "pacs" / "split.csv"
    file.write_text(file.read_text().replace(old, new))
    refused(words, "pacs/photo", size=16, root=pacs)


def test_pictures_of_several_sizes_need_a_size(pacs):
    Image.new("RGB", (30, 20)).save(pacs / "pacs/photo/dog/2.png")
    refused("has another size than", "pacs/photo", root=pacs)
    assert load("pacs/photo", size=12, root=pacs).images.shape == (21, 3, 12, 12)


def test_read_only_root_caches_elsewhere_or_nowhere(pacs, tmp_path, monkeypatch):
    "A folder that cannot be made stands for the read-only root, so that the test also holds for the superuser"
    (pacs / "pacs" / ".cache").write_text("a file where the folder should be")
    home = tmp_path / "home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    first = load("pacs/photo", "test", size=16, root=pacs)
    kept = list(home.rglob("photo_16.npz"))
    assert len(kept) == 1
    assert load("pacs/photo", "test", size=16, root=pacs).checksum == first.checksum
    shutil.rmtree(home)
    home.write_text("not a folder either")
    assert load("pacs/photo", "test", size=16, root=pacs).checksum == first.checksum


def test_really_read_only_root(pacs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    folder = pacs / "pacs"
    folder.chmod(0o555)
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("this user may write everywhere; the test above covers the same")
        assert len(load("pacs/photo", "test", size=16, root=pacs)) == 28
        assert list((tmp_path / "home").rglob("photo_16.npz"))
    finally:
        folder.chmod(0o755)


def test_a_full_disk_costs_the_cache_only(pacs, tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(np, "savez", full)
    assert len(load("pacs/photo", "test", size=16, root=pacs)) == 28
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".part", ".npz")]


# ---- CIFAR-10-C


def test_severities_are_rows(cifar10_c):
    for severity in (1, 3, 5):
        part = load(f"cifar10_c/fog/{severity}", "test", root=cifar10_c)
        assert part.images.shape == (10000, 3, 32, 32) and part.images[0, 0, 0, 0] == severity
        assert part.labels.bincount().tolist() == [1000] * 10
    assert available(TASKS["cifar10"].domains, root=cifar10_c) == ("cifar10_c/fog/5",)
    (cifar10_c / "CIFAR-10-C").rename(cifar10_c / "cifar10_c")
    assert len(load("cifar10_c/fog/2", "all", limit=3, root=cifar10_c)) == 3
    refused("snow.npy is missing", "cifar10_c/snow/2", "test", root=cifar10_c)


def test_wrong_corruption_files(cifar10_c):
    folder = cifar10_c / "CIFAR-10-C"
    np.save(folder / "fog.npy", np.zeros((10000, 32, 32, 3), np.uint8))
    refused("expected uint8 (50000, 32, 32, 3)", "cifar10_c/fog/1", "test", root=cifar10_c)
    (folder / "fog.npy").write_bytes((folder / "fog.npy").read_bytes()[:5000])
    refused("truncated or no array file", "cifar10_c/fog/1", "test", root=cifar10_c)
    (folder / "fog.npy").write_bytes(b"<html>")
    refused("truncated or no array file", "cifar10_c/fog/1", "test", root=cifar10_c)


def test_labels_of_the_other_cifar(cifar10_c):
    (cifar10_c / "CIFAR-100-C").symlink_to(cifar10_c / "CIFAR-10-C")
    refused("does not hold the labels of 100 classes, 100 of each", "cifar100_c/fog/1", "test", root=cifar10_c)
    np.save(cifar10_c / "CIFAR-10-C" / "labels.npy", np.tile(np.arange(10000) % 100, 5).astype(np.uint8))
    refused("does not hold the labels of 10 classes, 1,000 of each", "cifar10_c/fog/1", "test", root=cifar10_c)
    part = load("cifar100_c/fog/5", "test", root=cifar10_c)
    assert part.images[0, 0, 0, 0] == 5 and part.labels.bincount().tolist() == [100] * 100
    assert part.classes[0] == "apple" and available(TASKS["cifar100"].domains, root=cifar10_c) == ("cifar100_c/fog/5",)
    refused("train on `cifar100`", "cifar100_c/fog/5", "train", root=cifar10_c)
    refused("severity, 1 to 5, as in `cifar100_c/fog/3`", "cifar100_c/fog/6", "test", root=cifar10_c)
    refused("did you mean `cifar100_c/snow/1`?", "cifar100_c/snw/1", "test", root=cifar10_c)


# ---- CIFAR-100


def test_cifar100_is_told_from_cifar10(tmp_path):
    zeros = np.zeros((50000, 32, 32, 3), np.uint8)
    write_npz(tmp_path / "cifar100", "test", zeros[:10000], np.arange(10000) % 10)
    refused("not its labels, so it is another set", "cifar100", "test", root=tmp_path)
    write_npz(tmp_path / "cifar100", "train", zeros, np.arange(50000) % 10)
    refused("not its labels, so it is another set", "cifar100", "train", root=tmp_path)
    (tmp_path / "cifar100").rename(tmp_path / "cifar10")
    write_npz(tmp_path / "cifar10", "test", zeros[:10000], np.arange(10000) % 100)
    refused("labels run from 0 to 99", "cifar10", "test", root=tmp_path)


def test_cifar100_splits(tmp_path):
    images = np.zeros((50000, 32, 32, 3), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(50000) % 256, np.arange(50000) // 256
    write_npz(tmp_path / "cifar100", "train", images, np.arange(50000) % 100)
    write_npz(tmp_path / "cifar100", "test", images[:10000], np.arange(10000) % 100)
    train, valid = load("cifar100", "train", limit=45000, root=tmp_path), load("cifar100", "valid", root=tmp_path)
    assert len(valid) == 5000 and valid.note == "last 5,000 of train" and train.classes[99] == "worm"
    assert torch.equal(torch.cat([train.labels, valid.labels]), torch.arange(50000) % 100)
    assert torch.equal(valid.images[0, :, 0, 0], torch.tensor([45000 % 256, 45000 // 256, 0], dtype=torch.uint8))
    assert len(load("cifar100", "test", root=tmp_path)) == 10000
    assert len(set(data.FINE_OBJECTS)) == 100 and list(data.FINE_OBJECTS) == sorted(data.FINE_OBJECTS)


# ---- CIFAR-10-P


@pytest.fixture
def cifar10_p(tmp_path):
    "A stand-in for CIFAR-10-P: a sparse file of three frames, row and frame in the first pixel"
    (tmp_path / "CIFAR-10-P").mkdir()
    frames = np.lib.format.open_memmap(tmp_path / "CIFAR-10-P" / "tilt.npy", "w+", np.uint8, (10000, 3, 32, 32, 3))
    frames[:9, :, 0, 0, 0], frames[:9, :, 0, 0, 2] = np.arange(9)[:, None], np.arange(3)
    frames.flush()
    write_npz(tmp_path / "cifar10", "test", np.zeros((10000, 32, 32, 3), np.uint8), (np.arange(10000) + 3) % 10)
    return tmp_path


def test_sequences_are_mapped_with_the_test_labels(cifar10_p):
    images, labels = data.load_sequences("cifar10_p/tilt", root=cifar10_p)
    assert images.shape == (10000, 3, 3, 32, 32) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert torch.equal(labels, (torch.arange(10000) + 3) % 10)
    assert images[7, 2, :, 0, 0].tolist() == [7, 0, 2]
    few, some = data.load_sequences("cifar10_p/tilt", limit=4, root=cifar10_p)
    assert few.shape == (4, 3, 3, 32, 32) and some.tolist() == [3, 4, 5, 6]
    few[0] = 9
    assert data.load_sequences("cifar10_p/tilt", limit=4, root=cifar10_p)[0][0, 0, 0, 0, 0] == 0
    assert available(["cifar10_p/tilt", "cifar10_p/snow"], root=cifar10_p) == ("cifar10_p/tilt",)
    (cifar10_p / "CIFAR-10-P").rename(cifar10_p / "cifar10_p")
    assert len(data.load_sequences("cifar10_p/tilt", limit=2, root=cifar10_p)[1]) == 2


def test_wrong_sequences(cifar10_p, tmp_path):
    def says(match, name, **kwargs):
        with pytest.raises(SadalibError, match=match) as error:
            data.load_sequences(name, root=cifar10_p, **kwargs)
        assert "\n" not in str(error.value)

    says("single images: use `load`", "cifar10")
    says("did you mean `cifar10_p/tilt`", "cifar10_p/tild")
    says("name a perturbation", "cifar10_p")
    says("`limit` is 0", "cifar10_p/tilt", limit=0)
    says("snow.npy is missing: run `sadalib data prepare cifar10_p`", "cifar10_p/snow")
    refused("use `load_sequences`", "cifar10_p/tilt", "test", root=cifar10_p)
    file = cifar10_p / "CIFAR-10-P" / "tilt.npy"
    shapes = [(50000, 32, 32, 3), (9999, 3, 32, 32, 3), (10000, 3, 3, 32, 32)]
    for shape in shapes:
        np.lib.format.open_memmap(file, "w+", np.uint8, shape).flush()
        says("expected uint8 \\(10000, any, 32, 32, 3\\)", "cifar10_p/tilt")
    np.lib.format.open_memmap(file, "w+", np.int8, (10000, 3, 32, 32, 3)).flush()
    says("holds int8", "cifar10_p/tilt")
    np.lib.format.open_memmap(file, "w+", np.uint8, (10000, 1, 32, 32, 3)).flush()
    says("expected 2 frames or more", "cifar10_p/tilt")
    for content in (b"<html>", b"", file.read_bytes()[:200]):
        file.unlink()
        file.write_bytes(content)
        says("truncated or no array file", "cifar10_p/tilt")
    np.lib.format.open_memmap(file, "w+", np.uint8, (10000, 2, 32, 32, 3)).flush()
    (cifar10_p / "cifar10" / "test.npz").unlink()
    says("run `sadalib data prepare cifar10`,", "cifar10_p/tilt")


# ---- tasks


def test_tasks_name_loadable_domains_and_never_test_on_the_source():
    assert set(TASKS) == {"digits", "mnist", "pacs", "cifar10", "cifar100", "svhn"}
    for task in TASKS.values():
        for domain in task.domains:
            data.parse_name(domain)
        for source in task.sources:
            assert source not in task.targets(source)
            assert set(task.targets(source)) | {source} == set(task.domains)
    assert TASKS["pacs"].targets("photo") == TASKS["pacs"].targets("pacs/photo")
    assert len(TASKS["pacs"].targets("sketch")) == 3 and (TASKS["pacs"].size, TASKS["pacs"].paper_size) == (64, 224)
    assert len(TASKS["cifar100"].targets()) == 15 and len(TASKS["cifar100"].classes) == 100
    assert TASKS["svhn"].targets() == ()
    with pytest.raises(SadalibError, match="did you mean `photo`"):
        TASKS["pacs"].source("foto")
    with pytest.raises(SadalibError, match="unknown source `usps`"):
        TASKS["mnist"].targets("usps")


def test_corruptions_are_the_usual_fifteen_and_four():
    assert len(data.CORRUPTIONS) == len(set(data.CORRUPTIONS)) == 15 and len(data.EXTRA_CORRUPTIONS) == 4
    assert [len(group) for group in data.CORRUPTION_GROUPS.values()] == [3, 4, 4, 4]
    assert len(set(data.PERTURBATIONS)) == 20
    assert len(data.PAPER_PERTURBATIONS) == len(data.SCRIPT_PERTURBATIONS) == 10
    assert available(["cifar10_c/fog/5", "no such set", "digits"], root="/nowhere") == ("digits",)


# ---- the real sets

REAL = [
    ("mnist", "train", 60000), ("mnist", "test", 10000), ("usps", "train", 7291), ("usps", "test", 2007),
    ("mnist_m", "test", 9001), ("cifar10", "test", 10000), ("fashion_mnist", "test", 10000),
    ("pacs/photo", "train", 1499), ("pacs/photo", "valid", 171), ("pacs/photo", "test", 1670),
    ("pacs/art_painting", "all", 2048), ("pacs/cartoon", "all", 2344), ("pacs/sketch", "train", 3531),
    ("pacs/sketch", "all", 3929),
]  # fmt: skip


@pytest.mark.parametrize("name, split, count", REAL)
def test_real_sets(name, split, count):
    if not os.environ.get("SADALIB_DATA"):
        pytest.skip("set SADALIB_DATA to a folder with the real data sets")
    if not available([name], split):
        pytest.skip(f"{name} ({split}) does not lie in SADALIB_DATA: `sadalib data prepare {name.split('/')[0]}`")
    real = load(name, split, size=32, channels=1)
    assert len(real) == count and real.images.shape == (count, 1, 32, 32)
    assert real.labels.unique().tolist() == list(range(len(real.classes)))
    assert real.images.float().std() > 10
