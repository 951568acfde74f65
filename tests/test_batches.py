"""Shards, orders, packing and the sampler of chapter 07: round trips, accidents, resumption."""

import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook import batches
from llmbook.batches import (
    Batch,
    BatchSampler,
    PackedDocuments,
    ShardError,
    TokenRing,
    TokenShards,
    best_fit,
    document_fields,
    document_mask,
    pack_documents,
    permuted,
    random_bits,
    tokenizer_fingerprint,
    window_batch,
    write_shards,
)
from llmbook.corpus import CorpusWarning, Document

END = 256


class ByteTokenizer:
    """Bytes as ids, and one sign for the end; enough of a tokenizer for shards."""

    def __init__(self, vocab_size: int = 257, shift: int = 0):
        self.vocab_size, self.shift = vocab_size, shift
        self.special_tokens = {"<|endoftext|>": END}

    def encode(self, text: str) -> list[int]:
        return [(byte + self.shift) % 256 for byte in text.encode("utf-8", "replace")]

    def decode(self, ids) -> str:
        return bytes(int(i) for i in ids).decode()


TOKENIZER = ByteTokenizer()
TEXTS = [f"Document {number} says " + "la" * (number * 7 % 40) for number in range(60)]


@pytest.fixture
def shards(tmp_path: Path) -> TokenShards:
    return write_shards(TEXTS, tmp_path / "shards", TOKENIZER, shard_tokens=500)


@pytest.fixture
def untyped():
    """Switch jaxtyping's checks off, as they are for a reader, to see our own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def document(shards: TokenShards, number: int) -> list[int]:
    start = shards.document_ends[number - 1] if number else 0
    return shards[start : shards.document_ends[number]].tolist()


# Writing and reading


@given(st.lists(st.text(max_size=30), min_size=1, max_size=12), st.integers(1, 60))
@settings(max_examples=15)
def test_every_document_comes_back(tmp_path_factory, texts, shard_tokens):
    kept = [text for text in texts if text]
    folder = tmp_path_factory.mktemp("shards")
    if not kept:
        with pytest.warns(CorpusWarning), pytest.raises(ValueError, match="at least one document"):
            write_shards(texts, folder / "x", TOKENIZER, shard_tokens=shard_tokens)
        return
    empty = len(texts) - len(kept)
    if empty:
        with pytest.warns(CorpusWarning, match=f"{empty} empty"):
            found = write_shards(texts, folder / "x", TOKENIZER, shard_tokens=shard_tokens)
    else:
        found = write_shards(texts, folder / "x", TOKENIZER, shard_tokens=shard_tokens)
    found.verify()
    expected = [[*TOKENIZER.encode(text), END] for text in kept]
    assert [document(found, number) for number in range(len(kept))] == expected
    assert len(found) == sum(map(len, expected)) == found.document_ends[-1]
    assert (found.vocab_size, found.end_of_text) == (257, END)
    for path in list((folder / "x").iterdir())[:-1]:
        header = batches._read_header(path)
        assert header.is_last or header.n_tokens >= shard_tokens


def test_documents_texts_and_ids_are_the_same(tmp_path):
    as_texts = write_shards(TEXTS, tmp_path / "a", TOKENIZER)
    as_documents = write_shards(map(Document, TEXTS), tmp_path / "b", TOKENIZER)
    encoded = [np.array(TOKENIZER.encode(text), np.uint8) for text in TEXTS]
    as_ids = write_shards(encoded, tmp_path / "c", TOKENIZER)
    assert files(as_texts.directory) == files(as_documents.directory) == files(as_ids.directory)


def test_workers_do_not_change_a_byte(tmp_path, monkeypatch):
    rounds = batches._rounds  # small jobs, so that there are many
    monkeypatch.setattr(batches, "_rounds", lambda texts: rounds(texts, 300))
    tokenizer = SimpleNamespace(  # other processes can import it, unlike one of this test module
        vocab_size=257,
        special_tokens={"<|endoftext|>": END},
        encode=partial(bytearray, encoding="utf-8"),
    )
    one, two = (write_shards(TEXTS, tmp_path / f"{n}", tokenizer, workers=n) for n in (1, 2))
    assert files(one.directory) == files(two.directory)
    assert two[:].tolist() == [id_ for text in TEXTS for id_ in [*text.encode(), END]]


def test_rounds_keep_order_and_memory_in_bounds():
    texts = ["x" * size for size in (5, 0, 100, 1, 1, 1, 30, 8)]
    rounds = list(batches._rounds(iter(texts), job_size=10, round_size=40))
    jobs = [job for _, jobs in rounds for job in jobs]
    assert [text for _, items in jobs for text in items] == texts
    assert [first for first, _ in jobs] == list(np.cumsum([0] + [len(i) for _, i in jobs])[:-1])
    assert sum(size for size, _ in rounds) == sum(map(len, texts))
    assert len(rounds) > 1
    assert list(batches._rounds([])) == []


@pytest.mark.parametrize(("vocab_size", "width"), [(65536, 2), (65537, 4)])
def test_ids_take_as_many_bytes_as_they_need(tmp_path, vocab_size, width):
    tokenizer = ByteTokenizer(vocab_size)
    found = write_shards([[0, vocab_size - 1]], tmp_path / "x", tokenizer)
    assert found[:].tolist() == [0, vocab_size - 1, END]
    assert found._shards[0].tokens.dtype.itemsize == width
    assert found[:].dtype == np.int64


def test_one_document_one_token_and_a_long_line(tmp_path):
    one = write_shards(["a"], tmp_path / "one", TOKENIZER)
    assert one[:].tolist() == [97, END]
    long = write_shards(["x" * 1_000_000, "y"], tmp_path / "long", TOKENIZER, shard_tokens=1000)
    assert len(long) == 1_000_003
    assert long.document_ends.tolist() == [1_000_001, 1_000_003]
    assert len(files(long.directory)) == 2
    assert len(pack_documents(long, 1000)) == 1001  # the end of the first fits in with the second


def test_lone_surrogates_are_the_tokenizers_business(tmp_path):
    found = write_shards(["half \ud83d"], tmp_path / "x", TOKENIZER)
    assert TOKENIZER.decode(found[:-1]) == "half ?"


# Bad input to write_shards


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["ok", [1, 257]], "document 1: expected ids from 0 to 256, got 257"),
        ([[-1]], "document 0: expected ids from 0 to 256, got -1"),
        ([["a", "b"]], r"row of ids, got list \(1 dimensions of <U1\)"),
        ([[1.5]], "document 0: expected a text or a row of ids"),
        ([[[1], [2]]], "document 0: expected a text or a row of ids"),
        ([7], "document 0: expected a text or a row of ids"),
        ([[[1], [2, 3]]], "document 0: expected a text or a row of ids"),
        ([[2**80]], "document 0: expected a text or a row of ids"),
        ([None], "document 0: expected a text or a row of ids"),
        ([[5, END, 5]], "document 0: expected no end of text.*256 at position 1"),
        ([], "at least one document"),
        ("text", "expected several texts, got one str"),
        (b"text", "expected several texts, got one bytes"),
    ],
)
def test_wrong_texts_are_named_and_leave_nothing(tmp_path, texts, words):
    with pytest.raises(ValueError, match=words):
        write_shards(texts, tmp_path / "x", TOKENIZER)
    assert list(tmp_path.iterdir()) == []


def test_the_warning_points_to_the_caller(tmp_path):
    with pytest.warns(CorpusWarning, match="texts: 1 empty documents") as caught:
        write_shards(["a", ""], tmp_path / "x", TOKENIZER)
    assert Path(caught[0].filename).name != "batches.py"  # but here, or where shapes are checked


def test_the_size_of_the_vocabulary_is_not_asked_for_each_document(tmp_path):
    class Counting(ByteTokenizer):
        asked = 0

        @property
        def vocab_size(self):  # some tokenizers count their entries each time
            self.asked += 1
            return 257

        @vocab_size.setter
        def vocab_size(self, size):
            pass

    tokenizer = Counting()
    write_shards(TEXTS * 5, tmp_path / "x", tokenizer)
    assert tokenizer.asked < 50 < len(TEXTS * 5)


def test_the_error_names_a_document_by_its_id(tmp_path):
    class Poisoned(ByteTokenizer):
        def encode(self, text):
            return [END] if "<|endoftext|>" in text else super().encode(text)

    texts = [Document("fine"), Document("a <|endoftext|> b", id="evil.html")]
    with pytest.raises(ValueError, match=r"document 1 \('evil.html'\): expected no end of text"):
        write_shards(texts, tmp_path / "x", Poisoned())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"shard_tokens": 0}, "shard_tokens: expected at least 1"),
        ({"workers": 0}, "workers: expected at least 1"),
        ({"end_of_text": "</s>"}, r"end_of_text: expected one of \['<|endoftext|>'\], got '</s>'"),
    ],
)
def test_wrong_settings(tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        write_shards(TEXTS, tmp_path / "x", TOKENIZER, **arguments)


def test_nothing_is_overwritten(tmp_path, shards):
    before = files(shards.directory)
    with pytest.raises(ValueError, match="directory: expected a new or an empty one"):
        write_shards(["other"], shards.directory, TOKENIZER)
    assert files(shards.directory) == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="directory: expected"):
        write_shards(["other"], tmp_path / "file", TOKENIZER)
    (tmp_path / "empty").mkdir()
    assert len(write_shards(["other"], tmp_path / "empty", TOKENIZER)) == 6


def test_a_source_that_fails_midway_leaves_nothing(tmp_path):
    def texts():
        yield from TEXTS
        raise OSError("the network is gone")

    with pytest.raises(OSError, match="network"):
        write_shards(texts(), tmp_path / "x", TOKENIZER, shard_tokens=10)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys
from pathlib import Path
from llmbook.batches import write_shards

class ByteTokenizer:
    vocab_size, special_tokens = 257, {"<|endoftext|>": 256}
    def encode(self, text):
        return list(text.encode())

print("ready", flush=True)
for number in range(10_000):
    target = Path(sys.argv[1]) / f"set-{number}"
    write_shards(["text"] * 300, target, ByteTokenizer(), shard_tokens=20)
"""


