"""Tiny random models in the diffusers layout, one file a family: the real classes, with the real module names, milliseconds a step."""
