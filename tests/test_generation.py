"""Generation: filters, the loop, beams, drafts and bytes, against transformers and statistics."""

import inspect
import itertools
import math
from collections import Counter

import jaxtyping
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from llmbook import generation as module
from llmbook.generation import (
    Completion,
    GenerationOptions,
    QuantizedLinear,
    Sampling,
    TextCache,
    beam_search,
    draw,
    expected_tokens,
    generate,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical,
    next_token_distribution,
    penalize_frequency,
    penalize_repetition,
    quantize,
    quantize_rows,
    sample,
    speculative_generate,
    stored_bytes,
    stream,
    uniforms_of,
    verify,
)
from llmbook.model import ModelConfig, TransformerLM, save_model
from llmbook.tokenizer import train_bpe

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SMALL = {"vocab_size": 61, "context_length": 48, "d_model": 32, "n_layers": 2, "n_heads": 4}
KINDS = {
    "gpt2": {
        "positions": "learned",
        "norm": "layernorm",
        "activation": "gelu_tanh",
        "bias": True,
        "tie_embeddings": True,
    },
    "llama": {"n_kv_heads": 2},
    "qwen2": {"n_kv_heads": 2, "qkv_bias": True, "tie_embeddings": True},
    "qwen3": {"n_kv_heads": 2, "d_head": 16, "qk_norm": True},
    "mistral": {"n_kv_heads": 2, "sliding_window": 8},
    "mixtral": {"n_kv_heads": 2, "n_experts": 4, "n_active_experts": 2},
    "post": {"norm": "layernorm", "norm_position": "post", "positions": "sinusoidal"},
}
GREEDY = Sampling(temperature=0)
SAMPLINGS = {
    "greedy": GREEDY,
    "plain": Sampling(),
    "filters": Sampling(temperature=1.3, top_k=30, top_p=0.9, min_p=0.02, typical_p=0.95),
    "penalties": Sampling(repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2),
    "greedy, penalized": Sampling(temperature=0, repetition_penalty=1.3),
    "bans": Sampling(no_repeat_ngram_size=2, banned_tokens=[3, 8]),
}


def made(seed=0, spread=3.0, **changes):
    """A random model whose distributions are far from uniform."""
    torch.manual_seed(seed)
    model = TransformerLM(ModelConfig(**SMALL | changes)).eval()
    with torch.no_grad():
        for block in model.blocks:  # so that gains matter
            block.attention_norm.weight.uniform_(0.5, 1.5)
            block.feed_forward_norm.weight.uniform_(0.5, 1.5)
        if not model.config.tie_embeddings:
            model.lm_head.weight.mul_(spread)
        else:
            model.norm.weight.mul_(spread)
    return model


@pytest.fixture(scope="module")
def models():
    """In float64, so that no choice hangs on how a processor rounds."""
    return {name: made(**kind).double() for name, kind in KINDS.items()}


@pytest.fixture(scope="module")
def llama(models):
    return models["llama"]


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["the quick brown fox jumps over the lazy dog; ".upper().lower() * 3, "größer naïve 🙂"]
    return train_bpe(texts, 300)


