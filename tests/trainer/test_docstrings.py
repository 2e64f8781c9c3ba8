"""The standard library's docstrings as a dataset: what is taken, what is left out, the real thing."""

from __future__ import annotations

import pytest

from swiftk.config import DataConfig
from swiftk.trainer.docstrings import MAX_DOCSTRING, MAX_SIGNATURE, stdlib_docstrings
from swiftk.trainer.rows import read_rows


def test_signatures_and_docstrings(tmp_path):
    (tmp_path / "pack" / "tests").mkdir(parents=True)
    (tmp_path / "b.py").write_text(
        '''
class Heap(Base, metaclass=Meta):
    """A heap.

        indented
    End.
    """
    def push(self, item: int = 3, *, key=None) -> None:
        """Push item."""
        def inner():
            """Not seen from outside."""
try:
    async def later(x, /):
        """Wait for x."""
except ImportError:
    pass
def undocumented(): pass
def blank():
    """  """
def long():
    """'''
        + "line\n" * 400
        + '''"""
def one_line():
    """'''
        + "x" * (MAX_DOCSTRING + 1)
        + '''"""
def wide('''
        + ", ".join(f"argument_{i}" for i in range(MAX_SIGNATURE // 10))
        + '''):
    """Too wide."""
'''
    )
    (tmp_path / "a.py").write_text('def f(x):\n    """Same."""\n')
    (tmp_path / "c.py").write_text('def f(x):\n    """Same."""\ndef f(y):\n    """Other."""\n')
    (tmp_path / "pack" / "__init__.py").write_text('def g():\n    """In the package."""\n')
    (tmp_path / "pack" / "tests" / "test_g.py").write_text('def test():\n    """Not a test."""\n')
    (tmp_path / "broken.py").write_text("def f(:\n")
    pairs = [(row["query"], row["response"]) for row in stdlib_docstrings(str(tmp_path))]
    assert [pair for pair in pairs if not pair[0].startswith("def b.long")] == [
        ("def a.f(x)", "Same."),
        ("class b.Heap(Base)", "A heap.\n\n    indented\nEnd."),
        ("def b.Heap.push(self, item: int=3, *, key=None) -> None", "Push item."),
        ("async def b.later(x, /)", "Wait for x."),
        ("def c.f(y)", "Other."),
        ("def pack.g()", "In the package."),
    ]
    (long,) = [docstring for query, docstring in pairs if query == "def b.long()"]
    assert len(long) <= MAX_DOCSTRING and set(long.split("\n")) == {"line"}


def test_a_library_without_sources(tmp_path):
    (tmp_path / "x.py").write_text("")
    with pytest.raises(ValueError, match=r"python-stdlib-docstrings: .* has no Python sources"):
        stdlib_docstrings(str(tmp_path))


def test_the_real_library():
    rows, skipped = read_rows(DataConfig(dataset=("python-stdlib-docstrings",)))
    assert len(rows) > 5000 and not skipped
    texts = [tuple(message["content"] for message in row.messages) for row in rows]
    assert len(set(texts)) == len(texts)
    heappush = [reply for query, reply in texts if query == "def heapq.heappush(heap, item)"]
    assert heappush and heappush[0].startswith("Push item onto heap")
    assert not [query for query, _ in texts if " test." in query or ".tests." in query]
    sample = read_rows(DataConfig(dataset=("python-stdlib-docstrings#20",)))[0]
    assert len(sample) == 20 and all(row in rows for row in sample)
