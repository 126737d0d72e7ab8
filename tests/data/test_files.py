"""Data files as they come: line ends, encodings, dialects, sizes, pipes, damage; every error names the place."""

import csv
import gzip
import io
import json
import os
import threading
import tracemalloc
import warnings
from pathlib import Path

import pytest

from mixencoder.data import lines as line_reader
from mixencoder.data.candidates import read_candidates
from mixencoder.data.lines import read_lines
from mixencoder.data.tables import read_rows, source_name
from mixencoder.errors import DataError, InputError

DEEP = "[" * 200_000


def file(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(path: Path) -> list[dict]:
    return [row for _, row in read_rows(path)]


def refused(path: Path, **options) -> str:
    with pytest.raises(DataError) as caught:
        read_candidates(str(path), **options)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"a\nb\n", b"a\r\nb\r\n", b"a\rb\r", b"a\rb", b"\xef\xbb\xbfa\nb", b"\xef\xbb\xbfa\r\nb", b"a\r\n\r\nb"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_lines_end_in_every_common_way(tmp_path, content, packed):
    path = file(tmp_path / "a.txt.gz", gzip.compress(content, mtime=0)) if packed else file(tmp_path / "a.txt", content)
    assert read_candidates(str(path)).texts == ["a", "b"]


def test_a_return_inside_a_line_is_part_of_it(tmp_path):
    assert read_candidates(str(file(tmp_path / "a.txt", b"a\nb\rc\n"))).texts == ["a", "b\rc"]


def test_lines_longer_than_what_is_read_at_once_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(line_reader, "_BLOCK", 4)
    texts = ["y", "x" * 150, "", "z" * 9, "x" * 63, "x" * 62]
    for end in ("\n", "\r", "\r\n"):
        path = file(tmp_path / "a.txt", end.join(texts))
        assert [text for _, text in read_lines(path)] == texts


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-16-be"])
def test_another_encoding_is_named(tmp_path, encoding):
    message = refused(file(tmp_path / "a.txt", "hello\nyou\n".encode(encoding)))
    assert encoding[:6].upper() in message
    assert "expected" in message


def test_a_long_line_is_refused_with_its_place_and_without_its_size_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(line_reader, "LONGEST_LINE", 2**20)
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as packed:
        packed.write(b'{"text": "x"}\n{"text": "')
        for _ in range(64):
            packed.write(b"x" * 2**20)
    tracemalloc.start()
    message = refused(path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "line 2: longer than 1 MB; expected one record a line" in message
    assert most < 16 * 2**20
    with_returns = file(tmp_path / "b.txt", b"a\rb\r" + b"x" * (2**20 + 1))
    assert "line 3: longer than 1 MB" in refused(with_returns)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda packed: packed[: len(packed) // 2], "end-of-stream marker"),
        (lambda packed: packed[:20] + bytes([packed[20] ^ 255]) + packed[21:], "cannot be read"),
        (lambda packed: packed[:-8] + b"\0" * 8, "CRC"),
        (lambda packed: packed + b"junk", "Not a gzipped file"),
    ],
)
def test_damaged_gzip_is_named_with_the_line_before(tmp_path, damage, words):
    numbers = "\n".join(str(number**7) for number in range(2000))
    message = refused(file(tmp_path / "a.txt.gz", damage(gzip.compress(numbers.encode(), mtime=0))))
    assert words in message
    assert ", after line " in message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": ' + "1" * 5000 + "}", "line 2: not JSON: Exceeds the limit (4300 digits)"),
        (DEEP, "line 2: JSON nested too deep to be read"),
        ('{"a": ' * 200_000, "line 2: JSON nested too deep to be read"),
        ('{"text": "bad \\ud83d"}', "line 2: 'text' holds half of a surrogate pair (U+D83D at character 4)"),
        ('{"text": "x", "tags": [{"a": ["\\uDC00"]}]}', "line 2: 'tags' holds half of a surrogate pair"),
        ('{"text": "x", "\\ud83d": 1}', "line 2: '\\ud83d' holds half of a surrogate pair"),
        ('{"text": true}', 'line 2: no string in "text"'),
        ('{"text": NaN}', 'line 2: no string in "text"'),
        ('{"text": "x", "id": [1]}', 'line 2: "id" is a list; expected a string or a number'),
        ("x\0y", "line 2: a NUL byte at column 2"),
    ],
)
def test_a_bad_line_of_json_is_named(tmp_path, line, words):
    first = '{"text": "x", "id": 1}' if '"id"' in line else '{"text": "x"}'
    assert words in refused(file(tmp_path / "a.jsonl", f"{first}\n{line}\n"))


