#!/usr/bin/env bash
# Everything that wants one NVIDIA GPU, in one command: versions, parity with transformers' answers, throughput, streaming.
# usage: benchmarks/gpu/run_all.sh [PYTHON]     PYTHON has the extras cuda and test; the default is .venv/bin/python
set -u
python=${1:-.venv/bin/python}
cd "$(dirname "$0")/../.." || exit 1
"$python" -m millrace.runtime.launch doctor
"$python" -m pytest tests/test_parity.py tests/pallas_kernels -q -p no:cacheprovider -o timeout=0
"$python" benchmarks/gpu/throughput.py
"$python" benchmarks/gpu/streaming.py
