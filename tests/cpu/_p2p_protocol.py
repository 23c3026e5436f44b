"""A model of one direction of the channel of csrc/p2p.cu, small enough to visit every state.

Two ends run: the sender goes through a list of messages, the receiver waits for each, reads it and releases it. What
the model takes for granted of the hardware, and nothing else:

- A store to the other end arrives at any time after it was issued; two stores arrive in any order, but a release store
  after all that its thread, or its CTA before the barrier, issued before it.
- A fence returns when the stores before it have arrived.
- The reads of a kernel are over before the next kernel of its stream begins. (Stream order.)
- A copy queued on a stream runs whatever the kernel before it found out.

A time-out may expire at any moment of a run in which an end may die: whether the other end is dead, stopped for a while
or merely slow. What must hold in every state: a message that is released, by an end that has not failed, was read as it
was sent; and in a state that nothing leaves, each end that lives has done all its messages or has failed.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Violation(Exception):
    """Something the protocol promises does not hold in a reachable state."""


class Message(NamedTuple):
    """Pushed by `parts` CTAs of one word each, or copied (one word, announced by a kernel after it)."""

    parts: int = 1
    copied: bool = False


@dataclass(frozen=True)
class Rules:
    """The protocol, and each way to get it wrong."""

    waits_for_credit: bool = True
    credit_lacks: int = 0  # sends although so many earlier messages of the slot have not been released
    flag_after_data: bool = True  # False: the flag may arrive before the data
    flag_of_each_part: bool = True  # False: part 0's flag stands for all
    flags_count: bool = True  # False: a flag says that a message is there, not which
    credit_after_reads: bool = True
    tells_failure: bool = True  # False: a copy follows a failed wait, and the receiver does not hear of it
    failure_before_copy: bool = True  # False: the copy may overtake that news
    release_asks: bool = True  # False: the release does not look whether the sender has failed


class State(NamedTuple):
    sent: int  # message that the sender is at
    parts: tuple  # of that message, per part: 0 waits for the credit, 1 has stored its word, 2 has set its flag
    sender: str  # "runs", "failed" or "dead"
    taken: int  # message that the receiver is at
    stage: str  # of that: "waits", "reads", "read"
    unread: frozenset  # words of it still to be read
    wrong: bool  # one of those read was not the message's
    receiver: str
    words: tuple  # per slot and part: (message whose word stands there or None, flag)
    credits: tuple  # per slot, at the sender
    flight: frozenset  # stores on their way: (what, place, value, those that must arrive before)
    told: tuple  # (the receiver knows that the sender failed, the reverse)


class Model:
    def __init__(self, slots, messages, rules=None, dies=None):
        self.slots, self.messages, self.rules, self.dies = slots, tuple(messages), rules or Rules(), dies
        self.most = max(m.parts for m in messages)
        self.ends = set()  # (sender, receiver, messages released) of the states that nothing leaves

    def start(self):
        words = ((None, 0),) * (self.slots * self.most)
        first = (0,) * self.messages[0].parts
        return State(
            0,
            first,
            "runs",
            0,
            "waits",
            frozenset(),
            False,
            "runs",
            words,
            (0,) * self.slots,
            frozenset(),
            (False,) * 2,
        )

    def number(self, message):
        return message // self.slots

    def place(self, message, part):
        return message % self.slots * self.most + part

    def flag(self, message):
        return self.number(message) + 1 if self.rules.flags_count else 1

    # --- steps --------------------------------------------------------------------------------------------------------

    def successors(self, s):
        yield from self.arrivals(s)
        yield from self.sender_steps(s)
        yield from self.receiver_steps(s)
        if self.dies == "sender" and s.sender != "dead":
            yield s._replace(sender="dead")
        if self.dies == "receiver" and s.receiver != "dead":
            yield s._replace(receiver="dead")
        if s.flight and "dead" in (s.sender, s.receiver):
            yield s._replace(flight=frozenset())  # what a dead end had on its way may be lost

    def arrivals(self, s):
        for store in s.flight:
            what, place, value, after = store
            if any((other[0], other[1], other[2]) in after for other in s.flight):
                continue
            flight = s.flight - {store}
            if what == "credit":
                credits = (*s.credits[:place], value, *s.credits[place + 1 :])
                yield s._replace(credits=credits, flight=flight)
            elif what == "failed":
                yield s._replace(told=(True, s.told[1]) if place == 0 else (s.told[0], True), flight=flight)
            else:
                word, flag = s.words[place]
                new = (value, flag) if what == "word" else (word, value)
                yield s._replace(words=(*s.words[:place], new, *s.words[place + 1 :]), flight=flight)

    def fail(self, s, who):
        """An end gives up and says so."""
        tells = self.rules.tells_failure or who != "sender"
        news = {("failed", 0 if who == "sender" else 1, True, frozenset())} if tells else set()
        return s._replace(**{who: "failed"}, flight=s.flight | news)

    def sender_steps(self, s):
        if s.sender == "dead" or s.sent == len(self.messages):
            return
        message = self.messages[s.sent]
        if s.sender == "failed":
            # Nothing more is pushed or announced; copies that are queued still run.
            news = any(store[:2] == ("failed", 0) for store in s.flight)
            if message.copied and s.parts == (0,):
                if not (news and self.rules.failure_before_copy):
                    yield self.after_part(self.with_word(s, 0), 0, 2)
            else:
                yield self.next_message(s)
            return
        number, slot = self.number(s.sent), s.sent % self.slots
        for part, step in enumerate(s.parts):
            if step == 0:
                if not self.rules.waits_for_credit or s.credits[slot] >= number - self.rules.credit_lacks:
                    yield self.after_part(self.with_word(s, part), part, 1)
                if self.dies is not None:
                    yield self.fail(s, "sender")
                if s.told[1]:
                    yield self.fail(s, "sender")
            elif step == 1:
                place = self.place(s.sent, part)
                before = frozenset({("word", place, s.sent)}) if self.rules.flag_after_data else frozenset()
                if part == 0 or self.rules.flag_of_each_part:
                    s2 = s._replace(flight=s.flight | {("flag", place, self.flag(s.sent), before)})
                else:
                    s2 = s
                yield self.after_part(s2, part, 2)

    def with_word(self, s, part):
        return s._replace(flight=s.flight | {("word", self.place(s.sent, part), s.sent, frozenset())})

    def after_part(self, s, part, step):
        parts = (*s.parts[:part], step, *s.parts[part + 1 :])
        return self.next_message(s) if all(p == 2 for p in parts) else s._replace(parts=parts)

    def next_message(self, s):
        at = s.sent + 1
        parts = (0,) * self.messages[at].parts if at < len(self.messages) else ()
        return s._replace(sent=at, parts=parts)

    def receiver_steps(self, s):
        if s.receiver != "runs" or s.taken == len(self.messages):
            return
        message, slot = self.messages[s.taken], s.taken % self.slots
        places = [self.place(s.taken, part) for part in range(message.parts)]
        if s.stage == "waits":
            asked = places if self.rules.flag_of_each_part else places[:1]
            if all(s.words[p][1] == self.flag(s.taken) for p in asked):
                s2 = s._replace(stage="reads", unread=frozenset(places), wrong=False)
                yield s2 if self.rules.credit_after_reads else self.with_credit(s2, slot)
            if self.dies is not None or s.told[0]:
                yield self.fail(s, "receiver")
        elif s.stage == "reads":
            for place in s.unread:
                unread = s.unread - {place}
                yield s._replace(
                    unread=unread,
                    wrong=s.wrong or s.words[place][0] != s.taken,
                    stage="reads" if unread else "read",
                )
        elif s.told[0] and self.rules.release_asks:
            yield self.fail(s, "receiver")
        else:
            if s.wrong:
                raise Violation(f"message {s.taken} is released, and was not read as it was sent")
            s2 = s._replace(taken=s.taken + 1, stage="waits")
            yield self.with_credit(s2, slot) if self.rules.credit_after_reads else s2

    def with_credit(self, s, slot):
        number = (s.taken if s.stage != "waits" else s.taken - 1) // self.slots + 1
        return s._replace(flight=s.flight | {("credit", slot, number, frozenset())})

    # --- all states ---------------------------------------------------------------------------------------------------

    def explore(self, limit=2_000_000):
        """All reachable states; raises Violation."""
        first = self.start()
        seen, todo = {first}, [first]
        while todo:
            state = todo.pop()
            alone = True
            for new in self.successors(state):
                alone = False
                if new not in seen:
                    seen.add(new)
                    todo.append(new)
            if alone:
                self.check_end(state)
            if len(seen) > limit:
                raise RuntimeError(f"more than {limit} states")
        return seen

    def check_end(self, s):
        through = len(self.messages)
        if s.sender == "runs" and s.sent < through:
            raise Violation(f"the sender hangs in message {s.sent}")
        if s.receiver == "runs" and s.taken < through:
            raise Violation(f"the receiver hangs in message {s.taken}")
        self.ends.add((s.sender, s.receiver, s.taken))
