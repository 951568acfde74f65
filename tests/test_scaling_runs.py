"""Tests of the second half of ``llmbook.scaling``: transfer, batch size, costs and checklists."""

from __future__ import annotations

import copy
import csv
import math
import re
from pathlib import Path

import pytest
import torch

from llmbook import scaling
from llmbook.batches import Batch
from llmbook.model import ModelConfig, TransformerLM, count_parameters
from llmbook.training import RUNS, TrainingConfig

ROOT = Path(__file__).parents[1]
SIZES = {"vocab_size": 64, "context_length": 16, "n_layers": 2, "n_heads": 2}


def config(width: int, **changes) -> ModelConfig:
    return ModelConfig(**{**SIZES, "d_model": width, "d_ff": 2 * width, **changes})


def scales(width: int = 64, base: int = 16, **changes) -> dict[str, scaling.WidthScale]:
    return scaling.mup_scales(TransformerLM(config(width, **changes)), config(base, **changes))


# Transfer over width


@pytest.mark.parametrize(
    ("name", "init", "rate"),
    [
        ("embedding.weight", 1, 1),
        ("norm.weight", 1, 1),
        ("blocks.0.attention.k_proj.weight", 1, 1 / 4),
        ("blocks.0.attention.q_proj.weight", 1 / 2, 1 / 8),
        ("blocks.1.feed_forward.down_proj.weight", 1, 1 / 4),
        ("lm_head.weight", 1 / 2, 1 / 4),
    ],
)
def test_scales_are_those_of_the_table(name, init, rate):
    assert scales()[name] == (init, rate)


def test_more_heads_of_the_same_width_leave_the_queries_alone():
    base = config(16)
    model = TransformerLM(config(64, n_heads=8))
    assert scaling.mup_scales(model, base)["blocks.0.attention.q_proj.weight"] == (1, 1 / 4)


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": True}, {"qk_norm": True}, {"n_experts": 4, "n_active_experts": 2}],
)
def test_a_model_of_the_base_width_is_scaled_by_one(changes):
    assert set(scales(32, 32, **changes).values()) == {(1.0, 1.0)}


def test_a_fan_in_of_its_own_counts():
    model = TransformerLM(config(64, d_ff=64))
    found = scaling.mup_scales(model, config(16, d_ff=32))
    assert found["blocks.0.feed_forward.down_proj.weight"].rate == 1 / 2


def test_norms_of_queries_take_the_place_of_their_projection():
    found = scales(qk_norm=True)
    assert found["blocks.0.attention.q_norm.weight"] == (1 / 2, 1 / 2)
    assert found["blocks.0.attention.q_proj.weight"] == (1, 1 / 4)


def test_a_tied_head_is_scaled_by_the_norm_before_it():
    found = scales(tie_embeddings=True)
    assert found["norm.weight"] == (1 / 4, 1 / 4)
    assert found["embedding.weight"] == (2, 1)  # so that its entries are those of the base
    assert found["blocks.0.attention.o_proj.weight"] == (2, 1 / 4)


def test_a_router_is_a_head():
    found = scales(n_experts=4, n_active_experts=2)
    assert found["blocks.0.feed_forward.router.weight"] == (1 / 2, 1 / 4)


def test_the_first_logits_shrink_with_the_root_of_the_width():
    sizes = []
    for width in (32, 512):
        torch.manual_seed(0)
        model = TransformerLM(config(width))
        scaling.initialize_mup(model, config(32))
        sizes.append(model(torch.arange(16)[None]).std().item())
    assert sizes[0] / sizes[1] == pytest.approx(4, rel=0.3)


def test_drawing_twice_is_drawing_once():
    model, base = TransformerLM(config(64)), config(16)
    for _ in range(2):
        scaling.initialize_mup(model, base)
    assert model.lm_head.weight.std().item() == pytest.approx(4 / 64, rel=0.1)


def test_groups_hold_each_parameter_once_and_decay_times_rate_stays():
    model, base = TransformerLM(config(64)), config(16)
    groups = scaling.mup_groups(model, base, 0.1, 0.2)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    for group in groups:
        assert group["weight_decay"] == 0 or math.isclose(group["lr"] * group["weight_decay"], 0.02)
    by_id = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert by_id[id(model.lm_head.weight)] == pytest.approx(0.025)
    assert by_id[id(model.embedding.weight)] == pytest.approx(0.1)


def test_decay_is_a_tenth_unless_given():
    groups = scaling.mup_groups(TransformerLM(config(16)), config(16), 0.1)
    assert {group["weight_decay"] for group in groups} == {0.1, 0.0}


