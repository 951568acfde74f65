"""Tests of ``llmbook.lora``: adapters beside frozen weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from llmbook import lora
from llmbook.batches import Batch, ResumableBatches
from llmbook.generation import QuantizedLinear, Sampling, generate, quantize
from llmbook.lora import LoRAConfig, apply_lora, merge_lora
from llmbook.model import ModelConfig, TransformerLM
from llmbook.training import Trainer, TrainingConfig

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


# What is adapted, by name


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q_proj",), ["blocks.0.attention.q_proj", "blocks.1.attention.q_proj"]),
        (("attention.q_proj", "lm_head"), None),
        ((r"blocks.1.attention.q_proj",), ["blocks.1.attention.q_proj"]),
        (
            r".*\.1\.attention\.[qk]_proj",
            ["blocks.1.attention.q_proj", "blocks.1.attention.k_proj"],
        ),
    ],
)
def test_targets(targets, expected):
    names = apply_lora(model(), LoRAConfig(rank=2, targets=targets), seed=0)
    if expected is None:
        expected = ["blocks.0.attention.q_proj", "blocks.1.attention.q_proj", "lm_head"]
    assert names == expected


def test_all_linear_is_the_default_and_leaves_the_head_alone():
    made = model()
    names = apply_lora(made, LoRAConfig(), seed=0)
    assert len(names) == 14 and "lm_head" not in names
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{matrix}" for name in names for matrix in "ab"}
    assert {id(p) for p in lora.lora_parameters(made)} == {
        id(p) for p in made.parameters() if p.requires_grad
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("query",)}, "targets: expected linear layers, such as q_proj, k_proj"),
        ({"targets": ("q_proj", "query")}, "got 'query'"),
        ({"targets": ("embedding",)}, "got 'embedding', a module of class Embedding$"),
        ({"targets": ("blocks.0",)}, "got 'blocks.0', a module of class "),
        ({"targets": "q_proj"}, r"matches no whole name: write \('q_proj',\)$"),
        ({"targets": "query"}, "got 'query'$"),
        ({"targets": "("}, "targets: '\\(' is no regular expression"),
        ({"targets": ()}, "targets: expected names of layers"),
        ({"rank": 17}, "rank: expected at most 16, as blocks.0.attention.q_proj is 16 by 16, got"),
        ({"rank": 0}, "rank: expected"),
        ({"alpha": 0.0}, "alpha: expected a positive number, got 0"),
        ({"alpha": math.inf}, "alpha: expected a positive number, got inf"),
        ({"dropout": 1.0}, "dropout: expected"),
    ],
)
def test_what_cannot_be_adapted_is_named(changes, message):
    made = model()
    with pytest.raises(ValueError, match=message):
        apply_lora(made, LoRAConfig(**{"rank": 2, **changes}), seed=0)
    assert all(p.requires_grad for p in made.parameters())  # nothing was changed


def test_a_tied_head_is_refused_and_an_adapter_elsewhere_is_not():
    made = model(tie_embeddings=True)
    with pytest.raises(ValueError, match="lm_head shares its with embedding"):
        apply_lora(made, LoRAConfig(rank=2, targets=("lm_head",)), seed=0)
    apply_lora(made, LoRAConfig(rank=2), seed=0)
    assert made.lm_head.weight is made.embedding.weight


def test_a_second_adapter_is_refused():
    with pytest.raises(ValueError, match=r"model: expected one without adapters, but blocks.0"):
        apply_lora(adapted(), LoRAConfig(rank=2), seed=0)


def test_a_model_without_adapters_is_refused():
    for function in (merge_lora, lora.lora_parameters, lora.adapter_state):
        with pytest.raises(ValueError, match="model: expected one with adapters") as caught:
            function(model())
        assert str(caught.value).endswith(", got a module of class TransformerLM")


# The layer


def test_parameters_do_not_depend_on_the_state_of_the_generators():
    first, second = model(), model()
    apply_lora(first, LoRAConfig(rank=2), seed=3)
    torch.manual_seed(5)
    apply_lora(second, LoRAConfig(rank=2), seed=3)
    for a, b in zip(lora.lora_parameters(first), lora.lora_parameters(second), strict=True):
        assert torch.equal(a, b)


def test_lora_a_has_the_variance_that_is_promised():
    layer = lora.LoRALinear(nn.Linear(300, 400), LoRAConfig(rank=200))
    assert layer.lora_a.var().item() == pytest.approx(1 / 900, rel=0.03)
    assert layer.lora_a.abs().max().item() <= 300**-0.5
    assert not layer.lora_b.any()


@pytest.mark.parametrize(("rslora", "scale"), [(False, 4.0), (True, 8.0)])
def test_scale_and_effective_weight(rslora, scale):
    config = LoRAConfig(rank=4, rslora=rslora)
    layer = lora.LoRALinear(nn.Linear(8, 6), config).double()
    nn.init.normal_(layer.lora_b)
    assert config.scale == scale
    x = torch.randn(3, 8).double()
    expected = layer.base(x) + scale * x @ layer.lora_a.T @ layer.lora_b.T
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), expected)


def test_defaults_are_those_that_are_documented():
    config = LoRAConfig()
    assert (config.rank, config.alpha, config.dropout, config.rslora) == (8, 16.0, 0.0, False)
    assert config.targets == "all-linear" and config.scale == 2.0


def test_dropout_acts_in_training_and_only_on_the_adapter():
    layer = lora.LoRALinear(nn.Linear(64, 4), LoRAConfig(rank=2, dropout=0.5))
    nn.init.normal_(layer.lora_b)
    x = torch.randn(5, 64)
    assert not torch.allclose(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    layer.enabled = False
    assert torch.equal(layer(x), layer.base(x))


def test_merged_and_unmerged_weights_come_back_within_the_bound():
    made, base = adapted(), model()
    layers = merge_lora(made)
    lora.unmerge_lora(made, layers)
    for name, layer in layers.items():
        before = base.get_submodule(name).weight
        bound = torch.finfo(torch.float32).eps * (before.abs() + layer.update.abs())
        assert ((layer.base.weight - before).abs() <= bound).all()
    with pytest.raises(ValueError, match="layers: expected those that were merged into model"):
        lora.unmerge_lora(model(), layers)
    with pytest.raises(ValueError, match=r"layers: expected those .*, got none"):
        lora.unmerge_lora(model(), {})


def test_merged_has_the_plain_step_of_generate_and_the_same_tokens():
    made = adapted()
    greedy = {"max_new_tokens": 8, "sampling": Sampling(temperature=0.0)}
    expected = generate(made, [[1, 2, 3]], **greedy)[0].ids
    merge_lora(made)
    assert generate(made, [[1, 2, 3]], **greedy)[0].ids == expected
    assert generate(model(), [[1, 2, 3]], **greedy)[0].ids != expected


class Rows(ResumableBatches):
    """The same batch in each step."""

    def identity(self):
        return {"what": "rows"}

    def __getitem__(self, step):
        return Batch(IDS, IDS.roll(-1, 1))


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "lm_head")])
def test_the_trainer_moves_the_thin_matrices_and_nothing_else(targets):
    made = model()
    apply_lora(made, LoRAConfig(rank=2, targets=targets), seed=0)
    config = TrainingConfig(n_steps=2, batch_size=2, learning_rate=0.01, weight_decay=0.0, warmup=0)
    Trainer(made, Rows(), config).train()
    for layer in lora.lora_layers(made).values():
        assert layer.lora_b.any()
    with lora.without_lora(made):
        assert torch.equal(made.eval()(IDS), model()(IDS))


def test_dropout_at_a_head_is_refused():
    with pytest.raises(ValueError, match=r"dropout: expected 0.0 where lm_head is adapted"):
        apply_lora(model(), LoRAConfig(rank=2, dropout=0.1, targets=("lm_head",)), seed=0)


# Adapters apart from their base


def test_an_adapter_for_another_base_is_refused():
    state, other = lora.adapter_state(adapted()), model()
    other.norm.weight.data[0] = 2
    with pytest.raises(ValueError, match="state: expected an adapter for this base"):
        lora.load_adapter_state(other, state)
    lora.load_adapter_state(other, state, any_base=True)
    assert lora.base_fingerprint(other) != state.base == lora.base_fingerprint(model())


def test_a_state_that_does_not_fit_is_refused():
    state = lora.adapter_state(adapted())
    name = "blocks.0.attention.q_proj.lora_a"
    tensors = {key: value for key, value in state.tensors.items() if key != name}
    with pytest.raises(ValueError, match=rf"state: expected {name} of shape \(2, 16\), got none"):
        lora.load_adapter_state(model(), state._replace(tensors=tensors))
    extra = state.tensors | {"z.lora_a": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"got also z\.lora_a"):
        lora.load_adapter_state(model(), state._replace(tensors=extra))
    made = model()
    apply_lora(made, LoRAConfig(rank=4), seed=0)
    with pytest.raises(ValueError, match="state: expected"):
        lora.load_adapter_state(made, state)


def test_the_state_is_a_copy():
    made = adapted()
    state = lora.adapter_state(made)
    lora.lora_parameters(made)[0].data.zero_()
    assert state.tensors["blocks.0.attention.q_proj.lora_a"].any()


# Quantized layers and bits


def test_dense_weight_of_a_quantized_layer():
    linear = nn.Linear(8, 4)
    quantized = QuantizedLinear.of(linear)
    dense = lora.dense_weight(quantized)
    assert (dense - linear.weight).abs().max() <= quantized.scale.max() / 2 * 1.001
    with pytest.raises(ValueError, match="layer: expected a linear layer"):
        lora.dense_weight(nn.LayerNorm(4))


def test_training_over_a_quantized_base():
    made = quantize(model())
    apply_lora(made, LoRAConfig(rank=2), seed=0)
    made(IDS).square().mean().backward()
    assert all(layer.lora_b.grad.any() for layer in lora.lora_layers(made).values())


class Sure(nn.Module):
    """Gives one token a logit, and all others none."""

    def __init__(self, token: int, logit: float):
        super().__init__()
        self.token, self.logit = token, logit

    def forward(self, ids):
        logits = torch.zeros(*ids.shape, 20)
        logits[..., self.token] = self.logit
        return logits


@pytest.mark.parametrize(
    ("token", "logit", "bits", "right"), [(3, 0.0, 0.0, None), (3, 50.0, 2.0, 1), (4, 50.0, -70, 0)]
)
def test_bits_stored(token, logit, bits, right):
    from llmbook.instruction import Example

    example = Example((1, 2, 3, 5), (False, False, True, True))
    fact = lora.NewFact(example, 2, {3: 1, 4: 1, 5: 1, 6: 1})
    found, n_right = lora.bits_stored(Sure(token, logit), [fact])
    assert found == pytest.approx(bits, abs=0.2)
    assert right is None or n_right == right


def test_optimizer_bytes():
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert lora.optimizer_bytes(optimizer) == 2 * 4 * 20
