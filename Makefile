# `make train` and `make test` are all that most users need. Every target sets up .venv first.
PYTHON ?= python3
RUN := .venv/bin/python
# Tests run in as many processes as there are cores, up to four.
WORKERS := --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: help train sample test test-fast torture lint clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/:/' | awk -F': *' '{printf "  make %-10s %s\n", $$1, $$2}'

train: .venv/ready  ## train the default model, or resume it, and print samples (ARGS="key=value ...")
	@$(RUN) train.py $(ARGS)

sample: .venv/ready  ## complete a prompt with the latest run (ARGS='prompt="Return the"')
	@$(RUN) sample.py $(ARGS)

# A hundred tests start programs, each of which would compile all modules where none are kept.
test test-fast: export PYTHONDONTWRITEBYTECODE =

test: .venv/ready  ## run the whole test suite
	$(RUN) -m pytest -q $(WORKERS)

test-fast: .venv/ready  ## run the tests that take seconds
	$(RUN) -m pytest -q $(WORKERS) -m "not slow"

torture: .venv/ready  ## try to lose a run in every possible way (half an hour)
	$(RUN) -m scripts.torture

lint: .venv/ready  ## check the style
	$(RUN) -m ruff check .

clean:  ## remove .venv and caches; runs and prepared data stay
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# This file is created last, so that an interrupted installation starts over.
.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"nanohydra needs Python 3.11 or later, and $(PYTHON) is " + sys.version.split()[0] + \
		": choose another, as in make train PYTHON=python3.12")'
	@echo "Installing into .venv: this takes a minute or more."
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --requirement requirements.txt
	@touch .venv/ready
