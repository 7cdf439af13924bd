# Each target sets up all that it needs. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test lint clean

help:
	@echo "make demo   train, evaluate and plot on the bundled digits"
	@echo "make test   run all tests"
	@echo "make lint   style and types"
	@echo "make clean  remove the environment (runs/ stays)"

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
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV)
