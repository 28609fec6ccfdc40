"""How the cost of a step grows with dictionary size, context and members of a pack.

Times steps of TopK 16 trainings on random inputs with SmolLM2's shapes (9 query heads, 3 key heads, d_head 64,
d_model 576), 1,024 tokens a step, on one thread, each point in a process of its own, whose peak memory above that of
an idle one is taken. Three minutes. The last line of standard output is JSON:

    {"dictionary_size": {"512": {"ms_per_member_step": …, "tokens_per_second": …, "peak_mb": …}, …}, "context": …, …}
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from qkmodel.attention import AttentionGeometry, AttentionLayer
from qkmodel.configs import TrainingConfig
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.member import Member
from qkmodel.pack import shared_batch
from qkmodel.pack_memory import LIBRARIES_BYTES, pack_bytes
from qkmodel.products import product_dtype
from qkmodel.reference import LayerReference

TOKENS, STEPS = 1024, 6
POINTS = {
    "dictionary_size": [512, 1024, 2048, 4096, 8192, 16384],
    "context": [64, 128, 256, 512, 1024],
    "members": [1, 2, 4, 8, 16, 32],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point is not None:
        print(json.dumps(measure(**json.loads(arguments.point))))
        return
    idle = point(members=0)["peak_mb"]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, values in POINTS.items():
        found[name] = {}
        for value in values:
            figures = point(**{name: value})
            figures["peak_mb"] = round(figures["peak_mb"] - idle, 1)
            figures["predicted_mb"] = predicted_mb(**{name: value})
            found[name][str(value)] = figures
            print(f"{name} {value}: {figures}", flush=True)
    print(json.dumps(found))


def point(**setting: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--point", json.dumps(setting)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def measure(dictionary_size: int = 1024, context: int = 128, members: int = 1) -> dict[str, float]:
    """Milliseconds of a member's step, its share of the batch's true side included, and this process's peak memory."""
    torch.set_num_threads(1)
    layer, reference = small_layer()
    training = TrainingConfig(tokens=10**6, batch_sequences=TOKENS // context)
    pack = [Member(training_of(dictionary_size), layer, reference, training) for _ in range(members)]
    x = torch.randn(TOKENS // context, context, layer.geometry.d_model, generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(STEPS):
        started = time.perf_counter()
        batch = shared_batch(x, layer, reference, product_dtype("auto", x.device))
        for member in pack:
            member.step(batch, 1.0, 0.0)
        seconds.append(time.perf_counter() - started)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    if members == 0:
        return {"peak_mb": peak_mb}
    step = sorted(seconds[1:])[len(seconds) // 2 - 1] / members
    return {"ms_per_member_step": round(1e3 * step, 2), "tokens_per_second": round(TOKENS / step), "peak_mb": peak_mb}


def predicted_mb(dictionary_size: int = 1024, context: int = 128, members: int = 1) -> float:
    """What `pack: auto` reckons with, without the idle process."""
    pack = [training_of(dictionary_size)] * members
    layer, _ = small_layer()
    return round((pack_bytes(pack, layer.geometry, TOKENS // context, context, 1) - LIBRARIES_BYTES) / 1e6, 1)


def training_of(dictionary_size: int) -> Hyperparameters:
    return Hyperparameters(dictionary_size=dictionary_size, activation="topk", k=16, learning_rate=3e-3)


def small_layer() -> tuple[AttentionLayer, LayerReference]:
    geometry = AttentionGeometry(
        architecture="random",
        layer=0,
        d_model=576,
        n_heads=9,
        n_kv_heads=3,
        d_head=64,
        rotary_dim=64,
        scale=64**-0.5,
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) / 24 for name, shape in geometry.tensor_shapes().items()}
    tensors["inv_freq"] = 10_000.0 ** (-torch.arange(0, 64, 2) / 64)
    means = (torch.zeros(size) for size in (576, 576, 192))
    return AttentionLayer.from_tensors(geometry, tensors), LayerReference(*means, 1.0, 1.0, 1.0, 0.0, None, None)


if __name__ == "__main__":
    main()
