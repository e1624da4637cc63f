"""The page that draws in a browser alone, in Chromium."""

import functools
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import open_bundle
from runtime.images.pixels import to_uint8
from tests.conftest import ROOT

PAGE = ROOT / "examples" / "browser"
LIBRARY = "node_modules/onnxruntime-web"
SIZES = ((24, 24), (40, 64), (56, 56))
# A picture's height, width and RGBA, row by row.
READ = """canvases => canvases.map(c =>
    [c.height, c.width, [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data]])"""


class Handler(SimpleHTTPRequestHandler):
    """Static files and nothing else, without a word."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """The page's files on a port of this machine, without picture.onnx."""
    if not (PAGE / LIBRARY / "dist").is_dir():
        pytest.skip(f"no examples/browser/{LIBRARY}: run `make browser`")
    folder = tmp_path / "site"
    shutil.copytree(PAGE, folder, ignore=shutil.ignore_patterns("node_modules", "*.onnx"))
    (folder / "node_modules").symlink_to(PAGE / "node_modules")
    handler = functools.partial(Handler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_a_digit_at_three_sizes(
    browser: Any, site: str, picture_file: Path, mnist_bundle: Path, tmp_path: Path
) -> None:
    expect = pytest.importorskip("playwright.sync_api").expect
    page = browser.new_page()
    page.set_default_timeout(120_000)
    expect.set_options(timeout=120_000)
    faults, asked = [], []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(site)
    expect(page.get_by_role("status")).to_contain_text("No picture.onnx beside this page")
    assert page.get_by_role("button", name="Draw").is_disabled()

    page.get_by_label("Another file").set_input_files(picture_file)
    expect(page.get_by_role("status")).to_contain_text("Ready, on Web")
    page.get_by_label("7", exact=True).check(force=True)
    page.get_by_label("Seed").fill("12345678901234")
    page.get_by_label("Sizes").fill("24x, 9")
    page.get_by_role("button", name="Draw").click()
    expect(page.get_by_role("status")).to_contain_text('"24x" is no size')
    page.get_by_label("Sizes").fill(", ".join(f"{height}x{width}" for height, width in SIZES))
    page.get_by_role("button", name="Draw").click()
    expect(page.get_by_role("status")).to_have_text("Done")
    pictures = page.locator("canvas").evaluate_all(READ)
    page.close()

    bundle = open_bundle(mnist_bundle)
    assert [(height, width) for height, width, _ in pictures] == [*SIZES]
    for height, width, data in pictures:
        found = np.array(data, np.uint8).reshape(height, width, 4)
        latent = height // 8, width // 8
        made = bundle.generate([7], latent, image=(height, width), seed=12345678901234)
        wanted = to_uint8(made.images)[0].astype(int)
        assert np.abs(found[..., :3] - wanted).max() <= 1 and wanted.max() > 200
        assert (found[..., 3] == 255).all()
    assert not faults and all(url.startswith((site, "data:")) for url in asked)
