"""The stages of the production line, one module each, and what they share."""

import os

# Threads of OpenMP spin while they wait for each other. Beside any other work they so burn the time that the
# thread they wait for needs, and training takes a multiple of it (docs/log.md). This must be set before torch
# is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
