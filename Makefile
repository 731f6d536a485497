# make demo   train a LoRA on the model that comes with the package and look at what it learned
# make test   everything that must hold before a change lands
# make notebooks   every tutorial, run from top to bottom
# make lab    JupyterLab on the notebooks

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

# Threads that spin while they wait make a shared machine several times slower.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE ?= 1
# What is trained here is so small that more threads wait for each other: the demo takes 77 s with one and 90 s with two.
demo test notebooks test-compat test-full: export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-full notebooks lab lint clean

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
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not full" --ignore=tests/browser \
		--nbmake --nbmake-timeout=900 notebooks/quickstart.ipynb notebooks/04_the_panel.ipynb tests

# Two at a time where pytest-xdist is installed. The first one encodes what all of them share, so that they do not do it twice.
notebooks: $(READY)
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=300 notebooks/01_first_lora.ipynb
	$(BIN)/python -m pytest --durations=15 --nbmake --nbmake-timeout=300 $$($(BIN)/python -c 'import xdist' 2>/dev/null && printf %s '-n 2') \
		--ignore=notebooks/quickstart.ipynb --ignore=notebooks/04_the_panel.ipynb --ignore=notebooks/01_first_lora.ipynb notebooks

# The panels as Colab has them: its ipywidgets and an older kernel, beside everything else of the first environment.
COMPAT := .venv-compat
$(COMPAT)/ready: $(READY)
	$(BIN)/python -m venv --clear --system-site-packages $(COMPAT)
	$(BIN)/python -c 'import site; print(*site.getsitepackages(), sep="\n")' > "$$($(COMPAT)/bin/python -c 'import site; print(site.getsitepackages()[0])')/borrowed.pth"
	$(COMPAT)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps ipywidgets==7.7.1 ipython_genutils 'ipykernel>=6.29,<7'
	@touch $@

test-compat: $(COMPAT)/ready
	$(COMPAT)/bin/python -c 'import ipykernel, ipywidgets; print("ipywidgets", ipywidgets.__version__, "ipykernel", ipykernel.__version__); assert ipywidgets.__version__ == "7.7.1" and ipykernel.__version__ < "7"'
	PYTHONPATH=$(CURDIR) $(COMPAT)/bin/python -m pytest -m "not full" tests/test_forms.py tests/test_panel.py tests/test_red.py tests/test_studio.py
	PYTHONPATH=$(CURDIR) $(COMPAT)/bin/python -m pytest --nbmake --nbmake-timeout=300 notebooks/04_the_panel.ipynb notebooks/01_first_lora.ipynb notebooks/08_when_it_goes_wrong.ipynb

test-browser: $(READY)
	@test -x /usr/bin/chromium || { test "$$(id -u)" = 0 && apt-get install --yes --quiet chromium > /dev/null; } || true
	@if test -x /usr/bin/chromium; then \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(VENV)/constraints.txt playwright && $(BIN)/python -m pytest tests/browser; \
	else echo "SKIPPED: there is no /usr/bin/chromium, and it could not be installed"; fi

test-full: $(READY)
	$(BIN)/python -m pytest -m full --ignore=tests/browser --junitxml=$(VENV)/full.xml tests
	$(BIN)/python benchmarks/full_table.py $(VENV)/full.xml

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check sd3tune tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

lab: $(READY)
	$(BIN)/jupyter lab notebooks/00_setup_and_doctor.ipynb

clean:
	rm -rf $(VENV) $(COMPAT) .pytest_cache .mypy_cache .ruff_cache
