"""``memfit curve``: more memory is never slower, and what is done by hand is no better."""

import csv
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import transformers

from memfit.integrations import cli
from memfit.integrations.curve import draw_curve
from memfit.planner import InfeasibleBudget, plan
from memfit.planner.curve import BY_HAND, PLAN, Point, find_curve
from memfit.planner.preparing import prepare
from memfit.planner.solving import Outcome, Task
from memfit.solvers import SOLVERS
from tests.browser import PHONE, in_a_browser, probe

OPTIONS: dict[str, Any] = {"device": "cpu", "costs": "roofline"}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_curve_is_monotone_and_below_what_is_done_by_hand(
    name: str, make: Callable[..., Any]
) -> None:
    model, batch = make(name, layers=3)
    points = find_curve(prepare(model, batch, **OPTIONS), 7)
    planned = [point for point in points if point.name == PLAN]
    by_hand = [p.name for p in points[7:]]
    assert {"none", "every_2", "full"} <= set(by_hand)
    assert by_hand == [name for name in BY_HAND if name in by_hand]
    assert planned[0].overhead > planned[-1].overhead == 0
    for a, b in pairwise(planned):
        assert a.budget_bytes < b.budget_bytes
        assert a.overhead >= b.overhead and a.peak_bytes <= b.peak_bytes
    for point in points:
        assert point.peak_bytes <= point.budget_bytes
    for hand in points[7:]:
        made = plan(model, max(hand.budget_bytes, planned[0].budget_bytes), batch, **OPTIONS)
        assert made.predicted.overhead <= hand.overhead + 1e-9
    with pytest.raises(InfeasibleBudget):
        plan(model, int(planned[0].budget_bytes * 0.97), batch, **OPTIONS)


def test_the_curve_is_monotone_whatever_the_solver_finds(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(*make("gpt2", layers=4), **OPTIONS)
    task, most = prepared.task, find_curve(prepared, 2)[1].budget_bytes
    least = task.smallest_budget()
    known = [task.within(least + (most - least) * i // 11).solve("auto") for i in range(12)]
    known += [task.simulate(SOLVERS[name](task.problem)) for name in BY_HAND]  # worse than need be
    solve, random = Task.solve, Random(0)

    def by_luck(self: Task, solver: str) -> Outcome:
        own = self.problem.budget_bytes
        fitting = [outcome for outcome in known if outcome.timeline.peak_bytes <= own]
        return random.choice(fitting) if fitting else solve(self, solver)

    monkeypatch.setattr(Task, "solve", by_luck)
    for _ in range(6):
        planned = [point for point in find_curve(prepared, 12) if point.name == PLAN]
        for a, b in pairwise(planned):
            assert a.overhead >= b.overhead and a.peak_bytes <= b.peak_bytes
            assert a.peak_bytes <= a.budget_bytes


def test_a_curve_has_two_ends(make: Callable[..., Any]) -> None:
    prepared = prepare(*make("bert", layers=2), **OPTIONS)
    with pytest.raises(ValueError, match="points is 1"):
        find_curve(prepared, 1)
    first, last = (p for p in find_curve(prepared, 2) if p.name == PLAN)
    assert first.peak_bytes < last.peak_bytes


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 2, "vocab_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_positions": 64}))
    step = ["--batch-size", "4", "--device", "cpu", "--costs", "roofline", "--points", "4"]
    return ["curve", str(tmp_path / "config.json"), *step]


def test_the_forms_agree(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    table, png, svg = (tmp_path / name for name in ("curve.csv", "curve.png", "curve.svg"))
    assert cli.main([*words, "--json", "--csv", str(table), "--plot", str(png)]) == 0
    found = json.loads(capsys.readouterr().out)
    points = [Point(**point) for point in found["points"]]
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["name"], int(r["peak_bytes"])) for r in rows] == [
        (p.name, p.peak_bytes) for p in points
    ]
    assert png.read_bytes().startswith(b"\x89PNG")
    assert cli.main([*words, "--plot", str(svg)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [p.name for p in points]
    assert all(len(line) <= 80 for line in lines)
    assert all(point.name in svg.read_text() for point in points if point.name != PLAN)


def test_what_is_the_same_choice_is_listed_once(make: Callable[..., Any]) -> None:
    model = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(depths=[2, 2], embedding_size=8, hidden_sizes=[16, 32])
    )
    batch = {"pixel_values": torch.ones(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    points = find_curve(prepare(model.train(), batch, **OPTIONS), 2)
    names = [point.name for point in points if point.name != PLAN]
    assert "keep_attention" not in names and names[0] == "none"


POINTS = (
    Point(PLAN, 3 << 30, 3 << 30, 1.2, 0.2),
    Point(PLAN, 5 << 30, 5 << 30, 1.0, 0.0),
    Point("none", 5 << 30, 5 << 30, 1.0, 0.0),
    Point("<full>", 3 << 30, 3 << 30, 1.33, 0.33),
)
_PROBE = """
const plot = inner.getElementById("plot"), shown = inner.getElementById("shown");
const dots = [...inner.querySelectorAll(".dot")];
found.told = dots.map(function (dot) {
  const box = dot.getBoundingClientRect();
  const at = { clientX: box.left + 4, clientY: box.top + 4, bubbles: true };
  plot.dispatchEvent(new view.PointerEvent("pointermove", at));
  return shown.textContent;
});
found.places = dots.map(function (dot) {
  const box = dot.getBoundingClientRect(), around = plot.getBoundingClientRect();
  return [(box.x - around.x) / around.width, (box.y - around.y) / around.height];
});
dots[1].focus();
found.focused = shown.textContent;
found.marked = inner.querySelectorAll(".dot.shown").length;
found.rows = inner.querySelectorAll("tbody tr").length;
"""


@in_a_browser
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    draw_curve(POINTS, "A & B", tmp_path / "curve.html")
    found = probe((tmp_path / "curve.html").read_text(), _PROBE, tmp_path)
    assert found["errors"] == []
    assert found["told"][0] == "plan: peak 3.00 GiB, overhead 20.0 %, step 1.20 s"
    assert found["told"][3] == "<full>: peak 3.00 GiB, overhead 33.0 %, step 1.33 s"
    assert found["focused"] == "plan: peak 5.00 GiB, overhead 0.0 %, step 1.00 s"
    assert (found["marked"], found["rows"]) == (1, len(POINTS))
    plan, free, _, full = found["places"]
    assert plan[0] == full[0] < free[0] and full[1] < plan[1] < free[1]
    assert all(0 <= share < 1 for place in found["places"] for share in place)
    assert found["width"] <= PHONE


def test_the_page_asks_for_nothing_from_elsewhere(tmp_path: Path) -> None:
    draw_curve(POINTS, "</script>", tmp_path / "curve.html")
    page = (tmp_path / "curve.html").read_text()
    assert not re.findall(r"https?:|//\w|url\(|@import|\bsrc=|\bhref=|fetch\(|import\(", page)
    assert page.count("</script>") == 1 and "<full>" not in page


def test_one_point_is_drawn(tmp_path: Path) -> None:
    draw_curve(POINTS[1:2], "A", tmp_path / "curve.html")
    assert "peak 5.00 GiB" in (tmp_path / "curve.html").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--points", "1"], "'1' is not a number from 2 up"),
        (["--plot", "curve.pdf"], "ends in .html, .png or .svg"),
        (["--csv", "nowhere/curve.csv"], "there is no directory nowhere"),
    ],
)
def test_wrong_words_are_named(
    words: list[str], more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*words, *more]) == 2
    assert message in capsys.readouterr().err
