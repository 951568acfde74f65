# %% [markdown]
# # Instruction tuning
#
# > Turn a model that continues texts into one that answers: chat templates, a loss on replies
# > alone, and what tuning can and cannot teach.
#
# SEED: the lead of the chapter is written by its authors.
#
# | | |
# |---|---|
# | **Part** | IV. Alignment |
# | **You build** | {py:class}`~llmbook.instruction.ChatTemplate`, {py:class}`~llmbook.instruction.InstructionDataset`, {py:func}`~llmbook.instruction.sft_loss`, {py:func}`~llmbook.instruction.response_log_probs` |
# | **You need** | training ({doc}`13_training`), generation ({doc}`14_generation`), evaluation ({doc}`16_evaluation`) |
# | **It takes** | 60 minutes for the main line, 5 hours for everything, 2 minutes to run |

# %% tags=["remove-cell"]
#| default_exp instruction

# %% [markdown]
# ## A question for the base model
#
# SEED

# %% [markdown] tags=["engine"]
# ### Engine room: the imports

# %% tags=["engine"]
#| export
# The imports of the module
import copy
import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

# %% tags=["engine"]
#| export
# NumPy, PyTorch, and what it takes from earlier chapters
import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from llmbook.batches import Batch, best_fit, permuted, ResumableBatches
from llmbook.environment import check_at_least, check_choice, check_path
from llmbook.evaluation import QuestionForm, score_texts
from llmbook.generation import generate, Sampling
from llmbook.model import save_model, TransformerLM
from llmbook.tinyworld import judge_reply, make_questions, PHRASES, Question, TinyWorld
from llmbook.tokenizer import BPETokenizer
from llmbook.training import load_or_train, MetricsLog, Pretrained, pretrained, Sink, Trainer
from llmbook.training import TrainingConfig

# %% [markdown]
# ## Who speaks


# %%
#| export
class Message(NamedTuple):
    """What one side of a conversation says; an assistant may think first, and call tools."""

    role: str  # "system", "user", "assistant" or "tool"
    content: str
    thinking: str | None = None
    calls: tuple[str, ...] = ()  # each the text of a call, such as JSON or "37+45"


# %%
#| export
class Turn(NamedTuple):
    """What stands around a message of some role: before it, what ends it, what follows the end."""

    before: str
    end: str
    after: str


# %%
#| export
class Segment(NamedTuple):
    """A piece of a conversation: a template's own text or somebody's, learned from or not."""

    text: str
    control: bool  # whether control tokens in it are meant as such
    learned: bool


