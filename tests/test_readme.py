"""What the README shows runs."""

import pathlib
import re
import shlex

import pytest

from bitmixer_jax.cli import _parser

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
LINKS = re.findall(r"\]\(([^)#:]+)\)", README)
COMMANDS = re.findall(r"^    (bitmixer .*)$", README, re.M)


def test_the_readme_shows_commands():
    assert {line.split()[1] for line in COMMANDS} == {
        *("train", "evaluate", "prepare", "benchmark"),
        *("cost", "search", "front", "export", "predict"),
    }


@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_is_understood(line):
    _, rest = _parser().parse_known_args(shlex.split(line)[1:])
    assert [word for word in rest if not word.startswith("--config.")] == []


def test_the_readme_has_links():
    assert len(LINKS) > 3


@pytest.mark.parametrize("path", LINKS)
def test_each_link_leads_somewhere(path):
    assert (pathlib.Path(__file__).parent.parent / path).exists()


@pytest.mark.slow
def test_the_python_example_compiles_once(capsys):
    example = re.findall(r"```python\n(.*?)```", README, re.S)[0]
    names: dict = {}
    exec(example, names)
    assert capsys.readouterr().out.count("(8, 10)") == 3
    assert names["run"]._cache_size() == 1
