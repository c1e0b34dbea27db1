"""How the bundled models are trained. Not part of the package."""