@pytest.fixture
def untyped():
    """Switch jaxtyping's checks off, as they are for a reader, to see our own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def chi_square(counts, expected):
    """The probability of counts that are at least as far from what is expected."""
    counts, expected = torch.tensor(counts).double(), torch.tensor(expected).double()
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2)


def prompts_of(lengths=(3, 7, 1, 12), vocab_size=61, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


def ids_of(completions):
    return [completion.ids for completion in completions]


def some_logits(batch=16, vocab_size=50, scale=3.0):
    return scale * torch.randn(batch, vocab_size, dtype=torch.float64)


def peer_of(model, folder):
    """The model in transformers, in float64."""
    model.save_pretrained(folder)
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return peer.eval()


# --- filters ------------------------------------------------------------------------------------


PAIRS = [
    (Sampling(top_k=5), [theirs.TopKLogitsWarper(5)]),
    (Sampling(top_k=1), [theirs.TopKLogitsWarper(1)]),
    (Sampling(top_k=1000), [theirs.TopKLogitsWarper(1000)]),
    (Sampling(top_p=0.8), [theirs.TopPLogitsWarper(0.8)]),
    (Sampling(top_p=1e-6), [theirs.TopPLogitsWarper(1e-6)]),
    (Sampling(min_p=0.1), [theirs.MinPLogitsWarper(0.1)]),
    (Sampling(min_p=1.0), [theirs.MinPLogitsWarper(1.0)]),
    (Sampling(typical_p=0.7), [theirs.TypicalLogitsWarper(0.7)]),
    (Sampling(typical_p=0.05), [theirs.TypicalLogitsWarper(0.05)]),
    (Sampling(temperature=0.6), [theirs.TemperatureLogitsWarper(0.6)]),
    (Sampling(repetition_penalty=1.7), [theirs.RepetitionPenaltyLogitsProcessor(1.7)]),
]


@pytest.mark.parametrize(("sampling", "processors"), PAIRS)
@pytest.mark.parametrize("tied", [False, True])
def test_each_filter_is_transformers(sampling, processors, tied):
    logits, history = some_logits(), torch.randint(50, (16, 9))
    if tied:  # many equal logits, so that the border of what is kept goes through some of them
        logits = logits.round()
    expected = logits
    for processor in processors:
        expected = processor(history, expected)
    ours = next_token_distribution(logits, sampling, history)
    expected = expected.softmax(-1)
    if tied and sampling.top_p is not None:  # their sort leaves open which of equal ones are inside
        ours, expected = ours.sort(-1).values, expected.sort(-1).values
    assert torch.equal(ours > 0, expected > 0)
    torch.testing.assert_close(ours, expected)


def test_all_together_in_the_order_of_transformers():
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    chosen = {"temperature": 1.4, "top_k": 30, "top_p": 0.9, "min_p": 0.03, "typical_p": 0.9}
    generation = transformers.GenerationConfig(do_sample=True, repetition_penalty=1.4, **chosen)
    processors = model._get_logits_processor(generation, input_ids_seq_length=9, device="cpu")
    assert len(processors) == 6
    logits, history = some_logits(200), torch.randint(50, (200, 9))
    expected = processors(history, logits).softmax(-1)
    ours = next_token_distribution(logits, Sampling(repetition_penalty=1.4, **chosen), history)
    torch.testing.assert_close(ours, expected)


def test_frequency_and_presence_by_their_formula():
    counts = torch.tensor([[0, 1, 3]])
    out = penalize_frequency(torch.zeros(1, 3), counts, 0.5, 0.25)
    assert out.tolist() == [[0.0, -0.75, -1.75]]
    history = torch.tensor([[2, -1, 2, 2, 1]])
    sampling = Sampling(frequency_penalty=0.5, presence_penalty=0.25)
    ours = next_token_distribution(torch.zeros(1, 3), sampling, history)
    torch.testing.assert_close(ours, out.softmax(-1), rtol=1e-5, atol=0)


probabilities = st.lists(st.floats(0.01, 1), min_size=2, max_size=12).map(
    lambda p: torch.tensor([p], dtype=torch.float64) / sum(p)
)


@given(probabilities, st.integers(1, 14), st.floats(0.01, 1))
def test_filters_keep_what_they_promise(p, k, share):
    for kept in (
        keep_top_k(p, k),
        keep_top_p(p, share),
        keep_min_p(p, share),
        keep_typical(p, share),
    ):
        assert kept.sum().item() == pytest.approx(1, abs=1e-5)
        inside = kept > 0
        torch.testing.assert_close(kept[inside], p[inside] / p[inside].sum())
    assert (keep_top_k(p, k) > 0).sum() >= min(k, p.size(1))
    nucleus = keep_top_p(p, share) > 0
    assert p[nucleus].sum() >= share - 1e-5
    if nucleus.sum() > 1:  # none of it can be spared
        assert p[nucleus].sum() - p[nucleus].min() < share + 1e-5
    assert p[nucleus].min() >= p[~nucleus].max() if (~nucleus).any() else True
    assert torch.equal(keep_min_p(p, share) > 0, p >= share * p.max())
    assert p[keep_typical(p, share) > 0].sum() >= share - 1e-5


@given(st.integers(0, 10_000), st.floats(0.01, 1), st.sampled_from([1, 6, 1000]))
def test_the_nucleus_is_that_of_a_stable_sort_at_ties_too(seed, mass, levels):
    generator = torch.Generator().manual_seed(seed)
    p = torch.randint(1, levels + 1, (4, 12), generator=generator).float()
    p /= p.sum(-1, keepdim=True)
    ascending, order = p.sort(dim=-1, stable=True)
    inside = ascending.cumsum(-1) > 1 - mass
    inside[:, -1] = True
    expected = torch.zeros_like(inside).scatter_(1, order, inside)
    assert torch.equal(keep_top_p(p, mass) > 0, expected)


def test_of_equally_likely_tokens_the_last_are_in_the_nucleus():
    assert keep_top_p(torch.full((1, 4), 0.25), 0.5).tolist() == [[0, 0, 0.5, 0.5]]
    p = torch.tensor([[0.25, 0.5, 0.25]])
    assert keep_top_p(p, 0.75).tolist() == [[0, pytest.approx(2 / 3), pytest.approx(1 / 3)]]
    assert torch.equal(keep_top_p(p, 1), p)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_filters_in_every_dtype(dtype):
    p = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=dtype)
    for kept in (keep_top_k(p, 2), keep_top_p(p, 0.7), keep_min_p(p, 0.3)):
        assert kept.dtype == dtype and (kept > 0).tolist() == [[True, True, False, False]]
    assert keep_typical(p, 0.2).dtype == dtype


def test_gradients_pass_through_filters():
    logits = some_logits().requires_grad_()
    keep_top_p(logits.softmax(-1), 0.8).max(-1).values.sum().backward()
    assert logits.grad.abs().sum() > 0 and logits.grad.isfinite().all()


@given(probabilities, st.floats(0, 1, exclude_max=True))
def test_draw_is_the_inverse_of_the_distribution_function(p, uniform):
    token = draw(p, torch.tensor([uniform], dtype=torch.float64)).item()
    ends = p[0].double().cumsum(0) / p[0].double().sum()
    assert (ends[token - 1] if token else 0) <= uniform + 1e-12 and uniform < ends[token] + 1e-12


def test_draw_never_takes_what_is_impossible():
    p = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]] * 2)
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(p, ends).tolist() == [1, 3]


def test_sample_has_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(20_000, -1)
    counts = sample(logits, generator=torch.Generator().manual_seed(0)).bincount(minlength=4)
    expected = logits[0].softmax(-1).double()
    assert chi_square(counts.tolist(), (expected * 20_000).tolist()) > 1e-3
    assert (sample(logits, Sampling(top_k=1)) == 2).all() and (sample(logits, GREEDY) == 2).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tiny_temperatures_are_greedy_in_every_dtype(dtype):
    logits = torch.tensor([[60.0, 80.0, -90.0], [5.0, -torch.inf, 5.0]], dtype=dtype)
    for temperature in (1e-9, 1e-37, 1e-300):  # the last is none of float32's numbers
        p = next_token_distribution(logits, Sampling(temperature=temperature))
        assert p.tolist() == [[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]


WRONG = [
    ({"temperature": -1.0}, "temperature: expected 0"),
    ({"temperature": math.nan}, "temperature: expected 0"),
    ({"temperature": math.inf}, "temperature: expected 0"),
    ({"top_k": 0}, "top_k: expected at least 1, got 0"),
    ({"top_p": 0.0}, "top_p: expected more than 0, at most 1, got 0.0"),
    ({"top_p": 1.1}, "top_p: expected more than 0, at most 1, got 1.1"),
    ({"min_p": -0.1}, "min_p: expected"),
    ({"min_p": math.nan}, "min_p: expected"),
    ({"typical_p": 2.0}, "typical_p: expected"),
    ({"repetition_penalty": 0.0}, "repetition_penalty: expected a positive number"),
    ({"frequency_penalty": math.inf}, "frequency_penalty: expected a number"),
    ({"presence_penalty": math.nan}, "presence_penalty: expected a number"),
    ({"temperature": 0, "top_k": 5}, "top_k: expected None at temperature 0"),
    ({"temperature": 0, "top_p": 0.9}, "top_p: expected None at temperature 0"),
    ({"temperature": 0.0, "min_p": 0.1}, "min_p: expected None at temperature 0"),
    ({"temperature": 0.0, "typical_p": 0.1}, "typical_p: expected None at temperature 0"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_settings_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**arguments)


def test_a_penalty_needs_a_history():
    for looks_back in ({"repetition_penalty": 1.2}, {"no_repeat_ngram_size": 2}):
        with pytest.raises(ValueError, match="history: expected the text so far"):
            sample(some_logits(), Sampling(**looks_back))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("name", Sampling.__dataclass_fields__)
@pytest.mark.parametrize("value", ["0.5", True, [0.5], torch.tensor(0.5)])
def test_settings_of_a_wrong_kind(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        Sampling(**{name: value})


def test_settings_that_are_not_set_leave_the_models_distribution():
    logits = some_logits()
    history = torch.randint(50, (16, 9))
    for sampling in (Sampling(), Sampling(top_k=None, top_p=None, min_p=0.0, typical_p=None)):
        ours = next_token_distribution(logits, sampling, history)
        torch.testing.assert_close(ours, logits.softmax(-1), rtol=1e-12, atol=0)
        assert not sampling.has_penalties and not sampling.needs_history


def test_what_is_not_given_has_its_documented_default():
    """A change of a default is a change of what others get; here it shows."""
    settings = {f.name: f.default for f in Sampling.__dataclass_fields__.values()}
    assert settings == {
        "temperature": 1, "top_k": None, "top_p": None, "min_p": None, "typical_p": None,
        "repetition_penalty": 1, "frequency_penalty": 0, "presence_penalty": 0,
        "banned_tokens": (), "no_repeat_ngram_size": None,
    }  # fmt: skip
    options = vars(GenerationOptions(max_new_tokens=1))
    assert options == {
        "max_new_tokens": 1, "min_new_tokens": 0, "sampling": Sampling(), "tokenizer": None,
        "stop_tokens": (), "stop_strings": (), "seed": 0, "use_cache": True, "on_full": "stop",
    }  # fmt: skip
    expected = {
        generate: {"batch_size": 64, "first_row": 0, "cache": None, "compile": False},
        stream: {"cache": None, "compile": False},
        beam_search: {"n_beams": 4, "length_penalty": 1},
        speculative_generate: {"n_draft": 4},
        penalize_frequency: {"presence": 0},
        uniforms_of: {"first_step": 0},
        next_token_distribution: {"history": None},
        sample: {"sampling": Sampling(), "history": None, "uniforms": None, "generator": None},
        QuantizedLinear.__init__: {"bias": True},
        TextCache.__init__: {"capacity": None},
    }
    for function, defaults in expected.items():
        parameters = inspect.signature(function).parameters.values()
        assert {p.name: p.default for p in parameters if p.default is not p.empty} == defaults


def test_frequency_alone_has_no_presence():
    counts = torch.tensor([[0, 1, 3]])
    assert penalize_frequency(torch.zeros(1, 3), counts, 0.5).tolist() == [[0.0, -0.5, -1.5]]


P, V = torch.full((2, 4), 0.25), torch.zeros(2, 4)
SEEN, COUNTS = V.bool(), V.long()
NAN, UNIFORMS = torch.tensor([[0.0, math.nan]]), torch.tensor([0.5, 0.5])
MISUSED = [
    (keep_top_k, (P[0], 1), r"probabilities: expected the shape \(batch, vocab_size\), got \(4,\)"),
    (keep_top_k, (P[None], 1), r"probabilities: expected the shape .*, got \(1, 2, 4\)"),
    (keep_top_k, (P[:, :0], 1), r"probabilities: expected the shape .*, got \(2, 0\)"),
    (keep_top_k, (P.long(), 1), "probabilities: expected floats, got torch.int64"),
    (keep_top_k, (P.tolist(), 1), r"probabilities: expected a tensor, got \[\["),
    (
        keep_top_k,
        (3 * P, 1),
        "probabilities: expected numbers from 0 on that sum to 1, got the row",
    ),
    (keep_top_k, (NAN, 1), "probabilities: expected numbers from 0 on that sum to 1"),
    (keep_top_k, (torch.tensor([[1.5, -0.5]]), 1), "probabilities: expected numbers from 0 on"),
    (keep_top_k, (P, 0), "k: expected at least 1, got 0"),
    (keep_top_k, (P, None), "k: expected a whole number of at least 1, got None"),
    (keep_top_k, (P, 1.5), "k: expected a whole number, got 1.5"),
    (keep_top_p, (3 * P, 0.5), "probabilities: expected numbers"),
    (keep_top_p, (P, 0.0), "mass: expected more than 0, at most 1, got 0.0"),
    (keep_top_p, (P, 1.01), "mass: expected more than 0, at most 1, got 1.01"),
    (keep_top_p, (P, "0.5"), "mass: expected more than 0, at most 1, got '0.5'"),
    (keep_min_p, (3 * P, 0.5), "probabilities: expected numbers"),
    (keep_min_p, (P, -0.1), "share: expected at least 0, at most 1, got -0.1"),
    (keep_min_p, (P, 1.1), "share: expected at least 0, at most 1, got 1.1"),
    (keep_typical, (3 * P, 0.5), "probabilities: expected numbers"),
    (keep_typical, (P, math.nan), "mass: expected more than 0, at most 1, got nan"),
    (penalize_repetition, (V[0], SEEN, 1.2), "logits: expected the shape"),
    (
        penalize_repetition,
        (V, SEEN[:1], 1.2),
        r"seen: expected a torch.bool tensor of shape \(2, 4\)",
    ),
    (penalize_repetition, (V, COUNTS, 1.2), "seen: expected a torch.bool tensor"),
    (penalize_repetition, (V, SEEN, 0), "penalty: expected a positive number, got 0"),
    (penalize_frequency, (V.long(), COUNTS, 1), "logits: expected floats"),
    (penalize_frequency, (V, SEEN, 1), "counts: expected a torch.int64 tensor"),
    (penalize_frequency, (V, COUNTS, math.inf), "frequency: expected a number, got inf"),
    (penalize_frequency, (V, COUNTS, 1, "1"), "presence: expected a number, got '1'"),
    (draw, (V, UNIFORMS), "probabilities: expected numbers from 0 on, one positive, got the row"),
    (draw, (NAN, UNIFORMS[:1]), "probabilities: expected numbers from 0 on"),
    (draw, (-P, UNIFORMS), "probabilities: expected numbers from 0 on"),
    (draw, (P / 0, UNIFORMS), "probabilities: expected numbers from 0 on"),
    (draw, (P, UNIFORMS[:1]), r"uniforms: expected the shape \(2,\), got \(1,\)"),
    (draw, (P, UNIFORMS * 2), "uniforms: expected numbers from 0 to below 1, got 1.0"),
    (draw, (P, -UNIFORMS), "uniforms: expected numbers from 0 to below 1, got -0.5"),
    (draw, (P, UNIFORMS * math.nan), "uniforms: expected numbers from 0 to below 1, got nan"),
    (draw, (P, [0.5, 0.5]), "uniforms: expected a tensor of floats"),
    (uniforms_of, (0.5, 0, 1), "seed: expected a whole number of 64 bits, got 0.5"),
    (uniforms_of, (2**63, 0, 1), "seed: expected a whole number of 64 bits"),
    (uniforms_of, (0, -1, 1), "row: expected at least 0, got -1"),
    (uniforms_of, (0, 0, -1), "n: expected at least 0, got -1"),
    (uniforms_of, (0, 0, 1, None), "first_step: expected a whole number of at least 0, got None"),
    (expected_tokens, (1.1, 1), "acceptance: expected from 0 to 1, got 1.1"),
    (expected_tokens, ("1", 1), "acceptance: expected from 0 to 1, got '1'"),
    (expected_tokens, (0.5, -1), "n_draft: expected at least 0, got -1"),
    (quantize_rows, (V[0],), r"weight: expected the shape \(rows, columns\), got \(4,\)"),
    (quantize_rows, (V[:, :0],), r"weight: expected the shape \(rows, columns\), got \(2, 0\)"),
    (quantize_rows, (COUNTS,), "weight: expected a tensor of floats, got torch.int64"),
    (quantize_rows, (NAN,), "weight: expected numbers that float32 has, got nan"),
    (quantize_rows, (1e300 * P.double(),), "weight: expected numbers that float32 has, got 2.5e"),
    (quantize, ("model",), "model: expected a module of PyTorch, got 'model'"),
    (stored_bytes, (None,), "model: expected a module of PyTorch, got None"),
    (QuantizedLinear, (0, 1), "in_features: expected at least 1, got 0"),
    (QuantizedLinear, (1, None), "out_features: expected a whole number of at least 1, got None"),
    (TextCache, ("model",), "model: expected a TransformerLM, got 'model'"),
]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("function", "arguments", "message"), MISUSED)
def test_each_function_names_what_it_was_given(function, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        function(*arguments)


LOGITS = [
    (torch.tensor([[0.0, math.nan]]), "logits: expected numbers or -inf, one of them .* got NaN"),
    (torch.tensor([[1.0, 2.0], [0.0, math.inf]]), "logits: .* got infinity"),
    (torch.tensor([[1.0, 2.0], [-math.inf, -math.inf]]), "logits: .* got -inf for all"),
    (torch.zeros(3, 4, 5), r"logits: expected the shape \(batch, vocab_size\), got \(3, 4, 5\)"),
    (torch.zeros(4), r"logits: expected the shape \(batch, vocab_size\), got \(4,\)"),
    (torch.zeros(3, 0), r"logits: expected the shape \(batch, vocab_size\), got \(3, 0\)"),
    (torch.zeros(3, 4).long(), "logits: expected floats, got torch.int64"),
    ([[0.0, 1.0]], r"logits: expected a tensor, got \[\["),
]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("logits", "message"), LOGITS)
@pytest.mark.parametrize("sampling", [Sampling(), GREEDY, Sampling(top_k=1), Sampling(top_p=0.5)])
def test_logits_from_which_nothing_can_be_drawn(logits, message, sampling):
    for function in (sample, next_token_distribution):
        with pytest.raises(ValueError, match=f"^{message}"):
            function(logits, sampling)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"history": torch.tensor([[1, 4]])}, "history: expected ids from 0 to 3, or -1 .*, got 4"),
        ({"history": torch.tensor([[1, -2]])}, "history: expected ids from 0 to 3, .* got -2"),
        ({"history": torch.zeros(2, 3).long()}, r"history: expected the shape \(1, length\), got"),
        ({"history": torch.zeros(3).long()}, r"history: expected the shape \(1, length\), got"),
        ({"history": torch.zeros(1, 3)}, "history: expected an int64 tensor of ids, got torch.fl"),
        ({"history": [[1, 2]]}, r"history: expected an int64 tensor of ids, got \[\["),
        ({"sampling": {"top_k": 1}}, r"sampling: expected a Sampling, .*got \{'top_k': 1\}"),
        ({"sampling": Sampling(banned_tokens=[4])}, "banned_tokens: expected ids from 0 to 3, got"),
        ({"sampling": Sampling(banned_tokens=range(4))}, "sampling: expected a token that is nei"),
        ({"uniforms": torch.tensor([1.0])}, "uniforms: expected numbers from 0 to below 1"),
        ({"uniforms": torch.tensor([1.0]), "sampling": GREEDY}, "uniforms: expected numbers"),
        ({"generator": 5}, "generator: expected a torch.Generator, got 5"),
    ],
)
def test_sample_names_what_it_was_given(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        sample(torch.zeros(1, 4), **arguments)


def test_a_logit_of_minus_infinity_is_never_chosen():
    logits = torch.tensor([[0.0, -math.inf, 0.0]]).expand(500, -1)
    for sampling in (Sampling(), Sampling(temperature=1e-9), Sampling(typical_p=0.9)):
        assert set(sample(logits, sampling).tolist()) == {0, 2}


# --- what is forbidden --------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_no_phrase_twice_is_transformers(n):
    history = torch.randint(5, (30, 12))
    logits = some_logits(30, 9)
    expected = theirs.NoRepeatNGramLogitsProcessor(n)(history, logits)
    expected = theirs.SuppressTokensLogitsProcessor([2, 7])(history, expected)
    sampling = Sampling(no_repeat_ngram_size=n, banned_tokens={7, 2})
    ours = next_token_distribution(logits, sampling, history)
    torch.testing.assert_close(ours, expected.softmax(-1), rtol=1e-12, atol=0)
    padded = torch.cat([torch.full((30, 2), -1), history, torch.full((30, 1), -1)], dim=1)
    assert torch.equal(next_token_distribution(logits, sampling, padded), ours)
    assert sample(logits, sampling, history=history).eq(7).sum() == 0


def test_phrases_of_the_prompt_count_and_the_shortest_ones_too():
    model = made(vocab_size=3, spread=0.0)  # all tokens are equally likely
    options = {"max_new_tokens": 1, "sampling": Sampling(no_repeat_ngram_size=2)}
    rows = generate(model, [[0, 1, 0]] * 40, **options)
    assert {row.ids[0] for row in rows} == {0, 2}, "0 1 is in the prompt"
    drawn = (speculative_generate(model, model, [0, 1, 0], seed=s, **options) for s in range(20))
    assert {done.ids[0] for done, _ in drawn} == {0, 2}
    beams = beam_search(model, [0, 1, 0], n_beams=3, **options)
    assert {one.ids[0] for one in beams} == {0, 2}
    for n in (1, 2, 3):  # a text of just n tokens
        p = next_token_distribution(
            torch.zeros(1, 3), Sampling(no_repeat_ngram_size=n), torch.ones(1, n).long()
        )
        assert p.tolist() == [[0.5, 0, 0.5]]


FORBIDDEN = {
    "phrases": ({"no_repeat_ngram_size": 2}, {}),
    "tokens": ({"banned_tokens": [0, *range(7, 40)]}, {}),
    "early ends": ({}, {"min_new_tokens": 9, "stop_tokens": [*range(5, 25)]}),
    "all": (
        {"no_repeat_ngram_size": 3, "banned_tokens": [4, 9]},
        {"min_new_tokens": 5, "stop_tokens": [*range(5, 25)]},
    ),
}


@pytest.mark.parametrize("what", FORBIDDEN)
@pytest.mark.parametrize("n_beams", [1, 3])
def test_what_is_forbidden_is_transformers(llama, tmp_path, what, n_beams):
    rules, options = FORBIDDEN[what]
    peer = peer_of(llama, tmp_path)
    for prompt in prompts_of((4, 9)):
        out = peer.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(),
            max_new_tokens=20, do_sample=False, num_beams=n_beams, pad_token_id=0,
            early_stopping="never" if n_beams > 1 else None,
            eos_token_id=options.get("stop_tokens"), min_new_tokens=options.get("min_new_tokens"),
            no_repeat_ngram_size=rules.get("no_repeat_ngram_size"),
            suppress_tokens=rules.get("banned_tokens"),
        )  # fmt: skip
        expected = out[0, len(prompt) :].tolist()
        if n_beams > 1:
            sampling = Sampling(**rules)
            ours = beam_search(
                llama, prompt, n_beams=n_beams, max_new_tokens=20, sampling=sampling, **options
            )[0].ids
            assert ours == expected[: len(ours)]
            continue
        sampling = Sampling(temperature=0, **rules)
        options = options | {"max_new_tokens": 20, "sampling": sampling}
        for cached in (True, False):
            (ours,) = ids_of(generate(llama, [prompt], use_cache=cached, **options))
            assert ours == expected
        for draft in (llama, made(seed=9).double()):
            done, _ = speculative_generate(llama, draft, prompt, n_draft=3, **options)
            assert done.ids == expected
        (free,) = ids_of(generate(llama, [prompt], max_new_tokens=20, sampling=GREEDY))
        assert free != expected  # it changes something here


def test_what_is_forbidden_is_so_for_drawn_texts_too(llama):
    sampling = Sampling(no_repeat_ngram_size=2, banned_tokens=[3, 8])
    options = {"max_new_tokens": 40, "sampling": sampling}
    texts = ids_of(generate(llama, [[1]] * 20, **options))
    texts += [speculative_generate(llama, llama, [1], seed=s, **options)[0].ids for s in range(3)]
    for ids in texts:
        pairs = list(itertools.pairwise([1, *ids]))
        assert len(set(pairs)) == len(pairs) and not {3, 8} & set(ids)


def test_no_end_before_the_least_number_of_tokens(llama, tokenizer, monkeypatch):
    for least in (0, 1, 5, 6):
        options = {"stop_tokens": [*range(1, 61)], "max_new_tokens": 6, "min_new_tokens": least}
        for row in generate(llama, [[1]] * 5, **options):  # 0 alone does not stop
            before = row.ids[:-1] if row.finish_reason == "stop" else row.ids
            assert set(before) <= {0} and len(row.ids) >= least
    model, n = scripted(tokenizer, bytewise(tokenizer, "abcabcabc"), monkeypatch)
    options = {"max_new_tokens": n, "tokenizer": tokenizer, "stop_strings": ["c"]}
    for least, text in ((0, "ab"), (3, "ab"), (4, "abcab"), (6, "abcab"), (9, "abcabcab")):
        (row,) = generate(model, [[1]], min_new_tokens=least, **options)
        assert row.text == text and row.finish_reason == "stop"


def test_when_all_is_forbidden_it_says_so(llama, tokenizer):
    model = made(vocab_size=3)
    options = {"max_new_tokens": 9, "sampling": Sampling(no_repeat_ngram_size=1)}
    for run in (
        lambda: generate(model, [[0]], **options),
        lambda: speculative_generate(model, model, [0], **options),
        lambda: beam_search(model, [0, 1, 2], **options),
    ):
        with pytest.raises(ValueError, match="sampling: expected a token that is neither banned"):
            run()
    for rules in (
        {"sampling": Sampling(banned_tokens=range(3))},
        {"sampling": Sampling(banned_tokens=[0]), "stop_tokens": [1, 2], "min_new_tokens": 1},
    ):
        with pytest.raises(ValueError, match="sampling: expected a token that is not banned"):
            generate(model, [[0]], max_new_tokens=9, **rules)


# --- a vocabulary with padding ------------------------------------------------------------------


def test_ids_without_a_text_are_refused_or_excluded(tokenizer):
    model = made(vocab_size=2048, context_length=96, spread=0.0)  # all tokens are equally likely
    n = tokenizer.vocab_size
    message = (
        rf"tokenizer: .*or Sampling\(banned_tokens=range\({n}, 2048\)\), got none for {2048 - n}"
    )
    options = {"max_new_tokens": 60, "tokenizer": tokenizer}
    for run in (
        lambda **more: generate(model, ["fox"], **options, **more),
        lambda **more: stream(model, "fox", **options, **more),
        lambda **more: beam_search(model, "fox", **options, **more),
        lambda **more: speculative_generate(model, model, "fox", **options, **more),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            run()
        run(sampling=Sampling(banned_tokens=range(n, 2048)))
    sampling = Sampling(banned_tokens=range(n, 2048))
    texts = generate(model, ["fox"] * 9, sampling=sampling, **options)
    assert all(max(one.ids) < n and one.text == tokenizer.decode(one.ids) for one in texts)
    generate(model, [[5]], max_new_tokens=3)  # ids alone need no text
    with pytest.raises(ValueError, match=r"banned_tokens=\[\d+, \d+\]\), got none for 2 of them"):
        rest = set(range(n, 2048)) - {n, n + 5}
        generate(model, ["fox"], sampling=Sampling(banned_tokens=rest), **options)


# --- a cache that is kept -----------------------------------------------------------------------


@pytest.fixture
def read(monkeypatch):
    """Count the tokens that a model's layers read in one go."""
    counts = []
    original = TransformerLM.hidden_states

    def hidden_states(self, ids, **more):
        counts.append(ids.numel())
        return original(self, ids, **more)

    monkeypatch.setattr(TransformerLM, "hidden_states", hidden_states)
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_reads_only_what_is_new(models, kind, read):
    model, text = models[kind], prompts_of((9,))[0]
    cache = TextCache(model)
    options = {"max_new_tokens": 6, "sampling": Sampling(repetition_penalty=1.2)}
    for turn in range(3):
        expected = generate(model, [text], **options)
        read.clear()
        told = generate(model, [text], cache=cache, **options)
        assert read[0] == (9 if turn == 0 else 4)  # the last answer's last token, and three more
        assert ids_of(told) == ids_of(expected)
        assert cache.ids == text + told[0].ids[:-1]
        assert told[0].log_probs == pytest.approx(expected[0].log_probs, abs=1e-9)
        text = [*text, *told[0].ids, 7, 8, 9]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_a_kept_cache_forgets_what_differs(models, kind):
    model, cache = models[kind], TextCache(models[kind])
    first, other = prompts_of((12, 12))
    options = {"max_new_tokens": 9, "sampling": GREEDY}
    for text in (first, first[:8] + other[:3], other, first, first[:5], first + other):
        expected = ids_of(generate(model, [text], **options))
        assert ids_of(generate(model, [text], cache=cache, **options)) == expected
        assert [p.id for p in stream(model, text, cache=cache, **options)] == expected[0]
    pieces = stream(model, other, cache=cache, **options)  # left in the middle
    next(pieces), next(pieces)
    assert cache.ids[:12] == other
    expected = ids_of(generate(model, [first], **options))
    assert ids_of(generate(model, [first], cache=cache, **options)) == expected


