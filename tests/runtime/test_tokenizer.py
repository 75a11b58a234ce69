"""Tokenizer files as people have them, read as Hugging Face reads them."""

import json
import threading

import pytest
from tokenizers import processors

from millrace.errors import CheckpointError, InvalidRequestError
from millrace.runtime.json_files import MAX_JSON_BYTES
from millrace.runtime.tokenizer import load_tokenizer


@pytest.fixture
def directory(tmp_path, new_byte_level_backend):
    """A checkpoint's tokenizer.json, which says to put BOS in front and to cut prompts at 4 tokens."""
    backend = new_byte_level_backend()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def configure(directory, **config):
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(directory)


def test_directory_without_tokenizer_files_has_none(tmp_path):
    assert load_tokenizer(tmp_path) is None


def test_prompt_is_neither_cut_nor_padded(directory):
    tokenizer = load_tokenizer(directory)
    ids = tokenizer.encode("def add(a, b): return a + b")
    assert (ids[0], tokenizer.decode(ids)) == (0, "def add(a, b): return a + b")
    assert len(tokenizer.encode("a")) == 2


@pytest.mark.parametrize(
    ("config", "before", "after"),
    [
        ({}, [0], []),
        ({"add_bos_token": False}, [], []),
        ({"add_bos_token": True, "add_eos_token": True}, [0], [1]),
        ({"add_eos_token": True}, [], [1]),
    ],
)
def test_config_decides_about_bos_and_eos(config, before, after, directory):
    tokenizer = configure(directory, bos_token="<s>", eos_token={"content": "</s>"}, **config)
    plain = tokenizer.encode("cat", add_special_tokens=False)
    assert tokenizer.encode("cat") == [*before, *plain, *after]
    assert tokenizer.eos_id == 1


def test_special_tokens_in_the_text_are_tokens(directory):
    tokenizer = load_tokenizer(directory)
    ids = tokenizer.encode("<s>cat</s>", add_special_tokens=False)
    assert (ids[0], ids[-1]) == (0, 1)
    assert (tokenizer.decode(ids), tokenizer.decode(ids, False)) == ("cat", "<s>cat</s>")


def test_named_special_token_is_skipped_though_the_file_calls_it_plain(directory):
    tokenizer = configure(directory, eos_token="at")
    assert tokenizer.decode(tokenizer.encode("cat")) == "c"


def test_special_tokens_map_yields_to_the_config(directory):
    (directory / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "<s>"}))
    tokenizer = configure(directory, eos_token="</s>", pad_token=None)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_chat_template_comes_from_its_file_first(directory):
    assert configure(directory, chat_template="one").chat_template == "one"
    named = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    assert configure(directory, chat_template=named).chat_template == "three"
    (directory / "chat_template.jinja").write_text("four")
    assert configure(directory, chat_template="one").chat_template == "four"


def test_token_text_keeps_its_leading_space(byte_level, byte_fallback):
    assert byte_fallback.token_text(258) == " the"
    assert byte_fallback.token_text(1 + 0xE4) == "\N{REPLACEMENT CHARACTER}"
    assert byte_level.token_text(1) == "</s>"
    assert [byte_level.token_text(id) for id in (-1, byte_level.vocab_size, 2**40)] == [None] * 3


def test_vocab_size_counts_to_the_largest_id(byte_level, word_level):
    assert (byte_level.vocab_size, word_level.vocab_size) == (300, 3)


def test_half_a_surrogate_pair_is_refused(byte_level):
    with pytest.raises(InvalidRequestError, match="character 3"):
        byte_level.encode("abc\udc00")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "not json"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"eos_token": 5}'),
        ("tokenizer_config.json", '{"add_bos_token": "yes"}'),
        ("tokenizer_config.json", '{"add_bos_token": true, "bos_token": "<unknown>"}'),
        ("tokenizer_config.json", '{"chat_template": 5}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "y"}}'),
        ("special_tokens_map.json", '{"eos_token"'),
    ],
)
def test_malformed_file_is_a_checkpoint_error(name, text, directory):
    (directory / name).write_text(text)
    with pytest.raises(CheckpointError, match="token"):
        load_tokenizer(directory)


def test_settings_are_not_read_where_they_are_too_large(directory):
    with (directory / "tokenizer_config.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(CheckpointError, match=f"tokenizer_config.json: expected at most {MAX_JSON_BYTES} bytes"):
        load_tokenizer(directory)


def test_template_that_is_no_text_is_a_checkpoint_error(directory):
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="UTF-8"):
        load_tokenizer(directory)


def test_threads_may_share_a_tokenizer(byte_level):
    results = []

    def work():
        results.append([byte_level.decode(byte_level.encode(f"the cat {i}")) for i in range(200)])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[f"the cat {i}" for i in range(200)]] * 4
