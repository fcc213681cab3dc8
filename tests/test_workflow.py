"The pipeline that `make figures` calls: plan, order, progress, failure, kill and resume, one at a time"
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from sadalib import pipeline
from sadalib.data.catalogue import CATALOGUE
from sadalib.runs import SadalibError

ROOT = Path(__file__).resolve().parent.parent

IMPORTS = """
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
import os, time
from matplotlib.figure import Figure
from sadalib.report import save_figure
from sadalib.runs import Parameters, Progress, Run, finish, load_tensors, open_run, save_tensors

@dataclass(frozen=True)
class Toy:
    experiment: ClassVar[str] = "toy"
    profile: str = "small"; seed: int = 0; steps: int = 4; wrong: bool = False

def held():
    "The step before which the test makes the notebook wait"
    file = Path(os.environ["SADALIB_DATA"])/"hold"
    return int(file.read_text()) if file.exists() else 99

params = Parameters(globals())
"""
PARAMETERS = "profile = 'small'\nseed = 0\nsteps = 4\nwrong = False"
WORK = """config = params.build(Toy)
run = Run(config)
if not run.done:
    with open_run(run) as log:
        saved = run.folder/"checkpoint"/"last.safetensors"
        start = load_tensors(saved)[1]["step"] if saved.exists() else 0
        log.cut(start)
        with Progress(steps, "toy", start=start, every=0.) as bar:
            for step in range(start, steps):
                while step >= held(): time.sleep(.05)
                log.add(step=step + 1, value=seed + step * step)
                save_tensors(saved, {}, {"step": step + 1})
                bar.update()
        if wrong: raise RuntimeError("the toy broke on purpose")
        finish(run, [{"metric": "sum", "value": sum(r["value"] for r in log.rows()), "n": steps}])
rows = [{"step": 0, "value": run._read("result.json")["metrics"][0]["value"]}]
fig = Figure(figsize=(2, 1)); fig.subplots().plot([0, rows[0]["value"]])
save_figure(fig, "toys", f"decay_{seed}", data=rows, runs=[run], profile=profile, notebook="toy")
"""


def write_notebook(path):
    "The toy experiment: imports, tagged parameters, work"
    def cell(i, source, tags=()):
        return {"cell_type": "code", "id": f"c{i}", "source": source, "outputs": [], "execution_count": None,
                "metadata": {"tags": list(tags)}}
    cells = [cell(0, IMPORTS), cell(1, PARAMETERS, ["parameters"]), cell(2, WORK)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    path.write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))


