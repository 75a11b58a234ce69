# Every target does its own set-up: .ci/venv finds a Python, makes .venv and installs what the target needs.
.DEFAULT_GOAL := help
.PHONY: help demo test lint format parity bench bench-weights wheel clean
export PYTHON

BIN := .venv/bin
WORKERS ?= 2
TESTS ?= tests
# Where bench-weights finds the environment of llama.cpp, or makes it.
PEERS ?= build/peers
# The committed checkpoints have another seed, so that `make parity` never compares what the tests compare already.
SEED ?= $(shell date +%s)

help:
	@echo 'make demo    stream text from the embedded model'
	@echo 'make test    run the tests (TESTS=tests/runtime WORKERS=0 narrow them)'
	@echo 'make lint    ruff and mypy'
	@echo 'make format  let ruff rewrite the files'
	@echo 'make parity  compare with transformers on fresh checkpoints (installs torch)'
	@echo 'make bench   measure the numbers of the README again'
	@echo 'make bench-weights  measure weights: loading, converting, streaming, beside llama.cpp (12 minutes)'
	@echo 'make wheel   build dist/*.whl and check what it holds'
	@echo 'make clean   remove .venv and everything that was built'

demo:
	@.ci/venv runtime
	@$(BIN)/millrace demo

# The console script and not `python -m pytest`, which would put the root's folders (models, runtime) on sys.path.
# A file's tests stay in one process, which shares its compiled programs.
test:
	@.ci/venv test
	@$(BIN)/pytest $(TESTS) -q -n $(WORKERS) --dist loadfile

lint: .types/millrace
	@.ci/venv lint
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy -p millrace

format:
	@.ci/venv lint
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# mypy needs a folder named millrace, and a clone's folder may have any name.
.types/millrace:
	@mkdir -p .types
	@ln -sfn .. $@

parity:
	@.ci/venv parity
	@$(BIN)/python tests/fixtures/make.py --out build/parity --seed $(SEED)
	@$(BIN)/pytest tests/test_parity.py -q -n $(WORKERS) --checkpoints=build/parity/checkpoints

bench:
	@.ci/venv bench
	@$(BIN)/python benchmarks/startup.py
	@$(BIN)/python benchmarks/step_overhead.py
	@$(BIN)/python benchmarks/batch_scaling.py

# llama.cpp is built with the compiler that is here, which takes minutes; the benchmark goes on where that fails.
bench-weights:
	@.ci/venv bench
	@$(PEERS)/bin/python -c 'import llama_cpp' 2>/dev/null || { $(BIN)/python -m venv $(PEERS) && \
		$(PEERS)/bin/python -m pip install -q --no-input 'llama-cpp-python>=0.3.36'; } || echo 'llama.cpp is left out'
	@$(BIN)/python benchmarks/weights.py --peers=$(PEERS)

wheel:
	@.ci/venv runtime
	@rm -rf build/lib build/bdist.* dist
	@$(BIN)/python -m pip wheel -q --no-deps --wheel-dir dist .
	@$(BIN)/python .ci/check_wheel.py dist

clean:
	rm -rf .venv .types build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
