"""Modules that learn at test time: ``TTTLayer``, what surrounds its inner loop, and the states of its streams."""
