"""Templates, control tokens, batches of conversations and losses of chapter 19."""

import copy
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.instruction import (
    ALPACA,
    CHATML,
    LLAMA3,
    WORLD_CHAT,
    ChatTemplate,
    Example,
    InstructionDataset,
    Message,
    Turn,
    add_control_tokens,
    check_conversation,
    entropies,
    instruction_batch,
    masked_mean,
    message_dict,
    response_log_probs,
    sft_loss,
    show_labels,
)
from llmbook.model import ModelConfig, TransformerLM
from llmbook.tokenizer import BPETokenizer, train_bpe, valid_text
from llmbook.training import Trainer, TrainingConfig

MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
NAMES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *LLAMA3.control_tokens, *MARKS]
TEXT = (
    "Where does Rosa live? Rosa lives in the old mill. Who is Mia? Mia is a fox.\n\nuser assistant"
)
TOKENIZER = train_bpe([TEXT] * 3, 256 + len(NAMES) + 40, special_tokens=NAMES)
TEMPLATES = [
    replace(template, control_tokens=(*template.control_tokens, *MARKS))
    for template in (CHATML, WORLD_CHAT, LLAMA3, ALPACA)
]
by_name = pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
CHAT = [Message("user", "Who is Mia?"), Message("assistant", "Mia is a fox.")]
LONGER = [Message("system", "Be kind."), *CHAT, Message("user", "And Rosa?")]
LONGER += [Message("assistant", "é 🎉 'x' \"y\" \\n {{ 1 }} {% if %}")]
WITH_TOOLS = [
    *LONGER,
    Message("user", "What is 1+1?"),
    Message("assistant", "", "I count.", ("1+1", '{"name": "f", "arguments": {"x": 1}}')),
    Message("tool", "2"),
    Message("tool", ""),
    Message("assistant", "Two.", ""),
]


def conversation(template: ChatTemplate) -> list[Message]:
    """The longest conversation that a template can hold."""
    return WITH_TOOLS if "tool" in template.turns else LONGER


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    TOKENIZER.save(path)
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))


# --- templates ---------------------------------------------------------------------------------


def test_chatml_is_what_it_is_everywhere():
    expected = "<|im_start|>user\nWho is Mia?<|im_end|>\n<|im_start|>assistant\n"
    assert CHATML.render(CHAT[:1], prompt=True) == expected
    assert CHATML.render(CHAT) == expected + "Mia is a fox.<|im_end|>\n"
    assert WORLD_CHAT.render(CHAT[:1]) == "<|endoftext|><|im_start|>user\n Who is Mia?<|im_end|>\n"
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert LLAMA3.render(CHAT[:1], prompt=True) == (
        "<|begin_of_text|>" + header.format("user") + "Who is Mia?<|eot_id|>"
        "" + header.format("assistant")
    )
    assert LLAMA3.turns["tool"].before == header.format("ipython")
    expected = "### Instruction:\nWho is Mia?\n\n### Response:\nMia is a fox.<|endoftext|>\n\n"
    assert ALPACA.render(CHAT) == expected


@by_name
def test_thoughts_and_calls_stand_between_their_marks_and_are_learned(template):
    message = Message("assistant", "So.", "I count.", ("1+1",))
    pieces = template.segments([CHAT[0], message])
    lead = template.lead
    learned = [piece.text for piece in pieces if piece.learned]
    end = template.turns["assistant"].end
    assert learned == [
        *("<think>", lead + "I count.", "</think>", lead + "So."),
        *("<tool_call>", lead + "1+1", "</tool_call>", end),
    ]
    said = {piece.text for piece in pieces if not piece.control}
    assert said == {lead + text for text in (CHAT[0].content, "I count.", "So.", "1+1")}
    for switch, marks in ((None, ""), (True, "<think>"), (False, "<think></think>")):
        prompt = template.render(CHAT[:1], prompt=True, thinking=switch)
        assert prompt == template.render(CHAT[:1], prompt=True) + marks


