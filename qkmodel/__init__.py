"""The science: models, activations, query/key transcoders, their loss, training and evaluation.

Nothing here knows about sweeps: this package never imports orchestrator, ray, optuna, mlflow or hydra.
"""
