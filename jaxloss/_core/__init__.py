"""Shared floors: checks, numerics, masks, reductions, compilation and cases."""