def test_a_kept_cache_and_a_text_that_slides(llama):
    cache, options = TextCache(llama), {"max_new_tokens": 90, "on_full": "slide"}
    for prompt in prompts_of((7, 40)):
        expected = ids_of(generate(llama, [prompt], **options))
        assert ids_of(generate(llama, [prompt], cache=cache, **options)) == expected


def test_a_cache_that_does_not_fit(llama, untyped):
    options = {"max_new_tokens": 3}
    cache = TextCache(llama, capacity=9)
    generate(llama, [[1] * 7], cache=cache, **options)
    for arguments, message in (
        ((made(), [[1]], cache), "cache: expected one of this model"),
        ((llama, [[1], [2]], cache), "cache: expected a single prompt with it, got 2"),
        ((llama, [[1] * 8], cache), "cache: expected a capacity of at least 10 tokens, got 9"),
        ((llama, [[1]], llama.new_cache(1)), "cache: expected a TextCache, got"),
    ):
        model, prompts, given = arguments
        with pytest.raises(ValueError, match=f"^{message}"):
            generate(model, prompts, cache=given, **options)
        if len(prompts) == 1:
            with pytest.raises(ValueError, match=f"^{message}"):
                stream(model, prompts[0], cache=given, **options)
    with pytest.raises(ValueError, match="use_cache: expected True with a cache, got False"):
        generate(llama, [[1]], cache=cache, use_cache=False, **options)
    with pytest.raises(ValueError, match="capacity: expected at least 1, got 0"):
        TextCache(llama, capacity=0)


