"""The machines a plan is made for: presets, YAML or JSON descriptions, and profiles of `fused-parallel probe`."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .._version import __version__
from ..comm.probe import load_profile, probe
from .hardware import GPU, GPUS, LINKS, OURS_NVLINK4, Link

# Whose kernels: this library's, or plain torch's and NCCL's.
OURS, NCCL = "ours", "nccl"


def _check_count(value: object, key: str, where: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{where}: {key} must be a positive integer, got {value!r}")


def _check_islands(islands: object, gpus: int, where: str) -> None:
    lists = isinstance(islands, (list, tuple)) and all(isinstance(i, (list, tuple)) and i for i in islands)
    if not lists or not islands or len({len(island) for island in islands}) > 1:
        raise ValueError(
            f"{where}: islands must be lists of equally many of a host's GPUs, such as [[0, 1], [2, 3]], got "
            f"{islands!r}"
        )
    members = [gpu for island in islands for gpu in island]
    if any(not isinstance(g, int) or isinstance(g, bool) for g in members) or sorted(members) != list(range(gpus)):
        raise ValueError(f"{where}: islands must hold each GPU of a host, 0 to {gpus - 1}, once, got {islands!r}")


@dataclass(frozen=True)
class EagerLayer:
    """What a host takes to queue a layer's prefill kernel by kernel, microseconds: of a prompt's first chunk and of a
    later one; the same in a tensor-parallel group (None: not measured, taken to be alike)."""

    first: float
    later: float
    tp_first: float | None = None
    tp_later: float | None = None


@dataclass(frozen=True)
class Cluster:
    """`hosts` equal hosts of `gpus_per_host` GPUs.

    intra joins the GPUs of a host; inter joins hosts by `nics` adapters a host (None on one host). islands: where intra
    joins only some of a host's GPUs, which those are ((0, 1), (2, 3)), and `between` what joins the islands.
    `host_memory_gb` bounds what offload may keep in host memory (None: not checked). `layer_us` is the time of
    everything in a layer besides its matmuls, KV reads and communication (None: the backend's measured constant,
    cost.layer_us), `eager_layer_us` what the host takes to queue a layer's kernels one by one (a number: always;
    None: measured.EAGER_LAYER_US).
    ours: this library's kernels within an island (None: not measured on such a link); backend: whose costs count."""

    name: str
    gpu: GPU
    gpus_per_host: int
    intra: Link
    hosts: int = 1
    inter: Link | None = None
    nics: int = 1
    host_memory_gb: float | None = None
    layer_us: float | None = None
    eager_layer_us: float | EagerLayer | None = None
    islands: tuple[tuple[int, ...], ...] = ()
    between: Link | None = None
    ours: Link | None = None
    backend: str = NCCL

    def __post_init__(self) -> None:
        where = f"cluster {self.name!r}"
        for name in ("hosts", "gpus_per_host", "nics"):
            _check_count(getattr(self, name), name, where)
        if self.hosts > 1 and self.inter is None:
            raise ValueError(f"{where}: {self.hosts} hosts need an inter link; known: {', '.join(LINKS)}")
        if self.islands:
            _check_islands(self.islands, self.gpus_per_host, where)
        if (self.between is None) != (len(self.islands) < 2):
            raise ValueError(f"{where}: islands and between, the link that joins them, belong together")
        if self.backend == OURS and self.ours is None:
            raise ValueError(
                f"{where}: there are no costs of this library's kernels on {self.intra.name}, which were measured on "
                "NVLink between Hopper GPUs; a profile of `fused-parallel probe` has them where they run"
            )

    @property
    def island(self) -> int:
        """GPUs that intra joins."""
        return len(self.islands[0]) if self.islands else self.gpus_per_host

    def of(self, backend: str) -> Cluster:
        """The same machines by the costs of "ours" or "nccl". ValueError where there are none."""
        return dataclasses.replace(self, backend=backend)

    def link(self, ranks: int) -> Link:
        """What joins `ranks` GPUs of an island by the backend; groups over several are NCCL's."""
        return self.ours if self.backend == OURS and ranks <= self.island else self.intra

    @property
    def gpus(self) -> int:
        """All GPUs."""
        return self.hosts * self.gpus_per_host


