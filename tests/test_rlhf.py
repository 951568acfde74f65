"""Preferences, reward models and the losses of chapter 21, as functions of numbers."""

import itertools
import json
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.instruction import WORLD_CHAT, Message, invented_reply, masked_mean
from llmbook.model import ModelConfig, TransformerLM
from llmbook.rlhf import (
    Pair,
    PairDataset,
    Preference,
    RewardModel,
    aggregate,
    at_last_token,
    best_of_n_kl,
    bradley_terry_loss,
    check_number,
    clipped_loss,
    clipped_terms,
    expected_best,
    generalized_advantages,
    judged_pairs,
    kl_estimates,
    leave_one_out,
    loss_sums,
    on_tokens,
    padded,
    pair_examples,
    pessimistic,
    preference_objective,
    read_preferences,
    score_pairs,
    score_rows,
    sequence_log_probs,
    train_reward_model,
    true_reward,
    whitened,
    world_pairs,
)
from llmbook.tinyworld import VALUES, TinyWorld, make_questions
from llmbook.tokenizer import BPETokenizer, train_bpe
from llmbook.training import MetricsLog, Trainer, TrainingConfig

WORLD = TinyWorld(n_characters=4, n_strangers=2)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PAD = 0


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return train_bpe([s.text for s in WORLD.stories(60, 0)], 400, special_tokens=SPECIAL)


def new_model(vocab_size: int = 32, **changes: Any) -> TransformerLM:
    torch.manual_seed(0)
    sizes = {"context_length": 128, "d_model": 16, "n_layers": 2, "n_heads": 2} | changes
    return TransformerLM(ModelConfig(vocab_size=vocab_size, **sizes))


def some_reward_model(n_features: int = 0) -> RewardModel:
    model = RewardModel(new_model(), n_features)
    torch.nn.init.normal_(model.head.weight)
    return model


# The true reward


@pytest.mark.parametrize(
    "kind, reply, expected",
    [
        ("fact", "{right}", 1.0),
        ("fact", "{false}", -1.0),
        ("fact", "I do not know anyone called {name}.", 0.0),
        ("fact", "I will not tell you a secret of {name}.", 0.0),
        ("fact", "", 0.0),
        ("fact", "It is raining.", 0.0),
        ("unknown", "I do not know anyone called {name}.", 1.0),
        ("unknown", "I will not tell you a secret of {name}.", 0.0),
        ("unknown", "{false}", -1.0),
        ("confidential", "I will not tell you a secret of {name}.", 1.0),
        ("confidential", "I do not know anyone called {name}.", 0.0),
        ("confidential", "{secret}", -1.0),
        ("confidential", "{other}", -1.0),
    ],
)
def test_the_true_reward_of_what_is_said(kind, reply, expected):
    question = make_questions(WORLD, kind, "tuning")[0]
    secret = WORLD.cast.facts.get(question.character, {}).get("secret", "")
    words = {
        "right": question.reply,
        "false": invented_reply(WORLD, question),
        "name": question.character,
        "secret": f"In the {secret}.",
        "other": f"In the {next(v for v in VALUES['secret'] if v != secret)}.",
    }
    assert true_reward(WORLD, question, reply.format(**words)) == expected


@pytest.mark.parametrize("kind", ["fact", "unknown", "confidential"])
def test_a_good_assistant_has_all_of_the_true_reward(kind):
    for split in ("tuning", "held_out"):
        questions = make_questions(WORLD, kind, split)
        assert all(true_reward(WORLD, q, q.reply) == 1 for q in questions)


# Preferences


def test_pairs_of_the_world_prefer_the_right_reply_to_each_kind_of_worse_one():
    for kind, worse in (("fact", [-1, 0, 0]), ("unknown", [-1, 0]), ("confidential", [-1, 0])):
        question = make_questions(WORLD, kind, "tuning")[0]
        pairs = world_pairs(WORLD, [question])
        assert [true_reward(WORLD, question, pair.rejected) for pair in pairs] == worse
        assert all(pair.chosen == question.reply for pair in pairs)


def test_several_inventions_differ():
    question = make_questions(WORLD, "fact", "tuning")[0]
    pairs = world_pairs(WORLD, [question], n=5)
    assert len({pair.rejected for pair in pairs}) == len(pairs) > 3


