# make demo   train a LoRA on the model that comes with the package and look at what it learned
# make test   everything that must hold before a change lands
# make lab    JupyterLab on the notebooks

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

# Threads that spin while they wait make a shared machine several times slower.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-full lab lint clean

# A torch that this machine's Python can already import (a rented GPU's own) is reused; otherwise the tested one is installed.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "sd3tune needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then \
		echo "using the torch of $$($(PYTHON) -c 'import sys, torch; print(sys.executable, torch.__version__)')"; \
		$(PYTHON) -m venv --clear --system-site-packages $(VENV); grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt; \
	else \
		$(PYTHON) -m venv --clear $(VENV); cp constraints.txt $(VENV)/constraints.txt; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"; \
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(VENV)/constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/python notebooks/run_quickstart.py

# Two files at a time, the notebooks first because they are the longest, with one thread each.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not full" \
		--nbmake --nbmake-timeout=900 notebooks/quickstart.ipynb notebooks/panel.ipynb tests

test-full: $(READY)
	$(BIN)/python -m pytest -m full tests

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check sd3tune tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

lab: $(READY)
	$(BIN)/jupyter lab notebooks

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
