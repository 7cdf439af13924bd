"""Search for policies: which widths are best within a budget, or over the whole range of cost."""

from bitmixer_jax import deprecated
from bitmixer_jax.search.cache import EvaluationCache
from bitmixer_jax.search.evolution import Evolution
from bitmixer_jax.search.greedy import Greedy
from bitmixer_jax.search.ilp import IntegerProgram
from bitmixer_jax.search.problem import Constraint, Problem, parse_budget
from bitmixer_jax.search.random_search import Random
from bitmixer_jax.search.search import METHODS, Method, SearchResult, search
from bitmixer_jax.search.session import SearchSession, SearchSettings, search_front, search_policy

__all__ = [
    "METHODS",
    "Constraint",
    "EvaluationCache",
    "Evolution",
    "Greedy",
    "IntegerProgram",
    "Method",
    "Problem",
    "Random",
    "SearchResult",
    "SearchSession",
    "SearchSettings",
    "parse_budget",
    "search",
    "search_front",
    "search_policy",
]

__getattr__ = deprecated.module_getattr(__name__)
