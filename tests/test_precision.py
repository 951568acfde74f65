"""Mixed precision: torch's decisions, bit for bit, and a trainer that goes on through overflows."""

import copy
import itertools
import math
import re

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from llmbook.batches import Batch, ResumableBatches
from llmbook.environment import seed_everything
from llmbook.generation import generate
from llmbook.model import ModelConfig, TransformerLM, count_parameters
from llmbook.optimization import AdamW, clip_gradients, cross_entropy
from llmbook.precision import (
    CastProducts,
    CompactAdamW,
    GradScaler,
    LiveMemory,
    MixedPrecision,
    checkpoint_blocks,
    memory_breakdown,
)
from llmbook.training import Trainer, TrainingConfig, TrainingError, next_token_objective

SIZES = {"vocab_size": 23, "context_length": 16, "d_model": 16, "n_layers": 2, "n_heads": 2}


def model_of(seed=0, backend="torch", **changes):
    seed_everything(seed)
    return TransformerLM(ModelConfig(**SIZES | changes), backend)


@pytest.fixture
def untyped():
    """Switch jaxtyping's checks off, as they are for a reader, to see our own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


class Rows(ResumableBatches):
    """Rows of random ids, others at each step."""

    def identity(self):
        return {"rows": "random"}

    def __getitem__(self, step):
        ids = torch.randint(23, (4, 13), generator=torch.Generator().manual_seed(step))
        return Batch(ids[:, :-1], ids[:, 1:].contiguous())


def trainer_of(precision=None, objective=None, n_steps=6, folder=None, model=None, **changes):
    given = {"batch_size": 4, "learning_rate": 0.01, "log_every": 1, "checkpoint_every": 1}
    given["precision"] = changes.pop("precision_setting", "float32")
    config = TrainingConfig(n_steps=n_steps, **given | changes)
    options = {"precision": precision, "objective": objective, "folder": folder}
    return Trainer(model or model_of(dropout=0.1), Rows(), config, **options)


def weights_of(trainer):
    return [p.detach().clone() for p in trainer.parameters]


def trained(trainer):
    """Take all steps, with the same random numbers whoever asks."""
    seed_everything(1)
    trainer.train()
    return trainer


def same(some, others):
    return all(map(torch.equal, some, others))


# The scaler


class Twin:
    """Two weights with an optimizer each, under one scaler."""

    def __init__(self, scaler):
        self.scaler = scaler
        self.weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
        sgd, adam = torch.optim.SGD([self.weights[0]], lr=0.1), AdamW([self.weights[1]], lr=0.1)
        self.optimizers = [sgd, adam]

    def step(self, factors, unscaled):
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        for micro_batch in factors:
            losses = [(w * f).sum() for w, f in zip(self.weights, micro_batch, strict=True)]
            for loss in self.scaler.scale(losses):
                loss.backward()
        for weight, optimizer, early in zip(self.weights, self.optimizers, unscaled, strict=True):
            if early:
                self.scaler.unscale_(optimizer)
                clip_gradients([weight], 1.0)
            self.scaler.step(optimizer)
        self.scaler.update()


FACTORS = st.sampled_from([1.0, -0.3, 1e-6, 1e36, -3e38, math.inf, -math.inf, math.nan])
STEPS = st.lists(
    st.tuples(
        st.lists(st.tuples(FACTORS, FACTORS), min_size=1, max_size=3),
        st.tuples(st.booleans(), st.booleans()),
    ),
    min_size=1,
    max_size=12,
)
SETTINGS = st.fixed_dictionaries(
    {
        "init_scale": st.sampled_from([2.0**16, 1.0, 3.7, 1e30, 0.001]),
        "growth_factor": st.sampled_from([2.0, 1.7, 1e5]),
        "backoff_factor": st.sampled_from([0.5, 0.3]),
        "growth_interval": st.integers(1, 3),
    }
)


@given(steps=STEPS, chosen=SETTINGS, swap=st.integers(0, 12))
@settings(max_examples=60, deadline=None)
def test_every_decision_is_torchs(steps, chosen, swap):
    twins = [Twin(GradScaler(**chosen)), Twin(torch.amp.GradScaler("cpu", **chosen))]
    twins[1].scaler.scale(torch.ones(()))  # makes its scale, else its states are refused
    for number, (factors, unscaled) in enumerate(steps):
        if number == swap:
            states = [twin.scaler.state_dict() for twin in twins]
            for twin, state in zip(twins, reversed(states), strict=True):
                twin.scaler.load_state_dict(state)
        for twin in twins:
            twin.step(factors, unscaled)
        states = [twin.scaler.state_dict() for twin in twins]
        assert states[0] == states[1]
        exactly = {"rtol": 0, "atol": 0, "equal_nan": True}
        torch.testing.assert_close(twins[0].weights, twins[1].weights, **exactly)


def stepped(scaler, gradient=1.0):
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.scale((weight * gradient).sum()).backward()
    return weight, optimizer


def test_the_settings_are_torchs_by_default():
    ours, theirs = GradScaler(), torch.amp.GradScaler("cpu")
    assert ours.state_dict() == theirs.state_dict()
    assert ours.is_enabled()
    for name in ("scale", "growth_factor", "backoff_factor", "growth_interval"):
        assert getattr(ours, f"get_{name}")() == getattr(theirs, f"get_{name}")()


def test_a_scaler_that_is_not_enabled_does_nothing():
    scaler = GradScaler(enabled=False)
    weight, optimizer = stepped(scaler, math.inf)
    loss = torch.ones(())
    assert scaler.scale(loss) is loss
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    scaler.load_state_dict({})
    assert not weight.isfinite().all()
    assert (scaler.get_scale(), scaler.state_dict(), scaler.is_enabled()) == (1.0, {}, False)


def test_losses_are_scaled_in_32_bits_and_in_what_they_came_in():
    scaler, half = GradScaler(), torch.ones((), dtype=torch.float16)
    assert scaler.scale(half) == 2.0**16  # more than float16 holds
    assert scaler.scale([half, [half]]) == [2.0**16, [2.0**16]]
    assert scaler.scale((half,)) == (2.0**16,)
    assert list(scaler.scale(iter([half]))) == [2.0**16]
    for wrong in (3, "loss"):
        with pytest.raises(
            ValueError, match=f"^outputs: expected a tensor or several, got {wrong!r}"
        ):
            scaler.scale(wrong)


def test_the_value_of_the_optimizer_is_returned_and_a_skipped_step_has_none():
    class Telling(torch.optim.SGD):
        def step(self):
            return "taken"

    for gradient, said in ((1.0, "taken"), (math.nan, None)):
        scaler, weight = GradScaler(), nn.Parameter(torch.zeros(2))
        scaler.scale((weight * gradient).sum()).backward()
        assert scaler.step(Telling([weight])) == said


def test_an_optimizer_without_some_gradients_and_with_sparse_and_empty_ones():
    table, unused, empty = nn.Embedding(5, 2, sparse=True), nn.Parameter(torch.ones(2)), []
    empty = nn.Parameter(torch.zeros(0))
    optimizer = torch.optim.SGD([*table.parameters(), unused, empty], lr=1.0)
    before, scaler = table.weight.detach().clone(), GradScaler()
    scaler.scale(table(torch.tensor([1, 1])).sum() + empty.sum()).backward()
    scaler.step(optimizer)
    moved = torch.zeros(5, 2)
    moved[1] = 2
    torch.testing.assert_close(table.weight.detach(), before - moved)


def test_a_second_step_or_unscaling_before_update_is_refused():
    scaler = GradScaler()
    _, optimizer = stepped(scaler)
    scaler.unscale_(optimizer)
    message = r"^optimizer: expected update\(\) before {}, got SGD after {}"
    with pytest.raises(RuntimeError, match=message.format(r"unscale_\(\)", r"unscale_\(\)")):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=message.format(r"step\(\)", r"step\(\)")):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=message.format(r"unscale_\(\)", r"step\(\)")):
        scaler.unscale_(optimizer)
    scaler.update()
    scaler.step(optimizer)


def test_calls_without_what_they_need_are_refused():
    scaler = GradScaler()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0)
    with pytest.raises(RuntimeError, match=r"^update: expected unscale_\(\) or step\(\) before"):
        scaler.update()
    with pytest.raises(RuntimeError, match=r"^optimizer: expected gradients, got SGD without any"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"^optimizer: expected unscale_\(\) first, got SGD"):
        scaler.found_inf(optimizer)
    with pytest.raises(ValueError, match=r"^arguments: expected none"):
        scaler.step(optimizer, lambda: 0.0)


@pytest.mark.usefixtures("untyped")
def test_what_is_no_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"^optimizer: expected one of torch.optim, got 3"):
        GradScaler().unscale_(3)


def test_weights_in_float16_are_refused():
    scaler, weight = GradScaler(init_scale=4.0), nn.Parameter(torch.zeros(2, dtype=torch.float16))
    scaler.scale(weight.sum()).backward()
    message = r"^optimizer: expected weights and gradients in float32, got .* float16, .*\(2,\)"
    for call in (scaler.unscale_, scaler.step):
        with pytest.raises(ValueError, match=message):
            call(torch.optim.SGD([weight], lr=1.0))
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        theirs = torch.amp.GradScaler("cpu")
        theirs.scale(torch.ones(()))
        theirs.unscale_(torch.optim.SGD([weight], lr=1.0))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("init_scale", 0.0, "a positive number that float32 holds"),
        ("init_scale", math.inf, "a positive number that float32 holds"),
        ("init_scale", math.nan, "a positive number that float32 holds"),
        ("init_scale", 1e39, "a positive number that float32 holds"),
        ("growth_factor", 1.0, "more than 1"),
        ("backoff_factor", 1.0, "at least 0 and less than 1"),
        ("backoff_factor", 0.0, "more than 0"),
        ("growth_interval", 0, "at least 1"),
    ],
)
def test_settings_of_the_scaler_out_of_range(name, value, expected):
    message = "^" + re.escape(f"{name}: expected {expected}, got {value!r}")
    with pytest.raises(ValueError, match=message):
        GradScaler(**{name: value})
    if name != "init_scale":
        with pytest.raises(ValueError, match=message):
            getattr(GradScaler(), f"set_{name}")(value)
        with pytest.raises(ValueError, match=message):
            GradScaler().load_state_dict(GradScaler().state_dict() | {name: value})


def test_a_scale_of_ones_own_and_a_state_that_is_none():
    scaler = GradScaler()
    scaler.update(3.0)
    assert scaler.get_scale() == 3.0
    with pytest.raises(ValueError, match=r"^new_scale: expected a positive number .* got -1.0"):
        scaler.update(-1.0)
    with pytest.raises(ValueError, match=r"^state_dict: expected the state .* without '_growth"):
        scaler.load_state_dict({})
    with pytest.raises(ValueError, match=r"^_growth_tracker: expected at least 0, got -1"):
        scaler.load_state_dict(scaler.state_dict() | {"_growth_tracker": -1})


def test_a_power_of_two_changes_no_digit():
    weight = nn.Parameter(torch.randn(50))
    gradients = []
    for scale in (1.0, 2.0**20, 2.0**-20):
        weight.grad, scaler = None, GradScaler(init_scale=scale)
        scaler.scale((weight.square() * torch.arange(50)).sum()).backward()
        scaler.unscale_(torch.optim.SGD([weight], lr=1.0))
        gradients.append(weight.grad)
    assert same(gradients[1:], gradients[:1] * 2)


# Casts


def outcome(context, model, ids):
    model.zero_grad()
    with context:
        logits = model(ids)
    cross_entropy(logits.float(), ids).backward()
    return [logits.detach(), *[p.grad for p in model.parameters()]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "changes", [{}, {"n_kv_heads": 1}, {"norm": "layernorm", "activation": "gelu"}]
)
def test_casts_are_those_of_autocast(dtype, changes):
    ids = Rows()[0].inputs
    ours = outcome(CastProducts(dtype), model_of(**changes), ids)
    theirs = outcome(torch.autocast("cpu", dtype), model_of(**changes), ids)
    assert same(ours, theirs)
    assert ours[0].dtype == dtype
    exact = outcome(torch.autocast("cpu", enabled=False), model_of(**changes), ids)
    emulated = outcome(CastProducts(dtype, emulate=True), model_of(**changes), ids)
    assert emulated[0].dtype == torch.float32
    bound = 8 * {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    for some in (ours, emulated):
        for a, b in zip(some, exact, strict=True):
            assert 0 < (a.float() - b).norm() < bound * b.norm()


def test_which_functions_go_down_and_which_stay_up():
    x, low = torch.randn(4, 4), torch.randn(4, 4).half()
    with CastProducts(torch.bfloat16):
        for product in (x @ x, torch.mm(x, x), F.linear(x, x), x.matmul(low), F.linear(low, low)):
            assert product.dtype == torch.bfloat16
        attention = F.scaled_dot_product_attention(x[None], x[None], x[None])
        assert attention.dtype == torch.bfloat16
        for wide in (low.softmax(-1), low.exp(), low.sum(), F.layer_norm(low, (4,)), low.var()):
            assert wide.dtype == torch.float32
        assert (x + low).dtype == (x * 2).dtype == torch.float32
        assert (low * 2).dtype == torch.float16
        assert (x.double() @ x.double()).dtype == torch.float64
        assert torch.mm(x, x, out=torch.empty(4, 4)).dtype == torch.float32
    assert (x @ x).dtype == torch.float32
    with CastProducts(torch.bfloat16, emulate=True):
        assert torch.equal(x @ x, (x.bfloat16().float() @ x.bfloat16().float()).bfloat16().float())
        assert low.exp().dtype == torch.float16


def test_emulated_gradients_are_rounded_on_their_way_back():
    x = torch.ones(1, 1, requires_grad=True)
    for dtype, arrives in ((torch.float16, 0.0), (torch.bfloat16, 1e-9)):
        x.grad = None
        with CastProducts(dtype, emulate=True):
            y = x @ torch.ones(1, 1)
        (y * 1e-9).sum().backward()
        assert float(x.grad) == pytest.approx(arrives, rel=0.01)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, "bfloat16", None])
def test_products_can_be_cast_to_two_types(dtype):
    with pytest.raises(ValueError, match=r"^dtype: expected torch.float16 or torch.bfloat16, got"):
        CastProducts(dtype)


# In the trainer


def test_by_name_as_by_setting():
    plain, by_object = trained(trainer_of()), trained(trainer_of(MixedPrecision("float32")))
    assert same(weights_of(plain), weights_of(by_object))
    by_setting = trained(trainer_of(model=model_of(), precision_setting="bfloat16"))
    by_object = trained(trainer_of(MixedPrecision(), model=model_of()))
    assert same(weights_of(by_setting), weights_of(by_object))
    assert by_setting.identity()["precision"] == by_object.identity()["precision"] == "bfloat16"
    assert not same(weights_of(by_setting), weights_of(plain))


def overflowing(at, seen):
    """An objective whose gradient is infinite in the calls of these numbers, the loss never."""

    def objective(model, batch):
        total, count = next_token_objective(model, batch)
        seen.append(batch.inputs)
        weight = next(model.parameters())
        if len(seen) in at:  # the gradient of 0 * sqrt(0) is infinite times zero
            total = total + (0 * weight.detach() * weight).sum() + (weight * 0).abs().sqrt().sum()
        return total, count

    return objective


def test_a_batch_that_overflows_is_repeated_and_counts_once():
    seen, scaler = [], GradScaler(init_scale=2.0**8)
    precision = MixedPrecision("float16", scaler=scaler, emulate=True)
    trainer = trainer_of(precision, overflowing({3, 4}, seen), model=model_of(), max_skipped=0)
    log = trainer.train()
    assert (trainer.step, trainer.guard.skipped, precision.overflows) == (6, 0, 2)
    assert len(seen) == 8  # batch number 2 three times
    assert all(torch.equal(seen[i], Rows()[2].inputs[:, : seen[i].size(1)]) for i in (2, 3, 4))
    assert log.column("loss_scale")[1] == [2.0**8] * 2 + [2.0**6] * 4
    assert log.column("overflows")[1] == [0, 0, 2, 2, 2, 2]
    assert log.column("step")[1] == log.column("loss")[0] == [1, 2, 3, 4, 5, 6]
    state = trainer.optimizer.state_dict()["state"][0]
    assert int(state["step"]) == 6
    expected = trainer.schedule(5) * 0.01
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_a_loss_that_is_not_finite_is_the_guards_business():
    def bad(model, batch):
        total, count = next_token_objective(model, batch)
        return total * (math.inf if torch.equal(batch.inputs, Rows()[2].inputs) else 1.0), count

    def fresh():
        return MixedPrecision("float16", scaler=GradScaler(init_scale=2.0**8), emulate=True)

    precision = fresh()
    trainer = trained(trainer_of(precision, bad))
    assert (trainer.step, trainer.guard.skipped, precision.overflows) == (6, 1, 0)
    assert all(weight.isfinite().all() for weight in weights_of(trainer))
    with pytest.raises(TrainingError, match=r"step 3: 1 steps in a row .* the loss was inf"):
        trainer_of(fresh(), bad, max_skipped=0).train()


def test_a_gradient_that_is_infinite_at_any_scale_ends_the_run():
    precision = MixedPrecision("float16", emulate=True, lowest_scale=1.0)
    trainer = trainer_of(precision, overflowing(range(1000), []), max_skipped=2)
    with pytest.raises(TrainingError, match=r"step 3: 3 steps in a row were skipped, .*norm was"):
        trainer.train()
    assert precision.overflows == 17  # from 2**16 to below 1
    assert precision.scaler.get_scale() < 1


@pytest.mark.parametrize("stop", [1, 3, 5])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_a_resumed_run_is_the_same_to_the_bit(stop, name, tmp_path):
    def fresh(folder):
        scaler = GradScaler(init_scale=2.0**18, growth_interval=2, enabled=name == "float16")
        precision = MixedPrecision(name, scaler=scaler, emulate=True)
        return trainer_of(precision, folder=folder, micro_batch_size=2, clip_norm=0.1)

    whole, stopped = trained(fresh(None)), fresh(tmp_path)
    seed_everything(1)
    while stopped.step < stop:
        stopped.train_step(next(iter(stopped.batches)))
    stopped.save()
    resumed = fresh(tmp_path)
    resumed.train()
    assert same(weights_of(resumed), weights_of(whole))
    assert resumed.precision.state_dict() == whole.precision.state_dict()
    assert (whole.precision.overflows > 0) == (name == "float16")
    with pytest.raises(ValueError, match=f"^precision: expected '{name}', as in the checkpoint"):
        trainer_of(folder=tmp_path, micro_batch_size=2, clip_norm=0.1).resume()


def test_scaled_steps_are_those_of_float32_where_nothing_is_rounded():
    """A scale changes no digit: with float32 products, micro-batches and clipping, not a bit."""
    plain = trainer_of(micro_batch_size=2, clip_norm=0.1)
    scaled = trainer_of(
        MixedPrecision("float32", scaler=GradScaler(init_scale=2.0**10)),
        micro_batch_size=2,
        clip_norm=0.1,
    )
    assert same(weights_of(trained(plain)), weights_of(trained(scaled)))


@pytest.mark.parametrize("optimizer", ["muon", "sgd", "NAdam"])
def test_every_optimizer_can_be_scaled(optimizer):
    changes = {"optimizer": optimizer, "micro_batch_size": 2, "spike_factor": 50.0}
    scaler = GradScaler(init_scale=2.0**6)
    precision = MixedPrecision("float16", scaler=scaler, emulate=True)
    trainer, plain = trainer_of(precision, **changes), trainer_of(**changes)
    ours, exact = weights_of(trained(trainer)), weights_of(trained(plain))
    assert trainer.guard.skipped == precision.overflows == 0
    for a, b in zip(ours, exact, strict=True):
        assert 0 < (a - b).norm() < 0.1 * b.norm()


def test_evaluation_computes_in_the_same_precision():
    trainer = trainer_of(MixedPrecision("bfloat16"))
    trainer.validation = [Rows()[7]]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        total, count = next_token_objective(trainer.model.eval(), Rows()[7])
    assert trainer.evaluate() == pytest.approx(float(total / count))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_master_weights_in_16_bits_are_refused(name, dtype):
    message = f"^model: expected master weights in float32, got embedding.weight in {dtype}"
    with pytest.raises(ValueError, match=message):
        trainer_of(MixedPrecision(name), model=model_of().to(dtype))
    assert trainer_of(MixedPrecision(name), model=model_of().double())


@pytest.mark.usefixtures("untyped")
def test_unknown_names_and_arguments():
    for name in ("fp16", "float8_e4m3fn", None, 16):
        expected = r"^name: expected one of float32, bfloat16, float16, got"
        with pytest.raises(ValueError, match=expected):
            MixedPrecision(name)
    with pytest.raises(ValueError, match=r"^scaler: expected a GradScaler, got <torch.amp"):
        MixedPrecision("float16", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match=r"^emulate: expected True or False, got 1"):
        MixedPrecision("float16", emulate=1)
    with pytest.raises(ValueError, match=r"^lowest_scale: expected a positive number"):
        MixedPrecision("float16", lowest_scale=0)
    with pytest.raises(ValueError, match=r"^state: expected scaler and overflows"):
        MixedPrecision("float16").load_state_dict({})


def test_the_documented_defaults_of_mixed_precision():
    precision = MixedPrecision()
    assert (precision.name, precision.emulate, precision.lowest_scale) == (
        "bfloat16",
        False,
        2**-14,
    )
    assert not precision.scaler.is_enabled()
    assert MixedPrecision("float16").scaler.get_scale() == 2.0**16
    assert precision.numbers() == precision.state_dict() == {}


# The optimizer's state


def test_the_state_has_16_bits_and_is_right_on_average():
    weight = nn.Parameter(torch.zeros(20_000))
    plain = nn.Parameter(torch.zeros(1))
    torch.manual_seed(0)
    optimizer, exact = CompactAdamW([weight]), AdamW([plain])
    for step in range(30):
        for parameter, kind in ((weight, optimizer), (plain, exact)):
            parameter.grad = torch.full_like(parameter, 1.0 if step < 5 else 0.37)
            kind.step()
    for name in ("exp_avg", "exp_avg_sq"):
        state = optimizer.state[weight][name]
        assert state.dtype == torch.bfloat16
        true = float(exact.state[plain][name])
        assert len(state.unique()) > 1
        assert float(state.float().mean()) == pytest.approx(true, rel=3e-3)
    assert weight.dtype == torch.float32


def test_rounding_to_the_nearest_gets_stuck_as_documented():
    for beta, moves in ((0.999, False), (0.99, True)):
        weight = nn.Parameter(torch.zeros(3))
        optimizer = CompactAdamW([weight], betas=(0.9, beta), rounding="nearest")
        found = []
        for step in range(60):
            weight.grad = torch.full((3,), 1.0 if step < 30 else 0.0)
            optimizer.step()
            found.append(optimizer.state[weight]["exp_avg_sq"].clone())
        assert torch.equal(found[29], found[59]) != moves
        assert optimizer.param_groups[0]["params"][0] is weight


def test_where_16_bits_suffice_it_is_adamw():
    """With gradients and means that bfloat16 holds, nothing is rounded."""
    results = []
    for kind in (AdamW, CompactAdamW):
        weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
        groups = [{"params": weights[:1], "lr": 0.5}, {"params": weights[1:], "weight_decay": 0.0}]
        optimizer = kind(groups, betas=(0.5, 0.5))
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.full_like(weight, 2.0)
            optimizer.step()
        results.append([w.detach() for w in weights])
    assert same(*results)


def test_the_compact_state_resumes_to_the_bit(tmp_path):
    def fresh(folder):
        config = TrainingConfig(n_steps=6, batch_size=4, checkpoint_every=1)
        compact = lambda model: CompactAdamW(model.parameters(), lr=0.01)  # noqa: E731
        return Trainer(model_of(), Rows(), config, optimizer=compact, folder=folder)

    whole, stopped = trained(fresh(None)), fresh(tmp_path)
    seed_everything(1)
    for _ in range(3):
        stopped.train_step(next(iter(stopped.batches)))
    stopped.save()
    resumed = fresh(tmp_path)
    resumed.train()
    assert same(weights_of(resumed), weights_of(whole))
    assert resumed.identity()["optimizer group 0, rounding"] == "stochastic"


@pytest.mark.usefixtures("untyped")
def test_closures_and_unknown_roundings():
    weight = nn.Parameter(torch.ones(2))

    def closure():
        weight.grad = None
        loss = weight.square().sum()
        loss.backward()
        return loss

    optimizer = CompactAdamW([weight], lr=0.1)
    assert optimizer.step(closure).item() == 2.0
    assert weight[0].item() < 1
    again = copy.deepcopy(optimizer)
    assert again.param_groups[0]["rounding"] == "stochastic"
    with pytest.raises(
        ValueError, match=r"^rounding: expected one of nearest, stochastic, got 'up'"
    ):
        CompactAdamW([weight], rounding="up")


# Memory


def test_the_bytes_of_a_parameter():
    config = ModelConfig(**SIZES)
    n, matrices = count_parameters(config), 2 * (4 * 16 * 16 + 3 * 16 * config.d_ff)
    for precision, optimizer, per_parameter, per_matrix in (
        ("float32", "adamw", 16, 0), ("float32", "sgd", 8, 0), ("pure", "adamw", 8, 0),
        ("bfloat16", "adamw", 16, 2), ("float16", "compact_adamw", 12, 2),
        ("float32", "muon", 16, -4),
    ):  # fmt: skip
        parts = memory_breakdown(config, 2, 8, precision=precision, optimizer=optimizer)
        static = sum(parts[k] for k in ("weights", "16-bit copies", "gradients", "optimizer"))
        head = 2 * 23 * 16 if per_matrix == 2 else 0
        assert static == per_parameter * n + per_matrix * matrices + head


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 1}, {"activation": "gelu", "n_layers": 3}])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_formula_is_what_a_forward_pass_keeps(changes, precision, checkpointing):
    sizes = {"vocab_size": 64, "context_length": 64, "d_model": 64, "n_layers": 3, "n_heads": 4}
    config = ModelConfig(**sizes | changes)
    model, ids = TransformerLM(config), torch.zeros(4, 64, dtype=torch.int64)
    if checkpointing:
        checkpoint_blocks(model)
    with LiveMemory() as memory, MixedPrecision(precision).computing(ids.device):
        total = model(ids).sum()
    assert total.requires_grad
    options = {"precision": precision, "checkpointing": checkpointing}
    parts = memory_breakdown(config, 4, 64, **options)
    expected = parts["activations"] + parts["16-bit copies"]
    if checkpointing:  # the block that is computed again is not yet there, nor are all copies
        one = memory_breakdown(ModelConfig(**sizes | changes | {"n_layers": 1}), 4, 64, **options)
        ends = (2 * 64 if precision == "float32" else 64 + 32) * 4 * 4 * 64
        block = one["activations"] - ends - 64 * 4 * 4 * 64
        expected = parts["activations"] - block
        assert memory.live == pytest.approx(expected, rel=0.2)
    else:
        assert memory.live == pytest.approx(expected, rel=0.03)


def test_logits_and_their_chunks():
    config = ModelConfig(**SIZES)
    whole = memory_breakdown(config, 2, 8)["logits"]
    assert whole == 2 * 8 * 23 * 4
    assert memory_breakdown(config, 2, 8, chunk_size=4)["logits"] == whole / 4
    assert memory_breakdown(config, 2, 8, chunk_size=400)["logits"] == whole
    assert memory_breakdown(config, 2, 8, precision="bfloat16")["logits"] == whole
    assert memory_breakdown(config, 2, 8, precision="pure")["logits"] == whole / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "precision: expected one of float32, bfloat16, float16, pure, got"),
        ({"optimizer": "lion"}, "optimizer: expected one of sgd, adamw, compact_adamw, muon, got"),
        ({"chunk_size": 0}, "chunk_size: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"sequence": 0}, "sequence: expected at least 1, got 0"),
    ],
)
def test_what_memory_cannot_be_counted_for(options, message):
    given = {"batch_size": 2, "sequence": 8} | options
    with pytest.raises(ValueError, match=f"^{message}"):
        memory_breakdown(ModelConfig(**SIZES), **given)


def test_experts_are_refused():
    config = ModelConfig(**SIZES, n_experts=4, n_active_experts=2)
    with pytest.raises(ValueError, match=r"^n_experts: expected 0, got 4"):
        memory_breakdown(config, 2, 8)


def test_living_bytes_are_counted_once_and_until_they_die():
    before = torch.zeros(100)
    with LiveMemory() as memory:
        view = before.view(10, 10).t()
        assert memory.live == 0  # was there before
        x = torch.zeros(100)
        y = x[:50]
        z = x + 1
        assert memory.live == 800
        x.add_(1)
        del z
        assert (memory.live, memory.peak) == (400, 800)
        del x
        assert memory.live == 400  # y is a view of it
        del y
    assert (memory.live, memory.peak) == (0, 800)
    assert view.shape == (10, 10)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_blocks_have_the_same_gradients(dropout):
    found = []
    for prepare in (lambda model: model, checkpoint_blocks):
        model, batch = prepare(model_of(dropout=dropout)), Rows()[0]
        torch.manual_seed(1)
        next_token_objective(model, batch)[0].backward()
        found.append([p.grad for p in model.parameters()])
    assert same(*found)
    state = model.state_dict()
    assert state.keys() == model_of().state_dict().keys()


def test_checkpointing_twice_is_once_and_generation_goes_on():
    plain, model = model_of(), checkpoint_blocks(checkpoint_blocks(model_of()))
    assert not hasattr(model.blocks[0].forward.args[0], "func")
    for lm in (plain, model):
        lm.eval()
    options = {"prompts": [[1, 2, 3]], "max_new_tokens": 4}
    assert generate(plain, **options) == generate(model, **options)


@pytest.mark.usefixtures("untyped")
def test_only_our_model_has_blocks():
    with pytest.raises(ValueError, match=r"^model: expected a TransformerLM, got Linear"):
        checkpoint_blocks(nn.Linear(2, 2))


def test_checkpointed_blocks_in_the_trainer(tmp_path):
    plain = trainer_of(MixedPrecision("bfloat16"), model=model_of())
    saving = trainer_of(MixedPrecision("bfloat16"), model=checkpoint_blocks(model_of()))
    for trainer in (plain, saving):
        trainer.train()
    assert same(weights_of(plain), weights_of(saving))


def test_scales_are_numbers_that_float32_holds():
    assert GradScaler(init_scale=0.1).get_scale() == float(np.float32(0.1))
    scaler = GradScaler(init_scale=3e38, growth_interval=1)
    weight = nn.Parameter(torch.zeros(1))
    for _ in itertools.repeat(None, 2):  # it would be infinite, so it stays
        weight.grad = torch.ones(1)
        scaler.step(torch.optim.SGD([weight], lr=1.0))
        scaler.update()
    assert scaler.get_scale() == float(np.float32(3e38))
