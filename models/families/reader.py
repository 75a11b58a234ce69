"""Reading a config.json strictly: every key is read, at its default, or named in an error."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import CheckpointError, UnsupportedModelError

# Keys that change nothing of what a decoder computes at inference, whatever their value: names and provenance,
# training, outputs of other front ends, and special tokens, for which others read the tokenizer's files.
HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures attention_dropout
    attn_implementation bos_token_id cache_implementation embd_pdrop eos_token_id finetuning_task id2label
    initializer_range label2id model_type name_or_path output_attentions output_hidden_states output_router_logits
    output_scores pad_token_id pretraining_tp resid_pdrop return_dict return_dict_in_generate router_aux_loss_coef
    router_jitter_noise task_specific_params tf_legacy_loss tokenizer_class transformers_version unsloth_fixed
    unsloth_version use_cache
    """.split()
)

# What older versions of transformers wrote into every config.json; any other value asks for something else.
WRITTEN_DEFAULTS: Mapping[str, Any] = {
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "tie_encoder_decoder": False,
    "top_k": 50,
    "top_p": 1.0,
    "torchscript": False,
    "typical_p": 1.0,
    "use_bfloat16": False,
}

MAX_INTEGER = 2**31 - 1


class ConfigReader:
    """A JSON object with its defaults; remembers which keys were read, and `finish` names those that were not."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], *, where: str = "config.json") -> None:
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{where} should be a JSON object, but it is {_show(values)}")
        self.where = where
        self._values = dict(values)
        self._defaults = dict(defaults)
        self._read: set[str] = set()
        self._sections: list[ConfigReader] = []

    def get(self, key: str, default: Any = None) -> Any:
        """The key's value; if the file lacks it, the family's default, else `default`."""
        self._read.add(key)
        return self._values.get(key, self._defaults.get(key, default))

    def require(self, key: str) -> Any:
        """The key's value, which is neither missing nor null."""
        value = self.get(key)
        if value is None:
            raise UnsupportedModelError(f"{self.where} lacks {key!r}, which this model family needs")
        return value

    def integer(self, key: str, *, minimum: int = 1) -> int:
        """A whole number from `minimum` to 2**31 - 1."""
        value = self.require(key)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= MAX_INTEGER:
            raise self.wrong(key, f"a whole number from {minimum} to {MAX_INTEGER}")
        return value

    def optional_integer(self, key: str, *, minimum: int = 1) -> int | None:
        """A whole number, or None for null."""
        return None if self.get(key) is None else self.integer(key, minimum=minimum)

    def number(self, key: str, *, above: float = 0.0) -> float:
        """A finite number greater than `above`."""
        value = self.require(key)
        if not _is_number(value) or not value > above:
            raise self.wrong(key, f"a finite number above {above:g}")
        return float(value)

    def optional_number(self, key: str, *, above: float = 0.0) -> float | None:
        """A finite number, or None for null."""
        return None if self.get(key) is None else self.number(key, above=above)

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """A list of `length` finite numbers above 0."""
        value = self.require(key)
        if not isinstance(value, list) or len(value) != length or not all(_is_number(x) and x > 0 for x in value):
            raise self.wrong(key, f"a list of {length} finite numbers above 0")
        return tuple(float(x) for x in value)

    def flag(self, key: str) -> bool:
        """true or false."""
        value = self.require(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def choice[T](self, key: str, table: Mapping[str, T]) -> T:
        """What `table` holds for the key's value."""
        value = self.require(key)
        if not isinstance(value, str) or value not in table:
            raise self.wrong(key, f"one of {', '.join(table)}")
        return table[value]

    def expect(self, key: str, *allowed: Any) -> None:
        """The key is missing, null, or has one of these values: all that is implemented."""
        value = self.get(key)
        if value is not None and not any(_same(value, each) for each in allowed):
            raise self.wrong(key, " or ".join(_show(each) for each in (*allowed, None)))

    def ignore(self, *keys: str) -> None:
        """These keys change nothing of what this family computes here."""
        self._read.update(keys)

    def section(self, key: str, defaults: Mapping[str, Any]) -> "ConfigReader":
        """A reader of the nested object, which is finished with this one."""
        child = ConfigReader(self.require(key), defaults, where=f"{self.where}, {key!r}")
        self._sections.append(child)
        return child

    def wrong(self, key: str, expected: str) -> UnsupportedModelError:
        """The error for a value that is out of its range, or not implemented."""
        return UnsupportedModelError(f"{self.where}: {key!r} should be {expected}, but it is {_show(self.get(key))}")

    def finish(self) -> None:
        """Raises UnsupportedModelError that names every key which asks for something that was not read."""
        unread = {key: value for key, value in self._values.items() if key not in self._read and value is not None}
        known = {**WRITTEN_DEFAULTS, **self._defaults}
        asks = [k for k, v in unread.items() if k not in HARMLESS and not (k in known and _same(v, known[k]))]
        if asks:
            listed = "; ".join(f"{key!r} is {_show(self._values[key])}" for key in asks)
            raise UnsupportedModelError(
                f"{self.where} has keys that Millrace does not implement for this model family: {listed}. A key is "
                "accepted where it is absent, null or at its default."
            )
        for child in self._sections:
            child.finish()


def agreed[T](values: Iterable[tuple[str, T | None]], where: str) -> T | None:
    """The one value that several spellings of a key give, None if none of them does."""
    given = [(key, value) for key, value in values if value is not None]
    if given and any(value != given[0][1] for _, value in given):
        listed = " and ".join(f"{key!r} is {_show(value)}" for key, value in given)
        raise UnsupportedModelError(f"{where} contradicts itself: {listed}; leave one of them")
    return given[0][1] if given else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _same(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def _show(value: Any) -> str:
    text = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else repr(value)
    assert text is not None
    return text if len(text) <= 80 else text[:77] + "..."
