"""The best published throughputs on the targets' hardware, to stand beside what a plan predicts."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """Generated tokens per second and device, at about the default workload of a plan."""

    target: str
    model: str  # a part of the model's name, in lower case
    device_tokens_per_s: float
    source: str


RECORDS = (
    Record(
        target="gb300",
        model="llama-2-70b",
        device_tokens_per_s=15_291,
        source="Azure ND GB300 v6, 2025: 1,100,948 tokens/s on 72 GPUs, MLPerf v5.1 Offline, FP4, TensorRT-LLM",
    ),
    Record(
        target="gb200",
        model="llama-2-70b",
        device_tokens_per_s=12_022,
        source="GB200 NVL72, the record before GB300's: 865,000 tokens/s on 72 GPUs",
    ),
    Record(
        target="h200",
        model="llama-2-70b",
        device_tokens_per_s=4_488,
        source="NVIDIA, MLPerf v4.1 Offline, one H200, fp8, TensorRT-LLM",
    ),
    Record(
        target="h200",
        model="llama-2-70b",
        device_tokens_per_s=3_862,
        source="MLPerf v5.1 open division, one H200, fp8, vLLM",
    ),
    Record(
        target="h200",
        model="llama-3.1-8b",
        device_tokens_per_s=8_255,
        source="TensorRT-LLM on one H200, MLPerf Inference",
    ),
)


def records_of(target: str, model: str) -> tuple[Record, ...]:
    """Those of a target for a model, best first."""
    return tuple(record for record in RECORDS if record.target == target and record.model in model.lower())