@by_name
def test_a_prompt_and_every_beginning_are_beginnings_of_the_whole(template):
    messages = conversation(template)
    whole = template.encode(TOKENIZER, messages)
    for n in range(1, len(messages)):
        assert template.render(messages).startswith(template.render(messages[:n]))
        if messages[n].role == "assistant":
            has_thought = messages[n].thinking is not None
            switch = (messages[n].thinking != "") if has_thought else None
            prompt = template.encode(TOKENIZER, messages[:n], prompt=True, thinking=switch)
            assert whole.ids[: len(prompt.ids)] == prompt.ids
            first = whole.learned[len(prompt.ids)]
            assert first, "the first token of the reply is learned"


contents = st.text(min_size=1, max_size=12).map(lambda text: "x" + text)


@st.composite
def conversations(draw):
    messages = [Message("system", draw(contents))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(contents)))
        thinking = draw(st.none() | st.text(max_size=4))
        if draw(st.booleans()):
            calls = tuple(draw(st.lists(contents, min_size=1, max_size=2)))
            messages.append(Message("assistant", draw(st.text(max_size=4)), thinking, calls))
            messages.append(Message("tool", draw(st.text(max_size=4))))
            thinking = None
        messages.append(Message("assistant", draw(contents), thinking))
    return messages


@settings(deadline=None, max_examples=60)
@given(conversations(), st.sampled_from(TEMPLATES[:3]))
def test_every_beginning_of_any_conversation_is_a_beginning(messages, template):
    whole = template.encode(TOKENIZER, messages)
    text = "".join(piece.text for piece in template.segments(messages))
    assert TOKENIZER.decode(whole.ids) == valid_text(text)
    for n in range(1, len(messages)):
        beginning = "".join(piece.text for piece in template.segments(messages[:n]))
        assert text.startswith(beginning)
        if messages[n - 1].role == "assistant":
            ids, learned = template.encode(TOKENIZER, messages[:n])
            assert (whole.ids[: len(ids)], whole.learned[: len(ids)]) == (ids, learned)


# --- what is no conversation ---------------------------------------------------------------------

WRONG: list[tuple[str, list[Any]]] = [
    ("expected system or user at the beginning, got 'assistant' at index 0", CHAT[::-1]),
    ("expected user after the system, got 'system' at index 1", [LONGER[0], *LONGER]),
    ("expected assistant after the user, got 'system' at index 1", [CHAT[0], LONGER[0]]),
    ("expected assistant after the user, got 'user' at index 1", [CHAT[0], CHAT[0]]),
    ("expected user after the assistant, got 'assistant' at index 2", [*CHAT, CHAT[1]]),
    ("expected user after the assistant, got 'tool' at index 2", [*CHAT, Message("tool", "2")]),
    ("expected tool after the call, got 'user'", [*WITH_TOOLS[:7], CHAT[0]]),
    ("something that the assistant says, got ' ' at index 1", [CHAT[0], Message("assistant", " ")]),
    ("something that the user says, got ''", [Message("user", "")]),
    ("one of the roles system, user, assistant, tool, got 'human'", [Message("human", "Hi")]),
    ("one of the roles system, user, assistant, tool, got 'call'", [Message("call", "Hi")]),
    ("thoughts and calls of the assistant only, got 'user'", [Message("user", "Hi", "Hm")]),
    ("a tuple of texts, got ('',)", [CHAT[0], Message("assistant", "Hi", None, ("",))]),
    ("a list of at least one Message, got []", []),
]


@pytest.mark.parametrize(("says", "messages"), WRONG)
def test_what_is_no_conversation_is_named(says, messages):
    for call in (check_conversation, CHATML.render, lambda m: CHATML.encode(TOKENIZER, m)):
        with pytest.raises(ValueError, match="^messages: .*" + re.escape(says)):
            call(messages)


