"""The machine's limits, where there is no compiler or one that fails."""

import machine_limits
import pytest
from machine_limits import MachineLimits

from millrace.pallas_kernels.native import compiler


def test_without_a_compiler_numpy_measures_and_the_reason_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(compiler, "CANDIDATES", ())
    monkeypatch.setattr(machine_limits, "measure_with_numpy", lambda: {"read_bytes_per_s": 1})
    limits = MachineLimits(tmp_path, num_threads=1)
    assert "no C++ compiler" in limits.by
    assert limits.measure() == {"read_bytes_per_s": 1}


def test_a_program_that_ends_badly_is_not_used(tmp_path, monkeypatch):
    source = tmp_path / "limits.cc"
    source.write_text('#include <cstdio>\nint main() { std::fputs("no AMX", stderr); return 1; }\n')
    monkeypatch.setattr(machine_limits, "_SOURCE", source)
    try:
        compiler.find_compiler()
    except compiler.NativeError as reason:
        pytest.skip(str(reason))
    assert "ended with 1: no AMX" in MachineLimits(tmp_path / "built", num_threads=1).by
