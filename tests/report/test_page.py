"""The page and the files: complete, self-contained, escaped, and saying what the records say."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from autopar.errors import InputError
from autopar.report import DemoReport, render_page, write_report
from autopar.report.numbers import percent, significant
from autopar.report.write import table_csv

VOID = {"meta", "br", "img", "link", "hr", "input"}


class Checker(HTMLParser):
    """Collects text, ids and links, and notices elements that are not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        found = dict(attrs)
        self.ids += [value for key, value in attrs if key == "id" and value]
        self.links += [value for key, value in found.items() if key in ("href", "src", "xlink:href") and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1] if self.open else ''}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def page(sample_report: DemoReport) -> str:
    return render_page(sample_report)


@pytest.fixture(scope="module")
def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    return checker


def test_page_is_one_well_formed_file(page: str, checked: Checker) -> None:
    assert checked.open == []
    assert len(checked.ids) == len(set(checked.ids))
    assert len(page.encode()) < 3_000_000
    # Nothing is loaded: every link goes to a place on the page.
    assert checked.links and all(link.startswith("#") and link[1:] in checked.ids for link in checked.links)
    assert not checked.tags & {"script", "link", "img", "iframe"}
    assert not re.search(r"url\((?!#)|@import", page)
    assert "$" not in page.split("</style>")[1].split("<section")[0]


def test_page_escapes_what_it_was_given(page: str, sample_report: DemoReport) -> None:
    assert sample_report.title not in page and "A small GPT on four ranks &lt;made up&gt;" in page
    assert "Linux &amp; others" in page


def test_page_says_what_was_found(checked: Checker, sample_report: DemoReport) -> None:
    text = " ".join(" ".join(checked.text).split())
    validation = sample_report.validation
    assert percent(validation.regret) in text and percent(validation.time_error_median) in text
    assert f"{validation.kendall_tau:.2f}".replace("-", "−") in text
    for comparison in validation.comparisons:
        assert comparison.slug in text and significant(comparison.measured_step_s) in text
    for found in sample_report.result.best:
        assert found.plan.slug in text
    for line in sample_report.recommended.assumptions:
        assert line in text
    assert "One process alone takes" in text and "not checked" not in text
    assert sample_report.command in text and sample_report.notes[0] in text
    for name in ("predicted-measured", "step-breakdown", "memory", "timeline", "losses", "collectives", "matmul"):
        assert f"{name}-figure_1" in checked.ids


def test_page_works_in_the_dark_and_on_paper(page: str) -> None:
    style = page.split("<style>")[1].split("</style>")[0]
    assert "prefers-color-scheme: dark" in style and "@media print" in style and "max-width: 620px" in style
    for variable in set(re.findall(r"var\((--[\w-]+)\)", page)):
        assert f"{variable}:" in style, f"{variable} is used and not defined"


def test_page_without_a_profile_or_losses(sample_report: DemoReport) -> None:
    silent = tuple(dataclasses.replace(m, losses=()) for m in sample_report.measurements)
    text = render_page(dataclasses.replace(sample_report, profile=None, measurements=silent, reference=None, notes=()))
    assert 'id="losses"' not in text and "collectives-figure_1" not in text and 'id="machine"' in text


def test_a_report_takes_the_same_plans_on_all_sides(sample_report: DemoReport) -> None:
    slug = sample_report.measurements[0].slug
    with pytest.raises(InputError, match=slug):
        dataclasses.replace(sample_report, measurements=sample_report.measurements[1:])


def test_showcase_is_the_longest_pipeline(sample_report: DemoReport) -> None:
    assert sample_report.estimate_of(sample_report.showcase()).plan.layout.pp == 4


def test_all_files_are_written(sample_report: DemoReport, tmp_path: Path) -> None:
    out = tmp_path / "reports" / "demo"
    written = write_report(sample_report, out)
    assert sorted(written) == sorted(path for path in out.rglob("*") if path.is_file())
    names = {str(path.relative_to(out)) for path in written}
    assert {"index.html", "trace.json", "table.csv", "summary.json", "README.md"} <= names
    assert {f"traces/{m.slug}.json" for m in sample_report.measurements} <= names
    summary = json.loads((out / "summary.json").read_text())
    assert summary["validation"]["regret"] == sample_report.validation.regret
    reference = sample_report.reference
    assert reference is not None
    apart = max(abs(a - b) for m in sample_report.measurements for a, b in zip(m.losses, reference.losses, strict=True))
    assert summary["loss_apart"] == apart > 0
    assert summary["search"]["considered"] == sample_report.result.considered
    trace = json.loads((out / "trace.json").read_text())
    assert trace["otherData"]["plan"] == sample_report.showcase()
    readme = (out / "README.md").read_text()
    for picture in re.findall(r"\]\((.*?)\)", readme):
        assert (out / picture).is_file()
    for measurement in sample_report.measurements:
        assert f"`{measurement.slug}`" in readme
    # Writing again replaces, and says the same.
    before = (out / "index.html").read_text()
    write_report(sample_report, out)
    assert (out / "index.html").read_text() == before


def test_table_has_every_plan_once_with_what_was_measured(sample_report: DemoReport) -> None:
    rows = list(csv.DictReader(io.StringIO(table_csv(sample_report))))
    slugs = [row["slug"] for row in rows]
    expected = {e.plan.slug for e in (*sample_report.result.best, *sample_report.estimates)}
    assert len(slugs) == len(set(slugs)) and set(slugs) == expected
    times = [float(row["predicted_step_s"]) for row in rows]
    assert times == sorted(times)
    measured = {m.slug: m.median_step_s for m in sample_report.measurements}
    for row in rows:
        if row["slug"] in measured:
            assert float(row["measured_step_s"]) == measured[row["slug"]]
        else:
            assert row["measured_step_s"] == ""
