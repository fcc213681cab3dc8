"""Disparity as runs: trials and theory against direct calls, what a study asks for, its claims, figures and notebooks"""
import dataclasses
import itertools
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from sadalib.disparity import (
    disparity_gaps,
    gaussian_accuracies,
    linear_accuracy,
    population_accuracy,
    ramp_mean,
    solve_linear,
    stable_accuracies,
    stable_margins,
    stable_mixture,
    synthetic_problem,
    train_linear,
    trials,
    two_class_problem,
)
from sadalib.disparity.figures import over_draws, plot_classes, plot_gaps, plot_parts, plot_protocols, plot_tails
from sadalib.disparity.networks import NetworkConfig, train_network
from sadalib.disparity.pairs import array_problem
from sadalib.disparity.study import (
    FOURTH,
    LARGE,
    NETWORKS,
    CompareParameters,
    DisparityParameters,
    abstract_claims,
    abstract_intervals,
    check_study,
    compared,
    large_configs,
    model_of,
    network_claim,
    network_configs,
    row_of,
    theory_configs,
    trial_configs,
)
from sadalib.disparity.theory import collapse_ratio
from sadalib.disparity.trials import (
    NORMS,
    TheoryConfig,
    TrialConfig,
    gap_frame,
    own_file,
    problem_of,
    settings_of,
    theory_frame,
    theory_row,
    trial_frame,
)
from sadalib.runs import Parameters, SadalibError, config_id, load_tensors, record, require, seeded

ROOT, INF = Path(__file__).resolve().parent.parent, math.inf
SMALL = TrialConfig(ratio=3., sizes=(300, 100, 200), learning_rates=(.05, .01), seeds=(2, 22), epochs=6,
                    patience=6, fractions=(0., .5, .75))
SOLVED = replace(SMALL, protocol="exact", seeds=(), learning_rates=())


def sentence(call, says):
    "`call` refuses in one sentence that holds `says`"
    with pytest.raises(SadalibError) as error: call()
    text = str(error.value)
    assert says in text and "\n" not in text and text.rstrip().endswith((".", "?")) and ". " not in text, text


def rules(run): return load_tensors(run.folder/"rules.safetensors")[0]


def assert_same(one, other):
    assert (one.folder/"result.json").read_bytes() == (other.folder/"result.json").read_bytes()
    assert record(one)["digest"] == record(other)["digest"]
    a, b = rules(one), rules(other)
    assert a.keys() == b.keys() == {"u", "c"} and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def root(tmp_path_factory): return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def finished(root):
    "One draw: both protocols and the solution"
    return {c.protocol: require(c, root=root) for c in (SMALL, replace(SMALL, protocol="official"), SOLVED)}


def mine(path, n=360, seed=0):
    "A file of two classes, the last quarter of them rarer"
    draw = np.random.default_rng(seed)
    y = (np.arange(n) % 4 == 0).astype(int)
    x = draw.normal(size=(n, 3)) + (2*y - 1)[:, None]*np.array([2., 1., .3])
    np.savez(path, x=x, y=y)
    return path


# ---- trials: identity, no-op, the same twice, killed

def test_any_field_changes_the_identity_and_a_file_counts_by_its_content(tmp_path):
    path = mine(tmp_path/"mine.npz")
    first = TrialConfig(**own_file(path), sizes=None)
    assert own_file(path) == own_file(str(path)) and config_id(first) == config_id(TrialConfig(**own_file(path), sizes=None))
    mine(path, seed=1)
    second = TrialConfig(**own_file(path), sizes=None)
    assert first.file == second.file and config_id(first) != config_id(second)
    changed = [replace(SMALL, **{k: v}) for k, v in dict(ratio=4., protocol="official", select="clean", norms=("l2",), fractions=(0.,),
               sizes=(300, 100, 100), data_seed=1, seeds=(2,), epochs=7, optimizer="sgd", batch_size=32, patience=5).items()]
    assert len({config_id(c) for c in [SMALL, *changed]}) == 13


def test_a_file_that_changed_since_is_refused(tmp_path):
    path = mine(tmp_path/"mine.npz")
    config = TrialConfig(**own_file(path), sizes=None, ratio=2., protocol="exact", seeds=(), learning_rates=())
    assert len(record(require(config, root=tmp_path/"runs"))["metrics"]) > 5
    mine(path, seed=1)
    sentence(lambda: problem_of(config), "was changed since its checksum was taken")
    again = replace(config, data_seed=1)
    sentence(lambda: require(again, root=tmp_path/"runs"), "was changed")
    assert not (tmp_path/"runs"/"disparity"/config_id(again)/"done").exists()


@pytest.mark.parametrize(("arrays", "says"), [
    ({"x": np.zeros((20, 2))}, "does not hold arrays x and y"), ({"x": np.zeros((20, 2)), "y": np.zeros(20)}, "one class only"),
    ({"x": np.zeros((20, 2)), "y": np.arange(20) % 3}, "3 values"), ({"x": np.full((20, 2), np.nan), "y": np.arange(20) % 2}, "NaN"),
    ({"x": np.zeros((20, 2)), "y": np.arange(19) % 2}, "shape"), ({"x": np.zeros((20, 2)), "y": np.arange(20) < 3}, "at least 8"),
    ({"x": np.array([object()]), "y": np.zeros(1)}, "does not hold arrays"),
    ({"x": np.array(["a"]*20), "y": np.arange(20) % 2}, "no numbers")],
    ids=lambda v: v if isinstance(v, str) else "")
def test_files_that_hold_no_two_classes(arrays, says, tmp_path):
    np.savez(tmp_path/"bad.npz", **arrays)
    sentence(lambda: own_file(tmp_path/"bad.npz"), says)


def test_no_archive_and_no_file(tmp_path):
    (tmp_path/"text.npz").write_text("no archive")
    with pytest.raises(SadalibError, match="does not hold arrays x and y"): own_file(tmp_path/"text.npz")
    sentence(lambda: own_file(tmp_path), "does not exist")


def test_a_single_array_is_one_sentence(tmp_path):
    np.save(tmp_path/"single.npy", np.zeros((20, 2)))
    sentence(lambda: own_file(tmp_path/"single.npy"), "does not hold arrays")


def test_nobody_is_told_to_load_pickled_data(tmp_path):
    (tmp_path/"text.npz").write_text("no archive")
    sentence(lambda: own_file(tmp_path/"text.npz"), "does not hold arrays")


def test_a_finished_trial_is_a_no_op(finished, root, monkeypatch):
    monkeypatch.setattr(trials, "train_linear", None)
    monkeypatch.setattr(trials, "solve_linear", None)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}
    for run in finished.values(): assert require(run.config, root=root).id == run.id
    assert before == {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}


def test_two_roots_hold_the_same_bytes(finished, tmp_path):
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    for run in finished.values(): assert_same(run, require(run.config, root=tmp_path))
    assert torch.equal(state, torch.random.get_rng_state())
    one, other = (record(require(replace(SOLVED, data_seed=s), root=tmp_path)) for s in (0, 1))
    assert one["metrics"] != other["metrics"] and one["datasets"] != other["datasets"]


MOMENTS = {"a rule is measured": "measured", "rules are kept": "save_tensors", "the result is written": "finish"}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_when(moment, finished, tmp_path):
    config, name = finished["corrected"].config, MOMENTS[moment]
    child = os.fork()
    if not child:
        own, calls = getattr(trials, name), []
        def killed(*args, **kwargs):
            calls.append(1)
            if name != "measured": own(*args, **kwargs) if name == "save_tensors" else None
            if name != "measured" or len(calls) == 3: os.kill(os.getpid(), signal.SIGKILL)
            return own(*args, **kwargs)
        setattr(trials, name, killed)
        require(config, root=tmp_path)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not (tmp_path/"disparity"/config_id(config)/"done").exists()
    assert_same(require(config, root=tmp_path), finished["corrected"])