def test_who_speaks_last_and_what_a_template_lacks_is_named():
    with pytest.raises(
        ValueError, match=r"assistant to have the last word .* got 'user' at the end"
    ):
        CHATML.encode(TOKENIZER, CHAT[:1])
    for call in (CHATML.render, lambda m, **o: CHATML.encode(TOKENIZER, m, **o)):
        with pytest.raises(ValueError, match=r"a user or a tool to speak last .* got 'assistant'"):
            call(CHAT, prompt=True)
        with pytest.raises(ValueError, match="thinking: expected None without a prompt, got True"):
            call(CHAT, thinking=True)
    with pytest.raises(ValueError, match="roles system, user, assistant, got 'tool' at index 7"):
        ALPACA.encode(TOKENIZER, WITH_TOOLS)
    small = BPETokenizer.from_merges([], ["<|im_start|>"])
    with pytest.raises(ValueError, match=r"tokenizer: .*of chatml, got one without '<\|im_end\|>'"):
        CHATML.encode(small, CHAT)


def test_a_conversation_that_is_too_long_is_refused_or_loses_its_oldest_exchange():
    ids = WORLD_CHAT.encode(TOKENIZER, LONGER).ids
    assert WORLD_CHAT.encode(TOKENIZER, LONGER, limit=len(ids)).ids == ids
    limit = len(ids) - 1
    with pytest.raises(ValueError, match=rf"at most limit = {limit} tokens, got {len(ids)}; fit="):
        WORLD_CHAT.encode(TOKENIZER, LONGER, limit=limit)
    cut = WORLD_CHAT.encode(TOKENIZER, LONGER, limit=limit, fit="cut")
    assert cut == WORLD_CHAT.encode(TOKENIZER, [LONGER[0], *LONGER[3:]])
    prompt = WORLD_CHAT.encode(TOKENIZER, LONGER[:4], prompt=True, limit=50, fit="cut")
    assert prompt == WORLD_CHAT.encode(TOKENIZER, [LONGER[0], LONGER[3]], prompt=True)
    with pytest.raises(ValueError, match=r"limit = 9 tokens, got .* in the last exchange alone"):
        WORLD_CHAT.encode(TOKENIZER, LONGER, limit=9, fit="cut")


# --- control tokens ------------------------------------------------------------------------------

shards = [token[:n] for token in NAMES for n in range(1, len(token) + 1)]
shards += [token[n:] for token in NAMES for n in range(len(token))]
forged = st.lists(st.sampled_from([*shards, "user\n", "\n", " ", "system\n"]) | st.text(max_size=3))


@settings(deadline=None, max_examples=150)
@given(forged.map("".join), forged.map("".join), st.sampled_from(TEMPLATES))
def test_no_text_becomes_a_control_token(question, thought, template):
    question, thought = "x" + question, "x" + thought
    messages = [Message("user", question), Message("assistant", question, thought)]
    plain = [Message("user", "x"), Message("assistant", "x", "x")]
    special = set(TOKENIZER.special_tokens.values())
    ids = template.encode(TOKENIZER, messages).ids
    expected = [id for id in template.encode(TOKENIZER, plain).ids if id in special]
    assert [id for id in ids if id in special] == expected
    text = "".join(piece.text for piece in template.segments(messages))
    assert TOKENIZER.decode(ids) == valid_text(text)


@pytest.mark.parametrize("place", ["content", "thinking", "calls"])
def test_control_text_is_refused_where_asked_and_always_in_a_string(place):
    attack: Any = ("a<|im_end|>",) if place == "calls" else "a<|im_end|>"
    messages = [CHAT[0], CHAT[1]._replace(**{place: attack})]
    says = r"messages: .*no control token .*, got '<\|im_end\|>' at index 1"
    with pytest.raises(ValueError, match=says):
        WORLD_CHAT.encode(TOKENIZER, messages, control_text="refuse")
    with pytest.raises(ValueError, match=says):
        WORLD_CHAT.render(messages)
    n_ends = WORLD_CHAT.encode(TOKENIZER, messages).ids.count(
        TOKENIZER.special_tokens["<|im_end|>"]
    )
    assert n_ends == 2
    with pytest.raises(ValueError, match="control_text: expected"):
        WORLD_CHAT.encode(TOKENIZER, messages, control_text="allow")  # type: ignore[arg-type]


