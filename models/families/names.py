"""The names that Hugging Face gives to tensors, family by family: tables of parameter path -> spellings."""

import dataclasses
from collections.abc import Iterable, Mapping

from .source import Source

# A parameter's spellings, the first one whose tensors are all there being taken. Paths are those of the parameter
# tree, without stages/{s}/{p} for the parameters of a layer.
type Names = Mapping[str, tuple[Source, ...]]

LAYER = "model.layers.{layer}."


def layer_tensor(name: str) -> tuple[Source, ...]:
    """A tensor of a layer that is taken as it is."""
    return (Source(names=(LAYER + name,)),)


def _projections(block: str, module: str, names: Mapping[str, str]) -> dict[str, tuple[Source, ...]]:
    return {
        f"{block}/{path}/{leaf}": layer_tensor(f"{module}.{name}.{leaf}")
        for path, name in names.items()
        for leaf in ("weight", "bias")
    }


TOP: Names = {
    "embed/weight": (Source(names=("model.embed_tokens.weight",)),),
    "final_norm/scale": (Source(names=("model.norm.weight",)),),
    "head/weight": (Source(names=("lm_head.weight",)),),
}
ATTENTION: Names = {
    **_projections("attention", "self_attn", {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}),
    "attention/q_norm/scale": layer_tensor("self_attn.q_norm.weight"),
    "attention/k_norm/scale": layer_tensor("self_attn.k_norm.weight"),
}
MLP: Names = _projections("mlp", "mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"})
PRE_NORMS: Names = {
    "attention_norm/scale": layer_tensor("input_layernorm.weight"),
    "mlp_norm/scale": layer_tensor("post_attention_layernorm.weight"),
}
POST_NORMS: Names = {
    "attention_post_norm/scale": layer_tensor("post_attention_layernorm.weight"),
    "mlp_post_norm/scale": layer_tensor("post_feedforward_layernorm.weight"),
}
SANDWICH_NORMS: Names = {
    **POST_NORMS,
    "attention_norm/scale": layer_tensor("input_layernorm.weight"),
    "mlp_norm/scale": layer_tensor("pre_feedforward_layernorm.weight"),
}
DENSE: Names = {**TOP, **ATTENTION, **MLP, **PRE_NORMS}


def expert_names(module: str, *, gate: str, up: str, down: str, mlp_dim: int) -> Names:
    """Gated experts: three tensors for each, or, as transformers 5 holds them in memory, all in two stacked ones."""
    experts = f"{LAYER}{module}.experts."

    def spellings(name: str, stacked: Source) -> tuple[Source, ...]:
        return Source(names=(f"{experts}{{expert}}.{name}.weight",)), stacked

    both = (experts + "gate_up_proj",)
    return {
        "moe/router/weight": layer_tensor(f"{module}.gate.weight"),
        "moe/gate/weight": spellings(gate, Source(names=both, axis=1, rows=slice(None, mlp_dim))),
        "moe/up/weight": spellings(up, Source(names=both, axis=1, rows=slice(mlp_dim, None))),
        "moe/down/weight": spellings(down, Source(names=(experts + "down_proj",))),
    }


def with_prefixes(table: Names, renames: Iterable[Mapping[str, str]]) -> Names:
    """The same tensors under other roots: each of `renames` maps the start of a name to another start."""

    def renamed(source: Source, starts: Mapping[str, str]) -> Source:
        names = tuple(
            next((new + name.removeprefix(old) for old, new in starts.items() if name.startswith(old)), name)
            for name in source.names
        )
        return dataclasses.replace(source, names=names)

    starts = [{}, *renames]
    return {path: tuple(renamed(s, start) for start in starts for s in sources) for path, sources in table.items()}
