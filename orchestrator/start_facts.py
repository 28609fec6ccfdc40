"""What is recorded of a start for people to read: the machine it ran on, and what it set out to do."""

import platform
from typing import Any

import psutil
import torch

from orchestrator.plan import SweepPlan
from orchestrator.plan_checks import machine_cpus, machine_gpus


def machine_facts() -> dict[str, Any]:
    """The driver's machine."""
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpus": machine_cpus(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": ", ".join(torch.cuda.get_device_name(one) for one in range(machine_gpus())) or "none",
    }


def plan_facts(plan: SweepPlan) -> dict[str, Any]:
    """What is left to do at this start."""
    return {
        "trainings": plan.trainings_left,
        "tokens_per_training": plan.tokens_per_training,
        "packs": plan.packs,
        "pack_size": plan.pack_size,
        "packs_at_once": plan.slots,
        "sampler": plan.sampler,
        "halving": "none" if plan.halving is None else f"eta {plan.halving.eta:g}, rungs at steps {plan.halving.rungs}",
    }
