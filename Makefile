# A target for each thing people do; `make` lists them.
PYTHON ?= python

.DEFAULT_GOAL := help
.PHONY: help install test test-all lint format compare bench picture

help:        ## list the targets
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/: *##/\t/' | expand -t 14

install:     ## install for development, with the tests' tools
	$(PYTHON) -m pip install -e ".[test]"

test:        ## what CI runs: minutes
	$(PYTHON) -m pytest

test-all:    ## everything, with the heavy optional packages and the slow tests
	$(PYTHON) -m pip install -e ".[heavy]"
	$(PYTHON) -m pytest -m "not gpu" --timeout=3600

lint:        ## ruff, pyright, import-linter
	ruff check . && ruff format --check . && pyright && lint-imports

format:      ## put the code into shape
	ruff format . && ruff check --fix .

compare:     ## the main job
	skipscope compare

bench:       ## every benchmark, as ratios measured in one run; JSON in benchmarks/results/
	$(PYTHON) -m benchmarks

picture:     ## draw the README's picture anew
	$(PYTHON) docs/make_picture.py
