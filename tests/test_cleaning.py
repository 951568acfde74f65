"""Filters of chapter 03: idempotence, thresholds, hostile input, parity, counts that add up."""

import gettext
import inspect
import math
import random
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook import cleaning
from llmbook.cleaning import (
    CleaningReport,
    Contamination,
    LanguageIdentifier,
    QualityClassifier,
    area_under_roc,
    c4_clean,
    character_ngrams,
    clean_documents,
    decontaminate,
    fineweb_quality,
    gopher_quality,
    gopher_repetition,
    identify_language,
    mask_pii,
    normalize_text,
    read_translations,
    remove_license,
    remove_repeated_lines,
    repair_mojibake,
    roc_curve,
)
from llmbook.corpus import Document

PROSE = (
    "The baker opens the shop at six, and the smell of bread fills the street. "
    "Children who have to walk to school stop at the window with their coins. "
    "Nobody knows how old the oven is, but all agree that it should be kept. "
    "In winter the fog of the harbor comes up to the door and waits there."
)
ODD = st.text(
    st.one_of(
        st.characters(),
        st.sampled_from("Ãâ€™Â©\u00a0\u00ad\u200b\u0301\r\n\x85\ufeff\ud83d\ude00éÉ…» ü"),
    ),
    max_size=60,
)
PRIVATE = st.lists(
    st.sampled_from(
        "a@b.cd +49 30 1234567 (212) 555-0123 212-555-0123 1.2.3.4 2001:db8::7 <EMAIL> <IP> "
        "<PHONE> x . : - @ + 0 12 :: fe80 é / ( ) v 030 1234567".split(" ")
    ),
    max_size=14,
)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Switch jaxtyping's checks off, as they are for a reader, to see our own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# --- spelling -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("e\u0301", "é"),
        ("a\r\nb\rc\u2028d\x85e", "a\nb\nc\nd\ne"),
        ("a\n\n\n\n\nb  \n", "a\n\nb"),
        ("  indented\n    more", "  indented\n    more"),
        ("so\u00adft zero\u200bwidth \ufeffmark", "soft zerowidth mark"),
        ("no\u00a0break\u3000wide", "no break wide"),
        ("bell\x07 tab\t", "bell tab"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("👩\u200d🍳", "👩\u200d🍳"),
        ("lone \ud83d end", "lone \ufffd end"),
        ("pair \ud83d\ude00", "pair 😀"),
        ("hidden\U000e0041\U000e0042", "hidden"),
        ("x²", "x²"),
        ("cafÃƒÂ©", "café"),
    ],
)
def test_normalize(text: str, expected: str) -> None:
    assert normalize_text(text) == expected


@given(ODD)
@settings(max_examples=300)
def test_normalizing_twice_is_normalizing_once(text: str) -> None:
    once = normalize_text(text)
    assert normalize_text(once) == once
    assert unicodedata.is_normalized("NFC", once)
    once.encode()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "naïve café",
        "NO CAFÉ…",
        "«CAFÉ»",
        "0.2 Å±0.1",
        "Ã la carte",
        "5 €",
        "KÖLNÖ“",
        "MÜ™",
        "été…»",
    ],
)
def test_correct_text_is_not_repaired(text: str) -> None:
    assert repair_mojibake(text) == text


@given(
    st.text(st.characters(min_codepoint=0xA1, max_codepoint=0x24F, categories=["Ll"]), min_size=2)
)
def test_small_letters_survive_the_round_trip(text: str) -> None:
    damaged = "".join(map(cleaning._misread, ("a" + text).encode()))
    if not cleaning._decoded(damaged[1:3]):
        return
    assert repair_mojibake(damaged) == "a" + text


def test_nested_damage_takes_bounded_time() -> None:
    assert normalize_text("Â" * 10 + "©") == "©"
    assert normalize_text("Â" * 100_000 + "©").endswith("Â©")  # a round for each would be minutes


def test_mixed_text_is_repaired_in_part() -> None:
    assert repair_mojibake("cafÃ© café CAFÉ…") == "café café CAFÉ…"


# --- rules --------------------------------------------------------------------------------------


def test_good_prose_passes_every_rule() -> None:
    assert gopher_quality(PROSE) == []
    assert gopher_repetition(PROSE) == []
    assert c4_clean(PROSE) == (PROSE, [])
    assert fineweb_quality(PROSE) == []


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("word " * 49, "word_count"),
        ("word " * 100_001, "word_count"),
        ("to be " * 50, "mean_word_length"),
        ("incomprehensibilities " * 50, "mean_word_length"),
        (PROSE + " #" * 9, "symbol_ratio"),
        (PROSE + " …" * 9, "symbol_ratio"),
        ("\n".join("- " + line for line in PROSE.split(". ")), "bullet_lines"),
        (PROSE.replace(". ", "...\n"), "ellipsis_lines"),
        (PROSE + " 123" * 20, "alphabetic_words"),
        ("bread " * 60, "stop_words"),
    ],
)
def test_each_gopher_rule(text: str, rule: str) -> None:
    assert rule in gopher_quality(text)


def test_limits_are_inclusive_and_can_be_switched_off() -> None:
    assert "word_count" not in gopher_quality("word " * 50)
    assert "mean_word_length" not in gopher_quality("cat " * 50)
    assert gopher_quality("bread", min_words=1, min_stop_words=None) == []
    assert gopher_quality("- bread", min_words=1, min_stop_words=None, max_bullet_lines=None) == [
        "alphabetic_words"
    ]


@pytest.mark.parametrize("text", ["", " \n\t", "\n" * 1000])
def test_empty_text(text: str) -> None:
    assert "word_count" in gopher_quality(text)
    assert gopher_repetition(text) == []
    assert c4_clean(text) == ("", ["sentences"])
    assert "punctuated_lines" in fineweb_quality(text)
    assert normalize_text(text) == ""
    assert remove_license(text) == text
    assert mask_pii(text) == (text, Counter())
    assert identify_language(text) == ("und", 0.0)
    assert character_ngrams(text) == Counter()


@pytest.mark.parametrize("value", [-0.1, 1.1, 30, math.nan, math.inf, "0.3", True])
@pytest.mark.parametrize("name", ["max_symbol_ratio", "max_ellipsis_lines", "min_alphabetic"])
def test_shares_outside_their_range(name: str, value: object) -> None:
    with pytest.raises(Exception, match=name):
        gopher_quality("text", **{name: value})


