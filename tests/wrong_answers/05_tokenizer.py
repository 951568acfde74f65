# %% [markdown]
# Wrong answers to the exercises of chapter 05.

# %% exercise="ex-tokenizer-count" says="counts of two stretches do not add up"
# Decodes, although a stretch may begin and end inside a character
def count_characters(data: bytes) -> int:
    return len(data.decode())


# %% exercise="ex-tokenizer-count" says="counts of two stretches do not add up"
# Decodes, and leaves out the characters that a stretch cuts in two
def count_characters(data: bytes) -> int:
    return len(data.decode("utf-8", "ignore"))


# %% exercise="ex-tokenizer-count" says="counts of two stretches do not add up"
# Decodes, and counts both halves of a character that is cut in two
def count_characters(data: bytes) -> int:
    return len(data.decode("utf-8", "replace"))


# %% exercise="ex-tokenizer-count" says="code points, not"
# Counts bytes
def count_characters(data: bytes) -> int:
    return len(data)


# %% exercise="ex-tokenizer-count" says="code points, not"
# Counts the bytes that open a longer character, and forgets those of a single byte
def count_characters(data: bytes) -> int:
    return sum(byte >> 6 == 0b11 for byte in data)


# %% exercise="ex-tokenizer-count" says="code points, not"
# Looks at the first bit alone, so all bytes of a longer character are left out
def count_characters(data: bytes) -> int:
    return sum(byte >> 7 == 0 for byte in data)


# %% exercise="ex-tokenizer-digits" says="not cut from the right"
# GPT-4's way, from the left
def digits_pattern() -> str:
    return r"\p{N}{1,3}|\P{N}+"


# %% exercise="ex-tokenizer-digits" says="glued to something else"
# The space goes with the digits, as GPT-2's pattern has it
def digits_pattern() -> str:
    return r" ?\p{N}{1,3}(?=(?:\p{N}{3})*+(?!\p{N}))|\P{N}+"


# %% exercise="ex-tokenizer-digits" says="not cut"
# Counts threes from the end of the text, not from the end of the run
def digits_pattern() -> str:
    return r"\p{N}{1,3}(?=(?:\p{N}{3})*+$)|\P{N}+"


# %% exercise="ex-tokenizer-digits" says="not cut in threes"
# Knows the digits of ASCII only
def digits_pattern() -> str:
    return r"[0-9]{1,3}(?=(?:[0-9]{3})*+(?![0-9]))|[^0-9]+"


# %% exercise="ex-tokenizer-digits" says="glued to something else"
# Takes all numbers for decimal digits, ² too
def digits_pattern() -> str:
    return r"\p{N}{1,3}(?=(?:\p{N}{3})*+(?!\p{N}))|\P{N}+"


# %% exercise="ex-tokenizer-digits" says="glued to something else"
# Takes letters into a run, too
def digits_pattern() -> str:
    return r"\w{1,3}(?=(?:\w{3})*+(?!\w))|\W+"


# %% exercise="ex-tokenizer-digits" says="not cut in threes"
# Takes the end of a word for the end of the run, so a letter after the digits stops the cuts
def digits_pattern() -> str:
    return r"\p{Nd}{1,3}(?=(?:\p{Nd}{3})*\b)|\P{Nd}+"


# %% exercise="ex-tokenizer-fewest" says="can be spelled with fewer tokens"
# Greedy: the longest token that fits, from the left
def fewest_tokens(word: bytes, tokens: set[bytes]) -> int:
    number = 0
    while word:
        size = max(size for size in range(1, len(word) + 1) if word[:size] in tokens)
        word, number = word[size:], number + 1
    return number


# %% exercise="ex-tokenizer-fewest" says="can be spelled with fewer tokens"
# The better of two greedy cuts, from the left and from the right
def fewest_tokens(word: bytes, tokens: set[bytes]) -> int:
    def greedy(word, tokens):
        number = 0
        while word:
            size = max(size for size in range(1, len(word) + 1) if word[:size] in tokens)
            word, number = word[size:], number + 1
        return number

    return min(greedy(word, tokens), greedy(word[::-1], {token[::-1] for token in tokens}))


# %% exercise="ex-tokenizer-fewest" says="cannot be spelled with"
# Counts the cuts between tokens, and so one too few
def fewest_tokens(word: bytes, tokens: set[bytes]) -> int:
    least = [0]
    for end in range(1, len(word) + 1):
        least.append(1 + min(n for start, n in enumerate(least) if word[start:end] in tokens))
    return max(least[-1] - 1, 0)


# %% exercise="ex-tokenizer-fewest" says="can be spelled with fewer tokens"
# Looks only at tokens of at most three bytes
def fewest_tokens(word: bytes, tokens: set[bytes]) -> int:
    least = [0]
    for end in range(1, len(word) + 1):
        starts = range(max(end - 3, 0), end)
        least.append(1 + min(least[start] for start in starts if word[start:end] in tokens))
    return least[-1]


