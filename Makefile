# Two commands do everything: `make demo` shows what Headway does, `make test` runs the whole suite.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
REPORT ?= headway-demo.html
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo proteins-demo test lint fuzz clean
help:
	@echo "make demo   run Headway on a built-in model and write $(REPORT)"
	@echo "make proteins-demo  real sequences to a trained model, samples and a report, on CPU in under 10 minutes"
	@echo "make test   the whole test suite"
	@echo "make lint   ruff, mypy and the import contracts"
	@echo "make fuzz   50,000 random calls against float64"
	@echo "make clean  remove the environment and caches"

# torch first and alone: a later install that merely admits it must not pull another build.
$(BIN)/.runs: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e .
	@touch $@

$(BIN)/.installed: $(BIN)/.runs
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

# What a user gets: no test or lint package helps it along, unless one is there already.
demo: $(BIN)/.runs
	$(BIN)/headway demo --report $(REPORT)

$(BIN)/.proteins: $(BIN)/.runs
	$(BIN)/pip install -q -c constraints.txt -e ".[proteins]"
	@touch $@

proteins-demo: $(BIN)/.proteins
	rm -rf proteins-demo/data proteins-demo/run
	examples/proteins/sequences.sh proteins-demo
	$(BIN)/headway proteins prepare proteins-demo/DB.fasta.gz --out proteins-demo/data --note "Debian, mmseqs2-examples"
	$(BIN)/headway proteins train examples/proteins/demo.yaml --out proteins-demo/run
	$(BIN)/headway proteins sample proteins-demo/run --length 40-80 -n 24 --out proteins-demo/run/samples.fasta
	$(BIN)/headway proteins evaluate proteins-demo/run --data proteins-demo/data --sequences 100 \
		--samples proteins-demo/run/samples.fasta
	$(BIN)/headway proteins report proteins-demo/run --out proteins-demo/report.html

# Asserts as Python has them, which are not taken apart before each runs; those that failed are run again taken apart.
# Bytecode is kept, as many tests start a process.
test: export PYTHONDONTWRITEBYTECODE :=
test: $(BIN)/.installed
	$(BIN)/python -m pytest --assert=plain -n $(WORKERS) || { $(BIN)/python -m pytest --last-failed --last-failed-no-failures=none; exit 1; }

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fuzz: $(BIN)/.installed
	HEADWAY_FUZZ_DRAWS=50000 $(BIN)/python -m pytest -n $(WORKERS) tests/test_fuzz.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
