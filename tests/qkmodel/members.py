"""A training of every kind, small."""

from qkmodel.hyperparameters import Hyperparameters

RELU = {"activation": "relu", "learning_rate": 3e-3}
MEMBERS = [
    Hyperparameters(dictionary_size=64, activation="topk", k=3, learning_rate=1e-2),
    Hyperparameters(dictionary_size=24, activation="topk", k=3, learning_rate=1e-2),
    Hyperparameters(dictionary_size=64, key_dictionary_size=32, activation="topk", k=3, key_k=2, learning_rate=1e-2),
    Hyperparameters(dictionary_size=64, activation="batchtopk", k=3, learning_rate=1e-2),
    Hyperparameters(dictionary_size=24, activation="batchtopk", k=3, learning_rate=1e-2),
    Hyperparameters(dictionary_size=40, activation="jumprelu", sparsity_coefficient=1e-3, learning_rate=3e-3),
    Hyperparameters(dictionary_size=40, penalty="l1", sparsity_coefficient=1e-3, **RELU),
    Hyperparameters(dictionary_size=24, penalty="sqrt", sparsity_coefficient=1e-2, seed=7, **RELU),
    Hyperparameters(
        dictionary_size=24, penalty="tanh", sparsity_coefficient=1e-2, key_sparsity_coefficient=1e-3, **RELU
    ),
    Hyperparameters(dictionary_size=24, penalty="p_annealing", sparsity_coefficient=1e-2, **RELU),
    Hyperparameters(dictionary_size=40, penalty="l1", target_l0=5, key_target_l0=9, **RELU),
]
NAMES = [f"{index}-{one.activation}-{one.penalty}" for index, one in enumerate(MEMBERS)]