def test_a_killed_run_leaves_no_half(tmp_path):
    arguments = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as run:
        assert run.stdout.readline().strip() == b"ready"
        while not (tmp_path / "set-0").exists() and run.poll() is None:
            time.sleep(0.01)
        time.sleep(0.05)
        run.kill()
    whole = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert whole
    for path in whole:
        found = TokenShards(path)
        found.verify()
        assert len(found) == 300 * 5
    for number in range(len(whole) + 1):  # the one that was cut short is among them
        if not (tmp_path / f"set-{number}").exists():
            write_shards(["again"], tmp_path / f"set-{number}", TOKENIZER)
    assert not list(tmp_path.glob(".*"))


def test_of_two_runs_with_one_target_one_is_whole(tmp_path):
    def texts():
        yield from TEXTS
        write_shards(["the other run"], tmp_path / "x", TOKENIZER)
        yield "one more"

    with pytest.raises(OSError, match=r"x\.part-"):
        write_shards(texts(), tmp_path / "x", TOKENIZER, shard_tokens=10)
    assert len(TokenShards(tmp_path / "x")) == len("the other run") + 1
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_leftovers_of_others_stay(tmp_path):
    others = [tmp_path / ".x.y.part-1", tmp_path / ".xy.part-1"]
    own = tmp_path / ".x.part-1"
    for path in (*others, own):
        path.mkdir()
    write_shards(["a"], tmp_path / "x", TOKENIZER)
    assert all(path.exists() for path in others)
    assert not own.exists()


# Opening


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_any_flipped_bit_is_found_and_its_file_named(tmp_path):
    found = write_shards(["abc", "de", "fgh"], tmp_path / "x", TOKENIZER, shard_tokens=5)
    for path in found.directory.iterdir():
        for position in range(path.stat().st_size):
            flip(path, position, bit=position % 8)
            with pytest.raises(ShardError, match=path.name):
                TokenShards(tmp_path / "x").verify()
            flip(path, position, bit=position % 8)
    TokenShards(tmp_path / "x").verify()


