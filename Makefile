# make test    create the environment, lint, type-check, test
# make book    create the environment, execute and build the book
# make help    everything else
#
# Needs Python >= 3.11 (with its venv module), make and a network for the first run.
# Choose another interpreter with `make PYTHON=/path/to/python3.12 test`.
# `make JOBS=8 test` tests in eight processes.

VENV   ?= .venv
PYTHON ?=
JOBS   ?= 2

SHELL := bash
BIN   := $(VENV)/bin

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help env test lint types unit format tables rerun book check-book book-pdf clean distclean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ---- environment ------------------------------------------------------------------------------

$(BIN)/python:
	@found=""; \
	for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11 python; do \
	    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
	    found="$$python"; \
	    "$$python" -c 'import ensurepip, venv' >/dev/null 2>&1 || continue; \
	    echo "Creating $(VENV) with $$("$$python" --version)"; \
	    rm -f "$(VENV)"/.installed-*; "$$python" -m venv "$(VENV)"; exit; \
	done; \
	if [ -n "$$found" ]; then \
	    echo "$$("$$found" --version) is here, but without its venv module."; \
	    echo "On Debian and Ubuntu: sudo apt install python3-venv (or python3.X-venv), then try again."; \
	else \
	    echo "pycnf needs Python 3.11 or newer, and none was found as python3 or python3.X."; \
	    echo "Install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; \
	fi >&2; \
	exit 1

# One stamp for each extra; a changed pyproject.toml installs again. What pip says is cut to what it downloads.
ifdef VERBOSE
PROGRESS := cat
else
PROGRESS := { grep --line-buffered -oE 'Downloading [^ ]+\.(whl|tar\.gz) .*|Installing collected packages' || true; }
endif

$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo "Installing pycnf[$*] into $(VENV): minutes the first time, most of them for torch"
	@set -o pipefail; $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
	    --editable ".[$*]" | $(PROGRESS)
	@touch $@

env: $(VENV)/.installed-dev $(VENV)/.installed-book ## create the environment with everything for tests and book
	@echo "Ready: source $(BIN)/activate"

# ---- code -------------------------------------------------------------------------------------

test: lint types unit ## create the environment, lint, type-check, test

lint: $(VENV)/.installed-dev ## check style and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: $(VENV)/.installed-dev ## check types
	$(BIN)/mypy

unit: $(VENV)/.installed-dev ## run tests and doctests
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest -n $(JOBS) -m "not book"

format: $(VENV)/.installed-dev ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tables: $(VENV)/.installed-dev ## write the tables of the README from the records in results/
	$(BIN)/python benchmarks/tables.py

rerun: $(VENV)/.installed-dev ## make a record anew: make rerun RECORD=results/...; without RECORD: list them
	@$(BIN)/python book/_ext/rerun.py $(RECORD)

# ---- book -------------------------------------------------------------------------------------

# Executed pages are kept in _build/.jupyter_cache, which notices a change of a page's own code only. The
# build starts anew when anything else that the numbers come from changes. After a failed build the parsed
# pages go, because Sphinx would not report their warnings a second time.
# What the browser would be needed for is checked by `make check-book`.
book: $(VENV)/.installed-book ## create the environment, execute, build and check the book
	@$(BIN)/python book/_ext/execution_key.py _build
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
	    $(BIN)/jupyter-book build book --config _config.yml --path-output . -W -n --keep-going \
	    || { rm -rf _build/.doctrees; exit 1; }
	$(BIN)/pytest -q tests/test_book.py -m "not book"
	@echo "Open $(CURDIR)/_build/html/index.html"

check-book: $(VENV)/.installed-look book ## open every page of the book in a browser and check what it shows
	$(BIN)/pytest -q tests/test_book.py -m book

# LaTeX and the converter of figures are programs of the system, so they are looked for and not installed.
book-pdf: $(VENV)/.installed-book ## build the book as one PDF, where a LaTeX is installed
	@for program in latexmk xelatex rsvg-convert; do \
	    command -v $$program >/dev/null || { echo "make book-pdf needs $$program, which is not here."; \
	    echo "On Debian and Ubuntu: sudo apt install latexmk texlive-xetex texlive-latex-extra fonts-freefont-otf librsvg2-bin"; \
	    exit 1; }; \
	done >&2
	@$(BIN)/python book/_ext/execution_key.py _build
	TEXINPUTS="$(CURDIR)/book/_ext/latex:" OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
	    $(BIN)/jupyter-book build book --config _config.yml --path-output . --builder pdflatex
	@echo "Open $(CURDIR)/_build/latex/pycnf.pdf"

# ---- housekeeping -----------------------------------------------------------------------------

clean: ## remove builds and caches
	rm -rf _build dist build .mypy_cache .pytest_cache .ruff_cache
	find pycnf tests book -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove the environment too
	rm -rf $(VENV)
