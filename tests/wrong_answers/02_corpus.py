# Wrong answers to the exercises of chapter 02, and what their checks must say of them.

# %% exercise="ex-corpus-share" says="rounded up"
# Rounded down
def share_of_longest(documents, fraction):
    sizes = sorted((len(document.text) for document in documents), reverse=True)
    return sum(sizes[: int(fraction * len(sizes))]) / max(sum(sizes), 1)


# %% exercise="ex-corpus-share" says="though not in floating point"
# Rounded up without a thought for 0.07 * 100
def share_of_longest(documents, fraction):
    sizes = sorted((len(document.text) for document in documents), reverse=True)
    return sum(sizes[: math.ceil(fraction * len(sizes))]) / max(sum(sizes), 1)


# %% exercise="ex-corpus-share" says="whatever the bytes"
# Bytes
def share_of_longest(documents, fraction):
    sizes = sorted((len(document.text.encode()) for document in documents), reverse=True)
    return sum(sizes[: math.ceil(round(fraction * len(sizes), 9))]) / max(sum(sizes), 1)


# %% exercise="ex-corpus-share" says="wherever they stand"
# The first documents, not the longest
def share_of_longest(documents, fraction):
    sizes = [len(document.text) for document in documents]
    return sum(sizes[: math.ceil(round(fraction * len(sizes), 9))]) / max(sum(sizes), 1)


# %% exercise="ex-corpus-share" says="of no documents"
# Divided by nothing
def share_of_longest(documents, fraction):
    sizes = sorted((len(document.text) for document in documents), reverse=True)
    return sum(sizes[: math.ceil(round(fraction * len(sizes), 9))]) / sum(sizes)


# %% exercise="ex-corpus-share" says="not 100"
# In percent
def share_of_longest(documents, fraction):
    sizes = sorted((len(document.text) for document in documents), reverse=True)
    return 100 * sum(sizes[: math.ceil(round(fraction * len(sizes), 9))]) / max(sum(sizes), 1)


# %% exercise="ex-corpus-mojibake" says="should become"
# Latin-1, which lacks what Windows-1252 has at 80 to 9F
def repair_mojibake(text):
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text


# %% exercise="ex-corpus-mojibake" says="should become"
# A list of the usual suspects
def repair_mojibake(text):
    for bad, good in {"Ã©": "é", "Ã¯": "ï", "Ã¼": "ü"}.items():
        text = text.replace(bad, good)
    return text


# %% exercise="ex-corpus-mojibake" says="not just those of a list"
# A longer list, which has all that the examples have
def repair_mojibake(text):
    if any(good in text for good in "éïü"):
        return text
    for good in "ÃéïüÜ€":
        text = text.replace(good.encode().decode("cp1252"), good)
    return text


# %% exercise="ex-corpus-mojibake" says="was correct and must stay"
# What cannot be decoded is left out
def repair_mojibake(text):
    return text.encode("cp1252", "ignore").decode("utf-8", "ignore")


# %% exercise="ex-corpus-mojibake" says="was correct and must stay"
# Only one of the two errors is caught
def repair_mojibake(text):
    try:
        return text.encode("cp1252").decode("utf-8")
    except UnicodeDecodeError:
        return text


# %% exercise="ex-corpus-mojibake" says="all of the text must be mojibake"
# Word by word
def repair_mojibake(text):
    def repair(word):
        try:
            return word.encode("cp1252").decode("utf-8")
        except UnicodeError:
            return word

    return " ".join(map(repair, text.split(" ")))


# %% exercise="ex-corpus-reservoir" says="drawn too"
# A new document replaces one with probability 1 / n
def reservoir(documents, k, seed):
    generator, kept = random.Random(seed), []
    for n, document in enumerate(documents, 1):
        if n <= k:
            kept.append(document)
        elif generator.random() < 1 / n:
            kept[generator.randrange(k)] = document
    return kept


# %% exercise="ex-corpus-reservoir" says="drawn too"
# Counted from 0
def reservoir(documents, k, seed):
    generator, kept = random.Random(seed), []
    for n, document in enumerate(documents):
        if n < k:
            kept.append(document)
        elif (place := generator.randrange(n)) < k:
            kept[place] = document
    return kept


# %% exercise="ex-corpus-reservoir" says="drawn too"
# randint includes its upper end
def reservoir(documents, k, seed):
    generator, kept = random.Random(seed), []
    for n, document in enumerate(documents, 1):
        if n <= k:
            kept.append(document)
        elif (place := generator.randint(0, n)) < k:
            kept[place] = document
    return kept


# %% exercise="ex-corpus-reservoir" says="drawn too"
# The oldest of the kept leaves, not a random one
def reservoir(documents, k, seed):
    generator, kept = random.Random(seed), []
    for n, document in enumerate(documents, 1):
        if n <= k:
            kept.append(document)
        elif generator.random() < k / n:
            kept = [*kept[1:], document]
    return kept


