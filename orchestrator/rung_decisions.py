"""Decides at rungs, from what the ledger holds, and writes each decision there with its reasons."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from orchestrator.ledger import Ledger, Training
from orchestrator.ledger_decisions import read_decisions, record_decision
from orchestrator.ledger_records import Decision
from orchestrator.pareto import final_values, within_box
from orchestrator.search.halving import AtRung, FromRungToEnd, Halving, extrapolated, ranking, survivors

Metrics = Mapping[str, float | None]


class RungDecisions:
    """The decisions of one sweep. `halving` None: nothing is ever stopped."""

    def __init__(self, ledger: Ledger, halving: Halving | None, tokens_per_step: int) -> None:
        self._ledger = ledger
        self._halving = halving
        self._tokens_per_step = tokens_per_step
        # What the ledger holds is read once, at the start: only this process adds to it, and every pack asks.
        # (training id, tokens) that were decided about
        self._decided: set[tuple[str, int]] = set()
        # those that were stopped: taken up again, they go to their end
        self._stopped: set[str] = set()
        # (study id, tokens, family) -> who was decided about there, by training id
        self._arrived: dict[tuple[str, int, str], dict[str, AtRung]] = defaultdict(dict)
        # study id -> the number of its next decision
        self._number: dict[str, int] = defaultdict(int)
        # training id -> (kl, l0) of the finished
        self._ends: dict[str, tuple[float, float]] = {}
        for study in ledger.studies():
            self._note(study.study_id, read_decisions(ledger, study.study_id))
        for training in ledger.trainings(state="finished"):
            self.finished(training)

    def finished(self, training: Training) -> None:
        """Tells of a training that has finished: by such ones others are extrapolated."""
        values = final_values(training)
        if values is not None:
            self._ends[training.training_id] = values

    def next_stop(self, training_id: str, steps_done: int, last_step: int) -> int:
        """The step at which the training's pack ends: its next rung, or `last_step`.

        A rung at which the training was decided about is passed: one that begins again meets it a second time. What was
        stopped once and is taken up again goes to its end.
        """
        if self._halving is None or training_id in self._stopped:
            return last_step
        for rung in self._halving.rungs:
            is_decided = (training_id, rung * self._tokens_per_step) in self._decided
            if steps_done <= rung < last_step and not is_decided:
                return rung
        return last_step

    def decide(self, reached: Sequence[tuple[Training, Metrics]], tokens: int) -> list[Decision]:
        """Decides about trainings of one study that reached a rung together.

        About those only that were never decided about there, nor stopped anywhere: [] where there are none, or where
        `tokens` are those of no rung.
        """
        reached = [
            (training, metrics)
            for training, metrics in reached
            if (training.training_id, tokens) not in self._decided and training.training_id not in self._stopped
        ]
        step = tokens // self._tokens_per_step
        if self._halving is None or step not in self._halving.rungs or not reached:
            return []
        study_id = reached[0][0].study_id
        decisions = []
        for family in sorted({training.family for training, _ in reached}):
            asking = [_at_rung(training, metrics) for training, metrics in reached if training.family == family]
            before = list(self._arrived[study_id, tokens, family].values())
            where = {"tokens": tokens, "number": self._number[study_id], "family": family}
            decisions += self._decide_family(asking, before, where)
        self._ledger.patiently(lambda: record_decision(self._ledger, decisions))
        self._note(study_id, decisions)
        return decisions

    def stopped(self, study_id: str) -> list[str]:
        """Trainings of a study that are stopped, the best first: from the latest rung, and there by rank."""
        ids = {one.training_id for one in self._ledger.trainings(study_id, "stopped")}
        last = [one for one in read_decisions(self._ledger, study_id) if not one.kept and one.training_id in ids]
        last.sort(key=lambda one: (-one.tokens, one.rank / one.arrived, one.training_id))
        return [one.training_id for one in last]

    def _note(self, study_id: str, decisions: Sequence[Decision]) -> None:
        for one in decisions:
            self._decided.add((one.training_id, one.tokens))
            if not one.kept:
                self._stopped.add(one.training_id)
            arrival = AtRung(one.training_id, *one.values, one.feasible)
            self._arrived[study_id, one.tokens, one.family][one.training_id] = arrival
            self._number[study_id] = max(self._number[study_id], one.number + 1)

    def _decide_family(
        self, asking: Sequence[AtRung], before: Sequence[AtRung], where: Mapping[str, int | str]
    ) -> list[Decision]:
        ranked = ranking([*before, *asking])
        kept = survivors({one.training_id for one in asking}, ranked, self._halving.eta)
        rank = {one.training_id: place for place, one in enumerate(ranked)}
        finished = self._from_rung_to_end(before)
        decisions = []
        for one in asking:
            is_kept, values = one.training_id in kept, (one.kl, one.l0)
            decisions.append(
                Decision(
                    training_id=one.training_id,
                    values=values,
                    feasible=one.feasible,
                    rank=rank[one.training_id],
                    arrived=len(ranked),
                    kept=is_kept,
                    expected=extrapolated(values, finished) if one.is_finite and not is_kept else None,
                    **where,
                )
            )
        return decisions

    def _from_rung_to_end(self, before: Sequence[AtRung]) -> list[FromRungToEnd]:
        """Of the finished trainings that passed this rung."""
        return [
            FromRungToEnd((one.kl, one.l0), end)
            for one in before
            if (end := self._ends.get(one.training_id)) is not None
        ]


def _at_rung(training: Training, metrics: Metrics) -> AtRung:
    kl, l0 = (math.nan if metrics.get(name) is None else metrics[name] for name in ("kl", "l0"))
    return AtRung(training.training_id, kl, l0, within_box(training, metrics))
