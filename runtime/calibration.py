"""Quantized weights that are fitted to a text: what `millrace convert --calibrate` does.

The plain model computes windows of the text layer by layer. Of each projection's inputs X only X^T X is kept, while its
layer is at work; the weights are rounded to it (error_feedback), and the next layer sees what the rounded ones give.
So the host and one device hold a layer, its X^T X, and the residual stream of the text.

Inputs are seen where every weight is met: in the table of the operation, of which `_Observer` hands out the entries.
"""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from ..errors import CheckpointError, ConfigError
from ..models.config import LayerSpec, ModelConfig
from ..models.decoder import AbstractDecoder, Params, run_period
from ..models.quantization import mlp_block
from ..pallas_kernels.dispatch import Implementation, KernelChoices
from ..pallas_kernels.quantized_matmul import QuantizedWeight, WeightFormat
from ..pallas_kernels.quantized_matmul.error_feedback import quantize_with_feedback
from ..pallas_kernels.quantized_matmul.formats import dequantize, quantize
from ..sharding.mesh import make_mesh
from ..sharding.rules import Placement
from ..sharding.specs import whole_region
from .quantizing import QuantizedLeaf
from .texts import read_text, token_ids
from .tokenizer import Tokenizer
from .weights import Leaf
from .windows import window_cache, window_step

WINDOW_LEN = 512
MIN_TOKENS, MAX_TOKENS = 4096, 32768
MIN_ROWS = 64  # that an expert must have seen, for fewer say little about the rest
_MAX_BYTES = 16 << 20  # of a text, from its beginning
_ROUTER = "router"
_SHARED = {"k": "q", "v": "q", "up": "gate"}  # projections and the one before them that is given the same

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """A text as windows of tokens."""

    tokens: Int[np.ndarray, "windows T"]
    sha256: str

    @property
    def declared(self) -> dict[str, Any]:
        """What config.json says of it."""
        return {"text_sha256": self.sha256, "num_tokens": self.tokens.size}


def calibration_text(file: Path, tokenizer: Tokenizer | None, model: ModelConfig) -> CalibrationText:
    """Windows spread evenly over a text file, MAX_TOKENS in all.

    Raises:
      ConfigError: it cannot be read or is no text, there is no tokenizer, or the file has fewer than MIN_TOKENS tokens.
    """
    if tokenizer is None:
        raise ConfigError("calibrate needs the model's tokenizer, to make tokens of the text; it has none.")
    text = read_text(file, f"calibrate: {file}", _MAX_BYTES)
    ids = token_ids(tokenizer, text, model.vocab_size)
    if len(ids) < MIN_TOKENS:
        raise ConfigError(
            f"calibrate: {file} is too short: expected at least {MIN_TOKENS:,} tokens, got {len(ids):,}. Give a longer "
            f"text; up to {MAX_TOKENS:,} tokens are used."
        )
    length = min(WINDOW_LEN, model.max_context_len)
    count = min(len(ids), MAX_TOKENS) // length
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return CalibrationText(
        tokens=np.stack([ids[start : start + length] for start in starts]),
        sha256=hashlib.sha256(text.encode()).hexdigest(),
    )


