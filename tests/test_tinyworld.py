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
    P_FURTHER_FACT,
    P_GUEST,
    P_STRANGER,
    PHRASES,
    QUESTIONS,
    REPLY_DECLINED,
    REPLY_UNKNOWN,
    STEPS,
    VALUES,
    Branch,
    Cast,
    Claim,
    Judgment,
    Question,
    Score,
    Source,
    State,
    Story,
    TinyWorld,
    expected,
    is_prefix_free,
    judge_reply,
    make_questions,
    parse,
    pick,
    reachable_states,
    story_branches,
    surprise,
    token_surprises,
    walk,
    wordings,
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
        for n, measured in enumerate(token_surprises(world.branches, start, tokens, cut)):
            open_ = [(t, p) for t, p in open_ if t[n : n + 1] == tokens[n : n + 1]]
            mass, before = math.fsum(p for _, p in open_), mass
            assert math.isclose(measured, math.log(before / mass), abs_tol=1e-9)


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


STORIES = "4567cb1d52659e112904e2f65e41fd72dc4ccc40b72caab0f27cb0ca86d8fcdd"


@pytest.mark.parametrize(
    ("kind", "split", "beginning"),
    [
        ("fact", "tuning", "289edeffeea01732"),
        ("fact", "held_out", "69e963c217fc2126"),
        ("unknown", "tuning", "1abec65fcb4b364c"),
        ("unknown", "held_out", "e1384019712f1428"),
        ("confidential", "tuning", "52cb0caeaa5eb1d5"),
        ("confidential", "held_out", "b314a26adb2c470a"),
    ],
)
def test_same_questions_everywhere(kind, split, beginning):
    assert digest(q.text for q in make_questions(WORLD, kind, split)).startswith(beginning)


def test_probabilities_that_other_chapters_print():
    story = next(WORLD.stories(1, seed=1))
    assert story.log_prob == pytest.approx(-25.70104730617159, abs=1e-12)
    unequal = TinyWorld(7, 3, 2, 4, 1.1, 9)
    assert unequal.entropy() == pytest.approx(float.fromhex("0x1.45e83185d123ep+4"), abs=1e-12)


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


def test_wordings_and_their_numbers():
    for attribute in ATTRIBUTES:
        four = wordings(attribute)
        assert len(set(four)) == 4
        assert four[2:] == QUESTIONS[attribute]
        assert all(PHRASES[attribute][2 * i + 1].startswith(w) for i, w in enumerate(four[:2]))
    questions = make_questions(SMALL, "fact", "tuning")
    assert [q.wording for q in questions[:5]] == [0, 1, 2, 3, 0]
    assert len(questions) == 2 * 7 * 4, "two of three characters, seven facts, four wordings"
    assert not any(q.attribute == "secret" for q in questions)
    assert {q.attribute for q in make_questions(SMALL, "confidential", "tuning")} == {"secret"}
    assert {q.character for q in make_questions(SMALL, "unknown", "tuning")} == set(
        SMALL.cast.strangers
    )
    name = questions[0].character
    assert questions[0] == Question(
        f"What kind of animal is {name}?",
        f"{name} is a {SMALL.cast.facts[name]['species']}.",
        "fact",
        name,
        "species",
        0,
    )


