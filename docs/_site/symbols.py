"""Where a name is defined in a Python file."""

from __future__ import annotations

import ast


def symbols(code: str) -> dict[str, tuple[int, int]]:
    """First and last line of each function, class and constant of a module, and of each method as `Class.method`; decorators included."""
    found: dict[str, tuple[int, int]] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                found[prefix + node.name] = start, node.end_lineno or start
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name):
                        found[prefix + target.id] = node.lineno, node.end_lineno or node.lineno

    visit(ast.parse(code).body, "")
    return found
