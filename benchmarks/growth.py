"""How the cost of a step grows with dictionary size, context, members of a pack, threads and tokens of a step.

Times steps of packs of TopK 16 trainings on random inputs with SmolLM2's shapes (9 query heads, 3 key heads, d_head 64,
d_model 576), 1,024 tokens a step and one thread where nothing else is said (of threads 8 members, of tokens 8 members
on 2 threads), in three intervals with an evaluation after each, which is not timed, each point in a process of its own,
whose peak memory above that of an idle one is taken. Six minutes.
With `--device cuda` the same on a GPU, with 8,192 tokens a step and 8 members where nothing else is said; the peak is
that of the GPU's memory, CUDA's own share included. Three minutes.
The last line of standard output is JSON:

    {"dictionary_size": {"512": {"ms_per_member_step": …, "tokens_per_second": …, "peak_mb": …, "predicted_mb": …}, …},
     "context": …, …, "device": …}
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qkmodel.attention import AttentionGeometry, AttentionLayer
from qkmodel.configs import TrainingConfig
from qkmodel.evaluation import evaluate
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.pack import PackTrainer
from qkmodel.pack_memory import LIBRARIES_BYTES, pack_bytes
from qkmodel.pattern_comparison import evaluation_batch
from qkmodel.reference import LayerReference

# a GPU's second step records its graph, and its first batch of an interval is waited for
WARM_STEPS, INTERVALS, STEPS = 3, 3, {"cpu": 6, "cuda": 60}
POINTS = {
    "dictionary_size": [512, 1024, 2048, 4096, 8192, 16384],
    "context": [64, 128, 256, 512, 1024],
    "members": [1, 2, 4, 8, 16, 32],
    "threads": [1, 2, 4, 8],
    "tokens": [1024, 2048, 4096],
}
BESIDE = {"threads": {"members": 8}, "tokens": {"members": 8, "threads": 2}}
ON_GPU = {name: POINTS[name] for name in ("dictionary_size", "context", "members")} | {"tokens": [1024, 8192, 32768]}
# neither few tokens nor a single member would fill a GPU
USUAL, USUAL_ON_GPU = {"members": 1, "tokens": 1024}, {"members": 8, "tokens": 8192}


@dataclass(frozen=True)
class Activations:
    """Random inputs of the layer in memory, where a trainer expects an activation cache."""

    x: Tensor

    @property
    def context(self) -> int:
        return self.x.shape[1]

    @property
    def train_sequences_available(self) -> int:
        return len(self.x)

    def read_stored(self, _layer: int, _split: str, indices: Iterable[int]) -> Tensor:
        return self.x[torch.as_tensor(list(indices))]

    def read(self, layer: int, split: str, indices: Iterable[int]) -> Tensor:
        return self.read_stored(layer, split, indices).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point is not None:
        print(json.dumps(measure(**json.loads(arguments.point))))
        return
    on_gpu = arguments.device == "cuda"
    found: dict[str, object] = {"device": torch.cuda.get_device_name() if on_gpu else "cpu"}
    usual = {"device": arguments.device} | (USUAL_ON_GPU if on_gpu else USUAL)
    idle = 0.0 if on_gpu else point(**usual | {"members": 0})["peak_mb"]
    for name, values in (ON_GPU if on_gpu else POINTS).items():
        found[name] = {}
        for value in values:
            setting = usual | ({} if on_gpu else BESIDE.get(name, {})) | {name: value}
            figures = point(**setting)
            figures["peak_mb"] = round(figures["peak_mb"] - idle, 1)
            figures["predicted_mb"] = predicted_mb(**setting)
            found[name][str(value)] = figures
            print(f"{name} {value}: {figures}", flush=True)
    print(json.dumps(found))


def point(**setting: int | str) -> dict[str, float]:
    command = [sys.executable, __file__, "--point", json.dumps(setting)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def measure(
    members: int, tokens: int, device: str, dictionary_size: int = 1024, context: int = 128, threads: int = 1
) -> dict[str, float]:
    """Milliseconds of a member's step, its share of the batch's true side included, and the peak memory."""
    torch.set_num_threads(1)
    layer, reference = small_layer(device)
    batch = tokens // context
    training = TrainingConfig(tokens=10**7, batch_sequences=batch)
    generator = torch.Generator().manual_seed(0)
    evaluated = evaluation_batch(context)
    sequences = max(2 * batch, evaluated)
    x = torch.randn(sequences, context, layer.geometry.d_model, generator=generator)
    activations = Activations(x.bfloat16())
    if members == 0:
        return {"peak_mb": peak_mb(device)}
    pack = PackTrainer([training_of(dictionary_size)] * members, layer, activations, reference, training, 0, threads)
    pack.train(WARM_STEPS)
    seconds = 0.0
    for _ in range(INTERVALS):
        started = time.perf_counter()
        pack.train(STEPS[device])
        if device == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - started
        evaluate([one.transcoder for one in pack.members], layer, activations, reference, evaluated, threads)
    step = seconds / INTERVALS / STEPS[device] / members
    return {
        "ms_per_member_step": round(1e3 * step, 2),
        "tokens_per_second": round(tokens / step),
        "peak_mb": peak_mb(device),
    }


def peak_mb(device: str) -> float:
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        return (total - free - torch.cuda.memory_reserved() + torch.cuda.max_memory_reserved()) / 1e6
    # ru_maxrss would be the peak of the process that started this one, where that is larger
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6


def predicted_mb(
    members: int, tokens: int, device: str, dictionary_size: int = 1024, context: int = 128, threads: int = 1
) -> float:
    """What `pack: auto` reckons with; on a CPU without the idle process."""
    pack = [training_of(dictionary_size)] * members
    layer, _ = small_layer("cpu")
    needed = pack_bytes(pack, layer.geometry, tokens // context, context, threads, device)
    return round((needed - (LIBRARIES_BYTES if device == "cpu" else 0)) / 1e6, 1)


def training_of(dictionary_size: int) -> Hyperparameters:
    return Hyperparameters(dictionary_size=dictionary_size, activation="topk", k=16, learning_rate=3e-3)


def small_layer(device: str) -> tuple[AttentionLayer, LayerReference]:
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
    means = (torch.zeros(size, device=device) for size in (576, 576, 192))
    layer = AttentionLayer.from_tensors(geometry, tensors).to(device)
    return layer, LayerReference(*means, 1.0, 1.0, 1.0, 0.0, None, None)


if __name__ == "__main__":
    main()
