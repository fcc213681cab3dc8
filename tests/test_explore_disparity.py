"The explorer of accuracy disparity without a browser: its answers against the closed forms, its views by program"
import base64
import itertools
import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from sadalib.disparity import (
    collapse_ratio,
    gaussian_accuracies,
    gaussian_split,
    ramp_mean,
    stable_accuracies,
    stable_margins,
    stable_pdf,
    stable_threshold,
)
from sadalib.explore_disparity import (
    LAWS,
    DisparityExplorer,
    disparity_at,
    disparity_told,
    disparity_verdict,
    law_name,
    stable_split,
)
from sadalib.runs import SadalibError

INF = math.inf


@pytest.fixture
def explorer():
    return DisparityExplorer(1., 5., .5, INF)


GRID = list(itertools.product((1., 2., 10., 100.), (0., .2, .5, .95), (2, INF), (.5, 3., 5.)))


@pytest.mark.parametrize(("ratio", "fraction", "norm", "distance"), GRID)
def test_gaussian_answers_are_the_closed_forms(ratio, fraction, norm, distance):
    a = disparity_at(2, ratio, fraction, norm, distance)
    assert a.standard == gaussian_accuracies(a.mean, math.sqrt(2), ratio)
    assert a.robust == gaussian_accuracies(a.mean, math.sqrt(2), ratio, a.eps, norm)
    assert a.split == gaussian_split(a.mean, math.sqrt(2), ratio, a.eps, norm)
    assert a.margins[0] == pytest.approx(distance) and a.collapse == (INF, INF) and a.collapsed == (False, False)
    stable = stable_margins(a.mean, 2., a.eps, norm)  # the stable family ends in N(0, 2)
    assert (a.margins[1], a.robust_margin) == pytest.approx(stable, abs=1e-6)
    assert a.robust == pytest.approx(stable_accuracies(a.margins[1], ratio, 2., robust=a.robust_margin), abs=1e-12)


@pytest.mark.parametrize("alpha", [.5, .8, 1., 1.05, 1.5, 1.9])
@pytest.mark.parametrize(("ratio", "fraction", "norm", "distance"), GRID[::5])
def test_stable_answers_are_the_closed_forms(alpha, ratio, fraction, norm, distance):
    if alpha < 1 and norm == 2:
        norm = INF
    a = disparity_at(alpha, ratio, fraction, norm, distance)
    assert np.allclose(a.mean, ramp_mean(10).numpy() * a.mean[-1] / float(ramp_mean(10)[-1]))
    assert a.eps == pytest.approx(fraction * np.linalg.norm(a.mean, norm))
    assert a.margins[0] == pytest.approx(stable_margins(a.mean, alpha)[0]) == distance
    robust = stable_margins(a.mean, alpha, a.eps, norm)
    assert (a.margins[1], a.robust_margin) == pytest.approx(robust, abs=1e-8 if alpha > 1.1 else 1e-6)
    assert a.standard == stable_accuracies(a.margins[0], ratio, alpha)
    assert a.robust == stable_accuracies(a.margins[1], ratio, alpha, robust=a.robust_margin)
    pair = a.margins[0], a.robust_margin
    assert a.collapse == tuple(collapse_ratio(m, alpha) for m in pair)
    assert a.thresholds == tuple(stable_threshold(m, ratio, alpha) for m in pair)
    assert a.collapsed == tuple(ratio >= c for c in a.collapse)


@pytest.mark.parametrize("asked", [*itertools.product((.7, 1., 1.3, 1.5, 2.), (1., 3., 30.), (0., .4, .9))], ids=str)
def test_the_split_sums_to_the_change(asked):
    a = disparity_at(*asked, INF)
    for k in (0, 1):
        assert a.split.inherent[k] + a.split.imbalance[k] == pytest.approx(a.split.total[k], abs=1e-12)
        assert a.split.total[k] == pytest.approx(a.robust[k] - a.standard[k], abs=1e-12)
    assert a.gap == pytest.approx(a.split.disparity[2], abs=1e-12)
    if asked[2] == 0:
        assert a.split.total == (0, 0) and a.standard == a.robust
    if asked[1] == 1:
        assert a.split.imbalance == pytest.approx((0, 0), abs=1e-12) and a.gap == pytest.approx(0, abs=1e-12)


def test_the_two_splits_agree_where_both_laws_are_one():
    a = disparity_at(2, 7, .6, INF)
    assert np.allclose(stable_split(a.margins, a.thresholds, 2.), a.split, atol=1e-12)


