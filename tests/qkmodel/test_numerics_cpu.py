"""Compiled loops give the same bits whether they were compiled just now or come from disk."""

import os
import subprocess
import sys
from pathlib import Path

DIGEST = """
import hashlib
import torch
from qkmodel.kernels.pattern_kl_cpu import _softmax_gradients
from qkmodel.pattern_kl import pattern_kl, true_pattern
from tests.qkmodel.layers import random_layer

torch.set_num_threads(1)
torch.manual_seed(0)
digest = hashlib.sha256()
for soft_cap in (None, 5.0):
    layer = random_layer(n_heads=9, n_kv_heads=3, d_head=64, rotary_dim=64, d_model=64, soft_cap=soft_cap)
    q, k = layer.project(torch.randn(4, 128, 64))
    q_hat = (q + 0.3 * torch.randn_like(q)).requires_grad_()
    k_hat = (k + 0.3 * torch.randn_like(k)).requires_grad_()
    for dtype in (torch.float32, torch.bfloat16):
        loss = pattern_kl(q_hat, k_hat, true_pattern(layer, q, k, dtype))
        for value in (loss.total, *torch.autograd.grad(loss.total, (q_hat, k_hat))):
            digest.update(value.detach().numpy().tobytes())
print(sum(_softmax_gradients.stats.cache_misses.values()), digest.hexdigest())
"""


def test_what_was_just_compiled_rounds_as_what_is_read_from_disk(tmp_path: Path) -> None:
    said = []
    for _ in range(2):
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
        answer = subprocess.run([sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
        said.append(answer.stdout.split())
    (compiled, first), (compiled_again, second) = said
    assert int(compiled) > 0 and int(compiled_again) == 0
    assert first == second
