"""The plan of a checkpoint: for every parameter, which tensors it is built from and how."""

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from ...errors import CheckpointError
from ..config import LayerSpec, MlpSpec, ModelConfig
from .names import Names
from .source import Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a parameter: what lies at `index` of its leading axes, from the tensors `names`."""

    index: tuple[int, ...]  # () for the top level, (repeat,) for layers, (repeat, expert) for experts
    names: tuple[str, ...]
    source: Source

    def build(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """The part's array from the tensors by name; a view where possible, in the checkpoint's dtype."""
        return self.source.build([tensors[name] for name in self.names])

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The part's shape from the tensors' shapes; raises CheckpointError where they cannot be laid out."""
        return self.source.shape([shapes[name] for name in self.names])


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
    model: ModelConfig, names: Names, available: Collection[str], ignored: Sequence[str]
) -> dict[str, LeafPlan]:
    """Parameter path -> plan, in the order of the parameter tree.

    Raises CheckpointError if a parameter's tensors are missing, or if tensors are left over that match none of the
    patterns in `ignored`: a checkpoint of which a part was dropped silently would answer wrongly.
    """
    available = frozenset(available)
    plan = dict(_leaf_plans(model, names, available))
    used = {name for leaf in plan.values() for piece in leaf.pieces for name in piece.names}
    left = sorted(name for name in available - used if not any(re.match(pattern, name) for pattern in ignored))
    if left:
        listed = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        raise CheckpointError(
            f"the checkpoint has tensors that a {model.family} model with this config.json does not read: {listed}"
        )
    return plan


def _leaf_plans(model: ModelConfig, names: Names, available: frozenset[str]) -> Iterator[tuple[str, LeafPlan]]:
    top = ["embed/weight", "final_norm/scale", *([] if model.tie_embeddings else ["head/weight"])]
    for path in top:
        source = _spelling(path, names, available, layers=(0,), num_experts=1)
        yield path, LeafPlan(pieces=(Piece(index=(), names=source.resolve(), source=source),))
    for s, stage in enumerate(model.stages):
        for p, spec in enumerate(stage.period):
            num_experts = 1 if isinstance(spec.mlp, MlpSpec) else spec.mlp.num_experts
            for path in layer_leaves(spec):
                layers = stage.layer_indices(p)
                source = _spelling(path, names, available, layers=layers, num_experts=num_experts)
                pieces = tuple(_pieces(source, layers, num_experts))
                yield f"stages/{s}/{p}/{path}", LeafPlan(pieces=pieces)


def layer_leaves(spec: LayerSpec) -> list[str]:
    """The paths of one layer's parameters."""
    attention = spec.attention
    leaves = [f"attention/{name}/weight" for name in "qkvo"]
    leaves += [f"attention/{name}/bias" for name in "qkv" if attention.qkv_bias]
    leaves += ["attention/o/bias"] if attention.out_bias else []
    leaves += [] if attention.qk_norm == "none" else ["attention/q_norm/scale", "attention/k_norm/scale"]
    leaves += ["attention/sinks"] if attention.sinks else []
    leaves += [] if spec.norms == "post" else ["attention_norm/scale", "mlp_norm/scale"]
    leaves += [] if spec.norms == "pre" else ["attention_post_norm/scale", "mlp_post_norm/scale"]
    block, names = ("mlp", []) if isinstance(spec.mlp, MlpSpec) else ("moe", ["router"])
    for name in [*names, "gate", "up", "down"]:
        leaves += [f"{block}/{name}/weight"] + ([f"{block}/{name}/bias"] if spec.mlp.bias else [])
    return leaves


def _spelling(path: str, names: Names, available: frozenset[str], *, layers: Sequence[int], num_experts: int) -> Source:
    """The first spelling whose tensors are all in the checkpoint."""
    missing: list[str] = []
    for source in names[path]:
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
