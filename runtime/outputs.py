"""The files that images go into: one sheet, or a name of its own for each."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

from runtime import cli
from runtime.bundle.files import check_writable
from runtime.bundle.interface import size_name
from runtime.errors import UsageError

if TYPE_CHECKING:
    from runtime.sampling.labels import Label

FIELDS = ("index", "label", "seed", "latent", "image")  # of a name


def output_paths(
    out: Path, wanted: dict[str, Any], each: "list[Label]", names: Sequence[str]
) -> list[Path]:
    """One file for a sheet, or one per image where the name says `{index}` or `{label}`; checked.

    Raises UsageError for a field that is none of FIELDS, or a name that two images would have.
    """
    try:
        fields = {field for _, field, _, _ in Formatter().parse(out.name) if field is not None}
        if unknown := sorted(fields - {*FIELDS}):
            meant = difflib.get_close_matches(unknown[0], FIELDS, 1)
            nearest = f"; the nearest is {{{meant[0]}}}" if meant else ""
            raise UsageError(
                f"--out {out}: no field {{{unknown[0]}}}{nearest}. Expected some of "
                f"{', '.join(f'{{{field}}}' for field in FIELDS)}"
            )
        sizes = {name: size_name(wanted[name]) for name in ("latent", "image")}
        shared = {"seed": wanted["seed"], **sizes}
        singles = fields & {"index", "label"}
        indices = range(wanted["first_index"], wanted["first_index"] + len(each))
        paths = [
            out.with_name(out.name.format(index=index, label=label_in_name(label, names), **shared))
            for index, label in [*zip(indices, each, strict=True)][: None if singles else 1]
        ]
    except (ValueError, KeyError, IndexError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"--out {out}: cannot be filled in ({error}); expected a name as in "
            "'digit-{index:03}.png'"
        ) from None
    if len(set(paths)) < len(paths):
        raise UsageError(f"--out {out}: images would overwrite each other; add {{index}} to it")
    for path in paths:
        check_writable(cli.picture_name(path))
    return paths


def label_in_name(label: "Label", names: Sequence[str]) -> str:
    """A label by numbers as part of a file's name: `7`, `7-red`, `3+8`, `none`."""
    if label is None:
        return "none"
    terms = [*label] if isinstance(label, Mapping) else [label]
    each = [term if isinstance(term, tuple) else (term,) for term in terms]
    text = "+".join("-".join(names[int(number)] for number in term) for term in each)
    return re.sub(r"[^\w+. -]", "_", text)
