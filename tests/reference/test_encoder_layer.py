"""The reference encoder layer against torch's own, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastattn.reference import encoder_layer


def weights_of(layer: nn.TransformerEncoderLayer) -> list[torch.Tensor]:
    attention = layer.self_attn
    projections = zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
    modules = (attention.out_proj, layer.norm1, layer.linear1, layer.linear2, layer.norm2)
    return [*(t for pair in projections for t in pair), *(t for m in modules for t in (m.weight, m.bias))]


@pytest.mark.parametrize("norm_first", [False, True])
def test_against_torchs_layer(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(
        24, 3, 40, 0.0, "gelu", 1e-3, batch_first=True, norm_first=norm_first, dtype=torch.float64
    )
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    hidden = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    options = {"heads": 3, "norm_first": norm_first, "eps1": 1e-3, "eps2": 1e-3}
    found = encoder_layer(x, *weights_of(layer), mask=~hidden[:, None, None], **options)
    torch.testing.assert_close(found, layer(x, src_key_padding_mask=hidden))
    assert torch.autograd.gradcheck(lambda x: encoder_layer(x, *weights_of(layer), **options), x.requires_grad_())

    packed = torch.cat([x[0], x[1, :4]]).detach()
    bounds = torch.tensor([0, 7, 7, 11], dtype=torch.int32)
    rows = encoder_layer(packed, *weights_of(layer), cu_seqlens=bounds, **options)
    torch.testing.assert_close(rows, torch.cat([found[0], found[1, :4]]))
