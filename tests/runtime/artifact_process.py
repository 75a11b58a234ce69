"""A process that may not compile, for test_artifacts.py: it serves as its first argument, JSON, says."""

import json
import sys
from typing import Any

import jax

from millrace import Runtime, SamplingParams


def forbid_compiling(event: str, duration_s: float, **_: Any) -> None:
    """A listener of jax's monitoring."""
    if event == "/jax/core/compile/backend_compile_duration":
        raise AssertionError(f"compiled something in {duration_s} s")


def main() -> None:
    given: dict[str, Any] = json.loads(sys.argv[1])
    jax.config.update("jax_num_cpu_devices", given["num_devices"])
    jax.monitoring.register_event_duration_secs_listener(forbid_compiling)
    with Runtime.from_pretrained(given["model"], **given["options"]) as runtime:
        outputs = runtime.generate(given["prompts"], SamplingParams(**given["params"]), use_tqdm=False)
    print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


if __name__ == "__main__":
    main()
