"""Millrace on a CPU beside llama.cpp, CTranslate2 and transformers: tokens/s, ratios to the best of them, and a plot.

    python benchmarks/cpu_peers.py [--folder=DIR] [--peers=DIR] [--torch_peers=DIR] [--rounds=5] [--quick]
                                   [--entrants=NAMES] [--only=CELLS] [--model=large] [--set NAME=VALUE ...]

The models, a Llama of 1.1B random weights and the embedded one, are made once below --folder in every peer's form.
--peers is a virtual environment with llama-cpp-python, --torch_peers one with ctranslate2, transformers and torch.
Every peer at every precision has a process of its own, which stays and idles between its turns; each round visits all
of them for each cell, and numbers are medians over the rounds. These narrow it, and then it is only shown:
    --entrants=millrace-int8,llama.cpp    names, precisions, or both
    --only=decode1,prefill                cells, or "start": the time to the first token
    --set num_slots=64                    Millrace's options, as for the launcher
The whole writes benchmarks/results/cpu.json and cpu.png.
"""

import argparse
import contextlib
import dataclasses
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from cpu_cells import OURS, Cell, Entrant, parse_cells, parse_entrants
from cpu_model import Model, make_embedded, make_large, make_peer_files
from cpu_report import Findings, markdown, plot, show_findings
from cpu_start import measure_starts
from machine_limits import MachineLimits
from processes import Process, ProcessEnded, busy_s, cpu_s
from report import write
from results_log import Results

