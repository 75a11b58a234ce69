"""From a deployment's name and `path=value` texts to a RuntimeConfig, each value checked against its option's type."""

import dataclasses
import importlib
import pkgutil
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import configs
from ..errors import ConfigError
from .config import PLAIN, RuntimeConfig
from .flags import RUNTIME, given
from .spelling import nearest


def load_config(name: str) -> RuntimeConfig:
    """What `get_config()` of configs/NAME.py returns."""
    known = [module.name for module in pkgutil.iter_modules(configs.__path__)]
    if name not in known:
        raise ConfigError(f"--config={name} is not in configs/: {nearest(name, known)}")
    module = importlib.import_module(f"{configs.__name__}.{name}")
    config = module.get_config()
    if not isinstance(config, RuntimeConfig):
        raise ConfigError(f"configs/{name}.py: get_config() must return a RuntimeConfig, not {type(config).__name__}")
    return config


def override(config: RuntimeConfig, settings: Sequence[str]) -> RuntimeConfig:
    """A new config with every `path=value` applied in order, and validated once, with all of them.

    A path is an option of RuntimeConfig, or `option.key` where the option is a table: mesh.tensor=4.
    """
    hints = typing.get_type_hints(RuntimeConfig)
    changes: dict[str, Any] = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        name, dot, key = path.partition(".")
        if not equals:
            raise ConfigError(f"--set={setting}: expected path=value, as in --set num_slots=8")
        if name not in hints:
            raise ConfigError(f"unknown option {name} in --set={setting}: {nearest(name, hints)}")
        if dot:
            before = changes.get(name, getattr(config, name))
            changes[name] = _with_key(before, key, text, hints[name], path)
        else:
            changes[name] = _value(text, hints[name], path)
    return dataclasses.replace(config, **changes)


def _with_key(table: Any, key: str, text: str, hint: Any, path: str) -> tuple[tuple[str, Any], ...]:
    """`table`, a tuple of (key, value) pairs, with one pair changed or added."""
    kind = _pair_type(hint)
    if kind is None:
        raise ConfigError(f"{path}: {path.partition('.')[0]} is not a table, so it has no key {key!r}")
    return tuple({**dict(table or ()), key: _scalar(text, kind, path)}.items())


def _value(text: str, hint: Any, path: str) -> Any:
    """`text` as the type that the option is annotated with; "none" where the option may be None.

    But quantization=none is a choice of its own, that of plain weights.
    """
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in options and text.lower() == "none":
        return PLAIN if path == "quantization" else None
    kind = _pair_type(hint)
    if kind is None:
        return _scalar(text, next(option for option in options if option is not type(None)), path)
    # A colon reads better behind a flag's own equals sign: --kernels=paged_attention:hopper.
    pairs = [item.partition("=" if "=" in item else ":") for item in text.split(",") if item]
    if not all(key and sign for key, sign, _ in pairs):
        raise ConfigError(f"{path}={text}: expected key=value pairs with commas between them, as in data=1,tensor=2")
    if len({key for key, _, _ in pairs}) < len(pairs):
        raise ConfigError(f"{path}={text}: a key is named twice")
    return tuple((key, _scalar(value, kind, f"{path}.{key}")) for key, _, value in pairs)


def _pair_type(hint: Any) -> type | None:
    """X where the hint is tuple[tuple[str, X], ...] or that or None; otherwise None."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if typing.get_origin(option) is tuple:
            pair: type = typing.get_args(typing.get_args(option)[0])[1]
            return pair
    return None


def _switch(text: str) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.lower()]


_SCALARS: dict[type, tuple[Callable[[str], Any], str]] = {
    bool: (_switch, "true or false"),
    int: (int, "an integer"),
    float: (float, "a number"),
    str: (str, "a text"),
}


def _scalar(text: str, kind: type, path: str) -> Any:
    parse, expected = _SCALARS[kind]
    try:
        return parse(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{path}={text}: expected {expected}") from None


def resolve(values: Mapping[str, Any]) -> RuntimeConfig:
    """The config of one launch: configs/NAME.py or the defaults, then the flags, then every --set, in that order."""
    config = load_config(values["config"]) if values["config"] else RuntimeConfig()
    launcher_only = ("config", "set", "log_level")
    chosen = {name: value for name, value in given(RUNTIME, values).items() if name not in launcher_only}
    chosen.setdefault("progress", config.progress and sys.stderr.isatty())
    return override(config, [*(f"{name}={value}" for name, value in chosen.items()), *(values["set"] or ())])