def test_every_bit_of_the_header_is_guarded_on_opening(tmp_path):
    found = write_shards(["abc"], tmp_path / "x", TOKENIZER)
    path = found.directory / "shard-00000.bin"
    for position in range(batches._HEADER_SIZE):
        flip(path, position)
        with pytest.raises(ShardError, match=path.name):
            TokenShards(tmp_path / "x")
        flip(path, position)
    TokenShards(tmp_path / "x").verify()


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("truncated", lambda at: os.truncate(at / "shard-00001.bin", 300), "00001.*truncated"),
        ("tail lost", lambda at: os.truncate(at / "shard-00001.bin", 96), "00001.*truncated"),
        ("header cut", lambda at: os.truncate(at / "shard-00001.bin", 50), "00001.*header"),
        ("empty", lambda at: os.truncate(at / "shard-00001.bin", 0), "00001.*not a shard"),
        ("foreign", lambda at: (at / "shard-00001.bin").write_bytes(b"PK" * 99), "00001.*not a"),
        ("first lost", lambda at: (at / "shard-00000.bin").unlink(), "00000.*missing"),
        ("middle lost", lambda at: (at / "shard-00001.bin").unlink(), "00001.*missing"),
        ("last lost", lambda at: sorted(at.iterdir())[-1].unlink(), "missing, the set goes on"),
        ("all lost", lambda at: [path.unlink() for path in at.iterdir()], "no shards here"),
        (
            "swapped",
            lambda at: shutil.copy(at / "shard-00002.bin", at / "shard-00001.bin"),
            "00001.*another set",
        ),
    ],
)
def test_accidents_are_found_on_opening(shards, name, damage, words):
    damage(shards.directory)
    with pytest.raises(ShardError, match=words):
        TokenShards(shards.directory)


def test_shards_of_two_runs_do_not_mix(tmp_path, shards):
    texts = [text.upper() for text in TEXTS]
    other = write_shards(texts, tmp_path / "other", TOKENIZER, shard_tokens=500)
    shutil.copy(other.directory / "shard-00001.bin", shards.directory / "shard-00001.bin")
    with pytest.raises(ShardError, match=r"shard-00001.*another set"):
        TokenShards(shards.directory)
    assert shards.fingerprint != other.fingerprint


def test_a_longer_set_has_no_shard_behind_its_last(tmp_path, shards):
    short = write_shards(TEXTS, tmp_path / "short", TOKENIZER)
    shutil.copy(shards.directory / "shard-00001.bin", short.directory / "shard-00001.bin")
    with pytest.raises(ShardError, match=r"shard-0000[01]"):
        TokenShards(short.directory)


def test_other_files_beside_the_shards_do_no_harm(shards):
    (shards.directory / "README.md").write_text("What this is.")
    TokenShards(shards.directory).verify()


def test_a_newer_version_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as newer:
        newer.setattr(batches, "_VERSION", 2)
        write_shards(["a"], tmp_path / "x", TOKENIZER)
    with pytest.raises(ShardError, match=r"shard-00000.bin: expected version 1, got 2"):
        TokenShards(tmp_path / "x")


@pytest.mark.parametrize(
    "change",
    [{"token_bytes": wrong} for wrong in (0, 3, 9)] + [{"n_documents": 0}, {"n_documents": 99}],
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path, change):
    path = write_shards(["abc"], tmp_path / "x", TOKENIZER).directory / "shard-00000.bin"
    header = batches._read_header(path)._replace(**change)
    size = batches._layout(header)[1]
    path.write_bytes(batches._pack_header(header) + bytes(size - batches._HEADER_SIZE))
    with pytest.raises(ShardError, match=r"shard-00000.bin: the header makes no sense"):
        TokenShards(tmp_path / "x")


def test_another_tokenizer_is_refused(shards):
    TokenShards(shards.directory, TOKENIZER)
    for other in (ByteTokenizer(shift=1), ByteTokenizer(300)):
        with pytest.raises(ShardError, match="another tokenizer"):
            TokenShards(shards.directory, other)
    assert tokenizer_fingerprint(TOKENIZER) == tokenizer_fingerprint(ByteTokenizer())
    assert len(tokenizer_fingerprint(TOKENIZER)) == 16


def test_pickles_are_small(shards):
    pickled = pickle.dumps(shards)
    assert len(pickled) < 500
    assert pickle.loads(pickled)[:].tolist() == shards[:].tolist()


# The ring


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=5).filter(any),
    st.integers(-30, 60),
    st.integers(0, 60),
)
@settings(max_examples=50)
def test_a_ring_goes_round(parts, start, length):
    ring = TokenRing([np.array(part, int) for part in parts])
    line = [token for part in parts for token in part]
    assert len(ring) == len(line)
    assert ring.window(start, length).tolist() == [
        line[(start + i) % len(line)] for i in range(length)
    ]
    stop = start + length
    assert ring[start:stop].tolist() == line[start:stop]
    assert ring[:].tolist() == line


def test_a_ring_takes_plain_slices_only():
    with pytest.raises(ValueError, match="where: expected a slice with a step of 1"):
        TokenRing([np.arange(4)])[::2]


@pytest.mark.parametrize("parts", [[], [np.arange(0)]])
def test_a_ring_has_a_token(parts):
    with pytest.raises(ValueError, match="tokens: expected at least 1, got 0"):
        TokenRing(parts)


# Random numbers and permutations


def test_the_bits_will_never_change():
    # A run resumes with another version of NumPy, or of this book: same rows, so same numbers.
    assert random_bits(0, 0).tolist() == random_bits(0, np.arange(1)).tolist()
    assert (random_bits(0, np.arange(3)) % 1000).tolist() == [55, 654, 231]
    assert permuted(np.arange(10), 10, 0).tolist() == [5, 3, 6, 0, 9, 2, 4, 7, 8, 1]