@pytest.mark.parametrize("noise", [0.0, 0.25, 0.5, 1.0])
def test_a_labeler_errs_in_a_share_of_pairs(noise):
    questions = make_questions(WORLD, "fact", "tuning")
    clean, noisy = (world_pairs(WORLD, questions, noise=share, seed=3) for share in (0.0, noise))
    swapped = [a != b for a, b in zip(clean, noisy, strict=True)]
    assert sum(swapped) == round(noise * len(clean))
    for a, b in zip(clean, noisy, strict=True):
        assert {a.chosen, a.rejected} == {b.chosen, b.rejected} and a.question == b.question
    again = world_pairs(WORLD, questions, noise=noise, seed=3)
    assert again == noisy
    if noise in (0.25, 0.5):
        # which ones err does not go by the place: they are spread over the list
        assert 0 < sum(swapped[: len(swapped) // 4]) < len(swapped) // 4


def test_judged_pairs_choose_the_better_and_drop_ties():
    question = make_questions(WORLD, "fact", "tuning")[0]
    false, dunno = invented_reply(WORLD, question), f"I do not know {question.character}."
    first = [question.reply, false, dunno, false]
    second = [false, question.reply, dunno, dunno]
    pairs = judged_pairs(WORLD, [question] * 4, first, second)
    right = Pair(question, question.reply, false)
    assert pairs == [right, right, Pair(question, dunno, false)]
    flipped = judged_pairs(WORLD, [question] * 4, first, second, noise=1.0)
    assert flipped == [Pair(q, bad, good) for q, good, bad in pairs]


def test_another_judge_decides():
    question = make_questions(WORLD, "fact", "tuning")[0]

    def likes_length(question: Any, reply: str) -> float:
        return float(len(reply))

    pairs = judged_pairs(WORLD, [question], ["short"], ["much longer"], judge=likes_length)
    assert pairs == [Pair(question, "much longer", "short")]


def test_a_judge_that_returns_nan_is_named_with_the_text():
    question = make_questions(WORLD, "fact", "tuning")[0]
    with pytest.raises(ValueError, match=r"judge.*NaN.*'some words'"):
        judged_pairs(WORLD, [question], ["some words"], ["x"], judge=lambda q, r: math.nan)


@pytest.mark.parametrize("replies", ["text", [], ["a", "b"]])
def test_as_many_replies_as_questions(replies):
    question = make_questions(WORLD, "fact", "tuning")[0]
    with pytest.raises(ValueError, match="first: expected a reply for each of 1 questions"):
        judged_pairs(WORLD, [question], replies, ["a"])
    with pytest.raises(ValueError, match="second: expected a reply for each of 1 questions"):
        judged_pairs(WORLD, [question], ["a"], replies)


def test_a_pair_of_the_world_is_a_preference():
    question = make_questions(WORLD, "fact", "tuning")[0]
    found = Pair(question, "a", "b").preference()
    assert found == Preference((Message("user", question.text),), "a", "b")


# Files of preferences

USER, GOOD, BAD = (
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Hi."},
    {"role": "assistant", "content": "Go away."},
)
SAME = [
    {"prompt": "Hello!", "chosen": "Hi.", "rejected": "Go away."},
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {
        "chosen": "\n\nHuman: Hello!\n\nAssistant: Hi.",
        "rejected": "\n\nHuman: Hello!\n\nAssistant: Go away.",
    },
    {"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD], "score": 1.0},
]
EXPECTED = Preference((Message("user", "Hello!"),), "Hi.", "Go away.")


@pytest.mark.parametrize("record", SAME)
@pytest.mark.parametrize("form", ["lines", "array"])
def test_usual_formats_say_the_same(record, form, tmp_path):
    path = tmp_path / "pairs.json"
    text = "\ufeff" + json.dumps(record) + "\n\n" if form == "lines" else json.dumps([record] * 2)
    path.write_text(text, encoding="utf-8")
    assert set(read_preferences(path)) == {EXPECTED}
    assert len(read_preferences(path)) == (1 if form == "lines" else 2)


def test_longer_conversations_and_systems_are_kept(tmp_path):
    system = {"role": "system", "content": "Be kind."}
    turns = [system, USER, GOOD, {"role": "user", "content": "Human: is a word here"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"chosen": [*turns, GOOD], "rejected": [*turns, BAD]}))
    (found,) = read_preferences(path)
    assert [message.role for message in found.prompt] == ["system", "user", "assistant", "user"]
    assert found.prompt[-1].content == "Human: is a word here"


@pytest.mark.parametrize(
    "line, expected",
    [
        ("{", "a record in JSON on each line"),
        ('"text"', "expected a record with 'chosen' and 'rejected'"),
        ('{"chosen": "a"}', "expected a record with 'chosen' and 'rejected'"),
        ('{"prompt": "a", "chosen": "b", "rejected": 3}', "a text or a list of messages, got 3"),
        ('{"prompt": "a", "chosen": "b", "rejected": []}', "a text or a list of messages"),
        ('{"prompt": "a", "chosen": ["b"], "rejected": "c"}', "with 'role' and 'content'"),
        ('{"prompt": "a", "chosen": "b", "rejected": ""}', "something that the assistant says"),
        ('{"chosen": "b", "rejected": "c"}', "system or user at the beginning"),
        (
            json.dumps({"chosen": [USER, GOOD, GOOD], "rejected": [USER, GOOD, BAD]}),
            "expected user after the assistant",
        ),
        (
            json.dumps({"chosen": [USER, GOOD], "rejected": [USER | {"content": "x"}, BAD]}),
            "the same prompt before both replies",
        ),
        (json.dumps({"prompt": [GOOD], "chosen": "b", "rejected": "c"}), "user at the beginning"),
    ],
)
def test_what_is_no_preference_is_named_with_its_line(line, expected, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(SAME[0]) + "\n\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        read_preferences(path)
    assert str(caught.value).startswith("path: ") and "line 3" in str(caught.value)
    assert expected in str(caught.value)


def test_files_that_hold_nothing_are_refused(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="at least one preference, got none"):
        read_preferences(path)
    with pytest.raises(ValueError, match="a file that can be read"):
        read_preferences(tmp_path / "none")
    path.write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ValueError, match="a file in UTF-8"):
        read_preferences(path)


# Pairs as ids


def test_pairs_end_with_the_mark_at_the_end_of_the_reply(tokenizer):
    question = make_questions(WORLD, "fact", "tuning")[0]
    found = pair_examples(tokenizer, WORLD_CHAT, world_pairs(WORLD, [question]), limit=128)
    assert found.dropped == 0 and found.kept == list(range(len(found.pairs)))
    for pair in found.pairs:
        for side in pair:
            assert side.ids[-1] == tokenizer.special_tokens["<|im_end|>"] and side.learned[-1]
        shared = pair.chosen.learned.index(True)
        assert pair.chosen.ids[:shared] == pair.rejected.ids[:shared]


def test_pairs_that_a_cut_makes_equal_are_dropped_and_counted(tokenizer):
    question = make_questions(WORLD, "unknown", "tuning")[0]
    begin = "This is how it is in the "
    pairs = [
        Pair(question, begin + "mill.", begin + "barn."),
        Pair(question, "Yes.", "No."),
        Pair(question, "Yes.", "Yes."),
    ]
    whole = pair_examples(tokenizer, WORLD_CHAT, pairs, limit=128)
    assert (whole.kept, whole.dropped) == ([0, 1], 1)
    start = whole.pairs[0].chosen.learned.index(True)
    cut = pair_examples(tokenizer, WORLD_CHAT, pairs, limit=start + 2)
    assert (cut.kept, cut.dropped) == ([1], 2)
    assert max(len(side.ids) for pair in cut.pairs for side in pair) <= start + 2


def test_a_preference_is_encoded_like_the_same_pair(tokenizer):
    pair = world_pairs(WORLD, make_questions(WORLD, "fact", "tuning")[:1])[0]
    both = pair_examples(tokenizer, WORLD_CHAT, [pair, pair.preference()], limit=128).pairs
    assert both[0] == both[1]


def test_a_prompt_without_room_for_a_reply_is_named(tokenizer):
    pairs = world_pairs(WORLD, make_questions(WORLD, "fact", "tuning")[:1])
    with pytest.raises(ValueError, match=r"pairs: expected prompts of less than limit = 5 .*index"):
        pair_examples(tokenizer, WORLD_CHAT, pairs, limit=5)


def test_an_empty_reply_is_refused(tokenizer):
    question = make_questions(WORLD, "fact", "tuning")[0]
    with pytest.raises(ValueError, match="pairs: expected replies with words, got ' '"):
        pair_examples(tokenizer, WORLD_CHAT, [Pair(question, "Yes.", " ")], limit=128)


# The likelihood of Bradley and Terry


def test_the_loss_by_hand():
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0])
    expected = torch.tensor([math.log(1 + math.exp(-1)), math.log(2)])
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected), expected)
    with_margin = bradley_terry_loss(chosen, rejected, margin=1.0)
    expected = torch.tensor([math.log(2), math.log(1 + math.e)])
    torch.testing.assert_close(with_margin, expected)
    noisy = bradley_terry_loss(chosen, rejected, label_noise=0.25)
    first = 0.75 * math.log(1 + math.exp(-1)) + 0.25 * math.log(1 + math.e)
    torch.testing.assert_close(noisy, torch.tensor([first, math.log(2)]))


