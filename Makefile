# `make quickstart` and `make test` do everything on a fresh machine with Python 3.10+ and pip, set-up included.
PYTHON ?= python3
BIN := .venv/bin
RUN := output/quickstart
# test processes, one thread and about 3 GB of memory each
JOBS ?= 2
OLDEST := .venv-oldest

.PHONY: quickstart test test-oldest types docs dist format

.venv/installed: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

quickstart: .venv/installed
	rm -rf $(RUN)
	$(BIN)/python train.py --config configs/quickstart.yaml
	$(BIN)/python validate.py --checkpoint $(RUN)/model_best.pth.tar --split test \
		--plot $(RUN)/exits.png --results-file $(RUN)/exits.json \
		--adaptive --max-drop 3 --save-policy --report $(RUN)/page.html
	@echo 'Look at $(RUN)/page.html in a browser; the plot is $(RUN)/exits.png, the numbers are in $(RUN)/exits.json.'

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m 'not gpu'
	if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then $(BIN)/python -m pytest -m gpu; fi

# the lower bounds of install_requires, exactly; the extra [onnx] needs a newer torch, its packages do not
$(OLDEST)/installed: setup.cfg pyproject.toml
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	sed -n '/^install_requires/,/^$$/s/^ *\([a-z_]*\)>=\([0-9.]*\)$$/\1==\2/p' setup.cfg > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/constraints.txt --editable '.[test]' onnx onnxruntime onnxscript
	touch $@

test-oldest: $(OLDEST)/installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(JOBS)

types: .venv/installed
	$(BIN)/mypy

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

docs: .venv/docs
	$(BIN)/mkdocs build --strict

# what a release uploads; with TAG=vX.Y.Z, X.Y.Z must be the version
dist: .venv/installed
	test -z "$$TAG" || test "$$TAG" = "v$$($(BIN)/python -c 'import runpy; print(runpy.run_path("timm_mlcsd/version.py")["__version__"])')"
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
