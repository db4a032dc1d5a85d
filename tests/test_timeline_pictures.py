"""Pictures of a timeline show what the plan says, in a browser too, and lose no peak."""

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from memfit.integrations import cli
from memfit.integrations.pictures import PictureError
from memfit.integrations.timeline import chart, draw_timeline
from memfit.integrations.timeline.chart import COLOURS, make_chart, thin, ticks
from memfit.integrations.timeline.page import make_page
from memfit.planner import Batch, Plan, plan, timeline
from memfit.planner.budget import format_bytes
from memfit.planner.errors import PlanError
from memfit.planner.timeline import KINDS, encode_column
from tests.browser import PHONE, browse, in_a_browser, probe

Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def made() -> Plan:
    """A plan that recomputes, with more slots than there are columns."""
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    return plan(model, 1 << 40, Batch(2, 64), optimizer="sgd_momentum", device="cpu", solver="full")


@pytest.fixture(scope="module")
def page(made: Plan) -> str:
    return make_page(make_chart(made))


# -- what is drawn -------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=200), st.integers(1, 50))
def test_thinning_loses_no_peak(totals: list[int], limit: int) -> None:
    columns = thin(totals, limit)
    assert len(columns) == min(limit, len(totals))
    assert (columns[0].start, columns[-1].stop) == (0, len(totals))
    assert all(a.stop == b.start for a, b in pairwise(columns))
    for column in columns:
        assert column.start <= column.slot < column.stop
        assert totals[column.slot] == max(totals[column.start : column.stop])
    assert totals.index(max(totals)) in [column.slot for column in columns]


@pytest.mark.parametrize(
    ("top_bytes", "labels"),
    [
        (86 << 30, ["0", "20 GiB", "40 GiB", "60 GiB", "80 GiB"]),
        (1300 << 20, ["0", "0.5 GiB", "1 GiB"]),
        (1100 << 30, ["0", "0.25 TiB", "0.5 TiB", "0.75 TiB", "1 TiB"]),
        (50_000, ["0", "10 KiB", "20 KiB", "30 KiB", "40 KiB"]),
        (3, ["0", "1 B", "2 B", "3 B"]),
    ],
)
def test_the_axis_has_round_marks(top_bytes: int, labels: Sequence[str]) -> None:
    marks = ticks(top_bytes)
    assert [mark.label for mark in marks] == labels
    assert marks[-1].size_bytes <= top_bytes


def test_what_is_drawn_is_the_plan(made: Plan) -> None:
    drawn = make_chart(made)
    assert len(drawn.columns) == chart.COLUMNS < drawn.slots
    assert drawn.peak_bytes == max(drawn.totals) == made.predicted.peak_bytes
    assert drawn.moments[drawn.peak] == made.predicted.peak_at
    assert list(drawn.kinds) == [kind for kind in KINDS if kind in drawn.kinds]
    assert timeline.RECOMPUTED in drawn.kinds
    sums = [sum(column) for column in zip(*drawn.kinds.values(), strict=True)]
    assert sums == drawn.totals
    assert "the moment with the most bytes is drawn" in drawn.note
    assert set(COLOURS) == set(KINDS)
    assert len(set(COLOURS.values())) == len(KINDS)


@pytest.mark.parametrize(("factor", "in_sight"), [(1, True), (1.5, True), (2, False)])
def test_a_budget_far_above_does_not_flatten_the_rest(
    made: Plan, factor: float, in_sight: bool
) -> None:
    peak_bytes = made.predicted.peak_bytes
    drawn = make_chart(replace(made, budget_bytes=int(factor * peak_bytes)))
    assert drawn.budget_in_sight is in_sight
    assert drawn.top_bytes < 1.7 * peak_bytes
    text = make_page(drawn)
    assert ('class="budget"' in text) is in_sight
    assert ("far above" in text) is not in_sight


def test_timelines_that_cannot_be_drawn_are_refused(made: Plan) -> None:
    recorded = made.recorded_timeline()
    column = encode_column([1] * recorded.slots)
    with pytest.raises(PlanError, match=r"of an unknown kind, 'spam'; .* memfit that made it"):
        make_chart(replace(made, timeline=replace(recorded, kinds={"spam": column})))
    for other in (
        replace(recorded, kinds={timeline.BATCH: column}),
        replace(recorded, kinds={}),
        replace(recorded, at_peak=()),
    ):
        with pytest.raises(
            PlanError, match=r"the plan peaks at \d+ bytes, its timeline at \d+ with"
        ):
            make_chart(replace(made, timeline=other))


# -- the page ------------------------------------------------------------------------------------


def test_the_page_asks_for_nothing_from_elsewhere(page: str) -> None:
    assert not re.findall(r"https?:|//\w|url\(|@import|\bsrc=|\bhref=|fetch\(|import\(", page)


def test_names_cannot_end_their_element(made: Plan) -> None:
    bad = "</script><b>&"
    recorded = made.recorded_timeline()
    tensors = tuple(replace(t, module=bad, name=bad) for t in recorded.at_peak)
    odd = replace(
        made,
        model=replace(made.model, class_=bad),
        predicted=replace(made.predicted, peak_at=bad),
        timeline=replace(
            recorded,
            at_peak=tensors,
            moments=(bad,) * len(recorded.moments),
            phases={f"{bad}{phase}": first for phase, first in recorded.phases.items()},
        ),
    )
    text = make_page(make_chart(odd))
    assert bad not in text
    assert text.count(escape(bad)) > len(tensors)
    assert text.count("</script>") == 2


