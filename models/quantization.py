"""Which of a model's weights are quantized, and how: formats into a ModelConfig, checked against its shapes.

Embeddings, norms and routers stay as they are. A head is quantized only where it has a table of its own, and never to
4 bits: it decides between tokens that are close.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

from ..errors import ConfigError
from ..pallas_kernels.quantized_matmul import FORMATS, WeightFormat
from .config import Formats, LayerSpec, MlpSpec, ModelConfig

HEAD = "head"
# That may be chosen.
GROUP_SIZES: Mapping[str, tuple[int, ...]] = dict.fromkeys(("int4", "int4_a8", "fp8_block"), (32, 64, 128))
_HEAD_FORMATS = {
    "fp8_block": "fp8", "mxfp8": "fp8", "mxfp4": "fp8", "nvfp4": "fp8", "int4": "int8", "int4_a8": "int8",
}  # fmt: skip

# The format of a projection, None for a plain one: the layer's number (None for the head), and attention/q, mlp/gate,
# moe/down ... or head.
type Rule = Callable[[int | None, str], WeightFormat | None]


def named_format(name: str, group: int | None = None) -> WeightFormat:
    """One of FORMATS, in groups of another size where the format allows it.

    Raises:
      ConfigError: there is no such format, or it has no groups of that size.
    """
    if name not in FORMATS:
        raise ConfigError(f"quantization should be one of {', '.join(FORMATS)}; got {name!r}.")
    format = FORMATS[name]
    if group is None or group == format.group:
        return format
    if group not in GROUP_SIZES.get(name, ()):
        sizes = ", ".join(map(str, GROUP_SIZES.get(name, () if format.group is None else (format.group,))))
        raise ConfigError(
            f"group_size of {name} should be {f'one of {sizes}' if sizes else 'left out: it has none'}; got {group}."
        )
    return dataclasses.replace(format, group=group, block_rows=group if format.block_rows > 1 else 1)


def uniformly(format: WeightFormat) -> Rule:
    """Every projection in one format, and the head in 8 bits."""
    head = FORMATS[_HEAD_FORMATS.get(format.name, format.name)]
    return lambda layer, projection: head if projection == HEAD else format


def with_formats(model: ModelConfig, rule: Rule) -> ModelConfig:
    """The model with the formats that the rule gives its projections.

    Raises:
      ConfigError: a projection's shape does not fit its format; names it, the width, the group and what would fit.
    """

    def formats(number: int, block: str, names: tuple[str, ...]) -> Formats:
        found = ((name, rule(number, f"{block}/{name}")) for name in names)
        return tuple((name, format) for name, format in found if format is not None)

    layers = []
    for number, layer in enumerate(model.layers):
        attention = dataclasses.replace(layer.attention, formats=formats(number, "attention", ("q", "k", "v", "o")))
        block = mlp_block(layer)
        mlp = dataclasses.replace(layer.mlp, formats=formats(number, block, ("gate", "up", "down")))
        layers.append(dataclasses.replace(layer, attention=attention, mlp=mlp))
    head = None if model.tie_embeddings else rule(None, HEAD)
    quantized = dataclasses.replace(model, layers=tuple(layers), head_format=head)
    for path, format, shape in quantized_projections(quantized):
        if reason := format.misfit(*shape):
            raise ConfigError(
                f"{path} [out, in] = {list(shape)} cannot be quantized as {format.name}: {reason}."
                f"{_advice(format, shape)}"
            )
    return quantized


def without_formats(model: ModelConfig) -> ModelConfig:
    """The same model with plain weights."""
    return with_formats(model, lambda layer, projection: None)


def is_quantized(model: ModelConfig) -> bool:
    """Whether any weight has a format."""
    return next(quantized_projections(model), None) is not None


def format_paths(model: ModelConfig) -> dict[str, WeightFormat]:
    """The format of each quantized projection, by its path in the parameter tree."""
    found = {} if model.head_format is None else {HEAD: model.head_format}
    for s, stage in enumerate(model.stages):
        for p, layer in enumerate(stage.period):
            found |= {f"stages/{s}/{p}/{path}": format for path, format in layer_formats(layer)}
    return found


def is_scale(path: str) -> bool:
    """Whether a parameter is a scale of a quantized weight."""
    return path.rpartition("/")[2] in ("scales", "global_scale")


def is_beside_values(path: str) -> bool:
    """Whether a parameter belongs to a quantized weight, but is not its values."""
    return is_scale(path) or path.rpartition("/")[2] in ("zeros", "offsets")


def quantized_projections(model: ModelConfig) -> Iterator[tuple[str, WeightFormat, tuple[int, int]]]:
    """Path, format and shape [out, in] (of one expert) of the quantized projections of each kind of layer."""
    for layer in dict.fromkeys(model.layers):
        shapes = projection_shapes(layer, model.embed_dim)
        yield from ((path, format, shapes[path]) for path, format in layer_formats(layer))
    if model.head_format is not None:
        yield HEAD, model.head_format, (model.vocab_size, model.embed_dim)


def projection_shapes(layer: LayerSpec, embed_dim: int) -> dict[str, tuple[int, int]]:
    """[out, in] of a layer's projections by path, of one expert where there are experts."""
    attention, block, inner = layer.attention, mlp_block(layer), layer.mlp.mlp_dim
    heads, kv = (count * attention.head_dim for count in (attention.num_heads, attention.num_kv_heads))
    return {
        "attention/q": (heads, embed_dim),
        "attention/k": (kv, embed_dim),
        "attention/v": (kv, embed_dim),
        "attention/o": (embed_dim, heads),
        f"{block}/gate": (inner, embed_dim),
        f"{block}/up": (inner, embed_dim),
        f"{block}/down": (embed_dim, inner),
    }


def layer_formats(layer: LayerSpec) -> Iterator[tuple[str, WeightFormat]]:
    """Path and format of a layer's quantized projections: attention/q, mlp/gate, moe/down ..."""
    for block, formats in (("attention", layer.attention.formats), (mlp_block(layer), layer.mlp.formats)):
        yield from ((f"{block}/{name}", format) for name, format in formats)


def mlp_block(layer: LayerSpec) -> str:
    """What the parameters of a layer's MLP lie below."""
    return "mlp" if isinstance(layer.mlp, MlpSpec) else "moe"


def _advice(format: WeightFormat, shape: tuple[int, int]) -> str:
    fit = [
        size
        for size in GROUP_SIZES.get(format.name, ())
        if not shape[1] % size and not (format.block_rows > 1 and shape[0] % size)
    ]
    if fit:
        return f" A group_size of {' or '.join(map(str, fit))} fits."
    return " No group size of it fits: choose int8 or fp8, which have none."
