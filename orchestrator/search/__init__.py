"""What to train next: the typed search space, the samplers, and one Optuna study per study."""
