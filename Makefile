# make run · make verify · make test · make lint · make ui · make bench · make quality · make demo-t5 · make clean
# Everything runs in .venv, which is made from constraints.txt on first use.

PYTHON ?= python3
PREFECT_PORT ?= 4200
MLFLOW_PORT ?= 5000

BIN := .venv/bin
READY := .venv/.ready
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := run
.PHONY: run verify kills damage test lint ui bench quality bench-8b bench-1b demo-t5 clean setup

run: $(READY)  ## set up, run the main job, print where everything is
	@$(BIN)/python -m flows.pipeline

verify: $(READY)  ## read every result and DVC's cache afresh, and say what is damaged
	@$(BIN)/python -m flows.verify

kills: $(READY)  ## kill a small pipeline at random moments, run it again, compare every byte
	@$(BIN)/python -m benchmarks.reliability.kills

damage: $(READY)  ## flip and cut files of a small pipeline: named, made again or refused
	@$(BIN)/python -m benchmarks.reliability.damage

test: $(READY)  ## every test, the slow ones included
	@$(BIN)/python -m pytest -n 2 --dist loadfile --durations=30

lint: $(READY)  ## lint, format, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

ui: $(READY)  ## the Prefect and MLflow pages on loopback, until Ctrl-C
	@$(BIN)/python -m flows.server --prefect-port $(PREFECT_PORT) --mlflow-port $(MLFLOW_PORT)

bench: $(READY)  ## our numbers against their limits, into reports/bench/
	@$(BIN)/python -m benchmarks

quality: $(READY)  ## our best method's perplexity against the published one's, into reports/bench/quality.json
	@$(BIN)/python -m benchmarks.quality $(if $(IDS),--ids $(IDS))

demo-t5: $(READY)  ## train a small T5 in minutes, prune it, show what it cost; in .cache/demo-t5
	@$(BIN)/python -m demos.t5

bench-8b: $(READY)  ## an 8B shape with random weights, streamed through every step; 30 GB of disk while it runs
	@$(BIN)/python -m benchmarks.large 8b

bench-1b: $(READY)  ## the same with a 1.2B shape, a few minutes
	@$(BIN)/python -m benchmarks.large 1.2b

setup: $(READY)  ## only the environment

# Made beside the old environment, which stays until the new one stands; then scripts learn their new place.
# pip is silent for minutes; a dot every five seconds says that it works.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || \
		{ echo "error: expected Python 3.11 or 3.12, got $$($(PYTHON) --version 2>&1); run make PYTHON=python3.11" >&2; exit 2; }
	@echo "setting up .venv: a few minutes, about 2.3 GB"
	@start=$$SECONDS; \
	if [ ! -e .venv ] && [ -e .venv.old ]; then mv .venv.old .venv; fi; \
	(while sleep 5; do printf .; done) & dots=$$!; trap 'kill $$dots 2>/dev/null || true' EXIT; \
	$(PYTHON) -m venv --clear .venv.new && \
	.venv.new/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[pipeline,dev]' && \
	.venv.new/bin/python -c "$$RELOCATE" || { \
		rm -rf .venv.new; \
		if [ -e .venv ]; then stays="the old .venv is as it was: $(BIN)/python -m flows.pipeline works with it"; \
		else stays="nothing is left of the attempt"; fi; \
		echo >&2; echo "error: expected pip to set up a new environment, it failed (see above); $$stays; run make again" \
			"where the packages can be reached" >&2; exit 2; }; \
	rm -rf .venv.old; if [ -e .venv ]; then mv .venv .venv.old; fi; mv .venv.new .venv; rm -rf .venv.old; \
	touch $@; \
	echo " set-up: $$((SECONDS - start)) s"

# a virtual environment's scripts hold its path
define RELOCATE
import pathlib, sys
new = pathlib.Path(sys.prefix)
old, final = str(new).encode(), str(new.with_name(".venv")).encode()
for file in [new / "pyvenv.cfg", *new.glob("bin/*")]:
    if file.is_file() and not file.is_symlink() and old in (content := file.read_bytes()):
        file.write_bytes(content.replace(old, final))
endef
export RELOCATE

clean:  ## what the steps made; the environment, DVC's cache and the histories stay
	rm -rf data artifacts .cache build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find reports -mindepth 1 ! -name .gitkeep -delete
