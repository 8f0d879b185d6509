"""JSON Schemas of everything written to disk, generated from the models in `dde_cache.spec`."""
