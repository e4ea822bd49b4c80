# make demo | emulate | test | soak | lint | notebooks | instructions | gpu OUT=folder | bench | clean
#
# demo and test make virtual environments of their own and install into them once; a changed
# pyproject.toml or constraints.txt installs again. gpu uses the python it is given: PYTHON=...

PYTHON ?= python3
EXTRAS ?= demo
SECONDS ?= 600
PYTEST_ARGS ?= -n 2 --dist worksteal --durations=25
OUT ?= out

VENV := .venv
DEMO := .venvs/demo
SOURCES := $(wildcard cupynorm/*.py cupynorm/*/*.py cupynorm/py.typed kernels/*)
# Bytecode is made of what is imported alone, when it is.
PIP := -m pip --disable-pip-version-check install -qq --no-compile

# The CUDA extra that fits the driver; none without a driver. Set CUDA_EXTRA= to do without.
CUDA_EXTRA ?= $(shell nvidia-smi 2>/dev/null | \
  sed -nE 's/.*CUDA[A-Za-z ]*Version: *([0-9]+).*/\1/p' | head -n 1 | \
  awk '{ print ($$1 >= 13) ? "cuda13" : "cuda12" }')
comma := ,
DEMO_EXTRAS = $(EXTRAS)$(if $(CUDA_EXTRA),$(comma)$(CUDA_EXTRA))

.DELETE_ON_ERROR:
.PHONY: help demo emulate test soak lint notebooks instructions docs gpu bench clean python-check compiler-check

help:
	@echo "make demo              install, normalize real data on every available path, save a picture"
	@echo "make emulate           run handwritten digits through every kernel, without a GPU (a minute)"
	@echo "make test              install all that the tests need, run them"
	@echo "make soak SECONDS=600  random calls from threads, forks, under interrupts and little memory (SOAK_ARGS='--seed 1')"
	@echo "make lint              ruff and mypy"
	@echo "make notebooks         run docs/notebooks/*.py and store what they show in the .ipynb"
	@echo "make instructions      instructions of small calls against their budgets, by valgrind"
	@echo "make docs              the documentation site, into build/docs; warnings and broken links are errors"
	@echo "make gpu OUT=folder    on a machine with a CUDA GPU: tests, sanitizer, benchmark; no network (ten minutes; GPU_ARGS='--only forward' for a step)"
	@echo "make bench OUT=folder  CPU times against torch, onnxruntime, JAX and others (ten minutes at most; BENCH_ARGS='--groups shapes')"
	@echo "make clean             remove what the others made"

python-check:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, '$(PYTHON)' is not: make PYTHON=python3.12 ..." >&2; exit 1; }

# -- demo: the package as a user installs it, so not editable, and -P keeps the checkout out of sys.path

demo: $(DEMO)/.installed
	@mkdir -p out
	$(DEMO)/bin/python -P -m cupynorm --picture out/demo.png
	@command -v nvidia-smi >/dev/null || echo "No GPU here: 'make emulate' runs the kernels without one."

$(DEMO)/.installed: pyproject.toml $(SOURCES) | python-check
	test -x $(DEMO)/bin/python || $(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python $(PIP) ".[$(DEMO_EXTRAS)]"
	@touch $@

# -- test

test: compiler-check $(VENV)/.installed
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

soak: $(VENV)/.installed
	$(VENV)/bin/python -m tests.soak --seconds $(SECONDS) $(SOAK_ARGS)

# The PTX of every kernel on the CPU, on real data: kernel, architecture, error, bytes moved over the floor.
emulate: compiler-check $(VENV)/.installed
	$(VENV)/bin/python -m tests.ptx

compiler-check:
	@command -v g++ >/dev/null || { echo "g++ is needed: it builds the engine that runs" \
	  "the kernels on the CPU. On Debian: apt-get install g++" >&2; exit 1; }

# The build backend goes first so that the package itself, editable, needs no isolated download of it.
$(VENV)/.installed: pyproject.toml constraints.txt | python-check
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) -c constraints.txt hatchling editables
	$(VENV)/bin/python $(PIP) -c constraints.txt --no-build-isolation -e ".[test]"
	@touch $@

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The text is the .py; the .ipynb is made from it. On a machine without a GPU, as what is stored is.
notebooks: $(VENV)/.installed
	$(VENV)/bin/python docs/run_notebooks.py

# The Python of small calls up to the launch, counted by callgrind against bench/budgets.json.
instructions: $(VENV)/.installed
	$(VENV)/bin/python -m bench.calls --instructions

# -- docs: a warning is an error, and so is a link within the site that leads nowhere

docs: $(VENV)/.installed
	$(VENV)/bin/python -m sphinx -q -W --keep-going -n -b html docs build/docs
	$(VENV)/bin/python -m docs._generate.links build/docs
	@echo "build/docs/index.html"

# -- measurements

# For a machine without a network: the python at hand, which must have CuPy, pytest and numpy.
# GPU_ARGS=--simulate runs the same logic without a GPU.
gpu:
	$(PYTHON) -m bench.gpu --out "$(OUT)" $(GPU_ARGS)

# Needs none of what the tests need: its extra alone is installed, into the same environment.
$(VENV)/.bench: pyproject.toml constraints.txt | python-check
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) -c constraints.txt hatchling editables
	$(VENV)/bin/python $(PIP) -c constraints.txt --no-build-isolation -e ".[bench]"
	@touch $@

bench: $(VENV)/.bench
	@mkdir -p "$(OUT)"
	$(VENV)/bin/python -m bench.cpu --out "$(OUT)" --plots $(BENCH_ARGS)
	$(VENV)/bin/python -m bench.calls --to "$(OUT)"
	$(VENV)/bin/python -m bench.frames --to "$(OUT)" $(FRAMES_ARGS)
	$(VENV)/bin/python -m bench.dask --to "$(OUT)" $(DASK_ARGS)

clean:
	rm -rf $(VENV) .venvs out build dist docs/generated .pytest_cache .mypy_cache .ruff_cache .hypothesis .nvrtc_cache
	find cupynorm tests bench docs examples -name __pycache__ -type d -exec rm -rf {} +
