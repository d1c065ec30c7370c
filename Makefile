# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SAMPLE ?= samples/qwen3_5-modelopt-mixed
PROMPT ?= Four score and seven years ago
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test check lint bench clean

# torch first and alone: where several builds are offered, a smaller one for CPU is then kept by what follows.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) "torch>=2.11,<2.14"

$(VENV)/.installed: pyproject.toml $(BIN)/python
	$(PIP) --editable .
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.installed
	$(PIP) --editable ".[test]"
	@touch $@

demo: $(VENV)/.installed  ## convert a shipped checkpoint, prove it, and let it write
	$(BIN)/qconvert $(SAMPLE) demo-out --verify --force
	$(BIN)/qconvert inspect demo-out
	$(BIN)/python -m runtime.generate demo-out --prompt "$(PROMPT)" --max-new-tokens 120 --device cpu --stats

test: $(VENV)/.test  ## everything that must hold; needs neither GPU nor network
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test  ## what a change must pass before it is committed

bench: $(VENV)/.installed
	$(BIN)/python -m bench.convert

clean:
	rm -rf $(VENV) demo-out build dist *.egg-info
