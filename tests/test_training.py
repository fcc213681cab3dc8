"""Training: resume after SIGKILL, several processes, precision, checkpoints evaluated later."""
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from sadalib.baselines import ERM
from sadalib.data import ImageSet, load
from sadalib.models import create_model
from sadalib.runs import SadalibError, load_tensors, require, seeded
from sadalib.training import Method, Recipe, TrainConfig, evaluate, fit, load_model, predict

HEAD = """
import os, sys, time
from sadalib.baselines import ERM
from sadalib.runs import require, Run
from sadalib.sada import SADA
from sadalib.training import Recipe, TrainConfig
config = TrainConfig(method=SADA(guidance="uniform", steps=2, warm_up=1), model="tinynet", train_images=400, threads=1,
                     recipe=Recipe(epochs=4, batch_size=20, warmup=5), targets=("digits_hand",))
"""


def python(code: str, root, **env):
    "A process that runs `code` with its runs under `root`"
    env = {**os.environ, "SADALIB_RUNS": str(root), "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen([sys.executable, "-c", HEAD + textwrap.dedent(code)], env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def folder_of(root):
    found = [p.parent for p in root.glob("train/*/config.json")]
    return found[0] if found else None


def results(root):
    "What must be equal between two runs: weights, log, result"
    folder = folder_of(root)
    weights = {n: load_tensors(folder/"checkpoint"/f"{n}.safetensors")[0] for n in ("last", "selected")}
    return weights, (folder/"metrics.jsonl").read_text(), (folder/"result.json").read_text()


def assert_same(a, b):
    assert a[1:] == b[1:]
    for name in a[0]:
        assert a[0][name].keys() == b[0][name].keys()
        assert all(torch.equal(v, b[0][name][k]) for k, v in a[0][name].items())


def test_sigkill_at_random_moments_then_the_same_result(tmp_path):
    assert python("require(config)", tmp_path/"whole").wait() == 0
    whole, cut = results(tmp_path/"whole"), tmp_path/"cut"
    pauses = (.15 + 1.2 * torch.rand(3, generator=torch.Generator().manual_seed(int(time.time())))).tolist()
    for pause in pauses:
        job = python("""
            import sadalib.training
            sadalib.training.Loop.__init__.__kwdefaults__["save_every"] = .05
            print("go", flush=True); require(config)
        """, cut)
        job.stdout.readline()
        time.sleep(pause)
        job.send_signal(signal.SIGKILL)
        job.wait()
    last = python("require(config)", cut)
    out = last.communicate()[0]
    assert last.returncode == 0, out
    assert_same(results(cut), whole)
    assert not list(folder_of(cut).rglob("*.part"))


def test_a_finished_run_is_a_no_op(tmp_path):
    config = TrainConfig(method=ERM(), model="tinynet", train_images=100, threads=1, recipe=Recipe(epochs=1, warmup=1))
    first = require(config, root=tmp_path)
    stamps = {p: p.stat().st_mtime_ns for p in first.folder.rglob("*")}
    again = require(config, root=tmp_path)
    assert {p: p.stat().st_mtime_ns for p in again.folder.rglob("*")} == stamps


def test_two_runs_on_one_folder(tmp_path):
    holder = python("""
        from sadalib.runs import locked
        with locked(Run(config).folder): print("held", flush=True); time.sleep(30)
    """, tmp_path)
    assert holder.stdout.readline().strip() == "held"
    second = python("require(config)", tmp_path)
    out = second.communicate(timeout=60)[0]
    holder.kill()
    assert second.returncode != 0
    assert f"is in use by process {holder.pid}" in out.strip().splitlines()[-1]


RANKS = """
    import torch, torch.distributed as dist
    from sadalib.models import create_model
    from sadalib.data import load
    from sadalib.training import fit
    from sadalib.runs import save_tensors
    model = create_model(os.environ["NET"], seed=0)
    recipe = Recipe(epochs=2, batch_size=25, warmup=2, lr=.05)
    loop = fit(model, load("digits").take(101), config.method, recipe, progress=False, device="cpu")
    grads = {f"grad.{k}": p.grad for k, p in model.named_parameters()}
    path = f"{os.environ['SADALIB_RUNS']}/rank{loop.team.rank}of{loop.team.size}.safetensors"
    save_tensors(path, {**model.state_dict(), **grads})
    if loop.team.size > 1: dist.destroy_process_group()
"""


@pytest.mark.parametrize("net", ["tinynet"])
def test_two_gloo_ranks_equal_one_process(tmp_path, net):
    port = str(20000 + os.getpid() % 20000)
    jobs = [python(RANKS, tmp_path, NET=net)]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NET": net,
              "ACCELERATE_USE_CPU": "true"}
    jobs += [python(RANKS, tmp_path, RANK=str(r), LOCAL_RANK=str(r), **common) for r in (0, 1)]
    outs = [j.communicate(timeout=150)[0] for j in jobs]
    assert [j.returncode for j in jobs] == [0, 0, 0], "\n".join(outs)
    one, a, b = (load_tensors(tmp_path/f"rank{n}.safetensors")[0] for n in ("0of1", "0of2", "1of2"))
    for key in one:
        assert torch.equal(a[key], b[key]), key
        torch.testing.assert_close(a[key], one[key], rtol=1e-3, atol=2e-5)


