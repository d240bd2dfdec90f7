"""Where rows come from: JSONL, JSON, CSV and Parquet files, saved and hub `datasets`, and what is in memory already.

`read_rows` gives every row with its place. A row that cannot be read (broken JSON, a CSV row of the wrong width, bytes
that are not UTF-8) comes as a `RawRow` with an `error` and the reading goes on, so that the caller decides.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from posttrain.data.rows import BadRow, Origin, RawRow, describe
from posttrain.trajectory import PosttrainError

Source = str | Path | Iterable[Mapping[str, Any]] | Mapping[str, Any]  # a mapping holds the rows of each split
EXTENSIONS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
SAVED = ("state.json", "dataset_dict.json")  # what a folder of `datasets.save_to_disk` holds
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def read_rows(source: Source, *, split: str = "train") -> Iterator[RawRow]:
    """Read rows one by one.

    Args:
        source: a path to .jsonl, .ndjson, .json, .csv (each also with .gz) or .parquet; a folder written by
            `datasets.save_to_disk`; a hub id, with its configuration after a colon where it has several
            (`openai/gsm8k:main`); a list or any iterable of dicts; a `datasets.Dataset` or `DatasetDict`.
        split: which split to take where the source has splits.

    Raises:
        PosttrainError: missing file (with the nearest names), unsupported extension, file that cannot be parsed at all,
            unknown split, hub not reachable; and, once read to the end, a source without a single row.
    """
    if not isinstance(source, str | Path):
        return _in_memory(source, split)
    path = Path(source).expanduser()
    if path.is_dir():
        return _table(_saved_folder(path, split), str(source))
    if path.is_file():
        return _file(path)
    text = str(source)
    if isinstance(source, Path) or not _may_be_hub_id(text):
        raise _missing_file(path)
    return _table(_hub(text, split), f"{text}[{split}]")


def _may_be_hub_id(text: str) -> bool:
    """`org/name`, `org/name:configuration` or a bare `name`; not a relative path and not a file name."""
    looks_like_file = _extension(Path(text)) in EXTENSIONS or ("/" not in text and "." in text)
    return HUB_ID.fullmatch(text) is not None and not text.startswith(".") and not looks_like_file


def _file(path: Path) -> Iterator[RawRow]:
    extension = _extension(path)
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if extension not in readers:
        raise PosttrainError(
            f"{path}: unsupported extension {extension or '(none)'!r}; expected {', '.join(EXTENSIONS)}"
        )
    return _at_least_one(readers[extension](path), str(path))


def _extension(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _missing_file(path: Path) -> PosttrainError:
    folder = path.parent
    if not folder.is_dir():
        return PosttrainError(f"no file {path}: the folder {folder} does not exist")
    names = sorted(entry.name for entry in folder.iterdir())
    nearest = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    there = f"did you mean {' or '.join(nearest)}?" if nearest else f"nothing in {folder.resolve()} has a similar name"
    return PosttrainError(f"no file {path}: {there}")


def _at_least_one(rows: Iterator[RawRow], name: str) -> Iterator[RawRow]:
    count = 0
    for count, row in enumerate(rows, start=1):  # noqa: B007 - the count is read after the loop
        yield row
    if not count:
        raise PosttrainError(f"{name} holds no rows")


# Text files


def _lines(path: Path) -> Iterator[str]:
    """Lines with their ends; bytes that are not UTF-8 become lone surrogates, which `_undecodable` recognises."""
    try:
        with _opened(path) as file:
            yield from file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise PosttrainError(f"{path}: the gzip file is broken ({error}); compress it again") from error
    except OSError as error:
        raise PosttrainError(f"{path}: cannot be read ({error.strerror or error})") from error


def _opened(path: Path) -> TextIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="")
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _undecodable(text: str) -> bool:
    return any("\udc80" <= character <= "\udcff" for character in text) if not text.isascii() else False


def _jsonl(path: Path) -> Iterator[RawRow]:
    index = 0
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        origin = Origin(path.name, index, number)
        index += 1
        if _undecodable(line):
            yield _not_utf8(origin)
            continue
        try:
            value = json.loads(line.rstrip("\r\n"))
        except (ValueError, RecursionError) as error:
            yield RawRow({}, origin, BadRow("broken JSON", _json_fault(error), origin))
            continue
        yield _row(value, origin)


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else _first_line(error)


def _json(path: Path) -> Iterator[RawRow]:
    """A list of objects, or an object with one list of objects (`{"data": [...]}`), each by the line it starts on."""
    text = "".join(_lines(path))
    if not text.strip():
        return
    if _undecodable(text):
        line = next(i for i, part in enumerate(text.splitlines(), start=1) if _undecodable(part))
        raise PosttrainError(f"{path}:{line}: not UTF-8 text; convert the file to UTF-8")
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = "; one object a line is JSONL: name the file .jsonl" if "Extra data" in str(error) else ""
        raise PosttrainError(
            f"{path}:{getattr(error, 'lineno', 1)}: broken JSON: {_json_fault(error)}{hint}"
        ) from error
    line, counted = 1, 0
    for index, (value, position) in enumerate(_items(text, _list_start(text, whole, path))):
        line += text.count("\n", counted, position)
        counted = position
        yield _row(value, Origin(path.name, index, line))


SEPARATORS = re.compile(r"[\s,:]*")  # the text is known to be valid JSON, so skipping these is enough


def _list_start(text: str, whole: Any, path: Path) -> int:
    """Position of the first item of the list of rows."""
    position = len(text) - len(text.lstrip()) + 1
    if isinstance(whole, list):
        return position
    lists = [key for key, value in whole.items() if isinstance(value, list)] if isinstance(whole, dict) else []
    if "data" not in lists and len(lists) != 1:
        raise PosttrainError(
            f'{path}: the file holds {describe(whole)}; expected a list of objects or {{"data": [...]}}'
        )
    wanted = "data" if "data" in lists else lists[0]
    decoder = json.JSONDecoder()
    while True:
        key, position = decoder.raw_decode(text, _skip(text, position))
        position = _skip(text, position)
        if key == wanted and text[position] == "[":
            return position + 1
        _, position = decoder.raw_decode(text, position)


def _items(text: str, position: int) -> Iterator[tuple[Any, int]]:
    decoder = json.JSONDecoder()
    while text[position := _skip(text, position)] != "]":
        value, end = decoder.raw_decode(text, position)
        yield value, position
        position = end


def _skip(text: str, position: int) -> int:
    match = SEPARATORS.match(text, position)
    return match.end() if match else position


def _csv(path: Path) -> Iterator[RawRow]:
    """Comma-separated with a header; a quoted field may span lines, the row is named by the line it starts on."""
    csv.field_size_limit(2**31 - 1)  # a long document is no fault; the default of 131,072 would raise
    reader = csv.reader(_lines(path), strict=True)
    header: list[str] | None = None
    index, start = 0, 1
    while True:
        fault = None
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            cells, fault = [], f"{error}"
        if not cells and fault is None:  # a blank line
            start = reader.line_num + 1
            continue
        origin = Origin(path.name, index, start)
        start = reader.line_num + 1
        if header is None:
            header = _header(cells, fault, path)
            continue
        index += 1
        if fault is None and len(cells) != len(header):
            fault = f"the row has {len(cells)} fields, the header has {len(header)}"
        if fault is not None:
            yield RawRow({}, origin, BadRow("broken CSV", fault, origin))
        elif any(_undecodable(cell) for cell in cells):
            yield _not_utf8(origin)
        else:
            yield RawRow({name: _cell(cell) for name, cell in zip(header, cells, strict=True)}, origin)


def _header(cells: list[str], fault: str | None, path: Path) -> list[str]:
    names = [cell.strip() for cell in cells]
    if fault is None and len(set(names)) < len(names):
        fault = f"the header names a column twice: {', '.join(names)}"
    if fault is not None:
        raise PosttrainError(f"{path}:1: broken CSV: {fault}; expected a header of unique column names")
    return names


def _cell(cell: str) -> Any:
    """Text, except that a list of messages, which CSV cannot hold otherwise, is written as JSON."""
    if re.match(r'\s*\[\s*\{\s*"', cell):
        try:
            value = json.loads(cell)
        except json.JSONDecodeError:
            return cell
        if all(isinstance(item, dict) and {"role", "from"} & set(item) for item in value):
            return value
    return cell


# Tables


def _parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = (record for batch in file.iter_batches(batch_size=1024) for record in batch.to_pylist())
            for index, record in enumerate(batches):
                yield RawRow(record, Origin(path.name, index))
    except (pyarrow.ArrowException, OSError) as error:
        raise PosttrainError(f"{path}: cannot be read as Parquet ({_first_line(error)})") from error


def _saved_folder(path: Path, split: str) -> Iterable[Mapping[str, Any]]:
    import datasets

    if not any((path / name).is_file() for name in SAVED):
        files = sorted(entry.name for entry in path.iterdir() if _extension(entry) in EXTENSIONS)
        hint = f"; name one of its files: {', '.join(files[:5])}" if files else ""
        raise PosttrainError(f"the folder {path} was not written by datasets.save_to_disk{hint}")
    try:
        return _of_split(datasets.load_from_disk(str(path)), split, str(path))
    except (OSError, ValueError, KeyError) as error:
        raise PosttrainError(f"the saved data set {path} cannot be read ({_first_line(error)})") from error


def _hub(identifier: str, split: str) -> Iterable[Mapping[str, Any]]:
    import datasets
    from datasets import exceptions

    name, _, configuration = identifier.partition(":")
    try:
        return datasets.load_dataset(name, configuration or None, split=split)
    except ConnectionError as error:
        raise PosttrainError(
            f"{identifier!r} is no file here, and the hub cannot be reached to look for a data set of that name "
            f"({_first_line(error)})"
        ) from error
    except exceptions.DatasetNotFoundError as error:
        raise PosttrainError(
            f"{identifier!r} is neither a file here nor a data set on the hub that you may read"
        ) from error
    except (OSError, ValueError, RuntimeError, exceptions.DatasetsError) as error:
        raise PosttrainError(f"the data set {identifier!r} cannot be loaded: {_first_line(error)}") from error


def _in_memory(source: Iterable[Any], split: str) -> Iterator[RawRow]:
    name = type(source).__name__
    if isinstance(source, Mapping):
        source = _of_split(source, split, f"the {name}")
        name = f"{name}[{split}]"
    if not isinstance(source, Iterable):
        raise PosttrainError(f"the rows are {describe(source)}; expected a path, a hub id or an iterable of dicts")
    return _table(source, name)


def _of_split(source: Any, split: str, name: str) -> Iterable[Mapping[str, Any]]:
    """The rows of one split where the source has several (`DatasetDict`, a dict of lists)."""
    if not isinstance(source, Mapping):
        return source
    if split not in source or not isinstance(source[split], Iterable) or isinstance(source[split], str | Mapping):
        raise PosttrainError(f"{name} has no split {split!r}; it has {', '.join(map(str, source)) or 'none'}")
    return source[split]


def _table(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[RawRow]:
    return _at_least_one((_row(row, Origin(name, index)) for index, row in enumerate(rows)), name)


def _row(value: Any, origin: Origin) -> RawRow:
    if isinstance(value, Mapping):
        return RawRow(dict(value), origin)
    return RawRow({}, origin, BadRow("wrong type", f"the row is {describe(value)}, expected an object", origin))


def _not_utf8(origin: Origin) -> RawRow:
    return RawRow({}, origin, BadRow("not UTF-8", "the row holds bytes that are not UTF-8 text", origin))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
