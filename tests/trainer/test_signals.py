"""SIGTERM and Ctrl-C: agreement, one save, exit code 0; no agreement, no save. Two plain processes, without a launcher."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swiftk.trainer import checkpoint
from swiftk.trainer.stop import EXIT_NO_AGREEMENT, StopFlag
from tests.trainer import toy

ROOT = Path(__file__).resolve().parents[2]
MAIN = "import sys; from swiftk.train import main; sys.exit(main(sys.argv[1:]))"
# rank 1 hangs in its third step, as in a deadlock outside of Python's reach
HANG = (
    """
import sys, time, os
from swiftk.trainer import loop
original, calls = loop.learning_rate, []
def hang(*args):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        time.sleep(3600)
    return original(*args)
loop.learning_rate = hang
"""
    + MAIN
)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_ranks(keys, code=MAIN, size=2):
    base = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    command = [sys.executable, "-u", "-c", code, *toy.argv(keys)]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    return [subprocess.Popen(command, env={**base, "RANK": str(r), "LOCAL_RANK": str(r)}, **pipe) for r in range(size)]


def wait_for(process, pattern):
    """Reads the output up to a line that matches."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if re.search(pattern, line):
            return "".join(seen)
    raise AssertionError("".join(seen))


@pytest.fixture
def ranks():
    processes = []
    yield lambda *args, **kwargs: processes.extend(start_ranks(*args, **kwargs)) or processes
    for p in processes:
        p.kill()
        p.wait()
        p.stdout.close()


LONG = {"max_steps": 100000, "save_steps": 0, "eval_steps": 0}


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_signal_to_one_rank_saves_on_all_and_exits_with_0(tmp_path, ranks, number):
    first, second = ranks(toy.arguments(tmp_path, **LONG))
    wait_for(first, r"global_step/max_steps 3/")
    (second if number == signal.SIGTERM else first).send_signal(number)
    begin = time.monotonic()
    text = first.communicate(timeout=60)[0]
    assert first.returncode == 0 and second.wait(timeout=30) == 0, text + second.stdout.read()
    assert time.monotonic() - begin < 20
    (run_dir,) = (tmp_path / "out").glob("v*")
    saved = checkpoint.newest(run_dir)
    assert saved is not None and checkpoint.invalid(saved) is None
    assert f"after step {checkpoint.read_state(saved).step}, saved; go on with:" in text
    assert "--nproc-per-node 2 -m swiftk.train" in text and "--resume_from_checkpoint auto" in text


def test_no_agreement_no_save(tmp_path, ranks):
    first, _ = ranks(toy.arguments(tmp_path, **LONG), HANG)
    wait_for(first, r"global_step/max_steps 2/")
    time.sleep(0.5)
    first.send_signal(signal.SIGTERM)
    text = first.communicate(timeout=60)[0]
    assert first.returncode == EXIT_NO_AGREEMENT and "SIGTERM: no agreement on a step to stop at within" in text, text
    assert not list((tmp_path / "out").glob("v*/checkpoint-*"))


def test_a_rank_that_is_killed_is_named_within_30_seconds(tmp_path, ranks):
    first, second = ranks(toy.arguments(tmp_path, heartbeat_timeout=10, **LONG))
    wait_for(first, r"global_step/max_steps 3/")
    second.kill()
    begin = time.monotonic()
    text = first.communicate(timeout=40)[0]
    assert time.monotonic() - begin < 30
    assert first.returncode not in (0, None) and "rank 0 stops because rank 1 died" in text, text


@pytest.mark.long
def test_a_rank_that_is_frozen_is_named(tmp_path, ranks):
    first, second = ranks(toy.arguments(tmp_path, heartbeat_timeout=10, **LONG))
    wait_for(first, r"global_step/max_steps 3/")
    time.sleep(6)  # a sign of life, which says where the rank is, comes a few times in heartbeat_timeout
    second.send_signal(signal.SIGSTOP)
    text = first.communicate(timeout=40)[0]
    assert first.returncode == 13 and "rank 1 died: no sign of life for 10 s, last seen at all_" in text, text


@pytest.mark.long
def test_rank_0_that_is_killed_is_named(tmp_path, ranks):
    first, second = ranks(toy.arguments(tmp_path, heartbeat_timeout=10, **LONG))
    wait_for(first, r"global_step/max_steps 3/")
    first.kill()
    text = second.communicate(timeout=40)[0]
    assert second.returncode == 13 and "rank 0" in text.split("stops because")[1], text


@pytest.mark.long
def test_a_rank_that_hangs_is_named_when_the_collective_times_out(tmp_path, ranks):
    first, _ = ranks(toy.arguments(tmp_path, heartbeat_timeout=5, ddp_timeout=8, **LONG), HANG)
    text = first.communicate(timeout=90)[0]
    assert first.returncode == 13 and re.search(r"rank 1 is at collective \d+ \(all_reduce at", text), text


@pytest.mark.long
def test_torchrun_stops_and_saves(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
               "-m", "swiftk.train", *toy.argv(toy.arguments(tmp_path, **LONG))]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=env)
    wait_for(process, r"global_step/max_steps 3/")
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert "saved; go on with:" in text, text
    assert checkpoint.newest(next((tmp_path / "out").glob("v*"))) is not None


def test_what_comes_before_the_first_step_is_not_a_step():
    """Reading a dataset for minutes must not let a hang at a stop last for minutes."""
    flag = StopFlag(listen=False)
    time.sleep(0.05)
    flag.at_boundary()
    assert flag.longest_step == 0.0
    time.sleep(0.05)
    flag.at_boundary()
    assert 0.05 <= flag.longest_step < 5


def test_handlers_are_restored_and_the_flag_is_seen():
    before = signal.getsignal(signal.SIGTERM)
    flag = StopFlag(grace=60)
    try:
        assert flag.at_boundary() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 5
        while not flag.requested and time.monotonic() < deadline:
            time.sleep(0.01)
        assert flag.at_boundary() == 1 and flag.signal_name == "SIGTERM"
    finally:
        flag.close()
    assert signal.getsignal(signal.SIGTERM) == before
