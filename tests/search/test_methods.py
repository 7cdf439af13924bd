"""Each method on losses that are known: true optima, budgets, seeds, what it asks for."""

import numpy as np
import pytest

from bitmixer_jax.cost import Cost
from bitmixer_jax.search import (
    Constraint,
    Evolution,
    Greedy,
    IntegerProgram,
    Problem,
    Random,
    search,
)
from tests.refusals import refused
from tests.search.known import (
    BLOCKS,
    CHOICES,
    LIMITS,
    SPACE,
    WITH_GROUPS,
    Additive,
    Entangled,
    method,
    optimum,
    problem_of,
)

# --- the integer programme ---


@pytest.mark.parametrize("limits", LIMITS)
def test_ilp_finds_the_optimum_of_losses_that_add_up(limits):
    problem = problem_of(limits)
    for seed in range(4):
        score = Additive(seed)
        best = search(problem, IntegerProgram(), score).best()
        assert best.loss == pytest.approx(optimum(problem, score), abs=1e-12)
        assert problem.fits_policy(np.asarray(best.widths))


def test_ilp_measures_one_layer_at_a_time_and_then_its_solution():
    score = Additive()
    search(problem_of([("avg_bits", 3)]), IntegerProgram(rounds=0), score)
    widest, around, solution = score.asked
    assert widest.tolist() == [[4] * 6]
    assert (around != 4).sum(1).tolist() == [1] * 12
    assert len(np.unique(around, axis=0)) == 12
    assert solution.shape == (1, 6)


def test_ilp_believes_the_sensitivities_it_is_given():
    given = np.zeros((6, 3))
    given[:3, :2] = 1
    problem = problem_of([("avg_bits", 3)])
    found = search(problem, IntegerProgram(sensitivity=given, rounds=0), Additive())
    assert found.policies.tolist() == [[4, 4, 4, 2, 2, 2]]


@pytest.mark.parametrize("most", [3, 3.5])
def test_ilp_goes_on_from_its_solution_while_that_helps(most):
    problem = problem_of([("avg_bits", most)])
    plain, more = (
        search(problem, IntegerProgram(rounds=rounds), Entangled()).best() for rounds in (0, 3)
    )
    assert more.loss < plain.loss
    assert problem.fits_policy(np.asarray(more.widths))


def test_ilp_stops_where_one_more_change_does_not_help():
    score = Additive()
    given = score.table - score.table[:, 2:]
    problem = problem_of([("avg_bits", 3)])
    search(problem, IntegerProgram(sensitivity=given), score)
    # The solution and its surroundings; the steps beyond lead back to it.
    assert [len(asked) for asked in score.asked] == [1, 12]


def test_steps_beyond_a_solution_change_no_more_layers_than_allowed():
    problem = problem_of([("avg_bits", 9)])
    table = np.tile([0.0, 1.0, 2.0], (6, 1))
    for changes in range(7):
        genes = problem.solve_ilp(table, np.full(6, 2), changes)
        assert sorted(genes.tolist()) == [0] * changes + [2] * (6 - changes)


def test_ilp_prefers_the_wider_of_widths_that_seem_equally_good():
    given = np.zeros((6, 3))
    problem = problem_of([("avg_bits", 9)])
    found = search(problem, IntegerProgram(sensitivity=given, rounds=0), Additive())
    assert found.policies.tolist() == [[4] * 6]


@pytest.mark.parametrize("sensitivity", [np.zeros((3, 3)), np.full((6, 3), np.nan)])
def test_ilp_refuses_sensitivities_that_do_not_fit(sensitivity):
    with refused("bad-value", (6, 3), sensitivity.shape):
        search(problem_of(), IntegerProgram(sensitivity=sensitivity), Additive())


# --- greedy ---


def plain_greedy(table, weights, most):
    """What greedy descent evaluates, for a loss and a cost that are sums over layers."""

    def loss(policy):
        return sum(table[i][CHOICES.index(bits)] for i, bits in enumerate(policy))

    def cost(policy):
        return sum(weight * bits for weight, bits in zip(weights, policy, strict=True))

    policy = [4] * len(weights)
    asked = [policy]
    while cost(policy) > most:
        rates = {}
        for i, bits in enumerate(policy):
            if bits > 2:
                lower = [*policy[:i], bits - 1, *policy[i + 1 :]]
                asked.append(lower)
                rate = (loss(lower) - loss(policy)) / (cost(policy) - cost(lower))
                rates.setdefault(rate, lower)
        policy = rates[min(rates)]
    return asked


