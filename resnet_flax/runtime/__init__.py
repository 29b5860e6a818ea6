"""The process and its machine: files, locks, signals, the terminal."""
