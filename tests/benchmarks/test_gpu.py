"""The GPU's benchmarks, where there is none: their arithmetic, and a try of each on small problems."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import kernel_worker
import kernels
import lengths
import numpy as np
import offline
import pytest
import step_profile
import summary
from kernel_cases import cases
from kernel_worker import Unit
from tuning_candidates import candidates

from millrace import RequestOutput
from millrace.pallas_kernels.tuning import tuned
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


def test_the_steady_rate_leaves_out_the_first_wave_and_the_end():
    # Two slots, 10 tokens a second each; the first wave has begun after 1 s, the last request begins after 3 s.
    outputs = [output(0, 2, 20), output(1, 4, 30), output(2, 3, 10), output(3, 5, 20)]
    assert offline.steady_rate(outputs, 2, seconds=5) == (pytest.approx(20), 2)


def test_tokens_that_come_at_once_count_whole():
    outputs = [output(0, 4, 40), output(2, 2, 8), output(4, 5, 10)]
    assert offline.steady_rate(outputs, 1, seconds=5) == (pytest.approx(12), 4)


def test_a_first_wave_without_tokens_has_no_rate():
    assert offline.steady_rate([output(None, 1, 0)], 1, seconds=1) == (0, 0)


def test_requests_fit_the_context():
    load = offline.make_load(64, vocab_size=100, max_len=256, num_slots=4)
    assert len(load.prompts) == len(load.params) == 68
    assert all(len(prompt) + each.max_tokens <= 256 for prompt, each in zip(load.prompts, load.params, strict=True))
    assert all(each.max_tokens > 0 for each in load.params)


def test_the_first_wave_stands_where_a_long_run_stands():
    load = offline.make_load(24576, vocab_size=100, max_len=2048, num_slots=4096)
    whole, left = np.array(load.num_outputs[4096:]), np.array(load.num_outputs[:4096])
    mean_left = (whole**2).mean() / whole.mean() / 2  # of what is met in proportion to its length, halfway
    assert left.mean() == pytest.approx(mean_left, rel=0.05)
    behind = np.mean([len(prompt) for prompt in load.prompts[:4096]]) - np.mean([len(p) for p in load.prompts[4096:]])
    assert behind == pytest.approx(mean_left, rel=0.1)


def test_a_profile_sums_kernels_up_by_name():
    rows = step_profile.shares([("fusion.1", 1e6), ("matmul", 5e6), ("fusion_2", 3e6)], seconds=0.01)
    assert [row["kernel"] for row in rows] == ["matmul", "fusion"]
    assert rows[1] == {"kernel": "fusion", "calls": 2, "us": 2000, "share": pytest.approx(0.4)}


UNITS = [Unit("a", "hopper"), Unit("a", "xla"), Unit("b", "xla")]


def work(monkeypatch, *processes):
    """What a run makes of workers that say these lines."""
    left = list(processes)
    monkeypatch.setattr(kernels, "_lines", lambda command, deadline_s: iter(left.pop(0)))
    run = kernels.Run([], Path("lock"), float("inf"))
    return [(unit, found) for unit, found, _ in run.share(UNITS)]


HELLO = '{"hello": {"device": "NVIDIA H200", "copy_bytes_per_s": 4e12}}'
A, A_XLA, B = ('{"begin": ["a", "hopper", ""]}', '{"begin": ["a", "xla", ""]}', '{"begin": ["b", "xla", ""]}')
ROW, DONE = '{"row": {"us": 1.0}}', '{"done": true}'


def test_what_the_worker_finds_belongs_to_its_unit(monkeypatch):
    found = work(monkeypatch, [HELLO, A, ROW, A_XLA, ROW, B, ROW, DONE])
    assert [unit for unit, _ in found] == UNITS


def test_a_worker_that_ends_costs_one_unit(monkeypatch):
    found = work(monkeypatch, [HELLO, A, "CUDA_ERROR_ILLEGAL_ADDRESS"], [HELLO, A_XLA, ROW, B, ROW, DONE])
    assert [("error" in row) for _, row in found] == [True, False, False]
    assert "ILLEGAL_ADDRESS" in found[0][1]["error"]


def test_a_unit_that_nobody_serves_has_no_row(monkeypatch):
    found = work(monkeypatch, [HELLO, A_XLA, ROW, B, ROW, DONE])
    assert len(found) == 2


def test_a_worker_that_ends_behind_a_row_is_followed_by_another(monkeypatch):
    found = work(monkeypatch, [HELLO, A, '{"row": {"error": "it did not end"}}'], [HELLO, A_XLA, ROW, B, ROW, DONE])
    assert [unit for unit, _ in found] == UNITS


def test_a_worker_that_does_not_begin_is_said(monkeypatch):
    with pytest.raises(RuntimeError, match="no jax"):
        work(monkeypatch, ["ImportError: no jax"])


def test_a_worker_that_does_nothing_is_not_started_again(monkeypatch):
    with pytest.raises(RuntimeError, match="nothing done: killed"):
        work(monkeypatch, [HELLO, "killed"])


def test_cases_are_shared_whole_and_candidates_apart():
    assert kernels.shares_of(UNITS, 2, by_case=True) == [UNITS[:2], UNITS[2:]]
    assert kernels.shares_of(UNITS, 2, by_case=False) == [[UNITS[0], UNITS[2]], [UNITS[1]]]


def test_a_wrong_output_says_where():
    right = jnp.ones((4, 8))
    found = kernel_worker.compare(right.at[2, 3].set(jnp.nan).at[1, 3].set(5), right, tolerance=0.1)
    assert not found.agrees
    assert found.difference == float("inf")
    assert found.wrong == (
        "6.250% wrong, 3.125% not finite (axis 0: 2 of 4, [1, 2]; axis 1: 1 of 8, [3]); at [1, 3] 5 and not 1"
    )
    assert kernel_worker.compare(right, right * 1.01, tolerance=0.1).agrees


def test_sizes_are_changed_for_a_while():
    with kernel_worker.changed_sizes({"split": {"sms": 7}}):
        assert tuned("paged_attention", "NVIDIA H200", "split")["sms"] == 7
        assert tuned("paged_attention", "NVIDIA H200", "split")["max_splits"] == 64
    assert tuned("paged_attention", "NVIDIA H200", "split")["sms"] == 132


def test_candidates_change_sizes_that_there_are():
    tried = [(case, json.loads(change)) for case in cases() for change in candidates(case.name)]
    assert tried
    for case, change in tried:
        for key, sizes in change.items():
            tuned(case.operation, "NVIDIA H200", key)
            assert sizes


def test_a_target_that_was_not_measured_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    summary.main([])
    assert capsys.readouterr().out.count("not measured") == len(list(summary.lines()))


def test_without_a_gpu_the_compiled_kernels_of_targets_are_shown(capsys):
    summary.main(["--compiled"])
    head, *lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert head.split() == list(summary.COMPILED)
    for case in ("decode bfloat16 256 x 2k", "prefill bfloat16 16k", "fp8 70b_gate M=4096", "int4 70b_gate M=16"):
        assert any(line.strip().startswith(case) for line in lines), case


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
