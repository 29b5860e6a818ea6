"""About the process and its machine: files, locks, the terminal."""
