"""The library of native kernels is built once, kept, mended; where it cannot be, the reason is said and XLA serves."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from millrace.errors import KernelError, NativeError
from millrace.pallas_kernels import native
from millrace.pallas_kernels.dispatch import KernelChoices
from millrace.pallas_kernels.native import build, compiler
from millrace.pallas_kernels.paged_attention import TABLE as ATTENTIONS
from millrace.pallas_kernels.paged_attention import PagedAttentionProblem, PagedAttentionSpec
from millrace.pallas_kernels.quantized_matmul import FORMATS, MatmulProblem
from millrace.pallas_kernels.quantized_matmul import TABLE as MATMULS

SOURCES = build.SOURCES
SMALL = ("instruction_sets.cc", "instruction_sets.h", "targets.cc", "targets.h")  # which compile in a second
HAS_COMPILER = any(map(shutil.which, compiler.CANDIDATES))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, small sources, and a process that has tried nothing yet."""
    sources = tmp_path / "sources"
    sources.mkdir()
    for name in SMALL:
        shutil.copy(SOURCES / name, sources)
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "CACHE_DIR", tmp_path / "cache")
    monkeypatch.setattr(native, "_outcome", [])
    return tmp_path / "cache"


def install_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """Put a shell script in the place of all compilers; it finds the real one in $real, and logs its calls."""
    real, log = next(filter(None, map(shutil.which, compiler.CANDIDATES)), "false"), folder / "calls"
    path = folder / "c++"
    path.write_text(f'#!/bin/sh\nreal={real}\necho "$*" >>{log}\n{script}\n')
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.defpath}")
    return log


