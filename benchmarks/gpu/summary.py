"""The targets of the GPU, each beside what results/gpu_*.json last found; the end of run_all.sh.

With --compiled first what compilers say of the kernels behind them (`make compile-kernels`): registers, occupancy, and
the time below which an H200 cannot do them. That is all there is to say on a machine without a GPU.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from kernel_cases import cases, has_target
from report import RESULTS, table

type Line = tuple[str, float | None, float]  # what, what was found, what it should be at least

DECODE_ROWS = (1, 4, 16)
COMPILED = ("case", "kernel", "registers", "spills", "smem_kb", "blocks_per_sm", "bound_us", "bound_by")


def read_rows(name: str) -> list[dict[str, Any]]:
    """The rows of a result; none where it was not measured."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def lines() -> Iterator[Line]:
    """Every target."""
    kernels, peers = read_rows("gpu_kernels"), [*read_rows("gpu_peers_torch"), *read_rows("gpu_peers_jax")]
    for cache in ("bfloat16", "float8_e4m3fn", "int8"):
        for context, least in (("256 x 2k", 0.8), ("4 x 64k", 0.7)):
            case = f"decode {cache} {context}"
            yield f"{case}: share of the copy bandwidth", _chosen(kernels, case, "memory_share"), least
    for length in ("4k", "16k"):
        ours, theirs = _chosen(kernels, f"prefill bfloat16 {length}", "us"), _best(peers, f"prefill {length}", "cudnn")
        yield f"prefill {length}: speed over cuDNN", _ratio(theirs, ours), 1.0
    for weight, rows in itertools.product(("70b_gate", "70b_down"), (64, 256, 1024, 4096)):
        case = f"{weight} M={rows}"
        ours = _chosen(kernels, f"fp8 {case}", "us")
        yield f"fp8 {case}: speed over cuBLASLt", _ratio(_best(peers, case, "fp8"), ours), 0.95
    yield "fp8 M=4096: TFLOP/s", _chosen(kernels, "fp8 70b_gate M=4096", "tflops"), 1200
    for rows in (1, 16, 64, 256, 4096):
        ours, plain = (_chosen(kernels, f"{name} 70b_gate M={rows}", "us") for name in ("int4", "bf16"))
        least = 2.8 if rows <= max(DECODE_ROWS) else 1.4 if rows == 64 else 1.0
        yield f"int4 M={rows}: speed over bf16", _ratio(plain, ours), least
    for model, least in (("70b", 4488), ("8b", 8255)):
        rows = read_rows(f"gpu_offline_{model}")
        yield f"offline {model}: tokens/s", rows[0]["steady_tokens_per_s"] if rows else None, least


def _chosen(rows: list[dict[str, Any]], case: str, key: str) -> float | None:
    """Of the implementation that a runtime takes, the first that serves the case; None if it is wrong or not there."""
    found = [row for row in rows if row["case"] == case]
    return found[0][key] if found and found[0].get("agrees") else None


def _best(rows: list[dict[str, Any]], case: str, peer: str) -> float | None:
    times = [row["us"] for row in rows if row["case"] == case and peer in row["peer"] and row["us"] != "-"]
    return min(times, default=None)


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def compiled() -> list[list[str]]:
    """Lines of a table, its head among them."""
    wanted = {case.name for case in cases() if has_target(case)}
    rows = [row for row in read_rows("kernels_aot") if row["chip"] == "h200" and row["case"] in wanted]
    cells = [[row[key] for key in COMPILED] for row in rows]
    return [list(COMPILED), *([f"{x:.4g}" if isinstance(x, float) else str(x) for x in line] for line in cells)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiled", action="store_true")
    if parser.parse_args(arguments).compiled:
        print(table(compiled()), end="\n\n")
    width = max(len(what) for what, _, _ in lines())
    for what, found, least in lines():
        text = "not measured" if found is None else f"{found:,.2f}".rjust(12)
        verdict = "" if found is None else "reached" if found >= least else "MISSED"
        print(f"{what.ljust(width)}  {text}  target {least:>8,.2f}  {verdict}")


if __name__ == "__main__":
    main()
