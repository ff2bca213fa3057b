"""Projections from a tower's features to the shared space."""

from __future__ import annotations

from torch import Tensor, nn


class MlpProjection(nn.Module):
    """A linear map plus a one-hidden-layer correction: (B, in) -> (B, out).

    The linear path keeps the pretrained geometry at the start of training, the correction bends it.
    """

    def __init__(self, in_dim: int, hidden: int, out_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, out_dim, bias=False)
        self.fc1 = nn.Linear(in_dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features) + self.fc2(self.act(self.fc1(features)))


def make_projection(kind: str, in_dim: int, hidden: int, out_dim: int) -> nn.Module:
    """ "linear": one matrix without bias; "mlp": `MlpProjection` (hidden 0 means in_dim)."""
    if kind == "linear":
        return nn.Linear(in_dim, out_dim, bias=False)
    return MlpProjection(in_dim, hidden or in_dim, out_dim)
