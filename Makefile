# Each target sets up all that it needs. PYTHON picks the interpreter (3.11 or newer), JOBS how many
# processes run tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
JOBS ?= 2

.PHONY: help demo test test-all lint clean

help:
	@echo "make demo       train, evaluate and plot on the bundled digits"
	@echo "make test       run the everyday tests: minutes"
	@echo "make test-all   run all tests, with the compiler's optimisations on: an hour"
	@echo "make lint       style and types"
	@echo "make clean      remove the environment (runs/ stays)"

$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; $$($(PYTHON) --version) was found. Try: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/bitmixer train --config experiments/configs/digits.py:float --workdir runs/digits-float
	$(BIN)/bitmixer train --config experiments/configs/digits.py --workdir runs/digits \
		--config.init_from=runs/digits-float
	$(BIN)/bitmixer evaluate --workdir runs/digits --random 100 --policy 4,3,2,2,3,4

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist loadfile

# Compiled as for users; the everyday tests save the compiler most of its work.
test-all: $(READY)
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV)
