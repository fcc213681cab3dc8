"""One torch thread in the tests: small tensors gain nothing from more, and results do not depend on the machine."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("SADALIB_PROGRESS", "plain")

import torch

torch.set_num_threads(1)
