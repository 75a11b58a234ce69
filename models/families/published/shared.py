"""What the readers of quantization_config have in common."""

from ....pallas_kernels.quantized_matmul.contract import WeightFormat
from ..reader import ConfigReader

CACHE_SCALES = r".*\.(q|k|v|kv)_scale$"  # tensors
MODULE_LIMIT = 100_000  # names in a list: 94 layers of 128 experts have 36,000 modules


def read_bits(section: ConfigReader, *allowed: int) -> int:
    """The width of a value."""
    bits = section.integer("bits")
    if bits not in allowed:
        raise section.wrong("bits", " or ".join(map(str, allowed)))
    return bits


def read_group(section: ConfigReader) -> int | None:
    """Inputs that share a scale; None for -1, which is all of a row."""
    return None if section.get("group_size") == -1 else section.integer("group_size")


def read_module_list(section: ConfigReader, key: str) -> list[str]:
    """Names of modules; none where the key is absent or null."""
    names = section.get(key) or []
    if not isinstance(names, list) or len(names) > MODULE_LIMIT or not all(isinstance(name, str) for name in names):
        raise section.wrong(key, "a list of names of modules")
    return names


def read_cache_remark(section: ConfigReader) -> str | None:
    """What becomes of a kv_cache_scheme."""
    if section.get("kv_cache_scheme") is None:
        return None
    return "its static scales of keys and values are not used: kv_cache_dtype says how the cache is kept"


def packed_integers(bits: int, group: int | None, dtype: str, *, zeros: bool) -> WeightFormat:
    """4- or 8-bit integers beside activations as they are; scales in what holds all that a tool may have stored."""
    return WeightFormat(
        name="int4" if bits == 4 else "int8_a16",
        storage="uint4" if bits == 4 else "int8",
        group=group,
        scale="float16" if dtype == "float16" and group is not None else "float32",
        zeros=zeros,
    )
