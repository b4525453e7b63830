"""What a guided pass costs, measured: see bench.py."""
