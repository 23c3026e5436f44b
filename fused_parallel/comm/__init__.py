"""Groups and mesh, agreed capabilities, timed collectives, launching of local ranks."""

from .collectives import CommunicationTimer
from .groups import finalize, init, resolve_group
from .launch import RankPool, launch
from .p2p import P2PChannel
from .symmetric import symmetric_empty

__all__ = [
    "CommunicationTimer",
    "P2PChannel",
    "RankPool",
    "finalize",
    "init",
    "launch",
    "resolve_group",
    "symmetric_empty",
]
