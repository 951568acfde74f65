"""Scores of texts and choices, answers, intervals and tests of chapter 16."""

import itertools
import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmbook.evaluation import (
    STORY_FORM,
    Answer,
    BiasedJudge,
    EvaluationReport,
    Interval,
    LMEvalAdapter,
    QuestionForm,
    Result,
    TextScores,
    as_numbers,
    beliefs,
    bits_per_byte,
    bootstrap,
    bradley_terry,
    calibration,
    centered_accuracy,
    chance_of_consistency,
    check_causal,
    choice_log_probs,
    clustered_standard_error,
    confidence_interval,
    encode_pairs,
    evaluate,
    exact_match,
    fit_temperature,
    items_needed,
    majority_at_k,
    mean_interval,
    next_log_probs,
    normal_quantile,
    order_test,
    paired_test,
    parse_answer,
    pass_at_k,
    perplexity,
    plan_windows,
    possible_replies,
    rows_log_probs,
    rule_of_three,
    run_lm_eval,
    score_choices,
    score_continuations,
    score_texts,
    sign_test,
    standard_error,
    story_prompt,
    t_quantile,
    window_log_probs,
    write_lm_eval_task,
)
from llmbook.generation import Sampling, generate
from llmbook.model import ModelConfig, TransformerLM
from llmbook.tinyworld import TinyWorld, judge_reply, make_questions
from llmbook.tokenizer import BPETokenizer, train_bpe
from llmbook.training import documents_score

TEXTS = ["She lives in the barn.", "He lives in the old mill by the river.", "Zoë 抹茶", "A"]
BPE = train_bpe(TEXTS * 3, 300)
BYTES = BPETokenizer.from_merges([])
END = BPE.special_tokens["<|endoftext|>"]


def make_model(vocab_size: int = BPE.vocab_size, context_length: int = 64) -> TransformerLM:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "n_layers": 2, "n_heads": 2, "context_length": context_length}
    return TransformerLM(ModelConfig(vocab_size=vocab_size, **sizes)).double()


MODEL = make_model()


def by_hand(ids: list[int], model: nn.Module = MODEL) -> list[float]:
    """log q of each id after the first, one call for each."""
    found = []
    for place in range(1, len(ids)):
        logits = model(torch.tensor([ids[:place]]))[0, -1]
        found.append(logits.log_softmax(-1)[ids[place]].item())
    return found


