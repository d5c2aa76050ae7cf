# make demo    installs everything into .venv, then trains, evaluates and draws a DenseCLIP Mask R-CNN
# make test    installs everything into .venv, then lint, types, import layers and the tests
# make test-detectron2    runs the tests that must hold with every detectron2 (tests/both_detectron2.txt)
# make test-fiftyone    tests the export to FiftyOne, in an environment of its own
# make docs    builds the documentation site in build/site
# make test-reliability    damages inputs, kills jobs, fills disks; writes docs/reliability.md
#
# DETECTRON2=<path or git URL> uses another detectron2 (official main; needs a C++ compiler). It is kept until changed.
# E.g. `make test DETECTRON2=https://github.com/facebookresearch/detectron2`; back: `make test DETECTRON2=pb1-detectron2==0.6`.
# PYTHON=<interpreter> chooses the Python (3.10 to 3.13) that .venv is made from.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help env demo test test-slow test-detectron2 test-reliability test-fiftyone docs lint format lock clean FORCE

BIN := .venv/bin
PB1 := pb1-detectron2==0.6
DETECTRON2 ?= $(or $(shell cat .venv/.detectron2 2>/dev/null),$(PB1))

# The first Python of a supported version; looked for only when .venv has to be made.
PYTHON ?= $(shell for python in python3 python python3.12 python3.11 python3.10 python3.13; do \
	$$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& echo $$python && break; done)

# uv: the one at hand, else the one installed into .venv.
UV = $(shell uv --version >/dev/null 2>&1 && echo uv || echo $(BIN)/python -m uv)
PIP = $(UV) pip install --compile-bytecode --python $(BIN)/python --constraint requirements/lock.txt --override requirements/overrides.txt

EXTRAS := $(addsuffix .txt,base docs export extras mining sam scale supervision test track web)

# pb1-detectron2 ships detectron2 0.6 as source; its C++ extension is skipped (clipdense/compat.py stands in for it).
SKIP_EXTENSION := --config-settings-package pb1-detectron2:--global-option=build_py \
	--config-settings-package pb1-detectron2:--build-option=--skip-build
# A path is made absolute (a bare folder name would read as a package name), a URL is marked as git's.
CHOICE = $(if $(wildcard $(DETECTRON2)/setup.py),$(abspath $(DETECTRON2)),$(patsubst https://%,git+https://%,$(DETECTRON2)))

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

env: .venv/.base .venv/.installed

# One thread: on a busy machine two wait for each other, and a step takes many times as long.
demo: env
	OMP_NUM_THREADS=1 $(BIN)/python tools/train_net.py --config-file configs/shapes/denseclip_mask_rcnn_rn.yaml OUTPUT_DIR output/demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

test-detectron2: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" $$(grep -v '^#' tests/both_detectron2.txt)

# FiftyOne asks for other versions of packages than requirements/lock.txt: it gets them in front of those of .venv.
test-fiftyone: env
	$(UV) venv --quiet --allow-existing --python $(BIN)/python build/fiftyone
	$(UV) pip install --quiet --python build/fiftyone/bin/python fiftyone
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(echo build/fiftyone/lib/python*/site-packages)/zz_clipdense.pth"
	OMP_NUM_THREADS=1 build/fiftyone/bin/python -m pytest tests/run/test_prediction.py -k fiftyone

# Damages 2,000 inputs and kills 60 jobs (about an hour on two cores); full disks need root. Results are kept in
# output/reliability: called again after an interruption, it goes on where it was.
test-reliability: env
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.reliability --jobs 2 --markdown docs/reliability.md

# Strict: a broken link or a page that is not there is an error. Nothing is fetched.
docs: env
	$(BIN)/mkdocs build --strict

lint: env
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: env
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Choose new versions for everything in requirements/.
lock: env
	cd requirements && echo $(PB1) | $(UV) pip compile --quiet --universal --upgrade --no-annotate --no-header --no-emit-index-url \
		--python ../$(BIN)/python --python-version 3.10 --no-build-isolation --override overrides.txt --output-file lock.txt \
		$(EXTRAS) detectron2.txt -

clean:
	rm -rf .venv output build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "clipdense needs Python 3.10 to 3.13; name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "Making .venv with $(PYTHON) ..."
	@if uv --version >/dev/null 2>&1; then uv venv --quiet --python "$$(command -v $(PYTHON))" .venv; \
	elif $(PYTHON) -m venv .venv >/dev/null 2>&1; then :; \
	else rm -rf .venv; $(PYTHON) -m pip install --quiet uv && $(PYTHON) -m uv venv --quiet --seed --python $(PYTHON) .venv; fi
	@uv --version >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv

# Holds the choice of detectron2, so that another choice installs anew.
.venv/.detectron2: .venv/bin/python FORCE
	@echo '$(CHOICE)' | cmp -s - $@ || echo '$(CHOICE)' > $@

.venv/.base: $(wildcard requirements/*.txt) setup.py | .venv/bin/python
	@echo "Installing into .venv (the first time this downloads about 3 GB) ..."
	$(PIP) $(EXTRAS:%=-r requirements/%)
	$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

# Builds against the installed torch, hence after it.
.venv/.installed: .venv/.detectron2 requirements/detectron2.txt requirements/overrides.txt | .venv/.base
	$(UV) pip uninstall --quiet --python $(BIN)/python detectron2 pb1-detectron2
	$(PIP) --no-build-isolation $(SKIP_EXTENSION) "$(CHOICE)" -r requirements/detectron2.txt
	@touch $@
