"""The parts of a rehearsal: a tiny model, rows, a plan in miniature, two runs of it, and what is judged of them."""
