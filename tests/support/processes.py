"""Several processes that train together, forked, so that none of them imports torch again."""

import os
import pickle
import tempfile
import traceback
from pathlib import Path

import torch.distributed as dist
import torch.distributed.tensor.parallel  # noqa: F401 or each process would import it, for a second

from tests.support.crash import fork, wait
from ttt4rec.recsys.training.parallel import processes


def together(world_size, function):
    """What the function returns in each of so many processes of one group.

    They meet in a store of this process, as those of torchrun do in its: a port that is free now could be taken by
    another test when the first of them opens it.
    """
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:

        def run(rank):
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "LOCAL_RANK": str(rank)}
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
