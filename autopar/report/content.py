"""Everything that a report tells: one record, filled by whoever ran the job, read by page, plots, trace and files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autopar.errors import InputError
from autopar.estimate import Estimate, Setting
from autopar.measurement import Measurement
from autopar.model.spec import ModelSpec
from autopar.plan import Plan
from autopar.report.names import short_names
from autopar.search.exhaustive import SearchResult
from autopar.validate import Validation
from costmodels.profiles import MachineProfile


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoReport:
    """A plan from search to measurement.

    Attributes:
        title: of the page.
        command: that makes this report again.
        date: ISO, UTC.
        machine: what it ran on, in words by name (``processor``, ``cores``, ``torch``, ...).
        model: that was trained.
        setting: what was given to the planner; its cluster is the profiled one.
        profile: the measured machine; None where the planner used data sheets.
        result: of the search, best first.
        estimates: predictions of the plans that were run.
        measurements: their runs.
        validation: the two compared.
        notes: sentences that a reader must know (limits, what was left out).
        reference: the same training in one process; what the plans' losses are held against.
        reference_estimate: its prediction.
    """

    title: str
    command: str
    date: str
    machine: Mapping[str, str]
    model: ModelSpec
    setting: Setting
    profile: MachineProfile | None
    result: SearchResult
    estimates: tuple[Estimate, ...]
    measurements: tuple[Measurement, ...]
    validation: Validation
    notes: tuple[str, ...] = ()
    reference: Measurement | None = None
    reference_estimate: Estimate | None = None

    def __post_init__(self) -> None:
        predicted = {e.plan.slug for e in self.estimates}
        measured = {m.slug for m in self.measurements}
        compared = {c.slug for c in self.validation.comparisons}
        if not predicted == measured == compared or not compared:
            apart = (predicted | measured | compared) - (predicted & measured & compared)
            raise InputError(
                "a report takes the same plans predicted, measured and compared; "
                f"these are not in all three: {', '.join(sorted(apart)) or 'there are none at all'}"
            )

    @property
    def recommended(self) -> Estimate:
        """The plan that the search found fastest."""
        return self.result.best[0]

    @property
    def device_word(self) -> str:
        """What a rank runs on, for headers: GPU, or rank where ranks share processors."""
        return "GPU" if any(m.backend == "nccl" for m in self.measurements) else "rank"

    def names(self) -> dict[str, str]:
        """Short names of all plans in the report, by slug."""
        return short_names([*(e.plan for e in self.estimates), *(e.plan for e in self.result.best)])

    def run_names(self) -> dict[str, str]:
        """Short names of the plans that were run, the reference among them, by slug, for figures."""
        reference = [self.reference.plan] if self.reference is not None else []
        return short_names([*(e.plan for e in self.estimates), *reference])

    def estimate_of(self, slug: str) -> Estimate:
        """Prediction of a plan that was run."""
        return next(e for e in self.estimates if e.plan.slug == slug)

    def measurement_of(self, slug: str) -> Measurement:
        """Run of a plan."""
        return next(m for m in self.measurements if m.slug == slug)

    def showcase(self) -> str:
        """Slug of the plan whose step is drawn over time: the longest pipeline, the fastest measured of those."""

        def rank(plan: Plan) -> tuple[int, int, float]:
            stages = plan.num_stages if plan.layout.pp > 1 else 1
            return -stages, -plan.layout.pp, self.validation.of(plan.slug).measured_step_s

        return min((e.plan for e in self.estimates), key=rank).slug
