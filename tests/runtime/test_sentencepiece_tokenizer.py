"""tokenizer.model as Llama 2 has it: BOS, one space in front of the first text, bytes for unknown characters."""

import io
import json

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import CheckpointError
from millrace.runtime.detokenizer import IncrementalDetokenizer
from millrace.runtime.tokenizer import load_tokenizer

CORPUS = ["the cat sat on the mat", "def add(a, b): return a + b", "a fat rat [INST] hats"] * 5


@pytest.fixture(scope="module")
def model():
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=file,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return file.getvalue()


@pytest.fixture(scope="module")
def load(model, tmp_path_factory):
    def load(**config):
        directory = tmp_path_factory.mktemp("checkpoint")
        (directory / "tokenizer.model").write_bytes(model)
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        return load_tokenizer(directory)

    return load


@pytest.fixture(scope="module")
def tokenizer(load):
    return load(legacy=False, added_tokens_decoder={"320": {"content": "<|end|>", "special": True}})


def test_text_is_encoded_as_sentencepiece_does_with_bos_in_front(tokenizer, model):
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in ("the cat", " the cat", "日本 the", "a\n  b"):
        assert tokenizer.encode(text) == [original.bos_id(), *original.encode(text)]
        assert tokenizer.encode(text, add_special_tokens=False) == original.encode(text)


@given(text=st.text(max_size=20))
def test_any_text_survives_a_round_trip(tokenizer, text):
    text = text.replace("\u2581", " ").replace("\0", "")  # the space sign is a space, and sentencepiece drops NUL
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    detokenizer = IncrementalDetokenizer(tokenizer, ids[:1])
    assert "".join([*(detokenizer.push([id]) for id in ids[1:]), detokenizer.finish()]) == text


def test_special_tokens_in_the_text_are_tokens(tokenizer):
    ids = tokenizer.encode("<s>the cat</s><|end|>", add_special_tokens=False)
    assert (ids[0], ids[-2:]) == (1, [2, 320])
    assert (tokenizer.decode(ids), tokenizer.decode(ids, False)) == ("the cat", "<s>the cat</s><|end|>")
    assert tokenizer.vocab_size == 321


def test_legacy_puts_a_space_after_added_tokens(load):
    text = "<s>the"
    assert load(legacy=True).encode(text, False)[1:] == load(legacy=True).encode("the", False)
    assert load(legacy=False).encode(text, False)[1:] != load(legacy=True).encode("the", False)


def test_config_decides_about_bos_and_eos(load):
    plain = load().encode("the", add_special_tokens=False)
    assert load(add_bos_token=False).encode("the") == plain
    assert load(add_eos_token=True).encode("the") == [1, *plain, 2]


def test_ends_are_named_by_the_model_itself(tokenizer):
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.eos_id == 2


def test_token_text_keeps_its_leading_space(tokenizer):
    the = tokenizer.encode("the", add_special_tokens=False)
    assert "".join(tokenizer.token_text(id) for id in the) == " the"
    assert tokenizer.token_text(2) == "</s>"


def test_malformed_model_is_a_checkpoint_error(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"no protobuf")
    with pytest.raises(CheckpointError, match="sentencepiece"):
        load_tokenizer(tmp_path)
