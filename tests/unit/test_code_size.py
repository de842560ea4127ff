"""The package stays small and easy to read: its figures, with their limits.

Size is counted in tokens, so that nothing is gained by packing lines. `python -m tests.unit.test_code_size` prints
the figures.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "nemo_kd"

LAYOUT_TOKENS = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
FSTRING_START = getattr(tokenize, "FSTRING_START", None)
FSTRING_END = getattr(tokenize, "FSTRING_END", None)
NOUN_CLAUSE = re.compile(r"(What|Whether|How|Which|Where|When|Who)\b")
Definition = ast.FunctionDef | ast.AsyncFunctionDef

LIMITS = {
    "code tokens": 148_200,
    "code tokens per code line": 7.5,
    "share of assignments packed into tuples": 0.02,
    "share of docstrings that open with a noun clause": 0.01,
    "lines over 110 characters": 0,
    "files over 400 lines": 0,
    "functions over 60 lines": 0,
}
"""Lower them with the figures; they are no room to fill."""

ROOM_LIMITS = {
    "answers": 3_500,
    "cache": 15_900,
    "cli": 6_600,
    "config": 13_200,
    "data": 19_400,
    "evaluation": 6_900,
    "mcore": 19_200,
    "ops": 12_700,
    "run": 6_100,
    "student": 20_300,
    "teacher": 7_400,
    "tools": 11_900,
}
"""Code tokens of each folder: one that grows for a feature does so on purpose."""


def figures(package: Path) -> dict[str, float]:
    """Measure all Python files of a folder."""
    count: Counter[str] = Counter()
    for path in sorted(package.rglob("*.py")):
        text = path.read_text()
        lines = text.splitlines()
        tree = ast.parse(text)
        count["files over 400 lines"] += len(lines) > 400
        count["lines over 110 characters"] += sum(len(line) > 110 for line in lines)
        _count_nodes(tree, count)
        _count_tokens(text, _docstring_lines(tree), count)
    per_line = count["tokens"] / count["code lines"]
    packed = count["packed"] / count["assignments"]
    noun_clauses = count["noun clauses"] / count["docstrings"]
    return {
        "code tokens": count["tokens"],
        "code tokens per code line": round(per_line, 2),
        "share of assignments packed into tuples": round(packed, 4),
        "share of docstrings that open with a noun clause": round(noun_clauses, 4),
        "lines over 110 characters": count["lines over 110 characters"],
        "files over 400 lines": count["files over 400 lines"],
        "functions over 60 lines": count["functions over 60 lines"],
    }


def _count_nodes(tree: ast.AST, count: Counter[str]) -> None:
    for node in ast.walk(tree):
        if isinstance(node, Definition):
            length = (node.end_lineno or 0) - node.lineno + 1
            count["functions over 60 lines"] += length > 60
        if isinstance(node, ast.Module | ast.ClassDef | Definition):
            docstring = ast.get_docstring(node)
            count["docstrings"] += docstring is not None
            count["noun clauses"] += bool(docstring and NOUN_CLAUSE.match(docstring))
        if isinstance(node, ast.Assign):
            count["assignments"] += 1
            sides = (node.targets[0], node.value)
            count["packed"] += all(isinstance(side, ast.Tuple) for side in sides)


def _docstring_lines(tree: ast.AST) -> set[int]:
    return {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or 0) + 1)
    }


def _count_tokens(text: str, docstring_lines: set[int], count: Counter[str]) -> None:
    code_lines = set()
    depth = 0  # of f-strings, which are one token before Python 3.12
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_docstring = (
            token.type == tokenize.STRING and token.start[0] in docstring_lines
        )
        depth -= token.type == FSTRING_END
        is_inside = depth > 0
        depth += token.type == FSTRING_START
        if token.type in (*LAYOUT_TOKENS, FSTRING_END) or is_docstring or is_inside:
            continue
        count["tokens"] += 1
        code_lines.add(token.start[0])
    count["code lines"] += len(code_lines)


@pytest.fixture(scope="module")
def measured() -> dict[str, float]:
    return figures(PACKAGE)


@pytest.mark.parametrize("name", LIMITS)
def test_the_package_keeps_its_limits(measured, name):
    assert measured[name] <= LIMITS[name]


def test_every_room_keeps_its_size():
    found = {
        folder.name: figures(folder)["code tokens"]
        for folder in PACKAGE.iterdir()
        if (folder / "__init__.py").exists()
    }
    assert found.keys() == ROOM_LIMITS.keys()
    too_large = {name for name, count in found.items() if count > ROOM_LIMITS[name]}
    assert not too_large, {name: found[name] for name in too_large}


def test_the_figures_are_counted(tmp_path):
    line = "x = '" + "x" * 110 + "'"
    body = "\n".join(["def f():", *["    a = 1"] * 60, ""])
    (tmp_path / "code.py").write_text(
        f'"""What this is."""\n\n# a comment\na, b = 1, 2\n{line}\n\n\n{body}\n'
        + "\n" * 350
    )
    assert figures(tmp_path) == {
        "code tokens": 7 + 3 + 5 + 60 * 3,
        "code tokens per code line": round(195 / 63, 2),
        "share of assignments packed into tuples": round(1 / 62, 4),
        "share of docstrings that open with a noun clause": 1.0,
        "lines over 110 characters": 1,
        "files over 400 lines": 1,
        "functions over 60 lines": 1,
    }


if __name__ == "__main__":
    for name, value in figures(PACKAGE).items():
        print(f"{name}: {value:,}")
