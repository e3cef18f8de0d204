"""What is learned about this machine."""
from __future__ import annotations
import os
from llvmlite import binding as llvm
def cpu_name() -> str:
    return os.environ.get("NUMBA_CPU_NAME") or llvm.get_host_cpu_name()
def cpu_features() -> str:
    named = os.environ.get("NUMBA_CPU_FEATURES")
    return llvm.get_host_cpu_features().flatten() if named is None else named
LANES = 16 if "+avx512f" in cpu_features().split(",") else 8
TILE = 32
PART_KEYS = 512
FIELDS = 12
import numpy as np
FLOAT = np.float32
