"""Tables of sweeps: their statistics, and what stands in them."""

import math
import random

import pytest
from scipy import stats

from pilot_flwr.cli import main as cli
from pilot_flwr.errors import ConfigError
from pilot_flwr.sweeps.compare import as_latex, as_markdown, compare, holm, interval, paired
from pilot_flwr.sweeps.results import as_csv


def test_interval_is_students():
    values = [0.61, 0.58, 0.66, 0.6, 0.63]
    low, high = stats.t.interval(0.95, 4, loc=sum(values) / 5, scale=stats.sem(values))
    found = interval(values)
    assert found.mean == pytest.approx((low + high) / 2, abs=1e-12)
    assert found.half_width == pytest.approx((high - low) / 2, abs=1e-12)
    # Two values: s / sqrt(2) is half their distance, and t is tan(0.475 pi).
    assert interval([0.0, 1.0]).half_width == pytest.approx(0.5 * math.tan(0.475 * math.pi))
    assert interval([0.3]) == (0.3, None)


def test_the_test_is_scipys_paired_one():
    draw = random.Random(0)
    a = [draw.random() for _ in range(6)]
    b = [draw.random() for _ in range(6)]
    assert paired(a, b).p == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=1e-12)
    assert paired(a, b).difference.mean == pytest.approx(sum(a) / 6 - sum(b) / 6)
    for same in (
        ([1.0], [0.0]),
        (a, a),
        ([2.0, 3.0], [1.0, 2.0]),
        ([0.7, 0.8, 0.9], [0.6, 0.7, 0.8]),
    ):
        assert paired(*same).p is None


def test_holm_by_a_known_case_and_by_its_definition():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    draw = random.Random(1)
    values = [draw.random() ** 3 for _ in range(9)]
    for level in (0.01, 0.05, 0.2, 0.7):  # step down: reject while p(k) <= level / (m - k + 1)
        rejected = set()
        for rank, index in enumerate(sorted(range(9), key=values.__getitem__)):
            if values[index] > level / (9 - rank):
                break
            rejected.add(index)
        assert {i for i, p in enumerate(holm(values)) if p <= level} == rejected
    assert holm([None, 0.5, None]) == [None, 0.5, None]


def row(method, seed, a, b, **more):
    return {
        "name": "demo", "method": method, "variant": "", "seed": str(seed), "status": "done",
        "mean": str((a + b) / 2), "zero_shot_mean": "0.25", "score.a": str(a), "score.b": str(b),
        "zero_shot.a": "0.2", "zero_shot.b": "0.3", "metrics": "a:f1 b:f1", "settings": method,
        "overrides": f"strategy={method}", "job": f"{method}-{seed}", "evaluated_on": "test",
        "bytes_up": "2000", "bytes_down": "1000", "seconds": "60", "error": "", **more,
    }  # fmt: skip


ROWS = [
    *(row("pilot", seed, 0.6 + 0.01 * seed, 0.8) for seed in range(3)),
    *(row("local", seed, 0.5, 0.7 + 0.02 * seed) for seed in range(4)),
]


def test_a_row_per_method_with_its_mean_interval_and_test():
    (found,) = compare(ROWS, "local")
    untouched, pilot, local = found.methods
    assert (untouched.label, untouched.seeds, untouched.interval().mean) == (
        "untouched base",
        (0, 1, 2, 3),
        0.25,
    )
    assert (pilot.seeds, local.seeds) == ((0, 1, 2), (0, 1, 2, 3))
    assert pilot.interval("a").mean == pytest.approx(0.61)
    assert pilot.interval() == pytest.approx(interval([0.7, 0.705, 0.71]))
    expected = stats.ttest_rel([0.7, 0.705, 0.71], [0.6, 0.61, 0.62])  # the seeds of both
    assert (pilot.test.pairs, pilot.test.p) == (3, pytest.approx(expected.pvalue))
    assert local.test is None
    text = as_markdown(found, costs=True)
    assert (
        "| pilot          | 3 | 0.610 ± 0.025 | 0.800 ± 0.000 | 0.705 ± 0.012 | +0.095 ± " in text
    )
    assert "2.0 kB  | 1.0 kB" in text
    assert "1 min 0 s" in text
    assert "The methods have different numbers of seeds." in text


