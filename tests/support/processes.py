"""Several processes that train together, forked, so that none of them imports torch again."""

import os
import pickle
import socket
import tempfile
import traceback
from pathlib import Path

from tests.support.crash import fork, wait
from ttt4rec.recsys.training.parallel import processes


def together(world_size, function):
    """What the function returns in each of so many processes of one group."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:

        def run(rank):
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
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
