"""A rack on this machine: 18 processes of 4 virtual CPU devices each, one mesh of 72, generate together.

    python benchmarks/rack_demo.py [processes]

Every process compiles its own programs, for XLA's cache on a CPU knows the process; with the least optimization, and
forked from one that has imported jax, which 2 cores would be busy with for a minute otherwise.
"""

import contextlib
import multiprocessing
import os
import sys
import time

NUM_DEVICES = 4  # of a process
PATIENCE_S = 175
PROMPTS = ("def fibonacci(n):", "import numpy as np", "class Stack:", "for line in open(path):")
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(NUM_DEVICES),
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
}


def member(number: int, num_processes: int, port: int) -> None:
    """One process of the group, as `millrace generate` on the command line."""
    from millrace.runtime.launch import main as millrace

    flags = [
        "--model=embedded", "--dtype=bfloat16", f"--mesh=data={num_processes * NUM_DEVICES}", "--num_slots=1",
        "--max_step_tokens=16", "--max_context_len=48", "--max_tokens=16", "--temperature=0", "--no-progress",
        "--compile_cache_dir=",
        f"--num_processes={num_processes}", f"--process_id={number}", f"--coordinator_address=127.0.0.1:{port}",
        *(f"--prompt={prompt}" for prompt in PROMPTS),
    ]  # fmt: skip
    sys.exit(millrace(["generate", *flags]))


def main(num_processes: int = 18) -> int:
    """The first exit code that is not 0."""
    started_s = time.monotonic()
    print(f"{num_processes} processes x {NUM_DEVICES} devices = a mesh of {num_processes * NUM_DEVICES}", flush=True)
    os.environ.update(ENVIRONMENT)
    from millrace.runtime.supervisor import free_port

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["millrace.runtime.api", "millrace.runtime.launch"])
    port = free_port()
    processes = [context.Process(target=member, args=(number, num_processes, port)) for number in range(num_processes)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0, PATIENCE_S - (time.monotonic() - started_s)))
    finally:
        codes = [process.exitcode for process in processes]
        for process in processes:
            with contextlib.suppress(AttributeError):  # it never started
                process.kill()
    print(f"exit codes {codes} after {time.monotonic() - started_s:.0f} s", flush=True)
    return next((1 for code in codes if code != 0), 0)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