@pytest.mark.parametrize(
    ("name", "init", "rate"),
    [
        ("blocks.7.attention.o_proj.weight", 1 / 2, 1 / 4 / 4),
        ("blocks.7.feed_forward.down_proj.weight", 1 / 2, 1 / 4 / 4),
        ("blocks.7.feed_forward.down_proj.bias", 1 / 2, 1 / 4),
        ("blocks.7.feed_forward.up_proj.weight", 1, 1 / 4),
        ("blocks.7.attention_norm.weight", 1, 1),
        ("embedding.weight", 1, 1),
    ],
)
def test_depth_divides_what_writes_to_the_stream(name, init, rate):
    model = TransformerLM(config(64, n_layers=8, bias=True))
    assert scaling.mup_scales(model, config(16, n_layers=2, bias=True))[name] == (init, rate)


def test_branches_of_a_deeper_model_start_smaller_by_the_ratio_of_depths():
    spread = []
    for layers in (2, 8):
        torch.manual_seed(0)
        model = TransformerLM(config(64, n_layers=layers))
        scaling.initialize_mup(model, config(64))
        spread.append(model.blocks[0].attention.o_proj.weight.std().item())
    assert spread[0] == pytest.approx(1 / 8 / 2, rel=0.1)  # 1 / sqrt(fan-in), 1 / sqrt(2 layers)
    assert spread[1] == pytest.approx(spread[0] / 4, rel=0.1)


def test_scaled_writers_train_like_branches_that_are_divided():
    base, ratio = config(16, n_layers=1), 1 / 4
    torch.manual_seed(0)
    model = TransformerLM(config(16, n_layers=4)).double()
    scaling.initialize_mup(model, base)
    twin = copy.deepcopy(model)
    for block in twin.blocks:
        for branch in (block.attention, block.feed_forward):
            branch.register_forward_hook(lambda module, inputs, output: ratio * output)
    for name, parameter in twin.named_parameters():
        if {"o_proj", "down_proj"} & set(name.split(".")):
            parameter.data /= ratio
    ids, logits = torch.randint(64, (4, 16)), []
    for one, groups in (
        (model, scaling.mup_groups(model, base, 0.03, 0.2)),
        (twin, [{"params": [p], "weight_decay": 0.2 * (p.ndim > 1)} for p in twin.parameters()]),
    ):
        optimizer = torch.optim.AdamW(groups, lr=0.03, eps=1e-30)
        for group in optimizer.param_groups:  # tables do not decay
            if any(p is one.embedding.weight for p in group["params"]):
                group["weight_decay"] = 0.0
        for _ in range(5):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(one(ids).flatten(0, 1), ids.flatten()).backward()
            optimizer.step()
        logits.append(one(ids).detach())
    assert torch.allclose(*logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vocab_size": 65}, "vocab_size"),
        ({"qk_norm": True}, "qk_"),
        ({"n_layers": 3, "norm_position": "post"}, "norm_position"),
    ],
)
def test_a_base_that_differs_in_more_than_its_sizes_is_refused(changes, says):
    with pytest.raises(ValueError, match=f"base: expected {says}"):
        scaling.mup_scales(TransformerLM(config(64)), config(16, **changes))


def test_the_depth_of_a_model_with_post_norms_is_that_of_its_base():
    model = TransformerLM(config(64, norm_position="post"))
    with pytest.raises(ValueError, match="base: expected n_layers = 2 as of the model, got 3"):
        scaling.mup_scales(model, config(16, norm_position="post", n_layers=3))


def test_a_tied_head_without_a_norm_before_it_is_refused():
    changes = {"tie_embeddings": True, "norm_position": "post"}
    with pytest.raises(ValueError, match="norm_position"):
        scales(**changes)


def test_coordinates_move_alike_at_all_widths():
    moved = []
    for width in (32, 128):
        torch.manual_seed(0)
        model, base = TransformerLM(config(width)), config(32)
        scaling.initialize_mup(model, base)
        optimizer = torch.optim.AdamW(scaling.mup_groups(model, base, 0.03, 0.0))
        ids = torch.randint(64, (4, 16))
        before = model(ids).detach()
        for _ in range(4):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
            loss.backward()
            optimizer.step()
        moved.append((model(ids) - before).square().mean().sqrt().item())
    assert 0.5 < moved[1] / moved[0] < 1.6


