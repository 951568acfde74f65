"""The second half of chapter 21: responses, rewards, rollouts, and PPO as runs of a trainer."""

import copy
import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from llmbook.instruction import WORLD_CHAT, Example, response_log_probs, story_examples
from llmbook.model import ModelConfig, TransformerLM
from llmbook.rlhf import (
    PPO,
    ActorCritic,
    CriticCredit,
    LearnedReward,
    LeaveOneOutCredit,
    Prompt,
    Response,
    RewardModel,
    RolloutBatches,
    RolloutLog,
    Rollouts,
    as_rollouts,
    each,
    generalized_advantages,
    on_tokens,
    policy_objective,
    question_prompts,
    rewards_of,
    score_rollouts,
    score_rows,
    token_rewards,
    train_ppo,
    whitened,
    world_reward,
    write_responses,
)
from llmbook.tinyworld import TinyWorld, make_questions
from llmbook.tokenizer import BPETokenizer, train_bpe
from llmbook.training import MetricsLog, Trainer, TrainingConfig

WORLD = TinyWorld(n_characters=4, n_strangers=2)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [story.text for story in WORLD.stories(60, 0)]
TOKENIZER: BPETokenizer = train_bpe(TEXTS, 400, special_tokens=SPECIAL)
PAD = TOKENIZER.special_tokens["<|endoftext|>"]
END = TOKENIZER.special_tokens["<|im_end|>"]
QUESTIONS = make_questions(WORLD, "fact", "tuning")[:8]
PROMPTS = question_prompts(TOKENIZER, QUESTIONS)


def new_model(seed: int = 0, **changes: Any) -> TransformerLM:
    torch.manual_seed(seed)
    sizes = {"context_length": 192, "d_model": 16, "n_layers": 1, "n_heads": 2} | changes
    sizes.setdefault("vocab_size", TOKENIZER.vocab_size)
    return TransformerLM(ModelConfig(**sizes))


def likes_even_ids(prompt: Prompt, response: Response) -> float:
    """A reward that any model can learn: tokens with an even id."""
    return float(sum(id % 2 == 0 for id in response.ids))


def batches(policy: TransformerLM, **changes: Any) -> RolloutBatches:
    given: dict[str, Any] = {
        "prompts": PROMPTS,
        "reward": each(likes_even_ids),
        "credit": LeaveOneOutCredit(),
        "tokenizer": TOKENIZER,
        "n_prompts": 4,
        "samples": 2,
        "epochs": 2,
        "minibatches": 2,
        "max_new_tokens": 6,
    }
    return RolloutBatches(policy, **(given | changes))


def some_rollouts(**changes: Any) -> Rollouts:
    """Return two prompts with two responses each, of which one was cut off."""
    prompts = [Prompt((1, 2, 3)), Prompt((4, 5))]
    responses = [
        [Response((7, 8, END), (-1.0, -2.0, -3.0), True, "a"), Response((9,), (-4.0,), False, "b")],
        [Response((END,), (-5.0,), True, ""), Response((10, END), (-6.0, -7.0), True, "c")],
    ]
    rewards = torch.tensor([1.0, 0.0, 2.0, -2.0])
    return as_rollouts(prompts, responses, rewards, pad_id=PAD)._replace(**changes)


# Prompts and responses


def test_prompts_end_where_a_reply_begins_and_know_their_question():
    assert [prompt.question for prompt in PROMPTS] == QUESTIONS
    text = TOKENIZER.decode(PROMPTS[0].ids)
    assert text.endswith(f" {QUESTIONS[0].text}<|im_end|>\n<|im_start|>assistant\n")


