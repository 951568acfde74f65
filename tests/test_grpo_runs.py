"""The second half of chapter 23: credit, dynamic sampling, objectives, teachers, and runs."""

import copy
import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from llmbook.grpo import (
    GRPO,
    VARIANTS,
    GroupBatches,
    GroupCredit,
    TeacherCredit,
    Variant,
    distillation_loss,
    distillation_objective,
    group_batches,
    grpo_loss,
    grpo_objective,
    right_and_ended,
    sampled_distillation_loss,
    train_distilled,
    train_grpo,
    two_step_questions,
)
from llmbook.instruction import response_log_probs, story_examples
from llmbook.model import ModelConfig, TransformerLM
from llmbook.rlhf import (
    Prompt,
    Response,
    RolloutLog,
    Rollouts,
    as_rollouts,
    each,
    on_tokens,
    question_prompts,
    score_rollouts,
)
from llmbook.tinyworld import TinyWorld, judge_reply, make_questions
from llmbook.tokenizer import BPETokenizer, train_bpe
from llmbook.training import MetricsLog, Trainer, TrainingConfig

WORLD = TinyWorld(n_characters=4, n_strangers=2)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [story.text for story in WORLD.stories(60, 0)]
TOKENIZER: BPETokenizer = train_bpe(TEXTS, 400, special_tokens=SPECIAL)
END = TOKENIZER.special_tokens["<|im_end|>"]
QUESTIONS = make_questions(WORLD, "fact", "tuning")[:8]
PROMPTS = question_prompts(TOKENIZER, QUESTIONS)
EVEN = each(lambda prompt, response: float(sum(id % 2 == 0 for id in response.ids)))
SMALL = GRPO(n_steps=11, n_prompts=4, samples=2, epochs=2, minibatches=2, max_new_tokens=6)


def new_model(seed: int = 0, **changes: Any) -> TransformerLM:
    torch.manual_seed(seed)
    sizes = {"context_length": 192, "d_model": 16, "n_layers": 1, "n_heads": 2} | changes
    sizes.setdefault("vocab_size", TOKENIZER.vocab_size)
    return TransformerLM(ModelConfig(**sizes))


def batches(policy: TransformerLM, reward: Any = EVEN, **changes: Any) -> GroupBatches:
    settings = replace(SMALL, **{k: v for k, v in changes.items() if hasattr(SMALL, k)})
    given = {k: v for k, v in changes.items() if not hasattr(SMALL, k)}
    return group_batches(policy, PROMPTS, reward, settings, tokenizer=TOKENIZER, **given)


def rollouts_with(rewards: list[float], **changes: Any) -> Rollouts:
    """Return two prompts with as many responses each, of different lengths."""
    half = len(rewards) // 2
    answers = [Response(tuple(range(5, 6 + i)), (-1.0,) * (i + 1), True, "") for i in range(half)]
    prompts = [Prompt((1, 2, 3)), Prompt((4, 5))]
    numbers = torch.tensor(rewards)
    return as_rollouts(prompts, [answers, answers], numbers, pad_id=0)._replace(**changes)


# The reward


def answer(text: str, finished: bool = True) -> Response:
    return Response((5,), (-1.0,), finished, text)


def test_a_right_reply_counts_only_if_it_has_ended() -> None:
    reply = QUESTIONS[0].reply
    given = [answer(reply), answer(reply, finished=False), answer("I do not know.")]
    assert right_and_ended(WORLD)([PROMPTS[0]] * 3, given) == [1.0, 0.0, 0.0]


def test_a_prompt_without_a_question_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match="expected those of questions"):
        right_and_ended(WORLD)([Prompt((1, 2))], [answer("words")])


# Credit


