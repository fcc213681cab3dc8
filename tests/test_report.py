"Figures, tables and claims: byte-stable, whole or not at all, never without their runs, and nothing changed unnoticed"
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import matplotlib
import pandas as pd
import pytest

from sadalib import report
from sadalib.report import Claim, check_figures, panels, save_figure, save_table, style, write_claims
from sadalib.runs import Run, SadalibError, finish, open_run

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Toy:
    experiment: ClassVar[str] = "toy"
    seed: int = 0
    profile: str = "small"


def toy(folder, seed=0, profile="small", data="digits", value=.5):
    "A finished run"
    run = Run(Toy(seed, profile), folder)
    with open_run(run):
        finish(run, [{"metric": "accuracy", "value": value, "n": 10}], datasets={data: "0" * 64})
    return run


def draw(scale=1.):
    with style():
        fig, axes = panels(2)
        axes[0].plot([0, scale, 2])
        axes[1].imshow([[0, scale], [1, 2]])
    return fig


@pytest.fixture
def saved(tmp_path):
    "A function that saves the toy figure, with changes"
    runs = [toy(tmp_path / "runs", seed) for seed in (0, 1)]
    def save(name="fig", scale=1., **changes):
        given = {"data": pd.DataFrame({"x": [0, 1], "y": [scale, 2.]}), "runs": runs, "profile": "small",
                 "notebook": "n", "root": tmp_path / "figures", **changes}
        return save_figure(draw(scale), "sada", name, **given)
    save.runs, save.root, save.folder = runs, tmp_path / "figures", tmp_path
    return save


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_committed_figures_are_as_they_were_saved():
    assert check_figures(ROOT / "figures") == []


