"""What a search looks for: budgets as people type them, groups of layers, genes that fit."""

import itertools

import numpy as np
import pytest

import bitmixer_jax as bm
from bitmixer_jax.cost import Cost, costs
from bitmixer_jax.search import Constraint, Problem, parse_budget
from tests.refusals import refused

CHOICES = (2, 3, 4)
SPACE = bm.BitSpace(CHOICES)
MODEL = bm.create_model("resnet8", num_classes=10, width=3, image_shape=(8, 8, 1))
COSTS = costs(MODEL)
ALONE, BLOCKS = MODEL.groups("layer"), MODEL.groups("block")
EVERY = np.asarray(list(itertools.product(range(3), repeat=6)))


def measured(seed=0, layers=6):
    """A latency that need not fall with the width."""
    table = np.random.default_rng(seed).uniform(0.5, 2, (layers, 3))
    return Cost(name="latency_ms", unit="ms", choices=CHOICES, table=table)


def make(*limits, groups=ALONE, objective="bitops"):
    """A problem with limits such as ("avg_bits", 3) or (Cost, 3)."""
    found = tuple(
        Constraint(cost=COSTS[cost] if isinstance(cost, str) else cost, upper_bound=most)
        for cost, most in limits
    )
    objective = found[0].cost if found else COSTS[objective]
    return Problem(space=SPACE, groups=groups, objective=objective, constraints=found)


# --- what a person types ---


def test_a_budget_is_a_number_in_the_unit_of_the_cost():
    (limit,) = parse_budget(["avg_bits=3"], COSTS)
    assert limit.cost is COSTS["avg_bits"]
    assert limit.upper_bound == 3
    assert str(limit) == "avg_bits=3"


def test_a_percentage_is_of_the_widest_policy():
    (limit,) = parse_budget(["bitops=60%"], COSTS)
    assert limit.upper_bound == pytest.approx(0.6 * COSTS["bitops"]([4] * 6))


@pytest.mark.parametrize(
    "texts",
    [
        ["avg_bits=3", "bitops=60%", "bytes=700"],
        ["avg_bits=3,bitops=60%", "bytes=700"],
        [" avg_bits = 3 , bitops = 60% , bytes = 7e2 "],
    ],
)
def test_limits_combine(texts):
    limits = parse_budget(texts, COSTS)
    assert [limit.cost.name for limit in limits] == ["avg_bits", "bitops", "bytes"]
    assert limits[2].upper_bound == 700


@pytest.mark.parametrize(
    ("text", "code", "mentions"),
    [
        ("avg_bit=3", "unknown-name", ("'avg_bit'", "did you mean avg_bits", ", ".join(COSTS))),
        ("flops=3", "unknown-name", ("'flops'", ", ".join(COSTS))),
        ("=3", "unknown-name", ("''",)),
        ("latency_ms=3", "missing-value", ("latency_ms",)),
        # What has no "=" is quoted, with what to write instead.
        ("3", "bad-value", ("'3'", "avg_bits=3")),
        ("", "bad-value", ("''", "avg_bits=3")),
        ("avg_bits=3,", "bad-value", ("''", "avg_bits=3")),
        ("avg_bits", "bad-value", ("'avg_bits'", "avg_bits=3")),
        *(
            (f"avg_bits={value}", "bad-value", (f"avg_bits={value}",))
            for value in ("", "%", "three", "3%%", "3=3", "-3", "nan", "inf", "1e999", "nan%")
        ),
        ("avg_bits=3,avg_bits=3", "conflict", ("avg_bits",)),
        ("avg_bits=1.99", "out-of-reach", ("avg_bits=1.99", "[2, 4] bits")),
        ("avg_bits=0", "out-of-reach", ("avg_bits=0", "[2, 4] bits")),
        ("bitops=24%", "out-of-reach", ("{:g}, {:g}] BitOPs".format(*COSTS["bitops"].range),)),
    ],
)
def test_a_budget_that_makes_no_sense_is_one_line(text, code, mentions):
    with refused(code, *mentions):
        parse_budget([text], COSTS)


def test_no_budget_at_all_is_refused():
    with refused("bad-value", "''", "avg_bits=3"):
        parse_budget([], COSTS)


def test_a_cost_limited_twice_is_refused_over_several_texts():
    with refused("conflict", "bytes"):
        parse_budget(["bytes=700", "avg_bits=3", "bytes=90%"], COSTS)


