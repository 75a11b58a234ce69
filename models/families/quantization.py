"""What config.json's quantization_config says: the one source of truth for the formats of a model's weights.

A method, by its quant_method, is a reader. That of stores, "millrace", gives a `Rule`, the format of each projection;
that of GGUF files, "gguf", does so too (`gguf.formats`); those of published checkpoints (`published`) give a `Scheme`,
which knows their tensors besides.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ...errors import ConfigError, UnsupportedModelError
from ...pallas_kernels.quantized_matmul import FORMATS, WeightFormat
from ..quantization import Rule, named_format, uniformly
from .gguf import formats as gguf_formats
from .published import PUBLISHED
from .published.scheme import Scheme
from .reader import ConfigReader

KEY = "quantization_config"
METHOD = "millrace"
CALIBRATION = "calibration"  # what rounding was fitted to, if it was: it changes how nothing is read


def read_millrace(reader: ConfigReader) -> Rule:
    """{"quant_method": "millrace", "format": NAME, "group_size": N or null}: all projections alike."""
    reader.ignore(CALIBRATION)
    name = reader.choice("format", {name: name for name in FORMATS})
    try:
        return uniformly(named_format(name, reader.optional_integer("group_size")))
    except ConfigError as error:
        raise UnsupportedModelError(f"{reader.where}: {error}") from error


_RULES: Mapping[str, Callable[[ConfigReader], Rule]] = {METHOD: read_millrace, gguf_formats.METHOD: gguf_formats.read}


def read_quantization(config: Mapping[str, Any], dtype: str) -> Rule | Scheme | None:
    """What a config.json of a model in `dtype` says; None if its weights are plain.

    Raises:
      UnsupportedModelError: the method, or a value or key of it, is not implemented.
    """
    if config.get(KEY) is None:
        return None
    whole = ConfigReader({KEY: config[KEY]}, {})
    method = whole.section(KEY, {}).choice("quant_method", {name: name for name in (*_RULES, *PUBLISHED)})
    defaults, read = PUBLISHED.get(method, ({}, None))
    reader = ConfigReader({KEY: config[KEY]}, {}).section(KEY, defaults)
    reader.ignore("quant_method")
    found = _RULES[method](reader) if read is None else read(reader, dtype)
    reader.finish()
    return found


def wanted_format(config: Mapping[str, Any], name: str | None, group: int | None, where: str) -> WeightFormat | None:
    """The format that the plain weights of a config.json are to be made; None if they stay as they are.

    Raises:
      ConfigError: there is no such format, or the weights are quantized otherwise; `where` names them.
    """
    if name is None:
        return None
    format, found = named_format(name, group), config.get(KEY)
    if found is None:
        return format
    is_same = isinstance(found, Mapping) and (found.get("quant_method"), found.get("format")) == (METHOD, name)
    if is_same and group in (None, found.get("group_size")):
        return None
    raise ConfigError(
        f"{where}: expected plain weights to quantize as {name}; they are quantized already: {dict(found)!r:.200}. "
        "Leave quantization out, or take the unquantized checkpoint."
    )


def quantization_config(format: WeightFormat) -> dict[str, Any]:
    """What `read_millrace` reads, for a store whose projections were all made this format."""
    return {"quant_method": METHOD, "format": format.name, "group_size": format.group}
