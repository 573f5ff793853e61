"""The scans: the inner loop of each inner model, over all mini-batches of all sequences.

They always start at a mini-batch boundary; a stream that goes on inside a mini-batch is handled above, in
``layers.functional``.
"""

import torch
from torch import Tensor

from ..arguments import Scan
from ..inner_models import INNER_MODELS, InnerModel
from .operator import Gradients, Operator
from .samples import Draw, Sizes

TOKENS = ("q", "k", "v", "inner_lr")
PARAMETERS = ("token_scale", "weights", "ln_weight", "ln_bias")
DECAYS = ("log_decay", "initial")


def declare_scan(model: InnerModel, forgets: bool = False) -> Operator[Scan]:
    """o; the weights after the last complete mini-batch; what the backward keeps, checkpoints last.

    With decays it is an operator of its own, since arguments that most calls lack would slow small ones.
    """
    outgoing = tuple(f"{name}_out" for name in model.weights)
    kept = (*model.kept, "checkpoints")

    def fake(scan: Scan, backend: str) -> tuple[Tensor, ...]:
        q, weights, D = scan.q, scan.weights, scan.q.shape[3]
        # kernels keep inner gradients as rounded for their products, the other backends in full precision
        dtype = q.dtype if backend == "triton" else weights[0].dtype
        tokens = [q.new_empty(*q.shape[:3], width, dtype=dtype) for width in model.kept_widths(D, scan.hidden)]
        return q.new_empty(q.shape), *(w.new_empty(w.shape) for w in weights), *tokens, scan.new_checkpoints()

    def gradient_dtype(scan: Scan, field: str) -> torch.dtype | None:
        return None if field in TOKENS else scan.weights[0].dtype

    def absent(scan: Scan) -> tuple[Tensor, ...]:
        """One sequence's and head's zeros for all: a kernel makes whole what it reads by tokens."""
        return tuple(x.new_zeros(1, 1, *x.shape[2:]).expand(x.shape) for x in (scan.q, *scan.weights))

    def sample(sizes: Sizes, draw: Draw, *, packed: bool = False, segment: int = 1, expansion: int = 0) -> Scan:
        """A row is a sequence; packed: three sequences in one row, one of them empty, and tokens of none."""
        B, L, H, D, K = sizes
        shapes, wide, starts, lengths, N = model.shapes(D, (expansion or model.expansion) * D), draw.wide, None, None, B
        if packed:
            B, L, N, third = 1, B * L, 3, B * L // 3
            starts = torch.tensor([2 * third, 0, third], device=draw.device)
            lengths = torch.tensor([L - 2 * third, third, 0], device=draw.device)
        q, k, v = (draw.normal(B, L, H, D) for _ in range(3))
        weights = tuple(wide.weight(N, H, *shape, fan=shape[0]) for shape in shapes.values())
        norm = wide.normal(H, D), wide.normal(H, D)
        rates = wide.rate(B, L, H) / D, wide.rate(K)
        scan = Scan(q, k, v, *rates, weights, *norm, starts, lengths, 1e-6, segment, model.name)
        if not forgets:
            return scan
        log_decay = -wide.rate(B, L, H)
        return scan._replace(log_decay=log_decay, initial=tuple(wide.weight(H, *s, fan=s[0]) for s in shapes.values()))

    return Operator(
        f"{model.name}_forgetting_scan" if forgets else f"{model.name}_scan",
        Scan,
        ("o", *outgoing, *kept),
        fake,
        sample,
        constants={"inner": model.name} | ({} if forgets else {"log_decay": None, "initial": ()}),
        groups={"weights": model.weights, "initial": [f"{name}_initial" for name in model.weights]},
        gradients=Gradients(
            (*TOKENS, *PARAMETERS, *(DECAYS if forgets else ())), 1 + len(outgoing), kept, gradient_dtype, absent
        ),
    )


SCANS = {name: declare_scan(model) for name, model in INNER_MODELS.items()}
FORGETTING_SCANS = {name: declare_scan(model, forgets=True) for name, model in INNER_MODELS.items()}