def test_killed_from_outside(tmp_path):
    long = replace(SMALL, epochs=300, patience=300, learning_rates=(.01,), seeds=(2,), norms=("l2",))
    code = ("from sadalib.disparity.trials import TrialConfig; from sadalib.runs import require; "
            f"require({long!r}, root={str(tmp_path/'killed')!r})")
    child = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    folder, until = tmp_path/"killed"/"disparity"/config_id(long), time.monotonic() + 100
    while not (folder/"env.json").exists() and child.poll() is None and time.monotonic() < until: time.sleep(.01)
    time.sleep(.1)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and not (folder/"done").exists()
    assert_same(require(long, root=tmp_path/"killed"), require(long, root=tmp_path/"whole"))


# ---- trials: what rows say

def both(values): return [round(float(v), 6) for v in values]


@pytest.mark.parametrize("protocol", ["official", "corrected"])
def test_rows_of_trainings_agree_with_direct_calls(protocol, finished):
    c, p = finished[protocol].config, synthetic_problem("gaussian", 3., sizes=SMALL.sizes)
    assert torch.equal(problem_of(c).train.x, p.train.x)
    rows = [m for m in record(finished[protocol])["metrics"] if m["metric"] == "disparity"]
    assert [(m["norm"], m["fraction"], m["seed"]) for m in rows] == [
        (n, f, s) for n, f in (("l2", 0.), ("l2", .5), ("l2", .75), ("linf", .5), ("linf", .75)) for s in (2, 22)]
    tensors = rules(finished[protocol])
    for i, m in enumerate(rows):
        norm, eps = NORMS[m["norm"]], p.eps(m["fraction"], NORMS[m["norm"]])
        best = train_linear(*p.train, valid=p.valid, norm=norm, eps=eps, protocol=protocol, learning_rates=c.learning_rates,
                            seeds=m["seed"], epochs=6, patience=6).chosen()
        torch.testing.assert_close(tensors["u"][i], best.u[0], rtol=0, atol=2e-5) # alone or in a batch: rounding apart
        u, bias = tensors["u"][i], tensors["c"][i]
        clean, robust = linear_accuracy(u, bias, *p.balanced), linear_accuracy(u, bias, *p.balanced, norm=norm, eps=eps)
        assert [m["majority"], m["minority"]] == both(clean) and [m["majority_robust"], m["minority_robust"]] == both(robust)
        assert m["value"] == pytest.approx(float(clean[0] - clean[1]), abs=1e-6)
        assert m["population"] == both(population_accuracy(u, bias, p.mean, sigma=3.))
        assert m["population_robust"] == both(population_accuracy(u, bias, p.mean, sigma=3., norm=norm, eps=eps))
        right = ((p.test.x.float() @ u + bias > 0) == (p.test.y == 1)).double().mean()
        assert m["overall"] == pytest.approx(float(right), abs=1e-6)
        assert m["learning_rate"] == pytest.approx(float(best.learning_rate)) and m["best_epoch"] == int(best.best_epoch)
        assert m["loss"] == pytest.approx(float(best.best_loss), abs=1e-6) and m["eps"] == pytest.approx(eps, abs=1e-6)
    assert record(finished[protocol])["trainings"] == 5*2*2 and record(finished[protocol])["failed"] == 0


def test_rows_of_solutions_agree_with_direct_calls(finished):
    p, found = problem_of(SOLVED), record(finished["exact"])
    rows = [m for m in found["metrics"] if m["metric"] == "disparity"]
    assert len(rows) == 5 and {m["seed"] for m in rows} == {None} and found["unsolved"] == 0
    assert found["points"] == [[300, 100], [100, 33], [200, 67], [200, 200]]
    for m in rows:
        s = solve_linear(*p.train, norm=NORMS[m["norm"]], eps=p.eps(m["fraction"], NORMS[m["norm"]]))
        assert m["population"] == both(population_accuracy(s.u, s.c, p.mean, sigma=3.)) and m["loss"] == round(s.loss, 8)
        assert [m["majority"], m["minority"]] == both(linear_accuracy(s.u, s.c, *p.balanced))


def test_the_standard_rules_meet_every_adversary(finished):
    p = problem_of(SMALL)
    for name, seeds in (("corrected", (2, 22)), ("exact", (None,))):
        rows = {(m["norm"], m["fraction"], m["seed"]): m for m in record(finished[name])["metrics"] if m["metric"] == "standard_robust"}
        assert set(rows) == {(n, f, s) for n in NORMS for f in (.5, .75) for s in seeds}
        tensors = rules(finished[name]) # the standard rules come first, in the order of seeds
        for (n, f, s), m in rows.items():
            i = seeds.index(s)
            kept = linear_accuracy(tensors["u"][i], tensors["c"][i], *p.balanced, norm=NORMS[n], eps=p.eps(f, NORMS[n]))
            assert [m["majority"], m["minority"]] == both(kept) and m["value"] == pytest.approx(float(kept[0] - kept[1]), abs=1e-6)


@pytest.fixture(scope="module")
def heavy(tmp_path_factory):
    "Cauchy points of your own: an outlier makes the radius of the balanced points too large for all of them"
    path = tmp_path_factory.mktemp("own")/"heavy.npz"
    x, y = stable_mixture(300, [1.5, 1.], 1., 3, seeded(5))
    np.savez(path, x=x.numpy(), y=y.numpy())
    return TrialConfig(**own_file(path), sizes=None, ratio=3., fractions=(0., .5, .75), protocol="exact", seeds=(), learning_rates=())


def test_refused_settings_are_told_and_harm_no_other(heavy, root):
    kept, refused = settings_of(heavy, problem_of(heavy))
    assert [k[:2] for k in kept] == [("l2", 0.), ("l2", .5), ("linf", .5)]
    for text, start in zip(refused, ("l2 at 0.75 of ||mu||: eps", "linf at 0.75 of ||mu||: eps"), strict=True):
        assert text.startswith(start) and "beyond half the distance" in text and "\n" not in text
    run = require(heavy, root=root)
    assert record(run)["refused"] == refused
    rows = [m for m in record(run)["metrics"] if m["metric"] == "disparity"]
    assert [(m["norm"], m["fraction"]) for m in rows] == [k[:2] for k in kept]
    fewer = require(replace(heavy, fractions=(0., .5)), root=root) # without what is refused: the same rules
    assert record(fewer)["refused"] == [] and torch.equal(rules(run)["u"], rules(fewer)["u"])
    assert [m for m in record(fewer)["metrics"] if m["metric"] == "disparity"] == rows
    trained = require(replace(heavy, protocol="corrected", seeds=(2,), learning_rates=(.01,), epochs=3), root=root)
    assert record(trained)["refused"] == refused and len(rules(trained)["u"]) == 3


def test_a_rate_that_explodes_is_counted_and_harms_no_other(root):
    sgd = replace(SMALL, optimizer="sgd", protocol="official")
    alone, beside = require(replace(sgd, learning_rates=(.05,)), root=root), require(replace(sgd, learning_rates=(.05, 3e38)), root=root)
    a, b = record(alone), record(beside)
    assert (a["trainings"], a["failed"], a["lost"]) == (10, 0, 0) and (b["trainings"], b["failed"], b["lost"]) == (20, 10, 0)
    assert all(torch.isfinite(t).all() for t in rules(beside).values())
    torch.testing.assert_close(rules(alone)["u"], rules(beside)["u"], rtol=0, atol=1e-5)
    assert {m["learning_rate"] for m in b["metrics"] if m["metric"] == "disparity"} == {.05}
    assert np.isfinite(gap_frame(trial_frame([beside])).gap_disparity).all()


