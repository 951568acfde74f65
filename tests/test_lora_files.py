"""Chapter 20, second half: adapters in one batch, quantized bases, and files that PEFT opens."""

import inspect
import json
import logging
import math
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llmbook.generation import QuantizedLinear, Sampling, generate, stored_bytes
from llmbook.lora import (
    AdapterBank,
    LoRAConfig,
    NF4Linear,
    adapter_state,
    apply_lora,
    load_adapter,
    load_adapter_state,
    lora_layers,
    merge_lora,
    merge_quantized,
    nf4_levels,
    peft_names,
    quantize_base,
    quantize_nf4,
    read_adapter,
    rows_update,
    save_adapter,
)
from llmbook.model import PRESETS, ModelConfig, TransformerLM

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    logging.disable()
    peft = pytest.importorskip("peft")
    import transformers

    logging.disable(logging.NOTSET)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning",
    "ignore:.*fan_in_fan_out:UserWarning",
    "ignore:.*torch.jit:DeprecationWarning",
)
SIZES = {"vocab_size": 96, "context_length": 32, "d_model": 32, "n_layers": 2, "n_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"qk_norm": True, "n_kv_heads": 2},
    "mistral": {"sliding_window": 8},
    "gpt2": PRESETS["gpt2"] | {"dropout": 0.0},
}


def tiny(family: str = "llama") -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(ModelConfig(**FAMILIES[family] | SIZES)).eval()


def adapted(model: nn.Module, seed: int = 0, **config: Any) -> Any:
    """A copy with adapters that do something."""
    model = deepcopy(model)
    apply_lora(model, LoRAConfig(**{"rank": 4} | config), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        noise = torch.randn(layer.lora_b.shape, generator=generator)
        with torch.no_grad():
            layer.lora_b.copy_(0.2 * noise)
    return model


def some_ids(rows: int = 3) -> torch.Tensor:
    return torch.randint(96, (rows, 12), generator=torch.Generator().manual_seed(1))


def close(one: torch.Tensor, other: torch.Tensor, bound: float = 1e-4) -> bool:
    one, other = one.detach(), other.detach()
    return float((one - other).abs().max()) <= bound * float(other.abs().max())


# Several adapters in one batch


def test_each_row_gets_its_own_update():
    x, rows = torch.randn(3, 2, 5).double(), torch.tensor([1, 0, 1])
    a, b = torch.randn(2, 4, 5).double(), torch.randn(2, 6, 4).double()
    expected = torch.stack([x[i] @ (b[r] @ a[r]).T for i, r in enumerate(rows)])
    assert torch.allclose(rows_update(x, a, b, rows), expected)
    plain = inspect.unwrap(rows_update)  # as users call it: the tests check shapes by a hook
    # One number, or one row of x, would be broadcast
    for some, wrong in ((x, rows[:1]), (x, rows.repeat(2)), (x[:1], rows)):
        with pytest.raises(ValueError, match=r"rows: expected a number for each of [13] rows, got"):
            plain(some, a, b, wrong)


def filled_bank() -> tuple[AdapterBank, dict[str | None, TransformerLM]]:
    base = tiny()
    bank, models = AdapterBank(base), dict[str | None, TransformerLM]()
    for number, (rank, alpha, targets) in enumerate(
        [(4, 8.0, "all-linear"), (2, 2.0, ("q_proj",)), (7, 5.0, ("q_proj", "lm_head"))]
    ):
        name = "abc"[number]
        models[name] = adapted(base, number, rank=rank, alpha=alpha, targets=targets)
        bank.add(name, adapter_state(models[name]))
    return bank, models | {None: base}


def test_a_batch_gives_what_each_model_gives_alone():
    bank, models = filled_bank()
    names, ids = ["a", None, "c", "b", "a"], some_ids(5)
    out = bank(ids, names)
    for row, name in enumerate(names):
        assert close(out[row : row + 1], models[name](ids[row : row + 1])), name
    assert torch.equal(bank.base(ids), models[None](ids)), "the base has changed"


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(temperature=1.0)])
def test_rows_keep_their_adapters_while_others_finish(sampling):
    bank, models = filled_bank()
    names = ["a", None, "b", "c", "c", "a", None, "b", "c"]
    prompts = [some_ids(1)[0, : 1 + (5 * row) % 7].tolist() for row in range(9)]
    options: dict[str, Any] = {"max_new_tokens": 12, "sampling": sampling, "seed": 3}
    options["stop_tokens"] = tuple(range(0, 96, 7))  # rows finish at different steps
    found = bank.generate(prompts, names, batch_size=4, **options)
    assert len({len(row.ids) for row in found}) > 2
    for row, name in enumerate(names):
        alone = generate(models[name], [prompts[row]], first_row=row, **options)
        assert found[row].ids == alone[0].ids, (row, name)


