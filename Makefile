# Everything runs in .venv, which is made on first use from constraints.txt. `make help` lists the targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PEERS  := $(VENV)/.peers
EVALUATION := $(VENV)/.evaluation
EXAMPLES := $(VENV)/.examples
# Tests: one worker a core (two is enough for them), and one thread a worker: more only wait for each other.
WORKERS ?= 2
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DELETE_ON_ERROR:
.PHONY: help install demo test lint format bench peers test-peers experiments experiments-small examples docs clean

help:
	@echo "make demo    train on scikit-learn's digits, write out/demo/report.html and results.json"
	@echo "make test    all tests              make lint   ruff and mypy     make format  ruff format"
	@echo "make bench   the benchmarks         make peers  packages that the benchmarks compare with"
	@echo "make experiments-small  every table of the evaluation at a small setting, minutes"
	@echo "make experiments        the full tables: hours; goes on where it was stopped"
	@echo "make examples generative models, segmentation, text: pictures and figures in out/examples"
	@echo "make docs    the documentation      make clean  remove what these targets made"
	@echo "make test-peers  the tests that compare with those packages"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing nullbayes into $(VENV) (first use, or the requirements changed)"
	@$(PIP) -e '.[test]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/nullbayes demo

test: $(STAMP)
	@$(ONE_THREAD) $(BIN)/python -m pytest -q -n $(WORKERS) $(ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(PEERS)
	@set -e; for file in benchmarks/[a-z]*.py; do \
	    name=$$(basename $$file .py); echo "== benchmarks.$$name"; $(BIN)/python -m benchmarks.$$name; done

# laplace-torch and its relatives, without their requirements: those include torchvision.
peers: $(PEERS)

$(PEERS): $(STAMP)
	@$(PIP) -e '.[bench]'
	@$(PIP) --no-deps laplace-torch curvlinops-for-pytorch backpack-for-pytorch einconv unfoldnd asdfghjkl
	@touch $@

test-peers: $(PEERS)
	@$(ONE_THREAD) $(BIN)/python -m pytest -q -n $(WORKERS) tests_peers $(ARGS)

# The evaluation: two processes at a time, one thread each (WORKERS=1 where 20 GB of memory are too many).
# Pieces are kept under out/experiments: a second call does what is missing. ARGS: `--seeds 1 tabular`.
experiments: $(EVALUATION)
	@$(ONE_THREAD) $(BIN)/python -m experiments --setting full --workers $(WORKERS) --threads 1 $(ARGS)
	@$(BIN)/python -m experiments --docs

experiments-small: $(EVALUATION)
	@$(ONE_THREAD) $(BIN)/python -m experiments --setting small --workers $(WORKERS) --threads 1 $(ARGS)

$(EVALUATION): $(PEERS)
	@$(PIP) -e '.[experiments]'
	@touch $@

# Minutes each. ARGS: `--small` for a look, `--docs` to renew the pictures of the documentation.
examples: $(EXAMPLES)
	@set -e; for file in examples/[a-z]*.py; do \
	    name=$$(basename $$file .py); echo "== examples.$$name"; $(BIN)/python -m examples.$$name $(ARGS); done

# Transformers for one of them; it comes without torchvision.
$(EXAMPLES): $(STAMP)
	@$(PIP) -e '.[experiments]'
	@touch $@

docs: $(STAMP)
	@$(PIP) -e '.[docs]'
	@$(BIN)/mkdocs build --strict

clean:
	rm -rf out site dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find nullbayes tests benchmarks experiments examples -name __pycache__ -type d -prune -exec rm -rf {} +
