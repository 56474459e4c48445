# Every target sets up .venv from constraints.txt on first use.
PYTHON ?= python3
VENV := .venv
RUN := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(VENV)/bin/python
# A core for each of a few processes: threads that wait for each other on the same cores cost far more than they bring.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest tests --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: help demo test test-fast lint types bench clean

help:
	@echo "make demo       train the three stages on real panoramas, save, load elsewhere, ask (minutes)"
	@echo "make test       all tests;  make test-fast  without those that take more than ten seconds"
	@echo "make lint       ruff;  make types  mypy"
	@echo "make bench      every benchmark, each beside its peer"
	@echo "make clean      remove .venv and build"

$(VENV)/.ready: constraints.txt setup.cfg pyproject.toml
	@echo "== Setting up $(VENV) from constraints.txt"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt torch
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[train,test,lint]"
	@touch $@

demo: $(VENV)/.ready
	@echo "== Composing a small model, training its three stages on samples/, asking it in a new process"
	@$(RUN) -m panorama_vlm.demo.quickstart --output build/demo

test: $(VENV)/.ready
	@echo "== Running all tests"
	@$(PYTEST)

test-fast: $(VENV)/.ready
	@echo "== Running all but the slow tests"
	@$(PYTEST) -m "not slow"

lint: $(VENV)/.ready
	@echo "== ruff"
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

types: $(VENV)/.ready
	@echo "== mypy"
	@rm -rf build/types && mkdir -p build/types/panorama_vlm
	@for part in *.py train demo benchmarks tests; do ln -s ../../../$$part build/types/panorama_vlm/; done
	@cd build/types && ../../$(VENV)/bin/mypy --config-file ../../pyproject.toml -p panorama_vlm

bench: $(VENV)/.ready
	@for file in benchmarks/[a-z]*.py; do \
		echo "== $$file"; $(RUN) -m panorama_vlm.benchmarks.$$(basename $$file .py) || exit 1; \
	done

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