def test_responses_keep_their_ids_and_the_log_probabilities_of_the_policy():
    model = new_model()
    groups = write_responses(model, PROMPTS[:3], tokenizer=TOKENIZER, samples=4, max_new_tokens=7)
    assert [len(group) for group in groups] == [4, 4, 4]
    assert len({response.ids for group in groups for response in group}) > 6, "samples differ"
    for prompt, group in zip(PROMPTS[:3], groups, strict=True):
        for response in group:
            assert 1 <= len(response.ids) == len(response.log_probs) <= 7
            assert response.finished == (response.ids[-1] in (END, PAD))
            whole = torch.tensor([prompt.ids + response.ids])
            logits = model(whole[:, :-1])
            targets = whole[:, 1:].clone()
            targets[:, : len(prompt.ids) - 1] = -100
            found = response_log_probs(logits, targets)[targets != -100]
            expected = torch.tensor(response.log_probs)
            torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_at_another_temperature_the_log_probabilities_are_those_of_the_draw(temperature):
    model = new_model()
    options: Any = {"tokenizer": TOKENIZER, "samples": 3, "max_new_tokens": 5}
    groups = write_responses(model, PROMPTS[:4], temperature=temperature, batch_size=5, **options)
    rewards = torch.zeros(12)
    rollouts = as_rollouts(PROMPTS[:4], groups, rewards, pad_id=PAD)
    again = score_rollouts(model, rollouts, temperature=temperature)
    torch.testing.assert_close(rollouts.old_log_probs, again, rtol=1e-4, atol=1e-4)


def test_responses_depend_on_the_seed_and_their_number_alone():
    model = new_model()
    options: Any = {"tokenizer": TOKENIZER, "max_new_tokens": 5, "samples": 2}
    whole = write_responses(model, PROMPTS[:4], seed=3, **options)
    again = write_responses(model, PROMPTS[:4], seed=3, batch_size=3, **options)
    later = write_responses(model, PROMPTS[2:4], seed=3, first_row=4, **options)
    other = write_responses(model, PROMPTS[:4], seed=4, **options)
    ids = [[[response.ids for response in group] for group in found] for found in (whole, again)]
    assert ids[0] == ids[1]
    assert [[response.ids for response in group] for group in later] == ids[0][2:]
    assert [[response.ids for response in group] for group in other] != ids[0]


def test_prompts_that_leave_no_room_are_named():
    long = Prompt(tuple(range(3, 189)))
    with pytest.raises(ValueError, match=r"prompts: expected 1 to 186 tokens.*got 0 at index 1"):
        write_responses(
            new_model(), [PROMPTS[0], Prompt(())], tokenizer=TOKENIZER, max_new_tokens=6
        )
    with pytest.raises(ValueError, match=r"prompts: expected 1 to 182 tokens.*got 186 at index 0"):
        write_responses(new_model(), [long], tokenizer=TOKENIZER, max_new_tokens=10)


@pytest.mark.parametrize("option", [{"samples": 0}, {"max_new_tokens": 0}, {"temperature": 0.0}])
def test_options_of_writing_out_of_range(option):
    given: dict[str, Any] = {"tokenizer": TOKENIZER, "max_new_tokens": 2} | option
    with pytest.raises(ValueError, match=next(iter(option))):
        write_responses(new_model(), PROMPTS[:1], **given)


# Rewards


def response(text: str) -> Response:
    return Response((5,), (-1.0,), True, text)


def test_a_reward_function_that_raises_is_named_with_the_text():
    def fails(prompt: Prompt, response: Response) -> float:
        raise KeyError("no such thing")

    with pytest.raises(ValueError, match=r"reward: .*KeyError.*'some words'"):
        rewards_of(each(fails), PROMPTS[:1], [response("some words")])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_named_with_the_text(bad):
    rewards = each(lambda prompt, response: bad if response.text == "some words" else 1.0)
    with pytest.raises(ValueError, match=r"reward: expected a finite number .*'some words'.*got"):
        rewards_of(rewards, PROMPTS[:2], [response("others"), response("some words")])


def test_as_many_rewards_as_responses():
    with pytest.raises(ValueError, match="reward: expected 2 numbers, got 1"):
        rewards_of(lambda prompts, responses: [1.0], PROMPTS[:2], [response("a"), response("b")])
    with pytest.raises(ValueError, match="reward: expected numbers, got an error"):
        rewards_of(lambda prompts, responses: ["x"], PROMPTS[:1], [response("a")])  # type: ignore[list-item]


def test_the_true_reward_as_a_reward_function():
    right = response(QUESTIONS[0].reply)
    assert rewards_of(world_reward(WORLD), PROMPTS[:1], [right]).tolist() == [1.0]
    with pytest.raises(ValueError, match="one without a question"):
        rewards_of(world_reward(WORLD), [Prompt((1, 2))], [right])


