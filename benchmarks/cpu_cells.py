"""What cpu_peers.py asks for, and what its numbers mean: cells, ratios to the best peer, targets. No measuring here."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

PRECISIONS = ("int4", "int8", "bf16")  # each is to be compared with itself and those behind it
OURS = "Millrace"


class Cell(NamedTuple):
    """One thing that every peer does: a prompt of `size` tokens, or steps of `size` sequences."""

    kind: str  # "prefill" or "decode"
    size: int

    def __str__(self) -> str:
        return f"prefill {self.size}" if self.kind == "prefill" else f"decode batch {self.size}"

    def tokens_per_s(self, seconds: float) -> float:
        """Of a prompt, or of one step."""
        return self.size / seconds


class Entrant(NamedTuple):
    """Who is measured: a peer at a precision."""

    name: str
    precision: str

    def __str__(self) -> str:
        return f"{self.name} {self.precision}"


Speeds = Mapping[tuple[Entrant, Cell], float]  # tokens/s

# Ratios to the best peer at the same or a higher precision that each cell is to reach, for PRECISIONS in their order.
TARGETS: dict[Cell, tuple[float, float, float]] = {
    Cell("decode", 1): (1.0, 1.0, 1.0),
    Cell("decode", 8): (1.3, 1.5, 1.2),
    Cell("decode", 32): (2.0, 2.0, 1.3),
    Cell("decode", 64): (2.0, 2.0, 1.3),
    Cell("prefill", 1024): (1.2, 1.2, 1.2),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ratio:
    """Millrace's speed in a cell beside the best peer's."""

    cell: Cell
    precision: str
    ours: float  # tokens/s
    best: float
    peer: Entrant

    @property
    def value(self) -> float:
        """Above 1 where Millrace is faster."""
        return self.ours / self.best

    @property
    def target(self) -> float | None:
        """What it is to be at least; None where nothing was promised."""
        bounds = TARGETS.get(self.cell)
        return None if bounds is None else bounds[PRECISIONS.index(self.precision)]


def is_comparable(precision: str, peer_precision: str) -> bool:
    """Whether a peer keeps as many bits of a weight as we do, or more."""
    return PRECISIONS.index(peer_precision) >= PRECISIONS.index(precision)


def ratios(speeds: Speeds) -> list[Ratio]:
    """Of every cell and precision that Millrace and a comparable peer have, by cell, in the order of the speeds."""
    found = []
    for (ours, cell), speed in speeds.items():
        peers = {
            entrant: theirs
            for (entrant, at), theirs in speeds.items()
            if at == cell and entrant.name != OURS and is_comparable(ours.precision, entrant.precision)
        }
        if ours.name == OURS and peers:
            best = max(peers, key=lambda entrant: peers[entrant])
            found.append(Ratio(cell=cell, precision=ours.precision, ours=speed, best=peers[best], peer=best))
    order = list(dict.fromkeys(cell for _, cell in speeds))
    return sorted(found, key=lambda ratio: (order.index(ratio.cell), PRECISIONS.index(ratio.precision)))


def claims(found: list[Ratio]) -> dict[str, bool]:
    """Each ratio that has a target, with whether it holds."""
    held = {}
    for ratio in found:
        if ratio.target is not None:
            text = f"{ratio.precision} {ratio.cell}: at least {ratio.target:g} x the best peer, {ratio.peer}"
            held[f"{text} ({ratio.value:.2f})"] = ratio.value >= ratio.target
    return held


def step_bytes(weights_bytes: int, cell: Cell, cached_tokens: int, token_bytes: int) -> int:
    """What a decode step has to read at least: all weights once, and every sequence's cache."""
    return weights_bytes + cell.size * cached_tokens * token_bytes


def parse_cells(kinds: str, prefill_lens: tuple[int, ...], batches: tuple[int, ...]) -> list[Cell]:
    """The cells that are asked for: "all", or names with commas between them: decode, prefill, decode8, prefill1024.

    Raises:
      ValueError: there is no such cell.
    """
    cells = [*(Cell("decode", batch) for batch in batches), *(Cell("prefill", length) for length in prefill_lens)]
    if kinds == "all":
        return cells
    chosen = []
    for name in kinds.split(","):
        named = [cell for cell in cells if name in (cell.kind, f"{cell.kind}{cell.size}")]
        if not named:
            names = ", ".join(f"{cell.kind}{cell.size}" for cell in cells)
            raise ValueError(f"expected decode, prefill or some of {names}; got {name!r}")
        chosen += named
    return list(dict.fromkeys(chosen))


def parse_entrants(names: str, known: list[Entrant]) -> list[Entrant]:
    """The entrants that are asked for: "all", or names with commas between them: millrace, llama.cpp, millrace-int8.

    Raises:
      ValueError: there is no such entrant.
    """
    if names == "all":
        return known
    chosen = []
    for name in names.lower().split(","):
        named = [e for e in known if name in (e.name.lower(), f"{e.name}-{e.precision}".lower(), e.precision)]
        if not named:
            choices = ", ".join(f"{e.name}-{e.precision}".lower() for e in known)
            raise ValueError(f"expected some of {choices}, a peer alone or a precision alone; got {name!r}")
        chosen += named
    return [entrant for entrant in known if entrant in chosen]
