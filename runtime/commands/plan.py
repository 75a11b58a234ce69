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

if TYPE_CHECKING:
    from . import OpenRuntime

GROUPS = (
    Group(
        "Plan",
        (
            Option("prompt_len", "integer", "tokens of an average prompt", 260),
            Option("output_len", "integer", "tokens of an average output", 294),
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
        if values[name] < 1:
            raise ConfigError(f"--{name} must be at least 1, got {values[name]}.")
    from ..overrides import resolve

    config = resolve(values)
    from ...sharding.targets import parse_target, stay_on_cpus
    from ..deployment_plan import plan_deployment, sweep
    from ..model_source import open_model_config
    from ..plan_report import plan_json, plan_text, plot, sweep_text
    from ..roofline import Workload
    from ..weight_choice import choose_weights

    stay_on_cpus(math.prod(size for _, size in config.mesh or ()))
    machine = parse_target(config.target or "cpu")
    model = open_model_config(config.model, config.revision, config.quantization)
    choice = choose_weights(config, model, machine.target.platform)
    config, model = choice.config, choice.model
    if choice.line is not None:
        print(f"millrace: {choice.line}", file=sys.stderr)
    workload = Workload(prompt_len=values["prompt_len"], output_len=values["output_len"])
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
