"""Sources of samples, one file each; `common.import_samples` checks what they find and writes it."""
