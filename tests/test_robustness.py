"""Corruption errors, flips and top-5 distances against slow references; the runs on synthetic files, stopped and resumed."""
import itertools

import numpy as np
import pytest
import torch

from sadalib import data as rooms
from sadalib import robustness as room
from sadalib.baselines import ERM
from sadalib.corruptions import corrupt
from sadalib.data import CORRUPTIONS, PAPER_PERTURBATIONS, PERTURBATIONS, load
from sadalib.robustness import (
    CorruptionConfig,
    PerturbationConfig,
    corruption_error_table,
    corruption_errors,
    corruption_frame,
    flip_probability,
    is_noise,
    perturbation_frame,
    perturbation_table,
    plot_corruptions,
    plot_severities,
    top5_distance,
)
from sadalib.runs import SadalibError, record, require, seeded
from sadalib.training import Recipe, TrainConfig, evaluate, load_model

LEARNED = TrainConfig(method=ERM(), model="tinynet", threads=1, train_images=200, valid_images=0, recipe=Recipe(epochs=1))


def slow_flips(predictions, noise):
    "Section 4.2: neighbours, or the first frame where the perturbation is noise"
    rows = []
    for row in predictions:
        rows.append(np.mean([row[j] != row[0 if noise else j - 1] for j in range(1, len(row))]))
    return np.mean(rows)


def slow_top5(logits, noise):
    "Section 4.2: the double sum with its indicator, rank by rank"
    total = []
    for sequence in logits:
        ranks = [np.argsort(np.argsort(-frame, kind="stable"), kind="stable") + 1 for frame in sequence]
        for j in range(1, len(sequence)):
            first, then, d = ranks[0 if noise else j - 1], ranks[j], 0
            for i in range(1, 6):
                sigma = then[np.flatnonzero(first == i)[0]]
                d += sum(1 <= k - 1 <= 5 for k in range(min(i, sigma) + 1, max(i, sigma) + 1))
            total.append(d)
    return np.mean(total)


@pytest.mark.parametrize(("noise", "classes", "seed"), list(itertools.product((True, False), (5, 6, 10, 40), range(3))))
def test_flips_and_distances_are_the_papers(noise, classes, seed):
    logits = np.random.default_rng(seed).normal(size=(6, 7, classes)).cumsum(1)
    if seed == 2: logits = logits.round() # ties
    answers = logits.argmax(-1)
    assert flip_probability(torch.tensor(answers), noise=noise) == pytest.approx(slow_flips(answers, noise))
    want = slow_top5(logits, noise)
    assert top5_distance(torch.tensor(logits), noise=noise) == pytest.approx(want)
    ranks = np.argsort(np.argsort(-logits, kind="stable"), kind="stable") + 1
    assert top5_distance(torch.tensor(ranks), noise=noise) == pytest.approx(want)


def test_a_steady_network_neither_flips_nor_moves():
    logits = torch.randn(3, 1, 10, generator=seeded(0)).expand(-1, 5, -1)
    assert top5_distance(logits, noise=True) == flip_probability(logits.argmax(-1), noise=False) == 0


@pytest.mark.parametrize(("call", "says"), [
    (lambda: flip_probability(torch.zeros(3, 1).long(), noise=True), "two frames"),
    (lambda: flip_probability(torch.zeros(0, 4).long(), noise=True), "at least one sequence"),
    (lambda: flip_probability(torch.zeros(3, 4), noise=True), "float32"),
    (lambda: top5_distance(torch.full((2, 3, 10), torch.nan), noise=True), "without NaN"),
    (lambda: top5_distance(torch.zeros(2, 3, 4), noise=True), "five classes"),
    (lambda: top5_distance(torch.zeros(2, 3, 10).long(), noise=True), "from 1 to the number of classes"),
    (lambda: is_noise("noise"), "unknown perturbation"),
    (lambda: perturbation_table({p: .1 for p in PERTURBATIONS}, {p: 0. for p in PERTURBATIONS}), "reference is 0"),
    (lambda: perturbation_table({}, names=()), "no perturbation"),
    (lambda: CorruptionConfig(LEARNED, corruptions=("fog", "fog")), "name each once"),
    (lambda: CorruptionConfig(LEARNED, corruptions=()), "at least one"),
    (lambda: CorruptionConfig(LEARNED, severities=(1, 1)), "each once"),
    (lambda: CorruptionConfig(LEARNED, n=0), "at least 1 image"),
    (lambda: CorruptionConfig(LEARNED, rule="best"), "unknown selection rule"),
])
def test_one_sentence(call, says):
    with pytest.raises(SadalibError, match=says) as error: call()
    assert "\n" not in str(error.value)


