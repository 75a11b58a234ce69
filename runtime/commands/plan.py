"""`millrace plan --config=NAME`, or --model, --target and --mesh: memory and speed before anything is loaded.

No weights are needed, and no hardware: temporaries come from the target's own compiler where the cuda extra is
installed, else from the CPU's or from shapes, and are called an estimate. Speeds are ceilings, at the dense peaks.
"""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError
from ..flags import RUNTIME, Group, Option
from ..interrupts import interrupts_wait

if TYPE_CHECKING:
    from ..roofline import Workload
    from . import OpenRuntime

GROUPS = (
    Group(
        "Plan",
        (
            Option("prompt_len", "integer", "tokens of an average prompt; 260, or what a shorter context holds"),
            Option("output_len", "integer", "tokens of an average output; 294, or what a shorter context holds"),
            Option("sweep", "switch", "every mesh of the target's devices that fits, best first", False),
            Option("compile", "switch", "ask the compiler for temporaries; --no-compile takes them from shapes", True),
            Option("json", "text", "a file for all numbers; - for stdout, in place of the text"),
            Option("plot", "text", "a file for a picture, as in plan.png"),
        ),
    ),
    RUNTIME,
)


def run(values: Mapping[str, Any], open_runtime: "OpenRuntime") -> int:
    """The exit code: 1 where the plan does not fit."""
    for name in ("prompt_len", "output_len"):
        if values[name] is not None and values[name] < 1:
            raise ConfigError(f"--{name} must be at least 1, got {values[name]}.")
    from ..overrides import resolve

    config = resolve(values)
    with interrupts_wait():
        from ...sharding.targets import parse_target, stay_on_cpus
        from ..deployment_plan import plan_deployment, sweep
        from ..model_source import open_model_config
        from ..plan_report import plan_json, plan_text, plot, sweep_text
        from ..sizes import context_len
        from ..weight_choice import choose_weights

    stay_on_cpus(math.prod(size for _, size in config.mesh or ()))
    machine = parse_target(config.target or "cpu")
    model = open_model_config(config.model, config.revision, config.quantization)
    choice = choose_weights(config, model, machine.target.platform)
    config, model = choice.config, choice.model
    if choice.line is not None:
        print(f"millrace: {choice.line}", file=sys.stderr)
    workload = _workload(values, context_len(config, model))
    plan = plan_deployment(config, model, machine, workload, compiles=values["compile"])
    meshes = sweep(config, model, machine, workload) if values["sweep"] else None
    if values["json"] != "-":
        print(plan_text(plan))
    if values["json"] != "-" and meshes is not None:
        print(f"\n{sweep_text(meshes)}")
    if values["json"]:
        text = plan_json(plan, meshes)
        print(text) if values["json"] == "-" else Path(values["json"]).write_text(text + "\n")
    if values["plot"]:
        plot(plan, meshes, values["plot"])
    return int(plan.memory.free < 0)


def _workload(values: Mapping[str, Any], context_len: int) -> "Workload":
    """An average request; ConfigError where one that was asked for is longer than the context."""
    from ..roofline import Workload

    given = {name: values[name] for name in ("prompt_len", "output_len") if values[name] is not None}
    if given and sum(given.values()) + (len(given) == 1) > context_len:
        asked = " and ".join(f"--{name}={value}" for name, value in given.items())
        raise ConfigError(
            f"prompt and output should fit in max_context_len={context_len}; got {asked}. Lower it, or raise "
            "--max_context_len where the model has a longer context."
        )
    if context_len < 2:
        raise ConfigError(f"max_context_len should hold a prompt and an output, 2 or more; got {context_len}.")
    most = context_len - given["output_len"] if "output_len" in given else context_len // 2
    prompt_len = given.get("prompt_len", min(Workload.prompt_len, most))
    output_len = given.get("output_len", min(Workload.output_len, context_len - prompt_len))
    return Workload(prompt_len=prompt_len, output_len=output_len)
