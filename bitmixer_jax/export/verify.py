"""Verification: runs an export in its own engine and compares it with the network it came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bitmixer_jax.errors import UserError

Engine = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Limits how much the answers of an engine may differ from those of the network.

    Engines round real-valued arithmetic (stem, norms) differently. Nearly always logits differ by
    less than ``logits``. But sometimes a value at the border between two codes gets the other code,
    and the logits of that image differ visibly. So a share of images may differ by more.

    Attributes:
      logits: largest absolute difference of an image that counts as equal.
      share: largest share of images, over all policies, that may differ by more.
      agreement: smallest share of images, over all policies, with the same top-1 class.
    """

    logits: float = 1e-4
    share: float = 0.02
    agreement: float = 0.995


EXACT = Tolerance(logits=1e-4, share=0.0, agreement=1.0)


def compare(
    reference: Engine,
    engine: Engine,
    images: np.ndarray,
    policies: Sequence[np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Runs both on the same images under each policy.

    Args:
      reference, engine: functions of (images uint8 ``[N, H, W, C]``, policy int32 ``[L]``) that
        return logits float32 ``[N, K]``.
      images: uint8 ``[N, H, W, C]``.
      policies: M of them, ``[L]`` each.

    Returns:
      largest difference of a logit, float64 ``[M, N]`` (infinite where there is no finite answer),
      and whether the top-1 class is the same, bool ``[M, N]``.
    """
    errors = np.full((len(policies), len(images)), np.inf)
    same = np.zeros((len(policies), len(images)), bool)
    for row, policy in enumerate(policies):
        wanted = np.asarray(reference(images, policy), np.float64)
        found = np.asarray(engine(images, policy), np.float64)
        if found.shape == wanted.shape:
            difference = np.abs(found - wanted).max(-1)
            errors[row] = np.where(np.isfinite(difference), difference, np.inf)
            same[row] = found.argmax(-1) == wanted.argmax(-1)
    return errors, same & np.isfinite(errors)


def verify(
    what: str,
    reference: Engine,
    engine: Engine,
    images: np.ndarray,
    policies: Sequence[np.ndarray],
    tolerance: Tolerance,
) -> dict[str, Any]:
    """Compares an export with its network, within a tolerance.

    Args:
      what: name of the engine.
      reference, engine, images, policies: as in `compare`.
      tolerance: how much answers may differ.

    Returns:
      the report, a JSON tree; its key "passed" says whether they agree.
    """
    errors, same = compare(reference, engine, images, policies)
    above = errors > tolerance.logits
    passed = above.mean() <= tolerance.share and same.mean() >= tolerance.agreement
    return {
        "engine": what,
        "passed": bool(passed),
        "images": len(images),
        "policies": len(policies),
        "tolerance": dataclasses.asdict(tolerance),
        **_figures(errors, above, same),
        "by_policy": [
            {"widths": np.asarray(policy).tolist(), **_figures(errors[i], above[i], same[i])}
            for i, policy in enumerate(policies)
        ],
    }


def _figures(errors: np.ndarray, above: np.ndarray, same: np.ndarray) -> dict[str, Any]:
    return {
        "max_error": _number(errors.max()),
        "median_error": _number(np.median(errors)),
        "share_above": float(above.mean()),
        "top1_agreement": float(same.mean()),
    }


def _number(value: Any) -> float | str:
    """Returns a number for JSON, which has no infinity."""
    return float(value) if np.isfinite(value) else "not finite"


def summary(report: Mapping[str, Any]) -> str:
    """Returns a line that says what a report found."""
    error = report["max_error"]
    shown = error if isinstance(error, str) else f"{error:.2g}"
    verdict = "verified" if report["passed"] else "MISMATCH"
    return (
        f"{verdict}: {report['engine']}, {report['policies']} policies x {report['images']} "
        f"images: top-1 agreement {100 * report['top1_agreement']:.2f}%, logits differ by at most "
        f"{shown}, by more than {report['tolerance']['logits']:g} on "
        f"{100 * report['share_above']:.2f}% of images"
    )


def require(report: Mapping[str, Any]) -> None:
    """Raises UserError if the report says that the export differs."""
    if not report["passed"]:
        raise UserError(f"export: {summary(report)}; nothing was written", "mismatch")
