"""Data sets: records, manifest, buckets, plan, pipeline, preparation, the bundled pack."""
