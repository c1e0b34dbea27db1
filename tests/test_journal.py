"""What is measured once is not measured again, whatever interrupts."""

import json

import pytest

import dpcache
from dpcache.files.journal import Journal


def never():
    raise AssertionError("measured again")


def test_results_outlive_the_process_that_measured_them(tmp_path):
    path = tmp_path / "deep" / "j.jsonl"
    first = Journal(path, {"inputs": 1})
    assert first.get("a", lambda: [1.5, 2.0]) == [1.5, 2.0]
    assert first.get("a", never) == [1.5, 2.0]
    with pytest.raises(KeyboardInterrupt):
        first.get("b", interrupt)
    second = Journal(path, {"inputs": 1})
    assert second.get("a", never) == [1.5, 2.0]
    assert second.get("b", lambda: 3) == 3
    assert Journal(None, {}).get("a", lambda: 7) == 7


def interrupt():
    raise KeyboardInterrupt


def test_a_line_cut_short_is_measured_again(tmp_path):
    path = tmp_path / "j.jsonl"
    journal = Journal(path, {"seed": 1})
    journal.get("a", lambda: 1)
    journal.get("b", lambda: 2)
    path.write_text(path.read_text()[:-4])
    again = Journal(path, {"seed": 1})
    assert again.get("a", never) == 1
    assert again.get("b", lambda: 5) == 5
    assert Journal(path, {"seed": 1}).get("b", never) == 5
    assert [json.loads(line) for line in path.read_text().splitlines()][-1]["result"] == 5


@pytest.mark.parametrize("text", ["", "hello\n", "[1]\n{}\n", '{"format": "other"}\n'])
def test_other_files_are_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "j.jsonl"
    path.write_text(text)
    with pytest.raises(dpcache.FileFormatError, match="delete it or name another"):
        Journal(path, {"seed": 1})
    assert path.read_text() == text


def test_of_another_search(tmp_path):
    Journal(tmp_path / "j.jsonl", {"inputs": 1})
    with pytest.raises(dpcache.FileFormatError, match="another search, with other inputs:"):
        Journal(tmp_path / "j.jsonl", {"inputs": 2})
