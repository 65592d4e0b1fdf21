"""Sharding, sequence parallelism and recomputation of a run: words -> decisions of a Plan."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from autopar.graph import RECOMPUTE_MODULES
from autopar.plan import Recompute
from autopar.runs.degrees import Degrees
from autopar.runs.engines import Engine
from autopar.runs.reading import Read, find_int, has
from autopar.runs.rows import RunRow

# (pattern of zero_or_fsdp, ZeRO stage); the first match counts.
SHARDING: tuple[tuple[str, int], ...] = (
    (r"no_shard|zero-?0|plain dp|^none|^ddp|replicat(ed|e) only|^no\b", 0),
    (r"shard_grad_op|hybrid_shard_zero2|zero-?2|stage ?2", 2),
    (r"fsdp|full[_ ]shard|hybrid_shard|hsdp|zero-?3|stage ?3", 3),
    (r"zero-?1|distributed[-_ ]optimizer|dist[-_ ]?opt|sharded optimizer|stage ?1", 1),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """ZeRO stage and the data parallel ranks that shard."""

    zero_stage: int
    dp_shard: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Recomputing:
    """What backward computes again, as in Plan."""

    recompute: Recompute = Recompute.NONE
    modules: tuple[str, ...] = ()
    layers: int = 0


def read_sharding(row: RunRow, engine: Engine, degrees: Degrees, per_node: int) -> Read[Sharding]:
    """How optimizer state, gradients and parameters are sharded."""
    words, assumed = row.words("zero_or_fsdp"), []
    stage = next((stage for pattern, stage in SHARDING if has(words, pattern)), None)
    if stage is None:
        stage = engine.zero_stage
        assumed.append(f"sharding not stated: ZeRO stage {stage} assumed, as usual with {engine.stack}")
    dp = degrees.dp
    if stage == 0 or dp == 1:
        return Sharding(zero_stage=stage if dp == 1 else 0, dp_shard=1), tuple(assumed)
    shard = _shard_size(words, degrees, per_node)
    if dp % shard:
        assumed.append(f"shards of {shard} ranks do not divide dp={dp}: {math.gcd(dp, shard)}")
        shard = math.gcd(dp, shard)
    return Sharding(zero_stage=stage if shard > 1 else 0, dp_shard=shard), tuple(assumed)


def _shard_size(words: str, degrees: Degrees, per_node: int) -> int:
    dp, inside = degrees.dp, degrees.tp * degrees.cp
    ranks = find_int(words, r"within (\d+) dp", r"shard(?:ed)?[ =](\d+)", r"fsdp2? (\d+)$")
    if ranks:
        return min(dp, ranks)
    devices = find_int(words, r"within (\d+)")
    if devices:
        return max(1, min(dp, devices // inside))
    replicas = find_int(words, r"replicate[ =](\d+)", r"replicas[ =](\d+)")
    if replicas:
        return max(1, dp // replicas)
    if has(words, r"hybrid|hsdp|within (a|one|the) node"):
        return max(1, min(dp, per_node // inside))
    return dp


def read_sequence_parallel(row: RunRow, engine: Engine, degrees: Degrees, seq_len: int) -> Read[bool]:
    """Whether norms and residuals are divided along the sequence."""
    if degrees.tp == 1:
        return False, ()
    wanted = engine.sequence_parallel if row.sequence_parallel is None else row.sequence_parallel
    assumed: tuple[str, ...] = ()
    if row.sequence_parallel is None:
        setting = "on" if wanted else "off"
        assumed = (f"sequence parallelism not stated: {setting} assumed, as usual with {engine.stack}",)
    if wanted and seq_len % (degrees.tp * degrees.cp):
        return False, (*assumed, f"sequence parallelism off: {seq_len} tokens do not divide by tp * cp")
    return wanted, assumed


def read_recompute(row: RunRow, engine: Engine, latent: bool, blocks_per_stage: int) -> Read[Recomputing]:
    """What backward computes again.

    ``latent`` models of Megatron-Bridge recompute attention unless told otherwise, as its recipes say.
    ``blocks_per_stage`` are those of a virtual stage.
    """
    notes, setting = row.words("notes"), row.words("recompute")
    assumed: list[str] = []
    if not setting:
        if has(notes, r"(no|without) (activation )?(recompute|checkpointing)|recompute off"):
            setting = "none"
        elif has(notes, r"recompute[-_]modules?="):
            setting = "selective"
        else:
            setting = "selective" if latent and engine.stack == "megatron-bridge" else engine.recompute
            assumed.append(f"recomputation not stated: {setting} assumed, as usual with {engine.stack}")
    if has(setting, r"^(none|no|off|false|0)\b"):
        return Recomputing(), tuple(assumed)
    if has(setting, r"selective") and has(notes, r"modules default"):
        return Recomputing(), (*assumed, "the recipe's list of modules is empty: nothing is recomputed")
    if has(setting, r"selective"):
        found, more = _selective(f"{setting}; {notes}", engine, blocks_per_stage)
        return found, (*assumed, *more)
    if not has(setting, r"full|yes|on|true|1|all"):
        assumed.append(f"recomputation '{row.recompute}' taken as full")
    return Recomputing(recompute=Recompute.FULL, layers=_layers(notes, blocks_per_stage)), tuple(assumed)


def _layers(notes: str, blocks_per_stage: int) -> int:
    """Blocks of a virtual stage under full recomputation; 0 for all."""
    if has(notes, r"recompute-method=uniform"):
        return 0
    layers = find_int(notes, r"block num_layers=(\d+)", r"recompute[-_]num[-_]layers=(\d+)", r"recompute (\d+) layers")
    return layers if layers and layers < blocks_per_stage else 0


def _selective(words: str, engine: Engine, blocks_per_stage: int) -> Read[Recomputing]:
    stated = re.search(r"recompute[-_]modules?[=:] ?\[?([\w, -]+)\]?", words)
    if stated:
        names = [name for name in re.split(r"[,\s]+", stated[1]) if name]
        known = tuple(name for name in names if name in RECOMPUTE_MODULES)
        unknown = [name for name in names if name not in known]
        assumed = tuple(f"recomputation of {name} left out" for name in unknown)
        if not known:
            return Recomputing(), assumed
        return Recomputing(recompute=Recompute.SELECTIVE, modules=known), assumed
    every = find_int(words, r"every (\d+)(?:nd|rd|th)? (?:layer|block)")
    if every or has(words, r"selective layer|layer ac\b"):
        layers = -(-blocks_per_stage // (every or 2))
        note = f"recomputation of every {every or 2}nd block taken as that of the first ones of a stage"
        return Recomputing(recompute=Recompute.FULL, layers=layers), (note,)
    if engine.stack == "torchtitan":
        return Recomputing(recompute=Recompute.SELECTIVE, modules=("op_level",)), ()
    return Recomputing(recompute=Recompute.SELECTIVE), ()
