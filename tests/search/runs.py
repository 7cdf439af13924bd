"""Searches of a trained run, as its users start them."""

from bitmixer_jax.cli import main
from bitmixer_jax.search import SearchSession, SearchSettings, search_policy
from bitmixer_jax.search.describe import describe_policy
from bitmixer_jax.trained import load

SMALL = dict(images=64, evaluations=24)


def search(workdir, budget, out, overwrite=False, **settings):
    """Searches, writes the policy, and returns the lines that are printed."""
    found = search_policy(workdir, budget, **settings)
    found.save(out, overwrite=overwrite)
    return describe_policy(found)


def open_session(workdir, **settings):
    return SearchSession(load(workdir), SearchSettings(**settings))


def run(*words):
    """Runs a command in this process."""
    return main([str(word) for word in words])