def fitted_layers(
    model: ModelConfig,
    leaves: Mapping[str, Leaf],
    quantized: Mapping[str, QuantizedLeaf],
    text: CalibrationText,
    *,
    show_progress: bool,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """For each quantized weight of every layer: the layer's place in its stack, and the weight's arrays by path.

    `model` is the plain one, `leaves` are all of its parameters, `quantized` those of them that have a format.

    Raises:
      CheckpointError: weights cannot be read, or the model computes no finite numbers with them.
    """
    decoder = AbstractDecoder(model, jnp.dtype(jnp.float32))
    num_windows = 2 * len(decoder.layers) * len(text.tokens)  # each is computed for what it shows, and to go on
    with tqdm(total=num_windows, desc="calibrating", unit="window", disable=not show_progress) as bar:
        forward = _Forward(decoder, text.tokens.shape[1], bar.update)
        top = {path: _read(leaf, None) for path, leaf in leaves.items() if _is_top(path)}
        streams = forward.embed(top, text.tokens)
        for layer in decoder.layers:
            params = {
                path.removeprefix(f"{layer.path}/"): _read(leaf, layer.index)
                for path, leaf in leaves.items()
                if path.startswith(f"{layer.path}/")
            }
            inputs = forward.observe(layer.spec, params, streams)
            for path, each in quantized.items():
                if path.startswith(f"{layer.path}/"):
                    name = path.removeprefix(f"{layer.path}/").removesuffix("/weight")
                    made = _fit(f"{layer.path}/{name}", params[f"{name}/weight"], inputs[name], each.format)
                    params[f"{name}/weight"] = np.asarray(dequantize(made))
                    yield layer.index, each.named(made)
            streams = forward.run(layer.spec, params, streams)


def _is_top(path: str) -> bool:
    return path.split("/")[0] in ("embed", "final_norm", "head")


def _read(leaf: Leaf, layer: int | None) -> np.ndarray:
    """A leaf, or one layer of it, in float32."""
    if layer is None or leaf.is_one_part:
        region = whole_region(leaf.spec.stored_shape)
        first = () if layer is None else (slice(layer, layer + 1),)
        (values,) = leaf.parts[0].read([(*first, *region[len(first) :])])
        return values.astype(np.float32) if layer is None else values[0].astype(np.float32)
    made = np.empty(leaf.spec.stored_shape[1:], np.float32)
    for part in leaf.parts:
        if part.index[0] == layer:
            shape = made.shape[len(part.index) - 1 :]
            made[part.index[1:]] = part.read([whole_region(shape)])[0]
    return made


# ---- rounding


@dataclasses.dataclass
class _Inputs:
    """What a weight was given so far, of one expert where there are experts."""

    gram: Float[Array, "in in"]
    num_rows: int = 0

    def add(self, rows: Float[np.ndarray, "rows in"]) -> None:
        """Rows are padded, so that few shapes are compiled."""
        self.num_rows += len(rows)
        padded = np.pad(rows, ((0, -len(rows) % 128), (0, 0)))
        self.gram = _add_gram(self.gram, padded)


@functools.partial(jax.jit, donate_argnums=0)
def _add_gram(gram: Float[Array, "in in"], rows: Float[Array, "rows in"]) -> Float[Array, "in in"]:
    return gram + jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)


def _fit(path: str, weight: np.ndarray, inputs: list[_Inputs], format: WeightFormat) -> QuantizedWeight:
    """A weight [out, in], or those of all experts, rounded to what it was given."""
    for each in inputs:
        if not bool(jnp.isfinite(each.gram).all()):
            raise CheckpointError(f"{path}: expected finite inputs while it computed the text; got NaN or infinity.")
    if weight.ndim == 2:
        fitted: QuantizedWeight = quantize_with_feedback(weight, inputs[0].gram, format)
        return fitted
    unseen = [number for number, each in enumerate(inputs) if each.num_rows < MIN_ROWS]
    if unseen:
        _logger.warning(
            "%s: %d of %d experts saw fewer than %d rows of the text and are rounded to the nearest: %s",
            path, len(unseen), len(inputs), MIN_ROWS, ", ".join(map(str, unseen)),
        )  # fmt: skip
    made = [
        quantize(jnp.asarray(expert), format)
        if number in unseen
        else quantize_with_feedback(expert, inputs[number].gram, format)
        for number, expert in enumerate(weight)
    ]
    stacked: QuantizedWeight = jax.tree.map(lambda *parts: np.stack([np.asarray(part) for part in parts]), *made)
    return stacked


# ---- the forward


class _Observer(KernelChoices):
    """Choices whose implementations hand on the activations that they are called with.

    A layer calls its projections in a fixed order, so that a call's number, counted while it is traced, names it.
    """

    def __init__(self, device: jax.Device) -> None:
        super().__init__("cpu" if device.platform == "cpu" else "gpu", device_kind=device.device_kind)
        self._names: Iterator[str] = iter(())
        self._seen: list[tuple[str, np.ndarray, np.ndarray | None]] = []

    def begin(self, spec: LayerSpec) -> None:
        """Before a layer of this kind is traced."""
        self._names = iter(_projections(spec))

    def choose(self, operation: Any, table: Any, problem: Any) -> Any:
        """As in KernelChoices, for projections with an implementation that tells what it is given."""
        entry: Implementation[Any] = super().choose(operation, table, problem)
        if operation not in ("quantized_matmul", "grouped_matmul"):
            return entry
        return dataclasses.replace(entry, fn=self._observed(next(self._names), entry.fn), several=None)

    def take(self) -> list[tuple[str, np.ndarray, np.ndarray | None]]:
        """Name, rows, and group sizes if there are any, of the calls since the last time."""
        jax.effects_barrier()
        seen, self._seen = self._seen, []
        return seen

    def _observed(self, name: str, fn: Callable[..., Array]) -> Callable[..., Array]:
        def observed(x: Array, weight: Any, *sizes: Array, **options: Any) -> Array:
            if name == _input_of(name):
                jax.debug.callback(functools.partial(self._see, name), x.reshape(-1, x.shape[-1]), *sizes)
            return fn(x, weight, *sizes, **options)

        return observed

    def _see(self, name: str, rows: Any, sizes: Any = None) -> None:
        self._seen.append((name, np.array(rows), None if sizes is None else np.array(sizes)))