# --- the loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", SAMPLINGS)
def test_cached_equals_uncached(models, kind, how):
    options = {"max_new_tokens": 38, "sampling": SAMPLINGS[how], "stop_tokens": [5]}
    with_cache = generate(models[kind], prompts_of(), **options)
    without = generate(models[kind], prompts_of(), use_cache=False, **options)
    assert ids_of(with_cache) == ids_of(without)
    for a, b in zip(with_cache, without, strict=True):
        assert a.log_probs == pytest.approx(b.log_probs, abs=1e-9)
        assert a.finish_reason == b.finish_reason


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["greedy", "plain", "penalties", "bans"])
def test_a_row_does_not_depend_on_its_neighbors(models, kind, how):
    model, prompts = models[kind], prompts_of((3, 7, 1, 12, 7, 40))
    options = {"max_new_tokens": 16, "sampling": SAMPLINGS[how], "stop_tokens": [5], "seed": 3}
    together = generate(model, prompts, **options)
    assert ids_of(generate(model, prompts, batch_size=2, **options)) == ids_of(together)
    for number, prompt in enumerate(prompts):
        alone = generate(model, [prompt], first_row=number, **options)
        assert ids_of(alone) == ids_of(together[number : number + 1])


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "qwen3", "mistral"])
def test_greedy_is_transformers_token_for_token(models, kind, tmp_path):
    peer = peer_of(models[kind], tmp_path)
    prompts = prompts_of((6, 6, 6))
    out = peer.generate(
        torch.tensor(prompts), attention_mask=torch.ones(3, 6, dtype=torch.int64),
        max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert (
        ids_of(generate(models[kind], prompts, max_new_tokens=40, sampling=GREEDY))
        == out[:, 6:].tolist()
    )


def test_log_probs_are_the_models(llama):
    (prompt,) = prompts_of((5,))
    (completion,) = generate(
        llama, [prompt], max_new_tokens=10, sampling=Sampling(temperature=2.0, top_k=20)
    )
    text = torch.tensor([prompt + completion.ids])
    expected = llama(text[:, :-1]).log_softmax(-1)[0, 4:].gather(1, text[0, 5:, None])[:, 0]
    assert completion.log_probs == pytest.approx(expected.tolist(), abs=1e-9)


def test_sampled_texts_have_the_models_distribution():
    model = made(vocab_size=4, spread=1.0)
    rows = generate(model, [[1]] * 6000, max_new_tokens=2, batch_size=2000)
    counts = Counter(tuple(row.ids) for row in rows)
    first = model(torch.tensor([[1]]))[0, -1].softmax(-1)
    expected = []
    pairs = list(itertools.product(range(4), repeat=2))
    for a, b in pairs:
        second = model(torch.tensor([[1, a]]))[0, -1].softmax(-1)
        expected.append((first[a] * second[b]).item())
    expected = [6000 * p for p in expected]
    assert chi_square([counts[pair] for pair in pairs], expected) > 1e-3


def test_seeds(llama):
    prompts = prompts_of()
    first, again, other = (
        ids_of(generate(llama, prompts, max_new_tokens=8, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again != other
    torch.manual_seed(5)  # the global state plays no part
    assert ids_of(generate(llama, prompts, max_new_tokens=8, seed=1)) == first
    assert uniforms_of(0, 3, 5).tolist() == uniforms_of(0, 3, 9).tolist()[:5]
    assert uniforms_of(0, 3, 5, first_step=4).tolist() == uniforms_of(0, 3, 9).tolist()[4:]


def test_long_texts_have_numbers_of_their_own_at_each_step():
    model = made(vocab_size=7, context_length=600, d_model=8, n_heads=1, n_layers=1, spread=0.0)
    options = {"stop_tokens": [0], "seed": 4}
    rows = generate(model, [[1]] * 40, max_new_tokens=10**9, **options)  # and no table of as many
    free = generate(model, [[1]] * 2, max_new_tokens=590)
    for number, row in enumerate(free):  # all tokens are equally likely
        expected = (7 * uniforms_of(0, number, 590)).astype(int).tolist()
        assert row.ids == expected
    for number, row in enumerate(rows):
        expected = (7 * uniforms_of(4, number, 600)).astype(int).tolist()
        assert row.ids == expected[: expected.index(0) + 1]


def test_dropout_is_off_and_training_is_restored(llama):
    model = made(dropout=0.5, n_kv_heads=2)
    expected = ids_of(generate(model, prompts_of(), max_new_tokens=9))
    model.train()
    assert ids_of(generate(model, prompts_of(), max_new_tokens=9)) == expected
    assert model.training and all(block.training for block in model.blocks)
    model.blocks[0].eval()  # each part goes back to what it was
    assert ids_of(generate(model, prompts_of(), max_new_tokens=9)) == expected
    assert model.training and [block.training for block in model.blocks] == [False, True]
    model.eval().blocks[1].train()
    assert ids_of(generate(model, prompts_of(), max_new_tokens=9)) == expected
    model.train()
    pieces = stream(model, [1], max_new_tokens=9)
    next(pieces)
    assert model.training and not torch.is_inference_mode_enabled()


# --- ends ---------------------------------------------------------------------------------------


def test_it_stops_at_a_token_and_keeps_it(llama):
    (whole,) = generate(llama, [[1]], max_new_tokens=20)
    stop = whole.ids[7]
    end = whole.ids.index(stop) + 1
    (cut,) = generate(llama, [[1]], max_new_tokens=20, stop_tokens=[stop])
    assert cut == Completion(whole.ids[:end], None, "stop", whole.log_probs[:end])
    assert whole.finish_reason == "length" and len(whole.ids) == 20


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_context_is_full_without_being_exceeded(models, use_cache):
    for model in models.values():
        options = {"max_new_tokens": 100, "use_cache": use_cache, "sampling": GREEDY}
        whole, longest = generate(model, [[1] * 3, [2] * 48], **options)
        assert len(whole.ids) == 48 - 3 + 1 and whole.finish_reason == "context"
        assert len(longest.ids) == 1 and longest.finish_reason == "context"
        (exact,) = generate(model, [[1] * 3], max_new_tokens=46, use_cache=use_cache)
        assert len(exact.ids) == 46 and exact.finish_reason == "length"


@pytest.mark.parametrize("kind", KINDS)
def test_a_sliding_text_goes_on_with_and_without_cache(models, kind):
    prompts = prompts_of((3, 47, 30))
    options = {"max_new_tokens": 70, "on_full": "slide", "stop_tokens": [9]}
    with_cache = generate(models[kind], prompts, **options)
    without = generate(models[kind], prompts, use_cache=False, **options)
    assert ids_of(with_cache) == ids_of(without)
    free = generate(models[kind], prompts, max_new_tokens=70, on_full="slide")
    assert [len(row.ids) for row in free] == [70] * 3


def test_a_slide_keeps_half_of_the_context():
    model = made(context_length=8)
    (row,) = generate(model, [[1, 2, 3]], max_new_tokens=7, on_full="slide", sampling=GREEDY)
    text = [1, 2, 3, *row.ids]  # six tokens more make nine: the ninth is read with three before it
    expected = model(torch.tensor([text[5:9]]))[0, -1].log_softmax(-1)
    assert row.ids[6] == expected.argmax().item()
    assert row.log_probs[6] == pytest.approx(expected.max().item(), abs=1e-4)


def test_on_full_error_says_so_before_the_work(llama):
    with pytest.raises(ValueError, match="at most 39 tokens, for context_length = 48 and max_new"):
        generate(llama, [[1] * 40], max_new_tokens=10, on_full="error")
    generate(llama, [[1] * 39], max_new_tokens=10, on_full="error")


BAD = [
    ({"prompts": []}, "prompts: expected at least one, got none"),
    ({"prompts": [[]]}, "prompts: expected at least one token to go on from"),
    ({"prompts": [[1], []]}, "prompts: expected at least one token to go on from"),
    ({"prompts": [[61]]}, "prompts: expected ids from 0 to 60, got 61"),
    ({"prompts": [[-1]]}, "prompts: expected ids from 0 to 60, got -1"),
    ({"prompts": [[1] * 49]}, "prompts: expected at most 48 tokens, for context_length"),
    ({"prompts": ["text"]}, "tokenizer: expected one, for text as prompts"),
    ({"prompts": [1, 2]}, "prompts: expected a text or a list of ids for each, got 1"),
    ({"prompts": "text"}, "prompts: expected a list of prompts, got one text"),
    ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
    ({"batch_size": 0}, "batch_size: expected at least 1"),
    ({"first_row": -1}, "first_row: expected at least 0"),
    ({"on_full": "wrap"}, "on_full: expected one of stop, error, slide"),
    ({"stop_strings": ["x"]}, "tokenizer: expected one, for stop_strings"),
    ({"stop_strings": [""]}, "stop_strings: expected texts of at least one character"),
    ({"stop_strings": "ab"}, "stop_strings: expected a list of texts"),
    ({"stop_tokens": 5}, "stop_tokens: expected a list of ids, got 5"),
    ({"stop_tokens": "<|endoftext|>"}, "stop_tokens: expected a list of ids, got '<|endoftext|>'"),
    ({"stop_tokens": ["<|endoftext|>"]}, r"stop_tokens: expected ids; .* got '<\|endoftext\|>'"),
    ({"stop_tokens": [2.5]}, "stop_tokens: expected ids, which are whole numbers, got 2.5"),
    ({"stop_tokens": [True]}, "stop_tokens: expected ids, which are whole numbers, got True"),
    ({"stop_tokens": None}, "stop_tokens: expected a list of ids, got None"),
    ({"stop_tokens": [61]}, "stop_tokens: expected ids from 0 to 60, got 61"),
    ({"stop_tokens": [-1]}, "stop_tokens: expected at least 0, got -1"),
    ({"stop_strings": None}, "stop_strings: expected a list of texts, got None"),
    ({"stop_strings": [5]}, "stop_strings: expected a str, got 5"),
    ({"prompts": None}, "prompts: expected a list of prompts, got None"),
    ({"prompts": [None]}, "prompts: expected a text or a list of ids for each, got None"),
    ({"prompts": [[1.5]]}, "prompts: expected ids, which are whole numbers, got 1.5"),
    ({"prompts": [["a"]]}, "prompts: expected ids, which are whole numbers, got 'a'"),
    ({"prompts": torch.zeros(1, 1, 1).long()}, "prompts: expected a text or a list of ids for"),
    ({"max_new_tokens": None}, "max_new_tokens: expected a whole number of at least 1, got None"),
    ({"max_new_tokens": "5"}, "max_new_tokens: expected a whole number, got '5'"),
    ({"min_new_tokens": 4}, "min_new_tokens: expected at most max_new_tokens = 3, got 4"),
    ({"min_new_tokens": -1}, "min_new_tokens: expected at least 0, got -1"),
    ({"min_new_tokens": None}, "min_new_tokens: expected a whole number of at least 0, got None"),
    ({"batch_size": None}, "batch_size: expected a whole number of at least 1, got None"),
    ({"first_row": None}, "first_row: expected a whole number of at least 0, got None"),
    ({"sampling": {"top_k": 5}}, r"sampling: expected a Sampling, .* got \{'top_k': 5\}"),
    ({"sampling": None}, "sampling: expected a Sampling, .* got None"),
    (
        {"sampling": Sampling(banned_tokens=[61])},
        "banned_tokens: expected ids from 0 to 60, got 61",
    ),
    ({"tokenizer": "gpt2"}, "tokenizer: expected a BPETokenizer, got 'gpt2'"),
    ({"seed": "1"}, "seed: expected a whole number of 64 bits, got '1'"),
    ({"seed": None}, "seed: expected a whole number of 64 bits, got None"),
    ({"seed": -(2**63) - 1}, "seed: expected a whole number of 64 bits, got -9"),
    ({"use_cache": "no"}, "use_cache: expected True or False, got 'no'"),
    ({"on_full": None}, "on_full: expected one of stop, error, slide, got None"),
]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("caller", ["generate", "stream", "beam_search", "speculative_generate"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.5}, r"temperature: .* sampling=Sampling\(temperature=0.5\), got temp"),
        ({"top_k": 5}, r"top_k: expected it in sampling=Sampling\(top_k=5\), got top_k=5"),
        ({"eos_token_id": 5}, "eos_token_id: expected it as stop_tokens, got eos_token_id=5"),
        ({"max_length": 5}, "max_length: expected it as max_new_tokens, got max_length=5"),
        ({"stopp": 5}, "stopp: expected one of the options max_new_tokens, .*, got stopp=5"),
        ({}, "max_new_tokens: expected a whole number of at least 1, got none"),
    ],
)
def test_options_that_belong_elsewhere(llama, caller, options, message):
    prompt = {
        "generate": ([[1]],),
        "stream": ([1],),
        "beam_search": ([1],),
        "speculative_generate": (llama, [1]),
    }
    with pytest.raises(TypeError, match=f"^{message}"):
        getattr(module, caller)(llama, *prompt[caller], **options)


@pytest.mark.usefixtures("untyped")
def test_prompts_and_stops_may_be_any_collection_of_ids(llama):
    options = {"max_new_tokens": 9, "sampling": GREEDY}
    expected = generate(llama, [[1, 2]], stop_tokens=[7, 30], **options)
    for prompt in ((1, 2), np.array([1, 2]), torch.tensor([1, 2]), range(1, 3)):
        for stops in ({7, 30}, np.array([30, 7]), torch.tensor([7, 30]), (7, 30)):
            assert generate(llama, [prompt], stop_tokens=stops, **options) == expected
    assert generate(llama, torch.tensor([[1, 2]]), stop_tokens=[7, 30], **options) == expected


@pytest.mark.usefixtures("untyped")
def test_a_model_is_asked_for(llama):
    for wrong in ("gpt2", None, torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=r"^model: expected a TransformerLM, got"):
            generate(wrong, [[1]], max_new_tokens=3)
        with pytest.raises(ValueError, match=r"^draft: expected a TransformerLM, got"):
            speculative_generate(llama, wrong, [1], max_new_tokens=3)


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments_are_named(llama, untyped, arguments, message):
    arguments = {"prompts": [[1]], "max_new_tokens": 3} | arguments
    with pytest.raises(ValueError, match=message):
        generate(llama, **arguments)


def test_an_empty_text_is_no_prompt(tokenizer):
    model = made(vocab_size=tokenizer.vocab_size)
    with pytest.raises(ValueError, match="at least one token to go on from, such as end of text"):
        generate(model, [""], max_new_tokens=3, tokenizer=tokenizer)


def test_a_model_that_gives_nan_says_so(llama):
    model = made()
    model.lm_head.weight.data.fill_(torch.nan)
    options = {"max_new_tokens": 3}
    for sampling in (Sampling(), GREEDY):
        with pytest.raises(ValueError, match="model: expected logits, got NaN after 0 new tokens"):
            generate(model, [[1]], sampling=sampling, **options)
        with pytest.raises(ValueError, match="model: expected logits, got NaN after 0 new tokens"):
            speculative_generate(model, llama, [1], sampling=sampling, **options)
        with pytest.raises(ValueError, match="draft: expected logits, got NaN after 0 new tokens"):
            speculative_generate(llama, model, [1], sampling=sampling, **options)
    with pytest.raises(ValueError, match="model: expected logits, got NaN after 0 new tokens"):
        beam_search(model, [1], **options)


# --- text ---------------------------------------------------------------------------------------


def scripted(tokenizer, text, monkeypatch):
    """Make ``sample`` choose the ids of ``text`` one after the other, byte by byte."""
    ids = [tokenizer.encode(text)] if isinstance(text, str) else [text]
    model = made(vocab_size=tokenizer.vocab_size, context_length=200)
    original = module._Chooser.choose

    def choose(self, logits, step):
        _, log_probs = original(self, logits, step)
        return torch.tensor([row[min(step, len(row) - 1)] for row in ids]), log_probs

    monkeypatch.setattr(module._Chooser, "choose", choose)
    return model, len(ids[0])


def bytewise(tokenizer, text):
    """The ids of single bytes, so that characters and stops cross the borders of tokens."""
    single = {tokenizer.decode_bytes([i]): i for i in range(tokenizer.vocab_size)}
    return [single[bytes([byte])] for byte in text.encode()]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("größer 🙂 ok", [], "größer 🙂 ok"),
        ("one\n\ntwo", ["\n\n"], "one"),
        ("abcabcabd!", ["abd"], "abcabc"),
        ("aaab", ["aab"], "a"),
        ("naïve größe", ["ïve g"], "na"),
        ("stop it", ["never", "stop"], ""),
        ("ends with a half ab", ["abc"], "ends with a half ab"),
        ("xay", ["ay", "xa"], ""),
    ],
)
def test_stop_strings_cross_tokens_and_are_never_half_shown(
    tokenizer, monkeypatch, text, stops, expected
):
    model, n = scripted(tokenizer, bytewise(tokenizer, text), monkeypatch)
    options = {"max_new_tokens": n, "tokenizer": tokenizer, "stop_strings": stops}
    (whole,) = generate(model, [[1]], **options)
    assert whole.text == expected
    pieces = list(stream(model, [1], **options))
    assert "".join(piece.text for piece in pieces) == expected
    assert [piece.id for piece in pieces] == whole.ids
    shown = ""
    for piece in pieces:  # what was shown never has to be taken back
        shown += piece.text
        assert expected.startswith(shown) and "\ufffd" not in piece.text
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == whole.finish_reason


