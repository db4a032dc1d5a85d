"""Runs a script and leaves without the interpreter's own end.

A thread of gloo that lets go of a tensor then wants the interpreter, and Python before 3.14 ends
such a thread in a way that aborts the process.
"""

import os
import runpy
import sys

del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
