"""Training: state, steps, checkpoints, and the loop over them."""
