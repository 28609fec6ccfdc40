"""Filling the activation cache: one forward pass for all layers that a request misses, and nothing twice."""

import contextlib
import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int, Int32
from safetensors.torch import save
from torch import Tensor

from qkmodel.activation_request import CacheRequest, request_bytes
from qkmodel.activation_space import refuse_without_room
from qkmodel.activations import (
    DTYPES,
    MANIFEST,
    SHARD_SEQUENCES,
    SPLITS,
    TENSOR_NAME,
    TOKENS,
    ActivationCache,
    CacheKey,
    Manifest,
    MissingShard,
    Shard,
    Split,
    in_whole_shards,
    layer_part,
    map_shard,
    read_manifest,
    shard_path,
)
from qkmodel.allocator import give_back_memory, keep_freed_memory
from qkmodel.corpus import TokenisedCorpus
from qkmodel.errors import InputError
from qkmodel.files import PARTIAL_SUFFIX, exclusive, write_atomically
from qkmodel.forward_batch import forward_sequences
from qkmodel.progress import TokenProgress

if TYPE_CHECKING:
    from qkmodel.language_model import LanguageModel

logger = logging.getLogger(__name__)

# On a GPU: sequences that go through the model together, and passes at once.
_ON_GPU, _PASSES_ON_GPU = 8, 8


def build_activation_cache(
    root: Path,
    key: CacheKey,
    *,
    layers: Sequence[int],
    train_sequences: int,
    validation_sequences: int,
    max_bytes: int,
    streamed_sequences: int = 0,
    model_loader: "Callable[[], LanguageModel]",
    corpus_loader: Callable[[int, int], TokenisedCorpus],
    progress: Callable[[TokenProgress], None] | None = None,
    recorded: Callable[[], None] = lambda: None,
) -> ActivationCache:
    """Make sure that the cache of `key` below `root` holds these sequences of these layers, and open it.

    Of `streamed_sequences` further training sequences it holds the tokens alone.
    What is there is verified by checksum (about 1 s per 1.3 GB and core) and kept, whichever request or
    interrupted build it comes from; what is damaged or missing is built. `corpus_loader(train, validation)`
    returns that many sequences, or all when the corpus has fewer; it is called only for missing tokens, and
    `model_loader` only for missing activations. `recorded` is called whenever the manifest lists more. A second process
    that wants the same cache waits.

    Raises InputError when layers and sequences need more than `max_bytes` or the free disk space, when the
    corpus no longer gives the tokens that are cached, when the model's activations are not finite, and for
    a cache of an unknown version.
    """
    request = CacheRequest(
        tuple(sorted(set(layers))),
        tokens={"train": train_sequences + streamed_sequences, "validation": validation_sequences},
        activations={"train": train_sequences, "validation": validation_sequences},
    )
    whole = [in_whole_shards(request.tokens[split], None) for split in SPLITS]
    corpus = None
    if read_manifest(root / key.folder_name) is None:
        # what cannot be had is refused before there is as much as a lock
        corpus = corpus_loader(*whole)
        known = Manifest.empty(key).with_available(available_sequences(corpus))
        refuse_without_room(root, known, request, max_bytes)
    root.mkdir(parents=True, exist_ok=True)
    with exclusive(root / f"{key.folder_name}.lock", lambda holder: _say_waiting(root, key, holder)):
        build = _Build(root / key.folder_name, key, request)
        if not (build.lacks_tokens or build.missing_activations()):
            # what was whole may be made whole again, whatever the limit is by now
            max_bytes = max(max_bytes, build.request_bytes)
        build.drop_damaged()
        if build.lacks_tokens:
            corpus = corpus or corpus_loader(*whole)
            build.learn_available(corpus)
        if build.lacks_tokens or build.missing_activations():
            build.check_space(max_bytes)
        if build.lacks_tokens:
            build.add_tokens(corpus)
        if build.missing_activations():
            build.add_activations(model_loader(), progress, recorded)
    return ActivationCache.open(build.folder)


def _say_waiting(root: Path, key: CacheKey, holder: str) -> None:
    logger.warning("waiting for process %s, which is building %s", holder, root / key.folder_name)


def available_sequences(corpus: TokenisedCorpus) -> dict[Split, int | None]:
    """How many sequences the whole corpus has on each side, None where it was not read to its end."""
    return {"train": corpus.train_sequences_available, "validation": corpus.validation_sequences_available}


