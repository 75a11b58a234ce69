import re
from configparser import ConfigParser
from pathlib import Path

import millrace
from millrace.runtime.commands import doctor

ROOT = Path(millrace.__file__).parent
NOT_SHIPPED = {"tests", "benchmarks", "notebooks", "build", "dist"}


def settings() -> ConfigParser:
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def shipped_folders() -> set[Path]:
    inits = (path.relative_to(ROOT) for path in ROOT.rglob("__init__.py"))
    return {path.parent for path in inits if not (path.parts[0] in NOT_SHIPPED or path.parts[0].startswith("."))}


def test_every_package_is_named_in_setup_cfg():
    packages = set(settings()["options"]["packages"].split())
    assert packages == {".".join(["millrace", *folder.parts]) for folder in shipped_folders()}


def test_every_file_of_code_is_in_a_package():
    folders = {path.relative_to(ROOT).parent for room in ("runtime", "models", "sharding", "pallas_kernels", "configs")
               for path in (ROOT / room).rglob("*.py")}  # fmt: skip
    assert folders <= shipped_folders()


def test_every_data_file_is_named_in_setup_cfg():
    section = settings()["options.package_data"]
    for package, globs in section.items():
        base = ROOT.joinpath(*package.split(".")[1:])
        for pattern in globs.split():
            matches = [path for path in base.glob(pattern) if path.is_file()]
            assert matches or pattern == "**/*.json", f"{package}: {pattern} matches nothing"
    store = ROOT / "models" / "embedded" / "store"
    hidden = [path for path in store.rglob("*") if path.name.startswith(".")]
    assert not hidden, "setuptools' globs leave hidden files out of the wheel"


def test_doctor_asks_for_the_jax_that_is_installed():
    lowest, too_new = (".".join(map(str, version)) for version in (doctor.LOWEST_JAX, doctor.FIRST_JAX_TOO_NEW))
    assert f"jax>={lowest},<{too_new}" in settings()["options"]["install_requires"].split()


def test_no_file_names_a_machines_path():
    pattern = re.compile(r"/(?:work|home|Users)/\w")
    folders = ["runtime", "models", "sharding", "pallas_kernels", "configs", "tests", "benchmarks", "notebooks", ".ci"]
    files = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md", ".ipynb")
    ]
    named = [path.relative_to(ROOT).as_posix() for path in files if pattern.search(path.read_text())]
    assert named == []