def test_what_is_removed_leaves_the_others_as_they_were():
    bank, models = filled_bank()
    before, ids = bank.nbytes, some_ids(2)
    bank.remove("c")
    assert bank.names == ["a", "b"] and bank.nbytes < before
    assert close(bank(ids, ["a", "b"])[1:], models["b"](ids[1:]))
    bank.remove("a"), bank.remove("b")
    assert torch.equal(bank(ids, [None, None]), models[None](ids))
    bank.add("a", adapter_state(models["a"]))
    assert close(bank(ids, ["a", None])[:1], models["a"](ids[:1]))


def test_the_bank_holds_the_base_once():
    base = tiny()
    assert AdapterBank(base).nbytes == stored_bytes(base)


def test_a_bank_over_a_quantized_base():
    base = quantize_base(tiny())
    model, ids = adapted(base), some_ids(2)
    bank = AdapterBank(base)
    bank.add("a", adapter_state(model))
    assert close(bank(ids, [None, "a"])[1:], model(ids)[1:])


def test_what_a_bank_refuses():
    bank, models = filled_bank()
    state = adapter_state(models["a"])
    for call, words in [
        (lambda: AdapterBank(models["a"]), "without adapters, but blocks.0.attention.q_proj has"),
        (lambda: bank.add("a", state), "name: expected a new one"),
        (lambda: bank.add("", state), "name: expected a new one"),
        (lambda: bank.add("d", state._replace(base="0" * 16)), "an adapter for this base"),
        (lambda: bank.remove("z"), "name: expected one of a, b, c"),
        (lambda: bank(some_ids(2), ["a"]), "adapters: expected a name or None for each of 2"),
        (lambda: bank(some_ids(2), ["a", "z"]), "adapters: expected None or one of a, b, c"),
        (
            lambda: bank.generate([[1]], ["a"], max_new_tokens=2, on_full="slide"),
            "got on_full='slide'$",
        ),
        (
            lambda: bank.generate([[1]], ["a"], max_new_tokens=2, use_cache=False),
            "got use_cache=False$",
        ),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    bank.add("d", state._replace(base="0" * 16), any_base=True)


# Four bits

PUBLISHED = (
    "-1 -0.6961928 -0.52507305 -0.3949175 -0.28444138 -0.18477343 -0.091050036 0 0.0795803 "
    "0.1609302 0.2461123 0.33791524 0.44070983 0.562617 0.72295684 1"
)


def test_the_levels_are_the_published_ones():
    published = torch.tensor([float(number) for number in PUBLISHED.split()])
    assert torch.allclose(nf4_levels(), published, rtol=0, atol=1e-6)
    assert nf4_levels()[7] == 0 and len(nf4_levels()) == 16


def test_codes_and_matrix_are_those_of_torchao():
    logging.disable()
    name = "torchao.quantization.quantize_.workflows.nf4.nf4_tensor"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchao = pytest.importorskip(name)
    logging.disable(logging.NOTSET)
    weight = torch.randn(256, 256) * (0.5 + torch.rand(256, 1))  # no scale is near zero
    theirs = torchao.to_nf4(weight, 64, 256)
    ours = quantize_nf4(weight, levels=theirs.nf4)
    assert torch.equal(ours.codes, theirs.quantized_data)
    assert torch.equal(ours.scales, theirs.quantized_scalers)
    assert close(ours.dequantize(), theirs.get_original_weight(), 1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 64), (130, 257)])
