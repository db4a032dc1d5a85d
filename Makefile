# Every target works on a fresh clone: it makes .venv first if that is missing or out of date.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# Nothing here reaches for a model hub, and two threads keep small operations fast.
export HF_HUB_OFFLINE := 1
export OMP_NUM_THREADS ?= 2

.PHONY: install demo test test-slow lint \
  bench-truth bench-frontier bench-costs bench-overhead bench-solvers bench-optimum \
  bench-coverage bench-scale bench-finetune pictures

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "Making .venv (a minute or two) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --no-input --progress-bar off -c constraints.txt -e '.[dev]' \
	  | awk '/^Collecting/ { print "  " $$2; fflush() }'
	@touch $@
	@echo "Made .venv."

demo: $(STAMP)
	@$(BIN)/python benchmarks/demo.py

# Two processes, of one thread each.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

test-slow: $(STAMP)
	$(BIN)/pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests benchmarks examples

bench-truth: $(STAMP)
	$(BIN)/python benchmarks/truth.py

bench-frontier: $(STAMP)
	$(BIN)/python benchmarks/frontier.py

bench-costs: $(STAMP)
	$(BIN)/python benchmarks/costs.py

bench-solvers: $(STAMP)
	$(BIN)/python benchmarks/solvers.py

bench-optimum: $(STAMP)
	$(BIN)/python benchmarks/optimum.py

bench-coverage: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/coverage.py

bench-scale: $(STAMP)
	$(BIN)/python benchmarks/scale.py

bench-finetune: $(STAMP)
	$(BIN)/python benchmarks/finetune.py

pictures: $(STAMP)
	$(BIN)/python benchmarks/pictures.py

bench-overhead: $(STAMP)
	@$(BIN)/python benchmarks/overhead.py
