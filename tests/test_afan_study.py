"""A-FAN's recipes, arms, rules and pixel attacks."""
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
import yaml

from sadalib.afan.method import AFAN, LALFA
from sadalib.afan.study import (
    ABLATIONS,
    ARMS,
    MAIN,
    PAPER,
    PIXEL,
    SMALL,
    SMOKE,
    TASK_DATA,
    AfanParameters,
    CompareParameters,
    RobustConfig,
    ablation_configs,
    afan_claims,
    afan_config,
    afan_frame,
    afan_method,
    arms_of,
    as_registered,
    attacked_answers,
    check_afan,
    check_sites,
    class_frame,
    compare_configs,
    one_of,
    pair_table,
    paper_claims,
    paper_rows,
    plot_ablation,
    plot_robust,
    robust_configs,
    robust_frame,
    seeds_of,
    settings,
    size_frame,
)
from sadalib.baselines import ERM, PGDTraining
from sadalib.data import load
from sadalib.data.scenes import digit_scenes
from sadalib.models import create_model
from sadalib.recipes import PROFILES
from sadalib.runs import SadalibError, clone_root, config_id, record, require
from sadalib.scene_training import SceneConfig, create_scene_model
from sadalib.studies import paired_table
from sadalib.training import Recipe, TrainConfig, fit, predict

TASKS = tuple(TASK_DATA)


# --- recipes -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("profile", PROFILES)
def test_every_data_set_has_a_recipe_or_one_sentence(task, profile):
    for data in (*TASK_DATA[task], *(["folder/mine"] if task == "classification" else [])):
        p = AfanParameters(task=task, dataset=data, profile=profile)
        try: config = afan_config(p)
        except SadalibError as error:
            assert "profile" in str(error) and "\n" not in str(error)
            continue
        assert isinstance(config, TrainConfig if task == "classification" else SceneConfig) and config.data == data
        method = config.method if task == "classification" else config.method.inner
        assert isinstance(method, AFAN) and method.strengths == len(method.mix or "0"*method.strengths)


@pytest.mark.parametrize("row", [*SMOKE.values(), *SMALL.values()])
def test_the_sites_of_the_recipes_exist(row):
    task = "classification" if "decoder_site" not in row else "detection" if "fasterrcnn" in row["model"] else "segmentation"
    check_sites(afan_config(AfanParameters(task=task, model=row["model"], site=row["site"], decoder_site=row.get("decoder_site"),
                                           profile="smoke")))


def test_the_sites_of_the_published_recipes_exist():
    for name, row in PAPER.items():
        if "101" in row["model"] or name in ("voc2012/segmentation",): continue
        task = "classification" if "decoder_site" not in row else "detection" if "fasterrcnn" in row["model"] else "segmentation"
        config = afan_config(AfanParameters(task=task, model=row["model"], site=row["site"], decoder_site=row.get("decoder_site"),
                                            profile="smoke"))
        check_sites(replace(config, size=row.get("size") or 32) if task == "classification" else config)


def test_published_settings():
    row = settings(AfanParameters(dataset="cifar10", profile="paper"))
    assert (row["model"], row["site"], row["steps"], row["strengths"], row["gamma"], row["gamma_unit"]) == ("resnet56", "stage1", 5, 1,
                                                                                                            .5, "255ths")
    recipe = row["recipe"]
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.weight_decay, recipe.schedule) == (200, 128, .1, 5e-4, "tenths@25,75")
    row = settings(AfanParameters(task="detection", dataset="voc2007", profile="paper"))
    assert (row["gamma"], row["strengths"], row["mix"], row["rois"], row["recipe"].batch_size) == (1., 4, "0011", 128, 8)
    method = afan_method(AfanParameters(task="detection", dataset="voc2007", profile="paper", weights_of_terms="code"))
    assert sum(method.weights()) == pytest.approx(1.267, abs=1e-3) and method.decoder.part == "roi"
    assert settings(AfanParameters(task="detection", dataset="coco", profile="paper"))["gamma"] == .1


def test_adversarial_terms_weigh_as_much_as_the_clean_one_by_default():
    for task in TASKS:
        weights = afan_method(AfanParameters(task=task, profile="small")).weights()
        assert weights[0] == 1 and sum(weights[1:]) == pytest.approx(1)


