"""Several files of a bundle replaced as one: a reader finds all of the old or all of the new.

The manifest, renamed into its place, is the one switch. Files whose names are taken come in under
names with their hash, which the new manifest has; the old ones then give way to them, and a second
manifest has the usual names. Whatever is interrupted, the manifest that is there names whole files,
and the next writer brings the rest to its end.

A note is a file that no manifest names: how a precision's graphs were made. Its name has their hash
until the manifest that names them is there, so that it is never taken for one of other graphs.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from msgspec.structs import replace

from runtime.bundle.files import sha256
from runtime.bundle.folders import staging
from runtime.bundle.manifest import FILE_NAME, GraphSpec, Manifest, PlanSpec, read_manifest

HASHED = re.compile(r"(.+)\.([0-9a-f]{16})(\.[a-z]+)")


@contextlib.contextmanager
def editing(folder: Path) -> Iterator[tuple[Manifest, Path]]:
    """A bundle's manifest and a scratch folder in it, for its only writer; see `staging`."""
    with staging(folder) as scratch:
        settle(folder, scratch)
        yield read_manifest(folder), scratch


def commit(
    manifest: Manifest, folder: Path, scratch: Path, notes: Mapping[str, str] | None = None
) -> None:
    """Put what `manifest` names and `scratch` holds into `folder`, and the manifest with it.

    `scratch` is a folder on the same disk, `folder` in nobody else's hands; see `staging`.
    `notes`: files in `scratch` by the precision whose graphs they are of.
    """
    made = [spec for spec in _specs(manifest) if (scratch / spec.file).exists()]
    used = (folder / FILE_NAME).exists()
    taken = {spec.file for spec in made if used and (folder / spec.file).exists()}
    aside = {s.file: _aside(s.file, s.sha256) for s in made if s.file in taken}
    for spec in made:
        path = scratch / spec.file
        _flush(path)
        path.replace(folder / aside.get(spec.file, spec.file))
    for precision, name in (notes or {}).items():
        _flush(scratch / name)
        (scratch / name).replace(folder / _aside(name, _digest(manifest.variants[precision])))
    _renamed(manifest, aside).write(folder)
    settle(folder, scratch)


def settle(folder: Path, scratch: Path) -> None:
    """Give the files of a bundle their usual names, and remove those that it does not name."""
    if not (folder / FILE_NAME).exists():
        return
    manifest = read_manifest(folder)
    usual = {s.file: _usual(s.file) for s in _specs(manifest) if HASHED.fullmatch(s.file)}
    for file, name in usual.items():
        copy = scratch / name
        try:
            os.link(folder / file, copy)
        except OSError:  # a disk that has no links
            shutil.copyfile(folder / file, copy)
            _flush(copy)
        copy.replace(folder / name)
    if usual:
        _renamed(manifest, usual).write(folder)
    named = {usual.get(spec.file, spec.file) for spec in _specs(manifest)}
    made = {_digest(own)[:16] for own in manifest.variants.values()}
    for path in [*folder.iterdir()]:
        if (hashed := HASHED.fullmatch(path.name)) and path.name not in named:
            if hashed[2] in made:
                path.replace(folder / _usual(path.name))
            else:
                path.unlink()


def note(manifest: Manifest, name: str, precision: str) -> Path:
    """Where the note of a precision's graphs is, which a writer that was killed has not renamed."""
    own = manifest.variants.get(precision, {})
    aside = manifest.folder / _aside(name, _digest(own))
    return aside if aside.exists() else manifest.folder / name


def _specs(manifest: Manifest) -> list[GraphSpec | PlanSpec]:
    return [*(spec for _, spec in manifest.forms()), *manifest.plans.values()]


def _digest(own: Mapping[str, GraphSpec]) -> str:
    """A hash of graphs, whatever names their files have."""
    return sha256(json.dumps({name: own[name].sha256 for name in sorted(own)}).encode())


def _aside(file: str, digest: str) -> str:
    path = Path(file)
    return f"{path.stem}.{digest[:16]}{path.suffix}"


def _usual(file: str) -> str:
    return HASHED.sub(r"\1\3", file)


def _renamed(manifest: Manifest, names: Mapping[str, str]) -> Manifest:
    """The manifest with other names of files; plans stay under the names that users know."""

    def graphs(own: Mapping[str, GraphSpec]) -> dict[str, GraphSpec]:
        return {k: replace(spec, file=names.get(spec.file, spec.file)) for k, spec in own.items()}

    return replace(
        manifest,
        graphs=graphs(manifest.graphs),
        for_cpu=graphs(manifest.for_cpu),
        variants={precision: graphs(own) for precision, own in manifest.variants.items()},
        plans={k: replace(p, file=names.get(p.file, p.file)) for k, p in manifest.plans.items()},
    )


def _flush(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
