# `make demo` and `make test` need Python 3.10+, pip and make; everything else goes into .venv, at the versions of
# constraints.txt. `make test PYTHON=python3.12` chooses the Python that .venv is made with.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
DEMO := $(VENV)/demo-ready
OUT := out
# One thread a process: the tensors are small, and processes that share cores must not wait for each other's threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist worksteal
CODE := fusedres kernels benchmarks tests examples docs setup.py
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The newest Python with a full set of pinned wheels (torchvision refuses 3.14.1), able to make a virtual environment.
USABLE := import sys, venv; v = sys.version_info[:3]; sys.exit(not (3, 10) <= v < (3, 15) or v == (3, 14, 1))
PYTHON ?= $(shell for python in python3.14 python3.13 python3.12 python3.11 python3.10 python3 python; do \
	$$python -c '$(USABLE)' >/dev/null 2>&1 && echo $$python && break; done)

.PHONY: help demo test test-aten test-aten-sample test-triton test-triton-sample test-ptx test-ptx-sample test-slow test-oldest bench sweep docs lint format types wheel clean

help:
	@echo 'make demo    a ResNet-18 and its fused form side by side, the kernels beside PyTorch, the bytes that they move'
	@echo 'make test    lint, types, and the tests over plain PyTorch, over the Triton kernels and over their machine code'
	@echo 'make bench   measure what this machine can measure; the page is $(OUT)/bench/README.md'
	@echo 'make docs    the pages of docs/ as a site in $(OUT)/docs'
	@echo 'also: sweep test-aten test-triton test-ptx test-slow test-oldest lint format types wheel clean'

demo: $(DEMO)
	$(BIN)/fusedres demo --out $(OUT)

test: lint types test-aten-sample test-triton-sample test-ptx-sample

test-aten: $(READY)
	$(PYTEST) -m 'not slow' --backend aten $(ARGS)

test-triton: $(READY)
	$(PYTEST) -m 'not slow' --backend triton $(ARGS)

# All tests, and of those that compile a kernel for one chip and another every third case.
test-aten-sample: $(READY)
	$(PYTEST) -m 'not slow' --backend aten --sample-compiler 3 $(ARGS)

# The interpreter is slow.
test-triton-sample: $(READY)
	$(PYTEST) -m 'not slow' --backend triton --sample 4 $(ARGS)

# What Triton compiles of the kernels, run on the CPU (docs/testing.md); it needs gcc. ARCH is 80 or 90.
ARCH := 90
test-ptx: $(READY)
	$(PYTEST) -m 'not slow' --backend ptx --arch $(ARCH) $(ARGS)

test-ptx-sample: $(READY)
	$(PYTEST) -m 'not slow' --backend ptx --arch 90 --sample 48 $(ARGS)
	$(PYTEST) -m 'not slow' --backend ptx --arch 80 --sample 80 $(ARGS)

test-slow: $(READY)
	$(PYTEST) -m slow --backend aten $(ARGS)
	$(PYTEST) -m slow --backend triton $(ARGS)

# The other end of the range in pyproject.toml; numpy is held back for the interpreter of Triton 3.6.
test-oldest:
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/pip install --quiet torch==2.10.0 torchvision==0.25.0 triton==3.6.0 'numpy<2.4' \
		'setuptools>=77' '.[demo,models,recipes,test]'
	.venv-oldest/bin/pytest -m 'not slow' --backend aten $(ARGS)
	.venv-oldest/bin/pytest -m 'not slow' --backend triton $(ARGS)

bench: $(READY)
	$(BIN)/python -m fusedres bench --out $(OUT)/bench $(ARGS)
	$(BIN)/pytest benchmarks -p no:xdist --benchmark-only --benchmark-columns=median,iqr,rounds

# Every architecture of the packages that are installed; `make sweep ARGS="'resnet*'"` for some.
sweep: $(READY)
	$(BIN)/python -W ignore -m fusedres.benchmarks.sweep --out $(OUT)/sweep $(ARGS)

# In an environment of its own without PyTorch: half a minute from nothing. A warning is an error (--quiet would lose it).
docs: .venv-docs/ready
	NO_MKDOCS_2_WARNING=true .venv-docs/bin/mkdocs build --site-dir $(OUT)/docs

.venv-docs/ready: pyproject.toml constraints.txt | .venv-docs/bin/pip
	.venv-docs/bin/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	.venv-docs/bin/python -m pip install --quiet --constraint constraints.txt --group docs
	@touch $@

lint: $(READY)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

format: $(READY)
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

# Type checkers do not find fusedres.kernels in an editable install, so they get an installed wheel.
types: wheel
	$(BIN)/pip install --quiet --no-deps --upgrade --target build/types dist/fusedres-*.whl
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache

# build/ goes first: setuptools would pack what an earlier build left there.
wheel: $(READY)
	rm -rf build dist
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf $(VENV) .venv-docs $(OUT) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks

$(READY): pyproject.toml setup.py constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip setuptools
	$(BIN)/python -m pip install --constraint constraints.txt --no-build-isolation \
		--editable '.[demo,models,recipes,test]'
	@touch $@

# The demo needs no linter and no test runner.
$(DEMO): pyproject.toml setup.py constraints.txt | $(BIN)/pip
	@echo 'installing into $(VENV): PyTorch is most of it, a download of about 3 GB and 5.8 GB of disk'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[demo]'
	@touch $@

# A Python without ensurepip (Debian's, before python3-venv) lends its own pip.
$(BIN)/pip .venv-docs/bin/pip:
	@test -n '$(PYTHON)' || { echo 'no Python 3.10 to 3.14 found; name one: make PYTHON=/path/to/python' >&2; exit 1; }
	$(PYTHON) -m venv --clear $(@:/bin/pip=) || { $(PYTHON) -m venv --clear --without-pip $(@:/bin/pip=) \
		&& $(PYTHON) -m pip --python $(@D)/python install --constraint constraints.txt pip; }
