"""What `make` installs: an exact version for every package that pyproject.toml asks for."""

import re
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MADE = (ROOT / "Makefile").read_text()
EXTRAS = dict(re.findall(r"^EXTRAS_(\w+) := (.+)$", MADE, re.MULTILINE))
PACKAGES = dict(re.findall(r"^PACKAGES_(\w+) := (.+)$", MADE, re.MULTILINE))  # that are no extra's


def locked(name: str) -> dict[str, str]:
    """Version by package of one lock; it names no file, address or local build."""
    lines = (ROOT / "locks" / f"{name}.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    assert all(len(pair) == 2 and not set("+@/: ") & set("".join(pair)) for pair in pairs)
    return {canonicalize_name(package): version for package, version in pairs}


@pytest.mark.parametrize("name", EXTRAS)
def test_a_lock_names_every_package_asked_for_and_those_that_install(name: str) -> None:
    versions = locked(name)
    extras = (PROJECT["optional-dependencies"][extra] for extra in EXTRAS[name].split(","))
    for line in chain(("pip", "setuptools>=77", "wheel"), PROJECT["dependencies"], *extras):
        wanted = Requirement(line)
        assert wanted.specifier.contains(versions[canonicalize_name(wanted.name)]), line


@pytest.mark.parametrize("name", PACKAGES)
def test_a_lock_without_extras_names_its_packages(name: str) -> None:
    assert {*PACKAGES[name].split(), "pip", "setuptools", "wheel"} <= locked(name).keys()


def test_make_has_a_lock_for_each_environment() -> None:
    assert EXTRAS.keys() | PACKAGES.keys() == {path.stem for path in (ROOT / "locks").iterdir()}


def test_the_stages_of_one_environment_agree() -> None:
    assert locked("draw").items() <= locked("full").items()
