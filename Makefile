# Two commands do everything on a fresh machine: `make serve` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help serve test install check lint format demo results-ci bench chaos compose-demo clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

serve: .venv/.base ## serve the default model on port 8000, metrics on port 9000
	$(BIN)/scumble serve

test: .venv/.dev ## run the whole suite, a part on each core
	$(BIN)/pytest --numprocesses logical --dist loadfile

install: .venv/.dev ## everything for development, in .venv

check: .venv/.dev lint test ## linters and suite

lint: .venv/.dev ## ruff, mypy, import contracts, hadolint, shellcheck, yamllint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile docker/attacker/Dockerfile
	$(BIN)/shellcheck .ci/run docker/*.sh
	$(BIN)/yamllint --strict .yamllint.yml docker-compose.yml docker deploy

format: .venv/.dev ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: .venv/.dev ## steal a model, undefended and defended, and compare; a few minutes (ARGS='--queries 1000' for less)
	$(BIN)/python -m evaluation.demo $(ARGS)

results-ci: .venv/.dev ## a small comparison of defenses, made again and compared with the committed one
	$(BIN)/scumble evaluate --plan ci --out runs/results-ci
	$(BIN)/python -m evaluation.reproduce runs/results-ci evaluation/results/ci

chaos: .venv/.dev ## break a server in every way under load; three minutes
	$(BIN)/python -m loadtest.chaos

compose-demo: .venv/.dev ## build the images, play the story in containers and check it; ten minutes at most
	$(BIN)/python docker/demo.py

bench: .venv/.dev ## request latency, defense on against off
	$(BIN)/python loadtest/latency.py

clean: ## remove the environment and what tools left
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# The development environment holds the base one, so each stamp serves both targets in any order.
.venv/.base: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	@touch $@

.venv/.dev: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch .venv/.base $@
