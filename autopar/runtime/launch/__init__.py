"""Starting ranks on nodes, watching them, and ending all of them whatever happens. Needs no torch but in ranks."""