def test_what_ended_in_nan_at_every_rate_is_left_out_and_counted(root):
    run = require(replace(SMALL, learning_rates=(3e38,), optimizer="sgd"), root=root)
    assert record(run)["lost"] == 10 and record(run)["metrics"] == [] and len(rules(run)["u"]) == 0


def test_trials_without_a_rule_are_one_sentence(root):
    run = require(replace(SMALL, learning_rates=(3e38,), optimizer="sgd"), root=root)
    with pytest.raises(SadalibError): trial_frame([run])


def test_a_strength_that_is_named_twice_shifts_no_names(finished, root):
    config = replace(SMALL, fractions=(0., .5, .5, .75))
    try: twice = trial_frame([require(config, root=root)])
    except SadalibError: return # refused: as good
    keys, names = ["norm", "fraction", "seed"], ["majority", "minority"]
    once = trial_frame([finished["corrected"]]).set_index(keys)[names]
    for key, row in twice.drop_duplicates(keys).set_index(keys)[names].iterrows(): assert once.loc[key].tolist() == row.tolist(), key
    assert len(twice.drop_duplicates(keys)) == 10


# ---- networks as runs

def test_networks_as_runs(tmp_path):
    met = ("l2:0.5", "linf:0.75")
    plain = NetworkConfig(data="digits", ratio=2., sizes=(60, 20, 40), epochs=2, patience=2, steps=2, learning_rates=(1e30, .01, .05),
                          against=met)
    robust = replace(plain, norm="linf", fraction=.75, against=())
    runs = [require(c, root=tmp_path/"one") for c in (plain, robust)]
    again = require(robust, root=tmp_path/"two")
    assert (runs[1].folder/"result.json").read_bytes() == (again.folder/"result.json").read_bytes()
    for run in runs: assert record(run)["failed"] == 1 and record(run)["trainings"] == 3 and record(run)["points"][0] == [60, 30]
    problem = two_class_problem("digits", 2., sizes=(60, 20, 40))
    for run, norm, f in zip(runs, (2., INF), (0., .75), strict=True):
        direct = [train_network(problem, norm=norm, eps=problem.eps(f, norm), learning_rate=r, epochs=2, patience=2, steps=2, seed=2)
                  for r in (.01, .05)]
        best, row = min(direct, key=lambda r: r.best_loss), record(run)["metrics"][0]
        clean = best.accuracy(problem.balanced)
        assert [row["majority"], row["minority"]] == both(clean) and row["learning_rate"] == best.learning_rate
        assert row["loss"] == pytest.approx(best.best_loss, abs=1e-7) and row["eps"] == pytest.approx(problem.eps(f, norm), abs=1e-6)
    standard = [(m["norm"], m["fraction"]) for m in record(runs[0])["metrics"] if m["metric"] == "standard_robust"]
    assert standard == [("l2", .5), ("linf", .75)]
    own = [m for m in record(runs[1])["metrics"] if m["metric"] == "robust"]
    assert len(own) == 1 and own[0]["majority"] == record(runs[1])["metrics"][0]["majority_robust"]
    (gap,) = gap_frame(trial_frame(runs)).itertuples()
    values = [record(r)["metrics"][0] for r in runs]
    assert gap.gap_disparity == pytest.approx(values[1]["value"] - values[0]["value"]) and gap.measured_on == "test set"
    assert gap.gap_accuracy == pytest.approx(values[0]["overall"] - values[1]["overall"])
    sentence(lambda: require(replace(plain, learning_rates=(1e30,)), root=tmp_path/"one"), "lower the learning rate")


# ---- gaps

def rows(**columns):
    "A frame of invented rules"
    usual = {"data": "own", "protocol": "exact", "norm": "l2", "ratio": 3., "data_seed": 0, "seed": None}
    return pd.DataFrame([{**usual, **dict(zip(columns, values, strict=True))} for values in zip(*columns.values(), strict=True)])


def test_gaps_by_hand():
    found = gap_frame(rows(fraction=[0., .5, 1.], disparity=[.1, .3, .9], overall=[.8, .7, .75]))
    assert found.gap_disparity.tolist() == pytest.approx([.2, .8]) and found.gap_accuracy.tolist() == pytest.approx([.1, .05])
    assert found.degenerate.tolist() == [False, True] and set(found.measured_on) == {"test set"}
    law = rows(fraction=[0., .5], disparity=[9., 9.], overall=[9., 9.], majority_population=[.9, .95], minority_population=[.8, .6])
    found = gap_frame(law).iloc[0] # population in the place of test points: shares 3/4 and 1/4
    assert found.gap_disparity == pytest.approx(.35 - .1) and found.measured_on == "population"
    assert found.gap_accuracy == pytest.approx((.75*.9 + .25*.8) - (.75*.95 + .25*.6))
    law.loc[1, "majority_population"] = math.nan # not of all: test points for all
    assert set(gap_frame(law).measured_on) == {"test set"}
    sentence(lambda: gap_frame(law[law.fraction > 0]), "add the fraction 0")


def many():
    "Rules whose standard disparity names data, protocol, ratio, draw and seed"
    out = []
    for data, protocol, ratio, draw, seed in itertools.product(("gaussian", "own"), ("official", "corrected", "exact"),
                                                      (2., 10.), (0, 1), (2, 22)):
        code = 1000*(data == "own") + 100*len(protocol) + ratio + 20*draw + .01*seed
        for norm, fraction, more in (("l2", 0., 0.), ("l2", .5, .125), ("linf", .5, .25), ("linf", 1., .5)):
            out.append({"data": data, "protocol": protocol, "ratio": ratio, "data_seed": draw,
                        "seed": None if protocol == "exact" else seed,
                        "norm": norm, "fraction": fraction, "disparity": code + more, "overall": -code - more, "more": more})
    frame = pd.DataFrame(out)
    return frame[~((frame.protocol == "exact") & (frame.duplicated(["data", "protocol", "ratio", "data_seed", "norm", "fraction"])))]


def test_a_rule_is_compared_with_the_standard_rule_of_its_own_draw():
    frame = many()
    found = gap_frame(frame)
    assert len(found) == len(frame)*3/4
    np.testing.assert_allclose(found.gap_disparity, found.more, atol=1e-9)
    np.testing.assert_allclose(found.gap_accuracy, found.more, atol=1e-9)
    assert (found.degenerate == (found.fraction == 1)).all()
    keys = ["data", "protocol", "ratio", "data_seed", "seed", "norm", "fraction"]
    mixed = gap_frame(frame.sample(frac=1, random_state=0)).sort_values(keys).reset_index(drop=True)
    pd.testing.assert_frame_equal(mixed, found.sort_values(keys).reset_index(drop=True))


def test_frames_and_gaps_of_real_trials(finished):
    frame = trial_frame(list(finished.values()))
    assert frame.groupby("protocol").size().to_dict() == {"corrected": 10, "official": 10, "exact": 5}
    found, p = gap_frame(frame), problem_of(SMALL)
    assert set(found.measured_on) == {"population"} and not found.degenerate.any()
    accuracies = {}
    for f in (0., .5):
        s = solve_linear(*p.train, eps=p.eps(f))
        accuracies[f] = population_accuracy(s.u, s.c, p.mean, sigma=3.).numpy()
    (d0, o0), (d1, o1) = ((a[0] - a[1], a @ [.75, .25]) for a in accuracies.values())
    here = found[(found.protocol == "exact") & (found.norm == "l2") & (found.fraction == .5)].iloc[0]
    assert (here.gap_disparity, here.gap_accuracy) == pytest.approx((d1 - d0, o0 - o1), abs=3e-6)
    on_points = gap_frame(frame.drop(columns=[c for c in frame if "population" in c]))
    assert set(on_points.measured_on) == {"test set"}
    settings = [(NORMS[n], p.eps(f, NORMS[n])) for n, f in (("l2", 0.), ("l2", .5), ("l2", .75), ("linf", .5), ("linf", .75))]
    batch = train_linear(*p.train, valid=p.valid, norm=[n for n, _ in settings], eps=[e for _, e in settings], seeds=(2, 22),
                         learning_rates=SMALL.learning_rates, epochs=6, patience=6)
    reference = torch.cat(list(disparity_gaps(batch, p).values())).numpy()
    trained = on_points[on_points.protocol == "corrected"]
    np.testing.assert_allclose(trained[["gap_disparity", "gap_accuracy"]], reference, atol=3e-6)


