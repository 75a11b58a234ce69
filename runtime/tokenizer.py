"""Text to token ids and back, from a checkpoint's tokenizer.json or sentencepiece's tokenizer.model."""

import abc
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, InvalidRequestError
from .json_files import parse_object, read_bounded

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastBackend

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """What tokenizer_config.json and its neighbours say, read and checked."""

    special_tokens: Mapping[str, str]  # bos_token, eos_token ... and their text, as chat templates see them
    chat_template: str | None
    add_bos_token: bool | None  # None: as the tokenizer file itself has it
    add_eos_token: bool | None
    legacy: bool  # sentencepiece only: a space is put before every piece of text between added tokens
    added_tokens: Mapping[int, tuple[str, bool]]  # id to text and whether it is special


class Tokenizer(abc.ABC):
    """One vocabulary. Never changes after it is made, so any number of threads may use it."""

    def __init__(self, vocab_size: int, special_ids: frozenset[int], settings: TokenizerSettings) -> None:
        self.vocab_size = vocab_size  # one more than the largest id
        self.special_ids = special_ids
        self.special_tokens = settings.special_tokens
        self.chat_template = settings.chat_template
        self._token_texts: dict[int, str | None] = {}

    @property
    def eos_id(self) -> int | None:
        """The id of eos_token, where the tokenizer's settings name one."""
        text = self.special_tokens.get("eos_token")
        return None if text is None else self.token_id(text)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, in which special tokens that are written out count as tokens, as in Hugging Face's.

        `add_special_tokens` puts BOS in front (or what else the checkpoint asks); a rendered chat brings its own.
        Raises InvalidRequestError for a string that is no Unicode text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(f"the text holds half of a surrogate pair at character {error.start}") from None
        return self._encode(text, add_special_tokens)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; ids without a token have none, and bytes that are no UTF-8 become U+FFFD."""
        return self._decode(self.visible(ids, skip_special_tokens))

    def visible(self, ids: Iterable[int], skip_special_tokens: bool) -> list[int]:
        """The ids that have a token, without the special ones if those are to be skipped."""
        skipped = self.special_ids if skip_special_tokens else ()
        return [id for id in ids if 0 <= id < self.vocab_size and id not in skipped]

    def token_text(self, id: int) -> str | None:
        """The text that a token adds inside a text, its leading space kept; None for an id without a token."""
        if id not in self._token_texts:  # two threads may both compute it: they store the same
            twice, once = self.decode([id, id], False), self.decode([id], False)
            self._token_texts[id] = twice[len(once) :] if 0 <= id < self.vocab_size else None
        return self._token_texts[id]

    @abc.abstractmethod
    def token_id(self, token: str) -> int | None:
        """The id of one token by its name in the vocabulary."""

    @abc.abstractmethod
    def _encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


class FastTokenizer(Tokenizer):
    """A tokenizer.json, run by the `tokenizers` package. Spaces are never cleaned up: that corrupts code."""

    def __init__(self, backend: "FastBackend", settings: TokenizerSettings) -> None:
        _prepare(backend, settings)
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        special_ids = frozenset(id for id, token in added.items() if token.special)
        super().__init__(_num_ids(backend), special_ids, settings)

    def token_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def _decode(self, ids: list[int]) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=False))


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory; None where it has no tokenizer file. Raises CheckpointError."""
    reads = {**dict.fromkeys(TOKENIZER_FILES, Path.read_bytes), **dict.fromkeys(_SETTINGS_FILES, read_bounded)}
    try:
        files = {name: read(directory / name) for name, read in reads.items() if (directory / name).is_file()}
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read ({error}). Check its permissions.") from error
    return tokenizer_of(files, str(directory))


