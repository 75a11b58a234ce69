"""What a checkpoint itself says about generation: its default SamplingParams and its end-of-sequence ids."""

from collections.abc import Mapping

from ..errors import CheckpointError, InvalidRequestError
from .sampling_params import SamplingParams

_OPTION_OF_KEY = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def default_sampling_params(generation_config: Mapping[str, object]) -> SamplingParams:
    """The params of a request that names none, read from generation_config.json as vLLM reads it.

    The six keys above count, null is absent, other keys are not ours. One step beyond vLLM: an explicit
    `"do_sample": false` is greedy. Raises CheckpointError for values that SamplingParams refuses.
    """
    options = {
        option: generation_config[key]
        for key, option in _OPTION_OF_KEY.items()
        if generation_config.get(key) is not None
    }
    do_sample = generation_config.get("do_sample")
    if do_sample is not None and not isinstance(do_sample, bool):
        raise CheckpointError(f"generation_config.json: do_sample must be true or false, got {do_sample!r}")
    try:
        params = SamplingParams(**options)  # type: ignore[arg-type]  # it checks the types itself
    except InvalidRequestError as error:
        raise CheckpointError(f"generation_config.json: {error}") from error
    return params.replace(temperature=0.0) if do_sample is False else params


def eos_token_ids(
    generation_config: Mapping[str, object], config: Mapping[str, object], tokenizer_eos_id: int | None
) -> tuple[int, ...]:
    """The ids that end a sequence: generation_config.json's (one or a list), else config.json's, else the tokenizer's.

    Raises CheckpointError for anything that is not an id. Ids past the logits are kept: they are never sampled.
    """
    text_config = config.get("text_config")
    sources = [("generation_config.json", generation_config), ("config.json", config)]
    if isinstance(text_config, Mapping):
        sources.append(("config.json: text_config", text_config))
    for name, source in sources:
        value = source.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        for id in ids:
            if isinstance(id, bool) or not isinstance(id, int) or id < 0:
                raise CheckpointError(f"{name}: eos_token_id must be a token id or a list of them, got {value!r}")
        return tuple(dict.fromkeys(ids))
    return () if tokenizer_eos_id is None else (tokenizer_eos_id,)
