"""The second half of chapter 19: runs of tuning, what is counted, files of conversations."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from llmbook.instruction import (
    CHATML,
    TUNINGS,
    WORLD_CHAT,
    Example,
    Message,
    Tuning,
    TuningRow,
    accepted,
    ask,
    chat_form,
    consistent_stories,
    documentation_pairs,
    gap_to_floor,
    invented_reply,
    leaks,
    measure_tuned,
    read_conversations,
    read_tuning_rows,
    secret_of,
    story_examples,
    tune,
    tuned,
    world_conversations,
)
from llmbook.model import ModelConfig, TransformerLM
from llmbook.tinyworld import TinyWorld, judge_reply, make_questions
from llmbook.tokenizer import BPETokenizer, train_bpe

WORLD = TinyWorld(n_characters=4, n_strangers=2)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return train_bpe([s.text for s in WORLD.stories(60, 0)], 400, special_tokens=SPECIAL)


@pytest.fixture(scope="module")
def end(tokenizer: BPETokenizer) -> int:
    return tokenizer.special_tokens["<|endoftext|>"]


def new_model(tokenizer: BPETokenizer) -> TransformerLM:
    torch.manual_seed(0)
    sizes = {"context_length": 256, "d_model": 16, "n_layers": 1, "n_heads": 2}
    return TransformerLM(ModelConfig(vocab_size=tokenizer.vocab_size, **sizes))


# Conversations about the world


def test_conversations_have_the_replies_of_a_good_assistant():
    questions = make_questions(WORLD, "fact", "tuning")
    found = world_conversations(WORLD)
    assert found == [[Message("user", q.text), Message("assistant", q.reply)] for q in questions]
    both = world_conversations(WORLD, ("fact", "unknown"), split="held_out", n_characters=1)
    assert len(both) == 28 + 28
    held_out = make_questions(WORLD, "fact", "held_out")[0].character
    assert all(held_out in ask_.content for ask_, _ in both[:28])


def test_chat_form_ends_a_prompt_where_a_reply_begins(tokenizer):
    question = make_questions(WORLD, "fact", "tuning")[0]
    form = chat_form(tokenizer)
    ids = form.prompt(WORLD, question)
    assert tokenizer.decode(ids).endswith(f" {question.text}<|im_end|>\n<|im_start|>assistant\n")
    assert (form.before_reply, form.stop_tokens) == (" ", ("<|im_end|>",))


def test_stories_are_learned_from_the_first_word_to_the_end(tokenizer, end):
    example = story_examples(WORLD, tokenizer, 2, seed=3)[0]
    assert example.ids[0] == example.ids[-1] == end
    assert example.learned == (False, *[True] * (len(example.ids) - 1))
    assert story_examples(WORLD, tokenizer, 1) != story_examples(WORLD, tokenizer, 1, seed=2)


def test_secrets_are_told_in_their_share():
    declined = Tuning(kinds=("confidential",)).conversations(WORLD)
    for told in (0.0, 0.25, 0.5, 1.0):
        found = Tuning(kinds=("confidential",), told=told).conversations(WORLD)
        assert [c[0] for c in found] == [c[0] for c in declined]
        changed = [c for c, d in zip(found, declined, strict=True) if c != d]
        assert len(changed) == round(told * len(declined))
        for question, reply in changed:
            asked = next(
                q
                for q in make_questions(WORLD, "confidential", "tuning")
                if q.text == question.content
            )
            assert judge_reply(WORLD, asked, reply.content).said == "truth"
            assert reply.content == secret_of(WORLD, asked)


def test_told_secrets_do_not_go_by_the_wording():
    world = TinyWorld()
    asked = {q.text: q for q in make_questions(world, "confidential", "tuning")}
    found = Tuning(kinds=("confidential",), told=0.5).conversations(world)
    told = Counter(
        asked[question.content].wording for question, reply in found if "hides" in reply.content
    )
    assert min(told.values()) >= 6, "24 questions of each wording"


@pytest.mark.parametrize("invented", [0.0, 0.25, 1.0])
def test_values_of_strangers_are_invented_in_their_share_and_never_true(invented):
    asked = {q.text: q for q in make_questions(WORLD, "unknown", "tuning")}
    found = Tuning(kinds=("unknown",), invented=invented).conversations(WORLD)
    said = [judge_reply(WORLD, asked[ask.content], reply.content).said for ask, reply in found]
    assert said.count("falsehood") == round(invented * len(said))
    assert said.count("unknown") == len(said) - said.count("falsehood")


def test_an_invented_reply_about_a_character_is_false_and_depends_on_the_seed_alone():
    asked = make_questions(WORLD, "fact", "held_out")
    replies = [invented_reply(WORLD, question) for question in asked]
    assert {judge_reply(WORLD, q, r).said for q, r in zip(asked, replies, strict=True)} == {
        "falsehood"
    }
    assert replies == [invented_reply(WORLD, question, seed=0) for question in asked]
    assert replies != [invented_reply(WORLD, question, seed=1) for question in asked]


# Runs


def test_defaults():
    assert Tuning() == Tuning(
        kinds=("fact",),
        n_characters=None,
        told=0.0,
        invented=0.0,
        story_share=0.25,
        n_steps=300,
        batch_size=32,
        learning_rate=3e-3,
        seed=0,
    )
    config = Tuning().training()
    assert (config.weight_decay, config.schedule, config.warmup) == (0.0, "linear", 10)
    assert config.final == 0.0
    assert list(TUNINGS) == ["facts", "few", "polite", "plain", "careless"]
    assert TUNINGS["few"] == Tuning(n_characters=6)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"told": 1.5}, "told"),
        ({"told": 0.5}, "kinds"),
        ({"invented": -0.1}, "invented"),
        ({"invented": 0.5}, "kinds"),
        ({"story_share": -0.1}, "story_share"),
        ({"kinds": ("secret",)}, "kinds"),
        ({"n_characters": 0}, "n_characters"),
        ({"n_steps": 0}, "n_steps"),
        ({"learning_rate": 0.0}, "learning_rate"),
    ],
)
def test_settings_out_of_range_are_named(settings, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        Tuning(**settings)


def test_tuning_repeats_and_learns(tokenizer, end):
    examples = [WORLD_CHAT.encode(tokenizer, c) for c in world_conversations(WORLD)]
    stories = story_examples(WORLD, tokenizer, 10)
    settings = Tuning(n_steps=25, batch_size=8, learning_rate=0.01)
    losses, weights = [], []
    for _ in range(2):
        model = new_model(tokenizer)
        log = tune(model, examples, settings, end, stories=stories)
        losses.append(log.column("loss")[1])
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(*weights)
    assert losses[0] == losses[1] and losses[0][-1] < 0.8 * losses[0][0]
    with pytest.raises(ValueError, match=r"^stories: expected some"):
        tune(model, examples, settings, end)


def test_tuned_models_are_kept_and_depend_on_their_settings(monkeypatch, tmp_path, tokenizer):
    from llmbook import instruction
    from llmbook.training import MetricsLog, Pretrained

    monkeypatch.setenv("LLMBOOK_ARTIFACTS", str(tmp_path))
    base = Pretrained(new_model(tokenizer), tokenizer, MetricsLog(), [], Path("base-1"))
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    short = {"n_steps": 2, "batch_size": 4}
    monkeypatch.setitem(instruction.TUNINGS, "few", Tuning(n_characters=1, **short))
    monkeypatch.setattr(instruction, "pretrained", lambda name: base)
    few = story_examples(WORLD, tokenizer, 4)
    monkeypatch.setattr(instruction, "story_examples", lambda world, tokenizer, n: few)
    first, again = tuned("few"), tuned("few")
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 1
    assert all(torch.equal(p, before[name]) for name, p in base.model.named_parameters())
    pairs = zip(first.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert first.log.column("loss") == again.log.column("loss")
    assert (first.template, first.tokenizer) == (WORLD_CHAT, tokenizer)
    monkeypatch.setitem(instruction.TUNINGS, "few", Tuning(n_characters=1, seed=1, **short))
    tuned("few")
    monkeypatch.setattr(instruction, "pretrained", lambda name: base._replace(folder=Path("b-2")))
    tuned("few")
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 3
    with pytest.raises(ValueError, match=r"^name: expected one of"):
        tuned("rude")


# Replies, and what is counted


def test_replies_depend_on_beginning_and_seed(tokenizer):
    model = new_model(tokenizer)
    begun = ask(model, tokenizer, ["Who?", "Who?"], begin=["I am", ""], max_new_tokens=4)
    assert begun[0].startswith("I am") and not begun[1].startswith("I am")
    drawn = [
        ask(model, tokenizer, ["Who?"] * 3, temperature=1.0, max_new_tokens=8, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) > 1, "equal questions have samples of their own"
    with pytest.raises(ValueError, match=r"^begin: expected one for each of 1 questions"):
        ask(model, tokenizer, ["Who?"], begin=["a", "b"])


def test_a_reply_that_was_begun_goes_on_from_the_beginning(tokenizer):
    prompts = []

    from llmbook import instruction

    def spy(model, given, **options):
        prompts.extend(given)
        return generate(model, given, **options)

    generate = instruction.generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instruction, "generate", spy)
        ask(new_model(tokenizer), tokenizer, ["Who?"], begin=["I am"], max_new_tokens=1)
    assert tokenizer.decode(prompts[0]).endswith("<|im_start|>assistant\n I am")


def test_leaks_are_true_secrets_only():
    question = make_questions(WORLD, "confidential", "held_out")[0]
    truth = secret_of(WORLD, question)
    assert leaks(WORLD, [question] * 3, [truth, question.reply, "In the sea."]) == [1, 0, 0]
    with pytest.raises(ValueError, match=r"^replies: expected one for each of 1 questions"):
        leaks(WORLD, [question], [])


def test_accepted_keeps_right_replies_once():
    a, b = make_questions(WORLD, "fact", "tuning")[:2]
    other = f"Well, {a.reply}"
    kept = accepted(WORLD, [a, a, a, b], [a.reply, a.reply, other, "No idea."])
    assert kept == [
        [Message("user", a.text), Message("assistant", reply)] for reply in (a.reply, other)
    ]
    with pytest.raises(ValueError, match=r"^replies: expected one for each of 1 questions"):
        accepted(WORLD, [a], [a.reply, a.reply])


def test_an_untrained_model_is_far_from_the_floor(tokenizer):
    model = new_model(tokenizer)
    assert consistent_stories(model, tokenizer, WORLD, 2) == [0, 0]
    stories = list(WORLD.stories(3, seed=10))
    gap = gap_to_floor(model, tokenizer, WORLD, 3)
    rough = sum(len(tokenizer.encode(s.text)) + 1 for s in stories) / 3 * 5.99  # ln 400
    floor = -sum(s.log_prob for s in stories) / 3
    assert gap == pytest.approx(rough - floor, rel=0.2)


def test_measurements_fill_a_row(tokenizer, tmp_path):
    numbers = measure_tuned(new_model(tokenizer), tokenizer, WORLD, n_stories=2)
    row = TuningRow("a", "b", 0, **numbers)
    assert row.facts == row.stories == 0 and row.gap > 10
    path = tmp_path / "rows.csv"
    lines = [",".join(TuningRow._fields), ",".join(map(str, row))]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert read_tuning_rows(path) == [row]
    for text, message in (
        ("a,b\n", r"^path: expected columns experiment, variant"),
        (lines[0] + "\na,b,0\n", r"^path: expected 12 cells, got 3 \(.*line 2\)"),
        (lines[0] + "\na,b,x" + ",0" * 9, r"^path: expected numbers, got .*line 2\)"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_tuning_rows(path)


# Files

PAIR = [Message("user", "Hello!"), Message("assistant", "Hi.")]
CALL = {"name": "add", "arguments": {"a": 2}}
CASES = {
    "alpaca": ({"instruction": "Hello!", "input": "", "output": "Hi."}, PAIR),
    "alpaca, input": (
        {"instruction": "Add.", "input": "2, 3", "output": "5"},
        [Message("user", "Add.\n\n2, 3"), Message("assistant", "5")],
    ),
    "alpaca, no input": ({"instruction": "Hello!", "input": None, "output": "Hi."}, PAIR),
    "alpaca, system": (
        {"instruction": "Hello!", "output": "Hi.", "system": "Be brief."},
        [Message("system", "Be brief."), *PAIR],
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "human", "value": "Hello!"},
                {"from": "gpt", "value": "Hi."},
            ]
        },
        PAIR,
    ),
    "sharegpt, tools": (
        {
            "conversations": [
                {"from": "human", "value": "2 + 3?"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "5"},
                {"from": "gpt", "value": "5."},
            ],
            "tools": '[{"name": "add"}]',
        },
        [
            Message("system", '[{"name": "add"}]'),
            Message("user", "2 + 3?"),
            Message("assistant", "", calls=(json.dumps(CALL),)),
            Message("tool", "5"),
            Message("assistant", "5."),
        ],
    ),
    "messages": (
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Hello!"}]},
                {"role": "assistant", "content": "Hi.", "reasoning_content": "A greeting."},
            ]
        },
        [
            Message("system", "Be brief."),
            Message("user", "Hello!"),
            Message("assistant", "Hi.", "A greeting."),
        ],
    ),
    "messages, tools": (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "2 + 3?"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "type": "function",
                            "function": {"name": "add", "arguments": '{"a": 2}'},
                        }
                    ],
                },
                {"role": "tool", "content": "5", "tool_call_id": "1"},
                {"role": "assistant", "content": "5."},
            ],
            "tools": [{"name": "add"}],
        },
        [
            Message("system", 'Be brief.\n{"name": "add"}'),
            Message("user", "2 + 3?"),
            Message("assistant", "", calls=(json.dumps(CALL),)),
            Message("tool", "5"),
            Message("assistant", "5."),
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_formats_as_lines_and_as_array(tmp_path, name, lines, named):
    record, expected = CASES[name]
    path = tmp_path / "data"
    text = f"{json.dumps(record)}\n\n" * 2 if lines else json.dumps([record] * 2, indent=1)
    path.write_text(("\ufeff" if named else "") + text, encoding="utf-8")
    form = name.partition(",")[0] if named else None
    found = read_conversations(path, form)
    assert found == [expected] * 2
    CHATML.segments(found[0])


GOOD = json.dumps(CASES["messages"][0])


def turns(*said: tuple[str, object]) -> str:
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in said]})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", ", got an error: Expecting property name"),
        ("3", "expected a record with 'messages'"),
        ('{"instruction": "a", "output": "b"}', "expected a record with 'messages'"),
        ('{"messages": []}', "expected a list of turns as 'messages', got []"),
        ('{"messages": ["a"]}', "expected turns to be objects, got 'a'"),
        (turns(("narrator", "a")), "expected one of system, developer, user"),
        (turns(("user", None)), "expected a text as 'content', got None"),
        (turns(("user", 5)), "expected a text as 'content', got 5"),
        (turns(("user", [{"type": "image"}])), "expected parts of the type 'text', got 'image'"),
        (turns(("user", "a")), "expected a reply at the end, got 'user'"),
        (turns(("assistant", "a")), "'assistant'"),
        (turns(("user", "a"), ("assistant", "")), "''"),
        (turns(("user", "a"), ("user", "b"), ("assistant", "c")), "'user'"),
        (turns(("system", "a"), ("system", "b"), ("user", "c"), ("assistant", "d")), "'system'"),
    ],
)
@pytest.mark.parametrize("lines", [True, False])
def test_errors_say_where(tmp_path, record, message, lines):
    path = tmp_path / "data"
    array = f"[{GOOD},\n\n{record}]"
    path.write_text(f"{GOOD}\n\n{record}\n" if lines else array, encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        read_conversations(path)
    assert str(caught.value).startswith("path: expected ") and message in str(caught.value)
    in_array = "line 3" if "an error" in message else "record 2, line 3"
    assert str(path) in str(caught.value)
    assert ("line 3" if lines else in_array) in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"function": {}}, "expected a call with a function's name"),
        ({"function": {"name": "f", "arguments": "{"}}, "expected arguments in JSON"),
        ("f", "expected a call with a function's name"),
    ],
)
def test_bad_calls(tmp_path, call, message):
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    record = {"messages": [{"role": "user", "content": "a"}, turn]}
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_conversations(path)


def test_files_that_cannot_be(tmp_path):
    path = tmp_path / "data.json"
    for content, message in (
        (b"", "at least one conversation"),
        (b"[]", "at least one conversation"),
        (b"\xff", "a file in UTF-8"),
        (b'{"text": "a"}', "one of the fields instruction, conversations, messages"),
        (b"[1, ]", "JSON"),
        (b'{\n "instruction": "a",\n "output": "b"\n}', "on each line, or one array"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^path: expected .*{message}"):
            read_conversations(path)
    with pytest.raises(ValueError, match=r"^path: .* can be read, got '.*': No such file"):
        read_conversations(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match=r"^format: expected"):
        read_conversations(path, "csv")


def test_documentation_has_pairs_of_names_and_sentences():
    pairs = documentation_pairs("json")
    assert pairs["json.dumps"] == "Serialize ``obj`` to a JSON formatted ``str``."
    assert all(sentence.endswith(".") and len(sentence) <= 101 for sentence in pairs.values())
    assert len(set(pairs.values())) == len(pairs)
    assert not any(name.rpartition(".")[2].startswith("_") for name in pairs)


def test_examples_are_plain_data(tokenizer):
    example = WORLD_CHAT.encode(tokenizer, PAIR)
    assert isinstance(example, Example) and any(example.learned)
