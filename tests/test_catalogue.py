"""Each public set through the whole of `prepare`, on small archives written here in the original formats"""
import bz2
import csv
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_download import PAGE, Site, refused

from sadalib.data import catalogue
from sadalib.data.catalogue import CATALOGUE, check_set, check_sets, list_sets, pacs_crossval, prepare
from sadalib.runs import SadalibError

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def direct(monkeypatch): monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="module")
def site():
    site = Site()
    yield site
    site.close()


def pixels(*shape): return RNG.integers(0, 256, shape, dtype=np.uint8)


def served(site, name, bodies, splits=None, **changes):
    "The card of `name` with its files replaced by `bodies`, which `site` serves"
    site.routes = {f"/{file.name}": {"body": body} for file, body in zip(CATALOGUE[name].files, bodies, strict=True)}
    files = tuple(replace(file, url=f"{site.url}/{file.name}", mirrors=(), size=len(body), rate=2e6,
                          sha256=hashlib.sha256(body).hexdigest(), md5=None, sha1=None)
                  for file, body in zip(CATALOGUE[name].files, bodies, strict=True))
    return replace(CATALOGUE[name], files=files, splits=splits or CATALOGUE[name].splits, needs=0, **changes)


def tarred(files, mode="w:gz"):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def png(image):
    out = io.BytesIO()
    Image.fromarray(image).save(out, "png")
    return out.getvalue()


def idx(array):
    return b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def saved(value):
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def made(site, root, card):
    "Prepare `card` and verify what every prepared set has in common"
    said = []
    folder = prepare(card.name, root, card=card, echo=said.append)
    assert card.licence in said[0] and "MB" in said[0] and "prepared" in said[-1]
    assert {p.name for p in root.iterdir()} == {"digests", card.name}
    verdict = check_set(card.name, root, card=card)
    assert verdict["ok"], verdict
    digests = json.loads((folder / "checksums.json").read_text())
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha for name, sha in digests.items())
    seen = json.loads((root / "digests" / f"{card.name}.json").read_text())
    assert seen == {file.name: file.sha256 for file in card.files}
    assert json.loads((folder / "card.json").read_text())["licence"] == card.licence
    return folder


def arrays(folder, split):
    with np.load(folder / f"{split}.npz") as z: images, labels = z["images"], z["labels"]
    assert images.dtype == np.uint8 and labels.dtype == np.int64
    return images, labels


# --- every converter --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx(site, tmp_path, name):
    images = {"train": pixels(5, 28, 28), "test": pixels(3, 28, 28)}
    labels = {"train": pixels(5) % 10, "test": pixels(3) % 10}
    bodies = [gzip.compress(idx(part[split])) for split in ("train", "test") for part in (images, labels)]
    folder = made(site, tmp_path, served(site, name, bodies, {"train": 5, "test": 3}))
    for split in images:
        got = arrays(folder, split)
        assert (got[0] == images[split]).all() and (got[1] == labels[split]).all()


def test_usps_text(site, tmp_path):
    values, labels = RNG.uniform(-1, 1, (4, 256)).round(4).astype(np.float32), [1, 10, 5, 2]
    pairs = [" ".join(f"{i + 1}:{v}" for i, v in enumerate(row)) for row in values]
    rows = [f"{label} {row}" for label, row in zip(labels, pairs, strict=True)]
    bodies = [bz2.compress("\n".join(part).encode()) for part in (rows, rows[:1])]
    folder = made(site, tmp_path, served(site, "usps", bodies, {"train": 4, "test": 1}))
    images, digits = arrays(folder, "train")
    assert digits.tolist() == [0, 9, 4, 1]
    assert (images == ((values + 1) / 2 * 255).astype(np.uint8).reshape(-1, 16, 16)).all()


def test_svhn_matlab(site, tmp_path):
    from scipy.io import savemat
    image, bodies = pixels(32, 32, 3, 3), []
    for n in (3, 2):
        savemat(out := io.BytesIO(), {"X": image[..., :n], "y": np.array([[10], [1], [9]], np.uint8)[:n]})
        bodies.append(out.getvalue())
    folder = made(site, tmp_path, served(site, "svhn", bodies, {"train": 3, "test": 2}))
    images, labels = arrays(folder, "train")
    assert labels.tolist() == [0, 1, 9] and (images[1] == image[..., 1]).all()


