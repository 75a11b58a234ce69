"""Rotary embeddings in a config.json: `rope_parameters`, or `rope_theta` beside `rope_scaling`."""

from collections.abc import Mapping
from typing import Any

from ...errors import UnsupportedModelError
from ..config import RopeKind, RopeSpec
from .reader import ConfigReader, agreed

KINDS: Mapping[str, RopeKind] = {
    "default": "default",
    "linear": "linear",
    "dynamic": "dynamic",
    "yarn": "yarn",
    "llama3": "llama3",
    "longrope": "longrope",
}
# Phi-3 wrote "su" first, and what it calls "yarn" has longrope's two tables.
PHI3_KINDS: Mapping[str, RopeKind] = {
    "default": "default",
    "longrope": "longrope",
    "su": "longrope",
    "yarn": "longrope",
}

SECTION_DEFAULTS: Mapping[str, Any] = {"truncate": True}


def read_rope(
    reader: ConfigReader, head_dim: int, *, theta: float, kinds: Mapping[str, RopeKind] = KINDS, partial: bool = False
) -> RopeSpec:
    """The model's one rope; `theta` is the family's default, `partial` lets a part of each head go unrotated."""
    section = rope_section(reader)
    key = "partial_rotary_factor"
    fraction = agreed([(key, each.optional_number(key)) for each in (section, reader)], reader.where) or 1.0
    if fraction > 1 or not (partial or fraction == 1):
        raise UnsupportedModelError(f"{reader.where}: {key!r} should be {'at most ' * partial}1, but it is {fraction}")
    return rope_from_section(reader, section, int(head_dim * fraction), theta=theta, kinds=kinds)


def rope_section(reader: ConfigReader) -> ConfigReader:
    """The rope's own object, empty if the config has none; of two spellings one has to be null, or both equal."""
    spellings = [(key, reader.get(key)) for key in ("rope_parameters", "rope_scaling")]
    given = [key for key, value in spellings if value is not None and value != {}]
    agreed([(key, reader.get(key)) for key in given], reader.where)
    return reader.section(given[0], SECTION_DEFAULTS) if given else ConfigReader({}, SECTION_DEFAULTS)


def rope_from_section(
    reader: ConfigReader, section: ConfigReader, rotary_dim: int, *, theta: float,
    kinds: Mapping[str, RopeKind] = KINDS, theta_key: str = "rope_theta",
) -> RopeSpec:  # fmt: skip
    """The rope that `section` describes, its base being there or in the reader's `theta_key`."""
    if rotary_dim < 2 or rotary_dim % 2:
        raise UnsupportedModelError(
            f"{reader.where}: the part of each head that is rotated ('head_dim' times 'partial_rotary_factor') should "
            f"be even, but it is {rotary_dim}"
        )
    kind = _kind(section, kinds)
    bases = [("rope_theta", section.optional_number("rope_theta", above=1)),
             (theta_key, reader.optional_number(theta_key, above=1))]  # fmt: skip
    base = agreed(bases, reader.where)
    fields = _fields(kind, reader, section, rotary_dim)
    return RopeSpec(theta=theta if base is None else base, rotary_dim=rotary_dim, kind=kind, **fields)


def _kind(section: ConfigReader, kinds: Mapping[str, RopeKind]) -> RopeKind:
    names = [key for key in ("rope_type", "type") if section.get(key) is not None]
    given: list[tuple[str, RopeKind | None]] = [(name, section.choice(name, kinds)) for name in names]
    return agreed(given, section.where) or "default"


def _fields(kind: RopeKind, reader: ConfigReader, section: ConfigReader, rotary_dim: int) -> dict[str, Any]:
    """The keys that this kind reads, as RopeSpec's fields; what is unset takes transformers' default."""
    if kind == "default":
        return {}
    max_len = reader.integer("max_position_embeddings")
    if kind == "linear":
        return {"factor": _factor(section)}
    if kind == "dynamic":
        return {"factor": _factor(section), "original_max_len": max_len}
    original = _original_max_len(reader, section, max_len)
    if kind == "llama3":
        low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
        if not high > low:
            raise section.wrong("high_freq_factor", f"above low_freq_factor, {low:g}")
        fields: dict[str, Any] = {"factor": _factor(section), "low_freq_factor": low, "high_freq_factor": high}
        return {**fields, "original_max_len": original}
    fields = {
        "factor": max_len / original if section.get("factor") is None else _factor(section),
        "original_max_len": original,
        "attention_factor": section.optional_number("attention_factor"),
    }
    if kind == "longrope":
        tables = {key: section.numbers(key, rotary_dim // 2) for key in ("short_factor", "long_factor")}
        return {**fields, **tables}
    return {
        **fields,
        "beta_fast": section.optional_number("beta_fast") or 32.0,
        "beta_slow": section.optional_number("beta_slow") or 1.0,
        "mscale": section.optional_number("mscale"),
        "mscale_all_dim": section.optional_number("mscale_all_dim"),
        "truncate": section.flag("truncate"),
    }


def _factor(section: ConfigReader) -> float:
    factor = section.number("factor")
    if factor < 1:
        raise section.wrong("factor", "at least 1")
    return factor


def _original_max_len(reader: ConfigReader, section: ConfigReader, max_len: int) -> int:
    """Phi-3 keeps it beside the rope's object, the others inside."""
    key = "original_max_position_embeddings"
    lengths = [(key, each.optional_integer(key, minimum=2)) for each in (section, reader)]
    return agreed(lengths, reader.where) or max_len
