"""Losses compared by training one small model on real data; see `jaxloss.playground.compare`."""
