"""How strongly a decoder should start out: short trainings at several scales of its initial rows.

Trains TopK and ReLU + L1 dictionaries on one layer of SmolLM2, side by side in one pack, with decoder rows
multiplied by each scale, and prints the KL, L0 and top-1 agreement they end at. Needs the activation cache of a
sweep: run `orchestrate sweep sweeps/l1.yaml` first. About five minutes on one core. The last line is JSON:

    {"layer": 8, "scales": […], "kl": {training: [KL at each scale]}, "l0": {…}}
"""

import argparse
import json
from pathlib import Path

import torch

from qkmodel.activations import ActivationCache
from qkmodel.configs import TrainingConfig
from qkmodel.evaluation import evaluate
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.pack import PackTrainer
from qkmodel.reference import load_reference
from qkmodel.transcoder import INITIAL_DECODER_SCALE

SCALES = (1.0, 0.5, 0.3, 0.15, 0.05)
L1 = {"activation": "relu", "penalty": "l1", "sparsity_coefficient": 0.02, "learning_rate": 3e-3}
TRAININGS = {
    "topk16 d1024": Hyperparameters(dictionary_size=1024, activation="topk", k=16, learning_rate=7e-3),
    "relu-l1 d1024": Hyperparameters(dictionary_size=1024, **L1),
    "relu-l1 d256": Hyperparameters(dictionary_size=256, **L1),
}
TRAINING = TrainingConfig(tokens=65_536, validation_sequences=64, learning_rate_schedule="linear")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("activations", nargs="?", default=Path("runs/activations"), type=Path)
    parser.add_argument("--layer", default=8, type=int)
    arguments = parser.parse_args()
    reference_file = next(arguments.activations.glob(f"*/reference/L{arguments.layer:02d}-*.safetensors"), None)
    if reference_file is None:
        parser.error(f"no cache of layer {arguments.layer} below {arguments.activations}; run sweeps/l1.yaml first")
    torch.set_num_threads(1)
    kl: dict[str, list[float]] = {}
    l0: dict[str, list[float]] = {}
    for name, hyperparameters in TRAININGS.items():
        results = train_at_scales(hyperparameters, reference_file)
        for scale, metrics in zip(SCALES, results, strict=True):
            figures = " ".join(f"{metric} {metrics[metric]:.4f}" for metric in ("kl", "l0", "top1"))
            print(f"layer {arguments.layer} {name} scale {scale}: {figures}", flush=True)
        kl[name] = [round(metrics["kl"], 4) for metrics in results]
        l0[name] = [round(metrics["l0"], 1) for metrics in results]
    print(json.dumps({"layer": arguments.layer, "scales": SCALES, "kl": kl, "l0": l0}))


def train_at_scales(hyperparameters: Hyperparameters, reference_file: Path) -> list[dict[str, float]]:
    """Final metrics of the same training started at each of SCALES."""
    layer, reference = load_reference(reference_file)
    cache = ActivationCache.open(reference_file.parent.parent)
    trainer = PackTrainer([hyperparameters] * len(SCALES), layer, cache, reference, TRAINING, seed=0)
    for member, scale in zip(trainer.members, SCALES, strict=True):
        for side in (member.transcoder.query, member.transcoder.key):
            side.W_dec.data.mul_(scale / INITIAL_DECODER_SCALE)
    trainer.train(trainer.steps_planned)
    transcoders = [member.transcoder for member in trainer.members]
    return evaluate(transcoders, layer, cache, reference, TRAINING.validation_sequences)


if __name__ == "__main__":
    main()