def test_a_mask_survives_papermill_which_reads_it_as_a_number():
    for told, given in (("0011", 11), ("0001", 1), ("1100", 1100), ("0000", 0)):
        assert settings(AfanParameters(profile="small", strengths=4, mix=given))["mix"] == told
        assert afan_method(AfanParameters(profile="small", strengths=4, mix=given)) == afan_method(AfanParameters(profile="small",
                                                                                                                  strengths=4, mix=told))
    with pytest.raises(SadalibError, match="k=2"): afan_method(AfanParameters(profile="small", strengths=2, mix=111))


def test_explicit_values_win():
    p = AfanParameters(dataset="cifar10", profile="small", strengths=3, gamma=.7, epochs=2, lr=.01, train_images=77, site="stage3")
    row = settings(p)
    assert (row["strengths"], row["mix"], row["gamma"], row["recipe"].epochs, row["recipe"].lr, row["train_images"]) == (3, "001", .7, 2,
                                                                                                                         .01, 77)
    assert afan_method(p).site == "stage3"


# --- arms ------------------------------------------------------------------------------------------------------------

def test_arms_differ_in_one_thing():
    one = {arm: afan_method(AfanParameters(dataset="cifar10", profile="small", arm=arm)) for arm in ARMS}
    assert isinstance(one["plain"], ERM) and isinstance(one["pixel"], PGDTraining) and isinstance(one["l_alfa"], LALFA)
    assert replace(one["afan"], mix="") == one["features"] and replace(one["features"], direction="random") == one["noise"]
    assert one["pixel"].steps == one["afan"].steps and one["pixel"].mix == PIXEL["mix"] == .5
    configs = {arm: afan_config(AfanParameters(dataset="cifar10", profile="small", arm=arm)) for arm in ARMS}
    assert len({config_id(c) for c in configs.values()}) == len(ARMS)
    assert len({config_id(replace(c, method=None)) for c in configs.values()}) == 1


@pytest.mark.parametrize("p,word", [(AfanParameters(task="clasification"), "classification"), (AfanParameters(dataset="cifr10"), "cifar10"),
                                    (AfanParameters(dataset="camvid"), "no data set for classification"), (AfanParameters(arm="feature"),
                                                                                                           "features"),
                                    (AfanParameters(task="detection", dataset="cifar10"), "bccd"), (AfanParameters(model="resnet21"),
                                                                                                    "resnet2"),
                                    (AfanParameters(task="segmentation", model="resnet20"), "deeplab"), (AfanParameters(profile="tiny"),
                                                                                                         "profile"),
                                    (AfanParameters(task="detection", arm="pixel"), "classification"), (AfanParameters(strengths=0),
                                                                                                        "strengths"),
                                    (AfanParameters(epochs=-1), "epochs"), (AfanParameters(dataset="folder/"), "dataset"),
                                    (AfanParameters(dataset="imagenet", profile="small"), "profile")])
def test_wrong_parameters(p, word):
    with pytest.raises(SadalibError) as error: afan_config(p)
    assert word in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("p", [AfanParameters(site="stage7", profile="small"), AfanParameters(task="segmentation", site="encoder.layer9",
                                                                                              profile="smoke"),
                               AfanParameters(task="detection", decoder_site="roi_heads.box_haed", profile="smoke")])
def test_an_unknown_site_is_told_before_data_are_read(p):
    with pytest.raises(SadalibError, match="close are"): check_sites(afan_config(p))


def test_seeds_and_arms_of_the_comparisons():
    small = {"profile": "small"}
    assert arms_of(CompareParameters(**small)) == tuple(ARMS) and arms_of(CompareParameters(dataset="cifar10", **small)) == tuple(ARMS)[:-1]
    assert arms_of(CompareParameters(task="detection", dataset="bccd", **small)) == ("plain", "afan")
    assert [seeds_of(CompareParameters(task=t, dataset=d, **small)) for t, d in (("detection", "bccd"), ("segmentation",
                                                                                                         "camvid"))] == [(1,), (1, 2)]
    assert seeds_of(CompareParameters(dataset="cifar10", **small)) == (1, 2, 3)
    with pytest.raises(SadalibError, match="did you mean `noise`"): arms_of(CompareParameters(arms=("nois",)))


