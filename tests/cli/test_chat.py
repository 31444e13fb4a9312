"""`pilot-flwr chat`: one question, or a conversation over a pipe."""

import io

import pytest
from PIL import Image

from pilot_flwr.cli import main as cli


@pytest.fixture
def chat(finished, monkeypatch, capsys):
    """Run the command with lines on standard input; return its lines of output."""

    def call(*arguments, lines=(), who=("--client", "vqa-0"), code=0):
        text = b"".join(
            (line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines
        )
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
        words = ["chat", str(finished.folder.path), *who, "--max-new-tokens", "6", *arguments]
        assert cli.main(words) == code
        captured = capsys.readouterr()
        return captured.out.splitlines(), captured.err

    return call


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "an image.png"
    Image.effect_noise((32, 32), 90).save(path)
    return path


def test_one_question_about_an_image(chat, image):
    (answer,), _ = chat("--image", str(image), "--question", "What digit is at the top left?")
    assert answer
    again, _ = chat(
        lines=[f"/image {image}", "What digit is at the top left?", "/quit", "never asked"]
    )
    assert again == [answer]


def test_a_conversation_has_a_memory_until_it_is_reset(chat, image):
    about, question = f"/image {image}", "What digit is at the top left?"
    answers, said = chat(lines=[about, question, "", question, "/reset", about, question])
    assert len(answers) == 3
    assert answers[0] == answers[2]
    assert "vqa-0, stage 2, task vqa" in said


def test_mistakes_do_not_end_it(chat):
    answers, said = chat(lines=["/image absent.png", "/help", "<image>", "Hello"])
    assert len(answers) == 1
    assert "absent.png cannot be opened" in said
    assert "/reset" in said and "must not contain <image>" in said


def test_what_is_no_file_and_no_text_does_not_end_it_either(chat):
    lines = [
        "/image ~no-such-user-at-all/x.png",
        b"/image a\0b.png",
        "/image " + "x" * 5000,
        b"caf\xe9?",
        "Hello",
    ]
    answers, said = chat(lines=lines)
    assert len(answers) == 1
    assert "~no-such-user-at-all/x.png' cannot be opened" in said
    assert said.count("cannot be opened") == 3
    assert "not valid UTF-8" in said
    _, said = chat("--question", "caf\udce9", code=1)
    assert "not valid UTF-8" in said
    _, said = chat("--image", "~no-such-user-at-all/x.png", "--question", "What?", code=1)
    assert "cannot be opened" in said


def test_the_consensus_model(chat):
    (answer,), said = chat(lines=["Hello"], who=("--task", "counting"))
    assert "consensus of counting, stage 1" in said


def test_what_is_wrong_is_said(chat, tmp_path):
    _, said = chat("--image", "absent.png", "--question", "What?", code=1)
    assert "absent.png cannot be opened" in said
    _, said = chat("--max-new-tokens", "0", code=2)
    assert "`--max-new-tokens` is 0" in said
    _, said = chat("--state", str(tmp_path), who=("--task", "vqa"), code=2)
    assert "`--state` needs `--client`" in said
