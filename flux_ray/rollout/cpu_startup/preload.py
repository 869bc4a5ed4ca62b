"""Imports all that an engine's two processes on a CPU need of vLLM: some 5,000 modules, ten seconds.

Knows:  the garbage collector would look again and again at every object that imports make: a seventh of the time.
Never:  starts a thread: processes are forked from one that has imported this.
"""

import gc

collecting = gc.isenabled()
gc.disable()
try:
    import vllm.engine.arg_utils
    import vllm.v1.engine.async_llm
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker  # noqa: F401
finally:
    if collecting:
        gc.enable()
