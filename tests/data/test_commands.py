"""data.prepare and data.bench, as a user starts them."""

import json
import sys
from pathlib import Path

import pytest

from data import bench, prepare


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{i} " * (i + 1)}) for i in range(300)))
    return path


def call(main: object, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    main()


def test_prepare_tokenises_once_and_tells_what_is_kept(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], token_cache: Path
) -> None:
    arguments = ("data.name=documents", f"data.documents.source={source}", "data.documents.min_tokens=800")
    call(prepare.main, monkeypatch, *arguments)
    first, kept = capsys.readouterr().out.splitlines()
    assert first.startswith(f"tokenising {source} into {token_cache}")
    assert kept.startswith(f"{source}: kept 101 of 300 documents (33.7%)")
    call(prepare.main, monkeypatch, *arguments)
    assert capsys.readouterr().out.splitlines() == [kept]


def test_prepare_also_serves_tasks_in_text(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], token_cache: Path
) -> None:
    arguments = ("data.name=niah_essay", f"data.documents.source={source}")
    call(prepare.main, monkeypatch, *arguments)
    assert "kept 300 of 300 documents" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.name=passkey"], "data.name=passkey: reads no documents"),
        (["data.name=documents", "data.documents.source=/no/where"], "source=/no/where: no such file"),
        (["data.documents.mixture=[{source: a, weight: 0}]"], "sum to nothing"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        call(prepare.main, monkeypatch, *arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_bench_measures_every_way_of_reading(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"documents.source={source}", "train_length=64", "batch_size=4", "steps=3"]
    call(bench.main, monkeypatch, *settings, f"json={tmp_path}/out.json")
    results = json.loads((tmp_path / "out.json").read_text())
    assert [result["tokens"] > 0 for result in results.values()] == [True] * 4
    assert results["rows of a stream"]["tokens"] == 3 * 4 * 64
    assert "tokens/s a core" in capsys.readouterr().out
