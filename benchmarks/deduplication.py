"""MinHash and near-duplicate search against datasketch, on the same documents in one run.

Texts are the distinct documents of the standard library, numpy and matplotlib, about 30,000. Every
pair of rows does the same work; the first checks that both give the same signatures.
"""

from __future__ import annotations

import datasketch
import numpy as np
from measure import compare, environment, report, table

from llmbook.corpus import read_installed_docs
from llmbook.deduplication import LSHIndex, MinHasher, canonical_text, shingles

PERMUTATIONS, BANDS, ROWS = 128, 16, 8


def their_loop(texts: list[str]) -> list[datasketch.MinHash]:
    """Sign one document at a time, as datasketch's documentation does: SHA-1 of each 5-gram."""
    signed = []
    for text in texts:
        words = canonical_text(text).split()
        last = max(len(words) - 4, min(len(words), 1))
        minhash = datasketch.MinHash(PERMUTATIONS)
        minhash.update_batch({" ".join(words[i : i + 5]).encode() for i in range(last)})
        signed.append(minhash)
    return signed


def their_index(keys: list[str], signed: list[datasketch.MinHash]) -> datasketch.MinHashLSH:
    """Fill datasketch's index, buffered."""
    index = datasketch.MinHashLSH(num_perm=PERMUTATIONS, params=(BANDS, ROWS))
    with index.insertion_session() as session:
        for key, minhash in zip(keys, signed, strict=True):
            session.insert(key, minhash)
    return index


def our_index(keys: list[str], signatures: np.ndarray) -> LSHIndex:
    """Fill ours."""
    index = LSHIndex(bands=BANDS, rows=ROWS)
    index.insert(keys, signatures)
    return index


def main() -> None:
    """Measure, compare, report."""
    documents = list(read_installed_docs(["stdlib", "numpy", "matplotlib"]))
    texts = list({canonical_text(d.text): d.text for d in documents}.values())
    keys, hasher = [str(i) for i in range(len(texts))], MinHasher(PERMUTATIONS)
    sets = [shingles(text).astype(np.uint32) for text in texts]
    flat, sizes = np.concatenate(sets), np.array([len(s) for s in sets], np.int64)
    lists = [s.tolist() for s in sets]
    given = {"num_perm": PERMUTATIONS, "hashfunc": lambda value: value}
    signing = compare(
        {
            "theirs": lambda: their_loop(texts),
            "ours": lambda: hasher.signatures(texts),
            "bulk": lambda: datasketch.MinHash.bulk(lists, **given),
            "hashes": lambda: hasher.hash_signatures(flat, sizes),
        }
    )
    ours, signed = signing["hashes"].result, signing["bulk"].result
    assert np.array_equal(ours, [minhash.hashvalues for minhash in signed])
    filling = compare(
        {"theirs": lambda: their_index(keys, signed), "ours": lambda: our_index(keys, ours)}
    )
    theirs, index = filling["theirs"].result, filling["ours"].result
    asking = compare(
        {
            "theirs": lambda: [set(theirs.query(minhash)) for minhash in signed],
            "ours": lambda: [set(answer) for answer in index.query(ours)],
        }
    )
    assert asking["theirs"].result == asking["ours"].result
    pairs = (
        ("text to signatures, theirs one by one", signing["theirs"], signing["ours"]),
        ("hashes to signatures, theirs in bulk", signing["bulk"], signing["hashes"]),
        ("signatures to index", filling["theirs"], filling["ours"]),
        ("a query for each document", asking["theirs"], asking["ours"]),
    )
    rows = [
        [what, f"{a.seconds:.2f}", f"{b.seconds:.2f}", f"{a.seconds / b.seconds:.1f}"]
        for what, a, b in pairs
    ]
    characters = sum(map(len, texts))
    report(
        "deduplication",
        f"{len(texts)} documents, {characters / 1e6:.1f} million characters, {len(flat)} shingles; "
        f"{PERMUTATIONS} permutations, {BANDS} bands of {ROWS} rows. "
        f"{environment('datasketch', 'numpy')}.",
        table(["step", "datasketch (s)", "ours (s)", "ratio"], rows),
        f"From text to signatures: {characters / 1e6 / signing['ours'].seconds:.0f} million "
        f"characters a second, {len(texts) / signing['ours'].seconds:.0f} documents a second.",
    )


if __name__ == "__main__":
    main()