def test_whole_surrogate_pairs_numbers_and_blank_texts_are_read(tmp_path):
    path = file(
        tmp_path / "a.jsonl",
        '{"text": "\\ud83d\\ude00", "id": 7}\n{"text": 1984, "id": 1.5}\n{"text": " ", "id": "x"}\n',
    )
    found = read_candidates(str(path))
    assert found.texts == ["\U0001f600", "1984", " "]
    assert found.ids == ["7", "1.5", "x"]
    assert [suspect.where for suspect in found.suspects] == [f"{path}, line 1 (id 7)", f"{path}, line 3 (id x)"]


def test_rows_from_python_are_checked_for_unicode_too():
    with pytest.raises(DataError, match="rows, row 1: 'a' holds half of a surrogate pair"):
        list(read_rows([{"a": "x"}, {"a": ["\ud83d"]}]))


def test_two_candidates_of_one_id_are_refused_with_both_places(tmp_path):
    path = file(tmp_path / "a.csv", "id,text\n1,x\n2,y\n1,z\n")
    assert f"line 4 (id 1): the id '1' is also that of {path}, line 2 (id 1)" in refused(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "text,note\nhello,x\n"),
        ("a.csv", "text;note\r\nhello;x\r\n"),
        ("a.csv", "text\tnote\nhello\tx\n"),
        ("a.csv", '"text";"note"\n"hello";"x"'),
        ("a.csv", '"text, long",note\nhello,x\n'),
        ("a.csv", "text,note; more\nhello,x\n"),
        ("a.csv", "sep=|\ntext|note\nhello|x\n"),
        ("a.csv", "\n\ntext , note\nhello,x\n\n"),
        ("my.data.v2.CSV", "text,note\nhello,x\n"),
        ("a.tsv", "text\tnote\nhello\tx"),
        ("A.TSV.GZ", "text\tnote\nhello\tx"),
    ],
)
def test_the_header_line_says_what_separates_columns(tmp_path, name, content):
    (row,) = rows(file(tmp_path / name, content))
    assert list(row.values()) == ["hello", "x"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "a,b;c\nx,y;z\n", "line 1: commas and semicolons in the header line; expected one separator"),
        ("a.csv", "a,b;c\n", "expected one separator"),
        ("a.csv", "text,text\nx,y\n", "line 1: columns are text, text; expected unique names"),
        ("a.csv", "text, text\nx,y\n", "expected unique names"),
        ("a.tsv", "text\ttext\nx\ty\n", "expected unique names"),
        ("a.csv", "text,b\nx,y\nz\n", "line 3: 1 fields; expected 2 (text, b)"),
        ("a.tsv", "text\tb\nx\ty\tz\n", "line 2: 3 fields; expected 2 (text, b)"),
        ("a.csv", 'text,b\n"x\nz",y\n"never,\nclosed\n', "line 4: a quotation mark opens a field that is never closed"),
        ("a.csv", 'text,b\n"x"y,z\n', "line 2: ',' expected after '\"'"),
    ],
)
def test_a_bad_table_is_named_with_its_line(tmp_path, name, content, words):
    assert words in refused(file(tmp_path / name, content))


def test_fields_of_any_length_are_read_and_the_limit_of_others_stays(tmp_path, monkeypatch):
    before = csv.field_size_limit()
    long = "word " * 40_000
    path = file(tmp_path / "a.csv", f'text,b\n"{long}",x\n')
    reading = read_rows(path)
    assert next(reading)[1]["text"] == long
    assert csv.field_size_limit() == before == 131072
    monkeypatch.setattr("mixencoder.data.tables.LONGEST_LINE", 1000)
    assert "line 2: a field of more than 0 million characters; is a closing" in refused(path)
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('text\n"Hello" she said\nplain\n', ['"Hello" she said', "plain"]),
        (
            'text\n"Unclosed one\nmiddle line\nends here"\nlast\n',
            ['"Unclosed one', "middle line", 'ends here"', "last"],
        ),
        ('text\n5" disk\n"quoted"\n', ['5" disk', '"quoted"']),
        ('text\n"He said ""no"""\n"plain"\n', ['He said "no"', "plain"]),
        ('"text"\t"note"\n"a\tb"\t"x"\n', ["a\tb"]),
        ('text\tnote\n"two\nlines"\tx\n', ["two\nlines"]),
        ('text\tnote\n"a" b\t"x"\n', ['"a" b']),
    ],
)
def test_a_quotation_mark_of_a_tsv_is_a_character_unless_the_whole_file_agrees_with_quoting(tmp_path, content, texts):
    path = file(tmp_path / "a.tsv", content)
    assert read_candidates(str(path)).texts == texts
    assert read_candidates(str(file(tmp_path / "odd.name", content)), format="tsv").texts == texts


def test_commas_in_a_tsv_of_one_column_are_pointed_at(tmp_path):
    with pytest.warns(UserWarning, match="one column, 'id,text'.*must end in .csv"):
        rows(file(tmp_path / "a.tsv", "id,text\n1,x\n"))


