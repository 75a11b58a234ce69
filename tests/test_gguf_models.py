"""GGUF files as models: right beside Hugging Face's form of the same weights, and beside what their blocks stand for.

The committed files are llama.cpp's own (tests/fixtures/make_gguf.py); `make parity-gguf` compares with llama.cpp.
"""

import dataclasses
from pathlib import Path

import gguf_files
import jax.numpy as jnp
import make_gguf
import numpy as np
import pytest

from millrace import Runtime, RuntimeConfig, SamplingParams
from millrace.errors import ConfigError
from millrace.models.config import ModelConfig
from millrace.models.decoder import AbstractDecoder
from millrace.models.families import config_from_hf
from millrace.models.quantization import format_paths
from millrace.models.rope import frequencies
from millrace.runtime.checkpoint import Checkpoint
from millrace.runtime.convert import convert
from millrace.runtime.export import export
from millrace.runtime.gguf_checkpoint import open_gguf
from millrace.runtime.launch import main
from millrace.runtime.model_source import open_model, open_weights
from millrace.runtime.param_tree import flatten
from millrace.runtime.quant_eval import all_logprobs
from millrace.runtime.store import Store
from millrace.runtime.weights import load_params, source_leaves
from millrace.sharding.mesh import make_mesh
from millrace.sharding.rules import Placement

pytestmark = pytest.mark.usefixtures("quick_compilation")

FOLDER = Path(make_gguf.__file__).parent / "gguf"
TOKENS = np.random.default_rng(5).integers(3, 260, 40)
FORMAT_NAMES = {"f16": set[str](), "bf16": set[str](), "mixed": {"q4_k", "q5_0", "q6_k"}}  # the others': their own name


def logprobs(path: Path | str) -> np.ndarray:
    source = open_model(str(path), None)
    return all_logprobs(source, RuntimeConfig(model=str(path), dtype="float32"), make_mesh(), TOKENS)


def arrays(path: Path) -> dict[str, np.ndarray]:
    """Every part of every parameter."""
    source = open_weights(str(path), None)
    model = config_from_hf(dict(source.config))
    specs, _ = flatten(AbstractDecoder(model, jnp.dtype("float32")).specs)
    found = {}
    for leaf in source_leaves(source, model, specs, whole=False):
        for part in leaf.parts:
            region = tuple(slice(0, size) for size in leaf.spec.shape[len(part.index) :])
            found[f"{leaf.path} {part.index[:1]}"] = part.read([region])[0]
    return found


def ropes(path: Path) -> list[tuple[list[float], float]]:
    """Frequencies of each layer, whatever they are called."""
    found = []
    for layer in open_model(str(path), None).config.layers:
        assert layer.attention.rope is not None
        values, factor = frequencies(layer.attention.rope, 64)
        found.append((np.round(values, 5).tolist(), round(factor, 5)))
    return found


@pytest.mark.parametrize("name", gguf_files.MODELS)
def test_every_architecture_has_the_parameters_of_its_hugging_face_form(name: str, tmp_path: Path) -> None:
    config = gguf_files.model_config(name)
    tensors = gguf_files.random_tensors(config)
    plain = gguf_files.write_hf(tmp_path / "hf", config, tensors)
    path = gguf_files.write_gguf(tmp_path / "model.gguf", name, config, tensors)
    expected, found = (open_model(str(each), None).config for each in (plain, path))
    assert without_ropes(found) == without_ropes(expected)
    assert ropes(path) == ropes(plain)
    if name not in ("mixtral", "qwen3_moe"):  # whose experts are apart there
        wanted = arrays(plain)
        for key, array in arrays(path).items():
            np.testing.assert_allclose(array, wanted[key], atol=1e-6, rtol=0, err_msg=key)


def without_ropes(model: ModelConfig) -> ModelConfig:
    attentions = [dataclasses.replace(layer.attention, rope=None) for layer in model.layers]
    layers = zip(model.layers, attentions, strict=True)
    return dataclasses.replace(model, layers=tuple(dataclasses.replace(layer, attention=a) for layer, a in layers))


# Programs take long to compile: those whose experts the parameters do not tell apart, by default.
RUN = [
    pytest.param(name, marks=[] if name in ("mixtral", "qwen3_moe") else pytest.mark.kernels)
    for name in gguf_files.MODELS
]