class House:
    "A small project in a folder: one toy notebook, a configuration, and roots of its own"
    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        (folder / "data").mkdir(exist_ok=True)
        write_notebook(folder / "toy.ipynb")
        self.env = {**os.environ, "SADALIB_RUNS": str(folder / "runs"), "SADALIB_DATA": str(folder / "data"),
                    "SADALIB_FIGURES": str(folder / "figures"), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.env.pop("IN_TEST", None)
        self.jobs = [self.job("first", 1), self.job("second", 2, after=["first"])]
        self.save()

    def job(self, name, seed, after=(), needs=(), **parameters):
        return {"name": name, "notebook": str(self.folder / "toy.ipynb"), "parameters": {"seed": seed, **parameters},
                "outputs": [f"toys/decay_{seed}"], "minutes": .1, "after": list(after), "needs": list(needs)}

    def save(self):
        (self.folder / "config.yaml").write_text(yaml.safe_dump(self.config()))

    def config(self):
        return {"threads": 1, "profiles": {"smoke": self.jobs, "small": self.jobs}}

    def words(self, *more):
        return [sys.executable, "-m", "sadalib.pipeline", "--profile", "small", "--configfile",
                str(self.folder / "config.yaml"), *more]

    def start(self, *more):
        def heed(): signal.signal(signal.SIGINT, signal.default_int_handler) # a shell's background jobs ignore it
        before = signal.getsignal(signal.SIGINT)
        heed()
        try: return subprocess.Popen(self.words(*more), env=self.env, cwd=self.folder, start_new_session=True, text=True,
                                     stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        finally: signal.signal(signal.SIGINT, before)

    def run(self, *more):
        done = subprocess.run(self.words(*more), env=self.env, cwd=self.folder, text=True, check=False, timeout=120,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return done.returncode, done.stdout

    def directly(self, *given):
        "Run the toy's code without papermill, Snakemake and interruptions, once for each of the parameters `given`"
        lines = ["\n".join(f"{name} = {value!r}" for name, value in own.items()) for own in given]
        file = self.folder / "direct.py"
        file.write_text("\n".join("\n".join((IMPORTS, PARAMETERS, own, WORK)) for own in lines))
        subprocess.run([sys.executable, str(file)], env=self.env, check=True, stdout=subprocess.DEVNULL)

    def hold(self, step):
        "Let running notebooks wait before `step`; None lets them go"
        file = self.folder / "data" / "hold"
        if step is None:
            return file.unlink()
        file.with_name("new").write_text(str(step))
        file.with_name("new").rename(file)

    def results(self):
        "What the finished runs hold, by file name, without when and where they were made"
        def plain(path):
            return {k: v for k, v in json.loads(path.read_text()).items() if k != "made"}
        return {p.parent.name: plain(p) for p in sorted((self.folder / "runs" / "toy").glob("*/result.json"))}

    def logs(self):
        return {p.parent.name: p.read_text() for p in sorted((self.folder / "runs" / "toy").glob("*/metrics.jsonl"))}

    def pictures(self):
        return {p.name: p.read_bytes() for p in (self.folder / "figures" / "toys").iterdir() if p.suffix != ".json"}


def wait_for(test, seconds=90):
    "Wait until `test()` holds"
    until = time.monotonic() + seconds
    while not test():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(.05)


def living(word):
    "Processes whose command line holds `word`"
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        try:
            if word in (p / "cmdline").read_bytes().decode("utf8", "replace"):
                found.append(int(p.name))
        except OSError:
            pass
    return found


@pytest.fixture
def house(tmp_path, monkeypatch):
    made = House(tmp_path / "house")
    for name in ("SADALIB_RUNS", "SADALIB_DATA", "SADALIB_FIGURES"):
        monkeypatch.setenv(name, made.env[name])
    return made


def test_the_projects_own_jobs_are_read():
    for profile in ("smoke", "small", "paper"):
        jobs = pipeline.read_jobs(profile)
        assert jobs and all(job.minutes > 0 and job.outputs for job in jobs)
        assert all(job.hardware and (job.gpu_hours or not job.gpu) for job in jobs if profile == "paper")
        assert {name.split("/")[0] for job in jobs for name in job.needs} <= set(CATALOGUE)
    assert sum(job.minutes for job in pipeline.read_jobs("smoke")) <= 5


def test_plan_leaves_out_what_lacks_data_and_what_builds_on_it(house):
    house.jobs[0]["needs"] = ["mnist", "usps"]
    steps = pipeline.plan("small", {"profiles": {"small": house.jobs}})
    assert [s.state for s in steps] == ["left out", "left out"]
    assert "sadalib data prepare mnist usps" in steps[0].why and "builds on first" in steps[1].why
    for name in ("mnist", "usps"):
        (house.folder / "data" / name).mkdir()
        (house.folder / "data" / name / "test.npz").write_bytes(b"x")
    assert [s.state for s in pipeline.plan("small", {"profiles": {"small": house.jobs}})] == ["left", "left"]


@pytest.mark.parametrize("change, words", [
    ({"minuts": 3}, "did you mean `minutes`"), ({"name": "a b"}, "lower-case"),
    ({"notebook": "nope"}, "does not exist"),
    ({"after": ["second"]}, "not above it")])
def test_a_wrong_list_of_jobs_is_refused(house, change, words):
    with pytest.raises(SadalibError, match=words):
        pipeline.plan("small", {"profiles": {"small": [{**house.jobs[0], **change}]}})


def test_a_marker_follows_code_parameters_and_profile(house):
    job = pipeline.read_jobs("small", {"profiles": {"small": house.jobs}})[0]
    before = pipeline.fingerprint(job)
    path = house.folder / "toy.ipynb"
    data = json.loads(path.read_text())
    data["cells"][2]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "x"}]
    path.write_text(json.dumps(data))
    assert pipeline.fingerprint(job) == before
    data["cells"][2]["source"] += "\nmore = 1"
    path.write_text(json.dumps(data))
    assert pipeline.fingerprint(job) != before


def test_parameters_reach_papermill_as_they_are(house):
    job = pipeline.Job("x", "small", str(house.folder / "toy.ipynb"), ("a/b",), 1,
                       {"a": "1e5", "b": 3, "c": True, "d": [1, 2], "e": None, "f": "it's; $HOME"})
    words = pipeline.command(job)
    assert words[words.index("a") - 1:words.index("a") + 2] == ["-r", "a", "1e5"]
    assert words[words.index("b") - 1] == "-p" and words[words.index("c") + 1] == "True"
    assert words[words.index("d") + 1] == "1,2" and "e" not in words and words[-1] == "it's; $HOME"


def test_failure_says_why_and_where_and_the_rest_is_done(house):
    house.jobs = [house.job("broken", 7, wrong=True), house.job("fine", 9), house.job("next", 8, after=["broken"])]
    house.save()
    status, said = house.run("--jobs", "2")
    assert status == 1
    assert "not done: broken: RuntimeError: the toy broke on purpose (log: runs/workflow/logs/small/broken.log)" in said
    assert "not done: next: it was not started" in said
    assert "finished  fine" in said and "figures/toys/decay_9.png" in said
    assert (house.folder / "runs" / "notebooks" / "small" / "broken.ipynb").is_file()
    assert not (house.folder / "figures" / "toys" / "decay_7.json").exists()


def test_interrupted_then_killed_then_equal_and_then_nothing_to_do(house, tmp_path):
    def steps():
        return max([log.count("\n") for log in house.logs().values()], default=0)
    house.jobs[0]["parameters"]["steps"] = 12
    house.save()
    house.hold(3)

    first = house.start()
    wait_for(lambda: steps() == 3)
    refused, said = house.run()
    assert refused == 2 and "another pipeline" in said and said.count("\n") == 1
    os.killpg(first.pid, signal.SIGINT)
    said = first.communicate(timeout=60)[0]
    assert first.returncode == 130 and "Traceback" not in said and "goes on from here" in said
    wait_for(lambda: not living(str(house.folder)))
    assert steps() == 3
    house.hold(7)

    second = house.start()
    wait_for(lambda: steps() == 7)
    os.killpg(second.pid, signal.SIGKILL)
    second.wait()
    house.hold(None)
    status, said = house.run()
    assert status == 0, said
    assert "an earlier call was killed" in said
    starts = [json.loads(p.read_text())["starts"] for p in (house.folder / "runs" / "toy").glob("*/env.json")]
    assert sorted(starts) == [1, 3] and not living(str(house.folder))

    other = House(tmp_path / "other")
    other.directly({"seed": 1, "steps": 12}, {"seed": 2})
    assert house.results() == other.results() and house.logs() == other.logs() and house.pictures() == other.pictures()

    status, said = house.run()
    assert status == 0 and "none to run" in said and "figures/toys/decay_1.png" in said
    (house.folder / "figures" / "toys" / "decay_2.json").unlink()
    assert [step.state for step in pipeline.plan("small", house.config())] == ["done", "left"]