def test_other_bad_thresholds() -> None:
    with pytest.raises(ValueError, match="min_words"):
        gopher_quality("text", min_words=-1)
    for pair in ((10, 3), (math.nan, 5)):
        with pytest.raises(
            ValueError, match=r"mean_length: expected \(least, most\) in this order"
        ):
            gopher_quality("text", mean_length=pair)
    with pytest.raises(ValueError, match=r"min_words, max_words: expected .* got \(60, 50\)"):
        gopher_quality("text", min_words=60, max_words=50)
    with pytest.raises(ValueError, match="max_short_lines"):
        fineweb_quality("text", max_short_lines=67.0)
    with pytest.raises(ValueError, match="min_sentences"):
        c4_clean("text", min_sentences=-3)


@pytest.mark.usefixtures("unchecked")
def test_none_is_refused_or_switches_a_rule_off() -> None:
    rules = "min_words max_words mean_length max_symbol_ratio max_bullet_lines max_ellipsis_lines"
    names = [*rules.split(), "min_alphabetic", "min_stop_words"]
    assert gopher_quality("### ... 1", **dict.fromkeys(names)) == []
    for pair in (5, (1, 2, 3), "ab", (None, "x")):
        with pytest.raises(ValueError, match="mean_length"):
            gopher_quality("text", mean_length=pair)
    for name in ("min_punctuated_lines", "max_copied_characters", "max_short_lines", "short_line"):
        with pytest.raises(ValueError, match=name):
            fineweb_quality("text", **{name: None})
    for name in ("min_sentences", "min_words"):
        with pytest.raises(ValueError, match=name):
            c4_clean("text", **{name: None})
    with pytest.raises(ValueError, match="min_quality"):
        clean_documents([], min_quality=None)


@pytest.mark.parametrize("text", [None, b"bytes", 1, ["text"]])
@pytest.mark.parametrize(
    "function",
    [
        normalize_text,
        repair_mojibake,
        gopher_quality,
        gopher_repetition,
        c4_clean,
        fineweb_quality,
        remove_license,
        character_ngrams,
        identify_language,
        mask_pii,
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_text(function: Callable[[object], object], text: object) -> None:
    with pytest.raises(ValueError, match="text: expected a str, got"):
        function(text)


@pytest.mark.parametrize("documents", ["abc", ["abc"], None, [None], 1])
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_document(documents: object) -> None:
    for keep in ("first", "none"):
        with pytest.raises(ValueError, match="documents: expected"):
            list(remove_repeated_lines(documents, keep))
    with pytest.raises(ValueError, match="documents: expected"):
        list(decontaminate(documents, ["rye or wheat"]))
    with pytest.raises(ValueError, match="documents: expected"):
        list(clean_documents(documents))
    if documents != ["abc"]:
        with pytest.raises(ValueError, match="evaluation: expected"):
            decontaminate([], documents)


def test_repetition_by_hand() -> None:
    failed = gopher_repetition("one two three four five six\n" * 3)
    assert {"copied_lines", "copied_line_characters", "copied_5_grams"} <= set(failed)
    assert gopher_repetition("a b c") == []
    words = "one two three four five six seven eight nine ten eleven twelve".split()
    assert cleaning._copied_ngram_share([*words, *words], 5) == 0.5
    assert cleaning._copied_ngram_share(words, 5) == 0
    assert cleaning._top_ngram_share(["a", "b", "a", "b"], 2) == 1.0


def test_c4_lines_and_pages() -> None:
    result = c4_clean(
        PROSE + "\nHome\nPlease enable JavaScript to see this page.\nTo be continued..."
    )
    assert result.text == PROSE
    assert c4_clean(PROSE + "\n{").failed == ["curly_bracket"]
    assert c4_clean(PROSE + "\n{", curly_bracket=False).failed == []
    assert c4_clean(PROSE + "\nLorem ipsum").failed == ["lorem_ipsum"]
    assert c4_clean("One line of five words.").failed == ["sentences"]


# --- repeated lines, licenses -------------------------------------------------------------------


def test_lone_surrogates_do_not_stop_a_filter() -> None:
    text = "a line with half of a pair \ud83d of surrogates"
    assert gopher_repetition(text) == []
    assert fineweb_quality(text) == ["punctuated_lines"]
    assert mask_pii(text) == (text, Counter())
    assert QualityClassifier(buckets=8).predict([text]) == 0.5


def test_both_policies() -> None:
    documents = [Document("same line\nfirst", "1"), Document("SAME  line", "2"), Document("x", "3")]
    first = list(remove_repeated_lines(iter(documents), min_length=4))
    assert [(d.id, d.text) for d in first] == [("1", "same line\nfirst"), ("3", "x")]
    none = list(remove_repeated_lines(documents, "none", min_length=4))
    assert [(d.id, d.text) for d in none] == [("1", "first"), ("3", "x")]


def test_repeated_lines_bad_input() -> None:
    assert list(remove_repeated_lines([])) == []
    assert list(remove_repeated_lines([], "none")) == []
    with pytest.raises(ValueError, match="keep"):
        remove_repeated_lines([], "last")
    with pytest.raises(ValueError, match="iterator"):
        remove_repeated_lines(iter([Document("x")]), "none")
    with pytest.raises(ValueError, match="min_length"):
        remove_repeated_lines([], min_length=-1)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("keep", ["first", "none"])
def test_nothing_but_lines_is_removed(end: str, keep: str) -> None:
    def edited(*lines: str, ends: tuple[str, str] = ("", "")) -> str:
        text = ends[0] * 2 + end.join(lines) + ends[1]
        documents = [Document("again"), Document(text, "it"), Document("again", "third")]
        found = {d.id: d.text for d in remove_repeated_lines(documents, keep, min_length=3)}
        return found.get("it", "dropped")

    assert edited("new", "again", "", "old") == f"new{end}{end}old"
    assert edited("new", "again") == edited("again", "new") == "new"
    for ends in ((end, end), ("", end), (end, ""), ("", "")):
        assert edited("new", "again", ends=ends) == ends[0] * 2 + "new" + ends[1]
        assert edited("again", "", "  new", ends=ends) == ends[0] * 2 + "  new" + ends[1]
        assert edited("again", ends=ends) == edited("again", " ", ends=ends) == "dropped"


def test_other_line_ends_stay() -> None:
    documents = [Document("again"), Document("a\x0cb\u2028again\u2028c\r\nd\n\n", "it")]
    assert list(remove_repeated_lines(documents, min_length=3))[1].text == "a\x0cb\u2028c\r\nd\n\n"


def test_blank_lines_are_never_repeated_ones() -> None:
    documents = [Document("a\n\nb\n  \nc\n", "1"), Document("\n\nd\n\na", "2"), Document(" ", "3")]
    first = list(remove_repeated_lines(documents, min_length=0))
    assert [d.text for d in first] == ["a\n\nb\n  \nc\n", "\n\nd", " "]
    none = list(remove_repeated_lines(documents, "none", min_length=0))
    assert [d.text for d in none] == ["b\n  \nc\n", "\n\nd", " "]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_licenses_leave_line_ends(end: str) -> None:
    notice = f"Copyright (c) 2001 The Bakers{end}All rights reserved."
    for text in (f"{end}Bread.{end}{end}{notice}{end}", f"{end}{notice}{end}{end}Bread.{end}"):
        assert remove_license(text) == f"{end}Bread.{end}"
    middle = f"Bread.{end}{end}{notice}{end} {end}Salt."
    assert remove_license(middle) == f"Bread.{end} {end}Salt."
    assert remove_license(notice + end) == ""


@given(st.lists(st.text("ab \n", max_size=12), max_size=6))
def test_a_line_is_left_once_or_never(texts: list[str]) -> None:
    documents = [Document(text, str(i)) for i, text in enumerate(texts)]

    def lines(found: list[Document]) -> Counter[str]:
        every = (" ".join(line.split()) for d in found for line in d.text.splitlines())
        return Counter(line for line in every if len(line) >= 2)

    before = lines(documents)
    first = lines(list(remove_repeated_lines(documents, min_length=2)))
    none = lines(list(remove_repeated_lines(documents, "none", min_length=2)))
    assert first == Counter(set(before))
    assert none == Counter(line for line, count in before.items() if count == 1)


@pytest.mark.parametrize(
    "notice",
    [
        "Copyright (c) 2001 The Bakers",
        "# Copyright 2001-2007 Bakers\n# Author: A baker",
        "SPDX-License-Identifier: MIT",
        "Permission is hereby granted, free of charge, to any person",
        "Redistribution and use in source and binary forms, with or without modification",
        'THE BREAD IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND',
        "Licensed under the Apache License, Version 2.0",
    ],
)
def test_license_paragraphs_go_and_the_rest_stays(notice: str) -> None:
    assert remove_license(notice) == ""
    assert remove_license(f"Before.\n\n{notice}\n\nAfter.") == "Before.\n\nAfter."


@pytest.mark.parametrize(
    "text",
    ["The license of the baker expired.", "copyright: a string", "Show the license text.", PROSE],
)
def test_mentions_of_a_license_stay(text: str) -> None:
    assert remove_license(text) == text


# --- language -----------------------------------------------------------------------------------


@pytest.mark.parametrize("code", sorted(cleaning._STORY))
def test_own_story_is_recognized(code: str) -> None:
    assert identify_language(cleaning._STORY[code]).code == code


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("The weather was fine and we walked along the river until noon.", "en"),
        ("Das Wetter war schön, und wir gingen bis zum Mittag am Fluss entlang.", "de"),
        ("Il faisait beau et nous avons marché le long de la rivière.", "fr"),
        ("Погода была хорошая, и мы гуляли вдоль реки.", "ru"),
        ("天気がよかったので、私たちは川に沿って歩いた。", "ja"),
        ("天气很好，我们沿着河边走到中午。", "zh"),
        ("สวัสดีครับ", "und"),
        ("1234 !?", "und"),
        ("\ud83d", "und"),
    ],
)
def test_other_sentences(text: str, code: str) -> None:
    assert identify_language(text).code == code


