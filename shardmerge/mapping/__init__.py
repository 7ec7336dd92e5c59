"""mapping.yaml: name templates, the spec, and its resolution against catalogs."""
