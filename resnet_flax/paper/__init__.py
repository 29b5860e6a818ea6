"""The paper's tables and figures, and what reproduces each."""