def best_rates(sizes: str, width: int | None = None) -> dict[tuple[str, int], int]:
    """The best exponent of each method at each size, from the committed sweep; no weight decay."""
    with (ROOT / "benchmarks/results/transfer.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if float(row["weight_decay"]) == 0]
    found = {}
    for row in rows:
        if int(row["width"]) == width if sizes == "layers" else int(row["layers"]) == 2:
            key = row["method"], int(row[sizes]), int(row["log2_rate"])
            found.setdefault(key, []).append(float(row["loss"]))
    means = {key: sum(losses) / len(losses) for key, losses in found.items()}
    return {key[:2]: min((k for k in means if k[:2] == key[:2]), key=means.get)[2] for key in means}


def test_the_committed_sweep_is_whole_and_its_minima_stay_under_mup():
    best = best_rates("width")
    assert [best["standard", width] for width in (32, 64, 128, 256)] == [-5, -6, -7, -8]
    assert {best["mup", width] for width in (32, 64, 128, 256)} == {-5}
    best = best_rates("layers", 32)
    assert [best["standard", layers] for layers in (1, 2, 4, 8, 16)] == [-4, -5, -5, -5, -6]
    assert {best["mup", layers] for layers in (1, 2, 4, 8, 16)} == {-5}


def test_the_committed_steps_to_a_loss_are_whole():
    with (ROOT / "benchmarks/results/batch.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    keys = {(row["batch"], row["log2_rate"], row["seed"], row["target"]) for row in rows}
    assert len(keys) == len(rows) == 7 * 4 * 3 * 6
    assert {row["batch"] for row in rows if row["noise"]} == {"16"}


# The noise of the gradient


def test_noise_scale_solves_the_two_equations():
    found = scaling.noise_scale(3 + 8 / 2, 3 + 8 / 16, 2, 16)
    assert found.signal == pytest.approx(3) and found.noise == pytest.approx(8)
    assert found.batch_size == pytest.approx(8 / 3)


def test_noise_without_signal_asks_for_any_batch():
    assert scaling.noise_scale(8.0, 1.0, 1, 8).batch_size == math.inf


def test_a_batch_is_never_negative():
    found = scaling.noise_scale(1.0, 2.0, 1, 8)  # large batches with the larger gradient, by luck
    assert found.noise < 0 < found.signal and found.batch_size == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [((1, 1, 0, 2), "small"), ((1, 1, 4, 4), "big"), ((-1, 1, 1, 2), "small_square")],
)
def test_noise_scale_refuses(arguments, says):
    with pytest.raises(ValueError, match=f"^{says}: expected"):
        scaling.noise_scale(*arguments)


class Mean(torch.nn.Module):
    """Loss of a row: half its squared distance from the weights. Gradients are known exactly."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=torch.float64))


def distance(model, batch):
    difference = model.weight - batch.inputs.double() / 1000
    return difference.square().sum() / 2, torch.tensor(len(batch.inputs))


def batches_of(n_batches: int, rows: int) -> list[Batch]:
    torch.manual_seed(0)
    numbers = [(2000 * torch.randn(rows, 50)).long() for _ in range(n_batches)]
    return [Batch(ids, ids) for ids in numbers]


def test_gradient_noise_finds_a_known_covariance_in_rows():
    found = scaling.gradient_noise(Mean(50), batches_of(512, 2), group=8, objective=distance)
    assert found.noise == pytest.approx(50 * 4, rel=0.1)  # of 50 numbers of variance 4
    assert found.signal == pytest.approx(50, rel=0.1)


def test_gradient_noise_changes_nothing_and_has_groups_of_eight():
    model = Mean(50)
    scaling.gradient_noise(model, batches_of(8, 2), objective=distance)
    assert model.weight.grad is None and bool((model.weight == 1).all())
    with pytest.raises(ValueError, match=r"batches: expected at least group = 8.* got 7"):
        scaling.gradient_noise(model, batches_of(7, 2), objective=distance)
    with pytest.raises(ValueError, match="batches: expected 2 rows"):
        scaling.gradient_noise(model, batches_of(7, 2) + batches_of(1, 3), objective=distance)
    with pytest.raises(ValueError, match="batches: expected targets, got none"):
        scaling.gradient_noise(model, batches_of(8, 2), objective=lambda m, b: (m.weight.sum(), 0))
    model.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="model: expected a parameter"):
        scaling.gradient_noise(model, batches_of(8, 2), objective=distance)


# The cost of a run


def test_a_run_by_hand():
    device = scaling.Hardware(peak_flops=1e15, memory=1e10, power=500)
    run = scaling.estimate_run(
        1e9, 6e9, hardware=device, n_devices=2, mfu=0.5, price=3, pue=1.2, carbon=0.5
    )
    hours = 36e18 / 0.5e15 / 3600
    assert run.flops == pytest.approx(36e18) and run.gpu_hours == pytest.approx(hours)
    assert run.days == pytest.approx(hours / 48) and run.dollars == pytest.approx(3 * hours)
    assert run.energy_mwh == pytest.approx(hours * 500 * 1.2 / 1e6)
    assert run.co2_tonnes == pytest.approx(run.energy_mwh * 0.5)
    assert run.state_bytes == 18e9 and run.least_devices == 2


def test_defaults_of_a_run():
    given = {"hardware": "h100", "n_devices": 8, "mfu": 0.4, "price": 2, "pue": 1.1, "carbon": 0.42}
    assert scaling.estimate_run(1e9, 1e9) == scaling.estimate_run(1e9, 1e9, **given)


def test_experts_count_for_memory_and_the_sequence_for_operations():
    assert scaling.estimate_run(1e9, 1e9, total_parameters=4e9).state_bytes == 72e9
    gpt2 = ModelConfig.preset("gpt2")
    short, long = (scaling.estimate_run(gpt2, 1e9, sequence=n).flops for n in (128, 1024))
    assert short < long < 2 * short
    assert scaling.estimate_run(gpt2, 1e9).flops == long
    mixtral = ModelConfig.preset("mixtral-8x7b")
    assert scaling.estimate_run(mixtral, 1e9, total_parameters=2e10).state_bytes == 36e10


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hardware": "abacus"}, "hardware: expected one of v100"),
        ({"mfu": 1.5}, "mfu: expected a share"),
        ({"mfu": 0}, "mfu: expected a finite number above 0"),
        ({"tokens": -1}, "tokens: expected"),
        ({"model": math.nan}, "model: expected"),
        ({"n_devices": 0}, "n_devices: expected a whole"),
        ({"total_parameters": 0}, "total_parameters: expected"),
        ({"price": -2}, "price: expected"),
        ({"model": "7B"}, "model: expected .*ModelConfig.* got '7B'"),
        ({"total_parameters": 1e8}, r"total_parameters: expected at least the 1e\+09"),
        ({"pue": 0.9}, "pue: expected at least 1"),
        ({"sequence": 128}, "sequence: expected none"),
        ({"tokens": 10**400}, "tokens: expected a finite"),
    ],
)
def test_a_run_that_cannot_be_is_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        scaling.estimate_run(**{"model": 1e9, "tokens": 1e9, **changes})


def test_hardware_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="power: expected"):
        scaling.Hardware(1e15, 1e9, 0)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("GPT-3 175B", 175e9),
        ("Llama 2 7B", 6.74e9),
        ("Llama 2 70B", 69e9),
        ("Llama 3 70B", 70.6e9),
        ("Llama 3.1 405B", 405.9e9),
        ("OLMo 2 7B", 7.3e9),
    ],
)
def test_published_models_have_the_size_in_their_name(name, parameters):
    assert count_parameters(scaling.PUBLISHED[name].model) == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize("name", scaling.PUBLISHED)
def test_estimates_are_within_a_factor_of_three(name):
    run = scaling.PUBLISHED[name]
    found = scaling.estimate_run(run.model, run.tokens, hardware=run.hardware)
    if run.gpu_hours:
        assert 1 / 3 < found.gpu_hours / run.gpu_hours < 1.2
    if run.energy_mwh:
        assert 1 / 3 < found.energy_mwh / run.energy_mwh < 1.2


def test_info_agrees_with_what_earlier_chapters_count():
    config = ModelConfig.preset("mixtral-8x7b")
    found = scaling.info(config)
    assert found["parameters"] == count_parameters(config)
    assert found["active parameters"] == count_parameters(config, active=True)
    assert found["tokens by Chinchilla's rule"] == 20 * found["parameters"]
    assert found["bytes of weights"] == 2 * found["parameters"]
    assert found["bytes of training state"] == 18 * found["parameters"]
    assert found["flops per token, training"] == 3 * found["flops per token, forward"]
    gpt2 = ModelConfig.preset("gpt2")
    assert scaling.info(gpt2, 512)["bytes of cache"] * 2 == scaling.info(gpt2)["bytes of cache"]
    with pytest.raises(ValueError, match="config: expected"):
        scaling.info("gpt2")
    with pytest.raises(ValueError, match="sequence: expected at least 1"):
        scaling.info(gpt2, 0)


# Checklists


@pytest.mark.parametrize("scale", scaling.CHECKLISTS)
def test_each_value_lies_in_its_range_and_has_a_source(scale):
    keys = set(re.findall(r"@\w+\{([^,]+),", (ROOT / "references.bib").read_text("utf-8")))
    keys |= {path.stem for path in (ROOT / "chapters").glob("*.py")}
    assert len(scaling.hyperparameter_checklist(scale)) == len(scaling.CHECKLISTS[scale])
    for setting in scaling.CHECKLISTS[scale]:
        assert setting.low <= setting.value <= setting.high, setting
        assert setting.sources and keys.issuperset(setting.sources), setting


@pytest.mark.parametrize(
    ("number", "name"), [(2e6, "10M"), (3e8, "124M"), (4e8, "1B"), (13e9, "7B"), (1e12, "70B")]
)
def test_a_number_of_parameters_means_the_nearest_size(number, name):
    assert scaling.hyperparameter_checklist(number) == scaling.hyperparameter_checklist(name)


@pytest.mark.parametrize("scale", ["8B", "", -1, 0, math.nan, None, True, 7, 10**400, ["7B"]])
def test_unknown_scales_are_refused(scale):
    with pytest.raises(ValueError, match="scale: expected"):
        scaling.hyperparameter_checklist(scale)


def test_what_is_no_size_of_a_model_is_refused():
    with pytest.raises(ValueError, match="at least 100,000 parameters, got 99999"):
        scaling.hyperparameter_checklist(99_999)
    assert scaling.hyperparameter_checklist(1e5) == scaling.hyperparameter_checklist("10M")


def test_the_page_of_the_book_is_the_data():
    page = (ROOT / "chapters/checklists.md").read_text("utf-8")
    advice = "write checklist_page() of llmbook.scaling to chapters/checklists.md"
    assert page == scaling.checklist_page(), advice


GOOD = {"n_steps": 5000, "batch_size": 512, "learning_rate": 6e-4, "warmup": 50}


def test_a_config_by_the_list_passes():
    assert scaling.check_config(ModelConfig.preset("gpt2"), TrainingConfig(**GOOD)) == []


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"learning_rate": 0.01}, "learning_rate"),
        ({"batch_size": 8, "n_steps": 320_000, "warmup": 3200}, "batch_tokens"),
        ({"warmup": 0}, "warmup_share"),
        ({"weight_decay": 0.5}, "weight_decay"),
        ({"betas": (0.5, 0.95)}, "beta1"),
        ({"betas": (0.9, 0.9)}, "beta2"),
        ({"clip_norm": None}, "clip_norm"),
        ({"final": 0.5}, "final"),
        ({"schedule": "constant"}, "final"),
        ({"z_loss": 0.1}, "z_loss"),
        ({"n_steps": 50, "warmup": 1}, "tokens_per_parameter"),
    ],
)
def test_each_departure_is_named(changes, name):
    found = scaling.check_config(ModelConfig.preset("gpt2"), TrainingConfig(**GOOD | changes))
    assert [warning.split(":")[0] for warning in found] == [name]
    if name == "weight_decay":  # a range of one value
        assert found[0].startswith("weight_decay: 0.5 is not 0.1 (of published runs at 124M)")


def test_the_scale_may_be_given_and_other_optimizers_have_other_rates():
    gpt2, run = ModelConfig.preset("gpt2"), TrainingConfig(**GOOD)
    found = scaling.check_config(gpt2, run, scale="70B")
    assert any("at 70B" in warning and warning.startswith("learning_rate") for warning in found)
    muon = TrainingConfig(**GOOD | {"learning_rate": 0.02, "optimizer": "muon"})
    assert scaling.check_config(gpt2, muon) == []
    assert scaling.check_config(gpt2, run, scale=70e9) == found
    with pytest.raises(ValueError, match="model: expected"):
        scaling.check_config(None, run)
    with pytest.raises(ValueError, match="training: expected"):
        scaling.check_config(gpt2, None)
    with pytest.raises(ValueError, match="scale: expected"):
        scaling.check_config(gpt2, run, scale="huge")
    with pytest.raises(ValueError, match=r"scale: expected one of 10M, .* got 'sft'"):
        scaling.check_config(gpt2, run, scale="sft")
    atom = ModelConfig.preset("tiny", d_model=8, n_heads=2, d_ff=8, n_layers=1, vocab_size=64)
    assert isinstance(scaling.check_config(atom, run), list)


def test_the_presets_of_the_book_can_be_checked():
    for run in RUNS.values():
        assert isinstance(scaling.check_config(run.model_config(512), run.training), list)
