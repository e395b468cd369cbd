"""The Hub: what a run sends there in the background, and what is fetched from it."""
