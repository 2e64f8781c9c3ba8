"""A dataset that every machine already has: the documented functions and classes of Python's own standard library.

About 7,500 pairs with Python 3.11: the signature, qualified by its module, is the query; the cleaned docstring is the
response. The order is that of module name and line. Not portable: another version of Python has other docstrings.
"""

from __future__ import annotations

import ast
import os
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# tests, vendored wheels, installed packages, and two folders of generated tables (1.4 MB with nine docstrings)
SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled", "pydoc_data", "encodings",
}  # fmt: skip
MAX_SIGNATURE = 300  # characters; longer ones (about 1 in 300) are left out
MAX_DOCSTRING = 800  # characters; longer docstrings end at the last whole line within


@cache  # parsing 10 MB takes 3 s, and a run reads the rows twice: for the tokenizer and for training
def stdlib_docstrings(root: str | None = None) -> tuple[dict[str, str], ...]:
    """{"query": "def heapq.heappush(heap, item)", "response": docstring} in a fixed order, without repeats.

    root: the folder of the library; None: that of the running Python.
    Raises: ValueError where the folder holds no Python sources (some minimal installations ship bytecode alone).
    """
    folder = Path(root or sysconfig.get_path("stdlib"))
    seen: set[tuple[str, str]] = set()
    pairs: list[dict[str, str]] = []
    for path in _sources(folder):
        parts = path.relative_to(folder).with_suffix("").parts
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # files that are wrong on purpose, for lib2to3
            continue
        module = ".".join(part for part in parts if part != "__init__")
        for prefix, node in _documented(tree):
            docstring = _shorten(ast.get_docstring(node) or "")
            signature = _signature(f"{module}.{prefix}{node.name}", node)
            key = (_signature(node.name, node), docstring)  # the same function in two modules is one pair
            if docstring and len(signature) <= MAX_SIGNATURE and key not in seen:
                seen.add(key)
                pairs.append({"query": signature, "response": docstring})
    if not pairs:
        raise ValueError(f"python-stdlib-docstrings: {folder} has no Python sources, wants an installation with its library")
    return tuple(pairs)


def _sources(folder: Path) -> list[Path]:
    """All .py files in order; skipped folders are not entered (site-packages may hold 20 times as many)."""
    found: list[Path] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        found += [Path(parent, name) for name in files if name.endswith(".py")]
    return sorted(found)


Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _documented(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Documented]]:
    """Functions, methods and classes in the order of their lines, with the classes around them; not those in functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Documented):
            yield prefix, child
        if isinstance(child, ast.ClassDef):
            yield from _documented(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.If | ast.Try):
            yield from _documented(child, prefix)


def _signature(name: str, node: Documented) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    define = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f"{define} {name}({ast.unparse(node.args)}){returns}"


def _shorten(docstring: str) -> str:
    docstring = docstring.strip()
    if len(docstring) > MAX_DOCSTRING:
        docstring = docstring[: MAX_DOCSTRING + 1].rsplit("\n", 1)[0].rstrip() if "\n" in docstring[:MAX_DOCSTRING] else ""
    return docstring
