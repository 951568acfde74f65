"""WordPiece and Unigram of chapter 06: parity with `tokenizers`, sums against lists, bad input."""

import itertools
import json
import math
import pickle
import random
from collections import Counter

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmbook import subwords
from llmbook.corpus import Document
from llmbook.subwords import (
    TrainingStep,
    UnigramTokenizer,
    WordPieceTokenizer,
    merge_gain,
    renyi_efficiency,
    split_words,
    train_unigram,
    train_wordpiece,
)

tokenizers = pytest.importorskip("tokenizers")

TEXTS = [
    "The cat sat on the mat, and the dog unlocked the unlocked door.",
    "Walking, talking; unlocking the locks: walked, talked, locked!",
    "A tokenizer's tokens are tokenized. Don't untokenize the tokenization (yet).",
    "Ein Mäuschen läuft über die Straße: größer, süßer, schöner.",
    "Кошка сидит на окне. Кошки сидят на окнах. 猫が窓に座っている。",
] * 3

# Characters that have surprised tokenizers: marks, joiners, controls, odd spaces, late punctuation.
AWKWARD = "aeinstTHE .,'#▁-_<>[]0x41\t\n\r\x0b\x1c\x85\u00a0\u2028\u3000\u200b\u200d\ufe0f\u0301"
AWKWARD += "éßσΣİıﬁ猫が🦉👩🏳\u061d\u2e5d\u166d\u111c9½"
awkward = st.text(st.sampled_from(AWKWARD), max_size=30)
anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
lines = awkward | anything
relaxed = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def untyped():
    """Switch jaxtyping's checks off, as they are for a reader, to see our own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def wordpiece() -> WordPieceTokenizer:
    return train_wordpiece(TEXTS, 220)


@pytest.fixture(scope="module")
def unigram() -> UnigramTokenizer:
    return train_unigram(TEXTS, 420)


@pytest.fixture(scope="module")
def no_bytes() -> UnigramTokenizer:
    return train_unigram(TEXTS, 160, byte_fallback=False, character_coverage=0.9)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, wordpiece, unigram, no_bytes):
    """Our tokenizers and theirs, read from the files that ours wrote."""
    folder = tmp_path_factory.mktemp("tokenizers")
    lower = train_wordpiece(TEXTS, 160, lowercase=True, special_tokens=["<s>", "<s>s"])
    ours = {"wordpiece": wordpiece, "lower": lower, "unigram": unigram, "no_bytes": no_bytes}
    for name, tokenizer in ours.items():
        tokenizer.save(folder / f"{name}.json")
    read = tokenizers.Tokenizer.from_file
    return {name: (t, read(str(folder / f"{name}.json"))) for name, t in ours.items()}


def segmentations(word, pieces):
    if not word:
        return [[]]
    ends = [end for end in range(1, len(word) + 1) if word[:end] in pieces]
    return [[word[:end], *rest] for end in ends for rest in segmentations(word[end:], pieces)]


# --- words ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("untyped")
def test_words_are_cut_as_by_bert_for_every_character():
    theirs = tokenizers.pre_tokenizers.BertPreTokenizer()
    codes = [c for c in range(0x20000) if not 0xD800 <= c < 0xE000]  # beyond are letters
    for start in range(0, len(codes), 4096):
        text = "".join(f"a{chr(code)}b " for code in codes[start : start + 4096])
        assert split_words(text) == [word for word, _ in theirs.pre_tokenize_str(text)]


@relaxed
@given(lines)
def test_words_are_cut_as_by_the_library(text):
    bert = tokenizers.pre_tokenizers.BertPreTokenizer()
    assert split_words(text) == [word for word, _ in bert.pre_tokenize_str(text)]
    spaces = tokenizers.pre_tokenizers.Metaspace()
    assert subwords._spaced_words(text) == [word for word, _ in spaces.pre_tokenize_str(text)]


# --- likelihood of a merge -----------------------------------------------------------------------


def likelihood(words):
    counts = Counter(token for word in words for token in word)
    return sum(n * math.log(n / counts.total()) for n in counts.values())


@given(st.lists(st.text("abc", min_size=1, max_size=7), min_size=2, max_size=12), st.data())
def test_gain_is_the_difference_of_likelihoods(texts, data):
    table = subwords._PairTable.from_words(Counter(texts), "likelihood", 1)
    for _ in range(3):
        rows = [r for r in range(len(table.places)) if table.count[r] > 0]
        if not rows:
            return
        row = data.draw(st.sampled_from(rows))
        a, b, merged = table.pair[row]
        before = likelihood(
            [w for w, n in zip(table.words, table.frequency, strict=True) for _ in range(n)]
        )
        n, left, right, new = (
            np.array(x) for x in (table.count[row], *table.tokens[[a, b, merged]])
        )
        gain = float(merge_gain(n, left, right, table.total, merged=new, same=bool(a == b)))
        table.merge(row)
        after = likelihood(
            [w for w, n in zip(table.words, table.frequency, strict=True) for _ in range(n)]
        )
        assert math.isclose(after - before, gain, abs_tol=1e-8)


@given(st.lists(st.text("abc", min_size=1, max_size=8), min_size=1, max_size=10))
def test_counts_stay_right_through_training(texts):
    table = subwords._PairTable.from_words(Counter(texts), "likelihood", 1)
    table.merge_until(40)
    recount, pairs = Counter(), Counter()
    for word, n in zip(table.words, table.frequency, strict=True):
        for token in word:
            recount[token] += n
        for pair in subwords._adjacent(word):
            pairs[pair] += n
    assert table.total == recount.total()
    assert all(table.tokens[t] == recount[t] for t in range(len(table.spelling)))
    assert all(table.count[row] == pairs[pair] for pair, row in table.row.items())
    assert all(math.isclose(table.worth[row], w) for row, w in enumerate(reweighed(table)))


def reweighed(table):
    kept = table.worth.copy()
    table.weigh(np.arange(len(table.places)))
    fresh, table.worth = table.worth.copy(), kept
    return fresh[: len(table.places)]


def test_adjacent_pairs_do_not_overlap():
    assert subwords._adjacent("aaa") == [("a", "a")]
    assert subwords._adjacent("aaaab") == [("a", "a"), ("a", "a"), ("a", "b")]
    assert subwords._adjacent("a") == []


def test_rules_choose_differently():
    chosen = {
        rule: train_wordpiece(TEXTS, 150, rule=rule)._tokens[-8:]
        for rule in ("likelihood", "count", "ratio")
    }
    assert len({tuple(tokens) for tokens in chosen.values()}) == 3


def test_the_ratio_of_a_pair_that_is_always_together():
    table = subwords._PairTable.from_words(Counter({"xy": 1, "ab": 3, "ac": 5}), "ratio", 1)
    row, worth = table.best()
    assert table.spelling[table.pair[row, 2]] == "xy" and worth == 1.0  # 1 / (1 * 1)


def test_training_reports_and_climbs():
    report: list[TrainingStep] = []
    train_wordpiece(TEXTS, 330, min_frequency=1, report=report)
    assert [step.pieces % 100 for step in report] == [0] * len(report) and report
    nats = [step.nats_per_character for step in report]
    assert nats == sorted(nats)


# --- WordPiece -----------------------------------------------------------------------------------


@relaxed
@given(lines, st.sampled_from(["wordpiece", "lower", "unigram", "no_bytes"]))
def test_same_ids_and_text_as_the_library(saved, text, name):
    ours, theirs = saved[name]
    ids = ours.encode(text, allowed_special="all")
    assert ids == theirs.encode(text).ids
    plain = ours.encode(text)
    assert ours.decode(plain) == theirs.decode(plain, skip_special_tokens=False)


@pytest.mark.parametrize("name", ["wordpiece", "lower", "unigram", "no_bytes"])
def test_same_ids_on_the_translations_of_many_languages(saved, name):
    from llmbook.cleaning import read_translations

    ours, theirs = saved[name]
    texts = [text for messages in read_translations().values() for text in messages[:15]]
    assert [ours.encode(text) for text in texts] == [e.ids for e in theirs.encode_batch(texts)]


@pytest.mark.parametrize("name", ["wordpiece", "lower", "unigram", "no_bytes"])
def test_same_special_tokens_as_the_library(saved, name):
    ours, theirs = saved[name]
    for text in ("<s>s<s>", "a<|endoftext|>b <|endoftext|>", "<s><s>ss <|endoftext|", "<S>"):
        assert ours.encode(text, allowed_special="all") == theirs.encode(text).ids


def test_wordpiece_gives_back_the_words(wordpiece):
    for text in TEXTS:
        assert wordpiece.decode(wordpiece.encode(text)) == " ".join(split_words(text))


def test_continuations_are_joined_as_by_the_library(tmp_path):
    """The first token stands as it is, also a continuation."""
    tokenizer = WordPieceTokenizer(["[UNK]", "un", "##lock", "##ed", "##"])
    tokenizer.save(tmp_path / "t.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    for ids in ([2, 3], [1, 2, 3], [3], [0, 2], [2, 1, 3], [4, 4], []):
        assert tokenizer.decode(ids) == theirs.decode(ids)
    assert tokenizer.decode([2, 3]) == "##locked"


def test_words_that_are_all_too_long():
    genome = ["ACGT" * 60]
    with pytest.raises(
        ValueError, match=r"texts: expected a word of at most 100 .* max_word_length"
    ):
        train_wordpiece(genome, 100)
    trained = train_wordpiece(genome, 100, max_word_length=240)
    assert trained.max_word_length == 240 and 0 not in trained.encode("ACGTACGT")
    with pytest.raises(
        ValueError, match=r"character_coverage: expected to leave a word .* got 0.1"
    ):
        train_wordpiece(["abc"], 100, character_coverage=0.1)


def test_wordpiece_unknown_and_too_long(wordpiece):
    assert wordpiece.tokens("the ꙮ cat") == [
        *wordpiece.tokens("the"),
        "[UNK]",
        *wordpiece.tokens("cat"),
    ]
    assert wordpiece.tokens("t" * 100) != ["[UNK]"]
    assert wordpiece.tokens("t" * 101) == ["[UNK]"]


def test_greedy_matching_is_greedy():
    tokenizer = WordPieceTokenizer(["[UNK]", "a", "ab", "##b", "##c", "##bcd", "##d"])
    assert tokenizer.tokens("abcd") == ["ab", "##c", "##d"]
    assert WordPieceTokenizer(["[UNK]", "ab", "a", "##bc"]).tokens("abc") == ["[UNK]"]


def test_special_tokens_inside_the_vocabulary_keep_their_place():
    tokenizer = WordPieceTokenizer(["[PAD]", "[UNK]", "[CLS]", "a"], special_tokens=["[CLS]"])
    assert tokenizer.special_tokens == {"[CLS]": 2} and tokenizer.vocab_size == 4
    assert tokenizer.encode("[CLS]a", allowed_special=["[CLS]"]) == [2, 3]
    assert tokenizer.encode("[CLS]") == [1, 1, 1]


# --- Unigram: sums over paths --------------------------------------------------------------------

scores = st.dictionaries(
    st.text("ab", min_size=1, max_size=3), st.floats(-9, -0.1), min_size=1, max_size=10
).map(lambda d: {"a": -3.0, "b": -4.0} | d)


def model(scored, **options):
    return UnigramTokenizer([("<unk>", -50.0), ("▁", -1.0), *scored.items()], **options)


@given(scores, st.text("ab", min_size=1, max_size=8))
def test_forward_sum_equals_the_list(scored, word):
    listed = [sum(scored[t] for t in cut) for cut in segmentations(word, scored)]
    expected = np.logaddexp.reduce(listed) - 1.0
    assert math.isclose(model(scored).log_probability(word), expected, rel_tol=1e-9)


@given(scores, st.text("ab", min_size=1, max_size=8))
def test_viterbi_finds_a_best_segmentation(scored, word):
    best = max(sum(scored[t] for t in cut) for cut in segmentations(word, scored))
    cut = model(scored).tokens(word)
    assert cut[0] == "▁" and "".join(cut[1:]) == word
    assert math.isclose(sum(scored[t] for t in cut[1:]), best, rel_tol=1e-9)


@given(scores, st.lists(st.text("ab", min_size=1, max_size=7), min_size=1, max_size=5, unique=True))
def test_all_lattices_at_once_equal_the_lists(scored, words):
    words = sorted(words, key=lambda w: (-len(w), w))
    pieces = list(scored)
    arcs = [
        (n, i, j - i, pieces.index(w[i:j]))
        for n, w in enumerate(words)
        for i, j in itertools.combinations(range(len(w) + 1), 2)
        if w[i:j] in scored
    ]
    counts = np.arange(1.0, len(words) + 1)
    lengths = np.array([len(w) for w in words])
    lattices = subwords._WordLattices(counts, lengths, np.array(arcs))
    log_z, posterior = lattices.path_sums(np.array(list(scored.values())))
    expected = dict.fromkeys(pieces, 0.0)
    for n, word in enumerate(words):
        cuts = {tuple(c): sum(scored[t] for t in c) for c in segmentations(word, scored)}
        whole = np.logaddexp.reduce(list(cuts.values()))
        assert math.isclose(log_z[n], whole, rel_tol=1e-9, abs_tol=1e-9)
        for cut, score in cuts.items():
            for piece in cut:
                expected[piece] += counts[n] * math.exp(score - whole)
    found = lattices.expected(posterior, len(pieces))
    assert np.allclose(found, list(expected.values()))


@given(st.lists(st.text("ab", min_size=2, max_size=9), min_size=2, max_size=12))
def test_em_never_lowers_the_likelihood(texts):
    words = sorted(set(texts), key=lambda w: (-len(w), w))
    counts = np.array([float(texts.count(w)) for w in words])
    pieces, current, lattices = subwords._seeds(words, counts, 4, 50, set())
    climb = []
    for _ in range(6):
        log_z, posterior = lattices.path_sums(current)
        climb.append(float(log_z @ counts))
        expected = lattices.expected(posterior, len(pieces))
        current = np.log(np.maximum(expected, 1e-300) / expected.sum())
    assert all(after >= before - 1e-9 for before, after in itertools.pairwise(climb))


def test_loss_is_what_removing_a_piece_costs():
    words = ["unlocked", "locked", "unlock", "lock", "un"]
    counts = np.array([5.0, 40.0, 7.0, 60.0, 9.0])
    pieces, current, lattices = subwords._seeds(words, counts, 8, 100, set())
    for _ in range(3):
        _, posterior = lattices.path_sums(current)
        expected = lattices.expected(posterior, len(pieces))
        current = subwords._m_step(expected)
    log_z, posterior = lattices.path_sums(current)
    loss = subwords._losses(lattices, posterior, len(pieces))
    for piece in ("un", "unl"):
        n = pieces.index(piece)
        without = current - math.log1p(-math.exp(current[n]))
        without[n] = -700.0
        true = float((log_z - lattices.path_sums(without)[0]) @ counts)
        assert abs(loss[n] - true) < 0.1 * abs(true) + 0.5


def test_digamma_is_the_derivative_of_log_gamma():
    x = np.array([0.5, 0.9, 1.0, 2.5, 5.99, 6.0, 40.0, 1e6])
    slope = [(math.lgamma(v * (1 + 1e-5)) - math.lgamma(v * (1 - 1e-5))) / (2e-5 * v) for v in x]
    assert np.allclose(subwords._digamma(x), slope, rtol=1e-5, atol=1e-6)
    harmonic = sum(1 / k for k in range(1, 10))
    assert math.isclose(subwords._digamma(np.array([10.0]))[0], harmonic - 0.57721566490153286)


@given(st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=6), st.integers(1, 5))
def test_substrings_are_counted(texts, longest):
    words = sorted(set(texts), key=lambda w: (-len(w), w))
    counts = np.array([float(texts.count(w)) for w in words])
    strings, found, arcs = subwords._substrings(words, counts, longest)
    every = Counter()
    for word, count in zip(words, counts, strict=True):
        for i, j in itertools.combinations(range(len(word) + 1), 2):
            if j - i <= longest:
                every[word[i:j]] += count
    assert dict(zip(strings, found.tolist(), strict=True)) == {
        s: n for s, n in every.items() if n >= 2 or len(s) == 1
    }
    for word, place, length, piece in arcs.tolist():
        assert words[word][place : place + length] == strings[piece]


def test_samples_follow_the_posterior():
    scored = {"a": -2.0, "b": -2.5, "ab": -3.5, "ba": -4.0, "aba": -6.0}
    tokenizer, generator = model(scored), random.Random(0)
    for sharpness in (0.0, 0.5, 1.0):
        cuts = {
            tuple(c): math.exp(sharpness * sum(scored[t] for t in c))
            for c in segmentations("abab", scored)
        }
        drawn = Counter(
            tuple(
                tokenizer.token(i) for i in tokenizer.sample("abab", sharpness, generator=generator)
            )[1:]
            for _ in range(1500)
        )
        chi = sum(
            (drawn[c] - 1500 * p / sum(cuts.values())) ** 2 / (1500 * p / sum(cuts.values()))
            for c, p in cuts.items()
        )
        assert set(drawn) <= set(cuts) and chi < 3 * len(cuts)


def test_sharp_samples_are_the_best(unigram):
    for text in TEXTS[:5]:
        assert unigram.decode(unigram.sample(text, 0.3)) == text
        sharp = unigram.sample(text, 200.0, generator=random.Random(1))
        assert [len(unigram.token(i)) for i in sharp] == [len(t) for t in unigram.tokens(text)]


@relaxed
@given(lines)
def test_bytes_lose_nothing(unigram, text):
    expected = text.replace("▁", " ").removeprefix(" ")
    assert unigram.decode(unigram.encode(text)) == expected
    assert unigram.decode(unigram.sample(text, 0.2, generator=random.Random(0))) == expected


@pytest.mark.parametrize(
    "text", ["<unk>", "<0x41>", "a<0xF0><0x9F>", "[UNK]", "<|endoftext|>", "<s>"]
)
def test_names_of_tokens_in_text_are_text(unigram, text):
    assert unigram.decode(unigram.encode(text)) == text
    assert not {*unigram.special_tokens.values(), 0} & set(unigram.encode(text))


def test_any_id_may_be_that_of_the_unknown():
    ours = UnigramTokenizer([("a", -1.0), ("<unk>", -9.0), ("▁", -1.0)], unk_id=1)
    assert ours.encode("axa") == [2, 0, 1, 0] and ours.decode([2, 0]) == "a"


def test_unknown_characters_are_one(no_bytes):
    assert no_bytes.tokens("ꙮꙮꙮ").count("<unk>") == 1
    assert no_bytes.decode(no_bytes.encode("the ꙮꙮ cat")) == "the <unk> cat"


def test_ties_go_to_the_piece_that_begins_further_left():
    pieces = [("<unk>", -9.0), ("▁", -1.0), ("a", -1.0), ("b", -1.0), ("ab", -2.0), ("ba", -2.0)]
    theirs = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    ours = UnigramTokenizer(pieces)
    for length in range(1, 8):
        for text in map("".join, itertools.product("ab", repeat=length)):
            assert ours.encode(text) == theirs.encode(text).ids


def test_better_than_the_library_on_its_own_text():
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=200, unk_token="<unk>", show_progress=False
    )
    theirs = tokenizers.Tokenizer(tokenizers.models.Unigram())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    theirs.train_from_iterator(TEXTS, trainer)
    ours = train_unigram(TEXTS, 200, byte_fallback=False, special_tokens=())
    mine = sum(len(ours.encode(text)) for text in TEXTS)
    assert mine < 1.1 * sum(len(theirs.encode(text).ids) for text in TEXTS)


def test_unigram_training_reports_and_repeats():
    report: list[TrainingStep] = []
    once = train_unigram(TEXTS, 380, seed_size=2000, shrink=0.5, report=report)
    again = train_unigram(TEXTS, 380, seed_size=2000, shrink=0.5)
    assert once._tokens == again._tokens and once.pieces == again.pieces
    sizes = [step.pieces for step in report]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) > 1
    assert once.vocab_size == 380 and once.special_tokens == {"<|endoftext|>": 379}


# --- both ----------------------------------------------------------------------------------------

TRAIN = {WordPieceTokenizer: train_wordpiece, UnigramTokenizer: train_unigram}
both = pytest.mark.parametrize("kind", TRAIN)


@both
def test_documents_count_by_their_text(kind):
    ours = TRAIN[kind]([Document(text) for text in TEXTS], 400)
    assert ours.encode(TEXTS[0]) == TRAIN[kind](TEXTS, 400).encode(TEXTS[0])


@both
def test_size_is_what_was_asked_or_less(kind):
    size = TRAIN[kind](TEXTS, 400).vocab_size
    assert size == 400 if kind is UnigramTokenizer else 0 < size <= 400
    assert TRAIN[kind](["to be or not to be"], 5000).vocab_size < 400
    assert TRAIN[kind](["x"], 400).encode("x") != []


@both
@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "texts: expected at least one word, got none"),
        ([""], {}, "texts: expected at least one word, got none"),
        ("a text", {}, "texts: expected several Documents or texts, got a single str"),
        (["a", 7], {}, "texts: expected Documents or texts, got int at index 1"),
        (["some words"], {"vocab_size": 5}, "vocab_size: expected at least .* got 5"),
        (["some words"], {"vocab_size": 0}, "vocab_size: expected at least 1, got 0"),
        (["some words"], {"vocab_size": 5.5}, "vocab_size: expected a whole number"),
        (["a"], {"special_tokens": ["<s>", "<s>"]}, "special_tokens: .* once, got '<s>' several"),
        (["a"], {"special_tokens": "<s>"}, "special_tokens: expected several, .* one str"),
        (["a"], {"special_tokens": [""]}, "special_tokens: expected non-empty, .* got ''"),
        (["a"], {"special_tokens": ["\ud800"]}, "special_tokens: expected non-empty, valid texts"),
        (["a b"], {"special_tokens": 5}, "special_tokens: expected .* got 5"),
        (["a b"], {"special_tokens": ["<"]}, "special_tokens: expected names .* got '<'"),
        (5, {}, "texts: expected .* got (5|int)"),
        (["a"], {"report": "list"}, "report: expected a list, got 'list'"),
        (["a"], {"character_coverage": "all"}, "character_coverage: expected above 0.* got 'all'"),
        (["a"], {"character_coverage": math.nan}, "character_coverage: expected above 0.* got nan"),
        (["a"], {"character_coverage": 0.0}, "character_coverage: expected above 0"),
        (["a"], {"character_coverage": 1.5}, "character_coverage: .* at most 1, got 1.5"),
    ],
)
def test_bad_training_is_refused(kind, texts, options, message):
    if message.startswith("special_tokens: expected names") and kind is WordPieceTokenizer:
        texts, message = ["ab"], message.replace("'<'", "'##b'")
        options = {"special_tokens": ["##b"]}
    with pytest.raises(ValueError, match=message):
        TRAIN[kind](texts, **{"vocab_size": 600, **options})


@pytest.mark.usefixtures("untyped")
def test_bad_settings_are_refused():
    for options, message in (
        ({"rule": "best"}, "rule: expected one of likelihood, count, ratio, got 'best'"),
        ({"max_word_length": 0}, "max_word_length: expected at least 1, got 0"),
        ({"min_frequency": 0}, "min_frequency: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            train_wordpiece(TEXTS, 300, **options)
    for options, message in (
        ({"shrink": 1.0}, "shrink: expected between 0 and 1, got 1.0"),
        ({"shrink": 0.0}, "shrink: expected between 0 and 1, got 0.0"),
        ({"shrink": "half"}, "shrink: expected between 0 and 1, got 'half'"),
        ({"em_steps": 0}, "em_steps: expected at least 1, got 0"),
        ({"max_piece_length": 0}, "max_piece_length: expected at least 1, got 0"),
        ({"seed_size": -1}, "seed_size: expected at least 1, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            train_unigram(TEXTS, 600, **options)


@pytest.mark.usefixtures("untyped")
def test_bad_vocabularies_are_refused():
    for make, message in (
        (lambda: WordPieceTokenizer(["a"]), r"vocabulary: expected it to have '\[UNK\]'"),
        (lambda: WordPieceTokenizer(["[UNK]", "a", "a"]), "vocabulary: .* got 'a' twice"),
        (lambda: WordPieceTokenizer([]), "vocabulary: expected it to have"),
        (lambda: WordPieceTokenizer("abc"), "vocabulary: expected tokens in the order of ids, got"),
        (lambda: WordPieceTokenizer({"[UNK]": 0}), "vocabulary: expected tokens in the order of i"),
        (lambda: WordPieceTokenizer(5), "vocabulary: expected tokens in the order of ids, got 5"),
        (lambda: WordPieceTokenizer(["[UNK]", 5]), "vocabulary: expected a str, got 5"),
        (lambda: WordPieceTokenizer(["[UNK]", ""]), "vocabulary: expected non-empty, .* got ''"),
        (lambda: WordPieceTokenizer(["[UNK]"], unk_token=5), "unk_token: expected a str, got 5"),
        (lambda: UnigramTokenizer(5), "pieces: expected pairs of a text and a score, got 5"),
        (lambda: UnigramTokenizer([(5, -1.0)]), "pieces: expected pairs of a text and a score"),
        (lambda: UnigramTokenizer([("a", -1.0)], unk_id="0"), "unk_id: expected a whole number"),
        (lambda: WordPieceTokenizer(["[UNK]"], max_word_length=0), "max_word_length: expected"),
        (lambda: UnigramTokenizer([]), "pieces: expected at least one, got none"),
        (lambda: UnigramTokenizer([("a", -1.0)], unk_id=1), "unk_id: expected below 1, got 1"),
        (lambda: UnigramTokenizer([("a", math.nan)]), "pieces: expected finite scores"),
        (lambda: UnigramTokenizer([("a", "x")]), "pieces: expected pairs"),
        (lambda: UnigramTokenizer(["abc"]), "pieces: expected pairs"),
        (lambda: UnigramTokenizer([("a", -1.0)], byte_fallback=True), "pieces: expected one for"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@both
@pytest.mark.usefixtures("untyped")
def test_bad_calls_are_refused(kind, wordpiece, unigram):
    tokenizer = wordpiece if kind is WordPieceTokenizer else unigram
    size = tokenizer.vocab_size
    for wrong in (-1, size, 2**70, 1.0, "1", None, True):
        message = rf"^ids: expected 0 to {size - 1}, got {wrong!r} at index 1"
        with pytest.raises(ValueError, match=message):
            tokenizer.decode([1, wrong])
        with pytest.raises(ValueError, match=rf"id: expected 0 to {size - 1}, got {wrong!r}"):
            tokenizer.token(wrong)
    for several in (5, None, "5", b"5", np.array(5), torch.tensor(5)):
        with pytest.raises(ValueError, match=r"ids: expected several ids, such as \[5\], got"):
            tokenizer.decode(several)
    for argument in ("allowed_special", "disallowed_special"):
        for unknown in (5, None, "<s>", [5]):
            with pytest.raises(ValueError, match=f"{argument}: expected 'all' or some of"):
                tokenizer.encode("a", **{argument: unknown})
    for call in (tokenizer.save, kind.load):
        for wrong in (5, ""):
            with pytest.raises(ValueError, match=f"path: expected a str or a Path, got {wrong!r}"):
                call(wrong)
    for call in (tokenizer.tokens, split_words, unigram.sample, unigram.log_probability):
        with pytest.raises(ValueError, match="text: expected a str, got 5"):
            call(5)
    with pytest.raises(ValueError, match="text: expected a str, got b"):
        tokenizer.encode(b"bytes")
    with pytest.raises(
        ValueError, match=r"allowed_special: expected 'all' or some of .* got 'every'"
    ):
        tokenizer.encode("a", allowed_special="every")
    with pytest.raises(ValueError, match=r"allowed_special: .* or some of .*, got \['<s>'"):
        tokenizer.encode("a", allowed_special=["<s>"])
    for generator in (0, np.random.default_rng(0)):
        with pytest.raises(ValueError, match=r"generator: expected a random\.Random, got"):
            unigram.sample("a", generator=generator)
    for sharpness in (-1.0, math.inf, math.nan, "sharp"):
        with pytest.raises(ValueError, match="sharpness: expected 0 or more"):
            unigram.sample("a", sharpness)


@both
def test_odd_input_is_encoded(kind, wordpiece, unigram):
    tokenizer = wordpiece if kind is WordPieceTokenizer else unigram
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")
    assert tokenizer.encode("\ud83e\udd89") == tokenizer.encode("🦉")
    ids = tokenizer.encode("the cat<|endoftext|>the dog", allowed_special="all")
    assert tokenizer.decode(ids) == "the cat<|endoftext|>the dog"
    assert tokenizer.decode(np.array(ids)) == "the cat<|endoftext|>the dog"
    assert tokenizer.decode(torch.tensor(ids)) == "the cat<|endoftext|>the dog"
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


@both
def test_special_tokens_match_the_longest_and_only_where_allowed(kind):
    tokenizer = TRAIN[kind](TEXTS, 500, special_tokens=["<s>", "<s>s", "<|s|>"])
    assert list(tokenizer.special_tokens) == ["<s>", "<s>s", "<|s|>"]
    short, long = tokenizer.special_tokens["<s>"], tokenizer.special_tokens["<s>s"]
    assert tokenizer.encode("<s>s<s>", allowed_special="all") == [long, short]
    assert tokenizer.encode("<s><s>", allowed_special=["<s>"]) == [short, short]
    assert not {short, long} & set(tokenizer.encode("<s>s <s>"))


@both
def test_special_tokens_separate_in_training(kind):
    """The text of a mark teaches nothing: neither its letters nor what stands on both sides."""
    plain = ["unlock the door", "lock the door"] * 5
    marked = ["unlock the door<|eot|>lock the door<|eot|>"] * 5
    options = {"special_tokens": ["<|eot|>"], "vocab_size": 330}
    if kind is UnigramTokenizer:
        options["max_piece_length"] = 5
    ours, same = TRAIN[kind](marked, **options), TRAIN[kind](plain, **options)
    assert ours._tokens == same._tokens and not [t for t in ours._tokens[258:-1] if "|" in t]
    assert kind is UnigramTokenizer or "|" not in "".join(ours._tokens[:-1])


@both
def test_disallowed_special_tokens(kind, wordpiece, unigram):
    tokenizer = wordpiece if kind is WordPieceTokenizer else unigram
    for disallowed in ("all", ["<|endoftext|>"]):
        with pytest.raises(ValueError, match=r"text: .* '<\|endoftext\|>', at character 4"):
            tokenizer.encode("the <|endoftext|>", disallowed_special=disallowed)
    options = {"allowed_special": "all", "disallowed_special": "all"}
    assert tokenizer.encode("<|endoftext|>", **options) == [tokenizer.vocab_size - 1]


@both
def test_special_tokens_are_skipped_as_by_the_library(kind, saved):
    ours, theirs = saved["wordpiece" if kind is WordPieceTokenizer else "unigram"]
    text = "<|endoftext|>the cat<|endoftext|>the dog<|endoftext|>"
    ids = ours.encode(text, allowed_special="all")
    skipped = ours.decode(ids, skip_special_tokens=True)
    assert skipped == theirs.decode(ids) == "the cat the dog" != ours.decode(ids)


@both
def test_special_tokens_in_the_training_text_are_not_learned(kind):
    texts = ["<|endoftext|> the end the end <|endoftext|>", "theend theend"] * 9
    tokenizer = TRAIN[kind](texts, 400, special_tokens=["<|endoftext|>", "theend", "▁theend"])
    ids = tokenizer.encode("<|endoftext|> theend theend")
    assert not set(ids) & set(tokenizer.special_tokens.values())


@both
@pytest.mark.usefixtures("untyped")  # a check at each of millions of calls would take a minute
def test_long_lines(kind, wordpiece, unigram):
    """A million characters without a space: unknown to one, cut by the other, and trained on."""
    if kind is WordPieceTokenizer:
        assert wordpiece.encode("lock" * 250_000) == [0]
        trained = train_wordpiece(["lock" * 250_000, "lock and lock"], 500)
        assert trained.tokens("lock and") == ["lock", "a", "##n", "##d"]  # and occurs once
        return
    line = "lock" * 50_000
    assert unigram.decode(unigram.encode(line)) == line
    trained = train_unigram([line, "lock and lock"], 500)
    longest = max((piece for piece, _ in trained.pieces), key=len)
    assert longest.strip("▁") in line and len(trained.encode(line)) < len(line) / 8


def test_training_on_a_long_line_takes_all_of_it():
    line = "".join(random.Random(0).choices(["lock", "un", "ed"], k=3000))
    tokenizer = train_unigram([line], 400)
    assert len(tokenizer.encode(line)) < 3200


@both
def test_files_are_read_back(kind, tmp_path, wordpiece, unigram):
    tokenizer = wordpiece if kind is WordPieceTokenizer else unigram
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    again = kind.load(path)
    assert again.special_tokens == tokenizer.special_tokens
    assert [again.encode(t) for t in TEXTS] == [tokenizer.encode(t) for t in TEXTS]
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    other = WordPieceTokenizer if kind is UnigramTokenizer else UnigramTokenizer
    with pytest.raises(ValueError, match="model: expected"):
        other.load(path)


@both
@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"normalizer": {"type": "NFC"}},
        {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
        {"post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 1], "cls": ["[CLS]", 0]}},
        {"added_tokens": [{"id": 0, "content": "[UNK]", "lstrip": True, "single_word": False}]},
        {"added_tokens": [{"id": 0, "content": "[UNK]", "special": False}]},
        {"added_tokens": [{"id": 0, "content": "<unk>", "special": False}]},
        {"model": {"vocab": None}},
        {"model": {"vocab": {"[UNK]": 0, "a": 2}}},
        {"model": None},
    ],
)
def test_files_that_would_cut_differently_are_refused(kind, tmp_path, change, wordpiece, unigram):
    tokenizer = wordpiece if kind is WordPieceTokenizer else unigram
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    whole = json.loads(path.read_text(encoding="utf-8"))
    for name, value in change.items():
        whole[name] = {**whole[name], **value} if name == "model" and value else value
    path.write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(ValueError, match="path: "):
        kind.load(path)
    path.write_text("no JSON", encoding="utf-8")
    with pytest.raises(ValueError, match=r"path: .*Expecting value"):
        kind.load(path)


WORDPIECE_DEFAULTS = {
    "rule": "likelihood",
    "min_frequency": 2,
    "character_coverage": 1.0,
    "lowercase": False,
    "max_word_length": 100,
    "special_tokens": ("<|endoftext|>",),
}
UNIGRAM_DEFAULTS = {
    "max_piece_length": 16,
    "seed_size": 10 * (500 - 258),
    "shrink": 0.75,
    "em_steps": 2,
    "byte_fallback": True,
    "character_coverage": 0.9995,
    "special_tokens": ("<|endoftext|>",),
}
# Words that are long, rare, or have rare letters, so that each setting changes something.
MANY = [" ".join("".join(random.Random(n).choices("abcdeAB", k=n % 19 + 1)) for n in range(900))]
MANY += ["x" * 101 + " " + "y" * 100, "q" * 40, "ж", "abcdabcdabcdabcdabcd " * 9]


@pytest.mark.parametrize(
    ("kind", "option", "other"),
    [
        (WordPieceTokenizer, "rule", "count"),
        (WordPieceTokenizer, "min_frequency", 1),
        (WordPieceTokenizer, "min_frequency", 3),
        (WordPieceTokenizer, "character_coverage", 0.99),
        (WordPieceTokenizer, "lowercase", True),
        (WordPieceTokenizer, "max_word_length", 101),
        (WordPieceTokenizer, "max_word_length", 99),
        (WordPieceTokenizer, "special_tokens", ()),
        (UnigramTokenizer, "max_piece_length", 15),
        (UnigramTokenizer, "max_piece_length", 17),
        (UnigramTokenizer, "seed_size", 9 * (500 - 258)),
        (UnigramTokenizer, "shrink", 0.7),
        (UnigramTokenizer, "em_steps", 1),
        (UnigramTokenizer, "em_steps", 3),
        (UnigramTokenizer, "byte_fallback", False),
        (UnigramTokenizer, "character_coverage", 0.9),
        (UnigramTokenizer, "special_tokens", ()),
    ],
)
def test_defaults_are_those_documented(kind, option, other):
    defaults = WORDPIECE_DEFAULTS if kind is WordPieceTokenizer else UNIGRAM_DEFAULTS

    def learned(**options):
        made = TRAIN[kind](MANY, 500, **options)
        return made._tokens, made.special_tokens, getattr(made, "pieces", None)

    assert learned() == learned(**defaults) != learned(**{**defaults, option: other})


def test_defaults_of_the_tokenizers():
    assert WordPieceTokenizer(["[UNK]", "a"]).special_tokens == {}
    ours = WordPieceTokenizer(["[UNK]", "a", *(f"##{c}" for c in "ab")])
    assert (ours.unk_token, ours.lowercase, ours.max_word_length) == ("[UNK]", False, 100)
    assert (
        ours.encode("A") == [0] and ours.encode("a" * 100)[0] == 1 and ours.encode("a" * 101) == [0]
    )
    pieces = [("<unk>", -9.0), ("▁", -1.0), ("a", -8.0), ("aa", -2.0), ("▁a", -1.0)]
    unigram = UnigramTokenizer(pieces)
    assert (unigram.unk_id, unigram.byte_fallback, unigram.special_tokens) == (0, False, {})
    draws = [
        [unigram.sample("aaaaaa", *given, generator=random.Random(n)) for n in range(20)]
        for given in ((), (0.2,), (0.1,), (1.0,))
    ]
    assert draws[0] == draws[1] and draws[0] not in draws[2:]
    assert {tuple(unigram.sample("aaaaaa")) for _ in range(50)} != {tuple(draws[0][0])}


def test_files_of_the_library_are_read(tmp_path):
    theirs = tokenizers.Tokenizer(tokenizers.models.Unigram())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    theirs.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=150, unk_token="<unk>", special_tokens=["<s>"], show_progress=False
    )
    theirs.train_from_iterator(TEXTS, trainer)
    theirs.save(str(tmp_path / "theirs.json"))
    ours = UnigramTokenizer.load(tmp_path / "theirs.json")
    for text in (*TEXTS, "ꙮ<s> a", "<s>"):
        assert ours.encode(text, allowed_special="all") == theirs.encode(text).ids
    bert = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    bert.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=150, special_tokens=["[UNK]", "[CLS]"], show_progress=False
    )
    bert.train_from_iterator(TEXTS, trainer)
    bert.decoder = tokenizers.decoders.WordPiece(cleanup=False)
    bert.save(str(tmp_path / "bert.json"))
    wordpiece = WordPieceTokenizer.load(tmp_path / "bert.json")
    for text in (*TEXTS, "[CLS] a", "ꙮ[CLS]"):
        assert wordpiece.encode(text, allowed_special="all") == bert.encode(text).ids


def test_special_tokens_of_files_do_not_come_from_ordinary_text(tmp_path):
    pieces = [("<unk>", -9.0), ("<s>", 0.0), ("▁", -1.0), ("<", -2.0), ("s", -2.0), (">", -2.0)]
    unigram = UnigramTokenizer(pieces, special_tokens=["<s>"])
    wordpiece = WordPieceTokenizer(["[UNK]", "cls", "c", "##l", "##s"], special_tokens=["cls"])
    assert unigram.tokens("<s>") == ["▁", "<", "s", ">"] and wordpiece.tokens("cls")[0] == "c"
    for tokenizer, text in ((unigram, "<s>"), (wordpiece, "cls")):
        assert tokenizer.encode(text, allowed_special="all") == [1]
        path = tmp_path / "tokenizer.json"
        tokenizer.save(path)
        again = type(tokenizer).load(path)
        assert again.tokens(text) == tokenizer.tokens(text)
        whole = json.loads(path.read_text(encoding="utf-8"))
        whole["added_tokens"] = [{"id": 70, "content": "<e>"}]  # ours would be the next
        path.write_text(json.dumps(whole), encoding="utf-8")
        with pytest.raises(ValueError, match="added_tokens: expected '<e>' to have id"):
            type(tokenizer).load(path)


# --- measures ------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20).filter(any), st.floats(0.1, 5))
def test_efficiency_is_a_share(counts, order):
    assert -1e-9 <= renyi_efficiency(counts, max(len(counts), 2), order) <= 1 + 1e-9


def test_efficiency_of_known_distributions():
    assert renyi_efficiency([1, 1], 4) == 0.5
    assert renyi_efficiency([7, 0, 0], 8) == 0
    shannon = renyi_efficiency([1, 2, 3], 3, order=1.0)
    assert math.isclose(shannon, renyi_efficiency([1, 2, 3], 3, order=1 + 1e-6), rel_tol=1e-5)
    entropy = -sum(p * math.log(p) for p in (1 / 6, 1 / 3, 1 / 2))
    assert math.isclose(shannon, entropy / math.log(3))
    default = math.log((1 / 6) ** 2.5 + (1 / 3) ** 2.5 + (1 / 2) ** 2.5) / (1 - 2.5)
    assert math.isclose(renyi_efficiency([1, 2, 3], 5), default / math.log(5))
    assert renyi_efficiency(Counter("aab").values(), 2) == renyi_efficiency(np.array([2, 1]), 2)


@pytest.mark.usefixtures("untyped")
def test_bad_measures_are_refused():
    for arguments, message in (
        (([], 4), "counts: expected several, at least one above 0, got"),
        (([0], 4), "counts: expected several, at least one above 0, got"),
        ((5, 4), "counts: expected several, at least one above 0, got 5"),
        (([-1, 2], 4), "counts: expected finite counts, 0 or more, got"),
        (([1, math.nan], 4), "counts: expected finite counts"),
        (([1, math.inf], 4), "counts: expected finite counts"),
        ((["many"], 4), "counts: expected finite counts"),
        ((Counter("aab"), 4), r"counts: expected numbers, such as the values\(\) of a Counter"),
        (([1, 2], 1), "vocab_size: expected at least 2, got 1"),
        (([1, 2, 3], 2), "vocab_size: expected at least 3"),
        (([1, 2], 4, 0.0), "order: expected a positive number, got 0.0"),
        (([1, 2], 4, math.inf), "order: expected a positive number, got inf"),
        (([1, 2], 4, "2"), "order: expected a positive number, got '2'"),
    ):
        with pytest.raises(ValueError, match=message):
            renyi_efficiency(*arguments)
    good = {
        "pair": np.array([2.0]),
        "left": np.array([4.0]),
        "right": np.array([3.0]),
        "total": 9.0,
    }
    assert merge_gain(**good) > 0
    for change, message in (
        ({"pair": np.array([-1.0])}, "pair: expected finite counts, 0 or more, got"),
        ({"left": np.array([math.nan])}, "left: expected finite counts"),
        ({"right": "many"}, "right: expected finite counts"),
        ({"total": math.inf}, "total: expected finite counts"),
        ({"merged": -1.0}, "merged: expected finite counts"),
        ({"pair": np.array([3.5])}, "pair: expected no more than its tokens occur"),
        ({"left": np.array([1.0])}, "pair: expected no more than its tokens occur"),
        ({"total": 1.0}, "pair: expected no more than its tokens occur"),
        ({"left": np.array([3.0]), "same": True}, "pair: expected no more than its tokens occur"),
        ({"same": np.array([True, False])}, "same: expected one bool, or one for each pair"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_gain(**{**good, **change})
