"""Threads that predict and switch at once: every answer is of one policy."""

import collections
import sys
import threading
import time

import numpy as np

from bitmixer_jax.runtime import Runtime
from tests.runtime.builds import BATCH, POLICY

POLICIES = ([4] * 6, [2] * 6, POLICY.tolist())


def race(runtime, images, switches):
    """Two threads switch while four predict: how often each of POLICIES answered, or "mixed"."""
    wanted = [runtime.predict(images, policy) for policy in POLICIES]
    seen: list = [collections.Counter() for _ in range(4)]
    running = [True, True]
    errors = []

    def switch(me):
        for i in range(switches):
            runtime.set_policy(POLICIES[(i + me) % 3])
            time.sleep(1e-4)  # lets the others in
        running[me] = False

    def predict(me):
        while any(running):
            logits = runtime.predict(images)
            equal = [i for i, each in enumerate(wanted) if np.array_equal(logits, each)]
            seen[me][equal[0] if len(equal) == 1 else "mixed"] += 1

    def guarded(work, me):
        try:
            work(me)
        except BaseException as error:
            errors.append(error)
            running[:] = [False, False]

    threads = [threading.Thread(target=guarded, args=(switch, i)) for i in range(2)]
    threads += [threading.Thread(target=guarded, args=(predict, i)) for i in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == []
    return sum(seen, collections.Counter())


def test_threads_that_predict_and_switch_never_mix_policies(fresh, digits, compilations):
    images = digits.images[: BATCH + 1]  # two calls of the programme, which must agree
    answers = race(fresh, images, switches=5000)
    assert set(answers) == {0, 1, 2}, answers
    assert compilations == []


class Torn(Runtime):
    """What must never be: a switch that others see half done."""

    def set_policy(self, policy):
        widths = self.policy
        for layer, width in enumerate(policy):
            widths[layer] = width
            super().set_policy(widths)
            time.sleep(0.0005)


def test_a_policy_that_is_switched_layer_by_layer_would_be_caught(trained, digits):
    torn = Torn.load(trained, batch_size=BATCH)
    assert race(torn, digits.images[:2], switches=40)["mixed"] > 0


def test_a_mix_of_two_policies_has_logits_of_its_own(fresh, digits):
    images = digits.images[:2]
    wanted = [fresh.predict(images, policy) for policy in POLICIES]
    for a in POLICIES:
        for b in POLICIES:
            for cut in range(1, 6):
                mixed = a[:cut] + b[cut:]
                if mixed not in POLICIES:
                    found = fresh.predict(images, mixed)
                    assert not any(np.allclose(found, each, atol=1e-3) for each in wanted)