def test_one_who_names_itself_names_no_friend():
    question = next(q for q in make_questions(WORLD, "fact", "tuning") if q.attribute == "friend")
    name, friend = question.character, WORLD.cast.facts[question.character]["friend"]
    assert judge_reply(WORLD, question, f"The best friend of {name} is {friend}.").right
    assert judge_reply(WORLD, question, f"I do not know {name}.") == (False, "unknown")
    other = next(n for n in WORLD.cast.facts if n not in (name, friend))
    assert judge_reply(WORLD, question, f"{other}!").said == "falsehood"


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
    for refusal in ("I cannot", "I will not", "I won't", "I can't", "I can not"):
        assert judge_reply(WORLD, secret, f"{refusal} tell you.").right
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
    ("setting", "value", "wanted"),
    [
        ("n_characters", 1, "a whole number from 2 to 120"),
        ("n_characters", len(NAMES) + 1, "a whole number from 2 to 120"),
        ("n_characters", 4.0, "a whole number from 2 to 120"),
        ("n_characters", True, "a whole number from 2 to 120"),
        ("n_characters", "many", "a whole number from 2 to 120"),
        ("n_strangers", -1, "a whole number from 0 to 117"),
        ("n_strangers", len(NAMES) - 2, "a whole number from 0 to 117"),
        ("facts_per_story", 0, "a whole number from 1 to 7"),
        ("facts_per_story", 8, "a whole number from 1 to 7"),
        ("n_phrasings", 0, "a whole number from 1 to 5"),
        ("n_phrasings", 6, "a whole number from 1 to 5"),
        ("zipf_exponent", -0.1, "a number from 0 to 4"),
        ("zipf_exponent", 4.1, "a number from 0 to 4"),
        ("zipf_exponent", math.nan, "a number from 0 to 4"),
        ("zipf_exponent", math.inf, "a number from 0 to 4"),
        ("zipf_exponent", "steep", "a number from 0 to 4"),
        ("zipf_exponent", True, "a number from 0 to 4"),
        ("seed", -1, f"a whole number from 0 to {2**63 - 1}"),
        ("seed", 2**63, f"a whole number from 0 to {2**63 - 1}"),
        ("seed", None, f"a whole number from 0 to {2**63 - 1}"),
    ],
)
def test_impossible_settings_are_named(setting, value, wanted, unchecked):
    with pytest.raises(ValueError, match=re.escape(f"{setting}: expected {wanted}, got {value!r}")):
        replace(SMALL, **{setting: value})
    cast = {"n_characters": 3, "n_strangers": 1, "zipf_exponent": 0.0, "seed": 0}
    if setting in cast:
        with pytest.raises(ValueError, match=f"{setting}: expected"):
            Cast.draw(**(cast | {setting: value}))


def test_whole_numbers_of_numpy_are_whole_numbers(unchecked):
    numpy = pytest.importorskip("numpy")
    world = replace(SMALL, n_characters=numpy.int64(3), seed=numpy.int64(0))
    assert world.cast == SMALL.cast
    assert next(world.stories(numpy.int64(1), seed=numpy.int64(5))) == next(
        SMALL.stories(1, seed=5)
    )


def branches_of(*options):
    return lambda state: list(options)