def test_a_learned_reward_asks_its_model_about_the_whole_conversation():
    model = RewardModel(new_model())
    torch.nn.init.normal_(model.head.weight)
    answers = [Response((7, END), (-1.0, -1.0), True, ""), Response((8,), (-1.0,), False, "")]
    found = rewards_of(LearnedReward(model, PAD, center=0.5), PROMPTS[:2], answers)
    rows = [(*PROMPTS[0].ids, 7, END), (*PROMPTS[1].ids, 8)]
    torch.testing.assert_close(found, score_rows(model, rows, pad_id=PAD) - 0.5)


# Rows to learn from


def test_rollouts_by_hand():
    found = some_rollouts()
    assert found.inputs.shape == (4, 6)
    assert found.targets.tolist() == [
        [-100, -100, 7, 8, END, -100],
        [-100, -100, 9, -100, -100, -100],
        [-100, END, -100, -100, -100, -100],
        [-100, 10, END, -100, -100, -100],
    ]
    assert found.old_log_probs[0].tolist() == [0.0, 0.0, -1.0, -2.0, -3.0, 0.0]
    assert found.old_log_probs[3].tolist() == [0.0, -6.0, -7.0, 0.0, 0.0, 0.0]
    assert found.finished.tolist() == [True, False, True, True]
    assert found.groups.tolist() == [0, 0, 1, 1]
    assert found.mask.sum(dim=1).tolist() == [3, 1, 1, 2]
    assert not found.mask[:, -1].any(), "a response that was cut off has a place after it"


def test_what_stands_behind_a_row_is_no_part_of_it():
    """A response whose tokens have the id of padding is told by its place."""
    prompts, answer = [Prompt((PAD, 1))], Response((PAD, 5, PAD), (-1.0, -2.0, -3.0), True, "")
    short = Response((3,), (-4.0,), True, "")
    found = as_rollouts(prompts, [[answer, short]], torch.zeros(2), pad_id=PAD)
    assert found.mask.sum(dim=1).tolist() == [3, 1]
    assert found.targets[0, 1:4].tolist() == [PAD, 5, PAD]


def test_a_response_without_tokens_is_named():
    empty = Response((), (), True, "")
    with pytest.raises(ValueError, match="responses: expected at least one token in each"):
        as_rollouts([Prompt((1,))], [[empty]], torch.zeros(1), pad_id=PAD)
    with pytest.raises(ValueError, match=r"responses: expected a list for each of 0 prompts"):
        as_rollouts([], [], torch.zeros(0), pad_id=PAD)


def test_a_reference_of_a_smaller_vocabulary_is_refused():
    small = new_model(vocab_size=8)
    with pytest.raises(ValueError, match=r"model: expected one with more than .* got 8"):
        score_rollouts(small, some_rollouts())
    with pytest.raises(ValueError, match="reference: expected the policy's vocabulary of"):
        batches(new_model(), reference=small)


# Rewards of tokens


def test_the_reward_stands_at_the_last_token_of_the_response():
    found = token_rewards(some_rollouts())
    assert found.nonzero().tolist() == [[0, 4], [2, 1], [3, 2]]
    assert found[0, 4] == 1.0 and found[3, 2] == -2.0


def test_the_penalty_is_counted_once_at_every_token_of_the_response():
    rollouts = some_rollouts()
    reference = torch.full_like(rollouts.old_log_probs, -2.5)
    rollouts = rollouts._replace(reference_log_probs=reference)
    found = token_rewards(rollouts, kl_weight=0.1)
    penalty = on_tokens(torch.ones(4), rollouts.mask) * (rollouts.old_log_probs + 2.5)
    torch.testing.assert_close(found, token_rewards(rollouts) - 0.1 * penalty)
    assert not found[~rollouts.mask].any()
    spoiled = rollouts._replace(reference_log_probs=reference.where(rollouts.mask, math.nan))
    assert torch.equal(token_rewards(spoiled, kl_weight=0.1), found)


def test_a_penalty_needs_a_reference():
    with pytest.raises(ValueError, match=r"a reference's log-probabilities for kl_weight = 0.1"):
        token_rewards(some_rollouts(), kl_weight=0.1)
    with pytest.raises(ValueError, match="kl_weight: expected"):
        token_rewards(some_rollouts(), kl_weight=-0.1)


