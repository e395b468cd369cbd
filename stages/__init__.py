"""Room 2: batches become a published adapter. Importing this package, its plan, its reader and its check imports no torch."""
