"""The second half of chapter 22: pairs as batches, what is learned from them, and resuming."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from llmbook import dpo
from llmbook.dpo import (
    LOSSES,
    WITHOUT_REFERENCE,
    PreferenceBatch,
    PreferencePairs,
    PreferenceTuning,
    SampledPairs,
    balanced,
    dpo_loss,
    dpo_objective,
    kto_loss,
    pair_log_probs,
    prefer,
    response_sums,
    sum_log_probs,
)
from llmbook.instruction import WORLD_CHAT, Message, story_examples
from llmbook.model import ModelConfig, TransformerLM
from llmbook.rlhf import (
    Pair,
    Preference,
    each,
    pair_examples,
    question_prompts,
    read_preferences,
    world_pairs,
)
from llmbook.tinyworld import TinyWorld, make_questions
from llmbook.tokenizer import BPETokenizer, train_bpe
from llmbook.training import Trainer

WORLD = TinyWorld(n_characters=4, n_strangers=2)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QUESTIONS = make_questions(WORLD, "unknown", "tuning")
PAIRS = world_pairs(WORLD, QUESTIONS[:6])
FEW = PreferenceTuning(n_steps=4, batch_size=4, n_texts=0, learning_rate=1e-3)


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return train_bpe([s.text for s in WORLD.stories(60, 0)], 400, special_tokens=SPECIAL)


def new_model(tokenizer: BPETokenizer, seed: int = 0, **changes: int) -> TransformerLM:
    torch.manual_seed(seed)
    sizes = {"context_length": 128, "d_model": 16, "n_layers": 1, "n_heads": 2} | changes
    return TransformerLM(ModelConfig(**{"vocab_size": tokenizer.vocab_size} | sizes))


def log_prob(model: TransformerLM, tokenizer: BPETokenizer, pair: Pair, reply: str) -> float:
    """Of one reply by itself, token by token."""
    talk = [Message("user", pair.question.text), Message("assistant", reply)]
    ids, learned = WORLD_CHAT.encode(tokenizer, talk)
    with torch.no_grad():
        log_probs = model(torch.tensor([ids[:-1]])).log_softmax(-1)[0]
    return sum(
        log_probs[t, id].item()
        for t, (id, on) in enumerate(zip(ids[1:], learned[1:], strict=True))
        if on
    )


# Log-probabilities of replies


def test_log_probabilities_are_those_of_each_reply_by_itself(tokenizer):
    model = new_model(tokenizer).eval()
    examples = pair_examples(tokenizer, WORLD_CHAT, PAIRS, limit=129).pairs
    found = pair_log_probs(model, examples, batch_size=5)
    for row, pair in zip(found.tolist(), PAIRS, strict=True):
        expected = [log_prob(model, tokenizer, pair, reply) for reply in pair[1:]]
        assert row == pytest.approx(expected, rel=1e-4)


def test_they_do_not_depend_on_what_stands_beside_them(tokenizer):
    model = new_model(tokenizer)
    examples = pair_examples(tokenizer, WORLD_CHAT, PAIRS, limit=129).pairs
    one, many = (pair_log_probs(model, examples, batch_size=n) for n in (1, 100))
    torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-4)
    sides = [side for pair in examples for side in pair]
    torch.testing.assert_close(sum_log_probs(model, sides).view(-1, 2), many)


def test_asking_the_reference_leaves_it_as_it_was(tokenizer):
    model = new_model(tokenizer).train()
    examples = pair_examples(tokenizer, WORLD_CHAT, PAIRS[:2], limit=129).pairs
    assert not pair_log_probs(model, examples).requires_grad
    assert model.training and all(p.grad is None for p in model.parameters())


def test_rows_without_targets_have_no_log_probability(tokenizer):
    model = new_model(tokenizer)
    inputs, targets = torch.ones(2, 5, dtype=torch.int64), torch.full((2, 5), -100)
    sums, lengths = response_sums(model, inputs, targets)
    assert sums.tolist() == [0.0, 0.0] and lengths.tolist() == [0, 0]


# Pairs as batches


def test_batches_hold_chosen_and_rejected_with_what_the_reference_said(tokenizer):
    model = new_model(tokenizer)
    batches = PreferencePairs(PAIRS, tokenizer, 4, reference=model)
    batch = batches[0]
    assert batch.inputs.shape[:2] == (4, 2) == batch.targets.shape[:2]
    sums = response_sums(model, batch.inputs.flatten(0, 1), batch.targets.flatten(0, 1))[0]
    torch.testing.assert_close(batch.reference.flatten(), sums, rtol=1e-5, atol=1e-4)
    end = tokenizer.special_tokens["<|im_end|>"]
    for row, reference in zip(batch.targets, batch.reference, strict=True):
        said = [tokenizer.decode([id for id in side.tolist() if id != -100]) for side in row]
        assert all(text.endswith("<|im_end|>") for text in said), "the end is a part of a reply"
        (place,) = [
            i
            for i, pair in enumerate(PAIRS)
            if [f" {reply}<|im_end|>" for reply in pair[1:]] == said
            and torch.equal(batches.reference_log_probs[i], reference)
        ][:1]
        assert 0 <= place < len(PAIRS)
    assert end in batch.targets


def test_each_epoch_has_every_pair_once_in_another_order(tokenizer):
    batches = PreferencePairs(PAIRS, tokenizer, len(PAIRS), reference=new_model(tokenizer))
    first, second = (batches[step].reference for step in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(0).values, second.sort(0).values)
    again = PreferencePairs(PAIRS, tokenizer, len(PAIRS), reference=new_model(tokenizer))
    assert torch.equal(again[1].inputs, batches[1].inputs)
    other = PreferencePairs(PAIRS, tokenizer, len(PAIRS), seed=1)
    assert not torch.equal(other[0].inputs, batches[0].inputs)


def long_pairs() -> list[Preference]:
    """Two of three differ only late."""
    prompt = (Message("user", "Who?"),)
    words = " ".join(["Mia"] * 30)
    return [
        Preference(prompt, f"{words} knows.", f"{words} hides."),
        Preference(prompt, "Mia.", "No."),
        Preference(prompt, f"{words} knows it.", f"{words} hides it."),
    ]


def test_pairs_that_are_equal_once_cut_are_dropped_and_counted(tokenizer):
    whole = PreferencePairs(long_pairs(), tokenizer, 2)
    assert (len(whole.examples), whole.dropped) == (3, 0)
    cut = PreferencePairs(long_pairs(), tokenizer, 2, context_length=30)
    assert (len(cut.examples), cut.dropped) == (1, 2)
    with pytest.raises(ValueError, match=r"^pairs: expected some that differ, got all of 2"):
        PreferencePairs(long_pairs()[::2], tokenizer, 2, context_length=30)
    same = Preference((Message("user", "Who?"),), "Mia.", "Mia.")
    assert PreferencePairs([*long_pairs(), same], tokenizer, 2).dropped == 1


def test_pairs_from_a_file_are_taken_alike(tokenizer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "Who?", "chosen": "Mia.", "rejected": "No."}\n', encoding="utf-8")
    batch = PreferencePairs(read_preferences(path), tokenizer, 1)[0]
    assert torch.equal(batch.inputs, PreferencePairs(long_pairs()[1:2], tokenizer, 1)[0].inputs)


def test_texts_stand_behind_the_pairs(tokenizer):
    texts = story_examples(WORLD, tokenizer, 5)
    batches = PreferencePairs(
        PAIRS, tokenizer, 4, 256, new_model(tokenizer), texts=texts, n_texts=2
    )
    batch = batches[3]
    assert batches.n_rows == 6 == len(batch.inputs) == len(batch.targets) == len(batch.reference)
    learned = (batch.targets != -100).any(2)
    assert learned.tolist() == [[True, True]] * 4 + [[True, False]] * 2
    known = {example.ids[1:] for example in texts}
    for row in batch.targets[4:, 0]:
        assert tuple(id for id in row.tolist() if id != -100) in known


def test_for_kto_there_are_replies_to_other_prompts(tokenizer):
    model = new_model(tokenizer)
    batches = PreferencePairs(PAIRS, tokenizer, 4, reference=model, mismatched=True)
    batch = batches[0]
    sums = response_sums(model, batch.other_inputs, batch.other_targets)[0]
    torch.testing.assert_close(batch.other_reference, sums, rtol=1e-5, atol=1e-4)
    own = {tuple(row.tolist()) for row in batch.inputs.flatten(0, 1)}
    assert not own & {tuple(row.tolist()) for row in batch.other_inputs}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected"),
        ({"pairs": []}, "pairs: expected some that differ, got none"),
        ({"n_texts": 2}, "texts: expected some, for n_texts = 2, got none"),
        ({"seed": -1}, "seed: expected"),
        ({"context_length": 8}, "pairs: expected prompts of less than"),
    ],
)
def test_pairs_that_cannot_be(changes, message, tokenizer):
    with pytest.raises(ValueError, match=rf"^{message}"):
        PreferencePairs(**{"pairs": PAIRS, "tokenizer": tokenizer} | changes)


def test_empty_replies_are_refused(tokenizer):
    pairs = [Preference((Message("user", "Who?"),), "Mia.", " ")]
    with pytest.raises(ValueError, match=r"^pairs: expected replies with words"):
        PreferencePairs(pairs, tokenizer)


def test_a_reference_of_another_vocabulary_is_refused(tokenizer):
    small = new_model(tokenizer, vocab_size=tokenizer.vocab_size - 1)
    with pytest.raises(ValueError, match=r"^reference: expected one with a vocabulary of"):
        PreferencePairs(PAIRS, tokenizer, reference=small)
    large = new_model(tokenizer, vocab_size=tokenizer.vocab_size + 1)
    with pytest.raises(ValueError, match=r"^reference: expected one with a vocabulary of"):
        prefer(new_model(tokenizer), PAIRS, FEW, tokenizer=tokenizer, reference=large)


def test_kinds_have_their_shares():
    kinds = ("fact", "unknown", "confidential")
    questions = [q for kind in kinds for q in make_questions(WORLD, kind, "tuning")]
    pairs = world_pairs(WORLD, questions)
    found = balanced(pairs, {"fact": 2, "unknown": 1, "confidential": 1}, 200)
    counts = {kind: sum(p.question.kind == kind for p in found) for kind in kinds}
    assert counts == {"fact": 100, "unknown": 50, "confidential": 50}
    own = [pair for pair in found if pair.question.kind == "confidential"]
    times = [own.count(pair) for pair in dict.fromkeys(own)]
    assert max(times) - min(times) <= 1
    assert len(balanced(pairs, {"fact": 1, "unknown": 1, "confidential": 1}, 100)) == 100
    assert balanced(pairs, {"fact": 1.0}, 5) == balanced(pairs, {"fact": 1.0}, 5)
    assert balanced(pairs, {"fact": 1.0}, 5) != balanced(pairs, {"fact": 1.0}, 5, seed=1)
    with pytest.raises(ValueError, match=r"^pairs: expected some of the kind 'fact', got none"):
        balanced([p for p in pairs if p.question.kind != "fact"], {"fact": 1}, 5)
    with pytest.raises(ValueError, match=r"^shares: expected"):
        balanced(pairs, {"secret": 1}, 5)
    with pytest.raises(ValueError, match=r"^shares"):
        balanced(pairs, {"fact": 0}, 5)


# The objective


def of_batch(model: TransformerLM, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    rows = batch.inputs.flatten(0, 1), batch.targets.flatten(0, 1)
    sums, lengths = response_sums(model, *rows)
    return sums.view(-1, 2), lengths.view(-1, 2)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_objective_is_the_sum_of_losses(loss, tokenizer):
    model, reference = new_model(tokenizer), new_model(tokenizer, 1)
    known = None if loss in WITHOUT_REFERENCE else reference
    batches = PreferencePairs(PAIRS, tokenizer, 4, reference=known, mismatched=loss == "kto")
    batch = batches[0]
    total, count, logged = dpo_objective(model, batch, loss=loss, beta=0.5)
    policy, lengths = of_batch(model, batch)
    before = torch.zeros_like(policy) if known is None else batch.reference
    if loss in dpo.OF_MEANS:
        policy, before = policy / lengths, before / lengths
    if loss == "kto":
        others = response_sums(model, batch.other_inputs, batch.other_targets)[0]
        kl = (others - batch.other_reference).mean()
        flat = policy.flatten(), before.flatten(), torch.tensor([True, False] * 4)
        expected = kto_loss(*flat, kl, beta=0.5).sum() / 2
    else:
        expected = dpo_loss(*policy.unbind(1), *before.unbind(1), loss=loss, beta=0.5).sum()
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)
    assert count == 4
    assert float(logged["preference_loss"]) == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(("loss", "expected"), [("sigmoid", math.log(2)), ("kto", 0.5)])
def test_it_begins_where_it_must(loss, expected, tokenizer):
    model = new_model(tokenizer)
    batch = PreferencePairs(PAIRS, tokenizer, 4, reference=model, mismatched=loss == "kto")[0]
    total, count, logged = dpo_objective(model, batch, loss=loss)
    assert (total / count).item() == pytest.approx(expected, abs=1e-5)
    assert logged["chosen"].item() == pytest.approx(0.0, abs=1e-3)


def test_a_share_of_likelihood_is_that_of_the_chosen_reply_per_token(tokenizer):
    model = new_model(tokenizer)
    batch = PreferencePairs(PAIRS, tokenizer, 4, reference=model)[0]
    without, with_it = (dpo_objective(model, batch, likelihood=w)[0] for w in (0.0, 2.0))
    sums, lengths = of_batch(model, batch)
    expected = -2.0 * (sums / lengths)[:, 0].sum()
    torch.testing.assert_close(with_it - without, expected, rtol=1e-4, atol=1e-4)


def test_texts_count_by_their_weight(tokenizer):
    model, texts = new_model(tokenizer, context_length=256), story_examples(WORLD, tokenizer, 5)
    make = partial(PreferencePairs, PAIRS, tokenizer, 4, 256, model, texts=texts)
    alone, mixed = make()[0], make(n_texts=2)[0]
    rows = mixed.inputs[4:, 0], mixed.targets[4:, 0]
    sums, lengths = response_sums(model, *rows)
    for weight in (0.0, 1.0, 0.5):
        totals = [dpo_objective(model, b, text_weight=weight)[0] for b in (alone, mixed)]
        expected = -weight * (sums / lengths).sum()
        torch.testing.assert_close(totals[1] - totals[0], expected, rtol=1e-4, atol=1e-4)


def test_ties_do_not_count(tokenizer):
    model, reference = new_model(tokenizer), new_model(tokenizer, 1)
    batch = PreferencePairs(PAIRS, tokenizer, 4, reference=reference)[0]
    targets = batch.targets.clone()
    targets[1] = -100
    total, count, _ = dpo_objective(model, batch._replace(targets=targets))
    kept = [0, 2, 3]
    fields = batch.inputs[kept], batch.targets[kept], batch.reference[kept]
    expected, n, _ = dpo_objective(model, PreferenceBatch(*fields))
    torch.testing.assert_close(total, expected)
    assert count == n == 3


def test_a_batch_of_ties_has_no_gradient(tokenizer):
    model = new_model(tokenizer)
    batch = PreferencePairs(PAIRS, tokenizer, 4, reference=model)[0]
    nothing = batch._replace(targets=torch.full_like(batch.targets, -100))
    total, count, _ = dpo_objective(model, nothing)
    total.backward()
    assert total == 0 and count == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_what_a_loss_needs_of_a_batch(loss, tokenizer):
    model = new_model(tokenizer)
    batch = PreferencePairs(PAIRS, tokenizer, 4)[0]
    with pytest.raises(ValueError, match=rf"^batch: expected a reference.* for {loss}, got None"):
        dpo_objective(model, batch, loss=loss)
    batch = PreferencePairs(PAIRS, tokenizer, 4, reference=model)[0]
    with pytest.raises(ValueError, match=r"^batch: expected replies to other prompts for kto"):
        dpo_objective(model, batch, loss="kto")


# Runs


@pytest.mark.parametrize("loss", LOSSES)
def test_a_model_learns_what_is_preferred(loss, tokenizer):
    model = new_model(tokenizer)
    margin = 0.5 if loss == "simpo" else 0.0
    settings = PreferenceTuning(
        loss=loss, margin=margin, n_steps=12, batch_size=8, n_texts=0, learning_rate=1e-2
    )
    before = copy.deepcopy(model)
    prefer(model, PAIRS, settings, tokenizer=tokenizer)
    examples = pair_examples(tokenizer, WORLD_CHAT, PAIRS, limit=129).pairs
    change = pair_log_probs(model, examples) - pair_log_probs(before, examples)
    assert (change[:, 0] - change[:, 1]).mean() > 1, "the chosen gain on the rejected"


def test_the_reference_is_the_model_as_it_was(tokenizer):
    model, twin = new_model(tokenizer), new_model(tokenizer)
    log = prefer(model, PAIRS, FEW, tokenizer=tokenizer)
    assert log.column("preference_loss")[1] and all(math.isfinite(x) for x in log.column("loss")[1])
    prefer(twin, PAIRS, FEW, tokenizer=tokenizer, reference=new_model(tokenizer))
    assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))


def test_micro_batches_change_nothing(tokenizer):
    found = []
    for rows in (None, 2):
        model, reference = new_model(tokenizer), new_model(tokenizer, 1)
        batches = PreferencePairs(PAIRS, tokenizer, 4, reference=reference)
        config = replace(FEW.training(4), micro_batch_size=rows)
        Trainer(model, batches, config, objective=dpo_objective).train()
        found.append(model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-5)


def run_to(folder, model: TransformerLM, batches, n_steps: int, stop_after: int | None = None):
    """Train in a folder; with ``stop_after``, be killed then, after a checkpoint at each step."""
    config = replace(FEW.training(batches.n_rows), n_steps=n_steps, checkpoint_every=1)

    class Killed(Exception):
        pass

    class Stopping(Trainer):
        def attend(self, batch, report):
            super().attend(batch, report)
            if self.step == stop_after:
                raise Killed

    trainer = Stopping(model, batches, config, objective=dpo_objective, folder=folder)
    if stop_after is None:
        return trainer.train()
    with pytest.raises(Killed):
        trainer.train()


def test_a_run_on_pairs_resumes_bit_for_bit(tokenizer, tmp_path):
    texts = story_examples(WORLD, tokenizer, 5)
    models = []
    for name, stop in (("whole", None), ("killed", 3)):
        for after in (stop, None)[: 1 if stop is None else 2]:
            model = new_model(tokenizer, context_length=256)
            reference = new_model(tokenizer, 1, context_length=256)
            made = PreferencePairs(PAIRS, tokenizer, 4, 256, reference, texts=texts, n_texts=1)
            run_to(tmp_path / name, model, made, 6, after)
        models.append(model)
    assert all(map(torch.equal, models[0].state_dict().values(), models[1].state_dict().values()))


def test_resuming_keeps_what_the_reference_said(tokenizer):
    """The model may have changed meanwhile, as a resumed one has that is its own reference."""
    first = PreferencePairs(PAIRS, tokenizer, 4, reference=new_model(tokenizer))
    later = PreferencePairs(PAIRS, tokenizer, 4, reference=new_model(tokenizer, 1))
    assert not torch.equal(first[0].reference, later[0].reference)
    later.load_state_dict(first.state_dict())
    assert torch.equal(first[0].reference, later[0].reference)


def test_other_pairs_are_no_continuation(tokenizer):
    first = PreferencePairs(PAIRS, tokenizer, 4)
    with pytest.raises(ValueError, match=r"^state: pairs"):
        PreferencePairs(PAIRS[::-1], tokenizer, 4).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match=r"^state: seed"):
        PreferencePairs(PAIRS, tokenizer, 4, seed=1).load_state_dict(first.state_dict())


# Pairs that the model itself has written


def longer(prompt, response) -> float:
    return float(len(response.ids))


def sampled(tokenizer: BPETokenizer, policy: TransformerLM, **changes) -> SampledPairs:
    given = {
        "prompts": question_prompts(tokenizer, QUESTIONS[:4]),
        "reward": each(longer),
        "reference": new_model(tokenizer, 1),
        "n_prompts": 3,
        "samples": 3,
        "max_new_tokens": 6,
    }
    return SampledPairs(policy=policy, tokenizer=tokenizer, **given | changes)


def test_the_best_and_the_worst_make_a_pair(tokenizer):
    policy = new_model(tokenizer)
    with torch.no_grad():  # so that replies end now and then
        policy.lm_head.weight[tokenizer.special_tokens["<|im_end|>"]] *= 3
    batches = sampled(tokenizer, policy, reward=each(lambda p, r: float(r.ids[0])), samples=4)
    batch = batches[0]
    is_pair = (batch.targets != -100).any(2).all(1)
    assert is_pair.any()
    for row, targets in enumerate(batch.targets[is_pair]):
        best, worst = (next(id for id in side.tolist() if id != -100) for side in targets)
        assert best > worst, f"row {row}: the reward is the first id"
    assert batches.metrics["pairs"] == pytest.approx(is_pair.float().mean().item())
    reference = new_model(tokenizer, 1)
    rows = batch.inputs[is_pair].flatten(0, 1), batch.targets[is_pair].flatten(0, 1)
    said = response_sums(reference, *rows)[0].view(-1, 2)
    torch.testing.assert_close(batch.reference[is_pair], said, rtol=1e-4, atol=1e-4)


def test_equal_rewards_make_no_pair(tokenizer):
    model = new_model(tokenizer)
    batches = sampled(tokenizer, model, reward=each(lambda prompt, response: 1.0))
    assert (batches[0].targets == -100).all() and batches.metrics["pairs"] == 0
    before = copy.deepcopy(model.state_dict())
    log = prefer(model, batches, FEW, tokenizer=tokenizer)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert log.column("reward")[1][-1] == 1.0


def test_a_round_is_served_as_often_as_asked(tokenizer):
    batches = sampled(tokenizer, new_model(tokenizer), epochs=2)
    first, second, third = (batches[step] for step in range(3))
    assert torch.equal(first.inputs, second.inputs) and not torch.equal(first.inputs, third.inputs)
    with pytest.raises(ValueError, match=r"^step: expected"):
        batches[5]


def test_rewards_that_fail_are_named_with_the_text(tokenizer):
    with pytest.raises(ValueError, match=r"^reward: expected a finite number for the response"):
        sampled(tokenizer, new_model(tokenizer), reward=each(lambda p, r: math.nan))[0]
    with pytest.raises(
        ValueError, match=r"^reward: expected numbers, got an error: .*ZeroDivision"
    ):
        sampled(tokenizer, new_model(tokenizer), reward=each(lambda p, r: 1 / 0))[0]


def test_what_sampling_refuses(tokenizer):
    policy = new_model(tokenizer)
    with pytest.raises(ValueError, match=r"^reference: expected a copy of the policy, got the pol"):
        sampled(tokenizer, policy, reference=policy)
    for changes, name in (
        ({"samples": 1}, "samples"),
        ({"n_prompts": 5}, "prompts"),
        ({"epochs": 0}, "epochs"),
        ({"n_texts": 1}, "texts"),
        ({"reference": new_model(tokenizer, vocab_size=tokenizer.vocab_size + 8)}, "reference"),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: expected"):
            sampled(tokenizer, policy, **changes)


@pytest.mark.parametrize("stop", [1, 2])  # in the middle of a round, and between two
def test_sampling_resumes_bit_for_bit(stop, tokenizer, tmp_path):
    models = []
    for name, after in (("whole", [None]), ("killed", [stop, None])):
        for stopped in after:
            model = new_model(tokenizer)
            run_to(tmp_path / name, model, sampled(tokenizer, model, epochs=2), 5, stopped)
        models.append(model)
    assert all(map(torch.equal, models[0].state_dict().values(), models[1].state_dict().values()))


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta: expected"),
        ({"loss": "ppo"}, "loss: expected"),
        ({"label_smoothing": 0.1, "loss": "kto"}, "label_smoothing: expected"),
        ({"likelihood": -1.0}, "likelihood: expected"),
        ({"text_weight": math.nan}, "text_weight: expected"),
        ({"n_texts": -1}, "n_texts: expected"),
        ({"n_steps": 0}, "n_steps: expected"),
        ({"batch_size": 0}, "batch_size: expected"),
        ({"learning_rate": 0.0}, "learning_rate: expected"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=rf"^{message}"):
        PreferenceTuning(**settings)
