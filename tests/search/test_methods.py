"""Methods on losses that are known: true optima, budgets, fronts, seeds, blocks."""

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
    Greedy,
    IntegerProgram,
    Problem,
    Random,
    search,
)

CHOICES = (2, 3, 4)
SPACE = bm.BitSpace(CHOICES)
MODEL = bm.create_model("resnet8", num_classes=10, width=3, image_shape=(8, 8, 1))
COSTS = costs(MODEL)
ALONE, BLOCKS = MODEL.groups("layer"), MODEL.groups("block")
EVERY = np.asarray(list(itertools.product(CHOICES, repeat=6)), np.int32)
EACH = ("greedy", "ilp", "ilp of given sensitivities", "evolution", "random")
WITH_EACH = pytest.mark.parametrize("name", EACH)
WITH_GROUPS = pytest.mark.parametrize("groups", [ALONE, BLOCKS], ids=["alone", "blocks"])


def method(name, problem):
    """A method with small settings."""
    given = np.asarray([[0.9, 0.3, 0.0]] * problem.size)
    return {
        "greedy": Greedy(),
        "ilp": IntegerProgram(),
        "ilp of given sensitivities": IntegerProgram(sensitivity=given, points=9),
        "evolution": Evolution(policies=100, population=10),
        "random": Random(policies=50, batch=7),
    }[name]


class Additive:
    """Scores whose loss is a sum over layers; counts and remembers what it is asked for."""

    def __init__(self, seed=0, table=None):
        rng = np.random.default_rng(seed)
        self.table = rng.normal(1, 1, (6, 3)) * [1.0, 0.3, 0.0] if table is None else table
        self.asked = []

    def losses(self, policies):
        columns = np.searchsorted(CHOICES, policies)
        return 1 + self.table[np.arange(self.table.shape[0]), columns].sum(-1)

    def __call__(self, policies):
        assert policies.dtype == np.int32
        assert policies.ndim == 2
        assert len(policies) > 0
        self.asked.append(policies)
        loss = self.losses(policies)
        return Scores(1 / (1 + np.exp(loss)), loss)

    @property
    def proposed(self):
        """All policies in the order in which they were asked for."""
        return np.concatenate(self.asked)


class Entangled(Additive):
    """Scores whose loss also has a term for each pair of neighbours."""

    def losses(self, policies):
        pairs = np.random.default_rng(7).normal(0, 0.7, (5, 3, 3))
        columns = np.searchsorted(CHOICES, policies)
        between = pairs[np.arange(5), columns[..., :-1], columns[..., 1:]].sum(-1)
        return super().losses(policies) + between


def problem_of(constraints=(), groups=ALONE, objective="bitops", of=COSTS):
    found = tuple(Constraint(cost=of[name], upper_bound=most) for name, most in constraints)
    return Problem(
        space=SPACE,
        groups=groups,
        objective=found[0].cost if found else of[objective],
        constraints=found,
    )


def optimum(problem, score):
    """The least loss within the budget, by trying every policy."""
    return score.losses(EVERY)[problem.fits_policy(EVERY)].min()


BITOPS, BYTES = COSTS["bitops"].widest, COSTS["bytes"].widest
LIMITS = [
    [("avg_bits", 2.5)],
    [("avg_bits", 3)],
    [("avg_bits", 3.5)],
    [("bitops", 0.4 * BITOPS)],
    [("bytes", 0.7 * BYTES)],
    [("avg_bits", 3), ("bitops", 0.45 * BITOPS)],
    [("bytes", 0.65 * BYTES), ("activation_bytes", 0.7 * COSTS["activation_bytes"].widest)],
]


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
    with pytest.raises(bm.UserError, match="sensitivities"):
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


@pytest.mark.parametrize("kind", [Additive, Entangled])
@pytest.mark.parametrize("limits", [[("avg_bits", 3)], LIMITS[-1]])
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


# --- fronts ---


def check_front(found, axis):
    points = found.front()
    for one, two in itertools.pairwise(points):
        assert one.cost < two.cost
        assert one.loss > two.loss
    for point in points:
        assert point.cost == axis(np.asarray(point.widths))
        other_costs, other_losses = found.costs, found.scores.loss
        better = (other_costs <= point.cost) & (other_losses < point.loss)
        assert not (better | ((other_costs < point.cost) & (other_losses == point.loss))).any()
    return points


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
    with pytest.raises(bm.UserError, match="fits the budget; try --method ilp"):
        found.best()


@WITH_EACH
def test_no_method_warns(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for limits in ((), LIMITS[1]):
            problem = problem_of(limits)
            search(problem, method(name, problem), Additive())