def test_bf16_trains_close_to_float32():
    data = load("digits").take(400)
    losses = []
    for precision in ("float32", "bf16"):
        recipe = Recipe(epochs=2, batch_size=40, warmup=2, lr=.05, precision=precision)
        loop = fit(create_model("tinynet", seed=0), data, ERM(), recipe, progress=False, device="cpu")
        losses.append(torch.nn.functional.cross_entropy(predict(loop.model, data), data.labels).item())
    assert abs(losses[0] - losses[1]) < .1 * losses[0]


def test_kept_steps_can_be_evaluated_on_any_set_and_batch_size(tmp_path):
    config = TrainConfig(method=ERM(), model="tinynet", train_images=200, threads=1,
                         recipe=Recipe(epochs=2, batch_size=50, warmup=1, keep_steps=(3,)))
    run = require(config, root=tmp_path)
    for which in ("last", "selected", 3):
        model = load_model(run, which)
        answers = [evaluate(model, load("digits_hand", "test"), batch_size=n).predictions for n in (7, 500)]
        assert torch.equal(*answers)
    assert not torch.equal(predict(load_model(run, 3), load("digits", "test")), predict(load_model(run), load("digits", "test")))


class Diverging(Method):
    name = "diverging"

    def loss(self, model, images, labels, *, generator=None):
        return {"total": model(images).sum() * float("inf")}


def test_nan_keeps_the_last_checkpoint(tmp_path):
    data, options = load("digits").take(60), {"folder": tmp_path, "device": "cpu", "progress": False}
    fit(create_model("tinynet", seed=0), data, ERM(), Recipe(epochs=1, batch_size=20, warmup=1), **options)
    before = (tmp_path/"checkpoint"/"last.safetensors").read_bytes()
    with pytest.raises(SadalibError, match="last checkpoint is kept"):
        fit(create_model("tinynet", seed=0), data, Diverging(), Recipe(epochs=2, batch_size=20, warmup=1), **options)
    assert (tmp_path/"checkpoint"/"last.safetensors").read_bytes() == before


def test_labels_beyond_the_networks_classes():
    model = create_model("tinynet", classes=7, seed=0)
    with pytest.raises(SadalibError, match="7 classes"):
        evaluate(model, load("digits", "test").take(20))


def test_a_set_refuses_labels_out_of_range():
    good = load("digits").take(4)
    with pytest.raises(SadalibError, match="label"):
        ImageSet("mine", "train", good.images, torch.tensor([0, 1, 2, 99]), good.classes)


def test_result_names_its_data(tmp_path):
    config = TrainConfig(method=ERM(), model="tinynet", train_images=100, threads=1, targets=("digits_fonts", "svhn"),
                         recipe=Recipe(epochs=1, warmup=1))
    os.environ.pop("SADALIB_STALE", None)
    result = json.loads((require(config, root=tmp_path).folder/"result.json").read_text())
    assert result["datasets"]["digits/test"] == load("digits", "test", size=32).checksum
    assert set(m["data"] for m in result["metrics"]) >= {"digits", "digits_fonts"}
    assert "svhn" in result["missing"] or any(m["data"] == "svhn" for m in result["metrics"])


def test_batches_repeat_and_epochs_differ():
    from sadalib.training import Loop, batch_at
    recipe = Recipe(epochs=2, batch_size=20, augment="noise")
    loop = Loop(create_model("tinynet", seed=0), load("digits").take(40), ERM(), recipe, device="cpu")
    a, b, c = (batch_at(loop, s)[0] for s in (0, 0, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert seeded(0, "x").initial_seed() != seeded(0, "y").initial_seed()


def test_sada_with_its_map_under_accelerate(tmp_path):
    "The whole chain on two processes: ERM shared by both, its map by the first, SADA shared by both"
    words = ["train", "profile=smoke", "model=tinynet", "train_images=120", "epochs=1", "erm_epochs=1", "map_images=8",
             "map_cutoff=1", "steps=1"]
    port = str(20000 + (os.getpid() + 7) % 20000)
    env = {**os.environ, "SADALIB_RUNS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", port]
    done = subprocess.run([*launch, "-m", "sadalib.cli", *words], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "digits_hand" in done.stdout
    assert len(list(tmp_path.glob("train/*/done"))) == 2 and len(list(tmp_path.glob("map/*/done"))) == 1
