"""A stage's run: states and logs that are damaged are refused, in one line that names the file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reference import checkpoint
from reference.data import Images
from reference.families import FAMILIES, R2
from reference.optimizers import Optimizers
from reference.run import Run, Speed
from reference.train import build_models, read_config
from runtime.errors import ArtefactError
from tests.runtime.test_reading import damaged

STEPS = 2
MOMENT = "optimizer.0.0.exp_avg_sq"
Tensors = dict[str, Tensor]


class Stopped:
    """A run of two steps of R2ID under both optimizers, as a new process finds it."""

    def __init__(self, out: Path):
        config: dict[str, Any] = read_config("tiny")
        config["r2id"] |= {"steps": STEPS, "optimizer": "muon"}
        pixels = torch.randint(0, 255, (8, 1, 16, 16), dtype=torch.uint8)
        images = Images(pixels, torch.arange(8), tuple(map(str, range(10))), pad=True)
        speed = Speed(torch.device("cpu"), compile=False, bf16=False, save_every=1)
        stages, models = FAMILIES[R2].training.STAGES, build_models(config, "tiny")
        self.run = Run(stages, config, images, out, speed)
        self.task = stages[-1].task(config["r2id"], models, images)
        self.run.train(self.task)
        self.state, self.log = self.run.state_path, self.run.log_path
        self.files = {path: path.read_bytes() for path in (self.state, self.log)}

    def resume(self) -> int:
        """Read the state, and take a step with what is in it; the steps before it."""
        run, model = self.run, self.task.model
        average = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = Optimizers(self.task, run.config)
        step, _, _ = run._resume(model, average, optimizer)
        inputs = self.task.inputs(run._batch(step))
        run._step(model, self.task.loss, inputs, optimizer, step)
        return step


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    return Stopped(tmp_path_factory.mktemp("run"))


@pytest.fixture
def stopped(made: Stopped) -> Stopped:
    """The run with its files as they were written."""
    for path, data in made.files.items():
        path.write_bytes(data)
    return made


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, m: t.pop(MOMENT), "0.0.exp_avg_sq are not there in the shapes"),
        (lambda t, m: t.update({MOMENT: t[MOMENT][..., :1].clone()}), "in the shapes"),
        (lambda t, m: t[MOMENT].fill_(torch.nan), "are not finite"),
        (lambda t, m: t.update({MOMENT: t[MOMENT].int()}), "are not finite"),
        (lambda t, m: t.update({"optimizer.9.0.step": torch.ones(())}), "of no parameter"),
        (lambda t, m: t.update({"average.x": torch.ones(1)}), "unexpected x"),
        (lambda t, m: [v.fill_(torch.inf) for k, v in t.items() if "average" in k], "infinity"),
        (lambda t, m: m.update(step="3"), "step 3 after"),
        (lambda t, m: m.update(seconds="nan"), "step 2 after nan"),
        (lambda t, m: m.pop("step"), "KeyError"),
    ],
)
def test_a_state_that_is_not_of_its_run_is_refused(
    change: Callable[[Tensors, dict[str, str]], object], words: str, stopped: Stopped
) -> None:
    assert stopped.resume() == STEPS
    tensors = load_file(stopped.state)
    metadata = checkpoint.read_metadata(stopped.files[stopped.state], stopped.state)
    change(tensors, metadata)
    save_file(tensors, stopped.state, metadata)
    with pytest.raises(ArtefactError, match=words) as caught:
        stopped.resume()
    assert str(caught.value).startswith(f"{stopped.state}: ")


@pytest.mark.parametrize("text", ["", "step,loss\n1,2\n", "step,loss\n1,2\n3,4\n", "a\n\0", None])
def test_a_log_that_is_not_of_its_state_is_refused(text: str | None, stopped: Stopped) -> None:
    stopped.log.unlink()
    if text is not None:
        stopped.log.write_text(text)
    with pytest.raises(ArtefactError, match=r"r2id\.csv: .*r2id\.state\.safetensors to start anew"):
        stopped.resume()


@pytest.mark.parametrize("kind", ["state", "log"])
def test_random_damage_ends_in_an_error_of_ours_or_none(kind: str, stopped: Stopped) -> None:
    path = getattr(stopped, kind)
    whole, refused = stopped.files[path], 0
    head = 8 + int.from_bytes(whole[:8], "little") if kind == "state" else len(whole)
    for turn in range(150):
        path.write_bytes(damaged(whole[:head], turn) + whole[head:])
        try:
            stopped.resume()
        except ArtefactError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert refused > 50
