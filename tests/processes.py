"""Two real processes for a test, from a fork server that has the imports done."""

import multiprocessing
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

GROUP = pytest.mark.xdist_group("processes")  # the files that share the fork server
multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.preloaded"])


def free_port():
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_two(worker, folder):
    """Run `worker(rank, 2, port, folder)` in two processes; an exception in one of them is raised here."""
    mp.start_processes(worker, args=(2, free_port(), str(folder)), nprocs=2, start_method="forkserver")


def leave(results, folder, rank):
    """What a worker does last: its results are for `results_of_two`."""
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def results_of_two(worker, folder):
    """Run a worker as `run_two`; what each process left."""
    run_two(worker, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
