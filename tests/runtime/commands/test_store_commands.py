"""`millrace convert`, `verify-store` and `cache`: results on stdout, words on stderr, faults in the exit code."""

import shutil
from pathlib import Path

import pytest

from millrace.runtime.launch import main
from millrace.runtime.store import open_store


@pytest.fixture
def checkpoint_dir(fixture_checkpoints, tmp_path):
    return Path(shutil.copytree(fixture_checkpoints / "llama_default", tmp_path / "llama"))


@pytest.mark.parametrize("by_place", [True, False])
def test_convert_takes_its_places_with_and_without_flags(by_place, checkpoint_dir, tmp_path, capsys):
    store, flags = tmp_path / "store", ("--dtype", "bf16", "--noprogress")
    places = (str(checkpoint_dir), str(store)) if by_place else (f"--source={checkpoint_dir}", f"--destination={store}")
    assert main(["convert", *places, *flags]) == 0
    out, err = capsys.readouterr()
    assert out == f"{store}\n" and not err
    assert open_store(store).dtype == "bfloat16"
    assert main(["convert", *places, *flags]) == 0
    assert "nothing to do" in capsys.readouterr().err


def test_convert_shows_its_progress(checkpoint_dir, tmp_path, monkeypatch, capsys):
    from millrace.runtime import byte_bar

    monkeypatch.setattr(byte_bar, "DELAY_S", 0)
    assert main(["convert", str(checkpoint_dir), str(tmp_path / "store")]) == 0
    err = capsys.readouterr().err
    assert "Converting weights: 100%" in err and "B/s" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["convert"], "expected a source and a destination"),
        (["convert", "x"], "expected a source and a destination"),
        (["convert", "x", "y", "--dtype=int8"], "dtype must be one of float32, bfloat16, float16"),
        (["convert", "./absent", "y"], "is not a directory"),
        (["convert", "memory://a", "memory://b", "--revision=main"], "revision='main' goes with org/name"),
        (["verify-store"], "expected a store"),
        (["cache", "list", "absent"], "expected the name of a store"),
        (["cache", "empty"], "expected list, verify, remove; got 'empty'"),
        (["cache", "remove"], "remove takes names"),
    ],
)
def test_wrong_use_is_one_line_and_exits_with_1(argv, message, tmp_path, capsys):
    extra = [f"--store_cache_dir={tmp_path}"] if argv[0] == "cache" else []
    assert main([*argv, *extra]) == 1
    out, err = capsys.readouterr()
    assert not out and message in err and err.count("\n") == 1


def test_verify_store_lists_every_fault_and_exits_with_1(checkpoint_dir, tmp_path, capsys):
    store = tmp_path / "store"
    main(["convert", str(checkpoint_dir), str(store), "--noprogress"])
    capsys.readouterr()
    assert main(["verify-store", str(store)]) == 0
    assert capsys.readouterr() == ("", f"millrace: {store}: every byte is as it was saved\n")
    for name in ("embed.weight", "head.weight"):
        (store / "params" / name / "c" / "0" / "0").unlink()
    assert main(["verify-store", str(store)]) == 1
    out, err = capsys.readouterr()
    assert [line.split(": ")[1].split("[")[0] for line in out.splitlines()] == ["embed/weight", "head/weight"]
    assert err == f"millrace: {store}: faults: 2\n"


def test_cache_lists_verifies_and_removes(checkpoint_dir, tmp_path, capsys):
    flag = f"--store_cache_dir={tmp_path / 'cache'}"
    for name in ("a", "b"):
        main(["convert", str(checkpoint_dir), str(tmp_path / "cache" / name), "--noprogress"])
    (tmp_path / "cache" / "b" / "params" / "embed.weight" / "c" / "0" / "0").write_bytes(b"")
    capsys.readouterr()
    assert main(["cache", flag]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[:2]] == [["a", "llama", "float32"], ["b", "llama", "float32"]]
    assert lines[0].endswith(" old") and lines[2].startswith("2 stores, ")
    assert main(["cache", "verify", "a", flag]) == 0
    assert main(["cache", "verify", flag]) == 1
    assert "b: faults: 1\n" in capsys.readouterr().out
    assert main(["cache", "remove", "b", flag]) == 0
    assert main(["cache", "remove", "--all", flag]) == 0
    assert capsys.readouterr().out == "removed b\nremoved a\n"
    assert not list((tmp_path / "cache").iterdir())
