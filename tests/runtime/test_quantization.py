"""Quantized stores from plain weights, and runtimes that compute with them: on meshes, streamed, at load."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from millrace import CheckpointError, ConfigError, Runtime, SamplingParams
from millrace.models.decoder import AbstractDecoder
from millrace.models.families import config_from_hf
from millrace.models.partition import with_places
from millrace.models.quantization import GROUP_SIZES, named_format
from millrace.pallas_kernels.quantized_matmul import FORMATS, QuantizedWeight
from millrace.pallas_kernels.quantized_matmul.formats import dequantize, quantize
from millrace.runtime.checkpoint import open_checkpoint
from millrace.runtime.convert import convert
from millrace.runtime.export import export
from millrace.runtime.model_source import open_model, open_model_config
from millrace.runtime.param_tree import flatten
from millrace.runtime.quantizing import load_quantized
from millrace.runtime.store import Store, open_store
from millrace.runtime.store_writer import save_store
from millrace.runtime.weights import load_params
from millrace.sharding.mesh import make_mesh
from millrace.sharding.rules import Placement

OpenTiny = Callable[..., Runtime]
pytestmark = pytest.mark.usefixtures("quick_compilation")
DENSE: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 96, "max_position_embeddings": 128,
    "num_hidden_layers": 3, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "eos_token_id": 1,
}  # fmt: skip
EXPERTS = {**DENSE, "model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2, "num_hidden_layers": 2}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [20, 21, 22]]
SMALL = {"num_slots": 2, "max_step_tokens": 16, "max_context_len": 64}
PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0, prompt_logprobs=0, detokenize=False)


def random_store(config: dict[str, Any], place: Path) -> Store:
    specs = AbstractDecoder(config_from_hf(config), np.dtype("float32")).specs
    random = np.random.default_rng(0)
    save_store(
        place, jax.tree.map(lambda spec: random.normal(size=spec.shape).astype("f4") * 0.2, specs), specs, config, {}
    )
    return open_store(place)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Store:
    """A dense model of random weights in float32."""
    return random_store(DENSE, folder / "dense")


@pytest.fixture(scope="module")
def made(plain: Store, folder: Path) -> Callable[[str], Store]:
    """The dense model in a format, in groups of 32 where they may be chosen; each is converted once."""

    def store(name: str) -> Store:
        group = 32 if name in GROUP_SIZES else None
        if not (folder / name).exists():
            convert(plain, folder / name, quantization=named_format(name, group), show_progress=False)
        return open_store(folder / name)

    return store


def whole(store: Store, path: str) -> np.ndarray:
    return store.read(path, tuple(slice(0, size) for size in store.arrays[path].shape))


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def weight_of(store: Store, path: str, format: Any) -> QuantizedWeight:
    arrays = {name: whole(store, f"{path}/{name}") for name in ("weight", "scales")}
    top = whole(store, f"{path}/global_scale") if format.global_scale else None
    return QuantizedWeight(
        values=jnp.asarray(arrays["weight"]), scales=jnp.asarray(arrays["scales"]), format=format,
        global_scale=None if top is None else jnp.asarray(top),
    )  # fmt: skip


# ---- stores


@pytest.mark.parametrize("name", FORMATS)
def test_a_converted_store_holds_what_quantize_gives(name: str, plain: Store, made: Callable[[str], Store]) -> None:
    store, path = made(name), "stages/0/0/mlp/down"
    format = named_format(name, 32 if name in GROUP_SIZES else None)
    found, wanted = weight_of(store, path, format), quantize(whole(plain, f"{path}/weight"), format)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    assert store.quantization == {"quant_method": "millrace", "format": name, "group_size": format.group}
    assert store.config == {**plain.config, "quantization_config": store.quantization}
    np.testing.assert_array_equal(whole(store, "embed/weight"), whole(plain, "embed/weight"))


def test_two_conversions_are_equal_byte_for_byte(plain: Store, made: Callable[[str], Store], tmp_path: Path) -> None:
    made("nvfp4")
    place = tmp_path / "again"
    convert(plain, place, quantization=FORMATS["nvfp4"], show_progress=False)
    assert files_of(place) == files_of(Path(str(made("nvfp4").root.folder)))


def test_a_conversion_goes_on_with_what_is_unfinished(
    plain: Store, made: Callable[[str], Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from millrace.runtime import store_writer

    num_left, note = [9], store_writer.StoreWriter._note

    def note_or_die(self: Any, path: str, sha256: str) -> None:
        num_left[0] -= 1
        if num_left[0] < 0:
            raise KeyboardInterrupt
        note(self, path, sha256)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store_writer.StoreWriter, "_note", note_or_die)
        convert(plain, tmp_path / "store", quantization=named_format("int4", 32), show_progress=False)
    with pytest.raises(CheckpointError, match="interrupted conversion of .*'int4'.* where .*'int8'.* should go"):
        convert(plain, tmp_path / "store", quantization=FORMATS["int8"], show_progress=False)
    convert(plain, tmp_path / "store", quantization=named_format("int4", 32), show_progress=False)
    assert files_of(tmp_path / "store") == files_of(Path(str(made("int4").root.folder)))


def test_a_checkpoints_experts_are_quantized_as_its_stores_are(fixture_checkpoints: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(fixture_checkpoints / "mixtral_default")
    direct = convert(checkpoint, tmp_path / "direct", quantization=FORMATS["nvfp4"], show_progress=False)
    store = convert(checkpoint, tmp_path / "plain", show_progress=False)
    again = convert(store, tmp_path / "again", quantization=FORMATS["nvfp4"], show_progress=False)
    assert direct.arrays == again.arrays and "stages/0/0/moe/up/global_scale" in direct.arrays


def test_an_export_has_the_weights_that_a_quantized_store_stands_for(
    made: Callable[[str], Store], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = made("int4")
    exported = open_checkpoint(export(store, tmp_path / "exported", show_progress=False))
    assert "weights in int4, int8 are exported as the float32 that they stand for" in capsys.readouterr().err
    assert "quantization_config" not in exported.config
    layers = dequantize(weight_of(store, "stages/0/0/attention/o", named_format("int4", 32)))
    np.testing.assert_array_equal(exported.read("model.layers.2.self_attn.o_proj.weight"), layers[2])
    head = dequantize(weight_of(store, "head", FORMATS["int8"]))
    np.testing.assert_array_equal(exported.read("lm_head.weight"), head)


@pytest.mark.parametrize("value, what", [(0.0, "zero"), (np.nan, "NaN or infinite")])
def test_a_scale_that_loses_its_weight_is_named(value: float, what: str, tmp_path: Path) -> None:
    from millrace.runtime.weights import convert as to_dtype

    scales = np.ones((4, 1), np.float32)
    scales[2] = value
    with pytest.raises(CheckpointError, match=f"attention/q/scales should hold scales.*one of them is {what}"):
        to_dtype(scales, np.dtype("float32"), "stages/0/0/attention/q/scales")


def test_quantized_values_are_never_taken_for_numbers() -> None:
    from millrace.runtime.weights import convert as to_dtype

    with pytest.raises(CheckpointError, match="expected floating-point weights to make bfloat16 of; got float8_e4m3fn"):
        to_dtype(np.zeros(4, jnp.float8_e4m3fn), np.dtype(jnp.bfloat16), "embed/weight")


def test_a_plain_weight_that_is_not_finite_is_named(plain: Store, tmp_path: Path) -> None:
    from millrace.runtime.quantizing import QuantizedLeaf
    from millrace.runtime.weights import Leaf
    from millrace.sharding.specs import ParamSpec

    spec = ParamSpec((4, 32), np.dtype("float32"), ("mlp", "embed"))
    leaf = QuantizedLeaf(Leaf("head/weight", spec, []), FORMATS["int8"], {})
    values = np.ones((4, 32), np.float32)
    values[1, 2] = np.inf
    with pytest.raises(CheckpointError, match="head/weight should hold finite numbers only"):
        leaf.quantize(values)


def test_a_manifest_and_a_config_json_that_disagree_are_refused(made: Callable[[str], Store], tmp_path: Path) -> None:
    import shutil

    place = Path(shutil.copytree(str(made("int8").root.folder), tmp_path / "store"))
    manifest = json.loads((place / "manifest.json").read_text())
    (place / "manifest.json").write_text(json.dumps({**manifest, "quantization": None}))
    with pytest.raises(CheckpointError, match=r"the quantization of config.json, .*'int8'.*and None"):
        open_store(place)


# ---- what is asked for


def test_weights_that_are_quantized_otherwise_are_refused_with_both(made: Callable[[str], Store]) -> None:
    with pytest.raises(ConfigError, match="to quantize as fp8; they are quantized already: .*'int8'"):
        open_model(made("int8").url, None, "fp8")
    assert open_model(made("int8").url, None, "int8").quantization is None


def test_a_bundled_architecture_is_quantized_for_plans() -> None:
    config = open_model_config("meta-llama/Llama-2-70b-hf", None, "nvfp4")
    assert dict(config.layers[0].mlp.formats)["down"] == FORMATS["nvfp4"]
    assert config.head_format == FORMATS["fp8"]


# ---- runtimes


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def scores(outputs: list[Any]) -> np.ndarray:
    """The log probabilities of the prompts' tokens, which do not depend on what was sampled."""
    rows = [next(iter(entry.values())).logprob for output in outputs for entry in output.prompt_logprobs[1:]]
    return np.asarray(rows)


