"""The command that compiles all kernels: what it asks for, and that a kernel which ends its process costs no other."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import compile_kernels
import kernel_cases
import pytest
from compile_kernels import Job, find_jobs, run_job, untried_sizes

from millrace.pallas_kernels.dispatch import Implementation

FACTS = json.dumps({"bound_us": 1.0, "bound_by": "memory", "compile_s": 0.5, "sizes": ["x/hopper: a"], "calls": []})
SMALL = kernel_cases.matmul_case("bf16", "8b_k", 16)


def run_with(monkeypatch, outputs, cases=("a", "b", "c")):
    """The rows of a job whose processes say `outputs`, and what each was asked for."""
    asked = []

    def run_process(job, names):
        asked.append(list(names))
        return outputs[len(asked) - 1]

    monkeypatch.setattr(compile_kernels, "_run_process", run_process)
    return list(run_job(Job("paged_attention", "hopper", "h200", cases))), asked


def test_names_of_cases_are_unique():
    names = [case.name for case in kernel_cases.cases()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("operation", kernel_cases.TABLES)
def test_a_case_moves_at_least_its_weights_or_its_cache(operation):
    case = next(case for case in kernel_cases.cases() if case.operation == operation)
    assert case.moved_bytes() > (case.cache_bytes or kernel_cases.num_bytes(case.shapes()[1]))


def test_every_case_that_compiles_has_its_kernels(monkeypatch, dump):
    output = "".join(f"\nCASE {name}\n{dump}\nDONE {FACTS}\n" for name in "abc")
    rows, asked = run_with(monkeypatch, [output])
    assert [row["result"] for row in rows] == ["ok"] * 3
    assert (rows[0]["kernel"], rows[0]["registers"], rows[0]["blocks_per_sm"]) == ("matmul", 158, 1)
    assert asked == [["a", "b", "c"]]


def test_a_case_that_ends_its_process_leaves_the_others(monkeypatch, dump):
    first = f"\nCASE a\n{dump}\nDONE {FACTS}\n\nCASE b\nptxas fatal : wrong chip\n"
    rows, asked = run_with(monkeypatch, [first, f"\nCASE c\n{dump}\nDONE {FACTS}\n"])
    assert [row["result"][:6] for row in rows] == ["ok", "FAILED", "ok"]
    assert "wrong chip" in rows[1]["result"]
    assert asked == [["a", "b", "c"], ["c"]]


def test_a_case_whose_kernel_was_compiled_before_is_compiled_alone(monkeypatch, dump):
    only_lowered = dump.split("\n\n")[0]
    first = f"\nCASE a\n{dump}\nDONE {FACTS}\n\nCASE b\n{only_lowered}\nDONE {FACTS}\n"
    rows, asked = run_with(monkeypatch, [first, f"\nCASE b\n{dump}\nDONE {FACTS}\n"], cases=("a", "b"))
    assert [row["result"] for row in rows] == ["ok", "ok"]
    assert asked == [["a", "b"], ["b"]]


def test_a_process_that_does_not_begin_is_said_once(monkeypatch):
    rows, asked = run_with(monkeypatch, ["ImportError: no jax\n"])
    assert [row["result"] for row in rows] == ["FAILED: ImportError: no jax"]
    assert len(asked) == 1


def test_a_case_without_a_kernel_fails(monkeypatch):
    rows, _ = run_with(monkeypatch, [f"\nCASE a\nDONE {FACTS}\n"], cases=("a",))
    assert "neither a kernel" in rows[0]["result"]


def test_a_case_that_a_library_computes_names_its_call(monkeypatch):
    facts = FACTS.replace('"calls": []', '"calls": ["__cudnn$blockScaledDot"]')
    rows, _ = run_with(monkeypatch, [f"\nCASE a\nDONE {facts}\n"], cases=("a",))
    assert (rows[0]["kernel"], rows[0]["result"]) == ("__cudnn$blockScaledDot", "ok")


def test_jobs_come_from_the_tables(monkeypatch):
    def only_h200(problem):
        return None if "H200" in problem.device_kind else "made for the H200"

    made = Implementation("made", lambda *_: None, only_h200)
    monkeypatch.setitem(kernel_cases.TABLES, "quantized_matmul", (made, *kernel_cases.TABLES["quantized_matmul"][-2:]))
    jobs, refused = find_jobs(("h200", "gb300"), [SMALL])
    assert jobs == [Job("quantized_matmul", "made", "h200", (SMALL.name,))]
    assert [(each["chip"], each["reason"]) for each in refused] == [("gb300", "made for the H200")]


def test_tuned_sizes_that_no_case_takes_are_found(monkeypatch, tmp_path):
    folder = tmp_path / "matmul" / "tuning"
    folder.mkdir(parents=True)
    (folder / "hopper.json").write_text(json.dumps({"a": {}, "b": {}}))
    monkeypatch.setattr(compile_kernels.tuning, "__file__", str(tmp_path / "tuning.py"))
    assert untried_sizes([{"sizes": ["matmul/hopper: a"]}], ["matmul"]) == ["matmul/hopper: b"]


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="the cuda extra is not installed")
@pytest.mark.parametrize("case", ["decode bfloat16 256 x 2k", "fp8 70b_gate M=64", "bf16 qwen3_30b T=32"])
def test_a_kernel_compiles_for_a_chip_that_is_not_here(case):
    command = [sys.executable, str(Path(compile_kernels.__file__)), "--chips=h200", f"--case={case}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
