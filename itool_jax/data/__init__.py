"""Tool-use data: rows, schemas, sources and batches."""
