"""What the embedded model learns from: the standard library of the running Python interpreter (PSF licence)."""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
# Not code that one would want completed: tables of characters, generated help, deliberately broken files.
EXCLUDED = ("site-packages", "encodings", "pydoc_data", "lib2to3", "config-3")
# A line break takes its indentation with it, a word its space: one token for each, at most.
SPLIT = r"\n+[ ]*|[ ]?[A-Za-z_]+|[ ]?[0-9]{1,3}|[ ]?[^\sA-Za-z_0-9]+|\s+"
HELD_OUT_PERCENT = 3
LIBRARY_WEIGHT = 2  # the library itself is seen twice as often as its tests


def source_files() -> Iterator[tuple[str, str]]:
    """Relative name and text of every file, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not any(part.startswith(EXCLUDED) for part in name.parts):
            yield name.as_posix(), path.read_text(encoding="utf-8", errors="replace")


def is_held_out(name: str) -> bool:
    """Whether a file is kept from training, by the digest of its name: stable across machines and versions."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def split() -> tuple[list[str], list[str]]:
    """The texts to train on, and those held out: files of the library, none of its tests."""
    train: list[str] = []
    held_out: list[str] = []
    for name, text in source_files():
        is_library = "test" not in name
        if not is_held_out(name):
            train += [text] * (LIBRARY_WEIGHT if is_library else 1)
        elif is_library:
            held_out.append(text)
    return train, held_out


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE; id 0 ends a text and also starts one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Each text as token ids, preceded by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    return [np.array([end, *e.ids], np.int32) for e in tokenizer.encode_batch(texts)]