def test_a_limit_at_either_end_of_the_range_is_allowed():
    for cost in COSTS.values():
        low, high = cost.range
        for most, fitting in ((low, 1), (high, len(EVERY)), (2 * high, len(EVERY))):
            assert make((cost, most)).fits(EVERY).sum() == fitting


# --- genes, policies, tables ---


def test_genes_become_widths_by_group():
    problem = make(groups=BLOCKS)
    assert (problem.size, BLOCKS) == (3, (0, 0, 1, 1, 2, 2))
    assert problem.widths([2, 0, 1]).tolist() == [4, 4, 2, 2, 3, 3]
    assert problem.widths([[2, 0, 1], [0, 0, 0]]).shape == (2, 6)
    assert problem.widths(problem.widest).tolist() == [4] * 6
    assert problem.widths([2, 0, 1]).dtype == np.int32


@pytest.mark.parametrize("groups", [ALONE, BLOCKS])
def test_a_table_by_group_adds_up_to_the_cost(groups):
    problem = make(groups=groups)
    for cost in (*COSTS.values(), measured()):
        table = problem.table(cost)
        for genes in np.random.default_rng(0).integers(3, size=(10, problem.size)):
            total = table[np.arange(problem.size), genes].sum()
            assert total == pytest.approx(float(cost(problem.widths(genes))))


def test_what_fits_keeps_within_every_limit():
    latency = measured()
    problem = make(("avg_bits", 3), ("bytes", 700), (latency, 7))
    widths = problem.widths(EVERY)
    wanted = (widths.mean(1) <= 3) & (COSTS["bytes"](widths) <= 700) & (latency(widths) <= 7)
    assert 0 < wanted.sum() < len(EVERY)
    assert problem.fits(EVERY).tolist() == wanted.tolist()
    assert problem.fits_policy(widths).tolist() == wanted.tolist()
    assert bool(problem.fits(EVERY[0])) == wanted[0]


def test_an_average_of_exactly_the_limit_fits():
    for name in ("resnet8", "resnet18", "resnet50", "mobilenetv2"):
        model = bm.create_model(name, num_classes=10)
        limits = parse_budget(["avg_bits=75%,avg_weight_bits=3"], costs(model))
        groups = model.groups("layer")
        problem = Problem(space=SPACE, groups=groups, objective=limits[0].cost, constraints=limits)
        assert problem.fits(np.ones(problem.size, int))
        assert not problem.fits(np.ones(problem.size, int) + np.eye(problem.size, dtype=int)[0])


def test_without_limits_everything_fits():
    assert make().fits(EVERY).all()


# --- saving ---


def lowered(genes):
    return np.asarray([genes - row for row in np.eye(len(genes), dtype=int) if genes @ row])


def test_without_limits_saving_is_counted_in_parts_of_the_widest_policy():
    problem = make(objective="bytes")
    genes = np.asarray([2, 1, 0, 2, 1, 2])
    lower = lowered(genes)
    assert len(lower) == 5
    cost = COSTS["bytes"]
    wanted = [
        float(cost(problem.widths(genes)) - cost(problem.widths(row))) / cost.widest
        for row in lower
    ]
    assert problem.saving(genes, lower) == pytest.approx(wanted)


def test_saving_is_counted_in_the_limits_that_are_exceeded():
    genes = np.asarray([2, 2, 2, 2, 2, 2])
    lower = lowered(genes)
    both = make(("bytes", 700), ("avg_bits", 3))
    one = make(("bytes", 700), ("avg_bits", 4))  # every policy keeps within the second
    change = COSTS["bytes"](one.widths(genes)) - COSTS["bytes"](one.widths(lower))
    assert one.saving(genes, lower) == pytest.approx(change / 700)
    assert both.saving(genes, lower) == pytest.approx(change / 700 + 1 / 6 / 3)