def test_identifier_probabilities() -> None:
    identifier = LanguageIdentifier({"a": ["aaaa ab"], "b": ["bbbb ba"]}, longest=1, alpha=1.0)
    # Unigrams: a: 5 a, 1 b, 6 of the script; b: the reverse. Three n-grams, alpha 1.
    expected = np.log(np.array([6 * 7 / 15 / 15, 2 * 7 / 15 / 15]))
    expected -= np.logaddexp.reduce(expected)
    assert np.allclose(identifier.log_probabilities("a"), expected)
    assert identifier.identify("a") == pytest.approx(("a", 0.75))
    assert np.allclose(np.exp(identifier.log_probabilities("")), 0.5)


def test_naive_bayes_equals_sklearn() -> None:
    bayes = pytest.importorskip("sklearn.naive_bayes")
    texts = {code: [cleaning._STORY[code]] for code in ("de", "en", "nl")}
    ours = LanguageIdentifier(texts, longest=2, alpha=0.5)

    def row(text: str) -> np.ndarray:
        counts = np.zeros(len(ours.rows))
        for ngram, count in character_ngrams(text, 2).items():
            if ngram in ours.rows:
                counts[ours.rows[ngram]] = count
        return counts

    theirs = bayes.MultinomialNB(alpha=0.5, fit_prior=False)
    theirs.fit(np.array([row(t[0]) for t in texts.values()]), list(texts))
    probe = "Waar is het brood"
    assert np.allclose(
        ours.log_probabilities(probe), theirs.predict_log_proba(row(probe)[None])[0], atol=1e-9
    )


def test_only_the_first_characters_are_asked() -> None:
    identifier = LanguageIdentifier({"a": ["aaaa"], "b": ["bbbb"]})
    assert identifier.identify("1" * 499 + "a").code == "a"
    assert identifier.identify("1" * 500 + "a").code == "und"
    assert identifier.identify("1" * 500 + "a", max_characters=501).code == "a"
    assert identifier.identify("a" * 300 + "b" * 400).code == "a"  # 300 of the first 500
    assert identifier.identify("a" * 300 + "b" * 400, max_characters=700).code == "b"
    assert identifier.identify("ab", max_characters=1).code == "a"


@pytest.mark.parametrize("value", [0, -1, None, 1.5, True])
@pytest.mark.usefixtures("unchecked")
def test_no_characters_are_refused(value: object) -> None:
    identifier = LanguageIdentifier({"a": ["aaaa"], "b": ["bbbb"]})
    with pytest.raises(ValueError, match=r"max_characters: expected .* got"):
        identifier.identify("text", max_characters=value)


def test_identifier_bad_input() -> None:
    for texts in ({}, {"en": ["bread"]}, {"en": ["bread"], "de": []}, {"en": ["1"], "de": ["a"]}):
        with pytest.raises(ValueError, match="texts"):
            LanguageIdentifier(texts)
    for alpha in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"alpha: expected a positive number, got {alpha}"):
            LanguageIdentifier({"a": ["a"], "b": ["b"]}, alpha=alpha)
    with pytest.raises(ValueError, match="longest"):
        LanguageIdentifier({"a": ["a"], "b": ["b"]}, longest=0)


