"""The verbs of the `unisono` command, one module each, with a `main(argv) -> exit code`."""
