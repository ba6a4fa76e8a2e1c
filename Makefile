.PHONY: help install check test test-slow bench

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

install: ## install fewstep and its tools into the current environment
	pip install -e '.[dev]'

check: ## lint, format, types, import layers
	ruff check .
	ruff format --check .
	mypy
	PYTHONPATH=. lint-imports

test: ## the quick tests
	pytest

test-slow: ## the tests that train or run whole commands
	pytest -m slow

bench: ## the run behind the README's figures
	fewstep train fashion/consistency
