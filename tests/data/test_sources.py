"""Reading rows: every kind of source, the place of every row, and faults named instead of raised."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data import read_rows
from posttrain.trajectory import PosttrainError

ROWS = [{"prompt": "one", "n": 1}, {"prompt": "zwei é 😀", "n": 2}, {"prompt": "three", "n": 3}]


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def jsonl(path: Path, rows: list) -> Path:
    return written(path, "".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "ROWS.JSONL"])
def test_jsonl_names_lines_and_leaves_blank_ones_out(tmp_path, name):
    path = written(tmp_path / name, '{"a": 1}\n\n  \n{"a": 2}\r\n{"a": 3}')
    rows = list(read_rows(path))
    assert [row.values for row in rows] == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert [str(row.origin) for row in rows] == [f"{name}:1", f"{name}:4", f"{name}:5"]
    assert [row.origin.index for row in rows] == [0, 1, 2]


def test_a_path_may_be_text_and_start_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    assert [row.values for row in read_rows(str(path))] == [{"a": 1}]


def test_gzipped_jsonl(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    rows = list(read_rows(path))
    assert [row.values for row in rows] == ROWS
    assert str(rows[1].origin) == "rows.jsonl.gz:2"


def test_a_broken_gzip_file_is_an_error_of_the_file(tmp_path):
    whole = gzip.compress(b'{"a": 1}\n' * 1000)
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PosttrainError, match=r"rows\.jsonl\.gz: the gzip file is broken .*; compress it again"):
        list(read_rows(path))


def test_a_file_that_may_not_be_read_is_an_error_of_the_file(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "rows.jsonl", ROWS)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PosttrainError, match=r"rows\.jsonl: cannot be read \(Permission denied\)$"):
        list(read_rows(path))


def test_broken_lines_are_named_and_the_reading_goes_on(tmp_path):
    path = tmp_path / "rows.jsonl"
    deep = b"[" * 100_000
    path.write_bytes(b'{"a": 1}\n{"a": \n[1]\n"x"\nnull\n{"a": "\xff"}\n' + deep + b'\n{"a": 2}\n')
    rows = list(read_rows(path))
    assert [str(row.error) if row.error else row.values for row in rows] == [
        {"a": 1},
        "rows.jsonl:2: broken JSON: Expecting value at column 7",
        "rows.jsonl:3: wrong type: the row is a list, expected an object",
        "rows.jsonl:4: wrong type: the row is text, expected an object",
        "rows.jsonl:5: wrong type: the row is null, expected an object",
        "rows.jsonl:6: not UTF-8: the row holds bytes that are not UTF-8 text",
        "rows.jsonl:7: broken JSON: nested too deeply",
        {"a": 2},
    ]


@pytest.mark.parametrize(
    "text",
    [
        '[{"a": 1},\n {"a": [2, {"b": "]"}]},\n\n  3]',
        '{"data":\n [{"a": 1},\n\n{"a": [2, {"b": "]"}]}, 3]}',
        '\n{"canary": "data", "n": {"data": [7]}, "examples": [{"a": 1}, {"a": [2, {"b": "]"}]},\n\n3]}',
    ],
    ids=["list", "data", "one list under another name"],
)
def test_json_names_the_line_each_row_starts_on(tmp_path, text):
    path = written(tmp_path / "rows.json", text)
    rows = list(read_rows(path))
    lines = {"[": [1, 2, 4], '{"data"': [2, 4, 4]}
    expected = next((v for k, v in lines.items() if text.startswith(k)), [2, 2, 4])
    assert [row.values for row in rows] == [{"a": 1}, {"a": [2, {"b": "]"}]}, {}]
    assert [row.origin.line for row in rows] == expected
    assert rows[2].error is not None
    assert rows[2].error.reason == "wrong type: the row is a number (3), expected an object"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n{"a": }]', r"rows\.json:2: broken JSON: Expecting value at column 7$"),
        ('{"a": 1}\n{"a": 2}', r"rows\.json:2: broken JSON: Extra data at column 1; one object a line is JSONL"),
        ('{"a": 1}', r"rows\.json: the file holds an object; expected a list of objects or"),
        ("5", r"rows\.json: the file holds a number \(5\); expected a list of objects or"),
        ("", r"rows\.json holds no rows"),
        ("[]", r"rows\.json holds no rows"),
    ],
)
def test_a_json_file_that_cannot_be_parsed_is_an_error_of_the_file(tmp_path, text, message):
    with pytest.raises(PosttrainError, match=message):
        list(read_rows(written(tmp_path / "rows.json", text)))


def test_json_that_is_not_utf8_names_the_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"a": 1},\n{"a": "\xe9"}]')
    with pytest.raises(PosttrainError, match=r"rows\.json:2: not UTF-8 text; convert the file to UTF-8"):
        list(read_rows(path))


def test_csv_names_the_line_each_row_starts_on(tmp_path):
    text = 'prompt,answer\n"two\nlines",4\n\n5" nail,"a ""b"""\n'
    rows = list(read_rows(written(tmp_path / "train.csv", text)))
    assert [row.values for row in rows] == [
        {"prompt": "two\nlines", "answer": "4"},
        {"prompt": '5" nail', "answer": 'a "b"'},
    ]
    assert [str(row.origin) for row in rows] == ["train.csv:2", "train.csv:5"]


