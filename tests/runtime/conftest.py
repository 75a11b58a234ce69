"""Small tokenizers, trained on the spot."""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from millrace.runtime.tokenizer import FastTokenizer, Tokenizer, TokenizerSettings

CORPUS = ["def add(a, b):\n    return a + b\n", "the cat sat on the mat, the hat", "größer 日本語 😀"] * 4


def byte_level_backend() -> Backend:
    """A byte-level BPE of 300 tokens and two special ones, as Llama 3 and Qwen have it."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def settings(**changes: object) -> TokenizerSettings:
    """The settings of a checkpoint that has no more than a tokenizer.json."""
    plain = {"special_tokens": {}, "chat_template": None, "add_bos_token": None, "add_eos_token": None}
    return TokenizerSettings(**{**plain, "legacy": False, "added_tokens": {}, **changes})


@pytest.fixture(scope="session")
def new_byte_level_backend() -> Callable[[], Backend]:
    return byte_level_backend


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return FastTokenizer(byte_level_backend(), settings(special_tokens={"bos_token": "<s>", "eos_token": "</s>"}))


@pytest.fixture(scope="session")
def byte_fallback() -> Tokenizer:
    """Llama 2's kind: words with a space sign in front, single bytes for the rest, one leading space stripped."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\u2581the", "\u2581cat", "s", "a", "é"]
    backend = Backend(
        models.BPE({word: id for id, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return FastTokenizer(backend, settings())


@pytest.fixture(scope="session")
def word_level() -> Tokenizer:
    """No decoder at all: tokens are joined by spaces."""
    return FastTokenizer(Backend(models.WordLevel({"the": 0, "cat": 1, "sat": 2}, unk_token="the")), settings())
