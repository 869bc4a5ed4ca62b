"""What every test process needs before anything is imported."""

import gc
import os

# One OpenMP thread a process and no binding: two pools on one core are slower than one (see rollout.engine.engine_env).
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Ray's workers would give way to whatever else computes here, such as the tests of the other lane (launch/test.sh).
os.environ.setdefault("RAY_worker_niceness", "0")

gc.disable()  # until all tests are imported: half a million objects, at which every full collection would look


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
