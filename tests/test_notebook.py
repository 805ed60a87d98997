"""The notebook runs from its first cell to its last."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "quickstart.ipynb"
SMALL = "COLD_START_STEPS, ITERATIONS, MODEL = 21, 2, {'hidden_size': 16, 'num_hidden_layers': 1}"


def executed(parameters: str | None = None):
    """The notebook with its outputs; `parameters` takes the place of the cell of that tag."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        assert not cell.get("outputs"), "the notebook is kept without outputs"
        if parameters and "parameters" in cell.metadata.get("tags", []):
            cell.source = parameters
    folder = {"metadata": {"path": str(NOTEBOOK.parents[1])}}
    nbclient.NotebookClient(notebook, timeout=1800, resources=folder).execute()
    return notebook


def text_of(notebook) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def test_the_notebook_runs_on_a_smaller_model(monkeypatch):
    # One device and little optimisation: it is compilation that takes the time here.
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    text = text_of(executed(SMALL))
    assert "eval/accuracy" in text
    assert "accuracy" in text.split("eval/accuracy")[-1]


@pytest.mark.long
def test_the_notebook_as_it_is_learns(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    text = text_of(executed())
    last = [line for line in text.splitlines() if "#" in line and "accuracy" in line][-1]
    assert float(last.rpartition("accuracy")[2]) > 0.5
