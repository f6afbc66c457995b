"""`train.py` as submitit starts it: with a handler of its own for the signal that announces the end of a job."""

import runpy
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGUSR2, lambda *_: (print("the launcher requeues the job"), sys.exit(144)))
    sys.argv[0] = "train.py"
    runpy.run_path("train.py", run_name="__main__")
