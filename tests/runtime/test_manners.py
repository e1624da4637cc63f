"""What commands say, and where: names of files, defaults, notes, usage errors, logs."""

import importlib
import io
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import EngineOptions, cli, open_bundle, progress
from runtime import __main__ as commands
from runtime.images.pixels import read_metadata
from tests.conftest import Command

COMMANDS = ("generate", "render", "resample", "inspect", "certify", "doctor")


def drawn(command: Command, bundle: Path, *args: object) -> Any:
    return command("runtime.generate", "--engine", bundle, "--steps", 1, *args)


def test_names_are_filled_in(tiny_bundle: Path, command: Command, tmp_path: Path) -> None:
    out = "d-{index:03}-{label}-{seed}-{latent}-{image}.png"
    args = ("--label", "b,c+d,none", "--seed", 7, "--first-index", 9, "--latent", "3x2")
    assert drawn(command, tiny_bundle, *args, "--out", out).returncode == 0
    found = sorted(path.name for path in tmp_path.iterdir())
    middles = ("009-b", "010-c+d", "011-none")
    assert found == [f"d-{middle}-7-3x2-12x8.png" for middle in middles]
    assert read_metadata(tmp_path / found[0])["request"]["first_index"] == 9
    done = drawn(command, tiny_bundle, "--label", "0-3", "--out", "sheet-{seed:02}.png")
    assert done.returncode == 0 and (tmp_path / "sheet-00.png").is_file()


@pytest.mark.parametrize(
    ("out", "words"),
    [
        (
            "{indx}.png",
            "no field {indx}; the nearest is {index}. Expected some of {index}, ",
        ),
        ("{}.png", "no field {}"),
        ("{index.real}.png", "no field {index.real}"),
        ("{index:q}.png", "cannot be filled in"),
        ("{index.png", "cannot be filled in"),
        ("{label}.png", "images would overwrite each other; add {index}"),
    ],
)
def test_an_unknown_field_is_an_error_before_any_work(
    tiny_bundle: Path, command: Command, tmp_path: Path, out: str, words: str
) -> None:
    done = drawn(command, tiny_bundle, "--label", "0,0", "--out", out)
    assert done.returncode == 2 and words in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_a_fallback_is_said_once_with_what_ran(tiny_bundle: Path, command: Command) -> None:
    args = ("--label", "0", "--provider", "cuda", "--allow-fallback")
    done = drawn(command, tiny_bundle, *args)
    assert done.returncode == 0
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and "runs on cpu, since cuda cannot run it here" in notes[0]
    assert not drawn(command, tiny_bundle, *args, "--quiet").stderr


def test_programs_hear_of_a_fallback_too(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger("runtime")
    with caplog.at_level(logging.WARNING, "runtime"):
        log.propagate = True
        options = EngineOptions("cuda", allow_fallback=True)
        open_bundle(tiny_bundle, options).generate([0], steps=1)
    assert len([r for r in caplog.records if "runs on cpu" in r.message]) == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_default(name: str) -> None:
    parser = importlib.import_module(f"runtime.{name}").parser()
    text = " ".join(parser.format_help().split())
    for action in parser._actions:
        shown = action.help and action.help.strip("=") != "SUPPRESS"
        if shown and action.default not in (None, False, [], "==SUPPRESS=="):
            tail = text[text.index(" ".join(action.help.split())[:40]) :]
            assert "(" in tail[: len(action.help) + 30], action.dest


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (("--lable", "3"), "unknown --lable; the nearest is --label. Help: python -m"),
        (("--steps", "0"), "argument --steps: '0'; expected an integer"),
        (("stray",), "unknown stray"),
    ],
)
def test_a_usage_error_is_one_line_with_the_nearest_and_where_help_is(
    command: Command, line: tuple[str, ...], words: str
) -> None:
    done = command("runtime.generate", *line)
    assert done.returncode == 2 and words in done.stderr
    assert done.stderr.count("\n") == 1 and "runtime.generate -h" in done.stderr


@pytest.mark.parametrize("option", ["--image", "--size"])
def test_the_size_of_an_image_has_one_name_and_the_old_one_works(
    tiny_bundle: Path, command: Command, tmp_path: Path, option: str
) -> None:
    args = ("--label", "0", "--state", "a.npz")
    assert drawn(command, tiny_bundle, *args, option, "9x7").returncode == 0
    assert read_metadata(tmp_path / "out.png")["request"]["image"] == [9, 7]
    done = command("runtime.render", "a.npz", option, "20x30", "--engine", tiny_bundle)
    assert done.returncode == 0 and (tmp_path / "a-20x30.png").is_file()
    done = command("runtime.resample", "out.png", option, "8x8", "--engine", tiny_bundle)
    assert done.returncode == 0 and (tmp_path / "out-8x8.png").is_file()
    missing = command("runtime.render", "a.npz", "--engine", tiny_bundle)
    assert missing.returncode == 2 and "--image is missing" in missing.stderr
    assert "--size" not in command("runtime.render", "--help").stdout