def test_any_shape_is_rounded_to_the_nearest_level(shape):
    weight = torch.randn(shape)
    found = quantize_nf4(weight).dequantize()
    assert found.shape == shape
    # Half of the widest gap of the levels, and what double quantization adds
    assert float((found - weight).abs().max()) < 0.2 * float(weight.abs().max()) + 1e-6


def test_zeros_stay_zero_and_the_type_of_numbers_does_not_matter():
    weight = torch.randn(8, 64)
    weight[2] = 0
    weight[:, 5] = 0
    found = quantize_nf4(weight).dequantize()
    assert not found[2].any() and not found[:, 5].any()
    assert torch.equal(quantize_nf4(weight.double()).dequantize(), found)
    assert not quantize_nf4(torch.zeros(2, 64)).dequantize().any()


def test_a_weight_takes_little_more_than_four_bits():
    weight = torch.randn(1024, 1024)
    q = quantize_nf4(weight)
    bits = 8 * sum(t.nbytes for t in (q.codes, q.scales, q.steps)) / weight.numel()
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256))


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_multiplies_by_its_matrix_and_passes_gradients_through(bias):
    linear = nn.Linear(24, 8, bias=bias)
    layer = NF4Linear.of(linear)
    x = torch.randn(3, 5, 24, requires_grad=True)
    expected = x @ layer.dequantize().T + (linear.bias if bias else 0)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    assert close(gradient, wanted)
    assert not list(layer.parameters())
    copy = NF4Linear.of(nn.Linear(24, 8, bias=bias))
    copy.load_state_dict(layer.state_dict())
    assert torch.equal(copy.dequantize(), layer.dequantize())


def test_no_dense_matrix_is_kept_for_the_backward_pass():
    layer, kept = NF4Linear.of(nn.Linear(64, 64, bias=False)), list[int]()
    x = torch.randn(2, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        layer(x).sum()
    assert sum(kept) < 64 * 64


@pytest.mark.parametrize("kind, layer", [("nf4", NF4Linear), ("int8", QuantizedLinear)])
def test_all_linear_layers_but_the_head_are_quantized(kind, layer):
    base = tiny()
    found = quantize_base(base, kind)
    kinds = {name: type(m) for name, m in found.named_modules() if hasattr(m, "in_features")}
    assert kinds.pop("lm_head") is nn.Linear and set(kinds.values()) == {layer}
    assert stored_bytes(found) < stored_bytes(base)
    assert type(base.get_submodule("blocks.0.attention.q_proj")) is nn.Linear
    assert type(quantize_base(base).get_submodule("blocks.0.attention.q_proj")) is NF4Linear


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_adapters_over_a_quantized_base_learn_and_the_base_stays(kind):
    base = quantize_base(tiny(), kind)
    model, ids = deepcopy(base), some_ids()
    apply_lora(model, LoRAConfig(rank=2), seed=0)
    assert torch.equal(model(ids), base(ids)), "the first step must change nothing"
    before = {n: t.clone() for n, t in model.state_dict().items() if "lora_" not in n}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(5):
        logits = model(ids)[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merging_into_a_quantized_base_says_its_error(kind):
    model, ids = adapted(quantize_base(tiny(), kind)), some_ids()
    with torch.no_grad():
        expected = model(ids)
    with pytest.raises(ValueError, match="expected a Linear under"):
        merge_lora(model)
    kept, rounded = deepcopy(model), deepcopy(model)
    assert set(merge_quantized(kept, requantize=False).values()) == {0.0}
    assert close(kept(ids), expected)
    sums = {}
    for name, layer in lora_layers(model).items():
        dense = layer.weight.detach()
        sums[name] = (dense, layer.update.norm())
    errors = merge_quantized(rounded, requantize=True)
    for name, (dense, size) in sums.items():
        made: Any = rounded.get_submodule(name)
        matrix = made.dequantize() if kind == "nf4" else made.weight.float() * made.scale[:, None]
        error = float((matrix - dense).norm() / size.detach())
        assert errors[name] == pytest.approx(error, rel=1e-4)
        assert errors[name] > 0
    with pytest.raises(TypeError, match="requantize"):
        merge_quantized(model)  # type: ignore[call-arg]


@pytest.mark.parametrize("requantize, error", [(False, 0.0), (True, math.inf)])
def test_the_error_of_merging_an_adapter_that_was_never_trained(requantize, error):
    model = quantize_base(tiny())
    apply_lora(model, LoRAConfig(rank=2), seed=0)
    assert set(merge_quantized(model, requantize=requantize).values()) == {error}


@pytest.mark.parametrize(
    "weight, levels, words",
    [
        (torch.tensor([[math.nan, 1.0]]), None, "weight: expected finite numbers, got nan"),
        (torch.zeros(2, 0), None, "weight: expected at least one number"),
        (torch.ones(1, 2), torch.linspace(0, 1, 16), "levels: expected to rise from -1 to 1"),
    ],
)
def test_what_cannot_be_quantized(weight, levels, words):
    with pytest.raises(ValueError, match=words):
        quantize_nf4(weight, levels=levels)


def test_a_model_with_adapters_is_not_quantized():
    with pytest.raises(ValueError, match="model: expected one without adapters"):
        quantize_base(adapted(tiny()))


# Files


def their_model(folder: Path) -> Any:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"targets": ("q_proj", "lm_head"), "rank": 3, "alpha": 5.0}),
    ("qwen3", {"targets": ("q_proj", "blocks.1.feed_forward.up_proj"), "rslora": True}),
    ("mistral", {"targets": r".*attention\.[qv]_proj"}),
    ("gpt2", {"targets": ("q_proj", "v_proj", "down_proj")}),
    ("gpt2", {"rslora": True}),
]


