"""The head of LAION's aesthetic predictor, which ImageReward also uses: five linear layers and, as released, no
activation between them (christophschuhmann/improved-aesthetic-predictor, THUDM/ImageReward).

It is therefore one affine function, and a bound on its input is a bound on its output.
"""

from __future__ import annotations

import torch
from torch import nn

WIDTHS = (1024, 128, 64, 16, 1)
NAMES = ("0", "2", "4", "6", "7")
"""The layers have these names in the released files; the gaps are dropout layers of training."""


class LinearHead(nn.Module):
    """features [B, D] -> [B]. Its weights have the names of the released files."""

    def __init__(self, features: int) -> None:
        super().__init__()
        widths = zip((features, *WIDTHS), WIDTHS, strict=False)
        self.layers = nn.ModuleDict(
            {name: nn.Linear(inputs, outputs) for name, (inputs, outputs) in zip(NAMES, widths, strict=True)}
        )

    def forward(self, features_BD: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            features_BD = layer(features_BD)
        return features_BD[:, 0]

    def affine(self) -> tuple[torch.Tensor, float]:
        """The head as slope_D and offset, in float64: output = slope . features + offset."""
        state = {name: tensor.double() for name, tensor in self.state_dict().items()}
        slope, offset = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        for name in reversed(NAMES):
            offset = offset + slope @ state[f"layers.{name}.bias"]
            slope = slope @ state[f"layers.{name}.weight"]
        return slope[0], float(offset)