def folders(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


# ---- built, kept, mended


@needs_compiler
@pytest.mark.skipif(platform.machine() not in native.ARCHITECTURES, reason="the kernels are for x86-64")
def test_all_sources_compile_here() -> None:
    """Where they do not, XLA serves, and tests of what they compute are skipped."""
    assert build.built_library(show_progress=False).path.is_file()


@needs_compiler
def test_a_library_is_built_once_and_found_afterwards(cache, tmp_path, monkeypatch):
    log = install_compiler(tmp_path, monkeypatch, 'exec $real "$@"')
    first = build.built_library(show_progress=False)
    num_calls = len(log.read_text().splitlines())
    second = build.built_library(show_progress=False)
    assert first == second and folders(cache) == [first.path.parent]
    assert log.read_text().splitlines()[num_calls:] == ["--version"]


@needs_compiler
def test_other_sources_are_another_library(cache):
    first = build.built_library(show_progress=False)
    with open(build.SOURCES / "targets.h", "a") as file:
        file.write("// changed\n")
    assert build.built_library(show_progress=False).path != first.path


@needs_compiler
@pytest.mark.parametrize(
    ("file", "damage"),
    [(build.LIBRARY_FILE, damage) for damage in ("cut", "changed", "removed")]
    + [("built.json", damage) for damage in ("cut", "removed")],
)
def test_a_damaged_library_is_built_again(cache, file, damage):
    built = build.built_library(show_progress=False)
    path = built.path.parent / file
    content = path.read_bytes()
    path.unlink()
    if damage != "removed":
        middle = len(content) // 2
        changed = bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes(content[:middle] + (b"" if damage == "cut" else changed))
    assert build._open(built.path.parent) is None
    assert build.built_library(show_progress=False) == built
    assert build._open(built.path.parent) == built


@needs_compiler
def test_two_processes_that_build_at_once_build_one(cache, tmp_path, monkeypatch):
    log = install_compiler(tmp_path, monkeypatch, 'exec $real "$@"')
    script = (
        "import sys; from pathlib import Path; from millrace.pallas_kernels.native import build;"
        "build.CACHE_DIR, build.SOURCES = Path(sys.argv[1]), Path(sys.argv[2]);"
        "print(build.built_library(show_progress=False).path)"
    )
    command = [sys.executable, "-c", script, str(cache), str(build.SOURCES)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert paths == {str(build.built_library(show_progress=False).path)}
    assert sum("-shared" in line for line in log.read_text().splitlines()) == 1


@needs_compiler
def test_what_killed_builds_left_and_what_was_not_used_for_long_is_removed(cache, monkeypatch):
    monkeypatch.setattr(build, "_NUM_KEPT", 3)
    for number, name in enumerate(["unfinished-x", "old", "older", "oldest"]):
        (cache / name).mkdir(parents=True)
        os.utime(cache / name, (1000 - number, 1000 - number))
    built = build.built_library(show_progress=False)
    assert {path.name for path in folders(cache)} == {built.path.parent.name, "old", "older"}


@needs_compiler
def test_the_library_says_which_instruction_sets_may_be_used(cache):
    reason = native.unavailable()
    if reason is not None:
        pytest.skip(reason)
    library = native.library()
    best_first = list(compiler.INSTRUCTION_SETS)[::-1]
    assert list(library.instruction_sets) == best_first[best_first.index(library.instruction_sets[0]) :]
    assert library.targets == ()


# ---- what a compiler does not know


@needs_compiler
def test_files_of_a_set_that_the_compiler_does_not_know_are_left_out(cache, tmp_path, monkeypatch):
    script = 'case "$*" in *-mavx512vnni*) echo "error: unknown"; exit 1;; esac; exec $real "$@"'
    log = install_compiler(tmp_path, monkeypatch, script)
    (build.SOURCES / "some_amx.cc").write_text("#error cannot be compiled\n")
    monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")
    assert build.built_library(show_progress=False).known_sets == ("avx2", "avx512")
    assert "some_amx" not in log.read_text() and "MILLRACE_HAS_AVX512_VNNI" not in log.read_text()
    monkeypatch.setattr(native, "_instruction_sets", lambda _: (("avx512_vnni", "avx512", "avx2"), ("avx512", "avx2")))
    assert native.library().left_out == ("avx512_vnni: the compiler does not know it",)


def test_a_files_name_decides_its_flags(tmp_path):
    for name in ("c", "b_amx", "a_avx512", "z_avx2", "a_avx512_bf16", "b_avx512_vnni"):
        (tmp_path / f"{name}.cc").write_text("")
    sources = compiler.compiled_sources(tmp_path, ("avx2", "avx512", "avx512_vnni", "avx512_bf16"))
    assert [source.stem for source in sources] == ["c", "z_avx2", "a_avx512", "b_avx512_vnni", "a_avx512_bf16"]
    assert compiler.set_flags(compiler.set_of(Path("c.cc"))) == []
    assert compiler.set_flags(compiler.set_of(Path("x_avx2.cc"))) == ["-mavx2", "-mfma", "-mf16c"]
    vnni, bf16 = (set(compiler.set_flags(compiler.set_of(Path(f"x_avx512_{name}.cc")))) for name in ("vnni", "bf16"))
    assert bf16 - vnni == {"-mavx512bf16"} and {"-mavx2", "-mavx512vl", "-mavx512vnni"} <= vnni


# ---- reasons


def test_without_a_compiler_the_reason_names_what_to_install(cache, monkeypatch):
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")
    assert "no C++ compiler" in native.unavailable() and "apt-get install g++" in native.unavailable()
    with pytest.raises(KernelError, match="no C\\+\\+ compiler"):
        native.library()


@needs_compiler
def test_without_a_compiler_a_library_that_was_built_before_serves(cache, monkeypatch):
    built = build.built_library(show_progress=False)
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    assert build.built_library(show_progress=False) == built


def test_a_compiler_that_fails_is_quoted_with_its_command(cache, tmp_path, monkeypatch):
    script = 'case "$*" in --version) echo fake 1.0;; *) echo "in file x.h"; echo "x.h:1: error: boom"; exit 1;; esac'
    install_compiler(tmp_path, monkeypatch, script)
    monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")
    first, command, *_ = native.unavailable().splitlines()
    assert first.endswith("x.h:1: error: boom") and "-c" in command.split()
    assert folders(cache) == []


def test_a_compiler_that_does_not_start_is_named(cache, tmp_path, monkeypatch):
    install_compiler(tmp_path, monkeypatch, "echo no licence; exit 3")
    with pytest.raises(NativeError, match="does not start: no licence"):
        build.built_library(show_progress=False)


def test_another_architecture_is_named(cache, monkeypatch):
    monkeypatch.setattr(native.platform, "machine", lambda: "aarch64")
    assert "this one is aarch64" in native.unavailable()


@needs_compiler
def test_a_cpu_without_avx2_is_told(cache, monkeypatch):
    monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(native, "_instruction_sets", lambda _: ((), ()))
    assert "no AVX2" in native.unavailable()


@needs_compiler
def test_a_cache_that_cannot_be_written_is_named(cache, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(build, "CACHE_DIR", tmp_path / "file" / "below")
    with pytest.raises(NativeError, match="cannot be written"):
        build.built_library(show_progress=False)


@needs_compiler
def test_a_library_that_cannot_be_loaded_is_named(cache, monkeypatch):
    monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")
    built = build.built_library(show_progress=False)
    built.path.write_bytes(b"no library")
    record = json.loads((built.path.parent / "built.json").read_text())
    digest = build.hashlib.sha256(b"no library").hexdigest()
    (built.path.parent / "built.json").write_text(json.dumps({**record, "sha256": digest}))
    assert "cannot be loaded" in native.unavailable()


MATMUL = MatmulProblem(platform="cpu", format=FORMATS["int8"], num_rows=4, in_dim=256, out_dim=256, dtype="bfloat16")
ATTENTION = PagedAttentionProblem(
    platform="cpu", device_kind="cpu", spec=PagedAttentionSpec(scale=0.1), num_heads=4, num_kv_heads=2, head_dim=64,
    page_size=16, dtype="bfloat16", cache_dtype="bfloat16", has_sinks=False,
)  # fmt: skip


@pytest.mark.parametrize(
    "operation, table, problem",
    [("quantized_matmul", MATMULS, MATMUL), ("paged_attention", ATTENTIONS, ATTENTION)],
    ids=["quantized_matmul", "paged_attention"],
)
def test_without_the_library_xla_serves_and_the_reason_is_logged(operation, table, problem, monkeypatch, caplog):
    monkeypatch.setattr(native, "_outcome", ["there is no C++ compiler"])
    natives = [entry.name for entry in table if entry.unsupported(problem) == "there is no C++ compiler"]
    if not natives:
        pytest.skip("it has no native implementation")
    with caplog.at_level("INFO"):
        assert KernelChoices("cpu").choose(operation, table, problem).name == "xla"
    assert all(f"not {name}: there is no C++ compiler" in caplog.text for name in natives)
    with pytest.raises(KernelError, match="there is no C\\+\\+ compiler"):
        KernelChoices("cpu", {operation: natives[0]}).choose(operation, table, problem)