def test_another_selection_is_named(root):
    run = require(replace(SMALL, select="clean", norms=("l2",)), root=root)
    frame, p = trial_frame([run]), problem_of(SMALL)
    assert set(frame.protocol) == {"corrected, clean selection"}
    direct = train_linear(*p.train, valid=p.valid, eps=p.eps(.75), select="clean", learning_rates=SMALL.learning_rates, seeds=(2, 22),
                          epochs=6, patience=6).chosen()
    assert frame[frame.fraction == .75].loss.tolist() == pytest.approx(direct.best_loss.tolist(), abs=1e-6)


# ---- theory

def pair(row): return row["majority"], row["minority"]


LAWS = [dict(sigma=3.), dict(alpha=2.), dict(alpha=1.5), dict(alpha=1.)]


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_theory_rows_are_the_closed_forms(law, norm):
    mean, alpha = np.array([.4, 3., 2.9, -1.]), law.get("alpha")
    size = np.linalg.norm(mean, NORMS[norm])
    for ratio, fraction in itertools.product((1., 2., 8., 300.), (0., .4, .8)):
        row = theory_row(mean, ratio, fraction*size, norm, **law)
        if alpha is None: known = [gaussian_accuracies(mean, 3., ratio, e, NORMS[norm]) for e in (0., fraction*size)]
        else:
            (a, _), (b, s) = (stable_margins(mean, alpha, e, NORMS[norm]) for e in (0., fraction*size))
            known = [stable_accuracies(a, ratio, alpha), stable_accuracies(b, ratio, alpha, robust=s)]
            assert row["collapsed"] == (known[1] == (1., 0.)) and row["standard_collapsed"] == (known[0] == (1., 0.))
            limit = collapse_ratio(s, alpha)
            assert row["collapse_ratio"] == (None if limit == INF else pytest.approx(limit))
            assert row["collapsed"] == (ratio >= limit)
        assert pair(row) == pytest.approx(known[1], abs=1e-9) and row["value"] == pytest.approx(known[1][0] - known[1][1], abs=1e-9)
        change = np.subtract(known[1], known[0])
        np.testing.assert_allclose(np.add(row["inherent"], row["imbalance"]), change, atol=1e-9)
        assert row["gap_disparity"] == pytest.approx(change[0] - change[1], abs=1e-9)
        assert row["gap_accuracy"] == pytest.approx(-(ratio*change[0] + change[1])/(1 + ratio), abs=1e-9)
        if ratio == 1: np.testing.assert_allclose(row["imbalance"], 0, atol=1e-9)
        if fraction == 0: assert row["gap_disparity"] == row["gap_accuracy"] == 0 and row["standard_margin"] == row["clean_margin"]


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_tail_of_two_is_gaussian(norm):
    mean = ramp_mean(7, 4.).numpy()
    for ratio, fraction in itertools.product((1., 3., 50.), (0., .5, .9)):
        eps = fraction*np.linalg.norm(mean, NORMS[norm])
        stable, gaussian = theory_row(mean, ratio, eps, norm, alpha=2.), theory_row(mean, ratio, eps, norm, sigma=math.sqrt(2))
        for name in ("majority", "minority", "gap_disparity", "gap_accuracy", "inherent", "imbalance"):
            np.testing.assert_allclose(stable[name], gaussian[name], atol=1e-8)
        for name in ("clean_margin", "robust_margin", "standard_margin"): # in units of N(0, 2): its deviation is sqrt(2)
            assert stable[name] == pytest.approx(math.sqrt(2)*gaussian[name], rel=1e-8)
        assert not stable["collapsed"] and stable["collapse_ratio"] is None


TABLE = [(2., 2, .5, (.025, .066, .104, .142, .192)), (2., 2, 1, (.077, .211, .322, .404, .384)),
         (2., 3, 1.5, (.015, .050, .096, .163, .370)),
         (1.5, 2, .5, (.007, .031, .733, 0, 0)), (1.5, 2, 1, (.029, .154, .733, 0, 0)), (1.5, 3, 1.5, (.001, .009, .895, .827, 0)),
         (1., 2, .5, (-.008, -.018, 0, 0, 0)), (1., 2, 1, (-.011, .852, 0, 0, 0)), (1., 3, 1.5, (-.013, -.035, .843, 0, 0))]


@pytest.mark.parametrize(("alpha", "a", "eps", "gaps"), TABLE)
def test_the_gaps_sign_and_both_collapses(alpha, a, eps, gaps):
    found = [theory_row(np.array([float(a)]), r, eps, "l2", alpha=alpha) for r in (2, 5, 10, 20, 100)]
    # the recorded Holtsmark numbers came from a coarse integral and grid; the next test computes them independently
    np.testing.assert_allclose([r["gap_disparity"] for r in found], gaps, atol=4.5e-3 if alpha == 1.5 else 6e-4)
    assert [bool(r["collapsed"] and r["standard_collapsed"]) for r in found] == [g == 0 for g in gaps]
    assert [bool(r["collapsed"] and not r["standard_collapsed"]) for r in found] == [g > .7 for g in gaps]
    assert [r["gap_disparity"] < 0 for r in found] == [g < 0 for g in gaps]


@pytest.fixture(scope="module")
def holtsmark():
    "The distribution function by a plain integral: of sin(tz)/t exp(-t^1.5), which is z at 0"
    t, z = np.linspace(0, 25, 20_001)[1:], np.linspace(0, 12, 1201)
    upper = np.array([np.sin(t*v) @ (np.exp(-t**1.5)/t) + v/2 for v in z])*t[0]/math.pi
    return lambda v: .5 + np.sign(v)*np.interp(np.abs(v), z, upper)


@pytest.mark.parametrize(("a", "eps", "ratio"), [(2, .5, 5), (2, 1, 2), (2, 1, 5), (3, 1.5, 5)])
def test_holtsmark_gaps_by_brute_force(a, eps, ratio, holtsmark):
    grid = np.linspace(0, 6, 6001)
    def disparity(margin): # the threshold of least robust error, then what it does to clean points
        cut = grid[np.argmin(ratio*(1 - holtsmark(margin + grid)) + 1 - holtsmark(margin - grid))]
        return holtsmark(a + cut) - holtsmark(a - cut)
    found = theory_row(np.array([float(a)]), ratio, eps, "l2", alpha=1.5)["gap_disparity"]
    assert found == pytest.approx(disparity(a - eps) - disparity(a), abs=1.5e-3)


@pytest.mark.parametrize("fraction", [.02, .5, .75, .99])
@pytest.mark.parametrize("alpha", [1.001, 1.01])
def test_close_to_cauchy_the_l2_direction_is_still_the_best(alpha, fraction):
    mean = ramp_mean(30).numpy()
    eps = fraction*np.linalg.norm(mean)
    clean, robust = stable_margins(mean, alpha, eps, 2)
    assert clean >= robust > 0
    def reach(w): return (w @ mean - eps*np.linalg.norm(w, axis=-1))/(np.abs(w)**alpha).sum(-1)**(1/alpha)
    draw = np.random.default_rng(0)
    others = np.concatenate([draw.standard_normal((2000, 30)), mean + draw.standard_normal((2000, 30))*draw.choice([.01, .1, 1], (2000, 1)),
                             np.maximum(mean - np.linspace(0, mean.max()*.999, 500)[:, None], 0), mean**np.linspace(0, 60, 300)[:, None]])
    assert reach(others).max() <= robust + 1e-9
    assert robust == pytest.approx(stable_margins(mean, 1., eps, 2)[1], rel=60*(alpha - 1)) # continuous at Cauchy