def test_which_are_noise():
    assert {p for p in PAPER_PERTURBATIONS if is_noise(p)} == {"gaussian_noise", "shot_noise"}


def made_up(seed):
    draw = np.random.default_rng(seed)
    return {c: {s: float(v) for s, v in zip(range(1, 6), draw.uniform(.05, .9, 5), strict=True)} for c in CORRUPTIONS}


def test_the_table_is_the_definition():
    ours, theirs = made_up(0), made_up(1)
    both = corruption_error_table({**ours, "spatter": {s: 1. for s in range(1, 6)}}, theirs, clean=.01)
    table = np.array([[ours[c][s] for s in range(1, 6)] for c in CORRUPTIONS])
    other = np.array([[theirs[c][s] for s in range(1, 6)] for c in CORRUPTIONS])
    assert both.mean == pytest.approx(table.mean())
    assert both.mce == pytest.approx(100*(table.sum(1)/other.sum(1)).mean())
    assert corruption_error_table(ours, theirs, severities=(3,)).mce == pytest.approx(100*(table[:, 2]/other[:, 2]).mean())
    frame = both.frame()
    assert frame.loc["mean of 15", "4"] == pytest.approx(table[:, 3].mean()) and "spatter" in frame.index
    assert "CE" not in corruption_error_table(ours).frame().columns
    assert "| clean |" in both._repr_markdown_() and "nan" not in both._repr_markdown_()


def test_ratios_of_perturbations():
    values = {p: .1 + .01*i for i, p in enumerate(PERTURBATIONS)}
    table = perturbation_table(values, {p: .2 for p in PERTURBATIONS})
    assert table.mean == pytest.approx(np.mean([values[p] for p in PAPER_PERTURBATIONS]))
    assert table.mean_ratio == pytest.approx(500*table.mean)
    assert perturbation_table(values).mean_ratio is None and "snow" in table._repr_markdown_()


def test_a_run_that_was_stopped_goes_on_and_gives_the_same(tmp_path, monkeypatch):
    config = CorruptionConfig(LEARNED, severities=(2,), corruptions=("fog", "frost", "pixelate"), n=60)
    whole = record(require(config, root=tmp_path/"whole"))
    calls = itertools.count()

    def tired(*args, **kwargs):
        if next(calls) == 2: raise KeyboardInterrupt
        return evaluate(*args, **kwargs)
    monkeypatch.setattr(room, "evaluate", tired)
    with pytest.raises(KeyboardInterrupt): require(config, root=tmp_path/"cut")
    log = next((tmp_path/"cut"/"corruptions").glob("*/metrics.jsonl"))
    log.write_text(log.read_text() + '{"metric": "corruption_err') # torn
    again = record(require(config, root=tmp_path/"cut"))
    assert again["metrics"] == whole["metrics"] and again["datasets"] == whole["datasets"]
    assert next(calls) == 5 # two settings were left


def test_rows_are_the_networks_own_errors(tmp_path):
    config = CorruptionConfig(LEARNED, severities=(3,), corruptions=("snow",), n=50, seed=4)
    run = require(config, root=tmp_path)
    clean_row, row = record(run)["metrics"]
    model, images = load_model(require(LEARNED, root=tmp_path)), load("digits", "test", limit=50)
    bad = corrupt(images.images, "snow", 3, generator=seeded(4, "corruption", "snow", 3))
    for found, pixels in ((clean_row, images.images), (row, bad)):
        wrong = (model(pixels.float()/255).argmax(1) != images.labels).double().mean().item()
        assert found["value"] == wrong and found["n"] == 50
    assert row["suite"] == "regenerated" and "regenerated" in row["data"] and row["data"] + "/test" in record(run)["datasets"]
    with pytest.raises(SadalibError, match="no weights of rule `valid`"):
        require(CorruptionConfig(LEARNED, n=50, rule="valid"), root=tmp_path)
    with pytest.raises(SadalibError, match="14 of 15 corruptions are missing"): corruption_errors(run)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    "A data root with made-up CIFAR-10 and one made-up corruption in the published layout"
    root, draw = tmp_path/"data", np.random.default_rng(0)
    (root/"cifar10").mkdir(parents=True), (root/"cifar10_c").mkdir()
    labels = np.arange(10000) % 10
    for split, n in (("train", 200), ("test", 10000)):
        images = draw.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) if n < 10000 else np.zeros((n, 32, 32, 3), np.uint8)
        np.savez(root/"cifar10"/f"{split}.npz", images=images, labels=labels[:n])
    np.save(root/"cifar10_c"/"labels.npy", np.tile(labels, 5).astype(np.uint8))
    fog = np.lib.format.open_memmap(root/"cifar10_c"/"fog.npy", "w+", np.uint8, (50000, 32, 32, 3)) # sparse on the disk
    for severity in range(1, 6): fog[(severity - 1)*10000:(severity - 1)*10000 + 30] = 50*severity
    del fog
    monkeypatch.setenv("SADALIB_DATA", str(root))
    return TrainConfig(method=ERM(), data="cifar10", model="tinynet", threads=1, train_images=100, valid_images=0,
                       recipe=Recipe(epochs=1))


