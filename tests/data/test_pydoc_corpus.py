import sysconfig
from pathlib import Path

import pytest

from smelt.data.pydoc_corpus import module_text, prose, read_corpus, topics

MODULE = '''"""Do things with things.

>>> do(1)
2

They are done well, and quickly too, and nobody is hurt.
"""

import nothing_that_exists

raise SystemExit("a module that is read must not run")


class Thing:
    """A thing that can be done, which has a name and a size.

    ======  =====
    name    size
    ======  =====
    """

    def do(self, times, *, fast=False):
        """Do it as many times as you like; return how often it was done."""

    def _short(self):
        """Short."""


def undocumented():
    pass
'''


def test_docstrings_are_read_without_running_the_module(tmp_path):
    path = tmp_path / "things.py"
    path.write_text(MODULE)
    text = module_text(path, "pack.things")
    assert text == (
        "The module pack.things.\n\nDo things with things.\n\n"
        "They are done well, and quickly too, and nobody is hurt.\n\n"
        "class Thing\n\nA thing that can be done, which has a name and a size.\n\nname    size\n\n"
        "Thing.do(times, fast)\n\nDo it as many times as you like; return how often it was done."
    )


def test_files_of_another_python_are_left_out(tmp_path):
    path = tmp_path / "old.py"
    path.write_text("print 'hello'")
    assert module_text(path, "old") == ""


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Title\n*****\n\nText", "Title\n\nText"),
        ("a\n\n>>> x\n1\n... y\n\nb", "a\n\nb"),
        ("a\n+---+\n| b |\n+===+\n\n\n\nc", "a\n\nc"),
        ("f(*args, **kwargs) - x", "f(*args, **kwargs) - x"),
    ],
)
def test_examples_tables_and_rulers_are_left_out(text, kept):
    assert prose(text) == kept


def test_the_reference_is_read():
    texts = list(topics(Path(sysconfig.get_path("stdlib"))))
    assert len(texts) > 50
    assert any('The "while" statement is used for repeated execution' in text for text in texts)


@pytest.mark.slow
def test_the_whole_corpus_is_english_of_a_few_megabytes():
    texts = read_corpus()
    joined = "\n".join(texts)
    assert 1_500_000 < len(joined) < 10_000_000
    assert len(texts) > 300
    assert joined.count(" the ") > 10_000
    assert ">>>" not in joined.replace(">>>>", "")[:100_000]
    assert len(set(texts)) > 0.95 * len(texts)