def test_theory_as_a_run(root, tmp_path):
    config = TheoryConfig(data="cauchy", ratios=(1., 2.))
    run = require(config, root=root)
    again = require(config, root=tmp_path)
    assert (run.folder/"result.json").read_bytes() == (again.folder/"result.json").read_bytes()
    frame, mean = theory_frame([run, require(TheoryConfig(), root=root)]), synthetic_problem("cauchy", 1, sizes=(9, 9, 9)).mean.numpy()
    assert len(frame) == 2*2*3 + 4*2*3 and set(frame.data) == {"cauchy", "gaussian"}
    for r in frame[frame.data == "cauchy"].itertuples():
        eps = r.fraction*np.linalg.norm(mean, NORMS[r.norm])
        assert (r.majority, r.minority) == pytest.approx(pair(theory_row(mean, r.ratio, eps, r.norm, alpha=1.)), abs=1e-12)
    sentence(lambda: require(TheoryConfig(fractions=(1.,)), root=root), "degenerate point")
    sentence(lambda: require(TheoryConfig(data="caucy"), root=root), "did you mean `cauchy`")


def test_many_points_bring_the_exact_solution_to_theory():
    p = synthetic_problem("gaussian", 10., sizes=(16_000, 20, 20))
    accuracy = []
    for eps in (0., p.eps(.5)):
        s = solve_linear(*p.train, eps=eps)
        accuracy.append(population_accuracy(s.u, s.c, p.mean, sigma=3.))
    gap = float(accuracy[1][0] - accuracy[1][1] - accuracy[0][0] + accuracy[0][1])
    theory = theory_row(p.mean.numpy(), 10., p.eps(.5), "l2", sigma=3.)["gap_disparity"]
    assert .2 < theory < .25 and gap == pytest.approx(theory, abs=.03)


# ---- what a study asks for

@pytest.mark.parametrize(("wrong", "says"), [
    (dict(dataset="mnits"), "unknown dataset `mnits`: did you mean `mnist`"), (dict(dataset="gausian"), "did you mean `gaussian`"),
    (dict(protocol=("oficial",)), "did you mean `official`"), (dict(protocol=("exact", "x")), "unknown protocol `x`"),
    (dict(norm=("l1",)), "unknown norm `l1`"), (dict(model="vgg11"), "did you mean `vgg11_bn`"),
    (dict(profile="tiny"), "unknown profile `tiny`"),
    (dict(eps=(1.5,)), "eps is 1.5"), (dict(eps=(.5, 0.)), "eps is 0"), (dict(eps=(-.5,)), "eps is -0.5"),
    (dict(eps=(math.nan,)), "eps is nan"),
    (dict(eps=()), "`eps` is empty"), (dict(norm=()), "`norm` is empty"), (dict(protocol=()), "`protocol` is empty"),
    (dict(ratio=(.5,)), "ratio is 0.5"), (dict(ratio=(1., 0.)), "ratio is 0"),
    (dict(alpha=1.2), "go together"), (dict(dataset="stable"), "go together"), (dict(dataset="own"), "go together"),
    (dict(file="x.npz"), "go together"), (dict(dataset="gaussian", pair=(1, 7)), "give two numbers"),
    (dict(pair=(1, 2, 3)), "give two numbers"),
    (dict(dataset="gaussian", model="mlp"), "takes images")], ids=str)
def test_bad_parameters_are_one_sentence(wrong, says):
    sentence(lambda: check_study(DisparityParameters(**wrong)), says)


def test_good_parameters_pass():
    for good in (dict(), dict(dataset="cifar10"), dict(dataset="stable", alpha=1.2), dict(dataset="own", file="x.npz"), dict(pair=(3, 8)),
                 dict(model="mlp"), dict(ratio=(1., 100.))):
        check_study(DisparityParameters(**good))


@pytest.mark.parametrize("wrong", [dict(dataset="gaussian", ratio=()), dict(dataset="gaussian", data_seeds=()), dict(pair=(1, 1)),
                                   dict(dataset="stable", alpha=.8), dict(train_points=0),
                                   dict(dataset="gaussian", ratio=(1., 5000.))], ids=str)
def test_bad_parameters_fail_before_anything_is_computed(wrong):
    with pytest.raises(SadalibError):
        p = DisparityParameters(profile="smoke", **wrong)
        check_study(p)
        for config in trial_configs(p).values(): problem_of(config)


@pytest.mark.parametrize("profile", ["smoke", "small", "paper"])
@pytest.mark.parametrize("dataset", ["gaussian", "cauchy", "digits", "mnist"])
def test_how_many_trials(dataset, profile):
    p = DisparityParameters(dataset=dataset, profile=profile)
    row, configs = row_of(p), trial_configs(p)
    assert len(configs) == len({config_id(c) for c in configs.values()}) == 3*len(row["ratio"])*len(row["data_seeds"])
    for (protocol, select, ratio, draw), c in configs.items():
        assert (c.protocol, c.select, c.ratio, c.data_seed) == (protocol, select, ratio, draw) and select is None
        assert c.fractions == (0., .5, .75, 1.) and c.norms == ("l2", "linf") and c.data == dataset and c.sizes == row["sizes"]
        assert c.patience <= c.epochs and c.optimizer == ("sgd" if dataset == "mnist" and protocol != "exact" else "adam")
        assert (c.seeds, c.learning_rates) == (((), ()) if protocol == "exact" else (row["seeds"], row["learning_rates"]))
    if profile == "paper":
        assert row["epochs"] == 500 and len(row["learning_rates"]) == 8 and len(row["seeds"]) == 5 and row["sizes"][0] == 4000


def test_solutions_do_not_depend_on_how_others_train():
    usual = DisparityParameters(dataset="mnist", profile="smoke", protocol=("exact",))
    first = {k: config_id(c) for k, c in trial_configs(usual).items()}
    for more in (dict(epochs=3), dict(seeds=(1, 2, 3)), dict(learning_rates=(.3,)), dict(processes=2), dict(save=True),
                 dict(protocol=("official", "exact"))):
        again = {k: config_id(c) for k, c in trial_configs(replace(usual, **more)).items() if k[0] == "exact"}
        assert again == first, more
    trained = replace(usual, protocol=("official",))
    for more in (dict(epochs=3), dict(seeds=(1, 2, 3)), dict(learning_rates=(.3,))):
        other = {config_id(c) for c in trial_configs(replace(trained, **more)).values()}
        assert not {config_id(c) for c in trial_configs(trained).values()} & other
    assert set(trial_configs(usual, ("clean", "robust"))) == set(first) # a solution has no selection
    both_ways = trial_configs(replace(usual, protocol=("official", "corrected"), ratio=(2.,), data_seeds=(0,)), ("clean", "robust"))
    assert len({config_id(c) for c in both_ways.values()}) == 4


def test_explicit_values_reach_every_trial():
    p = DisparityParameters(dataset="gaussian", profile="smoke", ratio=(2., 3.), seeds=(7,), data_seeds=(4, 5, 6),
                           learning_rates=(.3,), epochs=4,
                            train_points=40, norm=("linf",), eps=(.25,), protocol=("official",))
    configs = trial_configs(p)
    assert set(configs) == {("official", None, r, s) for r in (2., 3.) for s in (4, 5, 6)}
    for c in configs.values():
        assert (c.seeds, c.learning_rates, c.epochs, c.patience, c.norms, c.fractions) == ((7,), (.3,), 4, 4, ("linf",), (0., .25))
        assert c.sizes[:2] == (40, 10)