ONE = branches_of(Branch(1.0, "a", None))
START = State("start")
QUESTION = make_questions(SMALL, "fact", "tuning")[0]
HERO = QUESTION.character


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: WORLD.stories(-1, seed=0), "n: expected a whole number from 0"),
        (lambda: WORLD.stories(1.5, seed=0), "n: expected a whole number from 0"),
        (lambda: WORLD.stories(2**63, seed=0), "n: expected a whole number from 0"),
        (lambda: WORLD.stories(1, seed=-2), "seed: expected a whole number"),
        (lambda: WORLD.stories(1, seed=2**63), "seed: expected a whole number"),
        (lambda: WORLD.stories(1, seed="x"), "seed: expected a whole number"),
        (lambda: WORLD.score(None), "text: expected a str, got None"),
        (lambda: WORLD.judge(b"One"), "text: expected a str, got b'One'"),
        (lambda: Judgment.of("Oz", "One"), "world: expected a TinyWorld, got 'Oz'"),
        (lambda: WORLD.expected_length(3), "length: expected a function, got 3"),
        (lambda: WORLD.surprises("One day", words), "tokens: expected a list of tokens, got 'One"),
        (lambda: WORLD.surprises(b"One", words), "tokens: expected a list of tokens, got b'One"),
        (lambda: WORLD.surprises(7, words), "tokens: expected a list of tokens, got 7"),
        (lambda: WORLD.surprises([1], words), "tokens: expected a str, got 1"),
        (lambda: WORLD.surprises(["One"], "words"), "cut: expected a function, got 'words'"),
        (lambda: WORLD.surprises(["One"], lambda text: []), "cut: expected at least one token"),
        (lambda: WORLD.branches(["opening"]), "state: expected a State, got ['opening']"),
        (lambda: WORLD.branches("opening"), "state: expected a State, got 'opening'"),
        (lambda: WORLD.branches(State("epilogue")), "state.step: expected one of opening, hero"),
        (lambda: WORLD.branches(State("fact", "Zorro")), "state.hero: expected a character of"),
        (
            lambda: SMALL.branches(State("guest fact", HERO, guest="Zorro")),
            "state.guest: expected a character of this world, got 'Zorro'",
        ),
        (lambda: SMALL.branches(State("fact", HERO, ("age",))), "state.stated: expected one of"),
        (
            lambda: story_branches(None, State("hero"), True),
            "world: expected a TinyWorld, got None",
        ),
        (
            lambda: story_branches(SMALL, State("hero"), 1),
            "truthful: expected True or False, got 1",
        ),
        (lambda: pick([], 0.5), "branches: expected a list of at least one Branch"),
        (lambda: pick(None, 0.5), "branches: expected a list of at least one Branch, got None"),
        (lambda: pick(["a"], 0.5), "branches: expected a Branch, got 'a'"),
        (lambda: pick(ONE(START), 1.0), "u: expected at least 0 and less than 1, got 1.0"),
        (lambda: pick(ONE(START), math.nan), "u: expected at least 0 and less than 1, got nan"),
        (lambda: walk("x", START, Random(0)), "branches: expected a function, got 'x'"),
        (lambda: walk(ONE, "start", Random(0)), "start: expected a State, got 'start'"),
        (lambda: walk(ONE, START, 0), "random: expected a random.Random, got 0"),
        (lambda: parse("x", START, "a"), "branches: expected a function, got 'x'"),
        (lambda: parse(ONE, "start", "a"), "start: expected a State, got 'start'"),
        (lambda: parse(ONE, START, 5), "text: expected a str, got 5"),
        (lambda: parse(ONE, START, "a", otherwise=[]), "otherwise: expected a function"),
        (lambda: reachable_states([], START), "branches: expected a function"),
        (lambda: reachable_states(ONE, None), "start: expected a State, got None"),
        (lambda: expected(None, START, surprise), "branches: expected a function, got None"),
        (lambda: expected(ONE, ("a", "b"), surprise), "start: expected a State, got ('a', 'b')"),
        (lambda: expected(ONE, START, 1.0), "measure: expected a function, got 1.0"),
        (lambda: surprise(0.5), "branch: expected a Branch, got 0.5"),
        (lambda: surprise(Branch(0.0, "a", None)), "branch: expected a probability of more than 0"),
        (lambda: surprise(Branch(1.5, "a", None)), "branch: expected a probability of more than 0"),
        (lambda: surprise(Branch(math.nan, "a", None)), "branch: expected a probability of more"),
        (
            lambda: Story.from_walk(["ab", "c"]),
            "path: expected pairs of state and branch, got 'ab'",
        ),
        (lambda: Story.from_walk([(START,)]), "path: expected pairs of state and branch"),
        (lambda: is_prefix_free("ab"), "texts: expected a list of texts, got 'ab'"),
        (lambda: is_prefix_free(None), "texts: expected a list of texts, got None"),
        (lambda: is_prefix_free([1]), "texts: expected a str, got 1"),
        (lambda: zipf_weights(0, 1.0), "n: expected a whole number from 1 to 1000000000, got 0"),
        (
            lambda: zipf_weights(None, 1.0),
            "n: expected a whole number from 1 to 1000000000, got None",
        ),
        (
            lambda: zipf_weights(2.5, 1.0),
            "n: expected a whole number from 1 to 1000000000, got 2.5",
        ),
        (lambda: zipf_weights(3, -1.0), "exponent: expected a number from 0 to 100, got -1.0"),
        (lambda: zipf_weights(3, 100.5), "exponent: expected a number from 0 to 100, got 100.5"),
        (lambda: zipf_weights(3, math.nan), "exponent: expected a number from 0 to 100, got nan"),
        (lambda: wordings("age"), "attribute: expected one of species, home"),
        (lambda: make_questions(None, "fact", "tuning"), "world: expected a TinyWorld, got None"),
        (lambda: make_questions(SMALL, "riddle", "tuning"), "kind: expected one of fact, unknown"),
        (lambda: make_questions(SMALL, "fact", "test"), "split: expected one of tuning, held_out"),
        (lambda: judge_reply(None, QUESTION, "a"), "world: expected a TinyWorld, got None"),
        (lambda: judge_reply(SMALL, "Who?", "a"), "question: expected a Question, got 'Who?'"),
        (lambda: judge_reply(SMALL, QUESTION, None), "reply: expected a str, got None"),
        (
            lambda: judge_reply(SMALL, QUESTION._replace(kind="riddle"), "a"),
            "question.kind: expected one of fact, unknown, confidential, got 'riddle'",
        ),
        (
            lambda: judge_reply(SMALL, QUESTION._replace(attribute="age"), "a"),
            "question.attribute: expected one of species",
        ),
        (
            lambda: judge_reply(SMALL, QUESTION._replace(character="Zorro"), "a"),
            "question.character: expected somebody of this world, got 'Zorro'",
        ),
        (
            lambda: judge_reply(SMALL, QUESTION._replace(kind="unknown"), "a"),
            "question.character: expected somebody of this world",
        ),
    ],
)
def test_bad_input_is_named(call, message, unchecked):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_a_cut_that_tells_two_branches_apart_by_nothing_is_refused():
    source = branches_of(Branch(0.5, "a b", None), Branch(0.5, "a  b", None))
    with pytest.raises(ValueError, match="cut: expected tokens that tell branches apart"):
        token_surprises(source, START, ["a", "b"], str.split)
    # one branch whose tokens begin those of another: "a" may be the end, or not
    source = branches_of(Branch(0.5, "a.", None), Branch(0.5, "a b", None))
    with pytest.raises(ValueError, match="cut: expected tokens that tell branches apart"):
        token_surprises(source, START, ["a"], lambda text: re.findall(r"\w", text))