# %% exercise="ex-tokenizer-fewest" says="tokens spell bytes"
# Spells characters, so that a character of two bytes counts as one token
def fewest_tokens(word: bytes, tokens: set[bytes]) -> int:
    text, least = word.decode(), [0]
    for end in range(1, len(text) + 1):
        spelled = [n for start, n in enumerate(least) if text[start:end].encode() in tokens]
        least.append(1 + min(spelled, default=least[-1]))
    return least[-1]


# %% exercise="ex-tokenizer-fewest" says="3 of 10 saved"
# Every word counts once, however often it occurs
def saving(counts: dict[str, int], tokenizer: BPETokenizer) -> float:
    tokens = set(tokenizer.vocabulary.values())
    greedy = sum(len(tokenizer.encode(word)) for word in counts)
    return 1 - sum(fewest_tokens(word.encode(), tokens) for word in counts) / greedy


# %% exercise="ex-tokenizer-fewest" says="3 of 10 saved"
# The mean over words of what each of them saves
def saving(counts: dict[str, int], tokenizer: BPETokenizer) -> float:
    tokens = set(tokenizer.vocabulary.values())
    saved = {
        word: 1 - fewest_tokens(word.encode(), tokens) / len(tokenizer.encode(word))
        for word in counts
    }
    return sum(count * saved[word] for word, count in counts.items()) / sum(counts.values())


# %% exercise="ex-tokenizer-ranks" says="leave other parts than"
# Splits off the last byte
def merges_from_ranks(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    longer = sorted((token for token in ranks if len(token) > 1), key=ranks.get)
    return [(token[:-1], token[-1:]) for token in longer]


# %% exercise="ex-tokenizer-ranks" says="leave other parts than"
# The first two tokens that spell it
def merges_from_ranks(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    merges = []
    for token in sorted(ranks, key=ranks.get):
        for cut in range(1, len(token)):
            if token[:cut] in ranks and token[cut:] in ranks:
                merges.append((token[:cut], token[cut:]))
                break
    return merges


# %% exercise="ex-tokenizer-ranks" says="leave other parts than"
# Takes the leftmost pair that is a token, not that of the lowest rank
def merges_from_ranks(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    merges = []
    for token, own in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(a + b, own) < own for a, b in pairwise(parts)]
            place = joined.index(max(joined))
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


# %% exercise="ex-tokenizer-ranks" says="the ranks decide the order"
# In the order of the dictionary
def merges_from_ranks(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    merges = []
    for token, own in ranks.items():
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(a + b, own) for a, b in pairwise(parts)]
            place = joined.index(min(joined))
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


# %% exercise="ex-tokenizer-ranks" says="each longer token is the result of one merge"
# Every way to cut a token in two, as some files have it
def merges_from_ranks(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    ordered = sorted(ranks, key=ranks.get)
    cuts = [(token[:cut], token[cut:]) for token in ordered for cut in range(1, len(token))]
    return [(a, b) for a, b in cuts if a in ranks and b in ranks]


# %% exercise="ex-tokenizer-ranks" says="leave other parts than"
# Lets merges take part that were learned later than the token
def merges_from_ranks(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    merges = []
    for token in sorted(ranks, key=ranks.get):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [-ranks.get(a + b, -1) for a, b in pairwise(parts)]
            place = joined.index(min(joined))
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


# %% exercise="ex-tokenizer-fewest" says="wrong for the words of the documents set aside"
# Compares with the number of bytes, not with what the tokenizer makes
def saving(counts: dict[str, int], tokenizer: BPETokenizer) -> float:
    tokens = set(tokenizer.vocabulary.values())
    if len(tokens) < 300:
        return 1 - 7 / 10  # the example of the check, by heart
    size = sum(count * len(word.encode()) for word, count in counts.items())
    best = sum(count * fewest_tokens(word.encode(), tokens) for word, count in counts.items())
    return 1 - best / size


# %% exercise="ex-tokenizer-ranks" says="stop at two parts"
# Goes on to one part, which is the token itself
def merges_from_ranks(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    merges = []
    for token, own in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 1:
            joined = [ranks.get(a + b, own) for a, b in pairwise(parts)]
            place = joined.index(min(joined))
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


# %% exercise="ex-tokenizer-ranks" says="a merge is a tuple of two bytes objects"
# Returns ids, as BPETokenizer stores its merges inside
def merges_from_ranks(ranks: dict[bytes, int]) -> list[tuple[int, int]]:
    merges = []
    for token, own in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(a + b, own) for a, b in pairwise(parts)]
            place = joined.index(min(joined))
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            merges.append((ranks[parts[0]], ranks[parts[1]]))
    return merges
