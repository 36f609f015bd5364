"""Bad inputs to the command, drawn at random; `nox -s badinput` runs them."""
