"""A small classifier of digits: it reads whether a generated one is what was asked for."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn

from reference.checkpoint import read_metadata
from reference.data import Images, fit
from reference.evaluation.colours import in_grey
from runtime.bundle.files import atomic_write, sha256
from runtime.progress import Bar

IMAGE_SIDE = 32  # of the digits that it reads
STEPS = 1500
AT_ONCE = 500  # images that are read at once
SEED = 1234


class Classifier(nn.Module):
    """Reads a 32 × 32 digit in [-1, 1]: three convolutions, one hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for into, out in ((1, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(into, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
        head = [nn.Flatten(), nn.Linear(64 * 16, 128), nn.ReLU(), nn.Linear(128, 10)]
        self.layers = nn.Sequential(*layers, *head)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 1, 32, 32]` -> logits `[B, 10]`."""
        logits: Tensor = self.layers(x)
        return logits


def trained_classifier(train: Images, cache: Path) -> Classifier:
    """The classifier, from `cache` where this code and data have made it before."""
    if cache.exists():
        data = cache.read_bytes()
        if read_metadata(data, cache).get("fingerprint") == fingerprint(train):
            model = Classifier()
            model.load_state_dict(load(data))
            return model.eval()
    model = fitted(train)
    store(model, train, cache)
    return model


def fitted(train: Images, steps: int = STEPS) -> Classifier:
    """A classifier trained for `steps` batches of 128 digits."""
    torch.manual_seed(SEED)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in Bar(range(steps), desc="classifier", unit="step"):
        chosen = torch.randint(len(train), (128,))
        loss = F.cross_entropy(model(augmented(train.pixels[chosen])), train.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return model.eval()


def fingerprint(train: Images) -> str:
    """What weights say that this code made of as many images."""
    return sha256(f"{Classifier()} {STEPS} {len(train)}".encode())


def store(model: Classifier, train: Images, path: Path) -> None:
    """Write the weights; raises ResourceError."""
    with atomic_write(path) as file:
        file.write(save(model.state_dict(), {"fingerprint": fingerprint(train)}))


def augmented(pixels: Tensor) -> Tensor:
    """uint8 digits slightly shifted, scaled and turned: `[B, 1, 32, 32]` in [-1, 1]."""
    x = fit(pixels, IMAGE_SIDE, IMAGE_SIDE, pad=True)
    theta = torch.eye(2, 3).repeat(len(x), 1, 1) + 0.1 * torch.randn(len(x), 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1  # what comes in is ground


def middle(images: Tensor) -> Tensor:
    """The middle square of `[B, c, h, w]`, whose side is the shorter one."""
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]


def framed(images: Tensor, side: int = IMAGE_SIDE) -> Tensor:
    """The middle of images `[B, 1, h, w]` at `side` × `side`, ground around it to `IMAGE_SIDE`.

    A pixel is the mean of what it covers of a larger image. `side` is smaller where a model has
    learnt digits without all of their margin.
    """
    square = middle(images)
    smaller = square.shape[-1] > side
    square = F.interpolate(square, (side, side), mode="area" if smaller else "bilinear")
    before, after = (IMAGE_SIDE - side) // 2, (IMAGE_SIDE - side + 1) // 2
    return F.pad(square, (before, after, before, after), value=-1.0)


def features(classifier: Classifier, images: Tensor, side: int = IMAGE_SIDE) -> Tensor:
    """The hidden layer `[B, 128]` at the `framed` middle of each image `[B, 1 or 3, h, w]`."""
    grey = in_grey(images) if images.shape[1] == 3 else images
    square = framed(grey, side)
    return torch.cat([classifier.layers[:-1](part) for part in square.split(AT_ONCE)])


def logits_of(classifier: Classifier, found: Tensor) -> Tensor:
    """Logits `[B, 10]` of `features`."""
    logits: Tensor = classifier.layers[-1](found)
    return logits


def read(classifier: Classifier, images: Tensor, side: int = IMAGE_SIDE) -> Tensor:
    """The label that the classifier reads in the middle of each image."""
    return logits_of(classifier, features(classifier, images, side)).argmax(1)


def accuracy(classifier: Classifier, test: Images) -> float:
    """Share of the test images that the classifier reads right."""
    square = fit(test.pixels, test.side, test.side, test.pad)
    return (read(classifier, square, test.side) == test.labels).float().mean().item()