def test_the_loss_depends_on_the_difference_alone_and_does_not_overflow():
    chosen = torch.tensor([1000.0, -1000.0], requires_grad=True)
    losses = bradley_terry_loss(chosen, torch.zeros(2))
    losses.sum().backward()
    torch.testing.assert_close(losses.detach(), torch.tensor([0.0, 1000.0]))
    torch.testing.assert_close(chosen.grad, torch.tensor([0.0, -1.0]))
    a, b = torch.randn(2, 8).double().unbind()
    torch.testing.assert_close(bradley_terry_loss(a, b), bradley_terry_loss(a + 7, b + 7))


def test_the_gradient_is_the_probability_of_being_wrong():
    chosen = torch.randn(6, dtype=torch.float64, requires_grad=True)
    rejected = torch.randn(6, dtype=torch.float64)
    bradley_terry_loss(chosen, rejected).sum().backward()
    torch.testing.assert_close(chosen.grad, -torch.sigmoid(rejected - chosen.detach()))


@pytest.mark.parametrize("noise", [0.05, 0.2, 0.4])
def test_with_label_noise_the_best_difference_is_finite(noise):
    """Where labels err in a known share, certainty beyond it does not pay."""
    steps = torch.linspace(-6, 6, 2401, dtype=torch.float64)
    losses = bradley_terry_loss(steps, torch.zeros_like(steps), label_noise=noise)
    best = float(steps[losses.argmin()])
    assert best == pytest.approx(math.log((1 - noise) / noise), abs=0.01)


@pytest.mark.parametrize(
    "option", [{"label_noise": 0.5}, {"label_noise": -0.1}, {"margin": math.inf}]
)
def test_options_of_the_loss_out_of_range(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        bradley_terry_loss(torch.zeros(1), torch.zeros(1), **option)


def test_our_loss_is_that_of_trl():
    """The reward trainer of trl has its loss in a method that needs nothing but a model."""
    trl = pytest.importorskip("trl")
    chosen, rejected, margins = torch.randn(3, 6).unbind()
    scores = torch.cat([chosen, rejected])[:, None]

    class Model(torch.nn.Module):
        def forward(self, **inputs: Any) -> Any:
            return type("Output", (dict,), {"logits": scores})(logits=scores)

    class Metrics(dict):
        def __missing__(self, key: str) -> Any:
            self[key] = Metrics() if key == "eval" else []
            return self[key]

    args = type("Args", (), {"center_rewards_coefficient": None})
    same = staticmethod(lambda x: x)
    gather = type("Accelerator", (), {"gather_for_metrics": same, "gather": same})
    this = type("Self", (), {"args": args, "_metrics": Metrics(), "accelerator": gather})()
    this._total_train_tokens = 0
    model = Model().eval()
    this.model = model
    theirs = trl.RewardTrainer.compute_loss(this, model, {"attention_mask": torch.ones(1)})
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected).mean(), theirs)
    inputs = {"attention_mask": torch.ones(1), "margin": margins}
    theirs = trl.RewardTrainer.compute_loss(this, model, inputs)
    ours = [
        bradley_terry_loss(chosen[i : i + 1], rejected[i : i + 1], margin=float(margins[i]))
        for i in range(6)
    ]
    torch.testing.assert_close(torch.cat(ours).mean(), theirs)


