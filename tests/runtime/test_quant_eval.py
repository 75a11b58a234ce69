"""What quantization costs the embedded model, on a short text; and what cannot be evaluated, named."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millrace import ConfigError, RuntimeConfig
from millrace.models.embedded import corpus
from millrace.runtime.launch import main
from millrace.runtime.model_source import open_model
from millrace.runtime.quant_eval import Candidate, Score, evaluate, make_windows
from millrace.sharding.mesh import make_mesh

pytestmark = pytest.mark.embedded
WINDOW_LEN, NUM_TOKENS = 128, 1024


@pytest.fixture(scope="module")
def text() -> str:
    """The beginning of a file that the embedded model was not trained on."""
    name, text = next((name, text) for name, text in corpus.source_files() if name == "functools.py")
    assert corpus.is_held_out(name)
    return text[:12_000]


@pytest.fixture(scope="module")
def file(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_text(text)
    return path


def scores_of(candidates: list[Candidate], text: str, mesh: dict[str, int]) -> list[Score]:
    config = RuntimeConfig(mesh=tuple(mesh.items()), progress=False)
    source = open_model("embedded", None)
    assert source.tokenizer is not None
    windows = make_windows(source, [text], WINDOW_LEN, NUM_TOKENS)
    return evaluate(source, config, make_mesh(mesh), windows, candidates)


# ---- the numbers


@pytest.fixture(scope="module")
def record(
    file: Path, tmp_path_factory: pytest.TempPathFactory, program_cache: str, quick_compilation: None
) -> dict[str, Any]:
    """What the command writes."""
    out = tmp_path_factory.mktemp("scores") / "scores.json"
    options = [
        f"--text={file}",
        f"--window={WINDOW_LEN}",
        f"--max_tokens={NUM_TOKENS}",
        f"--json={out}",
        "--noprogress",
    ]
    lists = ["--quantization=int8,fp8,int4", "--kv_cache_dtype=int8"]
    quick = ["--kernels=paged_attention=reference", f"--compile_cache_dir={program_cache}"]
    assert main(["eval-quant", *options, *lists, *quick]) == 0
    read: dict[str, Any] = json.loads(out.read_text())
    return read


@pytest.fixture(scope="module")
def found(record: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Scores by weights and dtype of the cache."""
    return {(score["weights"], score["kv_cache_dtype"]): score for score in record["scores"]}


def test_the_plain_model_is_itself(record: dict[str, Any], found: dict[tuple[str, str], dict[str, Any]]) -> None:
    plain = record["scores"][0]
    assert plain == found["plain", "bfloat16"]
    assert (plain["kl"], plain["bits_change"], plain["same_best"]) == (0, 0, 1)
    assert 0.5 < plain["bits_per_byte"] < 1.5 and record["num_tokens"] == NUM_TOKENS


@pytest.mark.parametrize(
    ("weights", "cache", "bound"),
    [("int8", "bfloat16", 0.005), ("fp8", "bfloat16", 0.005), ("int4", "bfloat16", 0.03), ("plain", "int8", 0.005)],
)
def test_quality_stays_within_its_target(
    found: dict[tuple[str, str], dict[str, Any]], weights: str, cache: str, bound: float
) -> None:
    assert 0 < abs(found[weights, cache]["bits_change"]) < bound


def test_fewer_bits_predict_further_from_the_plain_model(found: dict[tuple[str, str], dict[str, Any]]) -> None:
    int8, fp8, int4 = (found[weights, "bfloat16"] for weights in ("int8", "fp8", "int4"))
    assert 0 < int8["kl"] < fp8["kl"] < int4["kl"] < 0.1
    assert int4["same_best"] < int8["same_best"] < 1
    assert int4["weight_bytes"] < int8["weight_bytes"] == fp8["weight_bytes"] < found["plain", "int8"]["weight_bytes"]


@pytest.mark.kernels
@pytest.mark.parametrize("mesh", [{"data": 3}, {"tensor": 2}], ids=str)
def test_a_mesh_scores_as_one_device_does(text: str, mesh: dict[str, int]) -> None:
    candidates = [Candidate(format="int4"), Candidate(kv_cache_dtype="int8")]
    one, many = scores_of(candidates, text, {}), scores_of(candidates, text, mesh)
    for alone, shared in zip(one, many, strict=True):
        assert shared.bits_per_byte == pytest.approx(alone.bits_per_byte, rel=2e-3)
        assert shared.kl == pytest.approx(alone.kl, rel=0.1)