class TestTexts:
    def test_log_probs_are_those_one_by_one(self):
        rows = [[END, 5, 6, 7], [END, 9], [3, 4, 5, 6, 7, 8, 9]]
        for batch_tokens in (1, 9, 4096):
            found = rows_log_probs(MODEL, rows, batch_tokens=batch_tokens)
            for row, log_probs in zip(rows, found, strict=True):
                assert log_probs.tolist() == pytest.approx(by_hand(row), abs=1e-9)
        assert next_log_probs(MODEL, torch.tensor([rows[0]]))[0].tolist() == pytest.approx(
            by_hand(rows[0])
        )

    def test_models_that_return_records(self):
        class Record(nn.Module):
            config = SimpleNamespace(max_position_embeddings=64, vocab_size=BPE.vocab_size)

            def __init__(self) -> None:
                super().__init__()
                self.inner = MODEL

            def forward(self, ids: torch.Tensor) -> SimpleNamespace:
                return SimpleNamespace(logits=self.inner(ids))

        assert bits_per_byte(Record(), BPE, TEXTS) == bits_per_byte(MODEL, BPE, TEXTS)

    def test_nats_tokens_bytes(self):
        scores = score_texts(MODEL, BPE, TEXTS)
        for place, text in enumerate(TEXTS):
            ids = [END, *BPE.encode(text), END]
            assert scores.nats[place] == pytest.approx(-sum(by_hand(ids)), abs=1e-9)
            assert scores.n_tokens[place] == len(ids) - 1
            assert scores.n_bytes[place] == len(text.encode())
        nats, n_tokens, n_bytes = (sum(column) for column in scores)
        assert perplexity(MODEL, BPE, TEXTS) == pytest.approx(math.exp(nats / n_tokens))
        assert bits_per_byte(MODEL, BPE, TEXTS) == pytest.approx(nats / math.log(2) / n_bytes)

    def test_the_end_counts_unless_it_shall_not(self):
        with_end, without = (score_texts(MODEL, BPE, TEXTS, end=end) for end in (True, False))
        assert (with_end.n_tokens - without.n_tokens).tolist() == [1] * len(TEXTS)
        assert (with_end.nats > without.nats).all()

    def test_a_start_token_is_there_once(self):
        class Starting:
            vocab_size, special_tokens = BPE.vocab_size, BPE.special_tokens

            def encode(self, text: str) -> list[int]:
                return [END, *BPE.encode(text)]

        given = score_texts(MODEL, Starting(), TEXTS)
        assert given.nats.tolist() == score_texts(MODEL, BPE, TEXTS).nats.tolist()
        assert given.n_tokens.tolist() == score_texts(MODEL, BPE, TEXTS).n_tokens.tolist()
        pairs = (
            encode_pairs(Starting(), "She lives", [" in"]),
            encode_pairs(BPE, "She lives", [" in"]),
        )
        assert pairs[0] == pairs[1]

    @pytest.mark.parametrize("size", [4, 64])
    def test_without_overlap_it_is_documents_score(self, size):
        model = make_model(context_length=size)
        texts = [TEXTS[0][:n] for n in range(1, 20)] if size == 4 else TEXTS
        # The last window is filled up with context here, and is short there: let there be none.
        texts = [text for text in texts if size > 4 or (len(BPE.encode(text)) + 1) % size == 0]
        scores = score_texts(model, BPE, texts, stride=size)
        bits, n_bytes = documents_score(model, BPE, texts)
        assert scores.nats.sum() / math.log(2) == pytest.approx(bits, rel=1e-6)
        assert scores.n_bytes.sum() == n_bytes

    def test_an_empty_text_counts_its_end_only(self):
        scores = score_texts(MODEL, BPE, ["", "A"])
        assert scores.n_tokens[0] == 1 and scores.n_bytes[0] == 0 and scores.nats[0] > 0
        assert score_texts(MODEL, BPE, ["", "A"], end=False).nats[0] == 0
        with pytest.raises(ValueError, match="texts: expected at least one byte, got none"):
            bits_per_byte(MODEL, BPE, [""])

    def test_empty_test_set(self):
        for function in (perplexity, bits_per_byte, score_texts):
            with pytest.raises(ValueError, match="texts: expected at least one text, got none"):
                function(MODEL, BPE, [])

    def test_the_model_is_left_as_it_was(self):
        MODEL.train()
        try:
            state = torch.get_rng_state()
            score_texts(MODEL, BPE, TEXTS)
            assert MODEL.training and torch.equal(state, torch.get_rng_state())
        finally:
            MODEL.eval()


class TestWindows:
    @given(st.integers(2, 60), st.integers(1, 12), st.data())
    @settings(max_examples=100, deadline=None)
    def test_each_id_once_with_its_context(self, n_ids, size, data):
        stride = data.draw(st.integers(1, size))
        windows = plan_windows(n_ids, size, stride)
        scored = [place for w in windows for place in range(w.first, w.end)]
        assert scored == list(range(1, n_ids))
        for window in windows:
            assert window.end - window.start <= size + 1 and window.start < window.first
        for window in windows[1:]:
            assert window.first - window.start >= size + 1 - stride
            assert window.end - window.first <= stride

    def test_windows_are_those_by_hand(self):
        ids = [END, *range(1, 12)]
        model = make_model(context_length=5)
        found = window_log_probs(model, ids, stride=2).tolist()
        for place in range(1, len(ids)):
            window = next(w for w in plan_windows(12, 5, 2) if w.first <= place < w.end)
            assert found[place - 1] == pytest.approx(
                by_hand(ids[window.start : place + 1], model)[-1], abs=1e-9
            )

    def test_the_default_stride_is_half_the_context(self):
        model, ids = make_model(context_length=6), [END, *range(1, 20)]
        assert torch.equal(window_log_probs(model, ids), window_log_probs(model, ids, stride=3))
        texts = [" ".join(TEXTS)]
        default, half = score_texts(model, BPE, texts), score_texts(model, BPE, texts, stride=3)
        assert default.nats.tolist() == half.nats.tolist()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"stride": 65}, "stride: expected at most context_length = 64, got 65"),
            ({"stride": 0}, "stride: expected at least 1, got 0"),
            ({"context_length": 65}, "context_length: expected at most the model's 64, got 65"),
            ({"start": "<s>"}, "start: expected one of <|endoftext|>, got '<s>'"),
        ],
    )
    def test_refused(self, options, message):
        with pytest.raises(ValueError) as error:
            score_texts(MODEL, BPE, TEXTS, **options)
        assert message in str(error.value)


