"""Fits, optima and the table of runs of chapter 17."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmbook import scaling
from llmbook.model import ModelConfig, count_parameters, flops_per_token
from llmbook.scaling import (
    PUBLISHED_LAWS,
    Allocation,
    BudgetGame,
    Run,
    ScalingFit,
    ScalingLaw,
    best_runs,
    compute_optimal,
    fit_scaling_law,
    isoflop_minimum,
    read_runs,
    run_config,
    scaling_corpus,
    train_run,
)
from llmbook.training import Trainer

TABLE = Path(__file__).parents[1] / "benchmarks" / "results" / "scaling.csv"
LAW = PUBLISHED_LAWS["besiroglu2024"]
LAWS = st.builds(
    ScalingLaw,
    E=st.floats(0, 30),
    A=st.floats(1, 1e5),
    B=st.floats(1, 1e5),
    alpha=st.floats(0.1, 1),
    beta=st.floats(0.1, 1),
)


def design(sizes: int = 6, amounts: int = 6) -> tuple[np.ndarray, np.ndarray]:
    n, d = np.meshgrid(np.geomspace(7e7, 1e10, sizes), np.geomspace(5e9, 5e11, amounts))
    return n.ravel(), d.ravel()


def noisy(law: ScalingLaw, noise: float, seed: int = 0) -> tuple[np.ndarray, ...]:
    n, d = design()
    return n, d, law.predict(n, d) * np.exp(noise * np.random.default_rng(seed).normal(size=36))


# --- the law ------------------------------------------------------------------------------------


def test_the_law_is_its_formula_for_numbers_and_arrays():
    law = ScalingLaw(2.0, 100.0, 300.0, 0.5, 0.25)
    assert law.predict(1e4, 1e4) == pytest.approx(2 + 1 + 30)
    assert isinstance(law.predict(1e4, 1e4), float)
    assert law.predict([1e4, 1e8], np.array([1e4, 1e16])) == pytest.approx([33.0, 2.04])
    assert str(law) == "L = 2 + 100 / N^0.5 + 300 / D^0.25"
    assert law.exponent == pytest.approx(1 / 3)
    assert ScalingLaw(**json.loads(json.dumps(law.to_dict()))) == law


@given(LAWS, st.floats(1e3, 1e9), st.floats(1e3, 1e12))
def test_tokens_for_is_the_inverse_of_predict(law, parameters, tokens):
    loss = law.predict(parameters, tokens)
    price = law.B / tokens**law.beta
    if price > 1e-6 * loss:  # else the data no longer matter, and rounding decides
        assert law.tokens_for(loss, parameters) == pytest.approx(tokens, rel=1e-3)
    assert law.tokens_for(0.9 * (law.E + law.A / parameters**law.alpha), parameters) == math.inf


@pytest.mark.parametrize("name", ["A", "B", "alpha", "beta"])
@pytest.mark.parametrize("value", [0.0, -0.3, math.nan, math.inf])
def test_a_law_without_sense_is_refused_by_name(name, value):
    numbers = {"E": 1.0, "A": 1.0, "B": 1.0, "alpha": 0.3, "beta": 0.3}
    with pytest.raises(ValueError, match=f"{name}: expected a finite number above 0"):
        ScalingLaw(**numbers | {name: value})


def test_a_floor_may_be_zero_but_not_below():
    assert ScalingLaw(0.0, 1.0, 1.0, 0.3, 0.3).E == 0
    with pytest.raises(ValueError, match=r"E: .* got -1"):
        ScalingLaw(-1.0, 1.0, 1.0, 0.3, 0.3)


def test_predictions_for_nothing_are_refused():
    with pytest.raises(ValueError, match=r"parameters: .* got 0"):
        LAW.predict(0.0, 1e9)
    with pytest.raises(ValueError, match=r"tokens: .* got -1"):
        LAW.predict([1e6, 1e6], [1e6, -1.0])
    with pytest.raises(ValueError, match=r"parameters: expected .* got None"):
        LAW.predict(None, 1e9)
    with pytest.raises(ValueError, match=r"tokens: expected .* got 'all'"):
        LAW.predict(1e9, "all")
    with pytest.raises(ValueError, match=r"tokens: .* parameters, shape \(2,\), got shape \(3"):
        LAW.predict([1e6, 1e6], [1e6, 1e6, 1e6])


# --- the fit ------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [*PUBLISHED_LAWS.values(), ScalingLaw(18.0, 1e4, 2e4, 0.6, 0.6)])
def test_without_noise_the_law_is_found(law):
    n, d = design()
    found = fit_scaling_law(n, d, law.predict(n, d))
    for name, value in law.to_dict().items():
        assert getattr(found.law, name) == pytest.approx(value, rel=1e-3), name
    assert found.error < 1e-6 and found.n_runs == 36


def test_with_noise_the_law_is_near():
    found = fit_scaling_law(*noisy(LAW, 0.003)).law
    assert found.alpha == pytest.approx(LAW.alpha, abs=0.05)
    assert found.beta == pytest.approx(LAW.beta, abs=0.05)
    assert pytest.approx(LAW.E, abs=0.1) == found.E


@pytest.mark.parametrize("delta", [1e-3, 0.05])
def test_no_other_optimizer_finds_a_better_end(delta):
    minimize = pytest.importorskip("scipy.optimize").minimize
    n, d, losses = noisy(LAW, 0.01, seed=1)
    found = fit_scaling_law(n, d, losses, delta=delta)

    def objective(x):
        a, b, e, alpha, beta = x
        terms = [a - alpha * np.log(n), b - beta * np.log(d), e + 0 * n]
        r = np.abs(np.logaddexp.reduce(terms) - np.log(losses))
        return np.where(r <= delta, r * r / 2, delta * (r - delta / 2)).sum()

    law = found.law
    ours = np.array([math.log(law.A), math.log(law.B), math.log(law.E), law.alpha, law.beta])
    assert objective(ours) == pytest.approx(found.objective, rel=1e-6)
    ends = [minimize(objective, ours, method="Nelder-Mead", options={"maxiter": 4000})]
    for start in ((5, 5, 0.5, 0.3, 0.3), (8, 9, 0.5, 0.5, 0.5), (6, 7, 0.1, 0.3, 0.3)):
        ends.append(minimize(objective, start, method="BFGS"))
    assert found.objective <= min(end.fun for end in ends) * (1 + 1e-4)


def test_one_run_that_went_wrong_hardly_matters():
    n, d, losses = noisy(LAW, 0.001)
    losses[7] *= 1.5
    robust, square = (fit_scaling_law(n, d, losses, delta=delta).law for delta in (1e-3, 10.0))
    goal = LAW.predict(2e10, 1e12)
    assert abs(robust.predict(2e10, 1e12) - goal) < 0.01
    assert abs(square.predict(2e10, 1e12) - goal) > 0.01


def test_the_default_delta_is_that_of_the_source():
    runs = noisy(LAW, 0.01)
    default = fit_scaling_law(*runs)
    assert default == fit_scaling_law(*runs, delta=1e-3) and default.resampled == ()


def test_the_unit_of_the_loss_changes_its_terms_only():
    n, d, losses = noisy(LAW, 0.003)
    nats, bits = (fit_scaling_law(n, d, x).law for x in (losses, losses / math.log(2)))
    assert bits.E * math.log(2) == pytest.approx(nats.E, rel=1e-2)
    assert bits.exponent == pytest.approx(nats.exponent, rel=1e-2)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    covered = 0
    for seed in range(20):
        found = fit_scaling_law(*noisy(LAW, 0.01, seed), delta=0.05, n_bootstrap=60, seed=seed)
        covered += LAW.exponent in found.interval(lambda law: law.exponent, 0.9)
    assert 13 <= covered <= 20, covered


def test_a_bootstrap_depends_on_its_seed_alone():
    runs = noisy(LAW, 0.01)
    one, same, other = (fit_scaling_law(*runs, n_bootstrap=5, seed=seed) for seed in (0, 0, 1))
    assert one == same and one.law == other.law and one.resampled != other.resampled
    assert fit_scaling_law(*runs, n_bootstrap=5) == one  # the default seed
    assert len(one.resampled) == 5
    interval = one.interval(lambda law: law.E)
    assert interval.level == 0.95 and interval.estimate == one.law.E
    assert interval.low <= interval.high


@pytest.mark.parametrize(("sizes", "seed"), [(6, 3), (3, 786)])  # that one draws two sizes first
def test_each_law_of_a_bootstrap_is_the_fit_of_a_sample_with_three_sizes(sizes, seed):
    n, d = design(sizes, 6)
    losses = LAW.predict(n, d) * np.exp(0.003 * np.random.default_rng(0).normal(size=len(n)))
    random, samples = np.random.default_rng(seed), []
    while len(samples) < 4:
        rows = random.integers(0, len(n), len(n))
        if min(len(set(n[rows])), len(set(d[rows]))) >= 3:
            samples.append(rows)
    laws = fit_scaling_law(n, d, losses, n_bootstrap=4, seed=seed).resampled
    for rows, law in zip(samples, laws, strict=True):
        alone = fit_scaling_law(n[rows], d[rows], losses[rows]).law
        assert law.predict(n, d) == pytest.approx(alone.predict(n, d), rel=1e-3)


def test_an_interval_has_the_percentiles_and_the_error_is_a_root_mean_square():
    laws = tuple(ScalingLaw(float(E), 1.0, 1.0, 0.3, 0.3) for E in range(101))
    fit = ScalingFit(LAW, 36, 1.0, 0.1, laws)
    interval = fit.interval(lambda law: law.E, 0.9)
    assert (interval.low, interval.high) == pytest.approx((5, 95))
    n, d, losses = noisy(LAW, 0.01)
    found = fit_scaling_law(n, d, losses)
    residuals = np.log(found.law.predict(n, d) / losses)
    assert found.error == pytest.approx(np.sqrt(np.mean(residuals**2)))


def test_a_fit_goes_through_json_and_says_what_it_is():
    found = fit_scaling_law(*noisy(LAW, 0.003), n_bootstrap=3)
    assert ScalingFit.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert str(found).startswith(str(found.law)) and "(36 runs, error 0." in str(found)


def test_an_interval_needs_a_bootstrap():
    with pytest.raises(ValueError, match=r"resampled: .* got none"):
        fit_scaling_law(*noisy(LAW, 0.003)).interval(lambda law: law.E)


N, D = design(3, 3)
GOOD = {"parameters": N, "tokens": D, "losses": LAW.predict(N, D)}
RISING = {"losses": 2 + (N / 1e8) ** 0.3 + (D / 1e9) ** -0.3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": N[:5], "tokens": D[:5], "losses": N[:5]}, r"parameters: .* at least 6"),
        ({"parameters": np.full(9, 1e8)}, r"parameters: .* 3 different values.* got 1 in 9"),
        ({"tokens": np.where(D > 1e10, 1e10, D)}, r"tokens: .* 3 different values.* got 2 in 9"),
        ({"tokens": 20 * N}, r"tokens: .* not the same power"),
        ({"tokens": N**0.7}, r"tokens: .* not the same power"),
        ({"losses": np.append(GOOD["losses"][:-1], 0.0)}, r"losses: .* above 0, got 0"),
        ({"losses": np.append(GOOD["losses"][:-1], math.nan)}, r"losses: .* finite.* got nan"),
        ({"parameters": -N}, r"parameters: .* above 0, got -1"),
        ({"losses": GOOD["losses"][:8]}, r"losses: .* each of 9 runs, got 8"),
        ({"delta": 0.0}, r"delta: .* above 0, got 0"),
        ({"n_bootstrap": -1}, r"n_bootstrap: .* at least 0, got -1"),
        (RISING, r"parameters: .* losses that fall"),
    ],
)
def test_runs_that_determine_no_law_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        fit_scaling_law(**GOOD | changes)


# --- the best size ------------------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(LAWS, st.floats(1e9, 1e26))
def test_the_optimum_is_that_of_the_closed_form(law, flops):
    g = (law.alpha * law.A / (law.beta * law.B)) ** (1 / (law.alpha + law.beta))
    size = g * (flops / 6) ** law.exponent
    if size < 0.999:
        with pytest.raises(ValueError, match="flops: expected one whose best model"):
            compute_optimal(law, flops)
    assume(size > 1.001)
    found = compute_optimal(law, flops)
    assert found.parameters == pytest.approx(size, rel=1e-6)
    assert found.tokens == pytest.approx(flops / (6 * size), rel=1e-6)
    assert found.training_flops == pytest.approx(flops, rel=1e-9) and found.inference_flops == 0
    for factor in (0.8, 1.25):
        near = law.predict(factor * size, flops / (6 * factor * size))
        assert near >= found.loss * (1 - 1e-12)


@settings(deadline=None, max_examples=8)
@given(LAWS, st.floats(1e3, 1e12), st.floats(1e6, 1e15))
def test_with_use_no_neighbor_of_equal_loss_is_cheaper(law, size, used):
    loss = law.E + 2 * law.A / size**law.alpha
    found = compute_optimal(law, loss=loss, inference_tokens=used)
    cost = found.training_flops + found.inference_flops
    assert found.loss == pytest.approx(loss, rel=1e-6)
    for factor in (0.9, 1.1):
        n = factor * found.parameters
        other = 6 * n * law.tokens_for(loss, n) + 2 * n * used
        assert other >= cost * (1 - 1e-6)
    # The same point from its cost, where rounding leaves digits to tell neighbors apart
    if 1e-6 * used < found.tokens < 1e25 and loss - law.E > 1e-2 * loss:
        again = compute_optimal(law, cost, inference_tokens=used)
        assert again.parameters == pytest.approx(found.parameters, rel=1e-3)


def test_plans_are_of_plain_numbers_and_of_models():
    plan = compute_optimal(LAW, np.float64(1e20), inference_tokens=np.float64(1e9))
    assert {type(number) for number in plan} == {float}
    with pytest.raises(ValueError, match="flops: expected one whose best model has a parameter"):
        compute_optimal(LAW, 1.0)
    with pytest.raises(ValueError, match="loss: expected one whose best model has a parameter"):
        compute_optimal(LAW, loss=1e6)


def test_more_use_asks_for_smaller_models_trained_longer():
    plans = [compute_optimal(LAW, loss=2.0, inference_tokens=i) for i in (0.0, 1e11, 1e13, 1e15)]
    for one, other in pairwise(plans):
        assert other.parameters < one.parameters and other.tokens > one.tokens
    assert Allocation(2.0, 40.0, 1.0, 480.0).tokens_per_parameter == 20


@pytest.mark.parametrize(
    ("flops", "loss", "message"),
    [
        (None, None, "flops: expected either"),
        (1e20, 2.0, "flops: expected either"),
        (0.0, None, r"flops: .* above 0, got 0"),
        (None, 1.8, r"loss: expected more than E = 1.817, got 1.8"),
    ],
)
def test_a_budget_or_a_loss_that_can_be(flops, loss, message):
    with pytest.raises(ValueError, match=message):
        compute_optimal(LAW, flops, loss=loss)
    with pytest.raises(ValueError, match=r"inference_tokens: .* got -1"):
        compute_optimal(LAW, 1e20, inference_tokens=-1.0)


def test_consequences_of_published_coefficients():
    """40 and about 70 billion parameters for Gopher's budget, and 20 tokens per parameter."""
    first, second = (compute_optimal(law, 5.76e23) for law in PUBLISHED_LAWS.values())
    assert first.parameters == pytest.approx(40e9, rel=0.02)
    assert second.parameters == pytest.approx(70e9, rel=0.05)
    assert 17 < second.tokens_per_parameter < 21 < 50 < first.tokens_per_parameter
    assert PUBLISHED_LAWS["hoffmann2022"].exponent == pytest.approx(0.46, abs=0.005)
    assert PUBLISHED_LAWS["besiroglu2024"].exponent == pytest.approx(0.513, abs=0.001)


