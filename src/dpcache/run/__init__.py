"""Following a schedule through a sampling loop: the generation, and how a pipeline is entered."""