class Leaking(nn.Module):
    """Adds to each position's logits a little of a position ``ahead``."""

    def __init__(self, ahead: int, share: float):
        super().__init__()
        self.inner, self.config, self.ahead, self.share = MODEL, MODEL.config, ahead, share

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.inner(ids)
        return logits + self.share * logits.roll(-self.ahead, dims=1)


class TestCausality:
    def test_a_causal_model_passes(self):
        check_causal(MODEL)
        check_causal(make_model(context_length=2), length=2)

    @pytest.mark.parametrize("ahead", [1, 2, 7])
    @pytest.mark.parametrize("share", [1.0, 0.05])
    def test_one_that_sees_the_future_is_refused(self, ahead, share):
        with pytest.raises(ValueError, match=r"model: expected logits before token .* Leaking"):
            check_causal(Leaking(ahead, share))

    def test_scores_ask_first(self):
        with pytest.raises(ValueError, match="it sees the future"):
            bits_per_byte(Leaking(1, 1.0), BPE, TEXTS)

    def test_the_whole_row_in_a_norm(self):
        class Whole(Leaking):
            def forward(self, ids: torch.Tensor) -> torch.Tensor:
                logits = self.inner(ids)
                return logits / logits.std(dim=(1, 2), keepdim=True)

        with pytest.raises(ValueError, match="it sees the future"):
            check_causal(Whole(1, 0.0))

    def test_nan_is_no_proof(self):
        class Broken(Leaking):
            def forward(self, ids: torch.Tensor) -> torch.Tensor:
                return self.inner(ids) * torch.nan

        with pytest.raises(ValueError, match="model: "):
            check_causal(Broken(1, 0.0))


