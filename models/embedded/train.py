"""Train the embedded model and write it as a store: `python -m millrace.models.embedded.train --out DIR`.

The decoder is the one that serves; the optimizer is Muon (Jordan et al., 2024) on the matrices of the layers and Adam
on the rest, both from optax. The same seed, interpreter and versions give the same weights on the same machine.
"""

import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon
from tqdm import tqdm

from ...pallas_kernels.dispatch import KernelChoices
from ...runtime.store_writer import save_store
from ...sharding.mesh import make_mesh
from ...sharding.rules import Placement
from ..config import AttentionSpec, LayerSpec, MlpSpec, ModelConfig, RopeSpec
from ..decoder import AbstractDecoder, Decoder, Params
from ..step import Step, rope_tables
from . import corpus, dense

FLAGS = flags.FLAGS

type Loss = Callable[[Params, jax.Array], jax.Array]  # of the parameters and sequences [R, T + 1]

HF_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "torch_dtype": "bfloat16",
}


def model_config() -> ModelConfig:
    """The model that HF_CONFIG describes."""
    head_dim = HF_CONFIG["head_dim"]
    attention = AttentionSpec(
        num_heads=HF_CONFIG["num_attention_heads"],
        num_kv_heads=HF_CONFIG["num_key_value_heads"],
        head_dim=head_dim,
        scale=1 / math.sqrt(head_dim),
        rope=RopeSpec(theta=HF_CONFIG["rope_theta"], rotary_dim=head_dim),
    )
    layer = LayerSpec(attention=attention, mlp=MlpSpec(mlp_dim=HF_CONFIG["intermediate_size"]))
    return ModelConfig(
        family="llama",
        vocab_size=HF_CONFIG["vocab_size"],
        embed_dim=HF_CONFIG["hidden_size"],
        layers=(layer,) * HF_CONFIG["num_hidden_layers"],
        max_context_len=HF_CONFIG["max_position_embeddings"],
        norm_eps=HF_CONFIG["rms_norm_eps"],
        tie_embeddings=True,
    )


def make_loss(config: ModelConfig) -> Loss:
    """Mean cross entropy, in nats per token, of sequences [R, T + 1]."""
    decoder = AbstractDecoder(config, jnp.dtype("float32"))
    placement = Placement(make_mesh())
    kernels = KernelChoices("cpu" if jax.default_backend() == "cpu" else "gpu")

    def loss(params: Params, tokens: jax.Array) -> jax.Array:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
        ropes = rope_tables(config, positions, config.max_context_len)
        step = Step(placement=placement, kernels=kernels, attend=dense.attend, ropes=ropes)
        model = decoder.bind(params)
        x, _ = model.run_layers(model.embed_tokens(inputs, step), None, step)
        logits = model.logits(x, step)
        mean: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
        return mean

    return loss


