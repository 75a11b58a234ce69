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
    """Every module of every package, the CPU kernels' C++, and the embedded model's files."""
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    paths = {ROOT / "py.typed", *ROOT.glob("models/embedded/*.md")}
    for package in settings["options"]["packages"].split():
        paths |= set(ROOT.joinpath(*package.split(".")[1:]).glob("*.py"))
    paths |= {path for path in ROOT.glob("models/embedded/store/**/*") if path.is_file()}
    for pattern in ("**/*.json", "native/*.cc", "native/*.h"):
        paths |= {path for path in ROOT.joinpath("pallas_kernels").glob(pattern) if path.is_file()}
    return {f"millrace/{path.relative_to(ROOT).as_posix()}" for path in paths}


if __name__ == "__main__":
    main()
