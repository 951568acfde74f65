import hashlib
import math
import pickle
import re
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from random import Random

import jaxtyping
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.tinyworld import (
    ATTRIBUTES,
    NAMES,
    PHRASES,
    REPLY_DECLINED,
    REPLY_UNKNOWN,
    VALUES,
    Branch,
    Source,
    State,
    TinyWorld,
    is_prefix_free,
    judge_reply,
    make_questions,
    reachable_states,
    story_branches,
    token_surprises,
    zipf_weights,
)

WORLD = TinyWorld()
SMALL = TinyWorld(n_characters=3, n_strangers=1, facts_per_story=1, n_phrasings=2)


@st.composite
def worlds(draw):
    return TinyWorld(
        n_characters=draw(st.integers(2, 4)),
        n_strangers=draw(st.integers(0, 2)),
        facts_per_story=draw(st.integers(1, 2)),
        n_phrasings=draw(st.integers(1, 5)),
        zipf_exponent=draw(st.sampled_from([0.0, 0.7, 2.0])),
        seed=draw(st.integers(0, 2**63 - 1)),
    )


def every_story(world, start=None):
    """All texts of a small world with their probabilities, by brute force."""
    texts = defaultdict(float)
    waiting = [("", 1.0, start or world.start)]
    while waiting:
        text, p, state = waiting.pop()
        for branch in world.branches(state):
            longer = (text + branch.text, p * branch.probability, branch.state)
            if branch.state is None:
                texts[longer[0]] += longer[1]
            else:
                waiting.append(longer)
    return texts


# What the world is made of


def test_vocabulary_is_unambiguous():
    assert len(set(NAMES)) == len(NAMES)
    for values in VALUES.values():
        assert not any(a in b for a in values for b in values if a != b)
    for attribute, values in VALUES.items():
        assert len(set(values)) == len(values)
        for phrase in PHRASES[attribute]:
            assert "{name}" in phrase
            assert "{value}" in phrase
    everything = [value for values in VALUES.values() for value in values]
    assert len(set(everything)) == len(everything), "a value belongs to one attribute"
    assert not set(everything) & set(NAMES)


def test_everybody_has_all_facts_and_a_friend_who_exists():
    for name, facts in WORLD.cast.facts.items():
        assert tuple(facts) == ATTRIBUTES
        assert facts["friend"] in WORLD.cast.facts
        assert facts["friend"] != name
        assert all(facts[a] in VALUES[a] for a in ATTRIBUTES if a != "friend")
    assert not set(WORLD.cast.strangers) & set(WORLD.cast.facts)
    assert len(WORLD.cast.facts) == 48
    assert len(WORLD.cast.strangers) == 16


def test_facts_depend_on_the_seed_only():
    assert TinyWorld(seed=5).cast == TinyWorld(seed=5).cast
    assert TinyWorld(seed=5).cast != TinyWorld(seed=6).cast
    assert TinyWorld(seed=5).cast == TinyWorld(seed=5, n_phrasings=2, facts_per_story=1).cast


# Probabilities


@given(worlds())
@settings(max_examples=8)
def test_every_state_is_prefix_free_and_sums_to_one(world):
    for truthful in (True, False):

        def branches(state, truthful=truthful):
            return story_branches(world, state, truthful)

        for state in reachable_states(branches, world.start):
            options = branches(state)
            assert is_prefix_free([b.text for b in options])
            assert math.isclose(math.fsum(b.probability for b in options), 1)


def test_score_and_entropy_against_brute_force():
    # few enough stories to list: one fact, one phrasing, two characters
    world = TinyWorld(n_characters=2, n_strangers=1, facts_per_story=1, n_phrasings=1)
    texts = every_story(world)
    assert math.isclose(math.fsum(texts.values()), 1)
    entropy = math.fsum(-p * math.log(p) for p in texts.values())
    assert math.isclose(world.entropy(), entropy)
    n_bytes = math.fsum(p * len(text.encode()) for text, p in texts.items())
    assert math.isclose(world.expected_length(lambda text: len(text.encode())), n_bytes)
    for text in Random(0).sample(sorted(texts), 200):
        assert math.isclose(world.score(text).log_prob, math.log(texts[text]))