def test_latex_is_whole_and_escaped():
    (found,) = compare([row("pilot_m1", 0, 0.5, 0.5), row("pilot_m1", 1, 0.7, 0.5)])
    text = as_latex(found)
    assert r"pilot\_m1 & 2 & 0.600 $\pm$ 1.271 & 0.500 $\pm$ 0.000 & 0.550 $\pm$ 0.635 \\" in text
    assert text.count(r"\begin{tabular}{lrrrr}") == text.count(r"\end{tabular}") == 1


def test_names_splits_and_variants_stand_apart():
    rows = [
        row("pilot", 0, 0.5, 0.5),
        row("pilot", 0, 0.6, 0.6, variant="train.lr_scale=2", settings="x"),
        row("pilot", 0, 0.1, 0.1, name="other"),
        row("pilot", 0, 0.2, 0.2, evaluated_on="validation"),
    ]
    found = compare(rows)
    assert [comparison.title for comparison in found] == [
        "demo, test split", "other, test split", "demo, validation split",
    ]  # fmt: skip
    labels = [line.label for line in found[0].methods]
    assert labels == ["untouched base", "pilot", "pilot train.lr_scale=2"]


def test_nothing_is_left_out_in_silence(tmp_path, capsys):
    failed = row("pilot", 9, 0, 0, status="failed", mean="")
    again = row("pilot", 0, 0.9, 0.9)
    (found,) = compare([*ROWS, failed, again])
    text = as_markdown(found)
    assert "Omitted for lack of scores: pilot-9 (failed)." in text
    assert "1 row given twice: the last one is used." in text
    with pytest.raises(ConfigError, match="different settings"):
        compare([*ROWS, row("pilot", 7, 1, 1, settings="others")])
    with pytest.raises(
        ConfigError, match="`--baseline` is 'fedit' but 'demo' has 'pilot', 'local'"
    ):
        compare(ROWS, "fedit")
    path = tmp_path / "results.csv"
    path.write_text(as_csv([failed]))
    assert cli.main(["table", str(path)]) == 2
    assert "No finished job has scores" in capsys.readouterr().err


def test_the_command_reads_files_and_folders(tmp_path, capsys):
    for name, rows in (("x", ROWS[:3]), ("y", ROWS[3:])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.csv").write_text(as_csv(rows))
    places = [str(tmp_path / "x"), str(tmp_path / "y" / "results.csv")]
    assert cli.main(["table", *places, "--baseline", "local"]) == 0
    out = capsys.readouterr().out
    assert "| local " in out
    assert "Holm-corrected for 1 comparison." in out
    file = tmp_path / "t.tex"
    assert cli.main(["table", *places, "--format", "latex", "--out", str(file)]) == 0
    assert r"\toprule" in file.read_text()
    assert cli.main(["table", *places, "--out", str(file)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_latex_has_no_bare_signs_of_its_own_and_of_names():
    (found,) = compare(
        [
            *(row("a_b", seed, 0.9 + seed / 1000, 0.9) for seed in range(4)),
            *(row("c", seed, 0.1 + seed**2 / 1000, 0.1, variant=r"x=~\^$") for seed in range(4)),
        ],
        "a_b",
    )
    text = as_latex(found)
    assert r"& $<$ 0.001 \\" in text
    assert r"c x=\textasciitilde{}\textbackslash{}\textasciicircum{}\$ & 4 &" in text


def test_runs_of_different_lengths_are_not_averaged_and_are_told_apart():
    one, nine = row("pilot", 0, 0.5, 0.5, rounds="1"), row("local", 0, 0.5, 0.5, rounds="9")
    (found,) = compare([one, nine])
    assert "Runs have different `strategy.rounds`: 1, 9." in as_markdown(found)


def test_the_untouched_base_has_a_row_only_if_it_is_one_base():
    rows = [
        row("pilot", 0, 0.5, 0.5, variant="data.clients_per_task=2"),
        row("pilot", 0, 0.5, 0.5, variant="data.clients_per_task=3", **{"zero_shot.a": "0.9"}),
    ]
    (found,) = compare(rows)
    assert [line.label for line in found.methods] == [f"pilot {r['variant']}" for r in rows]


def test_a_first_evaluation_of_some_tasks_alone_is_no_score_of_the_base():
    (found,) = compare([row("pilot", 0, 0.5, 0.5, zero_shot_mean="", **{"zero_shot.b": ""})])
    assert [line.label for line in found.methods] == ["pilot"]
