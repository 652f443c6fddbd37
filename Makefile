# What a user and a contributor need, in the order of a first visit. `make` alone prints this list.
# ARGS="..." is handed on: make quickstart ARGS="--help", make test ARGS="-k sandbox".

# The repository root holds agents/, envs/, ...: never let it onto the path of a third-party `import agents`.
export PYTHONSAFEPATH := 1

BIN := .venv/bin
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test check docs bench clean venv

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: venv ## install everything into .venv, find or install Chromium and bubblewrap
	@scripts/system.sh

quickstart: setup ## train a small agent end to end, without a GPU
	@$(BIN)/palaestra quickstart $(ARGS)

test: venv ## run all tests, with their real parts where the machine has them
	@scripts/system.sh || echo "test: what needs these parts is skipped" >&2
	@$(BIN)/pytest -n $(JOBS) --dist loadgroup $(ARGS)

check: venv ## formatting, lint, types, and who imports whom
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

docs: venv ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: venv ## run every benchmark; each writes a dated result file to benchmarks/
	@for script in $(wildcard benchmarks/*.py); do echo "== $$script"; $(BIN)/python "$$script" $(ARGS) || exit 1; done

clean: ## remove what builds and tests leave; keeps .venv and runs/
	@rm -rf build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage*
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

venv:
	@scripts/venv.sh
