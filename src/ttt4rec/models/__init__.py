"""Sequential recommenders: ``TTT4Rec``, its blocks and mixers, and the softmax over all items."""