def test_a_split_through_collapse():
    split = stable_split((3., 2.5), (1., INF), 1.)
    before = .5 + math.atan(2) / math.pi
    assert split.total[1] == pytest.approx(-before) and split.inherent[1] < 0 and split.imbalance[0] > 0
    assert stable_split((3., 2.5), (INF, INF), 1.) == ((0, 0), (0, 0), (0, 0))


@pytest.mark.parametrize("fraction", [0., .3, .7])
@pytest.mark.parametrize("norm", [2, INF])
def test_a_rarer_minority_fares_worse_under_gaussian_noise(fraction, norm):
    answers = [disparity_at(2, ratio, fraction, norm) for ratio in np.geomspace(1, 100, 25).tolist()]
    for pair in ("standard", "robust"):
        minority = [getattr(a, pair)[1] for a in answers]
        assert all(x > y for x, y in itertools.pairwise(minority))
    if fraction:
        assert all(a.gap > 0 for a in answers[1:])


def test_l2_costs_isotropic_gaussian_classes_nothing_inherent():
    assert disparity_at(2, 5, .6, 2).split.inherent == pytest.approx((0, 0), abs=1e-12)
    assert disparity_at(2, 5, .6, INF).split.inherent[1] < -.01


def test_the_gap_of_cauchy_noise_is_negative_until_collapse():
    found = {ratio: disparity_at(1, ratio, .5, INF, 3.) for ratio in (2, 5, 10, 20, 100)}
    assert [found[r].gap for r in found] == pytest.approx([-.013, -.035, .843, 0, 0], abs=6e-4)
    assert [found[r].collapsed for r in (5, 10, 20)] == [(False, False), (False, True), (True, True)]
    assert found[10].collapse[0] == pytest.approx(11.94, abs=.01)
    assert "shrinks" in disparity_verdict(found[5]) and "robust rule gives all" in disparity_verdict(found[10])
    assert "nothing changes" in disparity_verdict(found[20])


@pytest.mark.parametrize(("alpha", "distance", "fraction", "ratio", "gap"), [
    (2, 2, .25, 10, .104), (2, 2, .5, 5, .211), (2, 3, .5, 100, .370), (1.5, 2, .25, 5, .0296), (1.5, 3, .5, 5, .009),
    (1, 2, .25, 5, -.018), (1, 2, .5, 5, .852)])
def test_a_mean_of_one_coordinate_has_the_tabled_gaps(alpha, distance, fraction, ratio, gap):
    for norm in (2, INF):
        assert disparity_at(alpha, ratio, fraction, norm, distance, mean=[7.]).gap == pytest.approx(gap, abs=6e-4)


def test_the_robust_boundary_lies_where_the_moved_classes_cross():
    for asked in ((2, 10, .5, INF), (1.5, 5, .3, 2), (1, 4, .5, INF)):
        a = disparity_at(*asked)
        low, high = (stable_pdf(a.thresholds[1] + k * a.robust_margin, a.alpha) for k in (1, -1))
        assert a.ratio * low == pytest.approx(high, rel=1e-6)


def test_only_the_shape_of_a_mean_counts():
    mean = np.array([1., -2., 0., .5])
    answers = [disparity_at(1.5, 3, .4, 2, mean=m) for m in (mean, 40 * mean, torch.tensor(mean), mean.tolist())]
    assert len({a.robust for a in answers}) <= 2 and len({a.mean for a in answers}) <= 2
    assert answers[0].robust == pytest.approx(answers[1].robust, abs=1e-12)


@pytest.mark.parametrize(("asked", "words"), [
    ({"alpha": 0}, "alpha is 0"), ({"alpha": 2.1}, "alpha is 2.1"), ({"alpha": "x"}, "alpha is 'x'"),
    ({"ratio": .9}, "ratio is 0.9"), ({"ratio": INF}, "ratio is inf"), ({"norm": 1}, "norm is 1"),
    ({"norm": "inf"}, "norm is 'inf'"), ({"fraction": 1.}, "1 is the degenerate point"),
    ({"fraction": 1.5}, "degenerate"),
    ({"fraction": -.1}, "fraction is -0.1"), ({"fraction": math.nan}, "fraction is nan"),
    ({"fraction": None}, "fraction is None"), ({"distance": 0}, "distance is 0"), ({"distance": INF}, "distance is inf"),
    ({"distance": math.nan}, "distance is nan"), ({"alpha": .7, "norm": 2}, "no closed form"),
    ({"mean": [0., 0.]}, "mean is 0"), ({"mean": [[1.]]}, "shape"), ({"mean": [math.nan]}, "finite"),
    ({"alpha": .01, "norm": INF}, "overflows")], ids=str)
