"""Full against cached: comparison, metrics, the report."""
