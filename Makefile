# Everything runs in .venv, which scripts/setup makes on first use and repairs after an interruption.
# Choose another interpreter with PYTHON=/path/to/python3; pass arguments on with ARGS="...".
.DEFAULT_GOAL := help
SHELL := /bin/sh
VENV := .venv
RUN := $(VENV)/bin/python -m
export PYTHON

# An installation is as good as its stamp; one that was cut short leaves .unfinished, newer than every stamp.
$(VENV)/.installed-%: pyproject.toml constraints.txt scripts/setup $(wildcard $(VENV)/.unfinished)
	@scripts/setup $*

.cookbook/.installed: $(VENV)/.installed-dev scripts/setup_cookbook
	@scripts/setup_cookbook

.PHONY: demo test cookbook chaos check fix bench map clean help

demo: $(VENV)/.installed-run ## train a small model on built-in text and see it write (about a minute)
	@$(RUN) smelt demo $(ARGS)

test: $(VENV)/.installed-dev ## run the tests; SLOW=1 runs the slow ones too
	@$(RUN) pytest -m "not chaos$(if $(SLOW),, and not slow)" $(ARGS)

cookbook: .cookbook/.installed ## run Tinker's cookbook, offline, against a server with a tiny model (minutes)
	@$(RUN) pytest tests/api/test_cookbook.py $(ARGS)

chaos: $(VENV)/.installed-dev ## kill each process at every point of an operation's life (ten minutes)
	@$(RUN) pytest tests/api/test_kill_matrix.py $(ARGS)

check: $(VENV)/.installed-dev ## format, lint, import contracts, types, architecture
	@$(RUN) ruff format --check .
	@$(RUN) ruff check .
	@$(VENV)/bin/lint-imports
	@$(RUN) mypy
	@$(RUN) pytest -q tests/test_architecture.py tests/test_docs.py

fix: $(VENV)/.installed-dev map ## format, repair what the linter can, rewrite the README's map
	@$(RUN) ruff check --fix .
	@$(RUN) ruff format .

map: $(VENV)/.installed-dev ## rewrite the README's map from the modules' first lines
	@$(VENV)/bin/python scripts/readme_map.py --write

bench: $(VENV)/.installed-bench ## train the same model with smelt and with Hugging Face Trainer, side by side
	@$(VENV)/bin/python benchmarks/train.py $(ARGS)

clean: ## remove .venv, caches and build leftovers; nothing of yours
	rm -rf $(VENV) .cookbook dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' Makefile
