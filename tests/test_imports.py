"""The import direction, read from the source: nothing is imported here."""

import ast
import re
import sys
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest

import millrace

ROOT = Path(millrace.__file__).parent
ROOMS = ("pallas_kernels", "sharding", "models", "runtime", "configs")

# What each room may import besides itself; errors is everyone's.
ALLOWED = {
    "pallas_kernels": set(),
    "sharding": set(),
    "models": {"pallas_kernels", "sharding"},
    "runtime": {"pallas_kernels", "sharding", "models"},
    "configs": {"runtime"},
}
LAUNCHER = re.compile(r"runtime/(launch|overrides|commands/\w+)\.py")  # above configs, though it lies in runtime
PROGRAMS = {"models/embedded/train.py"}  # run by a person, imported by nobody, so they stand above everything
MAY_READ_THE_ENVIRONMENT = {
    "runtime/commands/doctor.py",  # it reports variables that explain surprises
    "runtime/gpu_pool.py",  # jax takes a GPU's share from nowhere else
}
NEVER_IMPORTED = {"torch", "transformers", "pickle", "dill", "cloudpickle"}

FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(level, dotted name) of every import of a file: level 0 is absolute, else relative to the root of the package."""
    found: list[tuple[int, str]] = []
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((0, node.module or ""))
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
            found += [(node.level, ".".join([*base, alias.name])) for alias in node.names]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_imports_run_one_way(name):
    room = name.split("/")[0]
    allowed = ALLOWED[room] | {room, "errors", "__version__"}
    if LAUNCHER.fullmatch(name):
        allowed |= {"configs"}
    if name in PROGRAMS:
        allowed |= set(ROOMS)
    inner = {target.split(".")[0] for level, target in imports_of(ROOT / name) if level}
    assert inner <= allowed, f"{name} imports {sorted(inner - allowed)}"


def test_programs_are_imported_by_nobody():
    targets = {target for path in FILES for level, target in imports_of(path) if level}
    programs = {name.removesuffix(".py").replace("/", ".") for name in PROGRAMS}
    assert not {target for target in targets for program in programs if f"{target}.".startswith(f"{program}.")}


@pytest.mark.parametrize("name", NAMES)
def test_the_library_imports_itself_relatively_and_nothing_banned(name):
    outer = {target.split(".")[0] for level, target in imports_of(ROOT / name) if not level}
    assert not outer & (NEVER_IMPORTED | {"millrace"})


@pytest.mark.parametrize("name", NAMES)
def test_the_library_reads_no_environment(name):
    tree = ast.parse((ROOT / name).read_text())
    reads = [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv"))
        or (isinstance(node, ast.alias) and node.name in ("environ", "environb", "getenv"))
    ]
    assert not reads or name in MAY_READ_THE_ENVIRONMENT, f"{name}: lines {reads}"


def test_requirements_and_imports_agree():
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    required = {re.split(r"[<>=\[ ]", line)[0] for line in settings["options"]["install_requires"].split("\n") if line}
    imported = {
        target.split(".")[0] for path in FILES for level, target in imports_of(path) if not level
    } - sys.stdlib_module_names
    providers = metadata.packages_distributions()

    def normal(name: str) -> str:
        return name.lower().replace("_", "-")

    provided = {module: {normal(name) for name in providers.get(module, [module])} for module in imported}
    required = {normal(name) for name in required}
    assert [module for module, names in provided.items() if not names & required] == []
    assert required - set().union(*provided.values()) == set()
