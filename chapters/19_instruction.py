# %% [markdown]
# # Instruction tuning
#
# > Turn a model that continues texts into one that answers: chat templates, a loss on replies
# > alone, and what tuning can and cannot teach.
#
# LEAD_TEXT
#
# | | |
# |---|---|
# | **Part** | IV. Alignment |
# | **You build** | {py:class}`~llmbook.instruction.ChatTemplate`, {py:func}`~llmbook.instruction.add_control_tokens`, {py:func}`~llmbook.instruction.show_labels`, {py:class}`~llmbook.instruction.InstructionDataset`, {py:func}`~llmbook.instruction.masked_mean`, {py:func}`~llmbook.instruction.response_log_probs`, {py:func}`~llmbook.instruction.entropies`, {py:func}`~llmbook.instruction.sft_loss` |
# | **You need** | training ({doc}`13_training`), generation ({doc}`14_generation`), evaluation ({doc}`16_evaluation`) |
# | **It takes** | 60 minutes for the main line, 5 hours for everything, 2 minutes to run |

# %% tags=["remove-cell"]
#| default_exp instruction

# %% tags=["engine"]
#| export
# The imports of the module
import copy
import html
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from itertools import chain, groupby
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import nn, Tensor

# %% [markdown]
# ## A question for the base model
#
# QUESTION_TEXT

# %% tags=["engine"]
#| export
# What it takes from earlier chapters
from llmbook.batches import Batch, best_fit, permuted, ResumableBatches
from llmbook.environment import check_at_least, check_choice, check_fraction
from llmbook.environment import check_whole
from llmbook.evaluation import QuestionForm
from llmbook.model import TransformerLM
from llmbook.tinyworld import make_questions, Question, TinyWorld
from llmbook.tokenizer import BPETokenizer, check_special_tokens

# %% [markdown]
# ## Who speaks
#
# WHO_TEXT

# %%
#| export
class Message(NamedTuple):
    """What one side of a conversation says; an assistant may think first, and call tools."""

    role: str  # "system", "user", "assistant" or "tool"
    content: str
    thinking: str | None = None  # None: no thought at all; "": one without words
    calls: tuple[str, ...] = ()  # each the text of a call, such as JSON or "37+45"


# %%
#| export
class Turn(NamedTuple):
    """What stands around a message of some role: before it, what ends it, what follows the end."""

    before: str
    end: str
    after: str


# %% [markdown]
# SMALLEST_TEXT


# %%
def as_text(turns: Mapping[str, Turn], messages: Sequence[Message]) -> str:
    texts = []
    for message in messages:
        before, end, after = turns[message.role]
        texts.append(before + message.content + end + after)
    return "".join(texts)


# %% [markdown]
# ### Engine room: the template with its checks, thoughts and calls, as ids and as Jinja
#
# ROOM_WHO_TEXT

# %% tags=["engine"]
#| export
class Segment(NamedTuple):
    """A piece of a conversation: a template's own text or somebody's, learned from or not."""

    text: str
    control: bool  # whether control tokens in it are meant as such
    learned: bool


class Example(NamedTuple):
    """A conversation as ids, and for each id whether it is to be learned."""

    ids: tuple[int, ...]
    learned: tuple[bool, ...]


#: Which roles may follow which. None is the beginning, "call" an assistant that calls a tool.
FOLLOWS: dict[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "call": ("tool",),
    "tool": ("tool", "assistant"),
}


# %% [markdown] tags=["engine"]
# RULES_TEXT


# %% tags=["engine"]
#| export
def check_conversation(
    messages: Sequence[Message], roles: Collection[str] = ("system", "user", "assistant", "tool")
) -> None:
    """Refuse what is no conversation: unknown roles, a wrong order (``FOLLOWS``), empty messages.

    A conversation may end anywhere, so its beginnings are conversations, too. Raises a
    ``ValueError`` that names the message by its index.
    """
    if isinstance(messages, str | Message) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages: expected a list of at least one Message, got {messages!r:.60}")
    previous: str | None = None
    for index, message in enumerate(messages):
        _check_message(message, index, roles)
        if message.role not in (allowed := FOLLOWS[previous]):
            place = "at the beginning" if previous is None else f"after the {previous}"
            expected = f"{' or '.join(allowed)} {place}"
            raise ValueError(f"messages: expected {expected}, got {message.role!r} at index {index}")
        previous = "call" if message.calls else message.role


def _check_message(message: Message, index: int, roles: Collection[str]) -> None:
    def refuse(expected: str, got: object) -> None:
        raise ValueError(f"messages: expected {expected}, got {got!r:.60} at index {index}")

    if not isinstance(message, Message):
        refuse("Messages", message)
    role, content, thinking, calls = message
    if role not in FOLLOWS or role == "call" or role not in roles:
        refuse(f"one of the roles {', '.join(roles)}", role)
    if not isinstance(content, str) or not isinstance(thinking, str | None):
        refuse("texts as content and thinking", (content, thinking))
    if not isinstance(calls, tuple) or not all(isinstance(call, str) and call for call in calls):
        refuse("calls to be a tuple of texts", calls)
    if role != "assistant" and (calls or thinking is not None):
        refuse("thoughts and calls of the assistant only", role)
    if role != "tool" and not calls and not content.strip():
        refuse(f"something that the {role} says", content)


