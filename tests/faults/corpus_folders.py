"""Folders of images in which names, links, kinds of files and captions are odd."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from faults.corpus_case import FILLERS, GOOD, Case, Row, colours, fill, lines, put, several, stored

_SHOWN = Row(("x",), colours())
_NOT_THERE = "no file"


def folder_cases() -> Iterator[Case]:
    """All of them."""
    yield from _names()
    yield from _files()
    yield from _captions()
    yield from _masks()


def _case(name: str, write: Callable[[Path], None], *, good: tuple[str, ...] = (), bad: Mapping[str, str] | None = None, needs: str = "") -> Case:
    """A folder of good images and these. write: is given the folder of images."""

    def all_of_it(folder: Path) -> None:
        fill(folder / "rows")
        write(folder / "rows")

    return Case(name, all_of_it, rows=dict.fromkeys(good, _SHOWN), bad=bad or {}, fillers=FILLERS, asked={"prompt": "x"}, needs=needs)


def _names() -> Iterator[Case]:
    for called, name in (
        ("a newline", "line\nbreak.png"),
        ("emoji", "🐈‍⬛🏳️‍🌈.png"),
        ("255 bytes", "n" * 251 + ".png"),
        ("quotes and a backslash", "it's \"so\"\\.png"),
        ("the marks of patterns", "[a]*?{b}.png"),
        ("nothing but a space before the dot", " .png"),
        ("terminal colours", "\x1b[31mred.png"),
        ("text that runs from right to left", "\u202egnp.png"),
    ):
        yield _case(f"name: {called}", lambda folder, name=name: put(folder / name, GOOD), good=(name,))  # type: ignore[misc]
    yield _case("name: bytes that are not UTF-8", lambda folder: put(folder / os.fsdecode(b"caf\xe9.png"), GOOD), bad={"caf\\xe9.png": "is not a name in UTF-8; rename the file"})
    deep = "/".join(["d" * 200] * 15)
    yield _case("name: fifteen folders of 200 letters", lambda folder: put(folder / deep / "deep.png", GOOD), good=(f"{deep}/deep.png",))
    yield _case("name: a folder called x.png", lambda folder: put(folder / "x.png" / "inner.png", GOOD), good=("x.png/inner.png",))
    yield _case("name: hidden files and folders", several(*(lambda folder, name=name: put(folder / name, b"no image") for name in (".x.png", ".git/x.png", "._x.png"))))


def _files() -> Iterator[Case]:
    yield _case("link: to itself", lambda folder: os.symlink("loop.png", folder / "loop.png"), bad={"loop.png": _NOT_THERE})
    yield _case("link: two that name each other", several(lambda folder: os.symlink("b", folder / "a.png"), lambda folder: os.symlink("a.png", folder / "b")), bad={"a.png": _NOT_THERE})
    yield _case("link: to the folder above", lambda folder: os.symlink("..", folder / "up"), bad={"up": "a symbolic link to a folder, which is not followed"})
    yield _case("link: to nothing", lambda folder: os.symlink("gone.png", folder / "gone.png.png"), bad={"gone.png.png": _NOT_THERE})
    yield _case("link: to an image in the folder", lambda folder: os.symlink("filler000.png", folder / "same.png"), good=("same.png",))
    yield _case("link: to an image outside", several(lambda folder: put(folder.parent / "other.png", GOOD), lambda folder: os.symlink("../other.png", folder / "out.png")), bad={"out.png": "lies outside"})
    yield _case("link: to /etc/passwd", lambda folder: os.symlink("/etc/passwd", folder / "out.png"), bad={"out.png": "lies outside"})
    yield _case("link: to /dev/zero", lambda folder: os.symlink("/dev/zero", folder / "zero.png"), bad={"zero.png": "lies outside"})
    yield _case("special: FIFO named .png", lambda folder: os.mkfifo(folder / "pipe.png"), bad={"pipe.png": "is not a file"})
    yield _case("special: socket named .png", _socket, bad={"socket.png": "is not a file"})
    yield _case("special: device named .png", lambda folder: os.mknod(folder / "zero.png", 0o20666, os.makedev(1, 5)), bad={"zero.png": "is not a file"}, needs="root")
    yield _case("special: image that may not be read", _unreadable, bad={"secret.png": "Permission denied"}, needs="nobody")
    yield Case(
        "special: folder that may not be listed", _closed, asked={"prompt": "x"}, refused="cannot be listed: Permission denied", needs="nobody",
    )  # fmt: skip


def _socket(folder: Path) -> None:
    """Its path may be longer than the 108 bytes that a socket takes, so it is bound from where it lies."""
    here = os.getcwd()
    os.chdir(folder)
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind("socket.png")
    finally:
        os.chdir(here)


def _unreadable(folder: Path) -> None:
    put(folder / "secret.png", GOOD)
    os.chmod(folder / "secret.png", 0)


def _closed(folder: Path) -> None:
    fill(folder / "rows")
    (folder / "rows" / "inner").mkdir()
    os.chmod(folder / "rows" / "inner", 0)


def _captions() -> Iterator[Case]:
    long = "a very long caption, " * 500
    for called, content, prompts in (
        ("10,000 characters", long, (long.strip(),)),
        ("with a byte order mark", b"\xef\xbb\xbfa caption", ("a caption",)),
        ("with Windows line ends", b"first\r\nsecond\r\n\r\n", ("first", "second")),
        ("with emoji and Chinese", "一只猫 🐈", ("一只猫 🐈",)),
        ("with a script tag", "<script>alert(1)</script>", ("<script>alert(1)</script>",)),
        ("empty, and the plan has none either", b" \n", "its caption 'odd.txt' is empty"),
        ("missing", None, "no caption: 'odd.txt' is missing"),
        ("in Latin-1", "ein Mädchen läuft".encode("latin-1"), "is not UTF-8"),
        ("in UTF-16 with a byte order mark", "a caption".encode("utf-16"), "is not UTF-8"),
        ("in UTF-16 without a byte order mark", "a caption".encode("utf-16-le"), "the prompt holds a zero character; if it is UTF-16, save it as UTF-8"),
        ("with a NUL byte", b"a \0 caption", "the prompt holds a zero character; if it is UTF-16, save it as UTF-8"),
        ("of 50 MB", b"word " * 10_000_000, "its caption 'odd.txt' has 50,000,000 bytes; at most 1,048,576 are read"),
        ("that is a PNG", GOOD, "is not UTF-8"),
        ("that names an image of a row without references", "<img><|image_1|></img> as a drawing", "the row has no references"),
    ):
        yield Case(
            f"caption: {called}",
            partial(_captioned, content),
            rows={"odd.png": Row(prompts, colours())} if isinstance(prompts, tuple) else {},
            bad={"odd.png": prompts} if isinstance(prompts, str) else {},
            fillers=FILLERS,
        )
    for called, link in (("a FIFO", None), ("a link to itself", "odd.txt"), ("a link to /dev/zero", "/dev/zero")):
        yield Case(f"caption: {called}", partial(_linked_caption, link), bad={"odd.png": "'odd.txt'"}, fillers=FILLERS)


def _captioned(content: bytes | str | None, folder: Path) -> None:
    fill(folder / "rows")
    for each in range(FILLERS):
        put(folder / "rows" / f"filler{each:03}.txt", "a filler")
    put(folder / "rows" / "odd.png", GOOD)
    if content is not None:
        put(folder / "rows" / "odd.txt", content)


def _linked_caption(link: str | None, folder: Path) -> None:
    _captioned(None, folder)
    if link is None:
        os.mkfifo(folder / "rows" / "odd.txt")
    else:
        os.symlink(link, folder / "rows" / "odd.txt")


def _masks() -> Iterator[Case]:
    for called, mask, words in (
        ("of another size", colours(5, 9), "mask 1 'mask.png': 9 x 5 pixels, and the target has 9 x 6; a mask has the target's size"),
        ("of the target's size, turned", colours(9, 6), "mask 1 'mask.png': 6 x 9 pixels, and the target has 9 x 6"),
    ):
        yield Case(f"mask: {called}", partial(_masked, stored(mask), ["a cat"]), "rows/rows.jsonl", bad={"rows.jsonl:1": words}, fillers=FILLERS, asked={"task": "entity"})
    yield Case("mask: none for one of two prompts", partial(_masked, GOOD, ["a cat", "a dog"]), "rows/rows.jsonl", bad={"rows.jsonl:1": "holds 2 prompts"}, fillers=FILLERS, asked={"task": "entity"})
    yield Case("mask: an empty prompt", partial(_masked, GOOD, [" "]), "rows/rows.jsonl", bad={"rows.jsonl:1": "prompt 1 in 'eligen_entity_prompts' is empty"}, fillers=FILLERS, asked={"task": "entity"})


def _masked(mask: bytes, prompts: list[str], folder: Path) -> None:
    fill(folder / "rows")
    put(folder / "rows" / "odd.png", GOOD)
    put(folder / "rows" / "mask.png", mask)
    fillers: list[Mapping[str, Any]] = [_entity(f"filler{each:03}.png", "filler000.png", ["a cat"]) for each in range(FILLERS)]
    put(folder / "rows" / "rows.jsonl", lines([_entity("odd.png", "mask.png", prompts), *fillers]))


def _entity(image: str, mask: str, prompts: list[str]) -> dict[str, Any]:
    return {"image": image, "text": "x", "eligen_entity_prompts": prompts, "eligen_entity_masks": [mask]}