def test_parabolas_find_the_valley():
    sizes = np.geomspace(1e3, 1e5, 7)
    size, loss = isoflop_minimum(sizes, 3 + 0.2 * (np.log(sizes) - 9) ** 2)
    assert size == pytest.approx(math.exp(9)) and loss == pytest.approx(3)
    budget = 1e22
    around = compute_optimal(LAW, budget).parameters * np.geomspace(0.5, 2, 5)
    size, _ = isoflop_minimum(around, LAW.predict(around, budget / (6 * around)))
    assert size == pytest.approx(compute_optimal(LAW, budget).parameters, rel=0.05)


@pytest.mark.parametrize(
    ("sizes", "losses", "message"),
    [
        ([1.0, 2.0], [1.0, 2.0], r"parameters: .* at least 3"),
        ([1.0, 1.0, 2.0], [1.0, 2.0, 3.0], "parameters: expected at least 3 sizes, got 2"),
        ([1.0, 2.0, 4.0], [1.0, 2.0, 1.0], "losses: expected a valley"),
        ([1.0, 2.0, 4.0], [1.0, 1.01, 1.0], "losses: expected a valley"),
        ([1.0, 2.0, 4.0], [1.0, 2.0, 1.0, 1.0], "losses: expected one for each of 3 sizes, got 4"),
        ([-1.0, 2.0, 4.0], [2.0, 1.0, 2.0], r"parameters: .* above 0, got -1"),
    ],
)
def test_what_has_no_valley_is_refused(sizes, losses, message):
    with pytest.raises(ValueError, match=message):
        isoflop_minimum(sizes, losses)