class TestChoices:
    CONTEXT, CHOICES = "She lives in the", (" barn", " old mill", " river")

    def test_batched_equals_one_by_one(self):
        found = score_choices(MODEL, BPE, self.CONTEXT, self.CHOICES, normalization="none")
        for place, choice in enumerate(self.CHOICES):
            before, ids = [END, *BPE.encode(self.CONTEXT)], BPE.encode(choice)
            expected = sum(by_hand(before + ids)[-len(ids) :])
            assert found.log_probs[place] == pytest.approx(expected, abs=1e-9)
            assert found.n_tokens[place] == len(ids)
        assert found.best == found.log_probs.argmax()

    def test_normalizations(self):
        choices = [" barn", " Zoë 抹茶"]
        found = {
            name: score_choices(MODEL, BPE, "She", choices, normalization=name)
            for name in ("none", "token", "character", "byte", "unconditional")
        }
        total = found["none"].scores
        assert found["token"].scores == pytest.approx(total / found["none"].n_tokens)
        assert found["character"].scores == pytest.approx(total / [4, 6])
        assert found["byte"].scores == pytest.approx(total / [4, 11])
        alone = score_choices(MODEL, BPE, "", choices, normalization="none").scores
        assert found["unconditional"].scores == pytest.approx(total - alone)
        assert score_choices(MODEL, BPE, "She", choices).scores == pytest.approx(
            found["byte"].scores
        )
        neutral = score_choices(
            MODEL, BPE, "She", choices, normalization="unconditional", neutral="A"
        )
        given = score_choices(MODEL, BPE, "A", choices, normalization="none").scores
        assert neutral.scores == pytest.approx(total - given)

    def test_a_space_goes_over_to_the_answer(self):
        joint = encode_pairs(BPE, "She lives in the ", ["barn"])
        assert joint == encode_pairs(BPE, "She lives in the", [" barn"])
        apart = encode_pairs(BPE, "She lives in the ", ["barn"], seam="separate")
        assert apart == ([END, *BPE.encode("She lives in the ")], [BPE.encode("barn")])
        assert apart != joint

    def test_a_token_across_the_seam_belongs_to_the_answer(self):
        tokenizer = train_bpe(["unhappy happy ununun"] * 5, 280)
        context, whole = "un", tokenizer.encode("unhappy")
        assert whole[: len(tokenizer.encode(context))] != tokenizer.encode(context)
        before, (ids, other) = encode_pairs(tokenizer, context, ["happy", "x"])
        start = tokenizer.special_tokens["<|endoftext|>"]
        assert before + ids == [start, *whole]
        assert before + other == [start, *tokenizer.encode("unx")], "both share the same context"

    @given(st.text(max_size=12), st.lists(st.text(min_size=1), min_size=1, max_size=3, unique=True))
    @settings(max_examples=100, deadline=None)
    def test_joint_ids_are_those_of_the_text(self, context, endings):
        endings = [ending for ending in endings if ending.strip()]
        if not endings or len({e.encode("utf-8", "replace") for e in endings}) < len(endings):
            return
        before, ids = encode_pairs(BPE, context, endings)
        for ending, rest in zip(endings, ids, strict=True):
            assert before + rest == [END, *BPE.encode(context + ending)] and rest
            assert before[0] == END

    def test_prefixes_are_refused_unless_something_ends_them(self):
        with pytest.raises(ValueError, match=r"choices: .* got ' a' and ' ab'"):
            score_choices(MODEL, BYTES, "1", [" a", " ab"], context_length=8)
        found = score_choices(MODEL, BYTES, "1", [" a", " ab"], ending=".", context_length=8)
        assert found.n_tokens.tolist() == [3, 4]

    @pytest.mark.parametrize(
        ("choices", "message"),
        [
            ([" a"], "choices: expected at least 2, got [' a']"),
            ([], "choices: expected at least 2, got []"),
            ([" a", ""], "choices: expected texts that say something, got '' at 1"),
            ([" a", "  "], "choices: expected texts that say something, got '  ' at 1"),
            ([" a", " b", " a"], "choices: expected each once, got ' a' 2 times"),
            (" a", "choices: expected several texts, got ' a'"),
        ],
    )
    def test_refused(self, choices, message):
        with pytest.raises(ValueError) as error:
            score_choices(MODEL, BPE, "She", choices)
        assert str(error.value).startswith(message)

    def test_too_long_is_refused_or_cut_for_all_alike(self):
        context, choices = "She lives in the old mill by the river", [" A", " barn by"]
        before, ids = encode_pairs(BPE, context, choices)
        longest = max(map(len, ids))
        with pytest.raises(ValueError, match=f"context: .* too_long='truncate', got {len(before)}"):
            score_choices(MODEL, BPE, context, choices, context_length=8)
        cut = score_choices(
            MODEL,
            BPE,
            context,
            choices,
            context_length=8,
            too_long="truncate",
            normalization="none",
        )
        kept = before[-(9 - longest) :]
        for place, one in enumerate(ids):
            expected = sum(by_hand(kept + one)[-len(one) :])
            assert cut.log_probs[place] == pytest.approx(expected, abs=1e-9)
        with pytest.raises(ValueError, match=r"choices: expected at most 1 tokens .* got"):
            score_choices(MODEL, BPE, context, choices, context_length=1, too_long="truncate")

    def test_greedy_tells_whether_the_model_would_have_said_it(self):
        ids = [END]
        for _ in range(3):
            ids.append(int(MODEL(torch.tensor([ids]))[0, -1].argmax()))
        other = (ids[-1] + 1) % BPE.vocab_size
        found = score_continuations(MODEL, [(ids[:1], ids[1:]), (ids[:1], [*ids[1:-1], other])])
        assert [one.is_greedy for one in found] == [True, False]
        assert found[0].n_tokens == 3

    def test_centered(self):
        assert centered_accuracy(0.25, 0.25) == 0 and centered_accuracy(1.0, 0.25) == 1
        assert centered_accuracy(0.0, 0.5) == -1


