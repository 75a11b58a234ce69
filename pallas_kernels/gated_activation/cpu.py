"""Gated activations on x86-64 CPUs, in C++: native/gated_activation*.{h,cc}.

XLA computes exponentials of bfloat16 number by number, and those of few rows on one thread.
"""

from typing import Any

import jax
import jax.ffi

from .. import native
from . import reference
from .contract import Activation, GatedActivationProblem

ACTIVATIONS = ("silu", "gelu_tanh")


def unsupported(problem: GatedActivationProblem) -> str | None:
    """Why these kernels cannot serve a problem."""
    if problem.platform != "cpu":
        return f"it is made for CPUs, not for {problem.platform}"
    if problem.is_partitioned:
        return "XLA splits this over devices, and would gather its operands for a call"
    if problem.activation not in ACTIVATIONS or problem.dtype not in ("float32", "bfloat16", "float16"):
        return f"{problem.activation} of {problem.dtype} is left to XLA"
    return native.unavailable()


def gated_activation(
    gate: jax.Array, up: jax.Array, *, activation: Activation, instruction_set: str | None = None
) -> jax.Array:
    """See the contract; `instruction_set` is the best there is unless it is named. Gradients are the reference's."""
    name = instruction_set or native.library().instruction_sets[0]

    @jax.custom_vjp
    def run(gate: jax.Array, up: jax.Array) -> jax.Array:
        shape = jax.ShapeDtypeStruct(gate.shape, gate.dtype)
        call = jax.ffi.ffi_call("millrace_gated_activation", shape, vmap_method="broadcast_all")
        output: jax.Array = call(gate, up, activation=activation, instruction_set=name)
        return output

    def forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, Any]:
        return run(gate, up), (gate, up)

    def backward(saved: Any, push: jax.Array) -> Any:
        return jax.vjp(lambda *x: reference.gated_activation(*x, activation=activation), *saved)[1](push)

    run.defvjp(forward, backward)
    output: jax.Array = run(gate, up)
    return output
