"""Objectives: what a transformer is asked to predict, and at which noise levels."""
