"""The notebook: it runs from its first cell to its last, and what it keeps is small and says nothing of a machine."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "first_look.ipynb"


def test_it_keeps_pictures_alone():
    text = NOTEBOOK.read_text(encoding="utf-8")
    cells = json.loads(text)["cells"]
    kinds = [set(output["data"]) for cell in cells for output in cell.get("outputs", ())]
    assert len(text) < 200_000 and kinds and all(kind == {"image/png", "text/plain"} for kind in kinds)
    assert not any(word in text for word in ("/home", "/tmp", "/root", "Traceback"))


@pytest.mark.slow
def test_it_runs():
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    assert sum("image/png" in out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", ())) >= 6