def test_logs_have_plain_lines_and_a_word_before_hours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter(np.arange(0.0, 4000.0, 10.0))
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    heard: list[str] = []
    monkeypatch.setattr(progress.log, "warning", lambda text, *args: heard.append(text % args))
    with progress.Bar(total=1000, desc="train", unit="step") as bar:
        bar.set_postfix_str("loss=0.1")
        for _ in range(13):
            bar.update()
    assert heard == ["train will take about 2 h 46 min; Ctrl-C stops it"]
    lines = capsys.readouterr().err
    assert "train: 6 of 1000 steps, loss=0.1, 166 min left" in lines.replace(
        "2 h 46 min", "166 min"
    )
    assert "\r" not in lines and 1 <= lines.count("\n") <= 3
    assert [*progress.Bar([1, 2, 3], desc="walk", unit="batch")] == [1, 2, 3]
    assert [*progress.Bar([1], desc="one", unit="batch")] == [1]
    lines = capsys.readouterr().err
    assert "walk: 3 of 3 batches, " in lines and "one: 1 of 1 batch, " in lines


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    with progress.Bar(total=3, desc="graphs", unit="graph", mininterval=0) as bar:
        bar.set_postfix_str("r2id")
        bar.update()
        bar.n = 2.5
        bar.refresh()
        progress.Bar.write("a line", file=terminal)
    drawn = terminal.getvalue()
    assert "1/3" in drawn and "2.5/3" in drawn and "r2id" in drawn and "a line\n" in drawn
    assert "spent" not in drawn


def test_a_log_needs_no_library_of_bars() -> None:
    code = "import sys, runtime.progress as p; [*p.Bar([1, 2])]; print('tqdm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n" and "work: 2 of 2 items" in done.stderr


def test_a_request_far_outside_of_the_training_is_said(own_bundle: Path, command: Command) -> None:
    import json

    path = own_bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["interface"]["trained"] = {"shortest": 2, "longest": 5, "aspect": 2.0}
    path.write_text(json.dumps(manifest))
    near = drawn(command, own_bundle, "--label", "0", "--latent", "5x6")
    far = drawn(command, own_bundle, "--label", "0", "--latent", "20x20")
    assert near.returncode == far.returncode == 0
    assert "trained on" not in near.stderr
    assert "note: tiny was trained on latents with sides of 2 to 5" in far.stderr


def test_the_formatter_keeps_what_help_says_of_a_default() -> None:
    parser = cli.parser("x", None)
    parser.add_argument("--one", default=5, help="with its own words (five)")
    parser.add_argument("--two", default=6, help="without")
    text = parser.format_help()
    assert "(five)" in text and "(5)" not in text and "without (6)" in text


def test_the_commands_are_listed_and_begun_from_one(command: Command) -> None:
    listed = command("runtime")
    assert listed.returncode == 0
    assert all(f"python -m runtime {name} " in listed.stdout for name in COMMANDS)
    assert command("runtime", "--version").stdout == command("runtime.doctor", "--version").stdout
    wrong = command("runtime", "genrate")
    assert wrong.returncode == 2 and "the nearest is generate" in wrong.stderr
    assert command("runtime", "generate", "--help").stdout.startswith("usage: python -m runtime.g")
    beside = command("runtime", "export.to_plan")
    assert beside.returncode == 2
    assert "no command export.to_plan; it is python -m export.to_plan." in beside.stderr


def test_the_wheels_command_lists_itself_and_says_where_the_rest_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/r2-edge", "serving"])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert ended.value.code == 2
    said = "no command serving; it is in a clone of the repository, as python -m serving. "
    assert capsys.readouterr().err == f"r2-edge: error: {said}Help: r2-edge -h\n"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/r2-edge"])
    commands.main()
    listed = capsys.readouterr().out
    assert "r2-edge generate " in listed and "python -m" not in listed


def test_without_a_bundle_it_says_where_it_looked(command: Command, tmp_path: Path) -> None:
    done = command("runtime.generate")
    assert done.returncode == 3 and "make " not in done.stderr.replace("make one", "")
    for words in (str(tmp_path), "build/mnist", "shipped", "--engine FOLDER"):
        assert words in done.stderr


def test_no_message_of_the_runtime_sends_to_make() -> None:
    root = Path(cli.__file__).parent
    for path in root.rglob("*.py"):
        text = path.read_text()
        assert ": make " not in text and "`make" not in text and "'.[" not in text, path
