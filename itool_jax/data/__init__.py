"""Tool-use data: records, schemas, sources and batches."""