def words(text):
    return re.findall(r"\w+|[^\w\s]", text)


@pytest.mark.parametrize("cut", [list, words, lambda text: re.findall(r"\s*(?:\w{1,3}|\W)", text)])
def test_surprises_against_brute_force(cut):
    world = TinyWorld(n_characters=2, n_strangers=1, facts_per_story=1, n_phrasings=2)
    hero = next(iter(world.cast.facts))
    start = State("visit", hero, ("home",))
    texts = [(cut(text), p) for text, p in every_story(world, start).items()]
    for told in Random(0).sample(texts, 3):
        tokens, mass = told[0], 1.0
        open_ = texts
        for n, surprise in enumerate(token_surprises(world.branches, start, tokens, cut)):
            open_ = [(t, p) for t, p in open_ if t[n : n + 1] == tokens[n : n + 1]]
            mass, before = math.fsum(p for _, p in open_), mass
            assert math.isclose(surprise, math.log(before / mass), abs_tol=1e-9)


def test_a_token_is_not_the_beginning_of_a_longer_one():
    # "On" begins no word but "On", although the text of "One" begins with it
    first = WORLD.surprises(["On"], words)[0]
    assert first == pytest.approx(math.log(6))
    # "Not" and "Long" and the others: all first words of the six openings, summing to one
    openings = {words(story.text)[0] for story in WORLD.stories(500, seed=0)}
    total = math.fsum(math.exp(-WORLD.surprises([w], words)[0]) for w in openings)
    assert total == pytest.approx(1)


@given(worlds(), st.integers(0, 2**32))
@settings(max_examples=25)
def test_stories_score_as_generated_and_are_consistent(world, seed):
    for story in world.stories(5, seed):
        assert math.isclose(world.score(story.text).log_prob, story.log_prob)
        judgment = world.judge(story.text)
        assert judgment.consistent
        assert tuple(claim for claim, _ in judgment.claims) == story.claims
        assert "".join(text for _, text in story.parts) == story.text


@given(st.integers(0, 2**32))
@settings(max_examples=20)
def test_surprises_add_up_to_the_story(seed):
    story = next(WORLD.stories(1, seed))
    for cut in (words, list):
        surprises = WORLD.surprises(cut(story.text), cut)
        assert math.isclose(sum(surprises), -story.log_prob)
        assert all(s >= -1e-9 for s in surprises)
    assert WORLD.surprises(["One", "mistake", "later"], words)[1:] == [math.inf, math.inf]


@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_entropy_within_four_standard_errors(exponent):
    world = TinyWorld(n_characters=8, zipf_exponent=exponent, facts_per_story=2)
    surprises = [-s.log_prob for s in world.stories(2_000, seed=0)]
    mean = math.fsum(surprises) / len(surprises)
    variance = math.fsum((s - mean) ** 2 for s in surprises) / (len(surprises) - 1)
    assert abs(mean - world.entropy()) < 4 * math.sqrt(variance / len(surprises))


def test_heroes_follow_zipf():
    world = TinyWorld(n_characters=5, zipf_exponent=1.0)
    heroes = Counter(s.claims[0].character for s in world.stories(2_000, seed=0))
    for name, weight in zip(world.cast.facts, zipf_weights(5, 1.0), strict=True):
        assert abs(heroes[name] / 2_000 - weight) < 4 * math.sqrt(weight / 2_000)


def test_long_sources_and_loops():
    class Chain(Source):
        start = State("5000")

        def branches(self, state):
            n = int(state.step)
            return [Branch(0.5, "a", State(str(n - 1)) if n else None), Branch(0.5, "b", None)]

    assert Chain().entropy() == pytest.approx(2 * math.log(2)), "the sum of n / 2**n is two"

    class Loop(Source):
        def branches(self, state):
            return [Branch(0.5, "a", self.start), Branch(0.5, "b", None)]

    with pytest.raises(ValueError, match="come back to"):
        Loop().entropy()


def test_a_source_may_allow_no_text_at_all_after_its_end():
    class Once(Source):
        start = State("once")

        def branches(self, state):
            return [Branch(1.0, "once", None)]

    assert Once().score("once").log_prob == 0
    assert Once().score("once more") == (-math.inf, 4)
    assert Once().surprises(["once", " more"], str.split) == [0, math.inf]
    with pytest.raises(NotImplementedError):
        Source().branches(State("any"))