def test_splitmix_is_the_published_one():
    # The first outputs for seed 0, as every implementation has them.
    state = np.zeros(1, np.uint64)
    outputs = [int(batches._next_bits(state, np.array([k], np.uint64))[0]) for k in range(3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@given(st.integers(1, 3000), st.integers(0, 2**63))
@settings(max_examples=30)
def test_permutations_are_permutations(size, key):
    assert np.array_equal(np.sort(permuted(np.arange(size), size, key)), np.arange(size))


def test_a_permutation_of_many_is_reached_at_once():
    places = permuted(np.array([0, 1, 10**12]), 10**13, 5)
    assert len(set(places.tolist())) == 3
    assert places.max() < 10**13


@pytest.mark.parametrize("wrong", [-1, 5])
def test_numbers_to_permute_lie_in_range(wrong):
    with pytest.raises(ValueError, match=f"numbers: expected 0 to 4, got {wrong}"):
        permuted(np.array([0, wrong]), 5, 0)
    with pytest.raises(ValueError, match="size: expected at least 1"):
        permuted(np.array([0]), 0, 0)


@pytest.mark.parametrize("size", [2, 3, 5, 16, 17, 100])
def test_every_place_is_equally_likely(size):
    trials = 4000
    keys = np.repeat(np.arange(trials), size)
    orders = permuted(np.tile(np.arange(size), trials), size, keys).reshape(trials, size)
    degrees = (size - 1) ** 2
    counts = np.zeros((size, size))
    np.add.at(counts, (np.tile(np.arange(size), trials), orders.ravel()), 1)
    chi_square = np.sum((counts - trials / size) ** 2) / (trials / size)
    assert chi_square < degrees + 5 * np.sqrt(2 * degrees) + 5
    if size > 2:  # and neighbors go to unrelated places
        steps = np.bincount((orders[:, 1] - orders[:, 0]) % size, minlength=size)[1:]
        chi_square = np.sum((steps - trials / (size - 1)) ** 2) / (trials / (size - 1))
        assert chi_square < size + 5 * np.sqrt(2 * size)


# Windows


def test_targets_are_the_next_inputs(shards):
    batch = window_batch(shards, [0, 5, len(shards) - 3], 8)
    assert batch.inputs.shape == batch.targets.shape == (3, 8)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert batch.inputs[2, 3:].tolist() == shards[:5].tolist()
    assert batch.position_ids is None
    assert batch.document_ids is None
    assert batch.inputs.is_contiguous()
    assert torch.equal(batch.to("cpu").inputs, batch.inputs)
    with pytest.raises(ValueError, match="context_length: expected at least 1, got 0"):
        window_batch(shards, [0], 0)


def test_document_fields():
    ids = torch.tensor([[END, 1, END, END, 2], [1, 1, END, 1, 1]])
    positions, documents = document_fields(ids, END)
    assert positions.tolist() == [[0, 1, 0, 0, 1], [0, 1, 0, 1, 2]]
    assert documents.tolist() == [[0, 0, 1, 2, 2], [0, 0, 1, 1, 1]]


@given(st.lists(st.lists(st.integers(-1, 3), min_size=6, max_size=6), min_size=1, max_size=3))
@settings(max_examples=25)
def test_the_mask_by_its_definition(rows):
    ids = torch.tensor(rows)
    mask = document_mask(ids)
    assert mask.shape == (len(rows), 1, 6, 6)
    assert mask.dtype == torch.bool
    for b, row in enumerate(rows):
        for i in range(6):
            assert mask[b, 0, i].tolist() == [row[i] == row[j] and j <= i for j in range(6)]
    assert mask.any(-1).all(), "no position is left without anything to attend to"


# Packing


def best_fit_by_search(lengths: list[int], capacity: int) -> int:
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(capacity - length)
    return len(rooms)


@given(st.integers(1, 30).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c)))))
@settings(max_examples=50)
def test_best_fit_is_best_fit(case):
    capacity, lengths = case
    rows = best_fit(lengths, capacity)
    loads = np.bincount(rows, weights=lengths) if lengths else np.zeros(0)
    assert np.all(loads <= capacity)
    assert len(loads) == best_fit_by_search(lengths, capacity)
    assert np.all(loads > 0)


@pytest.mark.parametrize(("lengths", "wrong"), [([3, 9], 9), ([0], 0), ([-2, 3], -2)])
def test_lengths_that_do_not_fit(lengths, wrong):
    with pytest.raises(ValueError, match=f"lengths: expected 1 to 8, the capacity, got {wrong}"):
        best_fit(lengths, 8)


def test_lengths_and_counters_are_whole_numbers(untyped):
    with pytest.raises(ValueError, match=r"lengths: expected whole numbers, got .*1\.5"):
        best_fit([1.5, 2.5], 4)
    assert best_fit([], 4).tolist() == []
    for wrong in (1.7, None, 2**70):
        with pytest.raises(ValueError, match=r"counters: expected whole numbers .*, got"):
            random_bits(1, wrong)


@pytest.mark.parametrize("strategy", ["best_fit", "one_per_row"])
@pytest.mark.parametrize("context_length", [1, 7, 32, 1000])
def test_packed_rows_hold_every_token_once(tmp_path, context_length, strategy):
    shards = write_shards(TEXTS[:20], tmp_path / "x", TOKENIZER, shard_tokens=300)
    packed = pack_documents(shards, context_length, strategy)
    batch = packed.batch(range(len(packed)))
    real = batch.document_ids >= 0
    assert torch.equal(real, batch.targets != -100)
    assert sorted(batch.targets[real].tolist()) == sorted(shards[:].tolist())
    assert sorted(batch.inputs[real].tolist()) == sorted(shards[:].tolist())
    assert (batch.inputs[~real] == END).all()
    assert packed.padding == pytest.approx(1 - real.float().mean().item(), abs=1e-6)
    for row in range(len(packed)):
        ids, positions = batch.document_ids[row], batch.position_ids[row]
        assert positions.max() < context_length
        for number in range(int(ids.max()) + 1):
            here = (ids == number).nonzero().flatten().tolist()
            assert here == list(range(here[0], here[0] + len(here))), "in one piece"
            assert positions[here].tolist() == list(range(len(here))), "positions restart"
            inputs, targets = batch.inputs[row, here], batch.targets[row, here]
            assert torch.equal(inputs[1:], targets[:-1])
            assert END not in inputs[1:].tolist(), "only one document in a piece"
            if len(here) < context_length:
                assert targets[-1] == END, "what is shorter than a row has its end"
    if strategy == "one_per_row":
        assert (batch.document_ids <= 0).all()


def test_a_document_is_opened_by_the_end_of_another(shards):
    packed = pack_documents(shards, 200)
    batch = packed.batch(range(len(packed)))
    opened = batch.inputs[(batch.position_ids == 0) & (batch.document_ids >= 0)]
    assert (opened == END).all()
    found = set()
    for row, ids in zip(batch.targets, batch.document_ids, strict=True):
        for number in range(int(ids.max()) + 1):
            found.add(tuple(row[ids == number].tolist()))
    assert found == {tuple([*TOKENIZER.encode(text), END]) for text in TEXTS}


