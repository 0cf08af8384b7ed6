"""Tables of captions as spreadsheets, datasets and other tools write them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlaconvert.clips.captions import read_captions
from mlaconvert.errors import InputError

CAT = "a cat; in the snow"
EXPECTED = {"a.mp4": CAT}
LONG = "very " * 30_000 + "long"
SEPARATED = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven"


def row(**fields: object) -> str:
    return json.dumps(fields, ensure_ascii=False)


# Name -> (the file's bytes, what it says).
TABLES: dict[str, tuple[str, bytes, dict[str, str]]] = {
    "plain": ("c.csv", b"file,caption\na.mp4,a cat; in the snow\n", EXPECTED),
    "a byte order mark": ("c.csv", b"\xef\xbb\xbffile,caption\r\na.mp4,a cat; in the snow\r\n", EXPECTED),
    "semicolons": ("c.csv", b'file;caption\na.mp4;"a cat; in the snow"\n', EXPECTED),
    "tabs": ("c.tsv", b"file\tcaption\na.mp4\ta cat; in the snow\n", EXPECTED),
    "an ending in capitals": ("C.CSV", b"file,caption\na.mp4,a cat; in the snow", EXPECTED),
    "blanks after commas": ("c.csv", b'file, caption\na.mp4, "a cat; in the snow"\n', EXPECTED),
    "names in capitals": ("c.csv", b"File,Caption\na.mp4,a cat; in the snow\n", EXPECTED),
    "empty lines": ("c.csv", b"\n\nfile,caption\n\na.mp4,a cat; in the snow\n\n\n", EXPECTED),
    "empty columns at the end": ("c.csv", b"file,caption,,\na.mp4,a cat; in the snow,,,,\n", EXPECTED),
    "Open-Sora": ("c.csv", b"path,text,num_frames\na.mp4,a cat; in the snow,17\n", EXPECTED),
    "DiffSynth": ("c.csv", b"video,prompt\na.mp4,a cat; in the snow\n", EXPECTED),
    "ours before others": ("c.csv", b"video,file,text,caption\nx,a.mp4,y,a cat; in the snow\n", EXPECTED),
    "Windows": ("c.csv", b"file,caption\r\nd\\a.mp4,x\r\n", {"d\\a.mp4": "x", "d/a.mp4": "x"}),
    "lines in a caption": ("c.csv", b'file,caption\na.mp4,"one\ntwo"\nb.mp4,x', {"a.mp4": "one\ntwo", "b.mp4": "x"}),
    "a quotation mark inside": ("c.csv", b'file,caption\na.mp4,a 5" disk\n', {"a.mp4": 'a 5" disk'}),
    "long": ("c.csv", f"file,caption\na.mp4,{LONG}\n".encode(), {"a.mp4": LONG}),
    "JSON lines": ("c.jsonl", (row(file="a.mp4", caption=CAT) + "\r\n\r\n").encode(), EXPECTED),
    "JSON lines, a byte order mark": ("c.jsonl", b"\xef\xbb\xbf" + row(file="a.mp4", caption=CAT).encode(), EXPECTED),
    "JSON lines, separators": ("c.jsonl", row(file="a.mp4", caption=SEPARATED).encode(), {"a.mp4": SEPARATED}),
    "the Hub's metadata.jsonl": ("metadata.jsonl", row(file_name="a.mp4", text=CAT).encode(), EXPECTED),
    "musubi": ("c.jsonl", row(video_path="a.mp4", caption=CAT, frames=3).encode(), EXPECTED),
    "a JSON array": ("c.json", json.dumps([{"file": "a.mp4", "caption": CAT}], indent=1).encode(), EXPECTED),
    "a JSON array in a line": ("c.jsonl", f"[{row(file='a.mp4', caption=CAT)}]".encode(), EXPECTED),
    "both halves of a character": ("c.jsonl", b'{"file": "a", "caption": "\\ud83d\\ude00"}', {"a": "\U0001f600"}),
    "a second column that is not read": ("c.csv", b"file,caption,note,note\na,x,1,2\n", {"a": "x"}),
    "JSON, long": ("c.jsonl", row(file="a.mp4", caption=LONG).encode(), {"a.mp4": LONG}),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables(case: str, tmp_path: Path) -> None:
    name, data, expected = TABLES[case]
    (tmp_path / name).write_bytes(data)
    before = csv.field_size_limit()
    assert read_captions(tmp_path / name) == expected
    assert csv.field_size_limit() == before


BAD: dict[str, tuple[str, bytes, str]] = {
    "UTF-16": ("c.csv", "file,caption\na,b".encode("utf-16"), "c.csv: not UTF-8 text but UTF-16; save it as UTF-8"),
    "UTF-16 without a mark": (
        "c.csv",
        "file,caption\na,b".encode("utf-16-le"),
        "c.csv: not UTF-8 text but UTF-16; save",
    ),
    "the other UTF-16 without a mark": ("c.jsonl", row(file="a", caption="b").encode("utf-16-be"), "but UTF-16; save"),
    "two columns of captions": (
        "c.csv",
        b"file,caption, Caption \na.mp4,x,y\n",
        "c.csv: it has the column 'caption' twice",
    ),
    "two columns of files": (
        "c.csv",
        b"Video;prompt;video\na;x;b\n",
        "c.csv: it has the column 'Video' twice; keep one",
    ),
    "two fields of captions": (
        "c.jsonl",
        b'{"file": "a", "text": "x", "Text": "y"}',
        "line 1: it has the column 'text' twice",
    ),
    "an object over several lines": (
        "c.json",
        json.dumps({"file": "a.mp4", "caption": "x"}, indent=1).encode(),
        r"c\.json: one JSON object over several lines; write each entry on a line of its own, or all in an array",
    ),
    "objects over several lines": ("c.jsonl", b'{\n"file": "a"\n}\n{\n"file": "b"\n}', "line 1: not JSON"),
    "half of a character": (
        "c.jsonl",
        b'{"file": "a.mp4", "caption": "x"}\n{"file": "b.mp4", "caption": "a cat \\ud83d"}',
        r"c\.jsonl, line 2: '\\ud83d' is half of a character; write the whole one",
    ),
    "half of a character in a name": ("c.json", b'[{"file": "\\udc00.mp4", "caption": "x"}]', "entry 1: .* half of a"),
    "Latin-1": ("c.csv", "file,caption\na,\u00e9".encode("latin-1"), "not UTF-8 text"),
    "other columns": (
        "c.csv",
        b"name;description;seconds\na;b;3",
        "must name the columns file and caption; it has name;description;seconds$",
    ),
    "one column": ("c.csv", b"file,title\na,b", "file and caption; it has file, title$"),
    "nothing": ("c.csv", b"", "file and caption; it has none$"),
    "other fields": ("c.jsonl", row(name="a", text="b").encode(), "line 1: expected file and caption.*has name, text$"),
    "other fields of an array": (
        "c.json",
        json.dumps([{"file": "a", "caption": "b"}, {"file": "c"}]).encode(),
        "entry 2: expected file and caption, both text; it has file$",
    ),
    "an open quotation mark": (
        "c.csv",
        b'file,caption\na.mp4,x\nb.mp4,"a cat\n' + b"".join(b"c%d.mp4,x\n" % i for i in range(20_000)),
        "line 3: a quotation mark that opens here is never closed",
    ),
    "an open quotation mark at the end": ("c.csv", b'file,caption\na.mp4,"x', "line 2: a quotation mark that opens"),
    "commas in a caption": ("c.csv", b"file,caption\na.mp4,a cat, in the snow\n", "line 2: it has 3 fields.*','"),
    "an open array": ("c.json", b'[{"file": "a", "caption": "b"},', "c.json: not JSON"),
    "numbers": ("c.jsonl", row(file="a.mp4", caption=5).encode(), "line 1: expected file and caption, both text$"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named(case: str, tmp_path: Path) -> None:
    name, data, says = BAD[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=says) as caught:
        read_captions(tmp_path / name)
    assert len(str(caught.value)) < 500


@given(
    st.dictionaries(
        st.text("abc/ .", min_size=1).filter(lambda name: name.strip() == name),
        st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0")),
        min_size=1,
    ),
    st.sampled_from([",", ";", "\t"]),
)
def test_whatever_the_csv_module_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, table: dict[str, str], delimiter: str
) -> None:
    path = tmp_path_factory.mktemp("table") / "c.csv"
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writerows([("file", "caption"), *table.items()])
    assert read_captions(path) == table
