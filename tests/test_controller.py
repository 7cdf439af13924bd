"""Controller: the best point within a budget, without flapping, whatever the budget does."""

import dataclasses
import fractions
import itertools
import logging
import math
import threading

import numpy as np
import pytest

from bitmixer_jax import controller as module
from bitmixer_jax import data
from bitmixer_jax.controller import Controller
from bitmixer_jax.front import Front, Point
from bitmixer_jax.policy import BitSpace
from bitmixer_jax.runtime import Runtime
from tests.refusals import refused

NAMES = ("conv1", "conv2", "conv3")
POINTS = (
    Point(widths=(2, 2, 2), cost=100.0, loss=0.75, top1=0.5),
    Point(widths=(2, 3, 2), cost=200.0, loss=0.5, top1=0.6, test_top1=0.5),
    Point(widths=(4, 4, 4), cost=400.0, loss=0.25, top1=0.7),
)
CHEAP, MIDDLE, BEST = POINTS


class Stub:
    """What a controller needs of a Runtime."""

    names = NAMES
    space = BitSpace((2, 3, 4))
    weights_digest = "0123abcd"

    def __init__(self):
        self.ran = []

    def check(self, policy):
        return self.space.check(np.asarray(policy), len(NAMES))

    def predict(self, images, policy):
        self.ran.append(tuple(policy))
        return np.zeros((len(images), 10), np.float32)


def front(**changes):
    made = Front(
        points=POINTS,
        names=NAMES,
        choices=(2, 3, 4),
        cost="bitops",
        unit="BitOPs",
        weights_digest="0123abcd",
    )
    return dataclasses.replace(made, **changes)


def follow(budgets, **settings):
    """A controller that has met these budgets, and the points it chose."""
    controller = Controller(Stub(), front(), iter(budgets).__next__, **settings)
    return controller, [controller.choose() for _ in budgets]


# --- the choice ---


@pytest.mark.parametrize(
    ("budget", "wanted"),
    [
        (100, CHEAP),
        (199.9, CHEAP),
        (200, MIDDLE),
        (np.float32(250), MIDDLE),
        (np.int64(399), MIDDLE),
        (fractions.Fraction(801, 2), BEST),
        (1e300, BEST),
        (math.inf, BEST),
    ],
)
def test_it_takes_the_best_point_that_fits(budget, wanted):
    assert Controller(Stub(), front(), budget).choose() == wanted
    assert follow([budget])[1] == [wanted]


def test_it_runs_at_the_point_it_chose_and_reads_the_budget_before_each_batch():
    runtime, budgets = Stub(), iter([400, 120, 250])
    controller = Controller(runtime, front(), budgets.__next__)
    assert controller.point is None
    for wanted in (BEST, CHEAP, MIDDLE):
        assert controller.predict(np.zeros((5, 1))).shape == (5, 10)
        assert controller.point == wanted
        assert runtime.ran[-1] == wanted.widths
    assert len(runtime.ran) == 3


def test_a_front_of_one_point_is_enough():
    controller = Controller(Stub(), front(points=(MIDDLE,)), 1000)
    assert [controller.choose() for _ in range(3)] == [MIDDLE] * 3
    assert len(controller.switches) == 1


# --- hysteresis ---


def test_it_moves_down_at_once():
    _, chosen = follow([400, 399.999, 199.999, 100], hysteresis=0.5)
    assert chosen == [BEST, MIDDLE, CHEAP, CHEAP]


def test_it_moves_up_only_where_there_is_room():
    _, chosen = follow([150, 200, 222, 222.3, 444, 445], hysteresis=0.1)
    assert chosen == [CHEAP, CHEAP, CHEAP, MIDDLE, MIDDLE, BEST]


def test_it_moves_up_as_far_as_there_is_room():
    # 404 would do for BEST but for the margin: MIDDLE is what fits with it.
    _, chosen = follow([150, 404, 404, 500], hysteresis=0.05)
    assert chosen == [CHEAP, MIDDLE, MIDDLE, BEST]


def test_without_hysteresis_it_is_the_best_point_each_time():
    budgets = np.random.default_rng(0).uniform(100, 500, 300).tolist()
    controller, chosen = follow(budgets, hysteresis=0.0)
    assert chosen == [front().best(budget) for budget in budgets]
    assert len(controller.switches) > 100


