"""Pure functions of arrays, each in its recurrent and its parallel form. The two forms of an op share no code."""
