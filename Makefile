PYTHON ?= python3
CUDA ?= 0
ENV ?= InvertedDoublePendulum-v4
STEPS ?= 40000
SEEDS ?= 1
OUT ?= runs/$(ENV)

BIN := .venv/bin
comma := ,
EXTRAS := book,test,cluster,export,relatives$(if $(filter 1,$(CUDA)),$(comma)cuda)
STAMP := .venv/installed-$(if $(filter 1,$(CUDA)),cuda,cpu)
# Compiled programs, the smallest too, are shared by chapters, tests and book.
export JAX_COMPILATION_CACHE_DIR := $(CURDIR)/.jax_cache
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS := 0

.PHONY: install train check test book notebooks export format lint

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
	  { echo "som wants Python 3.11 or 3.12, found $$($(PYTHON) --version): set PYTHON=python3.11."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "Python cannot make a virtual environment: install the Debian package python3-venv."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e '.[$(EXTRAS)]' -c constraints.txt
	@touch $@

train: install
	$(BIN)/python -m som train --env $(ENV) --steps $(STEPS) --seeds $(SEEDS) --profile laptop --out $(OUT)

# Tests that need no whole run.
QUICK := $(addprefix tests/,theory agent test_structure.py test_package.py test_tools.py \
  $(patsubst %,training/test_%.py,environments records replay settings))

check: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(QUICK)

test: lint
	$(BIN)/python -m pytest --nbmake -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/python tools/export.py --check
	$(BIN)/python tools/notebooks.py --check
	$(BIN)/python tools/readme.py --check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

book: install
	rm -rf _build
	$(BIN)/jupyter-book build . -W --keep-going
	$(BIN)/python tools/browser.py _build/html

format: install
	$(BIN)/python tools/format_cells.py
	$(BIN)/ruff format .

export: install
	$(BIN)/python tools/export.py
	$(BIN)/python tools/readme.py

notebooks: install
	$(BIN)/python tools/notebooks.py