class TestAnswers:
    @pytest.mark.parametrize(
        ("kind", "text", "expected"),
        [
            ("letter", "The answer is (B).", "B"),
            ("letter", "Answer: C", "C"),
            ("letter", "answer is **D**", "D"),
            ("letter", "(A) is wrong, so it must be (C)", "C"),
            ("letter", "(A) is tempting. The answer is B, not (C).", "B"),
            ("letter", "B. Because the sky is blue.", "B"),
            ("letter", "b", "B"),
            ("letter", " (d). ", "D"),
            ("letter", "A dog is an animal.", None),
            ("letter", "I do not know.", None),
            ("letter", "The answer is E", None),
            ("letter", "", None),
            ("number", "The total is 1,234,567.", "1234567"),
            ("number", "$1,234.50", "1234.5"),
            ("number", "-3", "-3"),
            ("number", "−3.0", "-3"),
            ("number", "+7", "7"),
            ("number", "5-3", "3"),
            ("number", "(2)-3", "3"),
            ("number", "-$2.50", "-2.5"),
            ("number", "1, 2, 3", "3"),
            ("number", ".5", "0.5"),
            ("number", "007", "7"),
            ("number", "100", "100"),
            ("number", "-0.0", "0"),
            ("number", "3/4 of it", "3/4"),
            ("number", "6/4", "3/2"),
            ("number", "2.5e3 meters", "2500"),
            ("number", "about 50%", "50"),
            ("number", "GPT4 said 12 to H2O", "12"),
            ("number", "5/0", "0"),
            ("number", "1e999999999", None),
            ("number", "9" * 5000, None),
            ("number", "none", None),
            ("boxed", r"\boxed{42}", "42"),
            ("boxed", r"\boxed{1} and \boxed{ \frac{a}{b} } end}", r"\frac{a}{b}"),
            ("boxed", r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
            ("boxed", r"\fbox{x}", "x"),
            ("boxed", r"\boxed{1} then \boxed{2", None),
            ("boxed", "boxed{1}", None),
        ],
    )
    def test_parse(self, kind, text, expected):
        assert parse_answer(text, kind) == expected

    def test_letters(self):
        assert parse_answer("The answer is E", "letter", letters="ABCDE") == "E"
        with pytest.raises(ValueError, match="letters: expected letters such as 'ABCD', got ''"):
            parse_answer("A", "letter", letters="")

    @given(st.integers(-(10**12), 10**12))
    def test_numbers_with_commas(self, number):
        assert parse_answer(f"so it is {number:,}.", "number") == str(number)

    @pytest.mark.parametrize(
        ("text", "answer", "kind", "expected"),
        [
            ("  The   Barn. ", "the barn", None, True),
            ("barn", "mill", None, False),
            ("It is 0.50", "1/2", "number", True),
            ("1,000", "1000.0", "number", True),
            ("no idea", "3", "number", False),
            ("the answer is B", "B", "letter", True),
            (r"\boxed{x+1}", "x+1", "boxed", True),
            (r"\boxed{x+1}", r"so \boxed{x+1}", "boxed", True),
            (r"\boxed{x}", "y", "boxed", False),
        ],
    )
    def test_exact_match(self, text, answer, kind, expected):
        assert exact_match(text, answer, kind) is expected

    def test_an_answer_that_is_none(self):
        with pytest.raises(ValueError, match="answer: expected a number, got 'many'"):
            exact_match("3", "many", "number")


class TestAttempts:
    @given(st.integers(1, 9), st.data())
    @settings(max_examples=60, deadline=None)
    def test_pass_at_k_over_all_choices(self, n, data):
        c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
        right = [True] * c + [False] * (n - c)
        ways = [any(chosen) for chosen in itertools.combinations(right, k)]
        assert pass_at_k(n, c, k) == pytest.approx(sum(ways) / len(ways))

    @given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=7), st.data())
    @settings(max_examples=100, deadline=None)
    def test_majority_over_all_choices(self, answers, data):
        k, total, ways = data.draw(st.integers(1, len(answers))), 0.0, 0
        for chosen in itertools.combinations(answers, k):
            votes = {one: chosen.count(one) for one in chosen if one is not None}
            most = [one for one in votes if votes[one] == max(votes.values())]
            total, ways = total + ("a" in most) / max(1, len(most)), ways + 1
        assert majority_at_k(answers, "a", k) == pytest.approx(total / ways)

    def test_large_numbers(self):
        assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)
        assert pass_at_k(200, 0, 100) == 0 and pass_at_k(200, 150, 100) == 1

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: pass_at_k(5, 2, 6), "k: expected at most n = 5, got 6"),
            (lambda: pass_at_k(5, 6, 2), "c: expected at most n = 5, got 6"),
            (lambda: pass_at_k(0, 0, 1), "n: expected at least 1, got 0"),
            (lambda: pass_at_k(5, 2, 0), "k: expected at least 1, got 0"),
            (lambda: majority_at_k(["a"], "a", 2), "k: expected at most len(answers) = 1, got 2"),
            (lambda: majority_at_k([], "a", 1), "answers: expected at least one answer, got []"),
        ],
    )
    def test_refused(self, call, message):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == message


