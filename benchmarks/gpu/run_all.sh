#!/usr/bin/env bash
# Everything that wants one NVIDIA GPU, in one command: kernels checked and timed beside others', the decode step,
# offline throughput, and last a table of the targets. Results go to benchmarks/results/gpu_*.json. Without a GPU it
# prints what compilers say of the kernels, and the targets as they were last measured. Llama-2-70B wants an H200.
# usage: benchmarks/gpu/run_all.sh [PYTHON]     PYTHON has the extra cuda, and torch for its part of the peers;
#                                               the default is .venv/bin/python
# Each part has a process and a time limit of its own, so that one that fails takes nothing else with it: 9 minutes.
set -u
python=${1:-.venv/bin/python}
cd "$(dirname "$0")/../.." || exit 1

if ! "$python" -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu")'; then
    echo "== no GPU here, so nothing is measured: the kernels as compiled for an H200, and the targets as last measured"
    "$python" benchmarks/gpu/summary.py --compiled
    exit 1
fi

part() {
    limit=$1
    shift
    echo "== $*  (at most $limit s)"
    timeout --signal=INT --kill-after=10 "$limit" "$python" "$@" || echo "== ended with $?: $*"
}

part 15 -m millrace.runtime.launch doctor
part 80 benchmarks/gpu/kernels.py --targets --seconds=70
part 40 benchmarks/gpu/peers.py --library=torch
part 240 benchmarks/gpu/offline.py --model=70b --few_programs --seconds=40 --profile=1
part 120 benchmarks/gpu/offline.py --model=8b --few_programs --seconds=25 --profile=1
part 35 benchmarks/gpu/decode_step.py --model=8b
part 30 benchmarks/gpu/peers.py --library=jax
"$python" benchmarks/gpu/summary.py
# Longer, and not of the nine minutes: FULL=1 benchmarks/gpu/run_all.sh
if [ -n "${FULL:-}" ]; then
    part 600 benchmarks/gpu/kernels.py --seconds=550
    part 150 benchmarks/gpu/kernels.py --tune --seconds=140
    part 300 benchmarks/gpu/decode_step.py --model=70b --num_slots=128
    part 900 -m pytest tests/test_parity.py tests/pallas_kernels -m "not kernels" -q -p no:cacheprovider -o timeout=0
    part 300 benchmarks/gpu/throughput.py
    part 600 benchmarks/gpu/streaming.py
    "$python" benchmarks/gpu/summary.py
fi
