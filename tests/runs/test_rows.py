"""Reading and writing CSV files of runs."""

from pathlib import Path

import pytest

from autopar.errors import InputError
from autopar.runs import RunRow, read_runs, write_runs

DATA = Path(__file__).parent / "data"
HEADER = "id,model_name,gpu,n_gpus,gated_mlp,vocab,notes\n"


def _read(tmp_path: Path, text: str) -> tuple[RunRow, ...]:
    path = tmp_path / "runs.csv"
    path.write_text(text)
    return read_runs(path)


def test_empty_cells_are_none_and_whole_numbers_may_be_printed_as_floats(tmp_path: Path) -> None:
    (row,) = _read(tmp_path, HEADER + 'a-1,gpt,A100,8.0,1.0,nan,"x, y"\n')
    assert (row.n_gpus, row.gated_mlp, row.vocab, row.notes) == (8, True, None, "x, y")
    assert row.tp is None  # a column that the file does not have
    assert row.zero_or_fsdp is None


def test_unknown_columns_are_ignored(tmp_path: Path) -> None:
    (row,) = _read(tmp_path, "id,model_name,gpu,n_gpus,mood\na-1,gpt,A100,8,good\n")
    assert row.id == "a-1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1.*empty"),
        ("name,value\na,b\n", "line 1: column 'id'"),
        (HEADER + "a-1,gpt,A100,eight,,,\n", "line 2, column n_gpus: 'eight' is not a number"),
        (HEADER + "a-1,gpt,A100,8,,,\nb-1,gpt,A100,7.5,,,\n", "line 3, column n_gpus: 7.5 is not a whole number"),
        (HEADER + ",gpt,A100,8,,,\n", "line 2, column id"),
        (HEADER + "a-1,gpt,A100,8,,,x,y\n", "line 2: more cells than columns"),
    ],
)
def test_a_file_that_is_none_says_line_and_column(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _read(tmp_path, text)


def test_a_missing_or_binary_file_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_runs(tmp_path / "none.csv")
    (tmp_path / "runs.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        read_runs(tmp_path / "runs.csv")


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    rows = read_runs(DATA / "published.csv")
    write_runs(tmp_path / "copy.csv", rows)
    assert read_runs(tmp_path / "copy.csv") == rows
    assert len(rows) == 27