def test_attention_in_a_packed_row_is_that_of_each_document_alone(shards):
    batch = pack_documents(shards, 200).batch([0, 1])
    attention = torch.nn.functional.scaled_dot_product_attention
    q, k, v = torch.randn(3, 2, 3, 200, 8)
    together = attention(q, k, v, attn_mask=document_mask(batch.document_ids))
    assert together.isfinite().all()
    for row in range(2):
        for number in range(int(batch.document_ids[row].max()) + 1):
            here = batch.document_ids[row] == number
            alone = [x[row : row + 1, :, here] for x in (q, k, v)]
            expected = attention(*alone, is_causal=True)
            assert torch.allclose(together[row : row + 1, :, here], expected, atol=1e-5)


def test_pack_documents_refuses(shards, untyped):
    with pytest.raises(ValueError, match="strategy: expected 'best_fit' or 'one_per_row'"):
        pack_documents(shards, 8, "tetris")
    with pytest.raises(ValueError, match="context_length: expected at least 1"):
        pack_documents(shards, 0)
    packed = pack_documents(shards, 64)
    for empty in ([], np.array([], int)):
        with pytest.raises(ValueError, match=r"rows: expected 0 to .* got none"):
            packed.batch(empty)
        with pytest.raises(ValueError, match="starts: expected at least one position"):
            window_batch(shards, empty, 8)
    for wrong in (-1, len(packed), 0.5):
        with pytest.raises(ValueError, match=f"rows: expected 0 to .* got {wrong}"):
            packed.batch([0, wrong])


# The sampler


def same(a: Batch, b: Batch) -> bool:
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def sources(shards: TokenShards) -> list[tuple[TokenShards | PackedDocuments, dict]]:
    return [(shards, {"context_length": 16, "documents": True}), (pack_documents(shards, 64), {})]


@pytest.mark.parametrize("order", ["shuffled", "random", "sequential"])
def test_resumed_is_unbroken(shards, order):
    for source, settings_ in sources(shards):
        whole = BatchSampler(source, 6, **settings_, order=order, seed=4)
        expected = [batch for _, batch in zip(range(12), whole, strict=False)]
        stopped = BatchSampler(source, 6, **settings_, order=order, seed=4)
        for step, batch in zip(range(5), stopped, strict=False):
            assert same(batch, expected[step])
            assert stopped.state_dict()["step"] == step + 1
        state = json.loads(json.dumps(stopped.state_dict()))
        resumed = BatchSampler(source, 6, **settings_, order=order, seed=4)
        resumed.load_state_dict(state)
        for step, batch in zip(range(5, 12), resumed, strict=False):
            assert same(batch, expected[step])
            assert same(whole[step], expected[step])


@given(st.integers(0, 10**9), st.sampled_from([1, 2, 3, 6]))
@settings(max_examples=10)
def test_ranks_share_the_batch_of_one_process(shared_shards, step, world_size):
    for source, settings_ in sources(shared_shards):
        whole = BatchSampler(source, 6, **settings_, seed=1)[step]
        for rank in range(world_size):
            part = BatchSampler(source, 6, **settings_, seed=1, rank=rank, world_size=world_size)
            expected = Batch(*(field[rank::world_size] for field in whole))
            assert same(part[step], expected)


@pytest.fixture(scope="module")
def shared_shards(tmp_path_factory) -> TokenShards:
    return write_shards(TEXTS, tmp_path_factory.mktemp("s") / "x", TOKENIZER, shard_tokens=700)


def test_another_number_of_ranks_goes_on_in_the_same_order(shards):
    two = BatchSampler(shards, 6, 16, rank=1, world_size=2)
    for _ in zip(range(3), two, strict=False):
        pass
    one = BatchSampler(shards, 6, 16)
    one.load_state_dict(two.state_dict())
    assert same(next(iter(one)), BatchSampler(shards, 6, 16)[3])


def test_workers_of_a_rank_prepare_the_same_batches_and_do_not_count(shards):
    whole = BatchSampler(shards, 4, 16, documents=True, seed=2)
    sampler = BatchSampler(shards, 4, 16, documents=True, seed=2, rank=1, world_size=2)
    sampler.load_state_dict(whole.state_dict() | {"step": 3})
    before = torch.random.get_rng_state()
    prefetched = sampler.prefetch(workers=2)
    for step, batch in zip(range(3, 8), prefetched, strict=False):
        assert same(batch, Batch(*(field[1::2] for field in whole[step])))
        assert sampler.state_dict()["step"] == step + 1, "handed out, not prepared"
    assert torch.equal(torch.random.get_rng_state(), before)
    sampler.step = 0
    with pytest.raises(RuntimeError, match="step: expected 8, got 0"):
        next(prefetched)


def test_shuffled_epochs_visit_everything_once(shards):
    length, n = 16, len(shards)
    sampler = BatchSampler(shards, 1, length, seed=9)
    rows = n // length
    ids = np.arange(n)  # watch which positions are read
    sampler.source = ring = TokenShards(shards.directory)
    ring._parts, ring._first = [ids], [0, n]
    orders = []
    for epoch in range(3):
        targets = torch.cat([sampler[epoch * rows + i].targets for i in range(rows)])
        seen = np.bincount(targets.flatten(), minlength=n)
        assert seen.max() == 1
        assert (seen == 0).sum() == n % length
        orders.append(targets[:, 0].tolist())
    assert orders[0] != orders[1] != orders[2]
    assert len({start % length for order in orders for start in order}) > 1, "the cuts move"


def test_packed_epochs_visit_every_row_once(shards):
    packed = pack_documents(shards, 64)
    batch = BatchSampler(packed, len(packed), seed=5)[0]
    rows = {tuple(row.tolist()) for row in batch.inputs}
    assert rows == {tuple(row.tolist()) for row in packed.batch(range(len(packed))).inputs}
    again = BatchSampler(packed, len(packed), seed=5)[1]
    assert not same(batch, again)


