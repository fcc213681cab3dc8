__version__ = "0.1.0"

import os

# Threads that spin while they wait slow training several times over on a machine that does anything else.
# OpenMP reads this when torch is first imported, so import sadalib before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