def test_a_character_that_is_never_finished_is_replaced(tokenizer, monkeypatch):
    model, n = scripted(tokenizer, bytewise(tokenizer, "ok🙂")[:-1], monkeypatch)
    (whole,) = generate(model, [[1]], max_new_tokens=n, tokenizer=tokenizer)
    assert whole.text == "ok\ufffd" == tokenizer.decode(whole.ids)


def test_a_stop_token_is_not_in_the_text(tokenizer, monkeypatch):
    end = tokenizer.special_tokens["<|endoftext|>"]
    model, n = scripted(tokenizer, [*tokenizer.encode("a story"), end], monkeypatch)
    (whole,) = generate(model, [[end]], max_new_tokens=n, tokenizer=tokenizer, stop_tokens=[end])
    assert (whole.text, whole.ids[-1], whole.finish_reason) == ("a story", end, "stop")


@pytest.mark.parametrize("how", SAMPLINGS)
def test_a_stream_is_generate(tokenizer, how):
    model = made(vocab_size=tokenizer.vocab_size)
    options = {"max_new_tokens": 100, "sampling": SAMPLINGS[how], "tokenizer": tokenizer}
    for prompt in ("the fox", [3]):
        (whole,) = generate(model, [prompt], **options)
        pieces = list(stream(model, prompt, **options))
        assert [piece.id for piece in pieces] == whole.ids
        assert "".join(piece.text for piece in pieces) == whole.text == tokenizer.decode(whole.ids)
        assert pieces[-1].finish_reason == whole.finish_reason