def test_csv_reads_messages_written_as_json_and_leaves_other_text_alone(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = tmp_path / "chat.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["messages", "other", "third"])
        writer.writerow([json.dumps(messages), '[{"x": 1}]', '[{"x'])
    rows = list(read_rows(path))
    assert rows[0].values == {"messages": messages, "other": '[{"x": 1}]', "third": '[{"x'}


def test_broken_csv_rows_are_named_and_the_reading_goes_on(tmp_path):
    path = tmp_path / "train.csv"
    path.write_bytes(b'a,b\n1\n1,2,3\n"x"y,2\n\xff,2\n5,6\n"open,2\n7,8\n')
    rows = list(read_rows(path))
    assert [str(row.error) if row.error else row.values for row in rows] == [
        "train.csv:2: broken CSV: the row has 1 fields, the header has 2",
        "train.csv:3: broken CSV: the row has 3 fields, the header has 2",
        "train.csv:4: broken CSV: ',' expected after '\"'",
        "train.csv:5: not UTF-8: the row holds bytes that are not UTF-8 text",
        {"a": "5", "b": "6"},
        "train.csv:7: broken CSV: unexpected end of data",
    ]


def test_csv_takes_long_fields(tmp_path):
    rows = list(read_rows(written(tmp_path / "long.csv", "a\n" + "x" * 200_000 + "\n")))
    assert len(rows[0].values["a"]) == 200_000


@pytest.mark.parametrize("text", ["a,a\n1,2\n", 'a,"b"c\n1,2\n'])
def test_a_broken_csv_header_is_an_error_of_the_file(tmp_path, text):
    with pytest.raises(PosttrainError, match=r"train\.csv:1: broken CSV: .*; expected a header of unique column names"):
        list(read_rows(written(tmp_path / "train.csv", text)))


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    nested = [{**row, "messages": [{"role": "user", "content": "x"}]} for row in ROWS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(nested), path)
    rows = list(read_rows(path))
    assert [row.values for row in rows] == nested
    assert str(rows[2].origin) == "rows.parquet[2]"


def test_a_broken_parquet_file_is_an_error_of_the_file(tmp_path):
    with pytest.raises(PosttrainError, match=r"rows\.parquet: cannot be read as Parquet"):
        list(read_rows(written(tmp_path / "rows.parquet", "not parquet")))


def test_a_folder_of_datasets(tmp_path):
    import datasets

    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": saved, "test": saved.select([2])}).save_to_disk(str(tmp_path / "two"))
    one = list(read_rows(tmp_path / "one"))
    assert [row.values for row in one] == ROWS
    assert str(one[1].origin) == f"{tmp_path / 'one'}[1]"
    assert [row.values for row in read_rows(str(tmp_path / "two"), split="test")] == [ROWS[2]]
    with pytest.raises(PosttrainError, match=r"two has no split 'dev'; it has train, test"):
        read_rows(tmp_path / "two", split="dev")


def test_another_folder_names_the_files_to_choose_from(tmp_path):
    jsonl(tmp_path / "a.jsonl", ROWS)
    written(tmp_path / "notes.txt", "")
    message = r"was not written by datasets\.save_to_disk; name one of its files: a\.jsonl$"
    with pytest.raises(PosttrainError, match=message):
        read_rows(tmp_path)


def test_rows_in_memory():
    import datasets

    assert [row.values for row in read_rows(ROWS)] == ROWS
    assert str(list(read_rows(ROWS))[2].origin) == "list[2]"
    assert [str(row.origin) for row in read_rows(row for row in ROWS)] == [f"generator[{i}]" for i in range(3)]
    rows = list(read_rows(datasets.Dataset.from_list(ROWS)))
    assert [row.values for row in rows] == ROWS
    assert str(rows[0].origin) == "Dataset[0]"
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    assert str(list(read_rows(both))[1].origin) == "DatasetDict[train]:1"


def test_rows_in_memory_are_copied():
    given_row = {"prompt": "x"}
    next(read_rows([given_row])).values["prompt"] = "y"
    assert given_row == {"prompt": "x"}


def test_what_is_no_rows_at_all():
    wrong: Any = [5]
    assert str(next(read_rows(wrong)).error) == "list[0]: wrong type: the row is a number (5), expected an object"
    with pytest.raises(PosttrainError, match=r"^list holds no rows$"):
        list(read_rows([]))
    with pytest.raises(PosttrainError, match=r"the rows are a number \(5\); expected a path, a hub id or an iterable"):
        read_rows(wrong[0])
    with pytest.raises(PosttrainError, match=r"the dict has no split 'train'; it has prompt, answer"):
        read_rows({"prompt": ["a"], "answer": ["b"]})


def test_a_missing_file_names_the_nearest(tmp_path):
    jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(PosttrainError, match=r"no file .*tran\.jsonl: did you mean train\.jsonl\?$"):
        read_rows(tmp_path / "tran.jsonl")
    with pytest.raises(PosttrainError, match=r"no file .*zzz\.csv: nothing in .* has a similar name$"):
        read_rows(str(tmp_path / "zzz.csv"))
    with pytest.raises(PosttrainError, match=r"no file .*: the folder .*nowhere does not exist$"):
        read_rows(tmp_path / "nowhere" / "train.jsonl")


@pytest.mark.parametrize(
    "source", ["./data", "../data", "a/b/c", "train.txt", "train.jsonl", Path("org/name"), "a b/c"]
)
def test_what_cannot_be_a_hub_id_is_looked_for_as_a_file(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PosttrainError, match=r"^no file "):
        read_rows(source)


def test_an_unsupported_extension(tmp_path):
    message = r"train\.txt: unsupported extension '\.txt'; expected \.jsonl, \.ndjson, \.json, \.csv, \.parquet"
    with pytest.raises(PosttrainError, match=message):
        read_rows(written(tmp_path / "train.txt", "x"))


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file(tmp_path, text):
    with pytest.raises(PosttrainError, match=r"train\.jsonl holds no rows$"):
        list(read_rows(written(tmp_path / "train.jsonl", text)))
    with pytest.raises(PosttrainError, match=r"train\.csv holds no rows$"):
        list(read_rows(written(tmp_path / "train.csv", text + "a,b\n")))


def test_the_hub(monkeypatch):
    import datasets

    asked = []

    def load(name, configuration, **options):
        asked.append((name, configuration, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert str(list(read_rows("org/name"))[2].origin) == "org/name[train]:2"
    assert [row.values for row in read_rows("org/name:main", split="test")] == ROWS
    assert asked == [("org/name", None, {"split": "train"}), ("org/name", "main", {"split": "test"})]


def test_faults_of_the_hub_are_one_line_each(monkeypatch):
    import datasets
    from datasets import exceptions

    def failing(error):
        def load(*_, **__):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load)

    failing(ConnectionError("Couldn't reach the Hub\nlong story"))
    message = r"^'org/name' is no file here, and the hub cannot be reached .* \(Couldn't reach the Hub\)$"
    with pytest.raises(PosttrainError, match=message):
        read_rows("org/name")
    failing(exceptions.DatasetNotFoundError("gone"))
    with pytest.raises(PosttrainError, match=r"^'org/name' is neither a file here nor a data set on the hub"):
        read_rows("org/name")
    failing(ValueError("Unknown split 'dev'.\nmore"))
    with pytest.raises(PosttrainError, match=r"^the data set 'org/name' cannot be loaded: Unknown split 'dev'\.$"):
        read_rows("org/name", split="dev")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(rows=st.lists(st.dictionaries(st.text(max_size=4), json_values, max_size=3), min_size=1, max_size=5))
def test_json_of_any_shape_comes_back_whole(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("json") / "rows.json"
    for text in (json.dumps(rows), json.dumps({"version": 1, "data": rows}, indent=1)):
        path.write_text(text, encoding="utf-8")
        read = list(read_rows(path))
        assert [row.values for row in read] == rows
        lines = text.splitlines()
        assert all(lines[(row.origin.line or 0) - 1].lstrip("[ ").startswith("{") for row in read)