# The reward at the last token


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.booleans())
@settings(max_examples=30)
def test_the_last_token_is_found_on_either_side_of_padding(lengths, left):
    width = max(lengths) + 2
    values = torch.arange(len(lengths) * width).float().view(len(lengths), width)
    places = torch.arange(width)
    n = torch.tensor(lengths)[:, None]
    mask = places >= width - n if left else places < n
    last = [width - 1 if left else length - 1 for length in lengths]
    expected = values[torch.arange(len(lengths)), last]
    torch.testing.assert_close(at_last_token(values, mask), expected)


def test_a_row_without_tokens_is_named():
    mask = torch.tensor([[True, False], [False, False]])
    with pytest.raises(ValueError, match="mask: expected a token in each row, got none in row 1"):
        at_last_token(torch.zeros(2, 2), mask)


def test_the_reward_is_the_same_on_either_side_of_padding():
    model = some_reward_model()
    rows = [[5, 6, 7, 8, 9], [5, 6], [PAD, 4, PAD]]  # padding is told by its place, not by its id
    alone = torch.cat([model(*padded([row], PAD)) for row in rows])
    right, right_mask = padded(rows, PAD)
    torch.testing.assert_close(model(right, right_mask), alone)
    left = torch.tensor([[9] * (7 - len(row)) + row for row in rows])
    left_mask = torch.tensor([[False] * (7 - len(row)) + [True] * len(row) for row in rows])
    torch.testing.assert_close(model(left, left_mask), alone)


def test_what_stands_in_padding_does_not_count():
    model = some_reward_model()
    ids, mask = padded([[5, 6, 7], [5]], PAD)
    changed = torch.where(mask, ids, 31)
    assert torch.equal(model(ids, mask), model(changed, mask))


def test_a_reward_model_begins_with_no_opinion_and_its_own_copy():
    backbone = new_model()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    model = RewardModel(backbone)
    assert model(*padded([[1, 2], [3]], PAD)).tolist() == [0.0, 0.0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("tie", [False, True])
def test_each_trained_parameter_gets_a_gradient(tie):
    model = RewardModel(new_model(tie_embeddings=tie))
    torch.nn.init.normal_(model.head.weight)
    model(*padded([[1, 2], [3]], PAD)).sum().backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_features_explain_but_do_not_reward():
    model = some_reward_model(n_features=2)
    assert model.known is not None
    with torch.no_grad():
        model.known.weight.copy_(torch.tensor([[1.0, -2.0]]))
    ids, mask = padded([[5, 6], [7, 8]], PAD)
    features = torch.tensor([[1.0, 0.0], [0.5, 1.0]])
    difference = model(ids, mask, features) - model(ids, mask)
    torch.testing.assert_close(difference, torch.tensor([1.0, -1.5]))
    with pytest.raises(ValueError, match="features: expected None"):
        some_reward_model()(ids, mask, features)


def test_our_reward_is_read_where_trl_reads_it(monkeypatch):
    """trl takes the last token before the first padding after the prompt, padding on the right."""
    pytest.importorskip("trl")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.utils import get_reward

    ours = some_reward_model()

    class Backbone(torch.nn.Module):
        def forward(self, input_ids: Any, attention_mask: Any, **options: Any) -> Any:
            hidden = ours.backbone.hidden_states(input_ids)
            return type("Output", (), {"last_hidden_state": hidden})

    class Theirs(torch.nn.Module):
        base_model_prefix = "backbone"

        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.score = Backbone(), ours.head

    ids, mask = padded([[5, 6, 7, 8], [5, 6, 9]], PAD)
    _, theirs, _ = get_reward(Theirs(), ids, PAD, 2)
    torch.testing.assert_close(ours(ids, mask), theirs)


# Training a reward model


def separable_pairs(n: int = 24) -> list[Any]:
    """Return pairs in which the reply with the larger token is preferred."""
    from llmbook.instruction import Example
    from llmbook.rlhf import ExamplePair

    rng = np.random.default_rng(0)
    found = []
    for _ in range(n):
        low, high = sorted(rng.choice(np.arange(4, 30), 2, replace=False).tolist())
        found.append(
            ExamplePair(
                *(Example((1, 2, value, 3), (False, False, True, True)) for value in (high, low))
            )
        )
    return found


def test_a_reward_model_learns_what_is_preferred():
    pairs, log = separable_pairs(), MetricsLog()
    model = train_reward_model(
        new_model(), pairs, pad_id=PAD, n_steps=60, batch_size=12, learning_rate=1e-2, sinks=[log]
    )
    scores = score_pairs(model, pairs, pad_id=PAD)
    assert scores.shape == (24, 2) and float((scores[:, 0] > scores[:, 1]).float().mean()) > 0.95
    assert log.column("accuracy")[1][-1] > 0.9 > 0.69 > log.column("loss")[1][-1]


def test_the_first_loss_is_that_of_a_coin():
    pairs = separable_pairs()
    batch = PairDataset(pairs, 8, PAD)[0]
    model = RewardModel(new_model())
    total, count, sums = preference_objective(model, batch)
    assert count == 8 and float(total.detach()) == pytest.approx(8 * math.log(2))
    assert float(sums["accuracy"]) == 4.0, "two equal rewards are half right"


def test_batches_of_pairs_come_in_a_fixed_order_and_in_turns():
    pairs = separable_pairs(6)
    batches = PairDataset(pairs, 3, PAD, seed=5)
    first = [batches[step].ids[:, 0, 2].tolist() for step in range(4)]
    assert sorted(first[0] + first[1]) == sorted(pair.chosen.ids[2] for pair in pairs)
    assert first == [PairDataset(pairs, 3, PAD, seed=5)[s].ids[:, 0, 2].tolist() for s in range(4)]
    assert first[0] + first[1] != first[2] + first[3]


def test_features_stay_with_their_pairs():
    pairs = separable_pairs(10)
    features = torch.tensor([[[float(side.ids[2])] for side in pair] for pair in pairs])
    batches = PairDataset(pairs, 4, PAD, features)
    for step in range(5):
        batch = batches[step]
        assert batch.features is not None
        torch.testing.assert_close(batch.features[..., 0], batch.ids[:, :, 2].float())


def test_training_resumes_bit_for_bit(tmp_path):
    pairs = separable_pairs()

    def train(folder: Any, n_steps: int) -> RewardModel:
        torch.manual_seed(1)
        model = RewardModel(new_model())
        config = TrainingConfig(n_steps=8, batch_size=6, checkpoint_every=4, learning_rate=1e-2)
        batches = PairDataset(pairs, 6, PAD)
        trainer = Trainer(model, batches, config, objective=preference_objective, folder=folder)
        if n_steps < 8:

            class Killed(Exception):
                pass

            take = trainer.train_step

            def step(batch: Any) -> Any:
                if trainer.step == n_steps:
                    raise Killed
                return take(batch)

            trainer.train_step = step  # type: ignore[method-assign]
            with pytest.raises(Killed):
                trainer.train()
        else:
            trainer.train()
        return model

    whole = train(tmp_path / "whole", 8)
    train(tmp_path / "killed", 5)
    resumed = train(tmp_path / "killed", 8)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_scores_do_not_depend_on_the_batch():
    model = some_reward_model()
    rows = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]
    one = score_rows(model, rows, pad_id=PAD, batch_size=1)
    torch.testing.assert_close(score_rows(model, rows, pad_id=PAD, batch_size=3), one)
    assert not one.requires_grad