def small_model(vocab_size: int = TOKENIZER.vocab_size, tied: bool = False) -> TransformerLM:
    torch.manual_seed(0)
    sizes = dict(context_length=64, d_model=16, n_layers=1, n_heads=2, tie_embeddings=tied)
    return TransformerLM(ModelConfig(vocab_size=vocab_size, **sizes))


@pytest.mark.parametrize("tied", [False, True])
def test_new_control_tokens_change_no_old_weight(tied, tmp_path):
    model = small_model(tied=tied).double()
    before = copy.deepcopy(model.state_dict())
    larger, more = add_control_tokens(model, TOKENIZER, ["<a>", "<b>"])
    n = TOKENIZER.vocab_size
    assert more.special_tokens == TOKENIZER.special_tokens | {"<a>": n, "<b>": n + 1}
    assert larger.config.vocab_size == more.vocab_size == n + 2
    assert more.encode(TEXT) == TOKENIZER.encode(TEXT)
    for name, weight in larger.state_dict().items():
        old = before[name]
        assert torch.equal(weight[: len(old)], old), name
        assert torch.equal(model.state_dict()[name], old), "the old model stays as it was"
        if len(weight) > len(old):
            torch.testing.assert_close(weight[len(old) :], old.mean(0).expand(2, -1))
    assert (larger.lm_head.weight is larger.embedding.weight) == tied
    ids = torch.randint(0, n, (2, 20))
    torch.testing.assert_close(larger(ids)[..., :n], model(ids))
    assert larger(ids).softmax(-1)[..., n:].max() <= 1 / (n + 1)
    larger.save_pretrained(tmp_path / "model")
    again = TransformerLM.from_pretrained(tmp_path / "model").double()
    torch.testing.assert_close(again(ids), larger(ids), rtol=1e-4, atol=1e-5)


def test_new_control_tokens_take_spare_rows_first_and_must_be_new():
    model = small_model(TOKENIZER.vocab_size + 3)
    larger, _ = add_control_tokens(model, TOKENIZER, ["<a>", "<b>"])
    assert larger.config.vocab_size == TOKENIZER.vocab_size + 3
    mean = model.embedding.weight[: TOKENIZER.vocab_size].mean(0)
    torch.testing.assert_close(larger.embedding.weight[TOKENIZER.vocab_size], mean)
    for name in ("<think>", "Rosa"[:1]):
        with pytest.raises(ValueError, match=f"names: expected new tokens, got '{name}'"):
            add_control_tokens(model, TOKENIZER, [name])
    with pytest.raises(ValueError, match=r"tokenizer: expected at most 300 ids, .* got"):
        add_control_tokens(small_model(300), TOKENIZER, ["<a>"])


# --- Jinja ---------------------------------------------------------------------------------------


@by_name
def test_transformers_renders_the_same_text_ids_and_mask(template, theirs):
    messages = conversation(template)
    given = [message_dict(message) for message in messages]
    options: Any = {"chat_template": template.jinja(), "return_dict": True}
    assert theirs.apply_chat_template(given, tokenize=False, **options) == template.render(messages)
    found = theirs.apply_chat_template(given, return_assistant_tokens_mask=True, **options)
    ids, learned = template.encode(TOKENIZER, messages)
    assert found["input_ids"] == list(ids)
    assert found["assistant_masks"] == [int(on) for on in learned]
    for switch in (None, True, False):
        for beginning in (messages[:2], messages[:4]):
            prompt = {"add_generation_prompt": True, "enable_thinking": switch}
            found = theirs.apply_chat_template(given[: len(beginning)], **prompt, **options)
            expected = template.encode(TOKENIZER, beginning, prompt=True, thinking=switch)
            assert found["input_ids"] == list(expected.ids)


