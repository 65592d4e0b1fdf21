"""Logs of training engines as rows, and those rows as cases."""

from pathlib import Path

import pytest

from autopar.errors import InputError
from autopar.plan import parse_slug
from autopar.runs import RunCase, interpret, read_megatron_log, read_runs, read_torchtitan_log, write_runs

DATA = Path(__file__).parent / "data"
TITAN = (DATA / "torchtitan.log").read_text()
MEGATRON = (DATA / "megatron.log").read_text()


def test_torchtitan() -> None:
    row = read_torchtitan_log(TITAN)
    assert (row.model_name, row.hidden, row.n_kv_heads, row.ffn_hidden) == ("llama3-8b", 4096, 8, 14336)
    assert (row.n_gpus, row.tp, row.dp, row.global_batch, row.seq_len) == (8, 2, 4, 8, 8192)
    assert row.tokens_per_s_per_gpu == 6135  # without the first step
    assert row.iter_time_s == pytest.approx(8 * 8192 / (8 * 6135))
    assert (row.mem_gb_per_gpu, row.mfu) == (46.17, pytest.approx(0.3598))
    case = interpret(row)
    assert isinstance(case, RunCase)
    assert case.plan == parse_slug("tp2.pp1.vp1.cp1.dp4.z3.mb2.ac-selective+op_level.sp")
    assert case.stack == "torchtitan+async-tp"
    assert (case.cluster.device.name, case.memory_basis) == ("h100-500w", "reserved")


def test_torchtitan_of_other_years() -> None:
    newer = TITAN.replace(
        "Building 2-D device mesh with ['dp_shard', 'tp'], [4, 2]",
        "Building device mesh with parallelism: pp=1, dp_replicate=2, dp_shard=2, cp=1, tp=2, ep=1",
    ).replace("Applied selective activation", "Applied FullAC activation")
    row = read_torchtitan_log(newer)
    assert (row.zero_or_fsdp, row.recompute, row.dp) == ("HSDP replicate=2 shard=2", "full", 4)
    case = interpret(row)
    assert isinstance(case, RunCase)
    assert (case.plan.layout.dp_replicate, case.plan.layout.dp_shard) == (2, 2)
    older = read_torchtitan_log(TITAN.replace("tps:", "wps:"))
    assert older.tokens_per_s_per_gpu == 6135
    experts = "Building 2-D device mesh with ['dp_shard_mod_ep', 'dp_shard_in_ep'], [2, 4]"
    row = read_torchtitan_log(TITAN.replace("Building 2-D device mesh with ['dp_shard', 'tp'], [4, 2]", experts))
    assert (row.dp, row.ep, row.tp) == (8, 4, 1)


def test_megatron() -> None:
    row = read_megatron_log(MEGATRON, gpu="H100-80GB")
    assert (row.n_layers, row.n_kv_heads, row.vocab, row.n_experts, row.top_k) == (32, 8, 32000, 8, 2)
    assert (row.tp, row.pp, row.vp, row.dp, row.ep, row.year) == (2, 2, 4, 4, 4, 2024)
    assert row.iter_time_s == pytest.approx(5.4106)
    assert row.mem_gb_per_gpu == 56.0  # the largest of the ranks, MiB to GiB
    case = interpret(row)
    assert isinstance(case, RunCase)
    assert case.plan == parse_slug("tp2.pp2.vp4.cp1.ep4.dp4.z1.mb1.ac-selective+core_attn+layernorm.sp")
    assert case.stack == "megatron-core+plain-dispatcher+unfused-loss"
    assert not case.spec.bias
    assert not case.spec.dropout


def test_megatron_with_lines_that_carry_their_rank() -> None:
    prefixed = "".join(f"[lrdn0137:0]:{line}" for line in MEGATRON.splitlines(keepends=True))
    assert read_megatron_log(prefixed) == read_megatron_log(MEGATRON)


def test_logs_that_are_none() -> None:
    with pytest.raises(InputError, match="no line of a torchtitan step"):
        read_torchtitan_log(MEGATRON)
    with pytest.raises(InputError, match="no line of a Megatron-LM iteration"):
        read_megatron_log(TITAN)
    with pytest.raises(InputError, match="device mesh"):
        read_torchtitan_log("step: 10  loss: 4.1  memory: 0.69GiB(0.72%)  tps: 221,070\n")
    with pytest.raises(InputError, match="dump of Megatron-LM's arguments"):
        read_megatron_log("elapsed time per iteration (ms): 5630.1 |")


def test_logs_become_a_csv_of_runs(tmp_path: Path) -> None:
    rows = (read_torchtitan_log(TITAN), read_megatron_log(MEGATRON, gpu="H100-80GB"))
    write_runs(tmp_path / "runs.csv", rows)
    assert read_runs(tmp_path / "runs.csv") == rows
