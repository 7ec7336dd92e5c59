"""The plan: the value, how it is made, what it costs, and how it is shown. Opens nothing."""
