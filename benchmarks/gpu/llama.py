"""The shape of Llama-3.1-8B, for benchmarks that need no checkpoint."""

from millrace.models.config import AttentionSpec, LayerSpec, MlpSpec, ModelConfig, RopeSpec


def llama(num_layers: int, scale: int = 1) -> ModelConfig:
    """Llama-3.1-8B with `num_layers` layers; `scale` divides the widths, to try a benchmark on a small machine."""
    rope = RopeSpec(theta=5e5, rotary_dim=128)
    attention = AttentionSpec(num_heads=32 // scale, num_kv_heads=8 // scale, head_dim=128, scale=128**-0.5, rope=rope)
    layer = LayerSpec(attention=attention, mlp=MlpSpec(mlp_dim=14336 // scale))
    return ModelConfig(
        family="llama",
        vocab_size=128256 // scale,
        embed_dim=4096 // scale,
        layers=(layer,) * num_layers,
        max_context_len=8192,
    )