def answers(runtime: Runtime) -> list[Any]:
    with runtime:
        return runtime.generate(PROMPTS, PARAMS, use_tqdm=False)


@pytest.fixture(scope="module")
def int4(made: Callable[[str], Store], open_tiny: OpenTiny) -> list[Any]:
    return answers(open_tiny(made("int4").url, **SMALL))


@pytest.mark.parametrize(
    "options",
    [
        {"mesh": {"data": 2, "tensor": 2}},
        {"weights": "stream", "weights_memory": 1 << 17},
        pytest.param({"weights": "host"}, marks=pytest.mark.large),
    ],
    ids=["mesh", "streamed", "host"],
)
def test_int4_on_a_mesh_and_streamed_gives_the_tokens_of_one_device(
    int4: list[Any], made: Callable[[str], Store], open_tiny: OpenTiny, options: dict[str, Any]
) -> None:
    found = answers(open_tiny(made("int4").url, **SMALL, **options))
    assert tokens(found) == tokens(int4)
    np.testing.assert_allclose(scores(found), scores(int4), atol=1e-4)


@pytest.mark.large
def test_int8_on_a_mesh_differs_by_the_rounding_of_activations_alone(
    made: Callable[[str], Store], open_tiny: OpenTiny
) -> None:
    one = answers(open_tiny(made("int8").url, **SMALL))
    many = answers(
        open_tiny(made("int8").url, **SMALL, mesh={"data": 2, "tensor": 2})
    )  # rows have a scale for each half
    assert np.abs(scores(one) - scores(many)).mean() < 0.05


