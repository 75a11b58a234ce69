"""From the name of a model to what can be opened: the embedded store, a directory, a GGUF, a URL, a repository."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..errors import CheckpointError
from ..models.config import ModelConfig
from ..models.families import config_from_hf
from ..models.families.quantization import wanted_format
from ..models.quantization import uniformly, with_formats
from ..pallas_kernels.quantized_matmul import WeightFormat
from .checkpoint import CONFIG_FILE, Checkpoint, open_checkpoint
from .config import PLAIN
from .generation_defaults import default_sampling_params, eos_token_ids
from .gguf_checkpoint import SUFFIX as GGUF_SUFFIX
from .gguf_checkpoint import open_gguf
from .json_files import read_object
from .limits import MAX_EOS_IDS
from .sampling_params import SamplingParams
from .store import Store, is_store, open_store
from .store_root import is_url
from .tokenizer import Tokenizer

EMBEDDED_STORE = Path(__file__).parent.parent / "models" / "embedded" / "store"
ARCHITECTURES = Path(__file__).parent.parent / "models" / "architectures"  # config.json files by ORG--NAME


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that was found sound; its weights are still on disk."""

    weights: Checkpoint | Store
    config: ModelConfig  # as it runs
    quantization: WeightFormat | None = None  # what the weights, which are plain, are still to be made
    tokenizer: Tokenizer | None
    eos_ids: tuple[int, ...]
    default_sampling_params: SamplingParams

    def made(self, config: ModelConfig, format: WeightFormat | None) -> Self:
        """The same, to run as `config`, which has its plain weights in `format`; None leaves it as it is."""
        return self if format is None else dataclasses.replace(self, config=config, quantization=format)


def open_model(model: str, revision: str | None, quantization: str | None = None) -> ModelSource:
    """Find and check a model; `quantization` names the format that plain weights are made, PLAIN and None leave them.

    Raises:
      CheckpointError: nothing is there, or it cannot be trusted or understood.
      ConfigError: its weights are quantized otherwise, or their shapes do not fit the format.
    """
    weights = open_weights(model, revision)
    config, format = _config_of(weights.config, quantization, model)
    if isinstance(weights, Store):
        config = dataclasses.replace(config, dtype=weights.dtype)  # it may be converted to another than config.json's
    tokenizer = weights.load_tokenizer()
    eos_ids = eos_token_ids(weights.generation_config, weights.config, tokenizer.eos_id if tokenizer else None)
    if len(eos_ids) > MAX_EOS_IDS:
        raise CheckpointError(f"{weights.path}: expected at most {MAX_EOS_IDS} eos_token_id; got {len(eos_ids)}.")
    return ModelSource(
        weights=weights,
        config=config,
        quantization=format,
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        default_sampling_params=default_sampling_params(weights.generation_config),
    )


def _config_of(
    config: Mapping[str, Any], quantization: str | None, model: str
) -> tuple[ModelConfig, WeightFormat | None]:
    """A config.json as the model runs, and what its weights are to be made for that."""
    name = None if quantization == PLAIN else quantization
    found, format = config_from_hf(dict(config)), wanted_format(config, name, None, model)
    return (found, None) if format is None else (with_formats(found, uniformly(format)), format)


def open_model_config(model: str, revision: str | None, quantization: str | None = None) -> ModelConfig:
    """A model's shapes, for plans and programs: of all that `open_model` takes, of a folder with nothing but a
    config.json, and of the published models in models/architectures, which need no network.

    Raises:
      CheckpointError, ConfigError: see open_model.
    """
    bundled = ARCHITECTURES / f"{model.replace('/', '--')}.json"
    if revision is None and model.count("/") == 1 and bundled.is_file() and not Path(model).exists():
        return _config_of(read_object(bundled), quantization, model)[0]
    folder = Path(model).expanduser()
    if (folder / CONFIG_FILE).is_file() and not is_store(folder):
        return _config_of(read_object(folder / CONFIG_FILE), quantization, model)[0]
    return open_model(model, revision, quantization).config


def open_weights(model: str, revision: str | None) -> Checkpoint | Store:
    """What a model's name stands for, its configs and headers checked.

    Raises:
      CheckpointError: see open_model.
    """
    if revision is not None and is_url(model):
        raise CheckpointError(f"revision={revision!r} goes with org/name; {model!r} is a store. Leave it out.")
    if is_url(model):
        return open_store(model)
    if model == "embedded":
        path = EMBEDDED_STORE
    elif Path(model).expanduser().exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        path = Path(model).expanduser()
        is_gguf = path.suffix.lower() == GGUF_SUFFIX and path.is_file()
        if not (is_gguf or path.is_dir()):
            raise CheckpointError(
                f'model {model!r} is not a directory, a .gguf file, "embedded", a repository org/name, or the URL of a '
                "store. Give the directory that holds config.json."
            )
        if revision is not None:
            kind = "file" if is_gguf else "directory"
            raise CheckpointError(f"revision={revision!r} goes with org/name; {model!r} is a {kind}. Leave it out.")
        if is_gguf:
            return open_gguf(path)
    else:
        from .hub import download

        path = download(model, revision)
    return open_store(path) if is_store(path) else open_checkpoint(path)


def compute_dtype(config: ModelConfig, wanted: str | None) -> np.dtype:
    """The dtype of weights and activations: the one asked for, else the checkpoint's own."""
    import ml_dtypes

    name = wanted or config.dtype
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