def _ours(gpu: GPU, intra: Link) -> Link | None:
    """This library's kernels where they were measured: NVLink 4 between Hopper GPUs."""
    return OURS_NVLINK4 if gpu.name in ("h100", "h200") and intra.name.startswith("nvlink4") else None


def _preset(
    name: str, gpu: str, per_host: int, intra: str, hosts: int = 1, inter: str | None = None, nics: int = 1, **more
):
    link = LINKS[inter] if inter else None
    ours = _ours(GPUS[gpu], LINKS[intra])
    return Cluster(name, GPUS[gpu], per_host, LINKS[intra], hosts, link, nics, ours=ours, **more)


_PAIRS = {"islands": ((0, 1), (2, 3)), "between": LINKS["pcie4-no-peer"]}


CLUSTERS = {
    cluster.name: cluster
    for cluster in (
        _preset("1xh200", "h200", 1, "nvlink4"),
        _preset("1xh100", "h100", 1, "nvlink4"),
        _preset("2xh200", "h200", 2, "nvlink4-measured-pair"),
        _preset("2xh100", "h100", 2, "nvlink4-measured-h100"),
        _preset("8xa100", "a100", 8, "nvlink3"),
        _preset("8xh100", "h100", 8, "nvlink4"),
        _preset("8xh200", "h200", 8, "nvlink4"),
        _preset("8xb200", "b200", 8, "nvlink5"),
        _preset("4x8xh100-ndr", "h100", 8, "nvlink4", 4, "ib-ndr", 8),
        _preset("128x8xh100-ndr", "h100", 8, "nvlink4", 128, "ib-ndr", 8),
        _preset("2x8xh100-eth100", "h100", 8, "nvlink4", 2, "eth100"),
        _preset("8xl40s", "l40s", 8, "pcie4"),
        _preset("8xrtxpro6000", "rtxpro6000", 8, "pcie5"),
        _preset("1xl4", "l4", 1, "pcie4"),
        _preset("1xrtx4090", "rtx4090", 1, "pcie4-no-peer"),
        _preset("4xrtx4090", "rtx4090", 4, "pcie4-no-peer"),
        _preset("2xrtx3090-nvlink", "rtx3090", 2, "nvlink-bridge"),
        _preset("4xrtx3090-nvlink", "rtx3090", 4, "nvlink-bridge", **_PAIRS),
    )
}

_STALE_DAYS = 365  # after which a profile's figures are told to be old
_RATES = ("host_memory_gb", "layer_us", "eager_layer_us")
_KEYS = ("name", "hosts", "gpus_per_host", "gpu", "intra", "inter", "nics", *_RATES)
_KEYS += ("islands", "between")


def load_cluster(source: str | Path | dict | Cluster) -> Cluster:
    """A cluster from a preset's name, "this" (a quick probe of this machine now), a description (a dictionary, or a
    .json, .yaml or .yml file of one) or a profile that `fused-parallel probe --out` wrote.

    A description has the keys hosts, gpus_per_host, gpu, intra and, with several hosts, inter and nics, with several
    islands in a host, islands and between; gpu, intra, inter and between are names of presets, or mappings of {preset:
    name} and the fields to change. Raises ValueError that names
    the file (of YAML the line, too), the key and the value; ImportError for YAML without pyyaml.
    """
    if isinstance(source, Cluster):
        return source
    if isinstance(source, dict):
        return _describe(source, "cluster", {})
    if str(source) == "this":
        return from_profile(probe(quick=True), "this")
    if str(source) in CLUSTERS:
        return CLUSTERS[str(source)]
    path = Path(source)
    if not path.is_file():
        raise ValueError(
            f"cluster {str(source)!r} is neither 'this', a file nor a preset; presets: {', '.join(CLUSTERS)}"
        )
    lines: dict[tuple[str, ...], int] = {}
    if path.suffix in (".yaml", ".yml"):
        content, lines = _yaml(path)
    else:
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); name YAML files *.yaml") from error
    if isinstance(content, dict) and "schema_version" in content:
        return _of_profile(path)
    return _describe(content, str(path), lines)