# --- the table of runs --------------------------------------------------------------------------


def test_the_committed_table_is_whole_and_tuned():
    runs = read_runs(TABLE)
    cells = {run[:2] for run in runs}
    assert {(d, s) for d in (8, 12, 16, 24, 32) for s in (100, 200, 400, 800)} <= cells
    assert (48, 1600) in cells and len({run[:4] for run in runs}) == len(runs)
    floor = scaling_corpus(2000).world.entropy()
    for best in best_runs(runs):
        rates = {r.learning_rate for r in runs if r[:2] == best[:2] and r.seed == 0}
        assert {best.learning_rate / 2, best.learning_rate * 2} <= rates, best[:2]
        assert best.loss > floor
        assert best.parameters == count_parameters(run_config(best.d_model))


def test_six_operations_for_each_parameter_and_token():
    for width, most in ((8, 1.25), (32, 1.16), (48, 1.12)):
        config = run_config(width)
        ratio = flops_per_token(config, 41) / (6 * count_parameters(config))
        assert 1 <= ratio < most  # the rest is attention between tokens
    run = Run(8, 1, 0.1, 0, 100, 10, 1000, 3.0)
    assert run.flops == 6e5
    large = ModelConfig.preset("llama3-8b")
    assert flops_per_token(large, 1) == pytest.approx(6 * count_parameters(large), rel=0.08)


