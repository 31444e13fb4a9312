"""The examples run as they are published."""

import ast
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name):
    """Return an example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rule():
    return load("add_an_aggregation_rule")


def test_a_family_is_added_by_one_row(tmp_path, capsys):
    """Logits of both stages, the untouched model's; and both stages train at two clients."""
    family = load("add_family")
    found = family.main(tmp_path)
    assert found.keys() == {1, 2} and max(found.values()) < 1e-5
    assert "aya_vision" not in family.SPECS
    out = capsys.readouterr().out
    assert "Exchange 2: 2 clients, stage 2" in out and "difference 0." in out


def test_the_rules_weights_are_those_of_its_equation(rule):
    distances, examples = np.array([[0.0, 1, 3], [1, 0, 2], [3, 2, 0]]), [10.0, 20.0, 30.0]
    weights = rule.softmax_weights(distances, examples, temperature=0.25)
    for k in range(3):
        terms = [examples[j] * np.exp(-distances[k, j] / (0.25 * 2)) for j in range(3)]
        np.testing.assert_allclose(weights[k], np.array(terms) / sum(terms))
    np.testing.assert_allclose(rule.softmax_weights(np.zeros((1, 1)), [5.0]), [[1.0]])


@pytest.mark.slow
def test_the_rule_mixes_the_loras_of_a_run(rule, tmp_path, capsys):
    mixed = rule.main(tmp_path / "run")
    printed = capsys.readouterr().out
    assert mixed.weights.shape == (6, 6) and (mixed.weights > 0).all()  # Pilot mixes with two
    assert mixed.weights.sum(axis=1) == pytest.approx(np.ones(6))
    assert all(f"  {client} " in printed for client in mixed.clients)


SMALL = """OVERRIDES = (
    "data.clients_per_task=1 data.train_examples=16 data.test_examples=16 train.epochs=1 "
    "strategy.rounds=1 run.report=false run.tensorboard=false"
)"""


def test_what_the_notebook_imports_exists():
    notebook = json.loads((EXAMPLES / "demo.ipynb").read_text())
    source = "\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code")
    imports = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)]
    assert len(imports) > 5
    for statement in imports:
        module = importlib.import_module(statement.module)
        for name in statement.names:
            assert hasattr(module, name.name), f"{statement.module}.{name.name}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_notebook_runs(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "demo.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if cell.source.startswith("OVERRIDES = ")]
    cell.source = SMALL
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