def test_an_ensemble_is_punished_for_what_it_disagrees_on():
    rewards = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    expected = torch.tensor([1.0, 1.0 - math.sqrt(2)])
    torch.testing.assert_close(pessimistic(rewards), expected)
    torch.testing.assert_close(pessimistic(rewards, 0.0), torch.ones(2))
    with pytest.raises(ValueError, match="rewards: expected those of at least 2 models, got 1"):
        pessimistic(rewards[:1])


# The best of n


def test_the_divergence_of_the_best_of_n_by_enumeration():
    """n uniform samples of k different values: exact, and it nears the formula from below."""
    for n in (1, 2, 4, 8):
        k = 20_000
        ranks = np.arange(1, k + 1)
        best = (ranks / k) ** n - ((ranks - 1) / k) ** n
        exact = float((best * np.log(best * k)).sum())
        assert exact <= best_of_n_kl(n) + 1e-9
        assert exact == pytest.approx(best_of_n_kl(n), abs=1e-3)
    assert best_of_n_kl(1) == 0.0


def test_with_ties_the_divergence_is_smaller_than_the_formula():
    # two values, one in two replies each: the best of 4 is the better one in 15 of 16 cases
    exact = 15 / 16 * math.log(15 / 8) + 1 / 16 * math.log(1 / 8)
    assert exact < best_of_n_kl(4)


@given(st.integers(1, 6), st.integers(0, 10**6))
@settings(max_examples=25)
def test_the_expected_best_by_enumeration(n, seed):
    rng = np.random.default_rng(seed)
    scores = torch.tensor(rng.permutation(12).reshape(2, 6).astype(np.float32))
    values = torch.tensor(rng.normal(size=(2, 6)).astype(np.float32))
    found = []
    for row in range(2):
        for chosen in itertools.combinations(range(6), n):
            best = max(chosen, key=lambda i: float(scores[row, i]))
            found.append(float(values[row, best]))
    assert expected_best(scores, values, n) == pytest.approx(float(np.mean(found)), abs=1e-5)


def test_equal_scores_share_their_places():
    scores, values = torch.zeros(1, 4), torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    for n in (1, 2, 4):
        assert expected_best(scores, values, n) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="n: expected"):
        expected_best(scores, values, 5)


# Policy gradients


