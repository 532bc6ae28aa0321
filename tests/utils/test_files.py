"""Only regular files of limited size are read, and files are written whole or not at all."""

import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.files import (
    check_output,
    check_output_file,
    partial_path,
    read_file,
    write_aside,
    write_directory_aside,
)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("folder").mkdir()
    return tmp_path


def names(folder: str = ".") -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.mark.parametrize("name", ["new", "folder/new", "some/new/folder/new", "/tmp/a/b"])
def test_a_place_in_folders_that_can_be_made_is_fine_and_nothing_is_made(name: str, place: Path):
    check_output(Path(name))
    assert check_output_file(Path(name)) == "wrote"
    assert sorted(path.name for path in place.rglob("*")) == ["file", "folder"]


@pytest.mark.parametrize("name", ["file/new", "file/folder/new"])
def test_a_file_is_no_folder_to_write_into(name: str):
    with pytest.raises(UserError, match=f"^{name} cannot be written: file is not a folder$"):
        check_output(Path(name))


def test_a_folder_without_permission_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    message = "^folder/a/b cannot be written: there is no permission to write in folder$"
    with pytest.raises(UserError, match=message):
        check_output(Path("folder/a/b"))


def test_a_file_is_replaced_and_a_folder_is_not():
    assert check_output_file(Path("file")) == "replaced"
    with pytest.raises(UserError, match=r"^folder cannot be written: it is a folder$"):
        check_output_file(Path("folder"))


def test_a_file_is_read_up_to_a_size():
    assert read_file("file", most=4) == b"mine"
    with pytest.raises(UserError, match=r"^file has 4 bytes, expected at most 3$"):
        read_file("file", most=3)


def make_socket() -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (lambda: os.mkfifo("pipe"), "pipe", "is a pipe, expected a file"),
        (lambda: Path("zero").symlink_to("/dev/zero"), "zero", "is a device, expected a file"),
        (lambda: None, "folder", "is a folder, expected a file"),
        (make_socket, "socket", "cannot be read: No such device or address"),
        (lambda: None, "absent", "cannot be read: No such file or directory"),
        (lambda: None, "n" * 300, "cannot be read: File name too long"),
        (lambda: Path("a").symlink_to("a"), "a", "cannot be read: Too many levels of symbolic"),
    ],
    ids=["pipe", "device", "folder", "socket", "absent", "long name", "loop"],
)
def test_what_is_not_a_regular_file_is_refused_and_not_waited_for(make, name: str, message: str):
    make()
    with pytest.raises(UserError, match=f"^{name} {message}"):
        read_file(name, most=100)


@pytest.mark.parametrize("name", ["file", "new", "some/new/folder/file"])
def test_a_file_is_there_when_it_is_whole(name: str):
    before = Path(name).read_text() if name == "file" else None
    with write_aside(Path(name)) as aside:
        aside.write_text("half")
        assert (Path(name).read_text() if Path(name).exists() else None) == before
        aside.write_text("whole")
    assert Path(name).read_text() == "whole"
    assert not list(Path().rglob("*.partial"))


def end_within(writer: AbstractContextManager[Path], end: type[BaseException]) -> None:
    with writer as aside:
        (aside / "half" if aside.is_dir() else aside).write_text("half")
        raise end


@pytest.mark.parametrize("end", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_after_any_end_a_file_is_as_it_was(end: type[BaseException]):
    with pytest.raises(end):
        end_within(write_aside(Path("file")), end)
    assert names() == ["file", "folder"]
    assert Path("file").read_text() == "mine"


@pytest.mark.parametrize("end", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_after_any_end_a_directory_is_as_it_was(end: type[BaseException]):
    Path("folder/mine").touch()
    with pytest.raises(end):
        end_within(write_directory_aside(Path("folder")), end)
    with pytest.raises(end):
        end_within(write_directory_aside(Path("new")), end)
    assert names() == ["file", "folder"]
    assert names("folder") == ["mine"]


def test_a_link_is_replaced_and_what_it_leads_to_is_kept():
    Path("folder/mine").touch()
    Path("link").symlink_to("file")
    Path("link_to_folder").symlink_to("folder")
    partial_path(Path("link")).symlink_to("file")  # a link that a careless writer would follow
    with write_aside(Path("link")) as aside:
        aside.write_text("new")
    with write_directory_aside(Path("link_to_folder")) as aside:
        (aside / "new").touch()
    assert Path("link").read_text() == "new"
    assert Path("file").read_text() == "mine"
    assert not Path("link").is_symlink()
    assert not Path("link_to_folder").is_symlink()
    assert (names("link_to_folder"), names("folder")) == (["new"], ["mine"])


def test_what_a_killed_writer_left_is_removed_by_the_next():
    partial_path(Path("file")).write_text("half")
    partial_path(Path("folder")).mkdir()
    (partial_path(Path("folder")) / "half").touch()
    with write_aside(Path("file")) as aside:
        aside.write_text("whole")
    with write_directory_aside(Path("folder")) as aside:
        (aside / "whole").touch()
    assert names() == ["file", "folder"]
    assert names("folder") == ["whole"]


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from activemlp_jax.utils.files import write_directory_aside

    real, moment = os.rename, int(sys.argv[1])
    def rename(source, target):
        global moment
        moment -= 1
        if moment < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)
    os.rename = rename
    with write_directory_aside(Path("folder")) as aside:
        (aside / "new").touch()
"""


@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_between_removing_and_renaming_loses_nothing(renames: int):
    Path("folder/mine").touch()
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(renames)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert Path("folder").exists() == (renames == 0)  # killed before the first rename
    with pytest.raises(ValueError, match="another failure"), write_directory_aside(Path("folder")):
        raise ValueError("another failure")
    assert names() == ["file", "folder"]
    assert names("folder") == ["mine"]


def test_a_failed_rename_puts_the_directory_back(monkeypatch: pytest.MonkeyPatch):
    Path("folder/mine").touch()
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if str(source).endswith(".partial"):
            raise OSError(28, "No space left on device", str(target))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="No space left"), write_directory_aside(Path("folder")):
        pass
    assert names() == ["file", "folder"]
    assert names("folder") == ["mine"]


def test_a_reader_sees_the_old_file_or_the_new_one_whole():
    """While one process replaces a file repeatedly, another never reads part of it."""
    script = """
        from pathlib import Path
        from activemlp_jax.utils.files import write_aside

        for count in range(300):
            with write_aside(Path("file")) as aside:
                aside.write_text(str(count % 10) * 100_000)
    """
    writer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    contents = set()
    while writer.poll() is None:
        contents.add(read_file("file", most=100_000))
        time.sleep(0.001)
    assert writer.wait() == 0
    sizes = {len(content) for content in contents if len(set(content)) == 1}
    assert sizes == {100_000}
    assert all(len(set(content)) == 1 for content in contents - {b"mine"})
    assert stat.S_ISREG(Path("file").stat().st_mode)
