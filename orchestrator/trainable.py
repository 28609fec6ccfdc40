"""The Ray Tune trainable that owns one pack, from its first batch to its members' dictionaries."""

import contextlib
import errno
import logging
import math
import os
import platform
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from ray import tune

from orchestrator.checkpoints import checkpoint_path, drop_older
from orchestrator.objectives import OBJECTIVES
from orchestrator.pack_files import PackFiles
from orchestrator.pack_order import DIVERGED, MemberReport, PackOrder, dictionary_path
from orchestrator.packs.inputs import Pack, PackInputs
from orchestrator.packs.pair_mask import MaskPack
from orchestrator.packs.transcoder import TranscoderPack
from orchestrator.permit import Permit, PermitReader
from orchestrator.storage.shared import StorageGivesOut
from qkmodel.activation_stream import StreamedActivations
from qkmodel.dictionary import CONFIG_FILE
from qkmodel.errors import InputError
from qkmodel.pack import Checkpointed, PackTrainer, load_checkpoint, save_checkpoint
from qkmodel.pair_mask.pack import MaskPackTrainer
from qkmodel.reference import load_reference

if TYPE_CHECKING:
    from qkmodel.language_model import LanguageModel

# A kl this many times that of the mean pattern is no reconstruction any more, and no training comes back from it.
RUNAWAY_KL = 100

_log = logging.getLogger(__name__)


