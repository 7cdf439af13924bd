"""The split whose images score policies: never test data, and unseen in training if possible."""

from __future__ import annotations

from collections.abc import Iterable

from bitmixer_jax.data.splits import (
    ALL,
    EmptySplit,
    complement,
    left_out,
    overlap,
    parse_split,
    split_names,
)
from bitmixer_jax.errors import UserError
from bitmixer_jax.search.settings import SearchSettings
from bitmixer_jax.trained import Trained


def search_split(trained: Trained, settings: SearchSettings) -> str:
    """Returns the split of a search: the one in the settings, else what training did not use.

    If training used all of its split, this is the split itself.

    Raises:
      UserError: the split in the settings has images of the test data, or does not exist.
    """
    split = settings.split or _unused_split(trained, settings.data_dir)
    # A policy that was chosen on test data would have too high an accuracy on them.
    if _has_test_data(split, trained, settings.data_dir):
        raise UserError(f"split {split}: that is test data; search on training data", "test-data")
    return split


def _unused_split(trained: Trained, data_dir: str | None) -> str:
    """Returns the part of its split that training did not use; if there is none, the split."""
    used = trained.run.train_split
    names = split_names(used)
    if "+" in used and ALL not in names:
        unused = complement(used, _counts(names, trained, data_dir))
    else:
        unused = left_out(used) or ""
    if not unused:
        return used
    try:
        trained.load_split(unused, data_dir)
    except EmptySplit:  # such as train[100%:]
        return used
    return used if _has_test_data(unused, trained, data_dir) else unused


def _has_test_data(split: str, trained: Trained, data_dir: str | None) -> bool:
    """Returns whether a split has images of the test data.

    The names of splits often decide, and then no data are opened.
    """
    run = trained.run
    names, train, test = ({*split_names(text)} for text in (split, run.train_split, run.test_split))
    if ALL in names | test:
        return True
    shared = names & test
    if shared - train and ALL not in train:
        return True
    if not shared:
        return False
    counts = _counts(names | test, trained, data_dir)
    return overlap(parse_split(split, counts), parse_split(run.test_split, counts))


def _counts(names: Iterable[str], trained: Trained, data_dir: str | None) -> dict[str, int]:
    """Returns how many images each split has."""
    return {name: len(trained.load_split(name, data_dir)) for name in names}