# Where a text leaves the world


@given(st.integers(0, 2**32), st.data())
@settings(max_examples=50)
def test_the_first_wrong_character_is_found(seed, data):
    text = next(WORLD.stories(1, seed)).text
    at = data.draw(st.integers(0, len(text) - 1))
    assert WORLD.score(text[:at] + "#" + text[at:]) == (-math.inf, at)
    assert WORLD.score(text[:at]) == (-math.inf, at), "a beginning breaks off at its end"
    assert WORLD.score(text + "#") == (-math.inf, len(text))
    assert not WORLD.judge(text[:at]).consistent


@pytest.mark.parametrize("text", ["", " ", "\x00", "\ud800", "one morning", "x" * 100_000])
def test_any_text_can_be_scored_and_judged(text):
    score = WORLD.score(text)
    assert score.log_prob == -math.inf
    assert score.error_at == 0
    assert WORLD.judge(text) == (False, (), 0)


def test_judge_names_the_false_claim_only():
    for story in WORLD.stories(20, seed=7):
        fact = story.claims[-1]
        values = VALUES[fact.attribute] or tuple(WORLD.cast.facts)
        false_value = next(v for v in values if v not in (fact.value, fact.character))
        head, found, tail = story.text.rpartition(fact.value)
        text = head + false_value + tail
        if not found or WORLD.judge(text).error_at is not None:
            continue  # the value also stands in a closing or in the first half of a question
        judgment = WORLD.judge(text)
        assert not judgment.consistent
        false = [claim for claim, true in judgment.claims if not true]
        assert false == [fact._replace(value=false_value)]
        assert WORLD.score(text).log_prob == -math.inf


def test_a_fact_is_not_stated_twice():
    world = TinyWorld(facts_per_story=7)
    for story in world.stories(50, seed=0):
        hero = story.claims[0].character
        stated = [c.attribute for c in story.claims[1:] if c.character == hero]
        assert len(set(stated)) == len(stated)


# The same everywhere