def test_own_points_bring_their_file(tmp_path):
    path = mine(tmp_path/"mine.npz")
    p = DisparityParameters(dataset="own", file=str(path), profile="smoke")
    configs = trial_configs(p)
    assert all(c.sizes is None and c.checksum == own_file(path)["checksum"] for c in configs.values())
    assert theory_configs(p) == large_configs(p) == []
    sentence(lambda: trial_configs(replace(p, file=str(tmp_path/"none.npz"))), "does not exist")


def test_networks_of_a_study():
    p = DisparityParameters(dataset="cifar10", profile="smoke", norm=("l2", "linf"), eps=(.5, .75))
    assert model_of(p) == "mlp" and model_of(replace(p, model="vgg11_bn")) == "vgg11_bn" and model_of(DisparityParameters()) == "linear"
    configs = network_configs(p)
    assert len(configs) == len({config_id(c) for c in configs.values()}) == 2*2*1*5*2 # protocols, ratios, draws, adversaries, seeds
    for (protocol, ratio, draw, norm, f, seed), c in configs.items():
        assert (c.protocol, c.ratio, c.data_seed, c.norm, c.fraction, c.seed) == (protocol, ratio, draw, norm, f, seed)
        assert c.against == (() if f else ("l2:0.5", "l2:0.75", "linf:0.5", "linf:0.75")) and c.patience <= c.epochs == 2
    assert network_configs(replace(p, protocol=("official", "exact"))).keys() == {k: 0 for k in configs if k[0] == "official"}.keys()
    sentence(lambda: network_configs(replace(p, protocol=("exact",))), "no exact solution")
    given = network_configs(replace(p, learning_rates=(.3,), epochs=1, seeds=(9,), ratio=(2.,), data_seeds=(3,), model="vgg11_bn"))
    assert {(c.learning_rates, c.epochs, c.patience, c.seed, c.ratio, c.data_seed, c.model) for c in given.values()} == {
        ((.3,), 1, 1, 9, 2., 3, "vgg11_bn")}


def test_theory_and_large_samples_of_a_study():
    p = DisparityParameters(dataset="cauchy", profile="small", ratio=(1., 5.), norm=("l2",))
    (theory,), large = theory_configs(p), large_configs(p)
    assert (theory.data, theory.ratios, theory.norms, theory.fractions) == ("cauchy", (1., 5.), ("l2",), (0., .5, .75)) # 1 is degenerate
    assert [(c.protocol, c.ratio, c.sizes[0], c.data_seed) for c in large] == [("exact", 1., 64000, 0), ("exact", 5., 64000, 0)]
    for p in map(DisparityParameters, ("digits", "cifar10")): assert theory_configs(p) == large_configs(p) == []
    assert theory_configs(DisparityParameters(dataset="stable", alpha=1.2))[0].alpha == 1.2


# ---- claims

def claimed(law, sign, noise=.01, draws=5, ratios=(1., 2., 5., 10.)):
    "Invented frames: what robust training takes or adds has `sign`, and grows with R for Gaussian noise, falls for Cauchy"
    out, draw = [], np.random.default_rng(len(law))
    for seed, ratio in itertools.product(range(draws), ratios):
        for norm, f in (("l2", 0.), ("l2", .5), ("l2", .75), ("linf", .5), ("linf", .75), ("l2", 1.)):
            bump = draw.normal()*noise if f else 0.
            change = sign*f*(.1 + (.01 if law == "gaussian" else -.005)*ratio) + bump
            out.append({"data": law, "protocol": "exact", "ratio": ratio, "data_seed": seed, "seed": None, "norm": norm, "fraction": f,
                        "disparity": 0., "overall": 0., "majority_population": .8 - change/4, "minority_population": .8 - change*5/4})
    return pd.DataFrame(out)


def told(*frames):
    gaps = pd.concat([gap_frame(f) for f in frames], ignore_index=True)
    intervals = abstract_intervals(gaps, pd.concat(frames, ignore_index=True))
    return intervals, {c.claim: c for c in abstract_claims(intervals, tuple("0123456789ab" for _ in range(1)), "small", 3)}


def all_laws(sign, **how): return [claimed(law, sign, **how) for law in ("gaussian", "cauchy", "holtsmark")]


def test_claims_can_be_confirmed_and_can_fail():
    intervals, claims = told(*all_laws(1))
    assert len(claims) == 4 and {c.verdict for c in claims.values()} == {"confirmed"}
    assert intervals.low.min() > 0 and set(intervals.draws) == {5}
    lower = intervals[intervals.claim.str.contains("both classes")]
    assert len(lower) == 4*2 and lower.what.str.contains("minority").sum() == 4 # norms and strengths below 1, both classes
    _, claims = told(*all_laws(-1))
    assert {c.verdict for c in claims.values()} == {"not"} and all(c.seeds == 5 for c in claims.values())
    _, claims = told(*all_laws(1, noise=3.))
    assert {c.verdict for c in claims.values()} <= {"not", "partly"}
    mixed = claimed("gaussian", 1), claimed("cauchy", -1), claimed("holtsmark", 1)
    _, claims = told(*mixed)
    verdicts = [c.verdict for c in claims.values()]
    assert verdicts == ["confirmed", "confirmed", "partly", "partly"] and claims[FOURTH].verdict == "partly"
    assert all("intervals above 0" in c.value and c.expected == "above 0" for c in claims.values())
    assert {c.notebook for c in claims.values()} == {"10c_disparity_compare"}


def test_claims_rest_on_solutions_below_the_degenerate_point_alone():
    frames = all_laws(1)
    harmful = [f.assign(protocol="official") for f in all_laws(-1)]
    wild = [f.assign(minority_population=f.minority_population.where(f.fraction < 1, 7.)) for f in frames]
    assert told(*frames, *harmful)[0].equals(told(*frames)[0]) and told(*wild)[0].equals(told(*frames)[0])


def test_one_draw_confirms_nothing():
    _, claims = told(*all_laws(1, draws=1, noise=0.))
    assert {c.verdict for c in claims.values()} == {"not"}


def test_the_networks_claim():
    def gaps(sign, draws=3, standard=.99):
        return pd.DataFrame([{"data": "cifar10", "protocol": p, "ratio": r, "data_seed": d, "norm": n, "fraction": .5,
                              "gap_disparity": v + .01*d, "overall_standard": standard}
                             for d, n in itertools.product(range(draws), NORMS) for p, r, v in (
                                 ("corrected", 10., sign*.2), ("corrected", 2., .2), ("corrected", 1., -9.), ("official", 10., -9.))])
    run = ("0123456789ab",)
    found = network_claim(gaps(1), run, "small")
    assert found.verdict == "confirmed" and found.seeds == 3 and "4 of 4" in found.value # R = 1 and the released code left out
    assert network_claim(gaps(-1), run, "small").verdict == "partly" and network_claim(gaps(1, draws=1), run, "small").verdict == "not"
    none = network_claim(gaps(1).assign(data="digits"), (), "small")
    assert none.verdict == "not attempted at this scale" and none.value is None and none.claim == NETWORKS
    assert "10_disparity_train" in none.reason
    constant = gaps(1)
    constant = constant.assign(overall_standard=constant.ratio/(1 + constant.ratio)) # all to the majority
    assert network_claim(constant, run, "small").verdict == "not attempted at this scale"


