"""The digits that are asked for, and real ones as training showed them: grey, or painted.

Labels are int64: `[N]` of grey digits; `[N, 3]` of painted ones, digit, hue and ground, each a
number among the names of the data set.
"""

import torch
from torch import Tensor

from reference.classifier import SEED
from reference.data import HUES, Images, fit, paint

DIGITS = 10
Size = tuple[int, int]


def asked(count: int, parts: tuple[int, ...]) -> Tensor:
    """Labels of digits 0 to 9 in turn; of painted ones every pair of hues comes in its turn."""
    number = torch.arange(count)
    if len(parts) == 1:
        return number % DIGITS
    return torch.cat([number.unsqueeze(1) % DIGITS, hues_in_turn(count) + first_hues(parts)], 1)


def hues_in_turn(count: int) -> Tensor:
    """Numbers of a stroke's and its ground's hue `[count, 2]`, never the same two."""
    turn = torch.arange(count)
    stroke = turn % len(HUES)
    ground = (stroke + 1 + turn // len(HUES) % (len(HUES) - 1)) % len(HUES)
    return torch.stack([stroke, ground], 1)


def first_hues(parts: tuple[int, ...]) -> Tensor:
    """The labels of the first hue of strokes and of grounds, `[2]`."""
    return torch.tensor([parts[0], parts[0] + parts[1]])


def digit_of(labels: Tensor) -> Tensor:
    """The digits `[N]` among labels."""
    return labels if labels.dim() == 1 else labels[:, 0]


def conditions(labels: Tensor, count: int) -> Tensor:
    """Labels -> `[N, count]` float32, 1 at each of a row's labels."""
    return torch.zeros(len(labels), count).scatter_(1, labels.view(len(labels), -1), 1.0)


def balanced_indices(images: Images) -> Tensor:
    """Indices of digits 0 to 9 in turn, chosen by `SEED`: as many as can be had of each."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
    columns = [order[images.labels[order] == label] for label in range(DIGITS)]
    each = min(map(len, columns))
    return torch.stack([column[:each] for column in columns], 1).flatten()


def shown(images: Images, chosen: Tensor | slice, shape: Size) -> Tensor:
    """Real digits `[N, c, *shape]` in [-1, 1]; painted ones in `hues_in_turn`."""
    grey = fit(images.pixels[chosen], *shape, images.pad)
    return paint(grey, hues_in_turn(len(grey))) if images.painted else grey


def labels_of(images: Images, chosen: Tensor | slice) -> Tensor:
    """The labels of what `shown` shows."""
    own = images.labels[chosen]
    if not images.painted:
        return own
    return torch.cat([own.unsqueeze(1), hues_in_turn(len(own)) + first_hues(images.parts)], 1)
