"""How far a long piece of work over tokens has come, for whoever shows it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenProgress:
    """`what` is done, on how many tokens of how many; `seconds` counts from the first of them."""

    what: str
    tokens_done: int
    tokens_total: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_done / self.seconds

    @property
    def seconds_left(self) -> float:
        return (self.tokens_total - self.tokens_done) / self.tokens_per_second
