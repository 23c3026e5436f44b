"""The machines a plan is made for: presets, YAML or JSON descriptions, and profiles of `fused-parallel probe`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..comm.probe import load_profile, probe
from .hardware import GPU, GPUS, LINKS, Link


def _check_count(value: object, key: str, where: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{where}: {key} must be a positive integer, got {value!r}")


@dataclass(frozen=True)
class Cluster:
    """`hosts` equal hosts of `gpus_per_host` GPUs.

    intra joins the GPUs of a host; inter joins hosts by `nics` adapters a host (None on one host). `host_memory_gb`
    bounds what offload may keep in host memory (None: not checked). `layer_us` is the time of everything in a layer
    besides its matmuls, KV reads and communication (None: the measured constant of plain torch, cost.layer_us)."""

    name: str
    gpu: GPU
    gpus_per_host: int
    intra: Link
    hosts: int = 1
    inter: Link | None = None
    nics: int = 1
    host_memory_gb: float | None = None
    layer_us: float | None = None

    def __post_init__(self) -> None:
        for name in ("hosts", "gpus_per_host", "nics"):
            _check_count(getattr(self, name), name, f"cluster {self.name!r}")
        if self.hosts > 1 and self.inter is None:
            raise ValueError(f"cluster {self.name!r}: {self.hosts} hosts need an inter link; known: {', '.join(LINKS)}")

    @property
    def gpus(self) -> int:
        """All GPUs."""
        return self.hosts * self.gpus_per_host


def _preset(name: str, gpu: str, per_host: int, intra: str, hosts: int = 1, inter: str | None = None, nics: int = 1):
    link = LINKS[inter] if inter else None
    return Cluster(name, GPUS[gpu], per_host, LINKS[intra], hosts, link, nics)


CLUSTERS = {
    cluster.name: cluster
    for cluster in (
        _preset("1xh200", "h200", 1, "nvlink4"),
        _preset("2xh200", "h200", 2, "nvlink4-measured-pair"),
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
    )
}

_KEYS = ("name", "hosts", "gpus_per_host", "gpu", "intra", "inter", "nics", "host_memory_gb", "layer_us")


def load_cluster(source: str | Path | dict | Cluster) -> Cluster:
    """A cluster from a preset's name, "this" (a quick probe of this machine now), a description (a dictionary, or a
    .json, .yaml or .yml file of one) or a profile that `fused-parallel probe --out` wrote.

    A description has the keys hosts, gpus_per_host, gpu, intra and, with several hosts, inter and nics; gpu, intra and
    inter are names of presets, or mappings of {preset: name} and the fields to change. Raises ValueError that names
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
        return from_profile(load_profile(path), path.stem)
    return _describe(content, str(path), lines)


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
    for key in ("host_memory_gb", "layer_us"):
        value = given.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0):
            raise ValueError(f"{at(key)}: {key} must be a number of at least 0, got {value!r}")
    for key in ("hosts", "gpus_per_host", "nics"):
        _check_count(given.get(key, 1), key, at(key))
    if given.get("hosts", 1) > 1 and given.get("inter") is None:
        raise ValueError(f"{at('hosts')}: {given['hosts']} hosts need an inter link; known: {', '.join(LINKS)}")
    given.setdefault("name", Path(where).stem)
    return Cluster(**given)


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
        if key not in fields or key == "table":
            known = ", ".join(f for f in fields if f != "table")
            raise ValueError(f"{at(part, key)}: {part}: unknown key {key}; known: {known}")
        if key != "name" and (isinstance(v, bool) or not isinstance(v, (int, float)) or v < 0):
            raise ValueError(f"{at(part, key)}: {part}: {key} must be a number of at least 0, got {v!r}")
    return dataclasses.replace(preset, **changes)


def from_profile(profile: dict, name: str) -> Cluster:
    """The machine that a probe profile describes: its measured memory, matmul, host and all-reduce figures in place of
    the datasheet's. Raises ValueError for a machine without GPUs, with different ones, or with one unknown here."""
    found = profile["topology"]["gpus"]
    if not found or not profile["gpus"]:
        raise ValueError(f"cluster {name!r}: the probe found no GPU; plan for a preset instead: {', '.join(CLUSTERS)}")
    models = sorted({gpu["name"] for gpu in found})
    if len(models) > 1:
        raise ValueError(f"cluster {name!r}: its GPUs differ ({', '.join(models)}); the planner needs equal ones")
    squeezed = models[0].lower().replace(" ", "")
    known = [key for key in GPUS if key in squeezed]
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
    link, table = _profile_link(profile, found)
    intra = dataclasses.replace(LINKS[link], name=f"{link}, probed" if table else link, table=table)
    memory = profile["host"]["memory_bytes"] / 1e9
    return Cluster(name, dataclasses.replace(gpu, **changes), len(found), intra, host_memory_gb=memory)


def _profile_link(profile: dict, found: list[dict]) -> tuple[str, dict]:
    """(the preset that fits the topology best, the measured all-reduces)."""
    pairs = profile["topology"]["pairs"]
    generation = found[0].get("pcie_generation") or 4
    link = f"pcie{min(5, max(3, generation))}"
    if any(pair["link"].startswith("NV") for pair in pairs):
        major = (found[0].get("compute_capability") or [9])[0]
        link = {8: "nvlink3", 9: "nvlink4"}.get(major, "nvlink5")
    elif pairs and not all(pair["peer_access"] for pair in pairs):
        link += "-no-peer"
    table = {
        c["world_size"]: tuple((p["bytes"], p["us"]) for p in c["points"])
        for c in profile["collectives"]
        if c["op"] == "all_reduce" and c["backend"] == "nccl" and c["mode"] == "graph"
    }
    return link, table
