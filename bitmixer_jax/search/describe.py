"""Results of searches as lines of Markdown, for people."""

from __future__ import annotations

import numpy as np

from bitmixer_jax.front import Front
from bitmixer_jax.search.session import FoundPolicy, SearchSession

_ROWS = 12  # most points of a front that a table shows


def describe_policy(found: FoundPolicy) -> list[str]:
    """Returns a table of the policy and the uniform policies, and which images were read."""
    constraints, space = found.constraints, found.session.trained.model.space
    rows = ["| policy | top-1 on test, % |" + "".join(f" {c.cost.name} |" for c in constraints)]
    rows.append("|---|---|" + "---|" * len(constraints))
    policies = [("found", found.point.widths, found.point.test_top1)]
    for width, top1 in found.uniform.items():
        uniform = space.uniform(width, len(found.point.widths))
        policies.append((f"all {width} bits", tuple(uniform.tolist()), top1))
    for name, policy, accuracy in policies:
        cells = "".join(f" {float(c.cost(policy)):,.6g} |" for c in constraints)
        rows.append(f"| {name} | {100 * (accuracy or 0):.2f} |{cells}")
    return [*rows, "", *_images_read(found.session, len(found.result.policies), found.examples)]


def describe_front(front: Front, session: SearchSession) -> list[str]:
    """Returns a table of up to 12 points of a front, and which images were read."""
    points, cost = front.points, session.costs[front.cost]
    rows = [f"| {cost.name} | of the widest | top-1 on test, % | widths |", "|---|---|---|---|"]
    shown = np.unique(np.linspace(0, len(points) - 1, _ROWS).round().astype(int))
    for i in shown:
        point = points[i]
        rows.append(
            f"| {point.cost:,.6g} | {100 * point.cost / cost.widest:.1f}% | "
            f"{100 * (point.test_top1 or 0):.2f} | {','.join(map(str, point.widths))} |"
        )
    if len(shown) < len(points):
        rows.append(f"| ({len(points)} points in all) | | | |")
    search, test = front.notes["search"], front.notes["test"]
    return [*rows, "", *_images_read(session, search["evaluations"], test["examples"])]


def _images_read(session: SearchSession, evaluations: int, examples: int) -> list[str]:
    """Returns lines that say which images scored policies, and which tested the result."""
    seen = ""
    if session.seen_in_training:
        seen = (
            "; the network was trained on them: train with config.train_split=train[:90%] to keep "
            "some"
        )
    return [
        f"{session.settings.method}: {evaluations} policies evaluated on {len(session.data)} "
        f"images of {session.split}{seen}; {session.seconds:.1f} s.",
        f"Test data: {examples} images, read once, after the search.",
    ]
