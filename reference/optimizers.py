"""Optimizers over a task's parameters, their state as plain tensors."""

from typing import Any

import torch
from torch import Tensor

from reference.families.parts.training import Task

KINDS = ("adamw", "muon")
BETAS = (0.9, 0.99)  # of AdamW, where a family's stages do not name them
# What is kept of each parameter.
KEPT: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.Muon: ("momentum_buffer",),
}


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
        """Take over what `state` gave; raises ValueError where it is not of these parameters."""
        left = dict(state)
        for number, part in enumerate(self.parts):
            packed, kept = part.state_dict(), KEPT[type(part)]
            parameters = [own for group in part.param_groups for own in group["params"]]
            for index, parameter in enumerate(parameters):
                names = [f"{number}.{index}.{key}" for key in kept]
                found = [left.pop(name) for name in names if name in left]
                if not found:  # it had no gradient yet
                    continue
                shapes = [torch.Size() if key == "step" else parameter.shape for key in kept]
                if [own.shape for own in found] != shapes:
                    raise ValueError(f"{', '.join(names)} are not there in the shapes {shapes}")
                if not all(own.is_floating_point() and own.isfinite().all() for own in found):
                    raise ValueError(f"{', '.join(names)} are not finite numbers")
                packed["state"][index] = {
                    key: own.cpu() if key == "step" else own
                    for key, own in zip(kept, found, strict=True)
                }
            part.load_state_dict(packed)
        if left:
            raise ValueError(f"{', '.join([*left][:8])} are of no parameter")
