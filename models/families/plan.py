"""The plan of a checkpoint: for every parameter, which tensors it is built from and how."""

import contextlib
import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from ...errors import CheckpointError
from ...pallas_kernels.quantized_matmul.contract import WeightFormat
from ..config import LayerSpec, MlpSpec, ModelConfig, Stage
from ..quantization import HEAD, layer_formats, mlp_block, projection_shapes
from .names import Names
from .published.scheme import Projection, Scheme, parts
from .source import Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a parameter: what lies at `index` of its leading axes, from the tensors `names`."""

    index: tuple[int, ...]  # () for the top level, (repeat,) for layers, (repeat, expert) for experts
    names: tuple[str, ...]
    source: Source

    def build(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """The part's array from the tensors by name; a view where possible, in the checkpoint's dtype."""
        with self._named():
            return self.source.build([tensors[name] for name in self.names])

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The part's shape from the tensors' shapes; raises CheckpointError where they cannot be laid out."""
        with self._named():
            return self.source.shape([shapes[name] for name in self.names])

    def check_dtypes(self, dtypes: Mapping[str, np.dtype]) -> None:
        """Raises CheckpointError for a tensor in a dtype that its packing does not have."""
        wanted = self.source.packing.dtypes if self.source.packing is not None else ()
        for name, allowed in zip(self.names, wanted, strict=False):
            if dtypes[name].name not in allowed:
                raise CheckpointError(f"{name}: expected {' or '.join(allowed)}; got {dtypes[name]}.")

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """What is wrong with the tensors is said with their names."""
        try:
            yield
        except CheckpointError as error:
            raise CheckpointError(f"{' and '.join(self.names)}: {error}.") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafPlan:
    """A parameter as its pieces, which fill it exactly."""

    pieces: tuple[Piece, ...]

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The whole parameter's shape; raises CheckpointError that names a tensor unlike its siblings."""
        first = self.pieces[0]
        part = first.shape(shapes)
        for piece in self.pieces[1:]:
            if piece.shape(shapes) != part:
                raise CheckpointError(
                    f"{' and '.join(piece.names)} should be laid out as {part}, like {' and '.join(first.names)}, but "
                    f"it is {piece.shape(shapes)}"
                )
        return (*(1 + last for last in self.pieces[-1].index), *part)


def tensor_plan(
    model: ModelConfig,
    names: Names,
    available: Collection[str],
    ignored: Sequence[str],
    scheme: Scheme | None = None,
    *,
    as_plain: bool = False,
) -> dict[str, LeafPlan]:
    """Parameter path -> plan, in the order of the parameter tree.

    `scheme` says where quantized weights lie; `as_plain` takes them for plain ones at the same paths.

    Raises CheckpointError if a parameter's tensors are missing, or if tensors are left over that match none of the
    patterns in `ignored`: a checkpoint of which a part was dropped silently would answer wrongly.
    """
    available = frozenset(available)
    stages = _plain_stages(model) if as_plain else model.stages
    head_format = None if as_plain else model.head_format
    plan = {
        **dict(_top_plans(model, head_format, names, available, scheme)),
        **dict(_layer_plans(model, stages, names, available, scheme)),
    }
    used = {name for leaf in plan.values() for piece in leaf.pieces for name in piece.names}
    left = sorted(name for name in available - used if not any(re.match(pattern, name) for pattern in ignored))
    if left:
        listed = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        raise CheckpointError(
            f"the checkpoint has tensors that a {model.family} model with this config.json does not read: {listed}"
        )
    return plan


def _top_plans(
    model: ModelConfig, head_format: WeightFormat | None, names: Names, available: frozenset[str], scheme: Scheme | None
) -> Iterator[tuple[str, LeafPlan]]:
    head = [] if model.tie_embeddings else _weight_leaves(HEAD, head_format)
    quantized = {} if head_format is None else {HEAD: Projection(head_format, model.vocab_size, bias=False)}
    for path in ["embed/weight", "final_norm/scale", *head]:
        source = _spelling(path, _spellings(path, names, quantized, scheme), available, layers=(0,), num_experts=1)
        yield path, LeafPlan(pieces=(Piece(index=(), names=source.resolve(), source=source),))


