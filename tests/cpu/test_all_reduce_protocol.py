"""The exchange of csrc/common/lamport.cuh as a model on the host: every order of events, two and three ranks, streams
of calls without end. What the model assumes is said in _protocol.py and _protocol_failures.py."""

from itertools import permutations

import pytest
from _protocol import Kind, Model, Rules, Violation
from _protocol_failures import Failures

ONE, SHORT, TWO, UNEVEN = Kind(1), Kind(2), Kind(1, two_shot=True), Kind(3, two_shot=True)


@pytest.mark.parametrize(
    "world, kinds, reduced",
    [
        (2, (ONE, SHORT, TWO, UNEVEN), False),
        (2, (ONE, SHORT, TWO, UNEVEN), True),
        (3, (ONE, TWO), False),
        (3, (ONE, SHORT, TWO, UNEVEN), True),  # 95 000 states
    ],
)
def test_every_call_gets_its_own_values_and_ends(world, kinds, reduced):
    states = Model(world, kinds, reduced=reduced).explore()
    ahead = {max(ended for ended, _ in s.calls) - min(ended for ended, _ in s.calls) for s in states}
    assert ahead == {0, 1}  # the reason why three generations suffice
    used = {kind for state in states for _, kind in state.kinds}
    assert used == set(kinds)


WRONG = {
    "two generations": Rules(generations=2),
    "clears the generation it receives": Rules(cleared=0),
    "clears the next call's generation, just before its use": Rules(cleared=1),
    "clears as much as this call uses": Rules(cleared_size=0),
    "clears as much as the call before the last one used": Rules(cleared_size=-2),
    "the next call pushes before the clears are performed": Rules(ends_after_clears=False),
    "the next call clears while this one polls": Rules(ends_after_polls=False),
    "the last word is not polled": Rules(polls_every_word=False),
    "the epoch stays": Rules(advances_epoch=False),
    "a sum leaves before all partials have come": Rules(sums_all_partials=False),
}


@pytest.mark.parametrize("world, reduced", [(2, False), (2, True), (3, True)])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_protocol_is_found_out(wrong, world, reduced):
    with pytest.raises(Violation):
        Model(world, (ONE, SHORT, UNEVEN), WRONG[wrong], reduced).explore()


def test_a_fourth_generation_does_no_harm():
    Model(2, (ONE, SHORT), Rules(generations=4)).explore()


# --- a rank that stops ------------------------------------------------------------------------------------------------

STREAMS = {
    "one-shot": (ONE,) * 5,
    "two-shot": (TWO,) * 5,
    "uneven shares": (UNEVEN,) * 3,
    "mixed": (ONE, Kind(2, two_shot=True), ONE, TWO, SHORT),
}
WAYS = [(world, stops) for world in (2, 3) for stops in range(world)]


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("world, stops", WAYS)
@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.parametrize("after", ["silent", "asks"])
def test_every_rank_ends_and_none_is_misled(after, resumes, world, stops, stream):
    """explore() raises if a rank hangs, or if one whose record is empty can read a wrong value."""
    states = Failures(world, STREAMS[stream], stops, resumes, after).explore()
    others = [rank for rank in range(world) if rank != stops]
    assert any(all(state.failed[rank] is not None for rank in others) for state in states)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("world, stops", WAYS)
@pytest.mark.parametrize("resumes", [False, True])
def test_ranks_that_ask_each_other_name_the_one_that_stopped(resumes, world, stops, stream):
    model = Failures(world, STREAMS[stream], stops, resumes, "asks")
    model.explore()
    assert {named for _, named in model.records} == {stops}


def test_two_ranks_name_each_other_and_silence_suffices():
    for stops in (0, 1):
        model = Failures(2, STREAMS["mixed"], stops)
        model.explore()
        assert model.records == {(1 - stops, stops)}


def test_three_silent_ranks_may_name_one_that_waits_itself():
    """What asking is for. One-shot: the last words of rank 1 reached rank 2 and not rank 0, which therefore is a call
    behind, and the first that rank 2 misses. Two-shot: a rank misses the sum of one that misses rank 1's partial."""
    for stream, mistaken in (("one-shot", (2, 0)), ("two-shot", (2, 0)), ("uneven shares", (0, 2))):
        model = Failures(3, STREAMS[stream], stops=1)
        model.explore()
        assert mistaken in model.records


@pytest.mark.parametrize("world, stops, resumes, stream", [(2, 1, True, "one-shot"), (3, 1, False, "uneven shares")])
def test_a_rank_that_goes_on_after_a_failure_misleads_the_others(world, stops, resumes, stream):
    """Its later words overwrite the generation that a slower rank has yet to read; its sum lacks a partial."""
    with pytest.raises(Violation):
        Failures(world, STREAMS[stream], stops, resumes, "goes_on").explore()


# --- the call's number ------------------------------------------------------------------------------------------------


def numbers(ctas, before, per_call, order):
    """What begin_call gives the CTAs that arrive in `order`, and the counter afterwards."""
    given, counter = [], before
    for cta in order:
        given.append(counter // per_call)
        counter += per_call - (ctas - 1) if cta == 0 else 1
    return given, counter


@pytest.mark.parametrize("ctas", range(1, 6))
def test_all_ctas_find_the_number_of_their_call(ctas):
    """Whatever grid a call has, the counter stands at calls * per_call when it ends, so one call at a time covers all
    sequences of grids. 2**44 calls fit a 64-bit counter."""
    for per_call in (8, 1 << 20):
        for call in (0, 1, 2, 7, (1 << 64) // per_call - 2):
            for order in permutations(range(ctas)):
                given, counter = numbers(ctas, call * per_call, per_call, order)
                assert given == [call] * ctas
                assert counter == (call + 1) * per_call < 1 << 64


def test_arrivals_per_call_must_not_be_fewer_than_ctas():
    given = [numbers(5, 2 * 4, 4, order)[0] for order in permutations(range(5))]
    assert any(found != [2] * 5 for found in given)
