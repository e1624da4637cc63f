"""Judging: digits that are known, drawn or painted, get the figures that they deserve."""

import pytest
import torch
import torch.nn.functional as F

from reference.classifier import Classifier, features, middle
from reference.data import HUES, Images, load_mnist, load_painted_mnist
from reference.evaluation.colours import hues_right, in_grey, nearest_hue, stroke_and_ground
from reference.evaluation.digits import asked, balanced_indices, conditions, hues_in_turn, shown
from reference.evaluation.judging import Judge, balanced, trained_on
from reference.evaluation.measures import precision_and_recall
from tests.reference.test_data import MNIST

needs_mnist = pytest.mark.skipif(
    not MNIST.exists(), reason=f"no MNIST at {MNIST}; set MNIST to its folder"
)
PAINTED = (10, len(HUES), len(HUES))


@pytest.fixture(scope="module")
def digits() -> Images:
    """The test set."""
    return load_mnist(MNIST, "t10k")


def test_the_middle_is_the_shorter_side() -> None:
    wide = torch.arange(20.0).reshape(1, 1, 2, 10)
    assert middle(wide).tolist() == [[[[4, 5], [14, 15]]]]
    assert torch.equal(middle(wide.transpose(2, 3)), middle(wide).transpose(2, 3))


def test_training_sizes_are_read_of_a_range_and_of_stages() -> None:
    def found(latent: object, size: tuple[int, int]) -> bool | None:
        return trained_on(size, {"config": {"r2id": {"latent": latent, "aspect": 2.0}}})

    for latent in ([4, 16], [[1.0, 4, 16]], [[0.7, 4, 8], [1.0, 6, 16]]):
        assert found(latent, (4, 4)) and found(latent, (8, 16)) and found(latent, (16, 9))
        assert not found(latent, (3, 4)) and not found(latent, (24, 24))
        assert found(latent, (10, 4)) is False  # longer than the aspect allows
    assert not found([[0.7, 4, 8], [1.0, 6, 16]], (5, 10))  # in no stage as a whole
    assert trained_on((8, 8), {"labels": ["0"]}) is None


def test_painted_digits_are_asked_for_in_every_pair_of_hues() -> None:
    pairs = hues_in_turn(72)
    assert len(pairs.unique(dim=0)) == 72 and not (pairs[:, 0] == pairs[:, 1]).any()
    vectors = conditions(asked(90, PAINTED), sum(PAINTED))
    assert torch.equal(vectors.sum(1), torch.full((90,), 3.0))
    assert torch.equal(vectors[:, :10].argmax(1), torch.arange(90) % 10)
    assert torch.equal(vectors[:, 10:19].argmax(1), hues_in_turn(90)[:, 0])
    assert torch.equal(conditions(asked(20, (10,)), 10), torch.eye(10).repeat(2, 1))


def test_flat_colours_are_found_and_named() -> None:
    palette = torch.tensor([*HUES.values()]) / 127.5 - 1
    assert nearest_hue(palette + 0.05).tolist() == [*range(len(HUES))]
    image = palette[7].view(1, 3, 1, 1).repeat(1, 1, 9, 6)
    image[..., 3:6, 2:4] = palette[0].view(3, 1, 1)
    stroke, ground = stroke_and_ground(image)
    assert torch.allclose(stroke[0], palette[0]) and torch.allclose(ground[0], palette[7])
    assert hues_right(image, torch.tensor([[0, 7]])) == 1
    assert hues_right(image, torch.tensor([[7, 0]])) == 0
    grey = in_grey(image)
    assert grey[0, 0, 4, 2] == pytest.approx(1) and grey[0, 0, 0, 0] == pytest.approx(-1)


@needs_mnist
def test_painted_real_digits_have_their_hues_and_their_shapes(digits: Images) -> None:
    painted, chosen = load_painted_mnist(MNIST, "t10k"), balanced_indices(digits)[:360]
    images = shown(painted, chosen, (32, 32))
    assert hues_right(images, hues_in_turn(360)) > 0.98
    assert hues_right(images, hues_in_turn(360).flip(1)) == 0
    # Almost the grey digit: the stroke's mean colour is a little paler than its brightest pixel.
    error = (in_grey(images) - shown(digits, chosen, (32, 32))).abs().mean()
    assert error < 0.03


@needs_mnist
def test_a_collapsed_set_of_real_digits_is_precise_and_recalls_little(digits: Images) -> None:
    """In the features of any network: here of one that was not trained."""
    torch.manual_seed(0)
    classifier = Classifier().eval()
    chosen = balanced_indices(digits)
    real, other = (
        features(classifier, shown(digits, part, (32, 32))).detach()
        for part in (chosen[:500], chosen[500:1000])
    )
    precision, recall = precision_and_recall(real, other)
    assert precision > 0.8 and recall > 0.8
    collapsed = other[:10].repeat(50, 1) + 1e-3 * torch.randn(500, other.shape[1])
    precision, recall = precision_and_recall(real, collapsed)
    assert precision > 0.6 and recall < 0.05


@needs_mnist
def test_a_judge_knows_real_digits_from_noise(digits: Images, classifier: Classifier) -> None:
    judge = Judge.of(classifier, digits)
    images, labels = balanced(digits, 200)
    assert torch.equal(labels, torch.arange(200) % 10)
    real = judge(images, labels)
    assert real["read_right"] > 0.9 and real["precision"] == 1 and real["recall"] == 1
    assert judge(images, labels.flip(0))["read_right"] < 0.1
    noise = judge(torch.randn(200, 1, 32, 32).clamp(-1, 1), labels)
    assert noise["frechet"] > 10 * real["frechet"] and noise["recall"] < 0.05
    cropped = Judge.of(classifier, digits.cropped(28))  # to it a digit's margin is 2 pixels less
    assert torch.equal(cropped.real, judge.real) and cropped.side == 28
    inner = balanced(digits.cropped(28), 200)[0]
    assert cropped(inner, labels) == real
    large = F.interpolate(inner, (112, 112), mode="nearest")
    assert cropped(large, labels)["read_right"] == real["read_right"]
    assert cropped(large, labels)["frechet"] < judge(large, labels)["frechet"]
    painted = load_painted_mnist(MNIST, "t10k")
    in_hues = Judge.of(classifier, painted)(*balanced(painted, 200))
    assert in_hues["hues_right"] > 0.97 and in_hues["read_right"] > 0.9