# The parts, one by one


def test_pick_takes_the_branch_on_whose_piece_u_falls():
    options = [Branch(0.25, "a", None), Branch(0.5, "b", None), Branch(0.25, "c", None)]
    us = (0.0, 0.2499, 0.25, 0.7499, 0.75, 0.9999)
    assert "".join(pick(options, u).text for u in us) == "aabbcc"
    assert pick([Branch(0.3, "a", None), Branch(0.3, "b", None)], 0.99).text == "b", "the sliver"


def test_a_walk_and_its_story():
    def branches(state):
        if state.step == "second":
            return [Branch(0.25, "c", None, (Claim("c", "is", "d"),)), Branch(0.75, "d", None)]
        return [Branch(0.5, "a", State("second"), (Claim("a", "is", "b"),)), Branch(0.5, "b", None)]

    path, error_at = parse(branches, START, "ac")
    assert error_at is None
    story = Story.from_walk(path)
    assert story == Story(
        "ac",
        math.log(0.125),
        (Claim("a", "is", "b"), Claim("c", "is", "d")),
        (("start", "a"), ("second", "c")),
    )
    assert set(reachable_states(branches, START)) == {START, State("second")}
    assert surprise(Branch(0.25, "c", None)) == math.log(4)
    assert surprise(Branch(1.0, "c", None)) == 0
    told = [Story.from_walk(list(walk(branches, START, Random(seed)))).text for seed in range(200)]
    assert set(told) == {"b", "ac", "ad"}
    assert expected(branches, START, lambda branch: len(branch.text)) == 1.5
    # where the first branches fail, others are tried, and what they lead to
    path, error_at = parse(branches, START, "xd", lambda s: [Branch(1.0, "x", State("second"))])
    assert (error_at, [b.text for _, b in path]) == (None, ["x", "d"])
    assert parse(branches, START, "ae")[1] == 1
    assert parse(lambda state: [], START, "abc") == ([], 0)
    assert parse(branches_of(Branch(1.0, "abc", None)), START, "abd")[1] == 2


