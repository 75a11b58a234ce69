"""What others' kernels take on this GPU for the problems of kernel_cases.py: torch's, or those behind jax.

    python benchmarks/gpu/peers.py --library=torch      # cuBLASLt, cuDNN and FlashAttention through torch
    python benchmarks/gpu/peers.py --library=jax        # cuDNN through jax.nn.dot_product_attention, a plain dot

Attention gets contiguous keys and values, which is easier than pages. One library a process: each takes the memory.
"""

import argparse
import functools
import importlib
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from report import report, report_gpu

ROWS = (16, 64, 256, 1024, 4096)
WEIGHTS = {"70b_gate": (28672, 8192), "70b_down": (8192, 28672)}  # [out, in], as in kernel_cases
# Batch, queries, keys; heads 64 / 8 of 128.
ATTENTION = {
    "prefill 4k": (1, 4096, 4096),
    "prefill 16k": (1, 16384, 16384),
    "decode 256 x 2k": (256, 1, 2048),
    "decode 4 x 64k": (4, 1, 65536),
}
_CALLS, _ROUNDS = 10, 5


def torch_rows() -> Iterator[dict[str, Any]]:
    torch: Any = importlib.import_module("torch")
    x = torch.ones(2**29, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(x)
    seconds = _torch_seconds(torch, functools.partial(out.copy_, x))
    yield {"peer": "torch copy", "case": "1 GiB", "us": 1e6 * seconds, "tbytes_per_s": 2 * x.nbytes / seconds / 1e12}
    yield from _torch_matmuls(torch)
    yield from _torch_attention(torch)


def _torch_matmuls(torch: Any) -> Iterator[dict[str, Any]]:
    for name, (out_dim, in_dim) in WEIGHTS.items():
        weight = torch.randn(out_dim, in_dim, dtype=torch.bfloat16, device="cuda") * in_dim**-0.5
        weight8 = (weight * 16).to(torch.float8_e4m3fn)
        for rows in ROWS:
            x = torch.randn(rows, in_dim, dtype=torch.bfloat16, device="cuda")
            x8 = x.to(torch.float8_e4m3fn)

            def scaled(*shapes: tuple[int, ...], x8: Any = x8, weight8: Any = weight8) -> Any:
                scale_a, scale_b = (torch.ones(shape, device="cuda") for shape in shapes)
                return functools.partial(
                    torch._scaled_mm, x8, weight8.T, scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16,
                    use_fast_accum=True,
                )  # fmt: skip

            calls = {
                "torch bf16": functools.partial(torch.mm, x, weight.T),
                "torch fp8, a scale for each tensor": scaled((), ()),
                "torch fp8, a scale for each row": scaled((rows, 1), (1, out_dim)),
            }
            for peer, call in calls.items():
                seconds_of = functools.partial(_torch_seconds, torch, call)
                yield _row(peer, f"{name} M={rows}", seconds_of, 2 * rows * out_dim * in_dim)


def _torch_attention(torch: Any) -> Iterator[dict[str, Any]]:
    attention = importlib.import_module("torch.nn.attention")
    sdpa = torch.nn.functional.scaled_dot_product_attention
    for case, (batch, queries, keys) in ATTENTION.items():
        shapes = ((batch, 64, queries, 128), (batch, 8, keys, 128), (batch, 8, keys, 128))
        q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes)
        for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION"):
            with attention.sdpa_kernel(getattr(attention.SDPBackend, backend)):
                call = functools.partial(sdpa, q, k, v, is_causal=queries > 1, enable_gqa=True)
                seconds_of = functools.partial(_torch_seconds, torch, call)
                yield _row(f"torch {backend.lower()}", case, seconds_of, _attention_flops(case))


def _torch_seconds(torch: Any, call: Callable[[], Any]) -> float:
    """The median over rounds of calls one after the other, by the device's clock."""
    call()
    times = []
    for _ in range(_ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(_CALLS):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / _CALLS)
    return statistics.median(times)


def jax_rows() -> Iterator[dict[str, Any]]:
    import jax
    import jax.numpy as jnp
    from timing import time_call

    def seconds(call: Callable[..., Any], *arguments: Any) -> float:
        return time_call(call, arguments).seconds

    key = jax.random.key(0)
    for case, (batch, queries, keys) in ATTENTION.items():
        q = jax.random.normal(key, (batch, queries, 64, 128), jnp.bfloat16)
        k = v = jax.random.normal(key, (batch, keys, 8, 128), jnp.bfloat16)
        cudnn = functools.partial(jax.nn.dot_product_attention, is_causal=queries > 1, implementation="cudnn")
        yield _row("jax cudnn", case, functools.partial(seconds, cudnn, q, k, v), _attention_flops(case))
    for name, (out_dim, in_dim) in WEIGHTS.items():
        weight = jax.random.normal(key, (out_dim, in_dim), jnp.bfloat16)
        for rows in ROWS:
            x = jax.random.normal(key, (rows, in_dim), jnp.bfloat16)
            dot = functools.partial(seconds, lambda x, w: x @ w.T, x, weight)
            yield _row("jax dot bf16", f"{name} M={rows}", dot, 2 * rows * out_dim * in_dim)


def _attention_flops(case: str) -> float:
    batch, queries, keys = ATTENTION[case]
    pairs = queries * (queries + 1) / 2 if queries > 1 else keys
    return 4.0 * batch * pairs * 64 * 128


def _row(peer: str, case: str, seconds_of: Callable[[], float], flops: float) -> dict[str, Any]:
    """What a peer took, or why it would not."""
    try:
        seconds = seconds_of()
    except Exception as error:
        return {"peer": peer, "case": case, "us": "-", "error": f"{type(error).__name__}: {str(error)[:160]}"}
    return {"peer": peer, "case": case, "us": 1e6 * seconds, "tflops": flops / seconds / 1e12}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=("torch", "jax"), required=True)
    library = parser.parse_args().library
    if library == "torch":
        try:
            has_gpu = importlib.import_module("torch").cuda.is_available()
        except ImportError as error:
            print(f"torch is not here, so its kernels are not measured: {error}", file=sys.stderr)
            return 0
        if not has_gpu:
            print("torch finds no GPU", file=sys.stderr)
            return 0
    rows = []
    for row in torch_rows() if library == "torch" else jax_rows():
        print(row, file=sys.stderr, flush=True)
        rows.append({"peer": "", "case": "", "us": "-", "tflops": "-", "tbytes_per_s": "-", "error": ""} | row)
    (report if library == "torch" else report_gpu)(f"gpu_peers_{library}", rows, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