def test_the_same_figure_is_the_same_bytes_in_another_process(saved):
    saved()
    before = tree(saved.root)
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_report import *
runs = [Run(Toy(seed), {str(saved.folder / 'runs')!r}) for seed in (1, 0)]
frame = pd.DataFrame({{"x": [0, 1], "y": [1., 2.]}})
save_figure(draw(), "sada", "fig", data=frame, runs=runs, profile="small", notebook="n", root={str(saved.root)!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert tree(saved.root) == before


def test_drawing_leaves_figure_and_settings_alone(saved):
    before, fig = dict(matplotlib.rcParams), draw()
    texts = len(fig.texts)
    save_figure(fig, "sada", "x", data={"x": [1]}, runs=saved.runs, profile="small", notebook="n", root=saved.root)
    assert len(fig.texts) == texts and dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("profile, embedded, words", [
    ("smoke", False, "smoke profile"), ("small", False, "reduced run, not the published protocol"),
    ("small", True, "embedded digits"), ("paper", False, "")])
def test_what_is_not_the_published_protocol_says_so(tmp_path, profile, embedded, words):
    run = toy(tmp_path / "runs", profile=profile, data="digits" if embedded else "mnist/test")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        made = save_figure(draw(), "sada", "x", data={"x": [1]}, runs=[run], profile=profile, notebook="n", root=tmp_path)
    about = json.loads(made["json"].read_text())
    assert words in about["stamp"] and bool(words) == bool(about["stamp"])
    assert about["embedded"] is embedded
    assert ("smoke" in made["svg"].parts) == (profile == "smoke")
    drawn = "".join(made["svg"].read_text().split("<!--")[1:])
    assert (words[:20] in drawn) if words else ("profile" not in drawn)


@pytest.mark.parametrize("word", ["csv", "svg", "png", "json", "result", "claims", "page", "table"])
def test_one_changed_character_is_noticed(saved, word):
    made = saved()
    table = save_table({"a": [1.25]}, "sada", "tab", runs=saved.runs, profile="small", notebook="n", root=saved.root)
    claim = Claim("sada", "It is a half", "n", 2, 1., .5, "Table 1", .1, .5, "confirmed", runs=tuple(saved.runs))
    claims = write_claims("sada", [claim], saved.root)
    assert check_figures(saved.root) == []
    result = saved.root / "results" / f"{saved.runs[0].id}.json"
    file = {"result": result, "claims": claims["json"], "page": claims["md"], "table": table["md"], **made}[word]
    data = bytearray(file.read_bytes())
    place = max(i for i, b in enumerate(data) if chr(b).isdigit()) if word != "png" else len(data) - 1
    data[place] ^= 1
    file.write_bytes(data)
    assert check_figures(saved.root)


def test_missing_and_stray_files_are_noticed(saved):
    saved()
    (saved.root / "results" / f"{saved.runs[0].id}.json").unlink()
    (saved.root / "sada" / "hand_made.png").write_bytes(b"x")
    said = " ".join(check_figures(saved.root))
    assert "whose result is missing" in said and "hand_made.png has no provenance" in said


def test_a_result_made_again_elsewhere_changes_no_file(saved, tmp_path):
    saved()
    before = tree(saved.root)
    again = [toy(tmp_path / "elsewhere", seed) for seed in (0, 1)]
    env = again[0].folder / "env.json"
    env.write_text(json.dumps({**json.loads(env.read_text()), "seconds": 123., "chip": "another"}))
    saved(runs=again)
    assert tree(saved.root) == before


def test_another_result_of_a_run_is_noticed_by_figures_not_drawn_again(saved, tmp_path):
    saved("one"), saved("two")
    saved("one", runs=[toy(tmp_path / "elsewhere", 0, value=.6), saved.runs[1]])
    assert any("two was made from another result" in said for said in check_figures(saved.root))
    assert not any("one" in said for said in check_figures(saved.root))


def publish_and_die(folder, moment):
    "In a process of its own: save four new files, killed at the rename number `moment`"
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    seen, replace_file = [], os.replace

    def counted(*names):
        seen.append(names)
        if len(seen) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace_file(*names)
    os.replace = counted
    report._publish(folder, "fig", {suffix: b"new" for suffix in ("svg", "png", "csv", "json")})
    os._exit(0)


def test_all_files_or_none_when_killed_at_any_write(saved):
    seen = set()
    for moment in range(1, 11):
        saved()
        before = tree(saved.root / "sada")
        assert len(before) == 4
        status = publish_and_die(saved.root / "sada", moment)
        assert (status == signal.SIGKILL) == (moment < 10)
        report._settle(saved.root / "sada")
        after = {k: v for k, v in tree(saved.root / "sada").items() if not k.startswith(".")}
        assert after == before or set(after.values()) == {b"new"}
        seen.add(after == before)
    assert seen == {True, False}
    saved()
    assert check_figures(saved.root) == []


def test_a_better_profile_is_not_replaced(saved, tmp_path, monkeypatch):
    best = [toy(tmp_path / "runs", profile="paper", data="mnist/test")]
    saved(runs=best, profile="paper")
    before = tree(saved.root)
    with pytest.raises(SadalibError, match="better profile paper"):
        saved()
    saved(profile="smoke")
    assert {k: v for k, v in tree(saved.root).items() if not k.startswith("smoke")} == before
    monkeypatch.setenv("SADALIB_REPLACE", "1")
    assert json.loads(saved()["json"].read_text())["profile"] == "small"


@pytest.mark.parametrize("changes, words", [
    ({"runs": []}, "no number without its runs"), ({"profile": "papr"}, "did you mean `paper`"),
    ({"profile": "paper"}, "is of profile small"), ({"name": "../x"}, "lower-case"), ({"data": {}}, "has no data")])
def test_what_a_figure_may_not_be(saved, changes, words):
    with pytest.raises(SadalibError, match=words):
        saved(**changes)
    assert not saved.root.exists()


def test_changed_and_unfinished_runs_are_refused(saved):
    with pytest.raises(SadalibError, match="has no result yet"):
        saved(runs=[Run(Toy(9), saved.folder)])
    path = saved.runs[0].folder / "result.json"
    path.write_text(path.read_text().replace("0.5", "0.9"))
    with pytest.raises(SadalibError, match="was changed after the run wrote it"):
        saved()


def test_embedded_digits_never_share_a_table_with_public_data(saved, tmp_path):
    other = toy(tmp_path / "runs", 5, data="mnist/test")
    with pytest.raises(SadalibError, match="mixes the embedded digits with mnist"):
        save_table({"a": [1]}, "sada", "t", runs=[*saved.runs, other], profile="small", notebook="n", root=saved.root)


def test_a_declared_mixture_says_so(saved, tmp_path):
    other = toy(tmp_path / "runs", 5, data="mnist/test")
    made = save_table({"a": [1]}, "sada", "t", runs=[*saved.runs, other], profile="small", notebook="n", root=saved.root, mixed=True)
    assert "not public data sets" in made["md"].read_text()


def test_tables_escape_and_keep_missing_values_apart(saved):
    rows = {"method": ["<b>|x", "SADA"], "acc": [1 / 3, float("nan")], "n": [3, 4], "source": ["Table 1, a|b", None]}
    made = save_table(rows, "sada", "t", runs=saved.runs, profile="small", notebook="n", root=saved.root)
    assert "<b>" not in made["html"].read_text() and "\\|x" in made["md"].read_text()
    assert made["csv"].read_text().splitlines()[1:] == ['<b>|x,0.333333,3,"Table 1, a|b"', "SADA,,4,"]
    assert "reduced run" in made["md"].read_text() and saved.runs[0].id in made["md"].read_text()


def test_claims_of_other_notebooks_and_better_profiles_stay(saved):
    one = Claim("sada", "A", "first", 2, 1., .5, "Table 1", .1, .5, "confirmed", runs=tuple(saved.runs))
    write_claims("sada", [one], saved.root)
    page = write_claims("sada", [replace(one, notebook="second", claim="B")], saved.root)["md"].read_text()
    assert "| A |" in page and "| B |" in page
    write_claims("sada", [replace(one, value=.55)], saved.root)
    rows = json.loads((saved.root / "sada" / "claims.json").read_text())["claims"]
    assert [(r["claim"], r["value"]) for r in rows] == [("A", .55), ("B", .5)]
    smoke = write_claims("sada", [replace(one, profile="smoke", value=.45)], saved.root)
    assert "smoke" in smoke["md"].parts and check_figures(saved.root) == []


def test_claims_written_at_once_are_all_kept(saved):
    one = Claim("sada", "A", "n", 2, 1., .5, "Table 1", .1, .5, "confirmed", runs=tuple(saved.runs))
    def write(i):
        write_claims("sada", [replace(one, claim=f"claim {i}")], saved.root)
    threads = [threading.Thread(target=write, args=(i,)) for i in range(12)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(json.loads((saved.root / "sada" / "claims.json").read_text())["claims"]) == 12


def test_a_picture_does_not_take_a_tables_name(saved):
    frame = pd.DataFrame({"x": [1]})
    save_table(frame, "sada", "mine", runs=saved.runs, profile="small", notebook="n", root=saved.root)
    with pytest.raises(SadalibError, match="is a table already"): saved("mine")
    assert check_figures(saved.root) == []
