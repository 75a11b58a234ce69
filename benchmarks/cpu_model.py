"""Makes what cpu_peers.py measures: a model in the form of each peer, once, below one folder.

The large one is a Llama of 1.1B random weights, the small one the model that comes with the project. Each is a Hugging
Face folder first; GGUF files and CTranslate2's folder are made of it by the peers' own tools.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from processes import Process, ProcessEnded
from safetensors.numpy import load_file
from weights_model import FULL, Files, Size, make_model, write_gguf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model's files and how long its prompts may be."""

    name: str
    size: Size
    files: Files
    prefill_lens: tuple[int, ...]

    def gguf(self, format: str) -> Path:
        """llama.cpp's file; bf16 is the one that the others are made of."""
        return self.files.gguf if format == "bf16" else self.files.folder / f"{format}.gguf"

    @property
    def ctranslate2(self) -> Path:
        """CTranslate2's folder."""
        return self.files.folder / "ctranslate2"

    @property
    def token_bytes(self) -> int:
        """Keys and values of a token in 16 bits, in all layers."""
        return 2 * 2 * self.size.num_layers * self.size.num_kv_heads * self.size.head_dim

    @property
    def table_bytes(self) -> int:
        """The embedding in 16 bits, of which a step reads a row for each token; none where the head reads it all."""
        return 0 if self.name == "embedded" else 2 * self.size.vocab_size * self.size.embed_dim


def make_large(folder: Path) -> Model:
    """1.1B random weights."""
    model = Model(name="1.1B", size=FULL, files=Files(folder / "cpu"), prefill_lens=(128, 1024))
    make_model(model.size, model.files)
    write_tokenizer(model.files.checkpoint, model.size.vocab_size)
    return model


def make_embedded(folder: Path) -> Model:
    """The embedded model, exported; its context is 1,024 tokens, prompt and first token together."""
    files = Files(folder / "cpu_embedded")
    if not files.checkpoint.is_dir():
        files.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "millrace.runtime.launch", "export", "embedded", str(files.checkpoint)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    config = json.loads((files.checkpoint / "config.json").read_text())
    size = Size(
        embed_dim=config["hidden_size"], mlp_dim=config["intermediate_size"], num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"], num_kv_heads=config["num_key_value_heads"],
        vocab_size=config["vocab_size"], norm_eps=config["rms_norm_eps"],
        context_len=config["max_position_embeddings"],
    )  # fmt: skip
    if not files.gguf.exists():
        write_gguf(size, load_file(files.weights), files.gguf)
    return Model(name="embedded", size=size, files=files, prefill_lens=(128, 1000))


def write_tokenizer(checkpoint: Path, vocab_size: int) -> None:
    """A word for every token, so that each of a random model's tokens is a text that can be seen."""
    words = ["<unk>", "<s>", "</s>", *(f"w{n}" for n in range(3, vocab_size))]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "decoder": None, "pre_tokenizer": {"type": "Whitespace"},
        "added_tokens": [
            {"id": n, "content": words[n], "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False}
            for n in range(3)
        ],
        "model": {"type": "WordLevel", "vocab": {word: n for n, word in enumerate(words)}, "unk_token": "<unk>"},
    }  # fmt: skip
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>",
    }  # fmt: skip
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", settings)):
        if not (checkpoint / name).exists():
            (checkpoint / name).write_text(json.dumps(content))


def make_peer_files(model: Model, llama_python: str, torch_python: str) -> None:
    """Quantized GGUF files and CTranslate2's folder, by their own tools; who has none is told and left out later."""
    for format in ("q8_0", "q4_0"):
        _make(model.gguf(format), "cpu_llama_cpp.py", llama_python, "quantize", source=model.files.gguf, format=format)
    _make(model.ctranslate2, "cpu_ctranslate2.py", torch_python, "convert", source=model.files.checkpoint)


def _make(path: Path, script: str, python: str, measure: str, *, source: Path, **options: str) -> None:
    if path.exists():
        return
    print(f"Writing {path}", file=sys.stderr, flush=True)
    partial = path.with_name(f"partial-{path.name}")
    try:
        with Process(script, python=python) as process:
            process.ask(measure, source=str(source), destination=str(partial), **options)
    except ProcessEnded as reason:
        print(f"it could not be written: {reason}", file=sys.stderr, flush=True)
    else:
        partial.replace(path)