def test_a_run_repeats_and_its_loss_is_above_the_floor():
    one, same = (train_run(8, 4, 0.05, seed=3, n_stories=2000) for _ in range(2))
    assert one == same and one.seed == 3 and one.tokens > 4 * 8 * 30
    assert one.loss > scaling_corpus(2000).world.entropy()
    assert train_run(8, 1, 0.05, n_stories=2000) == train_run(8, 1, 0.05, 0, n_stories=2000)
    with pytest.raises(ValueError, match=r"n_steps: expected at most 250, got 251: no story"):
        train_run(8, 251, 0.05, n_stories=2000)


def test_a_run_is_trained_as_its_description_says(monkeypatch):
    seen = []
    monkeypatch.setattr(scaling, "Trainer", lambda *given: seen.append(given) or Trainer(*given))
    train_run(8, 20, 0.05, n_stories=2000)
    (_, batches, settings), *others = seen
    assert not others and batches.batch_size == settings.batch_size == 8
    assert (settings.n_steps, settings.learning_rate, settings.warmup) == (20, 0.05, 2)
    assert (settings.schedule, settings.final, settings.weight_decay) == ("linear", 0.0, 0.0)


def test_a_loss_is_the_entropy_and_what_the_model_loses_on_the_same_stories(monkeypatch):
    corpus = scaling_corpus(2000)
    bits = (corpus.surprise + 1.5) * len(corpus.held_out) / math.log(2)
    monkeypatch.setattr(scaling, "documents_score", lambda *given: (bits, None))
    run = train_run(8, 1, 0.05, n_stories=2000)
    assert run.loss == pytest.approx(corpus.world.entropy() + 1.5, abs=1e-4)


