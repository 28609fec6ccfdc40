"""What a sweep wants of an activation cache, and what that comes to: bytes in all, and work that is left."""

from collections.abc import Mapping
from dataclasses import dataclass

from qkmodel.activations import SPLITS, TOKENS, Manifest, Split, layer_part


@dataclass(frozen=True)
class CacheRequest:
    """What is wanted of a cache: the tokens of so many sequences, and activations at `layers` of the first of them.

    The two counts differ where packs compute training activations themselves.
    """

    layers: tuple[int, ...]
    tokens: Mapping[Split, int]
    activations: Mapping[Split, int]

    @property
    def streamed_sequences(self) -> int:
        """Training sequences whose activations packs compute themselves."""
        return self.tokens["train"] - self.activations["train"]

    @property
    def layer_parts(self) -> list[str]:
        return [layer_part(layer) for layer in self.layers]

    @property
    def parts(self) -> list[str]:
        return [TOKENS, *self.layer_parts]

    def wanted(self, part: str) -> Mapping[Split, int]:
        """Sequences that `part` has to have."""
        return self.tokens if part == TOKENS else self.activations


@dataclass(frozen=True)
class MissingWork:
    """What a request would add to a cache: sequences that go through the model, and bytes on disk."""

    sequences: int
    bytes: int


def request_bytes(manifest: Manifest, request: CacheRequest) -> int:
    """Bytes on disk of what is requested, what is there already included; file headers (0.1 kB a shard) left out.

    An upper bound while nobody has counted the corpus's sequences.
    """
    return sum(
        manifest.sequences_needed(split, request.wanted(part)[split]) * manifest.key.bytes_per_sequence(part)
        for part in request.parts
        for split in SPLITS
    )


def missing_work(manifest: Manifest, request: CacheRequest) -> MissingWork:
    """What `build_activation_cache` would still do, judged by the manifest alone.

    An upper bound while nobody has counted the corpus's sequences.
    """
    return MissingWork(
        sequences=manifest.missing_sequences(request.layer_parts, request.activations),
        bytes=sum(
            manifest.missing_sequences([part], request.wanted(part)) * manifest.key.bytes_per_sequence(part)
            for part in request.parts
        ),
    )