def test_what_is_compared(monkeypatch, tmp_path):
    monkeypatch.setenv("SADALIB_DATA", str(tmp_path))
    assert compared(CompareParameters(profile="smoke")) == (["gaussian", "cauchy", "holtsmark", "digits"], [])
    assert compared(CompareParameters(profile="small")) == (["gaussian", "cauchy", "holtsmark"], ["mnist", "fashion_mnist", "cifar10"])
    assert compared(CompareParameters(datasets=("digits", "cauchy"))) == (["digits", "cauchy"], [])
    sentence(lambda: compared(CompareParameters(datasets=("gaussian", "mnist"))), "sadalib data prepare mnist")
    for bad in (0., 1., 1.5, -1., math.nan): sentence(lambda bad=bad: compared(CompareParameters(eps=(.5, bad))), f"eps is {bad:g}")
    sentence(lambda: compared(CompareParameters(profile="huge")), "unknown profile `huge`")


# ---- points of your own

def points(many, few, d=3, seed=0):
    "Points that name themselves in their first coordinate; labels 5 (rare) and 9"
    y = np.r_[np.full(many, 9), np.full(few, 5)]
    x = np.random.default_rng(seed).normal(size=(many + few, d)) + (y == 9)[:, None]*[2.]*d
    x[:, 0] = np.arange(many + few)
    return x, y


@pytest.mark.parametrize("ratio", [1, 1.5, 2, 3, 4, 5, 10])
@pytest.mark.parametrize("counts", [(400, 100), (1000, 137), (300, 300)])
def test_own_points_keep_the_ratio_in_disjoint_splits(ratio, counts):
    x, y = points(*counts)
    p = array_problem(x, y, ratio, seed=3)
    for part, r in ((p.train, ratio), (p.valid, ratio), (p.test, ratio), (p.balanced, 1)):
        n, m = part.counts
        assert m == round(n/r) and abs(n/r - m) <= .5 and m >= 2 and part.y[:n].sum() == 0 # as exact as whole points can be
        labels = y[part.x[:, 0].long()]
        often, rare = (9, 5) if counts[0] > counts[1] else (5, 9) # of equally frequent ones the lower label
        assert (labels[:n] == often).all() and (labels[n:] == rare).all()
    train, valid, test, balanced = ({int(v) for v in part.x[:, 0]} for part in (p.train, p.valid, p.test, p.balanced))
    assert not train & valid and not train & (test | balanced) and not valid & (test | balanced)
    assert len(train) == len(p.train) and p.train.x.dtype == torch.float64
    share = p.train.counts[0]/(p.train.counts[0] + p.valid.counts[0] + p.test.counts[0])
    assert .5 < share < .7 and p.ratio == ratio


def test_own_points_share_their_scale_over_ratios_and_differ_over_seeds():
    x, y = points(500, 120)
    a, b, c = (array_problem(x, y, r, seed=s) for r, s in ((1, 0), (4, 0), (4, 1)))
    assert torch.equal(a.mean, b.mean) and a.eps(.5) == b.eps(.5) and not torch.equal(b.mean, c.mean)
    assert torch.equal(a.balanced.x, b.balanced.x) and torch.equal(array_problem(x, y, 4).train.x, b.train.x)
    n = a.train.counts[0]
    assert torch.equal(a.train.x[:n], b.train.x[:n]) # smaller majorities are parts of larger ones


def test_the_order_of_own_points_and_the_names_of_their_labels_change_nothing_essential():
    x, y = points(800, 200)
    x[:, 0] = x[:, 1]
    order = np.random.default_rng(1).permutation(len(x))
    p, q = array_problem(x, y, 3), array_problem(x[order], y[order], 3)
    for part in ("train", "valid", "test", "balanced"): assert getattr(p, part).counts == getattr(q, part).counts
    torch.testing.assert_close(p.mean, q.mean, rtol=0, atol=.25)
    assert p.mean.sign().tolist() == q.mean.sign().tolist() == [-1.]*3 # from the majority to the minority
    accuracy = [linear_accuracy(s.u, s.c, *r.balanced) for r in (p, q) for s in (solve_linear(*r.train),)]
    torch.testing.assert_close(*accuracy, rtol=0, atol=.15)
    for names in ((y == 5).astype(int), (y == 9).astype(float), torch.from_numpy(y), (y == 9)):
        assert torch.equal(array_problem(x, names, 3).train.x, p.train.x)
    before = x.copy()
    array_problem(x, y, 3).train.x.add_(1)
    assert np.array_equal(before, x)


@pytest.mark.parametrize(("counts", "ratio", "says"), [
    ((20, 7), 1, "at least 8"), ((400, 8), 300, "at least two"), ((20, 20), 30, "at least two"), ((40, 40), .5, "from 1 on"),
    ((40, 40), math.nan, "from 1 on")], ids=str)
def test_too_few_points_are_one_sentence(counts, ratio, says):
    sentence(lambda: array_problem(*points(*counts), ratio), says)


def test_what_suffices_for_eight_points_suffices_for_more():
    for n in range(8, 40): array_problem(*points(n, n), 1)


# ---- figures

BAD = .777 # the degenerate points' value


def invented(data=("gaussian",), protocols=("exact",), draws=(0, 1, 2), norms=("l2", "linf"), ratios=(1., 2., 10.)):
    out = []
    for d, p, n, f, r, s in itertools.product(data, protocols, norms, (.5, .75, 1.), ratios, draws):
        value = BAD if f == 1 else .02*f*r + .001*s
        out.append({"data": d, "protocol": p, "norm": n, "fraction": f, "ratio": r, "data_seed": s, "seed": -1, "gap_disparity": value,
                    "gap_accuracy": value, "majority": value, "minority": value, "majority_robust": value, "minority_robust": value,
                    "degenerate": f == 1})
    return pd.DataFrame(out)


@pytest.fixture(scope="module")
def theory(root):
    return theory_frame([require(TheoryConfig(data=d, ratios=(1., 2., 10.)), root=root) for d in ("gaussian", "cauchy", "holtsmark")])


WIDE = dict(data=("gaussian", "cauchy", "digits"), protocols=("official", "corrected", "exact", LARGE))
SHAPES = {"one": dict(), "one draw": dict(draws=(0,)), "one norm": dict(norms=("linf",)), "one ratio": dict(ratios=(10.,)), "several": WIDE,
          "several, one draw": {**WIDE, "draws": (0,)}}


def lines(figure): return [(axis, line) for axis in figure.axes for line in axis.lines]


def drawn(line): return np.concatenate([np.asarray(v, dtype=float).ravel() for v in line.get_data()])


def assert_degenerate_points_are_no_line(figure, crosses):
    "`crosses`: whether they are shown at all, as markers"
    hits = [line for _, line in lines(figure) if np.isclose(drawn(line), BAD).any()]
    assert bool(hits) == crosses
    for line in hits: assert line.get_linestyle() in ("None", "none", "") and line.get_marker() == "x" and line.get_color() == "gray"
    for axis in figure.axes:
        for bars in axis.collections: assert not any(np.isclose(path.vertices[:, 1], BAD).any() for path in bars.get_paths())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value", ["gap_disparity", "gap_accuracy"])
def test_gaps_are_drawn(shape, value, theory):
    gaps = invented(**SHAPES[shape])
    for beside in (None, theory):
        figure = plot_gaps(gaps, value, beside)
        sets, norms = gaps.data.nunique(), gaps.norm.nunique()
        assert isinstance(figure, Figure) and len(figure.axes) == sets*norms
        assert_degenerate_points_are_no_line(figure, crosses=True)
        figure.canvas.draw()
    title = figure.axes[0].get_title()
    assert title == f"gaussian, {gaps.norm.iloc[0]}"
    known = theory[(theory.data == "gaussian") & (theory.norm == gaps.norm.iloc[0]) & (theory.fraction == .5)].sort_values("ratio")[value]
    assert any(len(line.get_ydata()) == 3 and np.allclose(line.get_ydata(), known) for line in figure.axes[0].lines)


