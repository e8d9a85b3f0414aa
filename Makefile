# `make book` and `make test` do everything from a fresh clone; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c
PYTHON ?= python3
BIN := .venv/bin
STAGE := _build/stage
NOTEBOOKS := $(wildcard notebooks/*.py)
PROFILE ?= quick
MINUTES ?= 25
TRAINED := _build/training
TRAIN = $(BIN)/python -m training.train --corpus $(TRAINED)/corpus --tokenizer checkpoints/hybrid --bounded --minutes $(MINUTES)
BEYOND := tests/test_conformance.py tests/test_fla.py tests/test_sweep.py tests/test_harness.py tests/test_notebooks_elsewhere.py
CONFIG ?= sweep/example.yaml
RUN ?= _build/sweep
CORES ?= 2

.PHONY: help book test test-architectures test-gpu conformance check notebooks bench full quick figure sweep train clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true # on all cores; some packages hold files for other versions of Python
	touch $@

book: .venv/installed ## run the notebooks (PROFILE=quick) and build the site into _build/html
	$(BIN)/python -m book.assemble --stage $(STAGE) --profile $(PROFILE)
	rm -rf _build/_doctrees _build/.doctrees _build/html
	$(BIN)/jupyter-book build $(STAGE) --path-output . --all -n -W --keep-going
	@echo "the book is in _build/html/index.html"

test: .venv/installed ## run the tests that need no GPU, two at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not gpu" $(BEYOND:%=--ignore=%)

test-architectures: .venv/installed ## run every architecture's checks on its tiny model, a sweep, and lm-evaluation-harness
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not gpu" $(BEYOND)

test-gpu: .venv/installed ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

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

full: .venv/installed ## run the notebooks with the full profile (ONLY="NAME ..." some of them) and store their results
	$(BIN)/python -m book.assemble --stage _build/full --profile full $(if $(ONLY),--only $(ONLY))
	mkdir -p results/full && cp _build/full/results/[0-9]*.json results/full/

quick: book ## build the book and store what its quick runs gave, which tests hold later builds to
	mkdir -p results/quick && cp $(STAGE)/results/[0-9]*.json results/quick/

figure: .venv/installed ## store the figure of the README, from a quick run of the first notebook
	$(BIN)/python -m book.assemble --stage _build/figure --only 01_stratification --figure book/ranks.png

sweep: .venv/installed ## run notebooks on models and seeds (CONFIG=sweep/example.yaml RUN=_build/sweep CORES=2), or go on with it (UNLOCK=1 first, if make itself was killed)
	$(if $(UNLOCK),$(BIN)/snakemake --snakefile sweep/Snakefile --configfile $(CONFIG) --directory $(RUN) --unlock)
	$(BIN)/snakemake --snakefile sweep/Snakefile --configfile $(CONFIG) --directory $(RUN) --cores $(CORES) --rerun-incomplete

train: .venv/installed ## train both embedded models, side by side on one CUDA GPU (BOOKS=folder of texts, MINUTES=25)
	@test -d "$(BOOKS)" || { echo "say where the texts are: make train BOOKS=folder; got BOOKS=$(BOOKS)"; exit 1; }
	$(BIN)/python -m training.corpus $(BOOKS) --tokenizer checkpoints/hybrid --out $(TRAINED)/corpus
	$(TRAIN) hybrid --out $(TRAINED)/hybrid & first=$$!; $(TRAIN) pure --out $(TRAINED)/pure; wait $$first
	for name in hybrid pure; do $(BIN)/python -m training.card $$name $(TRAINED)/$$name; done

clean: ## remove what was built, keep the environment
	rm -rf _build