class PackTrainable(tune.Trainable):
    """One call of `step` trains the pack to its next report, and writes before it answers.

    A member's checkpoint, and at the end its dictionary, are in the storage before the driver hears of them, so the
    driver can always believe what it hears. Ray's own checkpoints hold nothing. Before every step the pack looks
    whether it may go on; asked to stop, it writes checkpoints and ends within that step.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self._model: LanguageModel | None = None
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        order = PackOrder.model_validate_json(new_config["order"])
        self._files = PackFiles.of(order)
        self._order = self._files.order
        self._permits = PermitReader(self._order.sweep_folder, order.start, self._files.storage)
        # with the memory that the former pack's steps took
        self._pack: Pack | None = None
        self._trainer: PackTrainer | MaskPackTrainer | None = None
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing: `PackOrder.steps_done` says where the members stand."""

    def _open(self) -> None:
        order = self._order
        # threads take different members, so that no result depends on how many there are
        torch.set_num_threads(1)
        cache = self._files.open_cache()
        layer, reference = load_reference(order.reference_file, order.device)
        training = StreamedActivations(cache, self._loaded_model()) if order.streamed else cache
        found = PackInputs(order, cache, training, layer, reference, self._loaded_model)
        self._pack = MaskPack(found) if order.task == "pair_mask" else TranscoderPack(found)
        self._trainer, self._objectives = self._pack.trainer, OBJECTIVES[order.task]
        self._runaway_kl = RUNAWAY_KL * reference.kl_baseline
        self._ids = [member.training_id for member in order.members]
        if order.steps_done > 0:
            for member, ordered in zip(self._trainer.members, order.members, strict=True):
                with self._files.storage.borrowed(ordered.checkpoint) as file:
                    steps = load_checkpoint(member, file, ordered.training_id)
                if steps != order.steps_done:
                    raise RuntimeError(f"{ordered.checkpoint} is at step {steps}, not {order.steps_done}")
            self._trainer.steps_done = order.steps_done

    def step(self) -> dict[str, Any]:
        """Trains to the next report; the answer holds a `MemberReport` per member.

        What goes wrong ends the pack and is answered as `error`: Tune would keep the reason to itself.
        """
        started = time.monotonic()
        try:
            if self._pack is None:
                self._open()
            return self._train_and_report(started)
        except Exception as error:  # noqa: BLE001 - Triton's compiler for one raises what is no RuntimeError
            _log.exception("pack %s", self._order.pack_id)
            reason = str(error).strip().splitlines() or ["no message"]
            return {
                "reports": [],
                "error": f"{type(error).__name__}: {reason[0]}",
                "storage_error": self._storage_error(error),
                "done": True,
            }

    def _train_and_report(self, started: float) -> dict[str, Any]:
        report_step = self._next_report()
        self._trainer.train(report_step - self._trainer.steps_done, lambda: self._permits.current() is Permit.GO)
        if self._permits.now() is Permit.FENCED:
            return {"reports": [], "error": None, "fenced": True, "done": True}
        if self._trainer.steps_done < report_step:
            self._write_checkpoints()
            reports = [self._standing(training_id) for training_id in self._ids]
            return {"reports": _with_seconds(reports, started), "error": None, "done": True}
        losses = [member.losses.take_means() for member in self._trainer.members]
        reports = [
            self._report(index, means, metrics)
            for index, (means, metrics) in enumerate(zip(losses, self._pack.evaluate(), strict=True))
        ]
        self._keep([index for index, report in enumerate(reports) if report.error is None])
        return {
            "reports": _with_seconds(reports, started),
            "error": None,
            "done": self._trainer.steps_done >= self._order.last_step or not self._trainer.members,
        }

    def _storage_error(self, error: Exception) -> str | None:
        """What is wrong with the storage or a disk, where that is no training's fault.

        A bucket that gives out; a disk that is full or read-only; the folder is gone.
        """
        if isinstance(error, StorageGivesOut):
            return f"{error.where}: {error.reason}"
        if not isinstance(error, OSError):
            return None
        folder = self._order.sweep_folder
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return f"{error.filename or folder}: {os.strerror(error.errno)}"
        # unlike is_dir, says no whatever the reason
        if self._order.bucket is not None or os.path.isdir(folder):
            return None
        return f"{folder}: the folder is gone on {platform.node()}"

    def _next_report(self) -> int:
        """The step after which members report: at every interval, at a rung and at the end."""
        interval, done = self._order.training.report_steps(self._trainer.tokens_per_step), self._trainer.steps_done
        return min(done + interval - done % interval, self._order.last_step)

    def _write_checkpoints(self) -> None:
        for member, training_id in zip(self._trainer.members, self._ids, strict=True):
            self._write_checkpoint(member, training_id, {})

    def _write_checkpoint(self, member: Checkpointed, training_id: str, progress: dict[str, float | None]) -> None:
        steps = self._trainer.steps_done
        path = checkpoint_path(self._order.sweep_folder, self._order.start, training_id, steps)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(member, path, training_id, steps, progress)
        self._files.hand_over(path)
        drop_older(path, self._files.storage)

    def _report(self, index: int, losses: dict[str, float], metrics: dict[str, float | None]) -> MemberReport:
        member, training_id = self._trainer.members[index], self._ids[index]
        if not (member.is_finite and _finite(losses | metrics)):
            return self._give_up(index, "a loss or metric is not finite")
        if metrics[self._objectives.kl] > self._runaway_kl:
            kl = f"{self._objectives.kl} {metrics[self._objectives.kl]:.3g}"
            return self._give_up(index, f"{kl} is over {RUNAWAY_KL} times the mean pattern's")
        finished = self._trainer.finished
        figures = metrics if finished else losses | metrics
        # final figures are those of a dictionary, which follows
        self._write_checkpoint(member, training_id, {} if finished else figures)
        report = self._standing(training_id).model_copy(update={"metrics": figures})
        if not finished:
            return report
        where = dictionary_path(self._order.start, training_id)
        folder = self._order.sweep_folder / where
        sha256 = self._pack.save(index, training_id, figures, folder)
        self._files.hand_over(folder, last=CONFIG_FILE)
        if self._order.steps_done == self._trainer.steps_done:
            # nothing was left to train: whoever wrote the last checkpoint may have got this far too
            with contextlib.suppress(OSError):
                # what is left there costs room, and no result
                self._files.drop_twins(training_id, sha256)
        return report.model_copy(update={"dictionary": str(where), "dictionary_sha256": sha256})

    def _loaded_model(self) -> "LanguageModel":
        """Raises InputError when the model's files are no longer those that the activations come from."""
        if self._model is not None:
            return self._model
        from qkmodel.language_model import load_language_model

        identity = self._order.model_identity
        model = load_language_model(identity.config, self._order.device)
        if model.description.weights_sha256 != identity.weights_sha256:
            raise InputError(
                f"model {identity.config.name}: its files changed since the sweep was started; start it again"
            )
        self._model = model
        return model

    def _give_up(self, index: int, why: str) -> MemberReport:
        error = f"{DIVERGED} by token {self._trainer.tokens_done} ({why}); try a lower learning rate"
        return self._standing(self._ids[index]).model_copy(update={"error": error})

    def _standing(self, training_id: str) -> MemberReport:
        """How far a member is, without figures."""
        return MemberReport(training_id=training_id, tokens=self._trainer.tokens_done, seconds=0.0, metrics={})

    def _keep(self, indices: list[int]) -> None:
        self._trainer.members = [self._trainer.members[index] for index in indices]
        self._ids = [self._ids[index] for index in indices]


def _with_seconds(reports: Sequence[MemberReport], started: float) -> list[dict[str, Any]]:
    """The reports to be sent, each with its share of the time since `started`."""
    share = (time.monotonic() - started) / len(reports)
    return [report.model_copy(update={"seconds": share}).model_dump() for report in reports]


def _finite(metrics: dict[str, float | None]) -> bool:
    return all(value is None or math.isfinite(value) for value in metrics.values())
