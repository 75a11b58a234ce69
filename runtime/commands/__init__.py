"""The launcher's commands, a module each: `GROUPS` are its flags, `run` its work.

`POSITIONALS`, where a module has it, names the flags that may be given by their place.

A module is imported when its command runs, and none imports jax at its top, so that --help and a wrong flag answer
at once.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from ..flags import Group

if TYPE_CHECKING:
    from ..api import Runtime

OpenRuntime = Callable[[Mapping[str, Any]], "Runtime"]  # from the parsed flags


class CommandModule(Protocol):
    """What a module of this folder holds."""

    GROUPS: Sequence[Group]
    __doc__: str | None

    @staticmethod
    def run(values: Mapping[str, Any], open_runtime: OpenRuntime) -> int:
        """Do the command with the parsed flags; the exit code."""
        ...


@dataclasses.dataclass(frozen=True)
class Command:
    """A command's name is its module's name, with a dash for an underscore."""

    name: str
    summary: str

    def load(self) -> CommandModule:
        """Import the command's module."""
        return cast(CommandModule, importlib.import_module(f".{self.name.replace('-', '_')}", __name__))


COMMANDS = {
    command.name: command
    for command in (
        Command("generate", "complete prompts; text or jsonl on stdout"),
        Command("chat", "talk to a model that has a chat template"),
        Command("plan", "memory and speed of a deployment, before anything is loaded"),
        Command("compile", "compile a deployment's programs for hardware that need not be here"),
        Command("convert", "write a checkpoint as a store, which loads fast and streams"),
        Command("export", "write a store as a Hugging Face checkpoint"),
        Command("eval-quant", "bits per byte and KL of quantized weights and caches, against the plain model"),
        Command("verify-store", "check every byte of a store"),
        Command("cache", "list, verify and remove the stores of checkpoints that were opened"),
        Command("group", "start all processes of a group on this machine, and again when one of them dies"),
        Command("doctor", "say what this machine has, what is wrong, and how to mend it"),
        Command("demo", "stream a few completions of the embedded model"),
    )
}
