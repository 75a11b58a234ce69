"""`millrace compile` writes an artifact and shows what each program takes."""

from pathlib import Path

import pytest

from millrace.runtime.artifacts import read_manifest
from millrace.runtime.launch import main

SMALL = ("--max_context_len=48", "--num_slots=2", "--max_step_tokens=8", "--dtype=float32", "--kv_cache_bytes=262144")


@pytest.fixture
def model(fixture_checkpoints: Path, tmp_path: Path) -> str:
    """A folder with nothing but shapes."""
    (tmp_path / "config.json").write_text((fixture_checkpoints / "llama_default" / "config.json").read_text())
    return f"--model={tmp_path}"


def test_compile_writes_an_artifact_and_shows_each_program(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "artifact"
    assert main(["compile", model, "--target=cpu:2", "--mesh=data=2", *SMALL, str(folder)]) == 0
    shown = capsys.readouterr().out
    manifest = read_manifest(folder)
    assert manifest.target == "cpu:1x1x2" and manifest.facts["devices"]["mesh"]["data"] == 2
    for name in manifest.programs:
        assert f"\n{name} " in shown
    assert f"{folder}: {manifest.num_bytes / 1e6:.1f} MB for cpu:1x1x2" in shown


@pytest.mark.parametrize(
    "flags, shown",
    [
        ((), "expected a folder for the artifact"),
        (("--target=gb3000",), "Known targets: gb300"),
        (("--target=cpu", "--mesh=data=99"), "needs 99 devices"),
        (("--target=cpu", "--mesh=tensor=3", "--target=cpu:3"), "Nearest meshes that fit"),
    ],
)
def test_what_cannot_be_compiled_is_one_line(
    flags: tuple[str, ...], shown: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = (f"--out={tmp_path / 'artifact'}",) if flags else ()
    assert main(["compile", model, *SMALL, *flags, *out]) == 1
    assert shown in capsys.readouterr().err
    assert not (tmp_path / "artifact").exists()