def test_mnist_m_archive(site, tmp_path):
    images, files = pixels(3, 32, 32, 3), {}
    for split, n in (("train", 3), ("test", 2)):
        lines = [f"{i:08d}.png {i + 5}\n" for i in reversed(range(n))]
        files[f"mnist_m/mnist_m_{split}_labels.txt"] = "".join(lines).encode()
        files |= {f"mnist_m/mnist_m_{split}/{i:08d}.png": png(images[i]) for i in range(n)}
    folder = made(site, tmp_path, served(site, "mnist_m", [tarred(files)], {"train": None, "test": 2}))
    got, labels = arrays(folder, "train")
    assert labels.tolist() == [7, 6, 5] and (got == images[::-1]).all()
    files["mnist_m/mnist_m_test/00000000.png"] = b"\x89PNG torn"
    card = served(site, "mnist_m", [tarred(files)], {"train": None, "test": 2})
    refused(lambda: prepare("mnist_m", tmp_path / "b", card=card), "mnist_m", "00000000.png is damaged",
            folder=tmp_path / "b", left=["mnist_m.json", "mnist_m.tar.gz", "lock"])


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 1, 2)], ids=["channels last", "channels first"])
def test_syn_tensors(site, tmp_path, order):
    images = pixels(4, 32, 32, 3)
    body = gzip.compress(saved((torch.tensor(images.transpose(order)), torch.tensor([3, 1, 4, 1]))))
    got, labels = arrays(made(site, tmp_path, served(site, "syn", [body, body])), "test")
    assert labels.tolist() == [3, 1, 4, 1] and (got == images).all()