class TestIntervals:
    def test_quantiles_against_scipy(self):
        stats = pytest.importorskip("scipy.stats")
        for level in (0.5, 0.9, 0.95, 0.999):
            assert normal_quantile(level) == pytest.approx(stats.norm.ppf((1 + level) / 2))
            for degrees in (1, 2, 3, 4, 5, 29, 400, 401, 10_000):
                expected = stats.t.ppf((1 + level) / 2, degrees)
                assert t_quantile(level, degrees) == pytest.approx(expected, rel=1e-6)

    @given(st.integers(1, 300), st.data(), st.sampled_from([0.8, 0.95, 0.99]))
    @settings(max_examples=60, deadline=None)
    def test_wilson_solves_its_equation(self, n, data, level):
        c = data.draw(st.integers(0, n))
        found, z = confidence_interval(c, n, level), normal_quantile(level)
        assert 0 <= found.low <= c / n <= found.high <= 1 and found.level == level
        for p in (found.low, found.high):
            if 0 < p < 1:
                assert (c / n - p) ** 2 == pytest.approx(z**2 * p * (1 - p) / n, abs=1e-12)

    def test_wilson_against_scipy(self):
        stats = pytest.importorskip("scipy.stats")
        for c, n in ((0, 10), (10, 10), (3, 17), (840, 1000)):
            theirs = stats.binomtest(c, n).proportion_ci(method="wilson")
            ours = confidence_interval(c, n)
            assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)

    def test_coverage(self):
        def coverage(p: float, method: str) -> float:
            inside = [c for c in range(31) if p in confidence_interval(c, 30, method=method)]
            return sum(math.comb(30, c) * p**c * (1 - p) ** (30 - c) for c in inside)

        assert coverage(0.97, "wilson") > 0.9 > 0.7 > coverage(0.97, "wald")
        assert confidence_interval(30, 30, method="wald").margin == 0

    def test_a_readable_text(self):
        assert str(confidence_interval(84, 100)) == "0.840 [0.756, 0.899]"
        assert Interval(0.5, 0.4, 0.6).level == 0.95 and 0.45 in Interval(0.5, 0.4, 0.6)
        assert 0.7 not in Interval(0.5, 0.4, 0.6)

    def test_mean_against_scipy(self):
        stats = pytest.importorskip("scipy.stats")
        values = [0.61, 0.64, 0.58, 0.7]
        error = stats.sem(values)
        low, high = stats.t.interval(0.9, 3, loc=np.mean(values), scale=error)
        found = mean_interval(values, 0.9)
        assert (found.low, found.high) == pytest.approx((low, high))
        assert standard_error(values) == pytest.approx(error)

    def test_lists_arrays_and_tensors(self):
        for values in ([True, False, True], np.array([1, 0, 1]), torch.tensor([1.0, 0.0, 1.0])):
            assert as_numbers(values).tolist() == [1, 0, 1]

    def test_clusters(self):
        values = np.random.default_rng(0).normal(size=40)
        assert clustered_standard_error(values, range(40)) == pytest.approx(standard_error(values))
        copied = np.repeat(values, 5)
        found = clustered_standard_error(copied, np.repeat(np.arange(40), 5))
        assert found == pytest.approx(standard_error(values))
        assert mean_interval(copied, clusters=np.repeat(np.arange(40), 5).tolist()).margin == (
            pytest.approx(mean_interval(values).margin)
        )
        shuffled = np.random.default_rng(1).permutation(200)
        clusters = np.repeat(np.arange(40), 5)[shuffled]
        assert clustered_standard_error(copied[shuffled], clusters) == pytest.approx(found)

    def test_rule_of_three(self):
        for n, level in ((1, 0.95), (100, 0.95), (30, 0.99)):
            assert (1 - rule_of_three(n, level)) ** n == pytest.approx(1 - level)
        assert 2.9 < 1000 * rule_of_three(1000) < 3

    def test_bootstrap(self):
        values = np.random.default_rng(0).normal(size=200)
        found, exact = bootstrap(values), mean_interval(values)
        assert found.estimate == pytest.approx(values.mean())
        assert found.margin == pytest.approx(exact.margin, rel=0.1)
        assert bootstrap(values) == found and bootstrap(values, seed=1) != found
        clusters = np.repeat(np.arange(20), 10)
        copied = np.repeat(values[:20], 10)
        assert bootstrap(copied, clusters=clusters).margin > 2.5 * bootstrap(copied).margin
        pairs = np.stack([values + 5, values + 10], axis=1)
        ratio = bootstrap(pairs, lambda rows: rows[:, 0].sum() / rows[:, 1].sum())
        assert ratio.estimate == pytest.approx(pairs[:, 0].sum() / pairs[:, 1].sum())

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: confidence_interval(3, 0), "n: expected at least 1, got 0"),
            (lambda: confidence_interval(3, 2), "successes: expected at most n = 2, got 3"),
            (lambda: confidence_interval(1, 2, 95.0), "level: expected a number between 0 and 1, "),
            (lambda: mean_interval([]), "values: expected at least 2 numbers in one dimension, "),
            (lambda: mean_interval([1, math.nan]), "values: expected finite numbers, got nan"),
            (
                lambda: clustered_standard_error([1, 2], [0]),
                "clusters: expected one for each of 2 values, got 1",
            ),
            (
                lambda: clustered_standard_error([1, 2], [0, 0]),
                "clusters: expected at least 2 different ones, got 1",
            ),
        ],
    )
    def test_refused(self, call, message):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value).startswith(message)


