"""What quantization costs: bits per byte of a text, and how far predictions move from those of the plain model.

Each candidate computes the text in windows as a runtime computes a prompt, through pages, cache and kernels of its own.
Distances are over the whole vocabulary, in blocks of tokens, so that no window's logits are ever there at once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from ..errors import ConfigError
from ..models.config import ModelConfig
from ..models.decoder import Params
from ..models.quantization import is_quantized, named_format, uniformly, with_formats, without_formats
from ..models.step import Step
from ..pallas_kernels.quantized_matmul import WeightFormat
from .config import RuntimeConfig
from .deployment import Deployment, deploy
from .model_source import ModelSource, open_model
from .quantizing import load_quantized
from .steps import StepModel
from .texts import token_ids
from .weights import load_params
from .windows import window_batch

_BLOCK_LEN = 64  # tokens whose logits are there at once, at most, on each data shard
_ANY_MEMORY = 2**50
_UNSCORED = -1  # a target that nothing predicts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to serve the model: weights in a format, or as they are elsewhere, and a dtype of the cache."""

    format: str | None = None  # as int8 or int4:32; None: plain weights
    path: str | None = None  # of a checkpoint or store of this model that is quantized already
    kv_cache_dtype: str | None = None  # None: that of the activations

    @property
    def weights(self) -> str:
        """Their name in a table."""
        return self.path or self.format or "plain"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """A candidate beside the plain model."""

    weights: str
    kv_cache_dtype: str
    weight_bytes: int  # on each device
    bits_per_byte: float
    bits_change: float  # of bits per byte, as a part of the plain model's
    kl: float  # mean KL(plain || candidate) of a token, in nats
    same_best: float  # share of tokens whose likeliest successor stayed


class Windows(NamedTuple):
    """A text as rows of tokens, each token but the first of a text the target of the one before it."""

    tokens: Int[np.ndarray, "windows T"]
    targets: Int[np.ndarray, "windows T"]
    num_bytes: int  # of the text that is scored

    @property
    def num_scored(self) -> int:
        """Tokens that are targets."""
        return int((self.targets != _UNSCORED).sum())


class _Sums(NamedTuple):
    """Over the scored tokens of a window."""

    nats: Array
    kl: Array
    num_same: Array


# ---- the text


def make_windows(source: ModelSource, texts: Sequence[str], window_len: int, max_tokens: int | None = None) -> Windows:
    """The texts one after the other; `max_tokens` keeps as many tokens of their beginning.

    Raises:
      ConfigError: there is less than one window, nothing but special tokens, or a token that the model does not know.
    """
    tokenizer = source.tokenizer
    assert tokenizer is not None
    rows: list[np.ndarray] = []
    num_bytes = 0
    for text in texts:
        ids = _first_ids(source, text, max_tokens)
        is_special = np.isin(ids, list(tokenizer.special_ids))
        rows.append(np.stack([ids[:-1], np.where(is_special[1:], _UNSCORED, ids[1:])]))
        first = [] if not len(ids) or is_special[0] else [int(ids[0])]
        num_bytes += len(text.encode()) - len(tokenizer.decode(first).encode())
    stream = np.concatenate(rows, axis=1) if rows else np.zeros((2, 0), np.int32)
    if max_tokens is not None and max_tokens < stream.shape[1]:
        kept = stream[1, :max_tokens]
        num_bytes = len(tokenizer.decode(kept[kept != _UNSCORED].tolist()).encode())
        stream = stream[:, :max_tokens]
    if stream.shape[1] < window_len:
        raise ConfigError(
            f"the text is too short: expected at least one window of {window_len} tokens, got {stream.shape[1]}. Give "
            "a longer text, or a smaller window."
        )
    missing = -stream.shape[1] % window_len
    tokens, targets = np.pad(stream, ((0, 0), (0, missing)), constant_values=((0, 0), (0, _UNSCORED)))
    if num_bytes <= 0 or (targets == _UNSCORED).all():
        raise ConfigError("the text has nothing to score: all its tokens are special ones. Give another text.")
    return Windows(tokens.reshape(-1, window_len), targets.reshape(-1, window_len), num_bytes)


def _first_ids(source: ModelSource, text: str, most: int | None) -> np.ndarray:
    """The tokens of a text, or of so much of its beginning that there are more than `most`."""
    assert source.tokenizer is not None
    length = len(text) if most is None else 16 * most
    while True:
        ids = token_ids(source.tokenizer, text[:length], source.config.vocab_size)
        # The last tokens might be others if more of the text followed.
        if length >= len(text) or (most is not None and len(ids) > most + 64):
            return ids
        length *= 4


# ---- the models


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Loaded:
    """A model with weights, on the devices."""

    deployment: Deployment
    params: Params

    @property
    def model(self) -> StepModel:
        return self.deployment.model