def test_leave_one_out_compares_the_responses_to_the_same_prompt():
    found = LeaveOneOutCredit()(some_rollouts())
    assert found.advantages is not None
    per_row = [row[row != 0] for row in found.advantages]
    assert [values.unique().tolist() for values in per_row] == [[1.0], [-1.0], [4.0], [-4.0]]
    assert not found.advantages[~found.mask].any()


def test_equal_rewards_in_a_group_give_no_signal():
    found = LeaveOneOutCredit()(some_rollouts(rewards=torch.ones(4)))
    assert found.advantages is not None and not found.advantages.any()


def test_the_credit_of_a_critic_is_that_of_its_parts():
    critic = RewardModel(new_model())
    torch.nn.init.normal_(critic.head.weight)
    rollouts = some_rollouts()
    with torch.no_grad():
        found = CriticCredit(critic, gamma=0.9, lam=0.8)(rollouts)
        values = critic.token_scores(rollouts.inputs)
    expected = generalized_advantages(
        token_rewards(rollouts), values, rollouts.mask, rollouts.finished, gamma=0.9, lam=0.8
    )
    assert found.advantages is not None and found.returns is not None
    torch.testing.assert_close(found.advantages, whitened(expected.advantages, rollouts.mask))
    torch.testing.assert_close(found.returns, expected.returns)


# Batches that the policy writes


def test_each_response_is_served_once_in_each_epoch():
    made = batches(new_model())
    assert made.steps_per_rollout == 4 and made.batch_size == 4
    served = [made[step] for step in range(4)]
    assert made.rollout is not None
    every = sorted(made.rollout.inputs.tolist())
    for epoch in (served[:2], served[2:]):
        assert sorted(row for batch in epoch for row in batch.inputs.tolist()) == every
    orders = [[b.old_log_probs.sum(dim=1).tolist() for b in e] for e in (served[:2], served[2:])]
    assert orders[0] != orders[1]


def test_all_prompts_come_in_turns():
    made = batches(new_model(), epochs=1, minibatches=1)
    seen: list[int] = []
    for step in range(2):
        made[step]
        assert made.rollout is not None
        starts = made.rollout.mask.int().argmax(dim=1) + 1
        rows = zip(made.rollout.inputs.tolist(), starts.tolist(), strict=True)
        prompts = [tuple(row[:start]) for row, start in rows]
        assert prompts[::2] == prompts[1::2], "both samples of a prompt stand together"
        seen += [next(i for i, p in enumerate(PROMPTS) if p.ids == ids) for ids in prompts[::2]]
    assert sorted(seen) == list(range(8))


def test_the_policy_writes_the_next_rollout_as_it_is_by_then():
    policy = new_model()
    made = batches(policy, epochs=1, minibatches=1)
    made[0]
    with torch.no_grad():
        policy.lm_head.weight.mul_(3.0)
    second = made[1]
    fresh = batches(policy, epochs=1, minibatches=1)
    assert torch.equal(second.inputs, fresh[1].inputs)
    again = score_rollouts(policy, second)
    torch.testing.assert_close(second.old_log_probs, again, rtol=1e-3, atol=1e-3)


def test_a_step_in_the_midst_of_another_rollout_is_refused():
    with pytest.raises(ValueError, match="step: expected a step of the rollout in hand"):
        batches(new_model())[5]


def test_texts_stand_behind_the_responses_and_have_no_reward():
    texts = story_examples(WORLD, TOKENIZER, 6)
    made = batches(new_model(), texts=texts, n_texts=3)
    assert made.batch_size == 7
    batch = made[0]
    assert batch.text_targets is not None and batch.advantages is not None
    assert batch.inputs.shape[0] == 7 and not batch.mask[4:].any()
    assert not (batch.text_targets[:4] != -100).any()
    for row, example in zip(batch.text_targets[4:], texts, strict=False):
        learned = row[row != -100]
        assert tuple(learned.tolist()) in {text.ids[1:] for text in texts}, example
    assert not batch.advantages[4:].any()


def test_other_rewards_are_watched_only():
    watch = {"tokens": each(lambda prompt, response: float(len(response.ids)))}
    plain, watched = batches(new_model()), batches(new_model(), watch=watch)
    assert torch.equal(plain[0].inputs, watched[0].inputs)
    assert "tokens" not in plain.metrics
    assert watched.metrics["tokens"] == pytest.approx(watched.metrics["length"])


