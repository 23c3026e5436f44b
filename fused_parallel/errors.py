"""Exceptions of the library. Bad input raises ValueError or TypeError; these are for what only a run can show."""


class PeerTimeoutError(RuntimeError):
    """A rank of the group died or did not answer within the timeout; the message names the operation and the ranks."""


class NoFusedKernelError(RuntimeError):
    """`fp.use("fused")` is in force and this call has no fused implementation; the message says why."""


class MessageMismatchError(ValueError):
    """A message came whose shapes, dtypes or keys are not those that `P2PChannel.recv(spec)` was given; the message
    prints both."""
