"""Search for policies: which widths are best within a budget, or over the whole range of cost."""

from bitmixer_jax.search.evolution import Evolution
from bitmixer_jax.search.greedy import Greedy
from bitmixer_jax.search.ilp import IntegerProgram
from bitmixer_jax.search.problem import Limit, Problem, parse_budget
from bitmixer_jax.search.random_search import Random
from bitmixer_jax.search.scores import ScoreBook
from bitmixer_jax.search.search import METHODS, Found, Method, search

__all__ = [
    "METHODS",
    "Evolution",
    "Found",
    "Greedy",
    "IntegerProgram",
    "Limit",
    "Method",
    "Problem",
    "Random",
    "ScoreBook",
    "parse_budget",
    "search",
]
