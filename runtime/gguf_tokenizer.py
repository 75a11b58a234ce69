"""A GGUF's tokenizer as the files that a Hugging Face checkpoint would have, for the code that reads those.

"gpt2" (byte-level BPE) becomes a tokenizer.json for the `tokenizers` package, "llama" (sentencepiece's BPE) a
tokenizer.model for sentencepiece. Texts are split before BPE by `tokenizer.ggml.pre`, as llama.cpp's
llama-vocab.cpp does, with the patterns of the models' own tokenizer.json files.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from ..errors import CheckpointError, UnsupportedModelError

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # token types, in GGUF as in sentencepiece
_TYPES = range(1, 7)
_PREFIX = "tokenizer.ggml."
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_WITH_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_LLAMA3 = rf"{_CONTRACTIONS}|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_GPT4O = (
    rf"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
    rf"|{_REST_WITH_SLASH}"
)
_TEKKEN = rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_REST_WITH_SLASH}"
_GPT2 = None  # what `tokenizers` does by itself
_DIGITS = r"\p{N}"  # each alone, then as GPT-2

# By tokenizer.ggml.pre: how a text is split.
_PATTERNS: Mapping[str, str | None] = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "smaug-bpe", "dbrx", "falcon3"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
    "tekken": _TEKKEN,
    **dict.fromkeys(("smollm", "refact", "starcoder", "command-r", "codeshell"), _DIGITS),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "roberta-bpe", "jina-v2-code"), _GPT2),
}
_WHOLE_WORDS_FIRST = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken", "gpt-4o")
_BOS_BY_DEFAULT = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken")
_NFC = ("qwen2", "deepseek-r1-qwen")

# Tokens that end a turn, whatever eos_token_id says: chats of base models and their derivatives name but one of them.
_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
         "<|return|>", "<|call|>", "<EOT>")  # fmt: skip
_CHANNEL_ENDS = ("<|return|>", "<|call|>")  # where there are such, <|end|> ends a message and not the turn


def tokenizer_files(metadata: Mapping[str, Any], where: str) -> dict[str, bytes]:
    """tokenizer_config.json and tokenizer.json or tokenizer.model; nothing if the file has no tokenizer.

    Raises:
      UnsupportedModelError: its kind, or its way to split texts, is not implemented.
      CheckpointError: its lists do not fit together.
    """
    kind = metadata.get(f"{_PREFIX}model", "none")
    if kind in ("none", "no_vocab"):
        return {}
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModelError(f"{where}: 'tokenizer.ggml.model' should be gpt2 or llama, but it is {kind!r:.80}")
    tokens, types = _tokens(metadata, where)
    config = _config(metadata, tokens, kind, where)
    files = {"tokenizer_config.json": json.dumps(config).encode()}
    if kind == "gpt2":
        return {**files, "tokenizer.json": json.dumps(_byte_level(metadata, tokens, types, where)).encode()}
    return {**files, "tokenizer.model": _sentencepiece(metadata, tokens, types, where)}


def generation_config(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The tokens that end a sequence, and how the file's author samples.

    Raises:
      CheckpointError: its lists of tokens do not fit together.
    """
    tokens, types = _tokens(metadata, where) if f"{_PREFIX}tokens" in metadata else ([], [])
    ends = [metadata.get(f"{_PREFIX}{name}_token_id") for name in ("eos", "eot", "eom")]
    found = [id for id in ends if type(id) is int and id >= 0]
    special = {token: id for id, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == _CONTROL}
    names = [name for name in _ENDS if name in special]
    if all(name in special for name in _CHANNEL_ENDS):
        names = [name for name in names if name != "<|end|>"]
    found += [special[name] for name in names]
    sampling = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    options = {name: metadata.get(f"general.sampling.{key}") for key, name in sampling.items()}
    config = {name: value for name, value in options.items() if value is not None}
    return {**config, "eos_token_id": list(dict.fromkeys(found))} if found else config


