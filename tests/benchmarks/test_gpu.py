"""The GPU's benchmarks, where there is none: their arithmetic, and a try of each on small problems."""

import subprocess
import sys
from pathlib import Path

import kernels
import lengths
import offline
import pytest
import summary

from millrace import RequestOutput
from millrace.runtime.request import CompletionOutput, RequestMetrics

FOLDER = Path(kernels.__file__).parent


def output(first_s, end_s, num_tokens):
    completion = CompletionOutput(0, "", [1] * num_tokens)
    metrics = RequestMetrics(time_to_first_token_s=first_s, total_s=end_s)
    return RequestOutput("0", None, [1], None, [completion], True, metrics)


def test_lengths_have_the_published_mean_and_quantiles():
    drawn = lengths.draw(lengths.OUTPUT_QUANTILES, 24576, seed=3)
    assert drawn.mean() == pytest.approx(294.45, rel=0.01)
    assert sorted(drawn)[len(drawn) // 2] == pytest.approx(254, abs=2)


def test_the_steady_rate_leaves_out_the_beginning_and_the_end():
    # Two slots, 10 tokens a second each; the steady time is from 2 s, the first end, to 3 s, the last beginning.
    outputs = [output(0, 2, 20), output(0, 4, 40), output(2, 3, 10), output(3, 5, 20)]
    assert offline.steady_rate(outputs, seconds=5) == pytest.approx(20)


def test_a_request_without_tokens_has_no_rate():
    assert offline.steady_rate([output(None, 1, 0)], seconds=1) == 0


def test_requests_fit_the_context():
    prompts, params = offline.make_requests(64, vocab_size=100, max_len=256)
    assert all(len(prompt) + each.max_tokens <= 256 for prompt, each in zip(prompts, params, strict=True))


def work(monkeypatch, *processes):
    """What `run_all` makes of workers that say these lines, and what each was asked for."""
    left = list(processes)
    monkeypatch.setattr(kernels, "_lines", lambda command, deadline_s: iter(left.pop(0)))
    units = [("a", "hopper"), ("a", "xla"), ("b", "xla")]
    return [(unit, found) for unit, found, _ in kernels.run_all(units, [], float("inf"))]


HELLO = '{"hello": {"device": "NVIDIA H200", "copy_bytes_per_s": 4e12}}'
A, A_XLA, B = '{"begin": ["a", "hopper"]}', '{"begin": ["a", "xla"]}', '{"begin": ["b", "xla"]}'
ROW = '{"row": {"us": 1.0}}'


def test_what_the_worker_finds_belongs_to_its_unit(monkeypatch):
    found = work(monkeypatch, [HELLO, A, ROW, A_XLA, ROW, B, ROW])
    assert [unit for unit, _ in found] == [("a", "hopper"), ("a", "xla"), ("b", "xla")]


def test_a_worker_that_ends_costs_one_unit(monkeypatch):
    found = work(monkeypatch, [HELLO, A, "CUDA_ERROR_ILLEGAL_ADDRESS"], [HELLO, A_XLA, ROW, B, ROW])
    assert [("error" in row) for _, row in found] == [True, False, False]
    assert "ILLEGAL_ADDRESS" in found[0][1]["error"]


def test_a_unit_that_nobody_serves_has_no_row(monkeypatch):
    found = work(monkeypatch, [HELLO, A_XLA, ROW, B, ROW])
    assert len(found) == 2


def test_a_worker_that_does_not_begin_is_said(monkeypatch):
    with pytest.raises(SystemExit, match="no jax"):
        work(monkeypatch, ["ImportError: no jax"])


def test_a_target_that_was_not_measured_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    summary.main()
    assert capsys.readouterr().out.count("not measured") == len(list(summary.lines()))


def test_targets_are_read_off_the_runtimes_choice(monkeypatch):
    rows = [
        {"case": "int4 70b_gate M=16", "implementation": "hopper", "us": 10.0, "agrees": True},
        {"case": "int4 70b_gate M=16", "implementation": "xla", "us": 5.0, "agrees": True},
        {"case": "bf16 70b_gate M=16", "implementation": "xla", "us": 30.0, "agrees": True},
        {"case": "int4 70b_gate M=64", "implementation": "hopper", "us": 1.0, "agrees": False},
    ]
    monkeypatch.setattr(summary, "read_rows", lambda name: rows if name == "gpu_kernels" else [])
    found = {what: value for what, value, _ in summary.lines()}
    assert found["int4 M=16: speed over bf16"] == 3.0
    assert found["int4 M=64: speed over bf16"] is None  # a wrong kernel is not fast


@pytest.mark.kernels
@pytest.mark.parametrize(
    "command",
    [
        "kernels.py --tiny",
        "offline.py --model=8b --scale=16 --num_layers=2 --seconds=3 --requests=8 --num_slots=4 --max_context_len=256 "
        "--max_step_tokens=64 --quantization=fp8 --kv_cache_dtype=fp8",
        "decode_step.py --model=8b --scale=16 --num_layers=2 --num_slots=4 --context_len=64",
        "throughput.py --num_layers=2 --scale=16 --num_slots=4",
    ],
)
def test_a_benchmark_runs_on_small_problems(command):
    program, *flags = command.split()
    done = subprocess.run([sys.executable, str(FOLDER / program), *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