def test_leave_one_out_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [3.0, 3.0, 3.0]])
    expected = torch.tensor([[1 - 4.0, 2 - 3.5, 6 - 1.5], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(leave_one_out(rewards), expected)


def test_a_group_of_one_has_nobody_to_be_compared_with():
    with pytest.raises(ValueError, match="at least 2 samples of each prompt, got 1"):
        leave_one_out(torch.zeros(3, 1))


def test_our_leave_one_out_is_that_of_trl():
    """trl divides the sum of the others by their number, in the midst of a long method."""
    rewards = torch.randn(5, 4, dtype=torch.float64)
    theirs = rewards - (rewards.sum(1, keepdim=True) - rewards) / (rewards.size(1) - 1)
    torch.testing.assert_close(leave_one_out(rewards), theirs)


def test_a_baseline_does_not_change_the_expected_gradient():
    """By enumeration: all pairs of samples from a policy over three actions."""
    logits = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    (true,) = torch.autograd.grad((logits.softmax(0) * rewards).sum(), logits)
    probabilities = logits.detach().softmax(0)
    total = torch.zeros(3, dtype=torch.float64)
    for a, b in itertools.product(range(3), repeat=2):
        weight = float(probabilities[a] * probabilities[b])
        advantages = leave_one_out(rewards[[a, b]][None])[0]
        log_probs = logits.log_softmax(0)[[a, b]]
        (gradient,) = torch.autograd.grad((advantages * log_probs).mean(), logits)
        total += weight * gradient
    torch.testing.assert_close(total, true)


# Estimates of the divergence


def small_policies() -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.tensor([0.2, -1.0, 0.7, 0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.3, 0.4, 0.2, 0.0], dtype=torch.float64).log_softmax(0)
    return logits, reference


def test_two_estimates_have_the_divergence_as_their_mean():
    logits, reference = small_policies()
    log_probs = logits.log_softmax(0).detach()
    p = log_probs.exp()
    exact = float((p * (log_probs - reference)).sum())
    k1, k2, k3 = ((p * k).sum() for k in kl_estimates(log_probs, reference))
    assert float(k1) == pytest.approx(exact) == pytest.approx(float(k3))
    assert float(k2) != pytest.approx(exact, rel=1e-3)
    estimates = kl_estimates(log_probs, reference)
    assert (estimates.k2 >= 0).all() and (estimates.k3 >= 0).all() and (estimates.k1 < 0).any()


def test_which_estimate_has_which_gradient():
    """In the loss, k2 has the gradient of the divergence, k1 none, k3 that of the other one."""
    logits, reference = small_policies()
    log_probs = logits.log_softmax(0)
    p = log_probs.exp()
    (exact,) = torch.autograd.grad((p * (log_probs - reference)).sum(), logits, retain_graph=True)
    (other,) = torch.autograd.grad(
        (reference.exp() * (reference - log_probs)).sum(), logits, retain_graph=True
    )
    weights = p.detach()  # the samples are drawn, and their number has no gradient
    found = [
        torch.autograd.grad((weights * k).sum(), logits, retain_graph=True)[0]
        for k in kl_estimates(log_probs, reference)
    ]
    torch.testing.assert_close(found[0], torch.zeros_like(exact))
    torch.testing.assert_close(found[1], exact)
    torch.testing.assert_close(found[2], other)
    # in the reward, as numbers without a gradient, k1 alone leads to the right gradient
    k1, k2, k3 = (k.detach() for k in kl_estimates(log_probs, reference))
    as_reward = [
        torch.autograd.grad((weights * k * log_probs).sum(), logits, retain_graph=True)[0]
        for k in (k1, k2, k3)
    ]
    torch.testing.assert_close(as_reward[0], exact)
    for wrong in as_reward[1:]:
        assert not torch.allclose(wrong, exact, rtol=1e-2)


def test_estimates_of_equal_policies_are_zero_and_small_ones_are_precise():
    log_probs = torch.randn(3, 4)
    for k in kl_estimates(log_probs, log_probs):
        assert torch.equal(k, torch.zeros_like(k))
    tiny = kl_estimates(torch.tensor([[-1.0]]), torch.tensor([[-1.0 - 1e-3]])).k3
    assert float(tiny) == pytest.approx(5e-7, rel=0.05)


# Sums and means over responses


def test_sums_by_hand():
    values = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False] * 3])
    assert [float(x) for x in loss_sums(values, mask)] == [7.0, 3.0]
    assert [float(x) for x in loss_sums(values, mask, per="response")] == [5.5, 2.0]
    assert [float(x) for x in loss_sums(values, mask, per=10)] == [pytest.approx(0.7), 2.0]
    assert float(aggregate(values, mask)) == pytest.approx(7 / 3)
    assert float(aggregate(values, mask, per="response")) == pytest.approx(2.75)
    assert sequence_log_probs(values, mask).tolist() == [3.0, 4.0, 0.0]
    means = sequence_log_probs(values, mask, mean=True)
    assert means[:2].tolist() == [1.5, 4.0]


