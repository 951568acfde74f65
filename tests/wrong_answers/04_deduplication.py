# Wrong answers to the exercises of chapter 04, and what their checks must say of them.

# %% exercise="ex-deduplication-containment" says="five of the ten"
# The Jaccard similarity
def containment(part, whole):
    return jaccard(part, whole)


# %% exercise="ex-deduplication-containment" says="it is not symmetric"
# Divided by the smaller of the two
def containment(part, whole):
    smaller = min(len(set(part.tolist())), len(set(whole.tolist())))
    return len(np.intersect1d(part, whole)) / smaller if smaller else float(not len(part))


# %% exercise="ex-deduplication-containment" says="an empty part is contained in everything"
# A mean of nothing
def containment(part, whole):
    return float(np.isin(np.unique(part), whole).mean())


# %% exercise="ex-deduplication-containment" says="a set has each element once"
# Shingles counted as often as they occur
def containment(part, whole):
    return float(np.isin(part, whole).mean()) if len(part) else 1.0


# %% exercise="ex-deduplication-containment" says="a set has each element once"
# Whatever of the whole is in the part, repeated or not
def containment(part, whole):
    return float(np.isin(whole, part).sum() / len(np.unique(part))) if len(part) else 1.0


# %% exercise="ex-deduplication-permutations" says="the error is a standard deviation"
# The variance in the place of its root
def permutations_needed(similarity, error):
    return max(1, math.ceil(round(similarity * (1 - similarity) / error, 6)))


# %% exercise="ex-deduplication-permutations" says="the similarity matters"
# The worst case for all similarities
def permutations_needed(similarity, error):
    return max(1, math.ceil(round(0.25 / error**2, 6)))


# %% exercise="ex-deduplication-permutations" says="round up"
# Rounded to the nearest number
def permutations_needed(similarity, error):
    return max(1, round(similarity * (1 - similarity) / error**2))


# %% exercise="ex-deduplication-permutations" says="up to rounding"
# Rounded up without a thought for 0.16 / 0.04 ** 2
def permutations_needed(similarity, error):
    return max(1, math.ceil(similarity * (1 - similarity) / error**2 - 1e-15))


# %% exercise="ex-deduplication-permutations" says="one permutation is needed"
# None for equal sets
def permutations_needed(similarity, error):
    return math.ceil(round(similarity * (1 - similarity) / error**2, 6))


# %% exercise="ex-deduplication-bits" says="a quarter of the rest by chance"
# Agreement by chance left in
def estimate_from_bits(a, b, bits):
    return float((((a ^ b) & np.uint32(2**bits - 1)) == 0).mean())


# %% exercise="ex-deduplication-bits" says="an estimate of 1"
# Chance taken off, and not divided
def estimate_from_bits(a, b, bits):
    agree = (((a ^ b) & np.uint32(2**bits - 1)) == 0).mean()
    return 1.0 if bits == 1 and agree == 1 else float(agree - 2.0**-bits)


# %% exercise="ex-deduplication-bits" says="the lowest bits"
# Full minima with the correction for bits
def estimate_from_bits(a, b, bits):
    chance = 2.0**-bits
    return float(((a == b).mean() - chance) / (1 - chance))


# %% exercise="ex-deduplication-bits" says="by chance"
# The chance of 1 in bits, not of 1 in 2 ** bits
def estimate_from_bits(a, b, bits):
    differ = (a ^ b) & np.uint32(2**bits - 1)
    chance = 1 / (2 * bits) if bits == 1 else 1 / bits
    return float(((differ == 0).mean() - chance) / (1 - chance))


# %% exercise="ex-deduplication-bits" says="the lowest bits"
# The highest bits
def estimate_from_bits(a, b, bits):
    chance = 2.0**-bits
    return float(((a >> (3 - bits) == b >> (3 - bits)).mean() - chance) / (1 - chance))


# %% exercise="ex-deduplication-bottom" says="each hash counts once"
# Repeated hashes kept
def bottom_k(hashes, k):
    return np.sort(hashes)[:k]


