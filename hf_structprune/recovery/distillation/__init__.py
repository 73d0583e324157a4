"""Distillation: a pruned model learns to predict what its dense teacher does.

`trainer` and what needs TRL is imported on demand.
"""