def _layer_plans(
    model: ModelConfig, stages: Sequence[Stage], names: Names, available: frozenset[str], scheme: Scheme | None
) -> Iterator[tuple[str, LeafPlan]]:
    for s, stage in enumerate(stages):
        for p, spec in enumerate(stage.period):
            num_experts = 1 if isinstance(spec.mlp, MlpSpec) else spec.mlp.num_experts
            quantized = _projections(spec, model.embed_dim)
            for path in layer_leaves(spec):
                layers = stage.layer_indices(p)
                spellings = _spellings(path, names, quantized, scheme)
                source = _spelling(path, spellings, available, layers=layers, num_experts=num_experts)
                pieces = tuple(_pieces(source, layers, num_experts))
                yield f"stages/{s}/{p}/{path}", LeafPlan(pieces=pieces)


def _plain_stages(model: ModelConfig) -> list[Stage]:
    """The model's stages, which its formats may have parted, with plain weights."""

    def plain(spec: LayerSpec) -> LayerSpec:
        attention = dataclasses.replace(spec.attention, formats=())
        return dataclasses.replace(spec, attention=attention, mlp=dataclasses.replace(spec.mlp, formats=()))

    return [dataclasses.replace(stage, period=tuple(map(plain, stage.period))) for stage in model.stages]


def layer_leaves(spec: LayerSpec) -> list[str]:
    """The paths of one layer's parameters."""
    attention, formats = spec.attention, dict(layer_formats(spec))
    leaves = [leaf for name in "qkvo" for leaf in _weight_leaves(f"attention/{name}", formats.get(f"attention/{name}"))]
    leaves += [f"attention/{name}/bias" for name in "qkv" if attention.qkv_bias]
    leaves += ["attention/o/bias"] if attention.out_bias else []
    leaves += [] if attention.qk_norm == "none" else ["attention/q_norm/scale", "attention/k_norm/scale"]
    leaves += ["attention/sinks"] if attention.sinks else []
    leaves += [] if spec.norms == "post" else ["attention_norm/scale", "mlp_norm/scale"]
    leaves += [] if spec.norms == "pre" else ["attention_post_norm/scale", "mlp_post_norm/scale"]
    block, names = mlp_block(spec), [] if isinstance(spec.mlp, MlpSpec) else ["router"]
    for path in (f"{block}/{name}" for name in [*names, "gate", "up", "down"]):
        leaves += _weight_leaves(path, formats.get(path)) + ([f"{path}/bias"] if spec.mlp.bias else [])
    return leaves


def _weight_leaves(path: str, format: WeightFormat | None) -> list[str]:
    """A plain weight, or the parts of a quantized one."""
    return [f"{path}/{leaf}" for leaf in (("weight",) if format is None else parts(format))]


def _projections(spec: LayerSpec, embed_dim: int) -> dict[str, Projection]:
    """The quantized projections of a layer by their path."""
    attention, shapes = spec.attention, projection_shapes(spec, embed_dim)
    biases = {f"attention/{name}": attention.qkv_bias for name in "qkv"} | {"attention/o": attention.out_bias}
    return {
        path: Projection(format, shapes[path][0], bias=biases.get(path, spec.mlp.bias))
        for path, format in layer_formats(spec)
    }


def _spellings(
    path: str, names: Names, quantized: Mapping[str, Projection], scheme: Scheme | None
) -> tuple[Source, ...]:
    """The ways in which a checkpoint may spell a parameter."""
    projection, _, leaf = path.rpartition("/")
    if projection not in quantized or leaf == "bias":
        return names[path]
    if scheme is None:
        raise CheckpointError(f"expected a quantization_config that says which tensors make {path}; it names none")
    return scheme.sources(leaf, quantized[projection], names[f"{projection}/weight"])


def _spelling(
    path: str, spellings: Sequence[Source], available: frozenset[str], *, layers: Sequence[int], num_experts: int
) -> Source:
    """The first spelling whose tensors are all in the checkpoint."""
    missing: list[str] = []
    for source in spellings:
        wanted = [name for piece in _pieces(source, layers, num_experts) for name in piece.names]
        absent = next((name for name in wanted if name not in available), None)
        if absent is None:
            return source
        missing.append(absent)
    raise CheckpointError(f"the checkpoint has no tensor {' and no '.join(missing)}, from which {path} is made")


def _pieces(source: Source, layers: Sequence[int], num_experts: int) -> Iterator[Piece]:
    for repeat, layer in enumerate(layers):
        if source.per_expert:
            for expert in range(num_experts):
                yield Piece(index=(repeat, expert), names=source.resolve(layer, expert), source=source)
        else:
            yield Piece(index=(repeat,), names=source.resolve(layer), source=source)