def test_the_best_rate_stands_for_its_cell_with_the_mean_of_its_seeds():
    rows = [(0.1, 0, 5.0), (0.2, 0, 3.0), (0.2, 1, 5.0), (0.4, 0, 4.0), (0.4, 1, 1.0)]
    runs = [Run(8, 10, rate, seed, 100, 10, 50, loss) for rate, seed, loss in rows]
    other = Run(4, 10, 0.1, 0, 50, 5, 50, 9.0)
    assert best_runs([*runs, other]) == [other, runs[1]._replace(loss=4.0)]
    with pytest.raises(ValueError, match="runs: expected at least one"):
        best_runs([])


def test_a_file_that_is_no_table_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"path: expected columns d_model, .* got a, b"):
        read_runs(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(ValueError, match="got none"):
        read_runs(tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("8,100,fast,0,9608,7904,32493,141.0", "a number as learning_rate, got 'fast'"),
        ("8,100.5,0.01,0,9608,7904,32493,141.0", "a whole number as n_steps, got '100.5'"),
        ("8,100,0.01", "8 cells, got 3"),
    ],
)
def test_a_cell_that_is_no_number_is_named(tmp_path, row, message):
    good = "8,100,0.01,0,9608,7904,32493,141.0"
    (tmp_path / "x.csv").write_text("\n".join([",".join(Run._fields), good, row]))
    with pytest.raises(ValueError, match=rf"path: expected {message} \(.*x\.csv, line 3\)"):
        read_runs(tmp_path / "x.csv")


