"""Preparing text on an engine: the same bytes as one process, whatever dies or comes late.

Ray is started once, by this file run as a script, in a process of its own: its own warnings and
what it leaves behind are not those of the other tests.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from llmbook import distributed
from llmbook.batches import TokenShards, write_shards
from llmbook.cleaning import clean_documents
from llmbook.corpus import Document, read_files, read_jsonl, write_jsonl
from llmbook.deduplication import MinHasher, deduplicate, find_near_duplicates
from llmbook.distributed import (
    PrepareConfig,
    RayEngine,
    StepError,
    band_keys,
    box_of,
    main,
    map_reduce,
    prepare,
    stable_hash,
)
from llmbook.tokenizer import BPETokenizer, train_bpe

CONFIG = {"vocab_size": 400, "n_boxes": 3, "held_out": 0.1}


def words(dice, n):
    return " ".join("".join(dice.choices("abcdefghij", k=dice.randint(2, 7))) for _ in range(n))


def corpus(folder):
    """Write a corpus with repeated lines, near and exact copies in other files, and addresses."""
    dice, texts = random.Random(0), []
    notice = "This line stands at the end of many a page, and is no news."
    for i in range(60):
        text = words(dice, 40)
        if i % 3 == 0:
            text += "\n" + notice
        if i % 4 == 0 and texts:
            text = dice.choice(texts)  # a copy
        elif i % 4 == 1 and texts:
            text = dice.choice(texts) + " " + words(dice, 1)  # nearly one
        texts.append(text if i % 7 else f"{text} Write to someone@example.org")
    folder.mkdir()
    for number in range(3):
        documents = [Document(t, f"{number}/{i}") for i, t in enumerate(texts[number::3])]
        write_jsonl(documents, folder / f"{number}.jsonl")
    (folder / "deep").mkdir()
    (folder / "deep" / "page.txt").write_text(texts[5] + "\n\n" + words(dice, 50))
    (folder / "deep" / "short.md").write_text("Too short.")
    (folder / "image.png").write_bytes(b"\x89PNG")
    return folder


def contents(folder):
    """What a preparation leaves, by the names of the files."""
    names = ["tokenizer.json", "*/shard-*.bin", "unique/*", "copies.json", "merges.json"]
    return {
        str(path.relative_to(folder)): path.read_bytes().hex()
        for name in names
        for path in sorted(folder.glob(name))
    }


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("prepare") / "text")


@pytest.fixture(scope="module")
def alone(text):
    """What one process makes of it."""
    return prepare([text], text.parent / "alone", PrepareConfig(**CONFIG))


def survivors(folder):
    """The documents that are left, in the order of the shards."""
    paths = sorted((folder / "unique").iterdir())
    return [d for path in paths if path.stat().st_size for d in read_jsonl(path)]


def test_the_steps_do_what_the_chapters_do(text, alone, tmp_path):
    documents = sorted(read_files(text), key=lambda d: (stable_hash(d.id), d.id))
    cleaned = list(clean_documents(documents))
    assert len(find_near_duplicates(cleaned).clusters) > 3, "nothing to be found in this corpus"
    kept = deduplicate(cleaned, linkage="single")
    assert survivors(alone.folder) == kept
    assert alone.counts["read"] == len(documents) > alone.counts["clean"] == len(cleaned)
    assert alone.counts["unique"] == len(kept)
    assert alone.characters["unique"] == sum(len(d.text) for d in kept)

    config = PrepareConfig(**CONFIG)
    learned = [d for d in kept if not config.holds_out(d.id)]
    assert 0 < len(learned) < len(kept)
    tokenizer = train_bpe(learned, config.vocab_size)
    assert tokenizer == BPETokenizer.load(alone.folder / "tokenizer.json")
    for name, some in (("train", learned), ("validation", [d for d in kept if d not in learned])):
        shards = write_shards(some, tmp_path / name, tokenizer)
        assert (tmp_path / name / "shard-00000.bin").read_bytes() == (
            alone.folder / name / "shard-00000.bin"
        ).read_bytes()
        assert alone.tokens[name] == len(shards)
    assert isinstance(TokenShards(alone.folder / "train", tokenizer), TokenShards)


def shuffled(dice, items, emit, reduce):
    """An engine in which everything comes in any order, and half of the tasks run twice."""
    boxes, items = {}, list(items)
    for item in dice.sample(items, len(items)):
        if dice.random() < 0.5:
            next(iter(emit(item)), None)
        for box, value in emit(item):
            boxes.setdefault(box, []).append(value)
    results = []
    for box in dice.sample(sorted(boxes), len(boxes)):
        if dice.random() < 0.5:
            list(reduce(box, dice.sample(boxes[box], len(boxes[box]))))
        results += reduce(box, dice.sample(boxes[box], len(boxes[box])))
    return dice.sample(results, len(results))


@pytest.mark.parametrize("seed", range(3))
def test_order_and_repetition_change_nothing(text, alone, tmp_path, seed):
    engine = partial(shuffled, random.Random(seed))
    result = prepare([text], tmp_path / "a", PrepareConfig(**CONFIG), engine=engine)
    assert contents(result.folder) == contents(alone.folder)
    assert result[1:] == alone[1:]


@pytest.mark.parametrize("n_boxes", [1, 2, 70])
def test_the_number_of_boxes_changes_no_token(text, alone, tmp_path, n_boxes):
    result = prepare([text], tmp_path / "a", PrepareConfig(**CONFIG | {"n_boxes": n_boxes}))
    assert survivors(result.folder) == survivors(alone.folder)
    for name in ("train", "validation"):
        file = f"{name}/shard-00000.bin"
        assert (result.folder / file).read_bytes() == (alone.folder / file).read_bytes()


@pytest.mark.parametrize("emitted", [None, [3], ["ab"], [(1, 2, 3)]])
def test_what_emits_no_pairs_is_told_so(emitted):
    with pytest.raises(ValueError, match="emit: expected one that yields pairs of a box and a"):
        map_reduce([0], lambda item: emitted, lambda box, values: values)


@pytest.mark.parametrize("step", range(6))
def test_a_preparation_that_was_stopped_goes_on(text, alone, tmp_path, step):
    calls, said = [], []

    def stopping(items, emit, reduce):
        if len(calls) == step:  # all values are sent, and one box is done
            boxes = {}
            for item in items:
                for box, value in emit(item):
                    boxes.setdefault(box, []).append(value)
            list(reduce(1, boxes[1]))
            draft = tmp_path / "a" / "unique" / ".box-00000.jsonl.9.part"  # of a dead worker
            draft.parent.mkdir(exist_ok=True)
            draft.touch()
            raise KeyboardInterrupt
        calls.append(step)
        return map_reduce(items, emit, reduce)

    config = PrepareConfig(**CONFIG)
    with pytest.raises(KeyboardInterrupt):
        prepare([text], tmp_path / "a", config, engine=stopping)
    result = prepare([text], tmp_path / "a", config, say=said.append)
    assert len(said) <= 7 - step
    assert contents(result.folder) == contents(alone.folder)
    assert result[1:] == alone[1:]


def test_what_is_done_is_not_done_again(text, alone):
    def refuse(*arguments):
        raise AssertionError("nothing is left to do")

    assert prepare([text], alone.folder, PrepareConfig(**CONFIG), engine=refuse) == alone
    left = {path.name for path in alone.folder.iterdir() if path.is_dir()}
    assert left == {"unique", "train", "validation"}


def test_another_preparation_is_refused(text, alone, tmp_path):
    with pytest.raises(ValueError, match=r"folder: .* prepared with other settings"):
        prepare([text], alone.folder, PrepareConfig(**CONFIG | {"min_words": 7}))
    with pytest.raises(ValueError, match=r"folder: .* other sources"):
        prepare([text / "0.jsonl"], alone.folder, PrepareConfig(**CONFIG))
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="folder: expected a new or an empty one"):
        prepare([text], tmp_path)


def test_sources_that_are_none(text, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"sources: no file or folder .*no-such"):
        prepare([tmp_path / "no-such.txt"], tmp_path / "a")
    with pytest.raises(ValueError, match="sources: expected at least one file, folder or package"):
        prepare([], tmp_path / "a")
    with pytest.raises(ValueError, match=r"packages: .*no-such-package"):
        prepare(["package:no-such-package"], tmp_path / "a")
    with pytest.raises(ValueError, match="suffix"):
        prepare([text / "image.png"], tmp_path / "a")
    with pytest.raises(ValueError, match="sources: expected a list"):
        prepare(str(text), tmp_path / "a")
    (tmp_path / "a-file").write_text("Yeast.")
    with pytest.raises(ValueError, match=r"folder: expected a folder, got the file .*a-file"):
        prepare([text], tmp_path / "a-file")
    (tmp_path / "few").mkdir()
    with pytest.raises(ValueError, match="sources: expected files of text"):
        prepare([tmp_path / "few"], tmp_path / "a")
    (tmp_path / "few" / "a.txt").write_text("Too short.")
    with pytest.raises(ValueError, match="none after cleaning"):
        prepare([tmp_path / "few"], tmp_path / "a")


def test_what_cannot_be_read_is_told(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.txt").write_text("One two three four five six seven.")
    (tmp_path / "in" / "empty.txt").touch()
    (tmp_path / "in" / "bad.jsonl").write_text('{"text": "One two three four five six."}\n{"te\n')
    result = prepare([tmp_path / "in"], tmp_path / "a", PrepareConfig(held_out=0.0))
    assert result.counts["read"] == 2 and len(result.problems) == 2
    assert result.problems[0].startswith("bad.jsonl:2") and "empty.txt" in result.problems[1]
    assert "validation" not in result.tokens


def test_a_package_is_a_source(tmp_path):
    result = prepare(["package:json"], tmp_path / "a", PrepareConfig(vocab_size=300))
    assert result.counts["read"] > 10 and set(result.tokens) <= {"train", "validation"}


def test_one_id_and_two_texts(tmp_path):
    for name in ("a", "b"):
        write_jsonl([Document(f"Text of {name}.", "same")], tmp_path / f"{name}.jsonl")
    with pytest.raises(StepError, match=r"read: box \d+: sources: two different texts.*'same'"):
        prepare([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "out")
    write_jsonl([Document("Text of a.", "same")], tmp_path / "b.jsonl")
    with contextlib.suppress(ValueError):
        prepare([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "out2")
    assert json.loads((tmp_path / "out2" / "problems.json").read_text())["steps"]["read"] == {
        "documents": 1,
        "characters": 10,
    }


def test_keys_are_the_bands():
    signatures = MinHasher(n_permutations=8).signatures(["to be or not to be", "to be", "to be"])
    keys = band_keys(signatures, 2, 4)
    assert keys.shape == (3, 2) and (keys[1] == keys[2]).all() and (keys[0] != keys[1]).all()
    same = np.tile(signatures[:1, :4], (1, 2))
    assert len(np.unique(band_keys(same, 2, 4))) == 2, "bands with the same rows must not meet"
    with pytest.raises(ValueError, match="bands, rows"):
        band_keys(signatures, 3, 4)
    assert box_of(2**64 - 1, 7) == 6 and box_of(0, 7) == 0


@pytest.mark.parametrize(("most", "n_pairs"), [(4, 6), (3, 3)])
def test_in_a_crowded_bucket_each_is_compared_with_the_first(monkeypatch, most, n_pairs):
    monkeypatch.setattr(distributed, "_ALL_PAIRS_UP_TO", most)
    values = [[7, id, number, 10] for number, id in enumerate("abcd")]
    found = list(distributed._pairs(0, [*values, [7, "e", 0, 10]]))
    first = min("abcde", key=lambda id: (stable_hash(id), id))
    pairs = [pair[1:3] for pair in found if not pair[0]]
    assert len(pairs) == n_pairs and sum(first in pair for pair in pairs) == 3
    assert [sorted(pair[1:3]) for pair in found if pair[0]] == [["a", "e"]]  # one text twice


def test_hashes_do_not_depend_on_the_process():
    code = "from llmbook.distributed import stable_hash; print(stable_hash('Yeast.'))"
    seeds = [os.environ | {"PYTHONHASHSEED": seed} for seed in ("1", "2")]
    command = [sys.executable, "-c", code]
    found = {subprocess.run(command, env=e, capture_output=True, text=True).stdout for e in seeds}
    assert found == {f"{stable_hash('Yeast.')}\n"}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_the_share_that_is_asked_for_is_held_out(share):
    held_out = PrepareConfig(held_out=share).holds_out
    assert sum(held_out(str(i)) for i in range(2000)) / 2000 == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 256),
        ("pattern", "x"),
        ("min_words", -1),
        ("min_line_length", 2.5),
        ("threshold", 1.0),
        ("held_out", 1.0),
        ("shard_tokens", 0),
        ("n_boxes", 0),
    ],
)
def test_settings_out_of_range(field, value):
    with pytest.raises(ValueError, match=field):
        PrepareConfig(**{field: value})


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["bake"], 2, "expected a command, got 'bake'"),
        ([], 2, "expected a command"),
        (["--help"], 0, ""),
        (["prepare", "no-such.txt"], 2, "sources: no file or folder 'no-such.txt'"),
        (["prepare", "--vocab_size", "x"], 2, "vocab_size"),
        (["prepare"], 2, "sources: expected at least one file"),
        (["prepare", "--help"], 0, ""),
    ],
)
def test_the_command_line(arguments, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == code and message in capsys.readouterr().err


def test_the_command_prepares(text, alone, tmp_path, capsys):
    options = [f"--{name}={value}" for name, value in CONFIG.items()]
    with pytest.raises(SystemExit) as exit:
        main(["prepare", str(text), "--folder", str(tmp_path / "a"), *options])
    assert exit.value.code == 0
    assert f"{alone.counts['unique']:,} documents" in capsys.readouterr().out
    assert contents(tmp_path / "a") == contents(alone.folder)


def test_an_engine_outside_its_block():
    with pytest.raises(ValueError, match="with block"):
        RayEngine(1)([], list, list)
    with pytest.raises(ValueError, match="workers"):
        RayEngine(0)


# --- on Ray ----------------------------------------------------------------------------------


def killing(item, emit, flag):
    """Emit a value, and then die, the first time that any worker comes here."""
    for value in emit(item):
        yield value
        try:
            Path(flag).touch(exist_ok=False)
        except FileExistsError:
            continue
        os.kill(os.getpid(), signal.SIGKILL)


class Killing:
    """An engine whose first and third steps lose a worker: reading, and cleaning."""

    def __init__(self, engine, folder):
        self.engine, self.folder, self.calls = engine, folder, 0

    def __call__(self, items, emit, reduce):
        self.calls += 1
        if self.calls not in (1, 3):
            return self.engine(items, emit, reduce)
        flag = str(self.folder / f"killed-{self.calls}")
        return self.engine(items, partial(killing, emit=emit, flag=flag), reduce)


class Losing:
    """An engine that loses a file before it begins."""

    def __init__(self, engine, path):
        self.engine, self.path = engine, path

    def __call__(self, items, emit, reduce):
        self.path.unlink()
        return self.engine(items, emit, reduce)


def on_ray(text):
    """Do everything that needs Ray; print what came of it."""
    config, found = PrepareConfig(**CONFIG), {}
    with RayEngine(2) as engine:
        result = prepare([text], text.parent / "ray", config, engine=engine)
        found["counts"] = result.counts
        deadly = Killing(engine, text.parent)
        prepare([text], text.parent / "killed", config, engine=deadly)
        found["steps"] = deadly.calls
        found["killed"] = len(list(text.parent.glob("killed-*")))
        lost = text.parent / "lost.txt"
        lost.write_text("Here and not there.")
        for name, sources, wrapped in (
            ("lost", [text, lost], Losing(engine, lost)),
            ("twice", sorted((text.parent / "twice").iterdir()), engine),
        ):
            try:
                prepare(sources, text.parent / f"out-{name}", config, engine=wrapped)
            except StepError as error:
                found[name] = str(error)
        logs = engine._logs
        try:
            engine([1], lambda item: [(0, 1 / 0)], lambda box, values: values)
        except StepError as error:
            found["bug"] = str(error)
        try:
            engine(["huge"], lambda item: os.kill(os.getpid(), signal.SIGKILL), list)
        except StepError as error:
            found["deadly"] = str(error)
    found["logs"] = Path(logs).exists()
    print(json.dumps(found))


@pytest.fixture(scope="module")
def ray_run(text):
    pytest.importorskip("ray", reason="the extra 'cluster' is not installed")
    folder = text.parent / "twice"
    folder.mkdir()
    for name in ("a", "b"):
        write_jsonl([Document(f"Text of {name}.", "same")], folder / f"{name}.jsonl")
    command = [sys.executable, __file__, str(text)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_ray_makes_what_one_process_makes(ray_run, text, alone):
    assert ray_run["counts"] == alone.counts
    assert survivors(text.parent / "ray") == survivors(alone.folder)  # compared by id, too
    assert contents(text.parent / "ray") == contents(alone.folder)


def test_killed_workers_lose_nothing_and_double_nothing(ray_run, text, alone):
    assert (ray_run["killed"], ray_run["steps"]) == (2, 6)
    assert contents(text.parent / "killed") == contents(alone.folder)


def test_errors_of_workers_name_step_item_and_machine(ray_run):
    assert ray_run["lost"].startswith("read: ") and "lost.txt" in ray_run["lost"]
    assert "on the machine" in ray_run["lost"]
    assert "two different texts have the id 'same'" in ray_run["twice"]
    assert "division by zero" in ray_run["bug"]
    assert ray_run["deadly"] == '"huge": 5 workers died of it, out of memory perhaps'


def test_ray_leaves_nothing_behind(ray_run):
    assert ray_run["logs"] is False


if __name__ == "__main__":
    on_ray(Path(sys.argv[1]))