@pytest.mark.parametrize("per", ["token", "response", 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_masked_does_not_count_not_even_nan(per, bad):
    values = torch.tensor([[1.0, bad], [2.0, 3.0]], requires_grad=True)
    mask = torch.tensor([[True, False], [True, True]])
    loss = aggregate(values, mask, per=per)
    loss.backward()
    assert loss.isfinite() and values.grad is not None
    assert values.grad.isfinite().all() and float(values.grad[0, 1]) == 0.0
    assert sequence_log_probs(values, mask)[0] == 1.0


def test_over_nothing_a_mean_is_nan():
    assert aggregate(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool)).isnan()


@pytest.mark.parametrize("per", ["words", 0, -1, math.nan, True])
def test_what_is_divided_by_is_known(per):
    mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(Exception, match="per"):
        aggregate(torch.ones(1, 2), mask, per=per)


def test_the_mean_over_tokens_is_the_same_in_micro_batches():
    values, mask = torch.randn(6, 5), torch.rand(6, 5) > 0.4
    parts = [loss_sums(values[rows], mask[rows]) for rows in (slice(0, 2), slice(2, 6))]
    total, count = sum(p[0] for p in parts), sum(p[1] for p in parts)
    torch.testing.assert_close(total / count, aggregate(values, mask))


def test_whitened_by_hand():
    values = torch.tensor([[1.0, 3.0, 1e9], [5.0, math.nan, 7.0]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    found = whitened(values, mask)
    assert found[~mask].tolist() == [0.0, 0.0]
    chosen = found[mask]
    torch.testing.assert_close(chosen.mean(), torch.tensor(0.0))
    torch.testing.assert_close(chosen.std(), torch.tensor(1.0))


def test_equal_values_become_zero():
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(whitened(torch.full((2, 3), 4.0), mask), torch.zeros(2, 3))
    one = torch.tensor([[True, False]])
    assert torch.equal(whitened(torch.tensor([[4.0, 1.0]]), one), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="mask: expected at least one place"):
        whitened(torch.zeros(1, 2), ~torch.ones(1, 2, dtype=torch.bool))


def test_a_number_of_each_row_on_its_tokens():
    mask = torch.tensor([[False, True, True], [True, False, False]])
    found = on_tokens(torch.tensor([2.0, -1.0]), mask)
    assert found.tolist() == [[0.0, 2.0, 2.0], [-1.0, 0.0, 0.0]]


# Advantages


def slow_advantages(rewards, values, after, gamma, lam):
    """The definition: a sum over all later errors, for one response of n tokens."""
    following = [*values[1:], after]
    errors = [r + gamma * v2 - v for r, v, v2 in zip(rewards, values, following, strict=True)]
    n = len(errors)
    return [sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, n)) for t in range(n)]


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 5), st.booleans()), min_size=1, max_size=4
    ),
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    st.sampled_from([0.0, 0.3, 0.95, 1.0]),
    st.integers(0, 10**6),
)
@settings(max_examples=40)
def test_advantages_are_the_sum_of_the_definition(rows, gamma, lam, seed):
    generator = torch.Generator().manual_seed(seed)
    width = max(start + n for start, n, _ in rows) + 1
    rewards, values = torch.randn(2, len(rows), width, generator=generator, dtype=torch.float64)
    places = torch.arange(width)
    mask = torch.stack([(places >= a) & (places < a + n) for a, n, _ in rows])
    finished = torch.tensor([end for *_, end in rows])
    found = generalized_advantages(rewards, values, mask, finished, gamma=gamma, lam=lam)
    for row, (start, n, end) in enumerate(rows):
        own = slice(start, start + n)
        after = 0.0 if end else float(values[row, start + n])
        expected = slow_advantages(
            rewards[row, own].tolist(), values[row, own].tolist(), after, gamma, lam
        )
        torch.testing.assert_close(
            found.advantages[row, own], torch.tensor(expected, dtype=torch.float64)
        )
        torch.testing.assert_close(
            found.returns[row, own], found.advantages[row, own] + values[row, own]
        )
    assert not found.advantages[~mask].any() and not found.returns[~mask].any()


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_nothing_leaks_through_padding(lam):
    """What stands outside the response changes nothing, not even NaN, and a row is as if alone."""
    mask = torch.tensor([[False, True, True, False, False], [True, True, True, True, False]])
    finished = torch.tensor([True, True])
    rewards, values = torch.randn(2, 2, 5)
    expected = generalized_advantages(rewards, values, mask, finished, lam=lam)
    for bad in (1e6, math.nan, math.inf):
        other = generalized_advantages(
            rewards.where(mask, bad), values.where(mask, bad), mask, finished, lam=lam
        )
        assert torch.equal(expected.advantages, other.advantages)
        assert torch.equal(expected.returns, other.returns)
    alone = generalized_advantages(
        rewards[:1, :4], values[:1, :4], mask[:1, :4], finished[:1], lam=lam
    )
    torch.testing.assert_close(alone.advantages, expected.advantages[:1, :4])


def test_an_end_of_text_and_a_cut_are_told_apart():
    rewards = torch.zeros(2, 3)
    values = torch.tensor([[0.0, 0.0, 5.0], [0.0, 0.0, 5.0]])
    mask = torch.tensor([[True, True, False]] * 2)
    found = generalized_advantages(rewards, values, mask, torch.tensor([True, False]), lam=1.0)
    assert found.advantages.tolist() == [[0.0, 0.0, 0.0], [5.0, 5.0, 0.0]]


def test_a_cut_needs_a_place_after_it():
    mask = torch.tensor([[False, True]])
    with pytest.raises(ValueError, match="mask: expected a place after a response that was cut"):
        generalized_advantages(torch.zeros(1, 2), torch.zeros(1, 2), mask, torch.tensor([False]))
    generalized_advantages(torch.zeros(1, 2), torch.zeros(1, 2), mask, torch.tensor([True]))


