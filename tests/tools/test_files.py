"""Files: removal that cannot leave half of a folder under its own name."""

import hashlib

from llama_tut.tools import files
from llama_tut.tools.files import fingerprint, remove


def test_a_fingerprint_is_size_and_checksum(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert fingerprint(tmp_path / "a") == {
        "bytes": 3,
        "sha256": hashlib.sha256(b"abc").hexdigest(),
    }


def test_remove_takes_files_folders_and_what_is_absent(tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "file").touch()
    names = ("folder", "file", "absent")
    remove(*(tmp_path / name for name in names))
    assert not list(tmp_path.iterdir())


def test_a_folder_loses_its_name_before_its_files(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(files.shutil, "rmtree", lambda *_, **__: None)
    remove(tmp_path / "folder")  # killed in the middle
    assert [p.name for p in tmp_path.iterdir()] == [".tmp-old-folder"]