def test_what_is_logged_of_a_rollout_by_hand():
    made = batches(new_model())
    assert made.metrics == {}
    reference = some_rollouts().old_log_probs - on_tokens(
        torch.full((4,), 0.5), some_rollouts().mask
    )
    made.rollout = some_rollouts(reference_log_probs=reference)
    expected = {"reward": 0.25, "length": 7 / 4, "finished": 0.75, "kl": 0.5 * 7 / 4}
    assert made.metrics == pytest.approx(expected)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"n_prompts": 0}, "n_prompts: expected"),
        ({"n_prompts": 9}, "prompts: expected at least n_prompts = 9, got 8"),
        ({"prompts": []}, "prompts: expected at least n_prompts = 4, got 0"),
        ({"minibatches": 3}, "minibatches: expected a divisor of 4 x 2 responses, got 3"),
        ({"n_texts": 2}, "texts: expected some, for n_texts = 2, got none"),
        ({"seed": -1}, "seed: expected"),
    ],
)
def test_batches_that_cannot_be_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        batches(new_model(), **changes)


def test_dropout_would_change_the_policy_between_draw_and_loss():
    with pytest.raises(ValueError, match=r"policy: expected one without dropout, got 0.1"):
        batches(new_model(dropout=0.1))


def test_a_credit_that_gives_no_advantages_is_named():
    made = batches(new_model(), credit=lambda rollouts: rollouts)
    with pytest.raises(ValueError, match="credit: expected finite advantages"):
        made[0]

    def nan(rollouts: Rollouts) -> Rollouts:
        return rollouts._replace(advantages=torch.full_like(rollouts.old_log_probs, math.nan))

    with pytest.raises(ValueError, match="credit: expected finite advantages"):
        batches(new_model(), credit=nan)[0]


def test_a_reward_that_fails_in_the_midst_of_training_is_named():
    def reward(prompt: Prompt, response: Response) -> float:
        raise ZeroDivisionError("by zero")

    with pytest.raises(ValueError, match=r"reward: .*ZeroDivisionError.*for the response"):
        batches(new_model(), reward=each(reward))[0]


# The objective


def objective_by_hand(model: ActorCritic, batch: Rollouts, clip: float, weight: float) -> float:
    total = 0.0
    log_probs = response_log_probs(model.policy(batch.inputs), batch.targets)
    values = model.critic.token_scores(batch.inputs)
    assert batch.advantages is not None and batch.returns is not None
    for row, column in batch.mask.nonzero().tolist():
        ratio = math.exp(float(log_probs[row, column] - batch.old_log_probs[row, column]))
        a = float(batch.advantages[row, column])
        total -= min(ratio * a, min(max(ratio, 1 - clip), 1 + clip) * a)
        total += weight / 2 * float(values[row, column] - batch.returns[row, column]) ** 2
    return total


def test_the_objective_by_hand():
    policy = new_model()
    model = ActorCritic(policy)
    torch.nn.init.normal_(model.critic.head.weight)
    with torch.no_grad():
        batch = batches(policy, credit=CriticCredit(model.critic), samples=1)[0]
        policy.lm_head.weight.mul_(1.2)
    total, count, sums = policy_objective(model, batch, clip=0.1, value_weight=0.3)
    assert int(count) == int(batch.mask.sum())
    assert float(total.detach()) == pytest.approx(
        objective_by_hand(model, batch, 0.1, 0.3), rel=1e-4
    )
    assert {"entropy", "clipped", "change", "value_error"} <= set(sums)
    assert 0 < float(sums["clipped"]) < float(count)
    total.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_an_entropy_bonus_is_subtracted():
    policy = new_model()
    batch = batches(policy)[0]
    plain, _, sums = policy_objective(policy, batch)
    more, _, _ = policy_objective(policy, batch, entropy_weight=0.1)
    assert float((plain - more).detach()) == pytest.approx(0.1 * float(sums["entropy"]), rel=1e-4)


def test_texts_are_learned_as_in_pretraining():
    policy, texts = new_model(), story_examples(WORLD, TOKENIZER, 4)
    batch = batches(policy, texts=texts, n_texts=2)[0]
    with_texts, count, sums = policy_objective(policy, batch, text_weight=0.5)
    rows = batch.take(range(4))._replace(text_targets=None)
    without, same, _ = policy_objective(policy, rows)
    assert int(count) == int(same), "texts are no tokens of responses"
    added = 0.5 * float(sums["text_loss"])
    assert float((with_texts - without).detach()) == pytest.approx(added, rel=1e-3)
    mean = float(sums["text_loss"]) / int(count)
    assert mean == pytest.approx(math.log(TOKENIZER.vocab_size), rel=0.2)


