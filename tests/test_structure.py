"""Habits of the code base that import-linter (pyproject.toml) does not check."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "pilot_flwr").rglob("*.py"))
MOST_LINES = 450


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names.add(node.module)
    return names


def test_files_stay_readable():
    lengths = {
        path.relative_to(ROOT / "pilot_flwr").as_posix(): len(path.read_text().splitlines())
        for path in FILES
    }
    assert {n: k for n, k in lengths.items() if k > MOST_LINES} == {}


def test_no_pickle_and_no_unsafe_load():
    for path in FILES:
        assert not {"pickle", "dill", "cloudpickle"} & imports(path), path
        assert "torch.load" not in path.read_text(), path


def test_the_mathematics_imports_torch_and_numpy_alone():
    allowed = {"numpy", "pilot_flwr", "torch", *sys.stdlib_module_names}
    for path in sorted((ROOT / "pilot_flwr" / "algorithm").glob("*.py")):
        names = imports(path)
        if path.name == "aggregation.py":  # connected components, imported where they are needed
            names -= {"scipy.sparse"}
        if path.name == "neighbors.py":  # a hierarchical clustering, imported where it is needed
            names -= {"scipy.cluster.hierarchy"}
        if path.name == "blocks.py":  # the number of threads of numpy's BLAS
            names -= {"threadpoolctl"}
        assert {name.partition(".")[0] for name in names} <= allowed, path