def test_a_batch_may_reach_into_the_next_epoch(shards):
    packed = pack_documents(shards, 500)
    sampler = BatchSampler(packed, 3 * len(packed) + 1)
    assert sampler[0].inputs.shape == (3 * len(packed) + 1, 500)


def test_sequential_windows_are_blocks_of_the_text(shards):
    batch = BatchSampler(shards, 3, 16, order="sequential")[1]
    assert batch.inputs.tolist() == [shards[at : at + 16].tolist() for at in (48, 64, 80)]


def test_random_windows_are_spread_evenly(shards):
    sampler = BatchSampler(shards, 5000, 1, order="random")
    counts = np.bincount(sampler[0].inputs.flatten(), minlength=257)
    expected = 5000 * np.bincount(shards[:], minlength=257) / len(shards)
    often = expected > 20
    assert np.all(np.abs(counts - expected)[often] < 5 * np.sqrt(expected[often]))


def test_seeds_differ(shards):
    for order in ("shuffled", "random"):
        a, b = (BatchSampler(shards, 8, 16, order=order, seed=seed)[0] for seed in (0, 1))
        assert not torch.equal(a.inputs, b.inputs)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"context_length": 0}, "context_length: expected at least 1"),
        ({"context_length": None}, "context_length: expected a number of tokens"),
        ({"context_length": 10**6}, "context_length: expected at most the .* tokens that there"),
        ({"order": "epoch"}, "order: expected one of"),
        ({"seed": -1}, "seed: expected at least 0"),
        ({"seed": 2**64}, "seed: expected at most 64 bits"),
        ({"rank": 2, "world_size": 2}, "cannot share 4 rows out for rank 2 of 2"),
        ({"rank": -1}, "rank: expected at least 0"),
        ({"world_size": 3}, "cannot share 4 rows out for rank 0 of 3"),
        ({"world_size": 0}, "world_size: expected at least 1"),
        ({"seed": None}, "seed: expected a whole number, got None"),
        ({"rank": None}, "rank: expected a whole number, got None"),
        ({"world_size": None}, "world_size: expected a whole number, got None"),
        ({"batch_size": None}, "batch_size: expected a whole number, got None"),
        ({"batch_size": 10**30}, "batch_size: expected at most"),
    ],
)
def test_wrong_samplers(shards, arguments, untyped, words):
    with pytest.raises(ValueError, match=words):
        BatchSampler(**{"source": shards, "batch_size": 4, "context_length": 16} | arguments)


def test_packed_rows_have_their_own_length(shards):
    packed = pack_documents(shards, 64)
    assert BatchSampler(packed, 2, 64).context_length == BatchSampler(packed, 2).context_length
    with pytest.raises(ValueError, match="context_length: rows have 64, got 32"):
        BatchSampler(packed, 2, 32)


def test_the_smallest_corpus(tmp_path):
    shards = write_shards(["a"], tmp_path / "x", TOKENIZER)
    batch = BatchSampler(shards, 3, 2, documents=True)[0]
    assert batch.inputs.shape == (3, 2)
    with pytest.raises(ValueError, match="at most the 2 tokens that there are, got 3"):
        BatchSampler(shards, 3, 3)
    assert BatchSampler(pack_documents(shards, 3), 1)[0].targets.tolist() == [[97, END, -100]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "state: seed: expected 0, as it is here, got 1"),
        ({"batch_size": 8}, "state: batch_size"),
        ({"order": "random"}, "state: order"),
        ({"source": "0" * 32}, "state: source"),
        ({"extra": 1}, "state: extra: expected None"),
        ({"step": -1}, "state: step: expected a whole number from 0 on, got -1"),
        ({"step": 1.5}, "state: step"),
        ({"step": None}, "state: step"),
        ({"step": 10**30}, "state: step: expected less than"),
    ],
)
def test_a_state_of_something_else_is_refused(shards, change, words):
    sampler = BatchSampler(shards, 4, 16)
    state = sampler.state_dict() | change
    sampler.step = 2
    with pytest.raises(ValueError, match=words):
        sampler.load_state_dict({k: v for k, v in state.items() if v is not None})
    assert sampler.step == 2


def test_a_state_knows_the_packing(shards):
    state = BatchSampler(pack_documents(shards, 64), 4).state_dict()
    with pytest.raises(ValueError, match="state: source"):
        BatchSampler(pack_documents(shards, 64, "one_per_row"), 4).load_state_dict(state)
    BatchSampler(pack_documents(TokenShards(shards.directory), 64), 4).load_state_dict(state)


def test_steps_below_zero(shards):
    with pytest.raises(ValueError, match="step: expected at least 0, got -1"):
        BatchSampler(shards, 4, 16)[-1]


def test_steps_beyond_64_bits(shards, untyped):
    for wrong in (10**30, None):
        with pytest.raises(ValueError, match=f"step: expected a number below .*, got {wrong}"):
            BatchSampler(shards, 4, 16)[wrong]
    assert BatchSampler(shards, 1 << 2, 16)[(1 << 40) - 1].inputs.shape == (4, 16)


@pytest.mark.parametrize("wrong", [None, [], "{}"])
def test_a_state_is_a_dictionary(shards, wrong, untyped):
    with pytest.raises(ValueError, match="state: expected a dictionary, got"):
        BatchSampler(shards, 4, 16).load_state_dict(wrong)


def test_numpy_numbers_are_fit_for_json(shards, untyped):
    sampler = BatchSampler(
        shards, np.int64(2), np.int64(16), seed=np.int64(3), documents=np.bool_(True)
    )
    sampler.step = np.int64(5)
    other = BatchSampler(shards, 2, 16, seed=3, documents=True)
    other.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert same(sampler[sampler.step], other[5])
    packed = pack_documents(shards, np.int64(64))
    json.dumps(BatchSampler(packed, np.int64(2)).state_dict())


# Tokens in memory

IDS = np.random.default_rng(0).integers(50, size=1000)