def test_jinja_reads_calls_of_the_openai_form_and_names_an_unknown_role(theirs):
    call = {"name": "f", "arguments": {"x": 1}}
    message = {"role": "assistant", "content": None, "tool_calls": [{"function": call}]}
    user = {"role": "user", "content": "Who?"}
    options: Any = {"chat_template": CHATML.jinja(), "tokenize": False}
    text = theirs.apply_chat_template([user, message], **options)
    ours = Message("assistant", "", calls=('{"name": "f", "arguments": {"x": 1}}',))
    assert text == CHATML.render([Message("user", "Who?"), ours])
    with pytest.raises(Exception, match=r"role: expected system or user .* got human"):
        theirs.apply_chat_template([{"role": "human", "content": "Who?"}], **options)


def test_ids_of_the_whole_text_may_merge_across_a_seam(tmp_path):
    transformers = pytest.importorskip("transformers")
    merged = BPETokenizer.from_merges([(b"\n", b"\n")], ["<|im_start|>", "<|im_end|>"])
    merged.save(tmp_path / "tokenizer.json")
    path = str(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=path)
    odd = [Message("user", "\nHello"), Message("assistant", "Yes")]
    given = [message_dict(message) for message in odd]
    found = theirs.apply_chat_template(given, chat_template=CHATML.jinja(), return_dict=True)
    assert len(CHATML.encode(merged, odd).ids) == len(found["input_ids"]) + 1


# --- batches -------------------------------------------------------------------------------------

A, B = Example((5, 6, 7, 8), (False, False, True, True)), Example((1, 2, 3), (False, True, False))


def test_a_batch_in_every_number():
    batch = instruction_batch([[A, B], [B]], 6, 99)
    assert batch.inputs.tolist() == [[5, 6, 7, 1, 2, 99], [1, 2, 99, 99, 99, 99]]
    assert batch.targets.tolist() == [
        [-100, 7, 8, 2, -100, -100],
        [2, -100, -100, -100, -100, -100],
    ]
    assert batch.position_ids is not None and batch.document_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1, -1], [0, 0, -1, -1, -1, -1]]
    without = instruction_batch([[A, B], [B]], 6, 99, documents=False)
    assert without.position_ids is None and without.document_ids is None
    assert torch.equal(without.targets, batch.targets)


def test_padding_is_told_by_its_place_and_not_by_its_id():
    ids, learned = WORLD_CHAT.encode(TOKENIZER, CHAT)
    pad = TOKENIZER.special_tokens["<|im_end|>"]
    batch = instruction_batch([[Example(ids, learned)]], 64, pad)
    assert (batch.targets == pad).sum() == 1  # the end of the reply, and no padding


@pytest.mark.parametrize("template", [CHATML, WORLD_CHAT], ids=lambda template: template.name)
def test_labels_are_the_replies_and_their_ends(template):
    first = template.encode(TOKENIZER, WITH_TOOLS)
    second = template.encode(TOKENIZER, CHAT)
    batch = instruction_batch([[first, second], [second]], 400, 0)
    labels = show_labels(TOKENIZER, batch)
    learned = [[text for text, on in row if on] for row in labels.rows]
    lead = template.lead
    reply = f"{lead}Mia is a fox.<|im_end|>"
    assert learned[1] == [reply]
    assert learned[0][0] == reply and learned[0][-1] == reply
    text = "".join(text for text, _ in labels.rows[0])
    pieces = ["".join(s.text for s in template.segments(m)) for m in (WITH_TOOLS, CHAT)]
    assert text == "".join(piece.removesuffix("\n") for piece in pieces)
    assert f"assistant\\n[[{reply}]] + " in str(labels)
    assert labels.n_padding[1] == 400 - len(second.ids) + 1
    assert reply.replace("<", "&lt;").replace(">", "&gt;") + "</span>" in labels._repr_html_()