def test_credit_is_given_within_each_group() -> None:
    found = GroupCredit()(rollouts_with([1.0, 0.0, 5.0, 3.0]))
    assert found.advantages is not None
    per_row = [row[row != 0].unique().tolist() for row in found.advantages]
    root = pytest.approx([math.sqrt(0.5)], rel=1e-4)
    assert per_row[0] == root and per_row[2] == root
    assert not found.advantages[~found.mask].any()
    torch.testing.assert_close(found.advantages[0].sum(), -found.advantages[1].sum() / 2)


def test_credit_follows_the_variant() -> None:
    rollouts = rollouts_with([1.0, 0.0, 0.0, 5.0, 5.0, 5.0])
    found = GroupCredit(VARIANTS["rloo"])(rollouts)
    assert found.advantages is not None
    per_row = [row.abs().max().item() for row in found.advantages]
    assert per_row == pytest.approx([1.0, 0.5, 0.5, 0.0, 0.0, 0.0])


def test_a_group_of_one_is_refused_before_anything_is_written() -> None:
    with pytest.raises(ValueError, match="samples: expected"):
        batches(new_model(), samples=1)
    one = rollouts_with([1.0, 0.0])
    with pytest.raises(ValueError, match="rewards: expected at least 2"):
        GroupCredit()(one)


def test_the_trainer_corrects_what_another_engine_has_drawn() -> None:
    policy = new_model()
    plain = batches(policy, n_steps=1)[0]
    assert plain.advantages is not None
    shifted = plain._replace(old_log_probs=plain.old_log_probs - 1.0, rewards=torch.rand(4))
    shifted = shifted._replace(groups=torch.tensor([0, 0, 1, 1]))
    with torch.no_grad():
        found = GroupCredit(trainer=policy, most=2.0)(shifted)
        without = GroupCredit()(shifted)
        own = score_rollouts(policy, shifted)
    assert found.advantages is not None and without.advantages is not None
    torch.testing.assert_close(found.old_log_probs, own)
    torch.testing.assert_close(found.advantages, 2.0 * without.advantages)


# Groups that teach nothing are drawn anew


def only_first_prompts(n: int) -> Any:
    """Return a reward that differs within the groups of some prompts alone."""
    useful = {prompt.ids for prompt in PROMPTS[:n]}

    def rewards(prompts: Any, responses: Any) -> list[float]:
        pairs = enumerate(prompts)
        return [float(place % 2) if prompt.ids in useful else 1.0 for place, prompt in pairs]

    return rewards


def test_idle_groups_are_drawn_anew() -> None:
    useful = {prompt.ids for prompt in PROMPTS[:5]}
    reward = only_first_prompts(5)
    seen = []
    for draws in (1, 4):
        made = batches(new_model(), reward, variant=Variant(draws=draws))
        rollout = made.make_rollout(0)
        made.rollout = rollout
        starts = (rollout.mask.int().argmax(dim=1) + 1).tolist()
        asked = [tuple(row[:n]) for row, n in zip(rollout.inputs.tolist(), starts, strict=True)]
        seen.append(sum(ids in useful for ids in asked) / len(asked))
        assert len(rollout.inputs) == 8
        assert made.metrics["informative"] == pytest.approx(seen[-1])
    assert seen[0] < 1.0 and seen[1] == 1.0


def test_idle_groups_fill_a_rollout_if_there_are_no_others() -> None:
    made = batches(new_model(), each(lambda prompt, response: 1.0), variant=Variant(draws=3))
    batch = made[0]
    assert len(batch.inputs) == 4 and batch.advantages is not None
    assert not batch.advantages.any()
    assert made.metrics["informative"] == 0.0


def test_kept_groups_are_served_with_their_own_rewards() -> None:
    """The reward of each row of a rollout is what the reward function says of it."""
    made = batches(new_model(), variant=Variant(draws=4))
    rollout = made.make_rollout(0)
    for targets, reward in zip(rollout.targets, rollout.rewards, strict=True):
        ids = targets[targets != -100]
        assert float((ids % 2 == 0).sum()) == float(reward)


# The objective


