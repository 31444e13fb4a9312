"""Where a report is written: only what an earlier report wrote is replaced."""

import pytest

from pilot_flwr.cli import main as cli
from pilot_flwr.errors import ConfigError
from pilot_flwr.report.page import Figure, Page, Panel, write_page


def page(*names):
    figures = [
        Figure(name, name, "", [Panel(lambda axes: axes.plot([0, 1]), "")]) for name in names
    ]
    return Page("a report", [], [], figures, files=[("words", '<section id="holiday">')])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["index.html", "holiday.png"])
def test_a_folder_of_somebody_elses_is_left_alone(tmp_path, capsys, finished, name):
    (tmp_path / name).write_text("<title>my site</title>")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="holds no report.*`--out`"):
        write_page(page("losses"), tmp_path)
    assert cli.main(["report", str(finished.folder.path), "--out", str(tmp_path)]) == 2
    assert "`--out`" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_of_an_earlier_report_only_its_own_files_are_replaced(tmp_path):
    write_page(page("losses", "router"), tmp_path)
    for name in ("holiday.png", "words.png", "scores.png"):
        (tmp_path / name).write_bytes(b"mine")
    write_page(page("losses"), tmp_path)
    found = contents(tmp_path)
    assert set(found) == {"index.html", "losses.png", "holiday.png", "words.png", "scores.png"}
    assert found["holiday.png"] == found["words.png"] == found["scores.png"] == b"mine"


def test_a_file_in_the_place_of_a_new_figure_is_left_alone(tmp_path):
    write_page(page("losses"), tmp_path)
    (tmp_path / "seeds.png").write_bytes(b"mine")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="seeds.png exists"):
        write_page(page("losses", "seeds"), tmp_path)
    assert contents(tmp_path) == before


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "report").write_text("")
    with pytest.raises(ConfigError, match="which is not a folder"):
        write_page(page(), tmp_path / "report")


def test_a_report_that_was_broken_off_can_be_written_again(tmp_path, monkeypatch):
    def full(figure, folder):
        raise OSError("disk full")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="disk full"):
        patched.setattr("pilot_flwr.report.page.save_png", full)
        write_page(page("losses"), tmp_path)
    write_page(page("losses"), tmp_path)
    assert set(contents(tmp_path)) == {"index.html", "losses.png"}