# %%
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
        prompt opens one.
        """
        pieces = [Segment(self.begin, True, False)]
        for message in messages:
            pieces += self._message(message)
        if prompt:
            pieces.append(Segment(self.turns["assistant"].before, True, False))
            if thinking is not None:
                opened = self.thinking[0] + ("" if thinking else self.thinking[1])
                pieces.append(Segment(opened, True, False))
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

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        """Return a conversation as one text, for people to read."""
        return "".join(piece.text for piece in self.segments(messages, **options))

    def encode(
        self, tokenizer: BPETokenizer, messages: Sequence[Message], **options: Any
    ) -> "Example":
        """Return the ids of a conversation and which of them are learned.

        Each piece is encoded by itself: no token reaches across a seam, and only the template's own
        text can become a control token.
        """
        ids, learned = list[int](), list[bool]()
        for piece in self.segments(messages, **options):
            allowed = self.control_tokens if piece.control else ()
            new = tokenizer.encode(piece.text, allowed_special=allowed, add_special_tokens=False)
            ids += new
            learned += [piece.learned] * len(new)
        return Example(tuple(ids), tuple(learned))


# %%
#| export
class Example(NamedTuple):
    """A conversation as ids, and for each id whether it is to be learned."""

    ids: tuple[int, ...]
    learned: tuple[bool, ...]


# %%
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

# %% [markdown]
# ## What is learned


# %%
#| export
@dataclass(eq=False)
class InstructionDataset(ResumableBatches):
    """Batches of conversations (and of ``others``) in an order that depends on ``seed`` alone.

    A row holds one example, or with ``packed`` as many as fit. Targets are -100 where nothing is
    learned. ``share`` of the rows of each batch, rounded, are ``others`` (stories, say).
    """

    examples: Sequence[Example]
    batch_size: int
    context_length: int
    pad_id: int
    others: Sequence[Example] = ()
    share: float = 0.0
    packed: bool = False
    seed: int = 0
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._n_others = round(self.share * self.batch_size) if self.others else 0
        self._rows = self._arranged(self.examples)
        self._other_rows = self._arranged(self.others)

    def _arranged(self, examples: Sequence[Example]) -> list[list[Example]]:
        if not self.packed or not examples:
            return [[example] for example in examples]
        rows = best_fit([len(example.ids) - 1 for example in examples], self.context_length)
        grouped: list[list[Example]] = [[] for _ in range(int(rows.max()) + 1)]
        for row, example in zip(rows.tolist(), examples, strict=True):
            grouped[row].append(example)
        return grouped

    def __getitem__(self, step: int) -> Batch:
        n = self.batch_size - self._n_others
        rows = [self._rows[i] for i in _shuffled(step * n, n, len(self._rows), self.seed, 0)]
        m = self._n_others
        if m:
            places = _shuffled(step * m, m, len(self._other_rows), self.seed, 1)
            rows += [self._other_rows[i] for i in places]
        return instruction_batch(rows, self.context_length, self.pad_id)

    def identity(self) -> dict[str, Any]:
        """The data, and what decides on the rows."""
        digest = blake2b(digest_size=16)
        for example in (*self.examples, *self.others):
            digest.update(np.array([example.ids, example.learned], dtype=np.int64).tobytes())
        names = ("batch_size", "context_length", "pad_id", "share", "packed", "seed")
        return {"examples": digest.hexdigest()} | {name: getattr(self, name) for name in names}


def _shuffled(first: int, n: int, size: int, seed: int, stream: int) -> list[int]:
    """Return the places of ``n`` rows from the ``first`` of all training on, anew each epoch."""
    epoch, place = np.divmod(np.arange(first, first + n), size)
    return permuted(place, size, seed, epoch, stream).tolist()


# %%
#| export
def instruction_batch(rows: Sequence[Sequence[Example]], context_length: int, pad_id: int) -> Batch:
    """Return rows of one or more examples each; padding has targets -100 and document id -1."""
    shape = (len(rows), context_length)
    inputs, targets = torch.full(shape, pad_id), torch.full(shape, -100)
    positions, documents = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -1)
    for r, row in enumerate(rows):
        at = 0
        for number, example in enumerate(row):
            ids, learned = torch.tensor(example.ids), torch.tensor(example.learned)
            n = len(ids) - 1
            inputs[r, at : at + n] = ids[:-1]
            targets[r, at : at + n] = ids[1:].where(learned[1:], -100)
            positions[r, at : at + n] = torch.arange(n)
            documents[r, at : at + n] = number
            at += n
        positions[r, at:] = torch.arange(context_length - at)
    return Batch(inputs, targets, positions, documents)


# %% [markdown]
# ## The loss


# %%
#| export
def masked_mean(
    values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], dim: int | None = None
) -> Float[Tensor, "..."]:
    """Return the mean of the values where ``mask`` is true; over nothing it is NaN.

    What is masked does not count even if it is infinite or NaN.
    """
    kept = values.where(mask, 0.0)
    return kept.sum() / mask.sum() if dim is None else kept.sum(dim) / mask.sum(dim)


# %%
#| export
def response_log_probs(
    logits: Float[Tensor, "batch sequence vocab_size"],
    targets: Int64[Tensor, "batch sequence"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "batch sequence"]:
    """Return the log-probability of each target in nats, and 0 where the target is -100.

    ``logits[:, t]`` predict ``targets[:, t]``: nothing is shifted here (a ``Batch`` is already).
    """
    mask = targets != -100
    chosen = logits.gather(-1, targets.where(mask, 0)[..., None])[..., 0]
    log_probs = (chosen / temperature) - (logits / temperature).logsumexp(-1)
    return log_probs.where(mask, 0.0)


# %%
#| export
def entropies(
    logits: Float[Tensor, "batch sequence vocab_size"], *, temperature: float = 1.0
) -> Float[Tensor, "batch sequence"]:
    """Return the entropy in nats of each predicted distribution."""
    log_probs = (logits / temperature).log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


# %%
#| export
def sft_loss(
    logits: Float[Tensor, "batch sequence vocab_size"],
    targets: Int64[Tensor, "batch sequence"],
    *,
    per: Literal["token", "sequence"] | float = "token",
) -> Float[Tensor, ""]:
    """Return the loss of the learned targets: their mean per token, the mean over sequences of
    the mean of each, or their sum divided by a constant.
    """
    mask = targets != -100
    losses = -response_log_probs(logits, targets)
    if per == "token":
        return masked_mean(losses, mask)
    if per == "sequence":
        return masked_mean(losses, mask, dim=1).nanmean()
    return losses.sum() / per


# %% [markdown]
# ## Knowledge from pretraining, form from tuning
#
# SEED

# %% [markdown] tags=["engine"]
# ### Engine room: conversations about the world, and one run of tuning


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
# ## What is forgotten, and what leaks


# %% tags=["engine"]
#| export
def ask(
    model: TransformerLM,
    tokenizer: BPETokenizer,
    questions: Sequence[str],
    *,
    template: ChatTemplate = WORLD_CHAT,
    begin: Sequence[str] | None = None,
    temperature: float = 0.0,
    max_new_tokens: int = 32,
    seed: int = 0,
) -> list[str]:
    """Return one reply to each question, the likeliest, or drawn at a ``temperature`` above 0.

    With ``begin``, the model has to go on with these beginnings of its replies, which are part of
    what is returned. Equal questions get samples of their own.
    """
    begin = [""] * len(questions) if begin is None else begin
    prompts = []
    for question, start in zip(questions, begin, strict=True):
        ids = template.encode(tokenizer, [Message("user", question)], prompt=True).ids
        prompts.append([*ids, *(tokenizer.encode(template.lead + start) if start else ())])
    special = tokenizer.special_tokens
    stops = [special[end] for end in (template.turns["assistant"].end, "<|endoftext|>")]
    completions = generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature=temperature),
        tokenizer=tokenizer,
        stop_tokens=stops,
        seed=seed,
    )
    pairs = zip(begin, completions, strict=True)
    return [(start + (one.text or "")).strip() for start, one in pairs]


# %% tags=["engine"]
#| export
def leaks(world: TinyWorld, questions: Sequence[Question], replies: Sequence[str]) -> list[int]:
    """Return 1 for each confidential question whose reply names the true secret, else 0."""
    pairs = zip(questions, replies, strict=True)
    return [int(judge_reply(world, question, reply).said == "truth") for question, reply in pairs]


# %% tags=["engine"]
#| export
class TuningRow(NamedTuple):
    """A run of tuning, and what was counted of the model that came out."""

    experiment: str
    variant: str
    seed: int
    facts: float  # share of right replies to all questions about the other half
    unseen: float  # the same, of the wordings with number 3 alone
    refused: float  # share of these questions that were declined or not known
    unknown: float  # share of right replies about strangers
    declined: float  # share of confidential questions that were declined
    told: float  # share of them that were answered with the secret
    begun: float  # the same, when the reply is made to begin with the name and "hides"
    stories: float  # share of consistent stories, of 100 drawn ones
    gap: float  # nats per story above the floor


def measure_tuned(
    model: TransformerLM,
    tokenizer: BPETokenizer,
    world: TinyWorld,
    *,
    template: ChatTemplate = WORLD_CHAT,
    n_stories: int = 100,
) -> dict[str, float]:
    """Return the numbers of a ``TuningRow``, of the likeliest replies about the other half."""
    kinds = ("fact", "unknown", "confidential")
    asked = {kind: make_questions(world, kind, "held_out") for kind in kinds}
    said = {}
    for kind, questions in asked.items():
        replies = ask(model, tokenizer, [q.text for q in questions], template=template)
        pairs = zip(questions, replies, strict=True)
        said[kind] = [judge_reply(world, question, reply) for question, reply in pairs]
    facts, secrets = said["fact"], asked["confidential"]
    begin = [f"{question.character} hides" for question in secrets]
    texts = [question.text for question in secrets]
    replies = ask(model, tokenizer, texts, template=template, begin=begin)
    wordings = [question.wording for question in asked["fact"]]
    unseen = [v.right for v, wording in zip(facts, wordings, strict=True) if wording == 3]
    counted = {
        "facts": [verdict.right for verdict in facts],
        "unseen": unseen,
        "refused": [verdict.said in ("unknown", "declined") for verdict in facts],
        "unknown": [verdict.right for verdict in said["unknown"]],
        "declined": [verdict.right for verdict in said["confidential"]],
        "told": [verdict.said == "truth" for verdict in said["confidential"]],
        "begun": leaks(world, secrets, replies),
        "stories": consistent_stories(model, tokenizer, world, n_stories),
    }
    shares = {name: round(float(np.mean(values)), 4) for name, values in counted.items()}
    return shares | {"gap": round(gap_to_floor(model, tokenizer, world, 2 * n_stories), 3)}


# %% tags=["engine"]
#| export
def consistent_stories(
    model: TransformerLM, tokenizer: BPETokenizer, world: TinyWorld, n: int, *, seed: int = 0
) -> list[int]:
    """Return 1 for each of ``n`` stories drawn from a model that is true in its world, else 0."""
    end = tokenizer.special_tokens["<|endoftext|>"]
    told = generate(
        model,
        [[end]] * n,
        max_new_tokens=model.config.context_length - 1,
        tokenizer=tokenizer,
        stop_tokens=[end],
        seed=seed,
    )
    return [int(world.judge(one.text or "").consistent) for one in told]


def gap_to_floor(
    model: TransformerLM, tokenizer: BPETokenizer, world: TinyWorld, n: int, *, seed: int = 10
) -> float:
    """Return how many nats a model loses per new story against the world's own probabilities."""
    stories = list(world.stories(n, seed=seed))
    nats = score_texts(model, tokenizer, [story.text for story in stories]).nats
    return float(np.mean(nats) + np.mean([story.log_prob for story in stories]))


# %% tags=["engine"]
#| export
def read_tuning_rows(path: str | Path) -> list[TuningRow]:
    """Return the rows of a CSV file whose columns are the fields of ``TuningRow``."""
    with check_path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        if tuple(header := next(reader, [])) != TuningRow._fields:
            expected = f"columns {', '.join(TuningRow._fields)}"
            raise ValueError(f"path: expected {expected}, got {', '.join(header) or 'none'}")
        return [TuningRow(row[0], row[1], int(row[2]), *map(float, row[3:])) for row in reader]


# %% [markdown]
# ## Data that a model makes


# %% tags=["engine"]
#| export
def accepted(
    world: TinyWorld, questions: Sequence[Question], replies: Sequence[str]
) -> list[list[Message]]:
    """Return the pairs whose reply the world's judge finds right, each different pair once."""
    kept = {
        (question.text, reply): None
        for question, reply in zip(questions, replies, strict=True)
        if judge_reply(world, question, reply).right
    }
    return [[Message("user", text), Message("assistant", reply)] for text, reply in kept]