def test_a_stream_complains_at_once(llama):
    with pytest.raises(ValueError, match="max_new_tokens: expected at least 1"):
        stream(llama, [1], max_new_tokens=0)
    with pytest.raises(ValueError, match="prompt: expected at least one token"):
        stream(llama, [], max_new_tokens=1)


# --- beams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 0.6, 2.0])
@pytest.mark.parametrize("n_beams", [2, 5])
def test_beam_search_is_transformers(models, tmp_path, n_beams, length_penalty):
    model = models["llama"]
    peer = peer_of(model, tmp_path)
    for stop in (None, [7], [3, 9]):
        for prompt in prompts_of((4, 6, 2)):
            out = peer.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(),
                num_beams=n_beams, num_return_sequences=n_beams, max_new_tokens=12,
                do_sample=False, early_stopping="never", length_penalty=length_penalty,
                eos_token_id=stop, pad_token_id=0,
            )  # fmt: skip
            ours = beam_search(
                model, prompt, n_beams=n_beams, max_new_tokens=12,
                length_penalty=length_penalty, stop_tokens=stop or (),
            )  # fmt: skip
            for mine, row in zip(ours, out.tolist(), strict=True):
                assert mine.ids == row[len(prompt) :][: len(mine.ids)]


def test_one_beam_is_greedy(llama):
    for prompt in prompts_of():
        options = {"max_new_tokens": 20, "stop_tokens": [7]}
        (expected,) = generate(llama, [prompt], sampling=GREEDY, **options)
        (ours,) = beam_search(llama, prompt, n_beams=1, length_penalty=0, **options)
        assert ours.ids == expected.ids and ours.finish_reason == expected.finish_reason


def test_wide_beams_find_the_most_likely_text():
    model = made(vocab_size=5)
    best = beam_search(model, [1], n_beams=125, max_new_tokens=3, length_penalty=0)[0]
    scores = {}
    for ids in itertools.product(range(5), repeat=3):
        text = torch.tensor([[1, *ids]])
        scores[ids] = model(text[:, :-1]).log_softmax(-1)[0].gather(1, text[0, 1:, None]).sum()
    assert tuple(best.ids) == max(scores, key=scores.get)
    assert sum(best.log_probs) == pytest.approx(max(scores.values()).item(), abs=1e-4)


def test_beam_search_at_the_end_of_the_context(llama):
    (best, *_) = beam_search(llama, [1] * 46, n_beams=3, max_new_tokens=9)
    assert len(best.ids) == 3 and best.finish_reason == "context"
    with pytest.raises(ValueError, match="n_beams: expected at least 1"):
        beam_search(llama, [1], n_beams=0, max_new_tokens=2)
    with pytest.raises(ValueError, match="length_penalty: expected a number"):
        beam_search(llama, [1], n_beams=2, max_new_tokens=2, length_penalty=math.nan)


@pytest.mark.parametrize("name", ["sampling", "stop_strings", "on_full"])
def test_beam_search_refuses_what_it_does_not_do(tokenizer, name):
    model = made(vocab_size=tokenizer.vocab_size)
    wrong = {"sampling": GREEDY, "stop_strings": ["x"], "on_full": "slide"}[name]
    with pytest.raises(ValueError, match=f"{name}: expected"):
        beam_search(model, [1], max_new_tokens=2, tokenizer=tokenizer, **{name: wrong})


# --- drafts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "mistral"])
@pytest.mark.parametrize("n_draft", [1, 3, 6])
def test_greedy_speculation_is_greedy(models, kind, n_draft):
    for draft in (made(seed=9, n_layers=1).double(), models[kind]):
        for prompt in prompts_of((1, 9, 30)):
            options = {"max_new_tokens": 30, "sampling": GREEDY, "stop_tokens": [5]}
            (expected,) = generate(models[kind], [prompt], **options)
            ours, stats = speculative_generate(
                models[kind], draft, prompt, n_draft=n_draft, **options
            )
            assert ours.ids == expected.ids and ours.finish_reason == expected.finish_reason
            assert ours.log_probs == pytest.approx(expected.log_probs, abs=1e-9)
            assert stats.n_tokens == len(ours.ids) and stats.n_passes <= stats.n_tokens
            if draft is models[kind]:
                assert stats.acceptance_rate == 1


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.5)],
)
def test_speculation_has_the_distribution_of_the_target(untyped, sampling):
    model, draft = made(vocab_size=4, spread=1.0), made(seed=7, vocab_size=4, spread=1.0)
    n, counts = 300, Counter()
    for seed in range(n):
        done, _ = speculative_generate(
            model, draft, [1], max_new_tokens=2, n_draft=1, sampling=sampling, seed=seed
        )
        counts[tuple(done.ids)] += 1
    expected = {}
    for ids in itertools.product(range(4), repeat=2):
        probability, text = 1.0, [1]
        for token in ids:
            logits, history = model(torch.tensor([text]))[:, -1], torch.tensor([text])
            p = next_token_distribution(logits, sampling, history)
            probability, text = probability * p[0, token].item(), [*text, token]
        expected[ids] = probability
    possible = [ids for ids, p in expected.items() if p > 0]
    assert set(counts) <= set(possible)
    total = sum(expected[ids] for ids in possible)
    frequent = [ids for ids in possible if n * expected[ids] >= 5]  # chi-square wants no rare ones
    observed = [counts[ids] for ids in frequent]
    wanted = [n * expected[ids] / total for ids in frequent]
    observed.append(n - sum(observed))
    wanted.append(n - sum(wanted))
    if wanted[-1] < 5:
        observed[-2:], wanted[-2:] = [sum(observed[-2:])], [sum(wanted[-2:])]
    assert chi_square(observed, wanted) > 1e-3