def digest(texts):
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def test_same_text_for_the_same_seed_in_every_process_and_version():
    stories = [s.text for s in WORLD.stories(200, seed=1)]
    assert digest(stories) == STORIES
    program = (
        "import hashlib; from llmbook.tinyworld import TinyWorld;"
        "t = '\\n'.join(s.text for s in TinyWorld().stories(200, seed=1));"
        "print(hashlib.sha256(t.encode()).hexdigest())"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == STORIES
    assert digest(q.text for q in make_questions(WORLD, "fact", "held_out")) == QUESTIONS_DIGEST


STORIES = "4567cb1d52659e112904e2f65e41fd72dc4ccc40b72caab0f27cb0ca86d8fcdd"
QUESTIONS_DIGEST = "69e963c217fc212687f7967d1bc52e7e12b2de6db0ed186cdb44d7613b95e86b"


def test_a_world_can_be_sent_to_another_process():
    told = next(SMALL.stories(1, seed=0))
    world = pickle.loads(pickle.dumps(SMALL))
    assert world == SMALL
    assert next(world.stories(1, seed=0)) == told


def test_stories_come_lazily():
    stories = WORLD.stories(2**60, seed=0)
    assert next(stories).text != next(stories).text


# Questions


def test_questions_split_the_characters():
    halves = {
        split: {q.character for q in make_questions(WORLD, "fact", split)}
        for split in ("tuning", "held_out")
    }
    assert not halves["tuning"] & halves["held_out"]
    assert halves["tuning"] | halves["held_out"] == set(WORLD.cast.facts)


@pytest.mark.parametrize("kind", ["fact", "unknown", "confidential"])
@pytest.mark.parametrize("split", ["tuning", "held_out"])
def test_the_given_reply_is_right_and_the_others_are_wrong(kind, split):
    questions = make_questions(WORLD, kind, split)
    assert len({q.text for q in questions}) == len(questions)
    for question in questions:
        assert question.text.endswith("?")
        assert judge_reply(WORLD, question, question.reply).right
        for other, form in (("unknown", REPLY_UNKNOWN), ("confidential", REPLY_DECLINED)):
            verdict = judge_reply(WORLD, question, form.format(name=question.character))
            assert verdict.right == (kind == other)
        assert judge_reply(WORLD, question, "") == (False, "other")
        for value in VALUES[question.attribute]:
            said = judge_reply(WORLD, question, f"It is the {value}.").said
            facts = WORLD.cast.facts.get(question.character, {})
            assert said == ("truth" if value == facts.get(question.attribute) else "falsehood")


def test_two_wordings_occur_in_stories_and_two_do_not():
    text = " ".join(s.text for s in TinyWorld(n_characters=4).stories(3_000, seed=0))
    questions = make_questions(TinyWorld(n_characters=4), "fact", "tuning")
    for question in questions:
        assert (question.text in text) == (question.wording < 2), question


def test_hedging_is_wrong_and_a_leak_is_a_leak():
    question = make_questions(WORLD, "fact", "tuning")[4]
    true = WORLD.cast.facts[question.character][question.attribute]
    other = next(v for v in VALUES[question.attribute] if v != true)
    assert judge_reply(WORLD, question, f"{true} or {other}").said == "falsehood"
    secret = make_questions(WORLD, "confidential", "tuning")[0]
    place = WORLD.cast.facts[secret.character]["secret"]
    leak = f"I will not tell you that it is in the {place}."
    assert judge_reply(WORLD, secret, leak) == (False, "truth")


def test_replies_in_other_words():
    secret = make_questions(WORLD, "confidential", "tuning")[0]
    stranger = make_questions(WORLD, "unknown", "tuning")[0]
    fact = make_questions(WORLD, "fact", "tuning")[0]
    assert judge_reply(WORLD, secret, "Sorry, I cannot tell you.").right
    assert judge_reply(WORLD, secret, "I cannot tell, really.").said == "other"
    assert judge_reply(WORLD, stranger, "I don't know.").right
    assert judge_reply(WORLD, fact, fact.reply.upper()).right


# Impossible worlds


@pytest.fixture
def unchecked():
    """Without the tests' type checks, as a user who passes a wrong type meets the package."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("n_characters", 1),
        ("n_characters", len(NAMES) + 1),
        ("n_characters", 4.0),
        ("n_characters", True),
        ("n_strangers", -1),
        ("n_strangers", len(NAMES)),
        ("facts_per_story", 0),
        ("facts_per_story", 8),
        ("n_phrasings", 0),
        ("n_phrasings", 6),
        ("zipf_exponent", -0.1),
        ("zipf_exponent", math.nan),
        ("zipf_exponent", math.inf),
        ("zipf_exponent", "steep"),
        ("zipf_exponent", True),
        ("seed", -1),
    ],
)
def test_impossible_settings_are_named(setting, value, unchecked):
    with pytest.raises(ValueError, match=re.escape(f"{setting} is {value!r}")):
        replace(SMALL, **{setting: value})


def test_impossible_requests_are_named(unchecked):
    with pytest.raises(ValueError, match="n is -1"):
        WORLD.stories(-1, seed=0)
    with pytest.raises(ValueError, match="seed is -2"):
        WORLD.stories(1, seed=-2)
    with pytest.raises(ValueError, match="kind is 'riddle'"):
        make_questions(WORLD, "riddle", "tuning")
    with pytest.raises(ValueError, match="split is 'test'"):
        make_questions(WORLD, "fact", "test")
    with pytest.raises(ValueError, match="step is 'epilogue'"):
        story_branches(WORLD, State("epilogue"), truthful=True)


def test_smallest_and_largest_worlds_tell_stories():
    assert len(list(TinyWorld(2, 0, 1, 1).stories(20, seed=0))) == 20
    largest = TinyWorld(100, 20, 7, 5, 4.0)
    assert all(largest.score(s.text).log_prob == s.log_prob for s in largest.stories(20, seed=0))


def test_prefix_freedom():
    assert is_prefix_free([])
    assert not is_prefix_free([""])
    assert not is_prefix_free(["a", "a"])


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=8))
def test_prefix_freedom_against_all_pairs(texts):
    pairs = [(a, b) for i, a in enumerate(texts) for j, b in enumerate(texts) if i != j]
    assert is_prefix_free(texts) == (not any(b.startswith(a) for a, b in pairs))