def test_refused_questions(asked, words):
    with pytest.raises(SadalibError, match=words) as failure:
        disparity_at(**asked)
    assert "\n" not in str(failure.value) and str(failure.value).count(". ") == 0


def test_without_an_adversary_a_heavy_tail_is_answered_for_l2_too():
    assert disparity_at(.7, 3, 0., 2).robust == disparity_at(.7, 3, 0., INF).standard


@pytest.mark.parametrize("alpha", [1.001, 1.01, 1.2, 1.999])
@pytest.mark.parametrize("fraction", [1e-6, .5, .999])
def test_the_l2_direction_is_the_most_robust_one(alpha, fraction):
    a = disparity_at(alpha, 2, fraction, 2)
    mean, best = np.array(a.mean), a.robust_margin
    assert best > 0
    for power in np.linspace(0, 30, 40):  # whatever other weights
        w = mean ** power
        assert best >= (w @ mean - a.eps * np.linalg.norm(w)) / (w ** alpha).sum() ** (1 / alpha) - 1e-9


MOVES = [("alpha", 1.5, "Holtsmark"), ("alpha", .75, "stable law, α = 0.75"), ("ratio", 2., "R = 2,"),
         ("fraction", .25, "ε = 0.25"), ("norm", 2., "‖μ‖₂"), ("distance", 2., "distance 2.0")]


@pytest.mark.parametrize(("name", "value", "words"), MOVES)
def test_views_follow_a_program(explorer, name, value, words):
    image = explorer.pane.widget.value
    explorer.controls[name].value = value
    asked = {"alpha": 1., "ratio": 5., "fraction": .5, "norm": INF, "distance": 3., name: value}
    expected = disparity_at(**asked)
    assert explorer.answer == expected and explorer.pane.widget.value == explorer.pane.png() != image
    assert words in explorer.text.value and disparity_told(expected) in explorer.text.value
    heights = [bar.get_height() for bar in explorer.picture.bars.bars]
    assert heights == pytest.approx([*expected.standard, *expected.robust])
    said = [text.get_text() for text in explorer.picture.bars.words]
    assert said == [f"disparity {d:.3f}" for d in expected.disparity]


def test_laws_have_buttons_and_the_slider_lies_between_them(explorer):
    for name, alpha in LAWS.items():
        explorer.law.value = name
        assert explorer.answer.alpha == alpha and name in explorer.text.value and law_name(alpha) == name
    explorer.controls["alpha"].value = 1.7
    assert explorer.law.value is None and explorer.answer.alpha == 1.7
    explorer.controls["alpha"].value = 1.
    assert explorer.law.value == "Cauchy"


def test_boundaries_are_drawn_where_they_are(explorer):
    a, picture = explorer.answer, explorer.picture
    assert list(picture.standard.boundary.get_xdata()) == pytest.approx([a.thresholds[0]] * 2)
    assert list(picture.robust.boundary.get_xdata()) == pytest.approx([a.thresholds[1]] * 2)
    assert list(picture.robust.other.get_xdata()) == pytest.approx([a.thresholds[0]] * 2)
    explorer.controls["ratio"].value = 50
    for panel in (picture.standard, picture.robust):
        assert len(panel.boundary.get_xdata()) == 0 and "all to the majority" in panel.note.get_text()
        assert panel.sides[1].get_width() == 0
    explorer.law.value = "Gaussian"
    explorer.controls["fraction"].value = .95
    assert "right of this picture" in picture.robust.note.get_text() and not picture.standard.note.get_text()


def test_where_no_closed_form_is_known_a_sentence_covers_the_picture(explorer):
    explorer.controls["alpha"].value = .7
    last = explorer.answer
    explorer.controls["norm"].value = 2.
    assert "no closed form" in explorer.text.value
    assert "no closed form" in explorer.picture.sentence.get_text().replace("\n", " ")
    assert explorer.picture.veil.get_visible() and explorer.answer == last and explorer.static().subfigs
    explorer.controls["fraction"].value = 0.
    assert not explorer.picture.veil.get_visible() and "without an adversary" in explorer.text.value
    explorer.controls["fraction"].value = .5
    assert explorer.picture.veil.get_visible()
    explorer.controls["norm"].value = INF
    assert not explorer.picture.veil.get_visible() and explorer.pane.widget.value == explorer.pane.png()


def test_extremes_of_the_knobs(explorer):
    knobs = explorer.controls
    ends = [(.5, 1., 2.), (1., 100.), (0., .95), (2., INF), (.5, 5.)]
    for values in itertools.product(*ends):
        for control, value in zip(knobs.values(), values, strict=True):
            control.value = value
        known = values[0] >= 1 or values[3] == INF or values[2] == 0
        assert known or "no closed form" in explorer.text.value
        assert not known or explorer.question() == pytest.approx(values)
        assert "nan" not in explorer.text.value and "Traceback" not in explorer.text.value


