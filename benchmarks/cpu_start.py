"""The part of cpu_peers.py about starting: from a new process to its first token, everything in its caches."""

from pathlib import Path
from statistics import median

from processes import FOLDER
from results_log import Results
from startup import first_byte_s, generate_command

PROMPT = range(17, 27)  # ten tokens
LIMIT = 1.5  # times llama.cpp's


def measure_starts(results: Results, checkpoint: Path, gguf: Path, llama_python: str, rounds: int) -> dict[str, float]:
    """Seconds of `millrace generate` in int8 and of llama.cpp with Q8_0, in turns, from process start to first token.

    Both are programs of Python, imports included. The first run of each fills its caches and is not counted.
    """
    folder = checkpoint.parent
    flags = ("--quantization=int8", "--max_tokens=8", "--prompt=" + " ".join(f"w{token}" for token in PROMPT))
    places = (f"--store_cache_dir={folder / 'stores-start'}", f"--compile_cache_dir={folder / 'programs-start'}")
    commands = {"Millrace int8": generate_command(f"--model={checkpoint}", *places, *flags)}
    if Path(llama_python).exists() and gguf.exists():
        program = str(FOLDER / "cpu_llama_start.py")
        commands["llama.cpp int8"] = [llama_python, program, str(gguf), *map(str, PROMPT)]
    runs: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        results.say(f"first tokens, {f'round {number} of {rounds}' if number else 'to fill the caches'}")
        for name, command in list(commands.items()):
            try:
                seconds = first_byte_s(command)
            except SystemExit as reason:
                results.absent("start to first token", name, str(reason))
                del commands[name]
                continue
            results.say(f"{name}: first token after {seconds:.2f} s")
            if number:
                runs[name].append(seconds)
    return {name: median(seconds) for name, seconds in runs.items() if seconds}
