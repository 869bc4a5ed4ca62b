"""Where rollout functions run: single_turn in the rollout worker, any other in a child process."""

from flux_ray.rollout.environments.sandboxed import SandboxedRollout

__all__ = ["SandboxedRollout"]
