"""The model: configurations, counts, masks, and equality with transformers through files."""

import inspect
import json
import math
import os
import shutil
import subprocess
import sys
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from safetensors.torch import save_model as save_by_safetensors
from torch.utils.flop_counter import FlopCounterMode

from llmbook import model as module
from llmbook.batches import Batch
from llmbook.blocks import ACTIVATIONS
from llmbook.model import (
    PRESETS,
    ModelConfig,
    TransformerLM,
    activation_bytes,
    cache_bytes,
    count_parameters,
    flops_per_token,
    load_model,
    model_type,
    parameter_counts,
    save_model,
    training_memory,
)
from llmbook.positions import RopeScaling, change_rope_layout

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SMALL = {"vocab_size": 61, "context_length": 48, "d_model": 32, "n_layers": 2, "n_heads": 4}
GPT2 = {
    "positions": "learned",
    "norm": "layernorm",
    "activation": "gelu_tanh",
    "bias": True,
    "tie_embeddings": True,
}
KINDS = {
    "gpt2": GPT2,
    "llama": {"n_kv_heads": 2},
    "qwen2": {"n_kv_heads": 2, "qkv_bias": True, "tie_embeddings": True},
    "qwen3": {"n_kv_heads": 2, "d_head": 16, "qk_norm": True},
    "mistral": {"n_kv_heads": 2, "sliding_window": 8},
    "mixtral": {"n_kv_heads": 2, "n_experts": 4, "n_active_experts": 2},
    "qwen3_moe": {"n_experts": 4, "n_active_experts": 2, "qk_norm": True},
    "stablelm": {"norm": "layernorm", "norm_bias": True, "d_rope": 4, "qkv_bias": True},
    "ernie4_5": {"n_kv_heads": 2, "layout": "interleaved", "d_head": 16},
    "llmbook": {"norm": "layernorm", "positions": "sinusoidal", "activation": "relu"},
}