def _tokens(metadata: Mapping[str, Any], where: str) -> tuple[list[str], list[int]]:
    tokens, types = metadata.get(f"{_PREFIX}tokens"), metadata.get(f"{_PREFIX}token_type")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(f"{where}: expected tokenizer.ggml.tokens, a list of strings. Fetch the file again.")
    types = [1] * len(tokens) if types is None else types
    if not isinstance(types, list) or len(types) != len(tokens) or not all(each in _TYPES for each in types):
        raise CheckpointError(
            f"{where}: expected tokenizer.ggml.token_type, {len(tokens)} numbers from 1 to 6, one a token."
        )
    return tokens, types


def _config(metadata: Mapping[str, Any], tokens: Sequence[str], kind: str, where: str) -> dict[str, Any]:
    """The settings beside the vocabulary."""
    config: dict[str, Any] = {}
    for name, key in _ROLES.items():
        id = metadata.get(f"{_PREFIX}{key}_token_id")
        if id is not None:
            if type(id) is not int or not 0 <= id < len(tokens):
                raise CheckpointError(
                    f"{where}: tokenizer.ggml.{key}_token_id should be below {len(tokens)}; got {id!r}."
                )
            config[name] = tokens[id]
    by_default = kind == "llama" or metadata.get(f"{_PREFIX}pre") in _BOS_BY_DEFAULT
    for name, default in (("add_bos_token", by_default), ("add_eos_token", False)):
        config[name] = bool(metadata.get(f"{_PREFIX}{name}", default))
    template = metadata.get("tokenizer.chat_template")
    return config if template is None else {**config, "chat_template": template}


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int], where: str) -> dict[str, Any]:
    """A tokenizer.json."""
    pre = str(metadata.get(f"{_PREFIX}pre"))
    if pre not in _PATTERNS:
        raise UnsupportedModelError(
            f"{where}: 'tokenizer.ggml.pre', which says how texts are split, should be one of {', '.join(_PATTERNS)}, "
            f"but it is {pre!r:.80}"
        )
    merges = metadata.get(f"{_PREFIX}merges")
    if not isinstance(merges, list) or not all(isinstance(each, str) and " " in each for each in merges):
        raise CheckpointError(
            f"{where}: expected tokenizer.ggml.merges, a list of pairs of tokens. Fetch the file again."
        )
    added = [
        {"id": id, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": kind == _CONTROL}
        for id, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]  # fmt: skip
    vocab: dict[str, int] = {}
    for id, token in enumerate(tokens):
        vocab.setdefault(token, id)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre in _NFC else None,
        "pre_tokenizer": _splitter(_PATTERNS[pre], byte_level),
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "unk_token": None, "byte_fallback": False, "ignore_merges": pre in _WHOLE_WORDS_FIRST,
            "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip


def _splitter(pattern: str | None, byte_level: Mapping[str, Any]) -> dict[str, Any]:
    if pattern is None:
        return {**byte_level, "use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**byte_level, "use_regex": pattern == _DIGITS}]}


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: list[int], where: str) -> bytes:
    """A tokenizer.model: the same pieces, scores and types."""
    from sentencepiece import sentencepiece_model_pb2

    scores = metadata.get(f"{_PREFIX}scores")
    if not isinstance(scores, list) or len(scores) != len(tokens) or not all(type(each) is float for each in scores):
        raise CheckpointError(f"{where}: expected tokenizer.ggml.scores, {len(tokens)} numbers, one a token.")
    model = cast(Any, sentencepiece_model_pb2).ModelProto()
    unknown = metadata.get(f"{_PREFIX}unknown_token_id", types.index(_UNKNOWN) if _UNKNOWN in types else 0)
    for id, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=True)):
        model.pieces.add(piece=token, score=score, type=_UNKNOWN if id == unknown else kind)
    model.trainer_spec.model_type = 2  # BPE
    model.trainer_spec.byte_fallback = _BYTE in types
    for name, key in _ROLES.items():
        role = name.removesuffix("_token")
        id = metadata.get(f"{_PREFIX}{key}_token_id", unknown if role == "unk" else -1)
        setattr(model.trainer_spec, f"{role}_id", id)
        setattr(model.trainer_spec, f"{role}_piece", tokens[id] if id >= 0 else "")
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = bool(metadata.get(f"{_PREFIX}add_space_prefix", True))
    model.normalizer_spec.remove_extra_whitespaces = bool(metadata.get(f"{_PREFIX}remove_extra_whitespaces", False))
    return bytes(model.SerializeToString())