def _of_profile(path: Path) -> Cluster:
    """from_profile of a file, with a warning where it is of another version of this library or a year old."""
    again = f"write it again: fused-parallel probe --out {path}"
    profile = load_profile(path)
    try:
        cluster = from_profile(profile, path.stem)
        version = profile["versions"]["fused_parallel"]
        days = (datetime.date.today() - datetime.date.fromisoformat(profile["date"][:10])).days
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no whole probe profile ({type(error).__name__}: {error}); {again}") from error
    if version != __version__ or days > _STALE_DAYS:
        about = f"by fused_parallel {version} (this is {__version__}) {days} days ago"
        warnings.warn(f"{path} was measured {about}: if the machine or its software has changed, {again}", stacklevel=2)
    return cluster


def _yaml(path: Path) -> tuple[object, dict[tuple[str, ...], int]]:
    """(content, the line of each key, which is the path to it)."""
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"{path}: reading YAML needs the package pyyaml; install it or write JSON") from error
    try:
        text = path.read_text()
        content, lines = yaml.safe_load(text), {}
        waiting = [((), yaml.compose(text, Loader=yaml.SafeLoader))]
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {error}") from error
    while waiting:
        above, node = waiting.pop()
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            name, line = (*above, str(key.value)), key.start_mark.line + 1
            if name in lines:  # of which YAML would silently take the last
                raise ValueError(f"{path}:{line}: the key {'.'.join(name)} stands on line {lines[name]} already")
            lines[name] = line
            waiting.append((name, value))
    return content, lines


def _describe(content: object, file: str, lines: dict[tuple[str, ...], int]) -> Cluster:
    def at(*key: str) -> str:
        """The file, and where it is known the line of a key (or of what it is in)."""
        found = lines.get(key) or lines.get(key[:1])
        return f"{file}:{found}" if found else file

    where = file
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected a mapping with the keys {', '.join(_KEYS)}, got {content!r}")
    unknown = [str(key) for key in content if key not in _KEYS]
    if unknown:
        raise ValueError(f"{at(unknown[0])}: unknown keys {', '.join(unknown)}; known: {', '.join(_KEYS)}")
    given = dict(content)
    for key in ("gpu", "gpus_per_host"):
        if key not in given:
            raise ValueError(f"{where}: the key {key} is missing")
    given["gpu"] = _part(given["gpu"], GPUS, "gpu", at)
    if given["gpus_per_host"] != 1 and "intra" not in given:
        raise ValueError(f"{where}: the key intra is missing, the link between the {given['gpus_per_host']} GPUs")
    given["intra"] = _part(given.get("intra", "pcie4"), LINKS, "intra", at)
    if given.get("inter") is not None:
        if given.get("hosts", 1) == 1:
            raise ValueError(f"{at('inter')}: inter is given, the link between hosts, but hosts is 1")
        given["inter"] = _part(given["inter"], LINKS, "inter", at)
    elif given.get("nics") is not None and given.get("hosts", 1) == 1:
        raise ValueError(f"{at('nics')}: nics is given, the adapters between hosts, but hosts is 1")
    _describe_islands(given, at)
    for key in _RATES:
        value = given.get(key)
        if value is not None and not _is_rate(value):
            raise ValueError(f"{at(key)}: {key} must be a number of at least 0, got {value!r}")
    for key in ("hosts", "gpus_per_host", "nics"):
        _check_count(given.get(key, 1), key, at(key))
    if given.get("hosts", 1) > 1 and given.get("inter") is None:
        raise ValueError(f"{at('hosts')}: {given['hosts']} hosts need an inter link; known: {', '.join(LINKS)}")
    given.setdefault("name", Path(where).stem)
    return Cluster(**given, ours=_ours(given["gpu"], given["intra"]))


