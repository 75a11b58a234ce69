"""GGUF files in Millrace beside llama.cpp: how far the predictions of one and the same file are apart.

    python benchmarks/gguf_parity.py [--peers=DIR] [--tokens=N] [FILE.gguf ...]

Without files: the committed ones of every type, and a fresh random model of every architecture, whose tokenizer is
compared as well. Prints KL(Millrace || llama.cpp), the mean over tokens, in nats; ends with 1 if one is 0.01 or more,
or a text is tokenized otherwise.
Activations are in float32 here, and what llama.cpp makes of them there (it quantizes them beside quantized weights).
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from processes import Process, ProcessEnded

from millrace import RuntimeConfig
from millrace.runtime.model_source import open_model
from millrace.runtime.quant_eval import all_logprobs
from millrace.sharding.mesh import make_mesh

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"
LIMIT = 0.01  # nats
TEXTS = (
    "The rain in Spain.",
    "  two  spaces\n\n\ttabs 12345 it's",
    "naïve 日本語 🙂 <|im_end|>x",
    "don't DON'T HTTPServer/2",
)


def kl_of(process: Process, path: Path, num_tokens: int, folder: Path) -> tuple[float, float]:
    """The mean KL of a token, and the greatest difference of the likeliest token's log probability."""
    source = open_model(str(path), None)
    tokens = np.random.default_rng(1).integers(3, min(source.config.vocab_size, 260), num_tokens)
    ours = all_logprobs(source, RuntimeConfig(model=str(path), dtype="float32"), make_mesh(), tokens).astype(np.float64)
    place = folder / "logits.npy"
    process.ask("logits", path=str(path), tokens=tokens.tolist(), place=str(place))
    logits = np.load(place).astype(np.float64)
    theirs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    theirs -= logits.max(-1, keepdims=True)
    best = ours.argmax(-1)[:, None]
    gap = np.abs(np.take_along_axis(ours - theirs, best, -1)).max()
    return float((np.exp(ours) * (ours - theirs)).sum(-1).mean()), float(gap)


def unlike_texts(process: Process, path: Path) -> list[str]:
    """The texts that the two tokenize differently."""
    tokenizer = open_model(str(path), None).tokenizer
    assert tokenizer is not None
    theirs = process.ask("tokenize", path=str(path), texts=TEXTS)["ids"]
    return [text for text, ids in zip(TEXTS, theirs, strict=True) if tokenizer.encode(text) != ids]


def fresh_models(folder: Path) -> list[Path]:
    """A random model of every architecture."""
    sys.path.insert(0, str(FIXTURES))
    import gguf_files

    made = []
    for name in gguf_files.MODELS:
        config = gguf_files.model_config(name)
        made.append(gguf_files.write_gguf(folder / f"{name}.gguf", name, config, gguf_files.random_tensors(config)))
    return made


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", type=Path, default=Path("build/peers"))
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("files", type=Path, nargs="*")
    options = parser.parse_args()
    is_unlike = False
    try:
        with (
            tempfile.TemporaryDirectory() as scratch,
            Process("gguf_llama_cpp.py", python=str(options.peers / "bin" / "python")) as process,
        ):
            folder = Path(scratch)
            files = options.files or [*sorted((FIXTURES / "gguf").glob("*.gguf")), *fresh_models(folder)]
            print(f"{'file':32} {'KL, nats':>10} {'best token':>11}  tokenizer")
            for path in files:
                kl, gap = kl_of(process, path, options.tokens, folder)
                unlike = unlike_texts(process, path)
                is_unlike |= not kl < LIMIT or bool(unlike)
                print(
                    f"{path.name:32} {kl:10.2e} {gap:11.2e}  {f'unlike: {unlike}' if unlike else 'alike'}", flush=True
                )
    except ProcessEnded as reason:
        print(f"llama.cpp {reason}", file=sys.stderr)
        return 2
    return int(is_unlike)


if __name__ == "__main__":
    raise SystemExit(main())
