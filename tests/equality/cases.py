"""Layouts of the equality table, by number of processes, and the models that they train."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from autopar.model.spec import ModelSpec, Norm, Position

SEQ, BATCH, STEPS, RATE, MOMENTUM, CLIP = 32, 16, 4, 0.3, 0.9, 0.5
TOLERANCE = 1e-5

GPT = ModelSpec(
    name="gpt", num_layers=4, hidden_size=32, num_heads=4, num_kv_heads=4, ffn_size=64, vocab_size=64, max_seq_len=SEQ,
)  # fmt: skip
LLAMA = ModelSpec(
    name="llama", num_layers=4, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_size=64, vocab_size=64,
    max_seq_len=SEQ, fused_qkv=False, gated_mlp=True, norm=Norm.RMSNORM, position=Position.ROTARY, bias=False,
)  # fmt: skip
EXPERTS = dataclasses.replace(
    LLAMA, name="experts", num_experts=4, top_k=2, expert_ffn_size=32, shared_ffn_size=32, dense_layers=1
)
MODELS = {
    "gpt": GPT,
    "gpt-tied": dataclasses.replace(GPT, name="gpt-tied", tied_embeddings=True),
    "gpt-deep": dataclasses.replace(GPT, name="gpt-deep", num_layers=8),
    "bert": dataclasses.replace(GPT, name="bert", causal=False),
    "llama": LLAMA,
    "experts": EXPERTS,
    "experts-capacity": dataclasses.replace(EXPERTS, name="experts-capacity", capacity_factor=1.0),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model under a plan, by names."""

    model: str
    slug: str


def _cases(**by_model: str) -> tuple[Case, ...]:
    return tuple(
        Case(model=model.replace("_", "-"), slug=slug) for model, slugs in by_model.items() for slug in slugs.split()
    )


CASES = {
    1: _cases(gpt="mb16 mb4 mb4.ac-full mb4.ac-selective mb4.ac-full2", llama="mb4.ac-selective", experts="mb4"),
    2: _cases(
        gpt="dp2.mb8 dp2.z1.mb2 dp2.z2.mb2 dp2.z3.mb4.ac-full tp2.mb8 tp2.sp.mb8.ac-selective cp2.mb8 "
            "pp2.mb4 pp2.mb2.sched-gpipe pp2.mb4.split-1-3 pp2.mb4.split-0-4 pp2.vp2.mb4 pp2.mb4.sched-zb-h1 "
            "pp2.mb4.sched-zb-h2 pp2.vp2.mb4.sched-zb-v pp2.vp2.mb2.sched-dualpipe-v",
        gpt_tied="pp2.mb4 tp2.mb8",
        llama="tp2.sp.mb8 cp2.z3.mb8 pp2.vp2.mb4.ac-full",
        bert="dp2.z2.mb8 tp2.mb8 cp2.mb8",
        experts="dp2.ep2.mb4 dp2.ep2.z3.mb4 pp2.mb4",
        experts_capacity="dp2.ep2.mb4",
    ),
    4: _cases(
        gpt="dp4.mb4 dp4.z3.rep2.mb2 tp4.mb16 pp4.mb4 dp2.pp2.z1.mb2 dp2.pp2.z3.mb2 dp2.tp2.z2.sp.mb8 cp2.dp2.z2.mb4 "
            "dp2.pp2.mb2.sched-zb-h1 dp2.pp2.vp2.z2.mb2 dp2.pp2.mb2.order-pp-tp-cp-dp tp2.dp2.mb4.order-cp-dp-tp-pp",
        gpt_deep="pp4.vp2.mb4 pp4.vp2.mb4.sched-zb-v pp4.vp2.mb2.sched-dualpipe-v",
        gpt_tied="dp2.pp2.z2.mb4",
        llama="tp2.cp2.mb8 cp2.pp2.mb4 tp2.pp2.sp.mb4 cp4.mb16",
        experts="dp4.ep4.mb4 dp2.tp2.sp.ep2.mb4 dp2.pp2.ep2.z2.mb4 dp2.tp2.sp.ep2.etp2.mb4",
    ),
    8: _cases(
        gpt="dp2.tp2.pp2.sp.mb4 dp2.tp2.cp2.z3.mb4",
        llama="pp2.tp2.cp2.sp.mb4",
        experts="pp2.dp2.tp2.sp.ep2.mb4 pp2.dp2.tp2.sp.ep4.z2.mb2",
    ),
}  # fmt: skip
"""By number of processes. A case that the executor refuses is no case: tests of refusals are elsewhere."""
