"""Loops without rollouts: completions, preference pairs, groups that were rolled out before."""
