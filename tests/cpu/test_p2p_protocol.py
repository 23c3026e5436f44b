"""The credit protocol of csrc/p2p.cu as a model on the host: every order of events, one to three slots, either end
stopping at every step. What the model assumes is said in _p2p_protocol.py."""

from itertools import permutations

import pytest
from _p2p_protocol import Message, Model, Rules, Violation

ONE, TWO, COPY = Message(), Message(parts=2), Message(copied=True)

STREAMS = {
    "pushes": (ONE,) * 5,
    "parts": (TWO, ONE, TWO, TWO),
    "copies": (COPY,) * 5,
    "mixed": (TWO, COPY, ONE, COPY, TWO),
}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_every_message_arrives_as_it_was_sent(slots, stream):
    model = Model(slots, STREAMS[stream])
    states = model.explore()
    assert model.ends == {("runs", "runs", len(STREAMS[stream]))}
    # The ring is used: the sender gets as far ahead as it has slots, and no further.
    assert max(s.sent - s.taken for s in states) == min(slots, len(STREAMS[stream]))


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("dies", ["sender", "receiver"])
def test_the_other_end_ends_and_is_not_misled(dies, slots, stream):
    """explore() raises if an end hangs that lives, or releases a message that it did not read as sent."""
    model = Model(slots, STREAMS[stream], dies=dies)
    model.explore()
    other = "receiver" if dies == "sender" else "sender"
    index = ("sender", "receiver").index(other)
    assert any(end[index] == "failed" for end in model.ends)
    assert any(end[1 - index] == "dead" for end in model.ends)
    # At every message: what came before is delivered.
    assert {taken for _, _, taken in model.ends} == set(range(len(STREAMS[stream]) + 1))


WRONG = {
    "sends without a credit": (Rules(waits_for_credit=False), None),
    "a credit too many": (Rules(credit_lacks=1), None),
    "the flag overtakes the data": (Rules(flag_after_data=False), None),
    "one flag for all parts": (Rules(flag_of_each_part=False), None),
    "flags that do not count": (Rules(flags_count=False), None),
    "the credit leaves before the reads are over": (Rules(credit_after_reads=False), None),
    "a copy after a failed wait, unannounced": (Rules(tells_failure=False), "receiver"),
    "the copy overtakes the news of the failure": (Rules(failure_before_copy=False), "receiver"),
    "the release does not ask whether the sender failed": (Rules(release_asks=False), "receiver"),
}


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_protocol_is_found_out(wrong, slots):
    rules, dies = WRONG[wrong]
    stream = (COPY,) * 4 if dies else (TWO,) * 4
    with pytest.raises(Violation):
        Model(slots, stream, rules, dies).explore()


def test_pushes_need_no_news_of_a_failure():
    """A push stops with its wait, so only copies and kernels that fill a slot themselves can overwrite a message."""
    for rules in (Rules(tells_failure=False), Rules(release_asks=False)):
        Model(2, (TWO,) * 4, rules, "receiver").explore()


# --- the number of a message in its slot ------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", range(1, 6))
def test_all_ctas_find_the_number_of_their_message(parts):
    """CTA 0 adds what is left to 64, the others 1: as arrivals_of_cta in csrc/common/lamport.cuh."""
    for message in (0, 1, 5, (1 << 58) - 2):
        for order in permutations(range(parts)):
            counter, found = 64 * message, []
            for cta in order:
                found.append(counter // 64)
                counter += 64 - (parts - 1) if cta == 0 else 1
            assert found == [message] * parts and counter == 64 * (message + 1) < 1 << 64
