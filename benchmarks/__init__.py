import os

# Before torch is there: its profiler, which counts memory here, would tell of each start.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
