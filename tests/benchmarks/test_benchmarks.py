"""The benchmarks run, in sizes at which their figures mean nothing, and README's table is theirs."""

import json

import pytest
import torch

from benchmarks.__main__ import BEGIN, END, HEADLINES, NAMES, earlier, headlines, run, table, write_between
from benchmarks.harness import Result, Row, Settings, Times, in_turn, machine, peak_bytes, ratio_row, value_row

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs(name, tmp_path):
    result = run(name, Settings(quick=True), tmp_path)
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert [row["case"] for row in found["rows"]] == [row.case for row in result.rows]
    assert len(set(map(str, result.rows))) == len(result.rows) > 0
    assert all(bool(row.target) == (row.holds is not None) for row in result.rows)
    assert {case for benchmark, case, _ in HEADLINES if benchmark == name} <= {row.case for row in result.rows}
    assert found["measurements"]
    assert (tmp_path / f"{name}.png").stat().st_size > 1000
    assert table([earlier(name, tmp_path)]) == table([result])


def test_runs_in_turn_are_paired_and_change_their_order():
    order = []
    times = in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 1e-9, least=4, most=4, warm_up=0)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert {name: len(seconds) for name, seconds in times.seconds.items()} == {"a": 4, "b": 4}


def test_a_ratio_is_the_median_of_ratios_not_the_ratio_of_medians():
    times = Times({"a": [1.0, 20.0, 300.0], "b": [1.0, 10.0, 30.0]})
    assert times.ratio("a", "b").middle == 2.0


@pytest.mark.parametrize(
    ("limits", "holds"), [({"at_most": 2.0}, True), ({"at_most": 1.9}, False), ({"at_least": 2.1}, False)]
)
def test_verdicts(limits, holds):
    row = ratio_row("", Times({"a": [2.0], "b": [1.0]}).ratio("a", "b"), **limits)
    assert row.holds is holds
    assert ("missed" in row.verdict) is not holds


def test_peak_memory_is_what_was_held_at_once():
    def run():
        held = torch.empty(1000, 1000)
        for _ in range(5):
            torch.empty(500, 1000)
        return held

    assert 6_000_000 <= peak_bytes(run) < 6_100_000


def test_what_another_machine_found_is_not_shown(tmp_path):
    assert earlier("compose", tmp_path) is None
    (tmp_path / "compose.json").write_text(json.dumps({"machine": machine() | {"threads": 99}, "rows": []}))
    assert earlier("compose", tmp_path) is None


def test_a_report_replaces_the_one_that_stands_in_a_file(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_between(page, "new")
    assert page.read_text() == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    page.write_text("no such lines")
    with pytest.raises(SystemExit, match="no lines"):
        write_between(page, "new")


def test_the_readmes_table_has_the_rows_that_there_are():
    name, case, label = HEADLINES[0]
    result = Result("T", [Row(case, "0.9 ×"), Row("another", "5")], {}, None)
    assert headlines({name: result}).splitlines()[2:] == [f"| {label} | 0.9 × |"]


def test_table():
    rows = [value_row("one", "3 s", 3.0, "s", at_most=1), Row("two", "5")]
    lines = table([Result("T", rows, {}, None)]).splitlines()
    assert lines[2:] == ["| **T** | one | 3 s | ≤ 1 s | **missed** |", "|  | two | 5 |  |  |"]
