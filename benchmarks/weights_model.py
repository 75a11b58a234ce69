"""Makes the model that weights.py measures: a Llama of random bf16 weights, for Millrace and for llama.cpp.

Every weight is drawn once and written twice: as a Hugging Face directory without a tokenizer, and as a GGUF file with
the same under llama.cpp's names. Making them takes a little more memory than the model's size.
"""

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

GGUF_NAMES = (
    (r"model\.embed_tokens", "token_embd"),
    (r"model\.norm", "output_norm"),
    (r"lm_head", "output"),
    (r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj", r"blk.\1.attn_\2"),
    (r"model\.layers\.(\d+)\.self_attn\.o_proj", r"blk.\1.attn_output"),
    (r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj", r"blk.\1.ffn_\2"),
    (r"model\.layers\.(\d+)\.input_layernorm", r"blk.\1.attn_norm"),
    (r"model\.layers\.(\d+)\.post_attention_layernorm", r"blk.\1.ffn_norm"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """What a Llama's size is made of."""

    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    norm_eps: float = 1e-5
    context_len: int = 2048

    @property
    def head_dim(self) -> int:
        """Of queries, keys and values."""
        return self.embed_dim // self.num_heads

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor under its Hugging Face name, linear weights [out, in]."""
        kv_dim = self.num_kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab_size, self.embed_dim)
        for layer in (f"model.layers.{n}" for n in range(self.num_layers)):
            yield f"{layer}.input_layernorm.weight", (self.embed_dim,)
            for name, out_dim in (("q", self.embed_dim), ("k", kv_dim), ("v", kv_dim), ("o", self.embed_dim)):
                yield f"{layer}.self_attn.{name}_proj.weight", (out_dim, self.embed_dim)
            yield f"{layer}.post_attention_layernorm.weight", (self.embed_dim,)
            yield f"{layer}.mlp.gate_proj.weight", (self.mlp_dim, self.embed_dim)
            yield f"{layer}.mlp.up_proj.weight", (self.mlp_dim, self.embed_dim)
            yield f"{layer}.mlp.down_proj.weight", (self.embed_dim, self.mlp_dim)
        yield "model.norm.weight", (self.embed_dim,)
        yield "lm_head.weight", (self.vocab_size, self.embed_dim)

    def config(self) -> dict[str, object]:
        """The config.json of the checkpoint."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
            "hidden_size": self.embed_dim, "intermediate_size": self.mlp_dim, "vocab_size": self.vocab_size,
            "num_hidden_layers": self.num_layers, "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads, "max_position_embeddings": self.context_len,
            "rms_norm_eps": self.norm_eps, "rope_theta": 10_000.0, "tie_word_embeddings": False,
            "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip


FULL = Size(embed_dim=2048, mlp_dim=5632, num_layers=22, num_heads=32, num_kv_heads=4, vocab_size=32_000)
QUICK = Size(embed_dim=1024, mlp_dim=2816, num_layers=12, num_heads=16, num_kv_heads=2, vocab_size=16_000)


@dataclasses.dataclass(frozen=True)
class Files:
    """Where the model lies, in each of its forms."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        """A Hugging Face directory."""
        return self.folder / "checkpoint"

    @property
    def weights(self) -> Path:
        """The checkpoint's one file of weights."""
        return self.checkpoint / "model.safetensors"

    @property
    def gguf(self) -> Path:
        """llama.cpp's."""
        return self.folder / "model.gguf"

    @property
    def store(self) -> Path:
        """Millrace's."""
        return self.folder / "store"

    @property
    def cold_store(self) -> Path:
        """A copy of it for those who read past the page cache, which may put its files out of it."""
        return self.folder / "cold_store"


def make_model(size: Size, files: Files) -> None:
    """Write the checkpoint and the GGUF file, if they are not there yet; an interrupted run leaves neither."""
    if files.checkpoint.is_dir():
        return
    partial = Files(files.folder / "partial")
    shutil.rmtree(partial.folder, ignore_errors=True)
    partial.checkpoint.mkdir(parents=True)
    tensors = draw_tensors(size)
    (partial.checkpoint / "config.json").write_text(json.dumps(size.config(), indent=1))
    print(f"Writing {files.weights}", file=sys.stderr, flush=True)
    save_file(tensors, partial.weights, metadata={"format": "pt"})
    print(f"Writing {files.gguf}", file=sys.stderr, flush=True)
    write_gguf(size, tensors, partial.gguf)
    partial.gguf.replace(files.gguf)
    partial.checkpoint.rename(files.checkpoint)
    partial.folder.rmdir()


def draw_tensors(size: Size) -> dict[str, np.ndarray]:
    """Matrices of small normal numbers and norms of one, the same every time."""
    rng = np.random.default_rng(0)
    return {
        name: (np.ones(shape) if len(shape) == 1 else 0.02 * rng.standard_normal(shape, np.float32)).astype(
            ml_dtypes.bfloat16
        )
        for name, shape in tqdm(list(size.shapes()), desc="Drawing weights", unit="tensor")
    }


def write_gguf(size: Size, tensors: dict[str, np.ndarray], path: Path) -> None:
    """The same weights for llama.cpp: matrices in bf16, norms in float32 as it wants them, and no vocabulary."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(size.vocab_size)
    writer.add_context_length(size.context_len)
    writer.add_embedding_length(size.embed_dim)
    writer.add_feed_forward_length(size.mlp_dim)
    writer.add_block_count(size.num_layers)
    writer.add_head_count(size.num_heads)
    writer.add_head_count_kv(size.num_kv_heads)
    writer.add_rope_dimension_count(size.head_dim)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(size.norm_eps)
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            writer.add_tensor(gguf_name(name), tensor.astype(np.float32))
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = interleave_rotated(tensor, size.head_dim)
        writer.add_tensor(gguf_name(name), tensor.view(np.uint8), raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave_rotated(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head as llama.cpp wants them: what rope turns together side by side, not half a head apart."""
    halves = weight.reshape(-1, 2, head_dim // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    stem = name.removesuffix(".weight")
    return next(re.sub(ours, theirs, stem) for ours, theirs in GGUF_NAMES if re.fullmatch(ours, stem)) + ".weight"
