"""A sentencepiece tokenizer.model, as Llama 2 and Gemma ship it, with the prefix space and BOS that they expect."""

import dataclasses
import re

import sentencepiece

from ..errors import CheckpointError
from .tokenizer import Tokenizer, TokenizerSettings

_SPACE = "\u2581"
# A second normalizer_spec {add_dummy_prefix: false}, which the protobuf parser merges into the model's own: the space
# in front is ours to place, because it belongs before the first text only and not after every added token.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer(Tokenizer):
    """Decodes piece by piece, so that increments add up; lstrip and rstrip of added tokens are not read."""

    def __init__(self, proto: bytes, settings: TokenizerSettings, where: str) -> None:
        model, prefix = _load(proto, where)
        added = {text: id for id, (text, _) in settings.added_tokens.items()}
        special = {id for id, (_, is_special) in settings.added_tokens.items() if is_special}
        for id in range(model.get_piece_size()):
            if model.is_control(id) or model.is_unknown(id):
                added.setdefault(model.id_to_piece(id), id)
                special.add(id)
        self._model, self._prefix, self._legacy = model, prefix, settings.legacy
        self._added = added
        self._added_pattern = re.compile("|".join(re.escape(text) for text in sorted(added, key=len, reverse=True)))
        self._bos = [model.bos_id()] if settings.add_bos_token is not False and model.bos_id() >= 0 else []
        self._eos = [model.eos_id()] if settings.add_eos_token and model.eos_id() >= 0 else []
        self._pieces = _piece_bytes(model, settings)
        super().__init__(max(self._pieces) + 1, frozenset(special), _with_ends(settings, model))

    def token_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        id = int(self._model.piece_to_id(token))
        return None if id == self._model.unk_id() else id

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = []
        start = 0
        for match in self._added_pattern.finditer(text) if self._added else ():
            ids += self._encode_plain(text[start : match.start()], is_first=start == 0)
            ids.append(self._added[match.group()])
            start = match.end()
        ids += self._encode_plain(text[start:], is_first=start == 0)
        return [*self._bos, *ids, *self._eos] if add_special_tokens else ids

    def _encode_plain(self, text: str, is_first: bool) -> list[int]:
        if not text:
            return []
        prefix = self._prefix if is_first or self._legacy else ""
        return [int(id) for id in self._model.encode(prefix + text)]

    def _decode(self, ids: list[int]) -> str:
        text = b"".join(self._pieces.get(id, b"") for id in ids).decode(errors="replace")
        return text.removeprefix(self._prefix) if self._prefix else text


def _load(proto: bytes, where: str) -> tuple[sentencepiece.SentencePieceProcessor, str]:
    """The model with its own prefix switched off, and that prefix: a space or nothing."""
    try:
        original = sentencepiece.SentencePieceProcessor(model_proto=proto)
        model = sentencepiece.SentencePieceProcessor(model_proto=proto + _NO_DUMMY_PREFIX)
    except RuntimeError as error:
        raise CheckpointError(f"{where} cannot be read as a sentencepiece model: {error}") from error
    has_prefix = "".join(original.encode("a", out_type=str)).startswith(_SPACE)
    return model, " " if has_prefix else ""


def _piece_bytes(model: sentencepiece.SentencePieceProcessor, settings: TokenizerSettings) -> dict[int, bytes]:
    pieces = {}
    for id in range(model.get_piece_size()):
        piece = model.id_to_piece(id)
        # A byte piece is spelled <0xE4>
        pieces[id] = bytes([int(piece[3:5], 16)]) if model.is_byte(id) else piece.replace(_SPACE, " ").encode()
    pieces |= {id: text.encode() for id, (text, _) in settings.added_tokens.items()}
    if not pieces:
        raise CheckpointError("tokenizer.model holds no pieces")
    return pieces


def _with_ends(settings: TokenizerSettings, model: sentencepiece.SentencePieceProcessor) -> TokenizerSettings:
    """The settings, with the model's own BOS and EOS where no file names them."""
    ends = {"bos_token": model.bos_id(), "eos_token": model.eos_id()}
    named = {name: model.id_to_piece(id) for name, id in ends.items() if id >= 0}
    return dataclasses.replace(settings, special_tokens={**named, **settings.special_tokens})
