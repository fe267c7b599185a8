"""Ways to break a save: kills, full disks, calls that fail."""

import contextlib
import errno
import gc
import io
import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from hf_lora import save_adapter
from hf_lora.formats import disk
from tests.judges import prepare


def forked(action):
    """Runs an action in a child process and returns its id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: forking beside threads
        process = os.fork()
    if process:
        return process
    code = 1
    try:
        torch.set_num_threads(1)  # threads do not survive a fork
        action()
        code = 0
    finally:
        os._exit(code)


def ended(process):
    """Waits for a child; tells whether a signal ended it. One that failed is an error."""
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if code > 0:
        raise RuntimeError("a child failed by itself, see its traceback above")
    return code < 0


_CHANGES = frozenset(
    {"mkdir", "open", "flock", "writelines", "flush", "fsync", "__exit__", "chmod", "link",
     "replace", "unlink", "close"}
)  # fmt: skip


def changes_disk(function):
    """Tells whether a C function is a system call that changes files, or does so to an open one."""
    owner = getattr(function, "__self__", None)
    of_system = getattr(function, "__module__", None) in ("posix", "fcntl", "_io", "io")
    return function.__name__ in _CHANGES and (of_system or isinstance(owner, io.IOBase))


@contextlib.contextmanager
def at_steps(action: Callable[[int, str], None]) -> Iterator[None]:
    """Calls the action before and after every call that changes the disk, with number and name."""
    numbers = itertools.count()

    def profile(_, event, function):
        if event in ("c_call", "c_return") and changes_disk(function):
            when = "before" if event == "c_call" else "after"
            action(next(numbers), f"{when} {function.__name__}")

    # what the collector finalises meanwhile makes calls too, and swallows what is raised in them
    gc.disable()
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)
        gc.enable()


def steps_of(judge, before, folder):
    """The names of all steps of one save."""
    names = []
    prepare(judge, before, folder)
    with at_steps(lambda _, name: names.append(name)):
        save_adapter(judge.known["new"], folder)
    return names


def kill_at_step(judge, folder, share, *, steps):
    """Kills the save at one of its steps, by its share of all."""
    wanted = int(share * len(steps))

    def save():
        def die(number, _):
            if number == wanted:
                os.kill(os.getpid(), signal.SIGKILL)

        with at_steps(die):
            save_adapter(judge.known["new"], folder)

    return ended(forked(save))


def kill_at_byte(judge, folder, share, **_):
    """Lets the kernel end the process when a file reaches a size, by its share of the weights'."""
    size = judge.known["new"].nbytes

    def save():
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size),) * 2)
        save_adapter(judge.known["new"], folder)

    return ended(forked(save))


def kill_at_time(judge, folder, share, *, steps):
    """Kills the save after a share of the time that a save takes."""
    del steps
    started = time.perf_counter()
    save_adapter(judge.known["new"], folder.with_name("timed"))
    delay = share * (time.perf_counter() - started)
    read, write = os.pipe()

    def save():
        os.write(write, b"!")
        save_adapter(judge.known["new"], folder)

    process = forked(save)
    os.close(write)
    os.read(read, 1)
    os.close(read)
    time.sleep(delay)
    os.kill(process, signal.SIGKILL)  # a child not yet waited for cannot have passed its id on
    return ended(process)


KILLS = (kill_at_step, kill_at_byte, kill_at_step, kill_at_time)


class _Full(io.FileIO):
    """A file on a disk with so many bytes left, counted over all files."""

    left = 0

    def write(self, data):
        if not _Full.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = super().write(memoryview(data)[: _Full.left])
        _Full.left -= written
        return written


@contextlib.contextmanager
def disk_with(free):
    """Lets saves write so many bytes, then no more."""
    _Full.left = free

    def opened(path, mode):
        return io.BufferedWriter(_Full(path, mode.replace("b", "")))

    with mock.patch.object(disk, "open", opened, create=True):
        yield


@contextlib.contextmanager
def failing_at(wanted, error):
    """Raises the error before or after one of the calls that change the disk."""

    def fail(number, _):
        if number == wanted:
            raise error

    with at_steps(fail):
        yield


@contextlib.contextmanager
def small_disk(place, room):
    """Mounts a file system of so many bytes; raises OSError where that is not permitted."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr.strip())
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


@contextlib.contextmanager
def filled(place, free):
    """Fills a file system but for so many bytes, in whole pages."""
    filler = place / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(shutil.disk_usage(place).free - free, 1))
    try:
        yield
    finally:
        filler.unlink()
