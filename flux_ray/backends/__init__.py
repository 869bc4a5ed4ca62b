"""Other libraries that can run a config: TRL and Unsloth, in one process and without Ray."""
