"""Tokenizers of GGUF files: the vocabulary, its special tokens, BOS, and the chat template."""

from pathlib import Path
from typing import Any

import gguf
import gguf_files
import pytest

from millrace.errors import CheckpointError, UnsupportedModelError
from millrace.runtime.gguf_file import open_gguf_file
from millrace.runtime.gguf_tokenizer import generation_config, tokenizer_files
from millrace.runtime.tokenizer import Tokenizer, tokenizer_of


def metadata(tmp_path: Path, kind: str, **changes: Any) -> dict[str, Any]:
    """That of a file with no tensors; a change to None takes a key away."""
    writer = gguf.GGUFWriter(tmp_path / f"{kind}.gguf", "llama")
    gguf_files.add_tokenizer(writer, 320, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    keys = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    found = {**open_gguf_file(tmp_path / f"{kind}.gguf").metadata, **keys}
    return {key: value for key, value in found.items() if value is not None}


def load(tmp_path: Path, kind: str, **changes: Any) -> Tokenizer:
    tokenizer = tokenizer_of(tokenizer_files(metadata(tmp_path, kind, **changes), "file"), "file")
    assert tokenizer is not None
    return tokenizer


def test_bytes_are_merged_and_special_tokens_found(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, "gpt2")
    begin, end = tokenizer.token_id("<|start|>"), tokenizer.token_id("<|im_end|>")
    assert tokenizer.encode("the<|im_end|>") == [begin, tokenizer.token_id("the"), end]
    assert tokenizer.eos_id == end and {begin, end} <= tokenizer.special_ids
    text = "naïve 日本\n  then 12"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert load(tmp_path, "gpt2", add_bos_token=False).encode("the") == [tokenizer.token_id("the")]
    assert tokenizer.chat_template is not None and "messages" in tokenizer.chat_template


@pytest.mark.parametrize(
    "pre, text, pieces",
    [
        ("llama-bpe", "12345", ["123", "45"]),
        ("qwen2", "12345", ["1", "2", "3", "4", "5"]),
        ("gpt-2", "it's", ["it", "'s"]),
        ("gpt-4o", "helloWorld", ["hello", "World"]),
        ("tekken", "HelloWorld12", ["Hello", "World", "1", "2"]),
        ("smollm", "a12", ["a", "1", "2"]),
        ("llama-bpe", "a  b\n\nc", ["a", "Ġ", "Ġb", "ĊĊ", "c"]),
    ],
)
def test_texts_are_split_as_the_model_wants_it(tmp_path: Path, pre: str, text: str, pieces: list[str]) -> None:
    tokenizer: Any = load(tmp_path, "gpt2", pre=pre)
    assert [piece for piece, _ in tokenizer._backend.pre_tokenizer.pre_tokenize_str(text)] == pieces


def test_sentencepiece_gets_a_space_in_front_unless_the_file_says_no(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, "llama")
    space, bos = tokenizer.token_id("\u2581"), tokenizer.token_id("<s>")
    assert tokenizer.encode("the") == [bos, space, tokenizer.token_id("the")]
    assert tokenizer.decode(tokenizer.encode("then 日本")) == "then 日本"
    bare = load(tmp_path, "llama", add_space_prefix=False)
    assert bare.encode("the<end_of_turn>") == [bos, tokenizer.token_id("the"), tokenizer.token_id("<end_of_turn>")]


def test_turns_end_with_every_token_that_ends_one(tmp_path: Path) -> None:
    found = metadata(tmp_path, "llama", eot_token_id=7)
    end_of_turn = found["tokenizer.ggml.tokens"].index("<end_of_turn>")
    assert generation_config(found, "file")["eos_token_id"] == [2, 7, end_of_turn]
    harmony = {
        "tokenizer.ggml.tokens": ["a", "<|end|>", "<|return|>", "<|call|>"],
        "tokenizer.ggml.token_type": [1, 3, 3, 3],
    }
    sampled = generation_config({**harmony, "general.sampling.temp": 0.5}, "file")
    assert sampled == {"temperature": 0.5, "eos_token_id": [2, 3]}


def test_a_file_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert tokenizer_files({}, "file") == {} == tokenizer_files({"tokenizer.ggml.model": "none"}, "file")
    assert generation_config({}, "file") == {}


def test_tokens_that_are_no_list_end_no_sequence() -> None:
    with pytest.raises(CheckpointError, match="file: expected tokenizer.ggml.tokens, a list of strings"):
        generation_config({"tokenizer.ggml.model": "none", "tokenizer.ggml.tokens": 5}, "file")


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("gpt2", {"model": "bert"}, "'tokenizer.ggml.model' should be gpt2 or llama, but it is 'bert'"),
        ("gpt2", {"pre": "default"}, "'tokenizer.ggml.pre', .* should be one of llama3, .* but it is 'default'"),
    ],
)
def test_a_kind_that_is_not_implemented_is_named(tmp_path: Path, kind: str, changes: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        load(tmp_path, kind, **changes)


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("gpt2", {"tokens": None}, "expected tokenizer.ggml.tokens, a list of strings"),
        ("gpt2", {"tokens": [1, 2]}, "expected tokenizer.ggml.tokens, a list of strings"),
        ("gpt2", {"token_type": [1]}, "expected tokenizer.ggml.token_type, 320 numbers from 1 to 6"),
        ("gpt2", {"merges": None}, "expected tokenizer.ggml.merges"),
        ("gpt2", {"merges": ["th"]}, "expected tokenizer.ggml.merges"),
        ("gpt2", {"merges": ["th q"]}, "cannot be read as a tokenizer"),
        ("gpt2", {"eos_token_id": 320}, "eos_token_id should be below 320; got 320"),
        ("llama", {"scores": [0.0]}, "expected tokenizer.ggml.scores, 320 numbers"),
        ("llama", {"scores": ["a"] * 320}, "expected tokenizer.ggml.scores, 320 numbers"),
        ("llama", {"unknown_token_id": -5}, "unknown_token_id should be below 320; got -5"),
        ("llama", {"token_type": [99] * 320}, "320 numbers from 1 to 6"),
    ],
)
def test_lists_that_do_not_fit_together_are_refused(tmp_path: Path, kind: str, changes: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, kind, **changes)
