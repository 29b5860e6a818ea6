"""What a training is about: loss, metrics and evaluation of a batch, and no loop."""
