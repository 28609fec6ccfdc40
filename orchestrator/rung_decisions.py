"""Decides at rungs, from what the ledger holds, and writes each decision there with its reasons."""

import math
from collections.abc import Mapping, Sequence

from orchestrator.ledger import Ledger, Training
from orchestrator.ledger_decisions import next_number, read_decisions, record_decision
from orchestrator.ledger_tables import Decision
from orchestrator.pareto import final_values, within_box
from orchestrator.search.halving import AtRung, FromRungToEnd, Halving, extrapolated, ranking, survivors

Metrics = Mapping[str, float | None]


class RungDecisions:
    """The decisions of one sweep. `halving` None: nothing is ever stopped."""

    def __init__(self, ledger: Ledger, halving: Halving | None, tokens_per_step: int) -> None:
        self._ledger = ledger
        self._halving = halving
        self._tokens_per_step = tokens_per_step
        # (training id, tokens) that were decided about; read once, since every pack asks for all who wait
        self._decided: set[tuple[str, int]] = set()
        # those that were stopped: taken up again, they go to their end
        self._stopped: set[str] = set()
        self._note(read_decisions(ledger))

    def next_stop(self, training_id: str, steps_done: int, last_step: int) -> int:
        """The step at which the training's pack ends: its next rung, or `last_step`.

        A rung at `steps_done` is still to come where nothing was decided there yet. What was stopped once and is taken
        up again goes to its end.
        """
        if self._halving is None or training_id in self._stopped:
            return last_step
        for rung in self._halving.rungs:
            is_here = rung == steps_done and (training_id, rung * self._tokens_per_step) not in self._decided
            if rung < last_step and (rung > steps_done or is_here):
                return rung
        return last_step

    def decide(self, reached: Sequence[tuple[Training, Metrics]], tokens: int) -> list[Decision]:
        """Decides, once for all, about trainings of one study that reached a rung together.

        [] where `tokens` are those of no rung.
        """
        step = tokens // self._tokens_per_step
        if self._halving is None or step not in self._halving.rungs or not reached:
            return []
        study_id = reached[0][0].study_id
        earlier = read_decisions(self._ledger, study_id)
        number = next_number(self._ledger, study_id)
        decisions = []
        for family in sorted({training.family for training, _ in reached}):
            asking = [_at_rung(training, metrics) for training, metrics in reached if training.family == family]
            before = [one for one in earlier if (one.tokens, one.family) == (tokens, family)]
            where = {"tokens": tokens, "number": number, "family": family}
            decisions += self._decide_family(asking, before, self._finished(study_id, before), where)
        record_decision(self._ledger, decisions)
        self._note(decisions)
        return decisions

    def stopped(self, study_id: str) -> list[str]:
        """Trainings of a study that are stopped, the best first: from the latest rung, and there by rank."""
        ids = {one.training_id for one in self._ledger.trainings(study_id, "stopped")}
        last = [one for one in read_decisions(self._ledger, study_id) if not one.kept and one.training_id in ids]
        last.sort(key=lambda one: (-one.tokens, one.rank / one.arrived, one.training_id))
        return [one.training_id for one in last]

    def _note(self, decisions: Sequence[Decision]) -> None:
        self._decided |= {(one.training_id, one.tokens) for one in decisions}
        self._stopped |= {one.training_id for one in decisions if not one.kept}

    def _decide_family(
        self,
        asking: Sequence[AtRung],
        before: Sequence[Decision],
        finished: Sequence[FromRungToEnd],
        where: Mapping[str, int | str],
    ) -> list[Decision]:
        arrived = [AtRung(one.training_id, *one.values, one.feasible) for one in before] + list(asking)
        kept = survivors({one.training_id for one in asking}, arrived, self._halving.eta)
        rank = {one.training_id: place for place, one in enumerate(ranking(arrived))}
        decisions = []
        for one in asking:
            is_kept, values = one.training_id in kept, (one.kl, one.l0)
            decisions.append(
                Decision(
                    training_id=one.training_id,
                    values=values,
                    feasible=one.feasible,
                    rank=rank[one.training_id],
                    arrived=len(arrived),
                    kept=is_kept,
                    expected=extrapolated(values, finished) if one.is_finite and not is_kept else None,
                    **where,
                )
            )
        return decisions

    def _finished(self, study_id: str, before: Sequence[Decision]) -> list[FromRungToEnd]:
        """From rung to end, of those that passed this rung before."""
        ends = {one.training_id: final_values(one) for one in self._ledger.trainings(study_id, "finished")}
        return [FromRungToEnd(one.values, end) for one in before if (end := ends.get(one.training_id)) is not None]


def _at_rung(training: Training, metrics: Metrics) -> AtRung:
    kl, l0 = (math.nan if metrics.get(name) is None else metrics[name] for name in ("kl", "l0"))
    return AtRung(training.training_id, kl, l0, within_box(training, metrics))
