# Every target can be called again at no cost. `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help setup lab test notebooks lint bench checkpoint clean
BIN := .venv/bin

help: ## list the targets
	@awk 'BEGIN { FS = ":.*## " } /^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: ## build .venv and install everything into it; opens nothing
	@sh tools/setup.sh

lab: setup ## open the course in JupyterLab
	@$(BIN)/dsv3 lab

test: setup ## run every check: lint, tests, notebooks, browser
	@sh tools/chromium.sh
	@$(BIN)/python tools/run_tests.py

notebooks: setup ## sync the notebooks with their sources, execute them, strip widget state
	@$(BIN)/python -m dsv3lib.course.notebooks

lint: setup ## check style
	@$(BIN)/python -m ruff check .

bench: setup ## measure against peers: on the GPU if there is one, else on the CPU
	@if [ -f benchmarks/gpu.py ] && $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(BIN)/python benchmarks/gpu.py; else $(BIN)/python benchmarks/cpu.py; fi

checkpoint: setup ## train tiny-v3 and its dense twin, measure, write data/checkpoints/tiny-v3 (MINUTES= and THREADS= if not as shipped); goes on where it was stopped
	@$(BIN)/python -m dsv3lib.training.run.checkpoint $(if $(MINUTES),--minutes $(MINUTES)) $(if $(THREADS),--threads $(THREADS))

clean: ## remove caches and builds (.venv, runs and your progress stay)
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .jupyter_cache docs/_build
	@find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
	@find . -name .venv -prune -o -name .ipynb_checkpoints -type d -prune -exec rm -rf {} +