def test_an_explorer_opens_as_asked_and_refuses_nonsense():
    view = DisparityExplorer(1.5, 3., .2, 2, 2., mean=torch.ones(4))
    assert view.answer == disparity_at(1.5, 3., .2, 2, 2., mean=torch.ones(4)) and view.law.value == "Holtsmark"
    for bad in ({"fraction": 1.}, {"alpha": .7}, {"mean": [0.]}):
        with pytest.raises(SadalibError):
            DisparityExplorer(**bad)


def test_a_still_pane_shows_what_a_full_drawing_shows(explorer):
    from io import BytesIO

    from PIL import Image
    explorer.controls["ratio"].value = 3.
    fast, full = BytesIO(explorer.pane.widget.value), BytesIO()
    explorer.picture.figure.savefig(full, format="png")
    fast, full = (np.asarray(Image.open(x).convert("RGB"), dtype=float) for x in (fast, full))
    assert fast.shape == full.shape and (np.abs(fast - full).max(2) > 40).mean() < .002


def test_no_text_leaves_the_picture_or_lies_on_another():
    for asked in ((2, 10, .5, 2), (2, 100, .95, INF, .5), (1.5, 99, .95, INF, 5.), (1, 5, .5, INF)):
        view = DisparityExplorer(*asked)
        view.pane.canvas.draw()
        renderer, figure = view.pane.canvas.get_renderer(), view.picture.figure
        texts = [t for t in figure.findobj(match=lambda x: hasattr(x, "get_text")) if t.get_text() and t.get_visible()]
        shown = [t for t in texts if t is not view.picture.sentence]
        boxes = [t.get_window_extent(renderer) for t in shown]
        for text, box in zip(shown, boxes, strict=True):
            inside = 0 <= box.x0 and box.x1 <= figure.bbox.width and 0 <= box.y0 and box.y1 <= figure.bbox.height
            assert inside, text.get_text()
        for (s, a), (t, b) in itertools.combinations(zip(shown, boxes, strict=True), 2):
            over = min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 2
            assert not over, (s.get_text(), t.get_text())


def test_pictures(explorer, monkeypatch):
    assert explorer.pane.png()[:8] == b"\x89PNG\r\n\x1a\n"
    monkeypatch.delenv("IN_TEST", raising=False)
    live = explorer._repr_mimebundle_()
    assert {"application/vnd.jupyter.widget-view+json", "image/png", "text/plain"} <= set(live)
    monkeypatch.setenv("IN_TEST", "1")
    still = explorer._repr_mimebundle_()
    assert set(still) == {"image/png", "text/plain"}
    assert base64.b64decode(still["image/png"])[:4] == b"\x89PNG" and len(still["image/png"]) < 60_000


def test_an_answer_takes_less_than_100_ms_of_processor_time(explorer):
    sweeps = [("alpha", np.arange(1.05, 2, .1)), ("norm", (2.,)), ("alpha", np.arange(1.1, 2, .1)),
              ("ratio", np.geomspace(1, 100, 12)), ("fraction", np.arange(.05, .95, .1)), ("norm", (INF,)),
              ("distance", np.arange(.6, 5, .4)), ("alpha", (1., .7, 1.5, 2.))]
    processor, wall = [], []
    for name, values in sweeps:
        for value in values:
            began, start = time.perf_counter(), time.process_time()
            explorer.controls[name].value = float(value)
            processor.append(time.process_time() - start)
            wall.append(time.perf_counter() - began)
    for name, times in (("processor", processor), ("wall clock", wall)):
        median, late = (1000 * sorted(times)[int(p * len(times))] for p in (.5, .95))
        print(f"\n{name}: median {median:.0f} ms, 95 % within {late:.0f} ms, {len(times)} answers", end="")
    assert sorted(processor)[len(processor) // 2] < .1


def test_importing_needs_no_widgets_and_drawing_no_pyplot():
    code = """if True:
        import sys, sadalib.explore_disparity as e
        heavy = {"matplotlib", "ipywidgets", "anywidget", "pandas", "PIL.Image", "scipy"} & set(sys.modules)
        assert not heavy, heavy
        view = e.DisparityExplorer()
        view.controls["ratio"].value = 3; view._repr_mimebundle_()
        assert "matplotlib.pyplot" not in sys.modules"""
    env = os.environ | {"IN_TEST": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