@pytest.fixture
def untyped():
    """Switch jaxtyping's checks off, as they are for a reader."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def small(**changes):
    return ModelConfig(**SMALL | changes)


def made(**changes):
    return TransformerLM(small(**changes)).eval()


def exact(**changes):
    """In 64 bits, where rounding can neither be taken for a fault nor hide one."""
    return made(**changes).double()


def assert_near(ours, expected):
    """Equal up to rounding, where theirs computes norms and angles in 32 bits whatever is asked."""
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def some_ids(batch=2, sequence=20, vocab_size=61):
    return torch.randint(vocab_size, (batch, sequence))


# --- configurations -----------------------------------------------------------------------------


def test_what_is_left_out_is_derived():
    config = small()
    assert (config.n_kv_heads, config.d_head, config.d_ff, config.qkv_bias) == (4, 8, 88, False)
    assert small(bias=True).qkv_bias is True
    assert small(activation="gelu").d_ff == 128
    assert ModelConfig.preset("gpt2", d_model=96, n_heads=3).d_ff == 384
    assert (config.d_rope, small(d_head=12).d_rope, small(d_head=12, d_rope=4).d_rope) == (8, 12, 4)
    biased = [small(bias=True, norm=norm).norm_bias for norm in ("layernorm", "rmsnorm")]
    assert biased == [True, False] and small(norm="layernorm").norm_bias is False


def test_defaults_of_a_configuration():
    """Those of a small Llama: the text of the chapter describes them, and files rely on them."""
    given_by_default = {field.name: getattr(small(), field.name) for field in fields(ModelConfig)}
    assert given_by_default == SMALL | {
        "n_kv_heads": 4,
        "d_head": 8,
        "d_ff": 88,
        "n_experts": 0,
        "n_active_experts": 0,
        "d_shared": 0,
        "normalize_experts": True,
        "positions": "rope",
        "rope_base": 10_000.0,
        "rope_scaling": None,
        "layout": "half",
        "d_rope": 8,
        "norm": "rmsnorm",
        "norm_eps": 1e-5,
        "norm_position": "pre",
        "activation": "swiglu",
        "bias": False,
        "qkv_bias": False,
        "norm_bias": False,
        "qk_norm": False,
        "sliding_window": None,
        "tie_embeddings": False,
        "dropout": 0.0,
    }


WRONG = [
    ({"vocab_size": 0}, "vocab_size: expected at least 1, got 0"),
    ({"n_layers": 0}, "n_layers: expected at least 1, got 0"),
    ({"n_heads": 5}, "n_heads: expected a divisor of d_model = 32"),
    ({"n_kv_heads": 3}, "n_kv_heads: expected a divisor of n_heads = 4, got 3"),
    ({"d_head": 7}, "d_head: expected an even number for 'rope', got 7"),
    ({"d_ff": 0}, "d_ff: expected at least 1"),
    ({"d_model": 33, "n_heads": 3, "positions": "sinusoidal"}, "d_model: expected an even number"),
    ({"positions": "alibi"}, "positions: expected one of rope, learned"),
    ({"rope_base": 1.0}, "rope_base: expected a number above 1"),
    ({"rope_base": math.inf}, "rope_base: expected a number above 1"),
    ({"rope_base": math.nan}, "rope_base: expected a number above 1"),
    ({"norm": "batchnorm"}, "norm: expected one of rmsnorm, layernorm"),
    ({"norm_eps": 0.0}, "norm_eps: expected a small positive number"),
    ({"norm_eps": math.nan}, "norm_eps: expected a small positive number"),
    ({"norm_position": "sandwich"}, "norm_position: expected one of pre, post"),
    ({"activation": "selu"}, "activation: expected one of"),
    ({"sliding_window": 0}, "sliding_window: expected at least 1, got 0"),
    ({"n_experts": 4}, "n_active_experts: expected 1 to n_experts = 4, got 0"),
    ({"n_active_experts": 2}, "n_active_experts: expected 0 to n_experts = 0, got 2"),
    ({"n_experts": -1}, "n_experts: expected at least 0"),
    ({"d_shared": 8}, "d_shared: expected 0 without experts, got 8"),
    ({"n_experts": 4, "n_active_experts": 2, "bias": True}, "bias: expected False with experts"),
    ({"layout": "mixed"}, "layout: expected one of half, interleaved, got 'mixed'"),
    ({"layout": "interleaved", "positions": "none"}, "layout: expected half where positions are"),
    ({"d_rope": 3}, "d_rope: expected an even number for 'rope', got 3"),
    ({"d_rope": 10}, "d_rope: expected 1 to d_head = 8 where positions are 'rope', got 10"),
    ({"d_rope": 0}, "d_rope: expected 1 to d_head = 8"),
    ({"d_rope": 4, "positions": "none"}, "d_rope: expected 8 to d_head = 8 where positions are"),
    (
        {"d_rope": 2, "rope_scaling": RopeScaling("ntk", 2.0)},
        "d_rope: expected at least 4 for 'ntk', got 2",
    ),
    ({"norm_bias": True}, "norm_bias: expected False for 'rmsnorm', which has none, got True"),
    ({"normalize_experts": False}, "normalize_experts: expected True without experts, got False"),
    ({"dropout": 1.0}, "dropout: expected at least 0 and less than 1"),
    (
        {"positions": "learned", "rope_scaling": RopeScaling("linear", 2.0)},
        "rope_scaling: expected",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_impossible_combinations_are_named(changes, message):
    with pytest.raises(ValueError, match=r"^" + message.replace("(", r"\(")):
        small(**changes)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"n_layers": "3"}, "n_layers: expected int, got '3'"),
        ({"n_layers": True}, "n_layers: expected int, got True"),
        ({"bias": 1}, "bias: expected bool, got 1"),
        ({"d_model": 32.0}, "d_model: expected int, got 32.0"),
        ({"vocab_size": None}, "vocab_size: expected a number, but it is missing"),
        ({"rope_scaling": {"kind": "linear"}}, "rope_scaling: "),
        ({"rope_scaling": {"kind": "linear", "factor": 0.5}}, "rope_scaling: factor"),
        ({"rope_scaling": [1]}, "rope_scaling: expected"),
        ({"n_head": 4}, "n_head: not a field of ModelConfig"),
    ],
)
def test_entries_of_a_wrong_type_are_named(entries, message):
    with pytest.raises(ValueError, match=rf"^{message}"):
        ModelConfig.from_dict(SMALL | entries)


def test_a_missing_size_and_an_unknown_preset_are_named():
    with pytest.raises(ValueError, match=r"^d_model: expected a number, but it is missing"):
        ModelConfig.from_dict({name: size for name, size in SMALL.items() if name != "d_model"})
    with pytest.raises(ValueError, match=r"^name: expected one of tiny, gpt2.*got 'gpt5'"):
        ModelConfig.preset("gpt5")
    with pytest.raises(ValueError, match=r"^1: not a field of ModelConfig"):
        ModelConfig.from_dict(SMALL | {1: 2})


def test_the_tiny_preset():
    config = ModelConfig.preset("tiny")
    sizes = (config.vocab_size, config.context_length, config.d_model, config.n_layers)
    assert (*sizes, config.n_heads) == (512, 128, 64, 3, 2)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    config = ModelConfig.preset(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(replace(config))


# --- counts -------------------------------------------------------------------------------------

PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name):
    assert count_parameters(ModelConfig.preset(name)) == PUBLISHED[name]


def test_presets_have_the_family_of_their_name():
    for name in PRESETS:
        family = model_type(ModelConfig.preset(name))
        assert name == "tiny" or name.replace("qwen2.5", "qwen2").startswith(family), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_formula_counts_what_is_there(kind):
    config = small(**KINDS[kind])
    with torch.device("meta"):
        model = TransformerLM(config)
    assert all(p.is_meta for p in model.parameters()), "nothing is allocated"
    assert count_parameters(config) == count_parameters(model)
    parts = {name: 0 for name in parameter_counts(config)}
    for name, parameter in model.named_parameters():
        part = name if "blocks" not in name else name.split(".", 2)[2]
        part = "norms" if part.split(".")[0].endswith("norm") else part.split(".")[0]
        parts[part] += parameter.numel()
    assert parts == parameter_counts(config)


def test_counting_without_embeddings_and_by_active_experts():
    config = small(**GPT2)
    rest = count_parameters(config) - 32 * (61 + 48)
    assert count_parameters(config, embeddings=False) == rest
    assert count_parameters(TransformerLM(config), embeddings=False) == rest
    mixture = small(**KINDS["mixtral"], d_shared=8)
    dense = count_parameters(mixture, active=True)
    assert count_parameters(mixture) - dense == 2 * 2 * 3 * 32 * mixture.d_ff
    assert count_parameters(torch.nn.Linear(3, 4)) == 16
    with pytest.raises(ValueError, match="model: expected a TransformerLM or a ModelConfig"):
        count_parameters(torch.nn.Linear(3, 4), active=True)


@pytest.mark.parametrize("kind", KINDS)
def test_operations_are_those_that_torch_counts(kind):
    config = small(**KINDS[kind])
    model, ids = TransformerLM(config, backend="reference"), some_ids()
    with FlopCounterMode(display=False) as forward:
        logits = model(ids)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert forward.get_total_flops() == 40 * flops_per_token(config, 20, training=False)
    total = forward.get_total_flops() + backward.get_total_flops()
    assert total == 40 * flops_per_token(config, 20)


def test_causal_operations_count_the_pairs_of_the_mask():
    per_pair = 12 * 2 * 4 * 8
    for window in (None, 1, 5, 20, 48):
        config = small(sliding_window=window)
        pairs = module.causal_mask(20, window).sum().item() / 20
        some = flops_per_token(config, 20, causal=True) - flops_per_token(config, 20)
        assert some == pytest.approx(per_pair * (pairs - 20))
    assert flops_per_token(small()) == flops_per_token(small(), 48)
    with pytest.raises(ValueError, match="sequence: expected at least 1, got 0"):
        flops_per_token(small(), 0)


def kept_bytes(model, ids):
    kept, parameters = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.hidden_states(ids)
    kept[output.untyped_storage().data_ptr()] = output  # which the head keeps
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in parameters)


ACTIVATION_KINDS = {
    **{kind: KINDS[kind] for kind in ("gpt2", "llama", "qwen2", "qwen3")},
    **{name: {"activation": name} for name in ACTIVATIONS},
    "post": {"norm_position": "post"},
}


@pytest.mark.parametrize("kind", ACTIVATION_KINDS)
def test_activations_are_what_autograd_keeps(kind):
    changes = {"d_model": 128, "n_heads": 2, "n_layers": 3} | ACTIVATION_KINDS[kind]
    config = small(**changes)
    expected = activation_bytes(config, 16, 40)
    assert kept_bytes(TransformerLM(config), some_ids(16, 40)) == pytest.approx(expected, rel=0.03)


def test_memory_of_training_and_of_the_cache():
    config = small()
    memory = training_memory(config, 3, 10)
    assert memory["weights"] == memory["gradients"] == 4 * count_parameters(config)
    assert memory["optimizer"] == 8 * count_parameters(config)
    assert memory["logits"] == 4 * 3 * 10 * 61
    assert 2 * training_memory(config, 3, 10, torch.bfloat16)["weights"] == memory["weights"]
    for kind in ("llama", "mistral"):
        model = made(**KINDS[kind])
        expected = cache_bytes(model.config, 3, 48, torch.float32)
        assert model.new_cache(3).nbytes == expected
    with pytest.raises(ValueError, match="n_experts: expected 0, got 4"):
        activation_bytes(small(**KINDS["mixtral"]), 1, 1)
    with pytest.raises(
        ValueError, match="batch_size: expected a whole number of at least 1, got 0"
    ):
        activation_bytes(config, 0, 1)


# --- the function -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_backends_agree_with_their_gradients(kind):
    config, ids = small(**KINDS[kind]), some_ids()
    models = [TransformerLM(config, backend).double() for backend in ("torch", "reference")]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    torch.testing.assert_close(models[0](ids), models[1](ids))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_first_loss_is_near_that_of_guessing():
    model = TransformerLM(small(vocab_size=2000, d_model=256))
    ids = some_ids(8, 40, 2000)
    loss = F.cross_entropy(model(ids).flatten(0, 1), some_ids(8, 40, 2000).flatten())
    assert abs(loss.item() - math.log(2000) - 0.5) < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_one_batch_is_learned_by_heart(kind):
    model, ids = TransformerLM(small(**KINDS[kind])), some_ids(2, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5, "from 4.6"


@st.composite
def any_fields(draw):
    """The fields of any configuration that is possible, small."""
    n_kv_heads = draw(st.sampled_from([1, 2]))
    experts = draw(st.sampled_from([0, 0, 3]))
    bias = draw(st.booleans()) and not experts
    positions = draw(st.sampled_from(["rope", "rope", "learned", "sinusoidal", "none"]))
    rotates = positions == "rope"
    d_head = draw(st.sampled_from([2, 6, 8]))
    d_rope = draw(st.sampled_from([None, 2, 4])) if rotates and d_head > 4 else None
    kinds = [None, "linear", "yarn", "llama3"] if rotates else [None]
    kinds += ["ntk", "dynamic"] if rotates and (d_rope or d_head) > 2 else []
    norm = draw(st.sampled_from(["rmsnorm", "layernorm"]))
    return dict(
        vocab_size=draw(st.integers(2, 40)),
        context_length=draw(st.integers(12, 40)),
        d_model=draw(st.sampled_from([8, 12, 20])),
        n_layers=draw(st.integers(1, 2)),
        n_heads=n_kv_heads * draw(st.integers(1, 2)),
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        d_rope=d_rope,
        layout=draw(st.sampled_from(["half", "interleaved"])) if rotates else "half",
        d_ff=draw(st.integers(1, 20)),
        n_experts=experts,
        n_active_experts=draw(st.integers(1, experts)) if experts else 0,
        d_shared=draw(st.sampled_from([0, 5])) if experts else 0,
        positions=positions,
        rope_scaling=draw(st.sampled_from(kinds)),
        norm=norm,
        norm_bias=draw(st.sampled_from([None, True, False])) if norm == "layernorm" else None,
        normalize_experts=draw(st.booleans()) if experts else True,
        norm_position=draw(st.sampled_from(["pre", "pre", "post"])),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        bias=bias,
        qkv_bias=draw(st.booleans()) or bias,
        qk_norm=draw(st.booleans()),
        sliding_window=draw(st.none() | st.integers(1, 12)),
        tie_embeddings=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.1])),
    )


def config_of(given_fields):
    kind = given_fields["rope_scaling"]
    scaling = None if kind is None else RopeScaling(kind, 4.0, 8 if kind == "dynamic" else 16)
    given_fields = given_fields | {"rope_scaling": scaling}
    return ModelConfig(**{name: value for name, value in given_fields.items() if value is not None})


@given(any_fields(), st.integers(0, 11))
@settings(max_examples=60)
def test_any_model_is_causal_and_counted(given_fields, place):
    config = config_of(given_fields)
    model = TransformerLM(config).double().eval()
    assert count_parameters(config) == count_parameters(model)
    ids = torch.arange(12)[None] % config.vocab_size
    changed = ids.clone()
    changed[0, place] = (ids[0, place] + 1) % config.vocab_size
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.isfinite(before).all()
    torch.testing.assert_close(before[:, :place], after[:, :place])


@given(any_fields(), st.integers(1, 11))
@settings(max_examples=60)
def test_any_model_reads_in_pieces_what_it_reads_at_once(given_fields, first):
    assume(given_fields["rope_scaling"] != "dynamic")  # whose factor is that of the text so far
    config = config_of(given_fields)
    model = TransformerLM(config).double().eval()
    ids = torch.arange(24).view(2, 12) % config.vocab_size
    cache = model.new_cache(2)
    with torch.no_grad():
        pieces = [model(ids[:, :first], cache=cache)]
        pieces += [model(ids[:, i : i + 1], cache=cache) for i in range(first, 12)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(ids))


@given(any_fields())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_model_survives_its_file(tmp_path, given_fields):
    config = config_of(given_fields)
    model = TransformerLM(config).eval()
    save_model(model, tmp_path / "model", max_shard_size=1500)
    again = load_model(tmp_path / "model")
    assert again.config == config
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert (again.lm_head.weight is again.embedding.weight) == config.tie_embeddings


@pytest.mark.parametrize("kind", KINDS)
def test_documents_in_one_row_are_as_if_alone(kind):
    model, ids = exact(**KINDS[kind]), some_ids(1, 20)
    documents = torch.tensor([[0] * 9 + [1] * 2 + [2] * 6 + [-1] * 3])
    with torch.no_grad():
        together = model(ids, document_ids=documents)
        alone = torch.cat([model(ids[:, a:b]) for a, b in ((0, 9), (9, 11), (11, 17))], dim=1)
    torch.testing.assert_close(together[:, :17], alone)
    assert torch.isfinite(together).all()
    places = torch.cat([torch.arange(n) for n in (9, 2, 6, 3)])[None]
    batch = Batch(ids, ids, places, documents)
    given_positions = model(
        batch.inputs, position_ids=batch.position_ids, document_ids=batch.document_ids
    )
    assert torch.equal(given_positions, together), "what a packed batch has"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind, side):
    model, ids = exact(**KINDS[kind]), some_ids(2, 14)
    steps = torch.arange(14)
    short = steps - 4 if side == "left" else torch.where(steps < 10, steps, -1)
    positions = torch.stack([steps, short.clamp(min=-1)])
    real = slice(4, 14) if side == "left" else slice(0, 10)
    following = some_ids(2, 1)
    with torch.no_grad():
        alone = model(torch.cat([ids[1:, real], following[1:]], dim=1))
        padded = model(ids, position_ids=positions)
        cache = model.new_cache(2)
        cached = model(ids, position_ids=positions, cache=cache)
        step = model(following, cache=cache)
    torch.testing.assert_close(padded[1:, real], alone[:, :-1])
    torch.testing.assert_close(cached[1:, real], alone[:, :-1])
    torch.testing.assert_close(step[1], alone[0, -1:])
    assert torch.isfinite(padded).all()


def test_a_window_cuts():
    model, ids = made(n_layers=1, sliding_window=4), some_ids(1, 20)
    changed = ids.clone()
    changed[0, 3] = (ids[0, 3] + 1) % 61
    moved = (model(ids) - model(changed)).abs().amax(-1)[0] > 0
    assert moved.nonzero().flatten().tolist() == [3, 4, 5, 6]


def test_a_tied_matrix_gets_the_sum_of_two_gradients():
    tied, apart = exact(tie_embeddings=True), exact()
    apart.load_state_dict(tied.state_dict())
    ids = some_ids()
    for model in (tied, apart):
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    both = apart.embedding.weight.grad + apart.lm_head.weight.grad
    torch.testing.assert_close(tied.embedding.weight.grad, both)
    assert len([name for name, _ in tied.named_parameters() if "lm_head" in name]) == 0


def test_balance_loss_is_summed_over_blocks():
    model = exact(**KINDS["mixtral"])
    model(some_ids())
    losses = [block.feed_forward.balance_loss for block in model.blocks]
    torch.testing.assert_close(model.balance_loss(), sum(losses))
    assert model.balance_loss() >= 2 * 2 - 1e-4, "n_active in each layer, if balanced"
    model.balance_loss().backward()
    assert model.blocks[0].feed_forward.router.weight.grad.any()
    assert made().balance_loss() == 0


def test_dropout_acts_in_training_only():
    model, ids = made(dropout=0.5), some_ids()
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_other_types_of_numbers(kind, dtype):
    model, ids = exact(**KINDS[kind]), some_ids()
    expected = model(ids)
    model.to(dtype)
    with torch.no_grad():
        logits = model(ids)
        cache = model.new_cache(2)
        assert model(ids, cache=cache).dtype == dtype
    assert logits.dtype == dtype
    limit = 1e-9 if dtype == torch.float64 else 0.15
    assert (logits.double() - expected).abs().mean() < limit


def test_a_model_can_be_copied_moved_and_compiled_into_a_graph():
    model = exact()
    ids = some_ids()
    exported = torch.export.export(model, (ids,)).module()
    torch.testing.assert_close(exported(ids), model(ids))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
@torch.no_grad()
def test_a_compiled_step_with_a_cache_is_compiled_once(kind, untyped):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model, ids = exact(**KINDS[kind]), some_ids()
    cache = model.new_cache(2)
    step = torch.compile(lambda ids: model(ids, cache=cache), backend="eager")
    pieces = [step(ids[:, :6]), *(step(ids[:, at : at + 1]) for at in range(6, 20))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids))
    graphs = 2  # one for the prompt, one for all fourteen tokens
    assert counters["stats"]["unique_graphs"] == graphs
    cache.truncate(19)
    step(ids[:, 19:])
    assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


# --- bad input ----------------------------------------------------------------------------------


def test_ids_that_cannot_be_are_named():
    model = made()
    for wrong in (torch.tensor([[61]]), torch.tensor([[0, -1]])):
        with pytest.raises(ValueError, match=r"^ids: expected 0 to 60, got"):
            model(wrong)
    with pytest.raises(ValueError, match="ids: expected 1 to context_length = 48 tokens, got 49"):
        model(some_ids(1, 49))
    with pytest.raises(ValueError, match="ids: expected 1 to context_length = 48 tokens, got 0"):
        model(some_ids(1, 0))
    with pytest.raises(ValueError, match="capacity: expected at most context_length = 48, got 49"):
        model.new_cache(1, 49)
    with pytest.raises(ValueError, match="document_ids: expected None with a cache"):
        model(some_ids(1, 4), document_ids=torch.zeros(1, 4).long(), cache=model.new_cache(1))


def test_types_and_shapes_are_checked_where_no_hook_checks_them():
    ids = some_ids(2, 6)

    def check(ids, position_ids=None, document_ids=None):
        module._check_input(small(), ids, position_ids, document_ids, None)

    for wrong in (ids.int(), ids.float(), ids[0], ids[None]):
        with pytest.raises(ValueError, match=r"^ids: expected \(batch, sequence\) of torch.int64"):
            check(wrong)
    for name, shape in (
        ("position_ids", (2, 5)),
        ("position_ids", (3, 6)),
        ("document_ids", (1, 6)),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: expected \(2, 6\) of torch.int64"):
            check(ids, **{name: torch.zeros(shape).long()})
    check(ids, position_ids=torch.zeros(1, 6).long())


def test_learned_positions_end():
    model = made(**GPT2)
    with pytest.raises(ValueError, match="position_ids"):
        model(some_ids(1, 2), position_ids=torch.tensor([[47, 48]]))


# --- files: with transformers -------------------------------------------------------------------

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 16}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 61}
OLD |= {"initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
OTHERS = {
    "gpt2": transformers.GPT2Config(**OLD),
    "gpt2-apart": transformers.GPT2Config(
        **OLD, tie_word_embeddings=False, n_inner=56, activation_function="relu"
    ),
    "llama": transformers.LlamaConfig(**SIZES),
    "llama-3": transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama-yarn": transformers.LlamaConfig(**SIZES, rope_parameters=YARN),
    "llama-biased": transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama-linear": transformers.LlamaConfig(
        **SIZES,
        rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
        hidden_act="gelu",
        head_dim=12,
    ),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen2-window": transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=0
    ),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=12, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=8),
    "mistral-whole": transformers.MistralConfig(**SIZES, sliding_window=None, head_dim=16),
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "mixtral-window": transformers.MixtralConfig(
        **SIZES, num_local_experts=3, num_experts_per_tok=1, sliding_window=8
    ),
    "llama-dynamic": transformers.LlamaConfig(
        **SIZES | {"max_position_embeddings": 16},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0},
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, norm_topk_prob=True, head_dim=12),
    "qwen3_moe-plain": transformers.Qwen3MoeConfig(
        **SIZES, **EXPERTS, norm_topk_prob=False, use_sliding_window=True, sliding_window=8
    ),
    "stablelm": transformers.StableLmConfig(**SIZES),
    "stablelm-half": transformers.StableLmConfig(
        **SIZES, partial_rotary_factor=0.5, use_qkv_bias=True, tie_word_embeddings=True
    ),
    "ernie4_5": transformers.Ernie4_5Config(**SIZES, pad_token_id=None, head_dim=12),
    "ernie4_5-biased": transformers.Ernie4_5Config(
        **SIZES, pad_token_id=None, head_dim=None, use_bias=True, tie_word_embeddings=False
    ),
}


def plainly(model):
    """Let experts be computed one by one: the fast way knows no 64 bits."""
    if model.config.model_type in ("mixtral", "qwen3_moe"):
        model.set_experts_implementation("eager")
    return model


def theirs_of(name):
    config = deepcopy(OTHERS[name])  # a model writes its type into it
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    plainly(model)
    with torch.no_grad():  # biases and gains that are not all 0 and 1
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def greedy(model, prompt, n):
    cache, ids = model.new_cache(len(prompt)), prompt
    with torch.no_grad():
        for _ in range(n):
            prompt = model(prompt, cache=cache)[:, -1:].argmax(dim=-1)
            ids = torch.cat([ids, prompt], dim=1)
    return ids


@pytest.mark.parametrize("name", OTHERS)
def test_logits_gradients_and_greedy_text_equal_theirs(name, tmp_path):
    theirs = theirs_of(name).double()
    theirs.save_pretrained(tmp_path)
    ours = TransformerLM.from_pretrained(tmp_path)
    assert ours.embedding.weight.dtype == torch.float64
    same = "llama" if name == "mistral-whole" else OTHERS[name].model_type  # the same function
    assert model_type(ours.config) == same
    assert count_parameters(ours) == theirs.num_parameters()
    ids = some_ids(2, 24)
    expected = theirs(ids, use_cache=False).logits
    assert_near(ours(ids), expected)
    for logits in (ours(ids), expected):
        F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    assert_near(ours.embedding.weight.grad, theirs.get_input_embeddings().weight.grad)
    assert_near(*(sum(p.grad.square().sum() for p in m.parameters()) for m in (ours, theirs)))
    options = {"max_new_tokens": 30, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(greedy(ours, ids, 30), theirs.generate(ids, **options))


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("most", [5_000_000_000, 6000])
def test_what_we_save_opens_in_transformers(name, most, tmp_path):
    theirs = theirs_of(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours", max_shard_size=most)
    again = plainly(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours"))
    assert type(again) is type(theirs) or name == "mistral-whole"
    ids = some_ids(2, 24)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, theirs(ids).logits)
    assert load_model(tmp_path / "ours").config == ours.config
    names = [set(), set()]
    for found, folder in zip(names, ("theirs", "ours"), strict=True):
        for path in (tmp_path / folder).glob("*.safetensors"):
            tensors = load_file(path)
            found |= tensors.keys()
            size = sum(tensor.nbytes for tensor in tensors.values())
            assert folder == "theirs" or size <= most or len(tensors) == 1
            with safe_open(path, "pt") as file:
                assert file.metadata() == {"format": "pt"}
    assert names[0] == names[1], "the same names, tied weights once"


DEFAULTS = {
    "gpt2": (transformers.GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    **{
        name: (getattr(transformers, f"{name.title()}Config"), dict(list(SIZES.items())[1:6]))
        for name in ("llama", "qwen2", "qwen3", "mistral", "mixtral")
    },
    "qwen3_moe": (transformers.Qwen3MoeConfig, dict(list(SIZES.items())[1:6]) | EXPERTS),
    "stablelm": (transformers.StableLmConfig, dict(list(SIZES.items())[1:6])),
    "ernie4_5": (transformers.Ernie4_5Config, dict(list(SIZES.items())[1:6])),
}


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("kind", DEFAULTS)
def test_their_own_defaults_in_several_files_of_bfloat16(kind, tie, tmp_path):
    make, sizes = DEFAULTS[kind]
    config = make(**sizes, vocab_size=61, tie_word_embeddings=tie)
    theirs = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="15KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    ours = load_model(tmp_path / "theirs")
    assert (ours.lm_head.weight is ours.embedding.weight) == tie
    ours.save_pretrained(tmp_path / "ours", max_shard_size=20_000, eos_token_id=None)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, theirs.state_dict()[name]), name
    ids = some_ids(1, 10)
    text = again.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)
    assert text.shape == (1, 22), "no end is known"


def test_files_of_earlier_versions_open(tmp_path):
    theirs = theirs_of("llama-3")
    theirs.save_pretrained(tmp_path)
    expected = load_model(tmp_path).config
    path = tmp_path / "config.json"
    entries = json.loads(path.read_text())
    rope = entries.pop("rope_parameters")
    entries["rope_theta"] = rope.pop("rope_theta")
    for key in ("rope_type", "type"):
        kind = rope.pop("rope_type", None) or rope.pop("type")
        entries["rope_scaling"] = rope | {key: kind}
        rope[key] = kind
        path.write_text(json.dumps(entries))
        assert load_model(tmp_path).config == expected
    entries["rope_scaling"] = None
    path.write_text(json.dumps(entries))
    assert load_model(tmp_path).config == replace(expected, rope_scaling=None)


def test_the_first_gpt2_files_open(tmp_path):
    theirs = theirs_of("gpt2")
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(path).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    tensors["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, path)
    ids = some_ids()
    ours, theirs = load_model(tmp_path, dtype=torch.float64), theirs.double()
    torch.testing.assert_close(ours(ids), theirs(ids).logits)


def test_a_tied_head_may_be_there_twice_if_it_is_the_same(tmp_path):
    model = made(tie_embeddings=True)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    assert "lm_head.weight" not in tensors
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, path)
    again = load_model(tmp_path)
    assert again.lm_head.weight is again.embedding.weight
    assert torch.equal(again.lm_head.weight, head)
    save_file(tensors | {"lm_head.weight": head + 1}, path)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding"):
        load_model(tmp_path)


# --- files: types, devices, replacing -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_type_is_kept_or_chosen(dtype, tmp_path):
    model = made(**KINDS["qwen3"]).to(dtype)
    model.save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())
    assert entries["dtype"] == str(dtype).removeprefix("torch.")
    again = load_model(tmp_path)
    assert all(p.dtype == dtype for p in again.parameters())
    assert again.rope.angles.frequencies.dtype == torch.float32
    ids = some_ids()
    assert torch.equal(again(ids), model(ids))
    chosen = load_model(tmp_path, dtype=torch.float32, device="cpu", backend="reference")
    assert chosen.embedding.weight.dtype == torch.float32
    assert not chosen.training


def test_mixed_types_need_a_choice(tmp_path):
    made().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"dtype: expected a choice, as .* has BF16, F32"):
        load_model(tmp_path)
    assert load_model(tmp_path, dtype=torch.float32).norm.weight.dtype == torch.float32


def test_loading_to_another_device_does_not_pass_by_the_cpu(tmp_path):
    model = made()
    model.save_pretrained(tmp_path)
    there = load_model(tmp_path, device="meta")
    assert all(p.is_meta for p in there.parameters())


def test_saving_replaces_a_model_and_keeps_the_rest(tmp_path):
    folder = tmp_path / "model"
    made().save_pretrained(folder, max_shard_size=6000)
    (folder / "tokenizer.json").write_text("{}")
    save_file({"step": torch.zeros(1)}, folder / "optimizer.safetensors")
    (folder / "extra").mkdir()
    (folder / "extra" / "note.txt").write_text("kept")
    second = made(**GPT2)
    second.save_pretrained(folder, eos_token_id=7)
    names = {path.name for path in folder.iterdir()}
    others = {"tokenizer.json", "optimizer.safetensors", "extra"}
    assert names == {"config.json", "model.safetensors"} | others
    assert (folder / "extra" / "note.txt").read_text() == "kept"
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 7
    assert load_model(folder).config == second.config
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing is left over"


def test_parts_of_a_configuration_make_it_again():
    config = small(n_kv_heads=2, rope_scaling=RopeScaling("linear", 2.0))
    assert type(config) is ModelConfig
    assert ModelConfig.__mro__ == (ModelConfig, object), "one class, not a chain"
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert ModelConfig.from_dict(small().to_dict() | {"d_ff": None}) == small()


def compiled(model):
    return torch.compile(model, backend="eager")  # the name of what is inside is the same


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_is_saved_like_the_one_in_it(kind, tmp_path):
    model = made(**KINDS[kind])
    save_model(model, tmp_path / "plain")
    save_model(compiled(model), tmp_path / "whole")
    for layer, block in enumerate(model.blocks):
        model.blocks[layer] = compiled(block)
    save_model(model, tmp_path / "blocks")
    compiled(model).save_pretrained(tmp_path / "both")
    expected = load_file(tmp_path / "plain" / "model.safetensors")
    for folder in ("whole", "blocks", "both"):
        found = load_file(tmp_path / folder / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    assert load_model(tmp_path / "whole").config == model.config


def test_saving_draws_no_random_numbers(tmp_path):
    model = made()
    state = torch.get_rng_state()
    save_model(model, tmp_path / "model")  # in the middle of a training run, say
    assert torch.equal(torch.get_rng_state(), state)


def test_a_compiled_model_opens_in_transformers(tmp_path):
    model, ids = exact(n_kv_heads=2), some_ids()
    save_model(compiled(model), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        found, expected = theirs(ids).logits, model(ids)
    assert_near(found, expected)


class Swapped(torch.nn.Module):
    """A linear layer whose weights are no parameters, as quantized ones are."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("weight", linear.weight.detach())

    def forward(self, x):
        return x @ self.weight.T


