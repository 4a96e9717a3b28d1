"""The quickstart notebook runs from its first cell to its last, and each picture displays."""

import ast
import json
from pathlib import Path

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"


def run_cell(source: str, scope: dict):
    """Executes a cell; the value of its last expression, as a notebook would show it."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), scope)
    if last is None:
        return None
    return eval(compile(ast.Expression(last.value), "cell", "eval"), scope)


def test_quickstart_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    scope, shown = {"__name__": "__main__"}, []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            shown.append(run_cell("".join(cell["source"]), scope))
    assert "parameters" in repr(shown[0])
    pictures = [s for s in shown if hasattr(s, "_repr_png_") or hasattr(s, "_repr_html_")]
    assert len(pictures) == 3
    assert (tmp_path / "runs" / "quickstart" / "grid.png").is_file()
