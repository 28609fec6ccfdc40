"""A pack's steps on a GPU, as CUDA graphs: launching kernels one by one takes longer than running most of them.

Making of a batch what all members read is one graph, and each member's step is another, so a member that leaves takes
its cost with it. Members' graphs run on `STREAMS` streams, which fills a GPU that one small training cannot, and the
next batch is made ready beside them. A graph reads and writes the same memory at every replay. Each first step goes
without one: it compiles kernels, and makes the optimiser's moments.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qkmodel.member import Member, SharedBatch

STREAMS = 4
# another thread reads the next batch meanwhile
CAPTURE = {"capture_error_mode": "thread_local"}


class PackGraphs:
    """Steps members on batches of one shape; `share` makes of a batch's inputs what members read."""

    def __init__(self, share: Callable[[Tensor], SharedBatch]) -> None:
        self._share = share
        self._inputs: Tensor | None = None
        self._batch: SharedBatch | None = None
        self._members: dict[Member, _MemberSteps] = {}
        self._streams = [torch.cuda.Stream() for _ in range(STREAMS)]
        self._pools = [torch.cuda.graph_pool_handle() for _ in range(STREAMS)]
        self._met = 0
        self._ahead = torch.cuda.Stream()
        self._ready, self._taken = torch.cuda.Event(), torch.cuda.Event()

    def prepare(self, x: Tensor) -> None:
        """Makes the next batch ready beside the steps on the present one, which must have been taken.

        `x` [batch, context, d_model] is on the GPU or in page-locked memory, in any precision.
        """
        # the host stays a step ahead, not hundreds: it is asked to stop between steps, and each holds a batch
        self._taken.synchronize()
        if x.is_cuda or self._inputs is None:
            # made on the present stream, as what layer and reference were copied to the GPU by
            self._ahead.wait_stream(torch.cuda.current_stream())
        if x.is_cuda:
            x.record_stream(self._ahead)
        with torch.cuda.stream(self._ahead):
            self._ahead.wait_event(self._taken)
            if self._inputs is None:
                self._record(x)
            self._inputs.copy_(x, non_blocking=True)
            self._sharing.replay()
            self._ready.record()

    def take(self) -> SharedBatch:
        """The batch that was made ready, where members' graphs read it."""
        torch.cuda.current_stream().wait_event(self._ready)
        if self._batch is None:
            self._batch = copy.deepcopy(self._prepared, {id(self._prepared.true.layer): self._prepared.true.layer})
        else:
            torch._foreach_copy_(_tensors(self._batch), _tensors(self._prepared))
        self._taken.record()
        return self._batch

    def step(self, batch: SharedBatch, members: Sequence[Member], learning_rate_factor: float, progress: float) -> None:
        """One step of each member on the batch that was taken."""
        self._members = {member: self._members.get(member) or self._meet(member) for member in members}
        here = torch.cuda.current_stream()
        for stream in self._streams:
            stream.wait_stream(here)
        for steps in self._members.values():
            steps.go_on(batch, learning_rate_factor, progress)
        for stream in self._streams:
            here.wait_stream(stream)

    def _record(self, x: Tensor) -> None:
        self._inputs = torch.empty_like(x, device="cuda").copy_(x)
        # compiles, which cannot be recorded
        self._share(self._inputs.float())
        self._sharing = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._sharing, stream=self._ahead, **CAPTURE):
            self._prepared = self._share(self._inputs.float())

    def _meet(self, member: Member) -> "_MemberSteps":
        # one pool for a stream: its graphs run one after the other, and leave nothing behind in it
        slot = self._met % STREAMS
        self._met += 1
        return _MemberSteps(member, self._streams[slot], self._pools[slot])


def _tensors(batch: SharedBatch) -> list[Tensor]:
    parts = (vars(batch.inputs) | vars(batch.true)).values()
    return [part for part in parts if isinstance(part, Tensor)]


class _MemberSteps:
    """A member's steps: the first as they come, then replayed where they can be."""

    def __init__(self, member: Member, stream: torch.cuda.Stream, pool: tuple[int, int]) -> None:
        self._member = member
        self._stream = stream
        self._pool = pool
        self._has_stepped = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def go_on(self, batch: SharedBatch, learning_rate_factor: float, progress: float) -> None:
        with torch.cuda.stream(self._stream):
            self._member.set_learning_rate(learning_rate_factor)
            if self._graph is not None:
                self._member.losses.steps += 1
                self._graph.replay()
            elif self._has_stepped and self._member.is_recordable:
                self._record(batch, progress)
            else:
                self._member.descend(batch, progress)
                self._has_stepped = True

    def _record(self, batch: SharedBatch, progress: float) -> None:
        """Records a step, which executes nothing, and takes it."""
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=self._pool, stream=self._stream, **CAPTURE):
            self._member.descend(batch, progress)
        self._graph.replay()
