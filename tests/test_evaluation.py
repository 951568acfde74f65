"""Scores of texts and choices, answers, intervals and tests of chapter 16."""

import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmbook.evaluation import (
    Interval,
    as_numbers,
    bits_per_byte,
    bootstrap,
    centered_accuracy,
    check_causal,
    clustered_standard_error,
    confidence_interval,
    encode_pairs,
    exact_match,
    items_needed,
    majority_at_k,
    mean_interval,
    next_log_probs,
    normal_quantile,
    paired_test,
    parse_answer,
    pass_at_k,
    perplexity,
    plan_windows,
    rows_log_probs,
    rule_of_three,
    score_choices,
    score_continuations,
    score_texts,
    sign_test,
    standard_error,
    t_quantile,
    window_log_probs,
)
from llmbook.model import ModelConfig, TransformerLM
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
