# Two commands, each from a fresh clone: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
# Files of tests that run at the same time, one thread each.
JOBS ?= 2

.PHONY: demo test clean
.DELETE_ON_ERROR:

demo: .venv/.demo
	$(BIN)/vqhit demo

test: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n $(JOBS) --dist loadfile

# One stamp per set of extras: installed again when pyproject.toml changes.
.venv/.demo .venv/.test: .venv/.%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "vqhit needs Python 3.11 or newer; name one with: make PYTHON=python3.11 ..." >&2; exit 1; }
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv .venv; \
	elif $(PYTHON) -m pip --version >/dev/null 2>&1; then \
	  $(PYTHON) -m venv --without-pip .venv && $(PYTHON) -m pip --python $@ install --quiet pip; \
	else echo "neither ensurepip nor pip is there; on Debian: apt-get install python3-venv" >&2; exit 1; fi

clean:
	rm -rf .venv demo runs