def test_ablations_change_one_setting_and_share_the_base():
    p = CompareParameters(profile="small")
    configs = ablation_configs(p)
    base = config_id(afan_config(one_of(p, seed=1)))
    same = [key[:2] for key, config in configs.items() if key[2] == 1 and config_id(config) == base]
    assert {what for what, _ in same} >= {"site", "strengths", "gamma", "steps", "mix", "batch statistics"}
    assert set(ABLATIONS) | {"plain"} == {what for what, _, _ in configs}
    for config in {config_id(c): c for c in configs.values()}.values(): check_sites(config)


# --- pixel attacks ---------------------------------------------------------------------------------------------------

def test_a_radius_of_zero_gives_the_clean_answers_and_attacks_hurt():
    data = load("digits", "train", limit=100)
    model = fit(create_model("tinynet", seed=0), data, ERM(), Recipe(epochs=20, batch_size=20, lr=.05, warmup=5),
                progress=False).model.eval()
    model.zero_grad()
    clean = attacked_answers(model, "classification", data, 0.)
    assert torch.equal(clean, predict(model, data).argmax(1))
    right = [(attacked_answers(model, "classification", data, eps, steps=3) == data.labels).double().mean() for eps in (0., 2/255, 16/255)]
    assert right[0] > .8 and right[2] < right[0]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("task,name", [("detection", "fasterrcnn_resnet18_light"), ("segmentation", "deeplabv3plus_mobilenet")])
