from pathlib import Path

import pytest

from millrace.pallas_kernels import native
from millrace.runtime.commands import doctor
from millrace.runtime.config import RuntimeConfig


def test_every_check_reports_on_this_machine(launch, capsys):
    launch("doctor")
    out = capsys.readouterr().out
    for subject in ("millrace", "python", "jax", "packages", "device", "compiler", "host", "compile cache"):
        assert f" {subject} " in out, subject
    assert "Error" not in out


def test_a_check_that_breaks_is_a_finding_and_the_rest_goes_on(launch, capsys, monkeypatch):
    def broken(config):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(doctor, "CHECKS", (broken, doctor._host))
    assert launch("doctor") == 1
    out = capsys.readouterr().out
    assert "FAIL broken" in out and "no such thing" in out and "cores" in out


@pytest.mark.parametrize(
    ("jax", "jaxlib", "level"),
    [
        ("0.11.2", "0.11.2", "ok"),
        ("0.12.0.1", "0.12.0.1", "ok"),
        ("0.10.2", "0.10.2", "FAIL"),
        ("0.13.0", "0.13.0", "FAIL"),
        ("0.12.0", "0.11.2", "FAIL"),
    ],
)
def test_a_jax_that_was_never_tried_is_refused(jax, jaxlib, level):
    finding = doctor._judge_jax(jax, jaxlib)
    assert finding.level == level
    assert bool(finding.remedy) == (level == "FAIL")


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("no-such-package",))
    findings = list(doctor._versions(RuntimeConfig()))
    assert ("FAIL", "pip install no-such-package") in [(finding.level, finding.remedy) for finding in findings]


def test_native_kernels_are_a_finding_with_their_instruction_sets_or_the_reason(monkeypatch):
    (finding, *_) = doctor._native_kernels(RuntimeConfig())
    reason = native.unavailable()
    expected = ("ok", native.library().instruction_sets[0]) if reason is None else ("warn", reason.partition("\n")[0])
    assert (finding.level, expected[1] in finding.detail) == (expected[0], True)
    monkeypatch.setattr(native, "_outcome", ["the C++ compiler failed: x.h:1: error: boom\nc++ -c x.cc\nmore"])
    (finding,) = doctor._native_kernels(RuntimeConfig())
    assert finding.level == "warn" and "XLA computes instead" in finding.detail and "boom" in finding.detail
    assert finding.remedy == "c++ -c x.cc"


def test_instruction_sets_that_cannot_be_used_are_notes(monkeypatch):
    left_out = ("amx: the operating system does not allow it",)
    library = native.Library(
        path=Path("cache/key/millrace.so"), compiler="c++ 12", instruction_sets=("avx2",), left_out=left_out, targets=()
    )
    monkeypatch.setattr(native, "_outcome", [library])
    found, note = doctor._native_kernels(RuntimeConfig())
    assert found.detail == "avx2; built by c++ 12 in cache/key"
    assert (note.level, note.detail) == ("note", "without amx: the operating system does not allow it")


def test_an_nvidia_driver_without_its_plugin_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "_has_nvidia_driver", lambda: True)
    warnings = [finding for finding in doctor._devices(RuntimeConfig()) if finding.level == "warn"]
    assert warnings and "millrace[cuda]" in warnings[0].remedy


def test_a_default_cache_that_cannot_be_made_is_a_warning_and_a_named_one_stops_a_start(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    (finding,) = doctor._compile_cache(RuntimeConfig(compile_cache_dir=str(file / "below")))
    assert finding.level == "FAIL" and finding.remedy
    monkeypatch.setenv("HOME", str(file))
    for check, effect in ((doctor._compile_cache, "compiles again"), (doctor._store_cache, "are loaded directly")):
        (finding,) = check(RuntimeConfig())
        assert finding.level == "warn" and finding.remedy and effect in finding.detail


def test_a_compile_cache_that_is_off_is_a_warning():
    (finding,) = doctor._compile_cache(RuntimeConfig(compile_cache_dir=""))
    assert finding.level == "warn"
