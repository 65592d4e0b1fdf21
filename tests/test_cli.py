"""The command line as a user meets it: answers, exit codes, one clear message for each mistake."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from autopar.cli import run
from autopar.errors import EXIT_NO_PLAN, EXIT_OK, EXIT_USAGE
from autopar.plan import parse_slug, read_plan_file

PLAN = ["plan", "llama3-70b", "--cluster", "h100:8x8", "--global-batch", "256", "--seq-len", "8192"]


def test_plan_as_json(capsys) -> None:
    assert run([*PLAN, "--json"]) == EXIT_OK
    captured = capsys.readouterr()
    assert captured.err == ""
    found = json.loads(captured.out)
    assert found["schema_version"] == 1
    assert set(found["search"]) >= {"considered", "feasible", "seconds"}
    best = found["plans"][0]
    assert {"slug", "step_s", "memory_gib", "mfu", "tokens_per_s_per_gpu", "breakdown_s", "memory_items_gib"} <= set(
        best
    )
    assert parse_slug(best["slug"]).layout.world_size == 64
    assert best["step_s"] == pytest.approx(sum(best["breakdown_s"].values()))
    assert best["memory_gib"] == pytest.approx(sum(best["memory_items_gib"].values()))
    assert best["tokens_per_s_per_gpu"] == pytest.approx(256 * 8192 / 64 / best["step_s"])
    assert best["mfu"] == pytest.approx(best["model_tflops_per_gpu"] / best["peak_tflops"])


def test_plan_as_table_fits_the_screen(capsys) -> None:
    assert run([*PLAN, "--top", "3"]) == EXIT_OK
    text = capsys.readouterr().out
    best = "tp4.pp8" in text or "tp4.pp4" in text
    assert best and "MFU" in text and "GiB" in text
    assert max(map(len, text.splitlines())) <= 120


def test_plan_writes_a_plan_file(tmp_path, capsys) -> None:
    assert run([*PLAN, "-o", str(tmp_path), "--json"]) == EXIT_OK
    best = json.loads(capsys.readouterr().out)["plans"][0]
    content = read_plan_file(tmp_path / "plan.json")
    assert content.slug == best["slug"] and content.model.name == "llama3-70b"


def test_estimate_agrees_with_plan(capsys) -> None:
    run([*PLAN, "--json"])
    best = json.loads(capsys.readouterr().out)["plans"][0]
    assert run(["estimate", PLAN[1], best["slug"], *PLAN[2:], "--json"]) == EXIT_OK
    single = json.loads(capsys.readouterr().out)
    assert single["step_s"] == best["step_s"] and single["memory_gib"] == best["memory_gib"]
    assert single["assumptions"]
    assert run(["estimate", PLAN[1], best["slug"], *PLAN[2:]]) == EXIT_OK
    assert "assum" in capsys.readouterr().out.lower()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["plan", "llama3-70", *PLAN[2:]], EXIT_USAGE, "unknown model 'llama3-70'; did you mean 'llama3-70b'"),
        ([*PLAN[:3], "h10:8x8", *PLAN[4:]], EXIT_USAGE, "unknown device 'h10'; did you mean 'h100'"),
        ([*PLAN[:3], "h100", *PLAN[4:]], EXIT_USAGE, "not DEVICE:NODESxDEVICES"),
        ([*PLAN, "--stack", "megatron"], EXIT_USAGE, "did you mean 'megatron-core'"),
        ([*PLAN, "--global-bach", "3"], EXIT_USAGE, "--global-bach"),
        ([*PLAN[:5], "0", *PLAN[6:]], EXIT_USAGE, "--global-batch"),
        (PLAN[:-2], EXIT_USAGE, "--seq-len"),
        (["plna"], EXIT_USAGE, "plna"),
        (["plan", "no/such/config.json", *PLAN[2:]], EXIT_USAGE, "no such file"),
        (["plan", "llama3-70b", "--cluster", "v100:8x8", *PLAN[4:]], EXIT_USAGE, "v100 has no bf16"),
        (["plan", "llama3-70b", "--cluster", "a100-40g:1x2", *PLAN[4:]], EXIT_NO_PLAN, "nearest miss"),
        (["estimate", "llama3-70b", "tp16.dp4.mb1", *PLAN[2:]], EXIT_USAGE, "tp=16 does not divide 8 key-value heads"),
        (["estimate", "llama3-70b", "tp8.dp4.mb1", *PLAN[2:]], EXIT_USAGE, "is 32, but there are 64 ranks"),
        (["estimate", "llama3-70b", "tp8,dp4", *PLAN[2:]], EXIT_USAGE, "a slug looks like"),
    ],
)
def test_mistakes_get_one_clear_message(arguments, code, message, capsys) -> None:
    assert run(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("autopar: error: ") and captured.err.count("\n") == 1
    assert message in captured.err


def test_a_torn_configuration(tmp_path, capsys) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "llama", "hidd')
    assert run(["plan", str(path), *PLAN[2:]]) == EXIT_USAGE
    assert "not valid JSON" in capsys.readouterr().err


def test_planning_imports_no_torch_and_no_plotting() -> None:
    code = (
        "import sys; from autopar.cli import run; "
        f"assert run({[*PLAN, '--json']!r}) == 0; "
        "heavy = {'torch', 'pandas', 'matplotlib', 'scipy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=120)
