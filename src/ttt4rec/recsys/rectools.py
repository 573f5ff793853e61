"""TTT layers in RecTools' sequential models (extra ``rectools``).

    SASRecModel(
        transformer_layers_type=TTTLayers,
        lightning_module_type=TTTLightningModule,
        use_pos_emb=False,
        transformer_layers_kwargs={"inner": "mlp"},
        ...,
    )

RecTools brings data, losses, training and recommendations, and leaves the layers to the user. Nothing else imports this
module.
"""

import copy
from typing import Any

from torch import Tensor, nn

from ttt4rec.extras import missing
from ttt4rec.layers.ttt import TTTLayer
from ttt4rec.models.blocks import Block, make_norm

try:
    from rectools.models.nn.transformers.lightning import TransformerLightningModule
    from rectools.models.nn.transformers.net_blocks import TransformerLayersBase
except ModuleNotFoundError as error:
    raise missing("ttt4rec.recsys.rectools", error) from error


class TTTLayers(TransformerLayersBase):  # type: ignore[misc]
    """TTT4Rec's residual blocks and final norm as RecTools' ``transformer_layers_type``.

    They are causal by themselves: of RecTools' masks for attention only that there is one is asked. TTT layers know the
    order of their tokens, so that RecTools' positional embedding is not needed.

    Args:
        n_blocks: residual blocks.
        n_factors: width.
        n_heads: heads of the TTT layers.
        dropout_rate: of each block's output.
        ff_factors_multiplier: width of the feed-forward networks, as a multiple of n_factors.
        options: more arguments of ``TTTLayer``, such as ``inner`` and ``mini_batch_size``.
    """

    def __init__(
        self,
        n_blocks: int,
        n_factors: int,
        n_heads: int,
        dropout_rate: float,
        ff_factors_multiplier: int = 4,
        **options: Any,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(n_factors, TTTLayer(n_factors, n_heads, **options), ffn_width=ff_factors_multiplier * n_factors)
            for _ in range(n_blocks)
        )
        self.dropout = nn.Dropout(dropout_rate)
        self.norm = make_norm("rms", n_factors)

    def forward(
        self, seqs: Tensor, timeline_mask: Tensor, attn_mask: Tensor | None, *others: Any, **more: Any
    ) -> Tensor:
        """seqs ``[B, L, n_factors]`` to the same shape; timeline_mask ``[B, L, 1]`` is False for padding.

        Raises:
            ValueError: attn_mask is None, as it is in a model that reads both ways, such as ``BERT4RecModel``.
        """
        if attn_mask is None:
            raise ValueError(
                "attn_mask must be causal, as TTT layers read forwards; given None; use a model such as SASRecModel"
            )
        mask = timeline_mask.squeeze(-1)
        for block in self.blocks:
            seqs = self.dropout(block(seqs, mask=mask))
        y: Tensor = self.norm(seqs)
        return y


class TTTLightningModule(TransformerLightningModule):  # type: ignore[misc]
    """RecTools' training, in which TTT layers begin as they were made.

    RecTools draws every parameter of more than one dimension again before it trains. So it draws the scales and biases
    of the inner norm and the inner learning rates too, which are matrices ``[num_heads, ...]`` in a TTT layer.
    """

    def on_train_start(self) -> None:
        """Draw the other layers' parameters, unless the model is trained already."""
        layers = [module for module in self.torch_model.modules() if isinstance(module, TTTLayer)]
        made = [copy.deepcopy(layer.state_dict()) for layer in layers]
        super().on_train_start()
        for layer, weights in zip(layers, made, strict=True):
            layer.load_state_dict(weights)
