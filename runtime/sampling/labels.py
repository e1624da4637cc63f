"""Labels by name or number, several parts in one condition, and mixtures of conditions.

`7:red` is one condition of two parts: one vector with a 1 at each. `3+8` is a mixture: two
conditions, each of which guides with its weight.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from numbers import Integral, Real
from typing import Any

from runtime.errors import UsageError

# A label by number or name, or a tuple of several, each of a part of its own.
Term = int | str | tuple[int | str, ...]
# One image's condition: a term, several with weights, or None for no condition.
Label = Term | Mapping[Term, float] | None
Combination = tuple[int, ...]  # the numbers of the labels of one condition
LISTED = 40  # names in one error
LARGEST_WEIGHT = 100.0
TERM = re.compile(r"(.+)\*(\d*\.?\d+)")


class Labels:
    """The labels of an interface, as users name them; every method raises UsageError."""

    def __init__(self, names: Sequence[str], parts: Sequence[int] = ()):
        """See `Interface` for `parts`."""
        self.names = names
        self.numbers = {name: number for number, name in reversed([*enumerate(self.names)])}
        self.ends = [*accumulate(parts or [len(names)] * bool(names))]

    def turn(self, number: int) -> Term | None:
        """The `number`-th condition of a series that goes through all labels; None without any.

        It has a label of every part. Each part begins one label later than the one before, so that
        where two have the same labels (a stroke's colour and its ground's) they are never the same.
        """
        spans = zip([0, *self.ends], self.ends, strict=False)
        each = [first + (number + part) % (end - first) for part, (first, end) in enumerate(spans)]
        return tuple(each) if len(each) > 1 else next(iter(each), None)

    def listed(self, text: str) -> list[Label]:
        """One label per image: `7`, `cat,dog`, `0-9`, `none`, and all that `read` takes."""
        if text.strip() in self.numbers:
            return [self.number(text.strip())]
        found: list[Label] = []
        for part in map(str.strip, text.split(",")):
            if (ends := self._range(part)) is None:
                found.append(self.plain(part))
                continue
            first, last = map(self.number, ends)
            if first > last:
                raise UsageError(
                    f"label {part!r} is no list of labels; expected one as in 7, cat,dog or 0-9, "
                    "the first one first"
                )
            found += range(first, last + 1)
        return found

    def _range(self, part: str) -> tuple[str, str] | None:
        """The ends of `first-last`: none in a name, which may have a hyphen, or in a mixture."""
        if part in self.numbers or any(sign in part for sign in "+*:"):
            return None
        places = [place for place, letter in enumerate(part) if letter == "-"]
        cuts = [(part[:place], part[place + 1 :]) for place in places]
        known = [cut for cut in cuts if all(map(self._known, cut))]
        numbers = [cut for cut in cuts if all(map(str.isdecimal, cut))]
        return next(iter(known or numbers), None)

    def read(self, label: Any) -> dict[Combination, float]:
        """The conditions of a label with their weights, none for None.

        A text is what stands between two commas on the command line: `7`, `red`, `7:red`,
        `3+8` or `3*0.7+8*0.3`.
        """
        if label is None:
            return {}
        weighted = label if isinstance(label, Mapping) else self._terms(label)
        found: dict[Combination, float] = {}
        for term, weight in weighted.items():
            if not isinstance(weight, Real) or not abs(float(weight)) <= LARGEST_WEIGHT:
                raise UsageError(
                    f"label {term!r} has the weight {weight!r}; expected a number from "
                    f"{-LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}"
                )
            own = self.combination(term)
            found[own] = found.get(own, 0.0) + float(weight)
        if found and not any(found.values()):
            raise UsageError(
                f"label {label!r} has no weight but 0; expected one that is not, or none for no "
                "condition"
            )
        return found

    def of_images(self, labels: Any) -> list[dict[Combination, float]]:
        """`read` of each image's label in a sequence."""
        if isinstance(labels, str) or not isinstance(labels, Sequence):
            raise UsageError(
                f"labels is {labels!r}; expected one label per image, as in [{labels!r}]"
            )
        if not labels:
            raise UsageError("no label is given; expected one per image, None for no condition")
        return [self.read(label) for label in labels]

    def plain(self, label: Any) -> Label:
        """A label by numbers alone: a number, a tuple of some, such with weights, or None."""
        found = self.read(label)
        each: dict[Term, float] = {}
        for own, weight in found.items():
            each[own[0] if len(own) == 1 else own] = weight
        if [*each.values()] == [1.0]:
            return next(iter(each))
        return each or None

    def _terms(self, label: Any) -> Mapping[Any, float]:
        """What a label that is no mapping is made of."""
        if not isinstance(label, str) or label in self.numbers:
            return {label: 1.0} if isinstance(label, str | tuple | Integral) else self._wrong(label)
        if label == "none":
            return {}
        terms = [term.strip() for term in label.split("+")]
        parted = [None if term in self.numbers else TERM.fullmatch(term) for term in terms]
        found: dict[str, float] = {}
        for term, match in zip(terms, parted, strict=True):
            name, weight = (match[1], float(match[2])) if match else (term, 1 / len(terms))
            found[name] = found.get(name, 0.0) + weight
        return found

    def combination(self, term: Any) -> Combination:
        """The numbers of a term's labels, which are of a part each, in the order of the parts."""
        if isinstance(term, str) and term not in self.numbers:
            term = tuple(term.split(":"))
        each = sorted(self.number(one) for one in (term if isinstance(term, tuple) else (term,)))
        if not each:
            raise UsageError("label () has no part; expected one at least, or None")
        parts = [self._part(number) for number in each]
        for place in range(1, len(each)):
            if parts[place] == parts[place - 1]:
                one, other = (self.names[number] for number in each[place - 1 : place + 1])
                raise UsageError(
                    f"labels {one} and {other} are of the same part of a condition; expected one "
                    f"of each. A mixture of both is {one}+{other}"
                )
        return tuple(each)

    def _part(self, number: int) -> int:
        return sum(number >= end for end in self.ends[:-1])

    def _known(self, text: str) -> bool:
        in_range = text.isdecimal() and len(text) < 10 and int(text) < len(self.names)
        return text in self.numbers or in_range

    def number(self, label: Any) -> int:
        """The number of one label, by name or number; a name that is a number wins."""
        if isinstance(label, str):
            label = label.strip()
            if label in self.numbers:
                return self.numbers[label]
            if self._known(label):
                return int(label)
        elif not isinstance(label, Integral) or isinstance(label, bool):
            self._wrong(label)
        elif 0 <= int(label) < len(self.names):
            return int(label)
        if not self.names:
            raise UsageError(f"label {label} is given; this bundle has none: leave labels None")
        if label == "":
            raise UsageError(
                "an empty label; expected one before and after each , + and : as in 7,8 or 3+8, or "
                "none for no condition"
            )
        term, times, weight = str(label).rpartition("*")
        if times:
            raise UsageError(
                f"label {term} has the weight {weight!r}; expected digits, with a point or without "
                "and no sign, as in 3*0.7+8*0.3"
            )
        numbered = str(label).lstrip("-").isdecimal()  # no number is near to another
        near = [] if numbered else difflib.get_close_matches(str(label), self.names, 1)
        meant = f"; the nearest is {near[0]}" if near else ""
        more = f" and {len(self.names) - LISTED} more" if len(self.names) > LISTED else ""
        raise UsageError(
            f"label {label} is not in this bundle{meant}. Expected one of "
            f"{', '.join(self.names[:LISTED])}{more}, or a number from 0 to {len(self.names) - 1}"
        )

    def _wrong(self, label: Any) -> Any:
        raise UsageError(
            f"label {label!r} is a {type(label).__name__}; expected a name, a number, a tuple of "
            "them, a mapping of these to weights, or None"
        )