@given(st.integers(0, 10_000))
@settings(max_examples=4)
def test_verify_gives_the_target_whatever_the_draft(seed):
    generator = torch.Generator().manual_seed(seed)
    p = (3 * torch.randn(2, 6, generator=generator)).softmax(-1)
    q = (3 * torch.randn(1, 6, generator=generator)).softmax(-1)
    uniforms = uniforms_of(seed, 0, 3 * 1500).reshape(-1, 3)
    counts, accepted = torch.zeros(6), 0
    for draft_uniform, *rest in uniforms:
        token = draw(q, torch.tensor([draft_uniform])).item()
        n, last = verify(p, q, [token], np.array(rest))
        counts[token if n else last] += 1
        accepted += n
    assert (counts / 1500 - p[0]).abs().max() < 0.06
    overlap = torch.minimum(p[0], q[0]).sum().item()
    assert accepted / 1500 == pytest.approx(overlap, abs=0.06)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": P[:1]}, r"draft: expected the shape \(0, 4\), a row less than target, got"),
        ({"target": V}, "target: expected numbers from 0 on that sum to 1"),
        ({"draft": V[:1]}, "draft: expected numbers from 0 on that sum to 1"),
        ({"draft": P[:1, :3]}, r"draft: expected the shape \(1, 4\)"),
        ({"draft": [[1.0]]}, r"draft: expected the shape \(1, 4\)"),
        ({"tokens": [4]}, "tokens: expected ids from 0 to 3, got 4"),
        ({"tokens": [1, 2]}, r"tokens: expected 1, one for each row of draft, got \[1, 2\]"),
        ({"tokens": ["a"]}, "tokens: expected ids, which are whole numbers, got 'a'"),
        (
            {"draft": torch.tensor([[1.0, 0, 0, 0]])},
            "tokens: expected what draft could draw, got 2",
        ),
        ({"uniforms": np.array([0.5])}, r"uniforms: expected the shape \(2,\), got \(1,\)"),
        ({"uniforms": np.array([0.5, 1.0])}, "uniforms: expected numbers from 0 to below 1, got 1"),
        ({"uniforms": [0.5, 0.5]}, "uniforms: expected an array, got"),
    ],
)
def test_verify_names_what_it_was_given(changes, message):
    good = {"target": P, "draft": P[:1], "tokens": [2], "uniforms": np.array([0.5, 0.5])}
    assert verify(**good) == (1, 2)
    with pytest.raises(ValueError, match=f"^{message}"):
        verify(**good | changes)


def test_a_rejected_token_is_replaced_from_what_is_owed():
    p, q = torch.tensor([[0.2, 0.8], [0.5, 0.5]]), torch.tensor([[0.8, 0.2]])
    assert verify(p, q, [0], np.array([0.24, 0.0])) == (1, 0)  # accepted below p / q = 1 / 4
    assert verify(p, q, [0], np.array([0.26, 0.0])) == (0, 1)
    assert verify(p, p[:1], [1], np.array([0.999, 0.6])) == (1, 1)


def test_expected_tokens():
    assert expected_tokens(0.0, 4) == 1 and expected_tokens(1.0, 4) == 5
    assert expected_tokens(0.8, 5) == pytest.approx((1 - 0.8**6) / 0.2)


def test_a_draft_must_fit(llama):
    with pytest.raises(ValueError, match="draft: expected a vocabulary of 61 tokens"):
        speculative_generate(llama, made(vocab_size=60), [1], max_new_tokens=3)
    with pytest.raises(ValueError, match="draft: expected a context of at least 48 tokens"):
        speculative_generate(llama, made(context_length=40), [1], max_new_tokens=3)
    with pytest.raises(ValueError, match="n_draft: expected at least 1"):
        speculative_generate(llama, llama, [1], max_new_tokens=3, n_draft=0)


def test_speculation_cannot_slide(llama):
    with pytest.raises(ValueError, match="on_full: expected one of stop, error, got 'slide'"):
        speculative_generate(llama, llama, [1], max_new_tokens=3, on_full="slide")