@pytest.mark.parametrize("name", RUN)
def test_every_architecture_answers_as_its_hugging_face_form(name: str, tmp_path: Path) -> None:
    config = gguf_files.model_config(name)
    tensors = gguf_files.random_tensors(config)
    plain = logprobs(gguf_files.write_hf(tmp_path / "hf", config, tensors))
    found = logprobs(gguf_files.write_gguf(tmp_path / "model.gguf", name, config, tensors))
    np.testing.assert_allclose(found, plain, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", make_gguf.FILES)
def test_every_type_answers_as_the_weights_that_it_stands_for(name: str, tmp_path: Path) -> None:
    config = gguf_files.model_config("llama", **make_gguf.FILES[name][2])
    wide = gguf_files.write_dequantized(tmp_path / "wide.gguf", config, FOLDER / f"{name}.gguf")
    assert not format_paths(open_model(str(wide), None).config)
    np.testing.assert_allclose(logprobs(FOLDER / f"{name}.gguf"), logprobs(wide), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", make_gguf.FILES)
def test_projections_stay_in_their_type(name: str) -> None:
    found = {format.name for format in format_paths(open_model(str(FOLDER / f"{name}.gguf"), None).config).values()}
    assert found == FORMAT_NAMES.get(name, {name})


def test_layers_of_a_mixed_file_differ() -> None:
    config = open_model(str(FOLDER / "mixed.gguf"), None).config
    assert {dict(layer.mlp.formats)["down"].name for layer in config.layers} == {"q4_k", "q6_k"}
    assert len(config.stages) > 1


def test_experts_in_mxfp4_stay_so(tmp_path: Path) -> None:
    config = gguf_files.model_config("gpt_oss")
    tensors = gguf_files.random_tensors(config)

    def choose(name: str, array: np.ndarray) -> object:
        return gguf_files.everywhere("MXFP4" if "exps.weight" in name else "F32")(name, array)

    path = gguf_files.write_gguf(tmp_path / "model.gguf", "gpt_oss", config, tensors, choose)  # type: ignore[arg-type]
    model = open_model(str(path), None).config
    assert {format.name for format in format_paths(model).values()} == {"mxfp4"}
    plain = logprobs(gguf_files.write_gguf(tmp_path / "plain.gguf", "gpt_oss", config, tensors))
    assert 1e-4 < np.abs(logprobs(path) - plain).mean() < 0.5


def params(source: Checkpoint | Store) -> dict[str, np.ndarray]:
    """The parameters as they are served, by path."""
    model = config_from_hf(dict(source.config))
    specs = AbstractDecoder(model, jnp.dtype("float32")).specs
    loaded = load_params(source, model, specs, Placement(make_mesh()), show_progress=False)
    return {path: np.asarray(array) for path, array in flatten(loaded)[0].items()}


def test_a_store_of_one_holds_the_same_and_exports_what_it_stands_for(tmp_path: Path) -> None:
    path, config = FOLDER / "mixed.gguf", gguf_files.model_config("llama", **make_gguf.FILES["mixed"][2])
    source = open_gguf(path)
    store = convert(source, tmp_path / "store", dtype=np.dtype("float32"), show_progress=False)
    assert store.config["quantization_config"] == source.config["quantization_config"]
    stored = params(store)
    for name, array in params(source).items():
        np.testing.assert_array_equal(stored[name], array, err_msg=name)
    tokenizer, kept = source.load_tokenizer(), store.load_tokenizer()
    assert tokenizer is not None and kept is not None
    assert kept.encode("then in the") == tokenizer.encode("then in the")
    assert kept.chat_template == tokenizer.chat_template
    exported = export(store, tmp_path / "exported", show_progress=False)
    wide = arrays(gguf_files.write_dequantized(tmp_path / "wide.gguf", config, path))
    for name, array in arrays(exported).items():
        np.testing.assert_allclose(array, wide[name], atol=1e-6, rtol=0, err_msg=name)


def test_a_runtime_generates_and_chats_from_the_store_cache(program_cache: str, store_cache: str) -> None:
    sizes = {"max_context_len": 64, "num_slots": 2, "page_size": 8, "max_step_tokens": 32}
    caches = {"compile_cache_dir": program_cache, "store_cache_dir": store_cache}
    path = str(FOLDER / "q8_0.gguf")
    with Runtime.from_pretrained(path, **sizes, **caches, progress=False) as runtime:
        [output] = runtime.generate("the rain", SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
        assert output.outputs[0].token_ids
        runtime.chat([{"role": "user", "content": "in"}], SamplingParams(max_tokens=2), use_tqdm=False)
    assert any(folder.name.startswith("q8_0.gguf-") for folder in Path(store_cache).iterdir())


def test_the_launcher_plans_and_converts_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"--model={FOLDER / 'q6_k.gguf'}", "--target=cpu", "--max_context_len=64"]) == 0
    assert "q6_k" in capsys.readouterr().out
    assert main(["convert", str(FOLDER / "q6_k.gguf"), str(tmp_path / "store"), "--no-progress"]) == 0
    assert str(tmp_path / "store") in capsys.readouterr().out


def test_the_suffix_may_be_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "UP.GGUF").symlink_to(FOLDER / "f16.gguf")
    assert open_model(str(tmp_path / "UP.GGUF"), None).config == open_model(str(FOLDER / "f16.gguf"), None).config


def test_a_quantized_file_is_not_quantized_again() -> None:
    with pytest.raises(ConfigError, match="expected plain weights to quantize as int8; they are quantized already"):
        open_model(str(FOLDER / "q4_0.gguf"), None, "int8")
    assert open_model(str(FOLDER / "f16.gguf"), None, "int8").quantization is not None