def test_what_stands_outside_the_responses_has_no_effect():
    policy = new_model()
    batch = batches(policy)[0]
    spoiled = batch._replace(old_log_probs=batch.old_log_probs.where(batch.mask, 1e4))
    first, second = (policy_objective(policy, b)[0] for b in (batch, spoiled))
    torch.testing.assert_close(first, second)


def test_a_batch_without_advantages_is_refused():
    with pytest.raises(ValueError, match="batch: expected advantages"):
        policy_objective(new_model(), some_rollouts())


def test_on_either_side_of_padding_a_row_alone_has_the_same_loss():
    policy = new_model()
    batch = batches(policy, minibatches=1)[0]
    whole, _count, _ = policy_objective(policy, batch)
    parts = []
    for row in range(len(batch.inputs)):
        alone = batch.take([row])
        width = int(alone.mask[0].nonzero().max()) + 1
        cut = [one[:, :width] if one is not None and one.ndim == 2 else one for one in alone]
        parts.append(policy_objective(policy, Rollouts(*cut))[0])
    torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-4)


# Runs


def run(folder: Any, stop_after: int | None = None, n_steps: int = 11, **changes: Any) -> Any:
    """Train for some steps, in a folder; with ``stop_after``, die after so many."""
    policy = new_model()
    model = ActorCritic(policy)
    made = batches(
        policy,
        credit=CriticCredit(model.critic, kl_weight=0.1),
        reference=copy.deepcopy(policy),
        texts=story_examples(WORLD, TOKENIZER, 5),
        n_texts=1,
        watch={"tokens": each(lambda prompt, response: float(len(response.ids)))},
        **changes,
    )
    config = TrainingConfig(
        n_steps=n_steps, batch_size=made.batch_size, learning_rate=1e-2, checkpoint_every=1
    )
    trainer = Trainer(
        model, made, config, objective=policy_objective, folder=folder, probes=[RolloutLog()]
    )
    if stop_after is None:
        trainer.train()
        return trainer

    class Killed(Exception):
        pass

    take = trainer.train_step

    def step(batch: Any) -> Any:
        if trainer.step == stop_after:
            raise Killed
        return take(batch)

    trainer.train_step = step  # type: ignore[method-assign]
    with pytest.raises(Killed):
        trainer.train()
    return trainer


@pytest.mark.parametrize("stop_after", [1, 4, 6, 7])
def test_a_run_resumes_bit_for_bit_in_the_midst_of_a_rollout(stop_after, tmp_path):
    """A rollout serves four steps: the runs die within one, between two, and at the last step."""
    whole = run(tmp_path / "whole")
    run(tmp_path / "killed", stop_after)
    resumed = run(tmp_path / "killed")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    kept = ("loss", "reward", "kl", "tokens", "entropy", "gradient_norm")
    for name in kept:
        assert whole.log.column(name)[1][-1] == resumed.log.column(name)[1][-1], name


def test_a_resumed_run_writes_no_rollout_that_is_there(tmp_path, monkeypatch):
    run(tmp_path, stop_after=6)
    numbers: list[int] = []
    make = RolloutBatches.make_rollout

    def counting(self: RolloutBatches, number: int) -> Rollouts:
        numbers.append(number)
        return make(self, number)

    monkeypatch.setattr(RolloutBatches, "make_rollout", counting)
    run(tmp_path)
    assert numbers == [2], "the second rollout, with number 1, was in the checkpoint"


@pytest.mark.parametrize(
    "changes", [{"samples": 1}, {"epochs": 1}, {"temperature": 0.9}, {"prompts": PROMPTS[:7]}]
)
def test_a_run_with_other_rollouts_is_not_resumed(changes, tmp_path):
    run(tmp_path, stop_after=2)
    with pytest.raises(ValueError):
        run(tmp_path, **changes)


