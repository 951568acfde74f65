# %% [markdown]
# Wrong answers to the exercises of chapter 19 on data, and what the checks must say of them.


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
