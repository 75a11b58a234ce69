"""Runtime: the whole library from Python."""

import itertools
import random
import weakref
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import GroupError, InvalidRequestError
from .assembly import assemble
from .chat_template import ChatRenderer
from .config import RuntimeConfig
from .executor import Executor
from .handle import RequestHandle
from .live_weights import LiveWeights, Weights
from .loop import StepLoop
from .request import Prompt, RequestOutput, is_iterable, validate
from .sampling_params import OnWeightsUpdate, SamplingParams
from .spelling import shown

Messages = Sequence[Mapping[str, Any]]


class Runtime:
    """A model, compiled and placed, that answers requests until it is closed.

    Thread-safe. Opening it checks the checkpoint, places the weights and compiles every program; after that nothing
    compiles.
    """

    def __init__(self, config: RuntimeConfig | None = None) -> None:
        """Raises ConfigError, CheckpointError, KernelError or OutOfMemoryError, before any request is taken."""
        engine = assemble(config or RuntimeConfig())
        self.config = engine.config  # complete: no option of it is None that has a value
        self.default_sampling_params = engine.source.default_sampling_params
        self._limits = engine.limits
        self._tokenizer = engine.limits.tokenizer
        self._loop = StepLoop(engine.scheduler, engine.executor, engine.group)
        self._weights = LiveWeights(
            self._loop, engine.executor, engine.source, show_progress=bool(self.config.progress)
        )
        tokenizer = self._tokenizer
        self._chat = ChatRenderer(*((tokenizer.chat_template, tokenizer.special_tokens) if tokenizer else (None, {})))
        self._request_numbers = itertools.count()
        self._seeds = None if self.config.seed is None else random.Random(self.config.seed)
        self._close_at_exit = weakref.finalize(self, _close, self._loop, engine.executor, self._chat)

    @classmethod
    def from_pretrained(cls, model: str = "embedded", **options: Any) -> "Runtime":
        """Open a model: "embedded", a Hugging Face directory, a store, or org/name; options are RuntimeConfig's."""
        return cls(RuntimeConfig(model=str(model), **options))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete every prompt; outputs in the order of the prompts.

        A prompt is a string or a list of token ids; `sampling_params` is one for all or one for each, None the
        checkpoint's defaults. Every prompt is checked before the first runs.

        Raises:
          InvalidRequestError: a prompt or an option is wrong; nothing was run.
        """
        batch = _as_batch(prompts)
        params = self._params_for(batch, sampling_params)
        handles = [self._make_handle(prompt, p) for prompt, p in zip(batch, params, strict=True)]
        self._loop.submit(handles)
        try:
            progress = tqdm(handles, desc="generating", unit="request", delay=1, disable=not use_tqdm)
            return [handle.result() for handle in progress]
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Generator[RequestOutput]:
        """Outputs that hold only what is new, as it comes; closing the iterator cancels the request."""
        return _stream(self.submit(prompt, sampling_params))

    def submit(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> RequestHandle:
        """Start a request and return at once.

        Raises:
          InvalidRequestError: the prompt or an option is wrong.
        """
        handle = self._make_handle(prompt, self._params_for([prompt], sampling_params)[0])
        self._loop.submit([handle])
        return handle

    def chat(
        self, messages: Messages, sampling_params: SamplingParams | None = None, **template_options: Any
    ) -> RequestOutput:
        """Answer a conversation of {"role": ..., "content": ...} through the checkpoint's chat template.

        `template_options` are the template's own (tools, enable_thinking ...).
        """
        handle = self._submit_chat(messages, sampling_params, template_options)
        try:
            return handle.result()
        except BaseException:
            handle.cancel()
            raise

    def stream_chat(
        self, messages: Messages, sampling_params: SamplingParams | None = None, **template_options: Any
    ) -> Generator[RequestOutput]:
        """As `chat`, piece by piece."""
        return _stream(self._submit_chat(messages, sampling_params, template_options))

    @property
    def has_tokenizer(self) -> bool:
        """Whether prompts may be strings, and outputs have text."""
        return self._tokenizer is not None

    @property
    def weights_version(self) -> int:
        """How many times the weights were updated; every output says which version computed it."""
        return self._loop.weights_version

    def update_weights(self, weights: Weights, *, running: OnWeightsUpdate = "drain") -> int:
        """Replace all or some weights between two steps, without a compile; returns the new version once that is done.

        `weights` are numpy or jax arrays by the parameters' paths, as a nested dict or as {"embed/weight": ...}; or
        the path or URL of a store of the same model, which is the only kind where weights are streamed. Floats become
        the dtype that runs. All is checked before anything is replaced. Arrays are copied, one at a time; but a jax
        array of the right dtype and sharding is taken as it is: do not donate or delete it afterwards.

        Requests that have started end on the old weights first with `running="drain"`, while nothing new starts, or go
        on with the new ones with "immediate"; a request's own `on_weights_update` decides for it. Several updates
        happen in order. An interrupt while it waits withdraws the update.

        Raises:
          ConfigError, CheckpointError: what is wrong with which array; the old weights stand.
          RuntimeClosedError: the runtime was closed.
        """
        return self._weights.update(weights, running)

    def save_weights(self, store: str | Path) -> None:
        """Write the weights of this moment as a store, to a new or empty path or URL; steps and updates go on.

        What an update replaces meanwhile stays in memory until it is written.

        Raises:
          ConfigError: the place is neither a path nor a URL.
          CheckpointError: the place holds something already, or cannot be written.
          RuntimeClosedError: the runtime was closed.
        """
        self._weights.save(store)

    @property
    def num_processes(self) -> int:
        """Processes of the group that this one belongs to; 1 on its own."""
        return self._loop.group.num_processes

    @property
    def process_id(self) -> int:
        """This process' number in its group."""
        return self._loop.group.process_id

    @property
    def takes_requests(self) -> bool:
        """Whether requests are made here: always, but in a group of processes only in process 0."""
        return self._loop.group.leads

    def follow(self) -> None:
        """In the other processes of a group: do what process 0 decides, until it closes.

        Raises:
          GroupError: a process failed, or this is process 0.
        """
        if self.takes_requests:
            raise GroupError("process 0 takes the requests; follow() is for the other processes of a group.")
        self._loop.follow(self._weights.swap_from_store)

    def close(self) -> None:
        """Abort what is running and end the step loop; closing twice does nothing."""
        self._close_at_exit()

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _params_for(self, prompts: Sequence[Prompt], given: Any) -> list[SamplingParams]:
        if given is None or isinstance(given, SamplingParams):
            return [given or self.default_sampling_params] * len(prompts)
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise InvalidRequestError(f"sampling_params must be SamplingParams or a list of them, got {shown(given)}")
        if len(given) != len(prompts):
            raise InvalidRequestError(f"{len(prompts)} prompts want as many sampling_params, got {len(given)}")
        return list(given)

    def _make_handle(self, prompt: Prompt, params: SamplingParams, text: str | None = None) -> RequestHandle:
        request = validate(str(next(self._request_numbers)), prompt, params, self._limits, text=text, seeds=self._seeds)
        return RequestHandle(request, self._tokenizer, self._loop.cancel)

    def _submit_chat(
        self, messages: Messages, params: SamplingParams | None, options: Mapping[str, Any]
    ) -> RequestHandle:
        if self._tokenizer is None:
            raise InvalidRequestError("chat needs a tokenizer, which this checkpoint does not have")
        self._loop.check_open()  # rendering starts a process
        text = self._chat.render(messages, template_kwargs=options)
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        handle = self._make_handle(ids, params or self.default_sampling_params, text)
        self._loop.submit([handle])
        return handle


def _as_batch(prompts: Any) -> list[Prompt]:
    """One prompt or several, as a list."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes | Mapping) or not is_iterable(prompts):
        raise InvalidRequestError(f"prompts must be a string, token ids, or a list of either, got {shown(prompts)}")
    items = list(prompts)
    if items and all(not isinstance(item, str) and not hasattr(item, "__iter__") for item in items):
        return [items]  # one prompt of token ids
    return items


def _stream(handle: RequestHandle) -> Generator[RequestOutput]:
    """The handle's outputs; a stream that is closed or dropped, even before its first output, cancels the request."""
    stream = _cancelling(handle)
    next(stream)  # a generator that was never started has no `finally` yet
    return stream


def _cancelling(handle: RequestHandle) -> Generator[Any]:
    try:
        yield None  # where it is started
        yield from handle
    finally:
        handle.cancel()  # nothing to one that has ended, or is the parent's of a forked process


def _close(loop: StepLoop, executor: Executor, chat: ChatRenderer) -> None:
    if not loop.is_here:
        return  # a forked child ends: the threads, connections and processes are its parent's
    loop.close()
    executor.close()
    chat.close()