@pytest.mark.parametrize("start", [0.5, 0.98, 1.02, 1.5])
@pytest.mark.parametrize("point", POINTS[1:], ids=lambda point: f"{point.cost:g}")
def test_a_budget_that_trembles_within_the_margin_switches_once_at_most(point, start):
    rng = np.random.default_rng(0)
    budgets = point.cost * (1 + rng.uniform(-0.024, 0.024, 2000))
    controller, chosen = follow([start * point.cost, *budgets.tolist()], hysteresis=0.05)
    assert len(controller.switches) <= 2  # the first choice is one
    assert all(p.cost <= budget for p, budget in zip(chosen[1:], budgets, strict=True))
    restless, _ = follow([start * point.cost, *budgets.tolist()], hysteresis=0.0)
    assert len(restless.switches) > 500


@pytest.mark.parametrize("hysteresis", [0.0, 0.05, 0.3])
def test_it_never_spends_more_than_the_budget_and_never_moves_up_without_room(hysteresis):
    rng = np.random.default_rng(1)
    budgets = np.exp(rng.uniform(np.log(60), np.log(700), 2000)).tolist()
    controller, chosen = follow(budgets, hysteresis=hysteresis)
    pairs = zip(itertools.pairwise(chosen), budgets[1:], strict=True)
    for (old, new), budget in pairs:
        assert new.cost <= budget or (new == CHEAP and budget < CHEAP.cost)
        if new.cost > old.cost:
            assert new.cost <= budget * (1 - hysteresis)
        roomy = front().best(budget * (1 - hysteresis))
        assert new.cost >= (roomy or CHEAP).cost
    assert [s.new for s in controller.switches] == [k for k, _ in itertools.groupby(chosen)]


@pytest.mark.parametrize("hysteresis", [-0.01, 1, 1.5, math.nan, math.inf, "0.1", None, True])
def test_hysteresis_that_is_no_fraction_is_refused(hysteresis):
    with refused("bad-value", "hysteresis", repr(hysteresis)):
        Controller(Stub(), front(), 100, hysteresis=hysteresis)


# --- below every point ---


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.INFO, logger="bitmixer_jax.controller")
    return lambda: [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize("budget", [99.9, 0, -5, -math.inf])
def test_below_every_point_it_runs_the_cheapest_and_says_so(warnings, budget):
    controller, chosen = follow([300, budget, budget, budget])
    assert chosen == [MIDDLE, CHEAP, CHEAP, CHEAP]
    assert [switch.fits for switch in controller.switches] == [True, False]
    (said,) = warnings()
    assert f"{budget:g} BitOPs" in said
    assert f"{CHEAP.cost:g}" in said


def test_it_warns_once_per_spell(warnings):
    follow([50, 60, 70, 300, 50, 50, 1000, 99])
    assert len(warnings()) == 3


def test_a_budget_that_trembles_around_the_cheapest_is_one_spell(warnings):
    rng = np.random.default_rng(0)
    _, chosen = follow((100 * (1 + rng.uniform(-0.024, 0.024, 500))).tolist(), hysteresis=0.05)
    assert set(chosen) == {CHEAP}
    assert len(warnings()) == 1


def test_no_warning_while_a_point_fits(warnings):
    follow([100, 400, 150, math.inf])
    assert warnings() == []


# --- what is kept of switches ---


def test_each_switch_is_recorded_and_logged(caplog):
    caplog.set_level(logging.INFO, logger="bitmixer_jax.controller")
    controller, _ = follow([300, 300, 50, 450, 450])
    kept = [(s.call, s.budget, s.old, s.new, s.fits) for s in controller.switches]
    assert kept == [
        (0, 300.0, None, MIDDLE, True),
        (2, 50.0, MIDDLE, CHEAP, False),
        (3, 450.0, CHEAP, BEST, True),
    ]
    seconds = [s.seconds for s in controller.switches]
    assert seconds == sorted(seconds)
    assert seconds[0] >= 0
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert said == [
        "call 0: budget 300 BitOPs, from cost nothing to 200, widths 2,3,2",
        "call 2: budget 50 BitOPs, from cost 200 to 100, widths 2,2,2",
        "call 3: budget 450 BitOPs, from cost 100 to 400, widths 4,4,4",
    ]


def test_the_record_of_switches_is_bounded():
    controller, _ = follow([100, 500] * 5100)
    assert len(controller.switches) == module.MOST_SWITCHES == 10_000
    assert controller.switches[-1].call == 10_199


def test_a_switch_cannot_be_changed():
    controller, _ = follow([300])
    with pytest.raises(dataclasses.FrozenInstanceError):
        controller.switches[0].budget = 1.0


# --- threads ---


def test_threads_that_choose_at_once_leave_one_chain_of_switches():
    turn, lock = itertools.cycle([120, 250, 500]), threading.Lock()
    inside = []

    def budget():
        inside.append(lock.acquire(blocking=False))  # False: two read at once
        value = next(turn)
        lock.release()
        return value

    controller = Controller(Stub(), front(), budget)
    threads = [
        threading.Thread(target=lambda: [controller.choose() for _ in range(500)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == [True] * 2000
    assert [s.call for s in controller.switches] == list(range(2000))
    assert [s.new for s in controller.switches] == [CHEAP, MIDDLE, BEST] * 666 + [CHEAP, MIDDLE]
    for before, after in itertools.pairwise(controller.switches):
        assert after.old is before.new


# --- what it refuses ---

BAD = [math.nan, np.float64("nan"), True, np.bool_(True), None, "100", [100], 1j, 10**400, {}]


@pytest.mark.parametrize("budget", BAD, ids=str)
def test_a_budget_that_is_no_number_is_refused(budget):
    with refused("bad-value", "budget", repr(budget), "BitOPs"):
        Controller(Stub(), front(), budget)
    budgets = iter([400, budget, 400])
    controller = Controller(Stub(), front(), lambda: next(budgets))
    controller.choose()
    with refused("bad-value", "budget", repr(budget), "BitOPs"):
        controller.predict(np.zeros((1, 1)))
    assert controller.point == BEST
    assert controller.choose() == BEST
    assert len(controller.switches) == 1


def test_an_error_of_the_callers_function_is_passed_on():
    answers = iter([400])
    controller = Controller(Stub(), front(), lambda: next(answers))
    controller.choose()
    with pytest.raises(StopIteration):
        controller.choose()
    assert controller.point == BEST


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"names": ("conv1", "conv2", "conv4")}, "layers"),
        ({"choices": (2, 4)}, "widths"),
        ({"weights_digest": "4567cdef"}, "weights"),
    ],
)
def test_a_front_of_another_network_is_refused(changes, what):
    with refused("other-network", what):
        Controller(Stub(), front(**changes), 100)


