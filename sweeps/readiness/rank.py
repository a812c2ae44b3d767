"""One rank of a preflight: `python -m sweeps.readiness.rank ACCELERATOR DIRECTORY`.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are in its environment. Prints a RankReport as JSON,
or ends with one line on stderr.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

MEBIBYTES = 64


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What the ranks found together."""

    backend: str
    ranks: int
    nodes: int
    device: str
    gib_per_second: float

    def describe(self) -> str:
        where = f"{self.ranks} ranks on {self.nodes} nodes"
        return (
            f"{self.backend} over {where}: {MEBIBYTES} MiB at {self.gib_per_second:.1f} GiB/s; "
            f"each on its own {self.device}"
        )


def main() -> None:
    accelerator, directory = sys.argv[1:]

    import torch
    import torch.distributed as dist

    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    world = int(os.environ["WORLD_SIZE"])
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise SystemExit("trainer.accelerator=cuda: PyTorch finds no CUDA device: check driver and wheel")
    on_cpu = accelerator == "cpu" or not torch.cuda.is_available()
    if not on_cpu and local_rank >= torch.cuda.device_count():
        raise SystemExit(
            f"rank {rank} needs device {local_rank}, this node shows {torch.cuda.device_count()}: "
            "ask for all of a node's GPUs with --gpus-per-node, without binding one to each task"
        )
    device = torch.device("cpu") if on_cpu else torch.device("cuda", local_rank)
    name = "CPU" if on_cpu else torch.cuda.get_device_name(device)
    square = torch.eye(256, device=device)
    if not torch.equal(square @ square, square):
        raise SystemExit(f"rank {rank}: {name} multiplies wrongly")
    if not on_cpu:
        torch.cuda.set_device(device)
    backend = "gloo" if on_cpu else "nccl"
    dist.init_process_group(backend, device_id=None if on_cpu else device)

    tensor = torch.full((MEBIBYTES * 2**18,), float(rank + 1), device=device)
    dist.all_reduce(tensor[:1024].clone())  # connects
    began = time.monotonic()
    dist.all_reduce(tensor)
    if not torch.all(tensor == world * (world + 1) / 2):
        raise SystemExit(f"rank {rank}: the all-reduce gave a wrong sum")
    rate = MEBIBYTES / 2**10 / (time.monotonic() - began)

    found: list[dict[str, str]] = [{} for _ in range(world)]
    dist.all_gather_object(found, {"host": os.uname().nodename, "torch": torch.__version__, "device": name})
    for key in ("torch", "device"):
        values = sorted({their[key] for their in found})
        if len(values) > 1:
            raise SystemExit(f"the ranks differ in {key}: {', '.join(values)}")
    check_shared_lock(Path(directory), rank)
    nodes = len({their["host"] for their in found})
    report = RankReport(backend=backend, ranks=world, nodes=nodes, device=name, gib_per_second=rate)
    print(json.dumps(asdict(report)))
    dist.barrier()
    dist.destroy_process_group()


def check_shared_lock(directory: Path, rank: int) -> None:
    """All ranks see one directory, and what rank 0 has locked in it no other can lock, on whatever node."""
    import torch.distributed as dist

    from sweeps.stores.locks import ProcessLock

    path = directory / f".preflight-{os.environ['MASTER_PORT']}.lock"
    lock = ProcessLock(path)
    if rank == 0:
        lock.acquire()
    dist.barrier()
    if rank != 0:
        if not path.exists():
            raise SystemExit(f"{os.uname().nodename} does not see what rank 0 writes in {directory}")
        if lock.try_acquire():
            raise SystemExit(f"{directory}: its file locks do not exclude other nodes: mount it with locks")
    dist.barrier()
    if rank == 0:
        lock.release()
        path.unlink()


if __name__ == "__main__":
    main()
