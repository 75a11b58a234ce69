"""Puts a runtime together: model, mesh, sizes, programs, weights, step loop."""

import dataclasses
import sys
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from ..errors import ConfigError
from ..models.decoder import Params
from ..models.quantization import without_formats
from ..sharding.mesh import make_mesh
from . import host_memory
from .artifacts import load_programs, with_options_of
from .checkpoint import Checkpoint
from .config import DEFAULT_CACHE_DIR, RuntimeConfig, programs_folder, stores_folder
from .cpu_kernels import prepare_kernels
from .deployment import Deployment, deploy, platform_of
from .distributed import check_mesh, config_facts, start
from .executor import Executor
from .gpu_pool import claim_memory
from .group import Group
from .model_source import ModelSource, open_model
from .param_tree import flatten
from .program_cache import kept_programs
from .programs import Programs, compile_programs
from .quantizing import load_quantized
from .request import RequestLimits
from .scheduler import Scheduler
from .sizes import check_host_memory, device_memory
from .store import Store
from .store_cache import cached_store, can_keep
from .weight_choice import choose_weights
from .weight_streaming import StreamedParams, open_stream
from .weights import load_params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """What stands behind a Runtime, ready to be driven by a step loop."""

    config: RuntimeConfig  # complete
    source: ModelSource
    limits: RequestLimits
    scheduler: Scheduler
    executor: Executor
    group: Group


def assemble(config: RuntimeConfig) -> Engine:
    """Everything that a Runtime does before its first request.

    Raises:
      ConfigError, CheckpointError, KernelError, OutOfMemoryError: what is wrong and what mends it.
    """
    config = with_options_of(config)
    claim_memory()
    group = start(config)
    try:
        engine = _assemble(config, group)
        host_memory.give_back()
        return engine
    except BaseException as error:
        group.fail(error)
        raise


def _assemble(config: RuntimeConfig, group: Group) -> Engine:
    source = open_model(config.model, config.revision, config.quantization)
    config = config.replace(compile_cache_dir=keep_programs(config.compile_cache_dir))
    mesh = make_mesh(dict(config.mesh or ()))
    check_mesh(mesh, group)
    choice = choose_weights(config, source.config, platform_of(mesh))
    config, source = choice.config, source.made(choice.model, choice.format)
    if choice.line is not None and group.leads:
        print(f"millrace: {choice.line}", file=sys.stderr, flush=True)
    deployment = deploy(config, source.config, mesh, group.least(device_memory(mesh)))
    group.check_alike({**config_facts(deployment.config), "the model": source.config})
    config, model = deployment.config, deployment.model
    if (line := prepare_kernels(model.kernels.platform, show_progress=config.progress)) is not None:
        print(f"millrace: {line}", file=sys.stderr, flush=True)
    if config.weights == "host":
        check_host_memory(sum(spec.num_bytes for spec in flatten(model.decoder.specs)[0].values()))
    source = _with_weights(source, config, model.decoder.dtype)
    params, programs = _load_and_compile(source, deployment)
    limits = RequestLimits(
        vocab_size=source.config.vocab_size,
        max_context_len=model.max_context_len,
        eos_ids=source.eos_ids,
        tokenizer=source.tokenizer,
    )
    return Engine(
        config=config,
        source=source,
        limits=limits,
        scheduler=Scheduler(deployment.scheduler),
        executor=Executor(model, deployment.buckets, programs, params),
        group=group,
    )


def _with_weights(source: ModelSource, config: RuntimeConfig, dtype: np.dtype) -> ModelSource:
    """The source with the weights in the form in which they will be read: a store, unless that was turned off."""
    weights, quantization = source.weights, source.quantization
    is_made = isinstance(weights, Checkpoint) or quantization is not None
    if is_made and config.store:
        model = source.config if quantization is None else without_formats(source.config)
        must_keep = config.store_cache_dir is not None or config.weights != "resident"
        if must_keep or can_keep(weights, dtype, quantization):
            folder = stores_folder(config.store_cache_dir)
            store = cached_store(weights, model, dtype, folder, quantization, show_progress=config.progress)
            weights, source = store, dataclasses.replace(source, quantization=None)
    elif is_made and config.weights != "resident":
        raise ConfigError(
            f"weights={config.weights} reads layers from a store as they are; {weights.path} is a "
            "checkpoint, or still to be quantized. Leave --no-store away, or convert it first: millrace convert."
        )
    if isinstance(weights, Checkpoint):
        return source
    return dataclasses.replace(source, weights=weights.with_direct_io() if _is_direct(config, weights) else weights)