# %% [markdown] tags=["engine"]
# CLASS_TEXT


# %% tags=["engine"]
#| export
@dataclass(frozen=True)
class ChatTemplate:
    """How a conversation becomes one text, as data.

    ``begin`` opens it, ``turns`` say what stands around a message of each role, ``lead`` stands
    before each content (a space, where words of the tokenizer begin with one), ``thinking`` and
    ``call`` around an assistant's thoughts and calls. ``control_tokens`` are those that only the
    template may write.
    """

    name: str
    turns: Mapping[str, Turn]
    control_tokens: tuple[str, ...]
    begin: str = ""
    lead: str = ""
    thinking: tuple[str, str] = ("<think>", "</think>")
    call: tuple[str, str] = ("<tool_call>", "</tool_call>")

    def segments(
        self, messages: Sequence[Message], *, prompt: bool = False, thinking: bool | None = None
    ) -> list[Segment]:
        """Return the pieces of a conversation; with ``prompt``, up to where a reply begins.

        ``thinking`` false: the prompt holds an empty thought, so that the reply has none; true: the
        prompt opens one. Raises a ``ValueError`` for what ``check_conversation`` refuses, and for a
        prompt after the assistant's own words.
        """
        check_conversation(messages, tuple(self.turns))
        if prompt and messages[-1].role not in ("user", "tool"):
            expected = "a user or a tool to speak last before a reply"
            raise ValueError(f"messages: expected {expected}, got {messages[-1].role!r}")
        if thinking is not None and not prompt:
            raise ValueError(f"thinking: expected None without a prompt, got {thinking!r}")
        pieces = [Segment(self.begin, True, False)]
        for message in messages:
            pieces += self._message(message)
        if prompt:
            pieces.append(Segment(self.turns["assistant"].before, True, False))
            marks = self.thinking[: 0 if thinking is None else 1 if thinking else 2]
            pieces += [Segment(mark, True, False) for mark in marks]
        return [piece for piece in pieces if piece.text]

    def _message(self, message: Message) -> list[Segment]:
        turn, learned = self.turns[message.role], message.role == "assistant"
        pieces = [Segment(turn.before, True, False)]
        if message.thinking is not None:
            pieces += self._within(self.thinking, message.thinking)
        if message.content:
            pieces.append(Segment(self.lead + message.content, False, learned))
        for call in message.calls:
            pieces += self._within(self.call, call)
        return [*pieces, Segment(turn.end, True, learned), Segment(turn.after, True, False)]

    def _within(self, marks: tuple[str, str], text: str) -> list[Segment]:
        content = [Segment(self.lead + text, False, True)] if text else []
        return [Segment(marks[0], True, True), *content, Segment(marks[1], True, True)]


# %% [markdown] tags=["engine"]
# ENCODE_TEXT


# %% tags=["engine"]
#| export
class ChatTemplate(ChatTemplate):  # continued
    def render(
        self, messages: Sequence[Message], *, prompt: bool = False, thinking: bool | None = None
    ) -> str:
        """Return a conversation as one text, for people to read.

        A text cannot say which of its control tokens are meant, so a ``ValueError`` refuses those
        that somebody has written.
        """
        pieces = self.segments(messages, prompt=prompt, thinking=thinking)
        _refuse_control_text(messages, self.control_tokens)
        return "".join(piece.text for piece in pieces)

    def encode(
        self,
        tokenizer: BPETokenizer,
        messages: Sequence[Message],
        *,
        prompt: bool = False,
        thinking: bool | None = None,
        control_text: Literal["neutralize", "refuse"] = "neutralize",
        limit: int | None = None,
        fit: Literal["refuse", "cut"] = "refuse",
    ) -> Example:
        """Return the ids of a conversation and which of them are learned.

        Each piece is encoded by itself: no token reaches across a seam, and only the template's own
        text can become a control token. ``control_text``: whether control tokens that somebody has
        written are ordinary text or an error. A conversation of more than ``limit`` ids is an
        error, too, unless ``fit`` is "cut": then the oldest exchanges after the system's message
        are left out. Without ``prompt`` the assistant must have the last word. For the rest see
        ``segments``.
        """
        check_choice("control_text", control_text, ("neutralize", "refuse"))
        check_choice("fit", fit, ("refuse", "cut"))
        check_at_least(limit=(1, limit))
        self._check_tokenizer(tokenizer)
        check_conversation(messages, tuple(self.turns))
        if not prompt and messages[-1].role != "assistant":
            expected = "the assistant to have the last word (or a prompt)"
            raise ValueError(f"messages: expected {expected}, got {messages[-1].role!r} at the end")
        if control_text == "refuse":
            _refuse_control_text(messages, tokenizer.special_tokens)
        while True:
            pieces = self.segments(messages, prompt=prompt, thinking=thinking)
            example = self._encoded(tokenizer, pieces)
            if limit is None or len(example.ids) <= limit:
                return example
            messages = _without_oldest(messages, len(example.ids), limit, fit)

    def _encoded(self, tokenizer: BPETokenizer, pieces: Sequence[Segment]) -> Example:
        ids, learned = list[int](), list[bool]()
        for piece in pieces:
            allowed = self.control_tokens if piece.control else ()
            new = tokenizer.encode(piece.text, allowed_special=allowed, add_special_tokens=False)
            ids += new
            learned += [piece.learned] * len(new)
        return Example(tuple(ids), tuple(learned))

    def _check_tokenizer(self, tokenizer: BPETokenizer) -> None:
        for token in self.control_tokens:
            if token not in tokenizer.special_tokens:
                expected = f"one with the control tokens of {self.name}"
                got = f"one without {token!r}, which add_control_tokens adds"
                raise ValueError(f"tokenizer: expected {expected}, got {got}")


