"""What cpu_peers.py found about one model: rows, claims, the printed tables and the plot."""

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any

from cpu_cells import OURS, PRECISIONS, Cell, Entrant, claims, ratios, step_bytes
from cpu_model import Model
from cpu_start import LIMIT
from machine_limits import MachineLimits
from report import RESULTS, table

BANDWIDTH_SHARE = 0.85  # of the read bandwidth, that steps of one sequence are to reach
MEMORY_FACTOR, MEMORY_ROOM = 1.15, 600e6  # of weights and cache, and bytes beside them
QUIET_SHARE = 0.05  # of the processors that others may have had for the numbers to be trusted


class Findings:
    """Of one model."""

    def __init__(self, model: Model, limits: MachineLimits, prompt_len: int) -> None:
        self.model = model
        self.facts: dict[str, str] = {}  # versions and features, by entrant
        self.sizes: dict[Entrant, dict[str, int]] = {}
        self.starts: dict[str, float] = {}
        self._limits, self._prompt_len = limits, prompt_len
        self._measured_limits: list[dict[str, Any]] = []
        self._seconds: defaultdict[tuple[Entrant, Cell], list[float]] = defaultdict(list)
        self._settings: dict[tuple[Entrant, Cell], str] = {}
        self._idle: list[float] = []
        self._others: list[float] = []

    def note(self, entrant: Entrant, cell: Cell, answer: dict[str, Any]) -> None:
        """One turn."""
        self._seconds[entrant, cell].append(answer["seconds"])
        self._settings[entrant, cell] = answer["setting"]

    def note_shares(self, *, idle: float, others: float) -> None:
        """Of all processor time spent during a turn: what waiting entrants took, and what the rest of the machine."""
        self._idle.append(idle)
        self._others.append(others)

    def note_limits(self) -> None:
        """Measure the machine now."""
        self._measured_limits.append(self._limits.measure())

    def limit(self, name: str) -> float:
        """The best that the rounds saw, for it is a limit."""
        return max(float(measured[name]) for measured in self._measured_limits)

    @property
    def speeds(self) -> dict[tuple[Entrant, Cell], float]:
        """tokens/s, medians over the rounds."""
        return {(entrant, cell): cell.tokens_per_s(median(s)) for (entrant, cell), s in self._seconds.items()}

    def rows(self) -> list[dict[str, Any]]:
        """Everything, for the record."""
        model = self.model.name
        rows: list[dict[str, Any]] = []
        for (entrant, cell), speed in self.speeds.items():
            seconds = self._seconds[entrant, cell]
            rows.append(
                {
                    "model": model, "measure": cell.kind, "size": cell.size, "of": entrant.name,
                    "precision": entrant.precision, "tokens_per_s": speed, "runs": len(seconds),
                    "lowest": cell.tokens_per_s(max(seconds)), "highest": cell.tokens_per_s(min(seconds)),
                    "setting": self._settings[entrant, cell],
                }
            )  # fmt: skip
        for found in ratios(self.speeds):
            rows.append(
                {
                    "model": model, "measure": f"ratio, {found.cell.kind}", "size": found.cell.size,
                    "precision": found.precision, "of": OURS, "value": found.value, "target": found.target,
                    "best peer": str(found.peer),
                }
            )  # fmt: skip
        rows += [{"model": model, "measure": f"memory, {kind}", "of": str(entrant), "bytes": num_bytes}
                 for entrant, sizes in self.sizes.items() for kind, num_bytes in sizes.items()]  # fmt: skip
        rows += [{"model": model, "measure": "start to first token, s", "of": name, "value": seconds}
                 for name, seconds in self.starts.items()]  # fmt: skip
        return rows + self.machine_rows()

    def machine_rows(self) -> list[dict[str, Any]]:
        """The machine's limits, who else was busy, and versions."""
        rows: list[dict[str, Any]] = []
        if self._measured_limits:
            by = self._measured_limits[0]
            rows = [
                {
                    "measure": "read bandwidth, GB/s",
                    "value": self.limit("read_bytes_per_s") / 1e9,
                    "of": self._limits.by,
                },
                {"measure": "int8 peak, GOP/s", "value": self.limit("int8_per_s") / 1e9, "of": by["int8_by"]},
                {"measure": "bf16 peak, GFLOP/s", "value": self.limit("bf16_per_s") / 1e9, "of": by["bf16_by"]},
            ]
        if self._idle:
            rows += [
                {"measure": "share of processor time, waiting entrants", "value": median(self._idle)},
                {"measure": "share of processor time, rest of the machine", "value": median(self._others)},
            ]
        rows += [{"measure": "version", "of": name, "setting": text} for name, text in self.facts.items()]
        return [{"model": self.model.name, **row} for row in rows]

    def claims(self) -> dict[str, bool]:
        """Every promise that this run could look at."""
        held = claims(ratios(self.speeds))
        for entrant, sizes in self.sizes.items():
            if entrant.name == OURS:
                bound = MEMORY_FACTOR * (sizes["weights"] + sizes["kv_cache"]) + MEMORY_ROOM
                room = f"{MEMORY_FACTOR:g} x (weights + KV cache) + {MEMORY_ROOM / 1e6:g} MB"
                text = f"{entrant.precision}: resident set at most {room}"
                held[f"{text} ({sizes['resident'] / 1e9:.2f} of {bound / 1e9:.2f} GB)"] = sizes["resident"] <= bound
        for precision, share in self._bandwidth_shares().items():
            text = f"{precision}: steps of one sequence read weights at {BANDWIDTH_SHARE:.0%} of the bandwidth or more"
            held[f"{text} ({share:.0%})"] = share >= BANDWIDTH_SHARE
        if "llama.cpp int8" in self.starts:
            # A start of ours that failed has no time, and keeps no promise.
            ours, theirs = self.starts.get("Millrace int8", math.inf), self.starts["llama.cpp int8"]
            text = f"time to the first token at most {LIMIT:g} x llama.cpp's"
            held[f"{text} ({ours:.2f} s beside {theirs:.2f} s)"] = ours <= LIMIT * theirs
        if self._others:
            share = median(self._others)
            held[f"other programs left the machine alone ({share:.0%} of the processor time)"] = share <= QUIET_SHARE
        return held

    def _bandwidth_shares(self) -> dict[str, float]:
        """Of the read bandwidth, that Millrace's steps of one sequence reach, by precision."""
        cell, shares = Cell("decode", 1), {}
        for entrant, sizes in self.sizes.items():
            speed = self.speeds.get((entrant, cell))
            if speed is not None and "weights" in sizes:
                weights = sizes["weights"] - self.model.table_bytes  # of the embedding a step reads one row
                num_bytes = step_bytes(weights, cell, self._prompt_len, self.model.token_bytes)
                shares[entrant.precision] = num_bytes * speed / self.limit("read_bytes_per_s")
        return shares

    def warnings(self) -> list[str]:
        """Why these numbers should not be trusted."""
        found = []
        if self._idle and median(self._idle) > QUIET_SHARE:
            found.append(f"waiting entrants took {median(self._idle):.0%} of the processor time")
        if self._others and median(self._others) > QUIET_SHARE:
            found.append(f"other programs took {median(self._others):.0%} of the processor time: not a quiet machine")
        return found