class TestPairs:
    @given(st.integers(0, 40), st.integers(0, 40))
    def test_sign_test_against_scipy(self, wins, losses):
        stats = pytest.importorskip("scipy.stats")
        expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
        assert sign_test(wins, losses) == pytest.approx(expected)

    def test_mcnemar_is_the_default_for_right_and_wrong(self):
        a, b = [1] * 18 + [0] * 8 + [1] * 50, [0] * 18 + [1] * 8 + [1] * 50
        found = paired_test(a, b)
        assert (found.wins, found.losses, found.n, found.method) == (18, 8, 76, "mcnemar")
        assert found.p_value == sign_test(18, 8)
        assert found.difference == mean_interval(np.subtract(a, b))
        assert str(found).startswith("+0.132 [") and "18 wins and 8 losses in 76 items" in str(
            found
        )
        back = paired_test(b, a)
        assert back.p_value == found.p_value and back.difference.estimate < 0

    def test_permutations_exactly(self):
        differences = np.array([0.5, 1.0, -0.25, 2.0, 0.75, 0.0])
        signs = itertools.product((-1, 1), repeat=6)
        sums = [abs(np.dot(s, differences)) for s in signs]
        expected = np.mean([total >= differences.sum() - 1e-12 for total in sums])
        found = paired_test(differences, np.zeros(6))
        assert found.method == "permutation" and found.p_value == pytest.approx(expected)

    def test_drawn_permutations(self):
        random_numbers = np.random.default_rng(0)
        a, b = random_numbers.random(60), random_numbers.random(60)
        found = paired_test(a, b)
        assert found.p_value == paired_test(a, b).p_value
        stats = pytest.importorskip("scipy.stats")
        assert found.p_value == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.03)
        assert paired_test(a + 10, b, n_resamples=99).p_value == 0.01  # never zero

    def test_uniform_without_a_difference(self):
        random_numbers, below = np.random.default_rng(0), 0
        for _ in range(200):
            a, b = random_numbers.random((2, 12)).round(2)
            below += paired_test(a, b).p_value < 0.1
        assert 5 <= below <= 35

    def test_clusters_are_flipped_whole(self):
        a = np.repeat([0.2, 0.3, -0.1, 0.4], 25)
        found = paired_test(a, np.zeros(100), clusters=np.repeat(np.arange(4), 25).tolist())
        assert found.p_value == paired_test([0.2, 0.3, -0.1, 0.4], [0, 0, 0, 0]).p_value == 0.25
        right = paired_test([1, 1, 0, 0], [0, 0, 0, 0], clusters=[0, 0, 1, 1])
        assert right.method == "permutation"

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: paired_test([1, 0], [1, 0, 1]), "b: expected as many scores as a, 2, got 3"),
            (lambda: paired_test([], []), "a: expected at least 2 numbers in one dimension, "),
            (
                lambda: paired_test([0.5, 1], [1, 1], method="mcnemar"),
                "method: expected 'permutation' for scores other than 0 and 1",
            ),
        ],
    )
    def test_refused(self, call, message):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value).startswith(message)

    def test_items_needed_by_simulation(self):
        n = items_needed(0.2, accuracy=0.6)
        draws = random.Random(0)
        found = 0
        for _ in range(400):
            a, b = (sum(draws.random() < p for _ in range(n)) / n for p in (0.7, 0.5))
            error = math.sqrt((a * (1 - a) + b * (1 - b)) / n)
            found += abs(a - b) > 1.96 * error
        assert 0.74 < found / 400 < 0.86

    def test_items_needed(self):
        assert items_needed(0.02) == items_needed(0.02, accuracy=0.5, level=0.95, power=0.8)
        assert items_needed(0.02, disagreement=0.1) < items_needed(0.02, accuracy=0.9)
        with pytest.raises(ValueError, match=r"disagreement: expected at least the difference 0.2"):
            items_needed(0.2, disagreement=0.1)
        with pytest.raises(
            ValueError, match=r"difference: expected a finite number above 0, got 0"
        ):
            items_needed(0.0)


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
    items = tuple(f"{name} {place}" for place, name in enumerate(clusters))
    return Result("facts", "choice", tuple(outcomes), tuple(clusters), items, 0.1, 1.0, {})


