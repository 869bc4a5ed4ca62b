"""Importing this imports vLLM, all that an engine's two processes on a CPU need of it: some 5,000 modules, ten seconds.

Takes:  nothing.
Gives:  nothing: what is imported.
Knows:  the garbage collector looks at every object that imports make again and again, a seventh of their time.
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
