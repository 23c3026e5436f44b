"""A pipeline over two hosts, which are network namespaces here: the README's example, and what crosses the link."""

import functools
import json
import re
import subprocess
import sys

import pytest
from _two_hosts import ROOT, finish, two_hosts, why_not

PROGRAM = "tests/cpu/_two_hosts_program.py"


@pytest.fixture
def hosts():
    if (reason := reason_now()) is not None:
        pytest.skip(reason)
    with two_hosts() as made:
        yield made


@functools.cache
def reason_now():
    return why_not()


def run_program(hosts, elements: int, messages: int) -> list[dict]:
    what = (PROGRAM, str(elements), str(messages))
    texts = finish([hosts.torchrun(node, 2, *what) for node in range(2)], 120)
    # Two ranks write to one pipe: their lines' ends may come after both lines.
    found = [json.loads(told) for text in texts for told in re.findall(r"told (\{[^{}]*\})", text)]
    assert [len({t["host"] for t in found}), len(found)] == [2, 4], texts
    return sorted(found, key=lambda told: told["rank"])


def test_only_the_payload_crosses_the_link(hosts):
    """Two ranks a host; each sends its half of the hidden states to its partner on the other host, and tokens come
    back. Tensor parallelism, the gather among it, stays inside the host."""
    elements, messages = 1 << 20, 6
    told = run_program(hosts, elements, messages)
    payload = 4 * elements * messages
    # Both ranks of a host read one counter; the later reading is the whole.
    first = max(t["tx"] for t in told if t["stage"] == 0)
    last = max(t["tx"] for t in told if t["stage"] == 1)
    assert payload < first < 1.1 * payload + 200_000, (first, payload)
    assert last < 0.1 * payload + 200_000, last


LINKS = {
    "delay and bandwidth": ("netem", "delay", "20ms", "rate", "200mbit"),
    "bandwidth": ("tbf", "rate", "200mbit", "burst", "128kb", "latency", "400ms"),  # where the kernel has no netem
}


@pytest.mark.parametrize("link", LINKS)
def test_a_slow_link(hosts, link):
    """200 Mbit/s, with 20 ms of delay or without: the messages take the time that the link needs, and not much more."""
    try:
        hosts.limit(*LINKS[link])
    except OSError as error:
        pytest.skip(f"no such link here: {error}")
    elements, messages = 1 << 19, 5
    told = run_program(hosts, elements, messages)
    least = messages * 4 * elements * 8 / 200e6
    seconds = max(t["seconds"] for t in told)
    # A protocol that asks before it sends: some round trips a message, and the payload once.
    assert 0.9 * least < seconds < 1.5 * least + 4.0, (seconds, least)


def readme_command() -> list[str]:
    """The multi-host example of the README: everything behind the addresses."""
    text = (ROOT / "README.md").read_text()
    (command,) = re.findall(r"torchrun --nnodes 2 (?:.|\\\n)*?--max-new-tokens \d+", text)
    words = command.replace("\\\n", " ").split()
    assert words[words.index("--nproc-per-node") + 1] == "2"
    return words[words.index("-m") :]


def test_the_readme_runs_as_written(hosts):
    """The same text as one process gives."""
    what = " ".join(readme_command())
    arguments = re.findall(r'"[^"]*"|\S+', what)
    arguments = [a.strip('"') for a in arguments]
    texts = finish([hosts.torchrun(node, 2, *arguments) for node in range(2)], 240)
    alone = [a for a in arguments if a not in ("--tp", "--pp")]
    for size in re.findall(r"--[tp]p (\d+)", what):
        alone.remove(size)
    done = subprocess.run([sys.executable, *alone], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    expected = done.stdout.strip()
    assert len(expected) > 40 and expected in texts[0], (expected, texts[0])
