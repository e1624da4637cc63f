"""Optimizers over a task's parameters, their state as plain tensors."""

from typing import Any

import torch
from torch import Tensor

from reference.families.parts.training import Task

KINDS = ("adamw", "muon")
BETAS = (0.9, 0.99)  # of AdamW, where a family's stages do not name them


class Optimizers:
    """AdamW, or Muon for the matrices inside the blocks and AdamW for the rest, as one.

    Muon's updates are scaled to the size of AdamW's, so that both take one learning rate.
    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks"; Liu et al.,
    "Muon is Scalable for LLM Training", eq. 4.
    """

    def __init__(self, task: Task, config: dict[str, Any]):
        named, decay = dict(task.model.named_parameters()), config["weight_decay"]
        matrices: list[dict[str, Any]] = []
        others: list[dict[str, Any]] = []
        for group in task.groups():
            muon = {
                name
                for name in group.names
                if config["optimizer"] == "muon"
                and named[name].ndim == 2
                and task.is_block_matrix(name)
            }
            own = {"weight_decay": decay if group.decayed else 0.0, "share": group.share}
            for listed, names in ((matrices, muon), (others, set(group.names) - muon)):
                if names:
                    chosen = [named[name] for name in group.names if name in names]
                    listed.append({"params": chosen, **own})
        betas = tuple(config.get("betas", BETAS))
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, betas=betas, fused=True)
        ]
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw"))

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self, rate: float) -> None:
        """One update with the learning rate `rate`."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate * group["share"]
            part.step()

    def state(self) -> dict[str, Tensor]:
        """Every tensor of the state by `part.parameter.name`."""
        return {
            f"{number}.{index}.{name}": value
            for number, part in enumerate(self.parts)
            for index, own in part.state_dict()["state"].items()
            for name, value in own.items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave."""
        packed = [part.state_dict() for part in self.parts]
        for name, value in state.items():
            number, index, key = name.split(".", 2)
            own = packed[int(number)]["state"].setdefault(int(index), {})
            own[key] = value.cpu() if key == "step" else value
        for part, whole in zip(self.parts, packed, strict=True):
            part.load_state_dict(whole)
