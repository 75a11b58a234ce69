"""`millrace export`: a folder comes out, its place on stdout; what is not a store is refused."""

from pathlib import Path

import pytest

from millrace.runtime.checkpoint import open_checkpoint
from millrace.runtime.convert import convert

LLAMA = Path(__file__).parents[2] / "fixtures" / "checkpoints" / "llama_default"


@pytest.fixture
def store(tmp_path):
    """The folder of a tiny Llama's store."""
    return convert(open_checkpoint(LLAMA), tmp_path / "store", show_progress=False).path


def test_export_writes_a_checkpoint_and_prints_its_place(launch, store, tmp_path, capsys):
    assert launch("export", str(store), str(tmp_path / "exported")) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'exported'}\n"
    assert open_checkpoint(tmp_path / "exported").tensor_names == open_checkpoint(LLAMA).tensor_names


def test_store_and_destination_may_be_flags(launch, store, tmp_path):
    assert launch("export", f"--store={store}", f"--destination={tmp_path / 'exported'}") == 0
    assert open_checkpoint(tmp_path / "exported").tensor_names


@pytest.mark.parametrize("arguments", [(), ("only-a-store",)])
def test_export_without_both_places_says_what_to_type(arguments, launch, capsys):
    assert launch("export", *arguments) == 1
    assert "as in: millrace export path/to/store path/to/new" in capsys.readouterr().err


def test_a_checkpoint_is_no_store(launch, tmp_path, capsys):
    assert launch("export", str(LLAMA), str(tmp_path / "exported")) == 1
    assert "this is a Hugging Face checkpoint already" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_destination_that_holds_something_is_refused(launch, store, capsys):
    assert launch("export", str(store), str(store)) == 1
    assert "new or empty folder" in capsys.readouterr().err
