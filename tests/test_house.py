"""What CONTRIBUTING says of the code and no linter checks: names of files, and what the formatter leaves alone."""

import ast
from collections import Counter
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "skipscope"
FILES = sorted(SOURCE.rglob("*.py"))


def unformatted(text: str) -> list[ast.stmt]:
    """The statements that the formatter leaves as they are."""
    marked = {i for i, line in enumerate(text.splitlines(), 1) if line.endswith("# fmt: skip")}
    statements = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)]
    return [node for node in statements if node.end_lineno in marked and not hasattr(node, "body")]


def is_table(node: ast.stmt) -> bool:
    """Whether a statement is a literal of several rows or entries, given a name or returned."""
    value = getattr(node, "value", None)
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and len(value.args) == 1:
        value = value.args[0]  # "\n".join([...])
    return isinstance(node, ast.Assign | ast.AnnAssign | ast.Return) and isinstance(
        value, ast.Dict | ast.List
    )


def test_only_tables_are_left_unformatted():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        kept = unformatted(text)
        assert text.count("# fmt: skip") == len(kept) and "# fmt: off" not in text, path.name
        assert all(map(is_table, kept)), f"{path.name}: the formatter can lay out all but tables"


def test_a_call_is_no_table():
    (call,) = unformatted("f(1,\n  2)  # fmt: skip")
    assert not is_table(call)
    (table,) = unformatted("T = {1: 2,\n  3: 4}  # fmt: skip")
    assert is_table(table)


def test_no_file_name_stands_twice():
    names = Counter(path.name for path in FILES if path.stem not in {"__init__", "__main__"})
    assert [name for name, count in names.items() if count > 1] == []
