"""`millrace group`: start all processes of a group on this machine, and again when one of them dies.

What follows "--" is the command that each process runs, as in
    millrace group --processes=4 --restarts=3 -- generate --mesh=tensor=4 --prompt=hello
Each gets --num_processes, --process_id and --coordinator_address besides. Across machines, see configs/deploy.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError
from ..flags import LOG_LEVEL, Group, Option
from ..supervisor import supervise

if TYPE_CHECKING:
    from . import OpenRuntime

GROUPS = (
    Group(
        "Group",
        (
            Option("command", "texts", "the command that every process runs, behind --"),
            Option("processes", "integer", "how many processes", 2),
            Option("restarts", "integer", "how often the whole group is started again after one has failed", 0),
            LOG_LEVEL,
        ),
    ),
)
POSITIONALS = ("command",)


def run(values: Mapping[str, Any], open_runtime: "OpenRuntime") -> int:
    """The exit code of the group's last start."""
    if not values["command"]:
        raise ConfigError(
            "expected the command that every process runs, as in: millrace group -- generate --prompt=hello"
        )
    if values["processes"] < 1 or values["restarts"] < 0:
        raise ConfigError("processes must be at least 1, and restarts at least 0.")
    return supervise(values["command"], values["processes"], values["restarts"])
