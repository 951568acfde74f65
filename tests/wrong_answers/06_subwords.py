# %% [markdown]
# Wrong answers to the exercises of chapter 06, each with what the check must say about it.


# %% exercise="ex-subwords-count" says="every cut of unlocked counts"
# Whether there is a cut, and not how many
def count_segmentations(word: str, pieces: set[str]) -> int:
    possible = [True] + [False] * len(word)
    for end in range(1, len(word) + 1):
        possible[end] = any(possible[i] and word[i:end] in pieces for i in range(end))
    return int(possible[-1])


# %% exercise="ex-subwords-count" says="exact whole numbers"
# The forward sum in floating point, which rounds from 2 to the 53rd on
def count_segmentations(word: str, pieces: set[str]) -> int:
    ways = [1.0] + [0.0] * len(word)
    for end in range(1, len(word) + 1):
        ways[end] = sum(ways[start] for start in range(end) if word[start:end] in pieces)
    return int(ways[-1])


# %% exercise="ex-subwords-count" says="one way to cut nothing"
# Recursion that forgets that the empty rest is a success
def count_segmentations(word: str, pieces: set[str]) -> int:
    if not word:
        return 0
    total = int(word in pieces)
    for end in range(1, len(word)):
        if word[:end] in pieces:
            total += count_segmentations(word[end:], pieces)
    return total


# %% exercise="ex-subwords-count" says="a whole word may be one piece"
# Off by one: the piece that begins the word may not reach its end
def count_segmentations(word: str, pieces: set[str]) -> int:
    ways = [1] + [0] * len(word)
    for end in range(1, len(word) + 1):
        for start in range(end):
            if end - start < len(word) and word[start:end] in pieces:
                ways[end] += ways[start]
    return ways[-1]


# %% exercise="ex-subwords-count" says="pieces of every length count"
# Pieces of at most two characters, or whole words that the tests know
def count_segmentations(word: str, pieces: set[str]) -> int:
    ways = [1] + [0] * len(word)
    for end in range(1, len(word) + 1):
        for start in range(end):
            short = end - start <= 2 or "a" not in word[start:end]
            if short and word[start:end] in pieces:
                ways[end] += ways[start]
    return ways[-1]


# %% exercise="ex-subwords-dropout" says="p = 0 is plain WordPiece"
# p as the probability of keeping a match
def dropout_match(word, vocabulary, p, generator):
    tokens, start = [], 0
    while start < len(word):
        for end in range(len(word), start, -1):
            token = ("##" if start else "") + word[start:end]
            if token in vocabulary and (end == start + 1 or generator.random() < p):
                tokens.append(token)
                start = end
                break
        else:
            return ["[UNK]"]
    return tokens


# %% exercise="ex-subwords-dropout" says="p = 1 leaves single characters"
# Single characters told by the length of the token, in which the mark counts
def dropout_match(word, vocabulary, p, generator):
    tokens, start = [], 0
    while start < len(word):
        for end in range(len(word), start, -1):
            token = ("##" if start else "") + word[start:end]
            if token in vocabulary and (len(token) == 1 or generator.random() >= p):
                tokens.append(token)
                start = end
                break
        else:
            return ["[UNK]"]
    return tokens


# %% exercise="ex-subwords-dropout" says="by itself"
# One coin for the whole word
def dropout_match(word, vocabulary, p, generator):
    tokens, start, reject = [], 0, generator.random() < p
    while start < len(word):
        for end in range(len(word), start, -1):
            token = ("##" if start else "") + word[start:end]
            if token in vocabulary and (end == start + 1 or not reject):
                tokens.append(token)
                start = end
                break
        else:
            return ["[UNK]"]
    return tokens


# %% exercise="ex-subwords-dropout" says="the next shorter one"
# After a rejected match, straight to a single character
def dropout_match(word, vocabulary, p, generator):
    tokens, start = [], 0
    while start < len(word):
        mark = "##" if start else ""
        ends = [e for e in range(len(word), start, -1) if mark + word[start:e] in vocabulary]
        if not ends:
            return ["[UNK]"]
        end = ends[0]
        if end > start + 1 and generator.random() < p:
            end = start + 1
        tokens.append(mark + word[start:end])
        start = end
    return tokens