@pytest.mark.parametrize("name", VARIANTS)
def test_the_objective_is_the_loss_of_the_log_probabilities(name: str) -> None:
    policy = new_model()
    variant = VARIANTS[name]
    made = batches(policy, variant=variant, kl_weight=0.3, reference=new_model(1))
    batch = made[0]
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.3)
    total, count, sums = grpo_objective(policy, batch, variant=variant, kl_weight=0.3)
    assert batch.advantages is not None
    expected = grpo_loss(
        response_log_probs(policy(batch.inputs), batch.targets),
        batch.old_log_probs,
        batch.advantages,
        batch.mask,
        variant=variant,
        reference=batch.reference_log_probs,
        kl_weight=0.3,
    )
    torch.testing.assert_close(total / count, expected)
    assert {"entropy", "clipped", "change"} <= set(sums)
    entropy = float(sums["entropy"] / count)
    assert 0 < entropy <= math.log(TOKENIZER.vocab_size)


def test_what_is_logged_is_a_mean_over_tokens_whatever_divides_the_loss() -> None:
    policy = new_model()
    batch = batches(policy)[0]
    found = []
    for per in ("token", "response", 7):
        _, count, sums = grpo_objective(policy, batch, variant=Variant(per=per))
        found.append({name: float(value / count) for name, value in sums.items()})
    assert found[0] == pytest.approx(found[1]) and found[0] == pytest.approx(found[2])


def test_texts_and_entropy_add_to_the_loss() -> None:
    policy, texts = new_model(), story_examples(WORLD, TOKENIZER, 4)
    batch = batches(policy, texts=texts, n_texts=2)[0]
    rows = batch._replace(text_targets=None)
    plain, count, _ = grpo_objective(policy, rows)
    more, same, sums = grpo_objective(policy, batch, text_weight=0.5)
    assert int(count) == int(same), "texts are no responses"
    added = float((more - plain).detach())
    assert added == pytest.approx(0.5 * float(sums["text_loss"]), rel=1e-3)
    less, _, _ = grpo_objective(policy, rows, entropy_weight=0.1)
    assert float(less.detach()) < float(plain.detach())


def test_a_batch_without_advantages_is_refused() -> None:
    with pytest.raises(ValueError, match="batch: expected advantages"):
        grpo_objective(new_model(), rollouts_with([1.0, 0.0, 0.0, 1.0]))


# Teachers


def test_both_directions_of_divergence_by_hand() -> None:
    student, teacher = (torch.tensor([[[a, 0.0]]]).log() for a in (0.5, 0.25))
    student[..., 1], teacher[..., 1] = math.log(0.5), math.log(0.75)
    mask = torch.ones(1, 1, dtype=torch.bool)
    reverse = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    forward = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert float(distillation_loss(student, teacher, mask)) == pytest.approx(reverse)
    found = distillation_loss(student, teacher, mask, direction="forward")
    assert float(found) == pytest.approx(forward)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_divergence_is_that_of_torch(direction: Any) -> None:
    student, teacher = torch.randn(2, 2, 3, 5, dtype=torch.float64).unbind(0)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    if direction == "forward":
        p, q = q, p
    terms = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    found = distillation_loss(student, teacher, mask, direction=direction)
    torch.testing.assert_close(found, terms[mask].mean())


