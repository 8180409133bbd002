# Every command sets up .venv first and may be repeated, also after an interruption.
.PHONY: demo demo-seg docs test test-all env

demo: env
	.venv/bin/python tools/demo.py detection

demo-seg: env
	.venv/bin/python tools/demo.py segmentation

docs: env
	.venv/bin/python -m sphinx -W --keep-going -q -b html docs docs/_build

test: env
	.venv/bin/mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --dist worksteal $(TESTS)

# Before a release: what repeats others on more networks, budgets and files as well.
test-all:
	$(MAKE) test TESTS=--exhaustive

env:
	tools/setup_env.sh