@pytest.mark.parametrize("most", [12, 9, 6.5, 6])
def test_greedy_is_the_greedy_descent_written_by_hand(most):
    # Layer 0 is dear to narrow and saves little; layer 1 is cheap at first; layer 2 in between.
    table = np.asarray([[5.0, 2.0, 0.0], [9.0, 0.5, 0.0], [3.0, 1.5, 0.0]])
    weights = [1.0, 1.5, 0.5]
    cost = Cost(
        name="bytes", unit="bytes", choices=CHOICES, table=np.outer(weights, [2.0, 3.0, 4.0])
    )
    limits = (Constraint(cost=cost, upper_bound=most),)
    problem = Problem(space=SPACE, groups=(0, 1, 2), objective=cost, constraints=limits)
    score = Additive(table=table)
    search(problem, Greedy(), score)
    assert score.proposed.tolist() == plain_greedy(table.tolist(), weights, most)


@WITH_GROUPS
@pytest.mark.parametrize("limits", LIMITS)
def test_greedy_reaches_every_budget(limits, groups):
    problem = problem_of(limits, groups)
    for seed in range(3):
        best = search(problem, Greedy(), Additive(seed)).best()
        assert problem.fits_policy(np.asarray(best.widths))


def test_greedy_asks_for_the_widest_alone_where_it_fits():
    score = Additive()
    found = search(problem_of([("avg_bits", 4)]), Greedy(), score)
    assert found.policies.tolist() == [[4] * 6]


# --- evolution and random ---


@pytest.mark.parametrize(
    ("kind", "limits"),
    [
        (Additive, LIMITS[-1]),
        (Entangled, LIMITS[1]),
        pytest.param(Additive, LIMITS[1], marks=pytest.mark.slow),
        pytest.param(Entangled, LIMITS[-1], marks=pytest.mark.slow),
    ],
)
def test_evolution_finds_the_optimum_of_729_policies(kind, limits):
    problem, score = problem_of(limits), kind(3)
    for seed in range(2):
        found = search(problem, Evolution(policies=300), score, seed=seed)
        assert found.best().loss == optimum(problem, score)


def test_evolution_finds_what_a_plain_ilp_misses_where_losses_do_not_add_up():
    problem, score = problem_of([("avg_bits", 3)]), Entangled(3)
    plain = search(problem, IntegerProgram(rounds=0), score).best()
    assert plain.loss > optimum(problem, score) + 0.01
    assert search(problem, Evolution(), score).best().loss == optimum(problem, score)


def test_evolution_asks_for_no_policy_twice_and_stops_when_it_knows_all():
    score = Additive()
    search(problem_of(groups=BLOCKS), Evolution(policies=500), score)
    assert len(score.proposed) == len(np.unique(score.proposed, axis=0)) <= 27


@WITH_GROUPS
@pytest.mark.parametrize("name", ["evolution", "random"])
@pytest.mark.parametrize("limits", LIMITS)
def test_every_policy_that_is_drawn_or_bred_fits(name, groups, limits):
    problem = problem_of(limits, groups)
    assert search(problem, method(name, problem), Additive()).fits.all()


@pytest.mark.parametrize("limits", [(), LIMITS[1]])
def test_random_policies_fit_and_use_the_budget_up(limits):
    problem, score = problem_of(limits), Additive()
    found = search(problem, Random(policies=50, batch=20), score)
    assert [len(batch) for batch in score.asked] == [20, 20, 10]
    assert found.fits.all()
    if limits:
        assert (found.policies.mean(1) == 3).all()


@pytest.mark.parametrize("name", ["evolution", "random"])
@pytest.mark.parametrize("limits", [(), LIMITS[5]])
def test_proposals_depend_on_the_seed_alone(name, limits):
    def proposed(seed):
        score = Additive()
        problem = problem_of(limits)
        search(problem, method(name, problem), score, seed=seed)
        return score.proposed.tolist()

    assert proposed(5) == proposed(5)
    assert proposed(5) != proposed(6)


@pytest.mark.parametrize("name", ["greedy", "ilp"])
def test_methods_that_draw_nothing_do_not_depend_on_the_seed(name):
    def proposed(seed):
        score = Entangled()
        problem = problem_of(LIMITS[1])
        search(problem, method(name, problem), score, seed=seed)
        return score.proposed.tolist()

    assert proposed(5) == proposed(6)
