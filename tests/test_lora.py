"""Tests of ``llmbook.lora``: adapters beside frozen weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmbook import lora
from llmbook.generation import QuantizedLinear, Sampling, generate, quantize
from llmbook.lora import LoRAConfig, apply_lora, merge_lora
from llmbook.model import ModelConfig, TransformerLM

SIZES = {"vocab_size": 64, "context_length": 16, "d_model": 16, "n_layers": 2, "n_heads": 2}
IDS = torch.arange(20).view(2, 10)


def model(**changes) -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(ModelConfig(**{**SIZES, **changes})).eval()


def adapted(config: LoRAConfig | None = None, **changes) -> TransformerLM:
    """A model with adapters that do something."""
    made = model(**changes)
    apply_lora(made, config or LoRAConfig(rank=2), seed=0)
    stir(made)
    return made


def stir(made: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for layer in lora.lora_layers(made).values():
        drawn = torch.randn(layer.lora_b.shape, generator=generator)
        layer.lora_b.data.copy_(drawn)


def test_at_first_nothing_changes_to_the_bit():
    base = model()
    before = base(IDS)
    apply_lora(base, LoRAConfig(), seed=0)
    assert torch.equal(base(IDS), before)


def test_without_lora_is_the_base_to_the_bit():
    made = adapted()
    with lora.without_lora(made):
        assert torch.equal(made(IDS), model()(IDS))
    assert not torch.allclose(made(IDS), model()(IDS))


def test_merged_and_unmerged():
    made = adapted()
    expected = made(IDS)
    layers = merge_lora(made)
    assert {type(m) for m in made.modules() if hasattr(m, "in_features")} == {nn.Linear}
    torch.testing.assert_close(made(IDS), expected)
    lora.unmerge_lora(made, layers)
    torch.testing.assert_close(made(IDS), expected)


def test_generate_does_not_ignore_adapters():
    made = adapted()
    ids = [[1, 2, 3]]
    by_hand = torch.tensor(ids)
    for _ in range(8):
        by_hand = torch.cat([by_hand, made(by_hand)[:, -1:].argmax(-1)], dim=1)
    found = generate(made, ids, max_new_tokens=8, sampling=Sampling(temperature=0.0))[0]
    assert list(found.ids) == by_hand[0, 3:].tolist()


def test_over_a_quantized_base():
    base = quantize(model())
    before = base(IDS)
    apply_lora(base, LoRAConfig(rank=2), seed=0)
    assert torch.equal(base(IDS), before)
    assert isinstance(base.blocks[0].attention.q_proj.base, QuantizedLinear)
    with pytest.raises(
        ValueError, match=r"model: expected a Linear under blocks.0.attention.q_proj"
    ):
        merge_lora(base)


def test_state_goes_to_another_copy_of_the_base():
    made, other = adapted(), model()
    lora.load_adapter_state(other, lora.adapter_state(made))
    assert torch.equal(made(IDS), other(IDS))