@pytest.mark.parametrize(
    "tokens",
    [
        IDS,
        IDS.astype(np.uint16),
        torch.from_numpy(IDS),
        torch.from_numpy(IDS).int(),
        IDS.tolist(),
        [IDS[:300], IDS[300:].astype(np.uint32)],
        [IDS[:999].tolist(), [int(IDS[999])]],
        [torch.from_numpy(IDS[:10]), IDS[10:]],
    ],
    ids=["array", "uint16", "tensor", "int32 tensor", "list", "arrays", "lists", "mixed"],
)
def test_tokens_in_memory_are_a_full_source(tokens, untyped):
    ring = TokenRing(tokens)
    assert ring[:].tolist() == IDS.tolist()
    assert ring.fingerprint == TokenRing(IDS).fingerprint, "whatever their kind and division"
    sampler, expected = (
        BatchSampler(tokens, 8, 7, seed=3),
        BatchSampler(TokenRing(IDS), 8, 7, seed=3),
    )
    assert sampler.state_dict() == expected.state_dict()
    for step, batch in zip(range(30), sampler, strict=False):
        assert same(batch, expected[step])
        for row, target in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            assert row[1:] == target[:-1]
    resumed = BatchSampler(tokens, 8, 7, seed=3)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert same(next(iter(resumed)), sampler[resumed.step - 1])


def test_windows_of_tokens_in_memory():
    batch = window_batch(np.arange(100), [0, 98], 3)
    assert batch.inputs.tolist() == [[0, 1, 2], [98, 99, 0]]
    assert batch.targets.tolist() == [[1, 2, 3], [99, 0, 1]]
    assert same(batch, window_batch(list(range(100)), [0, 98], 3))


def test_tokens_in_memory_give_the_batches_of_the_same_shards(shards):
    ring = TokenRing(shards[:], end_of_text=END)
    assert ring.document_ends.tolist() == shards.document_ends.tolist()
    ours = BatchSampler(ring, 4, 16, documents=True, seed=2)
    theirs = BatchSampler(shards, 4, 16, documents=True, seed=2)
    for step in (0, 1, 77):
        assert same(ours[step], theirs[step])
    packed = pack_documents(ring, 64)
    for a, b in zip(
        packed.batch(range(5)), pack_documents(shards, 64).batch(range(5)), strict=True
    ):
        assert torch.equal(a, b)
    assert BatchSampler(packed, 2).state_dict()["source"] == packed.fingerprint


def test_other_tokens_in_memory_are_another_source(untyped):
    state = BatchSampler(IDS, 8, 7).state_dict()
    for other in (IDS[:-1], IDS + 1, IDS[::-1], TokenRing(IDS, end_of_text=0)):
        with pytest.raises(ValueError, match="state: source: expected"):
            BatchSampler(other, 8, 7).load_state_dict(state)


def test_workers_prepare_batches_of_tokens_in_memory():
    sampler = BatchSampler(IDS, 8, 7, seed=1)
    for step, batch in zip(range(3), sampler.prefetch(), strict=False):
        assert same(batch, BatchSampler(IDS, 8, 7, seed=1)[step])


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ("data/train", "source: expected a row of token ids, a TokenRing, .* got str"),
        (["a text", "another"], "source: expected a row of token ids"),
        (None, "source: expected a row of token ids"),
        (7, "source: expected a row of token ids"),
        (np.zeros((4, 5), int), "expected rows of ids, .*2 dimensions of int"),
        (torch.zeros(4, 5).long(), "expected rows of ids, .*2 dimensions of int"),
        (np.zeros(40), "expected rows of ids, which are whole numbers, .* float64"),
        (np.ones(40, bool), "expected rows of ids, which are whole numbers, .* bool"),
        (np.arange(-1, 40), "expected ids from 0 on, got -1"),
        ([], "tokens: expected at least 1, got 0"),
        ({1: 2}, "source: expected a row of token ids"),
    ],
)
def test_what_are_not_ids_is_refused_at_once(tokens, words, untyped):
    with pytest.raises(ValueError, match=words):
        BatchSampler(tokens, 8, 7)


def test_documents_in_memory_need_their_end_of_text():
    with pytest.raises(ValueError, match="documents: the source must know its end_of_text"):
        BatchSampler(IDS, 8, 7, documents=True)
    with pytest.raises(ValueError, match="end_of_text: a TokenRing needs it"):
        pack_documents(TokenRing(IDS), 16)
    with pytest.raises(ValueError, match="tokens: expected end of text, 99, after the last doc"):
        pack_documents(TokenRing(IDS, end_of_text=99), 16)
    with pytest.raises(ValueError, match="end_of_text: expected at least 0, got -1"):
        TokenRing(IDS, end_of_text=-1)


# Windows that do not wrap around


def seen(sampler: BatchSampler, steps: range) -> np.ndarray:
    return np.concatenate([sampler[step].inputs.numpy() for step in steps])


@pytest.mark.parametrize("order", ["shuffled", "random", "sequential"])
@pytest.mark.parametrize(("n", "length"), [(100, 7), (99, 7), (8, 7), (2, 1), (50, 49), (15, 7)])
def test_no_window_wraps_around(order, n, length):
    sampler = BatchSampler(np.arange(n), 4, length, order=order, wrap=False, seed=5)
    for step in range(50):
        batch = sampler[step]
        assert torch.equal(batch.targets, batch.inputs + 1), "positions are ids here"
        assert batch.targets.max() < n


def test_windows_that_do_not_wrap_visit_everything_once_an_epoch():
    n, length = 103, 10
    sampler = BatchSampler(np.arange(n), 1, length, wrap=False)
    cuts = set()
    for epoch in range(40):
        starts = np.sort(seen(sampler, range(10 * epoch, 10 * epoch + 10))[:, 0])
        assert np.all(np.diff(starts) == length), "ten windows side by side"
        cuts.add(int(starts[0]))
    assert cuts == {0, 1, 2}, "and the cuts move as far as they can"


def test_random_windows_that_do_not_wrap_begin_everywhere():
    starts = seen(BatchSampler(np.arange(20), 500, 15, order="random", wrap=False), range(4))[:, 0]
    counts = np.bincount(starts)
    assert len(counts) == 5
    assert np.all(np.abs(counts - 400) < 5 * np.sqrt(400)), counts


def test_a_window_that_does_not_wrap_needs_one_token_more():
    assert BatchSampler(np.arange(9), 1, 9)[0].inputs.shape == (1, 9)
    with pytest.raises(ValueError, match="expected less than the 9 tokens that there are, got 9"):
        BatchSampler(np.arange(9), 1, 9, wrap=False)


