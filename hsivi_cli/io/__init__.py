"""Files: atomic writes, images, data sets, tables, hashes."""
