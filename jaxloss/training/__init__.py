"""What stands between losses and a training step: sums of terms, exact accumulation."""
