"""Optimizers over a model's parameters, their state as plain tensors."""

import re
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("adamw", "muon")
IN_BLOCK = re.compile(r"(encoder|decoder)\.\d+\.(attention|cross|ffn)\.")


class Optimizers:
    """AdamW, or Muon for the matrices inside the blocks and AdamW for the rest, as one.

    Muon's updates are scaled to the size of AdamW's, so that both take one learning rate.
    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks"; Liu et al.,
    "Muon is Scalable for LLM Training", eq. 4.
    """

    def __init__(self, model: nn.Module, config: dict[str, Any]):
        named, decay = dict(model.named_parameters()), config["weight_decay"]
        matrices = {
            name: p
            for name, p in named.items()
            if config["optimizer"] == "muon" and p.ndim == 2 and IN_BLOCK.search(name)
        }
        others = [p for name, p in named.items() if name not in matrices]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=decay, fused=True)
        ]
        if matrices:
            scale = "match_rms_adamw"
            muon = torch.optim.Muon(matrices.values(), weight_decay=decay, adjust_lr_fn=scale)
            self.parts.append(muon)

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self, rate: float) -> None:
        """One update with the learning rate `rate`."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
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
