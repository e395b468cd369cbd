"""Trackers: what draws curves of a run."""