def show_findings(findings: Findings) -> None:
    """Tables of speeds and ratios, the claims and what else there is, on stdout."""
    speeds = findings.speeds
    cells = list(dict.fromkeys(cell for _, cell in speeds))
    entrants = list(dict.fromkeys(entrant for entrant, _ in speeds))
    rows = [[str(e), *(_number(speeds.get((e, cell))) for cell in cells)] for e in entrants]
    print(f"\n{findings.model.name}, tokens/s\n" + table([["", *map(str, cells)], *rows]))
    found = ratios(speeds)
    if found:
        lines = [
            [r.precision, str(r.cell), f"{r.value:.2f}", "-" if r.target is None else f"{r.target:g}", str(r.peer)]
            for r in found
        ]
        print("\n" + table([["precision", "cell", "ratio", "target", "best peer"], *lines]))
    for row in findings.machine_rows():
        if "value" in row:
            print(f"{row['measure']}: {row['value']:.3g} {row.get('of', '')}")
    for name, seconds in findings.starts.items():
        print(f"start to first token, {name}: {seconds:.2f} s")
    for claim, holds in findings.claims().items():
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}")
    for warning in findings.warnings():
        print(f"WARNING: {warning}")


def markdown(findings: Findings) -> str:
    """README's tables: Millrace beside the best peer, and every entrant's tokens/s."""
    found = ratios(findings.speeds)
    cells = list(dict.fromkeys(ratio.cell for ratio in found))
    lines = [f"| tokens/s of {OURS}, times the best peer's | {' | '.join(PRECISIONS)} |", "|---|---|---|---|"]
    for cell in cells:
        texts = {r.precision: f"{_number(r.ours)}, {r.value:.2f} x {r.peer}" for r in found if r.cell == cell}
        lines.append(f"| {cell} | " + " | ".join(texts.get(precision, "-") for precision in PRECISIONS) + " |")
    speeds = findings.speeds
    cells = list(dict.fromkeys(cell for _, cell in speeds))
    lines += ["", f"| tokens/s | {' | '.join(map(str, cells))} |", "|---" * (len(cells) + 1) + "|"]
    for entrant in dict.fromkeys(entrant for entrant, _ in speeds):
        lines.append(f"| {entrant} | " + " | ".join(_number(speeds.get((entrant, cell))) for cell in cells) + " |")
    return "\n".join(lines)


def plot(all_findings: Sequence[Findings], name: str) -> None:
    """Tokens per second of every entrant in every cell, models below each other, beside the JSON."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5 * len(all_findings)), layout="constrained")
    for findings, axes in zip(all_findings, figure.subplots(len(all_findings), 1, squeeze=False)[:, 0], strict=True):
        speeds = findings.speeds
        cells = list(dict.fromkeys(cell for _, cell in speeds))
        entrants = list(dict.fromkeys(entrant for entrant, _ in speeds))
        width = 0.8 / len(entrants)
        for number, entrant in enumerate(entrants):
            places = [at + (number - (len(entrants) - 1) / 2) * width for at in range(len(cells))]
            heights = [speeds.get((entrant, cell), 0.0) for cell in cells]
            axes.bar(places, heights, width, label=str(entrant), hatch="" if entrant.name == OURS else "//")
        axes.set(ylabel="tokens/s", yscale="log", xticks=range(len(cells)), title=findings.model.name)
        axes.set_xticklabels(map(str, cells))
        axes.grid(axis="y", alpha=0.3)
        axes.legend(ncols=2, fontsize="small")
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / f"{name}.png", dpi=150)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"
