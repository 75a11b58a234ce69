"""Starts this process' part of a group: finds the others, through jax.distributed, and connects to them.

The only file that knows jax.distributed, and two private names of jax: its detection of Slurm, Open MPI and
Kubernetes, and the key-value store through which process 0 says where it listens.
"""

import atexit
import dataclasses
import ipaddress
import os
import secrets
import socket
import sys
import threading
import time
import warnings
from importlib import metadata
from typing import Any

import jax
from jax.sharding import Mesh

from ..errors import ConfigError, GroupError
from .artifacts import source_digest
from .config import RuntimeConfig
from .group import Group, accept, connect

START_TIMEOUT_S = 60.0
_GRACE_S = 5.0  # for process 0 to say what became of its requests
_ADDRESS_KEY = "millrace/address"
_MAY_DIFFER = (
    "process_id", "num_processes", "coordinator_address", "progress", "compile_cache_dir", "store_cache_dir",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Membership:
    """Which process of which group this is."""

    num_processes: int
    process_id: int
    coordinator_address: str

    @property
    def host(self) -> str:
        """Of process 0."""
        return self.coordinator_address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Of process 0, where jax.distributed meets."""
        return int(self.coordinator_address.rpartition(":")[2])


def start(config: RuntimeConfig, timeout_s: float = START_TIMEOUT_S) -> Group:
    """Meet the other processes: those that the config names, else those that Slurm, Open MPI or Kubernetes started.

    Must come before jax is used. All devices that a process sees are its own: let Slurm's --gpus-per-task say which.

    Raises:
      ConfigError: the three options do not go together, or the processes were not started alike.
      GroupError: the others do not answer.
    """
    membership = find(config)
    if membership is None:
        return Group()
    if not jax.distributed.is_initialized():
        _meet(membership, timeout_s)
    group = _connect(membership, timeout_s)
    group.check_alike({**config_facts(config), **_versions()})
    return group


def find(config: RuntimeConfig) -> Membership | None:
    """Which process of which group this is; None for a process on its own.

    Raises:
      ConfigError: options are missing, or contradict each other.
    """
    given = (config.coordinator_address, config.num_processes, config.process_id)
    if given == (None, None, None):
        given = _detected()
    address, num_processes, process_id = given
    if num_processes == 1 or given == (None, None, None):
        return None
    if address is None or num_processes is None or process_id is None:
        names = ("coordinator_address", "num_processes", "process_id")
        missing = [name for name, value in zip(names, given, strict=True) if value is None]
        raise ConfigError(
            f"num_processes, process_id and coordinator_address go together; {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing. Give all three, or none under Slurm, Open MPI or "
            "Kubernetes."
        )
    if process_id >= num_processes:
        raise ConfigError(
            f"process_id={process_id} is not below num_processes={num_processes}: processes are numbered from 0."
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"coordinator_address should be host:port, as in 127.0.0.1:4321; got {address!r}.")
    return Membership(num_processes, process_id, address)


def check_mesh(mesh: Mesh, group: Group) -> None:
    """Raises ConfigError unless every process has devices in the mesh."""
    owners = {device.process_index for device in mesh.devices.flat}
    if group.num_processes > 1 and len(owners) < group.num_processes:
        raise ConfigError(
            f"a mesh of {mesh.size} devices leaves {group.num_processes - len(owners)} of {group.num_processes} "
            f"processes without any; there are {jax.device_count()} devices. Make the mesh's axes multiply to "
            "that, or start fewer processes."
        )


def config_facts(config: RuntimeConfig) -> dict[str, object]:
    """The options in which processes must agree, by name."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in _MAY_DIFFER}


def _detected() -> tuple[str | None, int | None, int | None]:
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize() itself asks

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Kubernetes without its package: a pod that serves alone
        try:
            found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(START_TIMEOUT_S))
        except Exception as error:
            raise ConfigError(
                f"this process seems to be one of a group, but which could not be found out: {error}. Give "
                "num_processes, process_id and coordinator_address, or num_processes=1 to serve alone."
            ) from error
    address, num_processes, process_id, _ = found
    return address, num_processes, process_id


def _meet(membership: Membership, timeout_s: float) -> None:
    """Initialize jax.distributed, once it is certain that process 0 is there."""
    if membership.process_id == 0:
        _check_free(membership)
    else:
        _await_answer(membership, timeout_s)
    try:
        jax.distributed.initialize(
            membership.coordinator_address,
            membership.num_processes,
            membership.process_id,
            cluster_detection_method="deactivate",
            initialization_timeout=int(timeout_s),
            heartbeat_timeout_seconds=30,
            shutdown_timeout_seconds=10,
            coordinator_bind_address=membership.coordinator_address,
        )
    except RuntimeError as error:
        raise GroupError(
            f"expected {membership.num_processes} processes to meet at {membership.coordinator_address} within "
            f"{timeout_s:g} s; got: {error}"
        ) from error


def _check_free(membership: Membership) -> None:
    try:
        socket.create_server((membership.host, membership.port), family=_family(membership)).close()
    except OSError as error:
        raise ConfigError(
            f"process 0 cannot listen at coordinator_address={membership.coordinator_address}: {error}. Give an "
            "address of this machine and a port that is free."
        ) from error


def _await_answer(membership: Membership, timeout_s: float) -> None:
    """Knock at process 0's door until it is there: jax would wait no better, and abort the process."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((membership.host, membership.port), 5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise GroupError(
                    f"process {membership.process_id} expected process 0 to answer at "
                    f"{membership.coordinator_address} within {timeout_s:g} s; got: {error}. Start process 0, and "
                    "check coordinator_address."
                ) from error
        time.sleep(0.1)


def _family(membership: Membership) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in membership.host else socket.AF_INET


def _connect(membership: Membership, timeout_s: float) -> Group:
    from jax._src.distributed import global_state  # the key-value store has no public name

    store: Any = global_state.client
    on_failure, on_close = [_end_process(membership.process_id)], jax.distributed.shutdown
    options: dict[str, Any] = {"num_processes": membership.num_processes}
    options |= {"on_failure": on_failure, "on_close": on_close}
    if membership.process_id:
        host, port, token = store.blocking_key_value_get(_ADDRESS_KEY, int(timeout_s * 1000)).split("|")
        link = connect((host, int(port)), membership.process_id, token, timeout_s)
        return _parting(Group(membership.process_id, [link], **options))
    token = secrets.token_hex(16)
    with socket.create_server((membership.host, 0), family=_family(membership)) as listener:
        host, port = listener.getsockname()[:2]
        name = membership.host if not ipaddress.ip_address(host).is_loopback else host
        store.key_value_set(_ADDRESS_KEY, f"{name}|{port}|{token}")
        return _parting(Group(0, accept(listener, membership.num_processes, token, timeout_s), **options))


def _parting(group: Group) -> Group:
    """Have a process of a failed group end without jax's farewell, which waits for the others and then aborts."""

    def leave() -> None:
        if group.failure is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    atexit.register(leave)
    return group


def _end_process(process_id: int) -> Any:
    """What happens to a process whose group has failed: its main thread may hang in a collective for ever."""

    def end(failure: GroupError) -> None:
        print(f"millrace: {failure}", file=sys.stderr, flush=True)
        if process_id == 0:
            threading.Event().wait(_GRACE_S)
        os._exit(1)

    return end


def _versions() -> dict[str, object]:
    return {"jax": jax.__version__, "jaxlib": metadata.version("jaxlib"), "the source": source_digest()[:16]}