@pytest.mark.parametrize("points", [(), POINTS[::-1], (CHEAP, CHEAP)])
def test_a_front_out_of_order_is_refused(points):
    with refused("bad-value"):
        Controller(Stub(), front(points=points), 100)


def test_a_policy_that_cannot_run_is_refused_at_once():
    wrong = dataclasses.replace(BEST, widths=(4, 4, 5))
    with refused("policy-width", 5, (2, 3, 4)):
        Controller(Stub(), front(points=(CHEAP, wrong)), 100)


# --- with a network ---


def real_front(runtime, *policies):
    points = tuple(
        Point(widths=tuple(policy), cost=100.0 * (i + 1), loss=1 / (i + 1), top1=0.5)
        for i, policy in enumerate(policies)
    )
    network = dict(
        names=runtime.names, choices=runtime.space.choices, weights_digest=runtime.weights_digest
    )
    return front(points=points, **network)


def test_a_network_follows_a_budget(trained):
    runtime = Runtime.load(trained, batch_size=8)
    images = data.load("digits", "test[:10]").images
    policies = ([2] * 6, [4, 3, 2, 2, 3, 4], [4] * 6)
    budgets = [150, 250, 350, 50]
    controller = Controller(runtime, real_front(runtime, *policies), iter(budgets).__next__)
    for place in (0, 1, 2, 0):
        found = controller.predict(images)
        assert np.array_equal(found, runtime.predict(images, policies[place]))
    assert runtime.policy.tolist() == [4] * 6  # a controller leaves the policy in force alone
    assert runtime.traces == 1
    other = dataclasses.replace(controller.front, weights_digest="0" * 64)
    with refused("other-network", "weights"):
        Controller(runtime, other, 100)


def test_a_front_with_pairs_never_visited_is_refused(trained):
    young = Runtime.load(f"{trained}@weights", batch_size=1)
    Controller(young, real_front(young, [2] * 6, [4] * 6), 100)
    with refused("uncalibrated", [4, 3, 4, 3, 4, 3], "4->3"):
        Controller(young, real_front(young, [2] * 6, [4, 3, 4, 3, 4, 3]), 100)
