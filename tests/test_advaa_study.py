"""The study of Adversarial AutoAugment: recipes, arms of equal budget, rules of the verdicts, collapse."""
import json
import math

import pandas as pd
import pytest
import torch

from sadalib.advaa import AdvAA, PolicyLog
from sadalib.advaa.collapse import COLLAPSES, CollapseConfig, collapse_claim, collapse_configs, collapse_frame
from sadalib.advaa.study import (
    ARMS,
    CONTROLS,
    CORRUPTED,
    LEARNED,
    MAIN_ARMS,
    PAIRS,
    PAPER,
    SEEDS,
    AdvaaParameters,
    CompareParameters,
    advaa_claims,
    advaa_config,
    advaa_frame,
    arm_of,
    arms_of,
    as_registered,
    check_advaa,
    compare_configs,
    control_configs,
    copies_configs,
    corrupted,
    erm_of,
    final_entropy,
    log_of,
    one_of,
    pair_table,
    paper_claims,
    paper_hours,
    paper_rows,
    policy_frame,
    published,
    search_cost,
    settings,
)
from sadalib.models import NETWORKS
from sadalib.recipes import PROFILES
from sadalib.report import VERDICTS
from sadalib.runs import SadalibError, config_id, record, require
from sadalib.studies import passes
from sadalib.training import learning_rate

TINY = dict(profile="smoke", train_images=60, epochs=1, batch_size=20, corruption_images=5)


# --- recipes -----------------------------------------------------------------------------------------------------

def test_every_published_row_has_a_network_a_value_and_a_command():
    rows = paper_rows()
    assert len(rows) == len(PAPER) == len(published()) == 11 and set(rows.model) <= set(NETWORKS)
    assert all(f"-p dataset {r.data} -p model {r.model} -p profile paper" in r.command for r in rows.itertuples())
    assert rows.set_index(["data", "model"]).published.to_dict()["cifar10", "pyramidnet_272_shakedrop"] == 1.36
    assert (rows.hours > .5).all() and (rows.tolerance > 0).all()


def test_the_commands_train_what_they_say():
    for (data, model), recipe in PAPER.items():
        p = AdvaaParameters(dataset=data, model=model, profile="paper")
        config = advaa_config(p)
        assert config.recipe == recipe and config.model == model and config.method.copies == 8
        assert config.method.every is None and config.method.logit_bound is None and config.method.controller_lr == 3.5e-4
        assert config.size == (224 if data == "imagenet" else 32) and config.method.policy == "adversarial"
    assert PAPER["cifar10", "wrn_28_10"].lr == .1 and PAPER["cifar100", "pyramidnet_272_shakedrop"].epochs == 1200


def test_wide_networks_step_down_by_fifths():
    recipe = PAPER["cifar10", "wrn_28_10"]
    at = [learning_rate(recipe, epoch*10, 2000) for epoch in (0, 59, 60, 119, 120, 159, 160, 199)]
    assert at == pytest.approx([.1, .1, .02, .02, .004, .004, .0008, .0008])


def test_hours_follow_from_passes():
    assert paper_hours("cifar10", "wrn_28_10", 16) == pytest.approx(2*paper_hours("cifar10", "wrn_28_10"))
    assert paper_hours("imagenet", "resnet50") == pytest.approx(33, abs=1)


# --- arms --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("profile", PROFILES)
def test_arms_have_the_same_budget(profile):
    p = CompareParameters(dataset="cifar10", profile=profile, arms=tuple(ARMS))
    arms = {name: arm_of(p, name, seed=1) for name in ARMS}
    m = arms["adversarial"].method.copies
    for name, config in arms.items():
        spent = config.recipe.epochs*passes(config.method)
        whole = arms["adversarial"].recipe.epochs*3*m
        assert spent == (whole/m if name == "erm" else whole), name
        same = {k: getattr(config, k) for k in ("data", "model", "train_images", "seed", "size", "threads")}
        assert same == {k: getattr(arms["erm"], k) for k in same}
    assert arms["random"].method.every == arms["adversarial"].method.every == arms["replay"].method.every
    assert arms["replay"].method.replayed.seed == 101 and len({config_id(c) for c in arms.values()}) == len(ARMS)


