"""The tables of docs/results: a folder each, with `table.yaml` (what its rows share) and a YAML file for each row."""
