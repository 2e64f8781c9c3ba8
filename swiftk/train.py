"""`torchrun -m swiftk.train [config.yaml] --key value`: argv, YAML and environment -> configs -> a run; nothing else.

Plain `python -m swiftk.train` is one process. No arguments at all is the preset swiftk/tiny.yaml. Exit codes: 0 finished,
or stopped by a signal and saved; 2 bad arguments; 1 any other error; 13 another rank died; 14 a signal, nothing saved.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one tokenizer thread a rank; also no warning after a fork

import torch
import torch.distributed as dist

from swiftk.allocator import give_back_large_blocks
from swiftk.arguments import Arguments, help_text, parse
from swiftk.model.compute import isa_path, pick_device
from swiftk.parallel import comm as communication
from swiftk.parallel.comm import DistComm
from swiftk.parallel.mesh import Mesh
from swiftk.parallel.watchdog import Watchdog
from swiftk.trainer.checkpoint import CheckpointError
from swiftk.trainer.loop import NonFiniteError
from swiftk.trainer.run import Commands, run
from swiftk.trainer.stop import StopFlag
from swiftk.trainer.trained import UntrainedError

PRESET = Path(__file__).with_name("tiny.yaml")


def program(name: str, module: str | None = None) -> str:
    """`name` where a shell finds it beside this Python (an activated environment), else this Python by its path."""
    found = shutil.which(name)
    if found and os.path.samefile(os.path.dirname(found), os.path.dirname(sys.executable)):
        return name
    return shlex.quote(sys.executable) + (f" -m {module}" if module else "")


def start_command(world_size: int) -> str:
    if world_size == 1:
        return f"{program('python')} -m swiftk.train"
    return f"{program('torchrun', 'torch.distributed.run')} --nproc-per-node {world_size} -m swiftk.train"


def resume_command(argv: list[str], world_size: int) -> str:
    """What goes on where this run stops; the layout may be another one."""
    rest: list[str] = []
    skip = False
    for token in argv or [str(PRESET)]:
        if token.startswith("--"):
            skip = token.split("=")[0].replace("-", "_") == "__resume_from_checkpoint"
        if not skip:
            rest.append(token)
    return f"{start_command(world_size)} {shlex.join(rest)} --resume_from_checkpoint auto"


def connect(arguments: Arguments, rank: int, world_size: int, device: torch.device) -> tuple[Mesh, Watchdog | None]:
    """The process group from torchrun's environment, and the thread that names a rank that died."""
    if world_size == 1:
        return Mesh.single(), None
    timeout = timedelta(seconds=arguments.parallel.ddp_timeout)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_master = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    run_id = f"swiftk/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store = dist.TCPStore(host, port, world_size, is_master, timeout=timeout)
    group = dist.PrefixStore(f"{run_id}/group", store)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"  # counts and objects lie on the CPU, gradients do not
    dist.init_process_group(backend, store=group, rank=rank, world_size=world_size, timeout=timeout)
    comm = DistComm()
    beats = dist.PrefixStore(f"{run_id}/watchdog", dist.TCPStore(host, port, None, False, timeout=timedelta(seconds=10)))
    watchdog = Watchdog(beats, rank, world_size, timeout=arguments.parallel.heartbeat_timeout,
                        position=lambda: comm.position, leave=tell_launcher)  # fmt: skip
    return Mesh.from_comm(comm), watchdog


def tell_launcher(message: str) -> None:
    """Torchrun's summary then has the message, and the first rank to fail as its root cause."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and not os.path.exists(path):
        entry = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": entry}))


def in_a_collective(error: BaseException) -> bool:
    """Whether it was raised there: then another rank may be to blame, otherwise it is this rank's own."""
    return any(f.f_code.co_filename == communication.__file__ for f, _ in traceback.walk_tb(error.__traceback__))


def fail(message: str, rank: int, watchdog: Watchdog | None) -> int:
    """One message for people, from rank 0 where all ranks have the same one, and the reason for the others."""
    reason = message.split("\n")[0]
    tell_launcher(message)
    if not (watchdog and watchdog.reported(reason)):
        print(f"swiftk.train: {f'rank {rank}: ' if rank else ''}{message}", file=sys.stderr, flush=True)
    if watchdog:
        watchdog.failed(reason)
    return 1


def main(argv: list[str]) -> int:
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if "--help" in argv or "-h" in argv:
        print(help_text() if rank == 0 else "", end="\n" if rank == 0 else "")
        return 0
    try:
        arguments = parse(argv, world_size=world_size, preset=str(PRESET))
        isa_path(arguments.run.isa)
    except (ValueError, ImportError) as error:  # the second: no compiled kernels
        if rank == 0:
            print(f"swiftk.train: {error}", file=sys.stderr)
        tell_launcher(str(error))
        return 2 if isinstance(error, ValueError) else 1
    try:
        device = pick_device(arguments.run.device, int(os.environ.get("LOCAL_RANK", "0")))
    except ValueError as error:  # of this rank alone, perhaps
        print(f"swiftk.train: {error}", file=sys.stderr)
        tell_launcher(str(error))
        return 2
    if rank == 0:
        for warning in arguments.warnings:
            print(f"swiftk.train: {warning}", file=sys.stderr)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if "OMP_NUM_THREADS" not in os.environ or local_size > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))

    give_back_large_blocks()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    stop = StopFlag()
    try:
        mesh, watchdog = connect(arguments, rank, world_size, device)
    except (RuntimeError, OSError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        return fail(f"the ranks cannot meet at {where}: {str(error).splitlines()[0]}", rank, None)
    try:
        run(
            arguments.run, arguments.tuner, arguments.data, arguments.optim, mesh, stop, arguments=arguments.flat(),
            yaml_path=arguments.yaml_path, device=device,
            commands=Commands(
                start_command(2), program("tensorboard", "tensorboard.main"), resume_command(argv, world_size),
                f"{program('python')} -m swiftk.merge", f"{program('python')} -m swiftk.generate",
            ),
        )  # fmt: skip
    except (ValueError, CheckpointError, NonFiniteError, UntrainedError, ImportError) as error:
        stop.agreed()
        return fail(str(error), rank, watchdog)
    except (RuntimeError, ConnectionError) as error:
        if not watchdog or not in_a_collective(error):
            tell_launcher(repr(error))
            if watchdog:
                watchdog.failed(repr(error))
            raise
        reason = watchdog.after_failed_collective(error)
        watchdog.failed(f"its collective failed ({reason})")
        watchdog.end(reason)
    except OSError as error:  # of a file: the collectives' have been dealt with
        stop.agreed()
        return fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), rank, watchdog)
    except BaseException as error:
        tell_launcher(repr(error))
        if watchdog:
            watchdog.failed(repr(error))
        raise
    if watchdog:
        watchdog.close()  # before the barrier: then nobody looks for a rank 0 that has ended
        mesh.world.comm.barrier()
        dist.destroy_process_group()
    stop.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