_PROBE = """
const text = function (id) { return inner.getElementById(id).textContent.trim(); };
const legend = function () {
  return [...inner.querySelectorAll("#legend li")].map(function (item) {
    return [item.firstChild.nextSibling.textContent, item.lastChild.textContent];
  });
};
const shown = function () { return [text("total"), text("where"), legend()]; };
const slider = inner.getElementById("slider"), plot = inner.getElementById("plot");
const box = plot.getBoundingClientRect();
Object.assign(found, { first: shown(), moments: [], pointed: [] });
for (const column of JSON.parse(document.body.dataset.given)) {
  slider.value = column;
  slider.dispatchEvent(new view.Event("input"));
  found.moments.push(shown());
}
for (const share of [0.001, 0.5, 0.999]) {
  const at = { clientX: box.left + share * box.width, clientY: box.top + 9, bubbles: true };
  plot.dispatchEvent(new view.PointerEvent("pointermove", at));
  found.pointed.push(Number(slider.value));
}
inner.getElementById("back").click();
found.back = shown();
found.height = box.height;
found.paths = [...inner.querySelectorAll("svg path")].map(function (path) {
  return [path.querySelector("title").textContent, path.getBBox().width, path.getBBox().height];
});
found.title = inner.querySelector("svg > title").textContent;
found.tensors = [...inner.querySelectorAll("tbody tr td.name")].map(function (cell) {
  return cell.textContent;
});
"""


@in_a_browser
def test_the_page_in_a_browser(made: Plan, page: str, tmp_path: Path) -> None:
    drawn = make_chart(made)
    columns = [0, drawn.peak, *range(7, len(drawn.columns), 97), len(drawn.columns) - 1]
    found = probe(page, _PROBE, tmp_path, columns)

    def expected(column: int) -> list[Any]:
        place = f"{drawn.moments[column]}, {drawn.ops[column]}"
        number = f"(op {drawn.columns[column].slot + 1} of {drawn.slots})"
        kinds = [[kind, format_bytes(row[column])] for kind, row in drawn.kinds.items()]
        return [format_bytes(drawn.totals[column]), f"{place} {number}", kinds[::-1]]

    assert found["errors"] == []
    assert found["first"] == found["back"] == expected(drawn.peak)
    assert found["moments"] == [expected(column) for column in columns]
    assert found["pointed"][0] <= 1 and found["pointed"][2] >= len(drawn.columns) - 2
    middle = drawn.columns[found["pointed"][1]]
    assert middle.start <= drawn.slots / 2 <= middle.stop
    assert [kind for kind, _, _ in found["paths"]] == list(reversed(drawn.kinds))
    assert all(width > 0 and height > 0 for _, width, height in found["paths"])
    assert found["title"] == "LlamaForCausalLM: memory of a training step"
    assert found["width"] <= PHONE and found["height"] > 200
    names = [f"{tensor.path}{tensor.kind}" for tensor in drawn.at_peak]
    assert found["tensors"] == names


@in_a_browser
def test_the_colours_are_on_the_screen(page: str, made: Plan, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    size = "--window-size=500,1300"
    browse(size, f"--screenshot={tmp_path / 'page.png'}", (tmp_path / "page.html").as_uri())
    with Image.open(tmp_path / "page.png") as image:
        seen = {pixel for _, pixel in image.convert("RGB").getcolors(1 << 20) or []}
    for kind in make_chart(made).kinds:
        assert tuple(bytes.fromhex(COLOURS[kind][1:])) in seen, kind


# -- figures and the command line ----------------------------------------------------------------


def test_figures(made: Plan, tmp_path: Path) -> None:
    from PIL import Image

    for name in ("one.svg", "two.svg", "a.PNG"):
        draw_timeline(made, tmp_path / name)
    text = (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert text == (tmp_path / "two.svg").read_text(encoding="utf-8")
    drawn = make_chart(made)
    peak = drawn.peak
    for expected in (
        drawn.title,
        f"peak {format_bytes(drawn.peak_bytes)}",
        drawn.peak_at,
        f"budget {format_bytes(drawn.budget_bytes)}",
        *drawn.phases,
        *(f"{kind}: {format_bytes(row[peak])}" for kind, row in drawn.kinds.items()),
        *(tensor.path for tensor in drawn.at_peak[:8]),
    ):
        assert escape(expected) in text, expected
    with Image.open(tmp_path / "a.PNG") as image:
        assert image.size[0] > 1000
        seen = {pixel for _, pixel in image.convert("RGB").getcolors(1 << 20) or []}
    for kind in drawn.kinds:
        assert tuple(bytes.fromhex(COLOURS[kind][1:])) in seen, kind


@pytest.mark.parametrize("name", ["step.html", "step.svg"])
def test_show_draws_into_a_file(made: Plan, tmp_path: Path, capsys: Output, name: str) -> None:
    made.save(tmp_path / "plan.json")
    path = tmp_path / name
    assert cli.main(["show", str(tmp_path / "plan.json"), "--timeline", str(path)]) == 0
    assert capsys.readouterr() == ("", "")
    assert path.read_text(encoding="utf-8").rstrip().endswith(("</html>", "</svg>"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("step.gif", "cannot draw step.gif: name a file that ends in .html, .png or .svg"),
        ("step", "cannot draw step: "),
        ("missing/step.svg", "there is no directory missing"),
    ],
)
def test_what_cannot_be_drawn_is_refused_first(capsys: Output, name: str, expected: str) -> None:
    # There is no such plan either: the picture is what is looked at first.
    assert cli.main(["show", "no-plan.json", "--timeline", name]) == 2
    assert expected in capsys.readouterr().err


def test_without_matplotlib_the_way_out_is_named(
    made: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.startswith("memfit.integrations.timeline.figure")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PictureError, match=r"without matplotlib: `pip install 'memfit\[plot\]'`"):
        draw_timeline(made, tmp_path / "step.png")
    draw_timeline(made, tmp_path / "step.html")