def test_a_student_like_its_teacher_has_nothing_to_learn() -> None:
    logits = torch.randn(2, 3, 5, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    loss = distillation_loss(logits, logits.detach() + 4.0, mask)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert abs(float(loss.detach())) < 1e-6 and gradient.abs().max() < 1e-6


def test_sampled_tokens_have_the_exact_gradient_in_the_mean() -> None:
    """Exact, by enumerating all tokens that the student may draw at a place."""
    student = torch.randn(6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.bool)
    exact = distillation_loss(student[None, None], teacher[None, None], one)
    (expected,) = torch.autograd.grad(exact, student)
    log_probs, opinion = student.log_softmax(0), teacher.log_softmax(0)
    total = torch.zeros((), dtype=torch.float64)
    for token in range(6):
        here, there = log_probs[token].view(1, 1), opinion[token].view(1, 1)
        loss = sampled_distillation_loss(here, there, one)
        total = total + log_probs[token].exp().detach() * loss
    (found,) = torch.autograd.grad(total, student)
    torch.testing.assert_close(found, expected)


def test_the_teacher_gets_no_gradient_and_masked_places_have_no_effect() -> None:
    student, teacher = torch.randn(2, 1, 2, 5, requires_grad=True).unbind(0)
    mask = torch.tensor([[True, False]])
    loss = distillation_loss(student, teacher, mask)
    spoiled = student.detach().clone()
    spoiled[0, 1] = math.nan
    torch.testing.assert_close(distillation_loss(spoiled, teacher, mask), loss.detach())
    leaf = torch.randn(1, 2, requires_grad=True)
    other = torch.tensor([[-1.0, math.nan]], requires_grad=True)
    sampled_distillation_loss(leaf, other, mask).backward()
    assert other.grad is None and leaf.grad is not None and leaf.grad.isfinite().all()


def test_a_teacher_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="teacher: expected the student's vocabulary"):
        train_distilled(new_model(), new_model(vocab_size=9), PROMPTS, SMALL, tokenizer=TOKENIZER)
    one = torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="teacher: expected"):
        distillation_loss(torch.zeros(1, 1, 5), torch.zeros(1, 1, 6), one)


def test_the_credit_of_a_teacher() -> None:
    reference = torch.full((4, 4), -0.25)
    rollouts = rollouts_with([0.0] * 4)
    reference = torch.full_like(rollouts.old_log_probs, -0.25)
    found = TeacherCredit()(rollouts._replace(reference_log_probs=reference))
    assert found.advantages is not None
    torch.testing.assert_close(found.advantages, on_tokens(torch.full((4,), 0.75), rollouts.mask))
    with pytest.raises(ValueError, match="of a teacher, got none"):
        TeacherCredit()(rollouts)


def divergence(student: TransformerLM, teacher: TransformerLM) -> float:
    batch = batches(student, n_prompts=8, samples=8, epochs=1, minibatches=1, seed=99)[0]
    with torch.no_grad():
        total, count, _ = distillation_objective(student, batch, teacher=teacher)
    return float(total / count)


@pytest.mark.parametrize("exact", [True, False])
def test_a_student_comes_closer_to_its_teacher(exact: bool) -> None:
    student, teacher = new_model(), new_model(5)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(20.0)
    before = divergence(student, teacher)
    settings = replace(SMALL, n_steps=60, n_prompts=8, samples=8, minibatches=1, epochs=1)
    settings = replace(settings, learning_rate=2e-2)
    train_distilled(student, teacher, PROMPTS, settings, tokenizer=TOKENIZER, exact=exact)
    assert divergence(student, teacher) < (0.6 if exact else 0.9) * before


# Questions of two steps


@pytest.mark.parametrize("named", [True, False])
def test_two_step_questions_are_answered_by_their_own_replies(named: bool) -> None:
    for split in ("tuning", "held_out"):
        questions = two_step_questions(WORLD, split, named=named)  # type: ignore[arg-type]
        assert len(questions) == 2 * 6 * 4
        for question in questions:
            assert "best friend of" in question.text
            assert judge_reply(WORLD, question, question.reply).right
            assert (question.character in question.reply) == named or not named
    texts = [{q.text for q in two_step_questions(WORLD, s)} for s in ("tuning", "held_out")]  # type: ignore[arg-type]
    assert not texts[0] & texts[1]


# Runs


