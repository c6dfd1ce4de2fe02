# Everything runs inside .venv, made once from pyproject.toml and made again when that changes.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
RUN := $(VENV)/bin

.PHONY: help demo test lint fuzz docs docs-serve docs-zensical clean

help:
	@echo "make demo        a real model finds a pass key in 4000 tokens, split over 4 hosts"
	@echo "make test        lint, types and the test suite (no GPU needed; uses one if it is there)"
	@echo "make lint        ruff and the type checker only"
	@echo "make fuzz        the laws again, on thousands of random cases"
	@echo "make docs        build the documentation into site/ and check it"
	@echo "make docs-serve  build it and serve it on http://127.0.0.1:8000"
	@echo "make docs-zensical  try to build it with Zensical, too"
	@echo "make clean       remove what the others made"

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "apb needs Python 3.11 or newer; this is $$($(PYTHON) --version). Set PYTHON=…"; exit 1; }
	@echo "Setting up $(VENV) (once; a few minutes, most of it downloading PyTorch) …"
	@test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	@$(RUN)/python -m pip install -qq --disable-pip-version-check --editable '.[test,docs]'
	@touch $(READY)
	@echo "Ready: $(VENV)."

demo: $(READY)
	@$(RUN)/python -m apb demo

lint: $(READY)
	@echo "Checking style and types …"
	@$(RUN)/ruff check .
	@$(RUN)/ruff format --check .
	@$(RUN)/ty check --python $(VENV) apb

test: lint
	@echo "Running the tests (a few minutes) …"
	@CUDA_VISIBLE_DEVICES= $(RUN)/python -m pytest -n 2
	@if $(RUN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		echo "Running the tests that need a GPU …"; $(RUN)/python -m pytest -m gpu; fi

fuzz: $(READY)
	@HYPOTHESIS_PROFILE=fuzz CUDA_VISIBLE_DEVICES= $(RUN)/python -m pytest -n 2 --timeout=3600 --deselect tests/test_planted_bugs.py

docs: $(READY)
	@echo "Running the tutorials and building the pages …"
	@$(RUN)/python tutorials/to_pages.py
	@NO_MKDOCS_2_WARNING=1 $(RUN)/python -m mkdocs build --strict --quiet
	@$(RUN)/python docs/check_site.py site
	@echo "Built: site/index.html"

docs-serve: docs
	@$(RUN)/python -m http.server --directory site --bind 127.0.0.1 8000

# Zensical is young: that it fails is worth knowing, and ends no build.
ZENSICAL := build/zensical
docs-zensical: docs
	@test -d $(ZENSICAL) || $(RUN)/python -m pip install -qq --disable-pip-version-check --target $(ZENSICAL) zensical
	@export APB_SITE=build/zensical-site PYTHONPATH=$(ZENSICAL); \
		$(RUN)/python -m zensical build && $(RUN)/python docs/check_site.py $$APB_SITE && echo "Built: $$APB_SITE/index.html" \
		|| echo "Zensical: failed, as said above. The site is the one that make docs builds."

clean:
	@rm -rf $(VENV) site build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