@pytest.mark.kernels
def test_a_converted_store_scores_as_its_format_does(text: str, tmp_path: Path) -> None:
    assert main(["convert", "embedded", str(tmp_path / "int4"), "--quantization=int4", "--noprogress"]) == 0
    _, made, converted = scores_of([Candidate(format="int4"), Candidate(path=str(tmp_path / "int4"))], text, {})
    assert converted.kl == pytest.approx(made.kl, rel=1e-3) and converted.weight_bytes == made.weight_bytes


# ---- the text


def test_every_token_of_a_text_is_scored_once(text: str) -> None:
    source = open_model("embedded", None)
    tokenizer = source.tokenizer
    assert tokenizer is not None
    windows = make_windows(source, [text, text[:100]], 100)
    ids = [token for part in (text, text[:100]) for token in tokenizer.encode(part)[1:]]
    targets = windows.targets.reshape(-1)
    assert targets[targets >= 0].tolist() == ids and windows.num_scored == len(ids)
    assert windows.num_bytes == len(text.encode()) + len(text[:100].encode())
    inputs, num_first = windows.tokens.reshape(-1), len(tokenizer.encode(text)) - 1
    np.testing.assert_array_equal(inputs[1:num_first], targets[: num_first - 1])


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quantization=int5"], "quantization should be one of int8, .*; got 'int5'"),
        (["--quantization=int4:x"], "expected a format or format:group, as in int4:32; got 'int4:x'"),
        (["--quantization=int8:64"], "group_size of int8 should be left out"),
        (["--kv_cache_dtype=int8,int3"], "kv_cache_dtype must be one of float32, .*, int8 .*got 'int3'"),
        (["--window=4096"], "--window=4096 is beyond the model's 1024 tokens"),
        (["--window=1"], "--window must be at least 2"),
        (["--max_tokens=100"], "--max_tokens=100 is less than one window"),
        (["--json=nowhere/x.json"], "--json=nowhere/x.json: expected a file in a folder that is there"),
        (["--quantized=nowhere", "--quantization="], "'nowhere' is not a directory"),
        (["--text=nowhere.txt"], "--text=nowhere.txt cannot be read .*Give a file of text"),
        (["--weights=stream"], "leave --weights out"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_one_line(
    file: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [] if options[0].startswith("--text") else [f"--text={file}"]
    assert main(["eval-quant", *given, *options]) == 1
    shown = capsys.readouterr().err
    assert re.search(message, shown) and shown.count("\n") == 1


def test_a_text_shorter_than_a_window_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("x = 1\n")
    assert main(["eval-quant", f"--text={tmp_path / 'short.txt'}"]) == 1
    assert "expected at least one window of 512 tokens, got" in capsys.readouterr().err


def test_a_text_of_special_tokens_alone_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "special.txt").write_text("<|endoftext|>" * 600)
    assert main(["eval-quant", f"--text={tmp_path / 'special.txt'}"]) == 1
    assert "the text has nothing to score" in capsys.readouterr().err


def test_a_tokenizer_of_another_model_is_refused(text: str) -> None:
    source = open_model("embedded", None)
    small = dataclasses.replace(source, config=dataclasses.replace(source.config, vocab_size=100))
    with pytest.raises(ConfigError, match="but the model has 100 tokens"):
        make_windows(small, [text], WINDOW_LEN)


def test_the_beginning_of_a_long_text_is_enough(text: str) -> None:
    source = open_model("embedded", None)
    whole, beginning = make_windows(source, [20 * text], 100, 200), make_windows(source, [text], 100, 200)
    np.testing.assert_array_equal(whole.tokens, beginning.tokens)
    assert whole.num_bytes == beginning.num_bytes


def test_a_quantized_model_is_no_reference(text: str) -> None:
    source = open_model("embedded", None, "int8")
    assert source.tokenizer is not None
    windows = make_windows(source, [text], WINDOW_LEN)
    with pytest.raises(ConfigError, match="embedded is quantized: expected the plain model"):
        evaluate(source, RuntimeConfig(progress=False), make_mesh(), windows, [])
