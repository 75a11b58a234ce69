"""Whether the newest wheel of a folder holds every module, the embedded model and the licence, and nothing else.

usage: python .ci/check_wheel.py FOLDER
"""

import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT_BYTES = 20 * 2**20  # of the embedded model 16 MiB, and the code


def main() -> None:
    """Exit with one line per complaint."""
    wheel = max(Path(sys.argv[1]).glob("millrace-*.whl"), key=lambda path: path.stat().st_mtime)
    names = set(zipfile.ZipFile(wheel).namelist())
    complaints = [f"{name} is missing" for name in sorted(expected() - names)]
    complaints += [
        f"{name} does not belong there"
        for name in sorted(names - expected())
        if not name.split("/")[0].endswith(".dist-info")
    ]
    if not any(name.endswith("licenses/LICENSE") for name in names):
        complaints.append("LICENSE is missing")
    if wheel.stat().st_size > LIMIT_BYTES:
        complaints.append(f"{wheel.stat().st_size} bytes are more than {LIMIT_BYTES}")
    if complaints:
        raise SystemExit("\n".join(f"{wheel.name}: {complaint}" for complaint in complaints))
    print(f"{wheel}: {len(names)} files, {wheel.stat().st_size / 2**20:.1f} MiB")


def expected() -> set[str]:
    """Every module of every package, and the data that setup.cfg names: C++, tuned sizes, the embedded model."""
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    paths: set[Path] = set()
    for package in settings["options"]["packages"].split():
        paths |= set(ROOT.joinpath(*package.split(".")[1:]).glob("*.py"))
    for package, patterns in settings["options.package_data"].items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        paths |= {path for pattern in patterns.split() for path in folder.glob(pattern) if path.is_file()}
    return {f"millrace/{path.relative_to(ROOT).as_posix()}" for path in paths}


if __name__ == "__main__":
    main()
