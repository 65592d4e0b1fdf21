"""The command line's answers: documents, figures, and one clear message for each mistake."""

from __future__ import annotations

import json

import pytest

from autopar.cli import run
from autopar.errors import EXIT_OK, EXIT_USAGE

SETTING = ["llama2-7b", "--cluster", "a100-80g:1x8", "--global-batch", "16", "--seq-len", "4096", "--no-offload"]
PLAN, EXPLAIN, COMPARE = (["plan", *SETTING], ["explain", *SETTING], ["compare", *SETTING])


def document(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    assert run([*arguments, "--json"]) == EXIT_OK
    found = json.loads(capsys.readouterr().out)
    assert found["schema_version"] == 1
    return found


def test_answers_of_plan_join_its_document(tmp_path, capsys) -> None:
    options = ["--why-not", "tp1.pp1.dp8.z0.mb2", "--pareto", "--sensitivity", "-o", str(tmp_path)]
    found = document([*PLAN, *options], capsys)
    assert {"search", "plans", "why_not", "pareto", "sensitivity"} <= set(found)
    best = found["plans"][0]
    refused = found["why_not"]
    assert refused["feasible"] is False and refused["violations"][0]["reason"] == "memory"
    assert refused["violations"][0]["numbers"]["over_gib"] > 0 and refused["changes"]
    assert refused["best"]["slug"] == best["slug"] == found["sensitivity"]["slug"]
    whole = [point for point in found["pareto"]["points"] if point["gpus"] == 8]
    assert whole[0]["slug"] == best["slug"] and whole[0]["step_s"] == best["step_s"]
    assert all(trial["factor"] in (0.9, 1.1) for trial in found["sensitivity"]["trials"])
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {
        "plan.json", "why-not.json", "why-not.png", "pareto.json", "pareto.png", "sensitivity.json", "sensitivity.png",
    }  # fmt: skip


def test_a_feasible_plan_has_a_waterfall(capsys) -> None:
    found = document([*PLAN, "--why-not", "tp8.z0.mb1.ac-full.sp"], capsys)["why_not"]
    assert found["feasible"] and found["slower"] > 0 and not found["violations"]
    assert sum(found["waterfall_s"].values()) == pytest.approx(found["step_s"] - found["best"]["step_s"])


def test_answers_that_differ_and_raw_ranks(capsys) -> None:
    degrees = ("tp", "cp", "pp")
    shown = [tuple(p[d] for d in degrees) for p in document([*PLAN, "--top", "5"], capsys)["plans"]]
    raw = [tuple(p[d] for d in degrees) for p in document([*PLAN, "--top", "5", "--all-variants"], capsys)["plans"]]
    assert len(set(shown)) == 5 > len(set(raw)) and shown[0] == raw[0]


def test_explain_best_and_named(tmp_path, capsys) -> None:
    found = document([*EXPLAIN, "-o", str(tmp_path)], capsys)
    assert sum(found["shares"].values()) == pytest.approx(1, abs=1e-4) and found["binding"] in found["shares"]
    assert all(i["replanned_gain"] >= i["gain"] - 1e-12 for i in found["improvements"])
    assert {path.name for path in tmp_path.iterdir()} == {"explain.json", "explain.png"}
    named = document(["explain", SETTING[0], found["slug"], *SETTING[1:], "--no-replan"], capsys)
    assert named["step_s"] == found["step_s"] and named["improvements"][0]["replanned_gain"] is None


def test_compare_draws_three_figures(tmp_path, capsys) -> None:
    found = document([*COMPARE, "-o", str(tmp_path)], capsys)
    assert [s["name"] for s in found["strategies"]][-2:] == ["rule of thumb", "best plan"]
    assert [p["gpus"] for p in found["scaling"]] == [1, 2, 4, 8]
    assert {path.name for path in tmp_path.iterdir()} == {"compare.json", "strategies.png", "scaling.png", "map.png"}


@pytest.mark.parametrize("arguments", [[*PLAN, "--pareto"], [*PLAN, "--sensitivity"], EXPLAIN, COMPARE])
def test_tables_fit_the_screen(arguments: list[str], capsys) -> None:
    assert run(arguments) == EXIT_OK
    text = capsys.readouterr().out
    assert len(text) > 200 and max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*PLAN, "--why-not", "tp2.pp2"], "dp and mb are missing: for 8 ranks for example tp2.pp2.dp2.mb1"),
        ([*PLAN, "--why-not", "tp4,pp2"], "a slug looks like"),
        (["explain", SETTING[0], "tp2.mb1", *SETTING[1:]], "dp is missing"),
        (["explain", SETTING[0], "tp3.dp2.mb1", *SETTING[1:]], "tp=3"),
    ],
)
def test_mistakes_get_one_clear_message(arguments: list[str], message: str, capsys) -> None:
    assert run(arguments) == EXIT_USAGE
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err