def test_intervals_are_wider_where_clusters_go_together() -> None:
    apart = result([1, 0] * 20, "".join(chr(65 + i) for i in range(40))).interval
    together = result([1] * 20 + [0] * 20, "a" * 10 + "b" * 10 + "c" * 10 + "d" * 10).interval
    assert apart.estimate == together.estimate == 0.5
    assert together.margin > 1.5 * apart.margin
    all_right = result([1] * 10, "ab" * 5).interval
    assert all_right == confidence_interval(2, 2)  # two clusters, which may be of one kind each
    assert result([0] * 10, "abcde" * 2).interval == confidence_interval(0, 5)


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
    same = better.compare(better)["facts/choice"]
    assert (same.p_value, same.wins, same.losses) == (1.0, 0, 0)
    fewer = EvaluationReport(
        (result([0] * 5 + [1], names[:6]),), settings
    )  # what another form puts
    assert better.compare(fewer)["facts/choice"].wins == 5
    strange = EvaluationReport((result([0] * 3, "xyz"),), settings)
    with pytest.raises(ValueError, match="other: expected a report with some of the same items"):
        better.compare(strange)


def test_equal_scores_are_no_evidence() -> None:
    assert paired_test([0.5, 0.5, 1.2], [0.5, 0.5, 1.2]).p_value == 1.0


def test_answers_are_letters_of_the_question() -> None:
    assert exact_match("Answer: I think it is (C).", "C", "letter")
    assert not exact_match("Answer: (E).", "D", "letter", letters="ABCDE")


def test_what_a_model_reads_at_once_bounds_the_test_of_causality() -> None:
    sizes = {"vocab_size": 11, "context_length": 8, "d_model": 8, "n_layers": 1, "n_heads": 1}
    check_causal(TransformerLM(ModelConfig(**sizes)))


def test_no_token_has_no_perplexity() -> None:
    nothing = TextScores(np.zeros(1), np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))
    with pytest.raises(ValueError, match="texts: expected at least one token, got none"):
        _ = nothing.perplexity


def test_a_judge_of_very_long_answers() -> None:
    judge = BiasedJudge(length=0.03)
    brief, wordy = Answer("a", True, False), Answer("a" * 24_000, True, False)
    assert judge.prefers_first(brief, wordy) == 0.0 and judge.prefers_first(wordy, brief) == 1.0


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
    before = os.environ.get("HF_DATASETS_OFFLINE")
    found = run_lm_eval(lm, bpe, folder, ["facts", "cloze", "spoken", "texts"])
    assert os.environ.get("HF_DATASETS_OFFLINE") == before
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