def _is_direct(config: RuntimeConfig, store: Store) -> bool:
    """Whether to read past the page cache: where it holds nothing yet, or could not hold what every step reads."""
    if config.weights_io == "direct" and store.root.folder is None:
        raise ConfigError(f"weights_io=direct goes with a store on this machine's disks; {store.url} is elsewhere.")
    if config.weights_io != "auto" or store.root.folder is None:
        return config.weights_io == "direct"
    if config.weights == "stream":
        return store.num_bytes > host_memory.available_bytes()
    return not store.is_cached()


def _load_and_compile(source: ModelSource, deployment: Deployment) -> tuple[Params | StreamedParams, Programs]:
    """Both at once, for neither needs the other; when one fails, the other stops at its next part."""
    is_given_up = threading.Event()

    def on_part() -> None:
        if is_given_up.is_set():
            raise CancelledError

    with ThreadPoolExecutor(1, thread_name_prefix="millrace-load") as loader:
        loading = loader.submit(_load, source, deployment, on_part)

        def before_each() -> None:
            if loading.done():
                loading.result()  # raises what went wrong

        try:
            programs = _programs(deployment, before_each)
            return loading.result(), programs
        except BaseException:
            is_given_up.set()
            loading.add_done_callback(_close_stream)
            raise


def _programs(deployment: Deployment, before_each: Callable[[], None]) -> Programs:
    """From the artifact, where one is named, else from the cache or the compiler."""
    config = deployment.config
    if config.artifact is not None:
        return load_programs(Path(config.artifact).expanduser(), deployment, before_each=before_each)
    is_kept = deployment.model.kernels.platform == "cpu" and jax.process_count() == 1
    if is_kept and (folder := programs_folder(config.compile_cache_dir)) is not None:
        return kept_programs(deployment, folder, show_progress=config.progress, before_each=before_each)
    return compile_programs(
        deployment.model,
        deployment.buckets,
        streams=deployment.streams,
        show_progress=config.progress,
        before_each=before_each,
    )


def _load(source: ModelSource, deployment: Deployment, on_part: Callable[[], None]) -> Params | StreamedParams:
    """The weights, or as much of them as stays while the rest is streamed."""
    config, model, sizes = deployment.config, deployment.model, deployment.sizes
    progress, placement = config.progress, model.placement
    if sizes is None:
        specs = model.decoder.specs
        load = load_params if source.quantization is None else load_quantized
        return load(source.weights, source.config, specs, placement, show_progress=progress, on_part=on_part)
    assert isinstance(source.weights, Store)
    in_host_memory = config.weights == "host"
    return open_stream(
        source.weights, model.decoder, placement, sizes, in_host_memory=in_host_memory, show_progress=progress,
        on_part=on_part,
    )  # fmt: skip


def _close_stream(loading: "Future[Params | StreamedParams]") -> None:
    """Let go of what was loaded for nothing."""
    if loading.exception() is None and isinstance(params := loading.result(), StreamedParams):
        params.stream.close()


def keep_programs(directory: str | None) -> str | None:
    """Turn on JAX's persistent cache, for programs of any size; "" leaves it as it is.

    Returns the directory, or "" where none was named and the default cannot be made, which a line on stderr says.

    Raises:
      ConfigError: a directory that was named cannot be made.
    """
    try:
        path = programs_folder(directory)
        if path is None:
            return directory
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        if directory is None:
            print(
                f"millrace: {DEFAULT_CACHE_DIR} cannot be made ({error}), so that every start compiles again; "
                "--compile_cache_dir=DIR keeps programs elsewhere",
                file=sys.stderr,
            )
            return ""
        raise ConfigError(
            f'compile_cache_dir {directory} cannot be made ({error}). Choose another, or "" to keep no programs.'
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return directory
