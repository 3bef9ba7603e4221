"""What `python -m fastsam` runs: the diagnosis and the demo."""
