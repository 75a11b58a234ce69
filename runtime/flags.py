"""The launcher's flags, as tables: absl parses them, one FlagValues per command, so that nothing is global."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from absl import flags

from ..errors import ConfigError
from .spelling import nearest

if TYPE_CHECKING:
    from .sampling_params import SamplingParams

Kind = Literal["text", "integer", "number", "switch", "texts", "integers", "integer lists", "bias"]


@dataclasses.dataclass(frozen=True)
class Option:
    """One flag. A default of None leaves the choice to the configuration or the model."""

    name: str
    kind: Kind
    help: str
    default: Any = None
    choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Group:
    """Options that stand under one heading of --help."""

    title: str
    options: tuple[Option, ...]


LOG_LEVEL = Option("log_level", "text", "what is logged on stderr", "warning", ("debug", "info", "warning", "error"))
PROGRESS = Option("progress", "switch", "a progress bar on stderr", True)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(item) for item in text.split(","))


def _bias(text: str) -> dict[int, float]:
    pairs = (item.split(":") for item in text.split(","))
    return {int(token): float(value) for token, value in pairs}


class _Parser(flags.ArgumentParser[Any]):
    """An absl parser out of a function and a description of what it takes."""

    def __init__(self, parse: Callable[[str], Any], expected: str) -> None:
        super().__init__()
        self._parse = parse
        self.syntactic_help = expected

    def parse(self, argument: Any) -> Any:
        try:
            return self._parse(argument)
        except ValueError:
            raise ValueError(f"expected {self.syntactic_help}") from None


_PARSERS: dict[Kind, tuple[Callable[[str], Any], str]] = {
    "integer": (int, "an integer"),
    "number": (float, "a number"),
    "integers": (_integers, "integers with commas between them, as in 1,2,3"),
    "integer lists": (_integers, "integers with commas between them, as in 1,2,3"),
    "bias": (_bias, "pairs of token id and bias, as in 42:-1.5,7:2"),
}

MAX_TOKENS = 256  # SamplingParams' own 16 is too short for a person who reads along

RUNTIME = Group(
    "Runtime (each is an option of RuntimeConfig, as in --set NAME=VALUE)",
    (
        Option("config", "text", "a deployment: loads configs/NAME.py first"),
        Option("set", "texts", "path=value: any option of RuntimeConfig by name, as in --set seed=7; may be repeated"),
        Option("model", "text", "a checkpoint folder, a .gguf file, a store, org/name on the hub, or embedded"),
        Option("revision", "text", "branch, tag or commit of a model on the hub"),
        Option("dtype", "text", "bfloat16, float32 ...; the checkpoint's own by default"),
        Option("quantization", "text", "int8, fp8, int4 ... or none, of plain weights; int8 on a CPU without --dtype"),
        Option("max_context_len", "text", "longest prompt plus completion, in tokens"),
        Option("num_slots", "text", "how many sequences decode together"),
        Option("page_size", "text", "tokens per page of the KV cache"),
        Option("max_step_tokens", "text", "most tokens in one step"),
        Option("kv_cache_bytes", "text", "size of the KV cache"),
        Option("kv_cache_dtype", "text", "dtype of the KV cache: as --dtype by default, fp8 or int8 to halve it"),
        Option("mesh", "text", "axis sizes, as in data=2,tensor=4"),
        Option("target", "text", "hardware that plan and compile assume, as in gb300:1x18x4; this machine by default"),
        Option("artifact", "text", "a folder that millrace compile wrote: its programs are loaded, none is compiled"),
        Option("num_processes", "text", "processes of the group; found by itself under Slurm, Open MPI, Kubernetes"),
        Option("process_id", "text", "number of this process in the group, from 0"),
        Option("coordinator_address", "text", "host:port where process 0 can be reached"),
        Option("prefix_caching", "switch", "share the pages of equal prefixes"),
        Option("max_decode_steps", "text", "most decode steps per dispatch"),
        Option("weights", "text", "where weights are: resident, stream (from disk in every step) or host"),
        Option("weights_memory", "text", "bytes of weights on each device, for stream and host"),
        Option("weights_io", "text", "how a store is read: cached, direct (past the page cache) or auto"),
        Option("store", "switch", "convert a Hugging Face checkpoint into a store when it is first opened"),
        Option("store_cache_dir", "text", "where such stores are kept"),
        Option("compile_cache_dir", "text", "where compiled programs are kept; an empty value turns that off"),
        Option("kernels", "text", "implementations by operation, as in paged_attention:reference"),
        Option("progress", "switch", "progress bars on stderr; on by default where stderr is a terminal"),
        LOG_LEVEL,
    ),
)

SAMPLING = Group(
    "Sampling (each is an option of SamplingParams; what is left out, the model's generation_config.json decides)",
    (
        Option("n", "integer", "completions per prompt"),
        Option("temperature", "number", "0 always takes the likeliest token"),
        Option("top_p", "number", "keep the likeliest tokens up to this probability mass"),
        Option("top_k", "integer", "keep this many of the likeliest tokens; 0 or -1 keeps all"),
        Option("min_p", "number", "keep tokens of at least this share of the likeliest one's probability"),
        Option("presence_penalty", "number", "subtracted from every token that the completion already has"),
        Option("frequency_penalty", "number", "subtracted as often as the completion has the token"),
        Option("repetition_penalty", "number", "divides the logits of tokens in prompt and completion; 1 is off"),
        Option("seed", "integer", "makes sampling repeatable"),
        Option("stop", "texts", "a text that ends the completion; may be repeated"),
        Option("stop_token_ids", "integers", "token ids that end the completion"),
        Option("include_stop_str_in_output", "switch", "leave the stop text in the completion"),
        Option("ignore_eos", "switch", "go on after the end-of-text token"),
        Option("max_tokens", "integer", f"most tokens per completion; {MAX_TOKENS} where the model names none"),
        Option("min_tokens", "integer", "fewest tokens before the end-of-text token or a stop may come"),
        Option("logprobs", "integer", "log-probabilities of this many tokens per position, in jsonl"),
        Option("prompt_logprobs", "integer", "the same for the prompt"),
        Option("logit_bias", "bias", "token ids and what is added to their logits, as in 42:-1.5,7:2"),
        Option("allowed_token_ids", "integers", "the only token ids that may be sampled"),
        Option("bad_words", "texts", "a text that must not be written; may be repeated"),
        Option("skip_special_tokens", "switch", "leave special tokens out of the text"),
        Option("detokenize", "switch", "make text of the tokens"),
        Option(
            "on_weights_update",
            "text",
            "new weights wait until the request has ended (drain), or serve its next step",
            choices=("drain", "immediate"),
        ),
    ),
)


def parse(
    groups: Sequence[Group], argv: Sequence[str], command: str, positionals: Sequence[str] = ()
) -> dict[str, Any]:
    """The value of every option of `groups`; ConfigError names a flag that is unknown or has a wrong value.

    `positionals` are options that may be given by their place; the last takes all that remain if its kind is "texts".
    """
    values = flags.FlagValues()  # type: ignore[no-untyped-call]
    for group in groups:
        for option in group.options:
            _define(option, values)
    try:
        rest = values([command, *_as_absl_negates(argv, groups)])[1:]
    except flags.UnrecognizedFlagError as error:
        raise ConfigError(f"unknown flag --{error.flagname}: {nearest(error.flagname, values, prefix='--')}") from None
    except flags.Error as error:
        raise ConfigError(str(error).split("\n")[0]) from None
    options = {option.name: option for group in groups for option in group.options}
    chosen = {name: values[name].value for name in options}
    for name in positionals:
        if rest and chosen[name] != options[name].default:
            raise ConfigError(f"--{name} is given twice: as a flag, and by its place as {rest[0]!r}")
        if rest and options[name].kind == "texts":
            chosen[name], rest = rest, []
        elif rest:
            chosen[name], *rest = rest
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}: every other input is a flag, as in --prompt={rest[0]!r}")
    return chosen


def _as_absl_negates(argv: Sequence[str], groups: Sequence[Group]) -> Iterator[str]:
    """The arguments with `--no-store` as `--nostore`, for every switch; values and what is behind "--" as they are."""
    is_switch = {option.name: option.kind == "switch" for group in groups for option in group.options}
    arguments = iter(argv)
    for argument in arguments:
        name = argument.removeprefix("--no-")
        yield f"--no{name}" if argument != name and is_switch.get(name) else argument
        if argument == "--":
            yield from arguments
        elif is_switch.get(argument.removeprefix("-").removeprefix("-")) is False and argument.startswith("-"):
            yield from itertools.islice(arguments, 1)


def _define(option: Option, values: flags.FlagValues) -> None:
    """Tell absl about one option."""
    name, default, text = option.name, option.default, option.help
    if option.choices:
        flags.DEFINE_enum(name, default, option.choices, text, flag_values=values)
    elif option.kind == "text":
        flags.DEFINE_string(name, default, text, flag_values=values)
    elif option.kind == "switch":
        flags.DEFINE_boolean(name, default, text, flag_values=values)
    elif option.kind == "texts":
        flags.DEFINE_multi_string(name, default, text, flag_values=values)
    elif option.kind == "integer lists":
        parser, serializer = _Parser(*_PARSERS[option.kind]), flags.ArgumentSerializer[Any]()
        flags.DEFINE_multi(parser, serializer, name, default, text, flag_values=values)
    else:
        flags.DEFINE(_Parser(*_PARSERS[option.kind]), name, default, text, flag_values=values)


_PLACEHOLDERS: dict[Kind, str] = {
    "text": "TEXT",
    "integer": "N",
    "number": "X",
    "texts": "TEXT",
    "integers": "N,N",
    "integer lists": "N,N",
    "bias": "N:X,N:X",
}


def describe(groups: Sequence[Group]) -> str:
    """The lines of --help below a command's summary."""
    lines: list[str] = []
    for group in groups:
        lines += ["", f"{group.title}:"]
        for option in group.options:
            shown = f"--[no]{option.name}" if option.kind == "switch" else f"--{option.name}"
            shown += "" if option.kind == "switch" else f"={'|'.join(option.choices) or _PLACEHOLDERS[option.kind]}"
            default = "" if option.default is None else f" (default: {option.default})"
            separator = "\n" + " " * 34 if len(shown) > 30 else " " * (32 - len(shown))
            lines.append(f"  {shown}{separator}{option.help}{default}")
    return "\n".join(lines)


def given(group: Group, values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `group` that the command line or a default has decided."""
    chosen = {option.name: values[option.name] for option in group.options}
    return {name: value for name, value in chosen.items() if value is not None}


def request_params(values: Mapping[str, Any], base: "SamplingParams") -> "SamplingParams":
    """The model's own sampling params with the command line's on top."""
    changes = given(SAMPLING, values)
    if base.max_tokens == type(base)().max_tokens:
        changes.setdefault("max_tokens", MAX_TOKENS)
    return base.replace(**changes)
