"""Inner loops that an NVIDIA GPU has no shared memory for: they are refused before anything is launched."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.kernels.test_ahead_of_time import TABLE
from ttt4rec.kernels import launch, limits
from ttt4rec.operators import backends
from ttt4rec.operators.backends import choose_backend

SINGLE, HALF = torch.float32, torch.bfloat16
FITTING = [  # of head dimension 128: the longest mini-batch, of 64 that there are
    ("sm_90", "linear_backward", SINGLE, 32),
    ("sm_90", "linear_forward", SINGLE, 64),
    ("sm_90", "linear_backward", HALF, 64),
    ("sm_80", "linear_backward", SINGLE, 32),
    ("sm_80", "mlp_forward", SINGLE, 32),
    ("sm_86", "mlp_forward", SINGLE, 16),
    ("sm_86", "linear_backward", HALF, 0),
    ("sm_120", "linear_forward", HALF, 64),
]


@pytest.mark.parametrize(("architecture", "op", "dtype", "longest"), FITTING)
def test_what_does_not_fit_is_refused(
    architecture: str, op: str, dtype: torch.dtype, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "target", lambda: architecture)
    q = torch.empty(1, 1, 1, 128, dtype=dtype)
    if longest > 0:
        limits.check(op, q, longest)
    if longest == 64:
        return
    most = f"a mini_batch_size of up to {longest}" if longest else "head dimensions of up to 64"
    with pytest.raises(ValueError, match=f"the kernel on {architecture} .* with .*{most}; given"):
        limits.check(op, q, longest + 1)


@pytest.mark.parametrize("key", [key for key in TABLE if key[1] == "sm_80"])
def test_what_some_gpus_have_no_room_for_is_known(key: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the kernels whose costs are listed: those for an A100 that its smaller relatives cannot run."""
    monkeypatch.setattr(launch, "target", lambda: "sm_86")
    dtypes: dict[str, Any] = {"bf16": HALF, "fp32": SINGLE}
    for r in TABLE[key]:
        refused = limits.scan_refusal(r.op, r.head_dim, r.mini_batch_size, dtypes[r.dtype]) is not None
        assert refused or r.shared_memory <= limits.room("sm_86") * 1024, r


def test_auto_takes_no_kernel_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(launch, "target", lambda: "sm_90")
    x = SimpleNamespace(is_cuda=True, dtype=SINGLE, shape=(1, 2, 3, 128), device=torch.device("cuda:0"))
    given: Any = (x, 128, 64, "linear")
    assert choose_backend("auto", *given) == "auto"
    assert "for which 227 KiB of shared memory must be 640" in caplog.text
    with pytest.raises(RuntimeError, match="'triton' on sm_90 trains TTT-Linear in float32 with head dimension 128"):
        choose_backend("triton", *given)
    with torch.no_grad():
        assert choose_backend("auto", *given) == "triton"
    monkeypatch.setattr(backends, "autocast_dtype", lambda *_: HALF)
    assert choose_backend("auto", *given) == "triton"