def make_optimizer(num_steps: int, learning_rate: float) -> optax.GradientTransformation:
    """Muon for the stacked matrices [L, out, in], Adam for embedding and norms; warm-up, then a cosine down to 2 %."""

    def dimensions(params: Params) -> Any:
        def of(x: jax.Array) -> MuonDimensionNumbers | None:
            return MuonDimensionNumbers(reduction_axis=2, output_axis=1) if x.ndim == 3 else None

        return jax.tree.map(of, params)

    def schedule(peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, peak, min(200, num_steps // 10), num_steps, peak * 0.02)

    optimizer = muon(
        schedule(learning_rate),
        weight_decay=0.05,
        muon_weight_dimension_numbers=dimensions,
        adam_learning_rate=schedule(learning_rate / 5),
        consistent_rms=0.2,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optimizer)


def batches(stream: np.ndarray, batch: int, length: int, seed: int) -> Any:
    """Endless batches [batch, length + 1] of windows at random places of the stream."""
    random = np.random.default_rng(seed)
    while True:
        starts = random.integers(0, len(stream) - length - 1, batch)
        yield np.stack([stream[s : s + length + 1] for s in starts])


def bits_per_byte(loss: Loss, params: Params, tokenizer: Any, texts: list[str]) -> float:
    """Held-out cross entropy in bits per byte of text, windows of 512 tokens, without overlap."""
    length = 512
    total, num_bytes = 0.0, sum(len(t.encode()) for t in texts)
    stream = np.concatenate(corpus.encode(tokenizer, texts))
    evaluate = jax.jit(loss)
    for start in range(0, len(stream) - length - 1, length):
        total += float(evaluate(params, stream[None, start : start + length + 1])) * length
    scored = (len(stream) - 1) // length * length
    return total / math.log(2) / (num_bytes * scored / len(stream))


def train(num_steps: int, batch: int, length: int, learning_rate: float, seed: int, out: Path) -> None:
    """Run the whole recipe and write the store, with the numbers of its model card in training.json."""
    texts, held_out = corpus.split()
    tokenizer = corpus.train_tokenizer(texts, HF_CONFIG["vocab_size"])
    ids = corpus.encode(tokenizer, texts)
    np.random.default_rng(seed).shuffle(ids)
    stream = np.concatenate(ids)
    config = model_config()
    loss = make_loss(config)
    params = nnx.to_pure_dict(nnx.split(Decoder(config, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(seed)))[1])
    params["embed"]["weight"] = params["embed"]["weight"] * 0.3
    optimizer = make_optimizer(num_steps, learning_rate)
    state = optimizer.init(params)

    @jax.jit
    def update(params: Params, state: Any, tokens: jax.Array) -> tuple[Params, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(params, tokens)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    print(f"{len(texts)} files, {len(stream)} tokens; {sum(p.size for p in jax.tree.leaves(params))} parameters")
    started, smooth, step = time.monotonic(), math.log(config.vocab_size), 0
    short = batches(stream, batch, length, seed)
    long = batches(stream, batch // 2, 2 * length, seed + 1)
    try:
        for step in (bar := tqdm(range(1, num_steps + 1), mininterval=10)):
            params, state, value = update(params, state, next(short if step <= 0.8 * num_steps else long))
            if step % 20 == 0:
                smooth = 0.7 * smooth + 0.3 * float(value)
                bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
    except KeyboardInterrupt:
        print(f"interrupted after {step - 1} steps: writing what was learned so far")
    numbers = {
        "python": platform.python_version(),
        "train_files": len(ids),
        "train_tokens": len(stream),
        "held_out_files": len(held_out),
        "steps": step,
        "tokens_per_step": batch * length,
        "seconds": round(time.monotonic() - started),
        "train_loss_nats_per_token": round(smooth, 4),
    }
    write(out, params, tokenizer.to_str(), numbers, bits_per_byte(loss, served(params), tokenizer, held_out))


def served(params: Params) -> Params:
    """The weights as they are served: rounded to bfloat16."""
    rounded: Params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    return rounded


def write(out: Path, params: Params, tokenizer: str, numbers: dict[str, Any], held_out_bits_per_byte: float) -> None:
    """The store, with everything that serving needs, and the run's numbers."""
    numbers = {**numbers, "held_out_bits_per_byte": round(held_out_bits_per_byte, 4)}
    settings = {"add_bos_token": True, "bos_token": corpus.END_OF_TEXT, "eos_token": corpus.END_OF_TEXT}
    generation = {"bos_token_id": 0, "eos_token_id": 0, "do_sample": True, "temperature": 0.7, "top_p": 0.95}
    files = {
        "tokenizer.json": tokenizer.encode(),
        "tokenizer_config.json": _json(settings),
        "generation_config.json": _json(generation),
        "training.json": _json(numbers),
    }
    specs = AbstractDecoder(model_config(), jnp.dtype(jnp.bfloat16)).specs
    save_store(out, served(params), specs, HF_CONFIG, files, name="millrace/embedded")
    print(_json(numbers).decode())


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def main(argv: list[str]) -> None:
    del argv
    train(FLAGS.steps, FLAGS.batch, FLAGS.length, FLAGS.learning_rate, FLAGS.seed, Path(FLAGS.out))


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "directory to write the store to", required=True)
    flags.DEFINE_integer("steps", 1800, "optimizer steps; the last fifth sees sequences of twice the length")
    flags.DEFINE_integer("batch", 16, "sequences a step")
    flags.DEFINE_integer("length", 512, "tokens a sequence")
    flags.DEFINE_float("learning_rate", 0.01, "peak rate of Muon; Adam takes a fifth")
    flags.DEFINE_integer("seed", 0, "of the initial weights and the batches")
    app.run(main)
