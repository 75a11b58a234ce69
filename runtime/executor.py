"""Owns what is on the devices: parameters, KV cache, slot state, programs. Runs plans; never waits for a result."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from ..errors import StepError
from ..models.decoder import Params
from ..sharding.rules import Placement
from ..sharding.specs import ParamSpec
from .batching import Batcher
from .buckets import Bucket, pick
from .host_arrays import place
from .logprobs import Scores
from .param_tree import flatten
from .plan import StepPlan
from .programs import Programs, StepInterrupted
from .sequence import Sequence
from .slot_state import SlotState, slot_row
from .steps import StepModel, StepOutputs
from .store import Store
from .weight_streaming import StreamedParams


class StepResult:
    """A step's outputs, on their way from the device; reading them waits."""

    def __init__(self, outputs: StepOutputs) -> None:
        self._outputs = outputs
        self._scores: Scores | None = None
        self._prompt: Scores | None = None
        outputs.sampled.tokens.copy_to_host_async()

    def wait(self) -> None:
        """Until the device has computed the step."""
        jax.block_until_ready(self._outputs)

    def tokens(self) -> np.ndarray:
        """[num_steps, R, B]."""
        return np.asarray(self._outputs.sampled.tokens)

    def scores(self) -> Scores:
        """Of the sampled tokens, arrays [num_steps, R, B, ...] on the host."""
        if self._scores is None:
            arrays: Any = {name: np.asarray(getattr(self._outputs.sampled, name)) for name in Scores._fields}
            self._scores = Scores(**arrays)
        return self._scores

    def prompt_scores(self) -> Scores:
        """Of the token after each of the step's, arrays [R, T, ...] on the host."""
        assert self._outputs.prompt is not None
        if self._prompt is None:
            arrays: Any = [np.asarray(array) for array in self._outputs.prompt]
            self._prompt = Scores(*arrays)
        return self._prompt


class Executor:
    """The device side of the step loop, called by one thread."""

    def __init__(
        self, model: StepModel, buckets: tuple[Bucket, ...], programs: Programs, params: Params | StreamedParams
    ) -> None:
        self._model = model
        self.buckets = buckets
        self._programs = programs
        self._params = params
        self.batcher = Batcher(model.placement.num_shards, model.num_slots, model.pages_per_slot)
        self._state = programs.initial_state()
        self._per_shard = model.placement.sharding(("shard", None))
        self._everywhere = model.placement.sharding(())
        self._is_one_device = model.placement.mesh.size == 1

    @property
    def overlaps(self) -> bool:
        """Whether `run` returns long before the device is done; with streamed weights it takes all the step."""
        return not isinstance(self._params, StreamedParams)

    def run(self, plan: StepPlan) -> StepResult:
        """Dispatch a step; the device works on it after those dispatched before.

        Raises:
          ProgramError: the step has a shape for which nothing was compiled.
          StepError: weights could not be read; what the step's sequences have in the cache means nothing.
        """
        for sequence in plan.admitted:
            self._install(sequence)
        bucket = pick(self.buckets, plan.is_decode, plan.num_tokens)
        control = self.batcher.pack(plan, bucket)
        packed: Any = control.packed
        flags: Any = control.flags
        if not self._is_one_device:  # numpy goes to one device first, unless told where
            packed, flags = place((packed, flags), (self._per_shard, self._everywhere))
        step: Any = self._programs.steps[bucket]
        try:
            self._state, outputs = step(self._params, self._state, packed, flags)
        except StepInterrupted as error:
            self._state = error.state
            raise StepError(str(error)) from error
        return StepResult(outputs)

    # ---- live weights, between two steps

    @property
    def specs(self) -> dict[str, ParamSpec]:
        """Every parameter by its path."""
        return flatten(self._model.decoder.specs)[0]

    @property
    def placement(self) -> Placement:
        """Where parameters lie."""
        return self._model.placement

    @property
    def params(self) -> Params | None:
        """The parameters; None where they are streamed."""
        return None if isinstance(self._params, StreamedParams) else self._params

    def update(self, leaves: Iterable[tuple[str, jax.Array]]) -> None:
        """Replace resident parameters by their paths, one after the other: each new one is pulled once the one
        before it has taken its place.
        """
        assert not isinstance(self._params, StreamedParams)
        for path, array in leaves:
            *parents, name = path.split("/")
            node = self._params
            for key in parents:
                node = node[key]
            node[name] = array

    def stream_from(self, store: Store) -> None:
        """Take streamed weights from another store of the same model from the next step on.

        Raises:
          CheckpointError: what stays in memory cannot be read; the former weights remain.
        """
        assert isinstance(self._params, StreamedParams)
        self._params = self._params.switched(store)

    def close(self) -> None:
        """End what reads weights."""
        if isinstance(self._params, StreamedParams):
            self._params.stream.close()

    def _install(self, sequence: Sequence) -> None:
        self.batcher.admit(sequence)
        request = sequence.request
        row: SlotState = slot_row(
            self._model.decoder.config.vocab_size,
            prompt_ids=request.prompt_token_ids,
            output_ids=sequence.tokens[sequence.prompt_len :],
            logit_bias=request.params.logit_bias,
            allowed_ids=request.params.allowed_token_ids,
            bad_words=request.bad_word_ids,
            stop_ids=sorted(request.stop_ids),
        )
        slots = np.full(self._model.placement.num_shards, self._model.num_slots, np.int32)
        slots[sequence.shard] = sequence.slot
        arguments: Any = (slots, row)
        if not self._is_one_device:
            rows = jax.tree.map(lambda _: self._everywhere, row)
            arguments = place(arguments, (self._model.placement.sharding(("shard",)), rows))
        self._state = self._programs.install(self._state, *arguments)
