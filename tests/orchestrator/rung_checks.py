"""What every decision at a rung has to be, derived once more from what the ledger says was known then."""

from collections.abc import Sequence

from orchestrator.ledger_records import Decision
from orchestrator.search.halving import AtRung, ranking, survivors


def assert_explained(decisions: Sequence[Decision], eta: int) -> None:
    """`decisions`: all those of one study, made with this `eta`."""
    for number in {one.number for one in decisions}:
        together = [one for one in decisions if one.number == number]
        for family in {one.family for one in together}:
            asking = [one for one in together if one.family == family]
            arrived = [
                one
                for one in decisions
                if one.number <= number and (one.tokens, one.family) == (together[0].tokens, family)
            ]
            expected = survivors(
                {one.training_id for one in asking},
                ranking([AtRung(one.training_id, *one.values, one.feasible) for one in arrived]),
                eta,
            )
            assert {one.training_id for one in asking if one.kept} == expected
            assert {one.arrived for one in asking} == {len(arrived)}
