"""Several processes that train together, forked, so that none of them imports torch again."""

import contextlib
import multiprocessing
import os
import pickle
import tempfile
import traceback
from pathlib import Path

import torch.distributed as dist
import torch.distributed.tensor.parallel  # noqa: F401 or each process would import it, for a second

from tests.support.crash import fork, wait
from ttt4rec.recsys.training.parallel import processes


@contextlib.contextmanager
def meeting_place():
    """Port of a store where processes meet, as those of torchrun do in its.

    A port that is free now could be taken by another test when the first process opens it, so the store is there
    before them. It has a process of its own: its threads look up names, and a process forked meanwhile would inherit
    the lock of the C library that they hold, and wait for ever when it looks up one itself.
    """
    here, there = multiprocessing.Pipe()

    def serve():
        here.close()
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        there.send(store.port)
        with contextlib.suppress(EOFError):
            there.recv()

    child = fork(serve)
    there.close()
    try:
        yield here.recv()
    finally:
        here.close()
        assert wait(child) == 0


def together(world_size, function):
    """What the function returns in each of so many processes of one group."""
    with tempfile.TemporaryDirectory() as folder, meeting_place() as port:

        def run(rank):
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "TORCHELASTIC_USE_AGENT_STORE": "True"}
            try:
                with processes("cpu"):
                    result = function()
            except BaseException:
                traceback.print_exc()
                raise
            (Path(folder) / str(rank)).write_bytes(pickle.dumps(result))

        children = [fork(lambda rank=rank: run(rank)) for rank in range(world_size)]
        assert [wait(child) for child in children] == [0] * world_size
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world_size)]