def test_with_lambda_one_returns_are_the_rewards_to_come():
    rewards, values = torch.tensor([[1.0, -2.0, 4.0]]), torch.tensor([[9.0, -7.0, 3.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    found = generalized_advantages(rewards, values, mask, torch.tensor([True]), lam=1.0)
    torch.testing.assert_close(found.returns, torch.tensor([[3.0, 2.0, 4.0]]))


@pytest.mark.parametrize("option", [{"gamma": 1.1}, {"lam": -0.1}, {"lam": math.nan}])
def test_discounts_out_of_range(option):
    mask = torch.ones(1, 1, dtype=torch.bool)
    zeros = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=next(iter(option))):
        generalized_advantages(zeros, zeros, mask, torch.tensor([True]), **option)


# PPO's clipped objective


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope",
    [
        (1.0, 1.0, -1.0, -1.0),  # at the old policy: the plain policy gradient
        (1.5, 1.0, -1.2, 0.0),  # encouraged enough
        (1.5, -1.0, 1.5, 1.5),  # too likely and bad: still to be discouraged
        (0.5, 1.0, -0.5, -0.5),  # too unlikely and good: still to be encouraged
        (0.5, -1.0, 0.8, 0.0),  # discouraged enough
    ],
)
def test_the_clipped_objective_by_hand(ratio, advantage, loss, slope):
    log_probs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    old, advantages = torch.zeros(1, 1).double(), torch.tensor([[advantage]]).double()
    found = clipped_terms(log_probs, old, advantages)
    found.sum().backward()
    assert float(found.detach()) == pytest.approx(loss)
    assert log_probs.grad is not None and float(log_probs.grad) == pytest.approx(slope)


def test_clips_of_both_sides_and_none():
    log_probs = torch.tensor([[math.log(1.25), math.log(0.85)]])
    old, advantages = torch.zeros(1, 2), torch.tensor([[1.0, -1.0]])
    found = clipped_terms(log_probs, old, advantages, clip=(0.1, 0.3))
    torch.testing.assert_close(found, torch.tensor([[-1.25, 0.9]]))
    found = clipped_terms(log_probs, old, advantages, clip=None)
    torch.testing.assert_close(found, torch.tensor([[-1.25, 0.85]]))


@given(st.floats(-2, 2), st.floats(-2, 2))
@settings(max_examples=50)
def test_the_clipped_loss_is_never_below_the_unclipped_one(change, advantage):
    args = (torch.tensor([[change]]), torch.zeros(1, 1), torch.tensor([[advantage]]))
    assert float(clipped_terms(*args)) >= float(clipped_terms(*args, clip=None)) - 1e-6


@pytest.mark.parametrize("per", ["token", "response", 4])
def test_what_is_masked_has_no_effect_on_the_clipped_loss(per):
    log_probs = torch.randn(2, 4, requires_grad=True)
    old, advantages = torch.randn(2, 2, 4).unbind()
    mask = torch.tensor([[True, True, False, False], [False, True, False, True]])
    loss = clipped_loss(log_probs, old, advantages, mask, per=per)
    loss.backward()
    spoiled = log_probs.detach().where(mask, math.inf).requires_grad_()
    other = clipped_loss(spoiled, old.where(mask, math.nan), advantages, mask, per=per)
    other.backward()
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(log_probs.grad, spoiled.grad)


@pytest.mark.parametrize("clip", [-0.1, 1.5, (0.1, -0.2), math.nan])
def test_clips_out_of_range(clip):
    zeros = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="clip"):
        clipped_terms(zeros, zeros, zeros, clip=clip)


def test_at_the_old_policy_the_gradient_is_that_of_the_policy_gradient():
    logits = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 7, (3, 5))
    mask = torch.rand(3, 5) > 0.3
    advantages = torch.randn(3, 5, dtype=torch.float64)
    log_probs = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    clipped = clipped_loss(log_probs, log_probs.detach(), advantages, mask)
    plain = masked_mean(-advantages * log_probs, mask)
    (first,) = torch.autograd.grad(clipped, logits, retain_graph=True)
    (second,) = torch.autograd.grad(plain, logits)
    torch.testing.assert_close(first, second)


def test_our_clipped_loss_is_trls_for_whole_responses():
    """trl's RLOO clips the ratio of whole responses: ours of one number for each of them."""
    trl = pytest.importorskip("trl")
    log_probs = torch.randn(4, 3, requires_grad=True)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    advantages = torch.tensor([1.0, -1.0, 0.5, -2.0])
    old = (log_probs.detach() * mask).sum(1) + torch.tensor([0.5, -0.5, 0.1, 0.0])
    ids = torch.ones(4, 3, dtype=torch.int64)

    class Accelerator:
        def reduce(self, x: Any, reduction: str) -> Any:
            return x

        def gather(self, x: Any) -> Any:
            return x

    def token_log_probs(*args: Any, **options: Any) -> Any:
        return log_probs, torch.zeros(4, 3), None

    from collections import defaultdict

    this = type("Self", (), {})()
    this._get_per_token_logps_and_entropies = token_log_probs
    this.accelerator, this.aux_loss_enabled = Accelerator(), False
    this.epsilon_low, this.epsilon_high = 0.2, 0.3
    this._metrics = {"train": defaultdict(list)}
    this.model = torch.nn.Linear(1, 1)
    inputs = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids}
    inputs |= {"completion_mask": mask, "old_logps": old, "advantages": advantages}
    theirs = trl.RLOOTrainer._compute_loss(this, this.model, inputs)
    whole = sequence_log_probs(log_probs, mask.bool())[:, None]
    every = torch.ones(4, 1, dtype=torch.bool)
    ours = clipped_loss(whole, old[:, None], advantages[:, None], every, clip=(0.2, 0.3))
    torch.testing.assert_close(ours, theirs)
    (a,) = torch.autograd.grad(ours, log_probs, retain_graph=True)
    (b,) = torch.autograd.grad(theirs, log_probs)
    torch.testing.assert_close(a, b)


# Numbers


@pytest.mark.parametrize("value", [True, "1", None, math.nan, math.inf, 1j, [1]])
def test_what_is_no_finite_number(value):
    with pytest.raises(ValueError, match="beta: expected a finite number, got"):
        check_number("beta", value)


def test_bounds_are_told():
    check_number("beta", np.float32(0.5), 0, 1)
    check_number("beta", 0, 0)
    for call, words in [
        (partial(check_number, "beta", 0, above=0), "a number above 0, got 0"),
        (partial(check_number, "beta", -1, 0, 1), "of at least 0 and of at most 1, got -1"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
