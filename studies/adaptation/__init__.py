"""What adapting at test time buys: an ablation and two studies of users whose interests switch."""
