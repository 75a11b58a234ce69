"""A turn: what happens before a plan. Process 0 decides it, and every process of the group does the same."""

import dataclasses
from typing import Any

import google_crc32c
import numpy as np

from .plan import StepPlan
from .request import FinishReason, Request, SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ending:
    """A sequence that ends for a reason that the scheduler does not see: a stop string, a cancellation."""

    arrival: tuple[int, int]
    reason: FinishReason
    stop_reason: int | str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """Requests arrive, sequences end, weights are replaced; then a step is planned, unless this is the last."""

    arrived: tuple[Request, ...] = ()
    ended: tuple[Ending, ...] = ()
    weights: tuple[str, ...] = ()  # stores, one after the other; "" for arrays, which only a process alone can take
    starts_requests: bool = True
    is_last: bool = False
    digest: int | None = None  # of all plans before this turn

    def to_json(self) -> dict[str, Any]:
        """As JSON knows it, without what is at its default."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        if self.arrived:
            given["arrived"] = [_request_to_json(request) for request in self.arrived]
        if self.ended:
            given["ended"] = [dataclasses.astuple(ending) for ending in self.ended]
        return given

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> "Turn":
        """The inverse."""
        arrived = tuple(_request_from_json(request) for request in given.pop("arrived", ()))
        ended = tuple(
            Ending(arrival=(number, index), reason=reason, stop_reason=stop_reason)
            for (number, index), reason, stop_reason in given.pop("ended", ())
        )
        return cls(arrived=arrived, ended=ended, weights=tuple(given.pop("weights", ())), **given)


def plan_digest(plan: StepPlan, before: int) -> int:
    """Of a plan and all before it, quick enough for every step: it finds accidents, not malice."""
    digest = before
    for shard in plan.shards:
        chunks = [(*c.sequence.arrival, c.slot, c.start, c.num_tokens) for c in shard.chunks]
        for array in (shard.slots, shard.positions, shard.budgets, shard.page_tables, np.array(chunks, np.int64)):
            digest = google_crc32c.extend(digest, array.tobytes())
    return int(google_crc32c.extend(digest, plan.num_steps.to_bytes(4)))


def _request_to_json(request: Request) -> dict[str, Any]:
    """All but the prompt's text, which nobody but process 0 shows."""
    params = {f.name: getattr(request.params, f.name) for f in dataclasses.fields(request.params)}
    if params["logit_bias"] is not None:
        params["logit_bias"] = list(params["logit_bias"].items())  # JSON has no integer keys
    given = {f.name: getattr(request, f.name) for f in dataclasses.fields(request)}
    sets = {name: sorted(given[name]) for name in ("eos_ids", "stop_ids")}
    return {**given, **sets, "prompt": None, "params": params}


def _request_from_json(given: dict[str, Any]) -> Request:
    params = dict(given["params"])
    if params["logit_bias"] is not None:
        params["logit_bias"] = dict(params["logit_bias"])
    return Request(
        **{
            **given,
            "params": SamplingParams(**params),
            "prompt_token_ids": tuple(given["prompt_token_ids"]),
            "eos_ids": frozenset(given["eos_ids"]),
            "stop_ids": frozenset(given["stop_ids"]),
            "bad_word_ids": tuple(tuple(word) for word in given["bad_word_ids"]),
        }
    )
