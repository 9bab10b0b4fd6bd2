"""How foreign base layers are read. Each engine is one file; optional packages are imported only there."""
