import os

# Before torch is imported: its profiler, which counts memory here, logs each start.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
