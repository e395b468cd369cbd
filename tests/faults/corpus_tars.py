"""Shards (.tar) of which a member or the whole is broken, odd or hostile."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from faults.corpus_case import FILLERS, GOOD, Case, Row, colours, put, stored

_ODD = stored(colours(seed=1))
_SHOWN = Row(("odd",), colours(seed=1))
_LAST = f"filler{FILLERS - 1:03}.png"
Members = Callable[[tarfile.TarFile], None]


def tar_cases() -> Iterator[Case]:
    """All of them."""
    yield from _members()
    yield from _rows()
    yield from _files()


def _add(tar: tarfile.TarFile, name: str, content: bytes = b"", **facts: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for fact, value in facts.items():
        setattr(member, fact, value)
    tar.addfile(member, io.BytesIO(content))


def _write_tar(odd: Members, fillers: int, folder: Path) -> None:
    with tarfile.open(folder / "rows.tar", "w") as tar:
        odd(tar)
        for each in range(fillers):
            _add(tar, f"filler{each:03}.png", GOOD)
            _add(tar, f"filler{each:03}.txt", b"x")


def _case(name: str, odd: Members, *, good: Mapping[str, Row] | None = None, bad: Mapping[str, str] | None = None, broken: Mapping[str, str] | None = None) -> Case:
    """A shard whose first members are odd; rows by their name in it."""
    named = {f"rows.tar:{key}": reason for key, reason in (bad or {}).items()}
    return Case(
        f"tar: {name}",
        partial(_write_tar, odd, FILLERS),
        "rows.tar",
        rows={f"rows.tar:{key}": row for key, row in (good or {}).items()},
        bad=named,
        broken={f"rows.tar:{key}": words for key, words in (broken or {}).items()},
        fillers=FILLERS,
        streams=True,
    )


def _pair(name: str, image: bytes = _ODD, text: bytes = b"odd", **facts: object) -> Members:
    def add(tar: tarfile.TarFile) -> None:
        _add(tar, f"{name}.png", image, **facts)
        _add(tar, f"{name}.txt", text)

    return add


def _members() -> Iterator[Case]:
    yield _case("a member that leads outside by ..", _pair("../../evil"), good={"../../evil": _SHOWN})  # a name, and no more: nothing is unpacked
    yield _case("a member with an absolute path", _pair("/etc/evil"), good={"/etc/evil": _SHOWN})
    yield _case("a symbolic link", _pair("odd", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"), bad={"odd": "link"})
    yield _case("a hard link", _pair("odd", b"", type=tarfile.LNKTYPE, linkname="filler000.png"), bad={"odd": "link"})
    yield _case("a device", _pair("odd", b"", type=tarfile.CHRTYPE), bad={"odd": "device"})
    yield _case("a FIFO", _pair("odd", b"", type=tarfile.FIFOTYPE), bad={"odd": "device"})
    yield _case("a sparse member", _pair("odd", type=tarfile.GNUTYPE_SPARSE), bad={"odd": "sparse"})
    yield _case("two members of one name", _twice, bad={"odd": "two members|twice"})
    yield _case("a name with a newline and emoji", _pair("line\nbreak🐈"), good={"line\nbreak🐈": _SHOWN})
    yield _case("a name of 10,000 characters", _pair("n" * 10_000), good={"n" * 10_000: _SHOWN})
    yield _case("a name that is not UTF-8", _pair("caf\udce9"), good={"caf\\xe9": _SHOWN})
    yield _case("a folder, hidden members and one without a dot", _passed_over)


def _rows() -> Iterator[Case]:
    yield _case("no caption", lambda tar: _add(tar, "odd.png", _ODD), bad={"odd": "no prompt in 'txt'"})
    yield _case("a caption in Latin-1", _pair("odd", text="läuft".encode("latin-1")), bad={"odd": "its 'txt' is not UTF-8"})
    yield _case("a caption in UTF-16 without a byte order mark", _pair("odd", text="odd".encode("utf-16-le")), bad={"odd": "zero character"})
    yield _case("a caption of 50 MB", _pair("odd", text=b"word " * 10_000_000), bad={"odd": "its 'txt' has 50,000,000 bytes; at most 1,048,576 are read"})
    yield _case("an image of no byte", _pair("odd", b""), bad={"odd": "target: the file is empty"})
    yield _case("an image cut in the middle", _pair("odd", _ODD[: len(_ODD) // 2]), broken={"odd": "broken PNG file"})
    yield _case("an image that is gzip", _pair("odd", gzip.compress(bytes(50_000_000), 1)), bad={"odd": "target: not an image"})
    yield _case("an image that is 400 MB of zeros", _zeros, bad={"odd": "target: not an image"})
    for called, content, words in (
        ("not JSON", b'{"text": "od', "its 'json' is not JSON"),
        ("a list", b"[1]", "not an object {...}"),
        ("a key given twice", b'{"style": "1", "style": "2"}', "its 'json' gives 'style' twice; keep one"),
        ("nested 1,000,000 deep", b"[" * 1_000_000, "its 'json' is not JSON"),
        ("of 50 MB", b'{"style": "' + b"x" * 50_000_000 + b'"}', "its 'json' has 50,000,013 bytes; at most 1,048,576 are read"),
    ):
        yield Case(
            f"tar: fields that are {called}", partial(_write_fields, content), "rows.tar", bad={"rows.tar:odd": words}, fillers=FILLERS, streams=True, asked={"columns": {"prompt": "style"}},
        )  # fmt: skip


def _twice(tar: tarfile.TarFile) -> None:
    _pair("odd")(tar)
    _add(tar, "odd.png", GOOD)


def _passed_over(tar: tarfile.TarFile) -> None:
    _add(tar, "inner", type=tarfile.DIRTYPE)
    _add(tar, ".hidden.png", b"x")
    _add(tar, "README", b"x")


def _zeros(tar: tarfile.TarFile) -> None:
    """Written as a hole, so that it takes no room on the disk."""
    member = tarfile.TarInfo("odd.png")
    member.size = 400 * 2**20
    file, place = tar.fileobj, tar.offset
    assert file is not None
    file.write(member.tobuf())
    file.seek(place + 512 + member.size)
    tar.offset = place + 512 + member.size
    _add(tar, "odd.txt", b"odd")


def _write_fields(content: bytes, folder: Path) -> None:
    with tarfile.open(folder / "rows.tar", "w") as tar:
        for name, image, fields in (("odd", _ODD, content), *((f"filler{each:03}", GOOD, b'{"style": "x"}') for each in range(FILLERS))):
            _add(tar, f"{name}.png", image)
            _add(tar, f"{name}.json", fields)


def _files() -> Iterator[Case]:
    for called, pack, words in (("gzip", gzip.compress, "is compressed by gzip"), ("bzip2", bz2.compress, "is compressed by bzip2"), ("xz", lzma.compress, "is compressed by xz")):
        yield Case(f"tar: 20 MB of zeros packed by {called}", lambda folder, pack=pack: put(folder / "rows.tar", pack(bytes(20_000_000))), "rows.tar", refused=words, checked=words)  # type: ignore[misc]
    yield Case("tar: named .tar.gz", lambda folder: put(folder / "rows.tar.gz", gzip.compress(b"x")), "rows.tar.gz", refused="unpack it: gunzip", checked="unpack it: gunzip")
    yield Case("tar: no byte at all", lambda folder: put(folder / "rows.tar", b""), "rows.tar", refused="is empty; copy it again", checked="is empty")
    yield Case("tar: zeros alone", lambda folder: put(folder / "rows.tar", bytes(10_240)), "rows.tar", refused="it holds no rows", checked="holds no rows")
    yield Case("tar: text", lambda folder: put(folder / "rows.tar", b"hello " * 1000), "rows.tar", refused="is no tar", checked="is no tar")
    yield Case("tar: a zip", lambda folder: put(folder / "rows.tar", b"PK\3\4" + bytes(2000)), "rows.tar", refused="is no tar", checked="is no tar")
    yield Case("tar: cut inside its first member", partial(_changed, lambda content: content[:600]), "rows.tar", refused="is cut", checked="is cut")
    for called, change, place in (
        ("cut inside an image", lambda content: content[: _start(content, _LAST) + 520], f"rows.tar:{_LAST[:-4]}"),
        ("cut inside a header", lambda content: content[: _start(content, _LAST) + 100], "rows.tar"),
        ("a header in the middle is noise", lambda content: content[: _start(content, _LAST)] + b"\xa5" * 512 + content[_start(content, _LAST) + 512 :], "rows.tar"),
        ("a size that leads out of the file", lambda content: _resized(content, _LAST, b"77777777777\0"), f"rows.tar:{_LAST[:-4]}"),
        ("a size below zero", lambda content: _resized(content, _LAST, b"\xff" * 12), f"rows.tar:{_LAST[:-4]}"),
        ("a size of 2 to the 90", lambda content: _resized(content, _LAST, b"\x80\x04" + bytes(10)), f"rows.tar:{_LAST[:-4]}"),
    ):
        yield Case(f"tar: {called}", partial(_changed, change), "rows.tar", bad={place: "the shard (is cut|ends early)|is cut"}, fillers=FILLERS - 1, streams=True)


def _changed(change: Callable[[bytes], bytes], folder: Path) -> None:
    _write_tar(lambda tar: None, FILLERS, folder)
    put(folder / "rows.tar", change((folder / "rows.tar").read_bytes()))


def _start(content: bytes, name: str) -> int:
    return content.index(name.encode() + b"\0")


def _resized(content: bytes, name: str, size: bytes) -> bytes:
    """The shard with another size in a member's header, and the checksum that agrees with it."""
    start = _start(content, name)
    header = bytearray(content[start : start + 512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:start] + bytes(header) + content[start + 512 :]