# --- the game -----------------------------------------------------------------------------------


def test_a_game_counts_the_money_and_answers_by_the_law():
    game = BudgetGame(LAW, 6e20, noise=0.0)
    assert game.target == 6e21 and BudgetGame(LAW, 1.0, factor=3.0).target == 3
    assert game.train(1e9, 5e10) == pytest.approx(LAW.predict(1e9, 5e10))
    assert game.left == pytest.approx(3e20)
    with pytest.raises(ValueError, match=r"parameters: expected a run of at most 3e\+20"):
        game.train(1e9, 6e10)
    with pytest.raises(ValueError, match=r"parameters: expected a run of at least 6e\+18"):
        game.train(1e9, 9.9e8)
    game.train(1e9, 5e10)
    assert game.least == 6e18 and BudgetGame(LAW, 1.0, least_share=0.5).least == 0.5
    assert game.left == pytest.approx(0) and len(game.runs) == 2
    best = compute_optimal(LAW, game.target).parameters
    assert game.regret(best) == pytest.approx(0, abs=1e-9)
    assert game.regret(2 * best) > 1e-3 < game.regret(best / 2)


def test_the_noise_of_a_game_is_small_and_seeded():
    losses = [BudgetGame(LAW, 1e21, seed=seed).train(1e9, 1e10) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert losses[0] == BudgetGame(LAW, 1e21).train(1e9, 1e10)
    many = [BudgetGame(LAW, 1e21, seed=seed).train(1e9, 1e10) for seed in range(200)]
    assert np.std(np.log(many)) == pytest.approx(0.02, rel=0.2)