def test_the_state_survives_a_file(tmp_path):
    from llmbook.training import load_checkpoint, save_checkpoint

    made = batches(new_model(), reference=new_model(1))
    iterator = iter(made)
    next(iterator)
    save_checkpoint(tmp_path / "state.safetensors", made.state_dict())
    other = batches(new_model(), reference=new_model(1))
    other.load_state_dict(load_checkpoint(tmp_path / "state.safetensors"))
    assert other.number == made.number and made.rollout is not None and other.rollout is not None
    for name, value in made.rollout._asdict().items():
        same = getattr(other.rollout, name)
        assert (value is None and same is None) or torch.equal(value, same), name
    assert torch.equal(next(iter(other)).inputs, next(iterator).inputs)


QUICK = {"n_prompts": 8, "samples": 4, "learning_rate": 3e-2, "max_new_tokens": 8}


def test_ppo_raises_the_reward_and_logs_what_it_does():
    policy = new_model()
    before = copy.deepcopy(policy)
    settings = PPO(n_steps=40, kl_weight=0.0, **QUICK)
    reward = each(likes_even_ids)
    log = train_ppo(policy, PROMPTS, reward, settings, tokenizer=TOKENIZER, log_every=4)
    assert isinstance(log, MetricsLog)
    rewards, distances = log.column("reward")[1], log.column("kl")[1]
    assert rewards[-1] > rewards[0] + 1.5, rewards
    names = {"reward", "kl", "entropy", "clipped", "length", "finished", "change", "value_error"}
    assert names <= set(log.rows[-1])
    assert distances[0] == pytest.approx(0.0, abs=0.5) and distances[-1] > 4
    pairs = zip(policy.parameters(), before.parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in pairs)


def test_a_heavier_penalty_keeps_the_policy_nearer():
    ends = []
    for weight in (0.0, 5.0):
        policy = new_model()
        settings = PPO(n_steps=32, kl_weight=weight, **QUICK)
        reward = each(likes_even_ids)
        log = train_ppo(policy, PROMPTS, reward, settings, tokenizer=TOKENIZER, log_every=4)
        ends.append(log.column("kl")[1][-1])
    assert ends[1] < ends[0] / 2, ends


def test_the_reference_is_the_policy_at_the_beginning_and_stays():
    policy, reference = new_model(), new_model(5)
    kept = copy.deepcopy(reference)
    settings = PPO(n_steps=2, n_prompts=4, learning_rate=1e-2, max_new_tokens=3, epochs=1)
    log = train_ppo(
        policy, PROMPTS, each(likes_even_ids), settings, tokenizer=TOKENIZER, reference=reference,
        log_every=1,
    )  # fmt: skip
    assert log.column("kl")[1][0] != pytest.approx(0.0, abs=1e-3)
    for a, b in zip(reference.parameters(), kept.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_of_ppo_is_the_same_twice():
    ends = []
    for _ in range(2):
        policy = new_model()
        settings = PPO(n_steps=6, n_prompts=4, learning_rate=1e-2, max_new_tokens=4, seed=3)
        train_ppo(policy, PROMPTS, each(likes_even_ids), settings, tokenizer=TOKENIZER)
        ends.append(policy.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"kl_weight": -0.1}, "kl_weight"),
        ({"kl_weight": math.nan}, "kl_weight"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"n_steps": 0}, "n_steps"),
        ({"epochs": 0}, "epochs"),
        ({"clip": -1.0}, "clip"),
        ({"samples": 0}, "samples"),
    ],
)
def test_settings_out_of_range(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(PPO(), **changes)


def test_all_fields_of_the_settings_have_a_default():
    assert {field.name for field in fields(PPO)} >= {"kl_weight", "clip", "lam", "n_texts"}
    assert PPO() == PPO()


def test_a_policy_without_a_critic_learns_by_leave_one_out():
    policy = new_model()
    made = batches(policy, samples=8, epochs=1, minibatches=1, max_new_tokens=8)
    config = TrainingConfig(
        n_steps=30, batch_size=made.batch_size, learning_rate=3e-2, log_every=3, weight_decay=0.0
    )
    log = Trainer(policy, made, config, objective=policy_objective, probes=[RolloutLog()]).train()
    rewards = log.column("reward")[1]
    assert rewards[-1] > rewards[0] + 1.5, rewards


def test_a_row_of_an_example_is_no_prompt():
    assert Prompt((1, 2)).question is None
    assert Example((1, 2), (False, True)).ids == (1, 2) and WORLD_CHAT.name == "world-chat"