def test_pixel_attacks_leave_the_network_and_the_random_state(task, name):
    data = digit_scenes("test", task, n=2)
    model = create_scene_model(task, name, 11, rois=8).eval()
    state, before = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    first, second = (attacked_answers(model, task, data, 4/255, steps=2) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state()) and not any(m.training for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and all(p.grad is None for p in model.parameters())
    if task == "segmentation": assert torch.equal(first, second) and first.shape == data.masks.shape
    else: assert all(torch.equal(a[k], b[k]) for a, b in zip(first, second, strict=True) for k in a)


def test_runs_frames_and_pictures(tmp_path):
    p = CompareParameters(profile="smoke", train_images=100, epochs=2, seeds=(0, 1), robust_images=10)
    configs = compare_configs(p)
    keys = [k for k in configs if k[0] in ("plain", "afan")]
    runs = {k: require(configs[k], root=tmp_path) for k in keys}
    robust = {k: require(replace(robust_configs(p)[k], steps=2), root=tmp_path) for k in keys}
    frame, left = afan_frame(p.task, runs), robust_frame(robust)
    assert set(frame.data) == {"digits", "digits_photo", "digits_fonts", "digits_hand"} and len(frame) == 16
    assert len(left) == 16 and set(left.eps) == {0., .5, 1., 2.}
    clean = left[left.eps == 0].set_index(["arm", "seed"]).value
    assert clean.between(0, 1).all() and record(robust["afan", 0])["metrics"][0]["n"] == 10
    assert size_frame({"a": runs["afan", 0]}).size_l2.notna().all() and size_frame({"a": runs["plain", 0]}).size_l2.isna().all()
    toy = pd.DataFrame([{"what": w, "setting": s, "seed": 0, "value": .5} for w in ("plain", "site") for s in "ab"])
    assert plot_robust(left).axes and plot_ablation(toy).axes
    assert len(pair_table(replace(p, arms=("plain", "afan")), frame)) == 4


def test_class_frames_leave_absent_classes_out(tmp_path):
    p = CompareParameters(task="segmentation", profile="smoke", train_images=4, epochs=1, batch_size=2, seeds=(0,))
    runs = {("plain", 0): require(replace(compare_configs(p)["plain", 0], test_images=2), root=tmp_path)}
    table = class_frame(runs)
    assert "background" in set(table["class"]) and len(table) <= 11
    assert set(afan_frame("segmentation", runs).data) == {"miou", "pixel_accuracy"}


# --- rules -----------------------------------------------------------------------------------------------------------

def judged(values, plain=.6, seeds=(1, 2, 3), task="classification", data="cifar10"):
    "Claims of toy accuracies: by arm, one a seed"
    p = CompareParameters(task=task, dataset=data, profile="small", arms=tuple(values), seeds=seeds)
    number = data if task == "classification" else MAIN[task]
    frame = pd.DataFrame([{"arm": arm, "seed": s, "data": number, "value": v, "n": 10, "run": "x"} for arm, vs in values.items()
                          for s, v in zip(seeds, vs, strict=True)])
    costs = pd.DataFrame([{"arm": ARMS["afan"], "over_plain": 2.}, {"arm": ARMS["pixel"], "over_plain": 3.}])
    claims = afan_claims(p, frame, pair_table(p, frame), costs, ("0"*12,))
    return {c.claim.split(" (")[0]: c for c in claims}


def test_verdicts_follow_the_intervals():
    up = judged({"plain": (.60, .61, .60), "noise": (.6, .6, .6), "features": (.62, .63, .62), "afan": (.65, .66, .65), "pixel": (.7, .71,
                                                                                                                                  .7)})
    assert up["Clean accuracy rises with A-FAN"].verdict == "confirmed" and up["Normalisation adds to augmentation"].verdict == "confirmed"
    assert up["A-FAN beats training on attacked pixels in clean accuracy"].verdict == "not"
    assert "the opposite" in up["A-FAN beats training on attacked pixels in clean accuracy"].value
    assert up["Attacking features is cheaper than attacking pixels"].verdict == "confirmed"
    wide = judged({"plain": (.60, .61, .60), "afan": (.5, .9, .6)})
    assert wide["Clean accuracy rises with A-FAN"].verdict == "not" and "undecided" in wide["Clean accuracy rises with A-FAN"].value


def test_one_seed_and_an_untrained_network_decide_nothing():
    one = judged({"plain": (.5,), "afan": (.9,)}, seeds=(1,), task="detection", data="bccd")["Clean ap50 rises with A-FAN"]
    assert one.verdict == "not attempted at this scale" and "one seed" in one.reason and "+40.00" in one.value
    low = judged({"plain": (.05, .05), "afan": (.2, .3)}, seeds=(1, 2), task="segmentation", data="camvid")["Clean miou rises with A-FAN"]
    assert low.verdict == "not attempted at this scale" and "not informative" in low.reason


def test_registered_means_nothing_was_changed():
    assert as_registered(CompareParameters(dataset="cifar10", profile="small", save=True, processes=2))
    for change in ({"gamma": .1}, {"seeds": (1,)}, {"arms": ("plain",)}, {"epochs": 3}, {"site": "stage1"}):
        assert not as_registered(CompareParameters(dataset="cifar10", profile="small", **change))


def test_published_rows_are_jobs_and_only_two_are_quoted():
    table = paper_rows()
    jobs = yaml.safe_load((clone_root()/"workflow"/"config.yaml").read_text())["profiles"]["paper"]
    there = {(j["parameters"]["task"], j["parameters"]["dataset"], j["parameters"]["model"]): j
             for j in jobs if j["notebook"] == "08_afan_train"}
    assert set(there) == set(zip(table.task, table.data, table.model, strict=True))
    for row in table.to_dict("records"):
        assert there[row["task"], row["data"], row["model"]]["gpu_hours"] == row["hours"]
        afan_config(AfanParameters(task=row["task"], dataset=row["data"], model=row["model"], profile="paper"))
    assert sorted(v for v in table.published if not math.isnan(v)) == [75.38, 94.82]
    assert all(c.verdict == "not attempted at this scale" and "UNVERIFIED" in c.reason for c in paper_claims())


def test_runs_of_one_comparison_are_paired():
    frame = pd.DataFrame([{"arm": a, "seed": s, "data": "d", "value": v + s/100} for a, v in (("x", .5), ("y", .4)) for s in (1, 2, 3)])
    row = paired_table(frame, "arm", [("x", "y")], "d").iloc[0]
    assert row.difference == pytest.approx(10.) and row.low == pytest.approx(10.)


def test_robust_configurations_follow_their_training():
    p = CompareParameters(dataset="cifar10", profile="small")
    assert len(robust_configs(p)) == 15 and robust_configs(replace(p, robust_images=0)) == {}
    assert all(isinstance(c, RobustConfig) and c.trained == compare_configs(p)[k] for k, c in robust_configs(p).items())
    check_afan(p)
