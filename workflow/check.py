#!/usr/bin/env python
"""What `make test` runs, in order: export, clean, readme, ruff, mypy, nbdev_test, pytest.

usage: python workflow/check.py [STEP ...]            check (all steps by default); exit status 1 if any failed
       python workflow/check.py --write STEP ...      make it so: clean, export, readme
"""
import argparse
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
NO_NETWORK = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
NO_NETWORK |= {"no_proxy": "127.0.0.1,localhost", "NO_PROXY": "127.0.0.1,localhost"}


def call(*words: str, cwd: Path = ROOT, **env: str) -> None:
    "Run a tool of this environment; raises `CalledProcessError` when it fails"
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    subprocess.run([str(BIN/words[0]), *words[1:]], cwd=cwd, check=True, env={**os.environ, "PATH": path, **env})


def copy_of_house(to: Path) -> None:
    "The notebooks and what nbdev needs, in a scratch folder"
    for name in ("settings.ini", "setup.py", "pyproject.toml"): shutil.copy(ROOT/name, to)
    shutil.copytree(ROOT/"nbs", to/"nbs", ignore=shutil.ignore_patterns(".*"))
    (to/"sadalib").mkdir()
    (to/"sadalib"/"__init__.py").write_text((ROOT/"sadalib"/"__init__.py").read_text())


def python_files(folder: Path) -> dict[str, Path]:
    "Python files below `folder` by relative name"
    return {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*.py")) if "__pycache__" not in p.parts}


def differing(a: dict[str, Path], b: dict[str, Path]) -> list[str]:
    "Names that are in one only, or differ"
    return [n for n in sorted({*a, *b}) if n not in a or n not in b or not filecmp.cmp(a[n], b[n], shallow=False)]


def export(write: bool = False) -> None:
    "sadalib/ is what the notebooks export"
    if write: return call("nbdev_export")
    with tempfile.TemporaryDirectory() as tmp:
        copy_of_house(Path(tmp))
        call("nbdev_export", cwd=Path(tmp))
        wrong = differing(python_files(ROOT/"sadalib"), python_files(Path(tmp)/"sadalib"))
    if wrong: sys.exit(f"sadalib/ differs from what the notebooks export ({', '.join(wrong)}): run `make export`.")


def clean(write: bool = False) -> None:
    "Notebooks are as nbdev_clean leaves them"
    if write: return call("nbdev_clean", "--fname", "nbs")
    with tempfile.TemporaryDirectory() as tmp:
        copy_of_house(Path(tmp))
        call("nbdev_clean", "--fname", "nbs", cwd=Path(tmp))
        names = [p.relative_to(ROOT) for p in (ROOT/"nbs").glob("*.ipynb") if not p.name.startswith(".")]
        wrong = [str(n) for n in names if json.loads((ROOT/n).read_text()) != json.loads((Path(tmp)/n).read_text())]
    if wrong: sys.exit(f"not clean: {', '.join(wrong)}; run `make export`.")


def readme_text() -> str:
    "README.md as nbs/index.ipynb tells it: hidden cells left out, links seen from the root"
    from nbconvert import MarkdownExporter
    from traitlets.config import Config
    config = Config({"RegexRemovePreprocessor": {"patterns": [r"\s*#\|\s*hide"], "enabled": True},
                     "ClearOutputPreprocessor": {"enabled": True}})
    text, _ = MarkdownExporter(config=config).from_filename(str(ROOT/"nbs"/"index.ipynb"))
    text = re.sub(r"\]\(\.\./", "](", text)
    text = re.sub(r"\]\((\w+\.ipynb)", r"](nbs/\1", text)
    text = text.replace('src="../', 'src="')
    return "<!-- made by `make readme` from nbs/index.ipynb -->\n" + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def readme(write: bool = False) -> None:
    "README.md is what index.ipynb says"
    text = readme_text()
    if write: (ROOT/"README.md").write_text(text)
    elif (ROOT/"README.md").read_text() != text: sys.exit("README.md differs from nbs/index.ipynb: run `make readme`.")


def figures() -> None:
    "The committed figures and results are unchanged since they were made"
    from sadalib.report import check_figures
    if wrong := check_figures(ROOT/"figures"): sys.exit("\n".join(wrong))


def ruff() -> None:
    "Lint of notebooks, package, tests and workflow"
    call("ruff", "check", "--no-cache", "--output-format", "concise", ".")


def mypy() -> None:
    "Types of sadalib/"
    call("mypy", "--no-error-summary", "--cache-dir", os.devnull)


def nbdev_test() -> None:
    "Every notebook runs from top to bottom, offline and without prepared data, one torch thread a process"
    with tempfile.TemporaryDirectory() as tmp:
        roots = {"SADALIB_RUNS": f"{tmp}/runs", "SADALIB_FIGURES": f"{tmp}/figures", "SADALIB_DATA": f"{tmp}/data"}
        call("nbdev_test", "--n_workers", "2", "--timing", "--do_print", **roots, **ONE_THREAD, **NO_NETWORK)


def pytest() -> None:
    "The tests a reader need not see"
    call("pytest", "-n", "2", "--dist", "loadfile", "--durations", "8", "-rs")


STEPS = {f.__name__: f for f in (export, clean, readme, figures, ruff, mypy, nbdev_test, pytest)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--write", action="store_true", help="change the files instead of checking them")
    args = parser.parse_args()
    if unknown := [s for s in args.steps if s not in STEPS]: parser.error(f"unknown step {unknown[0]}: known are {', '.join(STEPS)}")
    if args.write:
        for name in args.steps: STEPS[name](write=True) # type: ignore[call-arg]
        return 0
    failed = []
    for name in args.steps or STEPS:
        print(f"== {name}: {STEPS[name].__doc__}", flush=True)
        began = time.monotonic()
        try: STEPS[name]()
        except (subprocess.CalledProcessError, SystemExit) as e:
            failed.append(name)
            print(e if isinstance(e, SystemExit) else f"{name} failed", flush=True)
        print(f"== {name}: {time.monotonic() - began:.0f} s{', FAILED' if name in failed else ''}", flush=True)
    print(f"failed: {', '.join(failed)}" if failed else "all steps passed")
    return bool(failed)


if __name__ == "__main__": sys.exit(main())
