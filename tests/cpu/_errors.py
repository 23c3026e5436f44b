"""For tests of bad input on ranks, where pytest.raises would tell the wrong process."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def errors_of(calls: Iterable[Callable]) -> list[str]:
    """What each call raises, as "ValueError: text" or "TypeError: text"; "no error" where it returns."""
    messages = []
    for call in calls:
        try:
            call()
            messages.append("no error")
        except (TypeError, ValueError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def assert_starts(messages: list[str], expected: list[str]) -> None:
    """Each message begins with the expected text at its place."""
    for message, start in zip(messages, expected, strict=True):
        assert message.startswith(start), message
