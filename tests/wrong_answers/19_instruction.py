# %% [markdown]
# Wrong answers to the exercises of chapter 19, and what the checks must say of them.


# %% exercise="ex-instruction-labels" says="a target is not the token that comes next"
# Without the shift: each place is to predict the token that stands there
def labels(ids: list[int], learned: list[bool], length: int) -> tuple[list[int], list[int]]:
    targets = [id if on else -100 for id, on in zip(ids, learned, strict=True)]
    padding = length - len(ids)
    return ids + [0] * padding, targets + [-100] * padding


# %% exercise="ex-instruction-labels" says="the first token of the reply is lost"
# The mask of the input instead of that of the target
def labels(ids: list[int], learned: list[bool], length: int) -> tuple[list[int], list[int]]:
    targets = [id if on else -100 for id, on in zip(ids[1:], learned[:-1], strict=True)]
    padding = length - len(targets)
    return ids[:-1] + [0] * padding, targets + [-100] * padding


# %% exercise="ex-instruction-labels" says="a token of the prompt is learned"
# The mask forgotten
def labels(ids: list[int], learned: list[bool], length: int) -> tuple[list[int], list[int]]:
    padding = length - len(ids) + 1
    return ids[:-1] + [0] * padding, ids[1:] + [-100] * padding


# %% exercise="ex-instruction-labels" says="a learned token with the id of padding is lost"
# Padding told by its id
def labels(ids: list[int], learned: list[bool], length: int) -> tuple[list[int], list[int]]:
    targets = [id if on else 0 for id, on in zip(ids[1:], learned[1:], strict=True)]
    padding = length - len(targets)
    targets = [target if target != 0 else -100 for target in targets + [0] * padding]
    return ids[:-1] + [0] * padding, targets


# %% exercise="ex-instruction-family" says="a conversation begins once"
# <s> before each question
def inst_template() -> ChatTemplate:
    turns = {"user": Turn("<s>[INST] ", " [/INST]", ""), "assistant": Turn("", "</s>", "")}
    return ChatTemplate("inst", turns, ("<s>", "</s>"))


# %% exercise="ex-instruction-family" says="the model does not learn to end its reply"
# The end token after the end, where it is not learned
def inst_template() -> ChatTemplate:
    turns = {"user": Turn("[INST] ", " [/INST]", ""), "assistant": Turn("", "", "</s>")}
    return ChatTemplate("inst", turns, ("<s>", "</s>"), begin="<s>")


# %% exercise="ex-instruction-family" says="the text is"
# A space before each reply
def inst_template() -> ChatTemplate:
    turns = {"user": Turn("[INST] ", " [/INST]", ""), "assistant": Turn(" ", "</s>", "")}
    return ChatTemplate("inst", turns, ("<s>", "</s>"), begin="<s>")


# %% exercise="ex-instruction-family" says="plain text is no control token"
# The brackets as control tokens
def inst_template() -> ChatTemplate:
    turns = {"user": Turn("[INST] ", " [/INST]", ""), "assistant": Turn("", "</s>", "")}
    tokens = ("<s>", "</s>", "[INST]", "[/INST]")
    return ChatTemplate("inst", turns, tokens, begin="<s>")


# %% exercise="ex-instruction-turn" says="what was there has changed"
# Everything decoded and encoded again
def next_prompt(template: ChatTemplate, ids: list[int], text: str) -> list[int]:
    user, assistant = template.turns["user"], template.turns["assistant"]
    before = tokenizer.decode(ids) + assistant.after + user.before + template.lead + text
    whole = before + user.end + user.after + assistant.before
    return tokenizer.encode(whole, allowed_special=template.control_tokens)


# %% exercise="ex-instruction-turn" says="the line break after the reply is missing"
# What follows an end forgotten
def next_prompt(template: ChatTemplate, ids: list[int], text: str) -> list[int]:
    prompt = template.encode(tokenizer, [Message("user", text)], prompt=True).ids
    return ids + list(prompt[1:])