# %% exercise="ex-corpus-reservoir" says="only k documents fit"
# All of the stream in memory
def reservoir(documents, k, seed):
    listed = list(documents)
    return random.Random(seed).sample(listed, min(k, len(listed)))


# %% exercise="ex-corpus-reservoir" says="the same seed"
# Nothing is seeded
def reservoir(documents, k, seed):
    kept = []
    for n, document in enumerate(documents, 1):
        if n <= k:
            kept.append(document)
        elif (place := random.randrange(n)) < k:
            kept[place] = document
    return kept


# %% exercise="ex-corpus-monkey" says="a grows with s"
# Zipf's own exponent
def monkey_exponent(letters, space):
    return 1.0


# %% exercise="ex-corpus-monkey" says="a grows with s"
# A sign was lost
def monkey_exponent(letters, space):
    return 1 + math.log(1 - space) / math.log(letters)


# %% exercise="ex-corpus-monkey" says="a is positive"
# The power of r, with its sign
def monkey_exponent(letters, space):
    return math.log(1 - space) / math.log(letters) - 1


# %% exercise="ex-corpus-monkey" says="a falls with k"
# The number of letters forgotten
def monkey_exponent(letters, space):
    return 1 - math.log(1 - space)


# %% exercise="ex-corpus-monkey" says="a is 1"
# The letters' share in a word's probability forgotten
def monkey_exponent(letters, space):
    return -math.log(1 - space) / math.log(letters)


# %% exercise="ex-corpus-monkey" says="a is 1"
# The probability of the space bar in the place of the letters'
def monkey_exponent(letters, space):
    return 1 - math.log(space) / math.log(letters)


# %% exercise="ex-corpus-monkey" says="the exponent is 2"
# The logarithm replaced by its first term, which holds for few spaces only
def monkey_exponent(letters, space):
    return 1 + space / math.log(letters)


# %% exercise="ex-corpus-warc" says="Content-Length counts bytes"
# Cut at the line that begins a record
def read_warc(path):
    for part in gzip.open(path).read().split(b"WARC/1.0\r\n")[1:]:
        head, _, block = part.partition(b"\r\n\r\n")
        lines = (row.decode().partition(":") for row in head.splitlines())
        header = {name.lower(): value.strip() for name, _, value in lines}
        answer, _, body = block.partition(b"\r\n\r\n")
        is_page = re.search(rb"(?i)content-type:\s*text/html", answer)
        if header.get("warc-type") == "response" and answer.split()[1] == b"200" and is_page:
            found = read_html(body, id=header["warc-record-id"])
            yield Document(found.text, found.id, header["warc-target-uri"], found.metadata)


# %% exercise="ex-corpus-warc" says="Content-Length counts bytes"
# Read as text, so that characters are counted
def read_warc(path):
    with gzip.open(path, "rt", encoding="utf-8", errors="replace", newline="") as file:
        while line := file.readline():
            if not line.startswith("WARC/"):
                continue
            lines = (row.partition(":") for row in iter(lambda: file.readline().strip(), ""))
            header = {name.lower(): value.strip() for name, _, value in lines}
            answer, _, body = file.read(int(header["content-length"])).partition("\r\n\r\n")
            is_page = re.search(r"(?im)^content-type:\s*text/html", answer)
            if header["warc-type"] == "response" and answer.split()[1] == "200" and is_page:
                found = read_html(body, id=header["warc-record-id"])
                yield Document(found.text, found.id, header["warc-target-uri"], found.metadata)


# %% exercise="ex-corpus-warc" says="b has status 404"
# 200 anywhere in the headers
def read_warc(path):
    with gzip.open(path, "rb") as file:
        while line := file.readline():
            if not line.startswith(b"WARC/"):
                continue
            lines = (
                row.decode().partition(":") for row in iter(lambda: file.readline().strip(), b"")
            )
            header = {name.lower(): value.strip() for name, _, value in lines}
            block = file.read(int(header["content-length"]))
            answer, _, body = block.partition(b"\r\n\r\n")
            status, _, fields = answer.partition(b"\r\n")
            is_page = re.search(rb"(?im)^content-type:\s*text/html", fields)
            if header["warc-type"] == "response" and b"200" in answer and is_page:
                found = read_html(body, id=header["warc-record-id"])
                yield Document(found.text, found.id, header["warc-target-uri"], found.metadata)


# %% exercise="ex-corpus-warc" says="c is a picture"
# Whatever the server calls it
def read_warc(path):
    with gzip.open(path, "rb") as file:
        while line := file.readline():
            if not line.startswith(b"WARC/"):
                continue
            lines = (
                row.decode().partition(":") for row in iter(lambda: file.readline().strip(), b"")
            )
            header = {name.lower(): value.strip() for name, _, value in lines}
            block = file.read(int(header["content-length"]))
            answer, _, body = block.partition(b"\r\n\r\n")
            status, _, fields = answer.partition(b"\r\n")
            is_page = re.search(rb"(?im)^content-type:\s*text/html", fields)
            if header["warc-type"] == "response" and status.split()[1:2] == [b"200"]:
                found = read_html(body, id=header["warc-record-id"])
                yield Document(found.text, found.id, header["warc-target-uri"], found.metadata)


