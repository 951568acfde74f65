"""Chapter 04: hashes, signatures, bands, the index, clusters, and what bad input does."""

import doctest
import inspect
import json
import math
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook import deduplication
from llmbook.corpus import Document
from llmbook.deduplication import (
    LSHIndex,
    MinHasher,
    UnionFind,
    _minima,
    _ShingleSets,
    _similarities,
    canonical_text,
    collision_probability,
    deduplicate,
    estimate_jaccard,
    exact_duplicates,
    find_near_duplicates,
    jaccard,
    optimal_bands,
    shingles,
)


@pytest.fixture(scope="module")
def datasketch() -> Any:
    return pytest.importorskip("datasketch", minversion="2.0")


WORD_COUNT = 200
STORY = [f"word{i}" for i in range(WORD_COUNT)]
ODD = [
    "",
    " ",
    "\n\t",
    "a",
    "a b",
    "half \ud83d",
    "\0",
    "a\0 b",
    "ﬁne Straße",
    "\u00a0\u2003",
    "¡¿!",
]

any_text = st.text(max_size=40) | st.text("ab c\n\u2003é\ud800", max_size=40)
# Few letters and short texts, so that many of them overlap.
small_texts = st.lists(st.text("ab ", max_size=12), max_size=8)


@pytest.fixture
def unchecked():
    """Switch jaxtyping's checks off, as they are for a reader, to see our own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def windows(step: int, length: int, count: int) -> list[str]:
    """Return texts each of which has lost ``step`` words of the one before and gained as many."""
    return [" ".join(STORY[step * i : step * i + length]) for i in range(count)]


def grams(text: str, n: int, unit: str) -> set[tuple[str, ...]]:
    """The shingles as tuples, written as naively as possible."""
    clean = canonical_text(text)
    units = clean.split() if unit == "word" else list(clean)
    return {tuple(units[i : i + n]) for i in range(max(len(units) - n + 1, min(len(units), 1)))}


def brute_force(texts: list[str], threshold: float) -> list[list[int]]:
    """Clusters by comparing all pairs."""
    forest, sets = UnionFind(len(texts)), [shingles(text) for text in texts]
    for i, j in combinations(range(len(texts)), 2):
        if jaccard(sets[i], sets[j]) >= threshold:
            forest.union(i, j)
    return forest.clusters()


def test_doctests() -> None:
    assert doctest.testmod(deduplication).failed == 0


# --- exact ---------------------------------------------------------------------------------------


def test_canonical_text_ignores_case_space_and_form() -> None:
    assert canonical_text(" Caf\u0065\u0301\r\n\tBAR ") == "café bar"
    assert canonical_text("ＡＢＣ") == "abc"
    assert canonical_text("") == canonical_text(" \n") == ""


@given(any_text)
def test_canonical_text_has_single_spaces(text: str) -> None:
    clean = canonical_text(text)
    assert clean == " ".join(clean.split())


def test_exact_duplicates_of_everything_odd() -> None:
    texts = [*ODD, *ODD]
    groups = exact_duplicates(texts)
    assert sorted(i for group in groups for i in group) == list(range(len(texts)))
    assert [0, 1, 2, 9, 11, 12, 13, 20] in groups
    assert exact_duplicates([]) == exact_duplicates([""]) == []
    assert exact_duplicates(Document(t) for t in ("A", "b", "a ")) == [[0, 2]]


@pytest.mark.parametrize("function", [exact_duplicates, find_near_duplicates, deduplicate])
def test_a_single_text_is_not_several(function) -> None:
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match="documents"):
        function("one text")


def test_wrong_elements_are_named() -> None:
    with pytest.raises((ValueError, jaxtyping.TypeCheckError)):
        exact_duplicates(["a", 5])
    with pytest.raises(ValueError, match="expected Documents, got str at index 0"):
        deduplicate(x for x in ("a",))


# --- shingles ------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    st.lists(any_text, min_size=1, max_size=6),
    st.integers(1, 6),
    st.sampled_from(["word", "character"]),
)
def test_hashed_shingles_are_the_tuples(texts: list[str], n: int, unit: str) -> None:
    hashed, counts = deduplication._shingle_hashes(texts, n, unit)
    parts = np.split(hashed, np.cumsum(counts)[:-1])
    tuples = [grams(text, n, unit) for text in texts]
    for text, part, expected in zip(texts, parts, tuples, strict=True):
        assert set(part.tolist()) == set(shingles(text, n, unit).tolist())
        assert len(set(part.tolist())) == len(expected)
    for (a, x), (b, y) in combinations(zip(parts, tuples, strict=True), 2):
        assert jaccard(a, b) == jaccard(x, y)


def test_shingles_are_the_same_on_every_machine() -> None:
    assert shingles("Dough rises.").tolist() == [17077196469518577250]
    assert shingles("dough\n RISES.").tolist() == [17077196469518577250]
    assert shingles("Dough rises.", 1).shape == (2,)
    assert shingles("ab", 1, "character").shape == (2,)


def test_a_line_of_a_million_characters() -> None:
    assert shingles("x" * 1_000_000).shape == (1,)
    assert shingles("x y " * 250_000).shape == (2,)
    assert shingles("x" * 1_000_000, 20, "character").shape == (1,)


def test_bad_shingles() -> None:
    with pytest.raises(ValueError, match="n: expected a whole number of at least 1, got 0"):
        shingles("a", 0)
    with pytest.raises(ValueError, match="unit: expected one of word, character, got 'line'"):
        shingles("a", 5, "line")


def test_jaccard() -> None:
    assert jaccard(set(), set()) == 1.0
    assert jaccard({1}, set()) == 0.0
    assert jaccard({"a", "b"}, {"b"}) == 0.5
    assert jaccard(np.array([1, 1, 2]), np.array([2, 2, 2, 3])) == 1 / 3
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match="a"):
        jaccard("a text", {1})


# --- signatures ----------------------------------------------------------------------------------


def naive_minima(x: np.ndarray, sizes: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    rows, start = [], 0
    for size in sizes.tolist():
        values = [
            [(int(f) * int(v) + int(s)) % 2**32 for v in x[start : start + size]]
            for f, s in zip(a, b, strict=True)
        ]
        rows.append([min(row, default=2**32 - 1) for row in values])
        start += size
    return np.array(rows, np.uint32).reshape(len(sizes), len(a))


@settings(max_examples=40)
@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 7), st.integers(0, 1000))
def test_minima_in_blocks_of_any_size(sizes: list[int], block: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = np.array(sizes, np.int64)
    x, a, b = (rng.integers(0, 2**32, n, dtype=np.uint32) for n in (counts.sum(), 3, 3))
    assert np.array_equal(_minima(x, counts, a, b, block), naive_minima(x, counts, a, b))


def test_signatures_equal_datasketch(datasketch: Any) -> None:
    texts = [*ODD, *windows(7, 60, 10)]
    for seed, k in ((1, 128), (7, 16)):
        ours = MinHasher(n_permutations=k, seed=seed).signatures(texts)
        for text, row in zip(texts, ours, strict=True):
            theirs = datasketch.MinHash(k, seed=seed, hashfunc=lambda h: h, scheme="affine32")
            theirs.update_batch(shingles(text).astype(np.uint32).tolist())
            assert np.array_equal(theirs.hashvalues, row)


def test_signatures_of_nothing() -> None:
    assert MinHasher(8).signatures([]).shape == (0, 8)
    assert (MinHasher(8).signatures(["", " \n"]) == 2**32 - 1).all()
    assert MinHasher(8).hash_signatures(np.empty(0, np.uint32), np.empty(0, np.int64)).shape == (
        0,
        8,
    )


def test_hashes_given_and_texts_have_the_same_signatures() -> None:
    for text in (*ODD, *windows(7, 60, 3)):
        hashes = shingles(text)  # of 64 bits, of which the lower 32 count
        given = MinHasher(16).hash_signatures(hashes, np.array([len(hashes)]))
        assert np.array_equal(given, MinHasher(16).signatures([text]))


def test_signatures_of_different_hashers_are_not_compared() -> None:
    a, b = MinHasher(16).signatures(["a"]), MinHasher(8).signatures(["a"])
    with pytest.raises((ValueError, jaxtyping.TypeCheckError)):
        estimate_jaccard(a, b)
    assert estimate_jaccard(a, a).tolist() == [1.0]


def test_signatures_do_not_depend_on_batches_or_processes(monkeypatch) -> None:
    texts = [*ODD, *windows(3, 50, 40)]
    whole = MinHasher().signatures(texts)
    shards = [MinHasher().signatures(texts[i : i + 7]) for i in range(0, len(texts), 7)]
    assert np.array_equal(np.concatenate(shards), whole)
    batches = deduplication._batches
    monkeypatch.setattr(deduplication, "_batches", lambda texts: batches(texts, 100))
    assert np.array_equal(MinHasher().signatures(iter(texts)), whole)
    assert np.array_equal(MinHasher().signatures(iter(texts), workers=2), whole)


def test_estimates_are_distributed_as_datasketch_s(datasketch: Any) -> None:
    rng, size, k = np.random.default_rng(0), 150, 128
    sizes = np.full(2, size)
    errors: dict[str, list[float]] = {"ours": [], "theirs": []}
    for common in rng.integers(20, 140, 250):
        drawn = rng.integers(0, 2**32, 2 * size - common, dtype=np.uint32)
        pair = drawn[:size], drawn[-size:]
        J = jaccard(*pair)
        scale = math.sqrt(J * (1 - J) / k)
        a, b = MinHasher(k).hash_signatures(np.concatenate(pair), sizes)
        theirs = []
        for values in pair:
            theirs.append(datasketch.MinHash(k))
            theirs[-1].update_batch([b"%d" % v for v in values])
        errors["ours"].append((float(estimate_jaccard(a, b)) - J) / scale)
        errors["theirs"].append((theirs[0].jaccard(theirs[1]) - J) / scale)
    for values in errors.values():  # four standard errors of the mean and of the deviation
        assert abs(np.mean(values)) < 0.26
        assert abs(np.std(values) - 1) < 0.18


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"n_permutations": 0}, "n_permutations: expected a whole number of at least 1, got 0"),
        ({"n": 0}, "n: expected a whole number of at least 1, got 0"),
        ({"seed": -1}, "seed: expected a whole number of at least 0, got -1"),
        ({"seed": 2**32}, "seed: expected less than"),
        ({"unit": "sentence"}, "unit: expected"),
    ],
)
def test_bad_hashers(settings, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        MinHasher(**settings)


def test_bad_hashes_and_workers() -> None:
    with pytest.raises(ValueError, match="sizes: expected a sum of 3, got 4"):
        MinHasher(4).hash_signatures(np.zeros(3, np.uint32), np.array([4]))
    with pytest.raises(ValueError, match="sizes"):
        MinHasher(4).hash_signatures(np.zeros(3, np.uint32), np.array([4, -1]))
    with pytest.raises(ValueError, match="workers: expected a whole number of at least 1, got 0"):
        MinHasher(4).signatures([], workers=0)


# --- bands ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 16, 64, 100, 128])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.05, 0.95), (0.9, 0.1)])
def test_bands_are_those_of_datasketch(
    datasketch: Any, k: int, weights: tuple[float, float]
) -> None:
    for threshold in (0.1, 0.5, 0.8, 0.95) if k < 100 else (0.7,):
        theirs = datasketch.lsh._optimal_param(threshold, k, *weights)
        assert optimal_bands(threshold, k, weights) == theirs


@pytest.mark.parametrize(
    ("threshold", "k", "weights", "layout"),
    [(0.8, 128, (1.0, 0.0), (1, 128)), (0.1, 1, (0.0, 1.0), (1, 1)), (0.1, 4, (0.0, 1.0), (4, 1))],
)
def test_bands_at_the_ends(threshold, k, weights, layout) -> None:
    assert optimal_bands(threshold, k, weights) == layout


def test_collision_probability() -> None:
    assert collision_probability(0.0, 4, 2) == 0 and collision_probability(1.0, 4, 2) == 1
    assert collision_probability(0.3, 1, 1) == pytest.approx(0.3)
    assert collision_probability(np.array([0.5]), 2, 2)[0] == pytest.approx(1 - 0.75**2)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="similarity: expected numbers from 0 to 1"):
            collision_probability(bad, 4, 2)
    with pytest.raises(ValueError, match="rows: expected a whole number of at least 1, got 0"):
        collision_probability(0.5, 4, 0)


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.5, 1.5, math.nan, math.inf])
def test_thresholds_outside(threshold) -> None:
    calls = (
        lambda: optimal_bands(threshold),
        lambda: find_near_duplicates(["a", "b"], threshold),
        lambda: deduplicate([Document("a")], threshold),
    )
    for call in calls:
        with pytest.raises(ValueError, match="threshold: expected a number between 0 and 1"):
            call()


@pytest.mark.parametrize("weights", [(0.0, 0.0), (-1.0, 2.0), (math.nan, 1.0), (math.inf, 1.0)])
def test_bad_weights(weights) -> None:
    with pytest.raises(ValueError, match="weights: expected two numbers from 0"):
        optimal_bands(0.5, 16, weights)


@pytest.mark.parametrize("weights", [[], [0.5], (0.1, 0.2, 0.7)])
def test_weights_that_are_no_pair(weights) -> None:
    for call in (find_near_duplicates, deduplicate):
        with pytest.raises(
            ValueError, match="weights: expected two numbers from 0, not both 0, got"
        ):
            call([], weights=weights)


def test_weights_in_any_sequence() -> None:
    for weights in ([0.05, 0.95], (0.05, 0.95)):
        assert optimal_bands(0.8, 128, weights) == optimal_bands(0.8)
    texts = windows(1, 60, 5)
    assert find_near_duplicates(texts, weights=[0.05, 0.95]).clusters == [list(range(5))]


# --- the index -----------------------------------------------------------------------------------

TEXTS = windows(4, 60, 30)


def filled(texts: list[str] = TEXTS, **settings) -> LSHIndex:
    index = LSHIndex(**settings)
    index.insert([f"id {i}" for i in range(len(texts))], index.hasher.signatures(texts))
    return index


@pytest.mark.parametrize(("bands", "rows"), [(16, 8), (32, 4), (3, 1), (2, 64)])
def test_candidates_equal_datasketch(datasketch: Any, bands: int, rows: int) -> None:
    index = filled(bands=bands, rows=rows)
    signatures = index.hasher.signatures(TEXTS)
    keys, minhashes = index.keys, []
    tables = datasketch.MinHashLSH(num_perm=128, params=(bands, rows))
    for key, row in zip(keys, signatures, strict=True):
        minhashes.append(datasketch.MinHash(hashvalues=row, scheme="affine32"))
        tables.insert(key, minhashes[-1])
    answers = index.query(signatures)
    for minhash, answer in zip(minhashes, answers, strict=True):
        assert set(tables.query(minhash)) == set(answer)
    pairs = {(a, b) for a, answer in zip(keys, answers, strict=True) for b in answer}
    expected = {(a, b) for a, b in pairs if keys.index(a) < keys.index(b)}
    assert set(index.candidate_pairs()) == expected


@settings(max_examples=25)
@given(st.lists(st.integers(0, 12), max_size=12))
def test_insertion_in_any_portions(portions: list[int]) -> None:
    index, whole, done = LSHIndex(), LSHIndex(), 0
    signatures = index.hasher.signatures(TEXTS)
    for portion in [*portions, len(TEXTS)]:
        part = range(done, min(done + portion, len(TEXTS)))
        index.insert([f"id {i}" for i in part], signatures[part.start : part.stop])
        done = part.stop
    whole = filled()
    sizes = [len(hashes) for hashes, _ in index._runs.runs]
    assert all(longer > 2 * shorter for longer, shorter in pairwise(sizes))
    assert len(index) == 30 and index.query(signatures) == whole.query(signatures)
    assert index.candidate_pairs() == whole.candidate_pairs()


def test_saved_and_loaded(tmp_path: Path) -> None:
    hasher = MinHasher(64, n=3, unit="character", seed=9)
    index = LSHIndex(hasher, 8, 4)
    keys = ["plain", "", "ünï\n", "half \ud83d"]
    index.insert(keys, hasher.signatures(TEXTS[:4]))
    index.save(tmp_path / "index")
    again = LSHIndex.load(str(tmp_path / "index"))
    assert (again.hasher, again.bands, again.rows) == (hasher, 8, 4)
    assert again.keys == keys and again.candidate_pairs() == index.candidate_pairs()
    again.insert(["new"], hasher.signatures(TEXTS[4:5]))
    with pytest.raises(ValueError, match="keys: expected new ones, got 'plain' again"):
        again.insert(["plain"], hasher.signatures(TEXTS[4:5]))
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_an_empty_index(tmp_path: Path) -> None:
    index = LSHIndex()
    assert len(index) == 0 and index.candidate_pairs() == []
    assert index.query(index.hasher.signatures(["a"])) == [[]]
    index.insert([], np.empty((0, 128), np.uint32))
    index.save(tmp_path / "index")
    again = LSHIndex.load(tmp_path / "index")
    again.insert(["a"], again.hasher.signatures(["a"]))
    assert again.query(again.hasher.signatures(["a", "b"])) == [["a"], []]


def test_a_refused_insertion_leaves_nothing_behind() -> None:
    index = filled()
    before = index.candidate_pairs()
    fresh = index.hasher.signatures(["x", "y"])
    for keys, match in (
        (["new"], "keys: expected 2, one for each signature, got 1"),
        (["new", "new"], "got 'new' again"),
        (["new", "id 3"], "got 'id 3' again"),
    ):
        with pytest.raises(ValueError, match=match):
            index.insert(keys, fresh)
    with pytest.raises(ValueError, match=r"signatures: expected rows of 128 .* shape \(2, 64\)"):
        index.insert(["p", "q"], fresh[:, :64])
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match="signatures"):
        index.query(fresh[0])  # one signature is not several
    with pytest.raises(ValueError, match=r"keys: expected several strings, got a single str"):
        index.insert("pq", fresh)
    assert len(index) == 30 and index.candidate_pairs() == before
    index.insert(["new", "p"], fresh)


def contents(index: LSHIndex) -> Any:
    """What can be seen of an index."""
    answers = index.query(index.hasher.signatures(TEXTS))
    return index.keys, len(index), index.candidate_pairs(), answers


@settings(max_examples=25)
@given(st.lists(st.integers(0, 29), max_size=30), st.integers(0, 30))
def test_removed_documents_are_as_if_never_inserted(removed: list[int], at: int) -> None:
    signatures = MinHasher().signatures(TEXTS)
    index, fresh = LSHIndex(), LSHIndex()
    for part in (range(at), range(at, 30)):
        index.insert([f"id {i}" for i in part], signatures[part.start : part.stop])
    index.remove(f"id {i}" for i in removed)
    stay = [i for i in range(30) if i not in removed]
    fresh.insert([f"id {i}" for i in stay], signatures[stay])
    assert contents(index) == contents(fresh)
    gone = sorted(set(removed))
    for changed in (index, fresh):  # what was removed may come again, under its old key
        changed.insert([f"id {i}" for i in gone], signatures[gone])
    assert contents(index) == contents(fresh)


@pytest.mark.usefixtures("unchecked")
def test_a_refused_removal_leaves_all_behind(tmp_path: Path) -> None:
    index = filled()
    before = contents(index)
    for keys, match in (
        (["id 3", "nobody"], "keys: expected keys of this index, got 'nobody'"),
        ("id 3", "keys: expected several strings, got a single str"),
        ([3], "keys: expected strings, got int"),
    ):
        with pytest.raises((ValueError, jaxtyping.TypeCheckError), match=match):
            index.remove(keys)
    index.remove([])
    assert contents(index) == before
    index.remove(f"id {i}" for i in range(30))
    assert len(index) == 0
    index.save(tmp_path / "empty")
    assert LSHIndex.load(tmp_path / "empty").candidate_pairs() == []


@settings(max_examples=15)
@given(st.lists(st.integers(0, 12), max_size=5))
def test_merged_indexes_are_one(portions: list[int]) -> None:
    whole, done = LSHIndex(), 0
    signatures = whole.hasher.signatures(TEXTS)
    for portion in [*portions, 30]:
        part = range(done, min(done + portion, 30))
        shard = LSHIndex()
        shard.insert([f"id {i}" for i in part], signatures[part.start : part.stop])
        before = contents(shard)
        whole.merge(shard)
        assert contents(shard) == before
        done = part.stop
    assert contents(whole) == contents(filled())
    sizes = [len(hashes) for hashes, _ in whole._runs.runs]
    assert all(longer > 2 * shorter for longer, shorter in pairwise(sizes))


@pytest.mark.usefixtures("unchecked")
def test_indexes_that_cannot_be_one() -> None:
    index = filled()
    before = contents(index)
    for other, match in (
        (filled(TEXTS[:2]), "other: expected keys that are new, got 'id 0' again"),
        (index, "other: expected keys that are new"),
        (LSHIndex(bands=32, rows=4), r"other: expected hasher, bands and rows .*16, 8.*32, 4"),
        (LSHIndex(MinHasher(seed=2)), r"other: expected hasher, bands and rows .*seed=2"),
        ({"a": 1}, r"other: expected an LSHIndex, got \{'a': 1\}"),
    ):
        with pytest.raises(ValueError, match=match):
            index.merge(other)
    assert contents(index) == before
    index.insert(["new"], index.hasher.signatures(["x"]))


def test_bad_layouts() -> None:
    with pytest.raises(ValueError, match="expected at most 64 permutations in all, got 16 times 8"):
        LSHIndex(MinHasher(64))
    with pytest.raises(
        ValueError, match="expected at most 128 permutations in all, got 16 times 9"
    ):
        LSHIndex(bands=16, rows=9)
    with pytest.raises(ValueError, match="bands: expected a whole number of at least 1, got 0"):
        LSHIndex(bands=0, rows=3)


def _rewritten(path: Path, **changes) -> None:
    with np.load(path) as file:
        arrays = dict(file)
    header = json.loads(arrays["header"].tobytes())
    header |= changes.pop("header", {})
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    for name, change in changes.items():
        arrays[name] = change(arrays[name])
    with path.open("wb") as file:
        np.savez(file, **arrays)


@pytest.mark.parametrize(
    "changes",
    [
        {"header": {"format": "llmbook.LSHIndex 9"}},
        {"header": {"keys": ["a", "a"]}},
        {"header": {"keys": ["only one"]}},
        {"header": {"keys": [1, 2, 3]}},
        {"header": {"layout": {"bands": 4}}},
        {"header": {"layout": [8, 8]}},
        {"header": {"layout": [16, 8, 4]}},
        {"header": {"layout": None}},
        {"header": {"hasher": {"n_permutations": -1}}},
        {"header": {"hasher": {"surprise": 1}}},
        {"hashes": lambda h: h[:-1]},
        {"hashes": lambda h: h.astype(np.int64)},
        {"owners": lambda o: o + 1},
        {"owners": lambda o: o - 1},
        {"owners": lambda o: np.zeros_like(o)},
    ],
)
def test_files_with_wrong_contents(tmp_path: Path, changes) -> None:
    path = tmp_path / "index.npz"
    filled(TEXTS[:3]).save(path)
    LSHIndex.load(path)
    _rewritten(path, **changes)
    with pytest.raises(ValueError, match=r"path: .*index\.npz"):
        LSHIndex.load(path)


def test_files_that_are_no_index(tmp_path: Path) -> None:
    path = tmp_path / "index.npz"
    filled(TEXTS[:5]).save(path)
    whole = path.read_bytes()
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    foreign = [(tmp_path / name).read_bytes() for name in ("array.npy", "other.npz")]
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 0xFF
    cut = [whole[:size] for size in (0, 10, len(whole) // 2, len(whole) - 1)]
    for content in (b"%PDF-1.7 and more", bytes(broken), *foreign, *cut):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"path: .*index\.npz"):
            LSHIndex.load(path)
    with pytest.raises(FileNotFoundError):
        LSHIndex.load(tmp_path / "absent")


def test_damaged_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    path, rng = tmp_path / "index.npz", np.random.default_rng(0)
    filled(TEXTS[:3]).save(path)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    refused = 0
    for _ in range(400):
        broken = whole.copy()
        broken[rng.integers(len(whole), size=2)] = rng.integers(256, size=2)
        path.write_bytes(broken.tobytes())
        try:
            LSHIndex.load(path)  # some bytes of a zip archive mean nothing
        except ValueError as error:
            assert "index.npz" in str(error)
            refused += 1
    assert refused > 300


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "index.npz"
    filled(TEXTS[:3]).save(path)
    before = path.read_bytes()

    def fail(file, **arrays) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        filled(TEXTS).save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# --- clusters ------------------------------------------------------------------------------------


@given(st.integers(1, 20), st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30))
def test_union_find_is_an_equivalence(size: int, edges: list[tuple[int, int]]) -> None:
    forest, sets = UnionFind(size), [{i} for i in range(size)]
    for a, b in ((a % size, b % size) for a, b in edges):
        different = sets[a] is not sets[b]
        assert forest.union(a, b) == different
        if different:
            sets[a] |= sets[b]
            for i in sets[b]:
                sets[i] = sets[a]
    assert [forest.find(i) for i in range(size)] == [min(s) for s in sets]
    expected = sorted({tuple(sorted(items)) for items in sets if len(items) > 1})
    assert forest.clusters() == [list(items) for items in expected]


def test_union_find_of_a_long_chain() -> None:
    forest = UnionFind(10_000)
    for i in reversed(range(9_999)):
        forest.union(i, i + 1)
    assert forest.find(9_999) == 0
    assert UnionFind(0).clusters() == []
    with pytest.raises(ValueError, match="size: expected a whole number of at least 0, got -1"):
        UnionFind(-1)


def test_items_outside_of_a_union_find() -> None:
    forest = UnionFind(3)
    for bad in (7, 3, -1):
        with pytest.raises(ValueError, match=f"item: expected an item from 0 below 3, got {bad!r}"):
            forest.find(bad)
        with pytest.raises(ValueError, match=f"a: expected .* got {bad!r}"):
            forest.union(bad, 0)
        with pytest.raises(ValueError, match=f"b: expected .* got {bad!r}"):
            forest.union(0, bad)
    assert forest.clusters() == []


@settings(max_examples=25)
@given(small_texts)
def test_true_similarities_of_many_pairs(texts: list[str]) -> None:
    sets = _ShingleSets(texts, 2, "word")
    pairs = np.array(list(combinations(range(len(texts)), 2)), np.int64).reshape(-1, 2)
    expected = [jaccard(shingles(texts[i], 2), shingles(texts[j], 2)) for i, j in pairs]
    assert _similarities(sets, pairs).tolist() == expected


@settings(max_examples=40)
@given(small_texts, st.sampled_from([0.3, 0.5, 0.75]))
def test_clusters_are_those_of_all_pairs(texts: list[str], threshold: float) -> None:
    # Weights that make nearly everything a candidate leave the verification to decide.
    hasher = MinHasher(64, n=2)
    found = find_near_duplicates(texts, threshold, hasher=hasher, weights=(0.0, 1.0))
    forest, sets = UnionFind(len(texts)), [shingles(text, 2) for text in texts]
    for i, j in combinations(range(len(texts)), 2):
        if jaccard(sets[i], sets[j]) >= threshold:
            forest.union(i, j)
    assert found.clusters == forest.clusters()
    again = UnionFind(len(texts))
    for (i, j), value in zip(found.pairs.tolist(), found.similarities, strict=True):
        assert jaccard(sets[i], sets[j]) == value >= threshold
        assert again.union(i, j), "more pairs than are needed"
    assert again.clusters() == found.clusters


def test_near_duplicates_of_little() -> None:
    for texts in ([], [""], ["one text"], ["one text", "another text"]):
        found = find_near_duplicates(texts)
        assert found.clusters == [] and found.pairs.shape == (0, 2) and found.compared == 0
    assert find_near_duplicates(["", " ", "a", "\n"]).clusters == [[0, 1, 3]]
    assert find_near_duplicates([*ODD, *ODD]).clusters
    huge = "x y z " * 100_000
    assert find_near_duplicates([huge, "a", huge + "end"], 0.5).clusters == [[0, 2]]


def test_clusters_of_chains_and_families() -> None:
    chain = windows(5, 100, 12)
    assert find_near_duplicates(chain, 0.7).clusters == [list(range(12))]
    family = [f"{text} number {i}" for i in range(40) for text in chain[::6]]
    assert find_near_duplicates(family).clusters == brute_force(family, 0.8)


def test_no_pair_is_compared_twice(monkeypatch) -> None:
    """The worst case: any two are too unlike to be joined, and alike enough to meet often."""
    text = " ".join(f"clause{i}" for i in range(35))
    texts = [f"Copyright {1990 + i % 35} by baker {i} who may {text}" for i in range(150)]
    compared: list[tuple[int, int]] = []

    def counted(sets, pairs):
        compared.extend(map(tuple, pairs.tolist()))
        return _similarities(sets, pairs)

    monkeypatch.setattr(deduplication, "_similarities", counted)
    found = find_near_duplicates(texts)
    assert len(set(compared)) == len(compared) == found.compared
    assert 0.5 * math.comb(150, 2) < found.compared <= math.comb(150, 2)
    assert found.clusters == []


def layouts_used(monkeypatch, call) -> set[tuple[int, int]]:
    used, candidates = set(), deduplication._candidates

    def noted(signatures, bands, rows):
        used.add((bands, rows))
        return candidates(signatures, bands, rows)

    monkeypatch.setattr(deduplication, "_candidates", noted)
    call()
    return used


@pytest.mark.parametrize(
    ("options", "layout"),
    [
        ({}, (16, 8)),
        ({"weights": (0.5, 0.5)}, (9, 13)),
        ({"bands": 14, "rows": 8}, (14, 8)),
        ({"bands": 14, "rows": 8, "weights": (0.5, 0.5)}, (14, 8)),
        ({"bands": 14, "rows": 8, "hasher": MinHasher(112), "threshold": 0.75}, (14, 8)),
    ],
)
@pytest.mark.parametrize("function", [find_near_duplicates, deduplicate])
def test_bands_by_weights_or_of_ones_own(monkeypatch, function, options, layout) -> None:
    listed = documents(windows(1, 60, 5))
    assert layouts_used(monkeypatch, lambda: function(listed, **options)) == {layout}


def test_own_bands_decide_what_meets() -> None:
    pair = windows(6, 100, 2)  # 0.88
    assert find_near_duplicates(pair, bands=32, rows=4).clusters == [[0, 1]]
    assert find_near_duplicates(pair, bands=1, rows=128).clusters == []
    assert len(deduplicate(documents(pair), bands=32, rows=4)) == 1
    assert len(deduplicate(documents(pair), bands=1, rows=128)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bands": 16}, "bands, rows: expected both or neither, got 16 and None"),
        ({"rows": 8}, "bands, rows: expected both or neither, got None and 8"),
        ({"bands": 0, "rows": 8}, "bands: expected a whole number of at least 1, got 0"),
        ({"bands": 16, "rows": 9}, "expected at most 128 permutations in all, got 16 times 9"),
        ({"bands": 2, "rows": 2, "weights": (0.0, 0.0)}, "weights: expected two numbers from 0"),
        ({"bands": 2, "rows": 2, "threshold": 1.0}, "threshold: expected a number between 0 and 1"),
    ],
)
@pytest.mark.parametrize("function", [find_near_duplicates, deduplicate])
def test_bad_bands_of_ones_own(function, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        function(documents(["a", "b"]), **options)


def test_a_bucket_with_three_thousand_members() -> None:
    text = " ".join(STORY)
    copies = [f"copyright {i} {text}" for i in range(3000)]
    found = find_near_duplicates(copies)
    assert found.clusters == [list(range(3000))]
    assert found.compared < 20_000


def test_large_buckets_are_bounded() -> None:
    groups, members = np.zeros(60, np.int64), np.arange(60)
    sets = _ShingleSets([f"nothing {i} in common" for i in range(60)], 5, "word")
    for exact_up_to, centers, expected in ((60, 5, 60 * 59 // 2), (59, 5, 59 + 58 + 57 + 56 + 55)):
        found = deduplication._link_similar(groups, members, sets, 0.5, exact_up_to, centers)
        assert len(found[0]) == 0 and found[2] == expected


def test_two_families_in_one_bucket() -> None:
    """What is similar to a center is still compared with what is not, up to the limit."""
    groups, members = np.zeros(4, np.int64), np.arange(4)
    texts = windows(10, 100, 4)
    sets = _ShingleSets(texts, 5, "word")
    pairs, values, compared = deduplication._link_similar(groups, members, sets, 0.7, 1000, 100)
    assert pairs.tolist() == [[0, 1], [1, 2], [2, 3]] and compared == 6 and (values >= 0.7).all()
    pairs, _, compared = deduplication._link_similar(groups, members, sets, 0.7, 3, 100)
    assert pairs.tolist() == [[0, 1], [2, 3]] and compared == 4
    pairs, _, compared = deduplication._link_similar(groups, members, sets, 0.7, 3, 1)
    assert pairs.tolist() == [[0, 1]] and compared == 3


# --- the best copy -------------------------------------------------------------------------------


def documents(texts: list[str]) -> list[Document]:
    return [Document(text, id=f"d{i}", source=str(i % 3)) for i, text in enumerate(texts)]


def test_the_longest_stays_and_order_too() -> None:
    long = " ".join(STORY[:100])
    texts = ["short", f"{long}", "Other", f"{long} and more", "SHORT ", "   other"]
    kept = deduplicate(documents(texts))
    assert [d.id for d in kept] == ["d0", "d2", "d3"]
    assert [d.id for d in deduplicate(documents(texts), score=lambda d: -len(d.text))] == [
        "d0",
        "d1",
        "d2",
    ]
    assert deduplicate([]) == []
    assert [d.id for d in deduplicate(iter(documents([""])))] == ["d0"]
    assert [d.id for d in deduplicate(documents(["", " "]))] == ["d0"]


@settings(max_examples=25)
@given(small_texts)
def test_what_is_removed_is_like_something_kept(texts: list[str]) -> None:
    listed = documents(texts)
    options = {"hasher": MinHasher(64, n=2), "weights": (0.0, 1.0)}
    kept = deduplicate(listed, 0.5, **options)
    sets = {d.id: shingles(d.text, 2) for d in listed}
    ids = [d.id for d in kept]
    assert ids == [d.id for d in listed if d in kept]
    for d in listed:
        close = [k for k in ids if k != d.id and jaccard(sets[k], sets[d.id]) >= 0.5]
        assert bool(close) == (d.id not in ids)
    single = deduplicate(listed, 0.5, linkage="single", **options)
    assert len(single) <= len(kept)
    assert deduplicate(kept, 0.5, **options) == kept


def test_a_long_chain_is_not_compared_with_itself(monkeypatch) -> None:
    """Comparisons grow with the length of a chain, not with its square."""
    words = [f"w{i}" for i in range(2100)]
    listed = documents([" ".join(words[i : i + 60]) for i in range(2000)])
    compared = []

    def counted(sets, pairs):
        compared.append(len(pairs))
        return _similarities(sets, pairs)

    monkeypatch.setattr(deduplication, "_similarities", counted)
    counts = []
    for length in (500, 1000, 2000):
        compared.clear()
        kept = deduplicate(listed[:length])
        counts.append(sum(compared))
        ids = np.array([int(d.id[1:]) for d in kept])
        closest = np.abs(np.arange(length)[:, None] - ids).min(1)
        assert closest.max() <= 6  # shingles shared: 50 of 62, more than 0.8
        assert length / 8 < len(kept) < length / 4
    assert counts[1] < 2.5 * counts[0] and counts[2] < 2.5 * counts[1]
    assert counts[2] < 50 * 2000


def test_copies_go_from_crowded_buckets_too(monkeypatch) -> None:
    """Where no center is tried any more, near duplicates may stay, but copies do not."""
    monkeypatch.setattr(deduplication, "_CENTERS", 1)
    texts = [*windows(1, 100, 40), *windows(1, 100, 40)]
    kept = deduplicate(documents(texts), exact_up_to=0)
    assert len({d.text for d in kept}) == len(kept)
    sets = {text: shingles(text) for text in texts}
    for text in set(texts) - {d.text for d in kept}:
        assert any(jaccard(sets[text], sets[d.text]) >= 0.8 for d in kept)


def test_bad_deduplication() -> None:
    twice = documents(["a", "a"])
    with pytest.raises(ValueError, match="linkage: expected one of star, single, got 'complete'"):
        deduplicate(twice, linkage="complete")
    with pytest.raises(ValueError, match="score: expected numbers, got nan for document 'd0'"):
        deduplicate(twice, score=lambda d: math.nan)
    with pytest.raises(
        ValueError, match="exact_up_to: expected a whole number of at least 0, got -1"
    ):
        find_near_duplicates(["a"], exact_up_to=-1)


# --- documented defaults -------------------------------------------------------------------------

SEARCH = {
    "threshold": 0.8,
    "hasher": None,
    "weights": (0.05, 0.95),
    "bands": None,
    "rows": None,
    "exact_up_to": 1000,
    "workers": 1,
}


@pytest.mark.parametrize(
    ("function", "defaults"),
    [
        (shingles, {"n": 5, "unit": "word"}),
        (MinHasher, {"n_permutations": 128, "n": 5, "unit": "word", "seed": 1}),
        (MinHasher.signatures, {"workers": 1}),
        (optimal_bands, {"n_permutations": 128, "weights": (0.05, 0.95)}),
        (LSHIndex, {"hasher": None, "bands": 16, "rows": 8}),
        (find_near_duplicates, SEARCH),
        (deduplicate, {**SEARCH, "score": None, "linkage": "star"}),
    ],
)
def test_documented_defaults(function, defaults) -> None:
    parameters = inspect.signature(function).parameters.values()
    assert {p.name: p.default for p in parameters if p.default is not p.empty} == defaults
    assert optimal_bands(0.8) == (16, 8) and LSHIndex().hasher == MinHasher()


@pytest.mark.parametrize("function", [find_near_duplicates, deduplicate])
def test_the_limits_reach_the_search(monkeypatch, function) -> None:
    given, similar = [], deduplication._link_similar

    def noted(groups, members, sets, threshold, exact_up_to, centers):
        given.append((threshold, exact_up_to, centers))
        return similar(groups, members, sets, threshold, exact_up_to, centers)

    monkeypatch.setattr(deduplication, "_link_similar", noted)
    listed = documents(windows(1, 60, 5))
    function(listed)
    function(listed, 0.7, exact_up_to=5)
    assert given == [(0.8, 1000, 100), (0.7, 5, 100)]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("text", lambda: canonical_text(5)),
        ("text", lambda: shingles(b"a")),
        ("n", lambda: shingles("a", None)),
        ("a", lambda: jaccard(5, {1})),
        ("b", lambda: jaccard({1}, "a text")),
        ("b", lambda: jaccard({1}, np.zeros((2, 2)))),
        ("seed", lambda: MinHasher(seed=None)),
        ("n_permutations", lambda: MinHasher(n_permutations=1.5)),
        ("workers", lambda: MinHasher().signatures([], None)),
        ("hashes", lambda: MinHasher().hash_signatures(np.ones(1), np.array([1]))),
        ("sizes", lambda: MinHasher().hash_signatures(np.ones(1, np.uint32), [1])),
        ("a", lambda: estimate_jaccard([1], np.ones(1, np.uint32))),
        ("b", lambda: estimate_jaccard(np.ones(1, np.uint32), np.ones(1))),
        ("bands", lambda: collision_probability(0.5, None, 2)),
        ("similarity", lambda: collision_probability("a", 2, 2)),
        ("n_permutations", lambda: optimal_bands(0.5, None)),
        ("weights", lambda: optimal_bands(0.5, 8, ("a", 1))),
        ("hasher", lambda: LSHIndex(5)),
        ("rows", lambda: LSHIndex(rows=None)),
        ("signatures", lambda: LSHIndex().query(np.ones((1, 128)))),
        ("signatures", lambda: LSHIndex().insert([], [])),
        ("keys", lambda: LSHIndex().insert(5, np.ones((1, 128), np.uint32))),
        ("path", lambda: LSHIndex().save(5)),
        ("path", lambda: LSHIndex.load(None)),
        ("size", lambda: UnionFind(None)),
        ("item", lambda: UnionFind(3).find(True)),
        ("items", lambda: UnionFind(3).roots([1])),
        ("hasher", lambda: find_near_duplicates([], hasher="minhash")),
        ("hasher", lambda: deduplicate([], hasher="minhash")),
        ("workers", lambda: find_near_duplicates([], workers=0)),
        ("score", lambda: deduplicate([], score=5)),
        ("score", lambda: deduplicate(documents(["a", "a"]), score=lambda d: "best")),
    ],
)
def test_bad_arguments_are_named(argument, call) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: expected"):
        call()