class Evil:
    "Writes a file when it is unpickled"
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (self.path, "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("wrap", [lambda evil: (evil, evil), lambda evil: evil], ids=["in a pair", "alone"])
def test_a_malicious_pickle_does_not_run(site, tmp_path, wrap):
    import pickle
    for body in (saved(wrap(Evil(str(tmp_path / "ran")))), pickle.dumps(wrap(Evil(str(tmp_path / "ran"))))):
        card = served(site, "syn", [gzip.compress(body)] * 2)
        shutil.rmtree(tmp_path / "root", ignore_errors=True)
        with pytest.raises(SadalibError, match="something else than a pair of plain tensors"):
            prepare("syn", tmp_path / "root", card=card)
        assert not (tmp_path / "ran").exists() and not (tmp_path / "root" / "syn").exists()


def test_cifar10_binary(site, tmp_path):
    images, files = pixels(6, 32, 32, 3), {}
    for i, name in enumerate([*(f"data_batch_{n}" for n in (1, 2, 3, 4, 5)), "test_batch"]):
        files[f"cifar-10-batches-bin/{name}.bin"] = bytes([9 - i]) + images[i].transpose(2, 0, 1).tobytes()
    shuffled = dict(sorted(files.items(), reverse=True))
    folder = made(site, tmp_path, served(site, "cifar10", [tarred(shuffled)], {"train": 5, "test": 1}))
    got, labels = arrays(folder, "train")
    assert labels.tolist() == [9, 8, 7, 6, 5] and (got == images[:5]).all()
    assert arrays(folder, "test")[1].tolist() == [4]


def test_cifar100_binary(site, tmp_path):
    images = pixels(3, 32, 32, 3)
    rows = [bytes([coarse, fine]) + images[i].transpose(2, 0, 1).tobytes()
            for i, (coarse, fine) in enumerate([(19, 99), (0, 40), (4, 7)])]
    files = {"cifar-100-binary/test.bin": rows[2], "cifar-100-binary/train.bin": rows[0] + rows[1],
             "cifar-100-binary/fine_label_names.txt": b"apple\n"}
    folder = made(site, tmp_path, served(site, "cifar100", [tarred(files)], {"train": 2, "test": 1}))
    got, labels = arrays(folder, "train")
    assert labels.tolist() == [99, 40] and (got == images[:2]).all()
    assert arrays(folder, "test")[1].tolist() == [7]


@pytest.mark.parametrize("body, says", [
    (bytes([20, 3]) + bytes(3072), "coarse labels above 19"), (bytes([3, 100]) + bytes(3072), "labels 100..100"),
    (bytes(3073), "no whole train.bin"), (b"", "no whole train.bin")])
def test_cifar100_that_is_another_file(site, tmp_path, body, says):
    files = {"x/test.bin": bytes(3074), "x/train.bin": body}
    card = served(site, "cifar100", [tarred(files)], {"train": 1, "test": 1})
    with pytest.raises(SadalibError, match=says): prepare("cifar100", tmp_path, card=card, echo=lambda text: None)
    assert not (tmp_path / "cifar100").exists()


def npy(array):
    np.save(out := io.BytesIO(), array)
    return out.getvalue()


def test_cifar10_p_arrays(site, tmp_path):
    files = {name: npy(pixels(6, 2, 32, 32, 3)) for name in CATALOGUE["cifar10_p"].parts}
    body = tarred({f"CIFAR-10-P/{name}.npy": content for name, content in files.items()}, "w")
    folder = made(site, tmp_path, card := served(site, "cifar10_p", [body], {"test": 6}))
    assert (folder / "tilt.npy").read_bytes() == files["tilt"] and len(list(folder.glob("*.npy"))) == 20
    again = prepare("cifar10_p", tmp_path / "b", source=folder, card=card, echo=lambda text: None)
    assert (again / "snow.npy").read_bytes() == files["snow"] and (folder / "snow.npy").is_file()
    for wrong in (pixels(6, 32, 32, 3), pixels(5, 2, 32, 32, 3), pixels(6, 1, 32, 32, 3), np.zeros((6, 2, 32, 32, 3))):
        np.save(folder / "tilt.npy", wrong)
        refused(lambda: prepare("cifar10_p", tmp_path / "c", source=folder, card=card, echo=lambda text: None),
                "tilt.npy is", folder=tmp_path / "c")
    (folder / "checksums.json").unlink()
    assert check_set("cifar10_p", tmp_path, card=card)["status"] == "damaged"
    (folder / "tilt.npy").unlink()
    assert check_set("cifar10_p", tmp_path, card=card)["status"] == "ok"  # a part of the files, by hand


def corruptions(name="cifar10_c"):
    files = {part: npy(pixels(10, 32, 32, 3)) for part in CATALOGUE[name].parts if part != "labels"}
    files["labels"] = npy(np.tile(np.array([3, 8], np.uint8), 5))
    return files, {name: hashlib.md5(body).hexdigest() for name, body in files.items()}


def test_cifar100_c_arrays(site, tmp_path):
    files, parts = corruptions("cifar100_c")
    files["labels"] = npy(np.tile(np.array([3, 98], np.uint8), 5))
    parts["labels"] = hashlib.md5(files["labels"]).hexdigest()
    body = tarred({"CIFAR-100-C/README.txt": b"read me"}
                  | {f"CIFAR-100-C/{name}.npy": content for name, content in files.items()}, "w")
    folder = made(site, tmp_path, served(site, "cifar100_c", [body], {"test": 10}, parts=parts))
    assert len(list(folder.glob("*.npy"))) == 20 and not (folder / "README.txt").exists()


def test_cifar10_c_arrays(site, tmp_path):
    files, parts = corruptions()
    body = tarred({f"CIFAR-10-C/{name}.npy": content for name, content in files.items()}, "w")
    folder = made(site, tmp_path, card := served(site, "cifar10_c", [body], {"test": 10}, parts=parts))
    assert (folder / "fog.npy").read_bytes() == files["fog"] and len(list(folder.glob("*.npy"))) == 20
    again = prepare("cifar10_c", tmp_path / "b", source=folder, card=card)
    assert (again / "snow.npy").read_bytes() == files["snow"] and (folder / "snow.npy").is_file()
    wrong = replace(card, parts=parts | {"fog": "0" * 32})
    refused(lambda: prepare("cifar10_c", tmp_path / "c", source=folder, card=wrong), "fog.npy has md5",
            folder=tmp_path / "c")
    np.save(folder / "fog.npy", np.array([print], dtype=object), allow_pickle=True)
    card = replace(card, parts=dict.fromkeys(parts, ""))
    refused(lambda: prepare("cifar10_c", tmp_path / "c", source=folder, card=card), "fog.npy is no plain numpy array",
            folder=tmp_path / "c")


def pacs_table(rows):
    import pyarrow as pa
    import pyarrow.parquet as pq
    table = pa.table({"image": [{"bytes": body, "path": name} for _, _, name, body in rows],
                      "domain": [row[0] for row in rows], "label": [row[1] for row in rows]})
    pq.write_table(table, out := io.BytesIO())
    return out.getvalue()


PACS = {"photo": 3, "art_painting": 2, "cartoon": 2, "sketch": 2}


def pacs_rows():
    rows = [(domain, i % 7, f"{domain}_{i}.jpg", png(pixels(8, 8, 3))) for domain, n in PACS.items() for i in range(n)]
    return rows, frozenset((row[0], CATALOGUE["pacs"].classes[row[1]], Path(row[2]).stem) for row in rows[::3])


def test_pacs_parquet(site, tmp_path, monkeypatch):
    rows, official = pacs_rows()
    monkeypatch.setattr(catalogue, "pacs_crossval", lambda: official)
    folder = made(site, tmp_path, card := served(site, "pacs", [pacs_table(rows[::-1])], PACS))
    with open(folder / "split.csv") as f: listed = list(csv.DictReader(f))
    assert list(listed[0]) == ["path", "domain", "class", "label", "split"] and len(listed) == 9
    assert {(r["domain"], r["class"], Path(r["path"]).stem) for r in listed if r["split"] == "val"} == official
    assert {r["path"]: (folder / r["path"]).read_bytes() for r in listed} == \
        {f"{d}/{card.classes[k]}/{Path(n).stem}.png": body for d, k, n, body in rows}
    again = prepare("pacs", tmp_path / "b", source=folder, card=card)
    assert (again / "split.csv").read_bytes() == (folder / "split.csv").read_bytes()


@pytest.mark.parametrize("change, says", [
    (lambda rows: rows[1:], "photo has 2 pictures, not 3"),
    (lambda rows: [(d, k, "renamed_" + n, b) for d, k, n, b in rows], "names of the official validation lists"),
    (lambda rows: [(d, k, "", b) for d, k, n, b in rows], "has no file name"),
    (lambda rows: [(d, k + 1, n, b) for d, k, n, b in rows], "names of the official validation lists"),
    (lambda rows: [(d, k - 3, n, b) for d, k, n, b in rows], "label -3"),
    (lambda rows: [("house", *row[1:]) for row in rows], "domain 'house'"),
    (lambda rows: [*rows[:-1], (*rows[-1][:3], b"torn")], "is damaged"),
    (lambda rows: [(d, k, f"../../{n}", b) for d, k, n, b in rows[::-1]], None),
    (lambda rows: [(d, k, f"..\\..\\{n}", b) for d, k, n, b in rows[::-1]], None),
])
def test_a_pacs_table_that_differs_is_refused(site, tmp_path, monkeypatch, change, says):
    rows, official = pacs_rows()
    monkeypatch.setattr(catalogue, "pacs_crossval", lambda: official)
    card = served(site, "pacs", [pacs_table(change(rows))], PACS)
    if says is None:  # only the name itself counts: nothing lands outside
        made(site, tmp_path, card)
        return
    refused(lambda: prepare("pacs", tmp_path, card=card), "pacs", says, folder=tmp_path,
            left=["lock", "pacs.json", "train-00000-of-00001.parquet"])
    assert not (tmp_path / "pacs").exists() and not (tmp_path / ".pacs.unfinished").exists()


def test_archives_of_a_login_site(site, tmp_path):
    bodies, pictures = [], {"leftImg8bit": ("leftImg8bit", pixels(6, 8, 3)), "gtFine": ("gtFine_labelIds", pixels(6, 8) % 34)}
    for top, (ending, array) in pictures.items():
        with zipfile.ZipFile(out := io.BytesIO(), "w") as packed:
            for part, i in (("train", 0), ("train", 1), ("val", 2)):
                packed.writestr(f"{top}/{part}/ulm/ulm_{i}_0_{ending}.png", png(array))
            packed.writestr("license.txt", "terms")
        bodies.append(out.getvalue())
    card = served(site, "cityscapes", bodies, {"trainval": 2, "test": 1})
    assert sorted(p.name for p in made(site, tmp_path, card).iterdir() if p.is_dir()) == ["gtFine", "leftImg8bit"]
    refused(lambda: prepare("cityscapes", tmp_path / "b"), "cityscapes", "leftImg8bit_trainvaltest.zip", "--source",
            "https://www.cityscapes-dataset.com/login/", "2c0b77ce9933", folder=tmp_path / "b")


# --- refusals leave no half set ---------------------------------------------------------------------------------------

def tiny(site, train=5, test=3):
    parts = (pixels(train, 28, 28), pixels(train) % 10, pixels(test, 28, 28), pixels(test) % 10)
    bodies = [gzip.compress(idx(part)) for part in parts]
    return served(site, "mnist", bodies, {"train": 5, "test": 3})


@pytest.mark.parametrize("told, says", [
    ({"body": PAGE}, "a web page came"), ({"status": 404}, "answers 404"),
    ({"body": b"\x1f\x8b" + b"x" * 40}, "offers 42 bytes"),
    ({"status": 302, "location": "ftp://127.0.0.1/"}, "only https")], ids=["page", "404", "short", "ftp"])
def test_one_bad_file_of_four(site, tmp_path, told, says):
    card = tiny(site)
    name = card.files[2].name
    good, site.routes[f"/{name}"] = site.routes[f"/{name}"], told
    refused(lambda: prepare("mnist", tmp_path, card=card), name, says, "by hand", folder=tmp_path,
            left=["lock", "mnist.json", *(file.name for file in card.files[:2])])
    site.routes[f"/{name}"], site.asked[:] = good, []
    made(site, tmp_path, card)
    assert [path for path, _ in site.asked] == [f"/{file.name}" for file in card.files[2:]]


def test_an_unreachable_host_leaves_an_empty_root(tmp_path):
    card = CATALOGUE["mnist"]
    away = tuple(replace(file, url=f"https://127.0.0.1:9/{file.name}", mirrors=()) for file in card.files)
    refused(lambda: prepare("mnist", tmp_path, card=replace(card, files=away)), "no connection", folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_first_digest_is_enforced_at_the_next_preparation(site, tmp_path):
    card = tiny(site)
    shutil.rmtree(made(site, tmp_path, card))
    other = tiny(site)
    refused(lambda: prepare("mnist", tmp_path, card=other), "seen at the first download", folder=tmp_path,
            left=["mnist.json"])


@pytest.mark.parametrize("bodies, says", [
    ((6, 3), "mnist/train holds 6 images, the publisher says 5"), ((5, 2), "mnist/test holds 2 images")])
def test_wrong_counts(site, tmp_path, bodies, says):
    with pytest.raises(SadalibError, match=says): prepare("mnist", tmp_path, card=tiny(site, *bodies))
    assert not (tmp_path / "mnist").exists()


def test_mnist_and_fashion_are_told_apart_by_digest(site, tmp_path):
    card = tiny(site)
    for path, told in site.routes.items(): (tmp_path / path[1:]).write_bytes(told["body"])
    left = sorted(p.name for p in tmp_path.iterdir())
    refused(lambda: prepare("fashion_mnist", tmp_path / "r", source=tmp_path), "train-images-idx3-ubyte.gz",
            "not the published file", folder=tmp_path, left=left)
    assert prepare("mnist", tmp_path / "r", source=tmp_path, card=card).is_dir()
    refused(lambda: prepare("mnist", tmp_path / "q", source=tmp_path / "no"), "does not exist", folder=tmp_path / "q")
    (tmp_path / left[0]).unlink()
    refused(lambda: prepare("mnist", tmp_path / "q", source=tmp_path, card=card), f"has no {left[0]}",
            folder=tmp_path / "q")


def test_a_full_disk_and_a_root_that_is_a_file(site, tmp_path):
    refused(lambda: prepare("mnist", tmp_path / "r", card=replace(tiny(site), needs=10**18)), "MB are needed",
            folder=tmp_path)
    (tmp_path / "file").write_text("in the way")
    refused(lambda: prepare("mnist", tmp_path / "file", card=tiny(site)), "file", folder=tmp_path, left=["file"])


def test_an_unknown_set_is_one_sentence(tmp_path):
    with pytest.raises(SadalibError, match="did you mean `mnist`"): prepare("mnits", tmp_path)
    assert not list(tmp_path.iterdir())


# --- interruptions and company ----------------------------------------------------------------------------------------

CHILD = """
import sys, time
from dataclasses import replace
from pathlib import Path
from sadalib.data import catalogue
def slow(card, paths, out):
    (out/"train.npz").write_bytes(b"half"); Path(sys.argv[2]).write_text("here"); time.sleep(60)
card = replace(catalogue.CATALOGUE["mnist"], files=(), convert=slow, needs=0)
catalogue.prepare("mnist", sys.argv[1], card=card)
"""


def test_killed_while_converting_and_two_at_once(site, tmp_path):
    root, mark = tmp_path / "root", tmp_path / "mark"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(root), str(mark)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not mark.exists():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(.02)
    with pytest.raises(SadalibError, match="is in use by process"): prepare("mnist", root, card=tiny(site))
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (root / "mnist").exists()
    made(site, root, tiny(site))


def test_a_second_preparation_says_so(site, tmp_path):
    card, said = tiny(site), []
    made(site, tmp_path, card)
    site.asked.clear()
    prepare("mnist", tmp_path, card=card, echo=said.append)
    assert len(said) == 1 and "already" in said[0] and not site.asked


# --- listing and checking ---------------------------------------------------------------------------------------------

def test_check_tells_damage(site, tmp_path):
    card = tiny(site)
    folder = made(site, tmp_path, card)
    whole = (folder / "train.npz").read_bytes()
    for harm in (whole[:-40], b"", whole[:100] + b"x" + whole[101:]):
        (folder / "train.npz").write_bytes(harm)
        verdict = check_set("mnist", tmp_path, card=card)
        assert verdict["status"] == "damaged" and "train.npz" in verdict["line"] and "prepare mnist" in verdict["line"]
    (folder / "train.npz").unlink()
    assert check_set("mnist", tmp_path, card=card)["status"] == "damaged"
    (folder / "checksums.json").write_text("torn")
    assert check_set("mnist", tmp_path, card=card)["status"] == "damaged"


def test_check_of_sets_put_there_by_hand(tmp_path):
    folder = tmp_path / "cifar10"
    folder.mkdir()
    np.savez(folder / "test.npz", images=np.zeros((4, 32, 32, 3), np.uint8), labels=np.arange(4))
    assert check_sets(tmp_path)[0]["status"] == "partial"
    np.savez(folder / "test.npz", images=np.zeros((4, 32, 32, 3), np.uint8), labels=np.arange(4) + 7)
    assert "labels 7..10" in check_sets(tmp_path)[0]["line"]
    (folder / "test.npz").write_bytes(b"PK torn")
    assert check_sets(tmp_path)[0]["status"] == "damaged"
    assert all("\n" not in row["line"] for row in check_sets(tmp_path, list(CATALOGUE)))


def test_the_list_says_what_is_there(tmp_path):
    rows = {row["name"]: row for row in list_sets(tmp_path)}
    assert set(rows) >= {"mnist", "usps", "mnist_m", "svhn", "syn", "cifar10", "cifar10_c", "cifar100",
                         "cifar100_c", "cifar10_p", "imagenet", "pacs", "fashion_mnist"}
    assert {row["state"] for row in rows.values()} == {"absent"} and not rows["cityscapes"]["automatic"]
    (tmp_path / "pacs").mkdir()
    assert {row["name"]: row["state"] for row in list_sets(tmp_path)}["pacs"] == "by hand"


# --- the cards themselves ---------------------------------------------------------------------------------------------

def test_every_card_is_complete_and_safe():
    for name, card in CATALOGUE.items():
        assert card.name == name and card.licence and card.citation and card.needs
        for file in card.files:
            if card.layout == "scenes" and not file.pin:  # repositories without a published digest: by hand only
                assert not file.url and file.about and not any(f.pin for f in card.files), file
                continue
            assert file.pin and file.kind and (file.size or file.about), file
            assert len(file.pin[1]) == {"sha256": 64, "sha1": 40, "md5": 32}[file.pin[0]]
            for url in (file.url, *file.mirrors):
                assert url.startswith("https://") or not url or file.sha256, url


def test_the_official_pacs_lists():
    lists = pacs_crossval()
    counts = {domain: sum(key[0] == domain for key in lists) for domain in CATALOGUE["pacs"].splits}
    assert counts == {"photo": 171, "art_painting": 208, "cartoon": 237, "sketch": 398}
    assert {key[1] for key in lists} == set(CATALOGUE["pacs"].classes)


def real(name):
    root = os.environ.get("SADALIB_DATA")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"real {name} is not here: set SADALIB_DATA to a folder that holds it")
    return Path(root)


def test_real_pacs_matches_the_official_lists(tmp_path):
    root = real("pacs")
    card = replace(CATALOGUE["pacs"], needs=0, splits={"photo": 1670})  # one domain: the others take the same way
    folder = prepare("pacs", tmp_path, source=root / "pacs", card=card)
    rows = [[(r["path"], r["label"], r["split"]) for r in csv.DictReader((f / "split.csv").read_text().splitlines())
             if r["domain"] == "photo"] for f in (folder, root / "pacs")]
    assert len(rows[0]) == 1670 and sorted(rows[0]) == sorted(rows[1]) and check_set("pacs", tmp_path, card=card)["ok"]


def test_real_sets_are_sound():
    root = real("mnist")
    for row in check_sets(root): assert row["status"] in ("ok", "partial"), row
