"""One file per checkpoint format: headers in, Catalog out. Reads no tensor data, imports no torch."""
