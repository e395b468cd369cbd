"""Families of transformers: one file each, and facts.py for what is known without torch. Importing this package imports no torch."""