MODELS = {"large": make_large, "embedded": make_embedded}
BATCHES = (1, 8, 32, 64)
PROMPT_LEN = 128  # of the steps' sequences
SLOT_LEN = 192  # tokens that a sequence of the steps has room for
STEPS = {1: 32, 8: 24, 32: 16, 64: 16}  # timed in a turn
PATIENCE_S = 1200.0
PEERS = {
    "llama.cpp": {"int4": "q4_0", "int8": "q8_0", "bf16": "bf16"},
    "CTranslate2": {"int8": "int8"},
    "transformers": {"bf16": "bf16"},
}
# With 4-bit weights activations are rounded to int8 in groups, as llama.cpp does beside Q4_0.
FORMATS = {"int4": "int4_a8", "int8": "int8", "bf16": "none"}
ENTRANTS = [
    *(Entrant(OURS, precision) for precision in FORMATS),
    *(Entrant(name, precision) for name, formats in PEERS.items() for precision in formats),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """How this run measures."""

    folder: Path
    peers: Path
    torch_peers: Path
    rounds: int
    is_quick: bool
    overrides: list[str]  # of RuntimeConfig: NAME=VALUE

    @property
    def num_threads(self) -> int:
        """As many as there are cores."""
        return len(os.sched_getaffinity(0))

    def python(self, entrant: Entrant) -> str:
        """Of the environment that has it."""
        if entrant.name == OURS:
            return sys.executable
        return str((self.peers if entrant.name == "llama.cpp" else self.torch_peers) / "bin" / "python")


def opening(setting: Setting, model: Model, entrant: Entrant) -> tuple[str, dict[str, Any]]:
    """The script of an entrant and what it is opened with."""
    threads = {"num_threads": setting.num_threads}
    longest = max(model.prefill_lens)
    if entrant.name == "llama.cpp":
        path = model.gguf(PEERS[entrant.name][entrant.precision])
        room = {"num_slots": max(BATCHES), "slot_len": SLOT_LEN, "max_prompt_len": longest + 1}
        return "cpu_llama_cpp.py", {"path": str(path), **room, **threads}
    if entrant.name == "CTranslate2":
        return "cpu_ctranslate2.py", {"path": str(model.ctranslate2), **threads}
    if entrant.name == "transformers":
        return "cpu_transformers.py", {"path": str(model.files.checkpoint), **threads}
    # Room for the steps' sequences, whose prompts are to stay, and for some rounds of prompts beside them.
    tokens = max(BATCHES) * SLOT_LEN + 4 * longest
    return "cpu_millrace.py", {
        "model": str(model.files.checkpoint),
        "dtype": "bfloat16",
        "quantization": FORMATS[entrant.precision],
        "num_slots": max(BATCHES),
        "max_context_len": longest + PROMPT_LEN if model.name != "embedded" else 1024,
        "kv_cache_bytes": tokens * model.token_bytes,
        "store_cache_dir": str(model.files.folder / f"stores-{entrant.precision}"),
        "compile_cache_dir": str(model.files.folder / "programs"),
        "overrides": setting.overrides,
    }


class Entrants:
    """A process for each entrant that can be opened."""

    def __init__(self, results: Results, setting: Setting, model: Model, stack: contextlib.ExitStack) -> None:
        self._results = results
        self.processes: dict[Entrant, Process] = {}
        self.facts: dict[str, str] = {}
        self._open = (setting, model, stack)

    def open(self, entrants: list[Entrant]) -> None:
        """Start them; a peer that cannot is reported as absent, Millrace must."""
        setting, model, stack = self._open
        for entrant in entrants:
            self._results.say(f"opening: {entrant}")
            script, options = opening(setting, model, entrant)
            try:
                process = stack.enter_context(Process(script, python=setting.python(entrant), patience_s=PATIENCE_S))
                answer = process.ask("open", **options)
            except ProcessEnded as reason:
                self._lose(entrant, reason)
                continue
            self.processes[entrant] = process
            self.facts[str(entrant)] = f"{answer['versions']} ({answer['features']})"

    def ask(self, entrant: Entrant, measure: str, **arguments: Any) -> dict[str, Any] | None:
        """An answer, or None from a peer that ended instead."""
        try:
            return self.processes[entrant].ask(measure, **arguments)
        except ProcessEnded as reason:
            self._lose(entrant, reason)
            self.processes.pop(entrant, None)
            return None

    def _lose(self, entrant: Entrant, reason: ProcessEnded) -> None:
        if entrant.name == OURS:
            raise reason
        self._results.absent("entrant", str(entrant), str(reason))


class Turns:
    """Rounds of all entrants over all cells."""

    def __init__(
        self, results: Results, setting: Setting, model: Model, entrants: Entrants, findings: Findings
    ) -> None:
        self._results, self._setting, self._entrants, self._findings = results, setting, entrants, findings
        self._random = random.Random(0)
        self._vocab_size = model.size.vocab_size
        self._prompts = [self._prompt(PROMPT_LEN) for _ in range(max(BATCHES))]

    def _prompt(self, length: int) -> list[int]:
        return [self._random.randrange(5, self._vocab_size) for _ in range(length)]

    def round(self, cells: list[Cell], *, counts: bool) -> None:
        """A turn of every entrant in every cell; each round begins with another."""
        order = list(self._entrants.processes)
        for cell in cells:
            for entrant in order:
                if entrant in self._entrants.processes:
                    self._turn(entrant, cell, counts)
            order = order[1:] + order[:1]

    def _turn(self, entrant: Entrant, cell: Cell, counts: bool) -> None:
        """Ask, and note what others had of the processors meanwhile."""
        before = self._spent_s(entrant)
        if cell.kind == "prefill":
            answer = self._entrants.ask(entrant, "prefill", prompt=self._prompt(cell.size))
        else:
            steps = (8 if self._setting.is_quick else STEPS[cell.size]) if counts else 3
            answer = self._entrants.ask(entrant, "decode", prompts=self._prompts[: cell.size], num_steps=steps)
        if answer is None:
            return
        spent, waiting, own = (after - then for after, then in zip(self._spent_s(entrant), before, strict=True))
        if spent:  # a turn may be over before the clock of processor time ticks
            self._findings.note_shares(idle=waiting / spent, others=max(0.0, 1 - (own + waiting) / spent))
        if counts:
            self._findings.note(entrant, cell, answer)
            speed = cell.tokens_per_s(answer["seconds"])
            self._results.say(f"{cell}, {entrant}: {speed:.4g} tokens/s ({answer['setting'] or 'default'})")

    def _spent_s(self, entrant: Entrant) -> tuple[float, float, float]:
        """Processor seconds of the whole machine, of the waiting entrants, and of the one whose turn it is."""
        processes = self._entrants.processes
        waiting = sum(cpu_s(process.pid) for other, process in processes.items() if other != entrant)
        return busy_s(), waiting, cpu_s(processes[entrant].pid)


def measure_model(
    results: Results, setting: Setting, model: Model, entrants: list[Entrant], cells: list[Cell]
) -> Findings:
    """All rounds; then memory and the time to a first token."""
    findings = Findings(model, MachineLimits(setting.folder, setting.num_threads), PROMPT_LEN)
    with contextlib.ExitStack() as stack:
        running = Entrants(results, setting, model, stack)
        running.open(entrants)
        findings.facts = running.facts
        turns = Turns(results, setting, model, running, findings)
        results.say("a round to warm up and to find each peer's fastest settings")
        turns.round(cells, counts=False)
        for number in range(setting.rounds):
            results.say(f"round {number + 1} of {setting.rounds}")
            findings.note_limits()
            turns.round(cells, counts=True)
        for entrant in list(running.processes):
            measure = "sizes" if entrant.name == OURS else "memory"
            findings.sizes[entrant] = running.ask(entrant, measure) or {}
    return findings


def measure(setting: Setting, options: argparse.Namespace) -> None:
    """Every model that was asked for; what is whole is written."""
    results, all_findings = Results(), []
    entrants = parse_entrants(options.entrants, ENTRANTS)
    llama, torch = (str(folder / "bin" / "python") for folder in (setting.peers, setting.torch_peers))
    for name in MODELS if options.model == "all" else [options.model]:
        model = MODELS[name](setting.folder)
        make_peer_files(model, llama, torch)
        cells = [] if options.only == "start" else parse_cells(options.only, model.prefill_lens, BATCHES)
        findings = measure_model(results, setting, model, entrants if cells else [], cells)
        if name == "large" and options.only in ("all", "start"):
            rounds = setting.rounds
            findings.starts = measure_starts(results, model.files.checkpoint, model.gguf("q8_0"), llama, rounds)
        show_findings(findings)
        all_findings.append(findings)
    if options.write:
        rows = [row for findings in all_findings for row in findings.rows()]
        claims = {
            f"{each.model.name}, {claim}": holds for each in all_findings for claim, holds in each.claims().items()
        }
        write("cpu", rows, claims)
        plot(all_findings, "cpu")
        print("\n" + "\n\n".join(map(markdown, all_findings)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "millrace-benchmark")
    parser.add_argument("--peers", type=Path, default=Path("build/peers"))
    parser.add_argument("--torch_peers", type=Path)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--entrants", default="all")
    parser.add_argument("--only", default="all")
    parser.add_argument("--model", choices=("all", *MODELS), default="all")
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    setting = Setting(
        folder=options.folder.resolve(),
        peers=options.peers,
        torch_peers=options.torch_peers or options.peers,
        rounds=options.rounds or (2 if options.quick else 5),
        is_quick=options.quick,
        overrides=options.set,
    )
    options.write = options.entrants == options.only == options.model == "all" and not (options.quick or options.set)
    try:
        measure(setting, options)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    except ProcessEnded as error:
        raise SystemExit(f"a process {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # every process was ended on the way here


if __name__ == "__main__":
    main()
