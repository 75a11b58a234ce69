"""`millrace eval-quant --model=NAME`: what quantized weights and KV caches cost, against the plain model.

The table on stdout has bits per byte of a text, the mean KL divergence of a token's prediction from the plain model's
in nats, and how often the likeliest token stayed. Without --quantization every format is tried that fits the model,
without --kv_cache_dtype fp8 and int8. Without --text it is Python code that the embedded model was not
trained on (the standard library's held-out files); other models may have seen it.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError
from ..flags import RUNTIME, Group, Option
from ..interrupts import interrupts_wait

if TYPE_CHECKING:
    from ...models.config import ModelConfig
    from ..quant_eval import Candidate, Score, Windows
    from . import OpenRuntime

GROUPS = (
    Group(
        "Evaluation (--quantization and --kv_cache_dtype may have several, as in int8,int4:32, and be empty)",
        (
            Option(
                "quantized", "texts", "a store or checkpoint of the model that is quantized already; may be repeated"
            ),
            Option("pairs", "switch", "every format with every dtype of the cache, too", False),
            Option("text", "texts", "a file of text; may be repeated"),
            Option("window", "integer", "tokens of a window, which begins without a past", 512),
            Option("max_tokens", "integer", "tokens of the text that are used; all by default"),
            Option("json", "text", "a file for all numbers; - for stdout, in place of the table"),
        ),
    ),
    RUNTIME,
)
CACHE_DTYPES = "fp8,int8"
_LONG_TEXT = 1_000_000  # characters, of which tokens take a second or two


def run(values: Mapping[str, Any], open_runtime: "OpenRuntime") -> int:
    """The exit code, 0."""
    for name, least in (("window", 2), ("max_tokens", 2)):
        if values[name] is not None and values[name] < least:
            raise ConfigError(f"--{name} must be at least {least}, got {values[name]}.")
    if values["max_tokens"] is not None and values["max_tokens"] < values["window"]:
        raise ConfigError(f"--max_tokens={values['max_tokens']} is less than one window: expected --window or more.")
    if values["json"] not in (None, "-") and not Path(values["json"]).expanduser().absolute().parent.is_dir():
        raise ConfigError(f"--json={values['json']}: expected a file in a folder that is there.")
    from ..overrides import resolve

    cache_dtypes = _split(CACHE_DTYPES if values["kv_cache_dtype"] is None else values["kv_cache_dtype"])
    config = resolve({**values, "kv_cache_dtype": None, "quantization": None})
    if config.weights != "resident":
        raise ConfigError("eval-quant has all weights on the devices: leave --weights out.")
    with interrupts_wait():
        from ...sharding.mesh import make_mesh
        from ..assembly import keep_programs
        from ..cpu_kernels import prepare_kernels
        from ..deployment import platform_of
        from ..model_source import open_model
        from ..quant_eval import evaluate, make_windows

    source = open_model(config.model, config.revision)
    if source.tokenizer is None:
        raise ConfigError(f"{config.model} has no tokenizer: expected one, to make tokens of the text.")
    if values["window"] > source.config.max_context_len:
        raise ConfigError(f"--window={values['window']} is beyond the model's {source.config.max_context_len} tokens.")
    texts = list(_texts(values["text"]))
    if config.progress and (size := sum(map(len, texts))) > _LONG_TEXT:
        print(f"millrace: making tokens of a text of {size:,} characters", file=sys.stderr)
    windows = make_windows(source, texts, values["window"], values["max_tokens"])
    candidates = list(_candidates(values, cache_dtypes, source.config))
    keep_programs(config.compile_cache_dir)
    mesh = make_mesh(dict(config.mesh or ()))
    prepare_kernels(platform_of(mesh), show_progress=config.progress)
    scores = evaluate(source, config, mesh, windows, candidates)
    record = {
        "model": config.model,
        "num_bytes": windows.num_bytes,
        "num_tokens": windows.num_scored,
        "window": values["window"],
        "scores": [dataclasses.asdict(score) for score in scores],
    }
    if values["json"] != "-":
        print(_table(config.model, windows, scores))
    if values["json"]:
        text = json.dumps(record, indent=1)
        print(text) if values["json"] == "-" else _write(Path(values["json"]).expanduser(), text)
    return 0


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text + "\n")
    except OSError as error:
        raise ConfigError(f"--json={file}: cannot be written ({error}).") from error


def _split(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _texts(files: Sequence[str] | None) -> Iterator[str]:
    """The files' texts, or those that were held out from the embedded model's training."""
    from ..texts import read_text

    if not files:
        from ...models.embedded.corpus import split

        yield from split()[1]
    for name in files or ():
        yield read_text(Path(name).expanduser(), f"--text={name}")


def _candidates(values: Mapping[str, Any], cache_dtypes: Sequence[str], model: "ModelConfig") -> Iterator["Candidate"]:
    """Each format, each quantized model, each dtype of the cache, and the pairs that were asked for.

    Raises:
      ConfigError: a format that was named does not exist or does not fit the model, or a dtype does not exist.
    """
    from ..config import RuntimeConfig
    from ..quant_eval import Candidate

    for dtype in cache_dtypes:
        RuntimeConfig(kv_cache_dtype=dtype)
    formats = _formats(values["quantization"], model)
    of_weights = [Candidate(format=each) for each in formats] + [
        Candidate(path=each) for each in values["quantized"] or ()
    ]
    yield from of_weights
    yield from (Candidate(kv_cache_dtype=dtype) for dtype in cache_dtypes)
    if values["pairs"]:
        for one in of_weights:
            yield from (dataclasses.replace(one, kv_cache_dtype=dtype) for dtype in cache_dtypes)


def _formats(text: str | None, model: "ModelConfig") -> list[str]:
    """Those named, each tried on the model's shapes; where none is named, all that fit, with a word on the others."""
    from ...models.quantization import uniformly, with_formats
    from ...pallas_kernels.quantized_matmul import FORMATS
    from ..quant_eval import parse_format

    found = []
    for name in FORMATS if text is None else _split(text):
        try:
            with_formats(model, uniformly(parse_format(name)))
        except ConfigError as error:
            if text is not None:
                raise
            print(f"millrace: {name} is left out: {error}", file=sys.stderr)
        else:
            found.append(name)
    return found


def _table(model: str, windows: "Windows", scores: "Sequence[Score]") -> str:
    width = max(12, *(len(score.weights) for score in scores))
    head = (
        f"{model}: {windows.num_bytes:,} bytes of text, {windows.num_scored:,} tokens in windows of "
        f"{windows.tokens.shape[1]}"
    )
    names = f"{'weights':<{width}}  {'KV cache':<14}{'bits/byte':>10}{'change':>9}{'KL, nats':>10}{'same best':>11}"
    lines = [
        f"{score.weights:<{width}}  {score.kv_cache_dtype:<14}{score.bits_per_byte:>10.4f}{score.bits_change:>+9.2%}"
        f"{score.kl:>10.5f}{score.same_best:>11.2%}{score.weight_bytes / 1e6:>9.2f}"
        for score in scores
    ]
    return "\n".join([head, f"{names}{'MB':>9}", *lines])