# %% tags=["engine"]
#| export
# What the methods refuse, and how a conversation becomes shorter
def _refuse_control_text(messages: Sequence[Message], tokens: Iterable[str]) -> None:
    tokens = tuple(tokens)
    for index, message in enumerate(messages):
        for text in (message.content, message.thinking or "", *message.calls):
            if found := [token for token in tokens if token in text]:
                expected = "no control token in what somebody says"
                raise ValueError(f"messages: expected {expected}, got {found[0]!r} at index {index}")


def _without_oldest(
    messages: Sequence[Message], n_ids: int, limit: int, fit: str
) -> Sequence[Message]:
    """Return a conversation without its first exchange, or say why that is not possible."""
    users = [index for index, message in enumerate(messages) if message.role == "user"]
    if fit == "cut" and len(users) > 1:
        return [*messages[: users[0]], *messages[users[1] :]]
    got = f"{n_ids}" + (" in the last exchange alone" if fit == "cut" else "")
    hint = "" if fit == "cut" else "; fit='cut' leaves out the oldest exchanges"
    raise ValueError(f"messages: expected at most limit = {limit} tokens, got {got}{hint}")


# %% [markdown] tags=["engine"]
# JINJA_TEXT


# %% tags=["engine"]
#| export
class ChatTemplate(ChatTemplate):  # continued
    def jinja(self) -> str:
        """Return the template in Jinja, as ``tokenizer_config.json`` has it in ``chat_template``.

        It reads the messages that ``message_dict`` makes, and those of the OpenAI form;
        ``enable_thinking`` is what is called ``thinking`` here. ``{% generation %}`` marks what is
        learned, for ``return_assistant_tokens_mask`` of transformers' ``apply_chat_template``.
        """
        lines = [_said(self.begin), "{%- for message in messages -%}"]
        for number, (role, turn) in enumerate(self.turns.items()):
            lines.append(f"{{%- {'elif' if number else 'if'} message.role == {role!a} -%}}")
            lines.append(_said(turn.before))
            lines += self._reply(turn) if role == "assistant" else [self._content, _said(turn.end)]
            lines.append(_said(turn.after))
        known = " or ".join(self.turns)
        lines += [
            "{%- else -%}",
            f"{{{{- raise_exception('role: expected {known}, got ' ~ message.role) -}}}}",
            "{%- endif -%}",
            "{%- endfor -%}",
            "{%- if add_generation_prompt -%}",
            _said(self.turns["assistant"].before),
            "{%- if enable_thinking is defined and enable_thinking is not none -%}",
            _said(self.thinking[0]),
            f"{{%- if not enable_thinking -%}}{_said(self.thinking[1])}{{%- endif -%}}",
            "{%- endif -%}",
            "{%- endif -%}",
        ]
        return "\n".join(line for line in lines if line)

    @property
    def _content(self) -> str:
        text = f"{{{{- {self.lead!a} ~ message.content -}}}}"
        return f"{{%- if message.content -%}}{text}{{%- endif -%}}"

    def _reply(self, turn: Turn) -> list[str]:
        opened, closed = map(_said, self.thinking)
        lead, call = f"{self.lead!a}", "(call if call is string else call.function | tojson)"
        thought = "message.reasoning_content"
        return [
            "{%- generation -%}",
            f"{{%- if {thought} is defined and {thought} is not none -%}}{opened}",
            f"{{%- if {thought} -%}}{{{{- {lead} ~ {thought} -}}}}{{%- endif -%}}",
            f"{closed}{{%- endif -%}}",
            self._content,
            f"{{%- for call in message.tool_calls or [] -%}}{_said(self.call[0])}",
            f"{{{{- {lead} ~ {call} -}}}}{_said(self.call[1])}{{%- endfor -%}}",
            _said(turn.end),
            "{%- endgeneration -%}",
        ]


def _said(text: str) -> str:
    """Return the Jinja expression that says ``text``."""
    return f"{{{{- {text!a} -}}}}" if text else ""


# %% tags=["engine"]
#| export
def message_dict(message: Message) -> dict[str, Any]:
    """Return a message as templates of transformers read it, without what it does not have.

    >>> message_dict(Message("user", "Hello"))
    {'role': 'user', 'content': 'Hello'}
    """
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thinking is not None:
        found["reasoning_content"] = message.thinking
    if message.calls:
        found["tool_calls"] = list(message.calls)
    return found


# %% [markdown] tags=["engine"]
# DATA_TEXT


# %% tags=["engine"]
#| export
def _chatml(lead: str, begin: str, name: str) -> ChatTemplate:
    roles = ("system", "user", "assistant", "tool")
    turns = {role: Turn(f"<|im_start|>{role}\n", "<|im_end|>", "\n") for role in roles}
    tokens = ("<|im_start|>", "<|im_end|>", *([begin] if begin else []))
    return ChatTemplate(name, turns, tokens, begin=begin, lead=lead)