def test_experts_in_int8_over_devices_give_the_tokens_of_one(folder: Path, open_tiny: OpenTiny) -> None:
    plain = random_store(EXPERTS, folder / "experts")
    options = {**SMALL, "quantization": "int8", "store_cache_dir": str(folder / "cache")}
    one = answers(open_tiny(plain.url, **options))
    many = answers(open_tiny(plain.url, **options, mesh={"expert": 2}))
    assert tokens(one) == tokens(many)


def test_plain_weights_quantized_at_load_are_those_of_the_store(
    fixture_checkpoints: Path, made: Callable[[str], Store], plain: Store, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(fixture_checkpoints / "mixtral_default")
    for source, quantization in ((plain, FORMATS["int8"]), (checkpoint, FORMATS["nvfp4"])):
        store = convert(source, tmp_path / quantization.name, quantization=quantization, show_progress=False)
        mesh = make_mesh({"expert": 3})
        model = with_places(config_from_hf(dict(store.config)), mesh)
        specs, placement = AbstractDecoder(model, jnp.dtype(store.dtype)).specs, Placement(mesh)
        stored = load_params(store, model, specs, placement, show_progress=False)
        at_load = load_quantized(source, model, specs, placement, show_progress=False)
        for path, values in flatten(stored)[0].items():
            np.testing.assert_array_equal(np.asarray(values), np.asarray(flatten(at_load)[0][path]), err_msg=path)


def test_streaming_without_a_quantized_store_is_refused(plain: Store, open_tiny: OpenTiny) -> None:
    with pytest.raises(ConfigError, match="or still to be quantized"):
        open_tiny(plain.url, quantization="int8", store=False, weights="stream", weights_memory=1 << 17)