# %% exercise="ex-corpus-warc" says="r is a resource"
# All types of records
def read_warc(path):
    with gzip.open(path, "rb") as file:
        while line := file.readline():
            if not line.startswith(b"WARC/"):
                continue
            lines = (
                row.decode().partition(":") for row in iter(lambda: file.readline().strip(), b"")
            )
            header = {name.lower(): value.strip() for name, _, value in lines}
            block = file.read(int(header["content-length"]))
            answer, _, body = block.partition(b"\r\n\r\n")
            status, _, fields = answer.partition(b"\r\n")
            is_page = re.search(rb"(?im)^content-type:\s*text/html", fields)
            if status.split()[1:2] == [b"200"] and is_page:
                found = read_html(body, id=header["warc-record-id"])
                yield Document(found.text, found.id, header["warc-target-uri"], found.metadata)


# %% exercise="ex-corpus-warc" says="lower case"
# Names of headers only as they are usually written
def read_warc(path):
    with gzip.open(path, "rb") as file:
        while line := file.readline():
            if not line.startswith(b"WARC/"):
                continue
            lines = (
                row.decode().partition(":") for row in iter(lambda: file.readline().strip(), b"")
            )
            header = {name.lower(): value.strip() for name, _, value in lines}
            block = file.read(int(header["content-length"]))
            answer, _, body = block.partition(b"\r\n\r\n")
            status, _, fields = answer.partition(b"\r\n")
            is_page = re.search(rb"(?m)^Content-Type:\s*text/html", fields)
            if header["warc-type"] == "response" and status.split()[1:2] == [b"200"] and is_page:
                found = read_html(body, id=header["warc-record-id"])
                yield Document(found.text, found.id, header["warc-target-uri"], found.metadata)


# %% exercise="ex-corpus-warc" says="the first page has eleven words"
# The server's headers taken for a part of the page
def read_warc(path):
    with gzip.open(path, "rb") as file:
        while line := file.readline():
            if not line.startswith(b"WARC/"):
                continue
            lines = (
                row.decode().partition(":") for row in iter(lambda: file.readline().strip(), b"")
            )
            header = {name.lower(): value.strip() for name, _, value in lines}
            block = file.read(int(header["content-length"]))
            answer, _, body = block.partition(b"\r\n\r\n")
            status, _, fields = answer.partition(b"\r\n")
            is_page = re.search(rb"(?im)^content-type:\s*text/html", fields)
            if header["warc-type"] == "response" and status.split()[1:2] == [b"200"] and is_page:
                found = read_html(block.replace(b"\0", b""), id=header["warc-record-id"])
                yield Document(found.text, found.id, header["warc-target-uri"], found.metadata)


# %% exercise="ex-corpus-warc" says="the main content"
# All of the page
def read_warc(path):
    with gzip.open(path, "rb") as file:
        while line := file.readline():
            if not line.startswith(b"WARC/"):
                continue
            lines = (
                row.decode().partition(":") for row in iter(lambda: file.readline().strip(), b"")
            )
            header = {name.lower(): value.strip() for name, _, value in lines}
            block = file.read(int(header["content-length"]))
            answer, _, body = block.partition(b"\r\n\r\n")
            status, _, fields = answer.partition(b"\r\n")
            is_page = re.search(rb"(?im)^content-type:\s*text/html", fields)
            if header["warc-type"] == "response" and status.split()[1:2] == [b"200"] and is_page:
                found = read_html(body, id=header["warc-record-id"], main_content=False)
                yield Document(found.text, found.id, header["warc-target-uri"], found.metadata)


# %% exercise="ex-corpus-warc" says="the id is the record"
# The address of the page for its id
def read_warc(path):
    with gzip.open(path, "rb") as file:
        while line := file.readline():
            if not line.startswith(b"WARC/"):
                continue
            lines = (
                row.decode().partition(":") for row in iter(lambda: file.readline().strip(), b"")
            )
            header = {name.lower(): value.strip() for name, _, value in lines}
            block = file.read(int(header["content-length"]))
            answer, _, body = block.partition(b"\r\n\r\n")
            status, _, fields = answer.partition(b"\r\n")
            is_page = re.search(rb"(?im)^content-type:\s*text/html", fields)
            if header["warc-type"] == "response" and status.split()[1:2] == [b"200"] and is_page:
                found = read_html(body, id=header["warc-target-uri"])
                yield Document(found.text, found.id, header["warc-target-uri"], found.metadata)