def test_seed_0_is_not_in_the_study():
    assert 0 not in SEEDS["small"] + SEEDS["paper"] and len(SEEDS["small"]) == 3
    assert {seed for _, seed in compare_configs(CompareParameters(profile="small"))} == {1, 2, 3}


def test_main_arms_and_few_shots():
    assert arms_of(CompareParameters(dataset="cifar10", profile="small")) == MAIN_ARMS
    assert arms_of(CompareParameters(profile="small")) == tuple(ARMS)
    with pytest.raises(SadalibError, match="did you mean"): arms_of(CompareParameters(arms=("randm",)))


def test_the_ablation_shares_runs_with_the_comparison():
    p = CompareParameters(profile="small")
    copies, compare = copies_configs(p), compare_configs(p)
    assert config_id(copies["random", 4, 1]) == config_id(compare["random", 1])
    assert config_id(copies["adversarial", 4, 2]) == config_id(compare["adversarial", 2])
    controls = control_configs(p)
    assert len({config_id(c) for c in controls.values()}) == len(CONTROLS)
    assert config_id(controls["as compared", 1]) == config_id(compare["adversarial", 1])


@pytest.mark.parametrize("changes, words", [
    (dict(dataset="cifar"), "did you mean"), (dict(dataset="folder"), "unknown dataset"), (dict(dataset="digits/x"), "unknown dataset"),
    (dict(profile="smal"), "did you mean"), (dict(model="wrn"), "unknown model"), (dict(copies=0), "1 or more"),
    (dict(every=-1), "0 or more"), (dict(dataset="imagenet", profile="small"), "no `small` profile")])
def test_bad_parameters_are_one_sentence(changes, words):
    with pytest.raises(SadalibError, match=words): check_advaa(AdvaaParameters(**changes))


def test_explicit_values_win_over_the_profile():
    p = AdvaaParameters(dataset="svhn", profile="small", copies=3, every=0, logit_bound=0., cutout=4, lr=.3, epochs=2)
    config = advaa_config(p)
    assert (config.method.copies, config.method.every, config.method.logit_bound, config.method.cutout) == (3, None, None, 4)
    assert (config.recipe.lr, config.recipe.epochs, config.method.flip) == (.3, 2, False)
    assert advaa_config(AdvaaParameters(dataset="svhn", profile="small")).method.cutout == 20
    assert settings(AdvaaParameters(profile="small"))["every"] == 1


def test_settings_without_effect_do_not_split_runs():
    """A control is one run, whatever the adversary beside it is told"""
    plain = advaa_config(AdvaaParameters(profile="small", policy="random"))
    other = advaa_config(AdvaaParameters(profile="small", policy="random", entropy_weight=.1, controller_lr=.5, carry_state=True))
    assert config_id(plain) == config_id(other)
    assert config_id(erm_of(plain)) == config_id(erm_of(advaa_config(AdvaaParameters(profile="small", logit_bound=1.))))


# --- results -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    p = CompareParameters(**TINY, arms=("erm", "random", "adversarial"), seeds=(0, 1))
    runs = {key: require(c, root=root) for key, c in compare_configs(p).items()}
    robust = {key: require(corrupted(run.config, 5), root=root) for key, run in runs.items() if key[0] != "erm"}
    return p, runs, robust


def test_frame_holds_clean_and_corrupted_accuracy(finished):
    p, runs, robust = finished
    frame = advaa_frame(runs, robust)
    assert set(frame.columns) == {"arm", "seed", "data", "value", "n", "run"} and frame.value.between(0, 1).all()
    corrupt = frame[frame.data == CORRUPTED]
    assert len(corrupt) == 4
    key = ("random", 1)
    errors = [m["value"] for m in record(robust[key])["metrics"] if "corruption" in m]
    assert len(errors) == 75 and math.isclose(1 - sum(errors)/75, corrupt[(corrupt.arm == "random") & (corrupt.seed == 1)].value.item())
    paired = pair_table(p, frame)
    assert {"digits", CORRUPTED} <= set(paired.data) and ("adversarial", "random") in set(zip(paired.arm, paired.against, strict=True))


