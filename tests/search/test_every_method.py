"""What every method keeps: fronts, budgets, blocks, and no more policies than it said."""

import itertools
import warnings

import numpy as np
import pytest

import bitmixer_jax as bm
from bitmixer_jax.cost import Cost, costs
from bitmixer_jax.evaluation import Scores
from bitmixer_jax.front import pareto
from bitmixer_jax.search import (
    METHODS,
    Constraint,
    Evolution,
    IntegerProgram,
    Problem,
    search,
)
from tests.refusals import refused
from tests.search.known import (
    ALONE,
    BLOCKS,
    CHOICES,
    COSTS,
    EVERY,
    LIMITS,
    SPACE,
    WITH_EACH,
    WITH_GROUPS,
    Additive,
    Entangled,
    check_front,
    method,
    problem_of,
)

# --- fronts ---


@WITH_EACH
@WITH_GROUPS
@pytest.mark.parametrize("kind", [Additive, Entangled])
def test_a_front_holds_what_no_other_evaluated_policy_beats(name, groups, kind):
    problem, score = problem_of(groups=groups), kind(1)
    found = search(problem, method(name, problem), score)
    points = check_front(found, COSTS["bitops"])
    kept = pareto(found.costs, found.scores.loss)
    assert [point.widths for point in points] == [tuple(p) for p in found.policies[kept].tolist()]
    assert found.fits.all()


@pytest.mark.parametrize("name", ["greedy", "ilp", "evolution"])
@pytest.mark.parametrize("axis", ["bitops", "avg_bits", "bytes"])
def test_a_front_reaches_both_ends_of_the_range(name, axis):
    falling = np.asarray([[0.9, 0.2, 0.0]] * 6) * np.arange(1, 7)[:, None]
    problem = problem_of(objective=axis)
    found = search(problem, method(name, problem), Additive(table=falling))
    points = check_front(found, COSTS[axis])
    assert points[0].widths == (2,) * 6
    assert points[-1].widths == (4,) * 6


def test_ilp_finds_points_of_the_true_front_where_losses_add_up():
    score = Additive(table=np.abs(Additive(2).table))
    found = search(problem_of(), IntegerProgram(points=40), score)
    costs, losses = COSTS["bitops"](EVERY), score.losses(EVERY)
    true = pareto(costs, losses)
    missing = 0
    for most in np.linspace(*COSTS["bitops"].range, 40):
        best = losses[costs <= most * (1 + 1e-9)].min()
        fitting = [point.loss for point in found.front() if point.cost <= most * (1 + 1e-9)]
        missing += min(fitting) > best + 1e-5
    assert missing == 0
    assert len(found.front()) > len(true) / 4


def test_evolution_comes_close_to_the_true_front():
    score = Entangled(2)
    found = search(problem_of(), Evolution(policies=400), score)
    true = pareto(COSTS["bitops"](EVERY), score.losses(EVERY))
    wanted = {tuple(policy) for policy in EVERY[true].tolist()}
    assert len(wanted & {point.widths for point in found.front()}) >= 0.8 * len(wanted)


# --- every method ---


def noisy(seed):
    """Costs with a latency that does not fall with the width, and has ties and zeros."""
    rng = np.random.default_rng(seed)
    table = np.round(rng.uniform(0, 1, (6, 3)), 1)
    return {**COSTS, "latency_ms": Cost(name="latency_ms", unit="ms", choices=CHOICES, table=table)}


def nearest(of, quantile):
    return float(np.quantile(of["latency_ms"](EVERY), quantile))


CASES = {
    **{f"limits {i}": (limits, COSTS) for i, limits in enumerate(LIMITS)},
    "front": ((), COSTS),
    **{
        f"latency {seed}, {part}": ([("latency_ms", nearest(noisy(seed), part))], noisy(seed))
        for seed, part in itertools.product(range(2), (0, 0.02, 0.5))
    },
    "latency and bits": ([("latency_ms", nearest(noisy(0), 0.4)), ("avg_bits", 3)], noisy(0)),
}


@WITH_EACH
@pytest.mark.parametrize("case", CASES)
def test_no_method_asks_for_more_than_it_said(name, case):
    limits, of = CASES[case]
    problem, score = problem_of(limits, of=of), Entangled()
    found = search(problem, method(name, problem), score)
    assert len(score.proposed) <= method(name, problem).evaluations(problem)
    assert len(found.policies) == len(np.unique(score.proposed, axis=0))


@WITH_EACH
@pytest.mark.parametrize("limits", [(), LIMITS[1], LIMITS[5]], ids=["front", "one", "two"])
def test_every_proposal_gives_the_layers_of_a_block_one_width(name, limits):
    problem, score = problem_of(limits, BLOCKS), Additive()
    search(problem, method(name, problem), score)
    assert (score.proposed[:, ::2] == score.proposed[:, 1::2]).all()
    assert len(score.proposed) <= method(name, problem).evaluations(problem)