def _projections(spec: LayerSpec) -> tuple[str, ...]:
    """The matmuls of a layer in the order in which it calls them."""
    block = mlp_block(spec)
    router = (_ROUTER,) if block == "moe" else ()
    attention = tuple(f"attention/{name}" for name in "qkvo")
    return (*attention, *router, *(f"{block}/{name}" for name in ("gate", "up", "down")))


def _input_of(name: str) -> str | None:
    """The first projection that is given the same activations; None for those that stay plain."""
    if name == _ROUTER:
        return None
    block, projection = name.split("/")
    return f"{block}/{_SHARED.get(projection, projection)}"


class _Forward:
    """The plain model, a layer at a time, over windows on one device."""

    def __init__(self, decoder: AbstractDecoder, window_len: int, on_window: Callable[[], object]) -> None:
        """`on_window` is called when a layer has computed a window."""
        mesh = make_mesh({})
        self._on_window = on_window
        self._decoder = decoder
        self._placement = Placement(mesh)
        self._observer = _Observer(mesh.devices.flat[0])
        self._plain = KernelChoices(self._observer.platform, device_kind=self._observer.device_kind)
        self._window_len = window_len

    def embed(self, top: Mapping[str, np.ndarray], tokens: Int[np.ndarray, "windows T"]) -> list[np.ndarray]:
        """The residual stream [1, T, D] of each window before the first layer; `top` are the parameters by path."""
        params = jax.device_put(_nested(top))

        @jax.jit
        def embed(params: Params, tokens: Array) -> Array:
            step = window_step(self._decoder, self._placement, self._plain, self._window_len)
            return self._decoder.without_layers.bind(params).embed_tokens(tokens, step)

        return [np.asarray(embed(params, window[None])) for window in tokens]

    def observe(
        self, spec: LayerSpec, params: Mapping[str, np.ndarray], streams: list[np.ndarray]
    ) -> dict[str, list[_Inputs]]:
        """The inputs of each projection, of each of its experts, while a layer computes all windows."""
        found: dict[str, list[_Inputs]] = {}
        nested = jax.device_put(_nested(params))
        for x in streams:
            self._layer(spec, self._observer, nested, x).block_until_ready()
            for name, rows, sizes in self._observer.take():
                parts = [rows] if sizes is None else np.split(rows, np.cumsum(sizes))[: len(sizes)]
                if name not in found:
                    width = rows.shape[1]
                    found[name] = [_Inputs(jnp.zeros((width, width), jnp.float32)) for _ in parts]
                for inputs, part in zip(found[name], parts, strict=True):
                    if len(part):
                        inputs.add(part)
            self._on_window()
        return {name: found[first] for name in _projections(spec) if (first := _input_of(name)) is not None}

    def run(self, spec: LayerSpec, params: Mapping[str, np.ndarray], streams: list[np.ndarray]) -> list[np.ndarray]:
        """The residual streams behind a layer."""
        nested, behind = jax.device_put(_nested(params)), []
        for x in streams:
            behind.append(np.asarray(self._layer(spec, self._plain, nested, x)))
            self._on_window()
        return behind

    @functools.partial(jax.jit, static_argnums=(0, 1, 2))
    def _layer(
        self, spec: LayerSpec, kernels: KernelChoices, params: Params, x: Float[Array, "1 T D"]
    ) -> Float[Array, "1 T D"]:
        if isinstance(kernels, _Observer):
            kernels.begin(spec)
        step = window_step(self._decoder, self._placement, kernels, self._window_len)
        cache = window_cache(self._decoder, self._placement, self._window_len)
        layer = self._decoder.bind_layer(spec, params)
        y, _ = run_period([layer], x, cache, jnp.int32(0), step)
        return y


def _nested(flat: Mapping[str, np.ndarray]) -> Params:
    """Parameters by their paths as a tree."""
    tree: Params = {}
    for path, array in flat.items():
        *parents, name = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = array
    return tree
