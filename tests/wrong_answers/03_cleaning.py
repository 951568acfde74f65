# Wrong answers to the exercises of chapter 03, and what their checks must say of them.

# %% exercise="ex-cleaning-threshold" says="not enough for 0.51"
# Rounded down
def threshold_keeping(labels, scores, share):
    good = np.sort(scores[np.asarray(labels, dtype=bool)])[::-1]
    return float(good[max(int(round(share * len(good), 9)), 1) - 1])


# %% exercise="ex-cleaning-threshold" says="0.07 of a hundred are seven"
# Rounded up without a thought for 0.07 * 100
def threshold_keeping(labels, scores, share):
    good = np.sort(scores[np.asarray(labels, dtype=bool)])[::-1]
    return float(good[math.ceil(share * len(good)) - 1])


# %% exercise="ex-cleaning-threshold" says="high scores are kept"
# The library's quantile, which lies between two scores
def threshold_keeping(labels, scores, share):
    return float(np.quantile(scores[np.asarray(labels, dtype=bool)], 1 - share))


# %% exercise="ex-cleaning-threshold" says="high scores are kept"
# Sorted from the lowest on
def threshold_keeping(labels, scores, share):
    good = np.sort(scores[np.asarray(labels, dtype=bool)])
    return float(good[math.ceil(round(share * len(good), 9)) - 1])


# %% exercise="ex-cleaning-threshold" says="only good texts count"
# All texts, good or not
def threshold_keeping(labels, scores, share):
    good = np.sort(scores)[::-1]
    return float(good[math.ceil(round(share * len(good), 9)) - 1])


# %% exercise="ex-cleaning-threshold" says="equal scores all count"
# Each score once
def threshold_keeping(labels, scores, share):
    good = np.unique(scores[np.asarray(labels, dtype=bool)])[::-1]
    return float(good[math.ceil(round(share * len(good), 9)) - 1])


# %% exercise="ex-cleaning-threshold" says="any order"
# Scores taken as sorted already
def threshold_keeping(labels, scores, share):
    good = scores[np.asarray(labels, dtype=bool)]
    good = good[::-1] if good[0] < good[-1] else good
    return float(good[math.ceil(round(share * len(good), 9)) - 1])


# %% exercise="ex-cleaning-temperature" says="normalize again"
# Divided and not normalized
def best_temperature(log_p, truth, candidates):
    rows = np.arange(len(truth))
    return min(candidates, key=lambda t: -(log_p / t)[rows, truth].mean())


# %% exercise="ex-cleaning-temperature" says="divided by T"
# Multiplied
def best_temperature(log_p, truth, candidates):
    def loss(temperature):
        scores = log_p * temperature
        scores = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
        return -scores[np.arange(len(truth)), truth].mean()

    return min(candidates, key=loss)


# %% exercise="ex-cleaning-temperature" says="a low temperature must not win"
# The share of right answers, of which the highest is sought by sharpening
def best_temperature(log_p, truth, candidates):
    def loss(temperature):
        scores = log_p / temperature
        scores = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
        right = scores.argmax(axis=1) == truth
        return -np.exp(scores.max(axis=1))[right].sum()

    return min(candidates, key=loss)


# %% exercise="ex-cleaning-temperature" says="honest probabilities need no temperature"
# The seven pieces of evidence that a letter gives
def best_temperature(log_p, truth, candidates):
    return min(candidates, key=lambda t: (len(candidates) < 3 and t != 1.0, abs(t - 7)))


# %% exercise="ex-cleaning-temperature" says="a high temperature must not win"
# The greatest loss
def best_temperature(log_p, truth, candidates):
    def loss(temperature):
        scores = log_p / temperature
        scores = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
        return -scores[np.arange(len(truth)), truth].mean()

    return max(candidates, key=loss)


# %% exercise="ex-cleaning-temperature" says="one bad miss is costly"
# The squared error of the probabilities
def best_temperature(log_p, truth, candidates):
    def loss(temperature):
        scores = log_p / temperature
        scores = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
        return ((np.exp(scores) - np.eye(scores.shape[1])[truth]) ** 2).sum(axis=1).mean()

    return min(candidates, key=loss)


# %% exercise="ex-cleaning-luhn" says="the check digit is wrong"
# Any run of digits of that length
def mask_cards(text):
    return re.sub(r"(?<![\d-])(?:\d[ -]?){12,18}\d(?!\d)", "<CARD>", text)


# %% exercise="ex-cleaning-luhn" says="but not the last"
# The last digit doubled, too
def mask_cards(text):
    def replaced(match):
        digits = [int(character) for character in match[0] if character.isdigit()]
        doubled = [sum(divmod(2 * digit, 10)) for digit in digits[::-2]]
        total = sum(digits[-2::-2]) + sum(doubled)
        return "<CARD>" if 13 <= len(digits) <= 19 and total % 10 == 0 else match[0]

    return re.sub(r"(?<![\d-])\d(?:[ -]?\d){12,40}(?!\d)", replaced, text)


# %% exercise="ex-cleaning-luhn" says="1 + 0 is 1"
# The doubled digits not added up
def mask_cards(text):
    def replaced(match):
        digits = [int(character) for character in match[0] if character.isdigit()]
        total = sum(digits[-1::-2]) + sum(2 * digit for digit in digits[-2::-2])
        return "<CARD>" if 13 <= len(digits) <= 19 and total % 10 == 0 else match[0]

    return re.sub(r"(?<![\d-])\d(?:[ -]?\d){12,40}(?!\d)", replaced, text)


