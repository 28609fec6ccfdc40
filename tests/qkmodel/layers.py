"""Small attention layers with random weights."""

import torch

from qkmodel.attention import AttentionGeometry, AttentionLayer


def random_layer(
    *,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    rotary_dim: int = 16,
    d_head: int = 16,
    d_model: int = 24,
    layer: int = 0,
    seed: int = 0,
    **more: object,
) -> AttentionLayer:
    """Weights are normal with standard deviation 1/sqrt(d_model), so queries and keys are of order 1."""
    geometry = AttentionGeometry(
        architecture="random",
        layer=layer,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        rotary_dim=rotary_dim,
        scale=d_head**-0.5,
        **more,
    )
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator) / d_model**0.5 for name, shape in geometry.tensor_shapes().items()
    }
    if rotary_dim:
        tensors["inv_freq"] = 10_000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    return AttentionLayer.from_tensors(geometry, tensors)
