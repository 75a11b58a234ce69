# Every target does its own set-up: .ci/venv finds a Python, makes .venv and installs what the target needs.
.DEFAULT_GOAL := help
.PHONY: help demo test test-kernels test-large test-native lint format parity parity-gguf bench bench-weights bench-cpu compile-rack compile-kernels rack-demo wheel clean
export PYTHON

BIN := .venv/bin
WORKERS ?= 2
TESTS ?= tests
# Where bench-weights and bench-cpu find the environment of llama.cpp, or make it, and bench-cpu that of CTranslate2 and
# transformers, which may need another Python.
PEERS ?= build/peers
TORCH_PEERS ?= $(PEERS)
# Medians of bench-cpu are of so many rounds, each of 5 minutes.
ROUNDS ?= 3
# Where compile-rack and compile-kernels find NVIDIA's compilers, or install them (4.8 GB; no GPU is needed).
CUDA ?= build/cuda
RACK := llama2_70b_gb300_nvl72
# The committed checkpoints have another seed, so that `make parity` never compares what the tests compare already.
SEED ?= $(shell date +%s)

help:
	@echo 'make demo    stream text from the embedded model'
	@echo 'make test    run the tests (TESTS=tests/runtime WORKERS=0 narrow them)'
	@echo 'make test-kernels  run the large set of kernel tests, in GPU interpret mode'
	@echo 'make test-large  run what make test leaves out beside the kernels: more checkpoints, meshes and processes'
	@echo 'make test-native  run the C++ kernels under ASan, UBSan and TSan'
	@echo 'make lint    ruff and mypy'
	@echo 'make format  let ruff rewrite the files'
	@echo 'make parity  compare with transformers on fresh checkpoints (installs torch)'
	@echo 'make parity-gguf  compare GGUF files with llama.cpp (builds it)'
	@echo 'make bench   measure steps, starts, artifacts and batches of the README again'
	@echo 'make bench-weights  measure weights: loading, converting, streaming, beside llama.cpp (12 minutes)'
	@echo 'make bench-cpu  measure decoding and prompts on this CPU, beside llama.cpp, CTranslate2 and transformers (takes long)'
	@echo 'make compile-rack  plan Llama-2-70B on 72 GB300s and compile its programs, without a GPU (installs 4.8 GB)'
	@echo 'make compile-kernels  compile every GPU kernel at every tuned size, without a GPU (installs 4.8 GB)'
	@echo 'make rack-demo  generate with 18 processes of 4 devices each on this machine'
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

test-kernels:
	@.ci/venv test
	@$(BIN)/pytest $(TESTS) -q -n $(WORKERS) --dist loadfile -m kernels

test-large:
	@.ci/venv test
	@$(BIN)/pytest $(TESTS) -q -n $(WORKERS) --dist loadfile -m large

test-native:
	@.ci/venv runtime
	@$(BIN)/python tests/native/run.py --seed=$(SEED)

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
	@$(BIN)/python benchmarks/artifact.py

# llama.cpp is built with the compiler that is here, which takes minutes; the benchmark goes on where that fails. The
# flags: GCC before 14 leaves out most of what _tile_loadconfig reads, and then llama.cpp crashes on CPUs with AMX.
define install_llama_cpp
$(PEERS)/bin/python -c 'import llama_cpp' 2>/dev/null || { $(BIN)/python -m venv $(PEERS) && \
	CMAKE_ARGS='-DCMAKE_CXX_FLAGS="-fno-tree-dse -fno-dse"' \
	$(PEERS)/bin/python -m pip install -q --no-input 'llama-cpp-python>=0.3.36'; } || echo 'llama.cpp is left out'
endef

# torch is pinned: other versions pull gigabytes of CUDA.
define install_torch_peers
$(TORCH_PEERS)/bin/python -c 'import ctranslate2, torch, transformers' 2>/dev/null || { \
	{ [ -x $(TORCH_PEERS)/bin/python ] || $(BIN)/python -m venv $(TORCH_PEERS); } && $(TORCH_PEERS)/bin/python -m pip \
	install -q --no-input 'ctranslate2>=4.8' 'transformers>=5,<6' torch==2.13.0; } || \
	echo 'CTranslate2 and transformers are left out'
endef

parity-gguf:
	@.ci/venv bench
	@$(install_llama_cpp)
	@$(BIN)/python benchmarks/gguf_parity.py --peers=$(PEERS)

bench-weights:
	@.ci/venv bench
	@$(install_llama_cpp)
	@$(BIN)/python benchmarks/weights.py --peers=$(PEERS)

bench-cpu:
	@.ci/venv bench
	@$(install_llama_cpp)
	@$(install_torch_peers)
	@$(BIN)/python benchmarks/cpu_peers.py --peers=$(PEERS) --torch_peers=$(TORCH_PEERS) --rounds=$(ROUNDS)

define install_cuda
$(CUDA)/bin/python -c 'import jax_cuda13_plugin, millrace' 2>/dev/null || { $(BIN)/python -m venv $(CUDA) && \
	echo 'installing the cuda extra: 4.8 GB' >&2 && $(CUDA)/bin/python -m pip install -q --no-input -e '.[cuda]'; }
endef

compile-rack:
	@.ci/venv runtime
	@$(install_cuda)
	@$(CUDA)/bin/millrace plan --config=$(RACK)
	@$(CUDA)/bin/millrace compile --config=$(RACK) --out=build/artifacts/$(RACK)

compile-kernels:
	@.ci/venv runtime
	@$(install_cuda)
	@$(CUDA)/bin/python benchmarks/compile_kernels.py

rack-demo:
	@.ci/venv runtime
	@$(BIN)/python benchmarks/rack_demo.py

wheel:
	@.ci/venv runtime
	@rm -rf build/lib build/bdist.* dist
	@$(BIN)/python -m pip wheel -q --no-deps --wheel-dir dist .
	@$(BIN)/python .ci/check_wheel.py dist

clean:
	rm -rf .venv .types build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
