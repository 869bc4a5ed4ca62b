"""The loop of reinforcement learning: what the driver decides, group by group."""
