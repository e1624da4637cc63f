"""How much an evaluation measures: all of it, or what a few minutes allow."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from reference.evaluation.digits import Size
from runtime.bundle.interface import Interface

LATENT_SIDE = 8  # of the default latent that sizes are chosen around
SQUARE: Size = (10, 10)  # latents that are decoded to other aspects


@dataclass(frozen=True)
class Extent:
    """Counts, and latent sizes in the order of the report.

    Sizes are those of a model whose default latent has `LATENT_SIDE` cells a side.
    """

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
    continued: tuple[Size, Size]  # steps at the first, then at the second
    sheets: Sequence[Size]
    seeds: Sequence[Size] = ((4, 4), (6, 6), (8, 8), (12, 12), (16, 16))  # of one seed's sheet

    def in_pixels(self, interface: Interface) -> "Extent":
        """The same for a model that diffuses pixels: sizes around its own, the nearest legal ones.

        What needs an image of another size than the latent is left out.
        """
        times, sides = min(interface.default_latent) / LATENT_SIDE, interface.latent_sides

        def own(size: Size) -> Size:
            return sides.nearest(round(size[0] * times)), sides.nearest(round(size[1] * times))

        def each(sizes: Sequence[Size]) -> tuple[Size, ...]:
            return tuple(dict.fromkeys(map(own, sizes)))

        return replace(
            self,
            sizes=each(self.sizes),
            unguided=each(self.unguided),
            decoded=(),
            reconstructed=(),
            scraped=each(self.scraped),
            stopped=(each(self.stopped[0]), self.stopped[1]),
            alike=each(self.alike),
            continued=(own(self.continued[0]), own(self.continued[1])),
            sheets=each(self.sheets),
            seeds=each(self.seeds),
        )


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
    continued=((8, 8), (16, 16)),
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
    continued=((8, 8), (16, 16)),
    sheets=((8, 8), (16, 9)),
)
