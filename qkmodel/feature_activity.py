"""How many features are active on a token, and how many tokens a feature is active on.

Active means `f > 0`. Position 0 (the BOS token) is left out, as in `evaluation`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qkmodel.transcoder import QKTranscoder, Transcoder


@dataclass(frozen=True)
class FeatureActivity:
    """One side of a dictionary over `tokens` tokens.

    `active` [tokens] counts the active features of each token, `fired` [features] the tokens of each feature.
    """

    active: Int[Tensor, " tokens"]
    fired: Int[Tensor, " features"]

    @property
    def tokens(self) -> int:
        return len(self.active)

    @property
    def density(self) -> Float[Tensor, " features"]:
        """The share of tokens that each feature is active on."""
        return self.fired.double() / self.tokens

    @property
    def dead(self) -> int:
        """Features that are active on no token."""
        return int((self.fired == 0).sum())


@torch.no_grad()
def feature_activity(
    transcoder: QKTranscoder, batches: Iterable[Float[Tensor, "batch context d_model"]]
) -> dict[str, FeatureActivity]:
    """The activity of both sides, `query` and `key`, over batches of attention inputs (one at least)."""
    sides = {"query": transcoder.query, "key": transcoder.key}
    counted = {name: ([], torch.zeros(side.features, dtype=torch.int64)) for name, side in sides.items()}
    for x in batches:
        for name, side in sides.items():
            active = _active(side, x)
            counted[name][0].append(active.sum(1))
            counted[name][1].add_(active.sum(0))
    return {name: FeatureActivity(torch.cat(per_token), fired) for name, (per_token, fired) in counted.items()}


def _active(side: Transcoder, x: Float[Tensor, "batch context d_model"]) -> Tensor:
    """Whether each feature is active on each token, bool [batch · (context − 1), features]."""
    return (side.encode(x[:, 1:]) > 0).flatten(0, 1)
