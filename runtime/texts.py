"""Texts that a model is calibrated with or measured on."""

import codecs
from pathlib import Path

import numpy as np
from jaxtyping import Int

from ..errors import ConfigError
from .tokenizer import Tokenizer


def read_text(file: Path, name: str, max_bytes: int | None = None) -> str:
    """A file's text, up to `max_bytes` of it, of which the last character may be a part.

    Raises:
      ConfigError: it cannot be read, or is no text; `name` says which.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(-1 if max_bytes is None else max_bytes)
        text = codecs.getincrementaldecoder("utf-8")().decode(content, final=len(content) != max_bytes)
    except OSError as error:
        raise ConfigError(f"{name} cannot be read ({error}). Give a file of text.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: expected a file of UTF-8 text ({error}).") from None
    if "\0" in text:
        raise ConfigError(f"{name}: expected a file of UTF-8 text; it holds bytes of zero. Is it of another kind?")
    return text


def token_ids(tokenizer: Tokenizer, text: str, vocab_size: int) -> Int[np.ndarray, " T"]:
    """The tokens of a text.

    Raises:
      ConfigError: one is beyond the model's vocabulary.
    """
    ids = np.asarray(tokenizer.encode(text), np.int32)
    if ids.max(initial=0) >= vocab_size:
        raise ConfigError(
            f"the tokenizer makes token {ids.max()} of the text, but the model has {vocab_size} tokens: the tokenizer "
            "is of another model. Fetch both again."
        )
    return ids
