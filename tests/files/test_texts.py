"""Texts and headers of other people's files: byte order marks, other encodings, and how long they may be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mlaconvert.errors import CheckpointError, InputError
from mlaconvert.files.headers import read_header
from mlaconvert.files.inputs import MAX_PARTS, parse_json, read_json, read_text, read_yaml

MARK = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(MARK + b'{"dim": 5}')
    assert read_text(tmp_path / "a") == '{"dim": 5}'
    assert read_json(tmp_path / "a") == {"dim": 5}
    assert read_yaml(tmp_path / "a") == {"dim": 5}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_other_encodings_are_named(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("\ufeff{}".encode(encoding) if encoding != "utf-16" else "{}".encode(encoding))
    with pytest.raises(InputError, match=r"not UTF-8 text but UTF-16; save it as UTF-8"):
        read_text(tmp_path / "a")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_named(encoding: str, tmp_path: Path) -> None:
    for text in ("{}", "a cat on a red wall \u4e2d\u6587"):
        (tmp_path / "a").write_bytes(text.encode(encoding))
        with pytest.raises(InputError, match=r"not UTF-8 text but UTF-16; save it as UTF-8"):
            read_text(tmp_path / "a")
    for text in ("", "\0", "a\0", "\0\0\0\0", "a b\0c d", "\u4e2d\u6587\u4e2d"):
        (tmp_path / "a").write_text(text, encoding="utf-8")
        assert read_text(tmp_path / "a") == text


def test_brackets_in_texts_are_no_lists() -> None:
    text = "[" * (MAX_PARTS + 1) + '\\"'
    assert parse_json(json.dumps({"a": text})) == {"a": text}
    with pytest.raises(ValueError, match="lists and objects"):
        parse_json(f"[{'[],' * MAX_PARTS}0]")
    for end in ('"', "\\"):  # a text that never ends is one, however many marks are in it
        with pytest.raises(ValueError, match=r"Extra data|Invalid"):
            parse_json('"' + '\\"[' * (MAX_PARTS + 1) + end + "x")


def test_headers_are_as_long_as_the_library_writes_them(tmp_path: Path) -> None:
    metadata = {"trained with": json.dumps([{"step": step} for step in range(600_000)])}
    save_file({"a": torch.ones(2, 3)}, tmp_path / "a.safetensors", metadata=metadata)
    size = (tmp_path / "a.safetensors").stat().st_size
    assert 5_000_000 < size < 100_000_000
    assert [info.shape for info in read_header(tmp_path / "a.safetensors")] == [(2, 3)]
    data = (100_000_001).to_bytes(8, "little")
    with (tmp_path / "b.safetensors").open("wb") as stream:
        stream.write(data)
        stream.truncate(100_000_020)
    with pytest.raises(CheckpointError, match="100,000,001 bytes, expected at most 100,000,000"):
        read_header(tmp_path / "b.safetensors")
