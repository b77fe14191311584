"""What speed and memory cost, measured side by side: `make bench` writes reports/bench/*.json."""

import os

# Before torch is imported, as for the steps: threads that wait sleep, or a busy neighbour doubles every time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
