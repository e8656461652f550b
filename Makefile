# `make quickstart` and `make test` do everything on a fresh machine with Python 3.10+ and pip, set-up included.
PYTHON ?= python3
BIN := .venv/bin
RUN := output/quickstart
# test processes, one thread and about 3 GB of memory each
JOBS ?= 2

.PHONY: quickstart test docs format

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
		--adaptive --max-drop 0.5 --save-policy --report $(RUN)/page.html
	@echo 'Look at $(RUN)/page.html in a browser; the plot is $(RUN)/exits.png, the numbers are in $(RUN)/exits.json.'

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

docs: .venv/docs
	$(BIN)/mkdocs build --strict

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
