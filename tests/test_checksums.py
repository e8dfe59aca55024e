"""Checksums of a folder that grows; large files are hashed once."""

import os
import shutil

import pytest

from befm_jax import checksums
from befm_jax.checksums import ChecksumError


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A folder with checksums, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "run"
    for name in ("base/config.json", "base/weights", "adapter/weights", "run.json", "notes"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"of {name}")
    checksums.add(folder, ["base"])
    checksums.add(folder, ["run.json", "adapter"])
    return folder


def test_every_changed_or_missing_file_is_named_and_only_where_it_is_looked_for(run):
    checksums.verify_once(run, ["base", "adapter", "run.json"])
    (run / "notes").write_text("nobody cares")
    for name in ("base/config.json", "base/weights", "adapter/weights", "run.json"):
        before = (run / name).read_bytes()
        part = name.split("/")[0]
        others = {"base", "adapter", "run.json"} - {part}
        for damaged, message in ((before[:-1] + b"!", "not as it was"), (before[:-1], "bytes")):
            (run / name).write_bytes(damaged)
            with pytest.raises(ChecksumError, match=f"^{name} .*{message}"):
                checksums.verify_once(run, [part])
            checksums.verify_once(run, others)
        (run / name).unlink()
        with pytest.raises(ChecksumError, match=f"^{name} is missing"):
            checksums.verify_once(run, [part])
        (run / name).write_bytes(before)
    with pytest.raises(ChecksumError, match=r"^tuned has no checksum"):
        checksums.verify_once(run, ["tuned"])


def test_what_is_written_anew_gets_new_sums_and_the_others_stay(run):
    assert checksums.has(run, "base")
    assert not checksums.has(run, "bas")
    assert not checksums.has(run.parent, "run")
    (run / "adapter" / "weights").unlink()
    (run / "adapter" / "other").write_text("new")
    left = run / "adapter" / ".writing-killed"
    left.mkdir()
    (left / "half").touch()
    checksums.add(run, ["adapter"])
    shutil.rmtree(left)  # by the next writer
    checksums.verify_once(run, ["base", "adapter", "run.json"])


@pytest.mark.parametrize("place", range(0, 400, 23))
def test_a_changed_byte_of_the_sums_is_found(run, place):
    content = bytearray((run / checksums.FILE).read_bytes())
    content[place] ^= 1
    (run / checksums.FILE).write_bytes(content)
    with pytest.raises(ChecksumError, match="SUMS"):
        checksums.verify_once(run, ["base", "adapter", "run.json"])


def test_a_large_file_is_hashed_again_only_where_its_time_or_size_changed(run, monkeypatch):
    monkeypatch.setattr(checksums, "LARGE", 1)
    hashed = []
    digest = checksums._digest
    monkeypatch.setattr(checksums, "_digest", lambda file: hashed.append(file) or digest(file))
    checksums.verify_once(run, ["base"])
    checksums.verify_once(run, ["base"])
    assert len(hashed) == 2
    changed = run / "base" / "weights"
    changed.write_bytes(changed.read_bytes()[:-1] + b"!")
    os.utime(changed, ns=(0, 0))
    with pytest.raises(ChecksumError, match="base/weights is not as it was written"):
        checksums.verify_once(run, ["base"])
