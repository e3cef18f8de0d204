"""Runs a program with the stand-in in place; see the package's docstring."""

from __future__ import annotations

import runpy
import sys

import strict_gpu

strict_gpu.install()
if sys.argv[1:2] == ["-m"]:
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