def tokenizer_of(files: Mapping[str, bytes], where: str) -> Tokenizer | None:
    """The tokenizer that these files make, by name; None where they hold none. Raises CheckpointError."""
    settings = read_settings(files, where)
    if (content := files.get("tokenizer.json")) is not None:
        from tokenizers import Tokenizer as FastBackend

        try:
            backend = FastBackend.from_buffer(content)
        except Exception as error:  # the package raises plain Exception for whatever is wrong with the file
            raise CheckpointError(f"{where}/tokenizer.json cannot be read as a tokenizer: {error}") from error
        return FastTokenizer(backend, settings)
    if (content := files.get("tokenizer.model")) is not None:
        from .sentencepiece_tokenizer import SentencePieceTokenizer

        return SentencePieceTokenizer(content, settings, f"{where}/tokenizer.model")
    return None


def read_settings(files: Mapping[str, bytes], where: str) -> TokenizerSettings:
    """Read tokenizer_config.json, special_tokens_map.json and chat_template.jinja, any of which may be missing."""

    def read(name: str) -> dict[str, Any]:
        return parse_object(files[name], f"{where}/{name}") if name in files else {}

    config = read("tokenizer_config.json")
    special = {**_special_tokens(read("special_tokens_map.json")), **_special_tokens(config)}
    jinja = files.get("chat_template.jinja")
    return TokenizerSettings(
        special_tokens=special,
        chat_template=_text(jinja, f"{where}/chat_template.jinja")
        if jinja is not None
        else _chat_template(config.get("chat_template")),
        add_bos_token=_flag(config, "add_bos_token"),
        add_eos_token=_flag(config, "add_eos_token"),
        legacy=_flag(config, "legacy") is not False,
        added_tokens=_added_tokens(config.get("added_tokens_decoder")),
    )


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where} cannot be read as UTF-8 text: {error}") from error


def _token_content(value: object) -> str | None:
    """A token is written as a string, as {"content": ...} or as null."""
    content = value.get("content") if isinstance(value, dict) else value
    if content is not None and not isinstance(content, str):
        raise CheckpointError(f"tokenizer settings: a special token must be a string, got {value!r}")
    return content


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    contents = {name: _token_content(config.get(name)) for name in _SPECIAL_NAMES}
    return {name: content for name, content in contents.items() if content is not None}


def _flag(config: Mapping[str, Any], name: str) -> bool | None:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"tokenizer_config.json: {name} must be true or false, got {value!r}")
    return value


def _chat_template(value: object) -> str | None:
    """One template, or a list of named ones of which "default" is ours."""
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"tokenizer_config.json: chat_template must be a string, got {type(value).__name__}")
    return value


def _added_tokens(value: object) -> dict[int, tuple[str, bool]]:
    added: dict[int, tuple[str, bool]] = {}
    for key, token in (value if isinstance(value, dict) else {}).items():
        content = _token_content(token)
        if not key.isdecimal() or not content:
            raise CheckpointError(f"tokenizer_config.json: added_tokens_decoder[{key!r}] is not a token: {token!r}")
        added[int(key)] = (content, isinstance(token, dict) and token.get("special") is True)
    return added


def _prepare(backend: "FastBackend", settings: TokenizerSettings) -> None:
    """Undo saved truncation and padding, and apply the settings that Hugging Face applies over tokenizer.json."""
    from tokenizers import processors

    backend.no_truncation()
    backend.no_padding()
    backend.add_special_tokens([text for text in settings.special_tokens.values() if backend.token_to_id(text)])
    if settings.add_bos_token is None and settings.add_eos_token is None:
        return
    ends: Sequence[tuple[bool | None, str]] = (
        (settings.add_bos_token, "bos_token"),
        (settings.add_eos_token, "eos_token"),
    )
    before, after = (
        [settings.special_tokens[name]] if add and name in settings.special_tokens else [] for add, name in ends
    )
    ids = [(text, backend.token_to_id(text)) for text in before + after]
    if missing := [text for text, id in ids if id is None]:
        raise CheckpointError(
            f"tokenizer.json has no token {missing[0]!r}, which tokenizer_config.json adds to prompts"
        )
    backend.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=ids)


def _num_ids(backend: "FastBackend") -> int:
    """One more than the largest id: the count, unless ids were left out between."""
    count = int(backend.get_vocab_size(with_added_tokens=True))
    if count and backend.id_to_token(count - 1) is not None and backend.id_to_token(count) is None:
        return count
    return max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
