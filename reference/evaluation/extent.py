"""How much an evaluation measures: all of it, or what a few minutes allow."""

from collections.abc import Sequence
from dataclasses import dataclass

from reference.evaluation.digits import Size

SQUARE: Size = (10, 10)  # latents that are decoded to other aspects


@dataclass(frozen=True)
class Extent:
    """Counts, and latent sizes in the order of the report."""

    images: int  # of the test set
    digits: int  # per row
    sizes: Sequence[Size]
    unguided: Sequence[Size]  # judged at guidance 1 as well
    decoded: Sequence[Size]  # images that `SQUARE` latents are decoded to
    reconstructed: Sequence[Size]
    scraped: Sequence[Size]  # eps over t
    scaled: tuple[Size, int]  # scale consistency: of this many latents of a size
    factors: Sequence[int]
    stopped: tuple[Sequence[Size], int]  # x0 on the way: digits per size
    alike: Sequence[Size]  # the first is what the others are compared with
    alike_digits: int
    sheets: Sequence[Size]


SIZES = (
    *((4, 4), (6, 6), (8, 8), (10, 10), (12, 12), (16, 16), (24, 24), (32, 32)),
    *((6, 9), (9, 6), (4, 10), (10, 4), (9, 16), (16, 9)),
)
FULL = Extent(
    images=10_000,
    digits=1000,
    sizes=SIZES,
    unguided=((8, 8),),
    decoded=((27, 18), (18, 32), (40, 24)),
    reconstructed=((4, 4), (6, 6), (8, 8), (12, 12), (16, 16), (6, 9), (16, 9)),
    scraped=((4, 4), (8, 8)),
    scaled=((8, 8), 5),
    factors=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32),
    stopped=(((8, 8), (16, 16)), 200),
    alike=((8, 8), (6, 6), (12, 12), (16, 16), (9, 16)),
    alike_digits=100,
    sheets=SIZES,
)
QUICK = Extent(
    images=200,
    digits=100,
    sizes=((4, 4), (8, 8), (10, 10), (16, 16), (6, 9), (16, 9)),
    unguided=((8, 8),),
    decoded=((40, 24),),
    reconstructed=((4, 4), (8, 8)),
    scraped=((8, 8),),
    scaled=((8, 8), 2),
    factors=(1, 2, 4, 16),
    stopped=(((8, 8),), 50),
    alike=((8, 8), (12, 12)),
    alike_digits=20,
    sheets=((8, 8), (16, 9)),
)