def test_a_model_without_its_parameters_is_not_saved_in_part(tmp_path):
    model, folder = made(), tmp_path / "model"
    model.blocks[1].attention.q_proj = Swapped(model.blocks[1].attention.q_proj)
    with pytest.raises(ValueError, match=r"model: expected a parameter blocks.1.attention.q_proj."):
        save_model(model, folder)
    model = made()
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"model: expected no parameter extra\.weight"):
        model.save_pretrained(folder)
    model = made()
    model.lm_head = torch.nn.Linear(32, 70, bias=False)
    with pytest.raises(ValueError, match=r"lm_head.weight of shape \(61, 32\), got \(70, 32\)"):
        model.save_pretrained(folder)
    with pytest.raises(ValueError, match="model: expected a TransformerLM, got Linear"):
        save_model(torch.nn.Linear(2, 2), folder)
    assert not folder.exists()


def test_a_save_that_fails_changes_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    first = made()
    first.save_pretrained(folder)

    def full(*args, **options):
        raise OSError("no space left")

    monkeypatch.setattr(module, "save_file", full)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="no space"):
            made(**GPT2).save_pretrained(target)
    assert load_model(folder).config == first.config
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_rename_that_fails_brings_the_old_model_back(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    first = made()
    first.save_pretrained(folder)
    rename = Path.rename

    def fail_once(path, target):
        if ".part-" in path.name:
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(OSError, match="no"):
        made(**GPT2).save_pretrained(folder)
    assert load_model(folder).config == first.config


def test_a_save_killed_between_two_renames_is_mended(tmp_path):
    folder = tmp_path / "model"
    first = made()
    first.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    folder.rename(tmp_path / ".model.old-123")
    assert load_model(folder).config == first.config, "the old version is found beside"
    assert not folder.exists(), "loading changes nothing"
    second = made(**GPT2)
    second.save_pretrained(folder)
    assert load_model(folder).config == second.config
    assert (folder / "tokenizer.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


KILLED = """
import os, signal, sys
from pathlib import Path
from llmbook.model import ModelConfig, TransformerLM, load_model

folder, left = Path(sys.argv[1]) / "model", None
sizes = dict(vocab_size=31, context_length=8, d_model=16, n_layers=1, n_heads=2)
old, new = (TransformerLM(ModelConfig(**sizes, qk_norm=more)) for more in (False, True))

def die_in_time(event, arguments):
    global left
    if left is not None and event != "os.kill" and event.startswith(("os.", "shutil.", "open")):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

def save_and_die(moment):
    global left
    if (pid := os.fork()) == 0:
        left = moment
        try:
            new.save_pretrained(folder, max_shard_size=2000)
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]

sys.addaudithook(die_in_time)
moments, found = 0, []
while True:
    old.save_pretrained(folder, max_shard_size=3000)
    (folder / "notes").write_text("kept")
    killed = save_and_die(moments)
    found.append(load_model(folder).config.qk_norm)
    assert save_and_die(moments // 2) == 9, "killed again"
    load_model(folder)
    old.save_pretrained(folder)
    assert load_model(folder).config == old.config and (folder / "notes").exists()
    assert os.listdir(sys.argv[1]) == ["model"]
    if not killed:
        break
    moments += 1
assert moments > 20 and found == sorted(found), "the old one, and from some moment on the new"
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_save_killed_at_any_moment_leaves_a_whole_model(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr


def test_a_folder_that_is_no_model_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="folder: expected a new one, an empty one or a model's"):
        made().save_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="folder: expected a new one"):
        made().save_pretrained(tmp_path / "file")
    assert (tmp_path / "thesis.tex").exists()
    (tmp_path / "empty").mkdir()
    made().save_pretrained(tmp_path / "empty")
    (tmp_path / "config.json").write_text('{"name": "a project of another kind"}')
    with pytest.raises(ValueError, match="folder: expected a new one"):
        made().save_pretrained(tmp_path)
    assert "another kind" in (tmp_path / "config.json").read_text()


def test_entries_that_follow_from_the_model_cannot_be_given(tmp_path):
    with pytest.raises(ValueError, match="hidden_size: follows from the model, got 5"):
        made().save_pretrained(tmp_path, hidden_size=5)
    with pytest.raises(
        ValueError, match="max_shard_size: expected a whole number of at least 1, got 0"
    ):
        made().save_pretrained(tmp_path, max_shard_size=0)


# --- files: what is refused ---------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    made(**KINDS["llama"]).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": "falcon"}, "model_type: expected one of llmbook, gpt2.*'falcon'"),
        ({"model_type": ["llama"]}, "config.json: "),
        ({"hidden_act": "xielu"}, "hidden_act: expected one of silu, gelu, relu, got 'xielu'"),
        ({"attention_bias": True}, "mlp_bias: expected True as attention_bias has, got False"),
        ({"attention_dropout": 0.1}, "attention_dropout: expected 0, got 0.1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1, got 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: expected None"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type: expected one of default"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_scaling: .*factor"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": math.inf}}, "config.json: "),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": "2"}}, "config.json: "),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 1}},
            "mscale: expected",
        ),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_scaling: "),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: expected 1"),
        ({"rope_parameters": [1]}, "config.json: "),
        ({"hidden_size": None}, "hidden_size: expected a number, but it is missing"),
        ({"hidden_size": "32"}, "d_model: expected int, got '32'"),
        ({"num_key_value_heads": 3}, "n_kv_heads: expected a divisor"),
        ({"rms_norm_eps": None}, "rms_norm_eps: expected a number"),
        ({"tie_word_embeddings": "yes"}, "tie_embeddings: expected bool"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "rope_base: expected a number above 1"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 10**400}},
            "no such model can be: int too big",
        ),
    ],
)
def test_configurations_of_other_functions_are_refused(entries, message, saved):
    edit(saved, **entries)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(saved)
    assert "config.json" in str(caught.value), "the message names the file"


@pytest.mark.parametrize(
    ("kind", "entries", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights: expected True"),
        ("gpt2", {"attn_pdrop": 0.3}, "attn_pdrop: expected one rate"),
        ("gpt2", {"n_layer": None}, "n_layer: expected a number"),
        ("gpt2", {"activation_function": "quick_gelu"}, "activation_function: expected one of"),
        ("qwen3", {"attention_bias": True}, "attention_bias: expected False"),
        ("qwen3", {"head_dim": None}, "head_dim: expected a number"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise: expected 0"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step: expected 1, got 2"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers: expected \[\], got \[0\]"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias: expected False, got True"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "moe_intermediate_size: expected a number"),
        ("qwen3_moe", {"norm_topk_prob": "yes"}, "normalize_experts: expected bool, got 'yes'"),
        ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual: expected False"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm: expected False, got True"),
        ("stablelm", {"hidden_dropout": 0.1}, "hidden_dropout: expected 0, got 0.1"),
        ("stablelm", {"layer_norm_eps": None}, "layer_norm_eps: expected a number"),
        (
            "stablelm",
            {"rope_parameters": {"partial_rotary_factor": 1.5}},
            "partial_rotary_factor: expected above 0 and at most 1, got 1.5",
        ),
        (
            "stablelm",
            {"rope_parameters": {"partial_rotary_factor": "half"}},
            "partial_rotary_factor: expected above 0 and at most 1, got 'half'",
        ),
        (
            "stablelm",
            {"rope_parameters": {"partial_rotary_factor": 0.4}},
            "d_rope: expected an even",
        ),
        ("ernie4_5", {"use_bias": 1}, "bias: expected bool, got 1"),
        ("llmbook", {"norm": "groupnorm"}, "norm: expected one of"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            "layer_types: expected the same in all",
        ),
        (
            "qwen3",
            {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]},
            "layer_types: expected the same in all",
        ),
        (
            "mistral",
            {"layer_types": ["chunked_attention"] * 2},
            "layer_types: expected one of full_attention, sliding_attention",
        ),
    ],
)
def test_more_that_is_refused(kind, entries, message, tmp_path):
    made(**KINDS[kind]).save_pretrained(tmp_path)
    edit(tmp_path, **entries)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_a_nulled_window_of_qwen_is_none(tmp_path):
    made(**KINDS["qwen3"]).save_pretrained(tmp_path)
    edit(tmp_path, sliding_window=4, use_sliding_window=False)
    assert load_model(tmp_path).config.sliding_window is None
    edit(tmp_path, layer_types=["full_attention", "full_attention"], use_sliding_window=True)
    assert load_model(tmp_path).config.sliding_window is None


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q), f"{Q} is missing"),
        (lambda t: t.update(extra=torch.zeros(2)), "extra is unexpected"),
        (
            lambda t: t.update({Q: t[Q][:5].clone()}),
            rf"{Q} has shape \(5, 32\), expected \(32, 32\)",
        ),
        (lambda t: t.update({Q: t[Q][0].clone()}), rf"{Q} has shape \(32,\), expected \(32, 32\)"),
        (lambda t: t.update({Q: t[Q].to(torch.int8)}), f"{Q} is of I8"),
        (lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)}), f"{Q} is of F8_E4M3"),
        (lambda t: [t.pop(name) for name in list(t)[5:]], "; and 11 more"),
        (lambda t: t.clear(), "expected tensors for 2 layers or experts, got 0 tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, saved):
    tensors = load_file(saved / "model.safetensors")
    change(tensors)
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_model(saved)


def test_pickles_are_refused(saved):
    torch.save({}, saved / "pytorch_model.bin")
    load_model(saved)  # what lies beside is not looked at
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin could run any program"):
        load_model(saved)
    (saved / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"expected model\.safetensors, or its index$"):
        load_model(saved)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..\\x.safetensors",
        "weights.bin",
        ".hidden.safetensors",
        "",
        5,
        None,
    ],
)
def test_an_index_cannot_lead_out_of_the_folder(name, tmp_path):
    folder = tmp_path / "model"
    made().save_pretrained(folder, max_shard_size=6000)
    save_file({"x": torch.zeros(1)}, tmp_path / "secret.safetensors")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][Q] = name
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"expected the name of a \.safetensors file, got"):
        load_model(folder)


def test_faults_of_an_index_are_named(tmp_path):
    folder = tmp_path / "model"
    made().save_pretrained(folder, max_shard_size=6000)
    path = folder / "model.safetensors.index.json"
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 5 and len(json.loads(path.read_text())["weight_map"]) == 21
    shutil.copy(shards[0], tmp_path)
    shards[0].unlink()
    with pytest.raises(ValueError, match=rf"{shards[0].name}: missing, but .*index.json names it"):
        load_model(folder)
    shutil.copy(shards[1], shards[0])
    with pytest.raises(ValueError, match=rf"is in {shards[0].name}, too"):
        load_model(folder)
    for content in ("{}", '{"weight_map": 3}', "[]", "{"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: "):
            load_model(folder)


def test_damaged_and_missing_files_are_named(saved):
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    for content in (b"", b"PK\3\4" * 50, whole[:100], whole[:-50], b"\xff" * 8 + whole):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors: damaged, or no safetensors"):
            load_model(saved)
    path.write_bytes(whole)
    edit(saved, num_hidden_layers=10**12)
    with pytest.raises(ValueError, match="expected tensors for 1000000000000 layers"):
        load_model(saved)
    for content in ("{", "\ufeff{}", '{"a":' * 100_000):
        (saved / "config.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=r"config\.json: not JSON"):
            load_model(saved)
    (saved / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: expected an object, got list"):
        load_model(saved)
    (saved / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json: missing"):
        load_model(saved)
    with pytest.raises(ValueError, match="expected the folder of a model"):
        load_model(saved / "nowhere")


@pytest.mark.parametrize("size", [2**40, 2**60, 2**70])
@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "head_dim", "intermediate_size"])
def test_sizes_that_the_files_cannot_hold_take_no_memory(name, size, saved):
    edit(saved, **{name: size})
    with pytest.raises(ValueError, match=r"expected tensors of a size \d+, got \d+ numbers in all"):
        load_model(saved)


def test_many_stacked_experts_are_few_tensors(tmp_path):
    model = made(n_experts=64, n_active_experts=2, d_shared=8, d_ff=4)
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path).config == model.config


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_not_waited_for(saved):
    (saved / "model.safetensors").unlink()
    os.mkfifo(saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"expected model\.safetensors, or its index$"):
        load_model(saved)


def test_what_no_family_computes_is_saved_for_us_alone(tmp_path):
    for changes in (
        {"norm": "layernorm"},
        {"rope_scaling": RopeScaling("ntk", 2.0)},
        {"n_kv_heads": 2, "qk_norm": True, "bias": True},
        {"activation": "gelu"},
        {"d_head": 6, "qkv_bias": True},
        {"d_model": 30, "d_head": 8},
        {"norm_position": "post"},
        {**GPT2, "n_kv_heads": 2},
        {**KINDS["mixtral"], "d_shared": 8},
        {**KINDS["mixtral"], "normalize_experts": False},
        {**KINDS["mixtral"], "qk_norm": True, "norm": "layernorm"},
        {"d_rope": 4},
        {"layout": "interleaved", "qk_norm": True},
        {"layout": "interleaved", "d_rope": 4},
        {"layout": "interleaved", "n_experts": 4, "n_active_experts": 1},
        {"norm": "layernorm", "norm_bias": True, "layout": "interleaved"},
        {"norm": "layernorm", "norm_bias": True, "sliding_window": 8},
        {"norm": "layernorm", "norm_bias": True, "d_head": 16},
        {"norm": "layernorm", "norm_bias": True, "d_rope": 6, "d_head": 8, "activation": "gelu"},
        {"norm": "layernorm", "norm_bias": True, "positions": "learned"},
        {"rope_scaling": RopeScaling("dynamic", 2.0, 16)},
    ):
        model = made(**changes)
        assert model_type(model.config) == "llmbook", changes
        model.save_pretrained(tmp_path / "model")
        again, ids = load_model(tmp_path / "model"), some_ids()
        assert again.config == model.config
        assert torch.equal(again(ids), model(ids))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_a_new_model_loses_little_more_than_one_that_knows_nothing(tied, positions):
    config = ModelConfig.preset("tiny", tie_embeddings=tied, positions=positions)
    model, ids = TransformerLM(config), torch.randint(512, (8, 65))
    with torch.no_grad():
        logits = model(ids[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    # With a tied table a token's own vector, still in the stream, speaks for the token itself.
    assert -0.25 < float(loss) - math.log(512) - 0.5 < (1.0 if tied else 0.25)


# --- rotations of other kinds -------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"d_rope": 4}, {"qk_norm": True}, {"n_kv_heads": 2}])
def test_the_layout_of_pairs_is_a_permutation_of_weights(changes):
    """As between Meta's files and those of Hugging Face."""
    half, pairs = exact(**changes), exact(**changes, layout="interleaved")
    state, config = half.state_dict(), half.config
    heads = {"q_proj.weight": config.n_heads, "k_proj.weight": config.n_kv_heads}
    heads |= {"q_norm.weight": 1, "k_norm.weight": 1}
    for name in state:
        number = heads.get(".".join(name.split(".")[-2:]))
        if number is not None:
            state[name] = change_rope_layout(
                state[name], number, "interleaved", d_rope=config.d_rope
            )
    ids = some_ids()
    pairs.load_state_dict(state)
    torch.testing.assert_close(pairs(ids), half(ids))
    pairs.load_state_dict(half.state_dict())
    assert not torch.allclose(pairs(ids), half(ids)), "the same weights are another function"


def test_heads_are_rotated_in_part_or_whole():
    """The same frequencies of a part: what is not rotated looks at no distance."""
    ids = some_ids(1, 12)
    parts = {d_rope: exact(d_rope=d_rope) for d_rope in (2, 4, 8)}
    whole = exact()
    for model in parts.values():
        model.load_state_dict(whole.state_dict())
    logits = {d_rope: model(ids) for d_rope, model in parts.items()}
    torch.testing.assert_close(logits[8], whole(ids))
    assert not torch.allclose(logits[2], logits[4]) and not torch.allclose(logits[4], logits[8])
    assert parts[4].rope.d_head == 4


def test_a_factor_that_follows_the_text_is_read_and_written(tmp_path):
    """Ours names the longest text, theirs the one from which on the factor grows."""
    scaling = RopeScaling("dynamic", 3.0, 16)
    model = made(rope_scaling=scaling)
    assert model_type(model.config) == "llama"
    model.save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())
    assert entries["max_position_embeddings"] == 16
    assert entries["rope_parameters"]["rope_type"] == "dynamic"
    again = load_model(tmp_path)
    assert again.config == model.config and again.config.context_length == 48
    plain = exact()
    plain.load_state_dict(model.state_dict())
    ids = some_ids(1, 17)
    with torch.no_grad():
        scaled, unscaled = model.double()(ids), plain(ids)
        torch.testing.assert_close(model(ids[:, :16]), plain(ids[:, :16]))
    assert not torch.allclose(scaled, unscaled)


def test_files_of_earlier_versions_say_how_much_is_rotated(tmp_path):
    theirs = theirs_of("stablelm-half")
    theirs.save_pretrained(tmp_path)
    expected = load_model(tmp_path).config
    assert expected.d_rope == 4
    path = tmp_path / "config.json"
    entries = json.loads(path.read_text())
    rope = entries.pop("rope_parameters")
    entries["rope_theta"] = rope["rope_theta"]
    path.write_text(json.dumps(entries | {"partial_rotary_factor": 0.5}))
    assert load_model(tmp_path).config == expected
    path.write_text(json.dumps({k: v for k, v in entries.items() if "partial" not in k}))
    assert load_model(tmp_path).config == replace(expected, d_rope=2), "a quarter is their default"


@pytest.mark.parametrize("kind", ["ernie4_5", "mixtral", "llama"])
def test_the_base_of_rotations_where_a_file_has_none(kind, tmp_path):
    made(**KINDS[kind]).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    entries = json.loads(path.read_text())
    for name in ("rope_parameters", "rope_theta"):
        entries.pop(name)
    path.write_text(json.dumps(entries))
    found = load_model(tmp_path).config.rope_base
    assert found == {"ernie4_5": 500_000.0, "mixtral": 1_000_000.0, "llama": 10_000.0}[kind]


# --- files: tied matrices, types by name, experts -----------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama-3", "qwen3", "ours"])
def test_a_tied_model_whose_file_has_only_the_head_is_read(name, tmp_path):
    """As ``safetensors.torch.save_model`` writes it: of names for one tensor it keeps the first."""
    alone = {"norm": "layernorm", "tie_embeddings": True}  # no family has these
    theirs = made(**alone) if name == "ours" else theirs_of(name)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    if name == "ours":
        tensors = load_file(path)
        save_file(tensors | {"lm_head.weight": tensors.pop("embedding.weight")}, path)
    else:
        save_by_safetensors(theirs, str(path))
    kept = load_file(path).keys()
    assert "lm_head.weight" in kept and not any("embed" in n or "wte" in n for n in kept)
    ours, ids = load_model(tmp_path), some_ids()
    assert ours.lm_head.weight is ours.embedding.weight
    expected = theirs(ids)
    assert_near(ours(ids), expected if name == "ours" else expected.logits)


def test_a_head_does_not_stand_for_an_embedding_that_is_not_tied_to_it(saved):
    tensors = load_file(saved / "model.safetensors")
    tensors.pop("model.embed_tokens.weight")
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight is missing"):
        load_model(saved)


def test_types_are_known_by_their_names(saved):
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        for given_type in (dtype, str(dtype).removeprefix("torch.")):
            assert load_model(saved, dtype=given_type).embedding.weight.dtype == dtype
    expected = (
        r"dtype: expected one of float64, float32, float16, bfloat16, as a torch.dtype or its"
    )
    for wrong in ("bf16", "auto", torch.int8, 16):
        with pytest.raises(ValueError, match=expected):
            inspect.unwrap(load_model)(saved, dtype=wrong)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_that_are_missing_are_named(kind, tmp_path):
    made(**KINDS[kind], n_layers=1).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if ".experts.3." in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, path)
    with pytest.raises(ValueError, match=f"{lost} is missing$"):
        load_model(tmp_path)
    rest = {name: t for name, t in tensors.items() if ".experts.3." not in name}
    save_file(rest, path)
    with pytest.raises(ValueError, match=r"\.experts\.3\.\w+\.weight is missing; .* is missing; "):
        load_model(tmp_path)
    save_file(tensors | {lost.replace(".3.", ".4."): tensors[lost].clone()}, path)
    with pytest.raises(ValueError, match=r"\.experts\.4\.\w+\.weight is unexpected$"):
        load_model(tmp_path)
    save_file(tensors, path)
    number = "num_experts" if kind == "qwen3_moe" else "num_local_experts"
    edit(tmp_path, **{number: 5})
    with pytest.raises(ValueError, match=r"\.experts\.4\."):
        load_model(tmp_path)
    edit(tmp_path, **{number: 100_000})
    with pytest.raises(ValueError, match="expected tensors for 100000 layers or experts, got"):
        load_model(tmp_path)


