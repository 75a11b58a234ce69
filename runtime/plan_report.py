"""A deployment's plan as text, as JSON and as a picture."""

import dataclasses
import importlib
import json
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError
from .deployment_plan import DeploymentPlan, MeshPlan
from .roofline import Bound, Prediction

_GIB = 2**30
_PARTS = ("weights", "kv_cache", "slot_state", "control", "outputs")


def plan_text(plan: DeploymentPlan) -> str:
    """What stands on the terminal."""
    return "\n\n".join([_head(plan), _memory(plan), _fits(plan), _roofline(plan)])


def _head(plan: DeploymentPlan) -> str:
    weights = f" with weights in {', '.join(plan.formats)}" if plan.formats else ""
    return (
        f"{plan.model} in {plan.dtype}{weights} on {plan.target}, mesh {plan.mesh}: {plan.num_devices} devices, "
        f"{plan.num_slots} slots and {plan.max_step_tokens} tokens a step on each data shard; KV cache in "
        f"{plan.kv_cache_dtype}, {plan.token_bytes:,} bytes a token on each device"
    )


def _memory(plan: DeploymentPlan) -> str:
    memory = plan.memory
    label = f"{'estimate: ' if memory.temporaries.is_estimate else ''}{memory.temporaries.source}"
    rows = [(part.replace("_", " "), getattr(memory, part), "") for part in _PARTS]
    rows += [
        ("temporaries", memory.temporaries.num_bytes, label),
        ("kept free", memory.memory_bytes - memory.usable_bytes, "fragments"),
        ("left" if memory.free >= 0 else "TOO MUCH BY", abs(memory.free), ""),
        ("arrays may take", memory.memory_bytes, "of the device's memory"),
    ]
    lines = [f"  {name:<16}{size / _GIB:>10.3f}  {note}".rstrip() for name, size, note in rows]
    remedy = (
        [] if memory.free >= 0 else ["  Lower kv_cache_bytes, num_slots or max_step_tokens, or widen the tensor axis."]
    )
    return "\n".join(["Memory of each device, GiB", *lines, *remedy])


def _fits(plan: DeploymentPlan) -> str:
    lines = [f"  {f.context_len:>12,}{f.shard_sequences:>14,}{f.num_sequences:>12,}" for f in plan.fits]
    head = f"  {'context':>12}{'a data shard':>14}{'in sum':>12}"
    return "\n".join(["Most sequences that fit (estimate)", head, *lines])


def _roofline(plan: DeploymentPlan) -> str:
    workload, prediction = plan.workload, plan.prediction
    lines = [
        f"Ceiling for prompts of {workload.prompt_len} and outputs of {workload.output_len} tokens, "
        f"{prediction.num_sequences} sequences on each data shard (estimate)",
        f"  {'step':<10}{'compute':>12}{'memory':>12}{'links':>12}  ms; bound by",
        _bound("prefill", prediction.prefill),
        _bound("decode", prediction.decode),
        f"  {prediction.device_tokens_per_s:,.0f} tokens/s a device, {prediction.tokens_per_s:,.0f} in sum",
    ]
    if plan.weights != "resident":
        lines.append(f"  without the time that weights={plan.weights} takes to bring them to the device")
    for record in plan.records:
        lines.append(f"  the record: {record.device_tokens_per_s:,.0f} tokens/s a device ({record.source})")
    return "\n".join(lines)


def _bound(name: str, bound: Bound) -> str:
    times = "".join(f"{1000 * s:>12.3f}" for s in (bound.compute_s, bound.memory_s, bound.links_s))
    return f"  {name:<10}{times}  {bound.term}"


def sweep_text(plans: Sequence[MeshPlan]) -> str:
    """Every mesh, best first."""
    head = f"  {'mesh':<30}{'weights':>9}{'slots':>8}{'prefill':>10}{'decode':>10}{'a device':>10}{'in sum':>12}"
    lines = [_mesh_line(plan) for plan in plans]
    title = "Every mesh that fits, best first: weights in GiB, slots of a data shard, what binds, tokens/s (estimate)"
    return "\n".join([title, head, *lines]) if plans else "No mesh of all the devices holds the model."


def _mesh_line(plan: MeshPlan) -> str:
    best = plan.prediction
    return (
        f"  {plan.mesh:<30}{plan.weights / _GIB:>9.2f}{best.num_sequences:>8,}{best.prefill.term:>10}"
        f"{best.decode.term:>10}{best.device_tokens_per_s:>10,.0f}{best.tokens_per_s:>12,.0f}"
    )


def plan_json(plan: DeploymentPlan, sweep: Sequence[MeshPlan] | None) -> str:
    """All numbers: bytes, seconds, tokens/s."""
    record = dataclasses.asdict(plan)
    record["memory"] |= {"total": plan.memory.total, "free": plan.memory.free}
    record["prediction"] = _prediction(plan.prediction)
    if sweep is not None:
        record["sweep"] = [dataclasses.asdict(one) | {"prediction": _prediction(one.prediction)} for one in sweep]
    return json.dumps(record, indent=1)


def _prediction(prediction: Prediction) -> dict[str, Any]:
    record = dataclasses.asdict(prediction) | {"device_tokens_per_s": prediction.device_tokens_per_s}
    for step in ("prefill", "decode"):
        bound: Bound = getattr(prediction, step)
        record[step] |= {"seconds": bound.seconds, "bound_by": bound.term}
    return record


def plot(plan: DeploymentPlan, sweep: Sequence[MeshPlan] | None, path: str) -> None:
    """Memory of a device beside tokens/s of the mesh, or of every mesh of a sweep.

    Raises:
      ConfigError: matplotlib is not installed.
    """
    try:
        pyplot: Any = importlib.import_module("matplotlib.figure")
    except ImportError:
        raise ConfigError("--plot needs matplotlib, which is not installed: pip install 'millrace[notebook]'") from None
    figure = pyplot.Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    memory, bottom = plan.memory, 0.0
    sizes = {part.replace("_", " "): getattr(memory, part) for part in _PARTS}
    for name, size in {**sizes, "temporaries": memory.temporaries.num_bytes}.items():
        left.bar(plan.target, size / _GIB, bottom=bottom, label=name, width=0.4)
        bottom += size / _GIB
    left.axhline(memory.memory_bytes / _GIB, color="black", linestyle="--", label="the device")
    left.set(ylabel="GiB of each device", title=f"{plan.model}, {plan.mesh}")
    left.legend()
    speeds = {plan.mesh: plan.prediction} if sweep is None else {one.mesh: one.prediction for one in sweep}
    right.barh(list(speeds)[::-1], [p.device_tokens_per_s for p in speeds.values()][::-1])
    for record in plan.records:
        right.axvline(record.device_tokens_per_s, color="black", linestyle=":", label="the record")
    right.set(xlabel="tokens/s a device, at most")
    figure.savefig(path)
