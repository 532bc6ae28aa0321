"""Where commands write is found out before the work starts."""

import os
from pathlib import Path

import pytest

from activemlp_jax.errors import UserError
from activemlp_jax.files import check_output, check_output_file


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("folder").mkdir()
    return tmp_path


@pytest.mark.parametrize("name", ["new", "folder/new", "some/new/folder/new", "/tmp/a/b"])
def test_a_place_in_folders_that_can_be_made_is_fine_and_nothing_is_made(name: str, place: Path):
    check_output(Path(name))
    assert check_output_file(Path(name)) == "wrote"
    assert sorted(path.name for path in place.rglob("*")) == ["file", "folder"]


@pytest.mark.parametrize("name", ["file/new", "file/folder/new"])
def test_a_file_is_no_folder_to_write_into(name: str):
    with pytest.raises(UserError, match=f"^{name} cannot be written: file is no folder$"):
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