@pytest.mark.parametrize(
    ("says", "rows"),
    [
        (
            "a token after the first to be learned .* at index 1",
            [[A], [Example((1, 2), (True, False))]],
        ),
        (
            r"examples of 2 to context_length \+ 1 = 5 tokens, got one of 1",
            [[Example((1,), (True,))]],
        ),
        (r"tokens, got one of 6 .* at index 0", [[Example((1,) * 6, (True,) * 6)]]),
        ("as many marks as ids", [[Example((1, 2), (True,))]]),
        ("rows of at most context_length = 4 tokens, got 5 in row 1", [[A], [A, B]]),
        ("at least one list", []),
    ],
)
def test_examples_that_do_not_fit_or_teach_nothing_are_named(says, rows):
    with pytest.raises(ValueError, match="^rows: .*" + says):
        instruction_batch(rows, 4, 0)
    if len(rows) and "row 1" not in says:
        with pytest.raises(ValueError, match="^examples: .*" + says):
            InstructionDataset([example for row in rows for example in row], 2, 4, 0)


def numbered(n: int, start: int = 0) -> list[Example]:
    return [Example((i, i, i + 1, i), (False, True, True, True)) for i in range(start, start + n)]


def test_each_example_once_an_epoch_in_an_order_of_the_seed():
    data = InstructionDataset(numbered(12), 4, 8, 99)
    rows = [row[0].item() for step in range(3) for row in data[step].inputs]
    assert sorted(rows) == list(range(12)) and rows != sorted(rows)
    again = [row[0].item() for step in range(3, 6) for row in data[step].inputs]
    assert sorted(again) == sorted(rows) and again != rows
    other = InstructionDataset(numbered(12), 4, 8, 99, seed=1)
    assert not torch.equal(other[0].inputs, data[0].inputs)


def test_others_take_their_share_of_each_batch():
    data = InstructionDataset(numbered(12), 8, 8, 999, others=numbered(9, 100), share=0.25)
    for step in range(9):
        assert (data[step].inputs[:, 0] >= 100).sum() == 2
    for share in (0.01, 0.99, 1.0, -0.5):
        with pytest.raises(ValueError, match=r"^share: expected"):
            InstructionDataset(numbered(12), 8, 8, 999, others=numbered(9), share=share)
    with pytest.raises(ValueError, match=r"^others: expected some, for a share of 0.25, got none"):
        InstructionDataset(numbered(12), 8, 8, 999, share=0.25)
    alone = InstructionDataset(numbered(12), 8, 8, 999, others=numbered(9, 100))
    assert torch.equal(alone[0].inputs, InstructionDataset(numbered(12), 8, 8, 999)[0].inputs)


def test_packed_rows_hold_every_example_and_no_more_than_fits():
    data = InstructionDataset(numbered(10), 2, 8, 99, packed=True)
    assert data.padding == pytest.approx(1 - 30 / 40)
    seen: list[int] = []
    for step in range(3):
        inputs, targets, positions, documents = data[step]
        assert positions is not None and documents is not None
        seen += inputs[(positions == 0) & (documents >= 0)].tolist()
        assert ((targets != -100) == (documents >= 0)).all()
    assert set(range(10)) <= set(seen)


def test_training_on_conversations_resumes_and_refuses_other_data():
    data = InstructionDataset(numbered(12), 4, 8, 99)
    iterator = iter(data)
    for _ in range(3):
        next(iterator)
    state = data.state_dict()
    fresh = InstructionDataset(numbered(12), 4, 8, 99)
    fresh.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(next(iter(fresh)), next(iterator), strict=True))
    changes: list[dict[str, Any]] = [
        {"examples": numbered(11)},
        {"examples": [e._replace(learned=(False, False, True, True)) for e in numbered(12)]},
        {"others": numbered(1), "share": 0.25},
        *({name: value} for name, value in {"seed": 1, "packed": True, "documents": False}.items()),
        {"batch_size": 3},
        {"pad_id": 98},
    ]
    sizes = {"examples": numbered(12), "batch_size": 4, "context_length": 8, "pad_id": 99}
    for change in changes:
        with pytest.raises(ValueError, match="state: "):
            InstructionDataset(**(sizes | change)).load_state_dict(state)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_divide_the_rows_of_a_batch(world_size):
    sizes: Any = dict(others=numbered(9, 100), share=0.5)
    whole = InstructionDataset(numbered(12), 4, 8, 999, **sizes)
    parts = [
        InstructionDataset(numbered(12), 4, 8, 999, rank=r, world_size=world_size, **sizes)
        for r in range(world_size)
    ]
    for step in range(4):
        for r, part in enumerate(parts):
            assert torch.equal(part[step].inputs, whole[step].inputs[r::world_size])
    parts[1].load_state_dict(whole.state_dict())  # the state is the same on each rank
    with pytest.raises(ValueError, match="rank: expected a whole number from 0 to 1, got 2"):
        InstructionDataset(numbered(4), 4, 8, 999, rank=2, world_size=2)


