# `make book` and `make test` do everything from a fresh clone; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c
PYTHON ?= python3
BIN := .venv/bin
UV := $(shell command -v uv)
INSTALL := $(if $(UV),$(UV) pip install --quiet --python $(BIN)/python,$(BIN)/pip install --quiet --disable-pip-version-check --no-compile)
STAGE := _build/stage
NOTEBOOKS := $(wildcard notebooks/*.py)
PROFILE ?= quick
# First those that keep one process busy for minutes, so that none is left alone at the end.
SLOW := tests/test_wheel.py tests/test_ladder.py tests/test_sweep.py tests/test_report.py tests/test_commands.py tests/test_harness.py
ARCHITECTURES := tests/test_notebooks_elsewhere.py tests/test_conformance.py tests/test_fla.py tests/test_kernels.py
PAGES := tests/test_pages.py
CONFIG ?= sweep/example.yaml
RUN ?= _build/sweep
CORES ?= 2
WAVE ?= 1
GPUS ?= 1
OUT ?= _build/report
LADDER := _build/ladder

.PHONY: help book pdf test test-architectures test-slow test-pages test-gpu workflows conformance check notebooks bench quick figure report sweep ladder clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(INSTALL) -r requirements.txt
	$(INSTALL) --no-deps --no-build-isolation -e .
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true # on all cores; some packages hold files for other versions of Python
	touch $@

book: .venv/installed ## run the notebooks (PROFILE=quick) and build the site into _build/html
	$(BIN)/python -m book.assemble --stage $(STAGE) --profile $(PROFILE)
	rm -rf _build/_doctrees _build/.doctrees _build/html
	$(BIN)/jupyter-book build $(STAGE) --path-output . --all -n -W --keep-going
	@echo "the book is in _build/html/index.html"

pdf: .venv/installed ## print the built book as _build/state-rank.pdf and link it from the home page: needs chromium, and `make book` before
	$(BIN)/python -m book.pdf --stage $(STAGE)

test: .venv/installed ## run the tests that need no GPU, two at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not gpu" $(patsubst %,--ignore=%,$(ARCHITECTURES) $(SLOW) $(PAGES))

test-architectures: .venv/installed ## run every check on a tiny model of every architecture (10 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not gpu" $(ARCHITECTURES)

test-slow: .venv/installed ## run what takes longest: the ladder's stored numbers, a sweep, reports, the wheel, lm-evaluation-harness (20 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder -m "not gpu" $(SLOW)

test-pages: .venv/installed ## look at the built book and its PDF in a browser: needs chromium, and `make book pdf` before
	$(BIN)/python -m pytest -n 2 $(PAGES)

test-gpu: .venv/installed ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

workflows: .venv/installed ## run what the GitHub workflows run, block by block, in a fresh clone of the last commit (half an hour)
	$(BIN)/python .ci/workflows

conformance: .venv/installed ## run every architecture's checks, on a GPU where there is one, and store the table of differences
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --store-conformance tests/test_conformance.py

check: .venv/installed ## lint, format, types, notebook pairs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m book.pairs --check

notebooks: .venv/installed ## write the .ipynb of every notebooks/*.py
	$(BIN)/python -m book.pairs

bench: .venv/installed ## time tracing, spectra, ablating and pruning against what one would do otherwise (STORE=1 keeps the tables)
	$(BIN)/python -m benchmarks $(if $(STORE),--store)

quick: book ## build the book and store what its quick runs gave, which tests hold later builds to
	mkdir -p results/quick && cp $(STAGE)/results/[0-9]*.json results/quick/

figure: .venv/installed ## store the figure of the README, from a quick run of the first notebook
	$(BIN)/python -m book.assemble --stage _build/figure --only 01_stratification --figure book/ranks.png

report: .venv/installed ## run the chapters on a model and build pages of them (MODEL=FOLDER or OWNER/NAME REVISION=... PROFILE=quick DEVICE=cuda DTYPE=bfloat16 ONLY=01_stratification OUT=_build/report)
	@[ -n "$(MODEL)" ] || { echo "name the model: make report MODEL=FOLDER" >&2; exit 1; }
	$(BIN)/staterank report "$(MODEL)" --out "$(OUT)" --profile $(PROFILE) $(if $(REVISION),--revision $(REVISION)) $(if $(DEVICE),--device $(DEVICE)) $(if $(DTYPE),--dtype $(DTYPE)) $(addprefix --only ,$(ONLY))

sweep: .venv/installed ## run notebooks on models and seeds (CONFIG=sweep/example.yaml RUN=_build/sweep CORES=2; PROFILE goes before the file's), or resume a run (UNLOCK=1 first, if make itself was killed)
	$(if $(UNLOCK),$(BIN)/snakemake --snakefile sweep/Snakefile --configfile $(CONFIG) --directory $(RUN) --unlock)
	$(BIN)/snakemake --snakefile sweep/Snakefile --configfile $(CONFIG) --directory $(RUN) --cores $(CORES) --resources gpu=$(GPUS) --rerun-incomplete $(if $(filter-out file,$(origin PROFILE)),--config profile=$(PROFILE))

ladder: .venv/installed ## train and measure a wave of the ladder (WAVE=1 BOOKS=folder of texts GPUS=1), or resume it
	@n=$$({ nvidia-smi -L 2>/dev/null || true; } | wc -l); [ $(GPUS) -le $$n ] || { echo "GPUS=$(GPUS), and this machine has $$n" >&2; exit 1; }
	status=0; $(BIN)/snakemake --snakefile sweep/Ladder --config wave=$(WAVE) books=$(abspath $(BOOKS)) --directory $(LADDER) --cores $(CORES) --resources gpu=$(GPUS) --keep-going --rerun-incomplete || status=$$?; \
	mkdir -p results/ladder && find $(LADDER)/results -type f -exec cp {} results/ladder/ \; ; exit $$status

clean: ## remove what was built, keep the environment
	rm -rf _build