def _describe_islands(given: dict, at: Callable[..., str]) -> None:
    """Check and replace the keys islands and between."""
    gpus = given["gpus_per_host"]
    if given.get("islands") is not None:
        _check_count(gpus, "gpus_per_host", at("gpus_per_host"))
        _check_islands(given["islands"], gpus, at("islands"))
        given["islands"] = tuple(map(tuple, given["islands"]))
        if len(given["islands"]) > 1 and given.get("between") is None:
            raise ValueError(f"{at('islands')}: the key between is missing, the link between the islands of a host")
    if given.get("between") is not None:
        if len(given.get("islands") or ()) < 2:
            raise ValueError(f"{at('between')}: between is given, the link between islands, but islands names no two")
        given["between"] = _part(given["between"], LINKS, "between", at)
    for key in ("islands", "between"):
        if given.get(key, 0) is None:
            del given[key]


def _part(value: object, presets: dict, part: str, at: Callable[..., str]):
    """A preset by name, or a preset with some fields changed; `at(key, ...)` tells where a key stands."""
    changes = {}
    if isinstance(value, dict):
        changes = {key: v for key, v in value.items() if key != "preset"}
        value = value.get("preset")
    if not isinstance(value, str) or value not in presets:
        raise ValueError(f"{at(part)}: {part} {value!r} is unknown; known: {', '.join(presets)}")
    preset = presets[value]
    fields = {f.name: getattr(preset, f.name) for f in dataclasses.fields(preset)}
    for key, v in changes.items():
        if key not in fields or key in ("name", "table", "behind"):  # by the name its kernels' costs are found
            known = ", ".join(f for f in fields if f not in ("name", "table", "behind"))
            raise ValueError(f"{at(part, key)}: {part}: unknown key {key}; known: {known}")
        divides = key.endswith(("_gb_s", "_tflops", "_gb", "_share"))
        if v is None and key == "fp8_tflops":
            continue
        if not _is_rate(v) or (divides and v == 0):
            least = "above 0" if divides else "of at least 0"
            raise ValueError(f"{at(part, key)}: {part}: {key} must be a number {least}, got {v!r}")
    return dataclasses.replace(preset, **changes)


