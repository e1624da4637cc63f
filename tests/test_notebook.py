"""docs/notebook.ipynb runs from its first cell to its last, as a reader would run it.

It is kept without outputs: pictures would make each change of it unreadable, and this test is what
says that they come out.
"""

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

nbformat = pytest.importorskip("nbformat", reason="no nbformat: pip install '.[notebook]'")
nbclient = pytest.importorskip("nbclient", reason="no nbclient: pip install '.[notebook]'")
ROOT = Path(__file__).parents[1]


def test_the_notebook_runs_and_shows_its_pictures(mnist_bundle: Path) -> None:
    book = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    run = {"path": str(ROOT)}
    client = nbclient.NotebookClient(
        book, timeout=600, kernel_name="python3", resources={"metadata": run}
    )
    client.execute()
    outputs = [output for cell in code for output in cell.outputs]
    pictures = [out.data["image/png"] for out in outputs if "image/png" in out.get("data", {})]
    sizes = [Image.open(io.BytesIO(base64.b64decode(each))).size for each in pictures]
    assert sizes[2:] == [(64, 64), (64, 128), (96, 96), (256, 256), (256, 256)]
    assert [height for _, height in sizes[:2]] == [64, 2 * 64 + 2]
    told = "".join(out.text for out in outputs if out.output_type == "stream")
    assert "12/12" in told