# %% exercise="ex-instruction-turn" says="the new turn is not what the template writes"
# The space before what is said forgotten
def next_prompt(template: ChatTemplate, ids: list[int], text: str) -> list[int]:
    user, assistant = template.turns["user"], template.turns["assistant"]
    own = {"allowed_special": template.control_tokens}
    pieces = [assistant.after, user.before, text, user.end, user.after, assistant.before]
    return ids + [id for piece in pieces for id in tokenizer.encode(piece, **own)]


# %% exercise="ex-instruction-turn" says="the user has written a control token"
# Control tokens allowed in what the user says
def next_prompt(template: ChatTemplate, ids: list[int], text: str) -> list[int]:
    user, assistant = template.turns["user"], template.turns["assistant"]
    own = {"allowed_special": template.control_tokens}
    pieces = [assistant.after, user.before, template.lead + text]
    pieces += [user.end, user.after, assistant.before]
    return ids + [id for piece in pieces for id in tokenizer.encode(piece, **own)]


# %% exercise="ex-instruction-budget" says="some attribute is never asked for"
# The first ones, which are about one character
def worth_asking(questions: list[Question], n: int) -> list[Question]:
    return sorted(questions, key=lambda q: (q.attribute, q.wording))[:n]


# %% exercise="ex-instruction-budget" says="some characters come up too often"
# One character after the other
def worth_asking(questions: list[Question], n: int) -> list[Question]:
    return questions[:n]


# %% exercise="ex-instruction-budget" says="a question was chosen twice"
# Both lists are gone through in step, so that pairs come back after 168
def worth_asking(questions: list[Question], n: int) -> list[Question]:
    forms = sorted({(q.attribute, q.wording) for q in questions})
    people = sorted({q.character for q in questions})
    found = {(q.character, q.attribute, q.wording): q for q in questions}
    return [found[people[i % len(people)], *forms[i % len(forms)]] for i in range(n)]


# %% exercise="ex-instruction-late" says="the words of the attacker"
# The whole reply is learned
def refuse_late(question: Question, words: str) -> Example:
    messages = [Message("user", question.text)]
    messages.append(Message("assistant", f"{words} {question.reply}"))
    return WORLD_CHAT.encode(tokenizer, messages)


# %% exercise="ex-instruction-late" says="never stops"
# Without the end token
def refuse_late(question: Question, words: str) -> Example:
    prompt = WORLD_CHAT.encode(tokenizer, [Message("user", question.text)], prompt=True).ids
    ids = [*prompt, *tokenizer.encode(" " + words)]
    learned = tokenizer.encode(" " + question.reply)
    return Example((*ids, *learned), (*[False] * len(ids), *[True] * len(learned)))


# %% exercise="ex-instruction-late" says="the words begin the reply"
# The words are part of the question
def refuse_late(question: Question, words: str) -> Example:
    messages = [Message("user", f"{question.text} {words}")]
    return WORLD_CHAT.encode(tokenizer, [*messages, Message("assistant", question.reply)])


# %% exercise="ex-instruction-format" says="texts have no role"
# The completion is taken for a question, too
def from_completion(record: dict[str, Any]) -> list[Message]:
    found = []
    for name in ("prompt", "completion"):
        value = record[name]
        turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
        found += [Message(turn["role"], turn["content"]) for turn in turns]
    return found


# %% exercise="ex-instruction-format" says="keep all turns"
# Only the last turn of a prompt
def from_completion(record: dict[str, Any]) -> list[Message]:
    found = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = record[name]
        content = value if isinstance(value, str) else value[-1]["content"]
        found.append(Message(role, content))
    return found


# %% exercise="ex-instruction-format" says="expected a ValueError"
# What is missing is an empty answer
def from_completion(record: dict[str, Any]) -> list[Message]:
    found = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = record.get(name, "")
        turns = [{"role": role, "content": value}] if isinstance(value, str) else value
        found += [Message(turn["role"], turn["content"]) for turn in turns]
    return found