@pytest.mark.parametrize("family, config", CONFIGS)
def test_peft_opens_ours(tmp_path, family, config):
    base, ids = tiny(family), some_ids()
    model = adapted(base, **config)
    base.save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "ours", base_name=str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(their_model(tmp_path / "base"), tmp_path / "ours")
    with torch.no_grad():
        assert close(theirs.eval()(ids).logits, model(ids))
        assert not close(theirs(ids).logits, base(ids))
    again = deepcopy(base)
    load_adapter(again, tmp_path / "ours")
    assert close(again(ids), model(ids), 1e-6)
    load_adapter(model, tmp_path / "ours")  # into one that has the same layers


THEIRS: list[tuple[str, Any]] = [
    ("llama", "all-linear"),
    ("qwen3", ["q_proj", "v_proj"]),
    ("mistral", r".*(q|o)_proj"),
    ("gpt2", ["c_attn", "c_fc"]),
    ("gpt2", "all-linear"),
]


@pytest.mark.parametrize("family, targets", THEIRS)
@pytest.mark.parametrize("rslora", [False, True])
def test_we_open_pefts(tmp_path, family, targets, rslora):
    base, ids = tiny(family), some_ids()
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=targets, task_type="CAUSAL_LM", use_rslora=rslora
    )
    theirs = peft.get_peft_model(their_model(tmp_path / "base"), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    model = deepcopy(base)
    load_adapter(model, tmp_path / "theirs")
    with torch.no_grad():
        assert close(model(ids), theirs(ids).logits)


def test_gradients_are_those_of_peft(tmp_path):
    base, ids = tiny(), some_ids()
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, targets=("q_proj", "down_proj"))
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(
        their_model(tmp_path / "base"), tmp_path / "ours", is_trainable=True
    )
    model(ids).square().mean().backward()
    theirs(ids).logits.square().mean().backward()
    found = {name: p.grad for name, p in theirs.named_parameters() if "lora_" in name}
    for name, layer in lora_layers(model).items():
        stem = f"base_model.model.{peft_names(model)[name]}"
        assert close(layer.lora_a.grad, found[f"{stem}.lora_A.default.weight"], 1e-3)
        assert close(layer.lora_b.grad, found[f"{stem}.lora_B.default.weight"], 1e-3)


