"""Environments and tools: what a model acts in between the turns of a completion."""
