"""Byte-pair encoding of chapter 05: against naive code, tiktoken and tokenizers; bad input."""

import base64
import dataclasses
import json
import os
import pickle
import random
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from unicodedata import normalize

import jaxtyping
import numpy as np
import pytest
import tiktoken
import tiktoken.load
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public
from tokenizers import models, pre_tokenizers, trainers

from llmbook import tokenizer as module
from llmbook.corpus import Document
from llmbook.tokenizer import (
    GPT2_PATTERN,
    GPT4_PATTERN,
    GPT4O_PATTERN,
    QWEN2_PATTERN,
    BPETokenizer,
    SpecialTokens,
    TextSteps,
    WordCache,
    check_special_tokens,
    count_words,
    learn_merges,
    naming_file,
    pretokenize,
    read_json_object,
    train_bpe,
    train_bpe_files,
    valid_text,
)

END = "<|endoftext|>"
BYTES = {i: bytes([i]) for i in range(256)}
# Our own words in many scripts, code, white space, and things that break tokenizers.
TEXTS = [
    "The baker's oven wasn't hot; they'LL wait. It's 7:30, 12345 loaves cost €98,765.40!",
    "Der Bäcker backt süße Brötchen für große Hunde. Çok güzel, naïve façade, Ærøskøbing.",
    "Пекарь печёт хлеб каждый день. Ο φούρναρης ψήνει ψωμί. האופה אופה לחם. الخباز يخبز الخبز.",
    "パン屋さんは毎朝パンを焼きます。面包师每天早上烤面包。빵집 주인은 매일 아침 빵을 굽는다.",
    "बेकर हर सुबह रोटी बनाता है। คนทำขนมปังอบขนมปังทุกเช้า Thợ làm bánh nướng bánh mì mỗi sáng",
    "🙂🙃 👨‍👩‍👧 🏳️‍🌈 e\u0301 \u200b\ufeff ﬁ Å ſ 'ſ ½ ² ٣٤٥ Ⅷ 一二三",
    "def bake(loaves: int) -> None:\n    for i in range(loaves):\n\t\tprint(f'{i:>5}')\r\n\r\n\n",
    "  leading,   runs   of \t\t tabs \n \n   and trailing  \n  ",
    "\x00\x01\x7f\x85\xa0\u2028\u3000 control",
    "https://example.org/a?b=c&d=%20#e <tag attr='x'>&amp;</tag> {}[]()$$$ ====\n----\n",
    "aaaaaaaaaaaaaaaa bababababab " * 3,
    "",
    " ",
    "\n",
]
# All that Python's Unicode knows: for newer letters the engines' versions differ.
KNOWN = st.characters(exclude_categories=("Cs", "Cn"))
MIXED = st.lists(
    st.sampled_from(
        [w for t in TEXTS for w in re.findall(r"\s+|\S+", t)] + [END, "'s", "  ", "\r\n"]
    )
    | st.text(KNOWN, max_size=5)
).map("".join)


@pytest.fixture(scope="module")
def ours() -> BPETokenizer:
    return train_bpe(TEXTS * 3, 700, special_tokens=[END, "<|pad|>"])


@pytest.fixture(scope="module")
def encoding(ours: BPETokenizer) -> tiktoken.Encoding:
    return ours.to_tiktoken()


