# Two commands do all the set-up; what they need is Python 3.11 to 3.13 and an index to install from:
#
#   make demo    trains on this machine's own text and opens the chat; the second time it opens at once
#   make test    runs the tests; `make lint` the style and the types; `make upstream` transformers' own tests of models
#   make bench   measures this machine, side by side with transformers' own classes
#
# The virtual environment is .venv, made by uv where it is installed, else by venv and pip (`make demo UV=` asks
# for pip). It gets the exact versions in constraints.txt, which are those that were tested; `make demo CONSTRAINTS=`
# takes the newest within pyproject.toml's bounds instead. It is installed again only when one of the two files has
# changed. TORCH chooses the torch that is installed first, for example another build of the same version:
#
#   make demo TORCH="torch==2.13.0 --index-url URL-of-an-index-with-CPU-builds"

PYTHON ?= python3
TORCH ?=
CONSTRAINTS ?= constraints.txt
UV ?= $(shell command -v uv)
# What pytest gets beside the defaults; `make test ARGS=` includes the tests that take minutes.
ARGS ?= -m "not slow"

VENV := .venv
BIN := $(VENV)/bin
constrain = $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

ifneq ($(UV),)
make_venv = $(UV) venv --quiet --allow-existing --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV)
install = $(UV) pip install --python $(BIN)/python $(constrain)
else
# `pip install --group` came with pip 25.1.
make_venv = $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet $(constrain) "pip>=25.1"
install = $(BIN)/python -m pip install $(constrain)
endif

.PHONY: help demo test upstream lint bench constraints

help:
	@echo "make demo   train on this machine's own text, then chat at http://127.0.0.1:7860"
	@echo "make test   run the tests"
	@echo "make lint   check style and types"
	@echo "make bench  measure speed and memory beside transformers' own classes"
	@echo "make upstream   run transformers' own tests of models on Fathom's"
	@echo "make constraints   write constraints.txt anew: the newest versions within pyproject.toml's bounds"

demo: $(VENV)/.installed
	$(BIN)/fathom quickstart

bench: $(VENV)/.installed
	$(BIN)/fathom bench

# One torch thread per worker: more would fight over the cores that the workers already fill.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

# The tests come with the source distribution of transformers, which pip fetches from the configured index.
upstream: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadscope $(ARGS) tests/upstream

# mypy needs a folder named like the package; the repository itself is the package.
lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p .types && ln -sfn .. .types/fathom
	MYPYPATH=.types $(BIN)/mypy -p fathom.modeling -p fathom.tokenizer -p fathom.training -p fathom.demo -p fathom.scripts

# torch 2.13.0 is the oldest release within the bounds: the suite runs on it, and .ci/fresh on the newest.
constraints:
	$(PYTHON) -m venv .venv-uv && .venv-uv/bin/python -m pip install --quiet uv
	{ echo "# The versions that the tests ran with, for Python 3.11 to 3.13; written by 'make constraints'."; \
	  echo "torch==2.13.0" | .venv-uv/bin/uv pip compile --quiet --universal --python-version 3.11 --all-extras \
	    --group dev --group build --no-annotate --no-header --constraint - pyproject.toml; } > constraints.new
	mv constraints.new constraints.txt
	rm -r .venv-uv

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))" || { \
	  echo "Fathom needs Python 3.11, 3.12 or 3.13; '$(PYTHON)' is $$($(PYTHON) --version 2>&1): name another with make PYTHON=python3.12" >&2; \
	  exit 1; }
	$(make_venv)
	$(if $(TORCH),$(install) $(TORCH))
	$(install) --group build
	$(install) --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(install) --group dev
	@touch $@
