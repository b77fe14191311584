"""What speed and memory cost, measured side by side: `make bench` writes reports/bench/*.json."""