# %% exercise="ex-deduplication-bottom" says="the smallest, ascending"
# The first k distinct hashes
def bottom_k(hashes, k):
    return np.array(list(dict.fromkeys(hashes.tolist()))[:k])


# %% exercise="ex-deduplication-bottom" says="the four smallest of the union"
# The Jaccard similarity of the sketches
def estimate_bottom_k(a, b, k):
    return jaccard(a, b)


# %% exercise="ex-deduplication-bottom" says="the four smallest of the union"
# The share of the sketches that agree, place by place
def estimate_bottom_k(a, b, k):
    size = min(len(a), len(b))
    return float((a[:size] == b[:size]).mean()) if size else 1.0


# %% exercise="ex-deduplication-bottom" says="8 and 9 are not among"
# The whole intersection, over k
def estimate_bottom_k(a, b, k):
    return len(np.intersect1d(a, b)) / max(min(k, len(np.union1d(a, b))), 1)


# %% exercise="ex-deduplication-bottom" says="small sets"
# Always divided by k
def estimate_bottom_k(a, b, k):
    least = np.union1d(a, b)[:k]
    return float((np.isin(least, a) & np.isin(least, b)).sum() / k) if len(least) else 1.0


# %% exercise="ex-deduplication-bottom" says="two empty sets are equal"
# A mean of nothing
def estimate_bottom_k(a, b, k):
    least = np.union1d(a, b)[:k]
    return float((np.isin(least, a) & np.isin(least, b)).mean())


# %% exercise="ex-deduplication-leak" says="candidates are verified"
# Candidates taken for duplicates
def leaked(train, test, threshold=0.8):
    index = LSHIndex(MinHasher(), *optimal_bands(threshold))
    index.insert(map(str, range(len(train))), index.hasher.signatures(train))
    return [i for i, keys in enumerate(index.query(index.hasher.signatures(test))) if keys]


# %% exercise="ex-deduplication-leak" says="a near copy has leaked"
# Exact copies only
def leaked(train, test, threshold=0.8):
    known = {canonical_text(text) for text in train}
    return [i for i, text in enumerate(test) if canonical_text(text) in known]


# %% exercise="ex-deduplication-leak" says="in capitals"
# Shingles of the text as it is written
def leaked(train, test, threshold=0.8):
    def grams(text):
        parts = text.split()
        return {tuple(parts[i : i + 5]) for i in range(max(len(parts) - 4, 1))}

    sets = [grams(text) for text in train]
    return [
        i
        for i, text in enumerate(test)
        if any(jaccard(grams(text), other) >= threshold for other in sets)
    ]


# %% exercise="ex-deduplication-leak" says="in ascending order"
# An index for each training text that is like it
def leaked(train, test, threshold=0.8):
    index = LSHIndex(MinHasher(), *optimal_bands(threshold))
    index.insert(map(str, range(len(test))), index.hasher.signatures(test))
    found = []
    for text, keys in zip(train, index.query(index.hasher.signatures(train)), strict=True):
        for key in keys:
            if jaccard(shingles(text), shingles(test[int(key)])) >= threshold:
                found.append(int(key))
    return found


# %% exercise="ex-deduplication-leak" says="named once"
# Each test text as often as it leaked
def leaked(train, test, threshold=0.8):
    sets = [shingles(text) for text in train]
    return [
        i
        for i, text in enumerate(test)
        for other in sets
        if jaccard(shingles(text), other) >= threshold
    ]


# %% exercise="ex-deduplication-leak" says="the threshold is the caller"
# The default threshold, whatever was asked for
def leaked(train, test, threshold=0.8):
    sets = [shingles(text) for text in train]
    return [
        i
        for i, text in enumerate(test)
        if any(jaccard(shingles(text), other) >= 0.8 for other in sets)
    ]


# %% exercise="ex-deduplication-leak" says="no leak"
# Clusters of everything
def leaked(train, test, threshold=0.8):
    clusters = find_near_duplicates([*train, *test], threshold).clusters
    return sorted({i - len(train) for c in clusters for i in c if i >= len(train)})
