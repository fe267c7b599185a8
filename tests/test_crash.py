"""Broken saves leave the old or the new adapter whole; `make crash` tries many more of them."""

import fcntl
import os
import random
import signal

import pytest

from hf_lora import open_adapter, save_adapter
from hf_lora.formats import disk
from hf_lora.formats import peft as layout
from tests.breakage import disk_with, failing_at, forked, steps_of
from tests.crash import ERRORS, LATE, broken, full_disks, kills, writers
from tests.judges import BEFORE, NAMES, bytes_of, judge_of, prepare


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    root = tmp_path_factory.mktemp("judges")
    return {
        (size, name): judge_of(name, size, root) for size in ("2 KiB", "1 MiB") for name in NAMES
    }


@pytest.fixture(scope="module")
def judge(judges):
    return judges["2 KiB", "peft"]


@pytest.mark.parametrize("before", BEFORE)
def test_a_killed_save_leaves_the_old_or_the_new_adapter(judges, before, tmp_path):
    outcomes = list(kills(judges, before, 16, tmp_path, random.Random(0)))
    assert len(outcomes) == 16
    assert [o for o in outcomes if o.fault] == []


@pytest.mark.parametrize("before", BEFORE)
def test_a_full_disk_changes_no_byte_of_the_old_adapter(judges, before, tmp_path):
    assert set(full_disks(judges.values(), [before], 5, tmp_path)) == {"refused"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files left open
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("name", NAMES)
def test_a_call_that_fails_is_undone_or_does_not_matter(judges, name, before, tmp_path):
    judge, folder = judges["2 KiB", name], tmp_path / "adapter"
    for number, step in enumerate(steps_of(judge, before, folder)):
        word = broken(judge, before, folder, failing_at(number, ERRORS[0]))
        assert word in ("refused", "saved"), step


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupted_save_leaves_one_adapter_whole(judge, tmp_path):
    for number, step in enumerate(steps_of(judge, "foreign", tmp_path / "a")):
        word = broken(judge, "foreign", tmp_path / "a", failing_at(number, KeyboardInterrupt()))
        assert word in ("refused", LATE), step


@pytest.mark.parametrize("count", [2, 4])
def test_of_several_writers_one_wins_whole(judges, count, tmp_path):
    for name in NAMES:
        words = set(writers(judges["1 MiB", name], count, 3, tmp_path))
        assert words <= {str(number) for number in range(1, count + 1)}


def test_a_reader_that_meets_a_save_reads_one_adapter(judge, tmp_path, monkeypatch):
    prepare(judge, "foreign", tmp_path / "a")
    read_config = layout.read_config

    def after_a_save(path, limits):
        monkeypatch.setattr(layout, "read_config", read_config)
        save_adapter(judge.known["new"], tmp_path / "a")
        return read_config(path, limits)

    monkeypatch.setattr(layout, "read_config", after_a_save)
    assert judge.ours(tmp_path / "a") == "new"


def test_what_an_earlier_save_left_is_removed(judge, tmp_path):
    save_adapter(judge.known["old"], tmp_path)
    for left in (disk.backup(layout.CONFIG), ".hf_lora.0123456789abcdef"):
        (tmp_path / left).write_text("{}")
    save_adapter(judge.known["old"], tmp_path)
    assert sorted(bytes_of(tmp_path)) == sorted(NAMES["peft"])


def test_without_hard_links_no_old_config_stands_beside_new_weights(judge, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    def replace(source, target):
        if os.path.basename(target) == failing:
            raise OSError("not this one")
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "replace", replace)
    old = prepare(judge, "ours", tmp_path / "a")
    for failing in (layout.WEIGHTS, layout.CONFIG):
        with pytest.raises(OSError, match="not this one"):
            save_adapter(judge.known["new"], tmp_path / "a")
        if failing == layout.WEIGHTS:
            assert bytes_of(tmp_path / "a") == old
    assert (judge.ours(tmp_path / "a"), judge.theirs(tmp_path / "a")) == ("new", "refused")


def test_a_folder_under_the_name_of_a_file_changes_nothing(judge, tmp_path):
    save_adapter(judge.known["old"], tmp_path)
    (tmp_path / layout.CONFIG).unlink()
    (tmp_path / layout.CONFIG).mkdir()
    weights = (tmp_path / layout.WEIGHTS).read_bytes()
    with pytest.raises(IsADirectoryError):
        save_adapter(judge.known["new"], tmp_path)
    assert (tmp_path / layout.WEIGHTS).read_bytes() == weights
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(NAMES["peft"])


def test_a_process_forked_during_a_save_does_not_keep_the_folder(judge, tmp_path, monkeypatch):
    children = []
    monkeypatch.setattr(disk, "_sync", lambda _: children.append(forked(signal.pause)))
    save_adapter(judge.known["old"], tmp_path)
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError where it is held
    finally:
        os.close(handle)
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_modes_follow_the_umask_through_a_linked_folder(judge, tmp_path, umask, mode):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    before = os.umask(umask)
    try:
        for name in ("old", "new"):
            save_adapter(judge.known[name], tmp_path / "link")
    finally:
        assert os.umask(before) == umask
    files = list((tmp_path / "real").iterdir())
    assert {p.name: p.stat().st_mode & 0o777 for p in files} == dict.fromkeys(NAMES["peft"], mode)
    assert (tmp_path / "link").is_symlink()


def test_a_config_that_links_out_of_the_folder_is_replaced_and_its_target_not_written(
    judge, tmp_path
):
    outside = tmp_path / "outside.json"
    folder = tmp_path / "a"
    prepare(judge, "foreign", folder)
    (folder / layout.CONFIG).rename(outside)
    (folder / layout.CONFIG).symlink_to(outside)
    content = outside.read_bytes()
    with pytest.raises(OSError, match="No space"), disk_with(100):
        save_adapter(judge.known["new"], folder)
    assert (folder / layout.CONFIG).is_symlink()
    save_adapter(judge.known["new"], folder)
    assert not (folder / layout.CONFIG).is_symlink()
    assert outside.read_bytes() == content
    assert open_adapter(folder).digest == judge.known["new"].digest
