"""What a quantization_config means for a model: the format of each projection, and which tensors hold its parts."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ....errors import UnsupportedModelError
from ....pallas_kernels.quantized_matmul.contract import WeightFormat
from ...config import ModelConfig, MoeSpec
from ...quantization import Rule
from ..names import Names
from ..source import Source


@dataclasses.dataclass(frozen=True)
class Projection:
    """One quantized linear layer [out, in] of a model, or that of each expert."""

    format: WeightFormat
    out_dim: int
    bias: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """One quantization_config.

    `format_of` takes the names that a linear layer may have in a checkpoint, and gives None where it is not quantized.
    `spellings` takes a plain spelling of its weight, whose name ends in `suffix`, and gives those of its "weight",
    "scales", "zeros", "global_scale" and "offsets".
    """

    method: str
    format_of: Callable[[Sequence[str]], WeightFormat | None]
    spellings: Callable[[Projection, Source], Mapping[str, tuple[Source, ...]]]
    suffix: str = ".weight"
    ignored_tensors: tuple[str, ...] = ()  # regular expressions, matched from the start
    remark: str | None = None  # what is computed otherwise than the checkpoint asks for

    def rule(self, model: ModelConfig, names: Names) -> Rule:
        """The format of each projection.

        The rule raises UnsupportedModelError where the experts of a layer differ in their formats, or the family has
        no spelling that this method could have packed.
        """

        def rule(layer: int | None, projection: str) -> WeightFormat | None:
            sources = self._plain(names[f"{projection}/weight"])
            mlp = None if layer is None else model.layers[layer].mlp
            by_expert = isinstance(mlp, MoeSpec) and any(source.per_expert for source in sources)
            experts = range(mlp.num_experts if by_expert and isinstance(mlp, MoeSpec) else 1)
            found = {self.format_of(list(_modules(sources, layer or 0, expert))) for expert in experts}
            module = next(_modules(names[f"{projection}/weight"], layer or 0, 0))
            if len(found) > 1:
                raise UnsupportedModelError(f"expected every expert of a layer in one format; those of {module} differ")
            format = found.pop()
            if format is not None and not sources:
                raise UnsupportedModelError(f"{module} is not read as {self.method}, for it is no linear layer there")
            return format

        return rule

    def sources(self, leaf: str, projection: Projection, plain: Iterable[Source]) -> tuple[Source, ...]:
        """The spellings of one parameter of a quantized projection, for the plain ones of its weight."""
        found = (self.spellings(projection, source).get(leaf, ()) for source in self._plain(plain))
        return tuple(source for sources in found for source in sources)

    def _plain(self, sources: Iterable[Source]) -> list[Source]:
        return [source for source in sources if source.names[0].endswith(self.suffix)]


def parts(format: WeightFormat) -> tuple[str, ...]:
    """The parameters of a weight in this format."""
    optional = {"zeros": format.zeros, "global_scale": format.global_scale, "offsets": format.offsets}
    return ("weight", "scales", *(name for name, has in optional.items() if has))


def beside(plain: Source, *suffixes: str, **fields: Any) -> Source:
    """A spelling from tensors of the same module, with its rows."""
    module = plain.names[0].removesuffix(".weight")
    names = tuple(module + suffix for suffix in suffixes)
    return Source(**{"names": names, "rows": plain.rows, "axis": plain.axis, **fields})


def block_rows(plain: Source, height: int) -> slice:
    """The rows of a spelling, counted in blocks; raises UnsupportedModelError where it cuts one."""
    edges = (plain.rows.start, plain.rows.stop)
    for edge in edges:
        if edge is not None and edge % height:
            raise UnsupportedModelError(
                f"{plain.names[0]}: its parts should begin at multiples of {height} rows, the height of a block of "
                f"scales, but one begins at row {edge}"
            )
    return slice(*(None if edge is None else edge // height for edge in edges))


@dataclasses.dataclass(frozen=True)
class Modules:
    """A list of modules, each by its name, a part of it between dots, or with * in it.

    So "mlp.gate" is a router and no mlp.gate_proj, and "model.layers.1" is not layer 10.
    """

    entries: frozenset[str]

    def __contains__(self, module: str) -> bool:
        names = module.split(".")
        runs = (".".join(names[i:j]) for i in range(len(names)) for j in range(i + 1, len(names) + 1))
        return any(run in self.entries for run in runs) or any(pattern.search(module) for pattern in self._patterns)

    @functools.cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        wild = (entry for entry in self.entries if "*" in entry)
        return [re.compile(r"(^|\.)" + re.escape(entry).replace(r"\*", "[^.]*") + r"(\.|$)") for entry in wild]


def _modules(sources: Iterable[Source], layer: int, expert: int) -> Iterator[str]:
    for source in sources:
        yield source.names[0].removesuffix(".weight").format(layer=layer, expert=expert)