def _load(source: ModelSource, config: RuntimeConfig, mesh: Mesh, window_len: int) -> _Loaded:
    deployment = _deploy(config, source.config, mesh, window_len)
    specs, placement = deployment.model.decoder.specs, deployment.model.placement
    load = load_params if source.quantization is None else load_quantized
    params = load(source.weights, source.config, specs, placement, show_progress=False)
    return _Loaded(deployment=deployment, params=params)


def _deploy(config: RuntimeConfig, model: ModelConfig, mesh: Mesh, window_len: int) -> Deployment:
    """For one window at a time on each data shard; whether memory holds that shows when it is there."""
    sized = config.replace(num_slots=1, max_context_len=window_len, max_step_tokens=window_len, kv_cache_bytes=None)
    return deploy(sized, model, mesh, _ANY_MEMORY)


def parse_format(text: str) -> WeightFormat:
    """A format by its name, or as name:group, as in int4:32.

    Raises:
      ConfigError: there is no such format, or it has no groups of that size.
    """
    name, colon, group = text.partition(":")
    if colon and not group.isdecimal():
        raise ConfigError(f"expected a format or format:group, as in int4:32; got {text!r}.")
    return named_format(name, int(group) if colon else None)


def _candidate(plain: _Loaded, candidate: Candidate, config: RuntimeConfig, source: ModelSource) -> _Loaded:
    """The candidate with its weights, from its own source if it has a path; plain ones are those of the plain model."""
    mesh, window_len = plain.model.placement.mesh, plain.model.max_context_len
    config = config.replace(dtype=plain.deployment.config.dtype, kv_cache_dtype=candidate.kv_cache_dtype)
    if candidate.path is not None:
        return _load(source, config, mesh, window_len)
    if candidate.format is None:
        return _Loaded(deployment=_deploy(config, source.config, mesh, window_len), params=plain.params)
    format = parse_format(candidate.format)
    model = with_formats(source.config, uniformly(format))
    return _load(dataclasses.replace(source, config=model, quantization=format), config, mesh, window_len)


def _open_other(path: str, config: RuntimeConfig, source: ModelSource) -> ModelSource:
    """A quantized model; raises ConfigError if it is not one of the plain model."""
    other = open_model(path, None)
    shapes, expected = (dataclasses.replace(without_formats(s.config), dtype="float32") for s in (other, source))
    if shapes != expected:
        raise ConfigError(f"{path} is another model than {config.model}: expected the same shapes.")
    return other


# ---- the forward


def _step(model: StepModel, tokens: Array) -> Step:
    """What the layers share while they compute a window [R, T], the only row of its data shard."""
    return model.step(window_batch(tokens, model.pages_per_slot), is_decode=False)


@functools.partial(jax.jit, static_argnames="model")
def _hidden(model: StepModel, params: Params, tokens: Int[Array, "R T"]) -> Float[Array, "R T D"]:
    """The residual stream behind the last layer."""
    step, decoder = _step(model, tokens), model.decoder.bind(params)
    cache = jax.tree.map(
        lambda spec: jax.lax.with_sharding_constraint(
            jnp.zeros(spec.shape, spec.dtype), model.placement.sharding(spec.axes)
        ),
        model.cache,
    )
    x, _ = decoder.run_layers(decoder.embed_tokens(tokens, step), cache, step)
    return x


@functools.partial(jax.jit, static_argnames=("plain", "other"))
def _compare(
    plain: StepModel, other: StepModel, plain_top: Params, top: Params, plain_x: Float[Array, "R T D"],
    x: Float[Array, "R T D"], targets: Int[Array, "R T"],
) -> _Sums:  # fmt: skip
    """Of two residual streams; the heads are those of decoders without layers."""
    step, other_step = _step(plain, targets), _step(other, targets)
    decoder, other_decoder = plain.decoder.without_layers.bind(plain_top), other.decoder.without_layers.bind(top)

    def block(parts: tuple[Array, Array, Array]) -> _Sums:
        of_plain = jax.nn.log_softmax(decoder.logits(parts[0], step))
        of_other = jax.nn.log_softmax(other_decoder.logits(parts[1], other_step))
        is_scored = parts[2] != _UNSCORED
        chosen = jnp.maximum(parts[2], 0)[..., None]

        def total(each: Array) -> Array:
            return jnp.sum(jnp.where(is_scored, each, 0), dtype=jnp.float32)

        return _Sums(
            nats=-total(jnp.take_along_axis(of_other, chosen, axis=-1)[..., 0]),
            kl=total(jnp.sum(jnp.exp(of_plain) * (of_plain - of_other), axis=-1)),
            num_same=total(jnp.argmax(of_plain, axis=-1) == jnp.argmax(of_other, axis=-1)),
        )

    length = max(n for n in range(1, _BLOCK_LEN + 1) if targets.shape[1] % n == 0)
    in_blocks = [jnp.moveaxis(a.reshape(a.shape[0], -1, length, *a.shape[2:]), 1, 0) for a in (plain_x, x, targets)]
    sums: _Sums = jax.tree.map(lambda a: a.sum(0), jax.lax.map(block, tuple(in_blocks)))
    return sums


