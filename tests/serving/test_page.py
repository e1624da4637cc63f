"""The page at `/`, in Chromium: draws, previews, cancels, edits, repeats."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.images.pixels import png_bytes, read_metadata
from runtime.images.png import Rows
from tests.serving.conftest import Server, pixels_of, running

WAIT = 60_000  # milliseconds
DRAWN = "#pictures figure:not(.wait) img"


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """The page of a running server; its faults and whom it asked are judged at the end."""
    opened = browser.new_page(accept_downloads=True)
    opened.set_default_timeout(WAIT)
    pytest.importorskip("playwright.sync_api").expect.set_options(timeout=WAIT)
    faults: list[str] = []
    asked: list[str] = []
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(server.url)
    expect(opened.locator(".chip").first).to_be_visible()
    yield opened
    opened.close()
    assert not faults
    assert all(url.startswith((server.url, f"blob:{server.url}", "data:")) for url in asked)


def expect(what: Any) -> Any:
    return pytest.importorskip("playwright.sync_api").expect(what)


def slide(page: Any, name: str, value: object) -> None:
    """Set a slider as a hand does."""
    page.locator(f"#{name}").evaluate(
        "(own, value) => { own.value = value;"
        " own.dispatchEvent(new Event('input', { bubbles: true })); }",
        str(value),
    )


def keep_seed(page: Any, seed: int) -> None:
    page.get_by_label("Seed", exact=True).fill(str(seed))
    page.get_by_label("keep").check()


def draw(page: Any, button: str = "Draw") -> None:
    page.get_by_role("button", name=button, exact=True).click()
    expect(page.locator("#status")).to_contain_text("drawn, seed")


def saved(page: Any, folder: Path, number: int = 0) -> Path:
    """A drawn picture as the page's link gives it."""
    with page.expect_download() as waiting:
        page.get_by_role("link", name="Download").nth(number).click()
    path = folder / f"{number}-{waiting.value.suggested_filename}"
    waiting.value.save_as(path)
    return path


def test_it_draws_what_the_runtime_does(
    page: Any, alone: Callable[..., Rows], tmp_path: Path
) -> None:
    page.get_by_role("button", name="d", exact=True).click()
    slide(page, "cells", 6)
    slide(page, "aspect", 20)  # twice as high as wide
    slide(page, "scale", 5)
    slide(page, "steps", 4)
    slide(page, "count", 2)
    keep_seed(page, 11)
    draw(page)
    expect(page.locator(DRAWN)).to_have_count(2)
    for index in range(2):
        path = saved(page, tmp_path, index)
        request = read_metadata(path)["request"]
        latent = tuple(request["latent"])
        assert latent[0] == 2 * latent[1] == 12 and request["seed"] == 11
        wanted = alone("d", index, latent=latent, image=(60, 30), steps=4, seed=11)
        assert np.array_equal(pixels_of(path.read_bytes()), wanted)


def test_previews_come_while_it_draws_and_esc_cancels(page: Any, server: Server) -> None:
    before = server.metric("r2_pictures_total")
    page.locator("#steps").evaluate("own => { own.max = 10000; }")
    slide(page, "steps", 10_000)
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.locator("#pictures figure.wait img[src^=blob]")).to_be_visible()
    expect(page.get_by_role("progressbar")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_contain_text("Cancelled")
    expect(page.locator("#pictures figure.wait")).to_have_count(0)
    assert server.metric("r2_pictures_total") == before


def test_one_seed_at_several_sizes(page: Any) -> None:
    keep_seed(page, 5)
    slide(page, "steps", 2)
    draw(page, "Several sizes")
    texts = page.locator("#pictures figcaption").all_inner_texts()
    assert len(texts) > 2 and len({text.split("\n")[0] for text in texts}) == len(texts)
    assert all("seed 5" in text for text in texts)


def test_a_picture_is_repeated_and_kept_in_the_history(page: Any, tmp_path: Path) -> None:
    slide(page, "steps", 3)
    keep_seed(page, 9)
    draw(page)
    first = saved(page, tmp_path)
    page.get_by_label("keep").uncheck()
    slide(page, "steps", 7)
    draw(page)
    expect(page.locator("#history li")).to_have_count(2)
    page.locator("#file").set_input_files(first)
    expect(page.locator("#status")).to_contain_text("drawn, seed 9")
    again = saved(page, tmp_path)
    assert np.array_equal(pixels_of(first.read_bytes()), pixels_of(again.read_bytes()))
    page.locator("#history li button").nth(1).click()
    expect(page.locator("#status")).to_contain_text("Shown")


def test_what_is_brushed_is_drawn_anew_and_the_rest_stays(page: Any, tmp_path: Path) -> None:
    before = np.full((24, 24, 1), 128, np.uint8)
    (tmp_path / "grey.png").write_bytes(png_bytes(before))
    slide(page, "steps", 3)
    page.locator("#file").set_input_files(tmp_path / "grey.png")
    box = page.locator("#brush").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 4)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 3, box["y"] + box["height"] / 4, steps=4)
    page.mouse.up()
    draw(page)
    path = saved(page, tmp_path)
    after = pixels_of(path.read_bytes())
    assert after.shape == before.shape
    changed = (after != before).any(-1)
    half = np.array(changed.shape) // 2
    assert changed[: half[0], : half[1]].any()
    assert not changed[half[0] :].any() and not changed[:, half[1] :].any()
    assert read_metadata(path)["request"]["mask"] is not None


def test_a_token_is_asked_for(browser: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    secret = "a token of many letters"[2:].replace(" ", "-")
    (tmp_path / "token").write_text(secret)
    with running(tiny_bundle, "--token-file", tmp_path / "token") as server:
        page = browser.new_page()
        page.set_default_timeout(WAIT)
        page.goto(server.url)
        expect(page.get_by_role("alert")).to_contain_text("no valid token")
        page.locator("#token").fill(secret)
        page.locator("#token").press("Tab")
        expect(page.locator(".chip").first).to_be_visible()
        assert json.loads(page.evaluate("JSON.stringify(Object.keys(sessionStorage))")) == ["token"]
        page.close()


def test_every_control_has_a_name_and_a_phone_shows_all(page: Any) -> None:
    nameless = page.locator("input:visible, button:visible, select:visible, canvas:visible")
    for control in nameless.all():
        name = control.evaluate(
            "own => own.getAttribute('aria-label') || own.labels?.[0]?.textContent"
            " || own.textContent"
        )
        assert name and name.strip(), control.evaluate("own => own.outerHTML")
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
