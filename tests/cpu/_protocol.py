"""A model of the Lamport exchange of csrc/common/lamport.cuh, small enough to visit every state.

One state holds, for W ranks: the call each rank is in, every slot's words, the stores in flight, the clears not yet
performed. What the model takes for granted of the hardware, and nothing else:

- A store to a peer arrives at any time after its call began; arrivals are unordered within a call, between calls, and
  between peers. (`st.relaxed.sys`: no order between two addresses.)
- A rank's clears are performed at any time between the beginning and the end of their call, and all by its end; the
  next call of that rank begins after it. (Stream order, or `griddepcontrol.wait` of every CTA before its first access.)
- A word arrives as a whole and stays until it is cleared or overwritten. (Coherence of one address.)

Four steps are taken together with the step that enables them, which loses no behaviour: a call's stores leave when it
begins (their arrival may be late), a two-shot owner sends its sum when the last partial has come, a call ends when the
last thing it waits for has come and the next one begins, and the clears of one call are performed at once. Each of them
only adds stores in flight, clears to come and words that are watched; waiting would forbid some orders and add none.
A poll is not a step either: a word that a call polls is watched from the call's beginning to its end, and whatever
stands there, at any moment, must be the sentinel or the one right value. So it does not matter when a thread looks.

Numbers of calls are counted from the slowest rank's (less a multiple of the generations), so the graph of states is
finite although the stream of calls has no end, and every sequence of the given kinds of call is covered.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple


class Violation(Exception):
    """Something the protocol promises does not hold in a reachable state."""


class Kind(NamedTuple):
    """A call: `vectors` words by one-shot or two-shot."""

    vectors: int
    two_shot: bool = False

    def share(self, world):
        return -(-self.vectors // world)

    def used(self, world):
        """Words of each slot that the call may fill: what begin_call keeps in `used`."""
        return 2 * self.share(world) if self.two_shot else self.vectors


@dataclass(frozen=True)
class Rules:
    """The protocol, and each way to get it wrong."""

    generations: int = 3
    cleared: int = -1  # the generation of which call is cleared, relative to this one
    cleared_size: int = -1  # the size of which call says how much of it
    ends_after_clears: bool = True  # False: the next call's stores may leave before this one's clears are performed
    ends_after_polls: bool = True  # False: the next call may begin (and clear) while this one polls
    polls_every_word: bool = True  # False: the last word of a slot is not looked at
    advances_epoch: bool = True
    sums_all_partials: bool = True  # False: a two-shot owner sends its sum before the last rank's partial has come


@dataclass(frozen=True)
class State:
    calls: tuple  # per rank: (calls ended, calls begun)
    words: frozenset  # (rank, generation, source, word, value); absent: the sentinel. value: (call, source, is a sum)
    flight: frozenset  # the same, on the way
    clears: frozenset  # (rank, generation, source, word) to be performed
    sent: frozenset  # (rank, call, word): two-shot sums sent
    kinds: tuple  # (call, kind) from the slowest rank's previous call on


class Model:
    def __init__(self, world, kinds, rules=None, reduced=False):
        self.world, self.kinds, self.rules, self.reduced = world, tuple(kinds), rules or Rules(), reduced
        self.polled = cache(self._polled)

    def generation(self, call):
        return call % self.rules.generations if self.rules.advances_epoch else 0

    def pushed(self, rank, call, kind):
        """What leaves when a call begins: all words (one-shot), or the partials of the peers' shares."""
        generation, value = self.generation(call), (call, rank, False)
        for peer in self.peers(rank):
            own = self.own(peer, kind) if kind.two_shot else kind.vectors
            for word in range(own):
                yield (peer, generation, rank, word, value)

    def sums(self, rank, call, kind, word):
        for peer in self.peers(rank):
            yield (peer, self.generation(call), rank, kind.share(self.world) + word, (call, rank, True))

    def _polled(self, rank, call, kind):
        """{(generation, source, word): the value that must come}."""
        generation, share, words = self.generation(call), kind.share(self.world), {}
        for source in self.peers(rank):
            for word in range(self.own(rank, kind) if kind.two_shot else kind.vectors):
                words[generation, source, word] = (call, source, False)
            for word in range(self.own(source, kind) if kind.two_shot else 0):
                words[generation, source, share + word] = (call, source, True)
        return words

    def peers(self, rank):
        return [r for r in range(self.world) if r != rank]

    def own(self, rank, kind):
        share = kind.share(self.world)
        return max(0, min(share, kind.vectors - rank * share))

    # --- steps -------------------------------------------------------------------------------------------------------

    def start(self):
        empty = frozenset()
        states = [State(((0, 0),) * self.world, empty, empty, empty, empty, ())]
        for rank in range(self.world):
            states = [new for state in states for new in self.begin(state, rank)]
        return [new for state in states for new in self.settle(state)]

    def begin(self, state, rank):
        """The states after `rank` has begun its next call, one for each kind of call if it is the first to do so."""
        ended, call = state.calls[rank]
        known = dict(state.kinds)
        for kind in [known[call]] if call in known else self.kinds:
            kinds = {**known, call: kind}
            clears = set()
            if call > 0 and self.rules.advances_epoch:  # epoch 0 clears nothing
                size = kinds.get(call + self.rules.cleared_size, Kind(0)).used(self.world)
                generation = self.generation(call + self.rules.cleared)
                for source in self.peers(rank):
                    clears.update((rank, generation, source, word) for word in range(size))
            watched = self.polled(rank, call, kind)
            for holder, generation, source, word, value in state.words:
                if holder == rank and watched.get((generation, source, word), value) != value:
                    raise Violation(f"call {call} of rank {rank} finds the value of call {value[0]}")
            calls = list(state.calls)
            calls[rank] = (ended, call + 1)
            yield replace(
                state,
                calls=tuple(calls),
                flight=state.flight.union(self.pushed(rank, call, kind)),
                clears=state.clears.union(clears),
                kinds=tuple(sorted(kinds.items(), key=lambda item: item[0])),
            )

    def arrive(self, state, store):
        rank, generation, source, word, value = store
        place = store[:4]
        for other in state.words:
            if other[:4] == place:
                raise Violation(f"{store} lands on {other[4]}, which rank {rank} has not cleared")
        if place in state.clears:
            raise Violation(f"{store} lands on a word that rank {rank} is about to clear")
        ended, begun = state.calls[rank]
        known = dict(state.kinds)
        for call in range(ended, begun):
            if self.polled(rank, call, known[call]).get((generation, source, word), value) != value:
                raise Violation(f"call {call} of rank {rank} finds the value of call {value[0]}")
        return replace(state, words=state.words | {store}, flight=state.flight - {store})

    def clear(self, state, rank):
        due = {place for place in state.clears if place[0] == rank}
        kept = set()
        for stored in state.words:
            if stored[:4] not in due:
                kept.add(stored)
            elif stored[4][0] >= state.calls[rank][0]:
                raise Violation(f"rank {rank} clears {stored} before it has used it")
        return replace(state, words=frozenset(kept), clears=state.clears - due)

    def settle(self, state):
        """Send the sums and end the calls that nothing holds back; the states in which all ranks wait."""
        known = dict(state.kinds)
        for rank in range(self.world):
            ended, begun = state.calls[rank]
            here = {place[1:4] for place in state.words if place[0] == rank}
            for call in range(ended, begun):
                kind = known[call]
                if kind.two_shot:
                    for word in range(self.own(rank, kind)):
                        if (rank, call, word) in state.sent:
                            continue
                        sources = self.peers(rank) if self.rules.sums_all_partials else self.peers(rank)[:-1]
                        if all((self.generation(call), source, word) in here for source in sources):
                            if any((self.generation(call), s, word) not in here for s in self.peers(rank)):
                                raise Violation(f"rank {rank} sums a partial that has not come")
                            flight = state.flight.union(self.sums(rank, call, kind, word))
                            sent = state.sent | {(rank, call, word)}
                            yield from self.settle(replace(state, flight=flight, sent=sent))
                            return
            if begun > ended and self.may_end(state, rank, ended, known[ended], here):
                calls = list(state.calls)
                calls[rank] = (ended + 1, begun)
                sent = frozenset(s for s in state.sent if s[:2] != (rank, ended))
                after = replace(state, calls=tuple(calls), sent=sent)
                begins = self.begin(after, rank) if begun == ended + 1 else [after]
                for new in begins:
                    yield from self.settle(new)
                return
        yield self.renumbered(state)

    def may_end(self, state, rank, call, kind, here):
        if self.rules.ends_after_clears and any(place[0] == rank for place in state.clears):
            return False
        last = kind.used(self.world) - 1
        for place in self.polled(rank, call, kind):
            if place not in here and (self.rules.polls_every_word or place[2] != last or last == 0):
                return False
        return all((rank, call, w) in state.sent for w in range(self.own(rank, kind) if kind.two_shot else 0))

    def successors(self, state):
        urgent = self.urgent(state) if self.reduced else None
        for store in [urgent] if urgent else state.flight:
            yield from self.settle(self.arrive(state, store))
        if urgent:
            return
        for rank in {place[0] for place in state.clears}:
            yield from self.settle(self.clear(state, rank))
        if not self.rules.ends_after_polls:
            for rank, (ended, begun) in enumerate(state.calls):
                if begun == ended + 1:
                    for new in self.begin(state, rank):
                        yield from self.settle(new)

    def urgent(self, state):
        """A store that the holder's present call waits for and whose word it is not about to clear. The holder takes no
        step before it arrives, and no other store goes to that word unless a violation is found anyway when it lands:
        so nothing is lost if it arrives next."""
        known = dict(state.kinds)
        for store in state.flight:
            ended, _ = state.calls[store[0]]
            waited_for = store[4][0] == ended and store[1:4] in self.polled(store[0], ended, known[ended])
            if waited_for and store[:4] not in state.clears:
                return store
        return None

    def renumbered(self, state):
        slowest = min(ended for ended, _ in state.calls)
        kept = slowest + min(-1, self.rules.cleared_size)  # sizes that a clear may still ask for
        g = self.rules.generations
        by = max(0, (slowest - g) // g * g)  # call 0 is special: it clears nothing
        if by == 0 and (not state.kinds or state.kinds[0][0] >= kept):
            return state

        def stores(of):
            return frozenset((*s[:4], (s[4][0] - by, *s[4][1:])) for s in of)

        return State(
            tuple((ended - by, begun - by) for ended, begun in state.calls),
            stores(state.words),
            stores(state.flight),
            state.clears,
            frozenset((rank, call - by, word) for rank, call, word in state.sent),
            tuple((call - by, kind) for call, kind in state.kinds if call >= kept),
        )

    def explore(self, limit=2_000_000):
        """All reachable states. Raises Violation, also for a state that nothing leaves. If there is none, every call of
        every rank ends: a call has finitely many steps, and in a finite graph no rank gets ahead without end."""
        seen = set(self.start())
        todo = list(seen)
        while todo:
            state = todo.pop()
            alone = True
            for new in self.successors(state):
                alone = False
                if new not in seen:
                    seen.add(new)
                    todo.append(new)
            if alone:
                raise Violation(f"deadlock: {state.calls}")
            if len(seen) > limit:
                raise RuntimeError(f"more than {limit} states")
        return seen