def test_saving_may_be_negative_where_a_narrower_width_takes_longer():
    table = np.asarray([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    cost = Cost(name="latency_ms", unit="ms", choices=CHOICES, table=table)
    problem = Problem(space=SPACE, groups=(0, 1), objective=cost)
    assert problem.saving(np.asarray([2, 2]), np.asarray([[1, 2], [2, 1]])).tolist() == [
        -0.25,
        0.25,
    ]


# --- what fits a budget ---


LATENCY = measured()
BUDGETS = {
    "the least": (("avg_bits", 2),),
    "some": (("bitops", 0.5 * COSTS["bitops"].widest),),
    "all": (("bytes", COSTS["bytes"].widest),),
    "more": (("avg_bits", 9),),
    "two": (("avg_bits", 3), ("bitops", 0.45 * COSTS["bitops"].widest)),
    "latency": ((LATENCY, 6.5),),
    "least latency": ((LATENCY, LATENCY.range[0]),),
    "latency and bits": ((LATENCY, 6.0), ("avg_bits", 2.5)),
}


@pytest.mark.parametrize(
    ("name", "groups"),
    [(name, ALONE) for name in BUDGETS]
    + [(name, BLOCKS) for name in BUDGETS if name not in ("least latency", "latency and bits")],
)
def test_what_is_drawn_repaired_and_filled_fits(name, groups):
    problem = make(*BUDGETS[name], groups=groups)
    rng = np.random.default_rng(0)
    for _ in range(20):
        genes = rng.integers(3, size=problem.size)
        before = genes.copy()
        repaired = problem.repair(genes, rng)
        filled = problem.fill(repaired, rng)
        drawn = problem.draw(rng)
        assert genes.tolist() == before.tolist()
        assert problem.fits(np.stack([repaired, filled, drawn])).all()
        assert (filled >= repaired).all()
        if problem.fits(genes):
            assert repaired.tolist() == genes.tolist()
        for row in np.eye(problem.size, dtype=int):  # nothing more goes in
            if filled @ row < 2:
                assert not problem.fits(filled + row)


def test_repair_of_what_no_narrower_width_helps_gives_the_cheapest():
    table = np.asarray([[3.0, 2.0, 1.0]] * 2)
    cost = Cost(name="latency_ms", unit="ms", choices=CHOICES, table=table)
    problem = Problem(
        space=SPACE,
        groups=(0, 1),
        objective=cost,
        constraints=(Constraint(cost=cost, upper_bound=3),),
    )
    repaired = problem.repair(np.asarray([0, 1]), np.random.default_rng(0))
    assert repaired.tolist() == problem.cheapest().tolist() == [2, 2]


def test_draws_without_limits_spread_over_the_whole_range():
    problem = make()
    rng = np.random.default_rng(0)
    found = np.asarray([problem.draw(rng) for _ in range(60)])
    low, high = COSTS["bitops"].range
    parts = (COSTS["bitops"](problem.widths(found)) - low) / (high - low)
    assert np.histogram(parts, 4, (0, 1))[0].min() >= 5


@pytest.mark.parametrize("name", ["least latency", "latency and bits"])
def test_budgets_that_single_layers_meet_and_blocks_do_not_are_refused(name):
    problem = make(*BUDGETS[name])
    assert problem.fits(problem.cheapest())
    blocks = (problem.widths(EVERY)[:, ::2] == problem.widths(EVERY)[:, 1::2]).all(1)
    assert not problem.fits(EVERY[blocks]).any()
    with refused("out-of-reach", *problem.constraints):
        make(*BUDGETS[name], groups=BLOCKS)


def test_limits_that_no_policy_meets_together_are_refused():
    latency = Cost(
        name="latency_ms",
        unit="ms",
        choices=CHOICES,
        table=np.asarray([[3.0, 2.0, 1.0]] * 6),  # wide is fast
    )
    widths = make().widths(EVERY)
    for most_ms, most_bits in itertools.product((6, 8, 9, 10, 12, 15, 18), (2, 2.5, 3, 3.5, 4)):
        reachable = ((latency(widths) <= most_ms) & (widths.mean(1) <= most_bits)).any()
        limits = ((latency, most_ms), ("avg_bits", most_bits))
        if reachable:
            problem = make(*limits)
            assert problem.fits(problem.cheapest())
        else:
            with refused("out-of-reach", f"latency_ms={most_ms:g}", f"avg_bits={most_bits:g}") as e:
                make(*limits)
            assert str(e.value).endswith("2)")  # what avg_bits alone can reach


def test_a_limit_that_no_policy_with_blocks_meets_is_refused():
    table = np.asarray([[1.0, 2.0, 2.0], [2.0, 1.0, 2.0]])
    cost = Cost(name="latency_ms", unit="ms", choices=CHOICES, table=table)
    limits = (Constraint(cost=cost, upper_bound=2.5),)
    Problem(space=SPACE, groups=(0, 1), objective=cost, constraints=limits)
    with refused("out-of-reach", *limits):
        Problem(space=SPACE, groups=(0, 0), objective=cost, constraints=limits)


def test_within_adds_a_limit_on_the_objective():
    problem = make(("avg_bits", 3), ("bytes", 700)).within(2.5)
    assert [str(limit) for limit in problem.constraints] == [
        "avg_bits=3",
        "bytes=700",
        "avg_bits=2.5",
    ]
    with refused("out-of-reach", "bitops=1", f"{COSTS['bitops'].range[0]:g}"):
        make().within(1.0)


# --- the integer programme ---


@pytest.mark.parametrize("name", BUDGETS)
def test_the_minimum_of_a_sum_is_that_of_all_policies(name):
    problem = make(*BUDGETS[name])
    fits = problem.fits(EVERY)
    for seed in range(3):
        table = np.random.default_rng(seed).normal(size=(6, 3))
        sums = table[np.arange(6), EVERY].sum(1)
        genes = problem.solve_ilp(table)
        assert problem.fits(genes)
        assert table[np.arange(6), genes].sum() == pytest.approx(sums[fits].min())


def test_the_minimum_with_blocks_is_that_of_all_policies_with_blocks():
    problem = make(("bitops", 0.5 * COSTS["bitops"].widest), groups=BLOCKS)
    every = EVERY[:27, 3:]
    fits = problem.fits(every)
    table = np.random.default_rng(0).normal(size=(3, 3))
    genes = problem.solve_ilp(table)
    wanted = table[np.arange(3), every].sum(1)[fits].min()
    assert table[np.arange(3), genes].sum() == pytest.approx(wanted)


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e12])
def test_the_scale_of_a_table_does_not_matter(scale):
    problem = make(("avg_bits", 3))
    genes = problem.solve_ilp(scale * np.asarray([[1.0, 0.5, 0.0]] * 3 + [[0.0, 0.0, 1.0]] * 3))
    assert problem.fits(genes)
    if scale:
        assert genes[:3].tolist() == [2, 2, 2]