@pytest.mark.parametrize("shape", SHAPES)
def test_classes_and_protocols_are_drawn(shape, theory):
    gaps = invented(**{**SHAPES[shape], "data": ("gaussian",)})
    known = theory[theory.data == "gaussian"]
    for figure in (plot_classes(gaps), plot_classes(gaps, known), plot_classes(gaps, classes=("majority_robust", "minority_robust")),
                   plot_protocols(gaps), plot_protocols(gaps, known)):
        assert isinstance(figure, Figure)
        assert_degenerate_points_are_no_line(figure, crosses=False)
        figure.canvas.draw()
    assert len(figure.axes) == gaps.ratio.nunique()
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert labels == [f"{n}, {f:g} ||mu||" for n in gaps.norm.unique() for f in (.5, .75)]


def test_parts_and_tails_are_drawn(theory):
    for some in (theory[theory.data == "gaussian"], theory[(theory.data == "cauchy") & (theory.norm == "l2")]):
        figure = plot_parts(some)
        assert len(figure.axes) == len(some[some.fraction > 0].drop_duplicates(["norm", "fraction"]))
        row = some[(some.ratio == 10) & (some.fraction == .75)].iloc[0]
        panel = [a for a in figure.axes if a.get_title() == f"{row.norm}, eps = 0.75 ||mu||"][0]
        heights = [bar.get_height() for bar in panel.patches]
        assert len(heights) == 12 and all(any(math.isclose(v, h, abs_tol=1e-12) for h in heights) for v in (*row.inherent, *row.imbalance))
    for some in (theory[theory.data == "cauchy"], theory):
        for gaps in (None, invented(("gaussian",)), invented(**WIDE), invented(**WIDE, draws=(0,))):
            figure = plot_tails(some, gaps)
            assert isinstance(figure, Figure) and len(figure.axes) == some.data.nunique()*4
            assert_degenerate_points_are_no_line(figure, crosses=False)
    figure.canvas.draw()


def test_means_over_draws_average_the_seeds_of_a_draw_first():
    frame = rows(fraction=[.5]*4, data_seed=[0, 0, 0, 1], seed=[2, 22, 42, 2], gap=[.1, .2, .3, .6])
    found = over_draws(frame, "gap").iloc[0]
    assert found["mean"] == pytest.approx(.4) and found.draws == 2 and found.error == pytest.approx(.2)
    assert (found.low, found.high) == pytest.approx((.4 - 12.7062*.2, .4 + 12.7062*.2), abs=1e-4) # Student's t, one degree of freedom
    alone = over_draws(frame[:3], "gap").iloc[0]
    assert alone["mean"] == pytest.approx(.2) and math.isnan(alone.low) and math.isnan(alone.error)


# ---- notebooks

def code_cells(name):
    cells = json.loads((ROOT/"nbs"/f"{name}.ipynb").read_text(encoding="utf8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


def begin(name, **given):
    "Run a notebook to the cell that checks its parameters, as papermill would with `given`"
    imports, parameters, check = code_cells(name)[:3]
    assert "check_study(" in check
    names: dict = {}
    for text in (imports, parameters, "\n".join(f"{k} = {v!r}" for k, v in given.items()), check):
        exec(compile("\n".join(line for line in text.splitlines() if not line.startswith("%")), name, "exec"), names)
    return names


WRONG = [("dataset", "mnits", "did you mean `mnist`"), ("eps", 1.5, "eps is 1.5"), ("eps", "0.5,x", "comma-separated list"),
         ("ratio", .5, "ratio is 0.5"),
         ("protocol", "oficial", "did you mean `official`"), ("protocl", "exact", "did you mean `protocol`"),
         ("norm", "l3", "unknown norm `l3`"),
         ("alpha", 1.2, "go together"), ("file", "none.npz", "go together"), ("model", "mpl", "did you mean `mlp`"),
         ("pair", "1,2,3", "two numbers"),
         ("profile", "smal", "did you mean `small`"), ("epochs", 2.5, "whole number"), ("save", "yes", "True or False")]


@pytest.mark.parametrize(("name", "value", "says"), WRONG)
def test_the_notebook_refuses_before_it_computes(name, value, says, tmp_path, monkeypatch):
    monkeypatch.setenv("SADALIB_RUNS", str(tmp_path/"runs"))
    monkeypatch.setenv("IN_TEST", "1")
    sentence(lambda: begin("10_disparity_train", **{name: value}), says)
    assert not (tmp_path/"runs").exists()


@pytest.mark.parametrize(("notebook", "name", "value", "says"), [
    ("10a_disparity_protocols", "dataset", "digits", "no theory"), ("10a_disparity_protocols", "eps", 1.5, "eps is 1.5"),
    ("10b_disparity_tails", "ratio", .5, "ratio is 0.5"), ("10b_disparity_tails", "protocol", "oficial", "did you mean `official`"),
    ("10c_disparity_compare", "datasets", "mnits", "did you mean `mnist`"), ("10c_disparity_compare", "eps", 1, "1 is degenerate"),
    ("10c_disparity_compare", "dataset", "cauchy", "did you mean `datasets`"),
    ("10a_disparity_protocols", "protocol", "exact", "unknown parameter `protocol`"),
    ("10b_disparity_tails", "dataset", "cauchy", "unknown parameter `dataset`")])
def test_the_other_notebooks_refuse_before_they_compute(notebook, name, value, says, tmp_path, monkeypatch):
    monkeypatch.setenv("SADALIB_RUNS", str(tmp_path/"runs"))
    monkeypatch.setenv("IN_TEST", "1")
    sentence(lambda: begin(notebook, **{name: value}), says)
    assert not (tmp_path/"runs").exists()


@pytest.mark.parametrize(("name", "kind"), [("10_disparity_train", DisparityParameters), ("10a_disparity_protocols", DisparityParameters),
                                            ("10b_disparity_tails", DisparityParameters), ("10c_disparity_compare", CompareParameters)])
def test_every_parameter_of_a_notebook_is_one_of_its_study(name, kind):
    names: dict = {}
    params = Parameters(names)
    exec(code_cells(name)[1], names)
    known = {f.name for f in dataclasses.fields(kind)}
    given = {k for k in names if not k.startswith("__")}
    assert given <= known and {"profile", "save", "force", "processes", "eps"} <= given
    if name == "10_disparity_train": assert given == known and params.build(kind) == kind() # the same defaults in both places


def papermill(folder, notebook, **parameters):
    "Plain papermill from another folder, with the CPU seconds that it took"
    words = [sys.executable, "-m", "papermill", str(ROOT/"nbs"/f"{notebook}.ipynb"), str(folder/"out.ipynb"), "--no-progress-bar"]
    for name, value in parameters.items(): words += ["-p", name, str(value)]
    env = {**os.environ, "SADALIB_RUNS": str(folder/"runs"), "IN_TEST": "1", "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=env, timeout=170)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_plain_papermill_on_points_of_your_own(tmp_path):
    done, _ = papermill(tmp_path, "10_disparity_train", dataset="own", file=mine(tmp_path/"mine.npz"), ratio=2, epochs=5, data_seeds="0,1")
    assert done.returncode == 0, done.stderr[-2000:]
    folders = list((tmp_path/"runs"/"disparity").glob("*/done"))
    assert len(folders) == 6 and not (tmp_path/"runs"/"theory").exists() # protocols and draws; no law, no theory
    cells = json.loads((tmp_path/"out.ipynb").read_text(encoding="utf8"))["cells"]
    pictures = [out for c in cells for out in c.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(pictures) == 4


def test_plain_papermill_refuses_a_typo_at_once(tmp_path):
    done, seconds = papermill(tmp_path, "10_disparity_train", protocl="exact")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0 and "unknown parameter `protocl`" in last and "did you mean `protocol" in last
    assert not (tmp_path/"runs").exists() and seconds < 15


def test_the_degenerate_strength_alone_is_refused():
    sentence(lambda: check_study(DisparityParameters(dataset="gaussian", eps=(1.,))), "degenerate point")
