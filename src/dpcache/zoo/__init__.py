"""Small trained pipelines that ship with the package, in plain diffusers format."""
