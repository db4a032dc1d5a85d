"""The forward of a region that keeps some of what autograd saves and recomputes the rest.

The first call of a kind is recorded, later ones of that kind are replayed. Whatever does not go as
recorded keeps everything: then gradients are right and only memory is more than planned, of which a
:class:`MemfitWarning` tells. Depends on recording and replay.
"""

import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from memfit.integrations.boxes import Box, unpack
from memfit.integrations.forwards import MemfitWarning, PlannedForward
from memfit.integrations.links import Given, Link, Relay
from memfit.integrations.probes import Verdict
from memfit.integrations.recording import Recorded, Recording
from memfit.integrations.replay import Opened, Replay
from memfit.integrations.signatures import Entry, Reader, Unreadable

# After so many forwards that were not as recorded, everything is kept for ever.
_MISMATCHES = 3
# Kinds of calls that are remembered.
_PROGRAMS = 64


class SelectiveForward(PlannedForward):
    """Keeps the saved tensors that are named in ``keep``, and recomputes the others on demand.

    Names are those of :class:`memfit.planner.program.Program`; ``name`` is what to call the module
    in messages. Arguments named in ``recompute_input``, by their names in the region before, are
    not held either: that region, which is ``followed`` by this one, leaves in their common
    ``relay`` how to make them again. A plan's regions have one ``verdict`` on what was recomputed.
    """

    def __init__(
        self,
        module: nn.Module,
        shadowed: Callable[..., Any] | None,
        keep: tuple[str, ...],
        name: str = "",
        recompute_input: tuple[str, ...] = (),
        followed: bool = False,
        relay: Relay | None = None,
        verdict: Verdict | None = None,
    ) -> None:
        super().__init__(module, shadowed)
        self._keep = frozenset(keep)
        self._linked = frozenset(recompute_input)
        self._followed = followed
        self._relay = relay
        self._name = name or type(module).__name__
        self._reader = Reader()
        self._programs: dict[tuple[Any, ...], Replay | None] = {}
        self._verdict = verdict or Verdict()
        self._mismatches = 0
        self._warned: set[str] = set()
        self._recording = threading.Lock()

    def _options(self) -> tuple[Any, ...]:
        linked = tuple(sorted(self._linked))
        names = tuple(sorted(self._keep)), self._name, linked
        return (*names, self._followed, self._relay, self._verdict)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        forward = self._forward()
        if not torch.is_grad_enabled() or self._mismatches >= _MISMATCHES:
            return forward(*args, **kwargs)
        self._verdict.read()
        try:
            entry = self._reader.enter(self._own(), args, kwargs)
        except Unreadable as reason:
            self._warn("arguments", f"keeps everything: {reason}. {_WAY_OUT}")
            return forward(*args, **kwargs)
        links = self._find_links(entry) if self._linked else {}
        if links:
            entry = replace(entry, key=(*entry.key, *links))
        replay = self._programs.get(entry.key)
        if replay is not None:
            return self._replay(forward, args, kwargs, entry, replay, links)
        # If it does not keep everything, another thread may be recording, or this one further out.
        if entry.key in self._programs or not self._recording.acquire(blocking=False):
            return forward(*args, **kwargs)
        try:
            return self._record(forward, args, kwargs, entry, links)
        finally:
            self._recording.release()

    def _find_links(self, entry: Entry) -> dict[int, Link]:
        """The arguments that the region before can make again."""
        links = {}
        assert self._relay is not None
        for index, argument in enumerate(entry.arguments):
            source = self._relay.take(argument, self._linked)
            if source is not None:
                links[index] = Link(Given(source), source, argument)
        if len(links) < len(self._linked):
            self._warn(
                "unlinked",
                "holds its input against the plan: the region before it does not make "
                f"{', '.join(sorted(self._linked))} as it was planned to. {_WAY_OUT}",
            )
        return links

    def _replay(
        self,
        forward: Callable[..., Any],
        args: Any,
        kwargs: Any,
        entry: Entry,
        replay: Replay,
        links: dict[int, Link],
    ) -> Any:
        opened = Opened(replay, entry, self._verdict, links)
        try:
            with torch.autograd.graph.saved_tensors_hooks(opened.pack, unpack):
                out = forward(*args, **kwargs)
            if not opened.commit(out, self._relay if self._followed else None):
                self._forget(entry)
        finally:
            opened.release()
        return out

    def _forget(self, entry: Entry) -> None:
        """A forward was not as recorded; the next one is recorded anew."""
        self._programs.pop(entry.key, None)
        self._mismatches += 1
        self._warn(
            "mismatch",
            "kept everything in this call: its forward did not save the tensors that it saved when "
            f"it was recorded; after {_MISMATCHES} such calls it will keep everything. {_WAY_OUT}",
        )

    def _record(
        self,
        forward: Callable[..., Any],
        args: Any,
        kwargs: Any,
        entry: Entry,
        links: dict[int, Link],
    ) -> Any:
        recording = Recording(self._own(), entry)
        try:
            with recording.running():
                out = forward(*args, **kwargs)
            if len(self._programs) >= _PROGRAMS:
                del self._programs[next(iter(self._programs))]
            self._programs[entry.key] = self._decide(recording, entry, links, out)
        finally:
            recording.release()
        return out

    def _decide(
        self, recording: Recording, entry: Entry, links: dict[int, Link], out: Any
    ) -> Replay | None:
        """Drops what the plan does not keep of what a recording saved; None if all is kept."""
        if recording.dynamic:
            self._warn("dynamic", f"keeps everything: {recording.dynamic}. {_WAY_OUT}")
            return None
        recorded = recording.finish(out)
        kept = self._kept(recorded, recording)
        replay = Replay(recorded, kept, self._name, links, self._followed)
        opened = Opened(replay, entry, self._verdict, links)
        opened.pack_recorded(recording.packed, recording.states)
        opened.commit(out, self._relay if self._followed else None)
        return replay

    def _kept(self, recorded: Recorded, recording: Recording) -> frozenset[int]:
        program = recorded.program
        wanted = {s for s, name in program.names.items() if name in self._keep}
        for pack, late in zip(program.packs, recording.packed, strict=True):
            # Written to after it was saved: autograd raises if it is asked for, and so shall we.
            box = late.target
            if isinstance(box, Box) and box.tensor._version != box.version:
                wanted.add(pack.storage)
        kept = program.kept(wanted)
        if unknown := self._keep.difference(program.names.values()):
            self._warn(
                "unknown",
                f"has no {', '.join(sorted(unknown))}, which the plan keeps. {_WAY_OUT}",
            )
        if forced := [program.names[s] for s in program.droppable if s in kept - wanted]:
            self._warn(
                "forced",
                f"keeps {', '.join(forced)} against the plan, for want of a way to recompute "
                f"{'them' if len(forced) > 1 else 'it'}. {_WAY_OUT}",
            )
        return kept

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"{self._name} {message}", MemfitWarning, stacklevel=5)


_WAY_OUT = (
    "The planned peak may not hold: plan anew with a batch like this one, or without selective "
    "recomputation"
)