@pytest.fixture(scope="module")
def theirs(ours: BPETokenizer, tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    path = tmp_path_factory.mktemp("saved") / "tokenizer.json"
    ours.save(path)
    return tokenizers.Tokenizer.from_file(str(path))


@pytest.fixture(scope="module")
def gpt2() -> BPETokenizer:
    return train_bpe(TEXTS, 500, pattern=GPT2_PATTERN)


@pytest.fixture
def untyped() -> Iterator[None]:
    """Switch jaxtyping's checks off, as they are for a reader, to see our own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def naive(words: Counter[str], size: int) -> list[tuple[bytes, bytes]]:
    """Count all pairs anew for each merge."""
    split = {word: [bytes([byte]) for byte in word.encode()] for word in words}
    merges: list[tuple[bytes, bytes]] = []
    while len(merges) < size:
        counts: Counter[tuple[bytes, bytes]] = Counter()
        for word, tokens in split.items():
            for pair in pairwise(tokens):
                counts[pair] += words[word]
        if not counts:
            break
        best = max(counts.items(), key=lambda item: (item[1], item[0]))[0]
        merges.append(best)
        for word, tokens in split.items():
            merged, i = [], 0
            while i < len(tokens):
                if tuple(tokens[i : i + 2]) == best:
                    merged.append(tokens[i] + tokens[i + 1])
                    i += 2
                else:
                    merged.append(tokens[i])
                    i += 1
            split[word] = merged
    return merges


def in_order(tokenizer: BPETokenizer, text: str) -> list[int]:
    """Encode by applying every merge in turn to every word: the definition."""
    ids = {token: id for id, token in tokenizer.vocabulary.items()}
    result = []
    for word in pretokenize(text, tokenizer.pattern):
        tokens = [bytes([byte]) for byte in word.encode()]
        for a, b in tokenizer.merges:
            merged: list[bytes] = []
            while tokens:
                if tokens[:2] == [a, b]:
                    merged.append(a + b)
                    del tokens[:2]
                else:
                    merged.append(tokens.pop(0))
            tokens = merged
        result += [ids[token] for token in tokens]
    return result


class TestPretokenize:
    def test_gpt4_pattern_cuts_as_the_published_one(self) -> None:
        source = Path(openai_public.__file__).read_text(encoding="utf-8")
        published = re.search(r'def cl100k_base.*?"pat_str": r"""(.*?)""",', source, re.S)
        older = re.search(r'^r50k_pat_str = \(\s*r"""(.*?)"""', source, re.S | re.M)
        assert published and older
        for text in [*TEXTS, *map("".join, zip(TEXTS, reversed(TEXTS), strict=True))]:
            assert pretokenize(text) == pretokenize(text, published[1])
            assert pretokenize(text, GPT2_PATTERN) == pretokenize(text, older[1])

    @given(MIXED)
    def test_nothing_is_lost(self, text: str) -> None:
        for pattern in (GPT2_PATTERN, GPT4_PATTERN, r"\p{L}+", r"x*", "(?:b)"):
            words = pretokenize(text, pattern)
            assert "".join(words) == text and all(words)

    @pytest.mark.usefixtures("untyped")
    @pytest.mark.parametrize("pattern", ["(", "(a)", r"\p{Nonsense}", "*", 5, None, ["a"], b"a"])
    def test_bad_patterns(self, pattern: Any) -> None:
        for call in (
            lambda: pretokenize("a", pattern),
            lambda: count_words(["a"], pattern),
            lambda: train_bpe(["a"], 300, pattern=pattern),
            lambda: BPETokenizer.from_merges([], pattern=pattern),
            lambda: BPETokenizer(BYTES, [], pattern=pattern),
        ):
            with pytest.raises(ValueError, match=r"^pattern: .*" + re.escape(repr(pattern))):
                call()

    def test_defaults(self) -> None:
        """Word patterns and special tokens are GPT-4's and one mark, wherever none are given."""
        text = "WE'LL bake 12345\n\n loaves"
        assert (
            pretokenize(text) == pretokenize(text, GPT4_PATTERN) != pretokenize(text, GPT2_PATTERN)
        )
        assert count_words([text]) == Counter(pretokenize(text, GPT4_PATTERN))
        for made in (
            train_bpe([text], 260),
            BPETokenizer.from_merges(train_bpe([text], 260).merges),
        ):
            assert made.pattern == GPT4_PATTERN and made.special_tokens == {END: 259}
            assert made.steps == TextSteps() and not made.ignore_merges
        bare = BPETokenizer(BYTES, [])
        assert (bare.pattern, bare.special_tokens, bare.ignore_merges) == (GPT4_PATTERN, {}, False)

    def test_surrogates(self) -> None:
        assert valid_text("a\ud83d\ude42\ude42") == "a🙂\ufffd"
        with pytest.raises(ValueError, match="word: expected a str, got 5"):
            valid_text(5, "word")
        assert pretokenize("a\ud83d") == ["a", "\ufffd"]
        assert pretokenize("\ud83d\ude42") == ["🙂"]


class TestTraining:
    @settings(max_examples=120)
    @given(
        st.dictionaries(st.text("aab é", max_size=9), st.integers(1, 6), max_size=8),
        st.integers(0, 40),
    )
    def test_as_the_naive_trainer(self, words: dict[str, int], size: int) -> None:
        assert learn_merges(words, size) == naive(Counter(words), size)

    def test_as_the_naive_trainer_on_text(self) -> None:
        words = count_words(TEXTS * 2)
        assert learn_merges(words, 400) == naive(words, 400)

    def test_ties_go_to_the_greatest_bytes(self) -> None:
        assert learn_merges({"ab": 1, "cd": 1, "ca": 1}, 1) == [(b"c", b"d")]
        # a prefix is less than what it begins
        assert learn_merges({"aXb": 1, "aXc": 1, "aY": 2}, 2) == [(b"a", b"Y"), (b"a", b"X")]
        assert learn_merges({"\u00e9": 1, "zz": 1}, 1) == [(b"\xc3", b"\xa9")]

    def test_more_than_55296_tokens(self) -> None:
        """Tokens are characters inside: those that stand in the range of surrogates work, too."""
        words, frequencies, new = ["ababc", "cab"], [2, 1], chr(55_296)
        counts, where = module._index_pairs(words, frequencies)
        found = module._merge_everywhere("ab", new, words, frequencies, counts, where)
        assert words == [new + new + "c", "c" + new]
        assert found == {new + new: 2, new + "c": 2, "c" + new: 1}
        assert {pair: count for pair, count in counts.items() if count} == {}
        found = module._merge_everywhere(new + new, "x", words, frequencies, found, where)
        assert words == ["xc", "c" + new] and found == {"xc": 2}

    def test_no_token_is_learned_twice_and_each_is_reachable(self, ours: BPETokenizer) -> None:
        tokens = list(ours.vocabulary.values())
        assert len(set(tokens)) == len(tokens) == 698
        for id, token in ours.vocabulary.items():
            text = token.decode("utf-8", "replace")
            if "\ufffd" not in text and len(pretokenize(text)) == 1:
                assert ours.encode(text) == [id]

    def test_ids(self, ours: BPETokenizer) -> None:
        assert [ours.vocabulary[i] for i in range(256)] == [bytes([i]) for i in range(256)]
        assert ours.special_tokens == {END: 698, "<|pad|>": 699}
        assert ours.vocab_size == 700

    def test_order_and_number_of_texts_do_not_matter(self) -> None:
        forward, backward = train_bpe(TEXTS, 400), train_bpe(iter(TEXTS[::-1]), 400)
        assert forward == backward
        assert train_bpe(["ab" * 5, "", "ab"], 300) == train_bpe(["ab", "ab" * 5], 300)

    def test_too_little_text_gives_fewer_tokens(self) -> None:
        tokenizer = train_bpe(["aaaa"], 1000)
        assert tokenizer.vocab_size == 256 + 2 + 1
        assert tokenizer.encode("aaaa") == [257]
        assert train_bpe(["a"], 257).vocab_size == 257

    def test_special_tokens_separate(self) -> None:
        with_mark = train_bpe([f"ab{END}ab{END}"], 300)
        assert with_mark.merges == [(b"a", b"b")]
        assert count_words(["xSSyS"], special_tokens=["S", "SS"]) == {"x": 1, "y": 1}

    def test_workers(self) -> None:
        texts = [text * 400 for text in TEXTS]
        assert count_words(texts, workers=2) == count_words(iter(texts))

    def test_a_long_document(self) -> None:
        long = train_bpe(["a" * 1_000_000, "ab " * 50_000], 300)
        assert long.merges[:2] == [(b"a", b"a"), (b"aa", b"aa")]

    @pytest.mark.parametrize(
        ("texts", "size", "options", "message"),
        [
            ([], 300, {}, "texts: expected some text to train on, got none"),
            (["", ""], 300, {}, "texts: expected some text"),
            ([END], 300, {}, "texts: expected some text"),
            ("one text", 300, {}, "texts: expected several"),
            (["a"], 256, {}, "vocab_size: expected at least 257"),
            (["a"], 10**7, {}, "vocab_size"),
            (["a"], 300, {"special_tokens": ["x1", "x1"]}, "'x1' several times"),
            (["a"], 300, {"special_tokens": [""]}, "non-empty"),
            (["a"], 300, {"special_tokens": ["\ud800"]}, "valid texts"),
            (["a"], 300, {"special_tokens": ["a"]}, "'a' is an ordinary token"),
            (["a"], 300, {"special_tokens": "<s>"}, "got one str"),
            (["a"], 300, {"workers": 0}, "workers"),
        ],
    )
    def test_bad_input(self, texts: Any, size: Any, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            train_bpe(texts, size, **options)

    @pytest.mark.usefixtures("untyped")
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"texts": 5}, "texts: expected "),
            ({"special_tokens": 5}, "special_tokens: expected "),
            ({"special_tokens": b"<s>"}, "special_tokens: expected "),
            ({"special_tokens": [5]}, "special_tokens: expected "),
            ({"workers": "2"}, "workers: expected a whole number, got '2'"),
            ({"workers": True}, "workers: expected a whole number, got True"),
            ({"vocab_size": 300.0}, "vocab_size: expected a whole number, got 300.0"),
            ({"vocab_size": 1_000_001}, "vocab_size: expected at most 1,000,000, got 1000001"),
        ],
    )
    def test_wrong_types(self, options: dict[str, Any], message: str) -> None:
        given: dict[str, Any] = {"texts": ["a"], "vocab_size": 300, **options}
        with pytest.raises(ValueError, match=re.escape(message)):
            train_bpe(**given)
        if "vocab_size" not in options:
            with pytest.raises(ValueError, match=re.escape(message)):
                count_words(
                    given.pop("texts"),
                    GPT4_PATTERN,
                    **{k: v for k, v in options.items() if k != "texts"},
                )

    @pytest.mark.usefixtures("untyped")
    @pytest.mark.parametrize(
        ("counts", "message"),
        [
            (5, "counts: expected words with their counts, such as a Counter, got int"),
            (["ab"], "counts: expected words with their counts, such as a Counter, got list"),
            ({"ab": 1.5}, "counts: expected a whole number, got 1.5"),
            ({"ab": "1"}, "counts: expected a whole number, got '1'"),
            ({"ab": None}, "counts: expected a whole number, got None for 'ab'"),
            ({"ab": True}, "counts: expected a whole number, got True"),
            ({"cd": 2, "ab": -1}, "counts: expected at least 0, got -1"),
            ({b"ab": 1}, "counts: expected a str, got b'ab'"),
        ],
    )
    def test_wrong_counts(self, counts: Any, message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            learn_merges(counts, 1)
        assert learn_merges({"ab": np.int64(2)}, 1) == [(b"a", b"b")]
        for size in (-1, 1.0, "1"):
            with pytest.raises(ValueError, match=r"^n_merges: expected"):
                learn_merges({}, size)

    def test_bad_counts(self) -> None:
        with pytest.raises(ValueError, match="counts: expected at least 0, got -1"):
            learn_merges({"ab": -1}, 1)
        assert learn_merges({"ab": 0, "\ud800": 1}, 0) == [] == learn_merges({}, 5)

    def test_what_is_no_text(self) -> None:
        with pytest.raises(ValueError, match="texts: expected Documents or texts, got int at"):
            train_bpe(iter(["a", 5]), 300)  # type: ignore[list-item]

    def test_documents_count_by_their_text(self) -> None:
        documents = [Document(text) for text in TEXTS]
        assert train_bpe(documents, 300) == train_bpe(TEXTS, 300)


class TestFiles:
    def write(self, folder: Path, marks: Iterable[str] = (END,)) -> Path:
        rng = random.Random(0)
        parts = [rng.choice(TEXTS) + rng.choice(list(marks)) for _ in range(500)]
        path = folder / "text.txt"
        path.write_text("".join(parts), encoding="utf-8", newline="")
        return path

    @pytest.mark.parametrize("size", [1, 7, 1000, 10_000, 10**9])
    def test_chunks_change_nothing(self, tmp_path: Path, size: int) -> None:
        special = (END, "<|pad|>")
        path = self.write(tmp_path, special)
        chunks = module._chunks(path, module._separators(special), size)
        assert [end for _, end in chunks[:-1]] == [start for start, _ in chunks[1:]]
        assert (chunks[0][0], chunks[-1][1]) == (0, path.stat().st_size)
        assert size > 10_000 or len(chunks) > 3
        total: Counter[str] = Counter()
        for start, end in chunks:
            job = (str(path), start, end, "strict", GPT4_PATTERN, special)
            total.update(module._count_chunk(job))
        text = path.read_bytes().decode()
        assert total == count_words([text], special_tokens=special)

    @pytest.mark.parametrize(
        ("megabytes", "workers", "jobs"), [(1, 1, 1), (4, 1, 4), (5, 4, 5), (32, 4, 16)]
    )
    def test_processes_for_the_size(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        megabytes: int,
        workers: int,
        jobs: int,
    ) -> None:
        path = tmp_path / "text.txt"
        path.write_text(("a" * (1000 - len(END)) + END) * 1000 * megabytes, encoding="utf-8")
        asked: list[tuple[int, int]] = []

        def ask(_: object, given: list[object], workers: int) -> list[Counter[str]]:
            asked.append((workers, len(given)))
            return []

        monkeypatch.setattr(module, "ordered_map", ask)
        monkeypatch.setattr(os, "cpu_count", lambda: 64)
        module._count_files([path], GPT4_PATTERN, (END,), None, "strict")
        assert asked == [(workers, pytest.approx(jobs, abs=1))]

    def test_a_mark_across_blocks(self, tmp_path: Path) -> None:
        path = tmp_path / "text.txt"
        for shift in range(-15, 3):
            path.write_text("a" * ((1 << 20) + shift + 5) + END + "b", encoding="utf-8")
            cuts = module._chunks(path, [END.encode()], 5)
            assert cuts == [
                (0, (1 << 20) + shift + 5),
                ((1 << 20) + shift + 5, path.stat().st_size),
            ]

    @pytest.mark.parametrize("marks", [(END, "<|p|>"), ("<|p|>", END)])
    def test_a_long_mark_across_blocks_beside_a_shorter_one(
        self, tmp_path: Path, marks: tuple[str, str]
    ) -> None:
        """A block may end in any part of the long one, whatever follows and whichever is first."""
        path = tmp_path / "text.txt"
        block = 1 << 20  # what is read at a time, from the place where the search begins
        for shift in range(-14, 4):
            for first, second in ((END, "<|p|>"), ("<|p|>", END), ("", END + "<|p|>")):
                path.write_text("a" * (block + 5 + shift) + first + second + "b", encoding="utf-8")
                cuts = module._chunks(path, module._separators(marks), 5)
                place = block + 5 + shift
                assert cuts[0] == (0, place) and cuts[1][0] == place, (shift, first, cuts)
                total: Counter[str] = Counter()
                for start, end in cuts:
                    job = (str(path), start, end, "strict", GPT4_PATTERN, marks)
                    total.update(module._count_chunk(job))
                assert total == {"a" * place: 1, "b": 1}

    def test_overlapping_marks_do_not_cut(self) -> None:
        assert module._separators(("aa", "<s>", "<s><s>", "ab", "xyx")) == []
        assert module._separators((END, "<|pad|>", "zz")) == [END.encode(), b"<|pad|>"]

    def test_as_from_texts(self, tmp_path: Path) -> None:
        path = self.write(tmp_path)
        (tmp_path / "empty.txt").touch()
        text = path.read_bytes().decode()
        paths = [path, str(tmp_path / "empty.txt")]
        alone = train_bpe_files(paths, 600)
        assert alone == train_bpe([text], 600) == train_bpe_files(paths, 600, workers=2)

    def test_broken_utf8(self, tmp_path: Path) -> None:
        path = tmp_path / "broken.txt"
        path.write_bytes(b"abc\xff" * 3)
        with pytest.raises(ValueError, match=r"broken.txt is not UTF-8: byte 0xff at 3"):
            train_bpe_files(path, 300)
        assert train_bpe_files(path, 300, errors="replace").vocab_size > 257

    def test_bad_paths(self, tmp_path: Path) -> None:
        (tmp_path / "empty.txt").touch()
        with pytest.raises(ValueError, match="paths: expected some text to train on, got none"):
            train_bpe_files(tmp_path / "empty.txt", 300)
        with pytest.raises(ValueError, match="folder"):
            train_bpe_files(tmp_path, 300)
        with pytest.raises(FileNotFoundError):
            train_bpe_files(tmp_path / "none.txt", 300)
        with pytest.raises(ValueError, match="at least one"):
            train_bpe_files([], 300)


class TestEncoding:
    def test_by_definition(self, ours: BPETokenizer, gpt2: BPETokenizer) -> None:
        for text in TEXTS:
            assert ours.encode(text) == in_order(ours, text)
            assert gpt2.encode(text) == in_order(gpt2, text)

    @settings(max_examples=120)
    @given(text=MIXED)
    def test_as_tiktoken_and_tokenizers(
        self,
        ours: BPETokenizer,
        encoding: tiktoken.Encoding,
        theirs: tokenizers.Tokenizer,
        text: str,
    ) -> None:
        assert ours.encode(text) == encoding.encode(text, disallowed_special=())
        with_special = ours.encode(text, allowed_special="all")
        assert with_special == encoding.encode(text, allowed_special="all")
        assert with_special == theirs.encode(text).ids
        assert ours.decode(with_special) == text == theirs.decode(with_special, False)

    @given(st.binary(max_size=40))
    def test_broken_utf8(
        self, ours: BPETokenizer, encoding: tiktoken.Encoding, data: bytes
    ) -> None:
        text = data.decode("utf-8", "replace")
        assert ours.encode(text) == encoding.encode_ordinary(text)
        ids = list(data)  # any bytes can come from a model
        assert ours.decode(ids) == text == encoding.decode(ids)
        assert ours.decode_bytes(ids) == data
        assert "".join(ours.decode_stream(ids)) == text

    @given(st.text(st.characters() | st.characters(categories=["Cs"]), max_size=12))
    def test_surrogates(self, ours: BPETokenizer, encoding: tiktoken.Encoding, text: str) -> None:
        text = re.sub(r"[^\x00-\u2fff\ud800-\udfff]", "x", text)
        assert ours.encode(text) == encoding.encode_ordinary(text)

    def test_on_gpt2_pattern(self, gpt2: BPETokenizer, tmp_path: Path) -> None:
        gpt2.save(tmp_path / "tokenizer.json")
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        for text in TEXTS:
            assert gpt2.encode(text) == theirs.encode(text).ids
            assert gpt2.encode(text) == gpt2.to_tiktoken().encode_ordinary(text)

    @settings(max_examples=30)
    @given(
        st.lists(st.text("aab ", max_size=12), min_size=1, max_size=6), st.text("aab ", max_size=15)
    )
    def test_any_training_gives_what_tiktoken_can_use(self, texts: list[str], text: str) -> None:
        if any(texts):
            tokenizer = train_bpe(texts, 280)
            assert tokenizer.encode(text) == tokenizer.to_tiktoken().encode_ordinary(text)

    def test_long_words(self, ours: BPETokenizer) -> None:
        run = ours.encode("a" * 1_000_000)
        letters = "".join(random.Random(0).choices("abcdefghij", k=20_000))
        mixed = ours.encode(letters)
        assert ours.decode(run) == "a" * 1_000_000 and ours.decode(mixed) == letters
        assert not any(len(word) > 64 for word in ours._tables.words)

    @pytest.mark.usefixtures("untyped")
    def test_bad_caches(self) -> None:
        for options, message in (
            ({"encode": 5}, "encode: expected a function of a word, got 5"),
            ({"size": 0}, "size: expected at least 1, got 0"),
            ({"longest": -1}, "longest: expected at least 0, got -1"),
        ):
            with pytest.raises(ValueError, match=message):
                WordCache(**{"encode": lambda word: (1,), **options})

    def test_the_cache_is_bounded(self) -> None:
        cache = WordCache(lambda word: (len(word),), size=3, longest=2)
        words = ("a", "bb", "ccc", "c", "d", "a")
        assert [cache[word] for word in words] == [(1,), (2,), (3,), (1,), (1,), (1,)]
        assert list(cache) == ["d", "a"], "full with a, bb and c, it is emptied for d"

    def test_batches(self, ours: BPETokenizer) -> None:
        texts = [*TEXTS, TEXTS[0] * 13_000]
        expected = [ours.encode(text) for text in texts]
        assert ours.encode_batch(texts) == expected == ours.encode_batch(texts, workers=2)
        assert ours.encode_batch([]) == []
        assert ours.encode_batch([END], allowed_special="all") == [[698]]
        with pytest.raises(ValueError, match="texts"):
            ours.encode_batch("one text")

    def test_pickle(self, ours: BPETokenizer) -> None:
        ours.encode("fill the cache")
        copy = pickle.loads(pickle.dumps(ours))
        assert copy == ours and copy.encode(TEXTS[0]) == ours.encode(TEXTS[0]) and repr(copy)


class TestSpecialTokens:
    def test_ordinary_unless_allowed(self, ours: BPETokenizer) -> None:
        text = f"a{END}b<|pad|>"
        assert not {698, 699} & set(ours.encode(text))
        assert ours.encode(text, allowed_special="all") == [97, 698, 98, 699]
        assert ours.encode(text, allowed_special=["<|pad|>"])[-1] == 699
        assert 698 not in ours.encode(text, allowed_special={"<|pad|>"})
        assert ours.encode(END * 3, allowed_special="all") == [698] * 3

    def test_longest_first(self) -> None:
        tokenizer = train_bpe(["x"], 300, special_tokens=["<a>", "<a><b>", "<b>", "b><"])
        ids = tokenizer.special_tokens
        assert tokenizer.encode("<a><b><b>", allowed_special="all") == [ids["<a><b>"], ids["<b>"]]
        assert tokenizer.encode("<a><b>", allowed_special=["<a>", "<b>"]) == [
            ids["<a>"],
            ids["<b>"],
        ]

    def test_longest_first_as_tokenizers(self, tmp_path: Path) -> None:
        tokenizer = train_bpe(TEXTS, 400, special_tokens=["<a>", "<a><b>", "<b>", "b><", "é é"])
        tokenizer.save(tmp_path / "t.json")
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
        for text in ("<a><b><b>", "<a><a><b>b><", "x<b><a> é é é", "b><b>"):
            assert tokenizer.encode(text, allowed_special="all") == theirs.encode(text).ids

    @pytest.mark.usefixtures("untyped")
    @pytest.mark.parametrize("allowed", ["<|pad|>", ["<|none|>"], ["all"], "", 5, None, [[1]]])
    @pytest.mark.parametrize("argument", ["allowed_special", "disallowed_special"])
    def test_unknown(self, ours: BPETokenizer, argument: str, allowed: Any) -> None:
        message = rf"^{argument}: expected 'all' or some of \['<\|endoftext"
        with pytest.raises(ValueError, match=message):
            ours.encode("a", **{argument: allowed})
        for several in (ours.encode_batch, ours.encode_iterable):
            with pytest.raises(ValueError, match=message):
                several(["a"], **{argument: allowed})

    @pytest.mark.parametrize("text", ["a", f"a{END}", "<|pad|>b", f"<|pad|>{END}", "<|endoftex"])
    @pytest.mark.parametrize("allowed", [(), (END,), "all"])
    @pytest.mark.parametrize("disallowed", [(), (END,), ("<|pad|>", END), "all"])
    def test_disallowed_as_in_tiktoken(
        self,
        ours: BPETokenizer,
        encoding: tiktoken.Encoding,
        text: str,
        allowed: Any,
        disallowed: Any,
    ) -> None:
        options = {"allowed_special": allowed, "disallowed_special": disallowed}
        sets = {name: set(v) if isinstance(v, tuple) else v for name, v in options.items()}
        try:
            expected = encoding.encode(text, **sets)
        except ValueError:
            for encode in (
                lambda: ours.encode(text, **options),
                lambda: ours.encode_batch(["x", text], **options),
                lambda: list(ours.encode_iterable([*text], **options)),
            ):
                with pytest.raises(ValueError, match="text: expected none of disallowed_special"):
                    encode()
        else:
            assert ours.encode(text, **options) == expected
            assert list(ours.encode_iterable([*text], **options)) == expected

    def test_found_between_ordinary_text(self) -> None:
        special = SpecialTokens({"<a>": 300, "<a><b>": 301})
        seen: list[str] = []

        def ordinary(text: str) -> list[int]:
            seen.append(text)
            return list(text.encode())

        assert special.encode("x<a><b>y<a>", ("<a>", "<a><b>"), ordinary) == [120, 301, 121, 300]
        assert seen == ["x", "y", ""]
        assert special.encode("<a>", (), ordinary) == [60, 97, 62]
        assert special.allowed("all") == ("<a>", "<a><b>") and special.allowed(["<a>"]) == ("<a>",)
        assert special.between("x<a><b>y<a>") == ["x", "y", ""]
        assert SpecialTokens().between("x<a>") == ["x<a>"]
        assert special == {"<a>": 300, "<a><b>": 301}
        assert pickle.loads(pickle.dumps(special)) == special

    def test_checked(self) -> None:
        assert check_special_tokens(["<a>", "<b>"]) == ("<a>", "<b>")
        for bad in ("<a>", ["<a>", "<a>"], [""], ["\ud800"]):
            with pytest.raises(ValueError, match="special_tokens"):
                check_special_tokens(bad)

    def test_decoding(self, ours: BPETokenizer) -> None:
        assert ours.decode([97, 698]) == f"a{END}"
        assert ours.decode([97, 698], skip_special_tokens=True) == "a"
        assert "".join(ours.decode_stream([97, 698, 98], skip_special_tokens=True)) == "ab"


class TestDecoding:
    @given(st.lists(st.integers(0, 699)))
    def test_stream_gives_the_whole(self, ours: BPETokenizer, ids: list[int]) -> None:
        assert "".join(ours.decode_stream(iter(ids))) == ours.decode(ids)

    def test_stream_waits_for_whole_characters(self, ours: BPETokenizer) -> None:
        data = list("a🙂é".encode())
        assert list(ours.decode_stream(data)) == ["a", "🙂", "é"]
        assert list(ours.decode_stream(data[:3])) == ["a", "�"]

    def test_arrays_and_tensors(self, ours: BPETokenizer) -> None:
        ids = ours.encode(TEXTS[0])
        assert ours.decode(np.array(ids, dtype=np.uint16)) == TEXTS[0]
        assert ours.decode(torch.tensor(ids)) == TEXTS[0]
        assert ours.decode([]) == "" == "".join(ours.decode_stream([]))

    @pytest.mark.parametrize("bad", [[True], [97.0], np.array([[97, 98]]), torch.tensor([[97]])])
    def test_what_is_no_id(self, ours: BPETokenizer, bad: Any) -> None:
        with pytest.raises(ValueError, match=r"got .* at index 0"):
            ours.decode(bad)

    @pytest.mark.usefixtures("untyped")
    @pytest.mark.parametrize("bad", [65, None, "text", b"AB", np.array(65), torch.tensor(65)])
    def test_what_is_not_several_ids(self, ours: BPETokenizer, bad: Any) -> None:
        for decode in (ours.decode, ours.decode_bytes, ours.decode_stream):
            with pytest.raises(ValueError, match=r"ids: expected several ids, such as \[65\], got"):
                decode(bad)

    def test_a_gap_of_the_ids(self) -> None:
        tokenizer = BPETokenizer(BYTES, [], special_tokens={END: 5000})
        with pytest.raises(
            ValueError, match=r"ids: expected ids that a token has, got 4000 at inde"
        ):
            tokenizer.decode([5000, 4000])
        with pytest.raises(ValueError, match=r"vocabulary, below 5001, got 5001 at index 0"):
            tokenizer.decode([5001])

    def test_tensors_of_one_id(self, ours: BPETokenizer) -> None:
        assert ours.decode(list(torch.tensor([104, 105]))) == "hi" == ours.decode(iter(b"hi"))

    @pytest.mark.parametrize("bad", [-1, 700, 10**12])
    def test_ids_out_of_range(self, ours: BPETokenizer, bad: int) -> None:
        with pytest.raises(ValueError, match=rf"below 700, got {bad} at index 1"):
            ours.decode([97, bad])
        stream = ours.decode_stream([97, bad])
        assert next(stream) == "a"
        with pytest.raises(ValueError, match="at index 1"):
            next(stream)


class TestStreaming:
    @settings(max_examples=100)
    @given(text=MIXED, data=st.data())
    def test_the_same_ids_wherever_it_is_cut(
        self, ours: BPETokenizer, gpt2: BPETokenizer, text: str, data: st.DataObject
    ) -> None:
        places = data.draw(st.lists(st.integers(0, len(text))).map(sorted))
        pieces = [text[a:b] for a, b in pairwise([0, *places, len(text)])]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_STREAM_SIZE", 1)
            for tokenizer in (ours, gpt2):
                for allowed in ((), "all"):
                    streamed = tokenizer.encode_iterable(pieces, allowed_special=allowed)
                    assert list(streamed) == tokenizer.encode(text, allowed_special=allowed)

    @settings(max_examples=100)
    @given(
        pieces=st.lists(st.text("aA' \n\t.1<>\u0301字。/s", max_size=4), max_size=12),
        pattern=st.sampled_from([*sorted(module._KNOWN_PATTERNS), r"\S+\s*"]),
    )
    def test_every_pattern(self, pieces: list[str], pattern: str) -> None:
        special = {"<a>": 256, "<": 257, "<a><a>": 258, "> ": 259}
        del special["<"]
        vocabulary = {i: bytes([i]) for i in range(256)}
        merges = [(b" ", b" "), (b" ", b"\n"), (b" \n", b" "), (b" ", b"a"), (b"\n", b"\n")]
        more = {300 + i: a + b for i, (a, b) in enumerate(merges)}
        tokenizer = BPETokenizer(vocabulary | more, merges, special_tokens=special, pattern=pattern)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_STREAM_SIZE", 1)
            for allowed in ((), ("<a>",), "all"):
                streamed = list(tokenizer.encode_iterable(pieces, allowed_special=allowed))
                assert streamed == tokenizer.encode("".join(pieces), allowed_special=allowed)

    def test_surrogate_pairs_are_joined(self, ours: BPETokenizer) -> None:
        for before in ("", "a", "，", "🙂"):  # the last two lie above all surrogates
            streamed = list(ours.encode_iterable([f"{before}\ud83d", "\ude42"]))
            assert streamed == ours.encode(f"{before}🙂")
        assert list(ours.encode_iterable(["a\ud83d", "", "b", "\ud83d"])) == ours.encode("a�b�")

    def test_lazy_and_in_constant_memory(self, ours: BPETokenizer) -> None:
        taken = 0

        def endless() -> Iterable[str]:
            nonlocal taken
            while True:
                taken += 1
                yield "The baker's oven wasn't hot. "

        ids = iter(ours.encode_iterable(endless()))
        for _ in range(100_000):
            next(ids)
        assert taken < 20_000

    def test_a_run_without_a_safe_place(self, ours: BPETokenizer) -> None:
        ids = list(ours.encode_iterable("ab" * 50 for _ in range(3_000)))
        assert ids == ours.encode("ab" * 150_000)

    @pytest.mark.usefixtures("untyped")
    def test_what_is_no_iterable_of_texts_is_refused(self, ours: BPETokenizer) -> None:
        with pytest.raises(ValueError, match="use encode"):
            list(ours.encode_iterable("text"))
        for wrong in (b"text", 5, None):
            with pytest.raises(ValueError, match=f"texts: expected an iterable of .* got {wrong}"):
                list(ours.encode_iterable(wrong))


class TestSteps:
    """What `tokenizers` does around the merges, done and saved by us."""

    def theirs(self, path: Path, **changes: Any) -> tokenizers.Tokenizer:
        """Save a tokenizer with changed parts of its file, and return what `tokenizers` reads."""
        train_bpe(TEXTS, 400, special_tokens=[END, "<s>", "</s>"]).save(path)
        data = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**data, **changes}), encoding="utf-8")
        return tokenizers.Tokenizer.from_file(str(path))

    @pytest.mark.parametrize(
        ("step", "around"),
        [
            ("llama", ((398,), ())),
            ("both", ((398,), (399, 397))),
            ("bert", ((398,), (399,))),
            ("roberta", ((398,), (399,))),
            ("nested", ((398,), (399,))),
            ("bytes", ((), ())),
        ],
    )
    def test_post_processors(self, tmp_path: Path, step: str, around: Any) -> None:
        def template(single: str) -> Any:
            special = [("<s>", 398), ("</s>", 399), (END, 397)]
            made = tokenizers.processors.TemplateProcessing(
                single=single, pair="$A $B:1", special_tokens=special
            )
            return json.loads(made.__getstate__())

        level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
        level["use_regex"] = True
        ends: dict[str, Any] = {"sep": ["</s>", 399], "cls": ["<s>", 398]}
        steps = {
            "llama": {"type": "Sequence", "processors": [level, template("<s> $A")]},
            "both": template(f"<s> $A </s> {END}"),
            "bert": {"type": "BertProcessing", **ends},
            "roberta": {
                "type": "RobertaProcessing", **ends, "trim_offsets": True, "add_prefix_space": False
            },
            "nested": {"type": "Sequence", "processors": [template("<s> $A </s>"), level, level]},
            "bytes": level,
        }  # fmt: skip
        theirs = self.theirs(tmp_path / "t.json", post_processor=steps[step])
        ours = BPETokenizer.load(tmp_path / "t.json")
        ours.save(tmp_path / "again.json")
        again = tokenizers.Tokenizer.from_file(str(tmp_path / "again.json"))
        assert BPETokenizer.load(tmp_path / "again.json") == ours
        for text in TEXTS:
            ids = ours.encode(text, allowed_special="all")
            assert ids == theirs.encode(text).ids == again.encode(text).ids
            assert ids == [*around[0], *ours.encode(text, add_special_tokens=False), *around[1]]
            bare = ours.encode(text, add_special_tokens=False)
            assert bare == theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS]
        assert ours.encode_batch(["a"], add_special_tokens=False) == [[97]]
        assert list(ours.encode_iterable(iter(TEXTS))) == ours.encode("".join(TEXTS))
        assert list(ours.encode_iterable(["a"], add_special_tokens=False)) == [97]
        pair = again.encode("a", "b").ids
        assert pair == [*ours.encode("a"), *ours.encode("b")]

    @pytest.mark.parametrize("normalizer", [None, "NFC"])
    @pytest.mark.parametrize("late", [False, True])
    def test_added_tokens(self, tmp_path: Path, normalizer: Any, late: bool) -> None:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        tokens = {END: True, "<s>": True, "</s>": True, "<think>": False, "caf\u00e9 ": False}
        listed = [
            {"id": 397 + i, "content": t, **flags, "normalized": late and not s, "special": s}
            for i, (t, s) in enumerate(tokens.items())
        ]
        step = {"type": normalizer} if normalizer else None
        theirs = self.theirs(tmp_path / "t.json", added_tokens=listed, normalizer=step)
        ours = BPETokenizer.load(tmp_path / "t.json")
        assert ours.special_tokens == {END: 397, "<s>": 398, "</s>": 399}
        assert ours.steps.added_tokens == {"<think>": 400, "caf\u00e9 ": 401}
        ours.save(tmp_path / "again.json")
        assert BPETokenizer.load(tmp_path / "again.json") == ours
        assert pickle.loads(pickle.dumps(ours)) == ours
        again = tokenizers.Tokenizer.from_file(str(tmp_path / "again.json"))
        theirs.encode_special_tokens = False
        for text in (
            *TEXTS,
            "a<think>b</s>",
            "cafe\u0301 x",
            "caf\u00e9 x<think>\u0338<s>",
            "e\u0301",
        ):
            ids = ours.encode(text, allowed_special="all")
            assert ids == theirs.encode(text).ids == again.encode(text).ids
            for skip in (False, True):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip)
            theirs.encode_special_tokens = True  # as if none were allowed
            assert ours.encode(text) == theirs.encode(text).ids
            theirs.encode_special_tokens = False
        assert 400 in ours.encode("<think>") and 398 not in ours.encode("<s>")
        assert ours.decode([97, 400, 398, 98], skip_special_tokens=True) == "a<think>b"

    @pytest.mark.parametrize("family", ["qwen", "llama"])
    def test_files_of_the_official_form(self, tmp_path: Path, family: str) -> None:
        """What stands in the tokenizer.json of Qwen 3 and of Llama 3, but for the vocabulary."""
        path, qwen = tmp_path / "t.json", family == "qwen"
        trained = train_bpe(TEXTS, 400, pattern=QWEN2_PATTERN if qwen else module._LLAMA3_PATTERN)
        trained.save(path)
        data = json.loads(path.read_text(encoding="utf-8"))
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        special = {END: True, "<|im_end|>": True, "<think>": not qwen}
        data["added_tokens"] = [
            {"id": 399 + place, "content": text, **flags, "special": kind}
            for place, (text, kind) in enumerate(special.items())
        ]
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
        level["use_regex"] = False
        data["pre_tokenizer"]["pretokenizers"][1] = data["decoder"] = level
        data["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
        data["normalizer"] = {"type": "NFC"} if qwen else None
        mark = {"SpecialToken": {"id": END, "type_id": 0}}
        first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        template = {
            "type": "TemplateProcessing",
            "single": [mark, first],
            "pair": [mark, first, mark, second],
            "special_tokens": {END: {"id": END, "ids": [399], "tokens": [END]}},
        }
        steps = {"type": "Sequence", "processors": [level, template]}
        data["post_processor"] = level if qwen else steps
        data["model"]["ignore_merges"] = not qwen
        path.write_text(json.dumps(data), encoding="utf-8")
        theirs, ours = tokenizers.Tokenizer.from_file(str(path)), BPETokenizer.load(path)
        for text in (*TEXTS, "<think>cafe\u0301</think><|im_end|>", "1234"):
            ids = ours.encode(text, allowed_special="all")
            assert ids == theirs.encode(text).ids and (qwen or ids[0] == 399)
            assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids)

    def test_normalizer(self) -> None:
        plain = train_bpe(TEXTS, 400)
        composing = dataclasses.replace(plain, steps=TextSteps(normalizer="NFC"))
        assert plain.encode("e\u0301") != plain.encode("\u00e9") == composing.encode("e\u0301")
        assert composing != plain and composing.encode_batch(["e\u0301"]) == [
            plain.encode("\u00e9")
        ]
        assert composing.decode(composing.encode("e\u0301")) == "\u00e9"

    @pytest.mark.usefixtures("untyped")
    @pytest.mark.parametrize("bad", ["NFKC", "nfc", 5])
    def test_unknown_normalizers(self, bad: Any) -> None:
        with pytest.raises(ValueError, match=rf"normalizer: expected one of NFC, got {bad!r}"):
            TextSteps(normalizer=bad)

    @settings(max_examples=100)
    @given(
        pieces=st.lists(
            st.text("ae' \n.1<>\u0301\u0323\u1100\u1161\u11a8=\u0338", max_size=4), max_size=9
        ),
        pattern=st.sampled_from([GPT2_PATTERN, GPT4_PATTERN, r"\S+\s*"]),
        late=st.sampled_from([(), ("<a>",), (" a",)]),
    )
    def test_streams(self, pieces: list[str], pattern: str, late: Any) -> None:
        steps = TextSteps("NFC", {"<a>": 300, " a": 301}, late, prefix=["<s>"], suffix=["<a>"])
        merges = [("\u00e9".encode()[:1], "\u00e9".encode()[1:]), (b" ", b" "), (b"1", b"1")]
        more = {256 + i: a + b for i, (a, b) in enumerate(merges)}
        special = {"<s>": 302, ">1": 303}
        tokenizer = BPETokenizer(
            BYTES | more, merges, special_tokens=special, pattern=pattern, steps=steps
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_STREAM_SIZE", 1)
            for allowed in ((), "all"):
                streamed = list(tokenizer.encode_iterable(pieces, allowed_special=allowed))
                assert streamed == tokenizer.encode("".join(pieces), allowed_special=allowed)

    def test_bad_steps(self) -> None:
        for options, message in (
            ({"added_tokens": {"<a>": 5}}, "added_tokens: expected ids of their own, got 5 again"),
            (
                {"added_tokens": {"a": 300}},
                "added_tokens: 'a' is an ordinary token already, with id",
            ),
            ({"added_tokens": {END: 300}}, "added_tokens: expected tokens that are not special"),
            ({"added_tokens": {"": 300}}, "added_tokens: expected non-empty, valid texts, got ''"),
            (
                {"added_tokens": {"<a>": -1}},
                "added_tokens: expected ids from 0 on, got -1 for '<a>'",
            ),
            ({"prefix": ["<a>"]}, "prefix: expected special or added tokens, got '<a>'"),
            ({"suffix": ["<a>"]}, "suffix: expected special or added tokens, got '<a>'"),
            ({"normalized": ["<a>"]}, "normalized: expected special or added tokens, got '<a>'"),
            ({"prefix": "<a>"}, "prefix: expected several tokens, got '<a>'"),
        ):
            with pytest.raises(ValueError, match=re.escape(message)):
                BPETokenizer(BYTES, [], special_tokens=[END], steps=TextSteps(**options))

    def test_what_gpt2_files_cannot_hold(self, tmp_path: Path) -> None:
        steps = TextSteps(normalizer="NFC")
        for tokenizer in (
            BPETokenizer(BYTES, [], steps=steps),
            BPETokenizer(BYTES, [], ignore_merges=True),
        ):
            with pytest.raises(ValueError, match="save_gpt2: expected no steps"):
                tokenizer.save_gpt2(tmp_path)
        with pytest.raises(ValueError, match="special_tokens: these files cannot make '!' special"):
            BPETokenizer(BYTES, [], special_tokens=["!"]).save_gpt2(tmp_path)


class TestOffsets:
    @settings(max_examples=100)
    @given(text=MIXED)
    def test_as_tokenizers(
        self, ours: BPETokenizer, theirs: tokenizers.Tokenizer, text: str
    ) -> None:
        ids, offsets = ours.encode_with_offsets(text, allowed_special="all")
        expected = theirs.encode(text)
        assert (ids, offsets) == (expected.ids, expected.offsets)

    @pytest.mark.parametrize("text", TEXTS)
    def test_as_tiktoken(self, ours: BPETokenizer, encoding: tiktoken.Encoding, text: str) -> None:
        """Its starts are ours, but for tokens that begin within a character: there it is unsure."""
        ids, offsets = ours.encode_with_offsets(text)
        if not ids:
            return
        whole, starts = encoding.decode_with_offsets(ids)
        assert whole == text
        for id, start, (ours_from, ours_to) in zip(ids, starts, offsets, strict=True):
            within = 0x80 <= ours.decode_bytes([id])[0] < 0xC0
            assert within or start == ours_from
            assert ours.decode_bytes([id]) in text[ours_from:ours_to].encode()

    @pytest.mark.parametrize("late", [(), ("caf\u00e9",), ("<a>",)])
    @pytest.mark.parametrize(
        "text",
        [
            *TEXTS,
            "cafe\u0301 <a>e\u0301<s>\u0301x",
            "\u1112\u1161\u11ab \r\n\u212b\u0958",
            "a\u0323\u0301\u0301",
        ],
    )
    def test_normalized(self, tmp_path: Path, text: str, late: Any) -> None:
        added = {"<a>": 998, "caf\u00e9": 999}
        steps = TextSteps("NFC", added, late, prefix=["<s>"], suffix=["<a>", "<s>"])
        trained = train_bpe(TEXTS, 400, special_tokens=["<s>"])
        ours = BPETokenizer(
            trained.vocabulary, trained.merges, special_tokens=trained.special_tokens, steps=steps
        )
        ours.save(tmp_path / "t.json")
        data = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
        data["model"]["vocab"] |= {f"unused {id}": id for id in range(400, 998)}
        (tmp_path / "t.json").write_text(json.dumps(data), encoding="utf-8")
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json")).encode(text)
        ids, offsets = ours.encode_with_offsets(text, allowed_special="all")
        assert ids == theirs.ids == ours.encode(text, allowed_special="all")
        if normalize("NFC", text) == text:
            assert offsets == theirs.offsets
        for (start, end), (their_start, their_end) in zip(offsets, theirs.offsets, strict=True):
            assert start <= their_start and their_end <= end  # theirs leave out what was composed
        bare = ours.encode_with_offsets(text, allowed_special="all", add_special_tokens=False)
        assert bare == (ids[1:-2], offsets[1:-2]) and offsets[0] == offsets[-1] == (0, 0)

    def test_composed_characters_are_covered_whole(self) -> None:
        """Where `tokenizers` reports the first of the characters that were composed."""
        ours = BPETokenizer(BYTES, [], steps=TextSteps("NFC", {"<a>": 256}))
        for text, expected in (
            ("xe\u0301y", [(0, 1), (1, 3), (1, 3), (3, 4)]),
            ("\u1112\u1161\u11ab ", [(0, 3), (0, 3), (0, 3), (3, 4)]),
            ("<a>\u0301e", [(0, 3), (3, 4), (3, 4), (4, 5)]),
            ("\u0344", [(0, 1)] * 4),
        ):
            assert ours.encode_with_offsets(text)[1] == expected

    def test_options(self, ours: BPETokenizer) -> None:
        assert ours.encode_with_offsets("") == ([], [])
        assert ours.encode_with_offsets(f"é{END}", allowed_special="all")[1][-1] == (1, 14)
        assert ours.encode_with_offsets(END)[0] == ours.encode(END)
        with pytest.raises(ValueError, match="text: expected none of disallowed_special"):
            ours.encode_with_offsets(END, disallowed_special="all")


class TestDropout:
    def distribution(
        self, word: bytes, ranks: dict[tuple[bytes, bytes], int], p: float
    ) -> dict[tuple[bytes, ...], float]:
        """Return the probability of each result, by going through all choices at each merge."""
        done: Counter[Any] = Counter()
        going: dict[tuple[bytes, ...], float] = {tuple(bytes([b]) for b in word): 1.0}
        while going:
            further: Counter[Any] = Counter()
            for tokens, chance in going.items():
                places = sorted(
                    (ranks[pair], place)
                    for place, pair in enumerate(pairwise(tokens))
                    if pair in ranks
                )
                for number, (_, place) in enumerate(places):  # all before it were left out
                    joined = (tokens[place] + tokens[place + 1],)
                    result = tokens[:place] + joined + tokens[place + 2 :]
                    further[result] += chance * p**number * (1 - p)
                done[tokens] += chance * p ** len(places)
            going = dict(further)
        return dict(done)

    @pytest.mark.usefixtures("untyped")  # checks of types at each merge would take most of the time
    @pytest.mark.parametrize("p", [0.1, 0.5])
    def test_the_distribution_of_the_paper(self, p: float) -> None:
        merges = [(b"a", b"b"), (b"b", b"a"), (b"ab", b"a"), (b"ab", b"ab")]
        tokenizer = BPETokenizer.from_merges(merges)
        ranks = {pair: rank for rank, pair in enumerate(merges)}
        expected = self.distribution(b"ababa", ranks, p)
        assert abs(sum(expected.values()) - 1) < 1e-9
        generator, drawn = random.Random(0), Counter[Any]()
        for _ in range(2000):
            ids = tokenizer.sample("ababa", p, generator=generator)
            drawn[tuple(tokenizer.vocabulary[id] for id in ids)] += 1
        assert set(drawn) <= set(expected)
        for tokens, chance in expected.items():
            error = (chance * (1 - chance) / 2000) ** 0.5
            assert abs(drawn[tokens] / 2000 - chance) < 4.5 * error

    @pytest.mark.usefixtures("untyped")
    def test_as_tokenizers(self, tmp_path: Path) -> None:
        """On merges that do not touch: there its queue has no stale entries."""
        tokenizer = BPETokenizer.from_merges([(b"a", b"b"), (b"c", b"d")])
        tokenizer.save(tmp_path / "t.json")
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
        theirs.model.dropout = 0.3
        generator = random.Random(0)
        ours = Counter(len(tokenizer.sample("abcd", 0.3, generator=generator)) for _ in range(1500))
        others = Counter(len(theirs.encode("abcd").ids) for _ in range(1500))
        assert all(abs(ours[size] - others[size]) / 1500 < 0.08 for size in (2, 3, 4))

    def test_limits_and_options(self, ours: BPETokenizer) -> None:
        text = f"The baker's oven{END}wasn't hot 🙂"
        assert ours.sample(text, 0.0) == ours.encode(text)
        assert ours.sample(text, 1.0) == list(text.encode())
        draws = [
            ours.sample(text, generator=random.Random(5)),
            ours.sample(text, 0.1, generator=random.Random(5)),
        ]
        assert draws[0] == draws[1] != ours.sample(text, 0.2, generator=random.Random(5))
        assert len({tuple(ours.sample(text, 0.5)) for _ in range(9)}) > 1
        for _ in range(20):
            ids = ours.sample(text, 0.5, allowed_special="all")
            assert ours.decode(ids) == text and ids.count(698) == 1
        steps = TextSteps("NFC", prefix=[END])
        around = dataclasses.replace(ours, steps=steps)
        assert around.sample("e\u0301", 1.0) == [698, *"\u00e9".encode()]
        assert around.sample("a", 1.0, add_special_tokens=False) == [97]

    def test_words_that_are_tokens_are_cut_too(self) -> None:
        """As in `tokenizers`, dropout takes no notice of ignore_merges; without it, both do."""
        vocabulary = BYTES | {256: b"bc", 257: b"abc", 258: b"ab"}
        merges = [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")]
        ignoring = BPETokenizer(vocabulary, merges, ignore_merges=True)
        assert ignoring.sample("abc", 0.0) == [257] and ignoring.sample("abc", 1.0) == [*b"abc"]

    @pytest.mark.usefixtures("untyped")
    def test_bad_input(self, ours: BPETokenizer) -> None:
        for bad in (-0.1, 1.1, float("nan"), "0.1", True, None):
            with pytest.raises(ValueError, match=rf"dropout: expected from 0 to 1, got {bad!r}"):
                ours.sample("a", bad)
        for bad in (0, np.random.default_rng(0)):
            with pytest.raises(ValueError, match=r"generator: expected a random\.Random, got"):
                ours.sample("a", generator=bad)


class TestRankFiles:
    def test_round_trip(
        self,
        ours: BPETokenizer,
        gpt2: BPETokenizer,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # none: it would remember files by their names
        path = tmp_path / "own.tiktoken"
        for tokenizer in (ours, gpt2):
            tokenizer.save_tiktoken(path)
            ranks = tiktoken.load.load_tiktoken_bpe(str(path))
            assert ranks == {token: id for id, token in tokenizer.vocabulary.items()}
            options: Any = {
                "special_tokens": tokenizer.special_tokens,
                "pattern": tokenizer.pattern,
            }
            assert BPETokenizer.load_tiktoken(path, **options) == tokenizer
        assert BPETokenizer.load_tiktoken(path).special_tokens == {}
        assert BPETokenizer.load_tiktoken(path).pattern == GPT4_PATTERN
        listed = BPETokenizer.load_tiktoken(path, special_tokens=["<a>", "<b>"])
        assert listed.special_tokens == {"<a>": 499, "<b>": 500}

    @settings(max_examples=60)
    @given(
        tokens=st.lists(
            st.text("abc", min_size=2, max_size=5), min_size=1, max_size=9, unique=True
        ),
        text=st.text("abc ", max_size=12),
    )
    def test_any_ranks_as_tiktoken(self, tokens: list[str], text: str) -> None:
        """Also tokens that no merges reach, in any order of ranks."""
        order = random.Random(len(text)).sample(range(256), 256)
        ranks = {bytes([byte]): rank for rank, byte in enumerate(order)}
        ranks |= {token.encode(): 256 + rank for rank, token in enumerate(tokens)}
        lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "own.tiktoken")
            path.write_text("\n".join(lines), encoding="utf-8")
            ours = BPETokenizer.load_tiktoken(path, pattern=GPT2_PATTERN)
        theirs = tiktoken.Encoding(
            "any", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        assert ours.encode(text) == theirs.encode_ordinary(text)

    def test_an_unreachable_token(self, tmp_path: Path) -> None:
        ranks = {**{bytes([i]): i for i in range(256)}, b"bc": 256, b"abcd": 257, b"ab": 258}
        path = tmp_path / "t.tiktoken"
        path.write_bytes(
            b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
        )
        ours = BPETokenizer.load_tiktoken(path)
        assert ours.ignore_merges and ours.encode("abcd") == [257]
        theirs = tiktoken.Encoding(
            "t", pat_str=GPT4_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        for text in ("abcd", "xabcd", "abcdabcd", "abc"):
            assert ours.encode(text) == theirs.encode_ordinary(text)
        ours.save_tiktoken(tmp_path / "again.tiktoken")
        assert BPETokenizer.load_tiktoken(tmp_path / "again.tiktoken") == ours

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("YWI=", "line 257: expected a token in base64 and its rank, got b'YWI='"),
            ("YWI 256", "line 257: expected a token in base64"),
            ("YWI= x", "line 257: expected a token in base64"),
            ("YWI= 256 1", "line 257: expected a token in base64"),
            ("YQ== 256", "line 257: expected each token once, got b'a' again"),
            ("YWI= 5", "expected a rank of its own for each token"),
            ("YWI= -1", "expected ids from 0 on, got -1"),
        ],
    )
    def test_bad_files(self, tmp_path: Path, line: str, message: str) -> None:
        path = tmp_path / "bad.tiktoken"
        lines = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]
        path.write_text("\n".join([*lines, line, ""]), encoding="utf-8")
        with pytest.raises(ValueError, match=rf"bad\.tiktoken.*{re.escape(message)}"):
            BPETokenizer.load_tiktoken(path)
        path.write_text("\n".join(lines[1:]), encoding="utf-8")
        with pytest.raises(ValueError, match=r"bad\.tiktoken.*0x00 is missing"):
            BPETokenizer.load_tiktoken(path)
        with pytest.raises(ValueError, match=r"^special_tokens: expected several"):
            path.write_text("\n".join(lines), encoding="utf-8")
            BPETokenizer.load_tiktoken(path, special_tokens="<s>")

    def test_what_rank_files_cannot_hold(self, tmp_path: Path) -> None:
        path = tmp_path / "t.tiktoken"
        falling = BPETokenizer(BYTES | {256: b"cd", 257: b"ab"}, [(b"a", b"b"), (b"c", b"d")])
        unused = BPETokenizer(BYTES | {256: b"ab"}, [])
        for tokenizer in (falling, unused):
            with pytest.raises(ValueError, match="merges: expected those that follow from the ids"):
                tokenizer.save_tiktoken(path)
        with pytest.raises(ValueError, match="steps: expected none"):
            BPETokenizer(BYTES, [], steps=TextSteps("NFC")).save_tiktoken(path)
        assert not path.exists()


def cut_by_tokenizers(pattern: str, text: str) -> list[str]:
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return [word for word, _ in split.pre_tokenize_str(text)]


class TestPatterns:
    def test_as_published(self) -> None:
        source = Path(openai_public.__file__).read_text(encoding="utf-8")
        parts = re.search(r'def o200k_base.*?"\|"\.join\((.*?)\)\s*return', source, re.S)
        assert parts
        published = "|".join(re.findall(r'r"""(.*?)"""', parts[1], re.S))
        for text in [*TEXTS, *map("".join, zip(TEXTS, reversed(TEXTS), strict=True))]:
            assert pretokenize(text, GPT4O_PATTERN) == pretokenize(text, published)
        assert pretokenize("WE'LL 12", QWEN2_PATTERN) == ["WE", "'LL", " ", "1", "2"]

    def test_gpt4_as_published(self) -> None:
        """Without most of the marks that forbid giving back, the words are the same."""
        source = Path(openai_public.__file__).read_text(encoding="utf-8")
        parts = re.search(r'def cl100k_base.*?"pat_str": r"""(.*?)"""', source, re.S)
        assert parts and parts[1].count("+") > GPT4_PATTERN.count("+")
        few_letters = map("".join, product("a1 \n'", repeat=5))
        for text in [*TEXTS, *few_letters]:
            assert pretokenize(text) == pretokenize(text, parts[1])
            assert pretokenize(text) == cut_by_tokenizers(GPT4_PATTERN, text)
        assert cut_by_tokenizers(GPT4_PATTERN.replace("s++$", "s+$"), " \na") == [" ", "\n", "a"]

    @pytest.mark.parametrize("pattern", [GPT4O_PATTERN, QWEN2_PATTERN])
    def test_in_files(self, tmp_path: Path, pattern: str) -> None:
        ours = train_bpe(TEXTS, 400, pattern=pattern)
        ours.save(tmp_path / "t.json")
        assert BPETokenizer.load(tmp_path / "t.json") == ours
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
        for text in TEXTS:
            assert ours.encode(text) == theirs.encode(text).ids
            assert ours.encode(text) == ours.to_tiktoken().encode_ordinary(text)


class TestVocabulary:
    def test_special_tokens_as_a_list(self, gpt2: BPETokenizer) -> None:
        """The form that courses use: known ones keep the vocabulary's id, others get the next."""
        vocabulary = dict(gpt2.vocabulary) | {gpt2.vocab_size - 1: END.encode()}
        double = END + END
        made = BPETokenizer(
            vocabulary, gpt2.merges, special_tokens=[END, double], pattern=GPT2_PATTERN
        )
        assert made.special_tokens == {END: gpt2.vocab_size - 1, double: gpt2.vocab_size}
        assert made.vocabulary == gpt2.vocabulary
        text = f"a{END}b{double}{END}"
        assert made.encode(text) == gpt2.encode(text)  # ordinary text unless allowed
        encoding = tiktoken.Encoding(
            "test",
            pat_str=GPT2_PATTERN,
            mergeable_ranks={token: id for id, token in gpt2.vocabulary.items()},
            special_tokens=made.special_tokens,
        )
        both = f"a{END}b"
        assert made.encode(both, allowed_special="all") == encoding.encode(
            both, allowed_special="all"
        )
        gap = BPETokenizer(BYTES | {900: b"ab"}, [(b"a", b"b")], special_tokens=["<a>", "<b>"])
        assert gap.special_tokens == {"<a>": 901, "<b>": 902}
        steps = TextSteps(added_tokens={"<think>": 950})
        assert BPETokenizer(BYTES, [], special_tokens=["<a>"], steps=steps).special_tokens == {
            "<a>": 951
        }

    @pytest.mark.parametrize("token", ["ab", " ab", "!"])
    def test_an_ordinary_token_made_special(self, tmp_path: Path, token: str) -> None:
        """It keeps its id and its merges, as with `tokenizers` and tiktoken."""
        ordinary = BPETokenizer(
            BYTES | {256: b"ab", 257: b" ab", 258: b" abab"},
            [(b"a", b"b"), (b" ", b"ab"), (b" ab", b"ab")],
        )
        ordinary.save(tmp_path / "t.json")
        made = dataclasses.replace(ordinary, special_tokens=[token])
        id = ordinary.encode(token)[0]
        assert made.special_tokens == {token: id} and made.vocabulary == ordinary.vocabulary
        assert dataclasses.replace(ordinary, special_tokens={token: id}) == made
        made.save(tmp_path / "made.json")
        assert BPETokenizer.load(tmp_path / "made.json") == made
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "made.json"))
        encoding = made.to_tiktoken()
        for text in ("xab! abab", " ab ab!!", "abababa b!"):
            ids = made.encode(text, allowed_special="all")
            assert ids == theirs.encode(text).ids == encoding.encode(text, allowed_special="all")
            assert made.encode(text) == encoding.encode_ordinary(text) == ordinary.encode(text)
            skipped = made.decode(ids, skip_special_tokens=True)
            assert skipped == theirs.decode(ids) == text.replace(token, "")
        if token != " ab":  # theirs writes the text of that one differently from ours
            other = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
            other.add_special_tokens([token])
            other.save(str(tmp_path / "other.json"))
            assert BPETokenizer.load(tmp_path / "other.json") == made

    def test_any_order_of_ids(self) -> None:
        ids = random.Random(0).sample(range(1000), 258)
        tokens = [*BYTES.values(), b"ab", b"abc"]
        tokenizer = BPETokenizer(
            dict(zip(ids, tokens, strict=True)),
            [(b"a", b"b"), (b"ab", b"c")],
            special_tokens={"<s>": 1000},
        )
        assert tokenizer.encode("abcab") == [ids[257], ids[256]]
        assert tokenizer.vocab_size == 1001
        assert tokenizer.decode(tokenizer.encode("schön")) == "schön"

    def test_ignore_merges(self, tmp_path: Path) -> None:
        vocabulary = BYTES | {256: b"bc", 257: b"abc", 258: b"ab"}
        merges = [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")]
        plain = BPETokenizer(vocabulary, merges)
        ignoring = BPETokenizer(vocabulary, merges, ignore_merges=True)
        assert plain.encode("abc") == [97, 256] and ignoring.encode("abc") == [257]
        for tokenizer in (plain, ignoring):
            tokenizer.save(tmp_path / "t.json")
            theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
            assert BPETokenizer.load(tmp_path / "t.json") == tokenizer
            for text in ("abc", "abcabc", "ab bc c"):
                assert tokenizer.encode(text) == theirs.encode(text).ids

    @pytest.mark.parametrize(
        ("vocabulary", "merges", "options", "message"),
        [
            ({i: bytes([i]) for i in range(255)}, [], {}, "0xff is missing"),
            ({}, [], {}, "0x00 is missing"),
            (BYTES | {256: b"a"}, [], {}, "different"),
            (BYTES | {256: b""}, [], {}, "non-empty"),
            (BYTES | {-1: b"ab"}, [], {}, "ids from 0 on, got -1"),
            (BYTES, [(b"a", b"b")], {}, "b'ab' is not in the vocabulary"),
            (BYTES | {256: b"abc"}, [(b"ab", b"c")], {}, "b'ab' is not"),
            (BYTES | {256: b"ab"}, [(b"a", b"b")] * 2, {}, "each pair once"),
            (BYTES, [], {"special_tokens": {"<s>": 5}}, "ids of their own, got 5"),
            (BYTES, [], {"special_tokens": {"<s>": 300, "<t>": 300}}, "got 300"),
            (BYTES | {256: b"ab"}, [], {"special_tokens": {"ab": 300}}, "ordinary token already"),
            (BYTES, [], {"special_tokens": {"": 300}}, "non-empty"),
            (BYTES, [], {"pattern": "(a)"}, "groups"),
            (
                [b"a"],
                [],
                {},
                "vocabulary: expected ids with their bytes, such as {0: b'a'}, got list",
            ),
            (BYTES | {256: "ab"}, [], {}, "vocabulary: expected bytes for id 256, got 'ab'"),
            ({b"a": 97}, [], {}, "vocabulary: expected ids from 0 on, got b'a'"),
            (BYTES | {2.5: b"ab"}, [], {}, "vocabulary: expected ids from 0 on, got 2.5"),
            (BYTES, 5, {}, "merges: expected pairs of bytes in order, got 5"),
            (BYTES, "ab", {}, "merges: expected pairs of bytes in order, got 'ab'"),
            (BYTES, [("a", "b")], {}, "merges: expected pairs of bytes, got ('a', 'b') at index 0"),
            (BYTES, [(b"a",)], {}, "merges: expected pairs of bytes, got (b'a',) at index 0"),
            (BYTES, [], {"special_tokens": 5}, "special_tokens: expected "),
            (
                BYTES,
                [],
                {"special_tokens": "<s>"},
                "special_tokens: expected several, such as ['<s>']",
            ),
            (
                BYTES,
                [],
                {"special_tokens": {"<s>": "5"}},
                "special_tokens: expected ids from 0 on, got",
            ),
            (BYTES, [], {"special_tokens": {5: 300}}, "special_tokens: expected non-empty, valid"),
            (BYTES, [], {"ignore_merges": "no"}, "ignore_merges: expected True or False, got 'no'"),
            (BYTES, [], {"steps": {"prefix": []}}, "steps: expected TextSteps, got dict"),
        ],
    )
    @pytest.mark.usefixtures("untyped")
    def test_bad_vocabularies(
        self, vocabulary: Any, merges: Any, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            BPETokenizer(vocabulary, merges, **options)

    def test_from_merges(self) -> None:
        trained = train_bpe(TEXTS, 400, special_tokens=["<a>", "<b>"], pattern=GPT2_PATTERN)
        made = BPETokenizer.from_merges(trained.merges, ["<a>", "<b>"], pattern=GPT2_PATTERN)
        assert made == trained
        assert BPETokenizer.from_merges([]).special_tokens == {END: 256}
        with pytest.raises(ValueError, match="special_tokens"):
            BPETokenizer.from_merges([], ["<a>", "<a>"])
        with pytest.raises(ValueError, match="merges"):
            BPETokenizer.from_merges([(b"ab", b"c")])

    @pytest.mark.usefixtures("untyped")
    @pytest.mark.parametrize("merges", [5, None, "ab", [b"ab"], [("a", "b")], [(b"a", b"b", b"c")]])
    def test_from_bad_merges(self, merges: Any) -> None:
        with pytest.raises(ValueError, match="merges: expected pairs of bytes"):
            BPETokenizer.from_merges(merges)

    def test_truncated(self) -> None:
        large = train_bpe(TEXTS, 500, special_tokens=["<a>", "<b>"])
        small = train_bpe(TEXTS, 300, special_tokens=["<a>", "<b>"])
        assert large.truncated(300) == small and large.truncated(500) == large
        assert large.truncated(258).merges == []
        with pytest.raises(ValueError, match="vocab_size"):
            large.truncated(257)
        steps = TextSteps("NFC", prefix=["<a>"])  # are kept
        assert dataclasses.replace(large, steps=steps).truncated(300).steps == steps
        for tokenizer in (
            BPETokenizer(BYTES | {300: b"ab"}, [(b"a", b"b")]),
            BPETokenizer(BYTES, [], steps=TextSteps(added_tokens={"<a>": 256})),
            BPETokenizer(BYTES, [], ignore_merges=True),
        ):
            with pytest.raises(ValueError, match="order of training"):
                tokenizer.truncated(256)

    def test_cannot_be_changed(self, ours: BPETokenizer) -> None:
        given = {"<s>": 256}
        tokenizer = BPETokenizer(BYTES, [], special_tokens=given)
        given["<t>"] = 5
        assert tokenizer.special_tokens == {"<s>": 256}
        with pytest.raises(AttributeError):
            ours.merges = []  # type: ignore[misc]


class TestTiktoken:
    def test_steps(self) -> None:
        steps = TextSteps(added_tokens={"<a>": 256}, prefix=["<a>"])
        ours = BPETokenizer(BYTES, [], steps=steps)
        encoding = ours.to_tiktoken("own")
        assert encoding.name == "own" and BPETokenizer(BYTES, []).to_tiktoken().name == "llmbook"
        ids = ours.encode("a<a>", add_special_tokens=False)
        assert ids == encoding.encode("a<a>", allowed_special="all") == [97, 256]
        with pytest.raises(ValueError, match="normalizer: expected none"):
            BPETokenizer(BYTES, [], steps=TextSteps("NFC")).to_tiktoken()

    def test_vocabularies_that_it_cannot_use(self) -> None:
        falling = BPETokenizer(BYTES | {256: b"cd", 257: b"ab"}, [(b"a", b"b"), (b"c", b"d")])
        with pytest.raises(ValueError, match="rise"):
            falling.to_tiktoken()
        merges = [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")]
        dead = BPETokenizer(BYTES | {256: b"bc", 257: b"ab", 258: b"abc"}, merges)
        with pytest.raises(ValueError, match="merges make, got b'abc'"):
            dead.to_tiktoken()
        early = BPETokenizer(BYTES | {256: b"abc", 257: b"ab"}, [(b"ab", b"c"), (b"a", b"b")])
        with pytest.raises(ValueError, match="rise"):
            early.to_tiktoken()


class TestSavedFiles:
    def test_what_is_wrong_names_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "some.json"
        path.write_text("[1]", encoding="utf-8")
        message = r"some\.json.*expected a JSON object, got list"
        with pytest.raises(ValueError, match=message), naming_file(path):
            read_json_object(path)
        message = r"some\.json.*not a tokenizer's file: KeyError 'a'"
        with pytest.raises(ValueError, match=message), naming_file(path):
            raise KeyError("a")
        with pytest.raises(FileNotFoundError), naming_file(tmp_path / "none.json"):
            read_json_object(tmp_path / "none.json")

    @pytest.mark.usefixtures("untyped")
    def test_what_is_no_path(self, ours: BPETokenizer) -> None:
        for call in (ours.save, BPETokenizer.load, read_json_object):
            with pytest.raises(ValueError, match=r"^path: expected a str or a Path, got 5"):
                call(5)
        for call in (ours.save_gpt2, BPETokenizer.load_gpt2):
            with pytest.raises(ValueError, match=r"^folder: expected a str or a Path, got None"):
                call(None)
        with pytest.raises(ValueError, match=r"^path: expected a str"), naming_file(5):
            pass

    def test_round_trip(self, ours: BPETokenizer, gpt2: BPETokenizer, tmp_path: Path) -> None:
        for tokenizer in (ours, gpt2):
            tokenizer.save(tmp_path / "tokenizer.json")
            assert BPETokenizer.load(tmp_path / "tokenizer.json") == tokenizer
            tokenizer.save_gpt2(tmp_path / "folder")
            again = BPETokenizer.load_gpt2(tmp_path / "folder", pattern=tokenizer.pattern)
            assert again == tokenizer
        assert not list(tmp_path.glob("**/*.part"))

    @pytest.mark.parametrize("pattern", [None, GPT4_PATTERN, module._LLAMA3_PATTERN])
    def test_trained_by_tokenizers(self, tmp_path: Path, pattern: str | None) -> None:
        theirs = tokenizers.Tokenizer(models.BPE())
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
        theirs.pre_tokenizer = byte_level
        if pattern:
            split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
            theirs.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        theirs.decoder = tokenizers.decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        theirs.train_from_iterator(TEXTS * 3, trainer)
        theirs.save(str(tmp_path / "theirs.json"))
        ours = BPETokenizer.load(tmp_path / "theirs.json")
        assert ours.special_tokens == {END: 0}
        for text in TEXTS:
            assert ours.encode(text, allowed_special="all") == theirs.encode(text).ids
        assert ours.encode(TEXTS[5]) == ours.to_tiktoken().encode_ordinary(TEXTS[5])
        ours.save(tmp_path / "ours.json")
        again = tokenizers.Tokenizer.from_file(str(tmp_path / "ours.json"))
        for text in TEXTS:
            assert again.encode(text).ids == theirs.encode(text).ids
        theirs.model.save(str(tmp_path))
        ours.save_gpt2(tmp_path / "gpt2")
        names = [str(tmp_path / "gpt2" / name) for name in ("vocab.json", "merges.txt")]
        again.model = models.BPE.from_file(*names)
        for text in TEXTS:
            assert again.encode(text).ids == theirs.encode(text).ids
        if pattern is None:
            same = BPETokenizer.load_gpt2(tmp_path)
            assert same.encode(TEXTS[0]) == ours.encode(TEXTS[0])

    def test_merges_as_text(self, ours: BPETokenizer, tmp_path: Path) -> None:
        path = tmp_path / "tokenizer.json"
        ours.save(path)
        data = json.loads(path.read_text(encoding="utf-8"))
        data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
        del data["pre_tokenizer"]["pretokenizers"][0]["invert"]
        path.write_text(json.dumps(data), encoding="utf-8")
        assert BPETokenizer.load(path) == ours

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"post_processor": {"type": "Sequence", "processors": [{"type": "Bert"}] * 2}},
                "post_processor: expected one template at most, got 2",
            ),
            ({"normalizer": {"type": "NFKC"}}, "normalizer: expected none or NFC, got NFKC"),
            (
                {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}},
                "normalizer: expected none or NFC, got Lowercase",
            ),
            (
                {"post_processor": {"type": "Other"}},
                "post_processor: expected a template, got Other",
            ),
            (
                {"post_processor": {"type": "BertProcessing", "cls": ["a", 97], "sep": ["b", 698]}},
                "post_processor: expected added tokens, got id 97",
            ),
            (
                {
                    "post_processor": {
                        "type": "TemplateProcessing",
                        "single": [{"Sequence": {"id": "A"}}, {"Sequence": {"id": "A"}}],
                        "special_tokens": {},
                    }
                },
                "post_processor: expected a template with one text",
            ),
            ({"truncation": {"max_length": 5}}, "truncation"),
            ({"padding": {"strategy": "BatchLongest"}}, "padding"),
            ({"decoder": {"type": "WordPiece"}}, "decoder: expected ByteLevel, got WordPiece"),
            ({"decoder": None}, "decoder"),
            ({"pre_tokenizer": None}, "pre_tokenizer"),
            ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
            ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "prefix space"),
            ({"model": {"type": "WordPiece"}}, "expected BPE, got WordPiece"),
            ({"model": {"dropout": 0.1}}, "dropout"),
            ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
            ({"model": {"merges": ["a b c"]}}, "expected pairs"),
            ({"model": {"merges": [["日", "本"]]}}, "byte alphabet"),
            ({"model": {"merges": 5}}, "not a tokenizer's file"),
            ({"model": {"vocab": {}}}, "is missing"),
            ({"model": None}, "not a tokenizer's file"),
            ({"added_tokens": [{"id": 900, "content": "<m>", "lstrip": True}]}, "'<m>' has lstrip"),
            ({"added_tokens": [{"id": 97, "content": "<m>"}]}, "got 97 again"),
        ],
    )
    def test_what_cannot_be_honored_is_named(
        self, ours: BPETokenizer, tmp_path: Path, change: dict[str, Any], message: str
    ) -> None:
        path = tmp_path / "tokenizer.json"
        ours.save(path)
        data = json.loads(path.read_text(encoding="utf-8"))
        for key, value in change.items():
            data[key] = data[key] | value if key == "model" and value else value
        path.write_text(json.dumps(data), encoding="utf-8")
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            BPETokenizer.load(path)
        assert "tokenizer.json" in str(error.value)

    @pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", "{}", '{"model": 3}', "\x00"])
    def test_files_of_another_kind(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "vocab.json").write_text(text, encoding="utf-8")
        (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        for load in (
            lambda: BPETokenizer.load(tmp_path / "vocab.json"),
            lambda: BPETokenizer.load_gpt2(tmp_path),
        ):
            with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
                load()

    def test_files_cut_off(self, ours: BPETokenizer, tmp_path: Path) -> None:
        path = tmp_path / "tokenizer.json"
        ours.save(path)
        path.write_bytes(path.read_bytes()[:-3000])
        with pytest.raises(ValueError, match=r"tokenizer\.json"):
            BPETokenizer.load(path)
        path.write_bytes(b"\xff\xfe{}")
        with pytest.raises(ValueError, match=r"tokenizer\.json"):
            BPETokenizer.load(path)
        with pytest.raises(FileNotFoundError):
            BPETokenizer.load(tmp_path / "none.json")
        ours.save_gpt2(tmp_path)
        merges = tmp_path / "merges.txt"
        merges.write_bytes(merges.read_bytes()[:-2])
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
            BPETokenizer.load_gpt2(tmp_path)

    @pytest.mark.parametrize(
        ("pattern", "message"),
        [
            (r"\p{N}{1,3}+|.", "possessive"),
            (r"^ +| ?\w+|.", "every line"),
            (r"\s+$|.", "every line"),
        ],
    )
    def test_patterns_that_mean_something_else_there(
        self, tmp_path: Path, pattern: str, message: str
    ) -> None:
        tokenizer = train_bpe(["ab"], 300, pattern=pattern)
        with pytest.raises(ValueError, match=message):
            tokenizer.save(tmp_path / "tokenizer.json")

    def test_a_pattern_that_drops_text_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "tokenizer.json"
        for pattern, dropping in ((r"\w+", True), (GPT4_PATTERN, False)):
            train_bpe(["low lower lowest"], 258, pattern=pattern).save(path)
            data = json.loads(path.read_text(encoding="utf-8"))
            data["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": "Removed", "invert": True}
            path.write_text(json.dumps(data), encoding="utf-8")
            theirs = tokenizers.Tokenizer.from_file(str(path))
            if dropping:
                with pytest.raises(ValueError, match="expected Split to isolate"):
                    BPETokenizer.load(path)
            else:
                ids = BPETokenizer.load(path).encode("low  low!")
                assert ids == theirs.encode("low  low!").ids

    def test_names_that_collide_in_files(self, tmp_path: Path) -> None:
        tokenizer = train_bpe([" t" * 5], 300, special_tokens=["Ġt"])
        with pytest.raises(ValueError, match="'Ġt'"):
            tokenizer.save(tmp_path / "tokenizer.json")
