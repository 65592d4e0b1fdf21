"""Which blocks lie on which virtual stage of a run's pipeline."""

from __future__ import annotations

import re

from autopar.runs.degrees import Degrees, with_virtual_stages
from autopar.runs.reading import CannotRead, Read, find_int, has

_TOKEN = re.compile(r"\(([^()]*)\)(?:\*(\d+))?|([A-Za-z|])(?:\*(\d+))?|[,'\"]|\s")


def expand_layout(text: str) -> tuple[str, ...]:
    """Stages of a Megatron-Core pipeline layout: ``Et*2|(t|)*2tmL`` is ("Ett", "t", "t", "tmL").

    E is the embedding, t a block, m a layer of multi-token prediction, L the loss, ``|`` ends a stage; ``*`` repeats
    a letter or a group in brackets. Raises CannotRead for anything else.
    """
    return tuple(stage for stage in _expand(text, text).split("|"))


def _expand(text: str, whole: str) -> str:
    found, place = "", 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if not match:
            raise CannotRead(f"pipeline layout '{whole}' cannot be read at '{text[place:]}'")
        group, group_times, letter, times = match.groups()
        if group is not None:
            found += _expand(group, whole) * int(group_times or 1)
        elif letter:
            found += letter * int(times or 1)
        place = match.end()
    return found


def read_stages(notes: str, degrees: Degrees, blocks: int, mtp_layers: int) -> Read[tuple[Degrees, tuple[int, ...]]]:
    """Degrees (virtual stages may be corrected) and blocks per virtual stage; empty where they divide evenly.

    ``notes`` keep their case: letters of a layout mean different things in either. Without a stated layout, uneven
    blocks are divided as if embedding and head were a block each, or the last stage's head and multi-token prediction
    three, where that comes out even; else earlier stages take what is left over. Raises CannotRead for more pipeline
    ranks than blocks.
    """
    if degrees.pp == 1:
        return (degrees, ()), ()
    if degrees.pp > blocks:
        raise CannotRead(f"pp={degrees.pp} stages for {blocks} blocks")
    stated = re.search(r"layout=(\S+?)(?:[;,]?\s|;|,\s|$)", notes)
    if stated and "|" in stated[1]:
        return _from_layout(stated[1].rstrip(",;"), degrees, blocks)
    stages = degrees.pp * degrees.vp
    if blocks % stages == 0 or has(notes, r"type:transformer\|embedding"):
        return (degrees, ()), ()
    first = find_int(notes, r"decoder-first-pipeline-num-layers=(\d+)")
    if first and degrees.vp == 1 and (blocks - first) % (stages - 1) == 0:
        return (degrees, (first, *[(blocks - first) // (stages - 1)] * (stages - 1))), ()
    return _balanced(degrees, blocks, mtp_layers)


def _from_layout(text: str, degrees: Degrees, blocks: int) -> Read[tuple[Degrees, tuple[int, ...]]]:
    counts = [stage.count("t") for stage in expand_layout(text)]
    assumed: list[str] = []
    if sum(counts) != blocks:
        raise CannotRead(f"pipeline layout {text} has {sum(counts)} blocks, the model {blocks}")
    if len(counts) % degrees.pp:
        raise CannotRead(f"pipeline layout {text} has {len(counts)} stages for pp={degrees.pp}")
    vp = len(counts) // degrees.pp
    if vp != degrees.vp:
        assumed.append(f"vp={vp} as in the pipeline layout")
        degrees = with_virtual_stages(degrees, vp)
    for stage, count in enumerate(counts[1:-1], start=1):
        if count == 0:
            donor = max(range(len(counts)), key=lambda i: (counts[i], -abs(i - stage)))
            counts[donor], counts[stage] = counts[donor] - 1, 1
            assumed.append("a stage without blocks takes one of a neighbour")
    return (degrees, tuple(counts)), tuple(assumed)


def _balanced(degrees: Degrees, blocks: int, mtp_layers: int) -> Read[tuple[Degrees, tuple[int, ...]]]:
    stages = degrees.pp * degrees.vp
    if mtp_layers and (blocks + 3) % stages == 0 and (each := (blocks + 3) // stages) > 3:
        split = (*[each] * (stages - 1), each - 3)
        return (degrees, split), ("blocks divided with head and multi-token prediction as three blocks, assumed",)
    if (blocks + 2) % stages == 0:
        each, why = (blocks + 2) // stages, "blocks divided with embedding and head as a block each, assumed"
        return (degrees, (each - 1, *[each] * (stages - 2), each - 1)), (why,)
    if stages > blocks:
        vp = max(1, blocks // degrees.pp)
        return (with_virtual_stages(degrees, vp), ()), (f"vp={degrees.vp} has more stages than blocks: vp={vp}",)
    return (degrees, ()), ("blocks that do not divide evenly: earlier stages take the remainder",)
