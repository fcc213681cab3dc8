# make figures   every figure of the chosen profile: smoke (default, minutes, embedded data), small, paper
# make test      everything that CI checks
# make lab       JupyterLab on the notebooks
# make readme    README.md from nbs/index.ipynb
# make clean     remove what can be made again (never runs, never data)
.PHONY: figures test lab readme export lock clean env
export OMP_WAIT_POLICY ?= PASSIVE
PROFILE ?= smoke
BIN := .venv/bin

env:
	@sh workflow/environment.sh

figures: env
	@$(BIN)/python -m sadalib.pipeline --profile $(PROFILE) $(ARGS)

test: env
	@$(BIN)/python workflow/check.py

lab: env
	@$(BIN)/jupyter lab nbs

readme: env
	@$(BIN)/python workflow/check.py --write readme

export: env
	@$(BIN)/python workflow/check.py --write clean export

lock: # uv remembers what a setup.py of the same date asked for
	@touch setup.py
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --extra dev setup.py -o requirements.lock

clean:
	rm -rf figures/smoke build _docs _proc .pytest_cache .mypy_cache .ruff_cache .hypothesis .snakemake *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