class _Build:
    """A cache under construction, by the one process that holds its lock."""

    def __init__(self, folder: Path, key: CacheKey, request: CacheRequest):
        self.folder = folder
        self._request = request
        self._manifest = read_manifest(folder) or Manifest.empty(key)
        if self._manifest.key != key:
            raise InputError(f"{folder}: holds another cache than its name says; remove the folder to build it anew")
        for part in (folder, folder / TOKENS, *folder.glob("L*")):
            for partial in part.glob(f".*{PARTIAL_SUFFIX}"):
                partial.unlink()

    @property
    def request_bytes(self) -> int:
        return request_bytes(self._manifest, self._request)

    @property
    def lacks_tokens(self) -> bool:
        return bool(self._manifest.missing([TOKENS], self._request.tokens))

    def missing_activations(self) -> list[MissingShard]:
        return self._manifest.missing(self._request.layer_parts, self._request.activations)

    def drop_damaged(self) -> None:
        """Forget those needed shards whose bytes are not what the manifest says."""
        needed = {
            shard_path(part, split, index)
            for part in self._request.parts
            for split in SPLITS
            for index in range(len(self._manifest.needed(split, self._request.wanted(part)[split])))
        }
        paths = sorted(needed & self._manifest.shards.keys())
        with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as threads:
            intact = threads.map(self._is_intact, paths)
            damaged = {path for path, is_intact in zip(paths, intact, strict=True) if not is_intact}
        for path in sorted(damaged):
            logger.warning("%s is damaged or gone and will be rebuilt", self.folder / path)
        kept = {path: shard for path, shard in self._manifest.shards.items() if path not in damaged}
        self._manifest = self._manifest.model_copy(update={"shards": kept})

    def learn_available(self, corpus: TokenisedCorpus) -> None:
        """Take over what reading the corpus has told about its length."""
        self._manifest = self._manifest.with_available(available_sequences(corpus))

    def check_space(self, max_bytes: int) -> None:
        """Refuse before anything is written. Raises InputError."""
        refuse_without_room(self.folder.parent, self._manifest, self._request, max_bytes)

    def add_tokens(self, corpus: TokenisedCorpus) -> None:
        """Write the token shards that are missing, after a look at those that are not. Raises InputError."""
        sequences = {"train": corpus.train, "validation": corpus.validation}
        written = {}
        for split in SPLITS:
            for index, size in enumerate(self._manifest.needed(split, self._request.tokens[split])):
                path = shard_path(TOKENS, split, index)
                tokens = sequences[split][index * SHARD_SEQUENCES :][:size]
                if path not in self._manifest.shards:
                    written[path] = self._write(path, tokens)
                elif not torch.equal(map_shard(self.folder / path), tokens):
                    raise InputError(
                        f"{self.folder}: the corpus no longer gives the tokens that are cached in {path}; if its new "
                        "text is what you want, remove the folder to build it anew"
                    )
        self._record(written)

    def add_activations(
        self, model: "LanguageModel", progress: Callable[[TokenProgress], None] | None, recorded: Callable[[], None]
    ) -> None:
        """Run the model over every shard that lacks a layer; a kill loses those under way. Raises InputError."""
        missing = self.missing_activations()
        tokens_total = self._manifest.key.context * sum(shard.sequences for shard in missing)
        tokens_done = 0
        start = time.monotonic()

        def report(tokens: int) -> None:
            nonlocal tokens_done
            tokens_done += tokens
            if progress is not None:
                progress(TokenProgress("caching activations", tokens_done, tokens_total, time.monotonic() - start))

        keep_freed_memory()
        with _own_threads() as cores:
            threads = min(cores, _PASSES_ON_GPU) if model.device.type == "cuda" else cores
            for lacking, shards in groupby(missing, self._lacking_layers):
                for shard, activations in _attention_inputs(
                    model, shards, self._tokens, lacking, self._manifest.key, threads, report
                ):
                    paths = {layer: shard_path(layer_part(layer), shard.split, shard.index) for layer in lacking}
                    self._record({paths[layer]: self._write(paths[layer], activations[layer]) for layer in lacking})
                    recorded()
        give_back_memory()

    def _lacking_layers(self, shard: MissingShard) -> list[int]:
        return [layer for layer in self._request.layers if layer_part(layer) in shard.parts]

    def _tokens(self, shard: MissingShard) -> Int32[Tensor, "sequence context"]:
        return map_shard(self.folder / shard_path(TOKENS, shard.split, shard.index))

    def _is_intact(self, path: str) -> bool:
        try:
            with (self.folder / path).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == self._manifest.shards[path].sha256
        except OSError:
            return False

    def _write(self, path: str, tensor: Tensor) -> Shard:
        data = save({TENSOR_NAME: tensor.contiguous()})
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, data)
        return Shard(sequences=len(tensor), sha256=hashlib.sha256(data).hexdigest())

    def _record(self, written: dict[str, Shard]) -> None:
        """Make shards exist: from here on a reader and the next build count on them."""
        shards = dict(sorted((self._manifest.shards | written).items()))
        self._manifest = self._manifest.model_copy(update={"shards": shards})
        write_atomically(self.folder / MANIFEST, self._manifest.model_dump_json(indent=1).encode())


@contextlib.contextmanager
def _own_threads() -> Iterator[int]:
    """Takes torch's threads away, for batches to be dealt to: the same bytes on any number, and none waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _attention_inputs(
    model: "LanguageModel",
    shards: Iterable[MissingShard],
    tokens_of: Callable[[MissingShard], Int32[Tensor, "sequence context"]],
    layers: list[int],
    key: CacheKey,
    threads: int,
    report: Callable[[int], None],
) -> Iterator[tuple[MissingShard, dict[int, Float[Tensor, "sequence context d_model"]]]]:
    """Each shard's activations at `layers`, by batches that start at the same sequences whatever is missing.

    Batches of the next shards are under way while one's last are waited for.
    """
    size = forward_sequences(key.context, model.device.type, _ON_GPU)
    begun: deque[MissingShard] = deque()

    def batches() -> Iterator[Int[Tensor, "batch context"]]:
        for shard in shards:
            begun.append(shard)
            yield from (batch.long() for batch in tokens_of(shard).split(size))

    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    products, stored = DTYPES[key.products], DTYPES[key.dtype]
    for inputs in model.attention_inputs_of_batches(batches(), layers, products, threads, stored):
        for layer in layers:
            if not inputs[layer].isfinite().all():
                raise InputError(f"model: layer {layer} receives NaN or infinity on this corpus; no cache can be built")
            parts[layer].append(inputs[layer])
        report(inputs[layers[0]][..., 0].numel())
        if sum(len(part) for part in parts[layers[0]]) == begun[0].sequences:
            activations = {layer: torch.cat(parts[layer]) for layer in layers}
            parts = {layer: [] for layer in layers}
            yield begun.popleft(), activations
