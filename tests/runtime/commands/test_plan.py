"""`millrace plan` answers without weights and without the hardware."""

import json
from pathlib import Path

import pytest

from millrace.runtime.launch import main

SMALL = ("--max_context_len=96", "--num_slots=4", "--max_step_tokens=32", "--no-compile")


@pytest.fixture
def model(fixture_checkpoints: Path, tmp_path: Path) -> str:
    """A folder with nothing but shapes."""
    (tmp_path / "config.json").write_text((fixture_checkpoints / "llama_default" / "config.json").read_text())
    return f"--model={tmp_path}"


def test_plan_shows_memory_what_fits_and_what_binds(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", model, "--target=h200:1x1x4", "--mesh=data=2,tensor=2", "--sweep", *SMALL]) == 0
    shown = capsys.readouterr().out
    for text in ("kv cache", "estimate: shapes", "context", "bound by", "in sum", "Every mesh that fits"):
        assert text in shown


def test_plan_writes_every_number_as_json(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", model, "--target=h200", "--json=-", *SMALL]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["memory"]["free"] > 0 and record["prediction"]["decode"]["bound_by"] in ("compute", "memory", "links")


def test_plan_draws_a_picture(model: str, tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    assert main(["plan", model, "--target=h200", f"--plot={picture}", *SMALL]) == 0
    assert picture.stat().st_size > 0


def test_a_mesh_beyond_the_target_is_one_line(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", model, "--target=h200", "--mesh=data=2", *SMALL]) == 1
    assert "needs 2 devices" in capsys.readouterr().err


def test_a_prompt_of_no_token_is_refused(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", model, "--prompt_len=0", *SMALL]) == 1
    assert "--prompt_len must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--prompt_len=96"], ["--prompt_len=50", "--output_len=47"]])
def test_a_request_beyond_the_context_is_refused_by_name(
    model: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", model, *flags, *SMALL]) == 1
    assert f"max_context_len=96; got {' and '.join(flags)}" in capsys.readouterr().err


def test_a_request_that_was_not_asked_for_fits_in_a_short_context(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", model, "--json=-", *SMALL]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["workload"] == {"prompt_len": 48, "output_len": 48} and record["prediction"]["num_sequences"] > 0
