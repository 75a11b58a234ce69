"""A rack on this machine: 18 processes of 4 virtual CPU devices each, one mesh of 72, generate together.

    python benchmarks/rack_demo.py [processes]

The devices' programs are compiled once, in process 0, and found by the others in a folder that is removed afterwards.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time

from millrace.runtime.supervisor import free_port

DEVICES = 4
PATIENCE_S = 170
PROMPTS = ("def fibonacci(n):", "import numpy as np", "class Stack:", "for line in open(path):")


def command(number: int, num_processes: int, port: int, cache: str) -> list[str]:
    flags = [
        "--model=embedded", f"--mesh=data={num_processes * DEVICES}", "--num_slots=1", "--max_step_tokens=16",
        "--max_context_len=48", "--max_tokens=16", "--temperature=0", "--no-progress",
        f"--compile_cache_dir={cache}", f"--num_processes={num_processes}", f"--process_id={number}",
        f"--coordinator_address=127.0.0.1:{port}", "--format=text", *(f"--prompt={prompt}" for prompt in PROMPTS),
    ]  # fmt: skip
    return [sys.executable, "-m", "millrace.runtime.launch", "generate", *flags]


def main(num_processes: int = 18) -> int:
    """The first exit code that is not 0."""
    started_s = time.monotonic()
    print(f"{num_processes} processes x {DEVICES} devices = a mesh of {num_processes * DEVICES}", flush=True)
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(DEVICES), "JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory(prefix="millrace-rack-") as cache:
        port = free_port()
        processes = []
        for number in range(num_processes):
            quiet = {} if number == 0 else {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
            argv = command(number, num_processes, port, cache)
            processes.append(subprocess.Popen(argv, stdin=subprocess.DEVNULL, env=environment, text=True, **quiet))
        watch = threading.Thread(target=report, args=(processes[1:], started_s), daemon=True)
        watch.start()
        try:
            codes = [process.wait(max(1, PATIENCE_S - (time.monotonic() - started_s))) for process in processes]
        except subprocess.TimeoutExpired:
            codes = [1]
        finally:
            for process in processes:
                process.kill()
    seconds = time.monotonic() - started_s
    print(f"exit codes {sorted(set(codes))} of {len(codes)} processes after {seconds:.0f} s", flush=True)
    return next((code for code in codes if code), 0)


def report(followers: list[subprocess.Popen[str]], started_s: float) -> None:
    """Say how many processes are ready, as they are."""
    for count, process in enumerate(followers, start=2):
        assert process.stderr
        line = process.stderr.readline().strip()
        print(f"[{time.monotonic() - started_s:4.0f} s] {count} processes are here: {line}", file=sys.stderr)
        threading.Thread(target=process.stderr.read, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