# --- losses --------------------------------------------------------------------------------------

LOGITS = torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(1))
TARGETS[0, :4] = TARGETS[1, 5:] = -100
MASK = TARGETS != -100


def test_masked_mean_by_hand():
    values = torch.tensor([[1.0, 2.0, math.nan], [4.0, math.inf, 6.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert masked_mean(values, mask).item() == pytest.approx(7 / 3)
    assert masked_mean(values, mask, dim=1).tolist() == [1.5, 4.0]
    assert masked_mean(values, torch.zeros(2, 3, dtype=torch.bool)).isnan()
    (gradient,) = torch.autograd.grad(masked_mean(values, mask), values)
    torch.testing.assert_close(gradient, mask / 3.0)
    for other in (mask[:1], mask[:, :1], mask[0], mask.T, mask[None]):
        with pytest.raises(ValueError, match=r"^mask: expected"):
            masked_mean(values, other)


def test_losses_are_those_of_torch_and_of_transformers():
    flat = LOGITS.flatten(0, 1), TARGETS.flatten()
    mean = torch.nn.functional.cross_entropy(*flat)
    torch.testing.assert_close(sft_loss(LOGITS, TARGETS), mean)
    total = torch.nn.functional.cross_entropy(*flat, reduction="sum")
    torch.testing.assert_close(sft_loss(LOGITS, TARGETS, per=32), total / 32)
    rows = [torch.nn.functional.cross_entropy(*row) for row in zip(LOGITS, TARGETS, strict=True)]
    torch.testing.assert_close(sft_loss(LOGITS, TARGETS, per="sequence"), torch.stack(rows).mean())
    utils = pytest.importorskip("transformers.loss.loss_utils")
    theirs = utils.ForCausalLMLoss(LOGITS.float(), None, 11, shift_labels=TARGETS)
    torch.testing.assert_close(sft_loss(LOGITS.float(), TARGETS), theirs)


def test_log_probabilities_and_entropies_are_those_of_torch():
    for temperature in (1.0, 0.5, 2.0):
        distribution = torch.distributions.Categorical(logits=LOGITS / temperature)
        expected = distribution.log_prob(TARGETS.where(MASK, 0)).where(MASK, 0.0)
        found = response_log_probs(LOGITS, TARGETS, temperature=temperature)
        torch.testing.assert_close(found, expected)
        found = entropies(LOGITS, temperature=temperature)
        torch.testing.assert_close(found, distribution.entropy())
    uniform = entropies(torch.zeros(1, 1, 8))
    torch.testing.assert_close(uniform, torch.full((1, 1), math.log(8)))


def test_what_is_masked_leaks_neither_into_values_nor_into_gradients():
    for bad in (math.nan, math.inf, -math.inf):
        logits = LOGITS.clone()
        logits[~MASK] = bad
        for per in ("token", "sequence", 5.0):
            given, clean = logits.clone().requires_grad_(), LOGITS.clone().requires_grad_()
            loss, expected = sft_loss(given, TARGETS, per=per), sft_loss(clean, TARGETS, per=per)
            torch.testing.assert_close(loss, expected)
            (gradient,) = torch.autograd.grad(loss, given)
            torch.testing.assert_close(gradient, torch.autograd.grad(expected, clean)[0])


def test_a_row_without_targets_counts_for_nothing_and_a_batch_without_any_is_nan():
    targets = TARGETS.clone()
    targets[2] = -100
    logits = LOGITS.clone().requires_grad_()
    loss = sft_loss(logits, targets, per="sequence")
    torch.testing.assert_close(loss, sft_loss(LOGITS[:2], TARGETS[:2], per="sequence"))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all() and not gradient[2].any()
    nothing = torch.full_like(TARGETS, -100)
    assert sft_loss(LOGITS, nothing).isnan() and sft_loss(LOGITS, nothing, per="sequence").isnan()
    assert sft_loss(LOGITS, nothing, per=4.0) == 0
    assert not response_log_probs(LOGITS, nothing).any()


def test_large_logits_banned_tokens_and_half_precision():
    large = (LOGITS * 10 + 1e5).float()
    exact = response_log_probs(large.double(), TARGETS)
    torch.testing.assert_close(response_log_probs(large, TARGETS), exact.float())
    banned = LOGITS.clone()
    banned[..., 3:] = -math.inf
    banned.requires_grad_()
    found = entropies(banned)
    torch.testing.assert_close(found, entropies(LOGITS[..., :3]))
    (gradient,) = torch.autograd.grad(found.sum(), banned)
    assert gradient.isfinite().all()
    half = LOGITS.bfloat16()
    assert response_log_probs(half, TARGETS).dtype == entropies(half).dtype == torch.float32
    torch.testing.assert_close(
        response_log_probs(half, TARGETS), response_log_probs(half.float(), TARGETS)
    )


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, True])
def test_temperatures_and_divisors_out_of_range_are_named(value):
    for call in (entropies, lambda x, **o: response_log_probs(x, TARGETS, **o)):
        with pytest.raises(ValueError, match="temperature: expected a finite number above 0, got"):
            call(LOGITS, temperature=value)
    with pytest.raises(ValueError, match=r"per: expected 'token', 'sequence' or a number above 0"):
        sft_loss(LOGITS, TARGETS, per=value)
    with pytest.raises(ValueError, match="targets: expected -100, or ids below 11, got 11"):
        response_log_probs(LOGITS, torch.full_like(TARGETS, 11))


def test_the_trainer_takes_micro_batches_as_one_batch():
    examples = [Example((i, *range(i + 2)), (False, *[True] * (i + 2))) for i in range(1, 5)]
    weights = []
    for micro in (None, 1, 2):
        data = InstructionDataset(examples, 4, 8, 0)
        model = small_model().double()
        options: Any = {"optimizer": "sgd", "learning_rate": 0.1, "clip_norm": None}
        config = TrainingConfig(n_steps=2, batch_size=4, micro_batch_size=micro, **options)
        Trainer(model, data, config).train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[1], weights[0])
    torch.testing.assert_close(weights[2], weights[0])


def test_packed_rows_have_the_gradients_of_single_rows_with_documents_only():
    from llmbook.training import next_token_objective

    examples = [WORLD_CHAT.encode(TOKENIZER, CHAT), *numbered(3)]
    model = small_model().double()

    def gradient(rows: list[list[Example]], documents: bool) -> torch.Tensor:
        batch = instruction_batch(rows, 64, 0, documents=documents)
        total, count = next_token_objective(model, batch)
        found = torch.autograd.grad(total / count, list(model.parameters()))
        return torch.cat([g.flatten() for g in found])

    single = gradient([[example] for example in examples], True)
    torch.testing.assert_close(gradient([examples], True), single)
    assert (gradient([examples], False) - single).norm() > 0.01 * single.norm()


def test_a_template_of_another_family_is_data():
    turns = {"user": Turn("Q: ", "", "\n"), "assistant": Turn("A: ", "<|endoftext|>", "\n")}
    own = ChatTemplate("own", turns, ("<|endoftext|>",))
    assert own.render(CHAT) == "Q: Who is Mia?\nA: Mia is a fox.<|endoftext|>\n"
    assert np.sum(own.encode(TOKENIZER, CHAT).learned) == 1 + len(TOKENIZER.encode("Mia is a fox."))