def feed(path: Path, content: bytes) -> threading.Thread:
    os.mkfifo(path)
    thread = threading.Thread(target=path.write_bytes, args=[content])
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("name", "content", "format", "texts"),
    [
        ("63", b"a\nb\n", None, ["a", "b"]),
        ("63", gzip.compress(b"a\nb\n", mtime=0), None, ["a", "b"]),
        ("63", b'{"text": "a"}\n', "jsonl", ["a"]),
        ("63", b'text\tn\n"a\nb"\tx\n', "tsv", ["a\nb"]),
        ("pipe.csv", b"text;n\na;x\n", None, ["a"]),
    ],
)
def test_pipes_are_read(tmp_path, name, content, format, texts):
    thread = feed(tmp_path / name, content)
    assert read_candidates(str(tmp_path / name), format=format).texts == texts
    thread.join()


def stdin(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_standard_input_is_text_unless_a_format_is_named(monkeypatch):
    line = b'{"text": "a", "id": 3}\n'
    stdin(monkeypatch, line * 2)
    with pytest.warns(UserWarning, match="standard input, line 1: a JSON object is ranked as plain text") as heard:
        assert read_candidates("-").texts == [line.decode().strip()] * 2
    assert len(heard) == 1
    for content in (line, gzip.compress(line, mtime=0)):
        stdin(monkeypatch, content)
        found = read_candidates("-", format="jsonl")
        assert (found.texts, found.ids) == (["a"], ["3"])
    stdin(monkeypatch, b"text,n\na,1\n")
    assert read_candidates("-", format="csv").texts == ["a"]
    stdin(monkeypatch, line)
    with warnings.catch_warnings(), pytest.raises(DataError, match="Parquet is not read from standard input"):
        read_candidates("-", format="parquet")
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(DataError, match="standard input is closed"):
        read_candidates("-")
    with pytest.raises(InputError, match="format is 'xml'; expected one of txt, jsonl, csv, tsv, parquet"):
        read_candidates("-", format="xml")


def test_a_format_wins_over_the_name(tmp_path):
    path = file(tmp_path / "a.csv", '{"text": "a"}\n')
    assert read_candidates(str(path), format="jsonl").texts == ["a"]
    assert "read; expected .txt, .jsonl" in refused(file(tmp_path / "a.jsonl.bak", b"x"))


def test_folders_empty_files_and_missing_ones_are_named(tmp_path):
    assert "is a folder; expected a file" in refused(tmp_path)
    (tmp_path / "a.jsonl").mkdir()
    assert "cannot be read: Is a directory" in refused(tmp_path / "a.jsonl")
    assert "holds no candidate" in refused(file(tmp_path / "empty.csv", b""))
    assert "holds no candidate" in refused(file(tmp_path / "mark.jsonl", b"\xef\xbb\xbf"))
    assert "cannot be read: No such file" in refused(tmp_path / "missing.txt")


def test_of_a_file_that_grows_what_it_held_when_it_was_opened_is_read(tmp_path):
    path = file(tmp_path / "a.txt", "one\ntwo\n")
    reading = read_lines(path)
    assert next(reading) == (1, "one")
    with path.open("a") as more:
        more.write("three\n")
    assert list(reading) == [(2, "two")]
    path = file(tmp_path / "b.txt", "one\ntw")
    reading = read_lines(path)
    next(reading)
    with path.open("a") as more:
        more.write("o and")
    with pytest.raises(DataError, match=r"b\.txt cannot be read: it is being written.*after line 1"):
        list(reading)


def test_names_lose_the_endings_that_say_the_format():
    names = ["a.jsonl", "a.JSONL", "my.data.v2.csv.gz", "a.TSV.GZ", "a.b", "a.parquet"]
    assert [source_name(Path(name)) for name in names] == ["a", "a", "my.data.v2", "a", "a.b", "a"]


def test_parquet_is_read_piece_by_piece(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = pyarrow.DictionaryArray.from_arrays([0] * 3000, ["x" * 200_000])
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": texts.cast(pyarrow.string()), "id": range(3000)}), path)
    tracemalloc.start()
    assert sum(len(row["text"]) for _, row in read_rows(path)) == 3000 * 200_000
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 64 * 2**20
    parquet.write_table(pyarrow.table({"text": ["a", "b"], "id": [1, 2]}), path)
    assert read_candidates(str(path))[:2] == (["a", "b"], ["1", "2"])
    path.write_bytes(path.read_bytes()[:-20])
    assert "cannot be read" in refused(path)


def test_lines_of_json_keep_their_numbers_past_empty_ones(tmp_path):
    path = file(tmp_path / "a.jsonl", "\n" + json.dumps({"text": "x"}) + "\n\n\nnot\n")
    assert "line 5: not JSON" in refused(path)