@pytest.fixture
def saved(tmp_path) -> Path:
    save_adapter(adapted(tiny()), tmp_path / "a")
    return tmp_path / "a"


def change(folder: Path, **entries: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    "entries, words",
    [
        ({"use_dora": True}, "use_dora: expected it switched off, got True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: expected it switched off"),
        ({"bias": "all"}, "bias: expected 'none', got 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: expected True or False"),
        ({"peft_type": "IA3"}, "peft_type: expected 'LORA', got 'IA3'"),
        ({"task_type": "SEQ_CLS"}, "task_type: expected None or 'CAUSAL_LM'"),
        ({"something_new": 3}, "something_new: expected it switched off, got 3"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern: expected one rank"),
        ({"r": 3}, r"expected floats of shape \(3, "),
        ({"r": 0}, "r: expected a whole number of at least 1"),
        ({"r": "four"}, "r: expected a whole number"),
        ({"target_modules": ["q_proj"]}, "24 tensors are unexpected"),
        ({"target_modules": ["nothing"]}, "target_modules: expected some of"),
        ({"target_modules": []}, r"target_modules: expected a text, or a list of texts, got \[\]"),
        ({"target_modules": ["q_proj", 3]}, r" target_modules: expected names of layers"),
        ({"target_modules": "("}, r" target_modules: '\(' is no regular expression"),
        ({"use_rslora": "false"}, "use_rslora: expected true or false, got 'false'"),
        ({"use_rslora": 1}, "use_rslora: expected true or false, got 1"),
    ],
)
def test_what_a_configuration_may_not_say(saved, entries, words):
    change(saved, **entries)
    model = tiny()
    with pytest.raises(ValueError, match=words):
        load_adapter(model, saved)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_what_a_file_may_not_be(saved, tmp_path):
    tensors = load_file(saved / "adapter_model.safetensors")
    first = min(tensors)
    cases = [
        ({n: t for n, t in tensors.items() if n != first}, "1 tensors are missing"),
        (tensors | {"more": torch.ones(1)}, "1 tensors are unexpected: more"),
        (tensors | {first: torch.ones(4, 31)}, r"expected floats of shape \(4, "),
        (tensors | {first: tensors[first].int()}, "expected floats of shape"),
    ]
    for changed, words in cases:
        save_file(changed, saved / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=words):
            read_adapter(saved, tiny())
    (saved / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="damaged, or no safetensors file"):
        read_adapter(saved, tiny())
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    with pytest.raises(ValueError, match="could run any program"):
        read_adapter(saved, tiny())
    (saved / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        read_adapter(saved, tiny())
    (saved / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="expected an object with r and target_modules"):
        read_adapter(saved, tiny())
    with pytest.raises(ValueError, match="missing: is this the folder of an adapter"):
        read_adapter(tmp_path / "nowhere", tiny())


def test_another_base_is_named(saved):
    other = tiny()
    with torch.no_grad():
        other.embedding.weight += 1
    with pytest.raises(ValueError, match="state: expected an adapter for this base"):
        load_adapter(other, saved)
    load_adapter(other, saved, any_base=True)
    with pytest.raises(ValueError, match=r"expected floats of shape|are missing|are unexpected"):
        read_adapter(saved, tiny("qwen3"))


def test_a_folder_is_whole_or_not_there(tmp_path, monkeypatch):
    model = adapted(tiny())
    with pytest.raises(ValueError, match="model: expected one with adapters"):
        save_adapter(tiny(), tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="expected a new or an empty one"):
        save_adapter(model, tmp_path / "full")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("llmbook.lora.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(model, tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_an_adapter_moves_between_kinds_of_bases():
    model, ids = adapted(tiny()), some_ids()
    four = quantize_base(tiny())
    load_adapter_state(four, adapter_state(model), any_base=True)
    assert not torch.equal(four(ids), model(ids))
    assert four(ids).shape == model(ids).shape