def test_policies_of_a_run_can_be_read(finished):
    _, runs, _ = finished
    log = log_of(runs["adversarial", 0])
    assert isinstance(log, PolicyLog) and log.curves["losses"].shape == (2, 2) and "entropy" in log.curves
    frame = policy_frame({"a": runs["adversarial", 0], "r": runs["random", 0]})
    assert len(frame) == 4 and frame[frame.name == "r"].entropy.isna().all() and frame.strength.between(0, 1).all()
    assert final_entropy([runs["adversarial", 0]]) == pytest.approx(50.75, abs=.2)
    with pytest.raises(SadalibError, match="no log of policies"): log_of(runs["erm", 0])


def rows(low=.5, high=2.):
    return pd.DataFrame([{"arm": a, "against": b, "data": d, "difference": (low + high)/2, "low": low, "high": high, "seeds": 3}
                         for pairs in PAIRS.values() for a, b in pairs for d in ("cifar10", CORRUPTED)])


def test_a_uniform_adversary_is_not_compared(finished):
    p, runs = CompareParameters(dataset="cifar10", profile="small"), tuple(finished[1].values())
    said = {c.claim: c for c in advaa_claims(p, rows(), LEARNED + 1, runs)}
    assert {c.verdict for c in said.values()} == {VERDICTS[-1]} and all("still uniform" in c.reason for c in said.values())
    assert {c.verdict for c in advaa_claims(p, rows(), LEARNED - 1, runs)} == {"confirmed"}
    assert {c.verdict for c in advaa_claims(p, rows(-3., -1.), 30., runs)} == {"not"}
    half = rows()
    half.loc[half.data == CORRUPTED, "low"] = -1.
    assert {c.verdict for c in advaa_claims(p, half, 30., runs)} == {"partly"}


def test_changed_parameters_claim_nothing():
    assert as_registered(CompareParameters(dataset="cifar10", processes=1, save=True))
    assert not as_registered(CompareParameters(epochs=3)) and not as_registered(CompareParameters(seeds=(1, 2, 3)))


def test_paper_claims_say_how_to_try_them():
    claims = paper_claims()
    assert all(c.verdict == VERDICTS[-1] and "papermill" in c.reason and "UNVERIFIED" in c.reason for c in claims)


def test_the_search_is_timed():
    found = search_cost(AdvaaParameters(profile="smoke"), times=1)
    assert set(found) == {"search", "step"} and min(found.values()) > 0


# --- collapse ----------------------------------------------------------------------------------------------------

def test_collapse_is_a_run_and_its_verdict_can_fail(tmp_path):
    run = require(CollapseConfig(updates=25), root=tmp_path)
    epochs = [m["epoch"] for m in record(run)["metrics"]]
    assert epochs == [0, 10, 20, 24] and json.loads((run.folder/"result.json").read_text())["seed"] == 0
    assert len(collapse_configs("small")) == 3*len(COLLAPSES)
    def ends(published, weight, bound):
        values = {"published settings": published, "entropy weight .1": weight, "logits within 1.5": bound}
        return pd.DataFrame([{"setting": n, "seed": 0, "epoch": 600, "entropy": v, "top_share": 0., "run": run.id}
                             for n, v in values.items()])
    verdicts = [collapse_claim(ends(*v), (run,), "small").verdict for v in ((12, 31, 37), (12, 29, 37), (21, 31, 37), (21, 29, 37))]
    assert verdicts == ["confirmed", "partly", "partly", "not"]
    assert len(collapse_frame({("published settings", 0): run})) == 4


@pytest.mark.parametrize("changes, low, high", [({}, 0, 20), ({"logit_bound": 1.5}, 30, 51)])
def test_published_search_collapses_and_bounded_logits_hold(changes, low, high):
    """Acceptance: synthetic reward, 600 updates"""
    from sadalib.advaa import toy_search
    record, _ = toy_search(600, noise=.02, **changes)
    assert low < record.rows[-1]["entropy"] < high


def test_methods_of_the_arms_can_be_told_apart():
    assert advaa_config(one_of(CompareParameters(profile="small"), policy="randaugment")).method == AdvAA(
        policy="randaugment", copies=4, padding=2, flip=False, cutout=8)
    assert torch.is_tensor(AdvAA(policy="random").search.draw())
