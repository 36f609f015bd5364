"""Training runs that come with the tools: `unisono train --config NAME`."""