def _is_rate(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def from_profile(profile: dict, name: str) -> Cluster:
    """The machine that a probe profile describes: its measured memory, matmul, host and all-reduce figures in place of
    the datasheet's. Raises ValueError for a machine without GPUs, with different ones, or with one unknown here."""
    found = profile["topology"]["gpus"]
    if not found or not profile["gpus"]:
        raise ValueError(f"cluster {name!r}: the probe found no GPU; plan for a preset instead: {', '.join(CLUSTERS)}")
    models = sorted({gpu["name"] for gpu in found})
    if len(models) > 1:
        raise ValueError(f"cluster {name!r}: its GPUs differ ({', '.join(models)}); the planner needs equal ones")
    words = re.findall("[a-z0-9]+", models[0].lower())  # "rtx", "4090"; an L40 is no L4
    spelt = {"".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
    known = [key for key in GPUS if key in spelt]
    if not known:
        raise ValueError(f"cluster {name!r}: GPU {models[0]!r} is unknown; known: {', '.join(GPUS)}")
    gpu = GPUS[max(known, key=len)]
    changes: dict[str, float] = {"memory_gb": min(g["memory_bytes"] for g in found) / 1e9}
    if rates := profile["host_device"]:
        changes["host_gb_s"] = rates[-1]["to_device_gb_per_s_each"]  # the last entry is all GPUs at once
    matmuls = profile["gpus"][0]["matmul"]
    if matmuls:
        changes["compute_share"] = max(m["tflop_per_s"] for m in matmuls) / gpu.bf16_tflops
    one = [m for m in matmuls if m["m"] == 1]
    if one:
        m = max(one, key=lambda m: m["k"] * m["n"])
        reading = m["us"] - gpu.matmul_start_us
        if reading > 0:
            changes["memory_share"] = min(1.0, m["k"] * m["n"] * 2 / reading / 1e3 / gpu.hbm_gb_s)
    memory = profile["host"]["memory_bytes"] / 1e9
    links = _profile_links(profile, found)
    queueing = profile["host"].get("eager_layer_us")
    if by_chunk := profile["host"].get("eager_layer_us_of"):  # profiles from before have the one number
        queueing = EagerLayer(*(by_chunk.get(field.name) for field in dataclasses.fields(EagerLayer)))
    host = {"host_memory_gb": memory, "eager_layer_us": queueing}
    return Cluster(name, dataclasses.replace(gpu, **changes), len(found), **host, **links)


def _profile_links(profile: dict, found: list[dict]) -> dict[str, object]:
    """intra, ours and, where NVLink joins only some of the GPUs, islands and between: the presets that fit the topology
    best, with the all-reduces and messages that were measured."""
    pairs = profile["topology"]["pairs"]
    generation = found[0].get("pcie_generation") or 4
    pcie = f"pcie{min(5, max(3, generation))}"
    if pairs and not all(pair["peer_access"] for pair in pairs if not pair["link"].startswith("NV")):
        pcie += "-no-peer"
    joined = [{pair["a"], pair["b"]} for pair in pairs if pair["link"].startswith("NV")]
    islands = _islands(joined, [gpu["index"] for gpu in found])
    if not joined or len({len(i) for i in islands}) > 1:  # none, or unequal ones: what joins all of them
        name, islands, within = pcie, (), len(found)
    else:
        major = (found[0].get("compute_capability") or [9])[0]
        name = {8: "nvlink3", 9: "nvlink4"}.get(major, "nvlink5")
        within = len(islands[0])
        islands = islands if len(islands) > 1 else ()
    nccl = _profile_table(profile, "nccl", "all_reduce")
    # n ranks were measured on GPUs 0 to n - 1, which need not be of one island.
    together = max(n for n in range(1, within + 1) if not islands or set(range(n)) <= set(islands[0]))
    table = {n: points for n, points in nccl.items() if n <= together}
    # Messages are between the first two of them.
    sends = _profile_sends(profile)
    within_island, between = (sends, {}) if together > 1 else ({}, sends)
    intra = dataclasses.replace(LINKS[name], name=f"{name}, probed" if table else name, table=table, **within_island)
    links: dict[str, object] = {"intra": intra, "ours": None}
    if islands:
        rest = {n: points for n, points in nccl.items() if n > within}
        links |= {"islands": islands, "between": dataclasses.replace(LINKS[pcie], table=rest, **between)}
    gpu = found[0]["name"].lower()
    if ours := _profile_table(profile, "fused_parallel", "all_reduce"):
        behind = _profile_table(profile, "fused_parallel", "matmul_all_reduce")
        # Elsewhere messages are taken to cost what they cost NCCL.
        base = OURS_NVLINK4 if name == "nvlink4" else intra
        about = {"name": f"{name}, this library's kernels, probed", "table": ours, "behind": behind}
        links["ours"] = dataclasses.replace(base, **about)
    elif name == "nvlink4" and ("h100" in gpu or "h200" in gpu):
        links["ours"] = OURS_NVLINK4
    return links


def _islands(joined: list[set[int]], gpus: list[int]) -> tuple[tuple[int, ...], ...]:
    """The GPUs that are joined, directly or by others."""
    islands = [{gpu} for gpu in gpus]
    for pair in joined:
        met = [island for island in islands if island & pair]
        islands = [island for island in islands if not island & pair] + [set().union(*met)]
    return tuple(tuple(sorted(island)) for island in sorted(islands, key=min))


def _profile_table(profile: dict, backend: str, op: str) -> dict[int, tuple[tuple[float, float], ...]]:
    """The points of an operation in CUDA graphs, by the number of ranks."""
    return {
        c["world_size"]: tuple((p["bytes"], p["us"]) for p in c["points"])
        for c in profile["collectives"]
        if (c["op"], c["backend"], c["mode"]) == (op, backend, "graph")
    }


def _profile_sends(profile: dict) -> dict[str, float]:
    """p2p_us and p2p_gb_s of NCCL's messages in CUDA graphs, where they were measured and have a rate."""
    for c in profile["collectives"]:
        if (c["op"], c["backend"], c["mode"]) == ("send_recv", "nccl", "graph") and c["beta_gb_per_s"]:
            return {"p2p_us": c["alpha_us"], "p2p_gb_s": c["beta_gb_per_s"]}
    return {}