def test_rewards_are_raised() -> None:
    policy = new_model()
    settings = replace(SMALL, n_steps=40, n_prompts=8, samples=8, epochs=1, minibatches=1)
    settings = replace(settings, learning_rate=2e-2)
    share = each(lambda _, r: sum(id % 2 == 0 for id in r.ids) / len(r.ids))
    log = train_grpo(policy, PROMPTS, share, settings, tokenizer=TOKENIZER)
    rewards = log.column("reward")[1]
    assert rewards[-1] > rewards[0] + 0.2


def test_equal_rewards_leave_the_policy_as_it_is() -> None:
    policy = new_model()
    before = copy.deepcopy(policy.state_dict())
    nothing = each(lambda prompt, response: 1.0)
    log = train_grpo(policy, PROMPTS, nothing, SMALL, tokenizer=TOKENIZER)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert log.column("informative")[1][-1] == 0.0


def run(folder: Any, stop_after: int | None = None, **changes: Any) -> Any:
    """Train for some steps, in a folder; with ``stop_after``, die after so many."""
    policy = new_model()
    variant = Variant(draws=3, clip=(0.2, 0.28), per="token")
    changes = {"variant": variant, "kl_weight": 0.1, "recompute": True, "n_texts": 1} | changes
    texts = story_examples(WORLD, TOKENIZER, 5)
    made = batches(policy, reference=copy.deepcopy(policy), texts=texts, **changes)
    config = TrainingConfig(
        n_steps=11, batch_size=made.batch_size, learning_rate=1e-2, checkpoint_every=1
    )
    objective = partial(grpo_objective, variant=changes["variant"], kl_weight=0.1)
    trainer = Trainer(
        policy, made, config, objective=objective, folder=folder, probes=[RolloutLog()]
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
def test_a_run_resumes_bit_for_bit_in_the_midst_of_a_rollout(
    stop_after: int, tmp_path: Any
) -> None:
    """A rollout serves four steps, with groups drawn anew and old log-probabilities recomputed."""
    whole = run(tmp_path / "whole")
    run(tmp_path / "killed", stop_after)
    resumed = run(tmp_path / "killed")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    for name in ("loss", "reward", "informative", "entropy", "gradient_norm"):
        assert whole.log.column(name)[1][-1] == resumed.log.column(name)[1][-1], name


def test_the_settings_of_dynamic_sampling_are_part_of_what_a_run_is(tmp_path: Any) -> None:
    run(tmp_path, stop_after=2)
    with pytest.raises(ValueError):
        run(tmp_path, variant=Variant(draws=2, clip=(0.2, 0.28), per="token"))


def test_a_run_in_a_folder_goes_on(tmp_path: Any) -> None:
    policy = new_model()
    log = train_grpo(policy, PROMPTS, EVEN, SMALL, tokenizer=TOKENIZER, folder=tmp_path)
    again = new_model()
    other = train_grpo(again, PROMPTS, EVEN, SMALL, tokenizer=TOKENIZER, folder=tmp_path)
    assert isinstance(log, MetricsLog) and isinstance(other, MetricsLog)
    for name, value in policy.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize(
    "change, message",
    [
        ({"samples": 1}, "samples: expected"),
        ({"kl_weight": -0.1}, "kl_weight: expected"),
        ({"entropy_weight": math.nan}, "entropy_weight: expected"),
        ({"learning_rate": 0}, "learning_rate: expected"),
        ({"temperature": 0.0}, "temperature: expected"),
        ({"n_steps": 0}, "n_steps: expected"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected"),
        ({"n_texts": -1}, "n_texts: expected"),
        ({"seed": -1}, "seed: expected"),
    ],
)
def test_settings_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRPO(**change)


def test_a_prompt_that_leaves_no_room_is_named() -> None:
    settings = replace(SMALL, max_new_tokens=190)
    with pytest.raises(ValueError, match="prompts: expected 1 to 2 tokens"):
        train_grpo(new_model(), PROMPTS, EVEN, settings, tokenizer=TOKENIZER)
