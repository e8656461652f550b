"""Partition a timm model into stages: trace it with a probe batch, place the exits, run stage by stage or at once."""
