"The explorer in a real browser: JupyterLab on loopback, driven by Playwright through the chromium on the PATH"
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
pytest.importorskip("jupyterlab", reason="the package jupyterlab is not installed")
from playwright.sync_api import Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH: install Debian's package `chromium`")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")

CELLS = ["""\
import time
import torch
from sadalib.data import load
from sadalib.explore import FrequencyExplorer, FrequencyProbe
from sadalib.models import create_model
from sadalib.runs import randint, seeded
from sadalib.sensitivity import sensitivity_map

train, test = load("digits", "train"), load("digits", "test", limit=128)
model, draws = create_model("tinynet", seed=0), seeded("browser")
optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
for step in range(100):
    rows = randint(0, len(train), 64, generator=draws)
    loss = torch.nn.functional.cross_entropy(model(train.images[rows] / 255), train.labels[rows])
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
found = sensitivity_map(model, test.images, test.labels, cutoff=10)
""", """\
explorer = FrequencyExplorer(FrequencyProbe(model, test, map=found))
explorer
"""]


def environment(root: Path) -> dict[str, str]:
    "The test's own Jupyter: this Python's kernel, no user settings, no news, nothing kept"
    from ipykernel.kernelspec import write_kernel_spec
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR",
             "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")
    folders = {name: root / name.lower() for name in names}
    for folder in folders.values():
        folder.mkdir(parents=True)
    write_kernel_spec(str(folders["JUPYTER_DATA_DIR"] / "kernels" / "python3"))
    settings = folders["JUPYTERLAB_SETTINGS_DIR"] / "@jupyterlab"
    quiet = settings / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    inherited = {k: v for k, v in os.environ.items() if k != "IN_TEST" and not k.startswith("JUPYTER")}
    return inherited | {k: str(v) for k, v in folders.items()} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def lab(tmp_path: Path):
    "Address of a notebook in a JupyterLab of its own"
    cells = [dict(cell_type="code", id=f"c{i}", metadata={}, source=s, outputs=[], execution_count=None)
             for i, s in enumerate(CELLS)]
    kernel = dict(kernelspec=dict(display_name="python3", language="python", name="python3"))
    work = tmp_path / "work"
    work.mkdir()
    (work / "explore.ipynb").write_text(json.dumps(dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, env = secrets.token_hex(16), environment(tmp_path / "jupyter")
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
               f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={work}"]
    log = tmp_path / "lab.log"
    with log.open("wb") as out:
        server = subprocess.Popen(command, env=env | {"JUPYTER_TOKEN": token}, stdout=out, stderr=out)
    try:
        wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", server, log)
        yield f"http://127.0.0.1:{port}/lab/tree/explore.ipynb?token={token}"
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_for(address: str, server: subprocess.Popen, log: Path, seconds: float = 90) -> None:
    "Return when `address` answers; fail with the log when `server` does not come up"
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(.2)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


@pytest.fixture
def page(lab: str, tmp_path: Path):
    "The notebook open in the browser, all cells run; nothing outside this machine can be reached"
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        page = browser.new_page(viewport={"width": 1440, "height": 960})
        page.set_default_timeout(30_000)
        page.route("**/*", lambda r: r.continue_() if r.request.url.startswith("http://127.0.0.1:") else r.abort())
        page.complaints = []
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("console", lambda m: page.complaints.append(m.text) if m.type == "error" else None)
        page.goto(lab)
        page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
        page.get_by_text("| Idle").wait_for()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        yield page
        page.screenshot(path=tmp_path / "page.png")
        browser.close()


def says(page: Page, start: str) -> str:
    "The explorer's line, once it begins with `start`; a busy machine may take its time"
    line = page.locator(".widget-html [role=status]")
    expect(line).to_have_text(re.compile("^" + re.escape(start)), timeout=60_000)
    return line.inner_text()


def cell(page: Page, u: int, v: int, reach: int = 10) -> tuple[float, float]:
    "Where on the page the middle of the map's cell (`u`, `v`) lies: the map begins 50, 8 pixels inside its canvas"
    box = page.locator(".sadalib-picker canvas").bounding_box()
    size = (box["width"] - 50 - 58) / (2 * reach + 1)
    return box["x"] + 50 + (v + reach + .5) * size, box["y"] + 8 + (u + reach + .5) * size


def test_explorer_in_jupyterlab(page: Page, tmp_path: Path):
    canvas, picture = page.locator(".sadalib-picker canvas"), page.locator("img.widget-image")
    failed = page.locator(".jp-OutputArea [data-mime-type='application/vnd.jupyter.error']")
    canvas.or_(failed).first.wait_for(timeout=150_000)  # imports and a short training on a busy machine
    assert not failed.count(), failed.all_inner_texts()
    canvas.scroll_into_view_if_needed()
    expect(canvas).to_have_attribute("role", "application")
    assert "Arrow keys" in canvas.get_attribute("aria-label")
    says(page, "u = ")
    assert page.get_by_role("checkbox").is_checked()

    image = picture.get_attribute("src")
    page.mouse.click(*cell(page, 3, -2))
    says(page, "u = 3, v = −2: error 0.")
    assert picture.get_attribute("src") != image
    expect(page.locator(".sadalib-says")).to_contain_text("u = 3, v = −2: error in the map 0.")

    cells = page.locator(".jp-Notebook .jp-Cell").count()
    for key, where in (("ArrowUp", "u = 2, v = −2"), ("Shift+ArrowRight", "u = 2, v = 3"), ("Home", "u = 0, v = 0")):
        page.keyboard.press(key)
        says(page, where)
    assert page.locator(".jp-Notebook .jp-Cell").count() == cells

    page.evaluate("""() => {
        window.frames_seen = 0;
        const image = document.querySelector("img.widget-image");
        new MutationObserver(() => window.frames_seen++).observe(image, {attributes: true});
    }""")
    moves, began = 120, time.monotonic()
    page.mouse.move(*cell(page, -10, -10))
    page.mouse.down()
    for i in range(moves + 1):
        page.mouse.move(*cell(page, round(-10 + 16 * i / moves), round(-10 + 13 * i / moves)))
    page.mouse.up()
    moved = time.monotonic() - began
    dragged, settled = says(page, "u = 6, v = 3"), time.monotonic() - began - moved
    frames = page.evaluate("window.frames_seen")
    assert 0 < frames < moves

    image = picture.get_attribute("src")
    page.get_by_role("slider").focus()
    for _ in range(5):
        page.keyboard.press("ArrowLeft")
    expect(page.get_by_role("checkbox")).not_to_be_checked()
    expect(picture).not_to_have_attribute("src", image)
    turned = says(page, "u = 6, v = 3")
    assert turned.split("radius")[1] != dragged.split("radius")[1]
    page.get_by_role("checkbox").check()
    expect(page.locator(".widget-html [role=status]")).to_contain_text(dragged.split("radius")[1].split(";")[0])

    page.locator(".jp-OutputArea-output", has=canvas).screenshot(path=tmp_path / "explore.png")
    assert (tmp_path / "explore.png").stat().st_size > 20_000
    if os.environ.get("SADALIB_SCREENSHOT"):
        shutil.copy(tmp_path / "explore.png", os.environ["SADALIB_SCREENSHOT"])
    print(f"\n{frames} pictures in a drag of {moved:.1f} s, the last {settled:.1f} s after it; {turned}")
    assert not page.complaints


SADA_CELLS = [CELLS[0].replace("FrequencyExplorer, FrequencyProbe", "FrequencyProbe") + """\
from sadalib.explore_sada import SadaExplorer, SadaProbe
""", """\
explorer = SadaExplorer(SadaProbe(model, test, map=found))
explorer
"""]


@pytest.fixture
def sada_page(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Page:
    "As `page`, with SADA's explorer in the notebook"
    monkeypatch.setattr(sys.modules[__name__], "CELLS", SADA_CELLS)
    return request.getfixturevalue("page")


def test_sada_explorer_in_jupyterlab(sada_page: Page, tmp_path: Path):
    page = sada_page
    canvas, picture = page.locator(".sadalib-picker canvas"), page.locator("img.widget-image")
    failed = page.locator(".jp-OutputArea [data-mime-type='application/vnd.jupyter.error']")
    canvas.or_(failed).first.wait_for(timeout=150_000)  # imports and a short training on a busy machine
    assert not failed.count(), failed.all_inner_texts()
    canvas.scroll_into_view_if_needed()
    line = page.locator(".widget-html [role=status]")
    expect(line).to_contain_text("5 guided steps of 0.08", timeout=60_000)

    def moved(words: str, act) -> str:
        "What the explorer says once `act` has changed its picture and its line has `words`"
        image = picture.get_attribute("src")
        act()
        expect(line).to_contain_text(words, timeout=60_000)
        expect(picture).not_to_have_attribute("src", image, timeout=60_000)
        return line.inner_text()

    def press(slider: int, key: str):
        page.get_by_role("slider").nth(slider).focus()
        page.keyboard.press(key)

    moved("4 guided steps of 0.08", lambda: press(0, "ArrowLeft"))
    moved("4 guided steps of 0.09", lambda: press(1, "ArrowRight"))
    moved("4 shuffled steps", lambda: page.get_by_role("button", name="shuffled").click())
    guided = moved("4 guided steps", lambda: page.get_by_role("button", name="guided").click())
    moved("4 uniform steps", lambda: page.get_by_role("button", name="uniform").first.click())
    moved("weight 1.00", lambda: page.get_by_role("button", name="none").click())
    image = picture.get_attribute("src")
    press(2, "ArrowRight")
    expect(picture).not_to_have_attribute("src", image)
    moved("u = 3, v = −2: weight 1.00", lambda: page.mouse.click(*cell(page, 3, -2, reach=15)))
    expect(page.locator(".sadalib-says")).to_contain_text("u = 3, v = −2: weight of the step 1.00")

    page.get_by_role("slider").nth(0).focus()
    for _ in range(12):  # faster than it can answer: the last one counts
        page.keyboard.press("ArrowRight")
    expect(line).to_contain_text("10 uniform steps of 0.09", timeout=60_000)

    page.locator(".jp-OutputArea-output", has=canvas).screenshot(path=tmp_path / "explore_sada.png")
    assert (tmp_path / "explore_sada.png").stat().st_size > 20_000
    if os.environ.get("SADALIB_SADA_SCREENSHOT"):
        shutil.copy(tmp_path / "explore_sada.png", os.environ["SADALIB_SADA_SCREENSHOT"])
    print(f"\n{guided}\n{line.inner_text()}")
    assert not page.complaints


DISPARITY_CELLS = ["""\
from sadalib.explore_disparity import DisparityExplorer
""", """\
explorer = DisparityExplorer(alpha=1, ratio=5, norm=float("inf"))
explorer
"""]


@pytest.fixture
def disparity_page(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Page:
    "As `page`, with the explorer of disparity in the notebook"
    monkeypatch.setattr(sys.modules[__name__], "CELLS", DISPARITY_CELLS)
    return request.getfixturevalue("page")


def test_disparity_explorer_in_jupyterlab(disparity_page: Page, tmp_path: Path):
    page = disparity_page
    line, picture = page.locator(".widget-html [role=status]"), page.locator("img.widget-image")
    failed = page.locator(".jp-OutputArea [data-mime-type='application/vnd.jupyter.error']")
    picture.or_(failed).first.wait_for(timeout=150_000)  # imports on a busy machine
    assert not failed.count(), failed.all_inner_texts()
    picture.scroll_into_view_if_needed()
    expect(line).to_contain_text("Cauchy, R = 5.01, ε = 0.50", timeout=60_000)  # the slider's nearest step
    expect(line).to_contain_text("robust training shrinks the disparity here")

    def moved(words: str, act) -> str:
        "What the explorer says once `act` has changed its picture and its line has `words`"
        image = picture.get_attribute("src")
        act()
        expect(line).to_contain_text(words, timeout=60_000)
        expect(picture).not_to_have_attribute("src", image, timeout=60_000)
        return line.inner_text()

    def press(slider: int, key: str, times: int = 1):
        page.get_by_role("slider").nth(slider).focus()
        for _ in range(times):
            page.keyboard.press(key)

    moved("R = 5.25", lambda: press(1, "ArrowRight"))  # one step of the logarithmic slider
    moved("the robust rule gives all to the majority", lambda: press(1, "ArrowRight", 10))
    widened = moved("robust training widens the disparity", lambda: page.get_by_role("button", name="Gaussian").click())
    assert "Gaussian, R = 8.32" in widened
    moved("ε = 0.55 ‖μ‖∞", lambda: press(2, "ArrowRight"))
    moved("ε = 0.55 ‖μ‖₂", lambda: page.get_by_role("button", name="ℓ2").click())
    moved("distance 2.9", lambda: press(3, "ArrowLeft"))
    moved("stable law, α = 1.95", lambda: press(0, "ArrowLeft"))
    assert not page.locator(".widget-toggle-button.mod-active", has_text="Gaussian").count()
    moved("no closed form", lambda: press(0, "Home"))
    moved("Cauchy, R = 8.32, ε = 0.55 ‖μ‖₂", lambda: page.get_by_role("button", name="Cauchy").click())

    page.locator(".jp-OutputArea-output", has=picture).screenshot(path=tmp_path / "explore_disparity.png")
    assert (tmp_path / "explore_disparity.png").stat().st_size > 20_000
    if os.environ.get("SADALIB_DISPARITY_SCREENSHOT"):
        shutil.copy(tmp_path / "explore_disparity.png", os.environ["SADALIB_DISPARITY_SCREENSHOT"])
    print(f"\n{widened}\n{line.inner_text()}")
    assert not page.complaints
