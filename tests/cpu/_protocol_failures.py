"""What a rank that stops does to the others: every state of a few calls of the exchange in which one rank stops.

As in _protocol, whose account of what is sent and polled it uses, with these differences. The stream of calls is short.
Clears are part of a call's beginning (their races are that model's subject). One rank stops once, at any moment, and of
its stores in flight any part arrives; a stopped rank may be allowed to go on later (SIGSTOP and SIGCONT, a slow
compilation). The time-out is much longer than any store's flight: it expires where every rank that runs has nothing
left to do but wait, and then for any of them, in any order.
"""

from dataclasses import dataclass, replace

from _protocol import Model, Violation


@dataclass(frozen=True)
class State:
    calls: tuple  # per rank: the call it is in; len(stream) when it is through
    words: frozenset  # ((rank, generation, source, word), value); value: (call, source, is a sum, is right)
    flight: frozenset
    sent: frozenset
    failed: tuple  # per rank: None, or the rank its record names
    stopped: bool
    resumed: bool


class Failures(Model):
    """`stops`: the rank that stops; `resumes`: it may go on. What a rank does after its wait has failed:

    goes_on: it sends what later calls send, and sums with whatever stands in the slots, without waiting.
    silent: it sends nothing any more: no later call's words, no sum of which a partial is missing.
    asks: silent, and it tells the peers whom it waited for; a record names the end of that chain.
    """

    def __init__(self, world, stream, stops, resumes=False, after="silent"):
        super().__init__(world, stream)
        self.stream, self.stops, self.resumes, self.after = tuple(stream), stops, resumes, after
        self.records = set()  # (rank, rank named by its record)

    def start(self):
        empty = frozenset()
        state = State((-1,) * self.world, empty, empty, empty, (None,) * self.world, False, False)
        for rank in range(self.world):
            state = self.next_call(state, rank)
        return self.settle(state)

    def runs(self, state, rank):
        return rank != self.stops or not state.stopped or state.resumed

    def watched(self, state, rank):
        """{place: value} that the present call of `rank` polls."""
        call = state.calls[rank]
        return self.polled(rank, call, self.stream[call]) if call < len(self.stream) else {}

    def next_call(self, state, rank):
        call = state.calls[rank] + 1
        words, flight = state.words, state.flight
        if call < len(self.stream):
            if call > 0:
                size, generation = self.stream[call - 1].used(self.world), self.generation(call - 1)
                words = frozenset(
                    (p, v) for p, v in words if p[:2] != (rank, generation) or p[3] >= size
                )  # p: (rank, generation, source, word)
            if state.failed[rank] is None or self.after == "goes_on":
                flight = flight | {(s[:4], (*s[4], True)) for s in self.pushed(rank, call, self.stream[call])}
        calls = (*state.calls[:rank], call, *state.calls[rank + 1 :])
        state = replace(state, calls=calls, words=words, flight=flight)
        self.check(state, rank)
        return state

    def check(self, state, rank):
        """Whatever a call of a rank that has not failed, and may ever go on, can read must be right."""
        if state.failed[rank] is None and (self.resumes or self.runs(state, rank)):
            watched = self.watched(state, rank)
            for place, value in state.words:
                if place[0] == rank and watched.get(place[1:], value[:3]) != value[:3]:
                    raise Violation(
                        f"call {state.calls[rank]} of rank {rank}, not failed, finds call {value[0]}'s value"
                    )
                if place[0] == rank and place[1:] in watched and not value[3]:
                    raise Violation(f"rank {rank}, not failed, finds a sum of which a partial is missing")

    def missing(self, state, rank):
        here = {place[1:] for place, _ in state.words if place[0] == rank}
        return {place for place in self.watched(state, rank) if place not in here}

    def settle(self, state):
        """Send the sums that are complete, and end the calls that nothing holds back."""
        for rank in range(self.world):
            call = state.calls[rank]
            if not self.runs(state, rank) or call >= len(self.stream):
                continue
            kind, missing = self.stream[call], self.missing(state, rank)
            for word in range(self.own(rank, kind) if kind.two_shot else 0):
                lacks = any((self.generation(call), s, word) in missing for s in self.peers(rank))
                if (rank, call, word) not in state.sent and (not lacks or state.failed[rank] is not None):
                    flight = state.flight
                    if not lacks or self.after == "goes_on":
                        flight |= {(s[:4], (*s[4], not lacks)) for s in self.sums(rank, call, kind, word)}
                    return self.settle(replace(state, flight=flight, sent=state.sent | {(rank, call, word)}))
            if not missing or state.failed[rank] is not None:
                return self.settle(self.next_call(state, rank))
        return state

    def may_name(self, state, rank):
        """The ranks that the wait of `rank` may name: of each thread, the first source in its order that is missing."""
        call = state.calls[rank]
        kind, missing = self.stream[call], self.missing(state, rank)
        generation, share = self.generation(call), kind.share(self.world)
        around = [(rank + k) % self.world for k in range(1, self.world)]
        for word in range(share if kind.two_shot else kind.vectors):
            order = [(generation, source, word) for source in self.peers(rank)]  # a thread's waits, in order
            if kind.two_shot:
                order += [(generation, owner, share + word) for owner in around]
            first = next((place[1] for place in order if place in missing), None)
            if first is not None:
                yield first

    def resolved(self, state, rank, path=()):
        """Where the chain of waits that begins with `rank` ends: a rank that does not wait."""
        if rank in path:
            raise Violation(f"the ranks {path} wait for each other")
        if state.failed[rank] is not None:
            yield state.failed[rank]
        elif not self.runs(state, rank):
            yield rank
        else:
            for named in self.may_name(state, rank):
                yield from self.resolved(state, named, (*path, rank))

    def successors(self, state):
        moves = list(state.flight)
        urgent = [s for s in moves if self.waits_for(state, s)][:1]
        for store in urgent or moves:
            yield self.settle(self.arrived(state, store))
        if not state.stopped:
            own = [s for s in state.flight if s[1][1] == self.stops]
            for lost in range(1 if self.resumes else 2 ** len(own)):
                gone = {s for i, s in enumerate(own) if lost >> i & 1}
                yield replace(state, stopped=True, flight=state.flight - gone)
        elif self.resumes and not state.resumed:
            yield self.settle(replace(state, resumed=True))
        if not moves and state.stopped:
            for rank in range(self.world):
                if self.runs(state, rank) and state.failed[rank] is None and state.calls[rank] < len(self.stream):
                    names = self.resolved(state, rank) if self.after == "asks" else self.may_name(state, rank)
                    for named in set(names):
                        self.records.add((rank, named))
                        failed = (*state.failed[:rank], named, *state.failed[rank + 1 :])
                        yield self.settle(replace(state, failed=failed))

    def waits_for(self, state, store):
        """Needed by a running rank's present call: its arrival loses no behaviour (see Model.urgent), but stopping may
        come before it, and is tried as well."""
        place, value = store
        rank = place[0]
        return (
            self.runs(state, rank)
            and state.failed[rank] is None
            and value[0] == state.calls[rank]
            and place[1:] in self.watched(state, rank)
            and not any(p == place for p, _ in state.words)
            and not any(s[0] == place and s is not store for s in state.flight)
        )

    def arrived(self, state, store):
        words = frozenset(w for w in state.words if w[0] != store[0]) | {store}
        state = replace(state, words=words, flight=state.flight - {store})
        self.check(state, store[0][0])
        return state

    def explore(self, limit=1_000_000):
        """All reachable states. Raises Violation where a rank that has not failed can read a wrong value, or where a
        rank that runs never ends its calls."""
        first = self.start()
        seen, todo = {first}, [first]
        while todo:
            state = todo.pop()
            after = list(self.successors(state))
            if not after:
                for rank in range(self.world):
                    if self.runs(state, rank) and state.calls[rank] < len(self.stream):
                        raise Violation(f"rank {rank} hangs in call {state.calls[rank]}")
            for new in after:
                if new not in seen:
                    seen.add(new)
                    todo.append(new)
            if len(seen) > limit:
                raise RuntimeError(f"more than {limit} states")
        return seen
