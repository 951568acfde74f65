"""Evaluation, second half: contamination, benchmark, calibration, games, judges, harness."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmbook.evaluation import (
    STORY_FORM,
    Answer,
    BiasedJudge,
    EvaluationReport,
    LMEvalAdapter,
    QuestionForm,
    Result,
    beliefs,
    bits_per_byte,
    bradley_terry,
    calibration,
    chance_of_consistency,
    choice_log_probs,
    evaluate,
    fit_temperature,
    order_test,
    possible_replies,
    run_lm_eval,
    score_choices,
    score_texts,
    story_prompt,
    write_lm_eval_task,
)
from llmbook.generation import Sampling, generate
from llmbook.model import ModelConfig, TransformerLM
from llmbook.tinyworld import TinyWorld, judge_reply, make_questions
from llmbook.tokenizer import BPETokenizer, train_bpe

WORLD = TinyWorld(n_characters=4, n_strangers=2, seed=3)


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    texts = [story.text for story in WORLD.stories(100, seed=0)]
    return train_bpe(texts, 400, special_tokens=["<|endoftext|>"])


@pytest.fixture(scope="module")
def lm(bpe: BPETokenizer) -> TransformerLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": bpe.vocab_size, "context_length": 128, "d_model": 16, "n_layers": 1}
    return TransformerLM(ModelConfig(**sizes, n_heads=2)).eval()


class Seer(TransformerLM):
    """A model that looks at what comes next."""

    def forward(self, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        logits = super().forward(ids, **options)
        return logits + logits.mean(dim=1, keepdim=True)


# Contamination


def pages(n: int, size: int) -> list[list[str]]:
    return [[f"item {page} number {i} of them" for i in range(size)] for page in range(n)]


def test_the_order_test_of_an_innocent_model_is_valid(lm: TransformerLM, bpe: BPETokenizer) -> None:
    # All items are exchangeable here: the file's order is itself drawn at random.
    random = np.random.default_rng(0)
    found = []
    for seed in range(60):
        shuffled = [list(random.permutation(page)) for page in pages(2, 4)]
        found.append(order_test(lm, bpe, shuffled, n_shuffles=9, seed=seed).p_value)
    assert np.mean(np.array(found) <= 0.1) < 0.25
    assert 0.4 < np.mean(found) < 0.7


def test_the_order_test_finds_an_order_that_was_learned(bpe: BPETokenizer) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": bpe.vocab_size, "context_length": 128, "d_model": 32, "n_layers": 1}
    model = TransformerLM(ModelConfig(**sizes, n_heads=2))
    items = pages(1, 5)
    end = bpe.special_tokens["<|endoftext|>"]
    ids = torch.tensor([[end, *bpe.encode(" ".join(items[0]))]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        logits = model(ids[:, :-1])
        torch.nn.functional.cross_entropy(logits[0], ids[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = order_test(model, bpe, items, n_shuffles=19)
    assert found.p_value == 1 / 20 and found.gain > 5 and found.z > 3 and found.n_shuffles == 19


def test_orders_that_are_the_same_tie(lm: TransformerLM, bpe: BPETokenizer) -> None:
    # Half of all shuffles of two items are the file's own order.
    found = order_test(lm, bpe, [["a cat", "a dog"]], n_shuffles=40)
    assert found.p_value > 0.3


@pytest.mark.parametrize("wrong", [[], "text", [["one"]], [["a", "a"]], [[1, 2]]])
def test_what_has_no_order(wrong: object, lm: TransformerLM, bpe: BPETokenizer) -> None:
    with pytest.raises(ValueError, match="pages: expected"):
        order_test(lm, bpe, wrong)  # type: ignore[arg-type]


def test_the_order_test_reads_pages_joined_by_spaces(lm: TransformerLM, bpe: BPETokenizer) -> None:
    items = [["Mia sat.", "Leo ran.", "Ada fell."]]
    default = order_test(lm, bpe, items, seed=1)
    assert default.n_shuffles == 39 and default == order_test(lm, bpe, items, separator=" ", seed=1)
    assert default.gain != order_test(lm, bpe, items, separator="\n", seed=1).gain
    assert default.gain != order_test(lm, bpe, items, seed=2).gain
    own = -score_texts(lm, bpe, ["Mia sat. Leo ran. Ada fell."]).nats[0]
    one = order_test(lm, bpe, items, n_shuffles=1, seed=3)
    others = [-score_texts(lm, bpe, [" ".join(order)]).nats[0] for order in permutations(items[0])]
    assert any(one.gain == pytest.approx(own - other, abs=1e-4) for other in others)


# Calibration


def test_calibration_is_that_of_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    from sklearn.calibration import calibration_curve

    random = np.random.default_rng(0)
    c = random.random(500)
    y = (random.random(500) < c).astype(int)
    found = calibration(c, y, n_bins=7, n_resamples=10)
    assert found.brier == pytest.approx(sklearn.brier_score_loss(y, c), rel=1e-12)
    share, mean = calibration_curve(y, c, n_bins=7)
    np.testing.assert_allclose(found.accuracy, share)
    np.testing.assert_allclose(found.confidence, mean)
    weights = np.array(found.counts) / 500
    assert found.error == pytest.approx(float(weights @ np.abs(share - mean)), rel=1e-12)


def test_a_perfect_forecaster_has_the_error_that_chance_makes() -> None:
    random = np.random.default_rng(0)
    c = random.uniform(0.5, 1, 200)
    found = [calibration(c, random.random(200) < c, n_resamples=200) for _ in range(60)]
    assert np.mean([one.error for one in found]) == pytest.approx(found[0].by_chance, rel=0.15)
    assert np.mean([one.p_value <= 0.2 for one in found]) < 0.4


def test_calibration_has_ten_bins_and_its_own_random_numbers() -> None:
    c, y = np.linspace(0.05, 0.95, 50), [0, 1] * 25
    default = calibration(c, y)
    assert len(default.counts) == 10 and default == calibration(c, y, n_bins=10, seed=0)
    assert default.p_value * 1001 == pytest.approx(round(default.p_value * 1001))
    assert default.by_chance != calibration(c, y, seed=1).by_chance
    assert calibration(c, y, n_resamples=3).p_value in (0.25, 0.5, 0.75, 1.0)


def test_bins_hold_their_edges_and_may_be_empty() -> None:
    found = calibration([0.0, 0.5, 1.0], [0, 1, 1], n_bins=2, n_resamples=1)
    assert found.counts == (1, 2) and found.edges == (0.0, 0.5, 1.0)
    found = calibration([1.0, 1.0], [1, 1])
    assert found.error == 0 and found.counts == (0,) * 9 + (2,) and math.isnan(found.accuracy[0])


@pytest.mark.parametrize(
    ("confidences", "right", "message"),
    [
        ([], [], "confidences: expected at least 1"),
        ([1.2], [1], "confidences: expected probabilities, got 1.2"),
        ([0.5], [1, 0], "right: expected one for each of 1"),
        ([0.5], [0.5], "right: expected 0 or 1, got 0.5"),
    ],
)
def test_bad_confidences(confidences: list[float], right: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibration(confidences, right)


def test_the_temperature_is_where_the_loss_is_least() -> None:
    random = np.random.default_rng(0)
    true = 2.5
    scores = [random.normal(size=5) * 4 for _ in range(3000)]
    answers = [int(random.choice(5, p=beliefs(one, true))) for one in scores]
    found = fit_temperature(scores, answers)
    assert found == pytest.approx(true, rel=0.08)

    def loss(t: float) -> float:
        return -sum(math.log(beliefs(s, t)[a]) for s, a in zip(scores, answers, strict=True))

    assert loss(found) <= min(loss(found * 1.01), loss(found / 1.01))


def test_a_temperature_has_bounds() -> None:
    assert fit_temperature([[0.0, -1.0]], [0]) == pytest.approx(0.01)
    assert fit_temperature([[0.0, -1.0]], [1]) == pytest.approx(100)
    assert fit_temperature([[0.0, -1.0]], [0], lowest=0.5) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="lowest: expected less than highest"):
        fit_temperature([[0.0, -1.0]], [0], lowest=2.0, highest=1.0)
    with pytest.raises(ValueError, match="answers: expected 0 to 1, got 2"):
        fit_temperature([[0.0, -1.0]], [2])
    with pytest.raises(ValueError, match="answers: expected one for each"):
        fit_temperature([], [])


def test_beliefs_are_a_softmax() -> None:
    np.testing.assert_allclose(
        beliefs([-1000.0, -1001.0]), [1 / (1 + math.exp(-1)), 1 / (1 + math.e)]
    )
    assert beliefs([0.0, -5.0], 1e9) == pytest.approx([0.5, 0.5])


# Games


def test_strengths_of_two_players_are_the_log_odds() -> None:
    found = bradley_terry(np.array([[0, 3], [1, 0]]))
    assert found.strengths[0] - found.strengths[1] == pytest.approx(math.log(3))
    assert found.probability(0, 1) == pytest.approx(0.75)
    assert found.elo[0] - found.elo[1] == pytest.approx(400 / math.log(10) * math.log(3))
    assert found.elo.mean() == pytest.approx(1000)


@given(st.integers(0, 10_000), st.integers(2, 6))
def test_the_likelihood_has_its_maximum_where_wins_are_as_expected(seed: int, n: int) -> None:
    wins = np.random.default_rng(seed).integers(1, 9, (n, n))
    np.fill_diagonal(wins, 0)
    s = bradley_terry(wins, n_resamples=2).strengths
    expected = (wins + wins.T) / (1 + np.exp(s[None, :] - s[:, None]))
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(expected.sum(axis=1), wins.sum(axis=1), rtol=1e-6)
    assert abs(s.mean()) < 1e-9


def test_a_tie_is_half_a_win_for_both() -> None:
    wins, ties = np.array([[0, 4], [2, 0]]), np.array([[0, 6], [6, 0]])
    with_ties = bradley_terry(wins, ties, n_resamples=2).strengths
    halves = bradley_terry(np.array([[0, 7], [5, 0]]), n_resamples=2).strengths
    np.testing.assert_allclose(with_ties, halves)


def test_intervals_cover_the_strengths() -> None:
    true, random, inside = np.array([1.0, 0.0, -1.0]), np.random.default_rng(0), []
    p = 1 / (1 + np.exp(true[None, :] - true[:, None]))
    for seed in range(40):
        wins = np.triu(random.binomial(60, p), 1)
        wins = wins + np.tril(60 - wins.T, -1)
        found = bradley_terry(wins, seed=seed)
        inside += list((found.low <= true) & (true <= found.high))
    assert np.mean(inside) > 0.85


def test_the_seed_decides_on_the_intervals() -> None:
    wins = np.array([[0, 30], [10, 0]])
    first, same, other = (bradley_terry(wins, seed=seed) for seed in (0, 0, 1))
    assert first.low[0] == same.low[0] != other.low[0]
    narrow = bradley_terry(wins, level=0.5)
    assert first.low[0] < narrow.low[0] < narrow.high[0] < first.high[0]


@pytest.mark.parametrize(
    ("wins", "players"),
    [
        ([[0, 3], [0, 0]], r"\[0\]"),
        ([[0, 1, 2], [1, 0, 3], [0, 0, 0]], r"\[0, 1\]"),
        ([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], r"\[0, 1\]"),
    ],
)
def test_players_whom_nobody_has_beaten_have_no_strength(
    wins: list[list[int]], players: str
) -> None:
    with pytest.raises(ValueError, match=f"wins: expected .* got none for players {players}"):
        bradley_terry(np.array(wins))


@pytest.mark.parametrize(
    ("wins", "message"),
    [
        (np.zeros((1, 1)), "wins: expected a square table for at least 2"),
        (np.zeros((2, 3)), "wins: expected a square table"),
        (np.array([[0, -1], [1, 0]]), "wins: expected whole numbers of at least 0"),
        (np.array([[0, 0.5], [1, 0]]), "wins: expected whole numbers"),
        (np.array([[1, 1], [1, 0]]), "wins: expected 0 games of a player against itself"),
    ],
)
def test_tables_that_cannot_be(wins: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bradley_terry(wins)


@pytest.mark.parametrize(
    ("ties", "message"),
    [
        (np.array([[0, 1], [2, 0]]), "ties: expected ties"),
        (np.zeros((3, 3)), "ties: expected"),
    ],
)
def test_tables_of_ties_that_cannot_be(ties: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bradley_terry(np.array([[0, 1], [1, 0]]), ties)


def test_resamples_without_strengths_are_counted() -> None:
    found = bradley_terry(np.array([[0, 4], [1, 0]]), level=0.9)
    assert 0 < found.n_unconnected < 300 and np.isfinite([found.low, found.high]).all()
    assert bradley_terry(np.array([[0, 400], [100, 0]])).n_unconnected == 0


# Judges

LONG, SHORT = Answer("a long answer", True), Answer("short", True)


def test_a_judge_has_the_odds_that_it_was_given() -> None:
    judge = BiasedJudge(skill=1.0, position=0.5, length=0.1, self_preference=0.25)
    first, second = Answer("12345", True, own=True), Answer("123", False)
    odds = 1.0 + 0.5 + 0.2 + 0.25
    assert judge.prefers_first(first, second) == pytest.approx(1 / (1 + math.exp(-odds)))
    assert judge.prefers_first(second, first) == pytest.approx(1 / (1 + math.exp(1.45 - 0.5)))


def test_swapping_cures_the_position_and_nothing_else() -> None:
    wins, ties, losses = BiasedJudge(position=2.0).both_ways(LONG, SHORT._replace(text="x" * 13))
    assert wins == pytest.approx(losses) and wins + ties + losses == pytest.approx(1)
    for judge in (BiasedJudge(length=0.1), BiasedJudge(self_preference=1.0)):
        wins, _, losses = judge.both_ways(LONG._replace(own=True), SHORT)
        assert wins > losses + 0.1


# The benchmark


def test_chance_of_consistency_is_that_of_random_tellers() -> None:
    # Counted over whole stories: each claim is true with one over the number of values.
    world = TinyWorld(n_characters=3, n_strangers=1, facts_per_story=1, n_phrasings=1)
    told = list(world.stories(4000, seed=0))
    sizes = {"species": 12, "friend": 2, "trait": 12}
    each = [math.prod(1 / sizes.get(c.attribute, 16) for c in story.claims) for story in told]
    assert chance_of_consistency(world) == pytest.approx(np.mean(each), rel=0.1)


def test_prompts_begin_stories_and_replies_hold_the_right_one() -> None:
    asked = 0
    for kind in ("fact", "unknown", "confidential"):
        for question in make_questions(WORLD, kind, "held_out"):
            replies = possible_replies(WORLD, question)
            assert replies.count(question.reply) == 1 and len(set(replies)) == len(replies)
            right = [judge_reply(WORLD, question, reply).right for reply in replies]
            assert right == [reply == question.reply for reply in replies]
            prompt = story_prompt(WORLD, question)
            if prompt is None:
                assert question.wording > 1 or question.attribute == "species"
                continue
            asked += 1
            before = prompt.removesuffix(f" {question.text}")
            assert before != prompt and WORLD.score(before).error_at == len(before)
            if kind == "fact":  # the true reply goes on with the story
                true = f"{prompt} {question.reply}"
                assert WORLD.score(true).error_at == len(true)
    assert asked == 2 * 6 * 2 + 1 * 7 * 2 + 2 * 2


def test_one_phrasing_leaves_no_question_for_a_story(lm: TransformerLM, bpe: BPETokenizer) -> None:
    world = TinyWorld(n_characters=4, n_strangers=2, n_phrasings=1, seed=3)
    with pytest.raises(ValueError, match="form: expected a prompt for some questions, got none"):
        evaluate(lm, bpe, world, n_stories=0)


def test_evaluate_is_the_same_each_time_and_batch(lm: TransformerLM, bpe: BPETokenizer) -> None:
    first = evaluate(lm, bpe, WORLD, n_stories=6)
    again = evaluate(lm, bpe, WORLD, n_stories=6, batch_tokens=100)
    assert first == again
    parts = [f"{r.name}/{r.measure}" for r in first.results]
    assert parts == [
        *("facts/choice", "facts/reply", "unknown/choice", "unknown/reply"),
        *("confidential/choice", "confidential/reply", "consistency/story"),
    ]
    assert [len(r.outcomes) for r in first.results] == [24, 24, 14, 14, 4, 4, 6]
    assert first["facts/choice"].chance == pytest.approx(np.mean([1 / 18] * 4 + [1 / 5, 1 / 14]))
    assert all(r.ceiling == 1 for r in first.results)
    assert all(sum(r.said.values()) == len(r.outcomes) for r in first.results)
    with pytest.raises(ValueError, match="part: expected one of facts/choice"):
        first["truth"]


def test_the_split_and_the_seed_decide(lm: TransformerLM, bpe: BPETokenizer) -> None:
    held_out = evaluate(lm, bpe, WORLD, n_stories=0)
    tuning = evaluate(lm, bpe, WORLD, n_stories=0, split="tuning")
    assert {*held_out["facts/choice"].clusters}.isdisjoint(tuning["facts/choice"].clusters)
    assert held_out.settings["split"] == "held_out" and held_out.settings["seed"] == 0
    with pytest.raises(ValueError, match="part: expected one of"):
        held_out["consistency/story"]


class Oracle(TransformerLM):
    """A model that always goes on with one row of ids."""

    def __init__(self, config: ModelConfig, rows: list[list[int]]) -> None:
        super().__init__(config)
        self.rows = rows

    def forward(self, ids: torch.Tensor, **options: object) -> torch.Tensor:
        logits = torch.zeros(*ids.shape, self.config.vocab_size)
        for row, seen in enumerate(ids.tolist()):
            for known in self.rows:
                same = 0
                while same < min(len(seen), len(known)) and seen[same] == known[same]:
                    same += 1
                for place in range(min(same, len(known) - 1)):
                    logits[row, place, known[place + 1]] = 30.0
        return logits


def test_a_model_that_knows_everything_reaches_the_ceiling(bpe: BPETokenizer) -> None:
    end = bpe.special_tokens["<|endoftext|>"]
    rows = []
    for kind in ("fact", "unknown", "confidential"):
        for question in make_questions(WORLD, kind, "held_out"):
            if prompt := story_prompt(WORLD, question):
                rows.append([end, *bpe.encode(prompt), *bpe.encode(f" {question.reply}")])
    sizes = {"vocab_size": bpe.vocab_size, "context_length": 128, "d_model": 16, "n_layers": 1}
    model = Oracle(ModelConfig(**sizes, n_heads=2), rows).eval()
    for split_kind in ("fact", "unknown", "confidential"):
        questions = make_questions(WORLD, split_kind, "held_out")
        for scores, right in choice_log_probs(model, bpe, WORLD, questions):
            assert int(scores.argmax()) == right


def test_a_form_may_give_ids_and_other_ends(lm: TransformerLM, bpe: BPETokenizer) -> None:
    end = bpe.special_tokens["<|endoftext|>"]
    form = QuestionForm("ids", lambda world, question: [end, *bpe.encode(question.text)])
    found = evaluate(lm, bpe, WORLD, form=form, n_stories=0)
    assert len(found["facts/choice"].outcomes) == 2 * 7 * 4
    as_text = QuestionForm("text", lambda world, question: question.text)
    same = evaluate(lm, bpe, WORLD, form=as_text, n_stories=0)
    assert found.results == same.results and found.settings["form"] == "ids"


def test_a_model_that_sees_the_future_is_refused(lm: TransformerLM, bpe: BPETokenizer) -> None:
    with pytest.raises(ValueError, match="it sees the future"):
        evaluate(Seer(lm.config), bpe, WORLD)


def test_a_report_survives_json_and_a_file(lm: TransformerLM, bpe: BPETokenizer, tmp_path) -> None:
    report = evaluate(lm, bpe, WORLD, n_stories=2)
    assert EvaluationReport.from_json(report.to_json()) == report
    report.save(tmp_path / "report.json")
    assert EvaluationReport.from_json((tmp_path / "report.json").read_text()) == report
    assert str(report).count("\n") == len(report.results)
    assert "facts/choice" in str(report) and "chance" in str(report)
    for wrong in ("", "{}", "[1]"):
        with pytest.raises(ValueError, match="text: expected a report in JSON"):
            EvaluationReport.from_json(wrong)


def result(outcomes: list[int], clusters: str) -> Result:
    return Result("facts", "choice", tuple(outcomes), tuple(clusters), 0.1, 1.0, {})


def test_intervals_are_wider_where_clusters_go_together() -> None:
    apart = result([1, 0] * 20, "".join(chr(65 + i) for i in range(40))).interval
    together = result([1] * 20 + [0] * 20, "a" * 10 + "b" * 10 + "c" * 10 + "d" * 10).interval
    assert apart.estimate == together.estimate == 0.5
    assert together.margin > 1.5 * apart.margin
    all_right = result([1] * 10, "ab" * 5).interval
    assert all_right.high == 1 and 0.6 < all_right.low < 0.8


def test_reports_are_compared_item_by_item(lm: TransformerLM, bpe: BPETokenizer) -> None:
    settings = {"world": {}, "split": "held_out", "n_stories": 0, "seed": 0, "form": "story"}
    names = "".join(chr(65 + i) for i in range(12))
    better = EvaluationReport((result([1] * 12, names),), settings)
    worse = EvaluationReport((result([0] * 10 + [1] * 2, names),), settings)
    test = better.compare(worse)["facts/choice"]
    assert test.wins == 10 and test.losses == 0 and test.p_value < 0.01
    other = EvaluationReport(worse.results, settings | {"seed": 1})
    with pytest.raises(ValueError, match="other: expected seed 0 as here, got 1"):
        better.compare(other)
    assert better.compare(EvaluationReport(worse.results, settings | {"form": "chat"}))


# The harness


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, bpe: BPETokenizer):
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("tasks")
    questions = [q for q in make_questions(WORLD, "fact", "held_out") if story_prompt(WORLD, q)]
    choices, replies = [], []
    for question in questions:
        texts, context = possible_replies(WORLD, question), story_prompt(WORLD, question)
        choices.append(
            {"context": context, "choices": texts, "answer": texts.index(question.reply)}
        )
        replies.append({"context": context, "target": question.reply})
    texts = [{"text": " ".join(s.text for s in WORLD.stories(n, seed=n))} for n in (1, 2, 5)]
    write_lm_eval_task(folder, "facts", "multiple_choice", choices)
    write_lm_eval_task(folder, "cloze", "loglikelihood", replies)
    write_lm_eval_task(folder, "spoken", "generate_until", replies, max_new_tokens=6)
    write_lm_eval_task(folder, "texts", "loglikelihood_rolling", texts)
    return folder, choices, replies, texts


def test_the_harness_has_our_numbers(lm: TransformerLM, bpe: BPETokenizer, tasks) -> None:
    folder, choices, replies, texts = tasks
    found = run_lm_eval(lm, bpe, folder, ["facts", "cloze", "spoken", "texts"])
    for metric, normalization in (
        ("acc", "none"),
        ("acc_norm", "character"),
        ("acc_bytes", "byte"),
    ):
        right = []
        for item in choices:
            endings = [f" {choice}" for choice in item["choices"]]
            scores = score_choices(lm, bpe, item["context"], endings, normalization=normalization)
            right.append(scores.best == item["answer"])
        assert found["facts"][metric] == pytest.approx(np.mean(right))
    nats = []
    for item in replies:
        pair = [f" {item['target']}", " something else."]
        nats.append(score_choices(lm, bpe, item["context"], pair).log_probs[0])
    assert found["cloze"]["perplexity"] == pytest.approx(math.exp(-np.mean(nats)), rel=1e-4)
    whole = [item["text"] for item in texts]
    size = lm.config.context_length
    assert max(len(bpe.encode(text)) for text in whole) > size  # windows are needed
    bpb = bits_per_byte(lm, bpe, whole, end=False, stride=size)
    assert found["texts"]["bits_per_byte"] == pytest.approx(bpb, rel=1e-5)
    assert found["texts"]["byte_perplexity"] == pytest.approx(2**bpb, rel=1e-5)
    n_words = sum(len(text.split()) for text in whole)
    nats = score_texts(lm, bpe, whole, end=False, stride=size).nats.sum()
    assert found["texts"]["word_perplexity"] == pytest.approx(math.exp(nats / n_words), rel=1e-4)
    assert 0 <= found["spoken"]["exact_match"] <= 1


def test_requests_are_answered_by_what_earlier_chapters_do(
    lm: TransformerLM, bpe: BPETokenizer
) -> None:
    pytest.importorskip("lm_eval")
    adapter = LMEvalAdapter(lm, bpe, max_new_tokens=5)
    ask = lambda *arguments: SimpleNamespace(args=arguments)  # noqa: E731
    end = bpe.special_tokens["<|endoftext|>"]
    (log_prob, greedy), (empty, _) = adapter.loglikelihood([ask("Mia", " is"), ask("", "Mia")])
    assert log_prob < 0 and empty < 0 and isinstance(greedy, bool)
    settings = [{"until": ["."]}, {"until": [], "max_gen_toks": 3}, {}]
    told = adapter.generate_until([ask("Mia is", one) for one in settings])
    options = {"sampling": Sampling(temperature=0), "tokenizer": bpe, "stop_tokens": [end]}
    prompt = [[end, *bpe.encode("Mia is")]]
    expected = [
        generate(lm, prompt, max_new_tokens=5, stop_strings=["."], **options)[0].text,
        generate(lm, prompt, max_new_tokens=3, **options)[0].text,
        generate(lm, prompt, max_new_tokens=5, **options)[0].text,
    ]
    assert told == expected
    long = "Mia is here. " * 60
    assert len(adapter.generate_until([ask(long, {})])) == 1
    assert adapter.loglikelihood([ask(long, " Mia")])[0][0] < 0
    assert adapter.loglikelihood_rolling([ask("")]) == [0.0]


def test_the_harness_loads_only_where_it_is_used() -> None:
    code = "import sys, llmbook.evaluation; print('lm_eval' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_without_the_extra_one_is_told_which(
    monkeypatch: pytest.MonkeyPatch, lm: TransformerLM, bpe: BPETokenizer
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'llmbook\[eval\]'"):
        LMEvalAdapter(lm, bpe)


def test_tasks_that_are_not_there(lm: TransformerLM, bpe: BPETokenizer, tasks, tmp_path) -> None:
    folder, *_ = tasks
    with pytest.raises(ValueError, match=r"tasks: expected some of those in .*facts.*, got 'none'"):
        run_lm_eval(lm, bpe, folder, ["none"])
    with pytest.raises(ValueError, match="tasks: expected a list of names"):
        run_lm_eval(lm, bpe, folder, "facts")  # type: ignore[arg-type]
    task = write_lm_eval_task(tmp_path, "gone", "loglikelihood_rolling", [{"text": "a"}])
    (tmp_path / "gone.jsonl").unlink()
    with pytest.raises(ValueError, match=r"tasks: expected the data of 'gone' in .*, got no such"):
        run_lm_eval(lm, bpe, tmp_path, ["gone"])
    assert json.loads(task.read_text())["output_type"] == "loglikelihood_rolling"
    with pytest.raises(ValueError, match="it sees the future"):
        run_lm_eval(Seer(lm.config), bpe, folder, ["facts"])


def test_running_the_harness_leaves_no_trace(
    lm: TransformerLM, bpe: BPETokenizer, tasks, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, *_ = tasks
    before, offline = torch.get_rng_state(), os.environ.get("HF_DATASETS_OFFLINE")
    run_lm_eval(lm, bpe, folder, ["spoken"])
    assert torch.equal(torch.get_rng_state(), before)
    assert os.environ.get("HF_DATASETS_OFFLINE") == offline
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folder": "nowhere"}, "folder: expected one that exists"),
        ({"name": "a b"}, "name: expected letters"),
        ({"kind": "essay"}, "kind: expected .*multiple_choice"),
        ({"items": []}, "items: expected at least one"),
        ({"items": [{"text": "x"}, {}]}, "items: expected text in each"),
    ],
)
def test_tasks_that_cannot_be_written(changes: dict, message: str, tmp_path) -> None:
    good = {"folder": tmp_path, "name": "a", "kind": "loglikelihood_rolling"}
    good["items"] = [{"text": "x"}]
    with pytest.raises(ValueError, match=message):
        write_lm_eval_task(**good | changes)


def test_story_form_is_the_default(lm: TransformerLM, bpe: BPETokenizer) -> None:
    questions = make_questions(WORLD, "confidential", "held_out")
    default = choice_log_probs(lm, bpe, WORLD, questions)
    same = choice_log_probs(lm, bpe, WORLD, questions, STORY_FORM)
    other = choice_log_probs(lm, bpe, WORLD, questions, replace(STORY_FORM, before_reply=""))
    assert all((a[0] == b[0]).all() for a, b in zip(default, same, strict=True))
    assert not all((a[0] == b[0]).all() for a, b in zip(default, other, strict=True))
