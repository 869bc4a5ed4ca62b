"""What every test process needs before anything is imported."""

import os

# One OpenMP thread a process and no binding: two pools on one core are slower than one (see rollout.engine.engine_env).
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