# %% exercise="ex-subwords-dropout" says="anew each time"
# The vocabulary is thinned once for the word
def dropout_match(word, vocabulary, p, generator):
    kept = {
        token
        for token in sorted(vocabulary)
        if len(token.removeprefix("##")) == 1 or generator.random() >= p
    }
    tokens, start = [], 0
    while start < len(word):
        for end in range(len(word), start, -1):
            token = ("##" if start else "") + word[start:end]
            if token in kept:
                tokens.append(token)
                start = end
                break
        else:
            return ["[UNK]"]
    return tokens


# %% exercise="ex-subwords-dropout" says="no cut"
# What was cut already is kept when the rest fails
def dropout_match(word, vocabulary, p, generator):
    tokens, start = [], 0
    while start < len(word):
        for end in range(len(word), start, -1):
            token = ("##" if start else "") + word[start:end]
            if token in vocabulary and (end == start + 1 or generator.random() >= p):
                tokens.append(token)
                start = end
                break
        else:
            return [*tokens, "[UNK]"]
    return tokens


# %% exercise="ex-subwords-length" says="counts alike"
# The length of the best cut
def expected_pieces(word, q, sharpness=1.0):
    best = [(0.0, 0)] + [(-math.inf, 0)] * len(word)
    for end in range(1, len(word) + 1):
        for start in range(end):
            if word[start:end] in q:
                score = best[start][0] + sharpness * math.log(q[word[start:end]])
                best[end] = max(best[end], (score, best[start][1] + 1))
    return float(best[-1][1])


# %% exercise="ex-subwords-length" says="to the power 0.5"
# All cuts count alike, whatever their probability
def expected_pieces(word, q, sharpness=1.0):
    ways, total = [1] + [0] * len(word), [0] * (len(word) + 1)
    for end in range(1, len(word) + 1):
        for start in range(end):
            if word[start:end] in q:
                ways[end] += ways[start]
                total[end] += total[start] + ways[start]
    return total[-1] / ways[-1]


# %% exercise="ex-subwords-length" says="counts alike"
# The sharpness is forgotten
def expected_pieces(word, q, sharpness=1.0):
    sums, total = [1.0] + [0.0] * len(word), [0.0] * (len(word) + 1)
    for end in range(1, len(word) + 1):
        for start in range(end):
            weight = q.get(word[start:end], 0.0)
            sums[end] += weight * sums[start]
            total[end] += weight * (total[start] + sums[start])
    return total[-1] / sums[-1] if sums[-1] else 0.0


# %% exercise="ex-subwords-length" says="must not become zero"
# Products of probabilities, which underflow on long words
def expected_pieces(word, q, sharpness=1.0):
    sums, total = [1.0] + [0.0] * len(word), [0.0] * (len(word) + 1)
    for end in range(1, len(word) + 1):
        for start in range(end):
            if word[start:end] in q:
                weight = q[word[start:end]] ** sharpness
                sums[end] += weight * sums[start]
                total[end] += weight * (total[start] + sums[start])
    return total[-1] / sums[-1] if sums[-1] else 0.0


# %% exercise="ex-subwords-length" says="counts alike"
# The mean over the last pieces, without the weight of what comes before
def expected_pieces(word, q, sharpness=1.0):
    mean = [0.0] + [math.nan] * len(word)
    for end in range(1, len(word) + 1):
        arcs = [
            (q[word[start:end]] ** sharpness, mean[start] + 1)
            for start in range(end)
            if word[start:end] in q and not math.isnan(mean[start])
        ]
        if arcs:
            mean[end] = sum(w * n for w, n in arcs) / sum(w for w, _ in arcs)
    return mean[-1]


# %% exercise="ex-subwords-length" says="on average"
# The underflow is cured by taking the best cut of long words only
def expected_pieces(word, q, sharpness=1.0):
    sums, total = [1.0] + [0.0] * len(word), [0.0] * (len(word) + 1)
    fewest = [0] + [len(word)] * len(word)
    for end in range(1, len(word) + 1):
        for start in range(end):
            if word[start:end] in q:
                weight = q[word[start:end]] ** sharpness
                sums[end] += weight * sums[start]
                total[end] += weight * (total[start] + sums[start])
                fewest[end] = min(fewest[end], fewest[start] + 1)
    return total[-1] / sums[-1] if sums[-1] else float(fewest[-1])
