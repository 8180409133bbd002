# Both commands set up .venv first and may be repeated, also after an interruption.
.PHONY: demo test env

demo: env
	.venv/bin/python tools/demo.py

test: env
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest

env:
	tools/setup_env.sh
