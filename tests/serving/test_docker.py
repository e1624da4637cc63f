"""The Dockerfile's steps outside of a container: what is copied installs, serves, is found well."""

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

TEXT = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
STEPS = re.findall(r"^([A-Z]+) +(.+)$", TEXT, re.MULTILINE)
TOKEN = "0123456789abcdef"


def of_stage(name: str) -> list[tuple[str, str]]:
    """The steps of a stage and of the one that it begins with, in their order."""
    stages: dict[str, list[tuple[str, str]]] = {}
    for word, rest in STEPS:
        if word == "FROM":
            before, _, own = rest.split()
            stages[own] = [*stages.get(before, [])]
            last = stages[own]
        else:
            last.append((word, rest))
    return stages[name]


def sent(path: str) -> bool:
    """Whether .dockerignore lets a file of the folder into the build."""
    found = True
    for line in (ROOT / ".dockerignore").read_text().split():
        pattern = line.removeprefix("!").removeprefix("**/")
        parts = [path, *map(str, Path(path).parents)]
        names = parts if "**/" not in line else [*Path(path).parts]
        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
            found = line.startswith("!")
    return found


@pytest.fixture(scope="module")
def image(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of what the last stage copies, with a tiny bundle."""
    root = tmp_path_factory.mktemp("image")
    work = Path()
    for word, rest in of_stage("cpu"):
        if word == "WORKDIR":
            work = root / rest.lstrip("/")
            work.mkdir(parents=True)
        if word == "COPY":
            *sources, target = rest.split()
            place = root / target.lstrip("/") if target.startswith("/") else work / target
            for source in sources:
                own = tiny_bundle if source == "${BUNDLE}" else ROOT / source
                if own.is_dir():
                    shutil.copytree(own, place, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    into = place / own.name if target == "./" else place
                    into.parent.mkdir(exist_ok=True)
                    shutil.copy(own, into)
    return root


@pytest.mark.parametrize("stage", ["cpu", "cuda"])
def test_what_a_stage_copies_is_sent_to_the_build(stage: str) -> None:
    sources = [s for word, rest in of_stage(stage) if word == "COPY" for s in rest.split()[:-1]]
    bundle = dict(re.findall(r"^ARG (\w+)=(.+)$", TEXT, re.MULTILINE))["BUNDLE"]
    for source in sources:
        path = source.replace("${BUNDLE}", bundle)
        assert sent(path) and (path == bundle or (ROOT / path).exists())
    assert sent("build/mnist/manifest.json") and sent("serving/web/page.js")
    for path in (".git/config", "data/x", ".venv/x", "runtime/__pycache__/x.pyc", "tests/tiny.py"):
        assert not sent(path)


def test_what_is_copied_installs_with_the_page(image: Path, tmp_path: Path) -> None:
    work = image / "srv/r2-edge"
    (install,) = (rest for word, rest in of_stage("cpu") if "pip install" in rest)
    assert install == "pip install --constraint locks/full.txt '.[cpu,serve]'"
    line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    line += ["--no-build-isolation", "--target", str(tmp_path / "site"), "."]
    copy = shutil.copytree(work, tmp_path / "source")  # in which setuptools builds
    done = subprocess.run(line, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder in ("runtime", "serving"):
        files = {path.relative_to(work) for path in (work / folder).rglob("*") if path.is_file()}
        assert all((tmp_path / "site" / path).exists() for path in files)


def test_the_server_starts_and_is_found_well(image: Path, tmp_path: Path) -> None:
    steps = dict(of_stage("cpu"))
    token = tmp_path / "token"
    token.write_text(TOKEN)
    line = json.loads(steps["ENTRYPOINT"]) + json.loads(steps["CMD"])
    swapped = {"python": sys.executable, "/run/secrets/token": str(token)}
    swapped |= {"mnist=/bundle": f"mnist={image / 'bundle'}", "0.0.0.0": "127.0.0.1"}
    line = [swapped.get(word, word) for word in line] + ["--port", "0", "--threads", "1"]
    check = json.loads(steps["HEALTHCHECK"].partition("CMD ")[2])
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    work = image / "srv/r2-edge"
    with subprocess.Popen(
        line, cwd=work, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            said = process.stdout.readline()
            assert said.startswith("serving mnist at http://"), process.stderr.read()
            port = said.strip().rpartition(":")[2]
            probe = [sys.executable, "-c", check[2].replace("8000", port)]
            assert subprocess.run(probe, capture_output=True).returncode == 0
            process.terminate()
            assert process.wait(timeout=60) == 0
            assert subprocess.run(probe, capture_output=True).returncode != 0
        finally:
            process.kill()