def all_logprobs(
    source: ModelSource, config: RuntimeConfig, mesh: Mesh, tokens: Int[np.ndarray, " T"]
) -> Float[np.ndarray, "T V"]:
    """The log probabilities of every token behind each of a text's, for comparisons with other runtimes."""
    loaded = _load(source, config, mesh, len(tokens))
    rows = jnp.asarray(np.broadcast_to(tokens, (loaded.model.placement.num_shards, len(tokens))))
    x = _hidden(loaded.model, loaded.params, rows)
    logprobs: np.ndarray = np.asarray(_logprobs(loaded.model, loaded.params, x))[0]
    return logprobs


@functools.partial(jax.jit, static_argnames="model")
def _logprobs(model: StepModel, params: Params, x: Float[Array, "R T D"]) -> Float[Array, "R T V"]:
    """Of a residual stream behind the last layer."""
    logits = model.decoder.bind(params).logits(x, _step(model, jnp.zeros(x.shape[:2], jnp.int32)))
    return jax.nn.log_softmax(logits)


# ---- the whole


class _Exact(NamedTuple):
    """What candidates are compared with."""

    plain: _Loaded
    windows: Windows
    steps: list[tuple[np.ndarray, np.ndarray, Array]]  # tokens and targets [R, T], and the plain model's _hidden


def evaluate(
    source: ModelSource, config: RuntimeConfig, mesh: Mesh, windows: Windows, candidates: Sequence[Candidate]
) -> list[Score]:
    """The plain model's score, and that of each candidate.

    Raises:
      ConfigError: the model is quantized itself, a format does not fit it, or its context is shorter than a window.
    """
    if is_quantized(source.config):
        raise ConfigError(
            f"{config.model} is quantized: expected the plain model, for others to be compared with. Give that as "
            "--model, and this one as --quantized."
        )
    others = {c.path: _open_other(c.path, config, source) for c in candidates if c.path is not None}
    plain = _load(source, config, mesh, windows.tokens.shape[1])
    pairs = _in_steps(windows, plain.model.placement.num_shards)
    with tqdm(total=(1 + len(candidates)) * len(pairs), unit="step", disable=not config.progress) as bar:
        bar.set_description("plain")
        exact = _Exact(plain, windows, [])
        for tokens, targets in pairs:
            exact.steps.append((tokens, targets, _hidden(plain.model, plain.params, tokens).block_until_ready()))
            bar.update()
        scores = [_score(exact, plain, Candidate(), lambda: None)]
        for candidate in candidates:
            bar.set_description(candidate.weights)
            of_candidate = source if candidate.path is None else others[candidate.path]
            other = _candidate(plain, candidate, config, of_candidate)
            scores.append(_score(exact, other, candidate, bar.update))
    plain_bits = scores[0].bits_per_byte
    return [dataclasses.replace(score, bits_change=score.bits_per_byte / plain_bits - 1) for score in scores]


def _in_steps(windows: Windows, num_shards: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and targets [R, T] of each step, a window for each data shard."""
    missing = -len(windows.tokens) % num_shards
    tokens = np.pad(windows.tokens, ((0, missing), (0, 0)))
    targets = np.pad(windows.targets, ((0, missing), (0, 0)), constant_values=_UNSCORED)
    starts = range(0, len(tokens), num_shards)
    return [(tokens[s : s + num_shards], targets[s : s + num_shards]) for s in starts]


def _score(exact: _Exact, other: _Loaded, candidate: Candidate, on_step: Callable[[], object]) -> Score:
    """A candidate's score, but for bits_change, which is 0."""
    plain = exact.plain
    head = other.model if other.model.decoder.config.head_format else plain.model  # one program for all plain heads
    tops = [{key: node for key, node in p.params.items() if key != "stages"} for p in (plain, other)]
    sums = np.zeros(len(_Sums._fields))
    for tokens, targets, plain_x in exact.steps:
        x = plain_x if other is plain else _hidden(other.model, other.params, tokens)
        sums += np.asarray(jax.device_get(_compare(plain.model, head, *tops, plain_x, x, targets)), np.float64)
        on_step()
    nats, kl, num_same = sums
    num_scored = exact.windows.num_scored
    assert other.deployment.config.kv_cache_dtype is not None
    return Score(
        weights=candidate.weights,
        kv_cache_dtype=other.deployment.config.kv_cache_dtype,
        weight_bytes=other.deployment.weight_bytes,
        bits_per_byte=nats / math.log(2) / exact.windows.num_bytes,
        bits_change=0.0,
        kl=kl / num_scored,
        same_best=num_same / num_scored,
    )