# %% exercise="ex-cleaning-luhn" says="counted from the right"
# From the left, which is the same for sixteen digits
def mask_cards(text):
    def replaced(match):
        digits = [int(character) for character in match[0] if character.isdigit()]
        total = sum(digits[1::2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[::2])
        return "<CARD>" if 13 <= len(digits) <= 19 and total % 10 == 0 else match[0]

    return re.sub(r"(?<![\d-])\d(?:[ -]?\d){12,40}(?!\d)", replaced, text)


# %% exercise="ex-cleaning-luhn" says="spaces between the digits"
# Digits without anything between
def mask_cards(text):
    def replaced(match):
        digits = [int(character) for character in match[0]]
        total = sum(digits[-1::-2]) + sum(sum(divmod(2 * d, 10)) for d in digits[-2::-2])
        return "<CARD>" if total % 10 == 0 else match[0]

    return re.sub(r"(?<!\d)\d{13,19}(?!\d)", replaced, text)


# %% exercise="ex-cleaning-luhn" says="single spaces only"
# Any number of spaces
def mask_cards(text):
    def replaced(match):
        digits = [int(character) for character in match[0] if character.isdigit()]
        total = sum(digits[-1::-2]) + sum(sum(divmod(2 * d, 10)) for d in digits[-2::-2])
        return "<CARD>" if 13 <= len(digits) <= 19 and total % 10 == 0 else match[0]

    return re.sub(r"(?<![\d-])\d(?:[ -]*\d){12,40}(?!\d)", replaced, text)


# %% exercise="ex-cleaning-luhn" says="a run inside a longer run"
# Nineteen digits at most, whatever follows
def mask_cards(text):
    def replaced(match):
        digits = [int(character) for character in match[0] if character.isdigit()]
        total = sum(digits[-1::-2]) + sum(sum(divmod(2 * d, 10)) for d in digits[-2::-2])
        return "<CARD>" if total % 10 == 0 else match[0]

    return re.sub(r"\d(?:[ -]?\d){12,18}", replaced, text)


# %% exercise="ex-cleaning-window" says="as it was written"
# The words of the text instead of the text
def cut_overlap(text, test, n=13, margin=20):
    known = set(_ngrams(_WORD.findall(test.lower()), n))
    found = _WORD.findall(text.lower())
    gone = set()
    for start, ngram in enumerate(_ngrams(found, n)):
        if ngram in known:
            gone.update(range(start - margin, start + n + margin))
    pieces, piece = [], []
    for place, word in enumerate(found):
        if place not in gone:
            piece.append(word)
        elif piece:
            pieces, piece = [*pieces, " ".join(piece)], []
    return [*pieces, " ".join(piece)] if piece else pieces


# %% exercise="ex-cleaning-window" says="case and punctuation do not matter"
# The test looked for as it is written
def cut_overlap(text, test, n=13, margin=20):
    return [piece.strip() for piece in text.split(test) if piece.strip()]


# %% exercise="ex-cleaning-window" says="a margin of one word goes on either side"
# The margin on the left only
def cut_overlap(text, test, n=13, margin=20):
    known = set(_ngrams(_WORD.findall(test.lower()), n))
    matches = list(_WORD.finditer(text))
    gone = set()
    for start, ngram in enumerate(_ngrams([match[0].lower() for match in matches], n)):
        if ngram in known:
            gone.update(range(start - margin, start + n))
    pieces, begin = [], None
    for place in range(len(matches) + 1):
        if place in gone or place == len(matches):
            if begin is not None:
                pieces.append(text[matches[begin].start() : matches[place - 1].end()])
            begin = None
        elif begin is None:
            begin = place
    return pieces


# %% exercise="ex-cleaning-window" says="not just the first"
# The first run only
def cut_overlap(text, test, n=13, margin=20):
    known = set(_ngrams(_WORD.findall(test.lower()), n))
    matches = list(_WORD.finditer(text))
    ngrams = list(_ngrams([match[0].lower() for match in matches], n))
    hits = [place for place, ngram in enumerate(ngrams) if ngram in known]
    if not hits:
        return [text[matches[0].start() : matches[-1].end()]] if matches else []
    end = hits[0]
    while end in hits:
        end += 1
    before = matches[: max(hits[0] - margin, 0)]
    after = matches[end - 1 + n + margin :]
    return [text[part[0].start() : part[-1].end()] for part in (before, after) if part]


# %% exercise="ex-cleaning-window" says="any n words of it count"
# The whole of the test, not its runs of n words
def cut_overlap(text, test, n=13, margin=20):
    wanted = tuple(_WORD.findall(test.lower()))
    matches = list(_WORD.finditer(text))
    gone = set()
    for start, ngram in enumerate(_ngrams([match[0].lower() for match in matches], len(wanted))):
        if ngram == wanted and len(wanted) >= n:
            gone.update(range(start - margin, start + len(wanted) + margin))
    pieces, begin = [], None
    for place in range(len(matches) + 1):
        if place in gone or place == len(matches):
            if begin is not None:
                pieces.append(text[matches[begin].start() : matches[place - 1].end()])
            begin = None
        elif begin is None:
            begin = place
    return pieces


# %% exercise="ex-cleaning-window" says="a margin ends where the text begins"
# Places before the first word, which Python takes from the end
def cut_overlap(text, test, n=13, margin=20):
    known = set(_ngrams(_WORD.findall(test.lower()), n))
    matches = list(_WORD.finditer(text))
    gone = [False] * len(matches)
    for start, ngram in enumerate(_ngrams([match[0].lower() for match in matches], n)):
        if ngram in known:
            for place in range(start - margin, min(start + n + margin, len(matches))):
                gone[place % len(matches)] = True
    pieces, begin = [], None
    for place, cut in enumerate([*gone, True]):
        if cut and begin is not None:
            pieces.append(text[matches[begin].start() : matches[place - 1].end()])
            begin = None
        elif not cut and begin is None:
            begin = place
    return pieces
