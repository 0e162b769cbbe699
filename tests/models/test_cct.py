"""The compact transformer compared with its definition."""

from __future__ import annotations

import pytest
import torch
from networks import create, images, small
from torch import nn

from ood_scores.errors import ShapeMismatch
from ood_scores.models.networks.cct import EncoderLayer


def test_cct_encoder_layer_matches_its_definition() -> None:
    torch.manual_seed(0)
    layer = EncoderLayer(dim=6, heads=2, hidden=8, attn_drop=0.1, drop_path=0.1).double().eval()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    qkv = layer.pre_norm(x) @ layer.self_attn.qkv.weight.T
    heads = []
    for head in range(2):
        q, k, v = (qkv[..., 6 * i + 3 * head : 6 * i + 3 * head + 3] for i in range(3))
        heads.append((q @ k.transpose(1, 2) / 3**0.5).softmax(-1) @ v)
    attended = layer.norm1(x + layer.self_attn.proj(torch.cat(heads, -1)))
    expected = attended + layer.linear2(nn.functional.gelu(layer.linear1(attended)))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_cct_pooling_is_a_weighted_average_of_tokens() -> None:
    model = small("haas_cct7_3x1").double()
    tokens = torch.randn(2, 7, 32, dtype=torch.float64)
    expected = []
    for row in tokens:
        weight = torch.exp(row @ model.attention_pool.weight[0] + model.attention_pool.bias)
        expected.append((weight / weight.sum()) @ row)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), torch.stack(expected), rtol=0, atol=1e-14)


def test_cct_uses_dropout_only_in_training() -> None:
    model = create("haas_cct7_3x1", dim=32)
    assert [block.drop_path.drop_prob for block in model.blocks] == pytest.approx([i / 60 for i in range(7)])
    assert all(block.self_attn.drop == 0.1 for block in model.blocks)
    with torch.no_grad():
        assert not torch.equal(model.train()(images()), model(images()))
        assert torch.equal(model.eval()(images()), model(images()))


def test_cct_refuses_images_of_another_size() -> None:
    with pytest.raises(ShapeMismatch, match=r"24x24 pixels have 144 tokens.*256 positions"):
        small("haas_cct7_3x1")(images(1, size=24))
    assert small("haas_cct7_3x1", img_size=24).eval()(images(1, size=24)).shape == (1, 10)
