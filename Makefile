# `make` alone lists the targets. One virtual environment serves run, test and lint; it is made on first use.

PYTHON ?= python3
VENV ?= .venv
# Further requirements for pip, to test other versions: make test VENV=.venv-floor PINS="jax==0.7.2 flax==0.11.2"
PINS ?=
PARITY_PYTHON ?= python3.11
PARITY_VENV ?= .venv-parity
AOT_VENV ?= .venv-aot
# What run runs: an experiment file, a name in it, options. make run CONFIG=experiments/glm5.py:tiny,data=stdlib
CONFIG ?= experiments/glm5.py:tiny
# Added to the command of run, test, test-slow, test-aot, parity and evidence.
ARGS ?=
GET_PIP ?= https://bootstrap.pypa.io/get-pip.py

CODE := $(wildcard glm5_jax pallas_kernels experiments benchmarks tests)

.DELETE_ON_ERROR:
.PHONY: help setup run test test-slow test-aot parity evidence lint clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/.installed  ## Make the virtual environment and install the library into it

run: setup  ## Pre-train, save, reload and sample the tiny model on real text
	@$(VENV)/bin/python -m glm5_jax --config $(CONFIG) $(ARGS)

test: setup  ## Run the fast tests
	@$(VENV)/bin/python -m pytest -n 2 -m "not slow" $(ARGS)

# pytest answers 5 when it collected nothing: right only while no test carries the marker.
test-slow: setup  ## Run the tests marked slow
	@$(VENV)/bin/python -m pytest -m slow $(ARGS) || { code=$$?; \
	  if [ $$code -eq 5 ] && ! grep -rq --include='*.py' 'mark\.slow' tests; \
	  then echo "No test is marked slow yet."; else exit $$code; fi; }

test-aot: $(AOT_VENV)/.installed  ## Compile every kernel for absent TPUs and GPUs; compare what the compilers say
	@$(AOT_VENV)/bin/python tests/kernels/aot/run.py $(ARGS)

parity: $(PARITY_VENV)/.installed  ## Compare with the reference implementation (Python 3.11, torch and transformers)
	@$(PARITY_VENV)/bin/python tests/golden/parity.py $(ARGS)

EVIDENCE := muon_split dsa_adaptation mtp_sharing length_extension reasoning_rl

evidence: setup  ## Run the experiments behind the claims, up to half an hour each (ARGS=--quick: seconds, toy size)
	@for name in $(EVIDENCE); do $(VENV)/bin/python experiments/evidence/$$name.py $(ARGS) || exit 1; done

lint: setup  ## flake8, mypy, and byte-compilation of every file
	@$(VENV)/bin/python -m flake8 $(CODE)
	@$(VENV)/bin/python -m mypy
	@$(VENV)/bin/python -m compileall -q $(CODE)

clean:  ## Remove environments, caches and build leftovers; runs/ stays
	rm -rf $(VENV) $(PARITY_VENV) $(AOT_VENV) .cache .hypothesis build dist *.egg-info
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call make_venv,folder,python): the stamp comes last, so an interrupted attempt is cleared and made anew. Debian
# keeps ensurepip in a package of its own; where it is missing, pip's own bootstrap script stands in.
define make_venv
	@echo "Making $(1) with $$($(2) --version) ..."
	@if $(2) -c 'from ensurepip import bootstrap' 2>/dev/null; then $(2) -m venv --clear $(1); else \
	  $(2) -m venv --clear --without-pip $(1) && \
	  $(2) -c 'import sys, urllib.request as r; r.urlretrieve(*sys.argv[1:])' $(GET_PIP) $(1)/get-pip.py 2>/dev/null && \
	  $(1)/bin/python $(1)/get-pip.py --quiet --disable-pip-version-check; fi || { \
	  echo "$(2) cannot make a virtual environment: its ensurepip module is missing, and $(GET_PIP) did not help." \
	  "On Debian or Ubuntu, as root: apt install python3-venv (for another Python than the default one its own, such as" \
	  "python3.12-venv); then the same make command again." >&2; exit 1; }
	@touch $(1)/.made
endef

# $(call install,folder,requirements): the stamp comes last, so a failed installation is tried again.
define install
	@echo "Installing glm5-jax into $(1) ($(3)) ..."
	@$(1)/bin/python -m pip install -qq --no-input --disable-pip-version-check -e $(2)
	@touch $(1)/.installed
endef

PACKAGES = '.[test,lint,viz,serve,clients,ray]' $(PINS)
PARITY_PACKAGES = '.[parity]'
AOT_PACKAGES = '.[aot]' $(PINS)
PARITY_FOUND = $(shell for python in $(PARITY_PYTHON) $(PYTHON); do \
  $$python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo $$python && break; done)

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "glm5-jax needs Python 3.11 or newer; $(PYTHON) answers: $$($(PYTHON) --version 2>&1)." \
	  "Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(call make_venv,$(VENV),$(PYTHON))

$(VENV)/.installed: setup.cfg pyproject.toml | $(VENV)/.made
	$(call install,$(VENV),$(PACKAGES),a minute or two)

$(AOT_VENV)/.made:
	$(call make_venv,$(AOT_VENV),$(PYTHON))

$(AOT_VENV)/.installed: setup.cfg pyproject.toml | $(AOT_VENV)/.made
	$(call install,$(AOT_VENV),$(AOT_PACKAGES),compilers of 2 GB: a few minutes)

$(PARITY_VENV)/.made:
	@[ -n "$(PARITY_FOUND)" ] || { \
	  echo "make parity compares with torch 2.13.0 on Python 3.11; neither $(PARITY_PYTHON) nor $(PYTHON) is one." \
	  "Install it, or name it: make parity PARITY_PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(call make_venv,$(PARITY_VENV),$(PARITY_FOUND))

$(PARITY_VENV)/.installed: setup.cfg pyproject.toml | $(PARITY_VENV)/.made
	$(call install,$(PARITY_VENV),$(PARITY_PACKAGES),with torch a few minutes)