def test_published_files_are_read_by_severity(tmp_path, cifar):
    run = require(CorruptionConfig(cifar, suite="published", corruptions=("fog",), severities=(1, 5), n=30), root=tmp_path)
    model, labels = load_model(require(cifar, root=tmp_path)), torch.arange(30) % 10
    for row, severity in zip(record(run)["metrics"][1:], (1, 5), strict=True):
        images = torch.full((30, 3, 32, 32), 50*severity/255)
        wrong = (model(images).argmax(1) != labels).double().mean().item()
        assert (row["value"], row["data"], row["suite"]) == (wrong, f"cifar10_c/fog/{severity}", "published")
    with pytest.raises(SadalibError, match="5 of 10 settings of cifar10_c are missing: run `sadalib data prepare"):
        require(CorruptionConfig(cifar, suite="published", corruptions=("fog", "snow")), root=tmp_path)


def test_sequences(tmp_path, cifar, monkeypatch):
    def frames(name, *, limit=None, root=None):
        seed = PERTURBATIONS.index(name.removeprefix("cifar10_p/"))
        images = torch.randint(0, 256, (12, 5, 3, 32, 32), dtype=torch.uint8, generator=seeded(seed))
        return images[:limit], torch.arange(12)[:limit] % 10
    monkeypatch.setattr(rooms, "load_sequences", frames)
    run = require(PerturbationConfig(cifar, ("tilt", "gaussian_noise"), n=8), root=tmp_path)
    model, found = load_model(require(cifar, root=tmp_path)), perturbation_frame([run], ["plain"]).set_index("perturbation")
    for name in ("tilt", "gaussian_noise"):
        images, labels = frames(f"cifar10_p/{name}", limit=8)
        with torch.no_grad(): logits = model(images.flatten(0, 1).float()/255).view(8, 5, 10).numpy()
        row, noise = found.loc[name], "noise" in name
        assert row["flip_probability"] == pytest.approx(slow_flips(logits.argmax(-1), noise))
        assert row["top5_distance"] == pytest.approx(slow_top5(logits, noise), abs=.2) # near ties may differ
        assert row["sequence_error"] == pytest.approx((logits.argmax(-1) != labels[:, None].numpy()).mean())
        assert (row["n"], row["frames"], row["arm"]) == (8, 5, "plain")


def test_pictures_of_arms_and_seeds(tmp_path):
    from matplotlib.figure import Figure
    runs = [require(CorruptionConfig(LEARNED, severities=(1, 5), corruptions=("fog", "contrast", "spatter"), n=20, seed=s),
                    root=tmp_path) for s in range(3)]
    frame = corruption_frame(runs, ["a", "a", "b"])
    assert len(frame) == 18 and set(frame["group"]) == {"weather", "digital", "extra"}
    assert isinstance(plot_corruptions(frame), Figure) and isinstance(plot_severities(frame), Figure)
    labels = [t.get_text() for t in plot_corruptions(frame, names=["contrast"]).axes[0].get_xticklabels()]
    assert labels == ["contrast"] and len(plot_corruptions(frame).axes[0].patches) == 6
    assert "2 corruptions" in plot_severities(frame).axes[0].get_ylabel()
    with pytest.raises(SadalibError, match="frame is empty"): plot_corruptions(frame[:0])
