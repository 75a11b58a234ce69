"""The collectives of a compiled program, read from its HLO text: what travels between devices, and for which part."""

import dataclasses
import math
import re
from collections import Counter

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
# %name = type opcode(operands), attributes; the -done half of an asynchronous pair is not counted.
_INSTRUCTION = re.compile(rf"^\s*(?:ROOT )?%?[\w.-]+ = (?P<result>.*?) (?P<kind>{_KINDS})(?:-start)?\(")
_SHAPE = re.compile(r"[a-z]\w*\[([\d,]*)\]")
_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction. An asynchronous one's shapes hold operands and results."""

    kind: str  # as HLO spells it: all-reduce, all-gather, reduce-scatter, all-to-all ...
    shapes: tuple[tuple[int, ...], ...]  # of its results, on one device
    name: str  # path of scopes that it was traced under

    @property
    def num_elements(self) -> int:
        """Of all results together."""
        return sum(map(math.prod, self.shapes))

    def is_below(self, scope: str) -> bool:
        """Whether it was traced under a jax.named_scope of this name."""
        return scope in re.split(r"[/()]", self.name)


def collectives(hlo: str) -> list[Collective]:
    """Every collective in the text that `Compiled.as_text()` gives, once for each time that it is written there.

    Some that GPUs have bear no name: they get that of what stands before them in the same computation.
    """
    found, name = [], ""
    for line in hlo.splitlines():
        named = _NAME.search(line)
        name = named[1] if named else "" if line.endswith("{") else name
        if match := _INSTRUCTION.match(line):
            shapes = tuple(_dims(dims) for dims in _SHAPE.findall(match["result"]))
            found.append(Collective(match["kind"], shapes, name))
    return found


def kinds_below(scope: str, hlo: str) -> Counter[str]:
    """How many collectives of each kind were traced under a scope; in a loop each counts once."""
    return Counter(one.kind for one in collectives(hlo) if one.is_below(scope))


def _dims(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(","))) if text else ()
