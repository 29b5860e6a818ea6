"""From data sets to batches on devices."""