@pytest.mark.parametrize("table", [np.zeros((5, 3)), np.zeros((6, 2)), np.full((6, 3), np.nan)])
def test_a_table_of_another_shape_or_not_finite_is_refused(table):
    with refused("bad-value", (6, 3), table.shape):
        make(("avg_bits", 3)).solve_ilp(table)


def test_one_layer_and_one_choice_are_enough():
    space = bm.BitSpace((4,))
    cost = Cost(name="avg_bits", unit="bits", choices=(4,), table=np.asarray([[4.0]]))
    problem = Problem(
        space=space,
        groups=(0,),
        objective=cost,
        constraints=(Constraint(cost=cost, upper_bound=4),),
    )
    rng = np.random.default_rng(0)
    found = (problem.cheapest(), problem.draw(rng), problem.solve_ilp(np.zeros((1, 1))))
    assert [genes.tolist() for genes in found] == [[0]] * 3


# --- limits that just one policy meets ---


def test_a_limit_just_below_the_best_policy_is_still_solved():
    model = bm.create_model("resnet18", num_classes=1000)
    count, layers = costs(model)["bytes"], model.num_layers
    rng = np.random.default_rng(0)
    for _ in range(10):
        genes = rng.integers(3, size=layers)
        table = np.ones((layers, 3))
        table[np.arange(layers), genes] = 0
        most = float(count(np.asarray(CHOICES)[genes])) - 1
        limits = (Constraint(cost=count, upper_bound=most),)
        problem = Problem(space=SPACE, groups=model.groups(), objective=count, constraints=limits)
        found = problem.solve_ilp(table)
        assert problem.fits(found)
        assert table[np.arange(layers), found].sum() == 1


def test_a_limit_of_nothing_at_all_can_be_met():
    free = np.ones((6, 3))
    free[:, 1] = 0
    free[0] = [1, 1, 0]
    latency = Cost(name="latency_ms", unit="ms", choices=CHOICES, table=free)
    bits = Cost(name="avg_bits", unit="bits", choices=CHOICES, table=np.tile(CHOICES, (6, 1)))
    limits = (Constraint(cost=bits, upper_bound=20), Constraint(cost=latency, upper_bound=0))
    problem = Problem(space=SPACE, groups=tuple(range(6)), objective=bits, constraints=limits)
    assert problem.solve_ilp(np.zeros((6, 3))).tolist() == [2, 1, 1, 1, 1, 1]