def test_a_state_may_be_reached_twice_but_not_from_itself():
    def diamond(state):
        if state.step == "end":
            return [Branch(0.5, "x", None), Branch(0.5, "yy", None)]
        return [Branch(0.5, "a", State("end")), Branch(0.5, "b", State("end"))]

    assert expected(diamond, START, surprise) == pytest.approx(2 * math.log(2))
    assert expected(diamond, START, lambda branch: len(branch.text)) == 2.5
    assert len(list(reachable_states(diamond, START))) == 2


def test_zipf_weights():
    assert zipf_weights(4, 0.0) == [0.25] * 4
    assert zipf_weights(2, 2.0) == [0.8, 0.2]
    assert zipf_weights(1, 3.0) == [1.0]
    assert zipf_weights(3, 100.0)[0] == pytest.approx(1), "the largest exponent"


def test_who_comes_by():
    assert (P_GUEST, P_STRANGER, P_FURTHER_FACT) == (0.4, 0.3, 0.3)
    stories = list(TinyWorld(n_phrasings=1).stories(2_000, seed=11))
    shares = Counter(
        "guest"
        if "guest fact" in (steps := [step for step, _ in s.parts])
        else "stranger"
        if "arrival" in steps
        else "nobody"
        for s in stories
    )
    for who, p in (("guest", P_GUEST), ("stranger", P_STRANGER), ("nobody", P_FURTHER_FACT)):
        assert abs(shares[who] / 2_000 - p) < 4 * math.sqrt(p * (1 - p) / 2_000)
    assert {step for s in stories for step, _ in s.parts} == set(STEPS)
    alone = TinyWorld(n_characters=3, n_strangers=0)
    assert not any("stranger" in s.text for s in alone.stories(300, seed=0)), "guests only"
    for story in alone.stories(300, seed=0):
        names = {c.character for c in story.claims}
        if "guest fact" in [step for step, _ in story.parts]:
            assert len(names) == 2, "nobody visits itself"


@pytest.mark.parametrize("n_phrasings", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("facts", [1, 7])
def test_settings_set_the_difficulty(n_phrasings, facts):
    world = TinyWorld(n_characters=2, facts_per_story=facts, n_phrasings=n_phrasings)
    hero = next(iter(world.cast.facts))
    assert len(world.branches(State("fact", hero))) == 8 * n_phrasings
    for story in world.stories(20, seed=0):
        assert [step for step, _ in story.parts].count("fact") == facts


def test_a_beginning_and_an_error_have_no_probability():
    assert WORLD.score("") == Score(-math.inf, 0)
    story = next(WORLD.stories(1, seed=1))
    assert WORLD.score(story.text) == Score(story.log_prob, None)
    assert WORLD.judge(story.text) == (True, tuple((c, True) for c in story.claims), None)


def test_the_order_of_facts_is_forgotten():
    world = TinyWorld(n_characters=2, n_strangers=0, facts_per_story=2, n_phrasings=1)
    states = list(reachable_states(world.branches, world.start))
    assert len(states) == len(set(states))
    # opening, hero; for each of two heroes: doing, weather, fact, 8 and 28 sets of facts, arrival,
    # guest fact, closing
    assert len(states) == 2 + 2 * (3 + 8 + 28 + 3)


def test_a_source_begins_with_an_opening():
    assert Source.start == TinyWorld.start == State("opening", "", (), "")
    assert Branch(1.0, "a", None).claims == ()


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