def test_speculation_ends_where_generate_does(llama, tokenizer):
    model = made(vocab_size=tokenizer.vocab_size)
    done, _ = speculative_generate(model, model, [1] * 40, max_new_tokens=99)
    assert len(done.ids) == 9 and done.finish_reason == "context"
    options = {"max_new_tokens": 40, "sampling": GREEDY, "tokenizer": tokenizer}
    (whole,) = generate(model, ["the"], **options)
    stop = whole.text[len(whole.text) // 2 :][:3]
    (cut,) = generate(model, ["the"], stop_strings=[stop], **options)
    done, _ = speculative_generate(model, model, "the", stop_strings=[stop], **options)
    assert done.text == cut.text and done.ids == cut.ids and done.finish_reason == "stop"


def test_guesses_after_the_end_are_not_counted(llama):
    options = {"max_new_tokens": 9, "sampling": GREEDY}
    (whole,) = generate(llama, [[1]], **options)
    stop = whole.ids[2]
    end = whole.ids.index(stop) + 1
    done, stats = speculative_generate(llama, llama, [1], n_draft=6, stop_tokens=[stop], **options)
    assert done.ids == whole.ids[:end]
    assert (stats.n_passes, stats.n_drafted) == (1, 6)
    assert stats.n_tested == stats.n_accepted == stats.n_tokens == end


# --- bits ---------------------------------------------------------------------------------------


@given(st.integers(1, 8), st.integers(1, 8), st.floats(1e-30, 1e30), st.integers(0, 999))
def test_no_weight_moves_by_more_than_half_a_step(rows, columns, size, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = size * torch.randn(rows, columns, generator=generator)
    numbers, scale = quantize_rows(weight)
    error = (numbers.double() * scale[:, None].double() - weight.double()).abs()
    assert (error <= scale[:, None].double() * 0.501).all()  # a quotient may round at a half
    assert numbers.abs().amax(dim=1).eq(127).all()


def test_quantized_numbers_are_torchs():
    weight = torch.randn(20, 30)
    numbers, scale = quantize_rows(weight)
    zeros = torch.zeros(20, dtype=torch.int32)
    peer = torch.fake_quantize_per_channel_affine(weight, scale, zeros, 0, -128, 127)
    assert (numbers * scale[:, None] - peer).abs().max() < 1e-5 * scale.max()
    assert quantize_rows(torch.zeros(2, 3))[0].tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_model_is_near_and_smaller(models, kind):
    model = models[kind]
    small, ids = quantize(model), torch.randint(61, (2, 30))
    assert any(isinstance(m, QuantizedLinear) for m in small.modules())
    assert stored_bytes(small) < (1.0 if kind == "mixtral" else 0.65) * stored_bytes(model)
    difference = (small(ids) - model(ids)).abs().mean() / model(ids).std()
    assert 0 < difference < 0.05
    assert (small.lm_head.weight is small.embedding.weight) == (kind in ("gpt2", "qwen2"))
    with_cache = generate(small, prompts_of(), max_new_tokens=20)
    assert ids_of(with_cache) == ids_of(
        generate(small, prompts_of(), max_new_tokens=20, use_cache=False)
    )


def test_a_model_that_is_a_linear_layer_is_quantized():
    layer = torch.nn.Linear(5, 3).double()
    small, x = quantize(layer), torch.randn(2, 4, 5)
    assert isinstance(small, QuantizedLinear) and type(layer) is torch.nn.Linear
    bound = (small.scale / 2 * x.abs().sum(-1, keepdim=True)).double()
    assert ((small(x.double()) - layer(x.double())).abs() <= 1.01 * bound + 1e-6).all()
    with pytest.raises(
        ValueError, match=r"x: expected floats of shape \(..., 5\), got torch.float32"
    ):
        inspect.unwrap(QuantizedLinear.forward)(small, torch.zeros(2, 4))


def test_a_quantized_state_dict_loads(tmp_path):
    from safetensors.torch import load_file, save_file

    small = quantize(made(**KINDS["llama"]))
    save_file(small.state_dict(), tmp_path / "int8.safetensors")
    fresh = quantize(made(seed=5, **KINDS["llama"]))
    fresh.load_state_dict(load_file(tmp_path / "int8.safetensors"))
    ids = torch.randint(61, (2, 9))
    assert torch.equal(fresh(ids), small(ids))
    assert fresh.blocks[0].attention.q_proj.weight.dtype == torch.int8


# --- the fast step ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "qwen3", "mistral"])
def test_the_fused_step_is_the_models(models, kind):
    model, generator = models[kind], torch.Generator().manual_seed(0)
    assert isinstance(module._next_step(model), module._FusedStep)
    fused, plain = module._FusedStep(model), module._plain_step(model)
    caches = [model.new_cache(3) for _ in range(2)]
    positions = torch.tensor([[-1, -1, 0], [-1, 0, 1], [0, 1, 2]])
    with torch.inference_mode():
        for alike in (False, True):
            for cache in caches:
                cache.reset()
                ids = torch.randint(61, (3, 3), generator=torch.Generator().manual_seed(1))
                model(ids, position_ids=None if alike else positions, cache=cache)
            for _ in range(30):
                ids = torch.randint(61, (3,), generator=generator)
                ours, expected = fused(ids, caches[0]), plain(ids, caches[1])
                torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)


def test_what_cannot_be_fused_is_not(models):
    for model in (models["mixtral"], models["post"], quantize(models["llama"])):
        assert not isinstance(module._next_step(model), module._FusedStep)
    half = made(n_kv_heads=2).to(torch.bfloat16)
    assert not isinstance(module._next_step(half), module._FusedStep)
    assert len(generate(half, [[1]], max_new_tokens=5)[0].ids) == 5
    assert isinstance(module._next_step(made()), module._FusedStep)  # in float32


# --- compiled models ----------------------------------------------------------------------------


@pytest.fixture
def graphs():
    """Say how many graphs were compiled since the test began."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_a_compiled_step_is_compiled_once_and_not_for_each_token(graphs, kind):
    model, prompts = made(**KINDS[kind]), prompts_of()
    options = {"max_new_tokens": 20, "sampling": GREEDY}
    expected = ids_of(generate(model, prompts, **options))
    compiled = torch.compile(model, backend="eager")
    assert ids_of(generate(compiled, prompts, **options)) == expected
    assert graphs() == 1
    for n in (5, 9, 17):  # caches of other lengths
        generate(compiled, prompts, **options | {"max_new_tokens": n})
    assert graphs() == 1
    model.compile(backend="eager")  # in place
    assert ids_of(generate(model, prompts, **options)) == expected


@pytest.mark.usefixtures("untyped", "graphs")
def test_a_compiled_model_can_do_all_that_the_model_can(llama):
    draft, prompt, n = made(seed=3), [5, 6, 7], 12
    compiled = torch.compile(llama, backend="eager")
    one, stats = speculative_generate(llama, draft, prompt, max_new_tokens=n)
    other, same = speculative_generate(compiled, draft, prompt, max_new_tokens=n)
    assert (one.ids, stats) == (other.ids, same)
    beams = [ids_of(beam_search(m, prompt, max_new_tokens=5)) for m in (llama, compiled)]
    assert beams[0] == beams[1]
    pieces = [
        [piece.id for piece in stream(m, prompt, max_new_tokens=n)] for m in (llama, compiled)
    ]
    assert pieces[0] == pieces[1]


# --- saving what is quantized -------------------------------------------------------------------


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "post"])
def test_a_quantized_model_is_not_saved_without_its_weights(models, kind, tmp_path):
    small = quantize(models[kind])
    with pytest.raises(ValueError, match=r"^model: expected a parameter blocks\.0\..*quantized"):
        save_model(small, tmp_path / "small")
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("changes", [{"layout": "interleaved"}, {"d_rope": 4}, {}], ids=str)
def test_greedy_text_is_that_of_the_whole_model_for_each_rotation(changes):
    sizes = dict(vocab_size=61, context_length=32, d_model=32, n_layers=2, n_heads=4)
    model = TransformerLM(ModelConfig(**sizes | changes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = [3, 5, 7, 9]
    with torch.no_grad():
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    greedy = Sampling(temperature=0)
    (completion,) = generate(model, [ids[:4]], max_new_tokens=8, sampling=greedy)
    assert completion.ids == ids[4:]


# --- the compiled step --------------------------------------------------------------------------


@pytest.fixture
def programs(monkeypatch, graphs, untyped):
    """Trace a compiled step as in earnest, but write no C++; say how many graphs there are."""
    real = torch.compile

    def traced(function, options, **more):
        chosen = {"guard_filter_fn": options["guard_filter_fn"]} if len(options) > 1 else None
        return real(function, backend="eager", options=chosen, **more)

    module._compiled_step.cache_clear()
    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(module.shutil, "which", lambda name: name)
    yield graphs
    module._compiled_step.cache_clear()


SAMPLED = Sampling(temperature=0.8, top_p=0.9)
WAYS = [GREEDY, SAMPLED, Sampling(repetition_penalty=1.3, banned_tokens=[3], min_p=0.01)]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "qwen3"])
def test_the_compiled_step_gives_the_tokens_of_the_fused_one(programs, kind):
    model = made(**KINDS[kind])
    for rows in ([[5, 6, 7]], [[5], [1, 2, 3], [9, 8]], [[4, 4]] * 3):
        for sampling in WAYS:
            stops = [7, 11] if len(rows) > 1 else []
            options = {"max_new_tokens": 20, "sampling": sampling, "stop_tokens": stops}
            one, other = (generate(model, rows, compile=c, **options) for c in (False, True))
            assert ids_of(one) == ids_of(other)
            for a, b in zip(one, other, strict=True):
                assert a.finish_reason == b.finish_reason
                assert a.log_probs == pytest.approx(b.log_probs, abs=1e-4)
    assert programs() == 6  # of one row and of three: the best, of a nucleus, and logits


@pytest.mark.parametrize("mass", [0.3, 0.75, 0.9, 1.0, None])
def test_a_nucleus_without_sorting_gives_the_tokens_of_the_sorted_one(mass):
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(200, 50, generator=generator)
    logits[::2] = logits[::2].round()  # many ties, also at the border
    uniforms = torch.rand(200, dtype=torch.float64, generator=generator)
    expected = sample(logits, Sampling(temperature=0.7, top_p=mass), uniforms=uniforms)
    numbers = torch.tensor([0.7, 2.0 if mass is None else mass]).unbind()
    tokens, log_probs, best = module._token_of_nucleus(logits, uniforms, *numbers)
    assert tokens.tolist() == expected.tolist()
    own = logits.log_softmax(dim=-1).gather(1, expected[:, None])[:, 0]
    torch.testing.assert_close(log_probs, own)
    assert best.tolist() == logits.amax(dim=-1).tolist()


def test_the_border_of_a_nucleus_is_exact():
    shares = torch.tensor([[0.5, 0.25, 0.125, 0.125], [1.0, 0.0, 0.0, 0.0], [2.0**-140, 1, 0, 0]])
    found = [module._border(shares, torch.tensor(mass))[:, 0].tolist() for mass in (0.5, 0.75, 2)]
    assert found == [[0.5, 1.0, 1.0], [0.25, 1.0, 1.0], [0.0, 0.0, 0.0]]


def test_the_best_token_is_the_first_of_equals():
    tokens, log_probs, best = module._best_token(torch.tensor([[1.0, 2.0, 2.0], [0.0, -1e9, -9]]))
    assert tokens.tolist() == [1, 0] and best.tolist() == [2.0, 0.0]
    assert log_probs.tolist() == pytest.approx([-0.8620, -0.0001234], abs=1e-4)


def test_a_program_that_chooses_tells_of_a_broken_model(programs):
    model = made()
    generate(model, [[5]], max_new_tokens=3, sampling=GREEDY, compile=True)
    model.lm_head.weight.data[3] = math.nan
    for sampling in (GREEDY, SAMPLED):
        with pytest.raises(ValueError, match=r"^model: expected logits, got NaN after 0 new"):
            generate(model, [[5]], max_new_tokens=3, sampling=sampling, compile=True)


def test_what_was_compiled_serves_other_weights_models_and_lengths(programs):
    model, prompt, options = made(), [[5, 6]], {"max_new_tokens": 9, "sampling": GREEDY}
    generate(model, prompt, compile=True, **options)
    before = ids_of(generate(model, prompt, **options))
    with torch.no_grad():
        for parameter in model.parameters():  # in place, as an optimizer does, and unseen by it
            parameter.data.mul_(-1.5)
    after = ids_of(generate(model, prompt, **options))
    assert before != after == ids_of(generate(model, prompt, compile=True, **options))
    twin = made(seed=5)
    expected = ids_of(generate(twin, [[1, 2, 3, 4]], max_new_tokens=17, sampling=GREEDY))
    arguments = {"max_new_tokens": 17, "sampling": GREEDY, "compile": True}
    assert ids_of(generate(twin, [[1, 2, 3, 4]], **arguments)) == expected
    assert programs() == 1
    wide = made().double()  # another type of numbers is another program
    expected = ids_of(generate(wide, prompt, **options))
    assert ids_of(generate(wide, prompt, compile=True, **options)) == expected
    assert programs() == 2


def test_a_compiled_step_serves_streams_caches_and_contexts_that_end(programs):
    model, options = made(), {"max_new_tokens": 60, "sampling": SAMPLED}
    for on_full in ("stop", "slide"):
        rows = [[1] * 30, [2, 3]]  # the first is full long before the second
        one, other = (
            generate(model, rows, on_full=on_full, compile=c, **options) for c in (False, True)
        )
        assert ids_of(one) == ids_of(other)
    pieces = stream(model, [5, 6], compile=True, max_new_tokens=20, sampling=SAMPLED)
    whole = generate(model, [[5, 6]], max_new_tokens=20, sampling=SAMPLED)[0]
    assert [piece.id for piece in pieces] == whole.ids
    kept, text = TextCache(model), [5, 6]
    for _ in range(3):
        arguments = {"max_new_tokens": 5, "sampling": SAMPLED}
        done = generate(model, [text], cache=kept, compile=True, **arguments)[0]
        assert done.ids == generate(model, [text], **arguments)[0].ids
        text = [*text, *done.ids, 7]


def test_where_there_is_no_compiled_step_an_error_says_why_and_auto_does_without(
    programs, models, monkeypatch
):
    options = {"max_new_tokens": 3, "sampling": GREEDY}

    def refused(model, why, **more):
        for run in (lambda **c: generate(model, [[5]], **c), lambda **c: stream(model, [5], **c)):
            with pytest.raises(ValueError, match=f"^compile: expected {why}.*, got True"):
                run(compile=True, **options, **more)
        auto = generate(model, [[5]], compile="auto", **options, **more)
        assert ids_of(auto) == ids_of(generate(model, [[5]], **options, **more))

    for kind in ("mixtral", "post"):
        refused(models[kind], "False for a model with experts")
    refused(quantize(models["llama"]), "False for a model with experts.* quantized")
    refused(models["mistral"], "False for a model with a sliding window")
    refused(models["llama"], "False with use_cache=False", use_cache=False)
    assert programs() == 0
    generate(models["llama"], [[5]], compile="auto", **options)
    assert programs() == 1
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused(models["llama"], r"False without a C\+\+ compiler, no-such-compiler")
    for wrong in (None, "yes", 1):
        with pytest.raises(ValueError, match=r"^compile: expected True, False or 'auto', got"):
            generate(models["llama"], [[5]], compile=wrong, **options)


COMPILER = module._no_compiling(TransformerLM(ModelConfig(**SMALL))) is None


@pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of PyTorch's compiler about itself
@pytest.mark.usefixtures("untyped", "graphs")
def test_the_program_that_a_compiler_makes_gives_the_same_tokens():
    model = made(n_layers=1, n_kv_heads=2)
    for sampling in (GREEDY, SAMPLED):
        options = {"max_new_tokens": 30, "sampling": sampling}
        expected = ids_of(generate(model, [[5], [1, 2, 3]], **options))
        assert ids_of(generate(model, [[5], [1, 2, 3]], compile=True, **options)) == expected
        expected = ids_of(generate(model, [[5]], **options))
        assert ids_of(generate(model, [[5]], compile=True, **options)) == expected
