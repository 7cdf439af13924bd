"""Networks, budgets and losses that are known, for tests of methods: nothing is measured."""

import itertools

import numpy as np
import pytest

import bitmixer_jax as bm
from bitmixer_jax.cost import costs
from bitmixer_jax.evaluation import Scores
from bitmixer_jax.search import (
    Constraint,
    Evolution,
    Greedy,
    IntegerProgram,
    Problem,
    Random,
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
