"""Activity of features, against counting one by one."""

import pytest
import torch

from qkmodel.feature_activity import feature_activity
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.transcoder import initialise_qk_transcoder
from tests.qkmodel.world import LAYER, SmallWorld

FAMILIES = {
    "topk": {"activation": "topk", "k": 3},
    "relu": {"activation": "relu", "penalty": "l1", "sparsity_coefficient": 1e-2},
    "two sizes": {"activation": "topk", "k": 2, "key_dictionary_size": 11, "key_k": 5},
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_activity_equals_counting_one_by_one(world: SmallWorld, family: dict) -> None:
    hyperparameters, reference = Hyperparameters(dictionary_size=24, learning_rate=1e-2, **family), world.reference
    means = (reference.mean_input, reference.mean_query, reference.mean_key)
    transcoder = initialise_qk_transcoder(hyperparameters, world.layer, *means, reference.input_rms)
    x = world.cache.read(LAYER, "validation", range(7))
    found = feature_activity(transcoder, [x[:4], x[4:]])
    for name in ("query", "key"):
        with torch.no_grad():
            f = getattr(transcoder, name).encode(x)
        sequences, context, features = f.shape
        active = [
            [feature for feature in range(features) if f[sequence, position, feature] > 0]
            for sequence in range(sequences)
            for position in range(1, context)
        ]
        fired = [sum(feature in token for token in active) for feature in range(features)]
        assert found[name].active.tolist() == [len(token) for token in active]
        assert found[name].fired.tolist() == fired
        assert found[name].dead == fired.count(0)
        assert found[name].tokens == 7 * (context - 1)
        assert found[name].density.tolist() == pytest.approx([count / len(active) for count in fired])
