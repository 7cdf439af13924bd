"""Verification judges what engines answer."""

import json

import numpy as np
import pytest

from bitmixer_jax.export.verify import EXACT, Tolerance, compare, require, summary, verify
from tests.refusals import refused

IMAGES = np.zeros((10, 4, 4, 1), np.uint8)
POLICIES = [np.full(3, 2), np.asarray([2, 3, 4])]


def reference(images, policy):
    return np.eye(10, dtype=np.float32)[:, :5] + np.float32(policy.mean())


def off_by(amount, images=1):
    def engine(given, policy):
        logits = reference(given, policy).copy()
        logits[:images, 0] += amount
        return logits

    return engine


def judge(engine, tolerance):
    return verify("engine", reference, engine, IMAGES, POLICIES, tolerance)


def test_the_same_answers_pass_exactly():
    report = judge(reference, EXACT)
    assert report["passed"]
    assert (report["max_error"], report["share_above"], report["top1_agreement"]) == (0, 0, 1)
    assert [row["widths"] for row in report["by_policy"]] == [[2, 2, 2], [2, 3, 4]]
    require(report)


def test_errors_are_counted_by_image():
    errors, same = compare(reference, off_by(0.5, 3), IMAGES, POLICIES)
    np.testing.assert_allclose(errors[:, :4], [[0.5, 0.5, 0.5, 0]] * 2, atol=1e-6)
    assert same.shape == (2, 10)


@pytest.mark.parametrize(
    ("engine", "tolerance", "passes"),
    [
        (off_by(5e-5), EXACT, True),
        (off_by(2e-4), EXACT, False),
        (off_by(2e-4), Tolerance(share=0.1), True),
        (off_by(2e-4, 2), Tolerance(share=0.1), False),
        (off_by(3.0, 3), Tolerance(share=1.0, agreement=0.7), True),  # image 0 was of class 0
        (off_by(3.0, 5), Tolerance(share=1.0, agreement=0.7), False),
    ],
)
def test_tolerance_is_of_images_and_of_classes(engine, tolerance, passes):
    assert judge(engine, tolerance)["passed"] == passes


@pytest.mark.parametrize(
    "broken",
    [
        lambda images, policy: reference(images, policy) * np.nan,
        lambda images, policy: reference(images, policy) + np.inf,
        lambda images, policy: reference(images, policy)[:, :4],
        lambda images, policy: reference(images, policy)[:9],
    ],
)
def test_no_answer_is_no_agreement(broken):
    report = judge(broken, Tolerance(share=1.0, agreement=0.1))
    assert not report["passed"]
    assert report["max_error"] == "not finite"
    json.dumps(report, allow_nan=False)
    with refused("mismatch", "engine", 2, 10):
        require(report)
    assert "nan" not in summary(report)