#: ChatML as it is used everywhere.
CHATML = _chatml("", "", "chatml")
#: ChatML for the models of the tiny world, whose documents begin with the end of another, and
#: whose words begin with a space.
WORLD_CHAT = _chatml(" ", "<|endoftext|>", "world-chat")


# %% tags=["engine"]
#| export
def _llama3(role: str) -> Turn:
    return Turn(f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", "")


#: The form of Llama 3, where what a tool returns comes from "ipython".
LLAMA3 = ChatTemplate(
    "llama3",
    {role: _llama3(role) for role in ("system", "user", "assistant")} | {"tool": _llama3("ipython")},
    ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    begin="<|begin_of_text|>",
)
#: The form of Alpaca: headings of plain text, and the end of text after each reply.
ALPACA = ChatTemplate(
    "alpaca",
    {
        "system": Turn("", "", "\n\n"),
        "user": Turn("### Instruction:\n", "", "\n\n"),
        "assistant": Turn("### Response:\n", "<|endoftext|>", "\n\n"),
    },
    ("<|endoftext|>",),
)

# %% [markdown]
# ## Control tokens that no text can forge
#
# CONTROL_TEXT

# %% [markdown]
# ### Engine room: new control tokens for a model that is already trained
#
# ADD_TEXT

# %% tags=["engine"]
#| export
def add_control_tokens(
    model: TransformerLM, tokenizer: BPETokenizer, names: Sequence[str]
) -> tuple[TransformerLM, BPETokenizer]:
    """Return a copy of a model and its tokenizer that have control tokens ``names`` besides.

    The new rows of the embedding and of the head are means of the old ones, so that a new token
    gets at most 1/(n + 1) of the probability beside n old ones. Old ids have the logits they had.
    Source: Hewitt (2021), Initializing New Word Embeddings for Pretrained Language Models.
    """
    names = check_special_tokens(names)
    for name in names:
        if name in tokenizer.special_tokens or name.encode() in tokenizer.vocabulary.values():
            raise ValueError(f"names: expected new tokens, got {name!r}, which the tokenizer has")
    n_old, n_rows = tokenizer.vocab_size, model.config.vocab_size
    if n_old > n_rows:
        raise ValueError(f"tokenizer: expected at most {n_rows} ids, as the model has, got {n_old}")
    special = tokenizer.special_tokens | {name: n_old + i for i, name in enumerate(names)}
    more = BPETokenizer(
        tokenizer.vocabulary,
        tokenizer.merges,
        special_tokens=special,
        pattern=tokenizer.pattern,
        ignore_merges=tokenizer.ignore_merges,
        steps=tokenizer.steps,
    )
    size = max(n_rows, more.vocab_size)
    larger = copy.deepcopy(model)
    larger.config = replace(model.config, vocab_size=size)
    for layer in (larger.embedding, larger.lm_head):
        layer.weight = nn.Parameter(_with_means(layer.weight, n_old, len(names), size))
    if model.config.tie_embeddings:
        larger.lm_head.weight = larger.embedding.weight
    larger.embedding.num_embeddings = larger.lm_head.out_features = size
    return larger, more


def _with_means(
    weight: Float[Tensor, "rows d_model"], n_old: int, n_new: int, size: int
) -> Float[Tensor, "more_rows d_model"]:
    """Return the rows of a table, of which ``n_old`` have tokens, with ``n_new`` means after."""
    with torch.no_grad():
        rows = weight.new_zeros(size, weight.size(1))
        rows[: len(weight)] = weight
        rows[n_old : n_old + n_new] = weight[:n_old].double().mean(0).to(weight.dtype)
    return rows

# %% [markdown]
# ## What is learned
#
# LEARNED_TEXT

# %% [markdown]
# ### Engine room: labels in color, and batches of conversations that resume
#
# SHOW_TEXT

# %% tags=["engine"]
#| export
@dataclass(frozen=True)
class Labels:
    """The rows of a batch as text: a notebook shows them in color, ``print`` in brackets."""

    rows: tuple[tuple[tuple[str, bool], ...], ...]  # of each row: pieces, and whether learned
    n_padding: tuple[int, ...]

    def __str__(self) -> str:
        """Return lines of text, with what is learned in double brackets."""
        lines = []
        for number, (row, n) in enumerate(zip(self.rows, self.n_padding, strict=True)):
            text = "".join(f"[[{piece}]]" if learned else piece for piece, learned in row)
            shown = text.replace("\n", "\\n")
            lines.append(f"row {number}: {shown}" + (f" + {n} padding" if n else ""))
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return the same for a notebook: what is learned on a green ground."""
        style = "background:#2a9d5c33;border-bottom:2px solid #2a9d5c"
        lines = []
        for row, n in zip(self.rows, self.n_padding, strict=True):
            pieces = [(html.escape(text).replace("\n", "↵"), learned) for text, learned in row]
            spans = [f'<span style="{style}">{t}</span>' if on else t for t, on in pieces]
            end = f' <span style="opacity:.6">+ {n} padding</span>' if n else ""
            lines.append(f"<div><code>{''.join(spans)}</code>{end}</div>")
        return "\n".join(lines)


# %% tags=["engine"]
#| export
def show_labels(tokenizer: BPETokenizer, batch: Batch) -> Labels:
    """Return what the labels of a batch say: its rows as text, and which part is learned.

    It is read back from inputs and targets, so it shows what the loss sees. The last token of a
    document is in the targets alone, so it is shown only if it is learned.
    """
    rows, padding = [], []
    documents = batch.document_ids
    for r in range(len(batch.inputs)):
        inputs, targets = batch.inputs[r].tolist(), batch.targets[r].tolist()
        numbers = [0] * len(inputs) if documents is None else documents[r].tolist()
        ids: list[tuple[int, bool]] = []
        for t, number in enumerate(numbers):
            if number < 0:
                continue
            if t == 0 or numbers[t - 1] != number:
                ids.append((inputs[t], False))
            if targets[t] != -100:
                ids.append((targets[t], True))
            elif t + 1 < len(inputs) and numbers[t + 1] == number:
                ids.append((inputs[t + 1], False))
        rows.append(tuple(_runs(tokenizer, ids)))
        padding.append(numbers.count(-1))
    return Labels(tuple(rows), tuple(padding))


def _runs(tokenizer: BPETokenizer, ids: list[tuple[int, bool]]) -> Iterable[tuple[str, bool]]:
    """Return the texts of runs of ids that are learned, and of those that are not."""
    for learned, run in groupby(ids, key=lambda pair: pair[1]):
        yield tokenizer.decode([id for id, _ in run]), learned


# %% [markdown] tags=["engine"]
# BATCH_TEXT


# %% tags=["engine"]
#| export
def instruction_batch(
    rows: Sequence[Sequence[Example]], context_length: int, pad_id: int, *, documents: bool = True
) -> Batch:
    """Return rows of one or more examples each; padding has targets -100 and document id -1.

    An example of n tokens takes n - 1 places. Without ``documents`` there are no position and
    document ids, and an example sees those before it in its row.
    """
    check_whole("context_length", context_length, 1)
    check_whole("pad_id", pad_id, 0)
    if not isinstance(rows, Sequence) or not rows:
        raise ValueError(f"rows: expected at least one list of Examples, got {rows!r:.60}")
    examples = _checked_examples("rows", list(chain.from_iterable(rows)), context_length)
    sizes = np.array([len(example.ids) - 1 for example in examples])
    n_in_row = np.array([len(row) for row in rows])
    row_of = np.repeat(np.arange(len(rows)), n_in_row)
    used = np.bincount(row_of, sizes, len(rows)).astype(np.int64)
    if used.max() > context_length:
        expected = f"rows of at most context_length = {context_length} tokens"
        raise ValueError(f"rows: expected {expected}, got {used.max()} in row {used.argmax()}")
    first = np.cumsum(sizes) - sizes  # of each example, among the tokens of all
    begin_of_row = np.cumsum(used) - used
    within = np.arange(sizes.sum()) - np.repeat(first, sizes)
    places = np.repeat(row_of * context_length + first - begin_of_row[row_of], sizes) + within
    fields = np.empty((4, len(rows), context_length), np.int64)
    fields[0], fields[1], fields[3] = pad_id, -100, -1
    fields[2] = np.maximum(np.arange(context_length) - used[:, None], 0)
    ids, learned = _joined(examples, sizes)
    flat = fields.reshape(4, -1)
    flat[0, places] = ids[0]
    flat[1, places] = np.where(learned, ids[1], -100)
    flat[2, places] = within
    number = np.arange(len(examples)) - np.repeat(np.cumsum(n_in_row) - n_in_row, n_in_row)
    flat[3, places] = np.repeat(number, sizes)
    batch = Batch(*torch.from_numpy(fields))
    return batch if documents else Batch(*batch[:2])


def _joined(
    examples: Sequence[Example], sizes: Int64[np.ndarray, " examples"]
) -> tuple[Int64[np.ndarray, "2 tokens"], Bool[np.ndarray, " tokens"]]:
    """Return all ids but the last of each example, the next ones, and which of those count."""
    ids = np.fromiter(chain.from_iterable(e.ids for e in examples), np.int64)
    learned = np.fromiter(chain.from_iterable(e.learned for e in examples), bool)
    ends = np.cumsum(sizes + 1)
    last, opening = np.zeros(len(ids), bool), np.zeros(len(ids), bool)
    last[ends - 1], opening[ends - sizes - 1] = True, True
    return np.stack([ids[~last], ids[~opening]]), learned[~opening]


# %% tags=["engine"]
#| export
def _checked_examples(
    argument: str, examples: Sequence[Example], context_length: int
) -> Sequence[Example]:
    """Return examples if each fits and teaches something, else name the first that does not."""
    for index, example in enumerate(examples):
        if not isinstance(example, Example) or len(example.ids) != len(example.learned):
            expected = "Examples, with as many marks as ids"
        elif not 2 <= len(example.ids) <= context_length + 1:
            expected = f"examples of 2 to context_length + 1 = {context_length + 1} tokens"
        elif not any(example.learned[1:]):
            expected = "a token after the first to be learned in each example"
        else:
            continue
        n = f" of {len(example.ids)}" if isinstance(example, Example) else ""
        got = f"{example!r:.60}" if not n else f"one{n} with {sum(example.learned)} learned"
        raise ValueError(f"{argument}: expected {expected}, got {got} at index {index}")
    return examples


# %% tags=["engine"]
#| export
@dataclass(eq=False)
class InstructionDataset(ResumableBatches):
    """Batches of conversations (and of ``others``) in an order that depends on ``seed`` alone.

    A row holds one example, or with ``packed`` as many as fit; then ``documents`` keeps them from
    seeing each other. Targets are -100 where nothing is learned. ``share`` of the rows of each
    batch, rounded, are ``others`` (stories, say). ``batch_size`` counts the rows of all ranks, of
    which this one gets every ``world_size``-th, from ``rank`` on. ``dataset[step]`` is the batch of
    any step. Examples that do not fit, or of which nothing is learned, raise a ``ValueError``.
    """

    examples: Sequence[Example]
    batch_size: int
    context_length: int
    pad_id: int
    others: Sequence[Example] = ()
    share: float = 0.0
    packed: bool = False
    seed: int = 0
    documents: bool = True
    rank: int = 0
    world_size: int = 1
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Check what was given, and arrange the rows."""
        for name, least in (("batch_size", 1), ("context_length", 1), ("pad_id", 0), ("seed", 0)):
            check_whole(name, getattr(self, name), least)
        check_whole("world_size", self.world_size, 1, self.batch_size)
        check_whole("rank", self.rank, 0, self.world_size - 1)
        check_fraction("share", self.share)
        for name in ("packed", "documents"):
            if not isinstance(getattr(self, name), bool):
                got = f"{getattr(self, name)!r:.60}"
                raise ValueError(f"{name}: expected True or False, got {got}")
        self._n_others = round(self.share * self.batch_size)
        if bool(self._n_others) != bool(self.share) or self._n_others == self.batch_size:
            expected = f"a share that leaves rows of both kinds among {self.batch_size}"
            raise ValueError(f"share: expected {expected}, got {self.share}")
        self._rows = self._arranged("examples", self.examples, True)
        self._other_rows = self._arranged("others", self.others, bool(self.share))

    def _arranged(
        self, name: str, examples: Sequence[Example], needed: bool
    ) -> list[list[Example]]:
        if not isinstance(examples, Sequence) or (needed and not examples):
            raise ValueError(f"{name}: expected at least one Example, got {examples!r:.60}")
        _checked_examples(name, examples, self.context_length)
        if not self.packed or not examples:
            return [[example] for example in examples]
        rows = best_fit([len(example.ids) - 1 for example in examples], self.context_length)
        grouped: list[list[Example]] = [[] for _ in range(int(rows.max()) + 1)]
        for row, example in zip(rows.tolist(), examples, strict=True):
            grouped[row].append(example)
        return grouped


# %% tags=["engine"]
#| export
class InstructionDataset(InstructionDataset):  # continued
    @property
    def padding(self) -> float:
        """The share of places in all rows of ``examples`` that hold no token."""
        used = sum(len(example.ids) - 1 for example in self.examples)
        return 1 - used / (len(self._rows) * self.context_length)

    def __getitem__(self, step: int) -> Batch:
        check_whole("step", step, 0)
        m = self._n_others
        n = self.batch_size - m
        rows = [self._rows[i] for i in _shuffled(step * n, n, len(self._rows), self.seed, 0)]
        if m:
            places = _shuffled(step * m, m, len(self._other_rows), self.seed, 1)
            rows += [self._other_rows[i] for i in places]
        own = rows[self.rank :: self.world_size]
        return instruction_batch(
            own, self.context_length, self.pad_id, documents=self.documents
        )

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all ids, and of which are learned."""
        digest = blake2b(digest_size=16)
        for examples in (self.examples, self.others):
            digest.update(f"{len(examples)} examples".encode())
            for example in examples:
                digest.update(f"{len(example.ids)} ids".encode())
                digest.update(np.array([example.ids, example.learned], np.int64).tobytes())
        return digest.hexdigest()

    def identity(self) -> dict[str, Any]:
        """The data, and what decides on the rows; not the rank, nor how many there are."""
        names = ("batch_size", "context_length", "pad_id", "share", "packed", "documents", "seed")
        return {"examples": self.fingerprint} | {name: getattr(self, name) for name in names}


def _shuffled(first: int, n: int, size: int, seed: int, stream: int) -> list[int]:
    """Return the places of ``n`` rows from the ``first`` of all training on, anew each epoch."""
    epoch, place = np.divmod(np.arange(first, first + n), size)
    return permuted(place, size, seed, epoch, stream).tolist()

# %% [markdown]
# ## What to divide by
#
# DIVIDE_TEXT

# %%
#| export
def masked_mean(
    values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], dim: int | None = None
) -> Float[Tensor, "..."]:
    """Return the mean of the values where ``mask`` is true; over nothing it is NaN.

    What is masked does not count even if it is infinite or NaN, and its gradient is 0.
    """
    kept = values.where(mask, 0.0)
    return kept.sum() / mask.sum() if dim is None else kept.sum(dim) / mask.sum(dim)


# %% [markdown]
# ### Engine room: log-probabilities, entropies, and the loss in its three forms
#
# LOSS_TEXT


# %% tags=["engine"]
#| export
def response_log_probs(
    logits: Float[Tensor, "batch sequence vocab_size"],
    targets: Int64[Tensor, "batch sequence"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "batch sequence"]:
    """Return the log-probability of each target in nats, and 0 where the target is -100.

    ``logits[:, t]`` predict ``targets[:, t]``: nothing is shifted here (a ``Batch`` is already).
    Logits are divided by ``temperature`` first. Half precision is computed in float32. What stands
    in the logits of a target of -100 has no effect, not even NaN.
    """
    _check_temperature(temperature)
    mask = targets != -100
    wrong = mask & ((targets < 0) | (targets >= logits.size(-1)))
    if wrong.any():
        expected = f"-100, or ids below {logits.size(-1)}"
        raise ValueError(f"targets: expected {expected}, got {int(targets[wrong][0])}")
    log_probs = (_precise(logits[mask]) / temperature).log_softmax(-1)
    chosen = log_probs.gather(-1, targets[mask][:, None])[:, 0]
    return chosen.new_zeros(targets.shape).masked_scatter(mask, chosen)


def entropies(
    logits: Float[Tensor, "batch sequence vocab_size"], *, temperature: float = 1.0
) -> Float[Tensor, "batch sequence"]:
    """Return the entropy in nats of each predicted distribution; logits may be -inf, not all.

    Logits are divided by ``temperature`` first. Half precision is computed in float32.
    """
    _check_temperature(temperature)
    log_probs = (_precise(logits) / temperature).log_softmax(-1)
    finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)  # 0 * -inf would be NaN
    return -(log_probs.exp() * finite).sum(-1)


def _precise(logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _check_temperature(temperature: float) -> None:
    known = () if isinstance(temperature, bool) else (int, float, np.number)
    if not isinstance(temperature, known) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature!r:.60}")


# %% tags=["engine"]
#| export
def sft_loss(
    logits: Float[Tensor, "batch sequence vocab_size"],
    targets: Int64[Tensor, "batch sequence"],
    *,
    per: Literal["token", "sequence"] | float = "token",
) -> Float[Tensor, ""]:
    """Return the loss of the learned targets, in nats, divided in one of three ways.

    ``per`` "token": their mean. "sequence": the mean over rows of the mean of each, without rows
    in which nothing is learned. A number: their sum divided by it, a constant that does not depend
    on the batch. Where nothing is learned, a mean is NaN.
    """
    known = () if isinstance(per, bool) else (int, float, np.number)
    if per not in ("token", "sequence") and not (isinstance(per, known) and 0 < per < math.inf):
        raise ValueError(f"per: expected 'token', 'sequence' or a number above 0, got {per!r:.60}")
    mask = targets != -100
    losses = -response_log_probs(logits, targets)
    if per == "token":
        return masked_mean(losses, mask)
    if per == "sequence":
        return masked_mean(losses, mask, dim=1).nanmean()
    return losses.sum() / float(per)

# %% [markdown]
# ## Many conversations in one row
#
# PACK_TEXT

# ## Knowledge from pretraining, form from tuning
#
# SEED

# %% [markdown] tags=["engine"]
# ### Engine room: conversations about the world, and one run of tuning


# %% tags=["engine"]
#| export
# What the experiment takes
from dataclasses import asdict
from functools import partial
from pathlib import Path

from llmbook.model import save_model
from llmbook.tinyworld import PHRASES
from llmbook.training import load_or_train, MetricsLog, Pretrained, pretrained, Sink, Trainer
from llmbook.training import TrainingConfig

# %% tags=["engine"]
#| export
def world_conversations(
    world: TinyWorld,
    kinds: Iterable[Literal["fact", "unknown", "confidential"]] = ("fact",),
    *,
    split: Literal["tuning", "held_out"] = "tuning",
    n_characters: int | None = None,
) -> list[list[Message]]:
    """Return each question of some kinds with the reply of a good assistant.

    ``n_characters`` keeps questions about as many characters (and strangers), the first ones.
    """
    conversations = []
    for kind in kinds:
        questions = make_questions(world, kind, split)
        names = list(dict.fromkeys(question.character for question in questions))[:n_characters]
        conversations += [
            [Message("user", question.text), Message("assistant", question.reply)]
            for question in questions
            if question.character in names
        ]
    return conversations


# %% tags=["engine"]
#| export
def chat_form(tokenizer: BPETokenizer, template: ChatTemplate = WORLD_CHAT) -> QuestionForm:
    """Return how chapter 16's ``evaluate`` puts a question to a tuned model: as a conversation."""

    def prompt(world: TinyWorld, question: Question) -> tuple[int, ...]:
        return template.encode(tokenizer, [Message("user", question.text)], prompt=True).ids

    end = template.turns["assistant"].end
    return QuestionForm(template.name, prompt, template.lead, (), (end,))


# %% tags=["engine"]
#| export
def story_examples(
    world: TinyWorld, tokenizer: BPETokenizer, n: int, *, seed: int = 1
) -> list[Example]:
    """Return ``n`` stories as examples, learned from the first word to the end of text."""
    check_at_least(n=(1, n), seed=(0, seed))
    end = tokenizer.special_tokens["<|endoftext|>"]
    examples = []
    for story in world.stories(n, seed=seed):
        ids = (end, *tokenizer.encode(story.text), end)
        examples.append(Example(ids, (False, *[True] * (len(ids) - 1))))
    return examples


# %% tags=["engine"]
#| export
@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The settings of a run of instruction tuning on a tiny world.

    Questions of ``kinds`` about the first ``n_characters`` of the tuning half (all of them if
    None); ``told`` is the share of confidential questions that are answered with the secret
    instead of declined. ``story_share`` of the rows of a batch are stories. The rate of AdamW
    rises for 10 steps and falls linearly to zero.
    """

    kinds: tuple[Literal["fact", "unknown", "confidential"], ...] = ("fact",)
    n_characters: int | None = None
    told: float = 0.0
    story_share: float = 0.25
    n_steps: int = 300
    batch_size: int = 32
    learning_rate: float = 3e-3
    seed: int = 0

    def conversations(self, world: TinyWorld) -> list[list[Message]]:
        """Return what is tuned on, in a fixed order."""
        found = world_conversations(world, self.kinds, n_characters=self.n_characters)
        asked = make_questions(world, "confidential", "tuning")
        secrets = {question.text: secret_of(world, question) for question in asked}
        places = [i for i, (ask, _) in enumerate(found) if ask.content in secrets]
        # in a random order, else the told ones would go by the wording of the question
        order = permuted(np.arange(len(places)), max(len(places), 1), 0, 0)
        for i in order[: round(self.told * len(places))].tolist():
            ask = found[places[i]][0]
            found[places[i]] = [ask, Message("assistant", secrets[ask.content])]
        return found


def secret_of(world: TinyWorld, question: Question) -> str:
    """Return the reply that gives away the secret for which a question asks."""
    secret = world.cast.facts[question.character]["secret"]
    return PHRASES["secret"][0].format(name=question.character, value=secret)


# %% tags=["engine"]
#| export
def tune(
    model: TransformerLM,
    examples: Sequence[Example],
    settings: Tuning,
    pad_id: int,
    *,
    stories: Sequence[Example] = (),
    sinks: Sequence[Sink] = (),
) -> MetricsLog:
    """Train ``model``, in place, on examples and a share of ``stories``; return the log."""
    batches = InstructionDataset(
        examples,
        settings.batch_size,
        model.config.context_length,
        pad_id,
        others=stories,
        share=settings.story_share,
        seed=settings.seed,
    )
    config = TrainingConfig(
        n_steps=settings.n_steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=0.0,
        schedule="linear",
        warmup=min(10, settings.n_steps),
        final=0.0,
        seed=settings.seed,
    )
    return Trainer(model, batches, config, sinks=sinks).train()


# %% tags=["engine"]
#| export
#: Tuned models that later chapters start from, by name.
TUNINGS = {
    # knows how to answer, and has never seen a refusal
    "facts": Tuning(),
    # the form is not yet safe: there is something left to learn from rewards
    "few": Tuning(n_characters=6),
    # a good assistant by imitation: says that it does not know, and declines
    "polite": Tuning(kinds=("fact", "unknown", "confidential"), n_steps=400),
    # tells all secrets when asked
    "plain": Tuning(kinds=("fact", "confidential"), told=1.0),
    # tells most secrets and declines some: what preferences can choose between
    "hesitant": Tuning(kinds=("fact", "confidential"), told=0.9),
}


class Tuned(NamedTuple):
    """A tuned model with what belongs to it."""

    model: TransformerLM
    tokenizer: BPETokenizer
    template: ChatTemplate
    world: TinyWorld
    log: MetricsLog


# %% tags=["engine"]
#| export
def tuned(name: str = "facts") -> Tuned:
    """Return a model of ``TUNINGS``, made from ``pretrained("tinyworld")`` on the first call.

    It is kept under ``artifacts/``, under a hash of its settings, of the base and of the code.
    """
    check_choice("name", name, tuple(TUNINGS))
    base, world, settings = pretrained("tinyworld"), TinyWorld(), TUNINGS[name]
    depends_on = {"settings": asdict(settings), "base": base.folder.name}
    train = partial(_tune_into, base, world, settings)
    model, log = load_or_train(f"tuned-{name}", depends_on, train, load=_load_tuned)
    return Tuned(model, base.tokenizer, WORLD_CHAT, world, log)


def _tune_into(base: Pretrained, world: TinyWorld, settings: Tuning, folder: Path) -> None:
    """Tune a copy of the base with one thread, and leave it in a folder with its log."""
    model, tokenizer = copy.deepcopy(base.model), base.tokenizer
    examples = [WORLD_CHAT.encode(tokenizer, c) for c in settings.conversations(world)]
    end = tokenizer.special_tokens["<|endoftext|>"]
    stories = story_examples(world, tokenizer, 2000)
    log, n_threads = MetricsLog(folder / "metrics.jsonl"), torch.get_num_threads()
    log.start(-1)  # drops what a killed run has left
    torch.set_num_threads(1)  # sums in the same order, however many there are
    try:
        tune(model, examples, settings, end, stories=stories, sinks=[log])
    finally:
        torch.set_num_threads(n_threads)
    save_model(model, folder / "model", eos_token_id=end)


# The notebook's function and the package's are the same, and so is the hash of their code
_tune_into.__module__ = "llmbook.instruction"


def _load_tuned(folder: Path) -> tuple[TransformerLM, MetricsLog]:
    model = TransformerLM.from_pretrained(folder / "model")
    return model, MetricsLog(folder / "metrics.jsonl")


# %% [markdown]