def test_states_say_whether_windows_wrap_only_if_they_do_not(shards):
    wrapping, not_wrapping = (BatchSampler(shards, 4, 16, wrap=wrap) for wrap in (True, False))
    assert "wrap" not in wrapping.state_dict(), "states from before there was a choice still fit"
    with pytest.raises(ValueError, match="state: wrap: expected False"):
        not_wrapping.load_state_dict(wrapping.state_dict())
    with pytest.raises(ValueError, match="state: wrap: expected None"):
        wrapping.load_state_dict(not_wrapping.state_dict())
    packed = pack_documents(shards, 64)
    assert BatchSampler(packed, 2, wrap=False).state_dict() == BatchSampler(packed, 2).state_dict()


# What cannot be, and what is left out


RING = TokenRing([1, 2, 3, 4, 5, 0], end_of_text=0)
WINDOW = torch.zeros(1, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda _: tokenizer_fingerprint(None), "tokenizer: expected an object with .* got None"),
        (
            lambda at: write_shards(["a"], at / "x", 5),
            "tokenizer: expected an object with .* got 5",
        ),
        (lambda at: write_shards(5, at / "x", TOKENIZER), "texts: expected several .* got one int"),
        (
            lambda _: write_shards(["a"], None, TOKENIZER),
            "directory: expected a str or a Path, got None",
        ),
        (lambda _: TokenShards(""), "directory: expected a str or a Path, got ''"),
        (lambda _: BatchSampler(RING, 2, 2)[0].to("nowhere"), "device: expected .* got 'nowhere'"),
        (lambda _: BatchSampler(RING, 2, 2)[0].to(None), "device: expected a device .* got None"),
        (lambda _: document_fields(WINDOW.int(), 0), "inputs: expected a tensor of int64, .*int32"),
        (
            lambda at: write_shards(["a"], at / "x", TOKENIZER, shard_tokens=None),
            "shard_tokens: expected a whole number, got None",
        ),
        (lambda _: TokenShards(None), "directory: expected a str or a Path, got None"),
        (lambda _: TokenRing(5), "tokens: expected a row of ids or several, got 5"),
        (
            lambda _: TokenRing([1], end_of_text="x"),
            "end_of_text: expected a whole number, got 'x'",
        ),
        (lambda _: RING.window(0.5, 2), "start: expected a whole number, got 0.5"),
        (lambda _: RING.window(0, -1), "length: expected at least 0, got -1"),
        (lambda _: RING.window(0, None), "length: expected a whole number, got None"),
        (lambda _: permuted([0], 3, 1), r"numbers: expected an array of whole numbers, got \[0\]"),
        (lambda _: permuted(np.array([0.5]), 3, 1), "numbers: expected an array of whole numbers"),
        (lambda _: permuted(np.array([0]), None, 1), "size: expected a whole number, got None"),
        (lambda _: window_batch(RING, [0.5], 2), r"starts: .* whole numbers, got \[0.5\]"),
        (lambda _: window_batch(RING, [[0]], 2), r"starts: .* whole numbers, got \[\[0\]\]"),
        (lambda _: window_batch(RING, [0], None), "context_length: expected a whole number, got N"),
        (lambda _: document_fields([[1]], 0), r"inputs: .* \(batch, sequence\), got \[\[1\]\]"),
        (lambda _: document_fields(WINDOW[0], 0), r"inputs: .* torch.int64 of shape \(3,\)"),
        (lambda _: document_fields(WINDOW.float(), 0), "inputs: .* got torch.float32 of shape"),
        (lambda _: document_fields(WINDOW, None), "end_of_text: expected a whole number, got None"),
        (lambda _: document_mask(WINDOW[0]), r"document_ids: .* got torch.int64 of shape \(3,\)"),
        (lambda _: document_mask(WINDOW.bool()), "document_ids: .* got torch.bool of shape"),
        (lambda _: best_fit([1], None), "capacity: expected a whole number, got None"),
        (lambda _: best_fit([], 0), "capacity: expected at least 1, got 0"),
        (lambda _: best_fit([[1]], 3), r"lengths: expected a row of them, got shape \(1, 1\)"),
        (lambda _: pack_documents([1, 0], 4), "shards: expected TokenShards or a TokenRing, got"),
        (lambda _: pack_documents(RING, None), "context_length: expected a whole number, got None"),
        (lambda _: pack_documents(RING, 4).batch(None), "rows: expected numbers of rows, got None"),
        (lambda _: pack_documents(RING, 4).batch(["a"]), "rows: expected 0 to 1, got a"),
        (lambda _: BatchSampler(RING, 2, 2, documents="no"), "documents: expected True or False"),
        (lambda _: BatchSampler(RING, 2, 2, wrap=None), "wrap: expected True or False, got None"),
        (lambda _: BatchSampler(RING, 2, 2).prefetch(None), "workers: expected a whole number"),
        (lambda _: BatchSampler(RING, 2, 2).prefetch(1, 0), "ahead: expected at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_named(tmp_path, untyped, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path)
    assert not list(tmp_path.iterdir())


def test_defaults(tmp_path):
    """What is left out is what the docstrings say."""
    sampler = BatchSampler(RING, 2, 2)
    given = (sampler.order, sampler.documents, sampler.rank, sampler.world_size, sampler.seed)
    assert given == ("shuffled", False, 0, 1, 0) and sampler.wrap and sampler.step == 0
    assert sampler[0].position_ids is None and TokenRing([1]).end_of_text is None
    packed, best = pack_documents(RING, 4), pack_documents(RING, 4, "best_fit")
    assert packed.fingerprint == best.fingerprint
    two = TokenRing([1, 0, 2, 0], end_of_text=0)
    assert len(pack_documents(two, 4)) == 1 and len(pack_documents(two, 4, "one_per_row")) == 2
    assert len(write_shards(["a"] * 9, tmp_path / "x", TOKENIZER)._shards) == 1
    with pytest.raises(ValueError, match=r"end_of_text: expected one of \['<s>'\]"):
        other = SimpleNamespace(vocab_size=3, special_tokens={"<s>": 0}, encode=lambda text: [1])
        write_shards(["a"], tmp_path / "y", other)
    signature = inspect.signature(write_shards).parameters["shard_tokens"]
    assert signature.default == 50_000_000
