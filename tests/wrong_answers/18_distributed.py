# %% exercise="ex-distributed-lines" says="must meet in one box"
# The document's box instead of the line's
def shared_lines(parts, n_boxes):
    def emit(part):
        for name, text in part.items():
            for line in text.splitlines():
                yield box_of(stable_hash(name), n_boxes), (line, name)

    def reduce(box, values):
        names = defaultdict(set)
        for line, name in values:
            names[line].add(name)
        return [line for line, found in names.items() if len(found) > 1]

    return map_reduce(parts, emit, reduce)


# %% exercise="ex-distributed-lines" says="that one document repeats"
# Occurrences instead of documents
def shared_lines(parts, n_boxes):
    def emit(part):
        for text in part.values():
            for line in text.splitlines():
                yield box_of(stable_hash(line), n_boxes), line

    def reduce(box, values):
        return [line for line, count in Counter(values).items() if count > 1]

    return map_reduce(parts, emit, reduce)


# %% exercise="ex-distributed-lines" says="each shared line once"
# Once for each further document
def shared_lines(parts, n_boxes):
    def emit(part):
        for name, text in part.items():
            for line in set(text.splitlines()):
                yield box_of(stable_hash(line), n_boxes), line

    def reduce(box, values):
        return [line for line, count in Counter(values).items() for _ in range(count - 1)]

    return map_reduce(parts, emit, reduce)


# %% exercise="ex-distributed-lines" says="must meet in one box"
# Only the lines of one part are compared
def shared_lines(parts, n_boxes):
    shared = []
    for part in parts:
        names = defaultdict(set)
        for name, text in part.items():
            for line in text.splitlines():
                names[line].add(name)
        shared += [line for line, found in names.items() if len(found) > 1]
    return shared
