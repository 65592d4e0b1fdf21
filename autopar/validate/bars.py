"""Errors that the cost model is held to, by source of published runs. Percent."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One goal.

    Attributes:
        name: as a reader knows the source.
        source: as rows name it; empty for all.
        percent: mean absolute error, at most.
        what: ``time`` and ``memory`` with the model left out of the fit; ``calibrated`` with one run of each model
            width, tp and microbatch measured; ``source left out`` the mean over sources; ``memory difference`` of two
            runs of one model, as a share of the measured difference.
    """

    name: str
    source: str
    percent: float
    what: str = "time"


BARS = (
    Bar(name="Megatron-LM 2022", source="korthikanti22", percent=2.0),
    Bar(name="Megatron-LM 2021", source="sc21_megatron", percent=2.0),
    Bar(name="Megatron-LM 2020", source="megatron_2020", percent=2.5),
    Bar(name="vTrain, 8 to 64 nodes", source="vtrain_multi", percent=7.5),
    Bar(name="vTrain, one node", source="vtrain_single", percent=6.0),
    Bar(name="vTrain, one node", source="vtrain_single", percent=3.0, what="calibrated"),
    Bar(name="BLOOM", source="bloom_prequel", percent=4.0),
    Bar(name="InternEvo", source="internevo", percent=3.5),
    Bar(name="llm-foundry", source="llmfoundry", percent=3.5),
    Bar(name="MLPerf", source="mlperf", percent=4.0),
    Bar(name="SimuMax B200", source="simumax_b200", percent=4.0),
    Bar(name="Megatron-Bridge", source="megatron_bridge", percent=9.0),
    Bar(name="torchtitan", source="torchtitan", percent=8.0),
    Bar(name="all sources", source="", percent=8.0, what="source left out"),
    Bar(name="SimuMax B200", source="simumax_b200", percent=0.5, what="memory"),
    Bar(name="torchtitan", source="torchtitan", percent=2.0, what="memory"),
    Bar(name="BLOOM", source="bloom_prequel", percent=4.0, what="memory"),
    Bar(name="InternEvo", source="internevo", percent=4.0, what="memory"),
    Bar(name="Megatron-Core CI", source="mcore_ci", percent=5.0, what="memory"),
    Bar(name="Megatron-Bridge studies", source="bridge_memory_studies", percent=15.0, what="memory difference"),
)

TITLES = {"nemo_2407": "NeMo 24.07", "torchtitan_nvfp4": "torchtitan NVFP4"}
"""Names of sources without a goal."""