@WITH_EACH
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("latency")])
def test_a_latency_that_does_not_fall_with_the_width_stops_no_method(name, case):
    limits, of = CASES[case]
    problem = problem_of(limits, of=of)
    found = search(problem, method(name, problem), Entangled())
    if found.fits.any():
        best = np.asarray(found.best().widths)
        assert of["latency_ms"](best) <= limits[0][1] * (1 + 1e-9)
    else:  # greedy may be stuck where no single step is faster
        assert name == "greedy"


@WITH_EACH
def test_the_front_over_a_latency_that_does_not_fall_with_the_width(name):
    for seed in range(3):
        of = noisy(seed)
        problem = problem_of(objective="latency_ms", of=of)
        found = search(problem, method(name, problem), Entangled())
        check_front(found, of["latency_ms"])


@WITH_EACH
def test_scores_that_are_all_equal_stop_no_method(name):
    for limits in ((), LIMITS[1]):
        problem = problem_of(limits)
        found = search(problem, method(name, problem), Additive(table=np.zeros((6, 3))))
        assert found.best().loss == 1
        if not limits:
            assert len(found.front()) == 1


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("limit", [None, 4, 9])
def test_one_layer_of_one_choice_has_one_policy(name, limit):
    cost = Cost(name="avg_bits", unit="bits", choices=(4,), table=np.asarray([[4.0]]))
    limits = () if limit is None else (Constraint(cost=cost, upper_bound=limit),)
    problem = Problem(space=bm.BitSpace((4,)), groups=(0,), objective=cost, constraints=limits)
    found = search(problem, METHODS[name](), lambda p: Scores(np.ones(len(p)), np.ones(len(p))))
    assert found.policies.tolist() == [[4]]
    assert found.front()[0].cost == found.best().cost == 4


@pytest.mark.parametrize("name", METHODS)
def test_widths_far_apart_are_searched_as_well(name):
    model = bm.create_model("resnet8", num_classes=10, width=3, space=bm.BitSpace((2, 8)))
    cost = costs(model)["avg_bits"]
    problem = Problem(
        space=model.space,
        groups=ALONE,
        objective=cost,
        constraints=(Constraint(cost=cost, upper_bound=5.5),),
    )
    found = search(problem, METHODS[name](), lambda p: Scores(p.mean(1), 1 / p.mean(1)))
    assert found.best().cost == 5.0


@pytest.mark.parametrize("name", METHODS)
def test_fronts_of_blocks_over_a_latency_that_does_not_fall_with_the_width(name):
    for seed in range(3):
        table = np.random.default_rng(seed).uniform(0.5, 2, (6, 3))
        cost = Cost(name="latency_ms", unit="ms", choices=CHOICES, table=table)
        problem = Problem(space=SPACE, groups=(0, 0, 1, 1, 2, 2), objective=cost)
        found = search(problem, METHODS[name](), lambda p: Scores(p.mean(1), 1 / p.mean(1)))
        assert len(found.front()) >= 1 + (name != "greedy")


# --- what a search tells ---


def test_policies_are_found_once_each_in_the_order_in_which_they_were_asked_for():
    class Twice:
        def evaluations(self, problem):
            return 5

        def run(self, problem, rng):
            losses = yield np.asarray([[2] * 6, [0] * 6, [2] * 6])
            assert losses.tolist() == score.losses(np.asarray([[4] * 6, [2] * 6, [4] * 6])).tolist()
            yield np.asarray([[0] * 6, [1] * 6])

    told, score = [], Additive()
    problem = problem_of([("avg_bits", 3)])
    found = search(problem, Twice(), score, on_scores=lambda *words: told.append(words))
    assert found.policies.tolist() == [[4] * 6, [2] * 6, [3] * 6]
    assert found.policies.dtype == np.int32
    assert found.scores.loss.tolist() == score.losses(found.policies).tolist()
    assert found.fits.tolist() == [False, True, True]
    assert found.costs.tolist() == [4, 2, 3]
    two, three = score.losses(found.policies[1:])
    assert told == [(2, two), (3, min(two, three))]


def test_nothing_within_the_budget_is_said_with_a_way_out():
    class Widest:
        def evaluations(self, problem):
            return 1

        def run(self, problem, rng):
            yield problem.widest[None]

    found = search(problem_of([("avg_bits", 3)]), Widest(), Additive())
    with refused("out-of-reach", "ilp"):
        found.best()


@WITH_EACH
def test_no_method_warns(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for limits in ((), LIMITS[1]):
            problem = problem_of(limits)
            search(problem, method(name, problem), Additive())