def test_files_that_call_experts_local_open(tmp_path):
    """Version 5 of their library has two words for the number of experts."""
    made(**KINDS["qwen3_moe"]).save_pretrained(tmp_path)
    expected, path = load_model(tmp_path).config, tmp_path / "config.json"
    entries = json.loads(path.read_text())
    entries["num_local_experts"] = entries.pop("num_experts")
    path.write_text(json.dumps(entries))
    assert load_model(tmp_path).config == expected


# --- bad input everywhere -----------------------------------------------------------------------


@pytest.mark.usefixtures("untyped")
def test_a_model_names_what_it_cannot_read():
    model, ids = made(), some_ids(2, 6)
    expected = r"^ids: expected \(batch, sequence\) of torch.int64, got "
    for wrong in ([[1, 2]], None, "abc", ids[0], ids[None], ids.float(), ids.int()):
        for read in (model, model.hidden_states):
            with pytest.raises(ValueError, match=expected):
                read(wrong)
    with pytest.raises(ValueError, match=r"^ids: expected at least one row, got shape \(0, 6\)"):
        model(ids[:0])
    for name in ("position_ids", "document_ids"):
        for wrong in ([[1] * 6] * 2, ids.float(), ids[:, :3], ids[0]):
            with pytest.raises(
                ValueError, match=rf"^{name}: expected \(2, 6\) of torch.int64, got"
            ):
                model(ids, **{name: wrong})
    with pytest.raises(
        ValueError, match=r"^position_ids: expected at least -1, for padding, got -2"
    ):
        model(ids, position_ids=torch.full((2, 6), -2))
    with pytest.raises(
        ValueError, match=r"^cache: expected a KVCache, as new_cache makes, got 'x'"
    ):
        model(ids, cache="x")
    with pytest.raises(ValueError, match=r"^cache: expected 2 layers, got fewer"):
        model(ids, cache=made(n_layers=1).new_cache(2))
    for other in (model.new_cache(3), made(n_kv_heads=2).new_cache(2), made(d_head=6).new_cache(2)):
        with pytest.raises(ValueError, match=r"^cache: expected .* of \(2, 4, 8\), got \("):
            model(ids, cache=other)
    for name, arguments in (
        ("batch_size", {"batch_size": None}),
        ("batch_size", {"batch_size": 0}),
        ("batch_size", {"batch_size": "2"}),
        ("capacity", {"batch_size": 1, "capacity": "9"}),
        ("capacity", {"batch_size": 1, "capacity": 0}),
        ("spare", {"batch_size": 1, "spare": -1}),
        ("spare", {"batch_size": 1, "spare": None}),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: expected"):
            model.new_cache(**arguments)


@pytest.mark.usefixtures("untyped")
def test_what_is_no_configuration_and_no_size_is_named(tmp_path):
    functions = (parameter_counts, flops_per_token, model_type, TransformerLM)
    memories = (activation_bytes, training_memory, cache_bytes)
    for wrong in ("gpt2", None, made(), {"d_model": 32}):
        for function in functions:
            with pytest.raises(ValueError, match=r"^config: expected a ModelConfig, got"):
                function(wrong)
        for function in memories:
            with pytest.raises(ValueError, match=r"^config: expected a ModelConfig, got"):
                function(wrong, 1, 1)
        with pytest.raises(ValueError, match=r"^(model|config): expected a"):
            count_parameters(wrong if isinstance(wrong, dict) else torch.nn.ReLU(), active=True)
    for function in memories:
        for wrong in (None, 0, -1, 1.5, "2", True):
            with pytest.raises(ValueError, match=r"^batch_size: expected"):
                function(small(), wrong, 1)
            with pytest.raises(ValueError, match=r"^sequence: expected"):
                function(small(), 1, wrong)
        with pytest.raises(ValueError, match=r"^dtype: expected a torch.dtype, got 'float32'"):
            function(small(), 1, 1, "float32")
    for wrong in (0, 1.5, "3"):
        with pytest.raises(ValueError, match=r"^sequence: expected"):
            flops_per_token(small(), wrong)
    with pytest.raises(ValueError, match=r"^backend: expected one of reference, torch, got 'jax'"):
        TransformerLM(small(), "jax")
    with pytest.raises(ValueError, match=r"^entries: expected a mapping of fields, got \[1\]"):
        ModelConfig.from_dict([1])


@pytest.mark.usefixtures("untyped")
def test_what_files_cannot_be_named_by_is_named(saved):
    model = made()
    for wrong in (None, 5, [saved]):
        with pytest.raises(ValueError, match=r"^folder: expected a str or a Path, got"):
            save_model(model, wrong)
        with pytest.raises(ValueError, match=r"^folder: expected a str or a Path, got"):
            load_model(wrong)
    for wrong in (None, "5GB", 1.5):
        with pytest.raises(ValueError, match=r"^max_shard_size: expected a whole number"):
            save_model(model, saved, max_shard_size=wrong)
    with pytest.raises(ValueError, match=r"^note: expected what JSON can hold, got tensor"):
        save_model(model, saved, note=torch.ones(2))
    for wrong in ("gpu", "nowhere:3", [1], 2.5):
        with pytest.raises(ValueError, match=r"^device: expected one that torch has here, got"):
            load_model(saved, device=wrong)
    with pytest.raises(ValueError, match=r"^backend: expected one of reference, torch, got 'jax'"):
        load_model(saved, backend="jax")
    assert load_model(str(saved)).config == load_model(saved).config == load_model(saved).config


def test_defaults_of_costs():
    """Bytes in float32 for training, in bfloat16 for use; all operations of a training step."""
    config = small(sliding_window=8)
    assert activation_bytes(config, 2, 3) == activation_bytes(config, 2, 3, torch.float32)
    assert training_memory(config, 2, 3) == training_memory(config, 2, 3, torch.float32)
    assert cache_bytes(config, 2, 3) == cache_bytes(config, 2, 3, torch.bfloat16)
    options = {"training": True, "causal": False}
    assert flops_per_token(config, 20) == flops_per_token(config, 20, **options)
    assert flops_per_token(config, 20) > flops_per_token(config, 20, causal=True)
    assert parameter_counts(config) == parameter_counts(config, active=False)
    default = inspect.signature(save_model).parameters["max_shard_size"].default
    assert default == 5_000_000_000, "as transformers has it"
    model = made()
    assert {b.attention.backend for b in model.blocks} == {"torch"}
    cache = made(sliding_window=8).new_cache(1)
    assert (cache.capacity, cache.slots, model.new_cache(1).capacity) == (48, 8, 48)


def test_a_loaded_model_is_ready_to_use(saved):
    model = load_model(saved)
    assert not model.training and model.blocks[0].attention.backend == "torch"
    assert load_model(saved, backend="reference").blocks[0].attention.backend == "reference"
