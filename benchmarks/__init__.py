"""Time and memory of jaxloss against its peers, side by side in one process."""