def test_translations() -> None:
    pytest.importorskip("sphinx")
    found = read_translations()
    assert {"de", "fr", "ja", "ru"} <= set(found)
    assert all(messages and all(m.strip() for m in messages) for messages in found.values())
    with pytest.raises(ValueError, match="catalogs"):
        read_translations("numpy")
    for name in ("no_such_package", "", "a.b", "..", "1+1"):
        with pytest.raises(ValueError, match="installed"):
            read_translations(name)


def test_translations_equal_gettext(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sphinx = pytest.importorskip("sphinx")
    path = Path(sphinx.__file__).parent / "locale/de/LC_MESSAGES/sphinx.mo"
    with path.open("rb") as file:
        catalog = gettext.GNUTranslations(file)
    assert catalog.gettext("Index") in read_translations()["de"]
    broken = tmp_path / "broken_catalogs/locale/xx/LC_MESSAGES"
    broken.mkdir(parents=True)
    (broken / "a.mo").write_bytes(b"no catalog")
    (tmp_path / "broken_catalogs/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"a\.mo is not a gettext catalog"):
        read_translations("broken_catalogs")


# --- classifier ---------------------------------------------------------------------------------


def examples(count: int, seed: int = 0) -> tuple[list[str], list[int]]:
    generator = random.Random(seed)
    good, other, both = "bread salt oven", "todo hack fixme", "water flour the a of"
    texts, labels = [], []
    for i in range(count):
        mine = (good if i % 2 else other).split() + both.split() * 2
        texts.append(" ".join(generator.choices(mine, k=12)))
        labels.append(i % 2)
    return texts, labels


def test_classifier_learns_and_agrees_with_sklearn() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    sparse = pytest.importorskip("scipy.sparse")
    texts, labels = examples(300)
    ours = QualityClassifier(buckets=2**12, penalty=1e-3).fit(texts, labels, iterations=3000)
    x = cleaning._hashed_ngrams(texts, 2**12)
    matrix = sparse.csr_matrix((x.values, (x.rows, x.columns)), shape=x.shape)
    theirs = linear.LogisticRegression(C=1 / (300 * 1e-3), tol=1e-8, max_iter=5000)
    theirs.fit(matrix, labels)
    assert np.allclose(ours.weights, theirs.coef_[0], atol=2e-3)
    assert ours.bias == pytest.approx(theirs.intercept_[0], abs=2e-3)
    new, truth = examples(100, seed=1)
    assert area_under_roc(truth, ours.predict(new)) > 0.9
    assert np.allclose(ours.predict(new), ours.predict(new[::-1])[::-1])


def test_gradient_by_differences() -> None:
    texts, labels = examples(20)
    x, truth = cleaning._hashed_ngrams(texts, 64), np.array(labels, dtype=float)
    weights, bias = cleaning._fit_logistic(x, truth, 0.01, 5000)

    def loss(w: np.ndarray, b: float) -> float:
        scores = x.times(w) + b
        return float(np.mean(np.logaddexp(0, scores) - truth * scores) + 0.005 * w @ w)

    least = loss(weights, bias)
    for step in (1e-3, -1e-3):
        assert loss(weights, bias + step) >= least
        for place in range(64):
            moved = weights.copy()
            moved[place] += step
            assert loss(moved, bias) >= least


def test_features() -> None:
    x = cleaning._hashed_ngrams(["", "Bread bread!", "salt bread"], 2**16)
    assert x.shape == (3, 2**16)
    assert np.bincount(x.rows, minlength=3).tolist() == [0, 2, 3]  # bread, bread bread; and so on
    assert np.allclose(np.bincount(x.rows, x.values**2, 3), [0, 1, 1])
    dense = np.zeros(x.shape)
    dense[x.rows, x.columns] = x.values
    vector = np.random.default_rng(0).normal(size=2**16)
    assert np.allclose(x.times(vector), dense @ vector)
    assert np.allclose(x.transposed_times(np.arange(3.0)), dense.T @ np.arange(3.0))
    assert cleaning._hashed_ngrams([], 8).shape == (0, 8)


def test_features_are_the_same_in_another_process() -> None:
    code = (
        "from llmbook import cleaning; "
        "print(cleaning._hashed_ngrams(['the oven']).columns.tolist())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(cleaning._hashed_ngrams(["the oven"]).columns.tolist())


def test_save_and_load(tmp_path: Path) -> None:
    texts, labels = examples(40)
    classifier = QualityClassifier(buckets=256, longest=1).fit(texts, labels)
    classifier.save(tmp_path / "quality.safetensors")
    again = QualityClassifier.load(tmp_path / "quality.safetensors")
    assert np.array_equal(again.predict(texts), classifier.predict(texts))
    assert (again.longest, again.penalty, again.buckets) == (1, 1e-4, 256)
    assert [path.name for path in tmp_path.iterdir()] == ["quality.safetensors"]
    (tmp_path / "broken").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="broken"):
        QualityClassifier.load(tmp_path / "broken")
    from safetensors.numpy import save_file

    save_file({"weights": np.zeros(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match="other"):
        QualityClassifier.load(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        QualityClassifier.load(tmp_path / "missing")


GOOD = '{"longest": 1, "penalty": 0.1, "bias": 0.5}'


@pytest.mark.parametrize(
    ("settings_", "weights"),
    [
        (None, np.zeros(2)),
        ("{", np.zeros(2)),
        ("[]", np.zeros(2)),
        ("{}", np.zeros(2)),
        (GOOD.replace("longest", "deepest"), np.zeros(2)),
        (GOOD.replace("{", '{"extra": 1, '), np.zeros(2)),
        *((GOOD.replace("0.5", bias), np.zeros(2)) for bias in ('"x"', "NaN", "null", "Infinity")),
        (GOOD.replace("0.1", "-1"), np.zeros(2)),
        (GOOD.replace("1,", "0,"), np.zeros(2)),
        (GOOD.replace("1,", "null,"), np.zeros(2)),
        (GOOD, np.zeros((2, 2))),
        (GOOD, np.zeros(0)),
        (GOOD, np.zeros(2, dtype=int)),
        (GOOD, np.array([0.0, math.nan])),
        (GOOD, np.array([0.0, math.inf])),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_load_what_others_wrote(tmp_path: Path, settings_: str | None, weights: np.ndarray) -> None:
    from safetensors.numpy import save_file

    metadata = {"format": "llmbook.QualityClassifier"}
    metadata |= {} if settings_ is None else {"settings": settings_}
    save_file({"weights": weights}, tmp_path / "strange", metadata)
    with pytest.raises(ValueError, match="path: 'strange'"):
        QualityClassifier.load(tmp_path / "strange")


@pytest.mark.parametrize("labels", [[], [1], [1, 1], [0, 2], [0.5, 0.5], [0, 1, 1]])
def test_classifier_bad_labels(labels: list[float]) -> None:
    with pytest.raises(ValueError, match="labels"):
        QualityClassifier(buckets=8).fit(["bread", "salt"], labels)


def test_labels_of_ones_own(tmp_path: Path) -> None:
    texts, labels = examples(60)
    plain = QualityClassifier(buckets=256).fit(texts, labels)
    kinds = ("crawl", "curated")
    named = [kinds[label] for label in labels]
    for given_labels in (named, tuple(named), np.array(named)):
        ours = QualityClassifier(buckets=256, labels=kinds).fit(texts, given_labels)
        assert np.array_equal(ours.weights, plain.weights)
    turned = QualityClassifier(buckets=256, labels=[1, 0]).fit(texts, labels)
    assert np.allclose(turned.predict(texts), 1 - plain.predict(texts), atol=1e-6)
    for same in (np.array(labels, bool), np.array(labels, float), [bool(x) for x in labels]):
        assert np.array_equal(
            QualityClassifier(buckets=256).fit(texts, same).weights, plain.weights
        )
    ours.save(tmp_path / "named")
    again = QualityClassifier.load(tmp_path / "named")
    assert again.labels == kinds
    assert np.array_equal(again.fit(texts, named).weights, plain.weights)
    for wrong in (labels, [*named[:-1], "other"]):
        with pytest.raises(
            ValueError, match="labels: expected one for each of 60 texts, 'crawl' and"
        ):
            ours.fit(texts, wrong)


@pytest.mark.parametrize("labels", [(0,), (1, 1), "ab", 5, (0, None), (0.5, 1), ("a", "b", "c")])
@pytest.mark.usefixtures("unchecked")
def test_labels_that_name_no_two_kinds(labels: object) -> None:
    with pytest.raises(ValueError, match="labels: expected two different numbers or texts, got"):
        QualityClassifier(labels=labels)


def test_files_from_before_labels_had_names(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    metadata = {"format": "llmbook.QualityClassifier", "settings": GOOD}
    save_file({"weights": np.ones(4)}, tmp_path / "old", metadata)
    old = QualityClassifier.load(tmp_path / "old")
    assert (old.labels, old.longest, old.penalty, old.bias) == ((0, 1), 1, 0.1, 0.5)


def test_the_default_number_of_steps_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, labels = examples(300)
    default = QualityClassifier(buckets=2**12).fit(texts, labels)
    for steps, least, most in ((1000, 0.0, 0.0), (20_000, 0.0, 1e-4), (100, 1e-2, 99.0)):
        other = QualityClassifier(buckets=2**12).fit(texts, labels, iterations=steps)
        gap = np.abs(other.weights - default.weights).max() / np.abs(default.weights).max()
        assert least <= gap <= most, (steps, gap)
    asked: list[int] = []
    monkeypatch.setattr(cleaning, "_minimize", lambda g, s, step, n: asked.append(n) or s)
    QualityClassifier(buckets=8).fit(texts, labels)
    assert asked == [1000]


def test_one_string_is_no_list_of_texts() -> None:
    with pytest.raises(ValueError, match="texts"):
        QualityClassifier(buckets=8).predict("bread")
    with pytest.raises(ValueError, match="texts"):
        LanguageIdentifier({"en": "bread", "de": "Brot"})


def test_classifier_bad_settings() -> None:
    for settings_ in ({"buckets": 0}, {"longest": 0}, {"penalty": 0.0}, {"penalty": math.nan}):
        with pytest.raises(ValueError, match=next(iter(settings_))):
            QualityClassifier(**settings_)


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=30).filter(
        lambda pairs: len({label for label, _ in pairs}) == 2
    )
)
def test_area_is_the_probability_of_the_right_order(pairs: list[tuple[bool, int]]) -> None:
    labels, scores = [p[0] for p in pairs], np.array([float(p[1]) for p in pairs])
    good = [s for y, s in zip(labels, scores, strict=True) if y]
    other = [s for y, s in zip(labels, scores, strict=True) if not y]
    wins = sum((g > o) + 0.5 * (g == o) for g in good for o in other)
    assert area_under_roc(labels, scores) == pytest.approx(wins / len(good) / len(other))
    false, true = roc_curve(labels, scores)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert (np.diff(false) >= 0).all()
    assert (np.diff(true) >= 0).all()


def test_area_equals_sklearn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    labels, scores = generator.integers(0, 2, 500), generator.normal(size=500).round(1)
    assert area_under_roc(labels, scores) == pytest.approx(metrics.roc_auc_score(labels, scores))


def test_roc_bad_input() -> None:
    for labels, scores in (([], []), ([1], [0.5]), ([1, 1], [0.1, 0.2]), ([1, 0], [0.1])):
        with pytest.raises(ValueError, match=f"labels: expected one for each of {len(scores)} "):
            roc_curve(labels, np.array(scores, dtype=float))
    with pytest.raises(ValueError, match="finite"):
        roc_curve([0, 1], np.array([0.1, math.nan]))


# --- masking ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("ann@example.org", "EMAIL"),
        ("<ann.b+c@mail.example.co.uk>", "EMAIL"),
        ("ünï@käse.example", "EMAIL"),
        ("+49 30 1234567", "PHONE"),
        ("+49 (0)30 1234567", "PHONE"),
        ("+1-212-555-0123", "PHONE"),
        ("+14155552671", "PHONE"),
        ("+1 (415) 555-2671", "PHONE"),
        ("(212) 555-0123", "PHONE"),
        ("(283)-182-3829", "PHONE"),
        ("(283) 182 3829", "PHONE"),
        ("212-555-0123", "PHONE"),
        ("212 555 0123", "PHONE"),
        ("1 212 555 0123", "PHONE"),
        ("212 555-0123", "PHONE"),
        ("212.555.0123", "PHONE"),
        ("1-800-555-0199", "PHONE"),
        ("030 1234567", "PHONE"),
        ("0171/1234567", "PHONE"),
        ("01 23 45 67 89", "PHONE"),
        ("tel:+49301234567", "PHONE"),
        ("192.0.2.146", "IP"),
        ("255.255.255.255", "IP"),
        ("2001:db8::7", "IP"),
        ("2001:0db8:85a3:0000:0000:8a2e:0370:7334", "IP"),
        ("fe80::1", "IP"),
    ],
)
def test_masked(text: str, kind: str) -> None:
    for before, after in (("", ""), ("Ask ", "."), ("(", ")"), ("see ", ", please")):
        masked = mask_pii(before + text + after)
        assert masked.counts == {kind: 1}, (before, after)
        assert f"<{kind}>" in masked.text
        assert not re.search(r"\d\d", masked.text)


@pytest.mark.parametrize(
    "text",
    [
        "version 1.2.3.4",
        "Python 3.11.0.1",
        "the releases 1.2.3.4",
        "Chrome/120.0.0.0 Safari/537.36",
        "linux-2.6.32.1",
        "numpy==1.2.3.4",
        "numpy >= 1.2.3.4",
        "DE89 3704 0044 0532 0130 00",  # account numbers, the examples of their registry
        "DE89370400440532013000",
        "GB82 WEST 1234 5698 7654 32",
        "FR14 2004 1010 0505 0001 3M02 606",
        "NO93 8601 1117 947",
        "BE68 5390 0754 7034",
        "4111 1111 1111 1111",  # a card
        "212 555 0123 44",  # rows of numbers
        "7 212 555 0123",
        "212 111 0123",  # what the numbering plan does not have
        "292 555 0123",
        "v1.2.3",
        "1.2.3.4.5",
        "256.1.1.1",
        "01.002.3.4",
        "2024-01-31",
        "31.01.2024",
        "01/02/2003",
        "2024-01-31T12:30:45.123+02:00",
        "12:34:56",
        "3.14159265358979",
        "Decimal('+35236450.6')",
        "1024x768",
        "0xdeadbeef01234567",
        "d41d8cd98f00b204e9800998ecf8427e",
        "978-0-306-40615-7",
        "x[1::2]",
        "x[::2] y[::-1]",
        "std::add",
        "00:1b:63:84:45:e6",
        "A@B.reshape(3)",
        "user@localhost",
        "@property",
        "1,234,567 people",
        "[0.1 0.2 0.3]",
        "01 02 03 04 05 06 07",
        "100 200 3000",
        "<EMAIL> <PHONE> <IP>",
    ],
)
def test_not_masked(text: str) -> None:
    assert mask_pii(text) == (text, Counter())


@pytest.mark.parametrize(
    "first", ["+14155552671", "+49 30 1234567", "(212) 555-0123", "030 1234567", "212 555 0123"]
)
@pytest.mark.parametrize(
    "second", ["212 555 0123", "+49 30 1234567", "(212) 555-0123", "212.555.0123", "030 1234567"]
)
def test_two_numbers_with_a_space_between(first: str, second: str) -> None:
    assert mask_pii(f"{first} {second}") == ("<PHONE> <PHONE>", Counter(PHONE=2))


def test_private_addresses_can_stay() -> None:
    text = "127.0.0.1 192.168.0.1:80 8.8.8.8"
    assert mask_pii(text).counts == {"IP": 3}
    assert mask_pii(text, keep_private=True).text == "127.0.0.1 192.168.0.1:80 <IP>"


def test_addresses_that_follow_a_word() -> None:
    for before in ("from ", "host=", "http://", "at ", "(", "conversions ", "python's "):
        assert mask_pii(f"{before}8.8.8.8").text == f"{before}<IP>"


MIXED = "Ask ann@example.org, (212) 555-0123 or 8.8.8.8."


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (("EMAIL",), "Ask <EMAIL>, (212) 555-0123 or 8.8.8.8."),
        ("PHONE", "Ask ann@example.org, <PHONE> or 8.8.8.8."),
        ({"IP"}, "Ask ann@example.org, (212) 555-0123 or <IP>."),
        (["IP", "EMAIL"], "Ask <EMAIL>, (212) 555-0123 or <IP>."),
        (cleaning.PII_KINDS, "Ask <EMAIL>, <PHONE> or <IP>."),
    ],
)
def test_only_the_kinds_that_were_asked_for(kinds: object, expected: str) -> None:
    assert mask_pii(MIXED, kinds=kinds).text == expected
    assert mask_pii(MIXED).text == "Ask <EMAIL>, <PHONE> or <IP>."


def test_placeholders_of_ones_own() -> None:
    own = {"EMAIL": "[mail]", "IP": ""}
    assert mask_pii(MIXED, placeholders=own) == (
        "Ask [mail], <PHONE> or .",
        Counter(EMAIL=1, PHONE=1, IP=1),
    )
    fineweb = {"EMAIL": "email@example.com", "IP": "22.214.171.124"}
    once = mask_pii(MIXED, placeholders=fineweb)
    assert once.text == "Ask email@example.com, <PHONE> or 22.214.171.124."
    assert once.counts == Counter(EMAIL=1, PHONE=1, IP=1)
    assert mask_pii(once.text, placeholders=fineweb) == (once.text, Counter())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ()}, "kinds: expected some of EMAIL, PHONE, IP, got ()"),
        ({"kinds": 5}, "kinds: expected some of EMAIL, PHONE, IP, got 5"),
        ({"kinds": ["NAME"]}, "kinds: expected one of EMAIL, PHONE, IP, got 'NAME'"),
        ({"placeholders": {"NAME": "x"}}, "placeholders: expected one of EMAIL, PHONE, IP, got"),
        ({"placeholders": {"IP": 5}}, "placeholders"),
        ({"placeholders": "<IP>"}, "placeholders: expected texts by kind, got '<IP>'"),
        (
            {"kinds": ["IP"], "placeholders": {"EMAIL": "x"}},
            "placeholders: expected one of IP, got 'EMAIL'",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_kinds_and_placeholders(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        mask_pii("text", **options)


@given(PRIVATE, st.sampled_from(["", " ", "\n"]))
@settings(max_examples=120)
def test_masking_twice_is_masking_once(parts: list[str], between: str) -> None:
    once = mask_pii(between.join(parts))
    assert mask_pii(once.text) == (once.text, Counter())
    for kind in ("EMAIL", "PHONE", "IP"):
        already = sum(part == f"<{kind}>" for part in parts)
        assert once.text.count(f"<{kind}>") == once.counts[kind] + already


@pytest.mark.parametrize(
    "unit",
    [
        "a",
        "1",
        "a.b-",
        "1.",
        "1 ",
        "a@",
        ":",
        "+1 ",
        "(0",
        "0123 ",
        "b.",
        "+",
        "ab:",
        "é",
        "Ã©",
        "#\n",
    ],
)
def test_a_million_characters(unit: str) -> None:
    size = 100_000 if unit in ("Ã©", "0123 ") else 1_000_000  # checking every type is slow
    text = (unit * size)[:size]
    mask_pii(text)  # quadratic time would be hours
    mask_pii("x@" + text)
    normalize_text(text)
    remove_license(text)
    gopher_quality(text)
    identify_language(text)


@pytest.mark.parametrize(
    ("unit", "kind"),
    [("(212) 555-0123", "PHONE"), ("+49 30 1234567", "PHONE"), ("%a@b.cd", "EMAIL")],
)
def test_neighbors_without_a_space(unit: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds, once = [], cleaning._mask_once
    monkeypatch.setattr(cleaning, "_mask_once", lambda *a: rounds.append(a) or once(*a))
    assert mask_pii(unit * 10_000) == (f"<{kind}>" * 10_000, Counter({kind: 10_000}))
    assert len(rounds) == 2
    rounds.clear()
    once = lambda text, *_: cleaning.Masked(text, Counter({kind: 1}))  # noqa: E731
    assert mask_pii(unit).counts == {kind: 20}


# --- decontamination ----------------------------------------------------------------------------


def test_decontaminate() -> None:
    question = "Who baked the bread that the children counted their coins for, and at what hour?"
    documents = [
        Document(
            "In the test: WHO baked the bread, that the children counted their coins for...", "a"
        ),
        Document("Who baked the bread?", "b"),
        Document("", "c"),
    ]
    found: list[Contamination] = []
    kept = list(decontaminate(documents, [Document(question, "q")], n=10, found=found))
    assert [d.id for d in kept] == ["b", "c"]
    assert found == [Contamination("a", "q", 2)]
    assert len(list(decontaminate(documents, [question], n=13))) == 3


def test_short_evaluation_texts_count_as_a_whole() -> None:
    documents = [Document("We say: rye or wheat! And so on."), Document("rye or oats")]
    assert [d.text for d in decontaminate(documents, ["Rye or wheat?"])] == ["rye or oats"]
    assert len(list(decontaminate(documents, ["yes", "rye or wheat?"]))) == 1
    assert len(list(decontaminate([Document("今日は天気がいい")], ["天気がいい"]))) == 0


def test_decontaminate_bad_input() -> None:
    for evaluation in ([], ["yes"], [""]):
        with pytest.raises(ValueError, match="evaluation"):
            decontaminate([], evaluation)
    with pytest.raises(ValueError, match="n: "):
        decontaminate([], ["a question of words"], n=0)
    with pytest.raises(ValueError, match="n: expected at least 3, got 2"):
        decontaminate([], ["a question of words"], n=2)
    assert list(decontaminate([], ["a question of words"])) == []


@given(
    st.lists(st.sampled_from("abc"), max_size=30),
    st.lists(st.sampled_from("abc"), min_size=4, max_size=9),
)
def test_decontaminate_against_substrings(text: list[str], item: list[str]) -> None:
    padded = f" {' '.join(text)} "
    expected = any(f" {' '.join(item[i : i + 4])} " in padded for i in range(len(item) - 3))
    kept = list(decontaminate([Document(" ".join(text))], [" ".join(item)], n=4))
    assert (not kept) == expected


# --- pipeline -----------------------------------------------------------------------------------


def corpus() -> list[Document]:
    texts = [
        PROSE,
        "Copyright (c) 1999 Bakers\n\nThis module bakes bread for all who come and ask.",
        "x",
        "-----------------------------",
        PROSE.upper(),
        "Please write to ann@example.org about the oven, or look at 127.0.0.1 instead.",
    ]
    return [Document(t, f"id{i}", "bakery", {"n": i}) for i, t in enumerate(texts)]


def test_pipeline_keeps_what_it_should() -> None:
    report = CleaningReport()
    clean = list(clean_documents(iter(corpus()), report=report))
    assert [(d.id, d.source, d.metadata["n"]) for d in clean] == [
        ("id0", "bakery", 0),
        ("id1", "bakery", 1),
        ("id5", "bakery", 5),
    ]
    assert clean[1].text == "This module bakes bread for all who come and ask."
    assert "<EMAIL>" in clean[2].text
    assert "127.0.0.1" in clean[2].text
    assert report.masked == {"EMAIL": 1}
    assert [step.step for step in report.steps][0::5] == ["read", "mask"]
    counts = [step.documents for step in report.steps]
    assert counts == sorted(counts, reverse=True)
    assert report.steps[0].characters == sum(len(d.text) for d in corpus())
    assert report.steps[-1].characters == sum(len(d.text) for d in clean)
    assert "mask" in str(report)
    assert str(CleaningReport()) == ""


def test_pipeline_options() -> None:
    german = Document(cleaning._STORY["de"], "german")
    kept = list(clean_documents([german, *corpus()], language="en"))
    assert "german" not in [d.id for d in kept]
    assert "german" in [d.id for d in clean_documents([german], language="de")]
    texts, labels = examples(60)
    classifier = QualityClassifier(buckets=256).fit(texts, labels)
    two = [
        Document("bread salt oven bread salt oven", "good"),
        Document("todo hack fixme todo hack", "bad"),
    ]
    assert [d.id for d in clean_documents(two, classifier=classifier)] == ["good"]
    assert [d.id for d in clean_documents(two, evaluation=["salt oven bread"])] == ["bad"]


def test_pipeline_streams_and_can_be_run_again() -> None:
    seen = []

    def endless() -> "object":
        for i in range(10**9):
            seen.append(i)
            yield Document(f"This is document {i} about the bread of the day.")

    report = CleaningReport()
    stream = clean_documents(endless(), report=report)
    assert next(stream).text.startswith("This is document 0")
    assert len(seen) == 1
    list(clean_documents(corpus(), report=report))
    assert report.steps[0].documents == 6


def test_pipeline_is_idempotent() -> None:
    once = list(clean_documents(corpus()))
    assert list(clean_documents(once)) == once


def test_pipeline_bad_input() -> None:
    assert list(clean_documents([])) == []
    assert list(clean_documents([Document("")])) == []
    for name, value in {
        "min_words": -1,
        "min_quality": 1.5,
        "language": "xx",
        "min_line_length": -1,
        "evaluation": [],
    }.items():
        with pytest.raises(ValueError, match=f"{name}: expected"):
            clean_documents([Document("x")], **{name: value})


# --- documented defaults and limits -------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "defaults"),
    [
        (
            gopher_quality,
            {
                "min_words": 50,
                "max_words": 100_000,
                "mean_length": (3, 10),
                "max_symbol_ratio": 0.1,
                "max_bullet_lines": 0.9,
                "max_ellipsis_lines": 0.3,
                "min_alphabetic": 0.8,
                "min_stop_words": 2,
            },
        ),
        (c4_clean, {"min_sentences": 3, "min_words": 5, "curly_bracket": True}),
        (
            fineweb_quality,
            {
                "min_punctuated_lines": 0.12,
                "max_copied_characters": 0.1,
                "max_short_lines": 0.67,
                "short_line": 30,
            },
        ),
        (read_translations, {"package": "sphinx"}),
        (remove_repeated_lines, {"keep": "first", "min_length": 30}),
        (character_ngrams, {"longest": 3}),
        (LanguageIdentifier, {"longest": 3, "alpha": 0.1}),
        (LanguageIdentifier.identify, {"max_characters": 500}),
        (QualityClassifier, {"buckets": 65_536, "longest": 2, "penalty": 1e-4, "labels": (0, 1)}),
        (QualityClassifier.fit, {"iterations": 1000}),
        (
            mask_pii,
            {"kinds": ("EMAIL", "PHONE", "IP"), "placeholders": None, "keep_private": False},
        ),
        (decontaminate, {"n": 13, "found": None}),
        (
            clean_documents,
            {
                "min_words": 5,
                "min_line_length": 30,
                "language": None,
                "classifier": None,
                "min_quality": 0.5,
                "evaluation": None,
                "report": None,
            },
        ),
    ],
)
def test_documented_defaults(function: Callable[..., object], defaults: dict[str, object]) -> None:
    """The values of the papers, and of the chapter's text."""
    parameters = inspect.signature(function).parameters.values()
    assert {p.name: p.default for p in parameters if p.default is not p.empty} == defaults


def words_of(alphabetic: int, other: int = 0, length: int = 4) -> str:
    return " ".join(["the", "and", *["b" * length] * (alphabetic - 2), *["1234"] * other])


@pytest.mark.parametrize(
    ("rule", "passes", "fails"),
    [
        ("word_count", words_of(50), words_of(49)),
        ("word_count", words_of(100_000), words_of(100_001)),
        ("mean_word_length", words_of(60, length=3), words_of(60, length=2)),
        ("mean_word_length", "b" * 10, "b" * 11),
        ("symbol_ratio", words_of(90) + " #" * 10, words_of(89) + " #" * 11),
        ("symbol_ratio", words_of(90) + "…" * 9, words_of(90) + "…" * 10),
        ("bullet_lines", "- a\n" * 9 + "a", "- a\n" * 10),
        ("ellipsis_lines", "a...\n" * 3 + "a\n" * 7, "a…\n" * 4 + "a\n" * 6),
        ("alphabetic_words", words_of(80, 20), words_of(79, 21)),
    ],
)
def test_gopher_at_its_limits(rule: str, passes: str, fails: str) -> None:
    assert rule not in gopher_quality(passes)
    assert rule in gopher_quality(fails)


def test_stop_words_are_counted_once_each() -> None:
    assert "stop_words" not in gopher_quality("THE bread AND")
    assert "stop_words" in gopher_quality("the bread the bread, andy")
    every = "the be to of and that have with".split()
    for one in every:
        for other in every:
            assert ("stop_words" in gopher_quality(f"{one} {other}")) == (one == other)


def test_repetition_has_the_limits_of_the_paper() -> None:
    """Rae et al. (2021), table A1."""
    assert cleaning._TOP_NGRAMS == {2: 0.20, 3: 0.18, 4: 0.16}
    assert cleaning._COPIED_NGRAMS == {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    lines = [f"{chr(97 + i) * 9}" for i in range(20)]
    assert "copied_lines" not in gopher_repetition("\n".join([*lines[:7], *["x"] * 4]))
    assert "copied_lines" in gopher_repetition("\n".join([*lines[:6], *["x"] * 5]))
    assert "copied_line_characters" not in gopher_repetition("\n".join([*lines[:8], *lines[:2]]))
    assert "copied_line_characters" in gopher_repetition("\n".join([*lines[:7], *lines[:2]]))
    assert "copied_paragraphs" not in gopher_repetition("\n\n".join([*lines[:7], *["x"] * 4]))
    assert "copied_paragraphs" in gopher_repetition("\n \n".join([*lines[:6], *["x"] * 5]))
    some = [*lines[:8], *lines[:2]]
    assert "copied_paragraph_characters" not in gopher_repetition("\n\n".join(some))
    some = [*lines[:7], *lines[:2]]
    assert "copied_paragraph_characters" in gopher_repetition("\n\n".join(some))


@pytest.mark.parametrize(
    ("rule", "passes", "fails"),
    [
        ("punctuated_lines", "a.\n" * 13 + "a\n" * 87, "a.\n" * 12 + "a\n" * 88),
        ("short_lines", "a" * 30, "a" * 29),
        ("short_lines", ("a" * 30 + "\n") * 34 + "a\n" * 66, ("a" * 30 + "\n") * 33 + "a\n" * 67),
        ("copied_lines", "ab\nab\n" + "c" * 17, "ab\nab\n" + "c" * 16),
    ],
)
def test_fineweb_at_its_limits(rule: str, passes: str, fails: str) -> None:
    assert rule not in fineweb_quality(passes)
    assert rule in fineweb_quality(fails)


def test_c4_at_its_limits() -> None:
    five, four = "One two three four five.", "One two three four."
    assert c4_clean(f"{five}\n{four}\n{five}!\n{five}”") == (f"{five}\n{five}!\n{five}”", [])
    assert c4_clean(f"{five} {five}").failed == ["sentences"]
    assert c4_clean(f"{five} {five} Six?").failed == []
    for end in (".", "!", "?", '"', "”"):
        assert c4_clean(five[:-1] + end).text == five[:-1] + end
    for end in (":", ",", "...", "'"):
        assert c4_clean(five[:-1] + end).text == ""


def test_lines_of_thirty_characters_count() -> None:
    for size, left in ((29, 2), (30, 1)):
        documents = [Document("a" * size, str(i)) for i in range(2)]
        assert len(list(remove_repeated_lines(documents))) == left


def test_thirteen_words_in_common() -> None:
    exam = " ".join(f"w{i}" for i in range(30))
    for count, left in ((12, 1), (13, 0)):
        text = " ".join(f"w{i}" for i in range(5, 5 + count)) + " end"
        assert len(list(decontaminate([Document(text)], [exam]))) == left
        padded = f"{text} of a sentence that is otherwise quite innocent"
        assert len(list(clean_documents([Document(padded)], evaluation=[exam]))) == left


def test_short_texts_pass_the_filter_of_languages() -> None:
    german = cleaning._STORY["de"]
    for size, left in ((199, 1), (200, 0)):
        text = " ".join(german.split())[:size].ljust(size, ".")
        kept = list(clean_documents([Document(text)], language="en"))
        assert len(kept) == left, size


def test_five_words_are_a_document() -> None:
    kept = [d.text for d in clean_documents([Document("one two three four"), Document("a " * 5)])]
    assert kept == []  # four words, and words that are too short
    assert len(list(clean_documents([Document("one two three four five")]))) == 1
